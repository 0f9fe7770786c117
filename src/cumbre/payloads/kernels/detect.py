"""Detection and measurement of sources on a difference image.

Matched filter with the local PSF, peaks of both signs, then per peak a PSF fit with position, an aperture, and
moments. Positions are 0-based pixels, centre of the first pixel at (0, 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from cumbre.payloads.kernels.planes import robust_rms

__all__ = [
    "GridPsf",
    "Measurement",
    "find_peaks",
    "measure",
    "noise_peaks",
    "robust_rms",
    "significance",
    "streak_mask",
]

BLOCK = 128
_MAX_SHIFT = 2.5


class PsfField(Protocol):
    """A PSF model: odd square stamps centred on their middle pixel, sum 1."""

    def __call__(self, x: float, y: float, /) -> NDArray[np.floating[Any]]:
        """Stamp of the place."""


class GridPsf:
    """PSF stamps sampled on a grid of cells, filtered by the difference's decorrelation kernel.

    Parameters
    ----------
    base
        ``base(x, y)`` → odd square stamp centred on its middle pixel.
    phi
        ``phi(x, y)`` → odd square kernel with sum 1.
    half
        Half size of the stamps returned.
    """

    def __init__(self, base: PsfField, phi: PsfField, *, half: int, cell: int = BLOCK) -> None:
        self._base, self._phi, self.half, self._cell = base, phi, half, cell
        self._cache: dict[tuple[int, int], NDArray[np.float64]] = {}

    def __call__(self, x: float, y: float) -> NDArray[np.float64]:
        """(2·half + 1)² stamp of the cell that holds (x, y)."""
        cell = int(x // self._cell), int(y // self._cell)
        if cell not in self._cache:
            cx, cy = (cell[0] + 0.5) * self._cell, (cell[1] + 0.5) * self._cell
            stamp, phi = np.asarray(self._base(cx, cy), float), self._phi(cx, cy)
            pad = phi.shape[0] // 2 + max(0, self.half - stamp.shape[0] // 2)
            wide = np.pad(stamp, pad)
            if phi.shape[0] > 1:
                flipped = np.ascontiguousarray(phi[::-1, ::-1])
                wide = cv2.filter2D(wide, cv2.CV_64F, flipped, borderType=cv2.BORDER_CONSTANT)
            middle = wide.shape[0] // 2
            cut = wide[
                middle - self.half : middle + self.half + 1, middle - self.half : middle + self.half + 1
            ]
            self._cache[cell] = cut / cut.sum()
        return self._cache[cell]


def shifted(stamp: NDArray[np.float64], dx: float, dy: float) -> NDArray[np.float64]:
    """A stamp moved by (dx, dy) pixels (quintic spline, so the flux of narrow PSFs stays)."""
    from scipy.ndimage import shift

    return np.asarray(shift(stamp, (dy, dx), order=5, mode="constant", cval=0.0))


def significance(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    psf: PsfField,
    half: int,
) -> NDArray[np.float32]:
    """Signal-to-noise of a point source at every pixel.

    ``Σ P·D / sqrt(Σ P²·V)`` with bad pixels left out of both sums.

    Parameters
    ----------
    image, variance
        (ny, nx) difference and its variance.
    bad
        True where a pixel must not count.
    psf, half
        Local PSF and the half size of its stamps.
    """
    ny, nx = image.shape
    good_image = np.pad(np.where(bad, 0, image).astype(np.float32), half)
    good_variance = np.pad(np.where(bad, 0, variance).astype(np.float32), half)
    out = np.zeros((ny, nx), dtype=np.float32)
    for y0 in range(0, ny, BLOCK):
        for x0 in range(0, nx, BLOCK):
            y1, x1 = min(y0 + BLOCK, ny), min(x0 + BLOCK, nx)
            stamp = psf((x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2).astype(np.float32)
            piece = np.s_[y0 : y1 + 2 * half, x0 : x1 + 2 * half]
            inner = np.s_[half : half + y1 - y0, half : half + x1 - x0]
            signal = cv2.filter2D(good_image[piece], cv2.CV_32F, stamp, borderType=cv2.BORDER_CONSTANT)[inner]
            noise = cv2.filter2D(good_variance[piece], cv2.CV_32F, stamp**2, borderType=cv2.BORDER_CONSTANT)[
                inner
            ]
            full = float((stamp**2).sum()) * float(np.median(variance[y0:y1, x0:x1]))
            out[y0:y1, x0:x1] = np.where(noise > 0.3 * full, signal / np.sqrt(np.maximum(noise, 1e-30)), 0)
    return out


def find_peaks(
    snr: NDArray[np.float32], threshold: float, *, radius: int = 3
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
    """Local maxima of \\|snr\\| of at least ``threshold``, each sign by itself.

    Returns
    -------
    x, y, is_negative, ordered from the most significant down.
    """
    window = np.ones((2 * radius + 1, 2 * radius + 1), dtype=np.uint8)
    xs, ys, signs, values = [], [], [], []
    for sign in (1.0, -1.0):
        signed = snr * np.float32(sign)
        top = cv2.dilate(signed, window)
        y, x = np.nonzero((signed >= threshold) & (signed >= top))
        xs.append(x)
        ys.append(y)
        signs.append(np.full(len(x), sign < 0))
        values.append(signed[y, x])
    order = np.argsort(-np.concatenate(values), kind="stable")
    return np.concatenate(xs)[order], np.concatenate(ys)[order], np.concatenate(signs)[order]


def noise_peaks(snr: NDArray[np.float32], bad: NDArray[np.bool_], radius: int) -> tuple[float, float]:
    """Tail of the noise, from the peaks too faint to be detections.

    Noise peaks of a stack or a resampled image are more frequent than Gaussian statistics say. Their number
    above s is described by ``count · exp(−(s − 4.5) / slope)``, measured between 3.5 and 4.5.

    Parameters
    ----------
    snr
        Significance image; give its negative for the negative tail.
    bad
        Pixels not to look at.
    radius
        Half size of the window in which a pixel must be the highest to be a peak.

    Returns
    -------
    count
        Expected noise peaks above 4.5 in the whole image.
    slope
        Scale of the exponential, sigma.
    """
    top = cv2.dilate(snr, np.ones((2 * radius + 1, 2 * radius + 1), dtype=np.uint8))
    peaks = snr[(snr >= top) & ~bad & (snr > 3.5)]
    near, far = int((peaks < 4.0).sum()), int(((peaks >= 4.0) & (peaks < 4.5)).sum())
    if far < 3 or near <= far:
        return 0.2 * far, 0.25
    ratio = near / far
    return far / (ratio - 1.0), float(np.clip(0.5 / np.log(ratio), 0.1, 1.0))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One source on the difference; fluxes in the image's units, positions in pixels.

    ``chi2`` is reduced, of the PSF fit; ``correlation`` that of stamp and PSF; ``opposite`` the part of the
    absolute flux near the source that has the other sign; ``partner`` the strongest peak of opposite sign
    nearby as a fraction of the source's own; ``elongation`` the axis ratio of the moments; ``length`` and
    ``angle`` (degrees from +x to +y) describe a trail. ``core_chi2`` is reduced, of the PSF fit within one FWHM with
    only a small error of the PSF allowed; ``peak`` the excess of the brightest pixel over the fitted PSF there, in
    units of that PSF's maximum beyond the noise; ``hit`` the part of the PSF's light on cosmic-ray pixels.
    """

    x: float
    y: float
    x_err: float
    y_err: float
    flux: float
    flux_err: float
    aperture_flux: float
    aperture_err: float
    chi2: float
    n_pixels: int
    correlation: float
    compactness: float
    opposite: float
    partner: float
    elongation: float
    length: float
    angle: float
    is_centroid_bad: bool
    mask_bits: int
    mask_bits_centre: int
    core_chi2: float
    peak: float
    hit: float


def fit_flux(
    data: NDArray[np.float64], weight: NDArray[np.float64], profile: NDArray[np.float64]
) -> tuple[float, float]:
    """Flux and its error of one PSF at a known place."""
    denominator = float((weight * profile**2).sum())
    if denominator <= 0:
        return float("nan"), float("nan")
    return float((weight * profile * data).sum()) / denominator, denominator**-0.5


def measure(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    mask: NDArray[np.uint16],
    snr: NDArray[np.float32],
    psf: GridPsf,
    position: tuple[int, int],
    *,
    unusable: int,
    aperture_radius: float,
    profile_tolerance: float = 0.08,
    core_tolerance: float = 0.05,
    hit_bits: int = 0,
) -> Measurement:
    """Measure one peak.

    Parameters
    ----------
    image, variance, mask
        (ny, nx) difference planes; bits of ``unusable`` leave a pixel out.
    snr
        Output of :func:`significance`, for the partner of opposite sign.
    position
        x, y of the peak.
    aperture_radius
        Pixels; the aperture flux has no correction.
    profile_tolerance
        Fraction of the model by which real PSFs differ from it; added to the noise in χ².
    core_tolerance
        The same for ``core_chi2`` and ``peak``.
    hit_bits
        Bits of cosmic-ray pixels.
    """
    x0, y0 = position
    half = psf.half
    data, var, bits, inside = _cutout(image, variance, mask, x0, y0, half)
    weight = np.where(inside & ((bits & unusable) == 0) & (var > 0), 1.0 / np.maximum(var, 1e-30), 0.0)
    model = psf(x0, y0)
    grid = np.arange(-half, half + 1)
    near = np.hypot(*np.meshgrid(grid, grid)) <= max(aperture_radius, 3.0)
    flux, flux_err, dx, dy, position_err, lost = _fit_position(data, weight * near, model)
    profile = shifted(model, dx, dy)
    if not lost:
        flux, flux_err = fit_flux(data, weight, profile)
    if not np.isfinite(flux):
        flux, flux_err = 0.0, float("inf")
    core = near & (weight > 0)
    residual = (data - flux * profile)[core]
    # The PSF's profile is not known perfectly; a bright source is not punished for it.
    tolerance = (
        1.0 / np.maximum(weight[core], 1e-30) + (profile_tolerance * flux * float(profile.max())) ** 2 / 9.0
    )
    tolerance += (profile_tolerance * flux * profile[core]) ** 2
    n = int(core.sum())
    sign = -1.0 if flux < 0 else 1.0
    values, shape = sign * data[core], profile[core]
    spread = float(np.sqrt((values**2).sum() * (shape**2).sum()))
    noise = np.sqrt(1.0 / np.maximum(weight[core], 1e-30))
    total = float(np.abs(values)[np.abs(values) > noise].sum())
    negative = float(np.abs(values)[values < -noise].sum())
    radius = np.hypot(grid[None, :] - dx, grid[:, None] - dy)
    core_chi2, peak = _core_misfit(
        data, var, weight > 0, flux, profile, radius, aperture_radius, core_tolerance
    )
    light = np.maximum(profile, 0.0)
    aperture = np.clip(aperture_radius + 0.5 - radius, 0, 1) * (weight > 0)
    length, angle, elongation = _moments(
        np.where(weight > 0, sign * data, 0.0), var, dx, dy, aperture_radius * 1.5
    )
    centre = bits[half - 1 : half + 2, half - 1 : half + 2]
    return Measurement(
        x=x0 + dx,
        y=y0 + dy,
        x_err=position_err[0],
        y_err=position_err[1],
        flux=flux,
        flux_err=flux_err,
        aperture_flux=float((aperture * data).sum()),
        aperture_err=float(np.sqrt((aperture**2 * var).sum())),
        chi2=float((residual**2 / tolerance).sum() / max(n - 3, 1)),
        n_pixels=n,
        correlation=float((values * shape).sum() / spread) if spread > 0 else 0.0,
        compactness=compactness(sign * data * (weight > 0), radius, aperture_radius),
        opposite=negative / total if total > 0 else 0.0,
        partner=_partner(snr, x0, y0, sign, reach=max(3, math.ceil(aperture_radius))),
        elongation=elongation,
        length=length,
        angle=angle,
        is_centroid_bad=lost,
        mask_bits=int(np.bitwise_or.reduce(bits[near & inside])) if (near & inside).any() else 0,
        mask_bits_centre=int(np.bitwise_or.reduce(centre.ravel())),
        core_chi2=core_chi2,
        peak=peak,
        hit=float(light[(bits & hit_bits) > 0].sum() / max(float(light.sum()), 1e-12)),
    )


def _core_misfit(
    data: NDArray[np.float64],
    variance: NDArray[np.float64],
    good: NDArray[np.bool_],
    flux: float,
    profile: NDArray[np.float64],
    radius: NDArray[np.float64],
    aperture_radius: float,
    tolerance: float,
) -> tuple[float, float]:
    """Reduced χ² in the core, and the brightest pixel's excess over the PSF beyond the noise."""
    core = good & (radius <= max(aperture_radius / 1.5 + 0.5, 2.3))
    if not core.any() or not np.isfinite(flux):
        return 100.0, 1.0
    model = flux * profile
    top = abs(flux) * float(profile.max())
    allowed = variance + (tolerance * model) ** 2 + (0.5 * tolerance * top) ** 2
    miss = (data - model)[core]
    chi2 = float((miss**2 / allowed[core]).sum() / max(int(core.sum()) - 3, 1))
    sign = -1.0 if flux < 0 else 1.0
    worst = int(np.argmax(sign * miss))
    excess = sign * miss[worst] - 1.5 * float(np.sqrt(variance[core][worst]))
    return chi2, float(np.clip(excess / max(top, 1e-12), 0.0, 3.0))


def compactness(data: NDArray[np.float64], radius: NDArray[np.float64], aperture_radius: float) -> float:
    """Light within half the aperture's radius over that in the aperture; 0 when there is none."""
    whole = float((np.clip(aperture_radius + 0.5 - radius, 0, 1) * data).sum())
    inner = float((np.clip(0.5 * aperture_radius + 0.5 - radius, 0, 1) * data).sum())
    return inner / whole if whole > 0 and inner > 0 else 0.0


def _cutout(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    mask: NDArray[np.uint16],
    x: int,
    y: int,
    half: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.uint16], NDArray[np.bool_]]:
    size = 2 * half + 1
    data, var = np.zeros((size, size)), np.zeros((size, size))
    bits, inside = np.zeros((size, size), dtype=np.uint16), np.zeros((size, size), dtype=bool)
    ny, nx = image.shape
    y0, y1, x0, x1 = max(y - half, 0), min(y + half + 1, ny), max(x - half, 0), min(x + half + 1, nx)
    into = np.s_[y0 - y + half : y1 - y + half, x0 - x + half : x1 - x + half]
    data[into], var[into], bits[into] = image[y0:y1, x0:x1], variance[y0:y1, x0:x1], mask[y0:y1, x0:x1]
    inside[into] = True
    return data, var, bits, inside


def _fit_position(
    data: NDArray[np.float64], weight: NDArray[np.float64], model: NDArray[np.float64]
) -> tuple[float, float, float, float, tuple[float, float], bool]:
    """Gauss–Newton for flux, dx, dy; falls back to the peak when it walks away."""
    dx = dy = 0.0
    flux, flux_err = fit_flux(data, weight, model)
    errors = (float("nan"), float("nan"))
    for _ in range(6):
        profile = shifted(model, dx, dy)
        slope_y, slope_x = np.gradient(profile)
        design = np.stack([profile, -flux * slope_x, -flux * slope_y]).reshape(3, -1)
        normal = (design * weight.ravel()) @ design.T
        right = (design * weight.ravel()) @ (data - flux * profile).ravel()
        try:
            inverse = np.linalg.inv(normal)
        except np.linalg.LinAlgError:
            return flux, flux_err, 0.0, 0.0, errors, True
        step = inverse @ right
        move = np.clip(step[1:], -1.0, 1.0)
        flux, dx, dy = flux + float(step[0]), dx + float(move[0]), dy + float(move[1])
        flux_err = float(np.sqrt(max(inverse[0, 0], 0)))
        errors = float(np.sqrt(max(inverse[1, 1], 0))), float(np.sqrt(max(inverse[2, 2], 0)))
        if not np.isfinite(flux) or max(abs(dx), abs(dy)) > _MAX_SHIFT:
            flux, flux_err = fit_flux(data, weight, model)
            return flux, flux_err, 0.0, 0.0, errors, True
        if np.abs(move).max() < 0.01:
            break
    return flux, flux_err, dx, dy, errors, False


def _moments(
    data: NDArray[np.float64], variance: NDArray[np.float64], dx: float, dy: float, radius: float
) -> tuple[float, float, float]:
    """(length of the equivalent bar in pixels, angle in degrees, axis ratio) of the positive part."""
    half = data.shape[0] // 2
    grid = np.arange(-half, half + 1)
    x, y = grid[None, :] - dx, grid[:, None] - dy
    w = np.where((np.hypot(x, y) <= radius) & (data > 1.5 * np.sqrt(variance)), data, 0.0)
    total = w.sum()
    if total <= 0:
        return 0.0, 0.0, 1.0
    mx, my = (w * x).sum() / total, (w * y).sum() / total
    xx, yy = (w * (x - mx) ** 2).sum() / total, (w * (y - my) ** 2).sum() / total
    xy = (w * (x - mx) * (y - my)).sum() / total
    middle, diff = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    major, minor = middle + diff, max(middle - diff, 1.0 / 12)
    angle = float(np.degrees(0.5 * np.arctan2(2 * xy, xx - yy)))
    return float(np.sqrt(12 * max(major - minor, 0))), angle, float(np.sqrt(max(major, 1.0 / 12) / minor))


def _partner(snr: NDArray[np.float32], x: int, y: int, sign: float, reach: int) -> float:
    """Strongest peak of the other sign within ``reach``, as a fraction of this one's."""
    ny, nx = snr.shape
    piece = snr[max(y - reach, 0) : min(y + reach + 1, ny), max(x - reach, 0) : min(x + reach + 1, nx)]
    own = max(abs(float(snr[y, x])), 1e-6)
    return float(max(0.0, -float((sign * piece).min()))) / own


def streak_mask(
    snr: NDArray[np.float32], *, width: float, threshold: float = 3.0, min_length: int = 80
) -> NDArray[np.bool_]:
    """Pixels on long straight lines (satellites, aeroplanes), found by Hough transform.

    Parameters
    ----------
    snr
        Significance image of the difference.
    width
        Pixels masked across a line.
    min_length
        Shortest line, pixels.
    """
    binary = (snr > threshold).astype(np.uint8)
    out = np.zeros(snr.shape, dtype=np.uint8)
    # Compact blobs (stars, galaxies) are no lines: only long thin components vote.
    _, labels, stats, _ = cv2.connectedComponentsWithStats(binary)
    diagonal = np.hypot(stats[:, 2], stats[:, 3])
    is_thin = (diagonal > max(10.0, width)) & (stats[:, 4] < 0.3 * diagonal**2)
    is_thin[0] = False
    keep = is_thin[labels].astype(np.uint8) * 255
    if np.count_nonzero(keep) < min_length:
        return out > 0
    lines = cv2.HoughLinesP(
        keep,
        1,
        np.pi / 360,
        threshold=min_length // 2,
        minLineLength=min_length,
        maxLineGap=max(8, min_length // 5),
    )
    for line in [] if lines is None else np.asarray(lines).reshape(-1, 4):
        x0, y0, x1, y1 = (int(v) for v in line)
        cv2.line(out, (x0, y0), (x1, y1), 1, max(1, round(width)))
    return out > 0
