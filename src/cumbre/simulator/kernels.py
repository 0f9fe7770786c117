"""Compiled loops of the camera: light onto pixels, bleeding, read-out. All in place or pure; no randomness."""

from __future__ import annotations

import numpy as np
from numba import njit

_NEGLIGIBLE = 1e-9


@njit(cache=True, nogil=True)
def _add_gaussian(image, x, y, amplitude, cxx, cxy, cyy, half):  # type: ignore[no-untyped-def]
    """Add one elliptical Gaussian; each row by a two-multiplication recurrence from its ridge."""
    ny, nx = image.shape
    det = cxx * cyy - cxy * cxy
    a, b, c = cyy / det, -cxy / det, cxx / det
    peak = amplitude / (2.0 * np.pi * np.sqrt(det))
    step = np.exp(-a)
    y0, y1 = max(int(np.floor(y - half)), 0), min(int(np.ceil(y + half)), ny - 1)
    x0, x1 = max(int(np.floor(x - half)), 0), min(int(np.ceil(x + half)), nx - 1)
    if x1 < x0:
        return
    for j in range(y0, y1 + 1):
        dy = j - y
        ridge = x - b * dy / a
        start = min(max(int(np.rint(ridge)), x0), x1)
        dx = start - x
        exponent = -0.5 * (a * dx * dx + 2.0 * b * dx * dy + c * dy * dy)
        if exponent < -40.0:
            continue
        first = peak * np.exp(exponent)
        # g(i+1)/g(i) = exp(-a(dx+½) - b·dy), which itself shrinks by exp(-a) each step.
        value, ratio = first, np.exp(-a * (dx + 0.5) - b * dy)
        for i in range(start, x1 + 1):
            image[j, i] += value
            value *= ratio
            ratio *= step
            if value < _NEGLIGIBLE:
                break
        ratio = np.exp(a * (dx - 0.5) + b * dy)
        value = first * ratio
        ratio *= step
        for i in range(start - 1, x0 - 1, -1):
            if value < _NEGLIGIBLE:
                break
            image[j, i] += value
            value *= ratio
            ratio *= step


@njit(cache=True, nogil=True)
def add_light(  # type: ignore[no-untyped-def]
    image, x, y, flux, shape, psf_shape, weights, variances, psf_weights, psf_variances, pixel, faint
):
    """Add light components (points or profiles) convolved with the PSF.

    Parameters
    ----------
    image
        float32 (ny, nx), electrons; changed in place.
    x, y, flux
        (n,) pixels, electrons.
    shape, psf_shape
        (n, 3) covariance xx, xy, yy (pixels²) that multiplies each profile's (PSF's) variances.
    weights, variances, psf_weights, psf_variances
        The sums of Gaussians; a point has weights [1] and variances [1] with its smear as ``shape``.
    pixel
        Variance of the pixel.
    faint
        Electrons a pixel below which light is left out.
    """
    for k in range(x.shape[0]):
        if not flux[k] > 0.0:
            continue
        for g in range(weights.shape[0]):
            for h in range(psf_weights.shape[0]):
                amplitude = flux[k] * weights[g] * psf_weights[h]
                cxx = shape[k, 0] * variances[g] + psf_shape[k, 0] * psf_variances[h] + pixel
                cxy = shape[k, 1] * variances[g] + psf_shape[k, 1] * psf_variances[h]
                cyy = shape[k, 2] * variances[g] + psf_shape[k, 2] * psf_variances[h] + pixel
                widest = 0.5 * (cxx + cyy) + np.sqrt(0.25 * (cxx - cyy) ** 2 + cxy * cxy)
                peak = amplitude / (2.0 * np.pi * np.sqrt(cxx * cyy - cxy * cxy))
                if peak <= faint * 0.02:
                    # Too faint to matter alone: its light goes into a box so that no flux is lost.
                    half = 2.0 * np.sqrt(widest)
                else:
                    half = np.sqrt(2.0 * widest * np.log(peak / (faint * 0.01))) + 1.0
                _add_gaussian(image, x[k], y[k], amplitude, cxx, cxy, cyy, half)


@njit(cache=True, nogil=True)
def add_track(image, x, y, step_x, step_y, charges):  # type: ignore[no-untyped-def]
    """Add charge deposits (electrons) along a line from (x, y), shared bilinearly among pixels."""
    ny, nx = image.shape
    for k in range(charges.shape[0]):
        px, py = x + k * step_x, y + k * step_y
        i, j = int(np.floor(px)), int(np.floor(py))
        if i < 0 or j < 0 or i >= nx - 1 or j >= ny - 1:
            continue
        fx, fy = px - i, py - j
        image[j, i] += charges[k] * (1 - fx) * (1 - fy)
        image[j, i + 1] += charges[k] * fx * (1 - fy)
        image[j + 1, i] += charges[k] * (1 - fx) * fy
        image[j + 1, i + 1] += charges[k] * fx * fy


@njit(cache=True, nogil=True)
def add_trail(image, x0, y0, cos, sin, brightness, sigma):  # type: ignore[no-untyped-def]
    """Add a straight trail through (x0, y0): ``brightness`` electrons per pixel of length, Gaussian across."""
    ny, nx = image.shape
    norm = brightness / (np.sqrt(2.0 * np.pi) * sigma)
    for j in range(ny):
        for i in range(nx):
            across = -(i - x0) * sin + (j - y0) * cos
            if abs(across) < 5.0 * sigma:
                image[j, i] += norm * np.exp(-0.5 * (across / sigma) ** 2)


@njit(cache=True, nogil=True)
def photon_noise(image, normal, low):  # type: ignore[no-untyped-def]
    """Turn expected electrons into counts where there are more than ``low``; smaller ones are left.

    The normal deviate is bent by (n²−1)/6, which gives the Poisson skewness.
    """
    ny, nx = image.shape
    for j in range(ny):
        for i in range(nx):
            mean = image[j, i]
            if mean > low:
                n = normal[j, i]
                image[j, i] = np.rint(mean + np.sqrt(mean) * n + (n * n - 1.0) / np.float32(6.0))


@njit(cache=True, nogil=True)
def bleed(image, x0, x1, y0, y1, full_well):  # type: ignore[no-untyped-def]
    """Let charge above ``full_well`` flow along its column, equally both ways, inside rows y0..y1."""
    for i in range(x0, x1):
        for j in range(y0, y1):
            excess = image[j, i] - full_well
            if excess <= 0.0:
                continue
            image[j, i] = full_well
            up, down = j, j
            turn = True
            while excess > 0.0 and (up < y1 - 1 or down > y0):
                turn = not turn
                if (turn and up < y1 - 1) or down <= y0:
                    up += 1
                    k = up
                else:
                    down -= 1
                    k = down
                room = full_well - image[k, i]
                if room > 0.0:
                    moved = min(room, excess)
                    image[k, i] += moved
                    excess -= moved
                # A neighbour that is itself above full well is passed; its turn comes in the outer loop.


@njit(cache=True, nogil=True)
def read_out(  # type: ignore[no-untyped-def]
    signal, offset, noise, read_noise_adu, data_box, data_shape, coupling, linearity, raw
):
    """Electronics: crosstalk, non-linearity, bias, read noise, conversion to uint16.

    Parameters
    ----------
    signal
        float32 (n_amp, height, width): linear ADU in read-out order.
    offset
        float32 (n_amp, ny_raw, nx_raw): bias with its structure, ADU.
    noise
        float32 (n_amp, ny_raw, nx_raw) of standard normal deviates.
    read_noise_adu, data_box, data_shape, coupling, linearity
        (n,) ; (n, 2) first x, y of the data in the raw array; (n, 2) width, height; (n, n); (n, k).
    raw
        uint16 (n_amp, ny_raw, nx_raw), filled.
    """
    n, ny_raw, nx_raw = raw.shape
    order = linearity.shape[1]
    for a in range(n):
        bx, by = data_box[a, 0], data_box[a, 1]
        width, height = data_shape[a, 0], data_shape[a, 1]
        for j in range(ny_raw):
            last = 0.0
            for i in range(nx_raw):
                value = 0.0
                u, v = i - bx, j - by
                if 0 <= u < width and 0 <= v < height:
                    value = signal[a, v, u]
                    for s in range(n):
                        strength = coupling[a, s]
                        if strength != 0.0 and v < data_shape[s, 1] and u < data_shape[s, 0]:
                            value += strength * signal[s, v, u]
                    true = value
                    # The description says true = m + c2 m² + …; the chip gives the m that solves it.
                    for _ in range(4):
                        correction, power = 0.0, value
                        for q in range(order):
                            power *= value
                            correction += linearity[a, q] * power
                        value = true - correction
                    last = value
                elif u == width and 0 <= v < height:
                    value = 2e-5 * last  # deferred charge in the first overscan column
                value += offset[a, j, i] + read_noise_adu[a] * noise[a, j, i]
                raw[a, j, i] = np.uint16(min(max(np.rint(value), 0.0), 65535.0))
