"""Images that something went wrong with: each has an outcome, a result that says what is missing, or both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cumbre.core.errors import NoWorkFoundError, UnprocessableDataError
from cumbre.core.instrument import load_instrument
from cumbre.payloads import process_run
from cumbre.payloads.alert_production import produce
from cumbre.payloads.difference import DifferenceConfig
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.isr import assemble_and_correct
from cumbre.payloads.kernels.wcs import PlaneWcs
from cumbre.payloads.raw import RawDetector

SIDE = 400
NEW = ((60.0, 300.0, 6000.0), (190.0, 120.0, 6000.0), (330.0, 230.0, 6000.0))


def gaussians(sources, sigma):
    yy, xx = np.mgrid[:SIDE, :SIDE]
    image = np.zeros((SIDE, SIDE))
    for x, y, flux in sources:
        image += flux * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    return image


def exposure(image, noise, seed):
    rng = np.random.default_rng(seed)
    variance = noise**2 + np.maximum(image, 0)
    scale = 0.4 / 3600
    return Exposure(
        (image + rng.normal(0, np.sqrt(variance))).astype(np.float32), variance.astype(np.float32),
        np.zeros(image.shape, np.uint16),
        wcs=PlaneWcs.linear(150.0, -30.0, 200.0, 200.0, np.array([[-scale, 0], [0, scale]])), zero_point=31.4,
        is_background_subtracted=True,
        metadata={"exposure_id": 2026112000012, "detector": 3, "mjd_mid_tai": 61364.2, "exposure_s": 30.0},
        metrics={"pixel_scale_arcsec": 0.4},
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(11)
    gx, gy = np.meshgrid(np.arange(25, 390, 40), np.arange(25, 390, 40))
    stars = [
        (x, y, flux)
        for x, y, flux in zip(gx.ravel(), gy.ravel(), 10 ** rng.uniform(3.8, 5.0, gx.size), strict=True)
        if all(np.hypot(x - a, y - b) > 14 for a, b, _ in NEW)
    ]
    template = exposure(gaussians(stars, 1.6), 4.0, 1)
    return exposure(gaussians([*stars, *NEW], 2.0), 8.0, 2), template


def copy(image):
    return replace(image, image=image.image.copy(), variance=image.variance.copy(), mask=image.mask.copy())


def found(made, x, y):
    sources = made.result.sources
    return bool((np.hypot(sources["x"] - x, sources["y"] - y) < 2).any())


def test_masked_detector_is_unprocessable(pair):
    science = copy(pair[0])
    science.mask[:] = MaskPlane.BAD
    with pytest.raises(UnprocessableDataError, match="usable"):
        produce(science, None, pair[1], None)


def test_saturated_field_is_unprocessable(pair):
    science = copy(pair[0])
    science.image[:] = 80000
    science.mask[:] = MaskPlane.SAT
    with pytest.raises(UnprocessableDataError):
        produce(science, None, pair[1], None)


def test_saturated_raw_is_refused_before_calibration():
    instrument = load_instrument("democam")
    detector = instrument.detectors[0]
    full = [np.full(a.raw_shape, 65535, np.uint16) for a in detector.amplifiers]
    metadata = type("Metadata", (), {"dark_s": 30.0})()
    raw = RawDetector(full, {}, detector, instrument, metadata, "full.fits")
    with pytest.raises(UnprocessableDataError, match=r"full\.fits: 100% of the pixels"):
        assemble_and_correct(raw)


def test_two_stars_are_no_work(pair):
    stars = [(100.0, 100.0, 5e4), (300.0, 250.0, 4e4)]
    science, template = exposure(gaussians(stars, 2.0), 8.0, 3), exposure(gaussians(stars, 1.6), 4.0, 4)
    with pytest.raises(NoWorkFoundError, match="usable stars"):
        produce(science, None, template, None)


def test_nan_pixels_cost_only_their_place(pair):
    science, template = copy(pair[0]), copy(pair[1])
    science.image[290:311, 50:71] = np.nan
    template.image[10:14, 380:390] = np.nan
    made = produce(science, None, template, None)
    assert [found(made, x, y) for x, y, _ in NEW] == [False, True, True]
    assert len(made.alerts) == 2
    assert np.isfinite([a["diaSource"]["psfFlux"] for a in made.alerts]).all()


def test_dead_half_leaves_the_other(pair):
    science = copy(pair[0])
    science.image[:, 200:] = 0
    science.variance[:, 200:] = 1e20
    science.mask[:, 200:] = MaskPlane.NO_DATA
    made = produce(science, None, pair[1], None)
    assert [found(made, x, y) for x, y, _ in NEW] == [True, True, False]
    assert all(a["diaSource"]["x"] < 200 for a in made.alerts)
    assert made.quality["maskedFraction"] == pytest.approx(0.5)
    assert made.warnings == []


def test_too_many_detections_are_capped_and_told(pair):
    science = copy(pair[0])
    rng = np.random.default_rng(5)
    y, x = rng.integers(5, SIDE - 5, (2, 400))
    science.image[y, x] += 3000
    made = produce(science, None, pair[1], None, config=DifferenceConfig(max_sources=40))
    assert len(made.result.sources) <= 40
    assert made.result.metrics["n_peaks"] > 100
    (warning,) = made.warnings
    assert "only the 40 most significant" in warning


def test_alerts_are_written_before_images(pair, tmp_path, monkeypatch):
    made = produce(pair[0], None, pair[1], None)
    written = []
    for name in ("_write_alerts", "_write_tables", "_write_difference"):
        function = getattr(process_run, name)
        monkeypatch.setattr(
            process_run, name, lambda *a, name=name, f=function: (written.append(name), f(*a))[1]
        )
    monkeypatch.setattr(process_run, "build_page", lambda *_, **__: b"")
    process_run.write_outputs(made.result, pair[0], tmp_path, {}, DifferenceConfig())
    assert written == ["_write_alerts", "_write_tables", "_write_difference"]
    assert (tmp_path / "alerts.avro").stat().st_mtime_ns <= (tmp_path / "difference.fits").stat().st_mtime_ns
