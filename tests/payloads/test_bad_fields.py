"""Whole detector images that went wrong at the telescope: an outcome with its reason, never a false alert."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import convolve1d
from test_calibrate import observe

from cumbre.core.errors import UnprocessableDataError
from cumbre.core.geometry import sky_from_pixel
from cumbre.core.instrument import load_instrument
from cumbre.payloads.alert_production import produce
from cumbre.payloads.calibrate import calibrate
from cumbre.payloads.kernels.psf import PsfModel, gaussian_psf
from cumbre.payloads.plausibility import ellipticity
from cumbre.payloads.refcat import RefCat

NEW = ((300.5, 400.2, 20.0), (700.3, 650.1, 19.0), (150.7, 820.4, 20.5))
CAMERA = load_instrument("democam")
TURN = 15.0


def with_identity(exposure, number):
    about = {"exposure_id": 2026112000000 + number, "mjd_mid_tai": 61364.2, "exposure_s": 30.0}
    exposure.metadata.update(about)
    return exposure


@pytest.fixture(scope="module")
def sky():
    """Reference stars in r and i, and the same sky with three new ones."""
    rng = np.random.default_rng(20)
    n = 15000
    ra = 60 + rng.uniform(-0.7, 0.7, n) / np.cos(np.radians(30))
    dec = -30 + rng.uniform(-0.7, 0.7, n)
    r = np.clip(22 - rng.exponential(1.3, n), 14.5, 23)
    i = r - rng.normal(0.4, 0.35, n)
    x, y, magnitude = (np.array(part) for part in zip(*NEW, strict=True))
    new_ra, new_dec = sky_from_pixel(CAMERA, CAMERA.detector(3), 60.0, -30.0, TURN, x, y)
    later = RefCat(
        np.append(ra, new_ra), np.append(dec, new_dec),
        {"r": np.append(r, magnitude), "i": np.append(i, magnitude)},
    )  # fmt: skip
    return RefCat(ra, dec, {"r": r, "i": i}), later


@pytest.fixture(scope="module")
def template(sky):
    exposure, *_ = observe(CAMERA, sky[0], 100, fwhm=2.2, rotpa=TURN)
    return calibrate(with_identity(exposure, 1), sky[0], instrument=CAMERA)


def take(sky, **how):
    return with_identity(observe(CAMERA, sky[1], 7, rotpa=TURN, **how)[0], 12)


def process(exposure, sky, template):
    return produce(calibrate(exposure, sky[0], instrument=CAMERA), None, template, None)


def level_of(exposure):
    return np.float32(np.median(exposure.image))


def are_the_new_ones(made):
    """Exactly the three new stars became alerts."""
    places = [(a["diaSource"]["x"], a["diaSource"]["y"]) for a in made.alerts]
    return len(places) == len(NEW) and all(
        min(np.hypot(x - px, y - py) for px, py in places) < 2 for x, y, _ in NEW
    )


def test_a_good_image_gives_the_new_sources_only(sky, template):
    made = process(take(sky), sky, template)
    assert are_the_new_ones(made)
    assert made.result.metrics["changed_stars"] < 0.1
    assert made.quality["psfEllipticity"] < 0.1
    assert made.warnings == []


def test_thin_clouds_cost_depth_and_thick_ones_are_an_outcome(sky, template):
    clear, thin = process(take(sky), sky, template), process(take(sky, dim=1.5), sky, template)
    assert are_the_new_ones(thin)
    assert clear.quality["zeroPoint"] - thin.quality["zeroPoint"] == pytest.approx(1.5, abs=0.05)
    assert thin.quality["limitingMagnitude"] < clear.quality["limitingMagnitude"] - 1
    with pytest.raises(UnprocessableDataError, match="clouds"):
        process(take(sky, dim=3.5), sky, template)
    with pytest.raises(UnprocessableDataError):
        process(take(sky, dim=6), sky, template)


@pytest.mark.parametrize("length", [9, 15])
def test_a_short_trail_of_the_telescope_is_told(sky, template, length):
    made = process(trailed(take(sky), length), sky, template)
    assert are_the_new_ones(made)
    assert any("did not follow" in warning for warning in made.warnings)
    assert made.quality["psfEllipticity"] > 0.3


def trailed(exposure, length):
    """Smear along x; smeared noise is made up for."""
    level = level_of(exposure)
    smeared = convolve1d(exposure.image - level, np.full(length, 1 / length), axis=1)
    noise = np.random.default_rng(3).normal(0, np.sqrt(exposure.variance * (1 - 1 / length)))
    exposure.image = (level + smeared + noise).astype(np.float32)
    return exposure


def test_a_long_trail_is_an_outcome(sky, template):
    with pytest.raises(UnprocessableDataError, match="stars differ from the template"):
        process(trailed(take(sky), 40), sky, template)


def test_another_filter_is_an_outcome(sky, template):
    """The header says r; the light is that of i."""
    lie = RefCat(sky[1].ra, sky[1].dec, {"r": sky[1].magnitudes["i"]})
    exposure = with_identity(observe(CAMERA, lie, 7, rotpa=TURN)[0], 12)
    with pytest.raises(UnprocessableDataError, match="another filter"):
        process(exposure, sky, template)


@pytest.mark.parametrize(("shift", "part"), [(6, 0.5), (14, 0.5), (30, 0.3), (30, 0.15)])
def test_a_double_image_is_an_outcome(sky, template, shift, part):
    """The telescope jumped: a part of the light is some pixels away."""
    exposure = take(sky)
    light = exposure.image - level_of(exposure)
    moved = np.zeros_like(light)
    moved[:, shift:] = light[:, :-shift]
    noise = np.random.default_rng(4).normal(0, 0.6 * np.sqrt(exposure.variance))
    exposure.image = (level_of(exposure) + (1 - part) * light + part * moved + noise).astype(np.float32)
    with pytest.raises(UnprocessableDataError, match="double or trailed"):
        process(exposure, sky, template)


def test_a_template_that_is_upside_down_serves(sky):
    """Taken with the camera turned by half a circle, so that another detector saw this sky."""
    exposure, *_ = observe(CAMERA, sky[0], 101, fwhm=2.2, rotpa=TURN + 180, detector=0)
    made = process(take(sky), sky, calibrate(with_identity(exposure, 1), sky[0], instrument=CAMERA))
    assert are_the_new_ones(made)
    assert made.quality["templateCoverage"] > 0.9


def test_a_pointing_wrong_by_half_a_degree_changes_no_alert(sky, template):
    exposure = take(sky)
    exposure.metadata["dec_deg"] += 0.5
    made = process(exposure, sky, template)
    assert are_the_new_ones(made)
    for alert in made.alerts:
        source = alert["diaSource"]
        ra, dec = sky_from_pixel(CAMERA, CAMERA.detector(3), 60.0, -30.0, TURN, source["x"], source["y"])
        assert np.hypot((source["ra"] - ra) * np.cos(np.radians(dec)), source["dec"] - dec) * 3600 < 0.15


def test_ellipticity_of_a_known_shape():
    assert ellipticity(gaussian_psf(4.0, (100, 100))) < 0.01
    grid = np.arange(-15, 16)
    stamp = np.exp(-(grid[None, :] ** 2) / (2 * 4.0**2) - grid[:, None] ** 2 / (2 * 2.0**2))
    long = PsfModel((stamp / stamp.sum())[None].astype(np.float32), (100, 100), 6.0)
    # (16 - 4) / (16 + 4); the cut at 3 % of the peak keeps the axis ratio
    assert ellipticity(long) == pytest.approx(0.6, abs=0.02)
