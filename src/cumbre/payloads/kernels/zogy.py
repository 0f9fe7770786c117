"""Proper image subtraction (Zackay, Ofek & Gal-Yam 2016) with PSFs that vary over the field.

With ``N = f · P_n ⊗ T`` and ``R = F · f · P_r ⊗ T`` and white noise of variances σn², σr², the difference

    D = k_n ⊗ N − k_r ⊗ R,   k̂_n = F·P̂_r / (q·F_D),   k̂_r = P̂_n / (q·F_D),
    q² = σn²·F²·|P̂_r|² + σr²·|P̂_n|²,   F_D = F / sqrt(σn²·F² + σr²)

is white, has the PSF ``k_n ⊗ P_n`` and the fluxes of N. The image is cut into overlapping cells, each with the PSFs,
noise, flux ratio and shift of its centre. Both sides then have one PSF, as far as the PSF models are right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import scipy.fft
from numba import njit
from numpy.typing import NDArray

from cumbre.payloads.kernels.convolve import KernelField, convolve_field, trimmed

FloatImage = NDArray[np.float32]
Floats = NDArray[np.float64]
CELL = 128
"""Side of the cells that share a pair of filters."""
CANVAS = 128
"""Side of the transforms that filters are made with: PSF stamps have 41 pixels at most."""
MOST_HALF = 20
"""Half size of the filters, which fade out over the outer half of it: a sharp end would be a ring around stars."""
POINT = 0.05
"""Light of a point that is added to both PSFs: where they have little power their errors must not set the ratio."""
KEPT = 0.999
"""Part of a filter's absolute sum that its cut holds."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What holds at one place.

    Attributes
    ----------
    science_psf, template_psf
        Odd square stamps, centred; any sum.
    science_variance, template_variance
        Of the sky's white noise.
    ratio
        F: template units in one science unit.
    shift
        (dx, dy), pixels by which the template's stars lie off the science's.
    """

    science_psf: NDArray[np.floating]
    template_psf: NDArray[np.floating]
    science_variance: float
    template_variance: float
    ratio: float
    shift: tuple[float, float]


def _transform(stamp: NDArray[np.floating]) -> NDArray[np.complex128]:
    half = stamp.shape[0] // 2
    wide = np.zeros((CANVAS, CANVAS))
    wide[: stamp.shape[0], : stamp.shape[1]] = stamp / np.sum(stamp, dtype=np.float64)
    wide = np.roll(wide, (-half, -half), axis=(0, 1))
    return np.asarray(scipy.fft.rfft2(wide))


def filters(cell: Cell) -> tuple[Floats, Floats]:
    """``k_n`` (sum 1) and ``k_r`` (sum 1/F) as (2·MOST_HALF + 1)² images; ``k_r`` also takes the shift out."""
    psf_n, psf_r = _transform(cell.science_psf), _transform(cell.template_psf)
    # only where the PSFs pass little
    point = POINT * np.maximum(1 - np.sqrt(np.abs(psf_n * psf_r)), 0) ** 2
    psf_n, psf_r = psf_n + point, psf_r + point
    ratio = cell.ratio
    q = np.sqrt(
        cell.science_variance * ratio**2 * np.abs(psf_r) ** 2 + cell.template_variance * np.abs(psf_n) ** 2
    )
    norm = q[0, 0]
    made_n = psf_r / q * norm
    made_r = psf_n / q * norm / ratio
    fx, fy = scipy.fft.rfftfreq(CANVAS)[None, :], scipy.fft.fftfreq(CANVAS)[:, None]
    made_r = made_r * np.exp(2j * np.pi * (fx * cell.shift[0] + fy * cell.shift[1]))
    around = np.arange(-MOST_HALF, MOST_HALF + 1)
    window = np.ix_(around, around)
    part = np.clip(2 * np.hypot(around[:, None], around) / (MOST_HALF + 1) - 1, 0, 1)
    fade = 0.5 * (1 + np.cos(np.pi * part))
    kernel_n = scipy.fft.irfft2(made_n, s=(CANVAS, CANVAS))[window] * fade
    kernel_r = scipy.fft.irfft2(made_r, s=(CANVAS, CANVAS))[window] * fade
    return np.asarray(kernel_n / kernel_n.sum()), np.asarray(kernel_r / (kernel_r.sum() * ratio))


def needed_half(*kernels: Floats) -> int:
    """Half size of the square that holds ``KEPT`` of each kernel's absolute sum."""
    most = 3
    for kernel in kernels:
        middle, size = kernel.shape[0] // 2, np.abs(kernel)
        total = size.sum()
        half = most
        while half < middle:
            part = size[middle - half : middle + half + 1, middle - half : middle + half + 1]
            if part.sum() > KEPT * total:
                break
            half += 1
        most = max(most, half)
    return most


class FilterField:
    """The filters of a field, cell by cell, made when first asked for."""

    def __init__(self, at: Callable[[float, float], Cell], shape: tuple[int, int]) -> None:
        self._at, self._shape = at, shape
        self._cache: dict[tuple[int, int], tuple[Floats, Floats]] = {}
        middle = filters(at(shape[1] / 2, shape[0] / 2))
        self.half = needed_half(*middle)

    def __call__(self, x: float, y: float) -> tuple[Floats, Floats]:
        """``k_n`` and ``k_r`` of the cell that holds (x, y)."""
        key = int(x // CELL), int(y // CELL)
        if key not in self._cache:
            ny, nx = self._shape
            cx, cy = (min(max((k + 0.5) * CELL, 0), n - 1) for k, n in zip(key, (nx, ny), strict=True))
            made, cut_off = filters(self._at(cx, cy)), MOST_HALF - self.half
            kept = slice(cut_off, 2 * MOST_HALF + 1 - cut_off)
            short = tuple(k[kept, kept] * (k.sum() / k[kept, kept].sum()) for k in made)
            self._cache[key] = short[0], short[1]
        return self._cache[key]

    def science(self, x: float, y: float) -> Floats:
        """``k_n`` there."""
        return self(x, y)[0]

    def template(self, x: float, y: float) -> Floats:
        """``k_r`` there."""
        return self(x, y)[1]


def filtered_variance(variance: FloatImage, kernel: Floats) -> FloatImage:
    """Variance of an image of independent pixels after a filter, by the sums of its square along the axes."""
    square = kernel**2
    total = float(square.sum())
    return np.asarray(
        cv2.sepFilter2D(
            variance, cv2.CV_32F, trimmed(square.sum(axis=0)[::-1] / total), trimmed(square.sum(axis=1)[::-1]),
            borderType=cv2.BORDER_REPLICATE,
        )
    )  # fmt: skip


@njit(cache=True)
def _mismatch(image, sigma_x, sigma_y, part):  # type: ignore[no-untyped-def]
    """σx²·(∂x)² + σy²·(∂y)² by central differences, + (part · image)²; zero on the rim."""
    ny, nx = image.shape
    out = np.zeros(image.shape, np.float32)
    a, b = sigma_x * sigma_x / 4, sigma_y * sigma_y / 4
    for j in range(1, ny - 1):
        for i in range(1, nx - 1):
            dx, dy = image[j, i + 1] - image[j, i - 1], image[j + 1, i] - image[j - 1, i]
            left = part * image[j, i]
            out[j, i] = a * dx * dx + b * dy * dy + left * left
    return out


def mismatch_noise(
    filtered: FloatImage, psf: KernelField, half: int, sigma_px: tuple[float, float], part: float
) -> FloatImage:
    """Variance of the matched filter's sum by errors of registration (the paper's V_ast), of PSFs and flux ratio.

    Parameters
    ----------
    filtered
        ``k_r ⊗ R``, (ny, nx).
    psf, half
        PSF of the difference: (2·half + 1)² at a place.
    sigma_px
        Error of the registration along x and y.
    part
        Of a star's flux, that errors of PSFs and flux ratio leave.
    """
    score = convolve_field(filtered, lambda x, y: psf(x, y)[::-1, ::-1], half)
    return np.asarray(_mismatch(score, *sigma_px, part))
