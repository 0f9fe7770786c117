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


@njit(cache=True, fastmath={"contract", "arcp", "reassoc", "nsz"}, error_model="numpy")
def _warp(image, variance, mask, grid, step, table, out, out_variance, out_mask, no_data, no_variance):  # type: ignore[no-untyped-def]
    ny, nx = image.shape
    steps = table.shape[0] - 1
    for j in range(out.shape[0]):
        cell_y = j // step
        ty = (j - cell_y * step) / step
        for cell_x in range((out.shape[1] - 1) // step + 1):
            ax = (1 - ty) * grid[0, cell_y, cell_x] + ty * grid[0, cell_y + 1, cell_x]
            bx = (1 - ty) * grid[0, cell_y, cell_x + 1] + ty * grid[0, cell_y + 1, cell_x + 1]
            ay = (1 - ty) * grid[1, cell_y, cell_x] + ty * grid[1, cell_y + 1, cell_x]
            by = (1 - ty) * grid[1, cell_y, cell_x + 1] + ty * grid[1, cell_y + 1, cell_x + 1]
            slope_x, slope_y = (bx - ax) / step, (by - ay) / step
            # area of an output pixel in input pixels: keeps the flux of a star
            down_x = (
                0.5
                * (
                    (grid[0, cell_y + 1, cell_x] - grid[0, cell_y, cell_x])
                    + (grid[0, cell_y + 1, cell_x + 1] - grid[0, cell_y, cell_x + 1])
                )
                / step
            )
            down_y = (
                0.5
                * (
                    (grid[1, cell_y + 1, cell_x] - grid[1, cell_y, cell_x])
                    + (grid[1, cell_y + 1, cell_x + 1] - grid[1, cell_y, cell_x + 1])
                )
                / step
            )
            area = np.float32(abs(slope_x * down_y - slope_y * down_x))
            for i in range(cell_x * step, min((cell_x + 1) * step, out.shape[1])):
                px, py = ax + slope_x * (i - cell_x * step), ay + slope_y * (i - cell_x * step)
                if not (px >= 2.0 and py >= 2.0 and px < nx - 3.0 and py < ny - 3.0):
                    out[j, i] = 0
                    out_variance[j, i] = no_variance
                    out_mask[j, i] = no_data
                    continue
                ix, iy = int(px), int(py)
                wx = table[int((px - ix) * steps + 0.5)]
                wy = table[int((py - iy) * steps + 0.5)]
                total, noise = np.float32(0), np.float32(0)
                for b in range(6):
                    row, row_noise = np.float32(0), np.float32(0)
                    for a in range(6):
                        row += wx[a] * image[iy + b - 2, ix + a - 2]
                        row_noise += wx[a] * wx[a] * variance[iy + b - 2, ix + a - 2]
                    total += wy[b] * row
                    noise += wy[b] * wy[b] * row_noise
                bits = mask[iy, ix] | mask[iy, ix + 1] | mask[iy + 1, ix] | mask[iy + 1, ix + 1]
                out[j, i] = total * area
                out_variance[j, i] = noise * area * area
                out_mask[j, i] = bits
                if not (noise < no_variance * 1e-4 and abs(total) < 1e30):
                    out[j, i] = 0
                    out_variance[j, i] = no_variance
                    out_mask[j, i] = bits | no_data


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
        float32, float32, uint16 of shape (ny, nx). Bad pixels must have been filled before: a NaN spoils the
        6 × 6 pixels around it, which then come out as NO_DATA.
    grid
        Result of :func:`position_grid` with the same ``shape`` and ``step``.
    shape
        (ny, nx) of the output.

    Returns
    -------
    image, variance, mask
        Of ``shape``. Pixels without input: 0, ``NO_VARIANCE``, NO_DATA. The mask is the union over the four
        nearest pixels. Neighbouring output pixels are correlated; the variance is that of a single pixel.
    """
    out, out_variance = np.empty(shape, np.float32), np.empty(shape, np.float32)
    out_mask = np.empty(shape, np.uint16)
    _warp(
        np.ascontiguousarray(image, np.float32), np.ascontiguousarray(variance, np.float32),
        np.ascontiguousarray(mask, np.uint16), np.ascontiguousarray(grid, np.float64), step, _TABLE, out, out_variance, out_mask,
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
