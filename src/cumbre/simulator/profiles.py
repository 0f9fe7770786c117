"""Point-spread function and galaxy profiles as sums of Gaussians.

A Moffat function, an exponential disc and a de Vaucouleurs bulge are fitted by non-negative sums of circular
Gaussians. Convolution of any galaxy with any PSF is then an addition of variances: stars and galaxies feel
exactly the same PSF, and the truth stays analytic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
MOFFAT_BETA = 3.5
PIXEL_VARIANCE = 1.0 / 12.0
"""Variance of a square pixel of unit side: adding it stands for the integration over the pixel."""


def _fit(radius: FloatArray, profile: FloatArray, sigmas: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Weights (sum 1) and variances of the Gaussians that match ``profile`` × area best."""
    from scipy.optimize import nnls

    area = radius * np.gradient(radius)
    weight = np.sqrt(area)
    basis = np.exp(-0.5 * (radius[:, None] / sigmas) ** 2) / (2 * np.pi * sigmas**2)
    amplitudes, _ = nnls(basis * weight[:, None], profile * weight)
    keep = amplitudes > 1e-5 * amplitudes.sum()
    return amplitudes[keep] / amplitudes[keep].sum(), sigmas[keep] ** 2


@lru_cache(maxsize=1)
def moffat() -> tuple[FloatArray, FloatArray]:
    """Weights and variances (FWHM = 1) of the Moffat function of index ``MOFFAT_BETA``."""
    alpha = 0.5 / np.sqrt(2 ** (1 / MOFFAT_BETA) - 1)
    radius = np.geomspace(1e-3, 12.0, 2000)
    profile = (1 + (radius / alpha) ** 2) ** -MOFFAT_BETA
    # Never narrower than 0.34 FWHM: at 1.5 pixels FWHM such a Gaussian is still well sampled.
    return _fit(radius, profile, np.array([0.34, 0.50, 0.78, 1.35, 2.8]))


@lru_cache(maxsize=1)
def exponential() -> tuple[FloatArray, FloatArray]:
    """Weights and variances of an exponential disc, half-light radius 1, cut at 5 half-light radii."""
    radius = np.geomspace(1e-3, 5.0, 2000)
    return _fit(radius, np.exp(-1.67835 * radius), np.array([0.12, 0.33, 0.7, 1.25]))


@lru_cache(maxsize=1)
def de_vaucouleurs() -> tuple[FloatArray, FloatArray]:
    """Weights and variances of an r^(1/4) bulge, half-light radius 1, cut at 8 half-light radii."""
    radius = np.geomspace(1e-3, 8.0, 2000)
    return _fit(radius, np.exp(-7.66925 * radius**0.25), np.geomspace(0.03, 3.2, 6))


@dataclass(frozen=True, slots=True)
class Psf:
    """PSF of one exposure: size and shape are smooth functions of the focal plane.

    Attributes
    ----------
    fwhm_px
        FWHM in pixels on the optical axis.
    radial
        Relative growth of the FWHM at the edge of the field (u² + v² = 1).
    shape
        Six numbers: e1 = s0 + s1·u + s2·v and e2 = s3 + s4·u + s5·v.
    """

    fwhm_px: float
    radial: float
    shape: tuple[float, float, float, float, float, float]

    def unit_covariance(self, u: FloatArray, v: FloatArray) -> FloatArray:
        """Covariance (n, 3: xx, xy, yy; pixels²) of a unit-FWHM² variance at field positions u, v (±1)."""
        size = (self.fwhm_px * (1 + self.radial * (u * u + v * v))) ** 2
        s = self.shape
        e1, e2 = s[0] + s[1] * u + s[2] * v, s[3] + s[4] * u + s[5] * v
        return np.stack([size * (1 + e1), size * e2, size * (1 - e1)], axis=-1)

    def effective_pixels(self) -> float:
        """1/Σp²: sky pixels whose noise a PSF fit feels, on the axis."""
        weights, variances = moffat()
        covariance = variances * self.fwhm_px**2 + PIXEL_VARIANCE
        overlap = weights[:, None] * weights / (2 * np.pi * (covariance[:, None] + covariance))
        return float(1.0 / overlap.sum())

    def peak_fraction(self) -> float:
        """Part of a star's flux in its brightest pixel, when centred there."""
        weights, variances = moffat()
        return float((weights / (2 * np.pi * (variances * self.fwhm_px**2 + PIXEL_VARIANCE))).sum())
