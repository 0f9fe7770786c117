"""Rows of Level 1 from light curves: one DiaObject a star, one DiaForcedSource a measurement."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.ids import source_id
from cumbre.payloads.lightcurve_run import Series

_BANDS = ("u", "g", "r", "i", "z", "y")


def object_ids(series: Series) -> NDArray[np.int64]:
    """(n,) identifiers of the stars: the first frame, its detector, and the star's number."""
    first = series.frames[0]
    visit, detector = int(first["exposure_id"]), int(first["detector"])
    return np.array([source_id(visit, detector, k) for k in range(series.ra.size)], np.int64)


def _median(series: Series) -> NDArray[np.float64]:
    """(n,) median flux of each star, electrons; NaN for one that was never measured."""
    flux = series.curves.flux
    out = np.full(flux.shape[0], np.nan)
    some = np.isfinite(flux).any(axis=1)
    out[some] = np.nanmedian(flux[some], axis=1)
    return out


def object_rows(series: Series, identifiers: NDArray[np.int64]) -> dict[str, Any]:
    """Columns of DiaObject."""
    rows: dict[str, Any] = {
        "diaObjectId": identifiers,
        "ra": series.ra,
        "dec": series.dec,
        "raErr": np.full(series.ra.size, series.position_error_deg, np.float32),
        "decErr": np.full(series.ra.size, series.position_error_deg, np.float32),
    }
    if series.band in _BANDS:
        rows[f"{series.band}_scienceFluxMean"] = (_median(series) * series.njy_per_electron).astype(
            np.float32
        )
    return rows


def rows_of_frame(series: Series, column: int, identifiers: NDArray[np.int64]) -> dict[str, Any]:
    """Columns of DiaForcedSource of one frame.

    ``scienceFlux`` is the star's median flux times its brightness relative to the ensemble, so clouds and air mass
    are out of it; ``psfFlux`` is the difference to the median, as in a difference image.
    """
    curves, frame = series.curves, series.frames[column]
    relative, error = curves.relative[:, column], curves.relative_err[:, column]
    level = _median(series) * series.njy_per_electron
    good = np.flatnonzero(np.isfinite(relative) & np.isfinite(level))
    visit, detector = int(frame["exposure_id"]), int(frame["detector"])
    sigma = (error[good] * level[good]).astype(np.float32)
    return {
        "diaForcedSourceId": np.array([source_id(visit, detector, int(k)) for k in good], np.int64),
        "diaObjectId": identifiers[good],
        "ra": series.ra[good],
        "dec": series.dec[good],
        "visit": np.full(good.size, visit, np.int64),
        "detector": np.full(good.size, detector, np.int64),
        "midpointMjdTai": np.full(good.size, curves.mjd_tai[column]),
        "scienceFlux": (relative[good] * level[good]).astype(np.float32),
        "scienceFluxErr": sigma,
        "psfFlux": ((relative[good] - 1) * level[good]).astype(np.float32),
        "psfFluxErr": sigma,
        "band": [series.band] * good.size,
    }
