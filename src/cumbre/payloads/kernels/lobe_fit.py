"""Least squares for models of moved PSFs: two lobes of opposite sign, a bar of light; compiled.

Levenberg–Marquardt on the usable pixels of a small window, every pixel with the same weight; the noise of the pixels goes
through the normal equations into the covariance.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from cumbre.payloads.kernels.shift import move

STEP_PX = 0.7
"""Distance of the points that a bar of light is summed up of."""
MOST_STEPS = 40
_FREE_TRIES, _MOST_TRIES = 15, 40
_ENOUGH = 1e-4
"""Relative gain of a step after which there is no other; a fit that cannot be good need not be exact.

Lobes that overlap have no end of their own: they are soon given up and fitted with the star's flux.
"""
N_DIPOLE, N_TRAIL = 6, 5
"""Numbers of each model, which tell them apart: everything is compiled once for both."""


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
def add(stamp, x, y, factor, plane):  # type: ignore[no-untyped-def]
    """Add ``factor`` times a stamp, whole pixels (x, y) from the window's centre."""
    side, n = stamp.shape[0], plane.shape[0]
    top, left = n // 2 - side // 2 + y, n // 2 - side // 2 + x
    for j in range(max(0, -top), min(side, n - top)):
        for i in range(max(0, -left), min(side, n - left)):
            plane[top + j, left + i] += factor * stamp[j, i]


@njit(cache=True)
def spot(coefficients, x, y, rows, stamp):  # type: ignore[no-untyped-def]
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
        ix, iy = spot(coefficients, values[3 * lobe + 1], values[3 * lobe + 2], rows, stamp)
        add(stamp, ix, iy, 1.0, planes[lobe])
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
    steps = min(max(2, int(np.ceil(length / STEP_PX))), MOST_STEPS)
    # points in a row scatter less than the bar they stand for
    wider = 1.0 / np.sqrt(1.0 - 1.0 / steps**2)
    planes[:, :, :] = 0.0
    for k in range(steps):
        at = ((k + 0.5) / steps - 0.5) * length * wider
        ix, iy = spot(coefficients, x + at * ux, y + at * uy, rows, stamp)
        add(stamp, ix, iy, 1.0 / steps, planes[0])
        add(stamp, ix, iy, at / steps, planes[1])
    for way in (-0.5, 0.5):
        ix, iy = spot(coefficients, x + way * length * ux, y + way * length * uy, rows, stamp)
        add(stamp, ix, iy, 0.5, planes[2])
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
def _evaluate(values, used, coefficients, rows, stamp, planes, model):  # type: ignore[no-untyped-def]
    if values.size == N_DIPOLE:
        _dipole(values, used, coefficients, rows, stamp, planes, model)
    else:
        _trail(values, used, coefficients, rows, stamp, planes, model)


@njit(cache=True)
def _slopes(values, used, planes, jacobian):  # type: ignore[no-untyped-def]
    """Derivatives of the model that ``planes`` are of."""
    if values.size == N_DIPOLE:
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
def fit(values, data, variance, used, prior, prior_error, coefficients, reach, work):  # type: ignore[no-untyped-def]
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
    _evaluate(values, used, coefficients, rows, stamp, planes, model)
    cost = _cost(data, used, model)
    if pull > 0:
        cost += pull * ((values[0] + values[3]) / 2 - prior) ** 2
    damping, is_ended = 1e-3, False
    for _ in range(_FREE_TRIES if values.size == N_DIPOLE and pull == 0.0 else _MOST_TRIES):
        _slopes(values, used, planes, jacobian)
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
                if a == 3 or (a == 4 and values.size == N_TRAIL):  # a flux or a length, an angle
                    continue
                trial[a] = min(max(trial[a], start[a] - reach), start[a] + reach)
            if values.size == N_TRAIL:
                trial[3] = min(max(trial[3], 0.05), STEP_PX * MOST_STEPS)
            _evaluate(trial, used, coefficients, rows, stamp, planes, model)
            new = _cost(data, used, model)
            if pull > 0:
                new += pull * ((trial[0] + trial[3]) / 2 - prior) ** 2
            if np.isfinite(new) and new <= cost:
                is_better = True
                break
            damping *= 6.0
        if not is_better:
            is_ended = True  # nothing near is better
            _evaluate(values, used, coefficients, rows, stamp, planes, model)
            break
        gain = cost - new
        values[:], cost = trial, new
        damping = max(damping * 0.2, 1e-7)
        if gain < max(1e-3 * mean_variance, _ENOUGH * cost):
            is_ended = True
            break
    _slopes(values, used, planes, jacobian)
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
