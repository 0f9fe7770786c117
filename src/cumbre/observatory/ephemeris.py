"""Where Sun, Moon and stars stand for a scheduler: numpy only, good to about 0.05°.

Sun and Moon are those of :mod:`cumbre.core.sun_moon`, horizontal coordinates and airmass those of
:mod:`cumbre.core.geometry`. Nutation (< 0.005°), UT1−UTC (< 0.004°) and refraction are left out.

Times are TAI seconds since 1970 (scalar or array), angles degrees, east longitude positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.core.geometry import airmass, horizontal_of_date, precess_from_j2000, sidereal_deg
from cumbre.core.geometry import separation_deg as separation
from cumbre.core.sun_moon import (
    EARTH_RADIUS_KM,
    OBLIQUITY_J2000_DEG,
    centuries_tt,
    moon_ecliptic,
    sun_longitude_deg,
)
from cumbre.core.time import day_obs_start_tai

__all__ = [
    "TWILIGHT_DEG", "Location", "airmass", "altitude_azimuth", "describe_sky", "moon_illumination", "moon_of_date",
    "moon_separation", "precess_to_date", "separation", "sidereal_time", "sun_altitude", "sun_of_date",
    "target_altitude", "twilights",
]  # fmt: skip

Degrees = NDArray[np.float64]
TWILIGHT_DEG = {"set": -0.833, "civil": -6.0, "nautical": -12.0, "astronomical": -18.0}


@dataclass(frozen=True, slots=True)
class Location:
    """A place on Earth: geodetic latitude, east longitude (degrees)."""

    latitude_deg: float
    longitude_deg: float


def _array(value: ArrayLike) -> Degrees:
    return np.asarray(value, dtype=np.float64)


def sidereal_time(tai_s: ArrayLike, longitude_deg: float = 0.0) -> Degrees:
    """Mean sidereal time at an east longitude, degrees in [0, 360); longitude 0 is Greenwich."""
    return sidereal_deg(tai_s, longitude_deg)


def _unit(lon_deg: ArrayLike, lat_deg: ArrayLike) -> Degrees:
    lon, lat = np.deg2rad(_array(lon_deg)), np.deg2rad(_array(lat_deg))
    lon, lat = np.broadcast_arrays(lon, lat)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def _spherical(vector: Degrees) -> tuple[Degrees, Degrees]:
    x, y, z = vector[..., 0], vector[..., 1], vector[..., 2]
    return np.rad2deg(np.arctan2(y, x)) % 360.0, np.rad2deg(np.arctan2(z, np.hypot(x, y)))


def precess_to_date(ra_deg: ArrayLike, dec_deg: ArrayLike, tai_s: float) -> tuple[Degrees, Degrees]:
    """ICRS (taken as J2000) to the mean equator and equinox of date, degrees."""
    return precess_from_j2000(tai_s, ra_deg, dec_deg)


def altitude_azimuth(
    location: Location, tai_s: ArrayLike, ra_deg: ArrayLike, dec_deg: ArrayLike
) -> tuple[Degrees, Degrees]:
    """Altitude and azimuth (north 0, east 90), degrees, of positions of date; arguments broadcast."""
    return horizontal_of_date(tai_s, location.latitude_deg, location.longitude_deg, ra_deg, dec_deg)[:2]


def target_altitude(
    location: Location, tai_s: ArrayLike, ra_deg: ArrayLike, dec_deg: ArrayLike
) -> tuple[Degrees, Degrees]:
    """Altitude and azimuth, degrees, of ICRS positions: precessed once, to the first time given."""
    times = _array(tai_s)
    ra, dec = precess_to_date(ra_deg, dec_deg, float(times.flat[0]))
    return altitude_azimuth(location, times, ra, dec)


def _equatorial(lon_deg: Degrees, lat_deg: ArrayLike, obliquity_deg: ArrayLike) -> Degrees:
    """Turn ecliptic coordinates into unit vectors of the equator."""
    x, y, z = np.moveaxis(_unit(lon_deg, lat_deg), -1, 0)
    eps = np.deg2rad(_array(obliquity_deg))
    return np.stack([x, y * np.cos(eps) - z * np.sin(eps), y * np.sin(eps) + z * np.cos(eps)], axis=-1)


def _obliquity(t: Degrees) -> Degrees:
    return OBLIQUITY_J2000_DEG - 0.0130042 * t


def sun_of_date(tai_s: ArrayLike) -> tuple[Degrees, Degrees]:
    """Right ascension and declination of the Sun, equinox of date, degrees (0.01°)."""
    t = centuries_tt(tai_s)
    return _spherical(_equatorial(sun_longitude_deg(t), np.zeros_like(t), _obliquity(t)))


def sun_altitude(location: Location, tai_s: ArrayLike) -> Degrees:
    """Altitude of the Sun's centre without refraction, degrees."""
    return altitude_azimuth(location, tai_s, *sun_of_date(tai_s))[0]


def moon_of_date(tai_s: ArrayLike, location: Location | None = None) -> tuple[Degrees, Degrees]:
    """Right ascension and declination of the Moon, equinox of date, degrees (0.05°).

    With a location the parallax (up to 1°) is taken off; without, the position is geocentric.
    """
    t = centuries_tt(tai_s)
    longitude, latitude, distance = moon_ecliptic(t)
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
    longitude, latitude, _ = moon_ecliptic(t)
    elongation = np.cos(np.deg2rad(latitude)) * np.cos(np.deg2rad(longitude - sun_longitude_deg(t)))
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
