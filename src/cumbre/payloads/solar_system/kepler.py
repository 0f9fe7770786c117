"""Two-body motion about the Sun, axes and magnitudes: what every orbit needs before anything disturbs it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.core.sun_moon import OBLIQUITY_J2000_DEG
from cumbre.core.time import SECONDS_PER_DAY

FloatArray = NDArray[np.float64]
GAUSS_K = 0.01720209895
"""Square root of the sun's gravity in au^1.5 / day."""
GM_SUN = GAUSS_K**2
AU_KM = 149597870.7
LIGHT_DAYS_PER_AU = 499.004784 / SECONDS_PER_DAY


def equatorial_from_ecliptic(position: FloatArray) -> FloatArray:
    """Turn (n, 3) vectors from the ecliptic to the equator of J2000."""
    tilt = np.deg2rad(OBLIQUITY_J2000_DEG)
    x, y, z = position[..., 0], position[..., 1], position[..., 2]
    return np.stack([x, y * np.cos(tilt) - z * np.sin(tilt), y * np.sin(tilt) + z * np.cos(tilt)], axis=-1)


def ecliptic_from_equatorial(position: FloatArray) -> FloatArray:
    """Turn (n, 3) vectors from the equator to the ecliptic of J2000."""
    tilt = np.deg2rad(OBLIQUITY_J2000_DEG)
    x, y, z = position[..., 0], position[..., 1], position[..., 2]
    return np.stack([x, y * np.cos(tilt) + z * np.sin(tilt), z * np.cos(tilt) - y * np.sin(tilt)], axis=-1)


def orbit_axes(
    inclination: FloatArray, node: FloatArray, perihelion: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Unit vectors towards perihelion and 90 degrees ahead of it, shape (n, 3), ecliptic; angles in radians."""
    cw, sw = np.cos(perihelion), np.sin(perihelion)
    cn, sn = np.cos(node), np.sin(node)
    ci, si = np.cos(inclination), np.sin(inclination)
    p = np.stack([cw * cn - sw * sn * ci, cw * sn + sw * cn * ci, sw * si], axis=-1)
    q = np.stack([-sw * cn - cw * sn * ci, -sw * sn + cw * cn * ci, cw * si], axis=-1)
    return p, q


def _stumpff(z: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Stumpff's functions c2 and c3; z positive on ellipses, negative on hyperbolas."""
    root = np.sqrt(np.abs(z))
    safe = np.where(root < 1e-3, 1.0, root)
    with np.errstate(over="ignore", invalid="ignore"):
        c2 = np.where(z > 0, (1 - np.cos(safe)) / safe**2, (np.cosh(safe) - 1) / safe**2)
        c3 = np.where(z > 0, (safe - np.sin(safe)) / safe**3, (np.sinh(safe) - safe) / safe**3)
    small = root < 1e-3
    return np.where(small, 0.5 - z / 24, c2), np.where(small, 1 / 6 - z / 120, c3)


def state_from_perihelion(
    q: ArrayLike,
    e: ArrayLike,
    inclination: ArrayLike,
    node: ArrayLike,
    perihelion: ArrayLike,
    days: ArrayLike,
) -> tuple[FloatArray, FloatArray]:
    """Position (au) and velocity (au/day) on any conic, shape (n, 3), ecliptic of J2000.

    Parameters
    ----------
    q, e
        Perihelion distance (au) and eccentricity (ellipse, parabola or hyperbola), shape (n,).
    inclination, node, perihelion
        Radians.
    days
        Since perihelion.
    """
    q, e, days = (np.atleast_1d(np.asarray(v, float)) for v in (q, e, days))
    alpha = (1 - e) / q
    bound = alpha > 1e-9
    period = 2 * np.pi / GAUSS_K * np.where(bound, alpha, 1.0) ** -1.5
    # Whole revolutions change nothing, and the solution is quick within half of one.
    wanted = GAUSS_K * np.where(bound, days - period * np.rint(days / period), days)
    # Kepler's equation in universal variables: q·χ + e·χ³·c3(α·χ²) = k·t rises everywhere.
    chi = np.cbrt(6 * wanted / np.maximum(e, 0.1))
    chi = np.where(np.abs(wanted / q) < np.abs(chi), wanted / q, chi)
    limit = np.where(bound, 2 * np.pi / np.sqrt(np.where(bound, alpha, 1.0)), np.inf)
    for _ in range(100):
        c2, c3 = _stumpff(alpha * chi**2)
        step = (q * chi + e * chi**3 * c3 - wanted) / (q + e * chi**2 * c2)
        chi = np.clip(chi - step, -limit, limit)
        if np.max(np.abs(step), initial=0.0) < 1e-13:
            break
    c2, c3 = _stumpff(alpha * chi**2)
    r = q + e * chi**2 * c2
    x, y = q - chi**2 * c2, np.sqrt(q * (1 + e)) * chi * (1 - alpha * chi**2 * c3)
    rate = GAUSS_K / r
    vx, vy = -rate * chi * (1 - alpha * chi**2 * c3), rate * np.sqrt(q * (1 + e)) * (1 - alpha * chi**2 * c2)
    p, ahead = orbit_axes(*(np.atleast_1d(np.asarray(v, float)) for v in (inclination, node, perihelion)))
    return x[:, None] * p + y[:, None] * ahead, vx[:, None] * p + vy[:, None] * ahead


def hg_magnitude(
    h: ArrayLike, g: ArrayLike, sun_distance: FloatArray, distance: FloatArray, phase_angle: FloatArray
) -> FloatArray:
    """Apparent V magnitude (Bowell et al. 1989, H–G); au, au, radians."""
    tangent = np.tan(0.5 * np.minimum(phase_angle, 3.1))
    phase1, phase2 = np.exp(-3.33 * tangent**0.63), np.exp(-1.87 * tangent**1.22)
    slope = np.asarray(g, float)
    reduced = np.asarray(h, float) + 5 * np.log10(sun_distance * distance)
    with np.errstate(divide="ignore"):
        return np.asarray(reduced - 2.5 * np.log10((1 - slope) * phase1 + slope * phase2))
