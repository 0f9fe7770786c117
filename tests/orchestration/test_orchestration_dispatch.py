"""The dispatcher: who gets which job, and what is left undone when there are too few workers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cumbre.orchestration.dispatch import LIGHT_AHEAD, Dispatcher, Leave, OverloadPolicy, PoolRule, Start
from cumbre.orchestration.models import Job, Priority

LIVE = {"live": (PoolRule("always", offline=False), ["a", "b"])}
SPARE = LIVE | {"spare": (PoolRule("behind", offline=False), ["s"])}


def image(number, *, deadline=100.0, affinity=-1):
    return Job(f"i{number}", "process", "f", {}, Priority.PROMPT, deadline, affinity)


def light(number, affinity):
    return Job(f"p{number}", "preload", "f", {}, Priority.PROMPT, 0.0, affinity)


def later(number):
    return Job(f"o{number}", "missed", "f", {}, Priority.OFFLINE)


def started(decisions):
    return {d.job.id: d.slot for d in decisions if isinstance(d, Start)}


def left(decisions):
    return {d.job.id: d.outcome for d in decisions if isinstance(d, Leave)}


def follow(dispatcher, now=0.0, pools=LIVE):
    """Plan, and record what is left as the driver does."""
    decisions = dispatcher.plan(now, pools)
    for decision in decisions:
        if isinstance(decision, Leave):
            dispatcher.remove(decision.job.id)
    return decisions


def test_a_worker_has_one_image_at_a_time_the_oldest_first():
    dispatcher = Dispatcher()
    for number, deadline in enumerate((300.0, 100.0, 200.0)):
        dispatcher.add(image(number, deadline=deadline))
    assert started(follow(dispatcher)).keys() == {"i1", "i2"}
    assert started(follow(dispatcher)) == {}
    slot = dispatcher.slot_of("i1")
    dispatcher.remove("i1")
    assert started(follow(dispatcher)) == {"i0": slot}


def test_among_images_of_a_visit_the_worker_that_prepared_it_is_chosen():
    dispatcher = Dispatcher()
    for number in (3, 1, 2, 0):
        dispatcher.add(image(number, affinity=number))
    first = started(follow(dispatcher))
    assert {name: slot[1] for name, slot in first.items()} == {"i3": "b", "i2": "a"}
    dispatcher.remove(next(name for name, slot in first.items() if slot[1] == "b"))
    (name,) = started(follow(dispatcher))
    assert int(name[1:]) % 2 == 1, "worker b has prepared the odd ones"


def test_preparations_queue_at_their_own_worker_beside_an_image():
    dispatcher = Dispatcher(light=["preload"])
    dispatcher.add(image(0, affinity=0))
    dispatcher.add(image(1, affinity=0))
    for number in range(LIGHT_AHEAD + 2):
        dispatcher.add(light(number, 0))
    got = started(follow(dispatcher))
    assert [slot[1] for name, slot in got.items() if name[0] == "p"] == ["a"] * LIGHT_AHEAD
    assert {"i0", "i1"} <= got.keys()
    assert dispatcher.waiting == 0


def test_the_spare_pool_helps_while_behind_and_until_none_waits():
    dispatcher = Dispatcher(OverloadPolicy(behind=2.0))
    for number in range(6):
        dispatcher.add(image(number))
    assert {slot[0] for slot in started(follow(dispatcher, pools=SPARE)).values()} == {"live"}
    assert not dispatcher.is_behind, "four wait for two workers: exactly what is allowed"
    dispatcher.add(image(6))
    assert started(follow(dispatcher, pools=SPARE))["i2"] == ("spare", "s")
    assert dispatcher.is_behind
    dispatcher.remove("i2")
    assert started(follow(dispatcher, pools=SPARE)) == {"i3": ("spare", "s")}, "still behind"
    for number in (0, 1, 3):
        dispatcher.remove(f"i{number}")
    follow(dispatcher, pools=SPARE)
    follow(dispatcher, pools=SPARE)
    assert not dispatcher.is_behind


def test_the_oldest_unexecuted_are_dropped_above_the_threshold():
    dispatcher = Dispatcher(OverloadPolicy(drop_above=3))
    for number in range(8):
        dispatcher.add(image(number, deadline=100.0 + number))
    decisions = follow(dispatcher)
    assert started(decisions).keys() == {"i0", "i1"}
    assert left(decisions) == {"i2": "Dropped", "i3": "Dropped", "i4": "Dropped"}
    assert dispatcher.waiting == 3
    assert left(follow(dispatcher)) == {}


def test_what_is_long_after_its_deadline_is_ended_and_its_worker_gets_nothing_until_it_is_back():
    dispatcher = Dispatcher(OverloadPolicy(kill_after_s=30.0))
    pools = {"live": (PoolRule(), ["a"])}
    for number in range(3):
        dispatcher.add(image(number, deadline=100.0 + 40 * number))
    follow(dispatcher, 50.0, pools)
    assert left(follow(dispatcher, 130.0, pools)) == {}
    decisions = follow(dispatcher, 171.0, pools)
    assert left(decisions) == {"i0": "Killed", "i1": "Deadline"}
    assert [d.slot for d in decisions if isinstance(d, Leave)] == [None, ("live", "a")]
    assert started(follow(dispatcher, 172.0, pools)) == {}
    assert started(follow(dispatcher, 173.0, {"live": (PoolRule(), ["a2"])})) == {"i2": ("live", "a2")}


def test_offline_work_begins_where_it_is_allowed_and_no_image_waits():
    dispatcher = Dispatcher(OverloadPolicy(behind=9))
    pools = LIVE | {"catch-up": (PoolRule("never", offline=True), ["c"])}
    assert dispatcher.room(pools) == 1
    dispatcher.add(later(0))
    dispatcher.add(later(1))
    assert started(follow(dispatcher, pools=pools)) == {"o0": ("catch-up", "c")}
    assert dispatcher.is_idle
    for number in range(3):
        dispatcher.add(image(number))
    dispatcher.remove("o0")
    got = started(follow(dispatcher, pools=pools))
    assert got == {"i0": ("live", "a"), "i1": ("live", "b")}, "no offline job begins while an image waits"
    assert dispatcher.room(pools) == 0


events = st.lists(
    st.one_of(
        st.tuples(st.just("image"), st.integers(0, 7)),
        st.tuples(st.just("light"), st.integers(0, 7)),
        st.tuples(st.just("offline"), st.just(0)),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("time"), st.integers(1, 60)),
        st.tuples(st.just("workers"), st.integers(0, 4)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(events, st.sampled_from([None, 1, 4]), st.sampled_from([None, 10.0]), st.sampled_from([0.5, 2.0]))
def test_whatever_happens_no_job_is_lost_or_done_twice(story, drop_above, kill_after_s, behind):
    dispatcher = Dispatcher(OverloadPolicy(behind, drop_above, kill_after_s), light=["preload"])
    now, live, count = 0.0, ["w0", "w1"], 0
    added, fate, running = {}, {}, {}
    for word, number in story:
        if word == "time":
            now += number
        elif word == "workers":
            live = [f"w{n}" for n in range(number)]
        elif word == "end" and running:
            name = sorted(running)[number % len(running)]
            fate[name] = "ended"
            del running[name]
            dispatcher.remove(name)
        elif word in ("image", "light", "offline"):
            count += 1
            job = {
                "image": image(count, deadline=now + 60.0, affinity=number),
                "light": light(count, number),
                "offline": later(count),
            }[word]
            added[job.id] = job
            dispatcher.add(job)
        pools = {
            "live": (PoolRule("always", offline=True), live),
            "spare": (PoolRule("behind", offline=False), ["s0"]),
        }
        for decision in dispatcher.plan(now, pools):
            name = decision.job.id
            assert name not in fate, "nothing is decided of what has ended"
            if isinstance(decision, Start):
                assert name not in running
                assert decision.slot[1] in pools[decision.slot[0]][1]
                assert decision.slot[0] == "live" or dispatcher.is_behind
                running[name] = decision.slot
            else:
                assert name[0] == "i", "only images are left undone"
                fate[name] = decision.outcome
                assert (running.pop(name, None) is not None) == (decision.outcome == "Killed")
                assert decision.outcome != "Dropped" or drop_above is not None
                assert decision.outcome == "Dropped" or now > added[name].deadline_tai + kill_after_s
                dispatcher.remove(name)
        heavy = [slot for name, slot in running.items() if name[0] != "p"]
        assert len(heavy) == len(set(heavy)), "one job a worker"
        assert drop_above is None or dispatcher.waiting <= drop_above
    waiting = set(added) - set(fate) - set(running)
    assert dispatcher.waiting == sum(name[0] == "i" for name in waiting)
