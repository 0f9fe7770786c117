"""Subtraction with a kernel that varies over the field, and removal of the noise correlation it causes.

With ``D = S − K ⊗ T`` the convolved template's noise is correlated. Filtering D with
``φ(k) = sqrt((σs² + κ(0)² σt²) / (σs² + κ(k)² σt²))`` (DMTN-021, normalised to φ(0) = 1 so that fluxes stay)
makes it white again; the difference's PSF is then ``φ ⊗ PSF`` of the image that was not convolved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from cumbre.payloads.kernels.kernel_match import KernelSolution

KernelField = Callable[[float, float], NDArray[np.float64]]
BLOCK = 128


def convolve_field(
    image: NDArray[np.float32], kernel_at: KernelField, half: int, *, block: int = BLOCK
) -> NDArray[np.float32]:
    """Convolve by blocks, each with the kernel of its centre.

    Parameters
    ----------
    image
        (ny, nx), finite everywhere; outside it counts as zero.
    kernel_at
        ``kernel_at(x, y)`` → (2·half + 1, 2·half + 1).
    """
    ny, nx = image.shape
    padded = np.pad(image, half)
    out = np.empty((ny, nx), dtype=np.float32)
    for y0 in range(0, ny, block):
        for x0 in range(0, nx, block):
            y1, x1 = min(y0 + block, ny), min(x0 + block, nx)
            # filter2D correlates: the kernel is flipped to convolve.
            kernel = np.ascontiguousarray(kernel_at((x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2)[::-1, ::-1])
            piece = padded[y0 : y1 + 2 * half, x0 : x1 + 2 * half]
            full = cv2.filter2D(piece, cv2.CV_32F, kernel.astype(np.float32), borderType=cv2.BORDER_CONSTANT)
            out[y0:y1, x0:x1] = full[half : half + y1 - y0, half : half + x1 - x0]
    return out


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
    size = 128
    while size < 2 * max(kernel.shape[0], 2 * half + 1):
        size *= 2
    canvas = np.zeros((size, size))
    n = kernel.shape[0]
    canvas[:n, :n] = kernel
    canvas = np.roll(canvas, (-(n // 2), -(n // 2)), axis=(0, 1))
    power = np.abs(np.fft.rfft2(canvas)) ** 2
    white = variance_fixed + power[0, 0] * variance_convolved
    response = np.sqrt(white / np.maximum(variance_fixed + power * variance_convolved, 1e-6 * white))
    phi = np.fft.fftshift(np.fft.irfft2(response, s=(size, size)))
    centre = size // 2
    cut = phi[centre - half : centre + half + 1, centre - half : centre + half + 1].copy()
    return np.asarray(cut / cut.sum())


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
    matched
        float32 (ny, nx): the convolved image, in the other's units and background.
    """

    image: NDArray[np.float32]
    variance: NDArray[np.float32]
    touched: NDArray[np.bool_]
    reach: int
    phi: KernelField
    matched: NDArray[np.float32]


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
) -> Subtraction:
    """Subtract two registered images with a fitted kernel.

    Parameters
    ----------
    fixed, convolved
        (ny, nx) images, finite; ``solution`` maps ``convolved`` onto ``fixed``.
    convolved_bad
        True where ``convolved`` cannot be trusted (saturated, missing).
    is_science_convolved
        Then the difference is ``(K ⊗ science + b − template) / ΣK``: science units, science minus template.
    """
    half = solution.basis.half
    matched = convolve_field(convolved, solution.kernel, half) + solution.background_image()
    kernel_sum = solution.metrics["sum"]
    middle = solution.kernel(solution.shape[1] / 2, solution.shape[0] / 2)
    square = middle**2
    # Photon noise of stars is smeared as the stars are; its level is that after decorrelation.
    smeared = cv2.filter2D(
        convolved_variance, cv2.CV_32F, (square / square.sum())[::-1, ::-1].astype(np.float32),
        borderType=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    image = fixed - matched
    variance = fixed_variance + np.float32(kernel_sum**2) * np.maximum(smeared, 0)
    if is_science_convolved:
        image *= np.float32(-1.0 / kernel_sum)
        variance *= np.float32(kernel_sum**-2)
    touched, reach = _reach(convolved_bad, middle)
    phi: KernelField = _identity
    if decorrelate:
        usable = ~convolved_bad
        v_fixed = float(np.median(fixed_variance[usable][::17])) if usable.any() else 1.0
        v_convolved = float(np.median(convolved_variance[usable][::17])) if usable.any() else 0.0
        phi = _PhiField(solution, v_fixed, v_convolved, phi_half)
        image = convolve_field(image.astype(np.float32), phi, phi_half, block=2 * BLOCK)
    return Subtraction(image.astype(np.float32), variance.astype(np.float32), touched, reach, phi, matched)


def _identity(_x: float, _y: float) -> NDArray[np.float64]:
    return np.ones((1, 1))


class _PhiField:
    """Decorrelation kernels on a coarse grid, computed when first asked for."""

    def __init__(self, solution: KernelSolution, fixed: float, convolved: float, half: int) -> None:
        self._solution, self._fixed, self._convolved, self._half = solution, fixed, convolved, half
        self._cache: dict[tuple[int, int], NDArray[np.float64]] = {}

    def __call__(self, x: float, y: float) -> NDArray[np.float64]:
        cell = int(x // (2 * BLOCK)), int(y // (2 * BLOCK))
        if cell not in self._cache:
            ny, nx = self._solution.shape
            kernel = self._solution.kernel(
                min((cell[0] + 0.5) * 2 * BLOCK, nx - 1.0), min((cell[1] + 0.5) * 2 * BLOCK, ny - 1.0)
            )
            self._cache[cell] = decorrelation_kernel(kernel, self._fixed, self._convolved, half=self._half)
        return self._cache[cell]


def _reach(bad: NDArray[np.bool_], kernel: NDArray[np.float64]) -> tuple[NDArray[np.bool_], int]:
    """Bad pixels grown by the radius that holds 95 % of the kernel's absolute sum."""
    half = kernel.shape[0] // 2
    yy, xx = np.mgrid[-half : half + 1, -half : half + 1]
    radius = np.hypot(xx, yy).ravel()
    order = np.argsort(radius)
    cumulative = np.cumsum(np.abs(kernel).ravel()[order])
    reach = int(np.ceil(radius[order][np.searchsorted(cumulative, 0.95 * cumulative[-1])]))
    if reach == 0 or not bad.any():
        return bad.copy(), reach
    shape = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    return np.asarray(cv2.dilate(bad.astype(np.uint8), shape) > 0), reach
