"""Compiled kernels against plain ones of numpy and scipy that do the same slowly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.signal import convolve2d

from cumbre.core.memory import ENVIRONMENT, hold_memory
from cumbre.payloads.kernels import convolve, detect, measure, planes, shift
from cumbre.payloads.kernels.cosmic_rays import _fine_structure, _middle
from cumbre.payloads.kernels.detect import GridPsf


def test_tiles_convolve_as_a_direct_sum():
    rng = np.random.default_rng(1)
    image = rng.normal(0, 100, (301, 277)).astype(np.float32)
    kernel = rng.normal(size=(13, 13))
    got = convolve.convolve_field(image, lambda x, y: kernel, 6)
    np.testing.assert_allclose(got, convolve2d(image, kernel, mode="same"), atol=2e-2)


def test_trimmed_window_keeps_its_sum():
    weights = np.exp(-0.5 * (np.arange(-12, 13) / 1.5) ** 2)
    short = convolve.trimmed(weights)
    assert 9 <= len(short) < 17
    assert short.sum() == pytest.approx(weights.sum(), rel=1e-6)
    assert len(convolve.trimmed(np.array([0.0, 0, 1, 0, 0]))) == 1


@pytest.mark.parametrize(("dx", "dy"), [(0.0, 0.0), (0.3, -0.7), (1.6, -2.2)])
def test_moved_stamp_is_the_quintic_spline(dx, dy):
    grid = np.arange(15) - 7
    stamp = np.exp(-(grid[:, None] ** 2 + grid**2) / (2 * 1.4**2))
    rows, out = np.empty_like(stamp), np.empty_like(stamp)
    shift.move(shift.spline_coefficients(stamp[None])[0], dx, dy, rows, out)
    expected = ndimage.shift(stamp, (dy, dx), order=5, mode="constant", cval=0.0)
    np.testing.assert_allclose(out, expected, atol=1e-12)


def test_source_is_measured_where_and_as_bright_as_it_is():
    rng = np.random.default_rng(2)
    yy, xx = np.mgrid[:60, :70]
    x, y, flux, sigma, noise = 33.4, 27.8, 5000.0, 1.7, 3.0
    truth = flux * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    image = (truth + rng.normal(0, noise, truth.shape)).astype(np.float32)
    grid = np.arange(-9, 10)
    stamp = np.exp(-(grid[:, None] ** 2 + grid**2) / (2 * sigma**2))
    psf = GridPsf(lambda x, y: stamp / stamp.sum(), lambda x, y: np.ones((1, 1)), half=9)
    variance, mask = np.full(image.shape, noise**2, np.float32), np.zeros(image.shape, np.uint16)
    mask[28, 36] = 8
    (source,) = measure.measure_sources(
        image, variance, mask, image / 3, psf, np.array([33]), np.array([28]), unusable=3, aperture_radius=6.0, hit_bits=8,
        profile_tolerance=0.0, core_tolerance=0.0,
    )  # fmt: skip
    assert np.hypot(source.x - x, source.y - y) < 4 * np.hypot(source.x_err, source.y_err)
    assert abs(source.flux - flux) < 4 * source.flux_err
    # the error of PSF photometry in white noise: noise times the root of the effective area
    assert source.flux_err == pytest.approx(noise * np.sqrt(4 * np.pi) * sigma, rel=0.02)
    assert source.aperture_flux == pytest.approx(flux, rel=0.03)
    assert 0.5 < source.chi2 < 1.5
    assert source.correlation > 0.97
    assert not source.is_centroid_bad
    # a pixel at a distance r has the part exp(−r²/2σ²)/2πσ² of a Gaussian's light
    part = np.exp(-(2.6**2 + 0.2**2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    assert source.hit == pytest.approx(part, rel=0.05)


def test_connected_groups_are_those_of_a_labelling():
    plane = (np.random.default_rng(4).random((80, 90)) < 0.35).astype(np.float32)
    expected, count = ndimage.label(plane, structure=np.ones((3, 3)))
    x, y = detect._pixels_above(plane, np.float32(0.5))
    label, found = detect.connected(x, y)
    assert found == count
    pairs = set(zip(label.tolist(), expected[y, x].tolist(), strict=True))
    assert len(pairs) == count


def test_peaks_are_the_pixels_that_a_maximum_filter_keeps():
    snr = np.random.default_rng(5).normal(0, 2, (120, 130)).astype(np.float32)
    x, y, _ = detect.find_peaks(snr, 5.0, radius=3)
    keep = (np.abs(snr) >= 5) & (
        (snr == ndimage.maximum_filter(snr, 7)) | (snr == ndimage.minimum_filter(snr, 7))
    )
    assert set(zip(x.tolist(), y.tolist(), strict=True)) == {(b, a) for a, b in np.argwhere(keep).tolist()}
    strength = np.abs(snr[y, x])
    assert (np.diff(strength) <= 0).all()


def test_saturated_stars_reach_as_far_as_they_are_large():
    mask = np.zeros((100, 100), np.uint16)
    mask[40:50, 40:50] = 2
    mask[80, 80] = 2
    reach = detect.SaturationReach(mask, 2, 2.0)
    near, edge, far, single = reach(np.array([45, 54, 70, 81]), np.array([45, 45, 45, 80]))
    assert near == pytest.approx(0.25)
    # 5 pixels from a core of 100 pixels, whose halo reaches sqrt(100/pi) + 5
    assert edge == pytest.approx(0.25 * (1 - 5 / (np.sqrt(100 / np.pi) + 5)))
    assert far == 0
    assert single == 0


def test_light_near_a_place():
    image = np.zeros((40, 40), np.float32)
    image[20, 20], image[20, 26] = 3.0, 10.0
    image[0, 0] = np.nan
    here, near = detect.light_near(image, np.array([20, 1]), np.array([20, 1]), 4.0)
    assert here[0] == 3.0
    assert near[0] == 10.0
    assert (here[1], near[1]) == (0.0, 0.0)


def test_median_by_selection():
    rng = np.random.default_rng(6)
    for n in (1, 2, 8, 9, 25, 48, 49):
        values = rng.normal(size=n).astype(np.float32)
        assert _middle(values.copy(), n) == pytest.approx(np.median(values), rel=1e-6)
    image = rng.normal(size=(30, 30)).astype(np.float32)
    third = ndimage.median_filter(image, 3)
    expected = third[15, 15] - np.median(third[12:19, 12:19])
    buffers = np.empty(49, np.float32), np.empty(25, np.float32)
    assert _fine_structure(image, 15, 15, *buffers) == pytest.approx(expected, abs=1e-6)


def test_planes_are_copied_only_where_something_is_wrong():
    image = np.ones((20, 30), np.float32)
    assert planes.finite_image(image) is image
    assert planes.finite_variance(image) is image
    image[3, 4], image[5, 6] = np.nan, np.inf
    fixed = planes.finite_image(image)
    assert (fixed[3, 4], fixed[5, 6], fixed[0, 0]) == (0, 0, 1)
    variance = np.full((20, 30), 7, np.float32)
    variance[2, 2], variance[4, 4], variance[6, 6] = np.nan, 1e20, 0
    assert (planes.finite_variance(variance) == 7).all()
    assert planes.has_no_variance(variance)


def test_memory_is_held_where_the_library_can():
    assert set(ENVIRONMENT) == {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX"}
    assert hold_memory() in (True, False)
