"""Time scales against published values and astropy; the clock against arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumbre.core.time import (
    Clock,
    day_obs_from_tai,
    day_obs_start_tai,
    isot,
    mjd_from_seconds,
    parse_isot,
    seconds_from_mjd,
    tai_from_utc,
    tai_minus_utc,
    utc_from_tai,
)


@pytest.mark.parametrize(
    ("utc", "offset"),
    [
        ("1999-01-01T00:00:00", 32),
        ("2016-12-31T23:59:59", 36),
        ("2017-01-01T00:00:00", 37),
        ("2026-11-21T00:00:00", 37),
    ],
)
def test_leap_seconds_are_those_of_bulletin_c(utc, offset):
    assert tai_minus_utc(parse_isot(utc)) == offset


def test_agrees_with_astropy():
    from astropy.time import Time

    utc_s = parse_isot("2026-11-20T03:04:05.678")
    theirs = Time("2026-11-20T03:04:05.678", scale="utc").tai
    assert isot(tai_from_utc(utc_s)) == theirs.isot
    assert mjd_from_seconds(tai_from_utc(utc_s)) == pytest.approx(theirs.mjd, abs=1e-9)


@pytest.mark.parametrize(
    ("utc", "day_obs"),
    [("2026-11-20T11:59:59", 20261119), ("2026-11-20T12:00:00", 20261120), ("2026-11-21T03:00:00", 20261120)],
)
def test_day_obs_rolls_at_noon_utc(utc, day_obs):
    assert day_obs_from_tai(tai_from_utc(parse_isot(utc))) == day_obs


@given(st.floats(min_value=9.5e8, max_value=3e9))
def test_scales_round_trip(utc_s):
    assert utc_from_tai(tai_from_utc(utc_s)) == pytest.approx(utc_s, abs=1e-5)
    assert seconds_from_mjd(mjd_from_seconds(utc_s)) == pytest.approx(utc_s, abs=1e-4)


@given(st.floats(min_value=9.5e8, max_value=3e9))
def test_day_obs_start_is_in_its_own_day(tai_s):
    start = day_obs_start_tai(day_obs_from_tai(tai_s))
    assert start <= tai_s + 1e-3 < start + 86402


def test_fast_clock_is_linear_and_shared(tmp_path):
    clock = Clock(tai0_s=1000.0, mono0_s=0.0, rate=8.0)
    clock.save(tmp_path / "clock.json")
    again = Clock.load(tmp_path / "clock.json")
    assert again == clock
    before = again.now_tai_s()
    again.sleep(0.08)
    assert 0.08 <= again.now_tai_s() - before < 8.0
    assert again.wall_s(16.0) == 2.0


def test_no_clock_file_means_real_time(tmp_path):
    assert Clock.load(tmp_path / "none.json").rate == 1.0
