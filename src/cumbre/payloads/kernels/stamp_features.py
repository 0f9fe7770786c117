"""Numbers that describe the stamps of difference sources, the same for cameras of any pixel scale.

Around each source, in units of the PSF's width: what the difference keeps when the fitted PSF is taken away, and the
template's light. At the template's brightest place nearby the difference is also taken apart into a change of flux,
a shift (dipole) and a change of width: a star that varied shows the first, a star that was badly subtracted the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cumbre.payloads.kernels.shift import move, spline_coefficients

Floats = NDArray[np.float64]
RESIDUAL_CELLS, RESIDUAL_STEP = 7, 0.55
"""Cells a side of the coarse residual, and their size in FWHM."""
TEMPLATE_CELLS, TEMPLATE_STEP = 5, 0.8


@dataclass(frozen=True, slots=True)
class StarChange:
    """The difference at the template's brightest place near each source, taken apart; arrays (n,).

    Attributes
    ----------
    x, y
        The place, pixels.
    template_flux
        PSF flux of the template there, in the difference's units.
    flux, flux_err
        Change of flux.
    part_flux, part_shift, part_width
        Parts (sum 1) of the explained signal that are a change of flux, a shift, a change of width.
    """

    x: Floats
    y: Floats
    template_flux: Floats
    flux: Floats
    flux_err: Floats
    part_flux: Floats
    part_shift: Floats
    part_width: Floats


@njit(cache=True)
def _coarse(values, weights, dx, dy, half, cells, step, out):  # type: ignore[no-untyped-def]
    """Means over square cells about (dx, dy) from the stamp's middle; 0 where there is no good pixel."""
    n = 2 * half + 1
    total, count = np.zeros((cells, cells)), np.zeros((cells, cells))
    # Each pixel is divided into 3 x 3 points, so that cells smaller than a pixel are filled evenly.
    for j in range(n):
        for i in range(n):
            if weights[j, i] <= 0:
                continue
            for b in range(-1, 2):
                for a in range(-1, 2):
                    u = (i - half - dx + a / 3.0) / step + 0.5 * cells
                    v = (j - half - dy + b / 3.0) / step + 0.5 * cells
                    p, q = int(np.floor(u)), int(np.floor(v))
                    if 0 <= p < cells and 0 <= q < cells:
                        total[q, p] += values[j, i]
                        count[q, p] += 1.0
    for q in range(cells):
        for p in range(cells):
            out[q, p] = total[q, p] / count[q, p] if count[q, p] > 0 else 0.0


@njit(cache=True)
def _stamps(  # type: ignore[no-untyped-def]
    image, variance, bad, template, x, y, flux, sign, which, splines, fwhm, residual, light, numbers
):
    ny, nx = image.shape
    size = splines.shape[1]
    rows, psf = np.empty((size, size)), np.empty((size, size))
    half = size // 2
    data, weight = np.empty((size, size)), np.empty((size, size))
    star = np.empty((size, size))
    for k in range(x.size):
        ix, iy = int(np.floor(x[k] + 0.5)), int(np.floor(y[k] + 0.5))
        dx, dy = x[k] - ix, y[k] - iy
        move(splines[which[k]], dx, dy, rows, psf)
        top = 0.0
        for j in range(size):
            for i in range(size):
                top = max(top, psf[j, i])
        scale = max(abs(flux[k]) * top, 1e-12)
        chi_tight, chi_plain, n_core, n_plain = 0.0, 0.0, 0, 0
        sharpest, deepest, ring, ring_n = 0.0, 0.0, 0.0, 0
        cross, norm_d, norm_p = 0.0, 0.0, 0.0
        for j in range(size):
            for i in range(size):
                yy, xx = iy + j - half, ix + i - half
                inside = 0 <= yy < ny and 0 <= xx < nx
                if not inside or bad[yy, xx]:
                    data[j, i], weight[j, i], star[j, i] = 0.0, 0.0, 0.0
                    if inside:
                        star[j, i] = template[yy, xx]
                    continue
                d, var = sign[k] * image[yy, xx], variance[yy, xx]
                model = sign[k] * flux[k] * psf[j, i]
                r = d - model
                data[j, i], weight[j, i], star[j, i] = r / scale, 1.0, template[yy, xx]
                distance = np.sqrt((i - half - dx) ** 2 + (j - half - dy) ** 2)
                if distance < 1.1 * fwhm + 0.5:
                    chi_tight += r * r / (var + (0.03 * model) ** 2 + (0.015 * scale) ** 2)
                    n_core += 1
                    noise = np.sqrt(var)
                    sharpest = max(sharpest, (r - 1.5 * noise) / scale)
                    deepest = max(deepest, (-r - 1.5 * noise) / scale)
                    cross += d * psf[j, i]
                    norm_d += d * d - var
                    norm_p += psf[j, i] * psf[j, i]
                elif distance < 2.5 * fwhm:
                    chi_plain += r * r / var
                    n_plain += 1
                    ring += d
                    ring_n += 1
        _coarse(data, weight, dx, dy, half, residual.shape[1], RESIDUAL_STEP * fwhm, residual[k])
        for j in range(size):
            for i in range(size):
                weight[j, i] = 1.0
                star[j, i] /= scale
        _coarse(star, weight, dx, dy, half, light.shape[1], TEMPLATE_STEP * fwhm, light[k])
        numbers[k, 0] = np.log(max(chi_tight / max(n_core - 3, 1), 0.1))
        numbers[k, 1] = np.log(max(chi_plain / max(n_plain, 1), 0.1))
        numbers[k, 2] = min(sharpest, 3.0)
        numbers[k, 3] = min(deepest, 3.0)
        numbers[k, 4] = 1.0 - cross / np.sqrt(max(norm_d, 1e-12) * max(norm_p, 1e-12)) if norm_d > 0 else 1.0
        numbers[k, 5] = ring / max(ring_n, 1) / scale


@njit(cache=True)
def _changes(image, variance, bad, template, x, y, which, splines, fwhm, out):  # type: ignore[no-untyped-def]
    ny, nx = image.shape
    size = splines.shape[1]
    rows, psf = np.empty((size, size)), np.empty((size, size))
    half = size // 2
    reach = max(2, int(np.floor(1.6 * fwhm + 0.5)))
    fit = min(half - 1, int(np.ceil(1.5 * fwhm + 1)))
    basis = np.zeros(4)
    for k in range(x.size):
        ix, iy = int(np.floor(x[k] + 0.5)), int(np.floor(y[k] + 0.5))
        best, bx, by = -1e30, ix, iy
        for yy in range(max(iy - reach, 1), min(iy + reach + 1, ny - 1)):
            for xx in range(max(ix - reach, 1), min(ix + reach + 1, nx - 1)):
                # Nearer places are preferred: a far brighter star must not hide the own one.
                value = template[yy, xx] * np.exp(
                    -0.5 * ((xx - x[k]) ** 2 + (yy - y[k]) ** 2) / (fwhm * fwhm)
                )
                if value > best:
                    best, bx, by = value, xx, yy
        dx, dy = 0.0, 0.0
        if 0 < bx < nx - 1 and 0 < by < ny - 1:
            c = template[by, bx]
            curve_x = template[by, bx - 1] - 2 * c + template[by, bx + 1]
            curve_y = template[by - 1, bx] - 2 * c + template[by + 1, bx]
            if curve_x < 0:
                dx = min(max(0.5 * (template[by, bx - 1] - template[by, bx + 1]) / curve_x, -0.5), 0.5)
            if curve_y < 0:
                dy = min(max(0.5 * (template[by - 1, bx] - template[by + 1, bx]) / curve_y, -0.5), 0.5)
        move(splines[which[k]], dx, dy, rows, psf)
        normal, right = np.zeros((4, 4)), np.zeros(4)
        noise = np.zeros((4, 4))
        t_up, t_down = 0.0, 0.0
        for j in range(half - fit, half + fit + 1):
            for i in range(half - fit, half + fit + 1):
                yy, xx = by + j - half, bx + i - half
                if yy < 0 or xx < 0 or yy >= ny or xx >= nx or bad[yy, xx]:
                    continue
                p = psf[j, i]
                basis[0] = p
                basis[1] = 0.5 * (psf[j, i + 1] - psf[j, i - 1])
                basis[2] = 0.5 * (psf[j + 1, i] - psf[j - 1, i])
                basis[3] = psf[j, i + 1] + psf[j, i - 1] + psf[j + 1, i] + psf[j - 1, i] - 4 * p
                for a in range(4):
                    right[a] += basis[a] * image[yy, xx]
                    for b in range(4):
                        normal[a, b] += basis[a] * basis[b]
                        noise[a, b] += basis[a] * basis[b] * variance[yy, xx]
                t_up += p * template[yy, xx]
                t_down += p * p
        out[k, 0], out[k, 1] = bx + dx, by + dy
        out[k, 2] = t_up / t_down if t_down > 0 else 0.0
        for a in range(4):
            normal[a, a] += 1e-9 * normal[0, 0] + 1e-30
        inverse = np.linalg.inv(normal)
        solved = inverse @ right
        error = inverse @ noise @ inverse
        out[k, 3], out[k, 4] = solved[0], np.sqrt(max(error[0, 0], 1e-30))
        flux = solved[0] ** 2 * normal[0, 0]
        shift = solved[1] ** 2 * normal[1, 1] + solved[2] ** 2 * normal[2, 2]
        width = solved[3] ** 2 * normal[3, 3]
        total = max(flux + shift + width, 1e-30)
        out[k, 5], out[k, 6], out[k, 7] = flux / total, shift / total, width / total


def describe_stamps(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    template: NDArray[np.float32],
    x: Floats,
    y: Floats,
    flux: Floats,
    is_negative: NDArray[np.bool_],
    which: NDArray[np.intp],
    stamps: NDArray[np.float32],
    fwhm: float,
) -> tuple[Floats, Floats, Floats, StarChange]:
    """Describe the surroundings of every source.

    Parameters
    ----------
    image, variance, bad
        Difference, (ny, nx); ``bad`` pixels are left out.
    template
        The template in the difference's units.
    x, y, flux, is_negative
        Sources: fitted positions, PSF fluxes, sign of their peaks; shape (n,).
    which, stamps
        Index (n,) into the PSF stamps (m, s, s), float32, odd side, sum one.
    fwhm
        Of the PSF, pixels.

    Returns
    -------
    residual
        (n, 7, 7): difference − fitted PSF, in units of the PSF's maximum, sign turned positive, in cells of 0.55 FWHM.
    light
        (n, 5, 5): template in the same units, cells of 0.8 FWHM.
    numbers
        (n, 6): ln χ² of the core with 3 % tolerance, ln χ² of the surroundings, highest excess and deepest deficit over
        the PSF (units of its maximum), 1 − correlation without noise, mean level around.
    change
        The difference at the template's brightest place nearby.
    """
    n = len(x)
    residual = np.zeros((n, RESIDUAL_CELLS, RESIDUAL_CELLS))
    light = np.zeros((n, TEMPLATE_CELLS, TEMPLATE_CELLS))
    numbers, changes = np.zeros((n, 6)), np.zeros((n, 8))
    if n:
        xs, ys = np.ascontiguousarray(x, np.float64), np.ascontiguousarray(y, np.float64)
        planes = (
            np.ascontiguousarray(image, np.float32), np.ascontiguousarray(variance, np.float32),
            np.ascontiguousarray(bad), np.ascontiguousarray(template, np.float32),
        )  # fmt: skip
        sign = np.where(is_negative, -1.0, 1.0)
        index = np.ascontiguousarray(which, np.int64)
        splines = spline_coefficients(stamps)
        _stamps(
            *planes, xs, ys, np.ascontiguousarray(flux, np.float64), sign, index, splines, float(fwhm),
            residual, light, numbers,
        )  # fmt: skip
        _changes(*planes, xs, ys, index, splines, float(fwhm), changes)
    return residual, light, numbers, StarChange(*(changes[:, k] for k in range(8)))
