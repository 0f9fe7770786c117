"""Which visits make a template, and what is told of the others."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cumbre.core.configuration import Templates
from cumbre.orchestration.inputs import choose_template, one_each
from cumbre.orchestration.template_choice import Candidate, choose

RULES = Templates()


def good(number, **more):
    """A visit like any other; the number only tells them apart."""
    values = {
        "airmass": 1.1, "seeing_arcsec": 0.8 + 0.001 * number, "zero_point": 28.0, "sky_rate": 20.0, "depth_mag": 24.0,
    }  # fmt: skip
    return Candidate(f"XC_O_20261120_{number:06d}_R00_S00", **(values | more))


def reasons(choice):
    return {one.obs_id: one.reason for one in choice.refused}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"zero_point": 27.6}, "clouds: zero point 0.40 mag below"),
        ({"seeing_arcsec": 1.4}, "seeing 1.40 arcsec: at most 1.1"),
        ({"sky_rate": 90.0}, "background 90 electrons/s: at most 80"),
        ({"depth_mag": 22.9}, "limiting magnitude 22.90: at least 23.00"),
        ({"masked": 0.5}, "50% of its pixels are unusable: at most 30%"),
        ({"ellipticity": 0.4}, "ellipticity 0.40: at most 0.3"),
        ({"astrometry_arcsec": 0.5}, "stars scatter by 0.500 arcsec"),
        ({"depth_mag": float("nan")}, "not measured: limiting magnitude"),
        ({"problem": "UnprocessableData: no stars"}, "UnprocessableData: no stars"),
    ],
)
def test_a_bad_visit_is_left_out_with_its_reason(fault, reason):
    bad = good(99, **fault)
    (choice,), outside = choose([*(good(k) for k in range(5)), bad], RULES)
    assert [one.obs_id for one in choice.chosen] == [good(k).obs_id for k in range(5)]
    assert reason in reasons(choice)[bad.obs_id]
    assert outside == []


def test_every_range_of_airmass_has_its_own_visits():
    visits = [good(k, airmass=1.0 + 0.1 * k) for k in range(18)]
    choices, outside = choose(visits, RULES)
    assert [(choice.low, choice.high) for choice in choices] == [(1.0, 1.3), (1.3, 1.7), (1.7, 2.5)]
    assert [len(choice.chosen) for choice in choices] == [3, 4, 8]
    for choice in choices:
        assert all(choice.low <= one.airmass < choice.high for one in choice.chosen)
    assert [one.reason for one in outside] == [
        f"airmass {1 + 0.1 * k:.2f}: templates are made from 1 to 2.5" for k in (15, 16, 17)
    ]


def test_seeing_of_a_cloudy_visit_is_no_measure():
    # sharp but cloudy: it must not push the others out
    cloudy = [good(k, seeing_arcsec=0.3, zero_point=27.0) for k in (50, 51, 52)]
    (choice,), _ = choose([*(good(k) for k in range(6)), *cloudy], RULES)
    assert len(choice.chosen) == 6


def test_too_few_are_none_and_too_many_leave_the_worst_out():
    (few,), _ = choose([good(1), good(2)], RULES)
    assert few.chosen == ()
    assert set(reasons(few).values()) == {"good, one of 2: at least 3 make a template"}
    many = [good(k, depth_mag=24.0 - 0.02 * k) for k in range(15)]
    (choice,), _ = choose(many, RULES)
    assert [one.obs_id for one in choice.chosen] == [good(k).obs_id for k in range(12)]
    assert set(reasons(choice).values()) == {"12 better ones are enough"}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.builds(
            good, st.integers(0, 99), airmass=st.floats(0.9, 3.0), seeing_arcsec=st.floats(0.4, 3.0),
            zero_point=st.floats(26, 28.5), depth_mag=st.floats(21, 25), sky_rate=st.floats(1, 100),
        ),
        max_size=25, unique_by=lambda c: c.obs_id,
    ),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_everybody_is_told_once_whatever_the_order(visits, rng):
    choices, outside = choose(visits, RULES)
    told = [one.obs_id for c in choices for one in (*c.chosen, *c.refused)] + [one.obs_id for one in outside]
    assert sorted(told) == sorted(one.obs_id for one in visits)
    assert all(one.reason for c in choices for one in c.refused)
    for choice in choices:
        assert len(choice.chosen) == 0 or RULES.fewest_visits <= len(choice.chosen) <= RULES.most_visits
    shuffled = list(visits)
    rng.shuffle(shuffled)
    assert choose(shuffled, RULES) == (choices, outside)


def test_rules_that_contradict_are_refused():
    with pytest.raises(ValidationError, match="rising numbers"):
        Templates(airmass_edges=[1.0, 1.5, 1.2])
    with pytest.raises(ValidationError, match=r"at most templates\.most_visits"):
        Templates(fewest_visits=9, most_visits=4)


# --- what prompt processing takes ----------------------------------------------------------------------------------------

ROW = {"tile": "a", "ra": 10.0, "dec": -30.0, "band": "r", "detector": "R00_S00"}
OLD = ROW | {"path": "old.fits"}
LOW = ROW | {
    "path": "low.fits",
    "airmass": [1.0, 1.3],
    "version": "x1_v2",
    "made_tai": 5.0,
    "visits": ["v1", "v2"],
}
HIGH = ROW | {
    "path": "high.fits",
    "airmass": [1.3, 1.7],
    "version": "x1.3_v1",
    "made_tai": 6.0,
    "visits": ["v3"],
}
NEW = LOW | {"path": "new.fits", "made_tai": 7.0, "visits": ["v1", "v4"]}
WANT = {"ra": 10.0, "dec": -30.0, "band": "r", "detector": "R00_S00", "reach_deg": 0.1}


def test_template_by_airmass_newest_first():
    rows = [OLD, HIGH, LOW, NEW]
    assert choose_template(rows, **WANT, airmass=1.1)["path"] == "new.fits"
    assert choose_template(rows, **WANT, airmass=1.5)["path"] == "high.fits"
    # none for this airmass: better one for any than one for another
    assert choose_template(rows, **WANT, airmass=2.2)["path"] == "old.fits"
    assert choose_template([LOW, HIGH], **WANT, airmass=2.2)["path"] == "high.fits"
    assert choose_template([OLD], **WANT)["path"] == "old.fits"


def test_a_visit_is_not_compared_with_itself():
    rows = [OLD, LOW, NEW]
    assert choose_template(rows, **WANT, airmass=1.1, obs_id="v4")["path"] == "low.fits"
    assert choose_template(rows, **WANT, airmass=1.1, obs_id="v1")["path"] == "old.fits"
    assert choose_template([NEW], **WANT, airmass=1.1, obs_id="v1") is None


def test_one_of_each_place():
    other = OLD | {"tile": "b", "path": "b.fits"}
    assert [row["path"] for row in one_each([OLD, HIGH, LOW, NEW, other])] == ["new.fits", "b.fits"]
