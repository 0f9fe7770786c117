"""Completeness, purity and training of the logistic reliability on simulated detector images of known truth.

    python benchmarks/reliability.py FOLDER --seeds 201 202        # measure
    python benchmarks/reliability.py FOLDER --seeds 111 112 113 114 115 --train --real PAIR

FOLDER keeps skies, calibrations, templates and raw frames; a second run renders nothing. Every seed is another
sky, camera and weather. Seeds below 200 train (rich skies); from 200 up they test, from 300 up on rich skies.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

MATCH_ARCSEC = 1.5
LIMITS = (6.0, 8.0, 10.0)
FIRST_TEST_SEED = 200
FIRST_RICH_TEST_SEED = 300
LEAST_WEIGHTS = {"host": 1.3, "wide": 0.4}
"""The simulated skies have too few stars to teach these: faint detections in the wings of stars are noise."""


def make_images(
    folder: Path, seed: int, detectors: int, visits: int
) -> Iterator[tuple[str, Any, Any, Any, Any, Any, dict[str, NDArray[Any]]]]:
    """Render what is missing of one seed's tile; yield (name, raw, calibrations, template, refcat, instrument, truth)."""
    from cumbre.site.quality_images import make_cases

    rich = seed < FIRST_TEST_SEED or seed >= FIRST_RICH_TEST_SEED
    for case in make_cases(folder, seed, detectors=detectors, visits=visits, rich=rich):
        yield (
            case.name, case.raw, case.calibrations, case.template, case.reference, case.instrument, case.truth,
        )  # fmt: skip


def match(
    a: dict[str, NDArray[Any]], ra: NDArray[np.float64], dec: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distance (arcsec) and index of the nearest of (ra, dec) for each of ``a``."""
    if len(ra) == 0 or len(a["ra"]) == 0:
        return np.full(len(a["ra"]), np.inf), np.zeros(len(a["ra"]), np.int64)
    scale = np.cos(np.radians(np.median(dec)))
    dx = (np.asarray(a["ra"], float)[:, None] - ra) * scale * 3600
    dy = (np.asarray(a["dec"], float)[:, None] - dec) * 3600
    distance = np.hypot(dx, dy)
    return distance.min(axis=1), distance.argmin(axis=1)


def run_seed(job: tuple[str, int, int, int], classifier: str = "logistic") -> list[dict[str, Any]]:
    """Process the images of one seed; one record a detector image."""
    import cv2

    from cumbre.payloads.alert_production import produce
    from cumbre.payloads.difference import DifferenceConfig

    cv2.setNumThreads(1)
    folder, seed, detectors, visits = job
    out = []
    for name, raw, calibrations, template, reference, instrument, truth in make_images(
        Path(folder), seed, detectors, visits
    ):
        begun = time.monotonic()
        made = produce(
            raw, calibrations, template, reference, instrument=instrument,
            config=DifferenceConfig(classifier=classifier),
        )  # fmt: skip
        sources = made.result.sources
        out.append(
            {
                "name": name,
                "truth": truth,
                "sources": sources,
                "features": made.result.features,
                "seconds": time.monotonic() - begun,
                "fwhm": made.result.metrics["science_fwhm_px"],
                "metrics": made.result.metrics,
            }
        )
    return out


def collect(
    folder: Path, seeds: list[int], detectors: int, visits: int, workers: int
) -> list[dict[str, Any]]:
    """All records of all seeds."""
    jobs = [(str(folder), seed, detectors, visits) for seed in seeds]
    if workers <= 1:
        return [record for job in jobs for record in run_seed(job)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [record for records in pool.map(run_seed, jobs) for record in records]


def labels(record: dict[str, Any]) -> NDArray[np.int8]:
    """1 for a detection of something that changed, 0 for one without any, −1 where neither is certain."""
    sources, truth = record["sources"], record["truth"]
    distance, index = match(sources, truth["ra"], truth["dec"])
    out = np.where(distance < MATCH_ARCSEC, 1, np.where(distance < 2 * MATCH_ARCSEC, -1, 0)).astype(np.int8)
    if len(truth["ra"]):
        faint = (distance < MATCH_ARCSEC) & ((truth["snr"][index] < 4.0) | ~truth["usable"][index])
        out[faint] = -1
    return out


def real_pair(folder: Path) -> dict[str, Any]:
    """A real pair with planted sources: ``2.fits.fz``, reference ``1.fits.fz``, ``truth_new_sources.ecsv`` (x, y)."""
    from astropy.table import Table

    from cumbre.payloads.difference import DifferenceConfig
    from cumbre.payloads.image_input import load_exposure
    from cumbre.payloads.image_stack import align_to
    from cumbre.payloads.processing import process_pair

    science, reference = load_exposure(folder / "2.fits.fz"), load_exposure(folder / "1.fits.fz")
    template = align_to(science, reference, name="1.fits.fz")
    result = process_pair(science, template, DifferenceConfig(classifier="logistic"))
    planted, sources = Table.read(folder / "truth_new_sources.ecsv"), result.sources
    apart = np.hypot(
        sources["x"][:, None] - np.asarray(planted["x"]), sources["y"][:, None] - np.asarray(planted["y"])
    )
    return {"features": result.features, "label": (apart.min(axis=1) < 2) & ~sources["isNegative"]}


def train(
    records: list[dict[str, Any]], real: dict[str, Any] | None, penalty: float
) -> tuple[float, NDArray[np.float64]]:
    """Bias and weights of least log-loss, none below its bound; classes, bright and faint sources weigh alike."""
    from dataclasses import fields

    from scipy.optimize import minimize

    from cumbre.payloads.kernels.classify import LIMIT, Features

    label = np.concatenate([labels(r) for r in records])
    features = np.concatenate([r["features"] for r in records])
    snr = np.concatenate([r["sources"]["snr"] for r in records])
    good = (label >= 0) & (features[:, -1] == 0) & np.isfinite(features).all(axis=1)
    x, y, bright = features[good, :-1], label[good] > 0, snr[good] > 8
    weight = np.zeros(len(y))
    for group in (y & bright, y & ~bright, ~y & bright, ~y & ~bright):
        weight[group] = 1.0 / max(int(group.sum()), 1)
    if real is not None:
        # Planted sources count three times: few images teach what real PSFs are like. The others are not all
        # false, some are real variables, and count less.
        free = real["features"][:, -1] == 0
        planted = real["label"][free]
        share = np.where(planted, 3.0 / max(planted.sum(), 1), 0.9 / max((~planted).sum(), 1))
        x, y = np.concatenate([x, real["features"][free, :-1]]), np.concatenate([y, planted])
        weight = np.concatenate([weight, share])
    x, sign = np.clip(x, 0, LIMIT), np.where(y, 1.0, -1.0)

    def loss(p: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin = sign * (p[0] - x @ p[1:])
        slope = -weight * sign / (1.0 + np.exp(np.clip(margin, -500, 500)))
        value = float((weight * np.logaddexp(0, -margin)).sum()) + penalty * float((p[1:] ** 2).sum())
        return value, np.concatenate([[slope.sum()], -(slope @ x) + 2 * penalty * p[1:]])

    least = [LEAST_WEIGHTS.get(f.name, 0.0) for f in fields(Features)]
    start = np.concatenate([[4.0], np.ones(len(least))])
    bounds = [(None, None), *((low, None) for low in least)]
    fitted = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 5000})
    print(f"trained on {int(y.sum())} real and {int((~y).sum())} false detections, loss {fitted.fun:.4f}")
    return float(fitted.x[0]), np.asarray(fitted.x[1:])


def scores(record: dict[str, Any], bias: float, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Reliability of a record's sources with other coefficients."""
    from cumbre.payloads.kernels.classify import LIMIT

    features = record["features"]
    logit = bias - np.clip(features[:, :-1], 0, LIMIT) @ weights
    return np.where(features[:, -1] > 0, 0.0, 1.0 / (1.0 + np.exp(-logit)))


def cause(source: Any) -> str:
    """Word for what a false detection most likely is."""
    from cumbre.payloads.exposure import MaskPlane

    if source["flagStreak"]:
        return "trail"
    if abs(source["templateFlux"]) > 0.5 * abs(source["psfFlux"]) or source["isNegative"]:
        return "bright star or galaxy"
    if source["pixelFlags"] & int(MaskPlane.SAT | MaskPlane.SAT_TEMPLATE):
        return "saturation"
    return "cosmic ray or noise in the dark"


def report(
    records: list[dict[str, Any]], bias: float, weights: NDArray[np.float64], *, verbose: bool = False
) -> dict[str, float]:
    """Print completeness and purity; return those above 8 sigma."""
    from dataclasses import fields

    from cumbre.payloads.kernels.classify import Features

    names = [f.name for f in fields(Features)]
    out: dict[str, float] = {}
    for limit in LIMITS:
        wanted: Counter[str] = Counter()
        found: Counter[str] = Counter()
        falses: Counter[str] = Counter()
        n_published = 0
        for record in records:
            truth, sources = record["truth"], record["sources"]
            score = scores(record, bias, weights)
            published = sources[score >= 0.5]
            distance, _ = match(truth, published["ra"], published["dec"])
            any_distance, any_index = match(truth, sources["ra"], sources["dec"])
            for k in np.flatnonzero((truth["snr"] > limit) & truth["usable"]):
                wanted[truth["kind"][k]] += 1
                found[truth["kind"][k]] += int(distance[k] < MATCH_ARCSEC)
                if verbose and limit == 8.0 and distance[k] >= MATCH_ARCSEC:
                    seen = any_distance[k] < MATCH_ARCSEC
                    values = record["features"][any_index[k]] if seen else []
                    flags = int(sources["pixelFlagsCentre"][any_index[k]]) if seen else -1
                    print(
                        f"  missed {record['name']} {truth['kind'][k]} mag {truth['mag'][k]:.2f} snr {truth['snr'][k]:.0f}"
                        f" x {truth['x'][k]:.0f} y {truth['y'][k]:.0f} flags {flags} "
                        + " ".join(
                            f"{n}={v:.2f}"
                            for n, v in zip([*names, "rejected"], values, strict=False)
                            if v > 0.05
                        )
                    )
            near, _ = match(published, truth["ra"], truth["dec"])
            strong = published["snr"] > limit
            n_published += int(strong.sum())
            for k in np.flatnonzero(strong & (near >= MATCH_ARCSEC)):
                row = np.flatnonzero(score >= 0.5)[k]
                why = cause(published[k])
                falses[why] += 1
                if verbose and limit == 8.0:
                    print(
                        f"  false {record['name']} {why} snr {published['snr'][k]:.0f} x {published['x'][k]:.0f}"
                        f" y {published['y'][k]:.0f} flags {int(published['pixelFlags'][k])} "
                        + " ".join(
                            f"{n}={v:.2f}"
                            for n, v in zip(names, record["features"][row], strict=False)
                            if v > 0.05
                        )
                    )
        total, n_false = sum(wanted.values()), sum(falses.values())
        completeness = sum(found.values()) / max(total, 1)
        purity = 1 - n_false / max(n_published, 1)
        kinds = ", ".join(f"{k} {found[k]}/{wanted[k]}" for k in sorted(wanted))
        print(f"above {limit:g} sigma: completeness {completeness:.1%} of {total} ({kinds})")
        print(f"                purity {purity:.1%} of {n_published}; false: {dict(falses)}")
        if limit == 8.0:
            out = {"completeness": completeness, "purity": purity, "n": total, "n_published": n_published}
    return out


def main() -> None:
    from dataclasses import fields

    from cumbre.payloads.kernels import classify

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--test-seeds", type=int, nargs="*", default=[])
    parser.add_argument("--detectors", type=int, default=2)
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--penalty", type=float, default=2e-3)
    parser.add_argument("--real", type=Path, help="folder of a real pair with planted sources")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    bias, weights = classify.BIAS, np.array(classify.WEIGHTS)
    records = collect(args.folder, args.seeds, args.detectors, args.visits, args.workers)
    print(f"{len(records)} detector images, {np.mean([r['seconds'] for r in records]):.2f} s each")
    report(records, bias, weights, verbose=args.verbose and not args.train)
    if args.train:
        if max(args.seeds) >= FIRST_TEST_SEED:
            parser.error(f"--train: seeds from {FIRST_TEST_SEED} up are kept for tests")
        bias, weights = train(records, real_pair(args.real) if args.real else None, args.penalty)
        print(f"BIAS = {bias:.2f}")
        for item, value in zip(fields(classify.Features), weights, strict=True):
            print(f"    {value:.2f},  # {item.name}")
        report(records, bias, weights, verbose=args.verbose)
    if args.test_seeds:
        print("test seeds")
        test = collect(args.folder, args.test_seeds, args.detectors, args.visits, args.workers)
        report(test, bias, weights, verbose=args.verbose)


if __name__ == "__main__":
    main()
