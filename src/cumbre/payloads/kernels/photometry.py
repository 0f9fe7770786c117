"""Forced PSF photometry (own, compiled) and apertures (sep) at given positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from cumbre.payloads.kernels.psf import PsfModel, normalised, psf_at

FloatImage = NDArray[np.float32]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PsfFluxes:
    """Fluxes at positions; every array has shape (n,).

    Attributes
    ----------
    flux, flux_err
        In the image's unit; NaN where less than half of the PSF's light fell on usable pixels.
    chi2
        χ² per pixel of the fit over the stamp.
    fraction
        Part of the PSF's light on usable pixels.
    bits
        Union of the mask over the 3 × 3 pixels at the centre (uint16).
    """

    flux: Floats
    flux_err: Floats
    chi2: Floats
    fraction: Floats
    bits: NDArray[np.uint16]


@njit(cache=True)
def _forced(image, variance, mask, bad_bits, spline, sums, u, v, x, y):  # type: ignore[no-untyped-def]
    count, n = x.size, spline.shape[1]
    half = n // 2
    ny, nx = image.shape
    flux, error = np.full(count, np.nan), np.full(count, np.nan)
    chi2, fraction = np.full(count, np.nan), np.zeros(count)
    bits = np.zeros(count, np.uint16)
    filtered, rows, stamp = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    for k in range(count):
        if not (-half < x[k] < nx + half and -half < y[k] < ny + half):
            continue
        ix, iy = int(np.floor(x[k] + 0.5)), int(np.floor(y[k] + 0.5))
        psf_at(spline, sums, u[k], v[k], x[k] - ix, y[k] - iy, filtered, rows, stamp)
        pd, pp, ppv, light = 0.0, 0.0, 0.0, 0.0
        for j in range(n):
            yy = iy + j - half
            if yy < 0 or yy >= ny:
                continue
            for i in range(n):
                xx = ix + i - half
                if xx < 0 or xx >= nx:
                    continue
                if abs(i - half) <= 1 and abs(j - half) <= 1:
                    bits[k] |= mask[yy, xx]
                d = image[yy, xx]
                if mask[yy, xx] & bad_bits or not np.isfinite(d):
                    continue
                p = stamp[j, i]
                pd += p * d
                pp += p * p
                ppv += p * p * variance[yy, xx]
                light += p
        fraction[k] = light
        if light < 0.5 or pp <= 0:
            continue
        f = pd / pp
        flux[k] = f
        error[k] = np.sqrt(ppv) / pp
        total, pixels = 0.0, 0
        for j in range(n):
            yy = iy + j - half
            if yy < 0 or yy >= ny:
                continue
            for i in range(n):
                xx = ix + i - half
                if xx < 0 or xx >= nx:
                    continue
                d = image[yy, xx]
                if mask[yy, xx] & bad_bits or not np.isfinite(d):
                    continue
                r = d - f * stamp[j, i]
                total += r * r / variance[yy, xx]
                pixels += 1
        chi2[k] = total / max(pixels - 1, 1)
    return flux, error, chi2, fraction, bits


def forced_psf_photometry(
    image: FloatImage,
    variance: FloatImage,
    mask: NDArray[np.uint16],
    psf: PsfModel,
    x: ArrayLike,
    y: ArrayLike,
    *,
    bad_bits: int,
) -> PsfFluxes:
    """PSF fluxes at fixed positions.

    The estimator is Σ P·d / Σ P² over usable pixels: its weights do not depend on the star's own light, so
    bright and faint stars have the same scale even where the PSF model is imperfect.

    Parameters
    ----------
    image, variance, mask
        Background-subtracted; float32, float32, uint16 of shape (ny, nx).
    x, y
        0-based positions, shape (n,).
    bad_bits
        Mask bits of pixels to leave out.
    """
    xs, ys = np.ascontiguousarray(x, np.float64).ravel(), np.ascontiguousarray(y, np.float64).ravel()
    u, v = normalised(xs, ys, psf.shape)
    u, v = np.clip(u, -1.1, 1.1), np.clip(v, -1.1, 1.1)
    result = _forced(
        np.ascontiguousarray(image, np.float32), np.ascontiguousarray(variance, np.float32), np.ascontiguousarray(mask),
        np.uint16(bad_bits), psf.spline, psf.sums, u, v, xs, ys,
    )  # fmt: skip
    return PsfFluxes(*result)


def aperture_photometry(
    image: FloatImage,
    variance: FloatImage,
    bad: NDArray[np.bool_] | None,
    x: ArrayLike,
    y: ArrayLike,
    radius: float,
    annulus: tuple[float, float] | None = None,
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Sums in circles, with exact pixel fractions approximated by 5 × 5 subpixels.

    Parameters
    ----------
    bad
        bool (ny, nx): pixels replaced by the mean of the rest of the aperture.
    radius
        Pixels.
    annulus
        Inner and outer radius of a local background, pixels.

    Returns
    -------
    flux, flux_err, flags
        Shape (n,); flags are sep's.
    """
    import sep

    extra = {} if annulus is None else {"bkgann": annulus}
    flux, error, flags = sep.sum_circle(
        np.ascontiguousarray(image, np.float32),
        np.ascontiguousarray(x, np.float64),
        np.ascontiguousarray(y, np.float64),
        radius,
        var=np.ascontiguousarray(variance, np.float32),
        mask=bad,
        subpix=5,
        **extra,
    )
    return (
        np.asarray(flux, np.float64),
        np.asarray(error, np.float64),
        np.asarray(flags, np.int64),
    )
