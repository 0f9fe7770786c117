"""Where Sun, planets, Moon and an observer are: ERFA's analytical series, no ephemeris file.

Earth: IAU SOFA ``epv00`` (right to 14 km, 0.02" at 1 au); planets: ``plan94`` (Simon et al. 1994; Jupiter to 71",
which matters only as a perturber: below 0.05" in 100 days); Moon: ``moon98``. Vectors are heliocentric, ICRS axes, au
and days; times MJD TT (TDB − TT, 2 ms, is left out).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.core.sun_moon import TT_MINUS_TAI_S
from cumbre.core.time import SECONDS_PER_DAY, mjd_from_seconds, seconds_from_mjd, utc_from_tai
from cumbre.payloads.solar_system.kepler import AU_KM, GM_SUN

FloatArray = NDArray[np.float64]
MJD_ZERO = 2400000.5
_TT_MINUS_TAI_DAYS = TT_MINUS_TAI_S / SECONDS_PER_DAY
_PLANETS = {1: 6023600.0, 2: 408523.71, 4: 3098708.0, 5: 1047.3486, 6: 3497.898, 7: 22902.98, 8: 19412.24}
"""Numbers of ``plan94`` → mass of the Sun in masses of the planet (IAU 1976/2009)."""
EARTH_MASS, MOON_MASS = 1 / 332946.0487, 1 / 27068703.0
GRAVITIES = GM_SUN * np.array([*(1 / mass for mass in _PLANETS.values()), EARTH_MASS, MOON_MASS])
"""GM (au³/day²) of the perturbers: Mercury, Venus, Mars … Neptune, Earth, Moon."""


def tt_from_tai(mjd_tai: ArrayLike) -> FloatArray:
    """MJD TT of MJD TAI."""
    return np.asarray(np.asarray(mjd_tai, float) + _TT_MINUS_TAI_DAYS)


def perturbers(mjd_tt: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Heliocentric position and velocity of the perturbers, each of shape (n, 9, 3)."""
    import erfa

    times = np.atleast_1d(np.asarray(mjd_tt, float))
    positions, velocities = [], []
    for number in _PLANETS:
        planet = erfa.plan94(MJD_ZERO, times, number)
        positions.append(planet["p"])
        velocities.append(planet["v"])
    earth, _ = erfa.epv00(MJD_ZERO, times)
    moon = erfa.moon98(MJD_ZERO, times)
    positions += [earth["p"], earth["p"] + moon["p"]]
    velocities += [earth["v"], earth["v"] + moon["v"]]
    return np.stack(positions, axis=1), np.stack(velocities, axis=1)


class Observer:
    """A place on the ground.

    Parameters
    ----------
    itrf_km
        Geocentric position, Earth-fixed axes.
    """

    def __init__(self, itrf_km: ArrayLike) -> None:
        self._itrf_au = np.asarray(itrf_km, float) / AU_KM

    @classmethod
    def at(cls, latitude_deg: float, longitude_deg: float, elevation_m: float) -> Observer:
        """From geodetic coordinates (WGS 84), east positive."""
        import erfa

        xyz = erfa.gd2gc(1, np.radians(longitude_deg), np.radians(latitude_deg), elevation_m)
        return cls(np.asarray(xyz) / 1000.0)

    def state(self, mjd_tt: float) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Heliocentric position and velocity (au, au/day), and velocity of the Sun to the barycentre."""
        import erfa

        tai_s = seconds_from_mjd(mjd_tt - _TT_MINUS_TAI_DAYS)
        utc = mjd_from_seconds(utc_from_tai(tai_s))
        spin = erfa.era00(MJD_ZERO, utc)
        turn = np.asarray(erfa.c2tcio(erfa.c2i06a(MJD_ZERO, mjd_tt), spin, np.eye(3)))
        place = turn.T @ self._itrf_au
        axis = turn.T @ np.array([0.0, 0.0, 2 * np.pi * 1.00273781191135448])
        helio, bary = erfa.epv00(MJD_ZERO, mjd_tt)
        return helio["p"] + place, helio["v"] + np.cross(axis, place), np.asarray(bary["v"] - helio["v"])
