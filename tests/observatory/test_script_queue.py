"""Visits: announced in time, exposed once, never lost, never twice, whenever the process dies."""

from __future__ import annotations

import itertools
import json

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


class Observatory:
    """The pure machine with an imagined camera; time is a number."""

    def __init__(self, wanted, *, dead=(), kill_at=()):
        self.state = queue.begin_night(QueueState(), "n", wanted)
        self.now = NIGHT
        self.dead, self.kill_at = set(dead), set(kill_at)
        self.announced, self.commanded, self.canceled, self.done = {}, {}, [], None
        self.readouts = []
        self.steps = 0

    def save_or_die(self, state):
        """Every save may be the last thing the process does: what follows is lost, what was saved is not."""
        self.state = QueueState.from_json(json.loads(json.dumps(state.to_json())))
        self.steps += 1
        return self.steps not in self.kill_at

    def run(self, limit=5000):
        for _ in range(limit):
            if self.state.finished:
                return
            for item in [r for r in self.readouts if r[0] <= self.now]:
                self.readouts.remove(item)
                self.state = queue.end_of_readout(self.state, item[1])
            action = queue.next_action(self.state, self.now, TIMING, _choose, instrument="DemoCam")
            after = queue.apply(self.state, action, self.now, TIMING)
            match action:
                case queue.Wait(until):
                    arrivals = [r[0] for r in self.readouts]
                    self.now = max(min([until, *arrivals]), self.now + 0.01)
                case queue.Announce():
                    self.save_or_die(after)
                case queue.Republish(visit):
                    self.announced.setdefault(visit.group_id, self.now)
                    self.save_or_die(after)
                case queue.Expose(visit):
                    if self.save_or_die(after):
                        assert visit.group_id not in self.commanded
                        self.commanded[visit.group_id] = self.now
                        if len(self.commanded) not in self.dead:
                            self.readouts.append((self.now + 32.0, visit.group_id))
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
            self.pending.append((now + message.fields["expTime"] + 2, message.fields["groupId"]))
        for item in [p for p in self.pending if p[0] <= now]:
            self.pending.remove(item)
            fields = {"groupId": item[1], "instrument": "DemoCam", "timestampEndOfReadout": now}
            self.bus.publish("Camera.endReadout", fields)


def _run(service, camera, site, steps=600):
    for _ in range(steps):
        service.step(0.01)
        camera.step()
        if (site.root / DONE_FILE).exists():
            return
    raise AssertionError(f"not done: {service.state}")


def test_service_makes_a_night(site, bus):
    camera = Camera(bus)
    service = ObservingService(site=site, bus=bus, clock=bus.clock)
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
    service = ObservingService(site=site, bus=bus, clock=bus.clock)
    for _ in range(400):
        service.step(0.01)
        camera.step()
        if service.state.exposing is not None:
            break
    group = service.state.exposing.group_id
    # killed: nothing is closed, nothing is committed; the camera goes on
    for _ in range(40):
        camera.step()
    again = ObservingService(site=site, bus=bus, clock=bus.clock)
    assert again.state.exposing.group_id == group
    _run(again, camera, site)
    groups = [g for g, _, _ in camera.taken]
    assert len(groups) == len(set(groups)) == 3


def test_refused_command_cancels_the_visit(site, bus):
    _order(site, 1)
    orders = bus.subscribe(["Camera.takeImages"], start="now")
    service = ObservingService(site=site, bus=bus, clock=bus.clock)
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
    service = ObservingService(site=site, bus=bus, clock=bus.clock)
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
    service = ObservingService(site=site, bus=bus, clock=bus.clock)
    service.step(0.0)
    assert "nothing can be observed" in json.loads((site.root / DONE_FILE).read_text())["reason"]


def test_bad_order_is_explained(site, bus):
    (site.root / NIGHT_FILE).write_text('{"visits": "many"}')
    service = ObservingService(site=site, bus=bus, clock=bus.clock)
    with pytest.raises(ConfigurationError, match=r"night\.json"):
        service.step(0.0)


def test_location_is_the_configured_one(site, bus):
    service = ObservingService(site=site, bus=bus, clock=bus.clock)
    assert service.limits.location == Location(-30.24, -70.74)
