"""Kernel matching, decorrelation and detection against simulated images with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import convolve2d

from cumbre.core.errors import NoWorkFoundError
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels.align import register
from cumbre.payloads.kernels.detect import find_peaks, streak_mask
from cumbre.payloads.kernels.difference import convolve_field, decorrelation_kernel
from cumbre.payloads.kernels.kernel_match import fit_kernel, gaussian_basis, select_stamps
from cumbre.payloads.kernels.planes import robust_rms
from cumbre.payloads.processing import process_pair

SHAPE = (500, 520)


def gaussians(x, y, flux, sigma, shape=SHAPE):
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    image = np.zeros(shape)
    for a, b, f in zip(x, y, flux, strict=True):
        y0, x0 = int(b), int(a)
        box = np.s_[max(y0 - 20, 0) : y0 + 21, max(x0 - 20, 0) : x0 + 21]
        image[box] += (
            f * np.exp(-((xx[box] - a) ** 2 + (yy[box] - b) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
        )
    return image


@pytest.fixture(scope="module")
def field():
    """Stars on a jittered grid, so that they are isolated."""
    rng = np.random.default_rng(4)
    gx, gy = np.meshgrid(np.arange(30, 500, 42), np.arange(30, 480, 42))
    x = gx.ravel() + rng.uniform(-6, 6, gx.size)
    y = gy.ravel() + rng.uniform(-6, 6, gx.size)
    return x, y, 10 ** rng.uniform(3.6, 4.9, gx.size)


def exposure(image, noise, seed, gain=4.0):
    rng = np.random.default_rng(seed)
    variance = noise**2 + np.maximum(image, 0) / gain
    noisy = (image + rng.normal(0, np.sqrt(variance))).astype(np.float32)
    return Exposure(
        noisy, variance.astype(np.float32), np.zeros(image.shape, np.uint16), is_background_subtracted=True
    )


def test_basis_sums_are_one_and_zero():
    images = gaussian_basis(10, (0.7, 1.5, 3.0), (4, 2, 0)).images()
    assert images[0].sum() == pytest.approx(1.0)
    assert np.abs(images[1:].sum(axis=(1, 2))).max() < 1e-12


def test_basis_convolution_equals_direct_convolution():
    basis = gaussian_basis(4, (1.0, 2.0), (2, 1))
    stamp = np.random.default_rng(0).normal(size=(21, 21))
    direct = [convolve2d(stamp, kernel, mode="valid") for kernel in basis.images()]
    np.testing.assert_allclose(basis.convolve(stamp), direct, atol=1e-10)


def test_kernel_of_two_gaussians_is_the_gaussian_between(field):
    x, y, flux = field
    template, science = gaussians(x, y, flux, 1.5), gaussians(x, y, 1.3 * flux, 2.0) + 7.0
    chosen = select_stamps(x, y, flux, SHAPE, cells=4, per_cell=6)
    solution = fit_kernel(
        template.astype(np.float32), science.astype(np.float32), np.full(SHAPE, 4.0, np.float32),
        np.zeros(SHAPE, bool), np.stack([x, y], 1)[chosen], basis=gaussian_basis(8, (0.7, 1.5, 3.0), (4, 2, 0)), order=1,
    )  # fmt: skip
    kernel = solution.kernel(260, 250)
    grid = np.arange(-8, 9)
    expected = np.exp(-(grid[:, None] ** 2 + grid**2) / (2 * (2.0**2 - 1.5**2)))
    expected *= 1.3 / expected.sum()
    assert solution.metrics["sum"] == pytest.approx(1.3, rel=2e-3)
    # What the template's PSF does not pass cannot be known: compare after convolution with it.
    psf = np.exp(-(grid[:, None] ** 2 + grid**2) / (2 * 1.5**2))
    seen, right = (convolve2d(k, psf / psf.sum(), mode="same") for k in (kernel, expected))
    assert np.abs(seen - right).max() < 0.005 * right.max()
    assert solution.background_image().mean() == pytest.approx(7.0, abs=0.1)


def test_stars_missing_in_the_template_do_not_bend_the_kernel(field):
    x, y, flux = field
    template, science = gaussians(x, y, flux, 1.5), gaussians(x, y, flux, 2.0)
    science += gaussians(x[::12], y[::12] + 3, flux[::12], 2.0)
    solution = fit_kernel(
        template.astype(np.float32), science.astype(np.float32), np.full(SHAPE, 4.0, np.float32),
        np.zeros(SHAPE, bool), np.stack([x, y], 1), basis=gaussian_basis(8, (0.7, 1.5, 3.0), (4, 2, 0)), order=1,
    )  # fmt: skip
    assert solution.metrics["sum"] == pytest.approx(1.0, rel=0.005)


def test_too_few_stars_is_no_work():
    zero = np.zeros(SHAPE, np.float32)
    with pytest.raises(NoWorkFoundError, match="usable stars"):
        fit_kernel(zero, zero, zero + 1, zero > 1, np.zeros((0, 2)), basis=gaussian_basis(5, (1.0,), (0,)))


def test_decorrelation_makes_noise_white():
    rng = np.random.default_rng(2)
    grid = np.arange(-10, 11)
    kernel = np.exp(-(grid[:, None] ** 2 + grid**2) / (2 * 1.6**2))
    kernel /= kernel.sum()
    science, template = rng.normal(0, 3, (400, 400)), rng.normal(0, 4, (400, 400))
    matched = convolve_field(template.astype(np.float32), lambda x, y: kernel, 10)
    difference = (science - matched).astype(np.float32)
    phi = decorrelation_kernel(kernel, 9.0, 16.0)
    white = convolve_field(difference, lambda x, y: phi, phi.shape[0] // 2)[40:-40, 40:-40]
    assert phi.sum() == pytest.approx(1.0)
    # 9 + 16: what two uncorrelated images give; and neighbours are independent again.
    assert white.var() == pytest.approx(25.0, rel=0.05)
    neighbours = (white[:, 1:] * white[:, :-1]).mean() / white.var()
    assert abs(neighbours) < 0.02
    before = difference[40:-40, 40:-40]
    assert abs((before[:, 1:] * before[:, :-1]).mean() / before.var()) > 0.02


@pytest.mark.parametrize("is_science_sharper", [False, True])
def test_injected_sources_come_back_with_their_flux(field, is_science_sharper):
    x, y, flux = field
    sharp, wide = 1.6, 2.1
    s_sigma, t_sigma = (sharp, wide) if is_science_sharper else (wide, sharp)
    rng = np.random.default_rng(8)
    nx_, ny_ = rng.uniform(40, 480, 20), rng.uniform(40, 460, 20)
    far = np.array([np.hypot(x - a, y - b).min() > 12 for a, b in zip(nx_, ny_, strict=True)])
    nx_, ny_ = nx_[far], ny_[far]
    new = np.where(np.arange(len(nx_)) % 4 == 0, -1.0, 1.0) * 3000.0
    science = exposure(gaussians(x, y, flux, s_sigma) + gaussians(nx_, ny_, new, s_sigma), 10.0, 1)
    template = exposure(0.5 * gaussians(x, y, flux, t_sigma), 4.0, 2)
    result = process_pair(science, template)
    assert result.difference.is_science_convolved is is_science_sharper
    found = result.sources[result.sources["reliability"] >= 0.5]
    distance = np.hypot(found["x"][None] - nx_[:, None], found["y"][None] - ny_[:, None])
    assert (distance.min(axis=1) < 1.0).mean() >= 0.95
    pick = distance.argmin(axis=1)
    ratio = found["psfFlux"][pick] / new
    assert np.median(ratio) == pytest.approx(1.0, abs=0.03)
    assert np.median(found["flux"][pick] / new) == pytest.approx(1.0, abs=0.05)
    assert (found["isNegative"][pick] == (new < 0)).all()
    # As many false as Gaussian noise allows, and fluxes scatter as their errors say.
    assert len(found) - len(nx_) <= 2
    pull = (found["psfFlux"][pick] - new) / found["psfFluxErr"][pick]
    assert robust_rms(pull) < 1.8


def test_bad_pixels_saturation_and_cosmic_rays_are_not_reliable(field):
    x, y, flux = field
    image, template = gaussians(x, y, flux, 2.0), gaussians(x, y, flux, 1.6)
    science = exposure(image, 10.0, 3)
    science.image[100, 70:74] += 4000
    science.mask[100, 69:75] |= np.uint16(MaskPlane.CR)
    science.image[300, 333] += 5000  # a cosmic ray nobody flagged: sharper than the PSF
    science.image[200:206, 200:206] = 50000
    science.mask[198:208, 198:208] |= np.uint16(MaskPlane.SAT)
    result = process_pair(science, exposure(template, 5.0, 4))
    reliable = result.sources[result.sources["reliability"] >= 0.5]
    for a, b in ((72, 100), (333, 300), (203, 203)):
        assert not (np.hypot(reliable["x"] - a, reliable["y"] - b) < 12).any()


def test_moved_star_is_a_dipole(field):
    x, y, flux = field
    x2, flux2 = x.copy(), flux.copy()
    x2[40] += 1.2
    flux2[40] = flux[40] = 80000.0
    result = process_pair(
        exposure(gaussians(x2, y, flux2, 2.0), 10, 5), exposure(gaussians(x, y, flux, 1.6), 5, 6)
    )
    near = result.sources[np.hypot(result.sources["x"] - x[40], result.sources["y"] - y[40]) < 6]
    assert near["isDipole"].any()
    assert (near["reliability"] < 0.5).all()


def test_significance_is_gaussian_on_empty_sky():
    empty = np.zeros(SHAPE)
    x, y = np.meshgrid(np.arange(60, 480, 100), np.arange(60, 460, 100))
    stars = gaussians(x.ravel(), y.ravel(), np.full(x.size, 2e4), 1.8)
    result = process_pair(exposure(empty + stars, 10, 7), exposure(empty + stars, 10, 8))
    far = np.ones(SHAPE, bool)
    for a, b in zip(x.ravel(), y.ravel(), strict=True):
        far[b - 20 : b + 21, a - 20 : a + 21] = False
    assert robust_rms(result.significance[far]) == pytest.approx(1.0, abs=0.05)
    assert len(result.sources[result.sources["reliability"] >= 0.5]) <= 1


def test_streak_is_masked():
    rng = np.random.default_rng(0)
    snr = rng.normal(0, 1, (400, 400)).astype(np.float32)
    t = np.arange(350)
    for offset in (-1, 0, 1):
        snr[(20 + 0.8 * t).astype(int) + offset, 30 + t] += 8
    mask = streak_mask(snr, width=9)
    assert mask is not None
    assert mask[(20 + 0.8 * t[20:330]).astype(int), 30 + t[20:330]].mean() > 0.9
    assert mask.mean() < 0.06


def test_peaks_of_both_signs_strongest_first():
    snr = np.zeros((50, 50), np.float32)
    snr[10, 20], snr[30, 40] = 6, -9
    x, y, negative = find_peaks(snr, 5.0)
    assert list(zip(x, y, negative, strict=True)) == [(40, 30, True), (20, 10, False)]


@pytest.mark.parametrize(
    ("angle", "shift", "scale"), [(0, (15, -8), 1.0), (37, (60, 20), 1.0), (180, (500, 480), 1.4)]
)
def test_register_finds_shift_rotation_scale(angle, shift, scale):
    rng = np.random.default_rng(3)
    x, y = rng.uniform(0, 1000, 120), rng.uniform(0, 1000, 120)
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    xo = scale * (c * x - s * y) + shift[0] + rng.normal(0, 0.05, 120)
    yo = scale * (s * x + c * y) + shift[1] + rng.normal(0, 0.05, 120)
    found = register(x, y, xo, yo)
    px, py = found(500.0, 500.0)
    assert float(px) == pytest.approx(scale * (c * 500 - s * 500) + shift[0], abs=0.1)
    assert float(py) == pytest.approx(scale * (s * 500 + c * 500) + shift[1], abs=0.1)


def test_unrelated_fields_do_not_register():
    rng = np.random.default_rng(5)
    with pytest.raises(NoWorkFoundError, match="same field"):
        register(*rng.uniform(0, 1000, (2, 60)), *rng.uniform(0, 1000, (2, 60)))


def test_an_interpolated_column_hides_no_source_beside_it(field):
    """The science image is the sharper one, and is convolved: what it lacks spreads."""
    x, y, flux = field
    columns = [100, 183, 266, 349, 432]
    new_y = np.array([70.0, 155.0, 238.0, 322.0, 405.0])
    new_x = np.array(columns) + 3.0
    free = np.array([np.hypot(x - a, y - b).min() > 10 for a, b in zip(new_x, new_y, strict=True)])
    new_x, new_y = new_x[free], new_y[free]
    assert len(new_x) >= 2
    found = {}
    for bits in (MaskPlane.BAD | MaskPlane.INTRP | MaskPlane.NO_DATA, MaskPlane.NO_DATA):
        light = gaussians(x, y, flux, 1.6) + gaussians(new_x, new_y, np.full(len(new_x), 3000.0), 1.6)
        science = exposure(light, 10.0, 1)
        for column in columns:
            science.image[:, column] = 0.5 * (science.image[:, column - 1] + science.image[:, column + 1])
            science.mask[:, column] = np.uint16(bits)
        result = process_pair(science, exposure(0.5 * gaussians(x, y, flux, 2.1), 4.0, 2))
        assert result.difference.is_science_convolved
        good = result.sources[result.sources["reliability"] >= 0.5]
        distance = np.hypot(good["x"][None] - new_x[:, None], good["y"][None] - new_y[:, None])
        found[int(bits)] = int((distance.min(axis=1, initial=np.inf) < 1.0).sum())
        if found[int(bits)] == len(new_x):
            assert good["psfFlux"][distance.argmin(axis=1)] == pytest.approx(3000.0, rel=0.2)
    assert found[int(MaskPlane.BAD | MaskPlane.INTRP | MaskPlane.NO_DATA)] == len(new_x)
    assert found[int(MaskPlane.NO_DATA)] < len(new_x)
