"""Where Sun, Moon and stars stand: low-precision formulae, numpy only, good to about 0.05°.

J. Meeus, *Astronomical Algorithms* (2nd ed., 1998): sidereal time (12.4), precession (21.2–21.4), the Sun
(ch. 25), the Moon (ch. 47, the largest terms). F. Kasten and A. T. Young, *Applied Optics* 28, 4735 (1989):
airmass. Nutation (< 0.005°), UT1−UTC (< 0.004°) and refraction are left out: a scheduler needs no more.

Times are TAI seconds since 1970 (scalar or array), angles degrees, east longitude positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.core.time import MJD_UNIX_EPOCH, SECONDS_PER_DAY, day_obs_start_tai, utc_from_tai

Degrees = NDArray[np.float64]

JD_MJD = 2400000.5
JD_J2000 = 2451545.0
DAYS_PER_CENTURY = 36525.0
TT_MINUS_TAI_S = 32.184
OBLIQUITY_J2000_DEG = 23.4392911
EARTH_RADIUS_KM = 6378.14
TWILIGHT_DEG = {"set": -0.833, "civil": -6.0, "nautical": -12.0, "astronomical": -18.0}

# Meeus table 47.A: multiples of D, M, M', F; longitude in 1e-6 deg (sine), distance in m (cosine).
_MOON_LONGITUDE = np.array(
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
    ],
    dtype=np.float64,
)
# Meeus table 47.B: multiples of D, M, M', F; latitude in 1e-6 deg (sine).
_MOON_LATITUDE = np.array(
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
    ],
    dtype=np.float64,
)


@dataclass(frozen=True, slots=True)
class Location:
    """A place on Earth: geodetic latitude, east longitude (degrees)."""

    latitude_deg: float
    longitude_deg: float


def _array(value: ArrayLike) -> Degrees:
    return np.asarray(value, dtype=np.float64)


def _utc_jd(tai_s: ArrayLike) -> Degrees:
    times = _array(tai_s)
    # The leap-second offset is constant over any one call of ours (a night): one look-up serves all.
    first = float(times.flat[0]) if times.size else 0.0
    return np.asarray((times + (utc_from_tai(first) - first)) / SECONDS_PER_DAY + MJD_UNIX_EPOCH + JD_MJD)


def centuries_tt(tai_s: ArrayLike) -> Degrees:
    """Julian centuries of TT since J2000.0."""
    jd = (_array(tai_s) + TT_MINUS_TAI_S) / SECONDS_PER_DAY + MJD_UNIX_EPOCH + JD_MJD
    return np.asarray((jd - JD_J2000) / DAYS_PER_CENTURY)


def sidereal_time(tai_s: ArrayLike, longitude_deg: float = 0.0) -> Degrees:
    """Mean sidereal time at an east longitude, degrees in [0, 360); longitude 0 is Greenwich."""
    days = _utc_jd(tai_s) - JD_J2000
    century = days / DAYS_PER_CENTURY
    greenwich = 280.46061837 + 360.98564736629 * days + 0.000387933 * century**2
    return np.asarray((greenwich + longitude_deg) % 360.0)


def _unit(lon_deg: ArrayLike, lat_deg: ArrayLike) -> Degrees:
    lon, lat = np.deg2rad(_array(lon_deg)), np.deg2rad(_array(lat_deg))
    lon, lat = np.broadcast_arrays(lon, lat)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def _spherical(vector: Degrees) -> tuple[Degrees, Degrees]:
    x, y, z = vector[..., 0], vector[..., 1], vector[..., 2]
    return np.rad2deg(np.arctan2(y, x)) % 360.0, np.rad2deg(np.arctan2(z, np.hypot(x, y)))


def precess_to_date(ra_deg: ArrayLike, dec_deg: ArrayLike, tai_s: float) -> tuple[Degrees, Degrees]:
    """ICRS (taken as J2000) to the mean equator and equinox of date, degrees."""
    t = float(centuries_tt(tai_s))
    zeta, z, theta = (
        np.deg2rad(arcsec / 3600.0)
        for arcsec in (
            (2306.2181 + (0.30188 + 0.017998 * t) * t) * t,
            (2306.2181 + (1.09468 + 0.018203 * t) * t) * t,
            (2004.3109 - (0.42665 + 0.041833 * t) * t) * t,
        )
    )
    alpha, delta = np.deg2rad(_array(ra_deg)), np.deg2rad(_array(dec_deg))
    a = np.cos(delta) * np.sin(alpha + zeta)
    b = np.cos(theta) * np.cos(delta) * np.cos(alpha + zeta) - np.sin(theta) * np.sin(delta)
    c = np.sin(theta) * np.cos(delta) * np.cos(alpha + zeta) + np.cos(theta) * np.sin(delta)
    return np.rad2deg(np.arctan2(a, b) + z) % 360.0, np.rad2deg(np.arctan2(c, np.hypot(a, b)))


def altitude_azimuth(
    location: Location, tai_s: ArrayLike, ra_deg: ArrayLike, dec_deg: ArrayLike
) -> tuple[Degrees, Degrees]:
    """Altitude and azimuth (north 0, east 90), degrees, of positions of date; arguments broadcast."""
    hour_angle = np.deg2rad(sidereal_time(tai_s, location.longitude_deg) - _array(ra_deg))
    dec, lat = np.deg2rad(_array(dec_deg)), np.deg2rad(location.latitude_deg)
    east = -np.cos(dec) * np.sin(hour_angle)
    north = np.sin(dec) * np.cos(lat) - np.cos(dec) * np.cos(hour_angle) * np.sin(lat)
    up = np.sin(dec) * np.sin(lat) + np.cos(dec) * np.cos(hour_angle) * np.cos(lat)
    return np.rad2deg(np.arctan2(up, np.hypot(east, north))), np.rad2deg(np.arctan2(east, north)) % 360.0


def target_altitude(
    location: Location, tai_s: ArrayLike, ra_deg: ArrayLike, dec_deg: ArrayLike
) -> tuple[Degrees, Degrees]:
    """Altitude and azimuth, degrees, of ICRS positions: precessed once, to the first time given."""
    times = _array(tai_s)
    ra, dec = precess_to_date(ra_deg, dec_deg, float(times.flat[0]))
    return altitude_azimuth(location, times, ra, dec)


def airmass(altitude_deg: ArrayLike) -> Degrees:
    """Airmass (Kasten and Young 1989); infinite below the horizon."""
    altitude = _array(altitude_deg)
    up = np.maximum(altitude, 0.0)
    value = 1.0 / (np.sin(np.deg2rad(up)) + 0.50572 * (up + 6.07995) ** -1.6364)
    return np.where(altitude < 0.0, np.inf, value)


def separation(ra1_deg: ArrayLike, dec1_deg: ArrayLike, ra2_deg: ArrayLike, dec2_deg: ArrayLike) -> Degrees:
    """Angle between directions, degrees (stable at all distances)."""
    one, two = np.broadcast_arrays(_unit(ra1_deg, dec1_deg), _unit(ra2_deg, dec2_deg))
    cross = np.linalg.norm(np.cross(one, two), axis=-1)
    return np.asarray(np.rad2deg(np.arctan2(cross, np.sum(one * two, axis=-1))))


def _equatorial(lon_deg: Degrees, lat_deg: ArrayLike, obliquity_deg: ArrayLike) -> Degrees:
    """Turn ecliptic coordinates into unit vectors of the equator."""
    x, y, z = np.moveaxis(_unit(lon_deg, lat_deg), -1, 0)
    eps = np.deg2rad(_array(obliquity_deg))
    return np.stack([x, y * np.cos(eps) - z * np.sin(eps), y * np.sin(eps) + z * np.cos(eps)], axis=-1)


def _obliquity(t: Degrees) -> Degrees:
    return OBLIQUITY_J2000_DEG - 0.0130042 * t


def _sun_longitude(t: Degrees) -> Degrees:
    """Apparent longitude of date (aberration in), degrees."""
    mean = 280.46646 + 36000.76983 * t + 0.0003032 * t**2
    anomaly = np.deg2rad(357.52911 + 35999.05029 * t - 0.0001537 * t**2)
    centre = (
        (1.914602 - 0.004817 * t) * np.sin(anomaly)
        + (0.019993 - 0.000101 * t) * np.sin(2 * anomaly)
        + 0.000289 * np.sin(3 * anomaly)
    )
    return np.asarray((mean + centre - 0.00569) % 360.0)


def sun_of_date(tai_s: ArrayLike) -> tuple[Degrees, Degrees]:
    """Right ascension and declination of the Sun, equinox of date, degrees (0.01°)."""
    t = centuries_tt(tai_s)
    return _spherical(_equatorial(_sun_longitude(t), np.zeros_like(t), _obliquity(t)))


def sun_altitude(location: Location, tai_s: ArrayLike) -> Degrees:
    """Altitude of the Sun's centre without refraction, degrees."""
    return altitude_azimuth(location, tai_s, *sun_of_date(tai_s))[0]


def _moon_ecliptic(t: Degrees) -> tuple[Degrees, Degrees, Degrees]:
    """Longitude and latitude of date (degrees), distance (km), geocentric."""
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

    def terms(table: Degrees) -> tuple[Degrees, Degrees]:
        phase = np.deg2rad(arguments @ table[:, :4].T)
        return phase, eccentricity ** np.abs(table[:, 1])

    phase, scale = terms(_MOON_LONGITUDE)
    longitude = mean + 1e-6 * np.sum(scale * _MOON_LONGITUDE[:, 4] * np.sin(phase), axis=-1)
    distance = 385000.56 + 1e-3 * np.sum(scale * _MOON_LONGITUDE[:, 5] * np.cos(phase), axis=-1)
    phase, scale = terms(_MOON_LATITUDE)
    latitude = 1e-6 * np.sum(scale * _MOON_LATITUDE[:, 4] * np.sin(phase), axis=-1)
    return longitude % 360.0, latitude, distance


def moon_of_date(tai_s: ArrayLike, location: Location | None = None) -> tuple[Degrees, Degrees]:
    """Right ascension and declination of the Moon, equinox of date, degrees (0.05°).

    With a location the parallax (up to 1°) is taken off; without, the position is geocentric.
    """
    t = centuries_tt(tai_s)
    longitude, latitude, distance = _moon_ecliptic(t)
    vector = _equatorial(longitude, latitude, _obliquity(t)) * distance[..., None]
    if location is not None:
        zenith = _unit(sidereal_time(tai_s, location.longitude_deg), location.latitude_deg)
        vector = vector - EARTH_RADIUS_KM * zenith
    return _spherical(vector)


def moon_separation(location: Location, tai_s: float, ra_deg: ArrayLike, dec_deg: ArrayLike) -> Degrees:
    """Degrees between ICRS positions and the Moon's centre as seen from a place."""
    return separation(*precess_to_date(ra_deg, dec_deg, tai_s), *moon_of_date(tai_s, location))


def moon_illumination(tai_s: ArrayLike) -> Degrees:
    """Lit part of the Moon's disc, 0 to 1 (elongation only: within 0.01)."""
    t = centuries_tt(tai_s)
    longitude, latitude, _ = _moon_ecliptic(t)
    elongation = np.cos(np.deg2rad(latitude)) * np.cos(np.deg2rad(longitude - _sun_longitude(t)))
    return np.asarray((1.0 - elongation) / 2.0)


def twilights(location: Location, day_obs: int) -> dict[str, tuple[float, float] | None]:
    """Evening and morning TAI of each :data:`TWILIGHT_DEG` level during an observing day.

    None where the Sun stays above or below the level all day. Good to some seconds.
    """
    # The observing day runs from 12:00 UTC; a site far from UTC−12…UTC+0 has its noon elsewhere.
    start = day_obs_start_tai(day_obs) - location_offset_s(location)
    grid = start + np.arange(0.0, 86400.0 + 1.0, 300.0)
    altitude = sun_altitude(location, grid)
    found: dict[str, tuple[float, float] | None] = {}
    for name, level in TWILIGHT_DEG.items():
        above = altitude - level
        down = np.flatnonzero((above[:-1] > 0) & (above[1:] <= 0))
        up = np.flatnonzero((above[:-1] <= 0) & (above[1:] > 0))
        if not len(down) or not len(up):
            found[name] = None
            continue
        found[name] = (_crossing(grid, above, int(down[0])), _crossing(grid, above, int(up[-1])))
    return found


def location_offset_s(location: Location) -> float:
    """Seconds by which the day's window moves so that it begins near the site's noon."""
    east = (location.longitude_deg + 180.0) % 360.0 - 180.0
    return float(east / 360.0 * 86400.0) if east > 0 else 0.0


def _crossing(grid: Degrees, values: Degrees, i: int) -> float:
    """Zero of ``values`` between grid points i and i+1, linear."""
    part = values[i] / (values[i] - values[i + 1])
    return float(grid[i] + part * (grid[i + 1] - grid[i]))


def describe_sky(location: Location, tai_s: float) -> dict[str, Any]:
    """Sun and Moon at a moment, for pages and logs (degrees; illumination 0 to 1)."""
    moon_altitude, _ = altitude_azimuth(location, tai_s, *moon_of_date(tai_s, location))
    return {
        "sun_altitude_deg": float(sun_altitude(location, tai_s)),
        "moon_altitude_deg": float(moon_altitude),
        "moon_illumination": float(moon_illumination(tai_s)),
        "sidereal_time_deg": float(sidereal_time(tai_s, location.longitude_deg)),
    }
