"""Fluxes and their errors against the truth: of what changed, and of stars that did not."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cumbre.payloads.alert_production import DetectorResult
    from cumbre.site.quality_images import Case

FLUX_EDGES = (10.0, 25.0, 50.0, np.inf)


def forced_on_stars(case: Case, made: DetectorResult) -> dict[str, NDArray[Any]]:
    """Rows of DiaForcedSource at constant stars, as columns, with ``true_njy``; (n,) each."""
    from cumbre.payloads.alert_production import force_at
    from cumbre.site.quality_images import constant_stars

    truth = constant_stars(case)
    places = [
        {"diaObjectId": k, "ra": ra, "dec": dec}
        for k, (ra, dec) in enumerate(zip(truth["ra"].tolist(), truth["dec"].tolist(), strict=True))
    ]
    rows = force_at(made, places, processed_mjd_tai=0.0)
    names = "psfFlux", "psfFluxErr", "scienceFlux", "scienceFluxErr"
    out = {
        name: np.array([np.nan if r[name] is None else r[name] for r in rows], np.float64) for name in names
    }
    return out | {"true_njy": truth["flux_njy"][[r["diaObjectId"] for r in rows]] if rows else np.zeros(0)}


def _spread(values: NDArray[np.float64]) -> float | None:
    """Standard deviation of a normal distribution with the same quartiles."""
    return float(0.7413 * np.subtract(*np.percentile(values, [75, 25]))) if len(values) > 3 else None


def _middle(values: NDArray[np.float64]) -> float | None:
    return float(np.median(values)) if len(values) else None


def of_changes(truth: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Bias (median of measured / true − 1) and width of the pulls of what was found."""
    # Moving sources are trailed: their PSF flux is another quantity.
    use = (
        truth["is_found"]
        & np.isfinite(truth["flux_njy"])
        & (truth["kind"] != "asteroid")
        & truth["usable"].astype(bool)
    )
    bright = use & (truth["snr"] > 15)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = truth["flux_njy"] / truth["true_njy"] - 1
        pulls = (truth["flux_njy"] - truth["true_njy"]) / truth["flux_err_njy"]
    ratio = part[bright]
    # Near the threshold only upward noise is detected: pulls are those of sources found whatever the noise.
    pull = pulls[use & (truth["snr"] > 10)]
    rows = []
    for low, high in pairwise(FLUX_EDGES):
        here = use & (truth["snr"] >= low) & (truth["snr"] < high)
        rows.append(
            {"snr": low, "to": high if np.isfinite(high) else None, "n": int(here.sum()),
             "bias": _middle(part[here]), "pull_median": _middle(pulls[here]), "pull_width": _spread(pulls[here])}
        )  # fmt: skip
    return {
        "n": int(bright.sum()),
        "bias": _middle(ratio),
        "bias_err": float(1.2533 * np.std(ratio) / np.sqrt(len(ratio))) if len(ratio) else None,
        "n_pulls": len(pull),
        "pull_median": _middle(pull),
        "pull_width": _spread(pull),
        "pull_outliers": float((np.abs(pull) > 5).mean()) if len(pull) else None,
        "by_snr": rows,
    }


def of_stars(measured: list[dict[str, NDArray[Any]]]) -> dict[str, Any]:
    """Of constant stars, by signal-to-noise: ``scienceFlux`` against the truth, ``psfFlux`` against zero."""
    columns = {
        name: np.concatenate([stars[name] for stars in measured if stars] or [np.zeros(0)])
        for name in ("true_njy", "psfFlux", "psfFluxErr", "scienceFlux", "scienceFluxErr")
    }
    rows = []
    with np.errstate(invalid="ignore", divide="ignore"):
        snr = columns["true_njy"] / columns["scienceFluxErr"]
        part = columns["scienceFlux"] / columns["true_njy"] - 1
        science = (columns["scienceFlux"] - columns["true_njy"]) / columns["scienceFluxErr"]
        difference = columns["psfFlux"] / columns["psfFluxErr"]
    good = np.isfinite(science)
    for low, high in pairwise(FLUX_EDGES):
        here = good & (snr >= low) & (snr < high)
        both = here & np.isfinite(difference)
        rows.append(
            {"snr": low, "to": high if np.isfinite(high) else None, "n": int(here.sum()),
             "science_bias": _middle(part[here]), "science_pull_median": _middle(science[here]),
             "science_pull_width": _spread(science[here]), "difference_pull_median": _middle(difference[both]),
             "difference_pull_width": _spread(difference[both])}
        )  # fmt: skip
    bright = good & (snr >= FLUX_EDGES[0])
    return {
        "n": int(bright.sum()), "bias": _middle(part[bright]), "pull_width": _spread(science[bright]), "by_snr": rows
    }  # fmt: skip
