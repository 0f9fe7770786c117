"""Weights of the logistic reliability model: fitted to simulated images and a real pair, and measured.

    python benchmarks/reliability.py FOLDER --seeds 201 202        # measure
    python benchmarks/reliability.py FOLDER --seeds 111 112 113 114 115 --train --real PAIR

FOLDER keeps skies, calibrations, templates and raw frames; a second run renders nothing. Every seed is another
sky, camera and weather. Seeds below 200 train (rich skies); from 200 up they test, from 300 up on rich skies.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cumbre.site.quality import Record

FIRST_RICH_TEST_SEED = 300
LEAST_WEIGHTS = {"host": 1.3, "wide": 0.4}
"""The simulated skies have too few stars to teach these: faint detections in the wings of stars are noise."""


def run_seed(job: tuple[str, int, int, int]) -> list[Record]:
    """Process the images of one seed with the logistic model."""
    import cv2

    from cumbre.site import quality
    from cumbre.site.quality_images import FIRST_TEST_SEED, make_cases

    cv2.setNumThreads(1)
    folder, seed, detectors, visits = job
    rich = seed < FIRST_TEST_SEED or seed >= FIRST_RICH_TEST_SEED
    cases = make_cases(Path(folder), seed, detectors=detectors, visits=visits, rich=rich)
    return [quality.run_case(case, classifier="logistic") for case in cases]


def collect(folder: Path, seeds: list[int], detectors: int, visits: int, workers: int) -> list[Record]:
    """All records of all seeds."""
    jobs = [(str(folder), seed, detectors, visits) for seed in seeds]
    if workers <= 1:
        return [record for job in jobs for record in run_seed(job)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [record for records in pool.map(run_seed, jobs) for record in records]


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
    records: list[Record], real: dict[str, Any] | None, penalty: float
) -> tuple[float, NDArray[np.float64]]:
    """Bias and weights of least log-loss, none below its bound; classes, bright and faint sources weigh alike."""
    from dataclasses import fields

    from scipy.optimize import minimize

    from cumbre.payloads.kernels.classify import LIMIT, Features

    label = np.concatenate([r.label for r in records])
    features = np.concatenate([r.features for r in records])
    snr = np.concatenate([r.sources["snr"] for r in records])
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


def rescored(records: list[Record], bias: float, weights: NDArray[np.float64]) -> None:
    """Give every source the reliability that other coefficients say."""
    from cumbre.payloads.kernels.classify import LIMIT

    for record in records:
        logit = bias - np.clip(record.features[:, :-1], 0, LIMIT) @ weights
        score = 1.0 / (1.0 + np.exp(-logit))
        record.sources["reliability"] = np.where(record.features[:, -1] > 0, 0.0, score)


def report(records: list[Record], name: str) -> None:
    """Print completeness and purity above each limit, and what the false ones are."""
    from cumbre.site import quality

    data = quality.summarise(records)
    print(f"{name}: {data['n_images']} detector images, {data['seconds_per_image']:.2f} s each")
    for limit, row in data["above"].items():
        print(f"above {limit} sigma: completeness {row['completeness']:.1%} of {row['n']}")
        print(f"                purity {row['purity']:.1%} of {row['n_published']}; false: {row['false']}")


def main() -> None:
    from dataclasses import fields

    from cumbre.payloads.kernels import classify
    from cumbre.site.quality_images import FIRST_TEST_SEED

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
    args = parser.parse_args()
    if args.train and max(args.seeds) >= FIRST_TEST_SEED:
        parser.error(f"--train: seeds from {FIRST_TEST_SEED} up are kept for tests")
    bias, weights = classify.BIAS, np.array(classify.WEIGHTS)
    records = collect(args.folder, args.seeds, args.detectors, args.visits, args.workers)
    report(records, "as shipped")
    if args.train:
        bias, weights = train(records, real_pair(args.real) if args.real else None, args.penalty)
        print(f"BIAS = {bias:.2f}")
        for item, value in zip(fields(classify.Features), weights, strict=True):
            print(f"    {value:.2f},  # {item.name}")
        rescored(records, bias, weights)
        report(records, "trained")
    if args.test_seeds:
        test = collect(args.folder, args.test_seeds, args.detectors, args.visits, args.workers)
        rescored(test, bias, weights)
        report(test, "test seeds")


if __name__ == "__main__":
    main()
