"""Convolution with a kernel that varies over the field, by Fourier transforms of tiles.

A tile of 192 × 192 single-precision pixels stays in the cache of one core, and its two transforms cost less than a
direct 7 × 7 convolution; the kernel's size then only decides how much neighbouring tiles overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import scipy.fft
from numpy.typing import NDArray

FloatImage = NDArray[np.float32]
ComplexImage = NDArray[np.complex64]
KernelField = Callable[[float, float], NDArray[np.floating]]
TILE = 192
"""Side of a transformed tile of a large image."""


def tile_side(shape: tuple[int, int], half: int) -> int:
    """Side of the transform for images of ``shape`` and kernels of ``half``: large where the kernel varies slowly."""
    wanted = TILE if min(shape) >= 1500 else 2 * TILE // 3
    return int(scipy.fft.next_fast_len(max(wanted, 4 * half + 32), real=True))


def tiles(shape: tuple[int, int], step: int) -> Iterator[tuple[int, int, int, int]]:
    """(y0, y1, x0, x1) of squares that cover an image."""
    ny, nx = shape
    for y0 in range(0, ny, step):
        for x0 in range(0, nx, step):
            yield y0, min(y0 + step, ny), x0, min(x0 + step, nx)


def transform_kernel(kernel: NDArray[np.floating], side: int) -> ComplexImage:
    """Transform of a kernel whose centre moves to the first pixel, so that the result is not shifted."""
    ny, nx = kernel.shape
    cy, cx = ny // 2, nx // 2
    wide = np.zeros((side, side), np.float32)
    wide[: ny - cy, : nx - cx] = kernel[cy:, cx:]
    if cy:
        wide[-cy:, : nx - cx] = kernel[:cy, cx:]
    if cx:
        wide[: ny - cy, -cx:] = kernel[cy:, :cx]
    if cx and cy:
        wide[-cy:, -cx:] = kernel[:cy, :cx]
    return np.asarray(scipy.fft.rfft2(wide))


def trimmed(weights: NDArray[np.floating], least: float = 1e-4) -> NDArray[np.float32]:
    """The middle of a symmetric window's weights without ends that are less than ``least`` of the sum; sum kept."""
    half = len(weights) // 2
    strong = np.flatnonzero(np.abs(weights) > least * np.abs(weights).sum())
    reach = int(np.abs(strong - half).max()) if strong.size else 0
    inner = weights[half - reach : half + reach + 1]
    return np.asarray(inner * (weights.sum() / inner.sum()), np.float32)


def cut(image: FloatImage, y0: int, x0: int, half: int, buffer: FloatImage) -> FloatImage:
    """Fill the square buffer with the image from (y0 − half, x0 − half) on; zero outside the image."""
    ny, nx = image.shape
    side = buffer.shape[0]
    top, left = y0 - half, x0 - half
    low, high = max(top, 0), min(top + side, ny)
    first, last = max(left, 0), min(left + side, nx)
    if high - low < side or last - first < side:
        buffer[:] = 0
    buffer[low - top : high - top, first - left : last - left] = image[low:high, first:last]
    return buffer


def forward(buffer: FloatImage) -> ComplexImage:
    """Transform of a tile."""
    return np.asarray(scipy.fft.rfft2(buffer))


def backward(transform: ComplexImage, side: int) -> FloatImage:
    """The tile of a transform, which is overwritten."""
    return np.asarray(scipy.fft.irfft2(transform, s=(side, side), overwrite_x=True))


def convolve_field(image: FloatImage, kernel_at: KernelField, half: int) -> FloatImage:
    """Convolve tile by tile, each with the kernel of its centre.

    Parameters
    ----------
    image
        float32 (ny, nx), finite everywhere; outside it counts as zero.
    kernel_at
        ``kernel_at(x, y)`` → (2·half + 1, 2·half + 1).
    """
    shape = (image.shape[0], image.shape[1])
    side = tile_side(shape, half)
    out = np.empty(shape, np.float32)
    buffer = np.zeros((side, side), np.float32)
    for y0, y1, x0, x1 in tiles(shape, side - 2 * half):
        spectrum = forward(cut(image, y0, x0, half, buffer))
        spectrum *= transform_kernel(kernel_at((x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2), side)
        out[y0:y1, x0:x1] = backward(spectrum, side)[half : half + y1 - y0, half : half + x1 - x0]
    return out
