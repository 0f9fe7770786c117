"""Sun and moon from the low-precision series of Meeus, "Astronomical Algorithms" (2nd ed., ch. 25 and 47).

Good to about 0.01 degrees for centuries around 2000. Positions are geocentric and apparent, mean equator of
J2000. The moon's parallax for an observer on the ground is :func:`topocentric`'s.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cumbre.core.geometry import MJD_J2000, sidereal_deg
from cumbre.core.time import mjd_from_seconds

FloatArray = NDArray[np.float64]
TT_MINUS_TAI_S = 32.184
OBLIQUITY_J2000_DEG = 23.4392911
EARTH_RADIUS_KM = 6378.137

# D, M, M', F, then 1e-6 degrees of longitude and 1e-3 km of distance: the terms above 2e-3 degrees of Meeus' table 47.A.
_LONGITUDE = np.array(
    [
        (0, 0, 1, 0, 6288774, -20905355),
        (2, 0, -1, 0, 1274027, -3699111),
        (2, 0, 0, 0, 658314, -2955968),
        (0, 0, 2, 0, 213618, -569925),
        (0, 1, 0, 0, -185116, 48888),
        (0, 0, 0, 2, -114332, -3149),
        (2, 0, -2, 0, 58793, 246158),
        (2, -1, -1, 0, 57066, -152138),
        (2, 0, 1, 0, 53322, -170733),
        (2, -1, 0, 0, 45758, -204586),
        (0, 1, -1, 0, -40923, -129620),
        (1, 0, 0, 0, -34720, 108743),
        (0, 1, 1, 0, -30383, 104755),
        (2, 0, 0, -2, 15327, 10321),
        (0, 0, 1, 2, -12528, 0),
        (0, 0, 1, -2, 10980, 79661),
        (4, 0, -1, 0, 10675, -34782),
        (0, 0, 3, 0, 10034, -23210),
        (4, 0, -2, 0, 8548, -21636),
        (2, 1, -1, 0, -7888, 24208),
        (2, 1, 0, 0, -6766, 30824),
        (1, 0, -1, 0, -5163, -8379),
        (1, 1, 0, 0, 4987, -16675),
        (2, -1, 1, 0, 4036, -12831),
        (2, 0, 2, 0, 3994, -10445),
        (4, 0, 0, 0, 3861, -11650),
        (2, 0, -3, 0, 3665, 14403),
        (0, 1, -2, 0, -2689, -7003),
        (2, 0, -1, 2, -2602, 0),
        (2, -1, -2, 0, 2390, 10056),
        (1, 0, 1, 0, -2348, 6322),
        (2, -2, 0, 0, 2236, -9884),
    ],
    float,
)
_LATITUDE = np.array(
    [
        (0, 0, 0, 1, 5128122),
        (0, 0, 1, 1, 280602),
        (0, 0, 1, -1, 277693),
        (2, 0, 0, -1, 173237),
        (2, 0, -1, 1, 55413),
        (2, 0, -1, -1, 46271),
        (2, 0, 0, 1, 32573),
        (0, 0, 2, 1, 17198),
        (2, 0, 1, -1, 9266),
        (0, 0, 2, -1, 8822),
        (2, -1, 0, -1, 8216),
        (2, 0, -2, -1, 4324),
        (2, 0, 1, 1, 4200),
        (2, 1, 0, -1, -3359),
        (2, -1, -1, 1, 2463),
        (2, -1, 0, 1, 2211),
        (2, -1, -1, -1, 2065),
    ],
    float,
)


def _centuries(tai_s: float) -> float:
    return (mjd_from_seconds(tai_s + TT_MINUS_TAI_S) - MJD_J2000) / 36525.0


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
    t = _centuries(tai_s)
    anomaly = np.deg2rad(357.52911 + 35999.05029 * t - 0.0001537 * t * t)
    centre = (
        (1.914602 - 0.004817 * t) * np.sin(anomaly)
        + (0.019993 - 0.000101 * t) * np.sin(2 * anomaly)
        + 0.000289 * np.sin(3 * anomaly)
    )
    longitude = 280.46646 + 36000.76983 * t + 0.0003032 * t * t + centre - 0.00569
    return direction(_j2000_from_ecliptic_of_date(longitude, 0.0, t))


def moon_vector_km(tai_s: float) -> FloatArray:
    """Geocentric position of the moon in km, equator of J2000."""
    t = _centuries(tai_s)
    mean = 218.3164477 + 481267.88123421 * t - 0.0015786 * t * t
    arguments = np.array(
        [
            297.8501921 + 445267.1114034 * t - 0.0018819 * t * t,
            357.5291092 + 35999.0502909 * t - 0.0001536 * t * t,
            134.9633964 + 477198.8675055 * t + 0.0087414 * t * t,
            93.2720950 + 483202.0175233 * t - 0.0036539 * t * t,
        ]
    )
    e = 1 - 0.002516 * t
    angle = np.deg2rad(_LONGITUDE[:, :4] @ arguments)
    damping = e ** np.abs(_LONGITUDE[:, 1])
    longitude = np.sum(_LONGITUDE[:, 4] * damping * np.sin(angle))
    distance = 385000.56 + np.sum(_LONGITUDE[:, 5] * damping * np.cos(angle)) / 1000.0
    angle_b = np.deg2rad(_LATITUDE[:, :4] @ arguments)
    latitude = np.sum(_LATITUDE[:, 4] * e ** np.abs(_LATITUDE[:, 1]) * np.sin(angle_b))
    venus, jupiter = np.deg2rad(119.75 + 131.849 * t), np.deg2rad(53.09 + 479264.290 * t)
    longitude += 3958 * np.sin(venus) + 1962 * np.sin(np.deg2rad(mean - arguments[3])) + 318 * np.sin(jupiter)
    latitude -= 2235 * np.sin(np.deg2rad(mean))
    return float(distance) * _j2000_from_ecliptic_of_date(mean + longitude / 1e6, latitude / 1e6, t)


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
