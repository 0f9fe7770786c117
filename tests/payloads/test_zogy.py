"""Proper subtraction against simulated images with known PSFs, fluxes, shifts and noise."""

import numpy as np
import pytest

from cumbre.core.errors import ConfigurationError
from cumbre.payloads.difference import DifferenceConfig, difference
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels import zogy
from cumbre.payloads.kernels.psf import gaussian_psf
from cumbre.payloads.processing import process_pair
from cumbre.payloads.zogy import relate

SHAPE = (620, 640)
PLANTED = 45


def widths(x, kind):
    """(sigma_x, sigma_y) of the PSF across the field: the science's is elongated and turns round along x."""
    t = x / SHAPE[1]
    return (1.75 - 0.3 * t, 1.45 + 0.3 * t) if kind == "science" else (1.4 + 0.1 * t, 1.5 - 0.1 * t)


def render(x, y, flux, kind):
    image = np.zeros(SHAPE)
    grid = np.arange(-15, 16)
    for a, b, f in zip(x, y, flux, strict=True):
        ix, iy = round(a), round(b)
        sx, sy = widths(a, kind)
        gx, gy = np.exp(-0.5 * ((grid + ix - a) / sx) ** 2), np.exp(-0.5 * ((grid + iy - b) / sy) ** 2)
        stamp = f * np.outer(gy, gx) / (2 * np.pi * sx * sy)
        y0, y1, x0, x1 = max(iy - 15, 0), min(iy + 16, SHAPE[0]), max(ix - 15, 0), min(ix + 16, SHAPE[1])
        image[y0:y1, x0:x1] += stamp[y0 - iy + 15 : y1 - iy + 15, x0 - ix + 15 : x1 - ix + 15]
    return image


def exposure(image, noise, rng):
    variance = noise**2 + np.maximum(image, 0)
    noisy = image + rng.normal(0, 1, SHAPE) * np.sqrt(variance)
    return Exposure(
        noisy.astype(np.float32), variance.astype(np.float32), np.zeros(SHAPE, np.uint16),
        is_background_subtracted=True,
    )  # fmt: skip


def pair(seed, *, deep=False):
    """Science and template with 180 stars; the template has 0.8 of the flux and lies 0.13 px off; 45 planted."""
    rng = np.random.default_rng(seed)
    gx, gy = np.meshgrid(np.arange(25, 620, 42.0), np.arange(25, 600, 42.0))
    x, y = gx.ravel() + rng.uniform(-6, 6, gx.size), gy.ravel() + rng.uniform(-6, 6, gx.size)
    flux = 10 ** rng.uniform(3.4, 4.9, gx.size)
    places = np.flatnonzero((gx.ravel() > 40) & (gy.ravel() > 40) & (gx.ravel() < 590) & (gy.ravel() < 570))
    spots = rng.choice(places, PLANTED, replace=False)
    px, py = (
        gx.ravel()[spots] + 21 + rng.uniform(-3, 3, PLANTED),
        gy.ravel()[spots] + 21 + rng.uniform(-3, 3, PLANTED),
    )
    new = 10 ** rng.uniform(3.05, 4.3, PLANTED) * np.where(np.arange(PLANTED) % 3 == 0, -1, 1)
    up, down = new > 0, new < 0
    science = render(x, y, flux, "science") + render(px[up], py[up], new[up], "science")
    template = 0.8 * render(x + 0.13, y - 0.08, flux, "template")
    template += 0.8 * render(px[down] + 0.13, py[down] - 0.08, -new[down], "template")
    pair = exposure(science, 14.0, rng), exposure(template, 4.0 if deep else 10.0, rng)
    return *pair, (px, py, new), (x, y, flux)


def test_filters_make_white_noise_and_one_psf():
    rng = np.random.default_rng(3)
    science, template = gaussian_psf(4.2, SHAPE, 41), gaussian_psf(3.2, SHAPE, 41)
    cell = zogy.Cell(science.centred(0, 0), template.centred(0, 0), 9.0, 4.0, 0.7, (0.2, -0.3))
    kernel_n, kernel_r = zogy.filters(cell)
    assert kernel_n.sum() == pytest.approx(1.0)
    assert kernel_r.sum() == pytest.approx(1 / 0.7)
    from scipy.signal import fftconvolve

    noise = fftconvolve(rng.normal(0, 3, (500, 500)), kernel_n, mode="same")
    noise -= fftconvolve(rng.normal(0, 2, (500, 500)), kernel_r, mode="same")
    noise = noise[30:-30, 30:-30]
    # Parseval: the sum of both variances, the template's in science units
    assert noise.var() == pytest.approx(9 + 4 / 0.49, rel=0.02)
    for dy, dx in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 1), (3, 0)):
        moved = np.roll(noise, (dy, dx), axis=(0, 1))
        assert abs((noise * moved)[5:-5, 5:-5].mean()) / noise.var() < 0.02
    # a star of flux 1 in both, at (0.2, -0.3) in the template, leaves what the added points of light leave
    grid = np.arange(-20, 21)
    sigma = 3.2 / 2.3548
    far = np.exp(-0.5 * (((grid - 0.2) / sigma)[None] ** 2 + ((grid + 0.3) / sigma)[:, None] ** 2))
    left = fftconvolve(science.centred(0, 0).astype(float), kernel_n, mode="full")
    left -= fftconvolve(0.7 * far / far.sum(), kernel_r, mode="full")
    assert np.abs(left).max() < 0.2 * fftconvolve(science.centred(0, 0).astype(float), kernel_n).max()


def test_relation_of_stars_is_that_of_the_images():
    science, template, _, (x, y, flux) = pair(5)
    order = np.argsort(-flux)
    planes = [(e.image, e.variance, np.zeros(SHAPE, bool)) for e in (science, template)]
    images, variances, bad = (tuple(part) for part in zip(*planes, strict=True))
    psfs = difference(science, template, DifferenceConfig(method="zogy"))
    found = relate(images, variances, bad, (psfs.science_psf, psfs.template_psf), x[order], y[order])
    for place in ((60, 60), (320, 300), (560, 560)):
        ratio, (dx, dy) = found.at(*place)
        assert ratio == pytest.approx(0.8, rel=0.015)
        assert (dx, dy) == (pytest.approx(0.13, abs=0.03), pytest.approx(-0.08, abs=0.03))
    assert max(found.sigma_px) < 0.03
    # stars that moved by an error of their own are seen as errors of registration
    rng = np.random.default_rng(9)
    moved = 0.8 * render(x + rng.normal(0, 0.08, x.size), y + rng.normal(0, 0.03, x.size), flux, "template")
    shaken = exposure(moved, 10.0, rng)
    seen = relate(
        (science.image, shaken.image), (science.variance, shaken.variance), bad,
        (psfs.science_psf, psfs.template_psf), x[order], y[order],
    )  # fmt: skip
    assert seen.sigma_px[0] == pytest.approx(0.08, rel=0.35)
    assert seen.sigma_px[1] == pytest.approx(0.03, abs=0.02)


@pytest.fixture(scope="module", params=[False, True], ids=["template as noisy", "deep template"])
def results(request):
    made = []
    for seed in range(2):
        science, template, planted, stars = pair(100 + seed, deep=request.param)
        made.append((process_pair(science, template, DifferenceConfig(method="zogy")), planted, stars))
    return made


def matched(results, reach=1.0):
    """(flux, error, truth, snr) of planted sources found, number planted, others."""
    rows, others, planted = [], 0, 0
    for result, (px, py, new), _ in results:
        s = result.sources
        distance = np.hypot(s["x"][None] - px[:, None], s["y"][None] - py[:, None])
        near = distance.argmin(axis=1)
        found = (distance.min(axis=1) < reach) & (s["isNegative"][near] == (new < 0))
        planted += len(px)
        rows += [
            (s["psfFlux"][near[k]], s["psfFluxErr"][near[k]], new[k], s["snr"][near[k]])
            for k in np.flatnonzero(found)
        ]
        others += int((s["reliability"] >= 0.5).sum() - (s["reliability"][near[found]] >= 0.5).sum())
    return np.array(rows), planted, others


def test_planted_sources_are_found_with_their_fluxes_and_errors(results):
    rows, planted, others = matched(results)
    flux, error, truth, snr = rows.T
    assert len(rows) >= 0.98 * planted
    assert others <= 3
    bright = np.abs(truth) > 4000
    assert np.median(flux[bright] / truth[bright]) == pytest.approx(1.0, abs=0.01)
    pulls = (flux - truth) / error
    assert abs(np.median(pulls)) < 0.3
    assert 0.7 < pulls.std() < 1.1
    assert snr.min() > 5


def test_difference_is_white_with_the_variance_it_says(results):
    for result, *_ in results:
        image, variance = result.exposure.image, result.exposure.variance
        empty = (result.exposure.mask == 0) & (variance < 1.15 * np.median(variance))
        empty[:30] = empty[-30:] = False
        pull = np.where(empty, image / np.sqrt(variance), np.nan)
        assert np.nanstd(pull) == pytest.approx(1.0, abs=0.04)
        for dy, dx in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):
            both = pull * np.roll(pull, (dy, dx), axis=(0, 1))
            assert abs(np.nanmean(both)) < 0.03
        assert result.metrics["snr_scale"] == pytest.approx(1.0, abs=0.1)
        assert result.metrics["noise_scale"] == pytest.approx(1.0, abs=0.05)


def test_score_is_at_least_that_of_the_fitted_kernel():
    science, template, (px, py, new), _ = pair(31)
    score = {}
    for method in ("zogy", "alard_lupton"):
        result = process_pair(science, template, DifferenceConfig(method=method))
        score[method] = np.abs(result.significance[np.rint(py).astype(int), np.rint(px).astype(int)])
    faint = np.abs(new) < 3000
    assert np.median(score["zogy"][faint] / score["alard_lupton"][faint]) > 0.98


def test_bad_pixels_of_both_images_are_named_as_far_as_they_reach():
    science, template, *_ = pair(41)
    for one, (y, x), plane in ((science, (200, 200), MaskPlane.SAT), (template, (400, 300), MaskPlane.SAT),
                               (science, (300, 500), MaskPlane.BAD), (template, (100, 450), MaskPlane.NO_DATA)):  # fmt: skip
        one.image[y : y + 3, x : x + 3] = 60000.0
        one.mask[y : y + 3, x : x + 3] |= np.uint16(plane)
    made = difference(science, template, DifferenceConfig(method="zogy"))
    mask = made.exposure.mask
    assert mask[201, 201] & MaskPlane.SAT
    assert mask[401, 301] & MaskPlane.SAT_TEMPLATE
    assert mask[301, 501] & MaskPlane.BAD
    assert mask[101, 451] & MaskPlane.NO_DATA
    assert mask[201, 198] & MaskPlane.SAT
    assert mask[401, 298] & MaskPlane.SAT_TEMPLATE
    assert not mask[250:270, 250:270].any()
    assert np.isfinite(made.exposure.image).all()


def test_errors_of_registration_quench_residuals_and_leave_what_is_new():
    rng = np.random.default_rng(55)
    science, _, (px, py, new), (x, y, flux) = pair(51)
    shaken = render(x + rng.normal(0, 0.12, x.size), y + rng.normal(0, 0.12, x.size), flux, "template")
    up = new > 0
    template = exposure(shaken, 10.0, rng)
    result = process_pair(science, template, DifferenceConfig(method="zogy"))
    assert result.metrics["astrometric_noise_x_px"] == pytest.approx(0.12, rel=0.35)
    fitted = process_pair(science, template, DifferenceConfig())
    bright = np.rint(y[flux > 3e4]).astype(int), np.rint(x[flux > 3e4]).astype(int)

    def worst(done):
        peak = [
            np.abs(done.significance[b - 3 : b + 4, a - 3 : a + 4]).max()
            for b, a in zip(*bright, strict=True)
        ]
        return np.median(peak)

    assert worst(result) < 0.6 * worst(fitted)
    assert worst(result) < 4.0
    at = np.rint(py[up]).astype(int), np.rint(px[up]).astype(int)
    assert np.median(result.significance[at] / fitted.significance[at]) > 0.95


def test_unknown_method_says_what_there_is():
    science, template, *_ = pair(61)
    with pytest.raises(ConfigurationError, match="method = 'hotpants': expected one of alard_lupton, zogy"):
        difference(science, template, DifferenceConfig(method="hotpants"))
