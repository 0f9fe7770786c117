"""The repository: a real Data Butler for each place that keeps images, written by one service.

In: ``Image.hop`` of kind ``written`` (summit) or ``at_archive`` (archive), raw files. Out: datasets ``raw``,
exposures and visits in the registry; ``OODS.imageInOODS`` for each file, ``OODS.imageComplete`` for each image,
``Image.hop`` of kind ``ingested_oods`` or ``ingested_embargo`` for each detector. Calibrations and templates
are datasets too (:mod:`cumbre.repository.calibrations`). A user's ``butler`` and ``pipetask`` commands work on
these repositories. Nothing here imports the middleware before it is needed.

Serves the observatory operations data service (OODS), the embargo ingest, and retention.
"""
