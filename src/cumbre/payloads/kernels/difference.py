"""Subtraction with a kernel that varies over the field, and removal of the noise correlation it causes.

With ``D = S − K ⊗ T`` the convolved template's noise is correlated. Filtering D with
``φ(k) = sqrt((σs² + κ(0)² σt²) / (σs² + κ(k)² σt²))`` (DMTN-021, normalised to φ(0) = 1 so that fluxes stay)
makes it white again; the difference's PSF is then ``φ ⊗ PSF`` of the image that was not convolved.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import scipy.fft
from numba import njit
from numpy.typing import NDArray

from cumbre.payloads.kernels.convolve import (
    ComplexImage,
    KernelField,
    backward,
    convolve_field,
    cut,
    forward,
    tile_side,
    tiles,
    transform_kernel,
    trimmed,
)
from cumbre.payloads.kernels.kernel_match import KernelSolution

__all__ = ["Subtraction", "convolve_field", "decorrelation_kernel", "reached", "subtract"]

CELL = 256
"""Side of the cells that share a decorrelation kernel."""
INTERPOLATED_PART = 0.3
"""Part of a convolved pixel's light that may come from interpolated ones, which are right to a fifth."""


def decorrelation_kernel(
    kernel: NDArray[np.float64], variance_fixed: float, variance_convolved: float, *, half: int = 15
) -> NDArray[np.float64]:
    """The filter φ as a (2·half + 1)² image with sum 1.

    Parameters
    ----------
    kernel
        The matching kernel at one place.
    variance_fixed, variance_convolved
        Typical white variances of the image left alone and of the one convolved (before convolution).
    """
    size = 64
    while size < 2 * max(kernel.shape[0], 2 * half + 1):
        size *= 2
    # The power spectrum does not know where the kernel lies on the canvas.
    power = np.abs(scipy.fft.rfft2(kernel, s=(size, size))) ** 2
    white = variance_fixed + power[0, 0] * variance_convolved
    response = np.sqrt(white / np.maximum(variance_fixed + power * variance_convolved, 1e-6 * white))
    phi = scipy.fft.irfft2(response, s=(size, size))
    around = np.arange(-half, half + 1)
    found = phi[np.ix_(around, around)]
    return np.asarray(found / found.sum())


@dataclass(slots=True)
class Subtraction:
    """Result of :func:`subtract`.

    Attributes
    ----------
    image, variance
        float32 (ny, nx), in units of the science image.
    touched, reach
        bool (ny, nx): pixels that a bad pixel of the convolved image reaches, at most ``reach`` pixels away.
    phi
        Function of x, y: the decorrelation kernel there (sum 1).
    """

    image: NDArray[np.float32]
    variance: NDArray[np.float32]
    touched: NDArray[np.bool_]
    reach: int
    phi: KernelField


def subtract(
    fixed: NDArray[np.float32],
    fixed_variance: NDArray[np.float32],
    convolved: NDArray[np.float32],
    convolved_variance: NDArray[np.float32],
    convolved_bad: NDArray[np.bool_],
    solution: KernelSolution,
    *,
    is_science_convolved: bool = False,
    decorrelate: bool = True,
    phi_half: int = 15,
    interpolated: NDArray[np.bool_] | None = None,
) -> Subtraction:
    """Subtract two registered images with a fitted kernel.

    Parameters
    ----------
    fixed, convolved
        (ny, nx) images, finite; ``solution`` maps ``convolved`` onto ``fixed``.
    convolved_bad
        True where ``convolved`` cannot be trusted (saturated, missing).
    interpolated
        Which of those hold a value from their neighbours (defects): what the kernel carries of them hardly matters.
    is_science_convolved
        Then the difference is ``(K ⊗ science + b − template) / ΣK``: science units, science minus template.
    """
    kernel_sum = solution.metrics["sum"]
    middle = solution.kernel(solution.shape[1] / 2, solution.shape[0] / 2)
    phi: KernelField = _identity
    if decorrelate:
        v_fixed, v_convolved = (
            _typical(variance, convolved_bad, default)
            for variance, default in ((fixed_variance, 1.0), (convolved_variance, 0.0))
        )
        phi = _PhiField(solution, v_fixed, v_convolved, _phi_half(middle, v_fixed, v_convolved, phi_half))
    factor = -1.0 / kernel_sum if is_science_convolved else 1.0
    image = _subtract_tiles(fixed, convolved, solution, phi if decorrelate else None, factor)
    # Photon noise of stars is smeared as the stars are; its level is that after decorrelation. Sums along the
    # axes describe the squared kernel well enough for a variance.
    square = middle**2 / (middle**2).sum()
    variance = cv2.sepFilter2D(
        convolved_variance, cv2.CV_32F, trimmed(square.sum(axis=0)[::-1]), trimmed(square.sum(axis=1)[::-1]),
        borderType=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    scale = kernel_sum**-2 if is_science_convolved else 1.0
    _add_variance(variance, fixed_variance, np.float32(scale * kernel_sum**2), np.float32(scale))
    touched, reach = reached(convolved_bad, middle, interpolated)
    return Subtraction(image, variance, touched, reach, phi)


def _typical(variance: NDArray[np.float32], bad: NDArray[np.bool_], default: float) -> float:
    """Median of a sample of the good pixels."""
    sample = variance[::5, ::5][~bad[::5, ::5]]
    return float(np.median(sample)) if sample.size else default


def _subtract_tiles(
    fixed: NDArray[np.float32],
    convolved: NDArray[np.float32],
    solution: KernelSolution,
    phi: KernelField | None,
    factor: float,
) -> NDArray[np.float32]:
    """``factor · (φ ⊗ (fixed − K ⊗ convolved) − b)``, three transforms a tile."""
    shape = (fixed.shape[0], fixed.shape[1])
    halo = solution.basis.half
    if phi is not None:
        halo += phi(0.0, 0.0).shape[0] // 2
    side = tile_side(shape, halo)
    out = np.empty(shape, np.float32)
    one, two = np.zeros((side, side), np.float32), np.zeros((side, side), np.float32)
    filters: dict[int, ComplexImage] = {}
    for y0, y1, x0, x1 in tiles(shape, side - 2 * halo):
        x, y = (x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2
        spectrum = forward(cut(convolved, y0, x0, halo, two))
        spectrum *= transform_kernel(solution.kernel(x, y), side)
        np.subtract(forward(cut(fixed, y0, x0, halo, one)), spectrum, out=spectrum)
        if phi is not None:
            kernel = phi(x, y)
            # neighbouring tiles share their decorrelation kernel: one transform for all of them
            if id(kernel) not in filters:
                filters[id(kernel)] = transform_kernel(kernel, side)
            spectrum *= filters[id(kernel)]
        result = backward(spectrum, side)[halo : halo + y1 - y0, halo : halo + x1 - x0]
        # The decorrelation's sum is one: the smooth background passes it unchanged.
        np.subtract(result, solution.background_tile(y0, y1, x0, x1), out=out[y0:y1, x0:x1])
    if factor != 1.0:
        out *= np.float32(factor)
    return out


@njit(cache=True, fastmath={"contract", "nsz"})
def _add_variance(smeared, fixed, kernel_square, scale):  # type: ignore[no-untyped-def]
    for j in range(smeared.shape[0]):
        for i in range(smeared.shape[1]):
            smeared[j, i] = scale * fixed[j, i] + kernel_square * max(smeared[j, i], np.float32(0))


def _identity(_x: float, _y: float) -> NDArray[np.float64]:
    return np.ones((1, 1))


def _phi_half(kernel: NDArray[np.float64], fixed: float, convolved: float, largest: int) -> int:
    """Half size beyond which the decorrelation kernel is a thousandth of its absolute sum."""
    phi = np.abs(decorrelation_kernel(kernel, fixed, convolved, half=largest))
    for half in range(3, largest):
        inner = phi[largest - half : largest + half + 1, largest - half : largest + half + 1]
        if inner.sum() > 0.999 * phi.sum():
            return half
    return largest


class _PhiField:
    """Decorrelation kernels on a coarse grid, computed when first asked for."""

    def __init__(self, solution: KernelSolution, fixed: float, convolved: float, half: int) -> None:
        self._solution, self._fixed, self._convolved, self._half = solution, fixed, convolved, half
        self._cache: dict[tuple[int, int], NDArray[np.float64]] = {}

    def __call__(self, x: float, y: float) -> NDArray[np.float64]:
        cell = int(x // CELL), int(y // CELL)
        if cell not in self._cache:
            ny, nx = self._solution.shape
            kernel = self._solution.kernel(
                min((cell[0] + 0.5) * CELL, nx - 1.0), min((cell[1] + 0.5) * CELL, ny - 1.0)
            )
            self._cache[cell] = decorrelation_kernel(kernel, self._fixed, self._convolved, half=self._half)
        return self._cache[cell]


def reached(
    bad: NDArray[np.bool_], kernel: NDArray[np.float64], interpolated: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.bool_], int]:
    """Bad pixels grown by the radius that holds 95 % of the kernel's absolute sum.

    Interpolated ones grow to where the kernel takes more than ``INTERPOLATED_PART`` of the light from them: a single
    column of a sensor would else hide a dozen.
    """
    half = kernel.shape[0] // 2
    yy, xx = np.mgrid[-half : half + 1, -half : half + 1]
    radius = np.hypot(xx, yy).ravel()
    order = np.argsort(radius)
    light = np.abs(kernel)
    cumulative = np.cumsum(light.ravel()[order])
    reach = int(np.ceil(radius[order][np.searchsorted(cumulative, 0.95 * cumulative[-1])]))
    if reach == 0 or not bad.any():
        return bad.copy(), reach
    shape = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    if interpolated is None or not interpolated.any():
        return np.asarray(cv2.dilate(bad.astype(np.uint8), shape) > 0), reach
    missing = (bad & ~interpolated).astype(np.uint8)
    part = cv2.sepFilter2D(
        (bad & interpolated).astype(np.uint8) * 255, cv2.CV_8U, trimmed(light.sum(axis=0)[::-1] / light.sum(), 1e-2),
        trimmed(light.sum(axis=1)[::-1] / light.sum(), 1e-2), borderType=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    touched = bad | (part > 255 * INTERPOLATED_PART)
    if missing.any():
        touched |= cv2.dilate(missing, shape) > 0
    return np.asarray(touched), reach
