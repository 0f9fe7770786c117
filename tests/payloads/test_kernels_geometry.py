"""WCS, matching and warping against geometry that is known exactly."""

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from cumbre.core.errors import UnprocessableDataError
from cumbre.payloads.kernels import match, warp, wcs


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def distorted_sky(x, y, ra0=120.0, dec0=-33.0):
    """Truth independent of SIP: radial distortion on the focal plane, rotation 25 deg, 0.6 arcsec pixels."""
    u, v = (x - 511.5) * 0.6 / 3600, (y - 511.5) * 0.6 / 3600
    t = np.radians(25)
    u, v = np.cos(t) * u - np.sin(t) * v, np.sin(t) * u + np.cos(t) * v
    r2 = (u + 0.13) ** 2 + (v + 0.13) ** 2
    u, v = (u + 0.13) * (1 + 0.01 * r2), (v + 0.13) * (1 + 0.01 * r2)
    return wcs.from_tangent_plane(-u, v, ra0, dec0)


def test_tangent_plane_agrees_with_astropy():
    from astropy.coordinates import SkyCoord

    point = SkyCoord([10.2, 9.7], [45.1, 44.8], unit="deg")
    centre = SkyCoord(10, 45, unit="deg")
    xi, eta = wcs.to_tangent_plane(point.ra.deg, point.dec.deg, 10, 45)
    separation = np.tan(centre.separation(point).rad)
    assert np.allclose(np.hypot(np.radians(xi), np.radians(eta)), separation, rtol=1e-12)
    ra, dec = wcs.from_tangent_plane(xi, eta, 10, 45)
    assert np.allclose(ra, point.ra.deg)
    assert np.allclose(dec, point.dec.deg)


@pytest.mark.parametrize("dec0", [-33.0, 88.0, 0.0])
def test_fit_recovers_a_distorted_field_and_clips(rng, dec0):
    x, y = rng.uniform(0, 1023, (2, 300))
    ra, dec = distorted_sky(x, y, ra0=359.99, dec0=dec0)
    noise = rng.normal(0, 0.03 / 3600, (2, 300))
    ra_seen, dec_seen = ra + noise[0] / np.cos(np.radians(dec)), dec + noise[1]
    dec_seen[:15] += 2 / 3600
    fit = wcs.fit_wcs(x, y, ra_seen, dec_seen, crpix=(511.5, 511.5), order=3)
    assert not fit.used[:15].any()
    assert fit.used[15:].mean() > 0.97
    assert fit.rms_x_arcsec == pytest.approx(0.03, rel=0.15)
    assert fit.rms_y_arcsec == pytest.approx(0.03, rel=0.15)
    gx, gy = np.meshgrid(np.linspace(20, 1000, 9), np.linspace(20, 1000, 9))
    ra_true, dec_true = distorted_sky(gx, gy, ra0=359.99, dec0=dec0)
    px, py = fit.wcs.sky2pix(ra_true, dec_true)
    assert np.max(np.hypot(px - gx, py - gy)) < 0.05


def test_header_means_the_same_to_astropy(rng):
    x, y = rng.uniform(0, 1023, (2, 400))
    fit = wcs.fit_wcs(x, y, *distorted_sky(x, y), crpix=(511.5, 511.5), order=3)
    header = fits.Header(list(fit.wcs.to_header((1024, 1024)).items()))
    theirs = WCS(header)
    ra, dec = theirs.all_pix2world(x, y, 0)
    ours = fit.wcs.pix2sky(x, y)
    assert np.allclose(ra, ours[0], atol=1e-9)
    assert np.allclose(dec, ours[1], atol=1e-9)
    px, py = fit.wcs.sky2pix(ra, dec)
    assert np.max(np.hypot(px - x, py - y)) < 1e-5
    again = wcs.PlaneWcs.from_header(header)
    assert np.allclose(again.pix2sky(x, y), ours, atol=1e-12)
    up, vp = (np.asarray(value) - 511.5 for value in theirs.wcs_world2pix(ra, dec, 0))  # without SIP
    du = sum(header.get(f"AP_{p}_{q}", 0) * up**p * vp**q for p in range(5) for q in range(5 - p))
    dv = sum(header.get(f"BP_{p}_{q}", 0) * up**p * vp**q for p in range(5) for q in range(5 - p))
    assert np.max(np.hypot(up + du - (x - 511.5), vp + dv - (y - 511.5))) < 0.01


def test_bad_headers_are_refused():
    good = wcs.PlaneWcs.linear(10, 20, 5, 5, np.eye(2) * 1e-4).to_header()
    for change in ({"CTYPE1": "GLON-CAR"}, {"CD1_1": 0.0}, {"CRVAL1": "x"}, {"CRPIX1": float("nan")}):
        with pytest.raises(UnprocessableDataError):
            wcs.PlaneWcs.from_header({**good, **change})
    with pytest.raises(UnprocessableDataError):
        wcs.fit_wcs([1, 2], [1, 2], [1, 2], [1, 2], crpix=(0, 0))
    with pytest.raises(UnprocessableDataError):
        wcs.fit_wcs(np.arange(9), np.arange(9), np.arange(9) * 1e-4, np.arange(9) * 1e-4, crpix=(0, 0))


@pytest.mark.parametrize(
    ("rotation", "scale", "parity"), [(3, 1.0, 1), (178, 1.04, -1), (-95, 0.96, 1), (40, 1.02, -1)]
)
def test_blind_match_far_off(rng, rotation, scale, parity):
    """A 1k detector in a field 1 deg wide, half a degree off, both lists incomplete, 0.5 px noise."""
    n_field = 900
    xr, yr = rng.uniform(-3000, 3000, (2, n_field))
    brightness = rng.exponential(1, n_field)
    t = np.radians(rotation)
    m = scale * np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) @ np.diag([parity, 1.0])
    back = np.linalg.inv(m)
    dx, dy = xr - 1700, yr + 1200
    x, y = back[0, 0] * dx + back[0, 1] * dy, back[1, 0] * dx + back[1, 1] * dy
    inside = (np.abs(x) < 512) & (np.abs(y) < 512) & (rng.random(n_field) < 0.85)
    rank = brightness[inside] * rng.lognormal(0, 0.2, inside.sum())
    order = np.argsort(-rank)
    x = np.concatenate([rng.uniform(-512, 512, 4), x[inside][order]]) + rng.normal(0, 0.5, inside.sum() + 4)
    y = np.concatenate([rng.uniform(-512, 512, 4), y[inside][order]]) + rng.normal(0, 0.5, inside.sum() + 4)
    true = np.concatenate([np.full(4, -1), np.flatnonzero(inside)[order]])
    reference = np.argsort(-brightness)
    found = match.match_blind(x, y, xr[reference], yr[reference], tolerance=4.0)
    assert found is not None
    assert found.transform.parity == parity
    assert found.transform.scale == pytest.approx(scale, abs=0.003)
    right = reference[found.second] == true[found.first]
    assert right.mean() > 0.95
    assert found.n > 0.8 * inside.sum()


def test_blind_match_says_none_for_unrelated_lists(rng):
    x, y = rng.uniform(0, 1000, (2, 60))
    xr, yr = rng.uniform(-2000, 3000, (2, 400))
    assert match.match_blind(x, y, xr, yr, tolerance=3.0, max_rotation_deg=10, parity=1) is None
    assert match.match_images(x[:2], y[:2], xr, yr) is None


def test_match_images_drift_and_half_turn(rng):
    x, y = rng.uniform(0, 650, (2, 80))
    seen = (x > 270) & (y < 440)
    xs, ys = x[seen] - 270 + rng.normal(0, 0.2, seen.sum()), y[seen] + 55 + rng.normal(0, 0.2, seen.sum())
    found = match.match_images(xs, ys, x, y)
    assert found is not None
    assert found.transform.offset == pytest.approx([270, -55], abs=2)
    assert np.array_equal(np.flatnonzero(seen)[found.first], found.second)
    turned = match.match_images(649 - x, 499 - y, x, y)
    assert turned is not None
    assert abs(abs(turned.transform.rotation_deg) - 180) < 0.01
    assert turned.n == 80


def moffat(nx, ny, x, y, flux, fwhm=3.5):
    """Pixel values integrated on 5 x 5 subpixels."""
    alpha = fwhm / (2 * np.sqrt(2 ** (1 / 3.0) - 1))
    sub = (np.arange(5) - 2) / 5
    out = np.zeros((ny, nx))
    yy, xx = np.mgrid[0:ny, 0:nx]
    for a in sub:
        for b in sub:
            out += (1 + ((xx + a - x) ** 2 + (yy + b - y) ** 2) / alpha**2) ** -3.0
    return out * flux * 2 / (np.pi * alpha**2) / 25


def test_warp_moves_a_star_exactly_and_keeps_its_flux():
    star = moffat(100, 90, 40.3, 50.6, 1e5).astype(np.float32)
    variance = np.full_like(star, 25.0)
    mask = np.zeros(star.shape, np.uint16)
    mask[10, 10] = 2
    t = np.radians(12)
    m = 0.8 * np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])

    def to_input(x, y):
        return m[0, 0] * x + m[0, 1] * y + 10.7, m[1, 0] * x + m[1, 1] * y + 2.2

    grid = warp.position_grid(to_input, (80, 110))
    out, out_variance, out_mask = warp.warp(star, variance, mask, grid, (80, 110))
    back = np.linalg.inv(m) @ np.array([40.3 - 10.7, 50.6 - 2.2])
    yy, xx = np.mgrid[0:80, 0:110]
    near = np.hypot(xx - back[0], yy - back[1]) < 18
    truth = moffat(110, 80, back[0], back[1], 1e5, fwhm=3.5 / 0.8)
    # the truth is integrated over the larger output pixel, the warped star over the smaller input pixel
    assert np.abs(out - truth)[near].max() < 0.02 * truth.max()
    assert out[near].sum() == pytest.approx(truth[near].sum(), rel=1e-3)
    assert np.median(out_variance[near]) < 25 * 0.64**2
    outside = (out_mask & warp.NO_DATA) > 0
    ix, iy = to_input(xx, yy)
    assert outside[(ix < 1) | (iy < 1) | (ix > 98) | (iy > 88)].all()
    assert not outside[(ix > 3) & (iy > 3) & (ix < 95) & (iy < 85)].any()
    assert (out[outside] == 0).all()
    assert ((out_mask & 2) > 0).sum() >= 4


def test_warp_whole_pixel_shift_is_exact(rng):
    image = rng.normal(100, 5, (64, 64)).astype(np.float32)
    image[30, 30] = np.nan
    grid = warp.position_grid(lambda x, y: (x + 3, y - 2), (64, 64))
    out, variance, mask = warp.warp(
        image, np.ones_like(image), np.zeros(image.shape, np.uint16), grid, (64, 64)
    )
    inside = (mask & warp.NO_DATA) == 0
    shifted = np.roll(image, (2, -3), axis=(0, 1))
    assert np.allclose(out[inside], shifted[inside], atol=1e-3)
    assert np.allclose(variance[inside], 1, atol=1e-3)
    assert not inside[32, 27]
    assert np.isfinite(out).all()


def test_warp_between_worlds(rng):
    x, y = rng.uniform(0, 1023, (2, 300))
    fit = wcs.fit_wcs(x, y, *distorted_sky(x, y), crpix=(511.5, 511.5), order=3)
    centre = fit.wcs.pix2sky(100.0, 120.0)
    target = wcs.PlaneWcs.linear(
        float(centre[0]), float(centre[1]), 50, 50, [[-0.6 / 3600, 0], [0, 0.6 / 3600]]
    )
    star = moffat(220, 240, 100.4, 119.7, 5e4).astype(np.float32)
    out, _, _ = warp.warp_between(
        star, np.ones_like(star), np.zeros(star.shape, np.uint16), fit.wcs, target, (100, 100)
    )
    px, py = target.sky2pix(*distorted_sky(np.array(100.4), np.array(119.7)))
    yy, xx = np.mgrid[0:100, 0:100]
    core = np.hypot(xx - px, yy - py) < 12
    assert (out * xx)[core].sum() / out[core].sum() == pytest.approx(px, abs=0.02)
    assert (out * yy)[core].sum() / out[core].sum() == pytest.approx(py, abs=0.02)
    assert out.sum() == pytest.approx(star.sum(), rel=0.01)
