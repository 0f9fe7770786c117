"""Quality of alerts, measured on simulated detector images against what the simulator put into the sky.

The whole payload runs from the raw file. ``expected signal-to-noise`` is the truth's: difference flux over the noise
of PSF photometry in the image and the mean of the template visits. A change of a bright star is judged against its
own systematic error too: ``SYSTEMATIC`` of the flux that is subtracted (``snr_total``).

Denominators. Completeness: everything in the truth that changed and whose place can be measured (``usable``: eight
pixels inside the edge, no defect within a pixel, not saturated in either image); ``completeness_all`` leaves that
condition out. Purity: published sources (reliability at least the configured one) of measured signal-to-noise above the
limit; one counts as true when something that changed or moved lies within ``MATCH_ARCSEC`` and has an expected
signal-to-noise of at least ``FAINTEST_SNR``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumbre.site.quality_fluxes import forced_on_stars, of_changes, of_stars

if TYPE_CHECKING:
    from cumbre.payloads.alert_production import DetectorResult
    from cumbre.payloads.processing import DifferenceResult
    from cumbre.site.quality_images import Case, Debris

MATCH_ARCSEC = 1.5
FAINTEST_SNR = 2.0
SYSTEMATIC = 0.01
"""Part of a star's flux by which a change must exceed the noise to be one: flat, PSF and zero point are not better."""
SNR_EDGES = (5.0, 6.0, 7.0, 8.0, 10.0, 15.0, 25.0, 50.0, 100.0, np.inf)
MAG_EDGES = tuple(np.arange(15.0, 24.01, 1.0))
LIMITS = (5.0, 6.0, 8.0, 10.0)
PUBLISHED: tuple[dict[str, Any], ...] = (
    {"size": "1k", "seeds": [309, 310], "detectors": 4, "visits": 4, "rich": True},
    {"size": "4k", "seeds": [405], "detectors": 1, "visits": 2, "rich": True},
)
"""What the figures of the documentation are made of."""
REAL, FALSE, UNSURE = 1, 0, -1
CLASSES = ("cosmic ray", "trail", "glint", "bright-star residual", "galaxy residual", "defect", "other")


@dataclass(slots=True)
class Record:
    """One processed detector image.

    Attributes
    ----------
    truth
        Columns of the truth, with ``snr_total`` added.
    sources
        Difference sources (``processing.SOURCE_DTYPE``), all of them.
    features
        As ``DifferenceResult.features``.
    label
        REAL, FALSE or UNSURE for each source.
    what
        Kind of the truth for real sources, one of ``CLASSES`` for false ones.
    flux_scale
        nJy of one unit of the sources' fluxes.
    stars
        Constant stars: true flux, and what forced photometry says on science image and difference; see
        :func:`cumbre.site.quality_fluxes.forced_on_stars`.
    """

    name: str
    truth: dict[str, NDArray[Any]]
    sources: NDArray[Any]
    features: NDArray[np.float64]
    label: NDArray[np.int8]
    what: NDArray[Any]
    flux_scale: float
    pixel_arcsec: float
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    wcs_error_mas: float = float("nan")
    stars: dict[str, NDArray[Any]] = field(default_factory=dict)
    stamps: NDArray[np.float32] | None = None
    reliability_version: str = ""


def nearest(
    ra: Any, dec: Any, other_ra: Any, other_dec: Any
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distance in arc seconds and index of the nearest other position (infinite when there is none)."""
    from scipy.spatial import cKDTree

    from cumbre.payloads.association import unit_vectors

    here, there = unit_vectors(ra, dec).reshape(-1, 3), unit_vectors(other_ra, other_dec).reshape(-1, 3)
    out, index = np.full(len(here), np.inf), np.zeros(len(here), np.int64)
    good, known = np.isfinite(here).all(axis=1), np.isfinite(there).all(axis=1)
    if not good.any() or not known.any():
        return out, index
    chord, near = cKDTree(there[known]).query(here[good])
    out[good] = np.degrees(2 * np.arcsin(np.minimum(chord / 2, 1))) * 3600
    index[good] = np.flatnonzero(known)[near]
    return out, index


def with_systematic(truth: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The truth with ``snr_total``, the signal-to-noise that the systematic error allows."""
    noise = np.abs(truth["delta_flux_e"]) / np.maximum(truth["snr"], 1e-9)
    before = np.maximum(truth["flux_e"] - truth["delta_flux_e"], 0.0)
    total = np.hypot(noise, SYSTEMATIC * before)
    return {**truth, "snr_total": np.abs(truth["delta_flux_e"]) / np.maximum(total, 1e-9)}


def run_case(
    case: Case, *, keep_stamps: bool = False, reliable: float = 0.5, classifier: str = "network"
) -> Record:
    """Process one image as the night does, and label every source by the truth.

    Parameters
    ----------
    keep_stamps
        Keep difference, science and template stamps (n, 3, 31, 31) of every source.
    reliable
        Reliability from which a source is published.
    classifier
        As ``DifferenceConfig.classifier``.
    """
    from cumbre.payloads.alert_production import produce
    from cumbre.payloads.difference import DifferenceConfig
    from cumbre.site.quality_images import debris

    begun = time.process_time()
    made = produce(
        case.raw, case.calibrations, case.template, case.reference, instrument=case.instrument,
        config=DifferenceConfig(reliable=reliable, classifier=classifier),
        processed_mjd_tai=float(case.request.mid_tai / 86400 + 40587),
    )  # fmt: skip
    seconds = time.process_time() - begun
    truth, sources = with_systematic(case.truth), made.result.sources
    label, what = labels(truth, sources, debris(case), made.result)
    stamps = None
    if keep_stamps:
        stamps = np.array(
            [list(made.result.stamps(s["x"], s["y"]).values()) for s in sources], np.float32
        ).reshape(-1, 3, 31, 31)
    return Record(
        name=case.name, truth=truth, sources=sources, features=made.result.features, label=label, what=what,
        flux_scale=made.exposure.njy_per_electron(), pixel_arcsec=made.exposure.metrics["pixel_scale_arcsec"],
        seconds=seconds, metrics={**made.exposure.metrics, **made.result.metrics},
        wcs_error_mas=_wcs_error_mas(case, made), stars=forced_on_stars(case, made), stamps=stamps,
        reliability_version=made.result.reliability_version,
    )  # fmt: skip


def _wcs_error_mas(case: Case, made: DetectorResult) -> float:
    """Root mean square per axis of fitted against true sky positions over a grid of pixels."""
    from cumbre.core.geometry import sky_from_pixel
    from cumbre.payloads.processing import sky_of

    detector, request = case.raw.detector, case.request
    x, y = (
        g.ravel()
        for g in np.meshgrid(np.linspace(20, detector.nx - 21, 9), np.linspace(20, detector.ny - 21, 9))
    )
    ra, dec = sky_from_pixel(case.instrument, detector, request.ra, request.dec, request.rotpa, x, y)
    got_ra, got_dec = sky_of(made.exposure.wcs, x, y)
    east = ((got_ra - ra + 180) % 360 - 180) * np.cos(np.radians(dec))
    return float(3.6e6 * np.sqrt(np.mean(east**2 + (got_dec - dec) ** 2) / 2))


def labels(
    truth: dict[str, NDArray[Any]], sources: NDArray[Any], junk: Debris, made: DifferenceResult
) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """REAL, FALSE or UNSURE, and what it is, for every source."""
    near, index = nearest(sources["ra"], sources["dec"], truth["ra"], truth["dec"])
    label = np.full(len(sources), FALSE, np.int8)
    if len(truth["ra"]):
        # A change too small to be seen is no reason for what was detected there.
        is_change = truth["snr"][index] >= FAINTEST_SNR
        label[(near < MATCH_ARCSEC) & is_change] = REAL
        label[(near < MATCH_ARCSEC) & is_change & ~truth["usable"][index]] = UNSURE
        label[(near >= MATCH_ARCSEC) & (near < 2 * MATCH_ARCSEC) & is_change] = UNSURE
    what = np.full(len(sources), "other", dtype=object)
    fwhm = made.metrics["science_fwhm_px"]
    radius = max(2, round(fwhm))
    for k, source in enumerate(sources):
        if label[k] != FALSE:
            what[k] = str(truth["kind"][index[k]])
            continue
        what[k] = _cause(source, junk, radius, fwhm)
    return label, what


def _cause(source: Any, junk: Debris, radius: int, fwhm: float) -> str:
    """What most likely made a false source."""
    x, y = round(float(source["x"])), round(float(source["y"]))
    box = np.s_[max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1]
    flux = max(abs(float(source["psfFlux"])), 1.0)
    if float(junk.cosmic_rays[box].sum()) > 0.2 * flux:
        return "cosmic ray"
    if float(junk.trail[box].sum()) > 0.2 * flux:
        return "trail"
    if len(junk.glints) and float(np.hypot(junk.glints[:, 0] - x, junk.glints[:, 1] - y).min()) < fwhm:
        return "glint"
    for table, name in ((junk.stars, "bright-star residual"), (junk.galaxies, "galaxy residual")):
        apart = np.hypot(table[:, 0] - x, table[:, 1] - y)
        # A star of a million electrons disturbs farther out than a faint one.
        reach = fwhm * (1.5 + np.log10(np.maximum(table[:, 2] / flux, 1.0)))
        if bool(((apart < reach) & (table[:, 2] > 2 * flux)).any()):
            return name
    return "defect" if bool(junk.defects[box].any()) else "other"


@dataclass(frozen=True, slots=True)
class Job:
    """Images of one seed to measure; see :func:`cumbre.site.quality_images.make_cases`."""

    folder: str
    seed: int
    size: str = "1k"
    rich: bool = False
    detectors: int = 4
    visits: int = 4


def records_of(job: Job) -> list[Record]:
    """Process the images of one job (in a worker process)."""
    import cv2

    from cumbre.site.quality_images import make_cases

    cv2.setNumThreads(1)
    cases = make_cases(
        Path(job.folder), job.seed, detectors=job.detectors, visits=job.visits, size=job.size, rich=job.rich
    )
    return [run_case(case) for case in cases]


def measure(jobs: list[Job], *, workers: int = 1, reliable: float = 0.5) -> dict[str, Any]:
    """Process all jobs and summarise them."""
    if workers <= 1 or len(jobs) == 1:
        records = [record for job in jobs for record in records_of(job)]
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            records = [record for some in pool.map(records_of, jobs) for record in some]
    return summarise(records, reliable=reliable)


def published(record: Record, reliable: float) -> NDArray[np.bool_]:
    """Sources that would be alerts without the flag of glints."""
    return np.asarray((record.sources["reliability"] >= reliable) & ~record.sources["flagGlintTrail"])


def summarise(records: Iterable[Record], *, reliable: float = 0.5) -> dict[str, Any]:
    """All numbers of the report."""
    listed = list(records)
    truths = [_matched(record, reliable) for record in listed]
    truth = {key: np.concatenate([t[key] for t in truths]) for key in truths[0]} if truths else {}
    detections = _detections(listed, reliable)
    return {
        "n_images": len(listed),
        "seconds_per_image": float(np.mean([r.seconds for r in listed])) if listed else None,
        "reliability_version": listed[0].reliability_version if listed else None,
        "reliability_threshold": reliable,
        "above": {f"{limit:g}": _above(truth, detections, limit) for limit in LIMITS},
        "by_snr": _bins(truth, detections, "snr", SNR_EDGES),
        "by_magnitude": _bins(truth, None, "mag", MAG_EDGES),
        "by_kind": _kinds(truth),
        "rejected": _classes(listed, reliable),
        "curves": _curves(listed),
        "flux": of_changes(truth) | {"stars": of_stars([r.stars for r in listed])},
        "astrometry_mas": _astrometry(listed, truth),
    }


def _matched(record: Record, reliable: float) -> dict[str, NDArray[Any]]:
    """The truth with what was found at each place: any source, a published one, its fluxes and place."""
    t, sources = record.truth, record.sources
    good = published(record, reliable)
    seen, _ = nearest(t["ra"], t["dec"], sources["ra"], sources["dec"])
    near, index = nearest(t["ra"], t["dec"], sources["ra"][good], sources["dec"][good])
    found = near < MATCH_ARCSEC
    out = dict(t) | {"is_detected": seen < MATCH_ARCSEC, "is_found": found}
    rows = sources[good][index] if good.any() else np.zeros(len(found), sources.dtype)
    scale = record.flux_scale
    with np.errstate(divide="ignore", invalid="ignore"):
        true_njy = 3631e9 * 10 ** (-0.4 * t["mag"]) * t["delta_flux_e"] / t["flux_e"]
    out["true_njy"] = true_njy
    out["flux_njy"] = np.where(found, rows["psfFlux"] * scale, np.nan)
    out["flux_err_njy"] = np.where(found, rows["psfFluxErr"] * scale, np.nan)
    east = ((rows["ra"] - t["ra"] + 180) % 360 - 180) * np.cos(np.radians(t["dec"]))
    out["east_mas"] = np.where(found, 3.6e6 * east, np.nan)
    out["north_mas"] = np.where(found, 3.6e6 * (rows["dec"] - t["dec"]), np.nan)
    out["image"] = np.full(len(found), record.name, dtype=object)
    return out


def _detections(records: list[Record], reliable: float) -> dict[str, NDArray[Any]]:
    keep = [published(r, reliable) for r in records]
    return {
        "snr": np.concatenate([r.sources["snr"][k] for r, k in zip(records, keep, strict=True)] or [np.zeros(0)]),
        "is_false": np.concatenate(
            [r.label[k] == FALSE for r, k in zip(records, keep, strict=True)] or [np.zeros(0, bool)]
        ),
        "what": np.concatenate([r.what[k] for r, k in zip(records, keep, strict=True)] or [np.zeros(0, object)]),
    }  # fmt: skip


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _above(
    truth: dict[str, NDArray[Any]], detections: dict[str, NDArray[Any]], limit: float
) -> dict[str, Any]:
    strong = truth["snr_total"] > limit
    wanted = strong & truth["usable"].astype(bool)
    some = detections["snr"] > limit
    false = some & detections["is_false"]
    return {
        "n": int(wanted.sum()),
        "completeness": _ratio(int(truth["is_found"][wanted].sum()), int(wanted.sum())),
        "completeness_all": _ratio(int(truth["is_found"][strong].sum()), int(strong.sum())),
        "detected": _ratio(int(truth["is_detected"][wanted].sum()), int(wanted.sum())),
        "n_published": int(some.sum()),
        "n_false": int(false.sum()),
        "purity": _ratio(int((some & ~detections["is_false"]).sum()), int(some.sum())),
        "false": dict(Counter(detections["what"][false].tolist())),
    }


def _bins(
    truth: dict[str, NDArray[Any]],
    detections: dict[str, NDArray[Any]] | None,
    name: str,
    edges: tuple[float, ...],
) -> list[dict[str, Any]]:
    rows = []
    usable = truth["usable"].astype(bool) & (truth["snr_total"] > SNR_EDGES[0])
    values = truth["snr_total" if name == "snr" else name]
    for low, high in pairwise(edges):
        here = usable & (values >= low) & (values < high)
        row: dict[str, Any] = {
            name: float(low), "to": float(high) if np.isfinite(high) else None, "n": int(here.sum()),
            "found": int(truth["is_found"][here].sum()),
            "completeness": _ratio(int(truth["is_found"][here].sum()), int(here.sum())),
        }  # fmt: skip
        if detections is not None:
            some = (detections["snr"] >= low) & (detections["snr"] < high)
            false = int((some & detections["is_false"]).sum())
            row |= {
                "n_published": int(some.sum()),
                "purity": _ratio(int(some.sum()) - false, int(some.sum())),
            }
        if row["n"] or row.get("n_published"):
            rows.append(row)
    return rows


def _kinds(truth: dict[str, NDArray[Any]]) -> dict[str, Any]:
    out = {}
    usable = truth["usable"].astype(bool)
    for kind in sorted(set(truth["kind"].tolist())):
        row = {}
        for limit in LIMITS:
            here = usable & (truth["kind"] == kind) & (truth["snr_total"] > limit)
            row[f"{limit:g}"] = {
                "n": int(here.sum()), "found": int(truth["is_found"][here].sum()),
                "completeness": _ratio(int(truth["is_found"][here].sum()), int(here.sum())),
            }  # fmt: skip
        out[str(kind)] = row
    return out


def _classes(records: list[Record], reliable: float) -> dict[str, Any]:
    """Detections above 5 sigma that are nothing real: how many of each class, and how many were published."""
    out = {}
    for name in CLASSES:
        made = sum(int(((r.label == FALSE) & (r.what == name)).sum()) for r in records)
        sent = sum(
            int(((r.label == FALSE) & (r.what == name) & published(r, reliable)).sum()) for r in records
        )
        out[name] = {"n": made, "published": sent, "rejected": _ratio(made - sent, made)}
    return out


def _curves(records: list[Record]) -> dict[str, list[list[float]]]:
    """Per class: [threshold, part of its detections with at least that reliability]."""
    if not records:
        return {}
    label = np.concatenate([r.label for r in records])
    what = np.concatenate([r.what for r in records])
    score = np.concatenate([r.sources["reliability"] for r in records])
    out = {}
    for name in sorted(set(what[label != UNSURE].tolist())):
        mine = score[(what == name) & (label != UNSURE)]
        out[str(name)] = [
            [round(float(t), 2), round(float((mine >= t).mean()), 4)] for t in np.linspace(0, 1, 21)
        ]
    return out


def _astrometry(records: list[Record], truth: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """In mas per axis: stars against the reference, the WCS against the true geometry, sources against the truth."""
    bright = truth["is_found"] & (truth["snr"] > 30) & np.isfinite(truth["east_mas"])
    axes = np.concatenate([truth["east_mas"][bright], truth["north_mas"][bright]])
    return {
        "stars_vs_reference": float(np.median([1e3 * r.metrics["astrometric_rms_arcsec"] for r in records])) if records else None,
        "wcs_vs_truth": float(np.median([r.wcs_error_mas for r in records])) if records else None,
        "sources_vs_truth_snr30": float(1.4826 * np.median(np.abs(axes))) if len(axes) else None,
        "n_sources_snr30": int(bright.sum()),
    }  # fmt: skip
