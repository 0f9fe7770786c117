"""Fits of two lobes (dipole) and of a bar of light (trail) to stamps of a difference image; compiled.

Both models are made of the local PSF, moved by quintic splines. Every pixel counts alike, as in the photometry of point
sources; errors are propagated from the variance of the pixels. Positions are 0-based pixels.
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

_STEP_PX = 0.7
"""Distance of the points that a bar of light is summed up of."""
_MOST_STEPS = 40
_FREE_TRIES, _MOST_TRIES = 15, 40
_ENOUGH = 1e-4
"""Relative gain of a step after which there is no other; a fit that cannot be good need not be exact.

Lobes that overlap have no end of their own: they are soon given up and fitted with the star's flux.
"""
_DIPOLE, _TRAIL = 0, 1


@dataclass(frozen=True, slots=True)
class Lobes:
    """Dipoles; arrays of shape (n,), of errors (n, 6, 6).

    Attributes
    ----------
    flux_up, flux_down
        Of the positive lobe, and of the negative one with its sign turned.
    x_up, y_up, x_down, y_down
        Places of the lobes.
    covariance
        Of (flux_up, x_up, y_up, flux_down, x_down, y_down).
    chi2, n_pixels
        Of the fit.
    is_good
        False where the fit did not end.
    """

    flux_up: NDArray[np.float64]
    x_up: NDArray[np.float64]
    y_up: NDArray[np.float64]
    flux_down: NDArray[np.float64]
    x_down: NDArray[np.float64]
    y_down: NDArray[np.float64]
    covariance: NDArray[np.float64]
    chi2: NDArray[np.float64]
    n_pixels: NDArray[np.int64]
    is_good: NDArray[np.bool_]

    def mean_flux(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean of the lobes' fluxes, and its error."""
        return (self.flux_up + self.flux_down) / 2, self._error(0.5, 0.5)

    def flux_difference(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Positive minus negative lobe, and its error."""
        return self.flux_up - self.flux_down, self._error(1.0, -1.0)

    def _error(self, up: float, down: float) -> NDArray[np.float64]:
        c = self.covariance
        square = up * up * c[:, 0, 0] + down * down * c[:, 3, 3] + 2 * up * down * c[:, 0, 3]
        return np.sqrt(np.maximum(square, 0.0))


@dataclass(frozen=True, slots=True)
class Trails:
    """Bars of light; arrays of shape (n,).

    ``angle`` is in radians from +x to +y; ``covariance`` (n, 5, 5) of (flux, x, y, length, angle); ``chi2_point`` that of
    a point source on the same pixels; ``is_cut`` where an end lies off the image or on unusable pixels, or the bar is longer
    than what is fitted.
    """

    flux: NDArray[np.float64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    length: NDArray[np.float64]
    angle: NDArray[np.float64]
    covariance: NDArray[np.float64]
    chi2: NDArray[np.float64]
    chi2_point: NDArray[np.float64]
    n_pixels: NDArray[np.int64]
    is_good: NDArray[np.bool_]
    is_cut: NDArray[np.bool_]


@njit(cache=True)
def _solve(matrix, right):  # type: ignore[no-untyped-def]
    """Gauss–Jordan in place: ``right`` becomes the solution; False for a singular matrix. ``right`` is (n, m)."""
    n = matrix.shape[0]
    for k in range(n):
        pivot = k
        for j in range(k + 1, n):
            if abs(matrix[j, k]) > abs(matrix[pivot, k]):
                pivot = j
        if not abs(matrix[pivot, k]) > 1e-300:
            return False
        if pivot != k:
            for i in range(n):
                matrix[k, i], matrix[pivot, i] = matrix[pivot, i], matrix[k, i]
            for i in range(right.shape[1]):
                right[k, i], right[pivot, i] = right[pivot, i], right[k, i]
        inverse = 1.0 / matrix[k, k]
        for i in range(n):
            matrix[k, i] *= inverse
        for i in range(right.shape[1]):
            right[k, i] *= inverse
        for j in range(n):
            if j == k:
                continue
            factor = matrix[j, k]
            if factor == 0.0:
                continue
            for i in range(n):
                matrix[j, i] -= factor * matrix[k, i]
            for i in range(right.shape[1]):
                right[j, i] -= factor * right[k, i]
    return True


@njit(cache=True)
def _slope(plane, j, i, along_x):  # type: ignore[no-untyped-def]
    """Derivative of a plane at one pixel, by five points; zero outside."""
    n = plane.shape[0]
    total = 0.0
    for k in (-2, -1, 1, 2):
        y, x = (j, i + k) if along_x else (j + k, i)
        if 0 <= y < n and 0 <= x < n:
            weight = (8.0 if abs(k) == 1 else -1.0) * (1.0 if k > 0 else -1.0)
            total += weight * plane[y, x]
    return total / 12.0


@njit(cache=True)
def _add(stamp, x, y, factor, plane):  # type: ignore[no-untyped-def]
    """Add ``factor`` times a stamp, whole pixels (x, y) from the window's centre."""
    side, n = stamp.shape[0], plane.shape[0]
    top, left = n // 2 - side // 2 + y, n // 2 - side // 2 + x
    for j in range(max(0, -top), min(side, n - top)):
        for i in range(max(0, -left), min(side, n - left)):
            plane[top + j, left + i] += factor * stamp[j, i]


@njit(cache=True)
def _spot(coefficients, x, y, rows, stamp):  # type: ignore[no-untyped-def]
    """The PSF moved to the fraction of (x, y); gives the whole pixels that are left."""
    ix, iy = int(np.floor(x + 0.5)), int(np.floor(y + 0.5))
    move(coefficients, x - ix, y - iy, rows, stamp)
    return ix, iy


@njit(cache=True)
def _dipole(values, used, coefficients, rows, stamp, planes, model):  # type: ignore[no-untyped-def]
    """Model of (flux up, x, y, flux down, x, y)."""
    n = model.shape[0]
    for lobe in range(2):
        planes[lobe, :, :] = 0.0
        ix, iy = _spot(coefficients, values[3 * lobe + 1], values[3 * lobe + 2], rows, stamp)
        _add(stamp, ix, iy, 1.0, planes[lobe])
    for j in range(n):
        for i in range(n):
            if used[j, i]:
                model[j, i] = values[0] * planes[0, j, i] - values[3] * planes[1, j, i]


@njit(cache=True)
def _dipole_slopes(values, used, planes, jacobian):  # type: ignore[no-untyped-def]
    n = used.shape[0]
    for j in range(n):
        for i in range(n):
            if not used[j, i]:
                continue
            for lobe in range(2):
                sign = 1.0 - 2.0 * lobe
                jacobian[3 * lobe, j, i] = sign * planes[lobe, j, i]
                jacobian[3 * lobe + 1, j, i] = -sign * values[3 * lobe] * _slope(planes[lobe], j, i, True)
                jacobian[3 * lobe + 2, j, i] = -sign * values[3 * lobe] * _slope(planes[lobe], j, i, False)


@njit(cache=True)
def _trail(values, used, coefficients, rows, stamp, planes, model):  # type: ignore[no-untyped-def]
    """Model of (flux, x, y, length, angle)."""
    n = model.shape[0]
    x, y, length = values[1], values[2], values[3]
    ux, uy = np.cos(values[4]), np.sin(values[4])
    steps = min(max(2, int(np.ceil(length / _STEP_PX))), _MOST_STEPS)
    # points in a row scatter less than the bar they stand for
    wider = 1.0 / np.sqrt(1.0 - 1.0 / steps**2)
    planes[:, :, :] = 0.0
    for k in range(steps):
        at = ((k + 0.5) / steps - 0.5) * length * wider
        ix, iy = _spot(coefficients, x + at * ux, y + at * uy, rows, stamp)
        _add(stamp, ix, iy, 1.0 / steps, planes[0])
        _add(stamp, ix, iy, at / steps, planes[1])
    for way in (-0.5, 0.5):
        ix, iy = _spot(coefficients, x + way * length * ux, y + way * length * uy, rows, stamp)
        _add(stamp, ix, iy, 0.5, planes[2])
    for j in range(n):
        for i in range(n):
            if used[j, i]:
                model[j, i] = values[0] * planes[0, j, i]


@njit(cache=True)
def _trail_slopes(values, used, planes, jacobian):  # type: ignore[no-untyped-def]
    n = used.shape[0]
    flux, safe = values[0], max(values[3], 1e-3)
    ux, uy = np.cos(values[4]), np.sin(values[4])
    for j in range(n):
        for i in range(n):
            if not used[j, i]:
                continue
            jacobian[0, j, i] = planes[0, j, i]
            jacobian[1, j, i] = -flux * _slope(planes[0], j, i, True)
            jacobian[2, j, i] = -flux * _slope(planes[0], j, i, False)
            jacobian[3, j, i] = flux * (planes[2, j, i] - planes[0, j, i]) / safe
            across = uy * _slope(planes[1], j, i, True) - ux * _slope(planes[1], j, i, False)
            jacobian[4, j, i] = flux * across


@njit(cache=True)
def _cost(data, used, model):  # type: ignore[no-untyped-def]
    total = 0.0
    n = data.shape[0]
    for j in range(n):
        for i in range(n):
            if used[j, i]:
                total += (data[j, i] - model[j, i]) ** 2
    return total


@njit(cache=True)
def _evaluate(kind, values, used, coefficients, rows, stamp, planes, model):  # type: ignore[no-untyped-def]
    if kind == _DIPOLE:
        _dipole(values, used, coefficients, rows, stamp, planes, model)
    else:
        _trail(values, used, coefficients, rows, stamp, planes, model)


@njit(cache=True)
def _slopes(kind, values, used, planes, jacobian):  # type: ignore[no-untyped-def]
    """Derivatives of the model that ``planes`` are of."""
    if kind == _DIPOLE:
        _dipole_slopes(values, used, planes, jacobian)
    else:
        _trail_slopes(values, used, planes, jacobian)


@njit(cache=True)
def _normal(data, variance, used, model, jacobian, matrix, noise, right):  # type: ignore[no-untyped-def]
    """Normal equations, and the noise that goes through them."""
    m, n = matrix.shape[0], data.shape[0]
    matrix[:, :] = 0.0
    noise[:, :] = 0.0
    right[:] = 0.0
    for j in range(n):
        for i in range(n):
            if not used[j, i]:
                continue
            left, v = data[j, i] - model[j, i], variance[j, i]
            for a in range(m):
                d = jacobian[a, j, i]
                right[a] += d * left
                for b in range(a + 1):
                    both = d * jacobian[b, j, i]
                    matrix[a, b] += both
                    noise[a, b] += both * v
    for a in range(m):
        for b in range(a):
            matrix[b, a], noise[b, a] = matrix[a, b], noise[a, b]


@njit(cache=True)
def _fit(kind, values, data, variance, used, prior, prior_error, coefficients, reach, work):  # type: ignore[no-untyped-def]
    """Levenberg–Marquardt in place; (ended well, covariance). ``prior`` is of the mean of both lobes' fluxes."""
    rows, stamp, planes, model, jacobian = work
    m, n = values.size, data.shape[0]
    matrix, noise, right = np.empty((m, m)), np.empty((m, m)), np.empty(m)
    try_matrix, step = np.empty((m, m)), np.empty((m, 1))
    count, mean_variance = 0, 0.0
    for j in range(n):
        for i in range(n):
            if used[j, i]:
                count += 1
                mean_variance += variance[j, i]
    covariance = np.full((m, m), np.nan)
    if count <= m + 3:
        return False, covariance
    mean_variance /= count
    # in the unit of the pixels' mean variance, so that it weighs beside pixels that count alike
    pull = mean_variance / prior_error**2 if prior_error > 0 else 0.0
    start = values.copy()
    trial = values.copy()
    _evaluate(kind, values, used, coefficients, rows, stamp, planes, model)
    cost = _cost(data, used, model)
    if pull > 0:
        cost += pull * ((values[0] + values[3]) / 2 - prior) ** 2
    damping, is_ended = 1e-3, False
    for _ in range(_FREE_TRIES if kind == _DIPOLE and pull == 0.0 else _MOST_TRIES):
        _slopes(kind, values, used, planes, jacobian)
        _normal(data, variance, used, model, jacobian, matrix, noise, right)
        if pull > 0:
            miss = prior - (values[0] + values[3]) / 2
            for a in (0, 3):
                right[a] += 0.5 * pull * miss
                for b in (0, 3):
                    matrix[a, b] += 0.25 * pull
                    noise[a, b] += 0.25 * pull * mean_variance
        is_better = False
        for _ in range(8):
            try_matrix[:, :] = matrix
            for a in range(m):
                try_matrix[a, a] *= 1.0 + damping
                step[a, 0] = right[a]
            if not _solve(try_matrix, step):
                return False, covariance
            for a in range(m):
                trial[a] = values[a] + step[a, 0]
            for a in range(1, m):
                if a == 3 or (a == 4 and kind == _TRAIL):  # a flux or a length, an angle
                    continue
                trial[a] = min(max(trial[a], start[a] - reach), start[a] + reach)
            if kind == _TRAIL:
                trial[3] = min(max(trial[3], 0.05), _STEP_PX * _MOST_STEPS)
            _evaluate(kind, trial, used, coefficients, rows, stamp, planes, model)
            new = _cost(data, used, model)
            if pull > 0:
                new += pull * ((trial[0] + trial[3]) / 2 - prior) ** 2
            if np.isfinite(new) and new <= cost:
                is_better = True
                break
            damping *= 6.0
        if not is_better:
            is_ended = True  # nothing near is better
            _evaluate(kind, values, used, coefficients, rows, stamp, planes, model)
            break
        gain = cost - new
        values[:], cost = trial, new
        damping = max(damping * 0.2, 1e-7)
        if gain < max(1e-3 * mean_variance, _ENOUGH * cost):
            is_ended = True
            break
    _slopes(kind, values, used, planes, jacobian)
    _normal(data, variance, used, model, jacobian, matrix, noise, right)
    if pull > 0:
        for a in (0, 3):
            for b in (0, 3):
                matrix[a, b] += 0.25 * pull
                noise[a, b] += 0.25 * pull * mean_variance
    inverse = np.eye(m)
    if not _solve(matrix, inverse):
        return False, covariance
    for a in range(m):
        for b in range(m):
            total = 0.0
            for c in range(m):
                for d in range(m):
                    total += inverse[a, c] * noise[c, d] * inverse[b, d]
            covariance[a, b] = total
    return is_ended, covariance


@njit(cache=True)
def _window(image, variance, scale, mask, unusable, x0, y0, data, var, usable):  # type: ignore[no-untyped-def]
    ny, nx = image.shape
    n = data.shape[0]
    for j in range(n):
        for i in range(n):
            y, x = y0 + j - n // 2, x0 + i - n // 2
            usable[j, i] = False
            data[j, i], var[j, i] = 0.0, 0.0
            if 0 <= y < ny and 0 <= x < nx and (mask[y, x] & unusable) == 0 and variance[y, x] > 0:
                usable[j, i] = True
                data[j, i], var[j, i] = image[y, x], variance[y, x] * scale


@njit(cache=True)
def _away(j, i, n, x, y, ux, uy, half):  # type: ignore[no-untyped-def]
    """Distance of a pixel of the window from a bar of half length ``half`` about (x, y)."""
    dx, dy = i - n // 2 - x, j - n // 2 - y
    along = min(max(dx * ux + dy * uy, -half), half)
    return np.hypot(dx - along * ux, dy - along * uy)


@njit(cache=True)
def _chi2(data, var, used, model):  # type: ignore[no-untyped-def]
    total, count = 0.0, 0
    n = data.shape[0]
    for j in range(n):
        for i in range(n):
            if used[j, i]:
                total += (data[j, i] - model[j, i]) ** 2 / var[j, i]
                count += 1
    return total, count


@njit(cache=True)
def _fit_dipoles(  # type: ignore[no-untyped-def]
    image, variance, scale, mask, snr, unusable, stamps, coefficients, which, xs, ys, priors, prior_errors,
    radius, out, covariances,
):  # fmt: skip
    ny, nx = image.shape
    side = stamps.shape[1]
    n = side + 2 * int(np.ceil(radius))
    data, var = np.empty((n, n)), np.empty((n, n))
    usable, used = np.empty((n, n), np.bool_), np.empty((n, n), np.bool_)
    work = (
        np.empty((side, side)),
        np.empty((side, side)),
        np.empty((2, n, n)),
        np.empty((n, n)),
        np.empty((6, n, n)),
    )
    values, reach = np.empty(6), int(np.ceil(radius))
    for s in range(xs.size):
        x0, y0 = xs[s], ys[s]
        sign = 1.0 if snr[y0, x0] > 0 else -1.0
        px, py, least = x0, y0, 0.0
        for j in range(max(y0 - reach, 0), min(y0 + reach + 1, ny)):
            for i in range(max(x0 - reach, 0), min(x0 + reach + 1, nx)):
                if sign * snr[j, i] < least:
                    least, px, py = sign * snr[j, i], i, j
        _window(image, variance, scale, mask, unusable, x0, y0, data, var, usable)
        top = stamps[which[s]].max()
        first, second = (0, 3) if sign > 0 else (3, 0)
        values[first], values[first + 1], values[first + 2] = abs(image[y0, x0]) / top, 0.0, 0.0
        values[second] = abs(image[py, px]) / top
        values[second + 1], values[second + 2] = px - x0, py - y0
        ax, ay = (values[1] + values[4]) / 2, (values[2] + values[5]) / 2
        dx, dy = values[1] - values[4], values[2] - values[5]
        apart = max(np.hypot(dx, dy), 1e-9)
        for j in range(n):
            for i in range(n):
                near = _away(j, i, n, ax, ay, dx / apart, dy / apart, apart / 2) <= radius
                used[j, i] = usable[j, i] and near
        is_good, covariance = _fit(
            _DIPOLE, values, data, var, used, priors[s], prior_errors[s], coefficients[which[s]], radius, work
        )
        chi2, count = _chi2(data, var, used, work[3])
        out[s, :6] = values
        for k in (1, 4):
            out[s, k] += x0
            out[s, k + 1] += y0
        out[s, 6], out[s, 7], out[s, 8] = chi2, count, 1.0 if is_good else 0.0
        covariances[s] = covariance


@njit(cache=True)
def _extent(snr, x0, y0, ux, uy, sign, least, most):  # type: ignore[no-untyped-def]
    """How far from a place the light goes on along a direction, in pixels."""
    ny, nx = snr.shape
    reach = 0.0
    for k in range(1, int(most) + 1):
        x, y = int(np.floor(x0 + k * ux + 0.5)), int(np.floor(y0 + k * uy + 0.5))
        if not (0 <= x < nx and 0 <= y < ny) or sign * snr[y, x] < least:
            break
        reach = float(k)
    return reach


@njit(cache=True)
def _fit_trails(  # type: ignore[no-untyped-def]
    image,
    variance,
    scale,
    mask,
    snr,
    unusable,
    stamps,
    coefficients,
    which,
    xs,
    ys,
    angles,
    radius,
    out,
    covariances,
):
    ny, nx = image.shape
    side = stamps.shape[1]
    longest = _STEP_PX * _MOST_STEPS
    n = side + 2 * int(np.ceil(longest / 2))
    data, var = np.empty((n, n)), np.empty((n, n))
    usable, used = np.empty((n, n), np.bool_), np.empty((n, n), np.bool_)
    work = (
        np.empty((side, side)),
        np.empty((side, side)),
        np.empty((3, n, n)),
        np.empty((n, n)),
        np.empty((5, n, n)),
    )
    values = np.empty(5)
    for s in range(xs.size):
        sign = 1.0 if snr[ys[s], xs[s]] > 0 else -1.0
        ux, uy = np.cos(angles[s]), np.sin(angles[s])
        least = max(3.0, 0.35 * abs(snr[ys[s], xs[s]]))
        ahead = _extent(snr, xs[s], ys[s], ux, uy, sign, least, longest)
        behind = _extent(snr, xs[s], ys[s], -ux, -uy, sign, least, longest)
        middle = (ahead - behind) / 2
        x0, y0 = int(np.floor(xs[s] + middle * ux + 0.5)), int(np.floor(ys[s] + middle * uy + 0.5))
        x0, y0 = min(max(x0, 0), nx - 1), min(max(y0, 0), ny - 1)
        _window(image, variance, scale, mask, unusable, x0, y0, data, var, usable)
        coefficient = coefficients[which[s]]
        values[1], values[2], values[4] = 0.0, 0.0, angles[s]
        values[3] = min(max(ahead + behind - radius / 3, radius / 4), longest)
        is_good, covariance, chi2, chi2_point, count = False, np.full((5, 5), np.nan), np.nan, np.nan, 0
        # the pixels follow the bar: once about the first guess, once about what came out
        for is_first in (True, False):
            ux, uy = np.cos(values[4]), np.sin(values[4])
            total = 0.0
            for j in range(n):
                for i in range(n):
                    near = _away(j, i, n, values[1], values[2], ux, uy, values[3] / 2) <= radius
                    used[j, i] = usable[j, i] and near
                    if used[j, i]:
                        total += data[j, i]
            values[0] = total
            if not is_first and not is_good:
                break
            is_good, covariance = _fit(_TRAIL, values, data, var, used, 0.0, 0.0, coefficient, radius, work)
            chi2, count = _chi2(data, var, used, work[3])
        # the best point source on the same pixels
        work[2][0, :, :] = 0.0
        ix, iy = _spot(coefficient, values[1], values[2], work[0], work[1])
        _add(work[1], ix, iy, 1.0, work[2][0])
        up, down = 0.0, 0.0
        for j in range(n):
            for i in range(n):
                if used[j, i]:
                    up += work[2][0, j, i] * data[j, i]
                    down += work[2][0, j, i] ** 2
        work[3][:, :] = work[2][0] * (up / max(down, 1e-300))
        chi2_point, _ = _chi2(data, var, used, work[3])
        is_cut = values[3] > 0.98 * longest
        for way in (-0.5, 0.5):
            x = int(np.floor(x0 + values[1] + way * values[3] * np.cos(values[4]) + 0.5))
            y = int(np.floor(y0 + values[2] + way * values[3] * np.sin(values[4]) + 0.5))
            is_cut |= not (0 <= x < nx and 0 <= y < ny) or (mask[y, x] & unusable) != 0
        out[s, :5] = values
        out[s, 1] += x0
        out[s, 2] += y0
        out[s, 5], out[s, 6], out[s, 7] = chi2, chi2_point, count
        out[s, 8], out[s, 9] = 1.0 if is_good else 0.0, 1.0 if is_cut else 0.0
        covariances[s] = covariance


def _whole(values: Any, kind: type[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(values, kind)


def fit_dipoles(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    mask: NDArray[np.uint16],
    snr: NDArray[np.float32],
    psf: GridPsf,
    x: NDArray[np.intp],
    y: NDArray[np.intp],
    *,
    unusable: int,
    radius: float,
    variance_scale: float = 1.0,
    prior: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> Lobes:
    """Fit a positive and a negative point source at once.

    Parameters
    ----------
    image, variance, mask, snr
        (ny, nx) planes of the difference; ``snr`` shows where the second lobe is.
    x, y
        Pixels of one lobe's peak, shape (n,).
    radius
        Pixels about the line between the lobes that take part.
    prior
        (mean flux of the lobes, its error), both (n,): what is known of the star from the images themselves. Lobes
        closer than a third of the PSF's width give only the product of flux and distance.
    """
    n = len(x)
    out, covariances = np.zeros((n, 9)), np.full((n, 6, 6), np.nan)
    if n:
        stamps, which = psf.stack(x, y)
        priors, errors = prior if prior is not None else (np.zeros(n), np.zeros(n))
        _fit_dipoles(
            image, variance, float(variance_scale), mask, snr, np.uint16(unusable), stamps,
            spline_coefficients(stamps), which, _whole(x, np.int64), _whole(y, np.int64), _whole(priors, np.float64),
            _whole(errors, np.float64), float(radius), out, covariances,
        )  # fmt: skip
    a, b, c, d, e, f, chi2, n_pixels, good = out.T
    return Lobes(a, b, c, d, e, f, covariances, chi2, n_pixels.astype(np.int64), good > 0)


def fit_trails(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    mask: NDArray[np.uint16],
    snr: NDArray[np.float32],
    psf: GridPsf,
    x: NDArray[np.intp],
    y: NDArray[np.intp],
    angle: NDArray[np.float64],
    *,
    unusable: int,
    radius: float,
    variance_scale: float = 1.0,
) -> Trails:
    """Fit the PSF drawn out along a straight line at constant speed; at most 28 pixels long.

    Parameters
    ----------
    angle
        First guess of the direction in radians from +x to +y, shape (n,).
    radius
        Pixels about the line that take part.
    """
    n = len(x)
    out, covariances = np.zeros((n, 10)), np.full((n, 5, 5), np.nan)
    if n:
        stamps, which = psf.stack(x, y)
        _fit_trails(
            image, variance, float(variance_scale), mask, snr, np.uint16(unusable), stamps,
            spline_coefficients(stamps), which, _whole(x, np.int64), _whole(y, np.int64), _whole(angle, np.float64),
            float(radius), out, covariances,
        )  # fmt: skip
    flux, x_out, y_out, length, turned, chi2, point, n_pixels, good, cut = out.T
    return Trails(
        flux,
        x_out,
        y_out,
        length,
        turned,
        covariances,
        chi2,
        point,
        n_pixels.astype(np.int64),
        good > 0,
        cut > 0,
    )
