"""Visits: announced in time, exposed once, never lost, never twice, whenever the process dies."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cumbre.bus import open_bus
from cumbre.core.configuration import Site
from cumbre.core.errors import ConfigurationError
from cumbre.core.time import Clock, parse_isot, tai_from_utc
from cumbre.observatory import script_queue as queue
from cumbre.observatory.ephemeris import Location, sidereal_time
from cumbre.observatory.scheduler import DONE_FILE, NIGHT_FILE, ObservingService
from cumbre.observatory.script_queue import QUEUE_FILE, QueueState, Timing
from cumbre.observatory.visits import AnnouncedVisit, Target

NIGHT = tai_from_utc(parse_isot("2026-11-21T02:00:00"))
TIMING = Timing(cadence_s=37.0, notice_s=22.0, readout_s=2.0)


def _choose(state, earliest):
    return Target("t", 10.0, -30.0, "r_demo", "r", 30.0, earliest, 1.1, 60.0, 4.0)


def _choose_pair(state, earliest):
    return Target("t", 10.0, -30.0, "r_demo", "r", 15.0, earliest, 1.1, 60.0, 4.0, snaps=2, between_s=2.0)


class Observatory:
    """The pure machine with an imagined camera; time is a number."""

    def __init__(self, wanted, *, dead=(), kill_at=(), choose=_choose, timing=TIMING, half=()):
        self.choose, self.timing, self.half = choose, timing, set(half)
        self.state = queue.begin_night(QueueState(), "n", wanted)
        self.now = NIGHT
        self.dead, self.kill_at = set(dead), set(kill_at)
        self.announced, self.commanded, self.canceled, self.done = {}, {}, [], None
        self.readouts, self.promised = [], {}
        self.steps = 0

    def save_or_die(self, state):
        """Every save may be the last thing the process does: what follows is lost, what was saved is not."""
        self.state = QueueState.from_json(json.loads(json.dumps(state.to_json())))
        self.steps += 1
        return self.steps not in self.kill_at

    def expose(self, visit):
        """Every exposure of a visit, with its read-out; of some visits only the first comes."""
        target = visit.target
        for number in range(1 if len(self.commanded) in self.half else target.snaps):
            end = self.now + (number + 1) * (target.exposure_s + 2.0)
            self.readouts.append((end, visit.group_id, f"{visit.group_id}/{number}", target.snaps))

    def run(self, limit=5000):
        for _ in range(limit):
            if self.state.finished:
                return
            for item in [r for r in self.readouts if r[0] <= self.now]:
                self.readouts.remove(item)
                for _ in range(2):  # told again after a death: what was read was not committed
                    after = queue.end_of_readout(self.state, *item[1:])
                    self.save_or_die(after)
            action = queue.next_action(self.state, self.now, self.timing, self.choose, instrument="DemoCam")
            after = queue.apply(self.state, action, self.now, self.timing)
            match action:
                case queue.Wait(until):
                    arrivals = [r[0] for r in self.readouts]
                    self.now = max(min([until, *arrivals]), self.now + 0.01)
                case queue.Announce():
                    self.save_or_die(after)
                case queue.Republish(visit):
                    self.announced.setdefault(visit.group_id, self.now)
                    self.promised[visit.group_id] = visit.target.start_tai
                    self.save_or_die(after)
                case queue.Expose(visit):
                    if self.save_or_die(after):
                        assert visit.group_id not in self.commanded
                        self.commanded[visit.group_id] = self.now
                        if len(self.commanded) not in self.dead:
                            self.expose(visit)
                case queue.Cancel(visit, _):
                    self.canceled.append(visit.group_id)
                    self.save_or_die(after)
                case queue.Finish():
                    self.save_or_die(after)
        raise AssertionError("the night does not end")


def test_a_night_is_pipelined_and_keeps_cadence_and_notice():
    night = Observatory(8)
    night.run()
    assert night.state.done == 8
    starts = list(night.commanded.values())
    assert all(abs(b - a - 37.0) < 0.1 for a, b in itertools.pairwise(starts))
    for group, start in night.commanded.items():
        assert start - night.announced[group] >= TIMING.notice_s
    assert list(night.announced) == sorted(night.announced)


def test_dead_camera_costs_one_visit():
    night = Observatory(5, dead=[2])
    night.run()
    assert night.state.done == 5
    assert len(night.commanded) == 6
    assert len(night.canceled) == 1


def test_a_dead_camera_ends_the_night_at_last():
    night = Observatory(4, dead=range(1, 100))
    night.run()
    assert night.state.done == 0
    assert "failed" in night.state.finished


@settings(max_examples=60, deadline=None)
@given(kills=st.lists(st.integers(1, 40), max_size=6), dead=st.lists(st.integers(1, 8), max_size=2))
def test_whatever_dies_whenever_every_visit_is_made_once(kills, dead):
    night = Observatory(6, kill_at=kills, dead=dead)
    night.run()
    assert night.state.done == 6
    assert set(night.commanded) <= set(night.announced)
    assert len(night.commanded) - len(night.canceled) <= 6


def test_a_pair_is_done_with_its_second_read_out():
    night = Observatory(6, choose=_choose_pair)
    night.run()
    assert night.state.done == len(night.commanded) == 6
    starts = list(night.commanded.values())
    # two exposures of 15 s and two read-outs of 2 s fit into the cadence of 37 s
    assert all(abs(b - a - 37.0) < 0.1 for a, b in itertools.pairwise(starts))
    assert night.state.read_out == {}


def test_the_cadence_is_never_shorter_than_a_visit_needs():
    timing = Timing(cadence_s=20.0, notice_s=22.0, readout_s=2.0)
    night = Observatory(4, choose=_choose_pair, timing=timing)
    night.run()
    starts = list(night.commanded.values())
    assert all(34.0 <= b - a < 34.1 for a, b in itertools.pairwise(starts))
    # what nextVisit promises is what happens
    assert all(abs(start - night.promised[group]) < 0.1 for group, start in night.commanded.items())


def test_a_visit_whose_second_exposure_never_comes_is_cancelled_at_its_deadline():
    night = Observatory(3, choose=_choose_pair, half=[2])
    night.run()
    assert (night.state.done, len(night.commanded), len(night.canceled)) == (3, 4, 1)


def test_the_deadline_counts_every_exposure_and_read_out():
    state = queue.begin_night(QueueState(), "n", 1)
    visit = queue.next_action(state, NIGHT, TIMING, _choose_pair, instrument="D").visit
    state = queue.apply(state, queue.Expose(visit), NIGHT, TIMING)
    assert state.deadline_tai == NIGHT + 2 * (15.0 + 2.0) + TIMING.grace_s
    state = queue.end_of_readout(state, visit.group_id, "a", 2)
    action = queue.next_action(state, state.deadline_tai, TIMING, _choose_pair, instrument="D")
    assert action == queue.Cancel(visit, "1 of 2 images were read out before the deadline")
    late = queue.end_of_readout(
        queue.apply(state, action, state.deadline_tai, TIMING), visit.group_id, "b", 2
    )
    assert (late.done, late.canceled, late.read_out) == (1, (), {})


@settings(max_examples=60, deadline=None)
@given(
    kills=st.lists(st.integers(1, 80), max_size=6),
    dead=st.lists(st.integers(1, 8), max_size=2),
    half=st.lists(st.integers(1, 8), max_size=2),
)
def test_whatever_dies_whenever_every_pair_is_made_once(kills, dead, half):
    night = Observatory(6, kill_at=kills, dead=dead, half=half, choose=_choose_pair)
    night.run()
    assert night.state.done == 6
    assert set(night.commanded) <= set(night.announced)
    assert len(night.commanded) - len(night.canceled) <= 6


def test_the_state_of_an_older_version_is_read():
    state = queue.begin_night(QueueState(), "n", 1)
    visit = queue.next_action(state, NIGHT, TIMING, _choose, instrument="D").visit
    data = queue.apply(state, queue.Expose(visit), NIGHT, TIMING).to_json()
    del data["read_out"]
    for name in ("snaps", "between_s"):
        del data["exposing"]["target"][name]
    read = QueueState.from_json(data)
    assert queue.end_of_readout(read, visit.group_id, "a").done == 1


def test_late_image_of_a_cancelled_visit_counts():
    state = queue.begin_night(QueueState(canceled=()), "n", 3)
    visit = queue.next_action(state, NIGHT, TIMING, _choose, instrument="D").visit
    for action in (queue.Announce(visit), queue.Republish(visit), queue.Expose(visit)):
        state = queue.apply(state, action, NIGHT, TIMING)
    state = queue.apply(state, queue.Cancel(visit, "late"), NIGHT + 200, TIMING)
    assert state.failed == 1
    state = queue.end_of_readout(state, visit.group_id)
    assert state.done == 1
    assert queue.end_of_readout(state, visit.group_id).done == 1


def test_pause_holds_the_next_announcement():
    state = queue.begin_night(QueueState(paused=True), "n", 3)
    assert isinstance(queue.next_action(state, NIGHT, TIMING, _choose, instrument="D"), queue.Wait)


def test_a_broken_state_file_is_explained(tmp_path):
    path = tmp_path / "queue.json"
    path.write_text('{"announced": {"group_id": 3}}')
    with pytest.raises(ConfigurationError, match=r"queue\.json: not a saved queue"):
        QueueState.load(path)


# -- the service on a real bus, in fast time --


@pytest.fixture
def site(tmp_path):
    text = {
        "observatory": {"latitude_deg": -30.24, "longitude_deg": -70.74},
        "instruments": ["democam"],
        "places": {"summit": {"raw": "summit/raw"}},
        "scheduler": {"moon_avoidance_deg": 5.0},
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(text))
    ra = float(sidereal_time(NIGHT, -70.74))
    tiles = [{"name": f"t{i}", "ra": (ra + 3 * i) % 360, "dec": -40.0} for i in range(3)]
    (tmp_path / "survey.json").write_text(json.dumps(tiles))
    return Site.load(tmp_path)


@pytest.fixture
def bus(tmp_path):
    clock = Clock.starting_at(NIGHT, rate=600.0)
    with open_bus(f"sqlite:///{tmp_path}/bus.db", identity="scheduler", clock=clock) as opened:
        # a service that is "killed" closes nothing: the fixture does
        subscribe, made = opened.subscribe, []
        opened.subscribe = lambda *a, **k: made.append(subscribe(*a, **k)) or made[-1]
        yield opened
        for subscription in made:
            subscription.close()


def _order(site, visits, **more):
    (site.root / NIGHT_FILE).write_text(json.dumps({"visits": visits, "state": "running", **more}))


class Camera:
    """Answers takeImages with an end of read-out when the exposure is over."""

    def __init__(self, bus):
        self.bus = bus
        self.orders = bus.subscribe(["Camera.takeImages"], start="now")
        self.pending = []
        self.taken = []

    def step(self):
        now = self.bus.clock.now_tai_s()
        for message in self.orders.poll(0.0):
            self.taken.append((message.fields["groupId"], message.snd_tai, message.fields))
            total = message.fields["numImages"]
            for index in range(1, total + 1):
                end = now + index * (message.fields["expTime"] + 2)
                name = f"XC_O_20261120_{100 * len(self.taken) + index:06d}"
                self.pending.append((end, message.fields["groupId"], name, total))
        for item in [p for p in self.pending if p[0] <= now]:
            self.pending.remove(item)
            self.bus.publish("Camera.endReadout", {
                "groupId": item[1], "instrument": "DemoCam", "timestampEndOfReadout": now, "imageName": item[2],
                "imagesInSequence": item[3],
            })  # fmt: skip


def _service(site, bus):
    """The service; a slow machine, on which time runs 600 times as fast, is no dead camera."""
    service = ObservingService(site=site, bus=bus, clock=bus.clock)
    service.timing = replace(service.timing, grace_s=1e6, late_s=1e6)
    return service


def _run(service, camera, site, steps=600):
    for _ in range(steps):
        service.step(0.01)
        camera.step()
        if (site.root / DONE_FILE).exists():
            return
    raise AssertionError(f"not done: {service.state}")


def test_service_makes_a_night(site, bus):
    camera = Camera(bus)
    service = _service(site, bus)
    assert service.step(0.0) == 0
    _order(site, 4)
    _run(service, camera, site)
    announced = list(bus.replay(["ScriptQueue.nextVisit"]))
    assert len(announced) == 4 == len(camera.taken)
    for message, (group, sent, fields) in zip(announced, camera.taken, strict=True):
        visit = AnnouncedVisit.from_fields(message.fields)
        assert visit.group_id == group
        assert sent - message.snd_tai >= site.config.scheduler.notice_s
        assert (fields["ra"], fields["dec"]) == (visit.ra, visit.dec)
        assert fields["filter"] == "r_demo"
    assert len({g for g, _, _ in camera.taken}) == 4
    assert json.loads((site.root / DONE_FILE).read_text())["visits"] == 4
    service.close()


def test_service_goes_on_after_kill(site, bus):
    camera = Camera(bus)
    _order(site, 3)
    service = _service(site, bus)
    for _ in range(400):
        service.step(0.01)
        camera.step()
        if service.state.exposing is not None:
            break
    group = service.state.exposing.group_id
    # killed: nothing is closed, nothing is committed; the camera goes on
    for _ in range(40):
        camera.step()
    again = _service(site, bus)
    assert again.state.exposing.group_id == group
    _run(again, camera, site)
    groups = [g for g, _, _ in camera.taken]
    assert len(groups) == len(set(groups)) == 3


def test_service_makes_pairs_and_goes_on_after_a_kill_between_the_two(site, bus):
    site.config.scheduler.exposure_s, site.config.scheduler.snaps = 15.0, 2
    camera = Camera(bus)
    _order(site, 2)
    service = _service(site, bus)
    for _ in range(600):
        service.step(0.01)
        camera.step()
        if service.state.read_out:
            break
    (group,) = service.state.read_out
    # killed with one of two read out, and that message not committed
    again = _service(site, bus)
    assert (again.state.exposing.group_id, again.state.done) == (group, 0)
    _run(again, camera, site)
    assert json.loads((site.root / DONE_FILE).read_text())["visits"] == 2
    assert [fields["numImages"] for _, _, fields in camera.taken] == [2, 2]
    assert {fields["expTime"] for _, _, fields in camera.taken} == {15.0}
    visits = [AnnouncedVisit.from_fields(m.fields) for m in bus.replay(["ScriptQueue.nextVisit"])]
    assert [(v.n_images, v.duration_s) for v in visits] == [(2, 32.0)] * 2
    (planned, *_) = bus.replay(["Scheduler.predictedSchedule"])
    assert (planned.fields["nimages"], planned.fields["duration"]) == ([2], [32.0])
    assert len(list(bus.replay(["ScriptQueue.nextVisitCanceled"]))) == 0


def test_refused_command_cancels_the_visit(site, bus):
    _order(site, 1)
    orders = bus.subscribe(["Camera.takeImages"], start="now")
    service = _service(site, bus)
    refused = []
    camera = None
    for _ in range(600):
        service.step(0.01)
        if not refused:
            for message in orders.poll(0.0):
                bus.acknowledge(message, -302, "shutter stuck", 7)
                refused.append(message.fields["groupId"])
                camera = Camera(bus)
        elif camera is not None:
            camera.step()
        if (site.root / DONE_FILE).exists():
            break
    canceled = [m.fields["groupId"] for m in bus.replay(["ScriptQueue.nextVisitCanceled"])]
    assert canceled == refused
    assert [g for g, _, _ in camera.taken] != refused
    assert json.loads((site.root / DONE_FILE).read_text())["visits"] == 1


def test_a_new_order_is_a_new_night_with_new_groups(site, bus):
    camera = Camera(bus)
    service = _service(site, bus)
    _order(site, 1, start_tai=1.0)
    _run(service, camera, site)
    (site.root / DONE_FILE).unlink()
    _order(site, 1, start_tai=2.0)
    _run(service, camera, site)
    assert len({g for g, _, _ in camera.taken}) == 2
    assert json.loads((site.root / QUEUE_FILE).read_text())["night"] == "2.0"


def test_nothing_to_observe_ends_the_night_with_its_reason(site, bus):
    (site.root / "survey.json").write_text('[{"name": "north", "ra": 10, "dec": 85}]')
    _order(site, 2)
    service = _service(site, bus)
    service.step(0.0)
    assert "nothing can be observed" in json.loads((site.root / DONE_FILE).read_text())["reason"]


def test_bad_order_is_explained(site, bus):
    (site.root / NIGHT_FILE).write_text('{"visits": "many"}')
    service = _service(site, bus)
    with pytest.raises(ConfigurationError, match=r"night\.json"):
        service.step(0.0)


def test_location_is_the_configured_one(site, bus):
    service = _service(site, bus)
    assert service.limits.location == Location(-30.24, -70.74)
