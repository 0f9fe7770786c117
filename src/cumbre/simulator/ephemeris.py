"""Sun and moon on the equator of J2000, and observers on the ground (the series of :mod:`cumbre.core.sun_moon`).

Good to about 0.01 degrees for centuries around 2000. Positions are geocentric and apparent. The moon's parallax for
an observer on the ground is :func:`moon_topocentric`'s.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cumbre.core.geometry import sidereal_deg
from cumbre.core.sun_moon import (
    EARTH_RADIUS_KM,
    OBLIQUITY_J2000_DEG,
    centuries_tt,
    moon_ecliptic,
    sun_longitude_deg,
)

FloatArray = NDArray[np.float64]


def vector(ra_deg: float, dec_deg: float) -> FloatArray:
    """Unit vector of a direction."""
    a, d = np.deg2rad(ra_deg), np.deg2rad(dec_deg)
    return np.array([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)])


def direction(position: FloatArray) -> tuple[float, float]:
    """Right ascension and declination (degrees) of a vector."""
    x, y, z = position
    return float(np.rad2deg(np.arctan2(y, x)) % 360.0), float(np.rad2deg(np.arctan2(z, np.hypot(x, y))))


def _j2000_from_ecliptic_of_date(longitude_deg: float, latitude_deg: float, t: float) -> FloatArray:
    """Unit vector, equator of J2000, of ecliptic coordinates of the mean equinox of date."""
    # Within a few decades of 2000 the ecliptic's own motion (47" a century) is left out; longitude precesses.
    longitude = longitude_deg - (5029.0966 * t + 1.1112 * t * t) / 3600.0
    x, y, z = vector(longitude, latitude_deg)
    tilt = np.deg2rad(OBLIQUITY_J2000_DEG)
    return np.array([x, y * np.cos(tilt) - z * np.sin(tilt), y * np.sin(tilt) + z * np.cos(tilt)])


def sun_position(tai_s: float) -> tuple[float, float]:
    """Apparent right ascension and declination of the sun, degrees (J2000 equator)."""
    t = float(centuries_tt(tai_s))
    return direction(_j2000_from_ecliptic_of_date(float(sun_longitude_deg(t)), 0.0, t))


def moon_vector_km(tai_s: float) -> FloatArray:
    """Geocentric position of the moon in km, equator of J2000."""
    t = float(centuries_tt(tai_s))
    longitude, latitude, distance = (float(v) for v in moon_ecliptic(t))
    return distance * _j2000_from_ecliptic_of_date(longitude, latitude, t)


def moon_position(tai_s: float) -> tuple[float, float]:
    """Geocentric right ascension and declination of the moon, degrees (J2000 equator)."""
    return direction(moon_vector_km(tai_s))


def observer_km(tai_s: float, latitude_deg: float, longitude_deg: float, elevation_m: float) -> FloatArray:
    """Geocentric position of an observer, km, on the equator of date (0.3 degrees from J2000's axes)."""
    latitude = np.deg2rad(latitude_deg)
    flattening = 1 / 298.257223563
    c = 1 / np.sqrt(np.cos(latitude) ** 2 + (1 - flattening) ** 2 * np.sin(latitude) ** 2)
    height = elevation_m / 1000.0
    across = (EARTH_RADIUS_KM * c + height) * np.cos(latitude)
    up = (EARTH_RADIUS_KM * c * (1 - flattening) ** 2 + height) * np.sin(latitude)
    sidereal = np.deg2rad(sidereal_deg(tai_s, longitude_deg))
    return np.array([across * np.cos(sidereal), across * np.sin(sidereal), up])


def moon_topocentric(
    tai_s: float, latitude_deg: float, longitude_deg: float, elevation_m: float = 0.0
) -> tuple[float, float]:
    """Right ascension and declination of the moon as this observer sees it, degrees."""
    return direction(moon_vector_km(tai_s) - observer_km(tai_s, latitude_deg, longitude_deg, elevation_m))


def moon_phase_angle_deg(tai_s: float) -> float:
    """Angle sun–moon–earth: 0 at full moon, 180 at new moon."""
    sun_km = 149597870.7 * vector(*sun_position(tai_s))
    moon_km = moon_vector_km(tai_s)
    to_sun, to_earth = sun_km - moon_km, -moon_km
    cosine = to_sun @ to_earth / np.linalg.norm(to_sun) / np.linalg.norm(to_earth)
    return float(np.rad2deg(np.arccos(np.clip(cosine, -1, 1))))
