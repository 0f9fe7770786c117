"""Where a replicator stands: every short history, checked against the sentences of the specification."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumbre.archive.pool import (
    FULL,
    LOCAL,
    NONE,
    Beat,
    Checked,
    Ended,
    Event,
    Lost,
    Pool,
    Registration,
    Started,
    Tick,
)

PAUSE = (10.0, 60.0)
SILENCE = 6.0


def pool() -> Pool:
    return Pool(random.Random(1), pause_s=PAUSE, silence_s=SILENCE)


def play(machine: Pool, events: Iterable[Event]) -> list[Registration | None]:
    return [machine.handle(event) for event in events]


def test_boot_with_everything_well_is_fully_operational() -> None:
    assert play(pool(), [Checked(0.0)]) == [Registration(FULL, "all tests passed")]


def test_boot_without_its_distributor_is_local_only_until_it_answers() -> None:
    machine = pool()
    assert play(machine, [Checked(0.0, {"distributor": "refused"}), Lost(1.0, "refused"), Beat(2.0)]) == [
        Registration(LOCAL, "refused"),
        None,
        Registration(FULL, "connection back"),
    ]


def test_without_its_own_stores_it_is_in_no_pool() -> None:
    machine = pool()
    assert machine.handle(Checked(0.0, {"outage buffer": "full", "distributor": "away"})) is None
    assert machine.handle(Beat(1.0)) is None
    assert machine.handle(Checked(2.0)) == Registration(FULL, "all tests passed")
    assert machine.handle(Checked(3.0, {"raw cache": "read-only"})) == Registration(
        NONE, "raw cache: read-only"
    )


def test_a_broken_tape_is_told_and_keeps_nobody_out() -> None:
    assert pool().handle(Checked(0.0, {"tape": "not mounted"})) == Registration(FULL, "tape: not mounted")


def test_a_silent_distributor_is_lost() -> None:
    machine = pool()
    machine.handle(Checked(0.0))
    assert machine.handle(Tick(SILENCE)) is None
    assert machine.handle(Tick(SILENCE + 0.1)) == Registration(LOCAL, "nothing heard for 6 s")
    assert machine.handle(Beat(8.0)) == Registration(FULL, "connection back")


def test_a_job_that_takes_too_long_sends_it_away_for_a_random_time() -> None:
    backs = set()
    for seed in range(20):
        machine = Pool(random.Random(seed), pause_s=PAUSE, silence_s=SILENCE)
        play(machine, [Checked(0.0), Started(0.0, "R22", 5.0), Beat(4.0)])
        assert machine.handle(Tick(5.0)) is None
        assert machine.handle(Beat(5.1)) == Registration(LOCAL, "slow: R22 not done in its time")
        now = 5.1
        while machine.pool == LOCAL:
            now += 0.5
            machine.handle(Beat(now))
        assert 5.1 + PAUSE[0] <= now <= 5.1 + PAUSE[1] + 0.5
        backs.add(now)
    assert len(backs) > 15


def test_after_a_slow_job_it_comes_back_only_while_the_distributor_is_heard() -> None:
    machine = pool()
    play(machine, [Checked(0.0), Started(0.0, "R22", 1.0), Tick(2.0)])
    assert machine.pool == LOCAL
    assert {machine.handle(Tick(float(now))) for now in range(3, 200)} == {None}
    # The connection alone is not enough: another interval was drawn when the first was over in silence.
    now = 200.0
    while machine.pool == LOCAL:
        assert now < 200.0 + PAUSE[1] + 1
        machine.handle(Beat(now))
        now += 1.0
    assert machine.pool == FULL


def test_an_interval_that_is_over_in_silence_is_followed_by_another() -> None:
    """Whoever was slow and then lost waits again when it is heard, so that not all come back at once."""
    still_away = 0
    for seed in range(20):
        machine = Pool(random.Random(seed), pause_s=PAUSE)
        play(machine, [Checked(0.0), Started(0.0, "R22", 1.0), Tick(2.0)])
        for now in range(3, 200):
            machine.handle(Tick(float(now)))
        machine.handle(Beat(200.0))
        still_away += machine.pool == LOCAL
    assert still_away >= 15


def test_a_job_done_in_time_or_given_away_changes_nothing() -> None:
    machine = pool()
    play(
        machine,
        [Checked(0.0), Started(0.0, "a", 5.0), Started(1.0, "b", 1.0), Ended(1.5, "b"), Ended(4.0, "a")],
    )
    assert play(machine, [Beat(4.0), Tick(9.0)]) == [None, None]


def test_what_a_lost_link_delays_is_not_called_slow() -> None:
    machine = pool()
    play(machine, [Checked(0.0), Started(0.0, "a", 5.0), Lost(1.0)])
    assert machine.handle(Tick(60.0)) is None
    assert machine.handle(Beat(61.0)) == Registration(FULL, "connection back")


KINDS = ("well", "no distributor", "no store", "beat", "lost", "start", "end", "short", "long")


class Witness:
    """The sentences of the specification, said once more in the plainest way, with intervals known."""

    def __init__(self) -> None:
        self.stores = self.heard = False
        self.heard_at = 0.0
        self.due: float | None = None
        self.slow_at = -1e9

    def see(self, kind: str, now: float) -> None:
        if kind in ("well", "no distributor", "no store"):
            self.stores = kind != "no store"
            self.heard = kind != "no distributor"
            self.heard_at = now
        elif kind == "beat":
            self.heard, self.heard_at = True, now
        elif kind == "lost":
            self.heard = False
        elif kind == "start" and self.due is None:
            self.due = now + 5.0
        elif kind == "end":
            self.due = None
        if now - self.heard_at > SILENCE:
            self.heard = False
        if not self.heard:
            self.due = None
        if self.due is not None and now > self.due:
            self.due, self.slow_at = None, now


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_every_history_of_up_to_five_events(length: int) -> None:
    for history in itertools.product(KINDS, repeat=length):
        machine, witness = pool(), Witness()
        now, was = 0.0, NONE
        for kind in history:
            now += {"short": 4.0, "long": 100.0}.get(kind, 0.5)
            event: Event = {
                "well": Checked(now), "no distributor": Checked(now, {"distributor": "x"}),
                "no store": Checked(now, {"raw cache": "x"}), "beat": Beat(now), "lost": Lost(now),
                "start": Started(now, "job", 5.0), "end": Ended(now, "job"), "short": Tick(now), "long": Tick(now),
            }[kind]  # fmt: skip
            told = machine.handle(event)
            witness.see(kind, now)
            # A registration is told when and only when the pool changes.
            assert (told is not None) == (machine.pool != was), history
            assert told is None or (told.pool == machine.pool and told.reason), history
            was = machine.pool
            assert (machine.pool != NONE) == witness.stores, history
            if machine.pool == FULL:
                assert witness.heard, history
                assert now - witness.slow_at >= PAUSE[0], history
            if witness.stores and not witness.heard:
                assert machine.pool == LOCAL, history


events = st.one_of(
    st.builds(Checked, st.just(0.0), st.dictionaries(st.sampled_from(["distributor", "buffer", "tape"]), st.just("x"))),
    st.builds(Beat, st.just(0.0)), st.builds(Lost, st.just(0.0)), st.builds(Tick, st.just(0.0)),
    st.builds(Started, st.just(0.0), st.sampled_from("abc"), st.floats(0.1, 30)),
    st.builds(Ended, st.just(0.0), st.sampled_from("abc")),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 90), events), max_size=40), st.integers(0, 5))
def test_whatever_happened_it_comes_back_when_all_is_well_again(
    history: list[tuple[float, Event]], seed: int
) -> None:
    machine = Pool(random.Random(seed), pause_s=PAUSE, silence_s=SILENCE)
    now, was = 0.0, NONE
    for wait, event in history:
        now += wait
        told = machine.handle(type(event)(now, *[getattr(event, name) for name in event.__slots__[1:]]))
        assert (told is not None) == (machine.pool != was)
        was = machine.pool
    for job in "abc":
        machine.handle(Ended(now, job))
    machine.handle(Checked(now))
    end = now + PAUSE[1] + 1
    while now < end:
        now += 1.0
        machine.handle(Beat(now))
    assert machine.pool == FULL
