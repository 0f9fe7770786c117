"""Pipelines of middleware tasks over the payloads: the same functions that the prompt worker calls, on a repository.

In: raws, calibrations, reference stars and templates as datasets of a Butler repository. Out: calibrated images,
difference images, sources, objects, forced photometry, alert packets and quality numbers as datasets. A task holds
connections, configuration and nothing else; what is done to pixels stands in :mod:`cumbre.payloads`. Run them with
``pipetask``, or with any executor of ``lsst.pipe.base``. Serves E1, E2, E13.
"""
