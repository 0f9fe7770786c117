"""Colour term of the zero point: planted in simulated stars and images, found with the error that is told."""

import numpy as np
import pytest
from test_calibrate import ZERO_POINT, observe

from cumbre.core.errors import ConfigurationError
from cumbre.core.instrument import ColourTerm, load_instrument
from cumbre.payloads.calibrate import CalibrateConfig, calibrate
from cumbre.payloads.refcat import RefCat
from cumbre.payloads.zero_point import colour_of, measure_zero_point

TERM = 0.11
PLANTED = ColourTerm(bands=("g", "r"), term=TERM, error=0.01, pivot=0.5)


def stars(rng, n, mean_colour, *, spread=0.35, scatter=0.015, outliers=0.04):
    """(flux, error, mag, colour) of stars seen by a camera with the term TERM about the colour 0.5."""
    mag, colour = rng.uniform(16, 20, n), rng.normal(mean_colour, spread, n)
    flux = 10 ** (-0.4 * (mag + TERM * (colour - 0.5) - 28.0))
    error = np.sqrt(flux + 900)
    seen = flux * 10 ** (-0.4 * rng.normal(0, scatter, n)) + rng.normal(0, 1, n) * error
    seen[rng.random(n) < outliers] *= 1.4
    return seen, error, mag, colour


def test_fitted_term_and_zero_point_have_the_errors_that_are_told():
    rng = np.random.default_rng(11)
    pulls = []
    for _ in range(120):
        flux, error, mag, colour = stars(rng, int(rng.integers(20, 150)), rng.uniform(0.3, 1.0))
        found = measure_zero_point(
            flux, error, mag, colour=colour, term=ColourTerm(bands=("g", "r"), pivot=0.5)
        )
        assert found.is_fitted
        pulls.append(((found.value - 28.0) / found.error, (found.colour_term - TERM) / found.colour_term_err))
    pulls = np.array(pulls)
    assert np.abs(pulls.mean(axis=0)).max() < 0.3
    assert pulls.std(axis=0) == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("mode", ["description", "fit"])
def test_red_and_blue_fields_have_one_zero_point(mode):
    rng = np.random.default_rng(12)
    fields = {c: stars(rng, 120, c, spread=0.25) for c in (0.2, 1.1)}
    plain = [measure_zero_point(*part[:3]).value for part in fields.values()]
    assert plain[0] - plain[1] == pytest.approx(TERM * 0.9, abs=0.02)
    for flux, error, mag, colour in fields.values():
        found = measure_zero_point(flux, error, mag, colour=colour, term=PLANTED, fit=mode == "fit")
        assert found.is_fitted == (mode == "fit")
        assert abs(found.value - 28.0) < 3 * found.error
        assert found.error < 0.015


def test_uncertain_description_makes_an_uncertain_zero_point_until_stars_are_asked():
    flux, error, mag, colour = stars(np.random.default_rng(13), 150, 1.3)
    vague = PLANTED.model_copy(update={"term": TERM + 0.06, "error": 0.06})
    told = measure_zero_point(flux, error, mag, colour=colour, term=vague)
    assert told.error == pytest.approx(0.06 * 0.8, rel=0.1)
    fitted = measure_zero_point(flux, error, mag, colour=colour, term=vague, fit=True)
    assert fitted.error < told.error / 5
    assert fitted.colour_term == pytest.approx(TERM, abs=3 * fitted.colour_term_err)
    # and a description that is sure of itself is not overruled by one image
    sure = vague.model_copy(update={"error": 0.0005})
    assert measure_zero_point(
        flux, error, mag, colour=colour, term=sure, fit=True
    ).colour_term == pytest.approx(TERM + 0.06, abs=0.002)


def test_few_stars_or_one_colour_or_no_second_band_leave_the_term_out():
    rng = np.random.default_rng(14)
    open_term = ColourTerm(bands=("g", "r"))
    for flux, error, mag, colour in (stars(rng, 8, 0.5, outliers=0), stars(rng, 60, 0.5, spread=0.02)):
        found = measure_zero_point(flux, error, mag, colour=colour, term=open_term)
        assert np.isnan(found.colour_term)
        assert "colour_term" not in found.metrics()
        assert found.value == measure_zero_point(flux, error, mag).value
    flux, error, mag, colour = stars(rng, 60, 0.5)
    beyond = measure_zero_point(flux, error, mag, colour=colour + 9, term=PLANTED)
    assert np.isnan(beyond.colour_term)


def test_which_term_holds():
    democam = load_instrument("democam")
    n = np.zeros(3)
    both, single = RefCat(n, n, {"g": n + 1, "r": n}), RefCat(n, n, {"r": n})
    assert colour_of(both, democam, "r_demo", "r", "description") is None
    term, colour = colour_of(both, democam, "r_demo", "r", "fit")
    assert (term.bands, colour[0]) == (("g", "r"), 1.0)
    assert colour_of(single, democam, "r_demo", "r", "fit") is None
    described = democam.model_copy(
        update={"filters": tuple(f.model_copy(update={"colour": PLANTED}) for f in democam.filters)}
    )
    assert colour_of(both, described, "r_demo", "r", "description")[0] == PLANTED
    assert colour_of(both, described, "unheard of", "r", "description")[0] == PLANTED
    assert colour_of(both, described, "r_demo", "r", "off") is None
    with pytest.raises(ConfigurationError, match="colour_term = 'of course': expected"):
        colour_of(both, democam, "r_demo", "r", "of course")


@pytest.mark.parametrize("mode", ["description", "fit", "off"])
def test_images_with_a_planted_term(mode):
    """A detector of stars whose light follows the camera's band; the catalogue has g and r."""
    democam = load_instrument("democam")
    rng = np.random.default_rng(15)
    n = 9000
    ra, dec = 60 + rng.uniform(-0.5, 0.5, n), -30 + rng.uniform(-0.45, 0.45, n)
    colour = np.clip(rng.normal(0.9, 0.4, n), 0.0, 1.7)
    in_camera = np.clip(21.5 - rng.exponential(1.2, n), 15, 23)
    exposure, *_ = observe(democam, RefCat(ra, dec, {"r": in_camera}), 16)
    in_catalogue = in_camera - TERM * (colour - 0.5)
    reference = RefCat(ra, dec, {"g": in_catalogue + colour, "r": in_catalogue})
    filters = tuple(f.model_copy(update={"colour": PLANTED}) for f in democam.filters)
    camera = democam.model_copy(update={"filters": filters})
    done = calibrate(exposure, reference, instrument=camera, config=CalibrateConfig(colour_term=mode))
    if mode == "off":
        assert done.zero_point == pytest.approx(ZERO_POINT - TERM * 0.4, abs=0.012)
        assert "colour_term" not in done.metrics
        return
    assert done.zero_point == pytest.approx(ZERO_POINT, abs=max(3 * done.zero_point_err, 0.006))
    assert done.metrics["colour_term"] == pytest.approx(TERM, abs=3 * done.metrics["colour_term_err"] + 1e-9)
    assert done.metrics["colour_term_fitted"] == (mode == "fit")
    assert done.metrics["zero_point_colour"] == pytest.approx(0.9, abs=0.12)
    assert done.metrics["zero_point_rms"] < 0.03
