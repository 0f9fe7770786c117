"""Brighter-fatter correction against a sensor whose pixel borders are moved by the charge it holds.

The sensor knows no kernel: each electron pushes what falls beside it by the field of a point charge at some depth and
of its mirror image in the electrode, and the exposure is taken in many short steps.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from astropy.io import fits
from scipy.signal import fftconvolve

from cumbre.core.errors import UnprocessableDataError
from cumbre.core.instrument import instrument_from_mapping, load_instrument
from cumbre.payloads import calibrate_run
from cumbre.payloads.calibration import Calibrations, measure_brighter_fatter
from cumbre.payloads.exposure_file import load_exposure
from cumbre.payloads.isr import assemble_and_correct
from cumbre.payloads.kernels import brighter_fatter as bf
from cumbre.payloads.raw import read_raw

STRENGTH, DEPTH, IMAGE = 5e-7, 0.5, 2.0
"""Border shift (pixels) = STRENGTH · electrons · distance · (1/(distance² + DEPTH²)^1.5 − 1/(distance² + IMAGE²)^1.5)."""
REACH = 8
SKY = 800.0


def push():
    """Part of a pixel by which an electron at (0, 0) moves the borders right of and above each pixel."""
    grid = np.arange(-REACH, REACH + 1.0)
    dx, dy = np.meshgrid(grid + 0.5, grid)
    square = dx**2 + dy**2
    right = STRENGTH * dx * ((square + DEPTH**2) ** -1.5 - (square + IMAGE**2) ** -1.5)
    return right, right.T


def expose(light, rng=None, steps=8):
    """Electrons collected of ``light`` (electrons per pixel), with photon noise when a generator is given."""
    charge = np.zeros(light.shape)
    right, above = push()
    for _ in range(steps):
        came = light / steps if rng is None else rng.poisson(light / steps).astype(float)
        padded = np.pad(charge + came / 2, REACH, mode="edge")
        to_right = fftconvolve(padded, right, mode="valid")[:, :-1] * (came[:, :-1] + came[:, 1:]) / 2
        upwards = fftconvolve(padded, above, mode="valid")[:-1] * (came[:-1] + came[1:]) / 2
        charge = charge + came
        charge[:, :-1] -= to_right
        charge[:, 1:] += to_right
        charge[:-1] -= upwards
        charge[1:] += upwards
    return charge


def expected_covariance():
    """Of a pixel with its neighbours, over the level's square: what an electron sends to each of them."""
    right, above = push()
    came = np.zeros((2 * REACH + 1, 2 * REACH + 1))
    came[:, 1:] += right[:, :-1] - right[:, 1:]
    came[1:] += above[:-1] - above[1:]
    return came[REACH : 2 * REACH, REACH : 2 * REACH]


@pytest.fixture(scope="module")
def kernel():
    level = np.array([20.0])
    return bf.kernel_of_covariances(level, (expected_covariance() * level**2)[None])


def stars(fluxes, sigma=1.6, shape=(200, 330)):
    """Light of a row of stars on a sky, and their places."""
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    light, places = np.full(shape, SKY), []
    for k, flux in enumerate(fluxes):
        x, y = 35.3 + 65 * (k % 5), 40.6 + 55 * (k // 5)
        light += flux * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
        places.append((x, y))
    return light, places


def sizes(image, places, sigma=1.6):
    """Second moments (trace) with a Gaussian weight, pixels²."""
    yy, xx = np.mgrid[: image.shape[0], : image.shape[1]]
    out = []
    for x, y in places:
        box = np.s_[round(y) - 12 : round(y) + 13, round(x) - 12 : round(x) + 13]
        dx, dy, data = xx[box] - x, yy[box] - y, image[box] - SKY
        weight = data * np.exp(-(dx**2 + dy**2) / (2 * (2 * sigma) ** 2))
        out.append((weight * (dx**2 + dy**2)).sum() / weight.sum())
    return np.array(out)


FLUXES = 10 ** np.linspace(3.8, 6.1, 15)


def test_moments_of_stars_no_longer_follow_their_flux(kernel):
    light, places = stars(FLUXES)
    collected = expose(light, steps=25)
    true, before = sizes(light, places), sizes(collected, places)
    assert collected.max() > 60000
    growth = before / true - 1
    assert growth[-1] > 0.015
    assert np.corrcoef(growth, FLUXES)[0, 1] > 0.99
    image = collected.astype(np.float32)
    told = bf.correct(image, kernel)
    left = sizes(image, places) / true - 1
    assert np.abs(left).max() < 0.04 * growth[-1]
    # pixel by pixel, not by moments alone
    assert np.abs(image - light).max() < 0.06 * np.abs(collected - light).max()
    assert told["last_change"] < bf.TOLERANCE_E
    assert 2 <= told["iterations"] < bf.MOST_ITERATIONS
    assert told["touched"] < 0.05


def test_charge_is_conserved_and_the_sky_is_left_alone(kernel):
    light, _ = stars(FLUXES)
    collected = expose(light, steps=10).astype(np.float32)
    image = collected.copy()
    told = bf.correct(image, kernel)
    assert image.sum(dtype=np.float64) == pytest.approx(collected.sum(dtype=np.float64), abs=1.0)
    assert told["moved"] > 5000
    flat = np.full((60, 70), 30000, np.float32)
    bf.correct(flat, kernel)
    np.testing.assert_array_equal(flat, 30000)
    # and a kernel of nothing does nothing
    same = collected.copy()
    assert bf.correct(same, np.zeros((5, 5)))["moved"] == 0
    np.testing.assert_array_equal(same, collected)


def test_nothing_crosses_the_borders_of_saturated_pixels(kernel):
    light, _ = stars(FLUXES)
    collected = expose(light, steps=10).astype(np.float32)
    held = collected > 40000
    image = collected.copy()
    bf.correct(image, kernel, held)
    np.testing.assert_array_equal(image[held], collected[held])
    assert image.sum(dtype=np.float64) == pytest.approx(collected.sum(dtype=np.float64), abs=1.0)
    assert held.sum() > 5


def test_kernel_of_flats_is_that_of_the_sensor(kernel):
    rng = np.random.default_rng(8)
    levels, covariances = [], []
    for mean in (60000, 80000, 80000, 80000, 80000, 80000):
        pair = [expose(np.full((400, 400), float(mean)), rng, steps=4).astype(np.float32) for _ in range(2)]
        level, covariance, _ = bf.pair_covariances(*pair, np.ones((400, 400), bool))
        assert level == pytest.approx(mean, rel=0.001)
        # what neighbours share is missing from the variance: flats of a sensor like this look too quiet
        assert covariance[0, 0] < 0.97 * mean
        levels.append(level)
        covariances.append(covariance)
    levels = np.array(levels)
    found = bf.kernel_of_covariances(levels, bf.smooth_tail(levels, np.array(covariances)))
    steps = []
    for one in (kernel, found):
        c = len(one) // 2
        steps.append(
            (one[c, c + 1] - one[c, c], one[c + 1, c] - one[c, c], one[c + 1, c + 1] - one[c + 1, c])
        )
    assert steps[1] == pytest.approx(steps[0], abs=0.1 * steps[0][0])
    light, places = stars(FLUXES)
    collected = expose(light, steps=15)
    image = collected.astype(np.float32)
    bf.correct(image, found)
    true = sizes(light, places)
    growth, left = sizes(collected, places) / true - 1, sizes(image, places) / true - 1
    assert np.abs(left).max() < 0.25 * growth.max()
    # corrected flats have the variance of photons
    one = expose(np.full((300, 300), 50000.0), rng, steps=4).astype(np.float32)
    raw_variance = one.var()
    bf.correct(one, found)
    assert raw_variance < 0.97 * 50000
    assert one[10:-10, 10:-10].var() == pytest.approx(50000, rel=0.025)


CAMERA = {
    "name": "Pushy", "prefix": "PU", "plate_scale": 40.0, "raw_layout": "one_hdu", "filters": [{"name": "R", "band": "r"}],
    "detectors": [{
        "id": 0, "name": "S0", "nx": 360, "ny": 360, "pixel_mm": 0.015,
        "amplifiers": [{"name": "A", "raw_box": [0, 360, 0, 360], "detector_box": [0, 360, 0, 360], "gain": 2.0,
                        "overscan_box": [360, 392, 0, 360], "read_noise": 5.0, "saturation": 60000, "bias_level": 500}],
    }],
    "file_pattern": r"(?P<seq_num>\d+)\.fits",
    "header": {
        "begin": {"keywords": ["DATE-OBS"], "time_scale": "utc", "required": True},
        "exposure_s": {"keywords": ["EXPTIME"], "unit": "s", "required": True},
        "image_type": {"keywords": ["KIND"], "required": True, "mapping": {"flat": "flat", "sky": "science", "bias": "bias"}},
        "filter": {"keywords": ["FILTER"]},
    },
}  # fmt: skip


def write(folder, number, kind, electrons, rng):
    counts = np.full((360, 392), 500.0)
    counts[:, :360] += electrons / 2.0
    counts += rng.normal(0, 2.5, counts.shape)
    header = fits.Header(
        {"DATE-OBS": f"2026-11-20T03:{number:02d}:00", "EXPTIME": 10.0, "KIND": kind, "FILTER": "R"}
    )
    path = folder / f"{number:04d}.fits"
    fits.writeto(path, np.clip(np.rint(counts), 0, 65535).astype(np.uint16), header)
    return path


def test_calibrate_measures_the_kernel_and_applies_it(tmp_path):
    rng = np.random.default_rng(21)
    camera = instrument_from_mapping(CAMERA, "test")
    response = 1 + 0.1 * np.cos(np.arange(360) / 57.0)[None, :] * np.ones((360, 1))
    flats = [write(tmp_path, k, "flat", expose(85000 * response, rng, steps=4), rng) for k in range(10)]
    bias = [write(tmp_path, 20 + k, "bias", np.zeros((360, 360)), rng) for k in range(3)]
    light, places = stars(FLUXES[:-1], shape=(360, 360))
    sky = write(tmp_path, 40, "sky", expose(rng.poisson(light) * response, steps=10), rng)
    reports = {}
    for mark in (False, True):
        out = tmp_path / f"out{mark}"
        reports[mark] = calibrate_run.run(bias, flats, [sky], out, instrument=camera, brighter_fatter=mark)
        assert reports[mark]["refused"] == []
    row = reports[True]["brighter_fatter"][0]
    near = expected_covariance()[0, 1]  # at low level; less where variances are far from Poisson's
    assert row["pairs"] == 5
    assert 0.5 * near < row["neighbour_covariance"] < 1.1 * near
    assert row["neighbour_covariance_err"] < 0.15 * near
    assert reports[False]["brighter_fatter"] == []
    assert json.loads((tmp_path / "outTrue" / "report.json").read_text())["brighter_fatter"] == [row]
    stored = Calibrations.load(tmp_path / "outTrue" / "master_brighter_fatter_000.fits")
    assert stored.brighter_fatter.shape == (17, 17)
    images = {mark: load_exposure(tmp_path / f"out{mark}" / "0040.calibrated.fits") for mark in (False, True)}
    bright = np.argsort(FLUXES[:-1])[-2:]
    spots = [places[k] for k in bright]
    size = {mark: sizes(e.image + SKY, spots).mean() for mark, e in images.items()}
    true = sizes(light, spots).mean()
    assert size[False] / true - 1 > 0.008
    assert abs(size[True] / true - 1) < 0.35 * (size[False] / true - 1)
    # without a kernel nothing is different: neither pixels nor numbers
    raw = read_raw(sky, camera)
    masters = Calibrations.load(tmp_path / "outFalse" / "master_flat_000_R.fits")
    plain = assemble_and_correct(raw, masters)
    assert not any(name.startswith("brighter") for name in plain.metrics)
    done = assemble_and_correct(raw, replace(masters, brighter_fatter=stored.brighter_fatter))
    assert done.metrics["brighter_fatter_iterations"] >= 1
    np.testing.assert_array_equal(done.variance, plain.variance)
    np.testing.assert_array_equal(done.mask, plain.mask)
    none = assemble_and_correct(raw, replace(masters, brighter_fatter=np.zeros((3, 3), np.float32)))
    np.testing.assert_allclose(none.image, plain.image, rtol=1e-6, atol=1e-3)


def test_flats_that_tell_nothing_are_refused(tmp_path):
    rng = np.random.default_rng(31)
    camera = instrument_from_mapping(CAMERA, "test")
    quiet = [
        read_raw(write(tmp_path, k, "flat", rng.poisson(9000.0, (360, 360)), rng), camera) for k in range(2)
    ]
    with pytest.raises(UnprocessableDataError, match="expected more than 3 sigma"):
        measure_brighter_fatter(quiet)
    steps = [
        read_raw(write(tmp_path, 10 + k, "flat", rng.poisson(9000.0 + 2000 * k, (360, 360)), rng), camera)
        for k in range(3)
    ]
    with pytest.raises(UnprocessableDataError, match="no two of 3 flats"):
        measure_brighter_fatter(steps)


@pytest.mark.parametrize("shape", [(4, 4), (5, 7), (67, 67)])
def test_kernels_of_odd_shapes_are_refused(shape):
    kernel = Calibrations(brighter_fatter=np.zeros(shape, np.float32))
    with pytest.raises(UnprocessableDataError, match="brighter-fatter kernel has the shape"):
        kernel.check(load_instrument("democam").detectors[0].shape, "here")
