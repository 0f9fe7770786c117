"""Sun and Moon from the series of J. Meeus, *Astronomical Algorithms* (2nd ed., 1998, ch. 25 and 47); numpy only.

Geocentric ecliptic coordinates of the mean equinox of date. The Sun is right to 0.01°, the Moon to 0.01°, for
centuries around 2000: the terms above 2e-3 degrees are kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.core.geometry import MJD_J2000
from cumbre.core.time import MJD_UNIX_EPOCH, SECONDS_PER_DAY

FloatArray = NDArray[np.float64]
DAYS_PER_CENTURY = 36525.0
TT_MINUS_TAI_S = 32.184
OBLIQUITY_J2000_DEG = 23.4392911
EARTH_RADIUS_KM = 6378.137

# D, M, M', F, then 1e-6 degrees of longitude (sine) and 1e-3 km of distance (cosine): Meeus' table 47.A.
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
# D, M, M', F, then 1e-6 degrees of latitude (sine): table 47.B.
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


def centuries_tt(tai_s: ArrayLike) -> FloatArray:
    """Julian centuries of TT since J2000.0 of TAI seconds since 1970."""
    seconds = np.asarray(tai_s, dtype=np.float64) + TT_MINUS_TAI_S
    return np.asarray((seconds / SECONDS_PER_DAY + MJD_UNIX_EPOCH - MJD_J2000) / DAYS_PER_CENTURY)


def sun_longitude_deg(t: ArrayLike) -> FloatArray:
    """Apparent ecliptic longitude of the Sun (aberration in), degrees; ``t`` in centuries of TT."""
    t = np.asarray(t, dtype=np.float64)
    mean = 280.46646 + 36000.76983 * t + 0.0003032 * t**2
    anomaly = np.deg2rad(357.52911 + 35999.05029 * t - 0.0001537 * t**2)
    centre = (
        (1.914602 - 0.004817 * t) * np.sin(anomaly)
        + (0.019993 - 0.000101 * t) * np.sin(2 * anomaly)
        + 0.000289 * np.sin(3 * anomaly)
    )
    return np.asarray((mean + centre - 0.00569) % 360.0)


def moon_ecliptic(t: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Longitude and latitude (degrees) and distance (km) of the Moon's centre; ``t`` in centuries of TT."""
    t = np.asarray(t, dtype=np.float64)
    mean = 218.3164477 + 481267.88123421 * t - 0.0015786 * t**2
    arguments = np.stack(
        [
            297.8501921 + 445267.1114034 * t - 0.0018819 * t**2,
            357.5291092 + 35999.0502909 * t - 0.0001536 * t**2,
            134.9633964 + 477198.8675055 * t + 0.0087414 * t**2,
            93.2720950 + 483202.0175233 * t - 0.0036539 * t**2,
        ],
        axis=-1,
    )
    eccentricity = (1.0 - 0.002516 * t)[..., None]
    phase = np.deg2rad(arguments @ _LONGITUDE[:, :4].T)
    damping = eccentricity ** np.abs(_LONGITUDE[:, 1])
    longitude = np.sum(_LONGITUDE[:, 4] * damping * np.sin(phase), axis=-1)
    distance = 385000.56 + np.sum(_LONGITUDE[:, 5] * damping * np.cos(phase), axis=-1) / 1000.0
    phase = np.deg2rad(arguments @ _LATITUDE[:, :4].T)
    latitude = np.sum(_LATITUDE[:, 4] * eccentricity ** np.abs(_LATITUDE[:, 1]) * np.sin(phase), axis=-1)
    # Venus, Jupiter and the flattening of the Earth
    venus, jupiter = np.deg2rad(119.75 + 131.849 * t), np.deg2rad(53.09 + 479264.290 * t)
    flattening = np.deg2rad(mean - arguments[..., 3])
    longitude = longitude + 3958 * np.sin(venus) + 1962 * np.sin(flattening) + 318 * np.sin(jupiter)
    latitude = latitude - 2235 * np.sin(np.deg2rad(mean))
    return (mean + longitude / 1e6) % 360.0, latitude / 1e6, distance
