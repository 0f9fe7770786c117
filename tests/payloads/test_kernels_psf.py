"""PSF model and photometry against simulated stars of known shape and flux."""

import numpy as np
import pytest

from cumbre.core.errors import UnprocessableDataError
from cumbre.payloads.kernels import photometry, psf
from cumbre.payloads.kernels.wcs import PlaneWcs  # noqa: F401  (kernels import together)


def render(shape, x, y, flux, fwhm):
    """Moffat stars (beta 3) integrated on 5 x 5 subpixels; fwhm is a number or a function of x, y."""
    out = np.zeros(shape)
    sub = (np.arange(5) - 2) / 5
    for xi, yi, fi in zip(x, y, flux, strict=True):
        w = fwhm(xi, yi) if callable(fwhm) else fwhm
        alpha = w / (2 * np.sqrt(2 ** (1 / 3.0) - 1))
        x0, y0 = max(int(xi) - 30, 0), max(int(yi) - 30, 0)
        yy, xx = np.mgrid[y0 : min(y0 + 61, shape[0]), x0 : min(x0 + 61, shape[1])]
        star = sum(
            (1 + ((xx + a - xi) ** 2 + (yy + b - yi) ** 2) / alpha**2) ** -3.0 for a in sub for b in sub
        )
        out[yy[0, 0] : yy[-1, 0] + 1, xx[0, 0] : xx[0, -1] + 1] += star * fi * 2 / (np.pi * alpha**2) / 25
    return out


def grid_positions(rng, n, step, size):
    gx, gy = np.meshgrid(np.arange(n) * step + 45.0, np.arange(n) * step + 45.0)
    x = (gx + rng.uniform(-4, 4, gx.shape)).ravel()
    y = (gy + rng.uniform(-4, 4, gy.shape)).ravel()
    assert max(x.max(), y.max()) < size - 30
    return x, y


@pytest.fixture(scope="module")
def field():
    rng = np.random.default_rng(4)
    x, y = grid_positions(rng, 9, 62.0, 620)
    flux = 10 ** rng.uniform(4.2, 5.2, x.size)

    def width(a, b):
        return 3.6 * (1 + 0.06 * (a / 619 - 0.5) - 0.05 * (b / 619 - 0.5) ** 2)

    image = render((620, 620), x, y, flux, width)
    variance = image + 400.0
    noisy = (image + rng.normal(0, 1, image.shape) * np.sqrt(variance)).astype(np.float32)
    return noisy, variance.astype(np.float32), x, y, flux, width


def test_psf_follows_the_position(field):
    image, _, x, y, _, width = field
    mask = np.zeros(image.shape, np.uint16)
    model = psf.fit_psf(image, mask, x, y, bad_bits=2, fwhm_px=3.6, noise=20)
    assert model.order >= 1
    assert model.n_stars > 70
    assert model.fwhm_px == pytest.approx(3.6, rel=0.04)
    for px, py in ((60.3, 70.8), (310.5, 310.1), (550.9, 90.2)):
        stamp = model.stamp(px, py)
        assert stamp.sum() == pytest.approx(1, abs=3e-4)
        truth = render((620, 620), [px], [py], [1.0], width)
        ix, iy = int(px + 0.5), int(py + 0.5)
        h = model.size // 2
        cut = truth[iy - h : iy + h + 1, ix - h : ix + h + 1]
        # the stamp has sum one within its circle; the wings of a Moffat star go on beyond it
        scale = np.sum(stamp * cut) / np.sum(stamp**2)
        assert scale == pytest.approx(0.98, abs=0.015)
        assert np.abs(scale * stamp - cut).max() < 0.015 * cut.max()


def test_psf_fluxes_are_unbiased_and_errors_honest(field):
    image, variance, x, y, flux, _ = field
    mask = np.zeros(image.shape, np.uint16)
    model = psf.fit_psf(image, mask, x, y, bad_bits=2, fwhm_px=3.6, noise=20)
    result = photometry.forced_psf_photometry(image, variance, mask, model, x, y, bad_bits=2)
    ratio = result.flux / flux
    # the stamp holds 98 % of a Moffat star's light; the rest is the aperture correction of calibrate
    assert np.median(ratio) == pytest.approx(0.98, abs=0.01)
    pull = (result.flux / np.median(ratio) - flux) / result.flux_err
    assert 1.4826 * np.median(np.abs(pull - np.median(pull))) == pytest.approx(1, abs=0.3)
    assert np.nanmedian(result.chi2) == pytest.approx(1, abs=0.25)
    rng = np.random.default_rng(9)
    sx, sy = rng.uniform(30, 590, (2, 2000))
    empty = np.min(np.hypot(sx[:, None] - x, sy[:, None] - y), axis=1) > 24
    sky = photometry.forced_psf_photometry(image, variance, mask, model, sx[empty], sy[empty], bad_bits=2)
    assert np.std(sky.flux / sky.flux_err) == pytest.approx(1, abs=0.1)


def test_masked_and_outside_positions(field):
    image, variance, x, y, flux, _ = field
    mask = np.zeros(image.shape, np.uint16)
    model = psf.fit_psf(image, mask, x, y, bad_bits=2, fwhm_px=3.6, noise=20)
    mask[int(y[0]) - 1, int(x[0]) + 1] = 2
    broken = image.copy()
    broken[int(y[0]) - 1, int(x[0]) + 1] = np.nan
    got = photometry.forced_psf_photometry(
        broken, variance, mask, model, [x[0], -300.0, 0.0, np.nan], [y[0], 10.0, 0.0, 5.0], bad_bits=2
    )
    assert got.flux[0] == pytest.approx(flux[0], rel=0.05)
    assert got.fraction[0] < 0.99
    assert got.bits[0] == 2
    assert np.isnan(got.flux[1:]).all()


def test_few_and_impossible_stars(field):
    image, _, x, y, _, _ = field
    mask = np.zeros(image.shape, np.uint16)
    model = psf.fit_psf(image, mask, x[:1], y[:1], bad_bits=2, fwhm_px=3.6, noise=20)
    assert model.order == 0
    assert model.fwhm_px == pytest.approx(3.6, rel=0.1)
    mask[:] = 2
    with pytest.raises(UnprocessableDataError):
        psf.fit_psf(image, mask, x, y, bad_bits=2)


def test_galaxies_do_not_enter(field):
    image, _, x, y, flux, _ = field
    rng = np.random.default_rng(3)
    extra = rng.choice(x.size, 20, replace=False)
    blurred = image + render(image.shape, x[extra] + 2.5, y[extra] + 1.0, 0.6 * flux[extra], 8.0).astype(
        np.float32
    )
    model = psf.fit_psf(blurred, np.zeros(image.shape, np.uint16), x, y, bad_bits=2, fwhm_px=3.6, noise=20)
    assert model.fwhm_px == pytest.approx(3.6, rel=0.05)
    assert 40 <= model.n_stars <= x.size - 15
    size = np.full(x.size, 2.0) + rng.normal(0, 0.03, x.size)
    size[extra] = 3.5
    chosen = psf.select_psf_stars(x, y, flux, np.full(x.size, 500), size, np.ones(x.size), shape=image.shape)
    assert not set(chosen) & set(extra)
    assert len(chosen) > 45


def test_apertures_and_gaussian():
    model = psf.gaussian_psf(4.0, (100, 100))
    assert model.fwhm_px == 4.0
    assert psf.fwhm_of(model.centred(50, 50)) == pytest.approx(4.0, rel=0.03)
    image = np.zeros((100, 100), np.float32)
    h = model.size // 2
    image[40 - h : 41 + h, 60 - h : 61 + h] = 1000 * model.stamp(60.0, 40.0)
    image += 7
    flux, error, flags = photometry.aperture_photometry(
        image, np.full_like(image, 4.0), None, [60.0], [40.0], 10.0, annulus=(15, 20)
    )
    assert flux[0] == pytest.approx(1000, abs=2)
    assert error[0] == pytest.approx(np.sqrt(4 * np.pi * 100 * (1 + 100 / (400 - 225))), rel=0.02)
    assert flags[0] == 0
