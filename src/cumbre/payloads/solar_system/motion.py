"""Perturbed motion of many test particles: Dormand and Prince's eighth-order pair, compiled, one step size each.

A particle feels the Sun (with the first post-Newtonian term), eight planets and the Moon. The perturbers' places are
interpolated on a common grid of half a day (cubic Hermite, below 1e-8 au), so that an orbit costs microseconds.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cumbre.payloads.solar_system.bodies import GRAVITIES, perturbers
from cumbre.payloads.solar_system.kepler import GM_SUN

FloatArray = NDArray[np.float64]
GRID_DAYS = 0.5
TOLERANCE = 1e-11
"""Error allowed in one step, in units of the heliocentric distance."""
_LIGHT_AU_DAY2 = 173.1446326846693**2


_MIN_STEP_DAYS, _MAX_STEP_DAYS = 1e-4, 60.0


def _tableau() -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    from scipy.integrate import DOP853

    return tuple(np.ascontiguousarray(part, float) for part in (DOP853.A, DOP853.B, DOP853.C, DOP853.E5))  # type: ignore[return-value]


_A, _B, _C, _E = _tableau()


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _acceleration(
    t: float,
    y: FloatArray,
    first: float,
    grid_p: FloatArray,
    grid_v: FloatArray,
    gm: FloatArray,
    out: FloatArray,
) -> None:
    """Velocity and acceleration of the state ``y`` (6) at ``t`` into ``out`` (6)."""
    at = (t - first) / GRID_DAYS
    k = min(max(math.floor(at), 0), grid_p.shape[0] - 2)
    s = at - k
    s2, s3 = s * s, s * s * s
    h00, h01 = 2 * s3 - 3 * s2 + 1, -2 * s3 + 3 * s2
    h10, h11 = (s3 - 2 * s2 + s) * GRID_DAYS, (s3 - s2) * GRID_DAYS
    x, y1, z, vx, vy, vz = y[0], y[1], y[2], y[3], y[4], y[5]
    r2 = x * x + y1 * y1 + z * z
    r = math.sqrt(r2)
    base = GM_SUN / (r2 * r)
    # Schwarzschild's term of the Sun
    post = base / _LIGHT_AU_DAY2
    radial = 4 * GM_SUN / r - (vx * vx + vy * vy + vz * vz)
    along = 4 * (x * vx + y1 * vy + z * vz)
    ax = -base * x + post * (radial * x + along * vx)
    ay = -base * y1 + post * (radial * y1 + along * vy)
    az = -base * z + post * (radial * z + along * vz)
    for b in range(gm.shape[0]):
        px = (
            h00 * grid_p[k, b, 0]
            + h01 * grid_p[k + 1, b, 0]
            + h10 * grid_v[k, b, 0]
            + h11 * grid_v[k + 1, b, 0]
        )
        py = (
            h00 * grid_p[k, b, 1]
            + h01 * grid_p[k + 1, b, 1]
            + h10 * grid_v[k, b, 1]
            + h11 * grid_v[k + 1, b, 1]
        )
        pz = (
            h00 * grid_p[k, b, 2]
            + h01 * grid_p[k + 1, b, 2]
            + h10 * grid_v[k, b, 2]
            + h11 * grid_v[k + 1, b, 2]
        )
        dx, dy, dz = px - x, py - y1, pz - z
        d2 = dx * dx + dy * dy + dz * dz
        p2 = px * px + py * py + pz * pz
        near = gm[b] / (d2 * math.sqrt(d2))
        sun = gm[b] / (p2 * math.sqrt(p2))
        ax += near * dx - sun * px
        ay += near * dy - sun * py
        az += near * dz - sun * pz
    out[0], out[1], out[2], out[3], out[4], out[5] = vx, vy, vz, ax, ay, az


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _advance(
    y: FloatArray, t0: float, t1: float, first: float, grid_p: FloatArray, grid_v: FloatArray, gm: FloatArray,
    a: FloatArray, b: FloatArray, c: FloatArray, e5: FloatArray,
) -> None:  # fmt: skip
    """Bring one state from ``t0`` to ``t1``, in place."""
    k = np.empty((13, 6))
    trial, new = np.empty(6), np.empty(6)
    t, sign = t0, 1.0 if t1 >= t0 else -1.0
    r = math.sqrt(y[0] ** 2 + y[1] ** 2 + y[2] ** 2)
    h = min(_MAX_STEP_DAYS, 0.1 * math.sqrt(r**3 / GM_SUN), abs(t1 - t0))
    _acceleration(t, y, first, grid_p, grid_v, gm, k[0])
    while sign * (t1 - t) > 1e-12:
        h = min(h, sign * (t1 - t))
        step = sign * h
        for i in range(1, 12):
            for n in range(6):
                total = 0.0
                for j in range(i):
                    total += a[i, j] * k[j, n]
                trial[n] = y[n] + step * total
            _acceleration(t + c[i] * step, trial, first, grid_p, grid_v, gm, k[i])
        for n in range(6):
            total = 0.0
            for j in range(12):
                total += b[j] * k[j, n]
            new[n] = y[n] + step * total
        _acceleration(t + step, new, first, grid_p, grid_v, gm, k[12])
        r = math.sqrt(new[0] ** 2 + new[1] ** 2 + new[2] ** 2)
        error = 0.0
        for n in range(3):
            total = 0.0
            for j in range(13):
                total += e5[j] * k[j, n]
            error = max(error, abs(step * total))
        error /= TOLERANCE * r
        if error <= 1.0 or h <= _MIN_STEP_DAYS:
            t += step
            for n in range(6):
                y[n] = new[n]
                k[0, n] = k[12, n]
        factor = 5.0 if error == 0 else min(5.0, max(0.2, 0.9 * error ** (-1.0 / 6.0)))
        h = min(max(h * factor, _MIN_STEP_DAYS), _MAX_STEP_DAYS)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _advance_all(
    states: FloatArray, starts: FloatArray, targets: FloatArray, out: FloatArray, first: float, grid_p: FloatArray,
    grid_v: FloatArray, gm: FloatArray, a: FloatArray, b: FloatArray, c: FloatArray, e5: FloatArray,
) -> None:  # fmt: skip
    y, rates = np.empty(6), np.empty(6)
    for i in range(states.shape[0]):
        y[:] = states[i]
        t = starts[i]
        for j in range(targets.shape[0]):
            _advance(y, t, targets[j], first, grid_p, grid_v, gm, a, b, c, e5)
            t = targets[j]
            _acceleration(t, y, first, grid_p, grid_v, gm, rates)
            out[i, j, :6] = y
            out[i, j, 6:] = rates[3:]


def integrate(states: FloatArray, epochs_mjd_tt: FloatArray, targets_mjd_tt: FloatArray) -> FloatArray:
    """States of test particles at some times.

    Parameters
    ----------
    states
        Heliocentric position and velocity, ICRS axes, au and au/day; shape (n, 6).
    epochs_mjd_tt
        Of each state, MJD TT, shape (n,).
    targets_mjd_tt
        Shape (m,), in the order in which they are reached: each particle goes from its epoch to the first, and on.

    Returns
    -------
    ndarray
        Shape (n, m, 9): position, velocity, acceleration.
    """
    states = np.ascontiguousarray(states, float)
    epochs = np.ascontiguousarray(np.broadcast_to(epochs_mjd_tt, len(states)), float)
    targets = np.ascontiguousarray(targets_mjd_tt, float)
    out = np.empty((len(states), len(targets), 9))
    if not out.size:
        return out
    low, high = min(epochs.min(), targets.min()), max(epochs.max(), targets.max())
    first = math.floor(low) - 1.0
    grid_p, grid_v = perturbers(np.arange(first, high + 2.0, GRID_DAYS))
    _advance_all(states, epochs, targets, out, first, grid_p, grid_v, GRAVITIES, _A, _B, _C, _E)
    return out
