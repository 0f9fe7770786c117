"""Sun, moon, orbits, weather, light curves: against astropy, conservation laws and published values."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.coordinates import get_body, get_sun, solar_system_ephemeris
from astropy.time import Time

from cumbre.core.geometry import separation_deg
from cumbre.core.time import parse_isot, tai_from_utc
from cumbre.simulator import ephemeris, lightcurves, orbits
from cumbre.simulator.tiles import choose_tiles
from cumbre.simulator.weather import Weather

DATES = ["2024-02-29T05:00:00", "2026-11-21T01:00:00", "2027-07-04T12:00:00", "2019-03-09T23:00:00"]


def tai_of(text: str) -> float:
    return tai_from_utc(parse_isot(text))


@pytest.mark.parametrize("date", DATES)
def test_sun_and_moon_agree_with_astropy(date):
    time = Time(date, scale="utc")
    with solar_system_ephemeris.set("builtin"):
        sun, moon = get_sun(time), get_body("moon", time)
    assert separation_deg(*ephemeris.sun_position(tai_of(date)), sun.ra.deg, sun.dec.deg) < 0.01
    assert separation_deg(*ephemeris.moon_position(tai_of(date)), moon.ra.deg, moon.dec.deg) < 0.02
    distance = np.linalg.norm(ephemeris.moon_vector_km(tai_of(date)))
    assert distance == pytest.approx(moon.distance.km, rel=2e-4)


def test_moon_phase_at_known_full_and_new_moon():
    assert ephemeris.moon_phase_angle_deg(tai_of("2026-11-24T14:53:00")) < 8  # full moon
    assert ephemeris.moon_phase_angle_deg(tai_of("2026-11-09T07:02:00")) > 172  # new moon


@pytest.mark.parametrize("e", [0.0, 0.3, 0.97, 0.9999])
def test_kepler_equation_is_solved(e):
    m = np.linspace(-7, 7, 501)
    anomaly = orbits.eccentric_anomaly(m, e)
    residual = anomaly - e * np.sin(anomaly) - m
    assert np.abs(np.mod(residual + np.pi, 2 * np.pi) - np.pi).max() < 1e-12


def some_elements(n: int = 40) -> orbits.Elements:
    rng = np.random.default_rng(2)
    return orbits.Elements(
        rng.uniform(2, 3.4, n), rng.uniform(0, 0.4, n), rng.uniform(0, 0.6, n),
        *rng.uniform(0, 2 * np.pi, (3, n)), epoch_tai=1.7e9,
    )  # fmt: skip


def test_orbits_close_and_conserve_energy_and_momentum():
    el = some_elements()
    period_s = 2 * np.pi * el.a**1.5 / orbits.GAUSS_K * 86400
    r0, _ = orbits.state(el, el.epoch_tai)
    r1, _ = orbits.state(el, el.epoch_tai + period_s)
    assert np.abs(r1 - r0).max() < 1e-6  # float64 seconds since 1970 set this limit
    energy, momentum = [], []
    for part in np.linspace(0, 1, 9):
        r, v = orbits.state(el, el.epoch_tai + part * period_s)
        energy.append(0.5 * np.sum(v**2, axis=1) - orbits.GM_SUN / np.linalg.norm(r, axis=1))
        momentum.append(np.cross(r, v))
    assert np.allclose(energy, -orbits.GM_SUN / 2 / el.a, rtol=1e-12)
    assert np.allclose(momentum, momentum[0], rtol=1e-10, atol=1e-14)


def test_velocity_is_the_derivative_of_position():
    el = some_elements()
    r0, _ = orbits.state(el, el.epoch_tai - 500)
    r1, _ = orbits.state(el, el.epoch_tai + 500)
    _, v = orbits.state(el, el.epoch_tai)
    assert np.abs((r1 - r0) / (1000 / 86400) - v).max() < 1e-8


def test_elements_round_trip():
    el = some_elements()
    back = orbits.elements_from_state(*orbits.state(el, 1.71e9), 1.71e9)
    assert np.allclose(back.a, el.a)
    assert np.allclose(back.e, el.e)
    later = 1.75e9
    assert np.allclose(orbits.state(back, later)[0], orbits.state(el, later)[0], atol=1e-7)


def test_earth_orbit_gives_one_year():
    r = np.linalg.norm(orbits.earth_position(tai_of("2026-01-03T17:00:00")))
    assert r == pytest.approx(0.9833, abs=2e-4)  # perihelion


def test_ceres_is_where_horizons_geometry_puts_it():
    # At opposition a body on the sun's far side has phase angle ~0 and V = H + 5 log10(r·Δ).
    earth = orbits.ecliptic_from_equatorial(orbits.earth_position(1.79e9))
    longitude = np.arctan2(earth[1], earth[0])
    el = orbits.Elements(
        *(np.array([v]) for v in (2.77, 0.0, 0.0, 0.0, 0.0, longitude)), epoch_tai=1.79e9
    )  # fmt: skip
    seen = orbits.observe(el, 1.79e9, np.zeros(3))
    assert np.rad2deg(seen.phase_angle[0]) < 0.1
    assert orbits.magnitude(np.array([3.5]), seen)[0] == pytest.approx(
        3.5 + 5 * np.log10(2.77 * seen.distance[0]), abs=0.05
    )


def test_weather_does_not_depend_on_the_order_of_calls(observatory):
    times = 1.79e9 + np.arange(50) * 613.0
    forward = [Weather(observatory, 3).conditions(t) for t in times]
    weather = Weather(observatory, 3)
    assert [weather.conditions(t) for t in times[::-1]] == forward[::-1]
    assert Weather(observatory, 4).conditions(times[0]) != forward[0]


def test_seeing_is_like_a_good_site(observatory):
    weather = Weather(observatory, 1)
    seeing = np.array([weather.seeing_arcsec(1.79e9 + k * 600.0) for k in range(3000)])
    assert 0.95 < np.median(seeing) < 1.15
    assert seeing.min() >= 0.85
    assert seeing.max() <= 1.6
    assert np.corrcoef(seeing[:-1], seeing[1:])[0, 1] > 0.6


def test_moonlight_brightens_by_magnitudes(observatory):
    weather = Weather(observatory, 1)
    dark = weather.sky_mag(tai_of("2026-11-10T03:00:00"), "r", 15.0, -30.0)
    bright = weather.sky_mag(tai_of("2026-11-24T03:00:00"), "r", 15.0, -30.0)
    assert 20.8 < dark < 21.3
    assert 1.0 < dark - bright < 4.0
    assert weather.sky_mag(tai_of("2026-11-10T16:00:00"), "r", 200.0, -30.0) < 10  # day


def test_krisciunas_schaefer_example(observatory):
    """Table 2 of the paper: full moon at 60° zenith distance, 60° away: about 1.8 to 2.6 mag of V brightening."""
    weather = Weather(observatory, 1)
    moonlight = weather._moonlight(tai_of("2026-11-24T04:00:00"), 0.0, -50.0, 65.0, "r")
    assert 17.5 < -2.5 * np.log10(moonlight) < 20.0


def test_light_curves():
    turn = np.linspace(0, 1, 2001)
    for kind in (lightcurves.SINUSOID, lightcurves.RR_LYRAE):
        n = np.full(turn.size, kind)
        one, p = np.ones(turn.size), np.zeros(turn.size)
        offset = lightcurves.variable_offset_mag(n, one, one, turn, 0.0)
        assert abs(offset.mean()) < 0.02
        assert np.ptp(offset) == pytest.approx(1.0, abs=0.01)
        assert not lightcurves.variable_offset_mag(p, one, one, turn, 0.0).any()
    days = np.linspace(-5, 120, 2000)
    flux = lightcurves.supernova_flux(days, 1.0)
    assert not flux[days < 0].any()
    assert flux.max() == pytest.approx(1.0, abs=0.03)
    assert 15 < days[flux.argmax()] < 20
    assert 0.3 < 2.5 * np.log10(flux.max() / flux[np.searchsorted(days, 33)]) < 1.2  # Δm15


def test_tiles_stand_high_and_away_from_the_moon(observatory):
    start = tai_of("2026-11-21T01:00:00")
    weather = Weather(observatory, 1)
    tiles = choose_tiles(observatory, start, 5)
    assert len({name for name, _, _ in tiles}) == 5
    for _, ra, dec in tiles:
        for hours in (0, 3):
            assert weather.airmass(start + hours * 3600, ra, dec) < 1.8
        assert separation_deg(ra, dec, *ephemeris.moon_position(start)) > 30
