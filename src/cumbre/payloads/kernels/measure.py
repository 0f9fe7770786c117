"""Measurement of the sources of a difference image: PSF fit with position, aperture, moments, misfits; compiled.

Positions are 0-based pixels, centre of the first pixel at (0, 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cumbre.payloads.kernels.shift import move, spline_coefficients

if TYPE_CHECKING:
    from cumbre.payloads.kernels.detect import GridPsf

_MAX_SHIFT = 2.5
(
    _X, _Y, _X_ERR, _Y_ERR, _FLUX, _FLUX_ERR, _AP, _AP_ERR, _CHI2, _N, _CORRELATION, _COMPACT, _OPPOSITE, _PARTNER,
    _ELONGATION, _LENGTH, _ANGLE, _LOST, _BITS, _CENTRE, _CORE_CHI2, _PEAK, _HIT,
) = range(23)  # fmt: skip


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


def compactness(data: NDArray[np.float64], radius: NDArray[np.float64], aperture_radius: float) -> float:
    """Light within half the aperture's radius over that in the aperture; 0 when there is none."""
    whole = float((np.clip(aperture_radius + 0.5 - radius, 0, 1) * data).sum())
    inner = float((np.clip(0.5 * aperture_radius + 0.5 - radius, 0, 1) * data).sum())
    return inner / whole if whole > 0 and inner > 0 else 0.0


@njit(cache=True)
def _flux(data, weight, profile):  # type: ignore[no-untyped-def]
    """Flux and its error of one PSF at a known place; NaN without a usable pixel.

    All pixels of positive weight count alike, as in the photometry of the stars that give the zero point. Weights
    1 / variance would favour the pixels whose own noise made them faint, and the wings of bright sources.
    """
    top, bottom, noise = 0.0, 0.0, 0.0
    n = data.shape[0]
    for j in range(n):
        for i in range(n):
            if weight[j, i] > 0:
                p = profile[j, i]
                top += p * data[j, i]
                bottom += p * p
                noise += p * p / weight[j, i]
    if bottom <= 0:
        return np.nan, np.nan
    return top / bottom, np.sqrt(noise) / bottom


@njit(cache=True)
def _fit_position(data, weight, near, model, coefficients, rows, profile, near_weight):  # type: ignore[no-untyped-def]
    """Gauss–Newton for flux, dx, dy; falls back to the peak when it walks away."""
    n = data.shape[0]
    for j in range(n):
        for i in range(n):
            near_weight[j, i] = weight[j, i] if near[j, i] else 0.0
    dx, dy, x_err, y_err = 0.0, 0.0, np.nan, np.nan
    flux, flux_err = _flux(data, near_weight, model)
    for _ in range(6):
        move(coefficients, dx, dy, rows, profile)
        m00, m01, m02, m11, m12, m22, r0, r1, r2 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for j in range(n):
            for i in range(n):
                w = near_weight[j, i]
                if w == 0:
                    continue
                p = profile[j, i]
                left, right = max(i - 1, 0), min(i + 1, n - 1)
                low, high = max(j - 1, 0), min(j + 1, n - 1)
                sx = -flux * (profile[j, right] - profile[j, left]) / (right - left)
                sy = -flux * (profile[high, i] - profile[low, i]) / (high - low)
                r = data[j, i] - flux * p
                m00 += w * p * p
                m01 += w * p * sx
                m02 += w * p * sy
                m11 += w * sx * sx
                m12 += w * sx * sy
                m22 += w * sy * sy
                r0 += w * p * r
                r1 += w * sx * r
                r2 += w * sy * r
        c00, c01, c02 = m11 * m22 - m12 * m12, m02 * m12 - m01 * m22, m01 * m12 - m02 * m11
        det = m00 * c00 + m01 * c01 + m02 * c02
        if not abs(det) > 1e-200:
            return flux, flux_err, 0.0, 0.0, x_err, y_err, True
        c11, c12, c22 = m00 * m22 - m02 * m02, m01 * m02 - m00 * m12, m00 * m11 - m01 * m01
        step_x = min(max((c01 * r0 + c11 * r1 + c12 * r2) / det, -1.0), 1.0)
        step_y = min(max((c02 * r0 + c12 * r1 + c22 * r2) / det, -1.0), 1.0)
        flux += (c00 * r0 + c01 * r1 + c02 * r2) / det
        dx += step_x
        dy += step_y
        flux_err = np.sqrt(max(c00 / det, 0.0))
        x_err, y_err = np.sqrt(max(c11 / det, 0.0)), np.sqrt(max(c22 / det, 0.0))
        if not np.isfinite(flux) or not max(abs(dx), abs(dy)) <= _MAX_SHIFT:
            flux, flux_err = _flux(data, near_weight, model)
            return flux, flux_err, 0.0, 0.0, x_err, y_err, True
        if max(abs(step_x), abs(step_y)) < 0.01:
            break
    return flux, flux_err, dx, dy, x_err, y_err, False


@njit(cache=True)
def _moments(data, variance, weight, sign, dx, dy, radius):  # type: ignore[no-untyped-def]
    """(length of the equivalent bar in pixels, angle in degrees, axis ratio) of the positive part."""
    n = data.shape[0]
    half = n // 2
    total, mx, my = 0.0, 0.0, 0.0
    xx, yy, xy = 0.0, 0.0, 0.0
    for j in range(n):
        for i in range(n):
            x, y, d = i - half - dx, j - half - dy, sign * data[j, i]
            if weight[j, i] > 0 and x * x + y * y <= radius * radius and d > 1.5 * np.sqrt(variance[j, i]):
                total += d
                mx += d * x
                my += d * y
                xx += d * x * x
                yy += d * y * y
                xy += d * x * y
    if total <= 0:
        return 0.0, 0.0, 1.0
    mx /= total
    my /= total
    xx, yy, xy = xx / total - mx * mx, yy / total - my * my, xy / total - mx * my
    middle, diff = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    major, minor = middle + diff, max(middle - diff, 1.0 / 12)
    angle = np.degrees(0.5 * np.arctan2(2 * xy, xx - yy))
    return np.sqrt(12 * max(major - minor, 0.0)), angle, np.sqrt(max(major, 1.0 / 12) / minor)


@njit(cache=True)
def _partner(snr, x, y, sign, reach):  # type: ignore[no-untyped-def]
    """Strongest peak of the other sign within ``reach``, as a fraction of this one's."""
    ny, nx = snr.shape
    least = 0.0
    for j in range(max(y - reach, 0), min(y + reach + 1, ny)):
        for i in range(max(x - reach, 0), min(x + reach + 1, nx)):
            least = min(least, sign * snr[j, i])
    return -least / max(abs(snr[y, x]), 1e-6)


@njit(cache=True)
def _measure(  # type: ignore[no-untyped-def]
    image,
    variance,
    variance_scale,
    mask,
    snr,
    stamps,
    coefficients,
    which,
    xs,
    ys,
    unusable,
    hit_bits,
    aperture_radius,
    profile_tolerance,
    core_tolerance,
    out,
):
    ny, nx = image.shape
    n = stamps.shape[1]
    half = n // 2
    data, var, weight = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    bits = np.empty((n, n), np.uint16)
    near, rows, profile, near_weight = (
        np.empty((n, n), np.bool_),
        np.empty((n, n)),
        np.empty((n, n)),
        np.empty((n, n)),
    )
    near_radius = max(aperture_radius, 3.0)
    core_radius = max(aperture_radius / 1.5 + 0.5, 2.3)
    for j in range(n):
        for i in range(n):
            near[j, i] = np.hypot(i - half, j - half) <= near_radius
    for s in range(xs.size):
        x0, y0, row = xs[s], ys[s], out[s]
        all_bits, centre = 0, 0
        for j in range(n):
            for i in range(n):
                y, x = y0 + j - half, x0 + i - half
                if y < 0 or x < 0 or y >= ny or x >= nx:
                    data[j, i], var[j, i], weight[j, i], bits[j, i] = 0.0, 0.0, 0.0, 0
                    continue
                b, v = mask[y, x], variance[y, x] * variance_scale
                data[j, i], var[j, i], bits[j, i] = image[y, x], v, b
                weight[j, i] = 1.0 / max(v, 1e-30) if (b & unusable) == 0 and v > 0 else 0.0
                if near[j, i]:
                    all_bits |= b
                if abs(j - half) <= 1 and abs(i - half) <= 1:
                    centre |= b
        model = stamps[which[s]]
        flux, flux_err, dx, dy, x_err, y_err, lost = _fit_position(
            data, weight, near, model, coefficients[which[s]], rows, profile, near_weight
        )
        move(coefficients[which[s]], dx, dy, rows, profile)
        if not lost:
            flux, flux_err = _flux(data, weight, profile)
        if not np.isfinite(flux):
            flux, flux_err = 0.0, np.inf
        top_profile = 0.0
        for j in range(n):
            for i in range(n):
                top_profile = max(top_profile, profile[j, i])
        sign = -1.0 if flux < 0 else 1.0
        top = abs(flux) * top_profile
        chi2, count, vs, vv, ss, total, negative = 0.0, 0, 0.0, 0.0, 0.0, 0.0, 0.0
        core_chi2, core_count, worst, worst_var = 0.0, 0, -1e300, 0.0
        light, hit, ap, ap_var, inner, whole = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for j in range(n):
            for i in range(n):
                p, d, w, v = profile[j, i], data[j, i], weight[j, i], var[j, i]
                light += max(p, 0.0)
                if bits[j, i] & hit_bits:
                    hit += max(p, 0.0)
                if w == 0:
                    continue
                miss = d - flux * p
                if near[j, i]:
                    allowed = v + (profile_tolerance * top) ** 2 / 9.0 + (profile_tolerance * flux * p) ** 2
                    chi2 += miss * miss / allowed
                    count += 1
                    vs += sign * d * p
                    vv += d * d
                    ss += p * p
                    if abs(d) > np.sqrt(v):
                        total += abs(d)
                        if sign * d < 0:
                            negative += abs(d)
                radius = np.hypot(i - half - dx, j - half - dy)
                if radius <= core_radius:
                    allowed = v + (core_tolerance * flux * p) ** 2 + (0.5 * core_tolerance * top) ** 2
                    core_chi2 += miss * miss / allowed
                    core_count += 1
                    if sign * miss > worst:
                        worst, worst_var = sign * miss, v
                a = min(max(aperture_radius + 0.5 - radius, 0.0), 1.0)
                ap += a * d
                ap_var += a * a * v
                whole += a * sign * d
                inner += min(max(0.5 * aperture_radius + 0.5 - radius, 0.0), 1.0) * sign * d
        length, angle, elongation = _moments(data, var, weight, sign, dx, dy, aperture_radius * 1.5)
        row[_X], row[_Y], row[_X_ERR], row[_Y_ERR] = x0 + dx, y0 + dy, x_err, y_err
        row[_FLUX], row[_FLUX_ERR], row[_AP], row[_AP_ERR] = flux, flux_err, ap, np.sqrt(ap_var)
        row[_CHI2], row[_N] = chi2 / max(count - 3, 1), count
        spread = np.sqrt(vv * ss)
        row[_CORRELATION] = vs / spread if spread > 0 else 0.0
        row[_COMPACT] = inner / whole if whole > 0 and inner > 0 else 0.0
        row[_OPPOSITE] = negative / total if total > 0 else 0.0
        row[_PARTNER] = _partner(snr, x0, y0, sign, max(3, int(np.ceil(aperture_radius))))
        row[_ELONGATION], row[_LENGTH], row[_ANGLE] = elongation, length, angle
        row[_LOST], row[_BITS], row[_CENTRE] = lost, all_bits, centre
        if core_count:
            row[_CORE_CHI2] = core_chi2 / max(core_count - 3, 1)
            row[_PEAK] = min(max((worst - 1.5 * np.sqrt(worst_var)) / max(top, 1e-12), 0.0), 3.0)
        else:
            row[_CORE_CHI2], row[_PEAK] = 100.0, 1.0
        row[_HIT] = hit / max(light, 1e-12)


def measure_sources(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    mask: NDArray[np.uint16],
    snr: NDArray[np.float32],
    psf: GridPsf,
    x: NDArray[np.intp],
    y: NDArray[np.intp],
    *,
    unusable: int,
    aperture_radius: float,
    variance_scale: float = 1.0,
    profile_tolerance: float = 0.08,
    core_tolerance: float = 0.05,
    hit_bits: int = 0,
) -> list[Measurement]:
    """Measure peaks.

    Parameters
    ----------
    image, variance, mask
        (ny, nx) difference planes; bits of ``unusable`` leave a pixel out.
    snr
        Output of ``significance``, for the partner of opposite sign.
    x, y
        Pixels of the peaks, shape (n,).
    aperture_radius
        Pixels; the aperture flux has no correction.
    variance_scale
        Factor on the variance.
    profile_tolerance
        Fraction of the model by which real PSFs differ from it; added to the noise in χ².
    core_tolerance
        The same for ``core_chi2`` and ``peak``.
    hit_bits
        Bits of cosmic-ray pixels.
    """
    if len(x) == 0:
        return []
    stamps, which = psf.stack(x, y)
    out = np.zeros((len(x), _HIT + 1))
    _measure(
        image, variance, np.float32(variance_scale), mask, snr, stamps, spline_coefficients(stamps), which,
        np.ascontiguousarray(x, np.int64), np.ascontiguousarray(y, np.int64), np.uint16(unusable), np.uint16(hit_bits),
        float(aperture_radius), float(profile_tolerance), float(core_tolerance), out,
    )  # fmt: skip
    return [_measurement(row) for row in out.tolist()]


def _measurement(row: list[Any]) -> Measurement:
    row[_N], row[_BITS], row[_CENTRE], row[_LOST] = (
        int(row[_N]),
        int(row[_BITS]),
        int(row[_CENTRE]),
        bool(row[_LOST]),
    )
    return Measurement(*row)
