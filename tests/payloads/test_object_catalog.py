"""Objects of a coadd against the stars and galaxies that were put into it."""

from __future__ import annotations

import numpy as np
import pytest

from cumbre.core.errors import UnprocessableDataError
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels.psf import gaussian_psf
from cumbre.payloads.kernels.wcs import PlaneWcs
from cumbre.payloads.object_catalog import measure_objects, merge

SHAPE, FWHM, ZERO_POINT, SCALE = (400, 500), 3.2, 27.0, 0.5
SIGMA = FWHM / 2.3548


def wcs(shift=0.0):
    step = SCALE / 3600
    return PlaneWcs.from_header(
        {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 359.99, "CRVAL2": -30.0, "CRPIX1": 250.5 + shift,
         "CRPIX2": 200.5, "CD1_1": -step, "CD1_2": 0.0, "CD2_1": 0.0, "CD2_2": step}
    )  # fmt: skip


def coadd(x, y, flux, *, wide=None, seed=1, shift=0.0):
    rng = np.random.default_rng(seed)
    image = np.zeros(SHAPE)
    jj, ii = np.mgrid[: SHAPE[0], : SHAPE[1]]
    for k in range(len(x)):
        width = SIGMA if wide is None or not wide[k] else 2.0 * SIGMA
        near = (abs(jj - y[k]) < 25) & (abs(ii - x[k]) < 25)
        d2 = (ii[near] - x[k]) ** 2 + (jj[near] - y[k]) ** 2
        image[near] += flux[k] * np.exp(-0.5 * d2 / width**2) / (2 * np.pi * width**2)
    noise = 2.0
    image += rng.normal(0, noise, SHAPE)
    return Exposure(
        image.astype(np.float32), np.full(SHAPE, noise**2, np.float32), np.zeros(SHAPE, np.uint16), wcs=wcs(shift),
        psf=gaussian_psf(FWHM, SHAPE), zero_point=ZERO_POINT, is_background_subtracted=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(7)
    gx, gy = np.meshgrid(np.arange(40, 480, 60), np.arange(40, 380, 60))
    x = gx.ravel() + rng.uniform(-3, 3, gx.size)
    y = gy.ravel() + rng.uniform(-3, 3, gx.size)
    flux = 10 ** rng.uniform(2.8, 4.5, gx.size)
    wide = np.arange(gx.size) % 4 == 0
    return x, y, flux, wide


def test_positions_fluxes_and_shapes(scene):
    x, y, flux, wide = scene
    made = measure_objects(coadd(x, y, flux, wide=wide))
    assert len(made["ra"]) == len(x)
    ra, dec = wcs().pix2sky(x, y)
    for k in range(len(x)):
        near = np.hypot(made["x"] - x[k], made["y"] - y[k])
        j = int(np.argmin(near))
        allowed = 0.05 + 4 * FWHM / made["snr"][j]
        assert near[j] < allowed
        assert abs((made["ra"][j] - ra[k] % 360 + 180) % 360 - 180) * 3600 * np.cos(np.radians(30)) < allowed
        assert abs(made["dec"][j] - dec[k]) * 3600 < allowed
        truth = flux[k] * 3631e9 * 10 ** (-0.4 * ZERO_POINT)
        if wide[k]:
            assert made["extendedness"][j] > 0.5
        else:
            assert abs(made["psfFlux"][j] - truth) < 4 * made["psfFluxErr"][j] + 0.01 * truth
            assert made["extendedness"][j] < 0.5
    assert ((made["ra"] >= 0) & (made["ra"] < 360)).all()


def test_noise_alone_gives_few(scene):
    made = measure_objects(coadd([250.0], [200.0], [5000.0]))
    assert len(made["ra"]) <= 2


def test_masked_pixels_are_not_searched(scene):
    x, y, flux, _ = scene
    image = coadd(x, y, flux)
    image.mask[:, :250] |= np.uint16(MaskPlane.NO_DATA)
    made = measure_objects(image)
    assert (made["x"] > 245).all()
    assert len(made["x"]) >= (x > 260).sum()


def test_overlapping_coadds_give_each_object_once(scene):
    x, y, flux, _ = scene
    first = measure_objects(coadd(x, y, flux, seed=1))
    second = measure_objects(coadd(x - 100, y, flux, seed=2, shift=-100.0))
    alone = len(first["ra"])
    both = merge([first, second])
    assert len(both["ra"]) == alone
    assert {len(v) for v in both.values()} == {alone}
    assert merge([]) == {}


def test_an_uncalibrated_image_is_refused(scene):
    image = coadd([250.0], [200.0], [5000.0])
    image.zero_point = float("nan")
    with pytest.raises(UnprocessableDataError):
        measure_objects(image)
