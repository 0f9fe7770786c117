"""Our formulae against astropy's own (ERFA and its built-in ephemeris)."""

from __future__ import annotations

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import AltAz, EarthLocation, SkyCoord, get_body
from astropy.time import Time
from astropy.utils import iers

from cumbre.core.sun_moon import moon_ecliptic
from cumbre.core.time import parse_isot, tai_from_utc
from cumbre.observatory import ephemeris
from cumbre.observatory.ephemeris import Location

LA_PALMA = Location(28.76, -17.88)
PACHON = Location(-30.2446, -70.7494)
DAYS = np.arange(0, 3650, 53.37) * 86400.0 + tai_from_utc(parse_isot("2014-06-01T03:00:00"))


@pytest.fixture(autouse=True)
def _no_network():
    with iers.conf.set_temp("auto_download", False), iers.conf.set_temp("iers_degraded_accuracy", "warn"):
        yield


def _times(tai_s):
    return Time(tai_s / 86400.0 + 40587.0, format="mjd", scale="tai")


def _of_date(body, times):
    from astropy.coordinates import PrecessedGeocentric

    coordinates = body.transform_to(PrecessedGeocentric(equinox=times, obstime=times))
    return coordinates.ra.deg, coordinates.dec.deg


def test_sun_within_0_02_degrees():
    times = _times(DAYS)
    ra, dec = _of_date(get_body("sun", times, ephemeris="builtin"), times)
    ours = ephemeris.sun_of_date(DAYS)
    assert ephemeris.separation(*ours, ra, dec).max() < 0.02


def test_moon_within_0_02_degrees():
    times = _times(DAYS)
    ra, dec = _of_date(get_body("moon", times, ephemeris="builtin"), times)
    ours = ephemeris.moon_of_date(DAYS)
    assert ephemeris.separation(*ours, ra, dec).max() < 0.02


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", [LA_PALMA, PACHON])
def test_altitude_azimuth_of_targets(place):
    earth = EarthLocation(lat=place.latitude_deg * u.deg, lon=place.longitude_deg * u.deg)
    ra, dec = np.array([10.0, 150.0, 266.4, 83.8]), np.array([-20.0, 2.2, -29.0, 60.0])
    for tai_s in DAYS[::10]:
        frame = AltAz(obstime=_times(tai_s), location=earth)
        truth = SkyCoord(ra * u.deg, dec * u.deg).transform_to(frame)
        altitude, azimuth = ephemeris.target_altitude(place, tai_s, ra, dec)
        assert ephemeris.separation(azimuth, altitude, truth.az.deg, truth.alt.deg).max() < 0.03


@pytest.mark.filterwarnings("ignore")
def test_topocentric_moon_and_sun_altitude():
    earth = EarthLocation(lat=PACHON.latitude_deg * u.deg, lon=PACHON.longitude_deg * u.deg)
    for tai_s in DAYS[::7]:
        times = _times(tai_s)
        frame = AltAz(obstime=times, location=earth)
        moon = get_body("moon", times, earth, ephemeris="builtin").transform_to(frame)
        ours = ephemeris.altitude_azimuth(PACHON, tai_s, *ephemeris.moon_of_date(tai_s, PACHON))
        assert ephemeris.separation(ours[1], ours[0], moon.az.deg, moon.alt.deg) < 0.15
        sun = get_body("sun", times, earth, ephemeris="builtin").transform_to(frame)
        assert abs(ephemeris.sun_altitude(PACHON, tai_s) - sun.alt.deg) < 0.03


def test_sidereal_time_of_meeus_example_12a():
    # 1987 April 10, 0h UT: 13h10m46.3668s. TAI−UTC was 23 s.
    tai_s = parse_isot("1987-04-10T00:00:00") + 23
    assert ephemeris.sidereal_time(tai_s) == pytest.approx((13 + 10 / 60 + 46.3668 / 3600) * 15, abs=1e-4)


def test_moon_of_meeus_example_47a():
    # 1992 April 12, 0h TD: longitude 133.162655, latitude −3.229126, distance 368409.7 km.
    t = np.asarray(-0.077221081451)
    longitude, latitude, distance = moon_ecliptic(t)
    assert longitude == pytest.approx(133.162655, abs=0.01)
    assert latitude == pytest.approx(-3.229126, abs=0.01)
    assert distance == pytest.approx(368409.7, rel=1e-4)


def test_airmass_of_kasten_and_young():
    # Their table: zenith 1, 30° 1.9943, 10° 5.5841, horizon 37.92.
    altitude = np.array([90.0, 30.0, 10.0, 0.0])
    assert ephemeris.airmass(altitude) == pytest.approx([1.0, 1.9939, 5.5841, 37.92], rel=2e-3)
    assert np.isinf(ephemeris.airmass(-1.0))


def test_twilights_are_in_order_and_at_their_level():
    found = ephemeris.twilights(PACHON, 20261120)
    assert all(found.values())
    evenings = [found[k][0] for k in ("set", "civil", "nautical", "astronomical")]
    mornings = [found[k][1] for k in ("set", "civil", "nautical", "astronomical")]
    assert evenings == sorted(evenings)
    assert mornings == sorted(mornings, reverse=True)
    for name, level in ephemeris.TWILIGHT_DEG.items():
        for moment in found[name]:
            assert ephemeris.sun_altitude(PACHON, moment) == pytest.approx(level, abs=0.02)


def test_polar_summer_has_no_night():
    found = ephemeris.twilights(Location(78.2, 15.6), 20260621)
    assert found["set"] is None


def test_full_moon_is_full():
    # Full moon of 2026-11-24 14:53 UTC, new moon of 2026-11-09 07:02 UTC.
    assert ephemeris.moon_illumination(tai_from_utc(parse_isot("2026-11-24T14:53:00"))) > 0.99
    assert ephemeris.moon_illumination(tai_from_utc(parse_isot("2026-11-09T07:02:00"))) < 0.01
