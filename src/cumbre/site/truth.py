"""Completeness and purity of a night: Level 1 against what the simulator put into the sky.

Only reports and tests read the truth. A truth entry counts for completeness when its difference flux against
the template has an expected signal-to-noise above the limit and its pixels are usable; a detection counts for
purity when anything that changed or moved in the truth lies within the match radius.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MATCH_ARCSEC = 1.5
SNR_LIMIT = 8.0
VARIABLE = "variable"


@dataclass(frozen=True, slots=True)
class Score:
    """Counts above the limit, and per bin of magnitude."""

    n_truth: int
    n_found: int
    n_detections: int
    n_true_detections: int
    by_kind: dict[str, dict[str, int]]
    by_magnitude: list[dict[str, Any]]
    missed: list[dict[str, Any]]
    false: list[dict[str, Any]]

    @property
    def completeness(self) -> float | None:
        """Part of the transients (all that appeared or moved) that was found; None when there were none.

        Known stars that vary are counted apart, in ``by_kind``: what they need is their light curve.
        """
        kinds = [count for kind, count in self.by_kind.items() if kind != VARIABLE]
        total = sum(count["n"] for count in kinds)
        return sum(count["found"] for count in kinds) / total if total else None

    @property
    def purity(self) -> float | None:
        """Part of the detections that are true; None when there were none."""
        return self.n_true_detections / self.n_detections if self.n_detections else None


def _unit(ra_deg: NDArray[np.float64], dec_deg: NDArray[np.float64]) -> NDArray[np.float64]:
    ra, dec = np.radians(ra_deg), np.radians(dec_deg)
    return np.column_stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])


def _near(
    a: dict[str, NDArray[Any]], b: dict[str, NDArray[Any]]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """For each of ``a``: whether one of ``b`` lies within the radius, and which."""
    from scipy.spatial import cKDTree

    n = len(a["ra"])
    if n == 0 or len(b["ra"]) == 0:
        return np.zeros(n, dtype=bool), np.zeros(n, dtype=np.int64)
    tree = cKDTree(_unit(b["ra"], b["dec"]))
    limit = 2 * np.sin(np.radians(MATCH_ARCSEC / 3600) / 2)
    distance, index = tree.query(_unit(a["ra"], a["dec"]), distance_upper_bound=limit)
    return np.isfinite(distance), index


def score(
    pairs: list[tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]], *, snr_limit: float = SNR_LIMIT
) -> Score:
    """Score a night.

    Parameters
    ----------
    pairs
        One (truth, detections) per processed detector image: columns ra, dec (degrees), snr, mag (truth),
        ids, and optionally usable (truth): false where saturation or the edge forbids a measurement.
        Detections are the published ones.
    """
    edges = np.arange(15.0, 25.0, 0.5)
    total, found = np.zeros(len(edges)), np.zeros(len(edges))
    missed: list[dict[str, Any]] = []
    false: list[dict[str, Any]] = []
    by_kind: dict[str, dict[str, int]] = {}
    n_detections = n_true = 0
    for truth, detections in pairs:
        bright = truth["snr"] > snr_limit
        if "usable" in truth:
            bright &= truth["usable"].astype(bool)
        wanted = {name: values[bright] for name, values in truth.items()}
        hit, _ = _near(wanted, detections)
        bins = np.clip(np.digitize(wanted["mag"], edges) - 1, 0, len(edges) - 1)
        np.add.at(total, bins, 1)
        np.add.at(found, bins[hit], 1)
        for kind, was_found in zip(wanted.get("kind", np.full(len(hit), "transient")), hit, strict=True):
            count = by_kind.setdefault(str(kind), {"n": 0, "found": 0})
            count["n"] += 1
            count["found"] += int(was_found)
        missed += [{k: _plain(v[i]) for k, v in wanted.items()} for i in np.flatnonzero(~hit)]
        strong = {name: values[detections["snr"] > snr_limit] for name, values in detections.items()}
        real, _ = _near(strong, truth)
        n_detections += len(real)
        n_true += int(real.sum())
        false += [{k: _plain(v[i]) for k, v in strong.items()} for i in np.flatnonzero(~real)]
    rows = [
        {
            "mag": float(edges[i]),
            "n": int(total[i]),
            "found": int(found[i]),
            "completeness": found[i] / total[i],
        }
        for i in range(len(edges))
        if total[i]
    ]
    return Score(int(total.sum()), int(found.sum()), n_detections, n_true, by_kind, rows, missed, false)


def of_visit(exposures: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Truth of a visit from that of each of its exposures, all of one detector.

    What is on several of them is once in the visit: at the mean place, with the signal-to-noise ratio of the sum
    (noise of equal exposures is the same and independent), usable where it is in all. What only one of them has is
    taken as it is there.
    """
    if len(exposures) == 1:
        return exposures[0]
    every = {name: np.concatenate([table[name] for table in exposures]) for name in exposures[0]}
    _, first, which = np.unique(every["id"], return_index=True, return_inverse=True)
    n = len(first)
    count = np.bincount(which, minlength=n)
    out = {name: values[first] for name, values in every.items()}
    for name in ("ra", "dec", "x", "y", "mag"):
        # measured from the first: right ascensions may lie on both sides of 0
        away = every[name] - out[name][which]
        if name == "ra":
            away = (away + 180.0) % 360.0 - 180.0
        out[name] = out[name] + np.bincount(which, away, n) / count
    out["ra"] = out["ra"] % 360.0
    out["snr"] = np.bincount(which, every["snr"], n) / np.sqrt(float(len(exposures)))
    out["usable"] = np.bincount(which, every["usable"].astype(float), n) == count
    return out


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def injected(root: Path) -> dict[str, Any] | None:
    """Completeness of the planted sources of a site by magnitude; None when no visit carried any.

    Parameters
    ----------
    root
        Folder of the site.
    """
    from cumbre.orchestration.prompt_worker import INJECTED

    files = [json.loads(path.read_text()) for path in sorted((root / INJECTED).glob("*.json"))]
    fakes = [fake for item in files for fake in item["fakes"]]
    if not fakes:
        return None
    mag, found = np.array([f["mag"] for f in fakes]), np.array([f["found"] for f in fakes], bool)
    rows = []
    for low in np.arange(np.floor(mag.min() * 2) / 2, mag.max() + 0.01, 0.5):
        here = (mag >= low) & (mag < low + 0.5)
        if here.any():
            rows.append(
                {"mag": float(low), "n": int(here.sum()), "found": int(found[here].sum()),
                 "completeness": float(found[here].mean())}
            )  # fmt: skip
    return {
        "visits": len({item["visit"] for item in files}), "n": len(fakes), "found": int(found.sum()),
        "completeness": float(found.mean()), "by_magnitude": rows,
    }  # fmt: skip
