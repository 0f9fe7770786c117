"""Templates from images of different seeing and reach."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumbre.orchestration.templates import Place, StoredWarp, TemplateStore
from cumbre.payloads import coadd
from cumbre.payloads.coadd import TEMPLATE_ZERO_POINT, combine, make_template, resample
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.exposure_file import load_exposure, save_exposure
from cumbre.payloads.kernels.psf import gaussian_psf
from cumbre.payloads.kernels.wcs import PlaneWcs

SIDE = 200
WCS = PlaneWcs.linear(10.0, -30.0, SIDE / 2, SIDE / 2, np.array([[-2e-4, 0], [0, 2e-4]]))
BRIGHT, FAINT = (60.0, 70.0), (130.0, 120.0)


def visit(fwhm: float, sky: float, fluxes: tuple[float, float], *, lost_columns: int = 0) -> Exposure:
    yy, xx = np.mgrid[:SIDE, :SIDE]
    sigma = fwhm / 2.3548
    image = np.zeros((SIDE, SIDE))
    for (x, y), flux in zip((BRIGHT, FAINT), fluxes, strict=True):
        image += flux * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    # far less noise than the variance says, so that a mean is seen as it is
    image += np.random.default_rng(int(10 * fwhm)).normal(0, 0.05, image.shape)
    mask = np.zeros((SIDE, SIDE), np.uint16)
    if lost_columns:
        mask[:, -lost_columns:] = MaskPlane.NO_DATA
    return Exposure(
        image.astype(np.float32), (image + sky).astype(np.float32), mask, wcs=WCS, zero_point=TEMPLATE_ZERO_POINT,
        zero_point_err=0.001, is_background_subtracted=True, psf=gaussian_psf(fwhm, (SIDE, SIDE)),
        metadata={"obs_id": f"v{fwhm}"},
    )  # fmt: skip


def test_bright_and_faint_stars_have_one_psf():
    visits = [visit(fwhm, 400.0, (1e6, 1e3)) for fwhm in (2.6, 3.0, 3.4, 4.4)]
    image = make_template(visits, WCS, (SIDE, SIDE)).image
    shapes = []
    for (x, y), flux in ((BRIGHT, 1e6), (FAINT, 1e3)):
        box = image[int(y) - 8 : int(y) + 9, int(x) - 8 : int(x) + 9]
        shapes.append(box / flux)
    assert np.abs(shapes[0] - shapes[1]).max() < 0.005 * shapes[1].max()


def test_star_that_varied_is_the_mean_by_the_noise_of_the_skies():
    skies, fluxes = (400.0, 400.0, 400.0, 1600.0), (1e5, 1.5e5, 0.7e5, 1.4e5)
    visits = [visit(3.0, sky, (1e6, flux)) for sky, flux in zip(skies, fluxes, strict=True)]
    made = make_template(visits, WCS, (SIDE, SIDE))
    x, y = (int(v) for v in FAINT)
    total = float(made.image[y - 12 : y + 13, x - 12 : x + 13].sum())
    assert total == pytest.approx(np.average(fluxes, weights=1 / np.array(skies)), rel=0.005)
    # far from all stars: the noise of that mean
    assert made.variance[20, 180] == pytest.approx(1 / np.sum(1 / np.array(skies)), rel=0.01)


def test_star_that_flared_in_the_sharpest_image_is_not_cut():
    widths, fluxes = (4.8, 4.5, 3.6, 3.7), (0.5e5, 0.7e5, 2.5e5, 0.6e5)
    visits = [visit(fwhm, 400.0, (1e6, flux)) for fwhm, flux in zip(widths, fluxes, strict=True)]
    made = make_template(visits, WCS, (SIDE, SIDE))
    x, y = (int(v) for v in FAINT)
    assert made.image[y - 12 : y + 13, x - 12 : x + 13].sum() == pytest.approx(np.mean(fluxes), rel=0.005)


def test_images_between_the_template_s_pixels_weigh_no_more():
    skies, fluxes = (400.0, 400.0), (1e5, 1.4e5)
    first, second = (visit(3.0, sky, (1e6, flux)) for sky, flux in zip(skies, fluxes, strict=True))
    # half a pixel off along both axes: resampling makes its noise look smaller
    second.wcs = PlaneWcs.linear(
        10.0, -30.0, SIDE / 2 + 0.5, SIDE / 2 + 0.5, np.array([[-2e-4, 0], [0, 2e-4]])
    )
    made = make_template([first, second], WCS, (SIDE, SIDE))
    x, y = (int(v) for v in FAINT)
    total = float(made.image[y - 12 : y + 13, x - 12 : x + 13].sum())
    assert total == pytest.approx(np.mean(fluxes), rel=0.005)


def test_particle_on_a_star_in_one_image_is_left_out():
    visits = [visit(3.0, 400.0, (1e6, 1e5)) for _ in range(4)]
    x, y = (int(v) for v in FAINT)
    before = make_template(visits, WCS, (SIDE, SIDE)).image[y, x + 2]
    visits[1].image[y, x + 2] += 30000
    after = make_template(visits, WCS, (SIDE, SIDE)).image[y, x + 2]
    assert after == pytest.approx(before, rel=0.1)


def test_particle_in_one_image_is_left_out():
    visits = [visit(3.0, 400.0, (1e6, 1e3)) for _ in range(3)]
    visits[1].image[30, 150] += 5000
    assert abs(make_template(visits, WCS, (SIDE, SIDE)).image[30, 150]) < 10


def test_part_that_not_all_images_reach_says_so():
    visits = [visit(3.0, 400.0, (1e6, 1e3), lost_columns=lost) for lost in (0, 0, 40)]
    mask = make_template(visits, WCS, (SIDE, SIDE)).mask
    assert (mask[20:-20, -30:-10] & MaskPlane.SUSPECT).all()
    assert not (mask[20:-20, 20:-50] & MaskPlane.SUSPECT).any()


def field(fwhm: float, factor: float, *, side: int = 420) -> Exposure:
    """Constant stars on a lattice, and in the middle one that is ``factor`` times as bright as usual."""
    yy, xx = np.mgrid[:side, :side]
    sigma = fwhm / 2.3548
    image = np.random.default_rng(int(100 * fwhm)).normal(0, 3, (side, side))
    for k, x in enumerate(np.arange(60, side - 59, 60)):
        for n, y in enumerate(np.arange(60, side - 59, 60)):
            flux = (2e5 if (k + n) % 2 else 1e5) * (factor if (x, y) == VARIABLE else 1.0)
            box = np.s_[y - 25 : y + 26, x - 25 : x + 26]
            r2 = (xx[box] - x - 0.2) ** 2 + (yy[box] - y + 0.1) ** 2
            image[box] += flux * np.exp(-r2 / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    image += np.random.default_rng(int(100 * fwhm) + 1).normal(0, 1, image.shape) * np.sqrt(
        np.maximum(image, 0)
    )
    return Exposure(
        image.astype(np.float32), (np.maximum(image, 0) + 9).astype(np.float32), np.zeros((side, side), np.uint16),
        wcs=WCS, zero_point=TEMPLATE_ZERO_POINT, zero_point_err=0.001, is_background_subtracted=True,
        psf=gaussian_psf(fwhm, (side, side)), metadata={"obs_id": f"f{fwhm}"},
    )  # fmt: skip


VARIABLE, CONSTANT = (240, 180), (180, 240)


def concentration(image: np.ndarray, place: tuple[int, int]) -> float:
    """Part of a star's light within 2.5 pixels."""
    x, y = place
    box = image[y - 14 : y + 15, x - 14 : x + 15]
    yy, xx = np.mgrid[-14:15, -14:15]
    total = box.sum()
    middle = (box * xx).sum() / total, (box * yy).sum() / total
    return float(box[np.hypot(xx - middle[0], yy - middle[1]) < 2.5].sum() / total)


def test_star_that_varied_has_the_psf_of_the_others():
    visits = [field(fwhm, factor) for fwhm, factor in ((3.2, 1.6), (3.6, 1.5), (4.6, 0.4), (4.8, 0.5))]
    apart = {}
    for match_psf in (True, False):
        made = make_template(visits, WCS, (420, 420), match_psf=match_psf)
        assert made.metrics["n_matched"] == (4 if match_psf else 0)
        constant = concentration(made.image, CONSTANT)
        apart[match_psf] = abs(concentration(made.image, VARIABLE) / constant - 1)
        x, y = VARIABLE
        light = made.image[y - 20 : y + 21, x - 20 : x + 21].sum()
        assert light == pytest.approx(2e5, rel=0.01)
    assert apart[False] > 0.04
    assert apart[True] < 0.008


def test_gap_in_one_image_leaves_no_hole():
    visits = [field(fwhm, 1.0) for fwhm in (3.2, 3.6, 4.6)]
    visits[0].mask[:, 178:181] = MaskPlane.BAD
    visits[0].image[:, 178:181] = 5e4
    made = make_template(visits, WCS, (420, 420))
    assert made.metrics["n_matched"] == 3
    x, y = CONSTANT
    assert made.image[y - 20 : y + 21, x - 20 : x + 21].sum() == pytest.approx(2e5, rel=0.02)
    assert np.abs(made.image[100:110, 150:210]).max() < 25


# --- one image after the other -------------------------------------------------------------------------------------------


def sky(
    seed: int, *, fwhm: float = 3.0, noise: float = 20.0, zero_point: float = TEMPLATE_ZERO_POINT
) -> Exposure:
    """The same stars with noise of their own."""
    made = visit(fwhm, noise**2, (3e5, 2e4))
    rng = np.random.default_rng(seed)
    made.image += rng.normal(0, noise, made.image.shape).astype(np.float32)
    made.image *= np.float32(10 ** (0.4 * (zero_point - TEMPLATE_ZERO_POINT)))
    made.variance *= np.float32(10 ** (0.8 * (zero_point - TEMPLATE_ZERO_POINT)))
    made.zero_point = zero_point
    made.metadata = {"obs_id": f"v{seed:03d}", "band": "r"}
    made.wcs = PlaneWcs.linear(
        10.0,
        -30.0,
        SIDE / 2 + rng.uniform(-4, 4),
        SIDE / 2 + rng.uniform(-4, 4),
        np.array([[-2e-4, 0], [0, 2e-4]]),
    )
    return made


def same(one: Exposure, other: Exposure) -> None:
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.variance, other.variance)
    np.testing.assert_array_equal(one.mask, other.mask)
    np.testing.assert_array_equal(one.metadata["depth"], other.metadata["depth"])
    assert one.metrics == other.metrics


def test_strips_are_the_whole(monkeypatch):
    exposures = [sky(k, fwhm=2.5 + 0.3 * k, zero_point=27 + 0.2 * k) for k in range(4)]
    whole = make_template(exposures, WCS, (SIDE, SIDE))
    monkeypatch.setattr(coadd, "STRIP_ROWS", 37)
    same(make_template(exposures, WCS, (SIDE, SIDE)), whole)


@settings(max_examples=6, deadline=None)
@given(st.integers(3, 6), st.integers(0, 1000), st.data())
def test_one_after_the_other_is_all_at_once(tmp_path_factory, count, seed, data):
    """Visits come in any order and portions; what is kept between is files."""
    store = TemplateStore(tmp_path_factory.mktemp("site"))
    place = Place("t", 10.0, -30.0, "r", "R00_S00")
    exposures = [sky(seed + k, noise=10.0 + 5 * k, zero_point=27 + 0.1 * k) for k in range(count)]
    exposures[-1].image[100:103, :] += 900.0
    at_once = make_template(exposures, WCS, (SIDE, SIDE))
    for k in data.draw(st.permutations(range(count))):
        warp = resample(exposures[k], WCS, (SIDE, SIDE))
        store.save_warp(store.warp_path(place, exposures[k].metadata["obs_id"]), warp, {})
        kept = sorted(store.warp_path(place, "any").parent.glob("*.fits"))
        step_by_step = combine([StoredWarp.open(path) for path in kept], WCS)
    same(step_by_step, at_once)


def test_satellite_and_cosmic_ray_of_one_visit_are_left_out():
    clean = [sky(k) for k in range(4)]
    struck = [sky(k) for k in range(4)]
    along = np.arange(20, 180)
    for width in (-1, 0, 1):
        struck[2].image[(195 - 0.3 * along).astype(int) + width, along] += 700.0
    struck[2].image[150, 40:43] += 5000.0
    made, right = (make_template(e, WCS, (SIDE, SIDE)) for e in (struck, clean))
    # nothing is left of them but the noise of three images instead of four
    assert np.abs(made.image - right.image).max() < 5 * 20.0
    lost = made.metadata["depth"] < right.metadata["depth"]
    assert lost.sum() > 300
    x, y = np.nonzero(lost.T)
    assert (np.abs(y - (195 - 0.3 * x)) < 10).mean() > 0.9


def test_depth_is_kept_in_the_file(tmp_path):
    made = make_template([sky(1), visit(3.0, 400.0, (1e5, 1e4), lost_columns=50)], WCS, (SIDE, SIDE))
    save_exposure(made, tmp_path / "t.fits")
    depth = load_exposure(tmp_path / "t.fits").metadata["depth"]
    np.testing.assert_array_equal(depth, made.metadata["depth"])
    assert depth.dtype == np.uint8
    assert depth[100, 100] == 2
    assert depth[100, 170] == 1


def test_images_that_pixels_do_not_sample_stay_as_they_are():
    visits = [field(fwhm, 1.0) for fwhm in (2.0, 3.2, 4.6)]
    assert make_template(visits, WCS, (420, 420)).metrics["n_matched"] == 0
