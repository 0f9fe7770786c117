"""Resampling of images: Lanczos 3 with the positions interpolated from a coarse grid.

A world-coordinate transform costs a microsecond per pixel; its values on a 16-pixel grid, interpolated
bilinearly, are within a thousandth of a pixel for every distortion a telescope has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

FloatImage = NDArray[np.float32]
Mask = NDArray[np.uint16]

NO_DATA = 256
"""Mask bit of output pixels without input (``MaskPlane.NO_DATA``)."""

NO_VARIANCE = np.float32(1e20)
"""Variance of pixels without data: finite, so that products with zero stay zero."""

_STEPS = 512


class SkyMap(Protocol):
    """What a warp needs of a WCS."""

    def pix2sky(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """Sky positions of pixels."""

    def sky2pix(self, ra: NDArray[np.float64], dec: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """Pixels of sky positions."""


def lanczos_table(lobes: int = 3, steps: int = _STEPS) -> NDArray[np.float32]:
    """Weights of the 2·lobes neighbours for fractions 0, 1/steps … 1; each row sums to one.

    Returns
    -------
    float32 of shape (steps + 1, 2·lobes).
    """
    fraction = np.arange(steps + 1)[:, None] / steps
    offset = np.arange(1 - lobes, lobes + 1)[None, :] - fraction
    weights = np.sinc(offset) * np.sinc(offset / lobes)
    return np.ascontiguousarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


_TABLE = lanczos_table()


def position_grid(
    to_input: Callable[[NDArray[np.float64], NDArray[np.float64]], tuple[NDArray[np.float64], ...]],
    shape: tuple[int, int],
    step: int = 16,
) -> NDArray[np.float64]:
    """Input positions of every ``step``-th output pixel.

    Parameters
    ----------
    to_input
        Function of arrays (x_out, y_out) that returns (x_in, y_in).
    shape
        (ny, nx) of the output.

    Returns
    -------
    float64 of shape (2, gy, gx); the grid reaches at least one cell beyond the output.
    """
    gy, gx = (shape[0] - 1) // step + 2, (shape[1] - 1) // step + 2
    x, y = np.meshgrid(np.arange(gx) * float(step), np.arange(gy) * float(step))
    x_in, y_in = to_input(x, y)[:2]
    return np.ascontiguousarray(np.stack([x_in, y_in]))


_CELL = 8
"""Side of the cells that say whether every pixel in them is good."""
_RUN = 64
"""Pixels done together: their weights stay in the first cache."""


@njit(cache=True)
def _bad_cells(image, variance, limit):  # type: ignore[no-untyped-def]
    """Bool per cell of the input: whether a value in it is not finite or its variance says "no data"."""
    ny, nx = image.shape
    out = np.zeros(((ny - 1) // _CELL + 1, (nx - 1) // _CELL + 1), np.bool_)
    for j in range(ny):
        for i in range(nx):
            if not (variance[j, i] < limit and abs(image[j, i]) < 1e30):
                out[j // _CELL, i // _CELL] = True
    return out


@njit(cache=True, fastmath={"contract", "arcp", "reassoc", "nsz"}, error_model="numpy")
def _sum36(plane, ix, iy, wx, wy):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for b in range(6):
        row = np.float32(0)
        for a in range(6):
            row += wx[a] * plane[iy + b - 2, ix + a - 2]
        total += wy[b] * row
    return total


@njit(cache=True, fastmath={"contract", "arcp", "reassoc", "nsz"}, error_model="numpy")
def _run_of_pixels(image, variance, ix, iy, weights, squares, sums, noise):  # type: ignore[no-untyped-def]
    """Neighbours in a row that come from neighbours in a row: vectors of pixels instead of sums of 36.

    ``weights`` is (12, n), ``squares`` (4, n); results go to ``sums`` and ``noise``, shape (n,).
    """
    n = sums.size
    w0, w1, w2, w3, w4, w5 = weights[0], weights[1], weights[2], weights[3], weights[4], weights[5]
    for b in range(6):
        row, up = image[iy + b - 2, ix - 2 : ix + n + 3], weights[6 + b]
        for i in range(n):
            value = (
                w0[i] * row[i]
                + w1[i] * row[i + 1]
                + w2[i] * row[i + 2]
                + w3[i] * row[i + 3]
                + w4[i] * row[i + 4]
                + w5[i] * row[i + 5]
            )
            sums[i] = sums[i] + up[i] * value if b else up[i] * value
    low, high = variance[iy, ix : ix + n + 1], variance[iy + 1, ix : ix + n + 1]
    q0, q1, q2, q3 = squares[0], squares[1], squares[2], squares[3]
    for i in range(n):
        noise[i] = q2[i] * (q0[i] * low[i] + q1[i] * low[i + 1]) + q3[i] * (
            q0[i] * high[i] + q1[i] * high[i + 1]
        )


@njit(cache=True, error_model="numpy")
def _warp(  # type: ignore[no-untyped-def]
    image,
    variance,
    mask,
    bad_cells,
    grid,
    step,
    table,
    squares,
    out,
    out_variance,
    out_mask,
    no_data,
    no_variance,
):
    ny, nx = image.shape
    width = out.shape[1]
    steps = table.shape[0] - 1
    ixs, iys = np.empty(width, np.int64), np.empty(width, np.int64)
    sxs, sys = np.empty(width, np.int64), np.empty(width, np.int64)
    kind, areas = np.empty(width, np.uint8), np.empty(width, np.float32)
    weights, pair = np.empty((12, _RUN + 8), np.float32), np.empty((4, _RUN + 8), np.float32)
    sums, noises = np.empty(_RUN, np.float32), np.empty(_RUN, np.float32)
    for j in range(out.shape[0]):
        cell_y = j // step
        ty = (j - cell_y * step) / step
        for cell_x in range((width - 1) // step + 1):
            g = grid[:, cell_y : cell_y + 2, cell_x : cell_x + 2]
            ax, bx = (1 - ty) * g[0, 0, 0] + ty * g[0, 1, 0], (1 - ty) * g[0, 0, 1] + ty * g[0, 1, 1]
            ay, by = (1 - ty) * g[1, 0, 0] + ty * g[1, 1, 0], (1 - ty) * g[1, 0, 1] + ty * g[1, 1, 1]
            slope_x, slope_y = (bx - ax) / step, (by - ay) / step
            # area of an output pixel in input pixels: keeps the flux of a star
            down_x = 0.5 * ((g[0, 1, 0] - g[0, 0, 0]) + (g[0, 1, 1] - g[0, 0, 1])) / step
            down_y = 0.5 * ((g[1, 1, 0] - g[1, 0, 0]) + (g[1, 1, 1] - g[1, 0, 1])) / step
            area = np.float32(abs(slope_x * down_y - slope_y * down_x))
            low_x, high_x = min(ax, bx) - 3, max(ax, bx) + 4
            low_y, high_y = min(ay, by) - 3, max(ay, by) + 4
            # Whether a bad pixel can be within reach of this run of pixels at all.
            is_clean = low_x >= 0 and low_y >= 0 and high_x < nx and high_y < ny
            if is_clean:
                for v in range(int(low_y) // _CELL, int(high_y) // _CELL + 1):
                    for u in range(int(low_x) // _CELL, int(high_x) // _CELL + 1):
                        is_clean = is_clean and not bad_cells[v, u]
            first = cell_x * step
            for i in range(first, min(first + step, width)):
                px, py = ax + slope_x * (i - first), ay + slope_y * (i - first)
                areas[i] = area
                if not (px >= 2.0 and py >= 2.0 and px < nx - 3.0 and py < ny - 3.0):
                    kind[i] = 0
                    ixs[i], iys[i] = -1, -1
                    continue
                kind[i] = 2 if is_clean else 1
                ix, iy = int(px), int(py)
                ixs[i], iys[i] = ix, iy
                sxs[i], sys[i] = int((px - ix) * steps + 0.5), int((py - iy) * steps + 0.5)
        i = 0
        while i < width:
            if kind[i] == 0:
                out[j, i], out_variance[j, i], out_mask[j, i] = 0, no_variance, no_data
                i += 1
                continue
            ix, iy, end = ixs[i], iys[i], i + 1
            if kind[i] == 2:
                longest = min(width, i + _RUN)
                while end < longest and kind[end] == 2 and iys[end] == iy and ixs[end] - ix == end - i:
                    end += 1
                n = end - i
                for k in range(n):
                    wx, wy, qx, qy = (
                        table[sxs[i + k]],
                        table[sys[i + k]],
                        squares[sxs[i + k]],
                        squares[sys[i + k]],
                    )
                    for a in range(6):
                        weights[a, k], weights[6 + a, k] = wx[a], wy[a]
                    # The four nearest have nearly all of the squared weight: they stand for the rest.
                    pair[0, k], pair[1, k], pair[2, k], pair[3, k] = qx[0], qx[1], qy[0], qy[1]
                _run_of_pixels(image, variance, ix, iy, weights, pair, sums[:n], noises[:n])
            else:
                wx, wy = table[sxs[i]], table[sys[i]]
                sums[0] = _sum36(image, ix, iy, wx, wy)
                noises[0] = _sum36(variance, ix, iy, wx * wx, wy * wy)
            for k in range(end - i):
                m, x = i + k, ix + k
                bits = mask[iy, x] | mask[iy, x + 1] | mask[iy + 1, x] | mask[iy + 1, x + 1]
                out[j, m] = sums[k] * areas[m]
                out_variance[j, m] = noises[k] * areas[m] * areas[m]
                out_mask[j, m] = bits
                if kind[m] == 1 and not (noises[k] < no_variance * 1e-4 and abs(sums[k]) < 1e30):
                    out[j, m], out_variance[j, m], out_mask[j, m] = 0, no_variance, bits | no_data
            i = end


def _squares(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared weights of the two nearest, scaled to the sum of all six."""
    square = table.astype(np.float64) ** 2
    two = square[:, 2:4]
    return np.ascontiguousarray(two * (square.sum(axis=1) / two.sum(axis=1))[:, None], dtype=np.float32)


_SQUARES = _squares(_TABLE)


def warp(
    image: FloatImage,
    variance: FloatImage,
    mask: Mask,
    grid: NDArray[np.float64],
    shape: tuple[int, int],
    step: int = 16,
) -> tuple[FloatImage, FloatImage, Mask]:
    """Resample image, variance and mask; the flux of a star is kept when the pixel scale changes.

    Parameters
    ----------
    image, variance, mask
        float32, float32, uint16 of shape (ny, nx). Bad pixels should have been filled before: a value that is not
        finite, or a variance of ``NO_VARIANCE``, spoils the 6 × 6 pixels around it, which come out as NO_DATA.
    grid
        Result of :func:`position_grid` with the same ``shape`` and ``step``.
    shape
        (ny, nx) of the output.

    Returns
    -------
    image, variance, mask
        Of ``shape``. Pixels without input: 0, ``NO_VARIANCE``, NO_DATA. The mask is the union over the four
        nearest pixels. Neighbouring output pixels are correlated; the variance is that of a single pixel, from the
        four nearest ones.
    """
    out, out_variance = np.empty(shape, np.float32), np.empty(shape, np.float32)
    out_mask = np.empty(shape, np.uint16)
    pixels, noise = np.ascontiguousarray(image, np.float32), np.ascontiguousarray(variance, np.float32)
    _warp(
        pixels, noise, np.ascontiguousarray(mask, np.uint16), _bad_cells(pixels, noise, NO_VARIANCE * np.float32(1e-4)),
        np.ascontiguousarray(grid, np.float64), step, _TABLE, _SQUARES, out, out_variance, out_mask,
        np.uint16(NO_DATA), NO_VARIANCE,
    )  # fmt: skip
    return out, out_variance, out_mask


def warp_between(
    image: FloatImage,
    variance: FloatImage,
    mask: Mask,
    wcs_in: SkyMap,
    wcs_out: SkyMap,
    shape: tuple[int, int],
    step: int = 16,
) -> tuple[FloatImage, FloatImage, Mask]:
    """Resample from one WCS to another; see :func:`warp`."""

    def to_input(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        return wcs_in.sky2pix(*wcs_out.pix2sky(x, y)[:2])

    return warp(image, variance, mask, position_grid(to_input, shape, step), shape, step)
