"""Known solar-system objects: from an orbit catalogue to where each of them is in one image.

In: orbit files (MPCORB.DAT, the Minor Planet Center's JSON). Out: a table of a night's motion of every object
(:mod:`~cumbre.payloads.solar_system.night`), predicted places for one image, and SSSource rows of the sources that
are such an object. Orbits are integrated under the Sun, eight planets and the Moon; nothing is fetched.
"""
