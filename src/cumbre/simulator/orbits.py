"""Two-body orbits about the sun: Kepler's equation, elements, and what an observer sees.

The earth's place comes from ERFA (IAU SOFA ``epv00``). Light time and the observer's parallax are applied;
perturbations by planets are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.core.sun_moon import TT_MINUS_TAI_S
from cumbre.core.time import SECONDS_PER_DAY
from cumbre.payloads.solar_system.kepler import (
    AU_KM,
    GAUSS_K,
    GM_SUN,
    LIGHT_DAYS_PER_AU,
    ecliptic_from_equatorial,
    equatorial_from_ecliptic,
    hg_magnitude,
    orbit_axes,
)

__all__ = [
    "AU_KM", "GAUSS_K", "GM_SUN", "Apparition", "Elements", "earth_position", "eccentric_anomaly",
    "ecliptic_from_equatorial", "elements_from_state", "equatorial_from_ecliptic", "magnitude", "observe", "state",
]  # fmt: skip

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Elements:
    """Heliocentric elements of n orbits, ecliptic and equinox of J2000; arrays of shape (n,).

    ``a`` in au, angles in radians, ``mean_anomaly`` at ``epoch_tai`` (TAI seconds; TDB − TT is left out).
    """

    a: FloatArray
    e: FloatArray
    inclination: FloatArray
    node: FloatArray
    perihelion: FloatArray
    mean_anomaly: FloatArray
    epoch_tai: float


def eccentric_anomaly(mean_anomaly: ArrayLike, e: ArrayLike) -> FloatArray:
    """Solve Kepler's equation E − e·sin E = M (radians, 0 ≤ e < 1) by Newton's method."""
    m = np.mod(np.asarray(mean_anomaly, float) + np.pi, 2 * np.pi) - np.pi
    e = np.asarray(e, float)
    # Starting outside of the root makes Newton's steps monotonic for every e < 1.
    anomaly = np.where(e < 0.8, m, np.pi * np.sign(m + 1e-300))
    for _ in range(60):
        step = (anomaly - e * np.sin(anomaly) - m) / (1 - e * np.cos(anomaly))
        anomaly = anomaly - step
        if np.max(np.abs(step), initial=0.0) < 1e-14:
            break
    return np.asarray(anomaly)


def state(elements: Elements, tai_s: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Heliocentric position (au) and velocity (au/day), shape (n, 3), ecliptic of J2000.

    ``tai_s`` is one time or one for each orbit.
    """
    el = elements
    motion = GAUSS_K * el.a**-1.5
    days = (np.asarray(tai_s, float) - el.epoch_tai) / SECONDS_PER_DAY
    anomaly = eccentric_anomaly(el.mean_anomaly + motion * days, el.e)
    cos, sin = np.cos(anomaly), np.sin(anomaly)
    minor = np.sqrt(1 - el.e**2)
    rate = motion / (1 - el.e * cos)
    p, q = orbit_axes(el.inclination, el.node, el.perihelion)
    position = (el.a * (cos - el.e))[:, None] * p + (el.a * minor * sin)[:, None] * q
    velocity = (-el.a * sin * rate)[:, None] * p + (el.a * minor * cos * rate)[:, None] * q
    return position, velocity


def elements_from_state(position: FloatArray, velocity: FloatArray, epoch_tai: float) -> Elements:
    """Elements of heliocentric ecliptic states (au, au/day), shape (n, 3); bound orbits only."""
    r = np.linalg.norm(position, axis=1)
    momentum = np.cross(position, velocity)
    a = 1.0 / (2.0 / r - np.sum(velocity**2, axis=1) / GM_SUN)
    toward = np.cross(velocity, momentum) / GM_SUN - position / r[:, None]
    e = np.linalg.norm(toward, axis=1)
    inclination = np.arctan2(np.hypot(momentum[:, 0], momentum[:, 1]), momentum[:, 2])
    node = np.arctan2(momentum[:, 0], -momentum[:, 1])
    ascending = np.stack([np.cos(node), np.sin(node), np.zeros_like(node)], axis=-1)
    unit = momentum / np.linalg.norm(momentum, axis=1)[:, None]
    ahead = np.cross(unit, ascending)
    perihelion = np.arctan2(np.sum(toward * ahead, axis=1), np.sum(toward * ascending, axis=1))
    e_cos = 1 - r / a
    e_sin = np.sum(position * velocity, axis=1) / np.sqrt(GM_SUN * a)
    anomaly = np.arctan2(e_sin, e_cos)
    return Elements(a, e, inclination, node, perihelion, anomaly - e_sin, epoch_tai)


def earth_position(tai_s: float) -> FloatArray:
    """Heliocentric position of the earth in au, equator of J2000 (ICRS)."""
    import erfa

    days = (tai_s + TT_MINUS_TAI_S) / SECONDS_PER_DAY
    heliocentric, _ = erfa.epv00(2440587.5, days)
    return np.asarray(heliocentric["p"], float)


@dataclass(frozen=True, slots=True, eq=False)
class Apparition:
    """What an observer sees of n bodies: degrees, au, au, radians, degrees per day; arrays (n,)."""

    ra: FloatArray
    dec: FloatArray
    sun_distance: FloatArray
    distance: FloatArray
    phase_angle: FloatArray


def observe(elements: Elements, tai_s: float, observer_km: FloatArray) -> Apparition:
    """Astrometric places (light time applied) from an observer at a geocentric position in km."""
    place = earth_position(tai_s) + observer_km / AU_KM
    position = equatorial_from_ecliptic(state(elements, tai_s)[0])
    for _ in range(2):
        delay = np.linalg.norm(position - place, axis=1) * LIGHT_DAYS_PER_AU * SECONDS_PER_DAY
        position = equatorial_from_ecliptic(state(elements, tai_s - delay)[0])
    line = position - place
    distance = np.linalg.norm(line, axis=1)
    sun_distance = np.linalg.norm(position, axis=1)
    cosine = np.sum(line * position, axis=1) / distance / sun_distance
    return Apparition(
        ra=np.mod(np.rad2deg(np.arctan2(line[:, 1], line[:, 0])), 360.0),
        dec=np.rad2deg(np.arctan2(line[:, 2], np.hypot(line[:, 0], line[:, 1]))),
        sun_distance=sun_distance,
        distance=distance,
        phase_angle=np.arccos(np.clip(cosine, -1, 1)),
    )


def magnitude(h: FloatArray, seen: Apparition, slope: float = 0.15) -> FloatArray:
    """Apparent V magnitude of absolute magnitudes ``h`` (Bowell et al. 1989, H–G)."""
    return hg_magnitude(h, slope, seen.sun_distance, seen.distance, seen.phase_angle)
