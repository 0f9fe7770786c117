"""The reference catalogue: what earlier surveys would know of this sky, with their errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cumbre.simulator.catalogue import Table, write_table
from cumbre.simulator.randomness import generator

FAINTEST_MAG_R = 20.5
POSITION_ERROR_MAS = 5.0
MAG_ERROR = 0.01
VARIABLES_KEPT = 0.1
"""Part of the variable stars that an earlier survey did not recognise."""


def reference_catalogue(stars: Table, seed: int) -> Table:
    """Stars brighter than r = 20.5 with catalogue noise, sorted by ra.

    Returns
    -------
    dict of arrays
        ``id``; ``ra``, ``dec`` (degrees) with ``ra_err``, ``dec_err`` (degrees on the sky); ``mag_g``,
        ``mag_r``, ``mag_i`` (AB) with ``mag_g_err``, ``mag_r_err``, ``mag_i_err``.
    """
    rng = generator(seed, "refcat")
    known = (stars["variable_kind"] == 0) | (rng.uniform(size=stars["id"].size) < VARIABLES_KEPT)
    index = np.flatnonzero((stars["mag_r"] < FAINTEST_MAG_R) & known)
    n = index.size
    error_deg = POSITION_ERROR_MAS / 3.6e6
    dec = stars["dec"][index] + rng.normal(0, error_deg, n)
    ra = stars["ra"][index] + rng.normal(0, error_deg, n) / np.cos(np.deg2rad(dec))
    ra = np.mod(ra, 360.0)
    order = np.argsort(ra, kind="stable")
    out: Table = {
        "id": stars["id"][index][order],
        "ra": ra[order],
        "dec": dec[order],
        "ra_err": np.full(n, error_deg),
        "dec_err": np.full(n, error_deg),
    }
    for band in ("g", "r", "i"):
        out[f"mag_{band}"] = (stars[f"mag_{band}"][index] + rng.normal(0, MAG_ERROR, n))[order]
        out[f"mag_{band}_err"] = np.full(n, MAG_ERROR)
    return out


def write_reference_catalogue(path: Path, stars: Table, seed: int) -> int:
    """Write the catalogue as parquet, atomically; gives the number of stars."""
    table = reference_catalogue(stars, seed)
    write_table(table, path, {"epoch": "2016.0", "frame": "ICRS", "proper_motion": "none"})
    return int(table["id"].size)
