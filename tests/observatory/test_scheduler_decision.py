"""Limits hold for any sky, time and state; a night is used."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumbre.core.errors import ConfigurationError
from cumbre.core.time import parse_isot, tai_from_utc
from cumbre.observatory import ephemeris
from cumbre.observatory.ephemeris import Location
from cumbre.observatory.targets import Limits, TelescopeState, next_target, predict, why_nothing
from cumbre.observatory.visits import Tile, load_tiles, new_group_id, parse_tiles

NIGHT = tai_from_utc(parse_isot("2026-11-21T01:00:00"))
SITE = Location(-30.24, -70.74)
LIMITS = Limits(location=SITE, filters=(("r_demo", "r"), ("g_demo", "g")))

tiles_strategy = st.lists(
    st.tuples(st.floats(0, 359.99), st.floats(-89, 89)), min_size=1, max_size=8, unique=True
).map(lambda xs: [Tile(f"t{i}", ra, dec) for i, (ra, dec) in enumerate(xs)])


@settings(max_examples=150, deadline=None)
@given(
    tiles=tiles_strategy,
    moment=st.floats(0, 366 * 86400.0),
    pointing=st.none() | st.tuples(st.floats(0, 359), st.floats(-89, 89)),
    last_filter=st.sampled_from(["", "r_demo", "g_demo", "i_demo"]),
    max_airmass=st.floats(1.05, 4.0),
    avoid=st.floats(0, 120),
)
def test_limits_are_never_crossed(*, tiles, moment, pointing, last_filter, max_airmass, avoid):
    limits = Limits(location=SITE, filters=LIMITS.filters, max_airmass=max_airmass, moon_avoidance_deg=avoid)
    now = NIGHT + moment
    ra, dec = pointing or (None, None)
    state = TelescopeState(ra, dec, last_filter, now - 5.0)
    target = next_target(state, now, limits, tiles)
    if target is None:
        assert why_nothing(state, now, limits, tiles)
        return
    assert target.start_tai >= now
    assert target.start_tai >= state.free_tai + target.slew_s - 1e-6
    for t in (target.start_tai, target.start_tai + target.exposure_s):
        altitude, _ = ephemeris.target_altitude(SITE, t, target.ra, target.dec)
        assert ephemeris.airmass(altitude) <= max_airmass + 1e-9
        assert ephemeris.moon_separation(SITE, t, target.ra, target.dec) >= avoid - 1e-9
        assert ephemeris.sun_altitude(SITE, t) <= limits.sun_limit_deg


def test_daylight_only_when_configured():
    noon = tai_from_utc(parse_isot("2026-11-21T16:40:00"))
    zenith = [Tile("up", float(ephemeris.sidereal_time(noon, SITE.longitude_deg)), -70.0)]
    limits = Limits(location=SITE, filters=LIMITS.filters, moon_avoidance_deg=0.0)
    assert next_target(TelescopeState(), noon, limits, zenith) is None
    assert "Sun" in why_nothing(TelescopeState(), noon, limits, zenith)
    by_day = Limits(location=SITE, filters=LIMITS.filters, moon_avoidance_deg=0.0, allow_daylight=True)
    assert next_target(TelescopeState(), noon, by_day, zenith) is not None


def _survey():
    rng = np.random.default_rng(5)
    return [
        Tile(f"s{i}", float(ra), float(dec))
        for i, (ra, dec) in enumerate(zip(rng.uniform(0, 360, 150), rng.uniform(-75, 15, 150), strict=True))
    ]


def test_a_whole_night_is_used_and_sensible():
    night = ephemeris.twilights(SITE, 20261120)["nautical"]
    tiles = _survey()
    schedule = predict(
        TelescopeState(), night[0] + 10, LIMITS, tiles, until_tai=night[1] - 120, cadence_s=37.0
    )
    length = night[1] - night[0]
    assert len(schedule) > 0.9 * length / 39
    starts = np.array([t.start_tai for t in schedule])
    assert np.diff(starts).min() >= 37.0 - 1e-6
    assert np.diff(starts).max() < 60.0
    assert np.median([t.slew_s for t in schedule]) < 20.0
    assert np.median([t.airmass for t in schedule]) < 1.5
    by_tile: dict[str, list[float]] = {}
    for target in schedule:
        by_tile.setdefault(target.tile, []).append(target.start_tai)
    assert min(np.diff(v).min() for v in by_tile.values() if len(v) > 1) >= LIMITS.revisit_s


def test_few_tiles_take_turns():
    ra = float(ephemeris.sidereal_time(NIGHT, SITE.longitude_deg))
    # away from the Moon of that night
    tiles = [Tile(f"t{i}", (ra + 4.0 * i) % 360, -35.0) for i in range(3)]
    limits = Limits(location=SITE, filters=(("r_demo", "r"),), moon_avoidance_deg=10.0)
    schedule = predict(TelescopeState(), NIGHT, limits, tiles, until_tai=NIGHT + 12 * 37, cadence_s=37.0)
    assert len(schedule) >= 11
    counts = [sum(t.tile == tile.name for t in schedule) for tile in tiles]
    assert max(counts) - min(counts) <= 1
    assert all(a.tile != b.tile for a, b in pairwise(schedule))


def test_filter_change_costs_and_is_avoided():
    ra = float(ephemeris.sidereal_time(NIGHT, SITE.longitude_deg))
    limits = Limits(location=SITE, filters=LIMITS.filters, moon_avoidance_deg=0.0)
    state = TelescopeState(ra, -35.0, "g_demo", NIGHT)
    target = next_target(state, NIGHT, limits, [Tile("a", ra, -34.0)])
    assert target.filter == "g_demo"


def test_same_question_same_answer():
    tiles = _survey()
    one = next_target(TelescopeState(), NIGHT, LIMITS, tiles)
    assert one == next_target(TelescopeState(), NIGHT, LIMITS, tiles)


@given(st.floats(1.7e9, 1.9e9), st.floats(1.7e9, 1.9e9))
def test_group_ids_only_grow(first, second):
    one = new_group_id(first, "")
    two = new_group_id(second, one)
    assert two > one
    assert len(two) == 23


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "list of"),
        ("{", "not JSON"),
        ('[{"name": "a", "ra": 400, "dec": 0}]', "ra must be"),
        ('[{"name": "a", "ra": 1}]', "entry 0"),
        ('[{"name": "a", "ra": 1, "dec": 0}, {"name": "a", "ra": 2, "dec": 0}]', "twice"),
    ],
)
def test_bad_survey_files_are_explained(tmp_path, text, said):
    path = tmp_path / "survey.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        load_tiles(path)


def test_survey_may_be_wrapped():
    assert parse_tiles({"tiles": [{"name": "a", "ra": 1, "dec": 2}]}, "x") == [Tile("a", 1.0, 2.0)]
