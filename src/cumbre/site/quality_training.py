"""Examples for the reliability network: simulated detector images and real ones, both with planted sources.

Simulated images give every class (their truth knows cosmic rays, trails, residuals), planted transients and variables
give numbers. Real pairs give what a simulator's PSF has not: there only what was planted counts as real, and what was
found elsewhere counts as false, with a lower weight, for some of it may be real.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumbre.payloads import injection
from cumbre.payloads.difference import DifferenceConfig
from cumbre.payloads.realbogus import SCALARS
from cumbre.payloads.training import Examples, joined
from cumbre.site import quality
from cumbre.site.quality_images import Case, debris, make_cases

if TYPE_CHECKING:
    from cumbre.payloads.exposure import Exposure
    from cumbre.payloads.processing import DifferenceResult

PLANTED = injection.InjectionConfig(transients=40, variables=30, snr=(4.5, 150.0))
PLANTED_IN_REAL = injection.InjectionConfig(transients=120, variables=40, snr=(6.0, 250.0), apart_fwhm=6.0)
REAL_FALSE_WEIGHT = 0.3
FAINTEST = 4.0
MORE_HITS = 8
"""Particles added after their rejection, in units of an exposure's own."""


@dataclass(frozen=True, slots=True)
class Job:
    """Images of one seed, or one real pair (``science``, ``template``).

    ``known`` is a table with columns x, y of real new sources in ``science``: no examples are made of them.
    """

    folder: str
    seed: int
    size: str = "1k"
    rich: bool = True
    detectors: int = 4
    visits: int = 5
    science: str = ""
    template: str = ""
    known: str = ""


def examples_of(job: Job) -> Examples:
    """Examples of one job (in a worker process)."""
    import cv2

    cv2.setNumThreads(1)
    if job.science:
        return _real_pair(job)
    cases = make_cases(
        Path(job.folder), job.seed, detectors=job.detectors, visits=job.visits, size=job.size, rich=job.rich
    )
    return joined([_simulated(case) for case in cases])


def collect(jobs: list[Job], *, workers: int = 2) -> Examples:
    """Examples of all jobs, in their order."""
    if workers <= 1 or len(jobs) == 1:
        return joined([examples_of(job) for job in jobs])
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return joined(list(pool.map(examples_of, jobs)))


def _simulated(case: Case) -> Examples:
    from cumbre.payloads.alert_production import warp_template
    from cumbre.payloads.calibrate import calibrate
    from cumbre.payloads.isr import assemble_and_correct
    from cumbre.payloads.processing import process_pair

    exposure = calibrate(
        assemble_and_correct(case.raw, case.calibrations), case.reference, instrument=case.instrument
    )
    rng = injection.seed_of("training", case.name)
    fakes = injection.plan(exposure, rng, PLANTED)
    # Nothing is planted on what changes anyway: the label would be of both.
    truth = quality.with_systematic(case.truth)
    fakes = fakes[_distance(fakes, truth["x"], truth["y"]) > 10] if len(truth["x"]) else fakes
    planted = injection.plant(exposure, fakes, rng)
    hits = _with_hits(planted, case, rng)
    result = process_pair(
        planted, warp_template(case.template, planted), DifferenceConfig(classifier="logistic")
    )
    label, what = quality.labels(truth, result.sources, debris(case), result)
    near, index = quality.nearest(result.sources["ra"], result.sources["dec"], truth["ra"], truth["dec"])
    if len(truth["ra"]):
        weak = (
            (label == quality.REAL) & (near < quality.MATCH_ARCSEC) & (truth["snr_total"][index] < FAINTEST)
        )
        label[weak] = quality.UNSURE
    _label_planted(result, planted, fakes, label, what)
    _label_hits(result, hits, label, what)
    return _examples(result, label, what)


def _with_hits(planted: Exposure, case: Case, rng: np.random.Generator) -> NDArray[np.float32]:
    """Add particles that no rejection has seen, in place; returns their electrons."""
    from cumbre.simulator.render import add_cosmic_rays

    hits = np.zeros(planted.shape, np.float32)
    add_cosmic_rays(hits, case.raw.detector, MORE_HITS * case.request.exposure_s, rng)
    planted.image += hits
    planted.variance += hits
    return hits


def _label_hits(
    result: DifferenceResult, hits: NDArray[np.float32], label: NDArray[np.int8], what: NDArray[Any]
) -> None:
    """Sources made of planted particles are false; real ones that were struck are unsure."""
    radius = max(2, round(result.metrics["science_fwhm_px"]))
    for k, source in enumerate(result.sources):
        x, y = round(float(source["x"])), round(float(source["y"]))
        charge = float(hits[max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1].sum())
        if charge > 0.2 * abs(float(source["psfFlux"])):
            is_real = label[k] != quality.FALSE
            label[k], what[k] = (quality.UNSURE, what[k]) if is_real else (quality.FALSE, "planted particle")


def _distance(rows: NDArray[Any], x: Any, y: Any) -> NDArray[np.float64]:
    apart = np.hypot(rows["x"][:, None] - np.asarray(x)[None], rows["y"][:, None] - np.asarray(y)[None])
    return np.asarray(apart.min(axis=1))


def _label_planted(
    result: DifferenceResult,
    planted: Exposure,
    fakes: NDArray[Any],
    label: NDArray[np.int8],
    what: NDArray[Any],
) -> None:
    """Sources at planted places are real; those nearby, or at changes lost in the star's own error, are unsure."""
    sources, fwhm = result.sources, planted.psf.fwhm_px
    for fake in fakes:
        apart = np.hypot(sources["x"] - fake["x"], sources["y"] - fake["y"])
        here = (apart < max(0.6 * fwhm, 1.2)) & (sources["isNegative"] == (fake["flux"] < 0))
        label[apart < 2.5 * fwhm] = quality.UNSURE
        star = 0.0
        if fake["is_variable"]:
            listed = planted.metadata["stars"]
            star = float(
                listed["flux"][np.argmin(np.hypot(listed["x"] - fake["x"], listed["y"] - fake["y"]))]
            )
        noise = abs(float(fake["flux"])) / max(float(fake["snr"]), 1e-9)
        total = abs(float(fake["flux"])) / float(np.hypot(noise, quality.SYSTEMATIC * star))
        if total > FAINTEST:
            label[here] = quality.REAL
            what[here] = "planted variable" if fake["is_variable"] else "planted transient"


def _examples(
    result: DifferenceResult, label: NDArray[np.int8], what: NDArray[Any], weight: float = 1.0
) -> Examples:
    # What a hard rule rejects needs no network.
    use = (label != quality.UNSURE) & (result.features[:, -1] == 0)
    real = label[use] == quality.REAL
    return Examples(
        result.inputs[use],
        real,
        what[use],
        result.sources["snr"][use].astype(float),
        np.where(real, 1.0, weight),
    )


def _real_pair(job: Job) -> Examples:
    """A real pair of images with planted sources."""
    from astropy.table import Table

    from cumbre.payloads.difference import find_stars, measure_psf
    from cumbre.payloads.image_input import load_exposure
    from cumbre.payloads.image_stack import align_to
    from cumbre.payloads.processing import process_pair

    science_path, template_path = Path(job.science), Path(job.template)
    science, reference = load_exposure(science_path), load_exposure(template_path)
    template = align_to(science, reference, name=template_path.name)
    stars = find_stars(science)
    science.psf = measure_psf(science, stars)
    science.metadata["stars"] = _star_table(stars)
    rng = injection.seed_of("training", science_path.name, template_path.name, job.seed)
    fakes = injection.plan(science, rng, PLANTED_IN_REAL)
    listed = Table.read(job.known) if job.known else None
    if listed is not None:
        fakes = fakes[_distance(fakes, listed["x"], listed["y"]) > 10]
    planted = injection.plant(science, fakes, rng)
    planted.psf = None
    planted.metadata.pop("stars")
    result = process_pair(planted, template, DifferenceConfig(classifier="logistic"))
    label = np.full(len(result.sources), quality.FALSE, np.int8)
    what = np.full(len(result.sources), "real image", dtype=object)
    science.psf = result.difference.science_psf
    planted.psf, planted.metadata["stars"] = science.psf, science.metadata["stars"]
    _label_planted(result, planted, fakes, label, what)
    if listed is not None and len(result.sources):
        label[_distance(result.sources, listed["x"], listed["y"]) < 5] = quality.UNSURE
    return _examples(result, label, what, REAL_FALSE_WEIGHT)


def _star_table(stars: Any) -> NDArray[np.void]:
    from cumbre.payloads.calibrate import STAR_TYPE

    table = np.zeros(len(stars), STAR_TYPE)
    table["x"], table["y"], table["flux"], table["snr"] = stars.x, stars.y, stars.flux, stars.snr
    return table


def train(jobs: list[Job], out: Path, *, seed: int = 1, workers: int = 1) -> dict[str, Any]:
    """Train on the examples of all jobs, write model and provenance to ``out``; returns the provenance.

    A fifth of the examples is held out for the curves; the shipped network is then fitted to all of them.
    """
    import hashlib

    from cumbre.payloads import training
    from cumbre.payloads.realbogus import MODEL_NAME

    examples = collect(jobs, workers=workers)
    rng = np.random.default_rng(seed)
    held = rng.uniform(size=len(examples)) < 0.2
    trial = training.fit(_part(examples, ~held), seed=seed)
    apart = _part(examples, held)
    network = training.fit(examples, seed=seed)
    digest = hashlib.sha256(b"".join(w.astype(np.float32).tobytes() for w in network.weights)).hexdigest()
    about = {
        "version": f"cumbre-net-1-{digest[:8]}",
        "seed": seed,
        "trained_on": [_described(job) for job in jobs],
        "domain": _domain(examples),
        "n_real": int(examples.is_real.sum()),
        "n_false": int((~examples.is_real).sum()),
        "held_out": training.curves(apart, trial.scores(apart.inputs)),
    }
    training.export(network, out / f"{MODEL_NAME}.onnx", about)
    return about


def _domain(examples: Examples) -> dict[str, list[float]]:
    """Images that the model may be used for: PSF widths of the examples, and noise as white as theirs."""
    width = 4.0 * examples.inputs[:, SCALARS.index("fwhm")]
    return {
        "fwhm_px": [round(0.93 * float(width.min()), 2), round(1.1 * float(width.max()), 2)],
        "noise_correlation": [0.8, 1.25],
    }


def _part(examples: Examples, keep: NDArray[np.bool_]) -> Examples:
    return Examples(*(getattr(examples, name)[keep] for name in Examples.__slots__))


def _described(job: Job) -> dict[str, Any]:
    if job.science:
        return {"science": Path(job.science).name, "template": Path(job.template).name}
    return {
        "sky": job.seed, "size": job.size, "rich": job.rich, "detectors": job.detectors, "visits": job.visits
    }  # fmt: skip
