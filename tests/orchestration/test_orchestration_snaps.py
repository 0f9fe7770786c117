"""Visits of several exposures in prompt processing: together, once, in time, whatever does not come."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cumbre.bus import open_bus
from cumbre.core.configuration import Site
from cumbre.core.ids import ObsId
from cumbre.core.time import Clock, parse_isot, tai_from_utc
from cumbre.ledger import LedgerService
from cumbre.observatory.visits import AnnouncedVisit
from cumbre.orchestration import prompt_jobs
from cumbre.orchestration.engine import InlineEngine
from cumbre.orchestration.prompt import PromptService
from cumbre.orchestration.prompt_jobs import PROCESS
from cumbre.orchestration.prompt_state import DetectorImage, Miss, Process, PromptState, ReadOut, Reject
from cumbre.site.report import hop_table, latencies, visits

NIGHT = tai_from_utc(parse_isot("2026-11-21T02:00:00"))
GROUP = "2026-11-21T02:00:37.000"
FIRST, SECOND = "XC_O_20261120_000011", "XC_O_20261120_000012"
VISIT = AnnouncedVisit(GROUP, "DemoCam", 10.0, -30.0, 0.0, "r_demo", NIGHT + 22, 32.0, 2, "a")
TIMEOUT = 180.0


def _image(obs_id, detector=0, at=NIGHT + 60):
    number = ObsId.parse(obs_id).exposure_id
    return DetectorImage(obs_id, "DemoCam", number, GROUP, detector, "R00_S00", f"/{obs_id}.fits", at)


def _read(obs_id, tai):
    return ReadOut(GROUP, obs_id, tai, 2, 15.0)


@pytest.fixture
def state():
    made = PromptState({"DemoCam": {0: "R00_S00", 1: "R00_S01"}}, image_timeout_s=TIMEOUT)
    made.announced(VISIT, NIGHT, NIGHT)
    return made


def test_the_first_waits_for_the_second_and_latency_counts_from_the_last_read_out(state):
    state.read_out(_read(FIRST, NIGHT + 39), NIGHT + 39)
    assert state.at_archive(_image(FIRST), NIGHT + 45) == []
    state.read_out(_read(SECOND, NIGHT + 56), NIGHT + 56)
    (made,) = state.at_archive(_image(SECOND), NIGHT + 60)
    assert made == Process(_image(FIRST), VISIT, NIGHT + 56, snaps=(_image(SECOND),))
    assert state.at_archive(_image(SECOND), NIGHT + 61) == []
    assert state.tick(NIGHT + 3000) != []  # detector 1, of which nothing came


def test_the_order_of_arrival_does_not_matter(state):
    assert state.at_archive(_image(SECOND), NIGHT + 60) == []
    (made,) = state.at_archive(_image(FIRST), NIGHT + 61)
    assert (made.image.obs_id, [snap.obs_id for snap in made.snaps]) == (FIRST, [SECOND])


def test_without_its_second_a_visit_is_processed_after_the_timeout_and_the_second_is_rejected(state):
    state.read_out(_read(FIRST, NIGHT + 39), NIGHT + 39)
    state.read_out(_read(SECOND, NIGHT + 56), NIGHT + 56)
    state.at_archive(_image(FIRST), NIGHT + 45)
    assert state.tick(NIGHT + 56 + TIMEOUT - 1) == []
    now = NIGHT + 56 + TIMEOUT + 1
    told = [item for item in state.tick(now) if getattr(item, "image", None)]
    absent, process = told
    assert isinstance(absent, Reject)
    assert (absent.image.obs_id, absent.image.detector, absent.outcome) == (SECOND, 0, "Deadline")
    assert isinstance(process, Process)
    assert (process.snaps, process.note, process.since_tai) == ((), "1 of 2 exposures came", now)
    (late,) = state.at_archive(_image(SECOND), now + 5)
    assert isinstance(late, Reject)
    assert late.outcome == "Deadline"
    assert state.tick(now + 10) == []


def test_the_second_is_waited_for_as_long_as_its_exposure_takes(state):
    state.read_out(ReadOut(GROUP, FIRST, NIGHT + 639, 2, 600.0), NIGHT + 639)
    state.at_archive(_image(FIRST), NIGHT + 645)
    assert not [i for i in state.tick(NIGHT + 639 + 600 + TIMEOUT) if isinstance(i, Process)]
    assert [i for i in state.tick(NIGHT + 639 + 632 + TIMEOUT) if isinstance(i, Process)]


def test_a_cancelled_visit_is_processed_with_what_came(state):
    state.read_out(_read(FIRST, NIGHT + 39), NIGHT + 39)
    state.at_archive(_image(FIRST), NIGHT + 45)
    process, *dropped = state.canceled(GROUP, NIGHT + 200)
    assert (process.image.obs_id, process.note) == (FIRST, "1 of 2 exposures came")
    assert [item.detector for item in dropped] == [1]
    assert state.tick(NIGHT + 3000) == []


def test_both_may_come_hours_late(state):
    state.read_out(_read(FIRST, NIGHT + 39), NIGHT + 39)
    state.read_out(_read(SECOND, NIGHT + 56), NIGHT + 56)
    assert {item.others for item in state.tick(NIGHT + 300)} == {(SECOND,)}
    assert state.at_archive(_image(FIRST), NIGHT + 2000, is_caught_up=True) == []
    assert state.tick(NIGHT + 2001) == []
    (made,) = state.at_archive(_image(SECOND), NIGHT + 2100, is_caught_up=True)
    assert isinstance(made, Miss)
    assert (made.outcome, [snap.obs_id for snap in made.process.snaps]) == ("CaughtUp", [SECOND])


def test_exposures_that_nobody_announced_are_one_visit_as_the_camera_says():
    state = PromptState({"DemoCam": {0: "R00_S00"}}, image_timeout_s=TIMEOUT)
    state.read_out(_read(FIRST, NIGHT + 39), NIGHT + 39)
    assert state.at_archive(_image(FIRST), NIGHT + 45) == []
    (made,) = state.at_archive(_image(SECOND), NIGHT + 60)
    assert (made.visit, len(made.snaps)) == (None, 1)


def test_what_waits_is_given_up_and_forgotten(state):
    for number in range(50):
        group = f"g{number:02d}"
        state.read_out(ReadOut(group, f"XC_O_20261120_{100 + 2 * number:06d}", NIGHT, 2, 15.0), NIGHT)
        state.at_archive(
            DetectorImage("x", "DemoCam", number, group, 0, "R00_S00", "/x", NIGHT), NIGHT + number
        )
        state._seen.clear()  # the same name each time
    assert len(state.awaiting()) == 51
    made = state.tick(NIGHT + 1000)
    assert sum(isinstance(item, Process) for item in made) == 50
    state.tick(NIGHT + 5000)
    assert state.awaiting() == set()


story = st.lists(
    st.one_of(
        st.tuples(st.just("image"), st.integers(0, 2), st.integers(0, 1)),
        st.tuples(st.just("read"), st.integers(0, 2), st.integers(0, 1)),
        st.tuples(st.just("visit"), st.integers(0, 2)),
        st.tuples(st.just("cancel"), st.integers(0, 2)),
        st.tuples(st.just("tick"), st.integers(1, 400)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(story)
def test_in_any_order_each_exposure_ends_once_and_no_detector_of_a_visit_is_processed_twice(story):
    state, now = PromptState({"DemoCam": {0: "R00_S00"}}, image_timeout_s=TIMEOUT), NIGHT
    for number in range(3):
        # the queue announces a visit before it exposes
        state.announced(
            AnnouncedVisit(f"g{number}", "DemoCam", 1.0, 2.0, 0.0, "r", now + 22, 32.0, 2, "a"), now, now
        )
    made, sent = [], set()
    for word, number, *rest in story:
        group = f"g{number}"
        if word == "image":
            obs_id = f"XC_O_20261120_{10 * (number + 1) + rest[0]:06d}"
            sent.add(obs_id)
            item = DetectorImage(
                obs_id, "DemoCam", ObsId.parse(obs_id).exposure_id, group, 0, "R00_S00", "/x", 0
            )
            made += state.at_archive(item, now)
        elif word == "read":
            made += state.read_out(
                ReadOut(group, f"XC_O_20261120_{10 * (number + 1) + rest[0]:06d}", now, 2, 15.0), now
            )
        elif word == "cancel":
            made += state.canceled(group, now)
        elif word == "tick":
            now += number
            made += state.tick(now)
    made += state.tick(now + 3000)
    processed = [item for item in made if isinstance(item, Process)]
    used = [one.obs_id for item in processed for one in (item.image, *item.snaps)]
    late = [item.image.obs_id for item in made if isinstance(item, Reject) and item.image.path]
    assert sorted(used + late) == sorted(sent)
    groups = [item.image.group_id for item in processed]
    assert len(groups) == len(set(groups))


# -- the service: real bus, real database, jobs in this process --


class World:
    def __init__(self, root, database):
        text = {
            "observatory": {"latitude_deg": -30.24, "longitude_deg": -70.74},
            "instruments": ["democam"],
            "database": database.dsn,
            "bus": f"sqlite:///{root}/bus.db",
            "places": {"summit": {"raw": "summit/raw"}},
        }
        (root / "site.yaml").write_text(yaml.safe_dump(text))
        self.site, self.db = Site.load(root), database
        self.clock = Clock.starting_at(NIGHT, rate=1.0)
        self.bus = open_bus(self.site.config.bus, identity="prompt", clock=self.clock)
        self.services = []

    def start(self):
        made = PromptService(
            site=self.site, bus=self.bus, clock=self.clock, db=self.db, engine=InlineEngine()
        )
        self.services.append(made)
        return made

    def later(self, seconds):
        """The same world, that much later."""
        clock = Clock.starting_at(NIGHT + seconds, rate=1.0)
        for service in self.services:
            service.clock = service.manager.clock = service.teller.clock = clock

    def announce(self):
        self.bus.publish("ScriptQueue.nextVisit", {
            "groupId": GROUP, "position": [10.0, -30.0], "instrument": "DemoCam", "filters": "r_demo",
            "startTime": NIGHT + 22, "duration": 32.0, "nimages": 2, "survey": "a",
        })  # fmt: skip

    def read_out(self, obs_id, tai):
        index = 1 if obs_id == FIRST else 2
        self.bus.publish("Camera.endReadout", {
            "instrument": "DemoCam", "groupId": GROUP, "imageName": obs_id, "imageIndex": index,
            "imagesInSequence": 2, "timestampEndOfReadout": tai, "requestedExposureTime": 15.0,
            "detectors": ["R00_S00"],
        })  # fmt: skip

    def arrive(self, obs_id, detector=0, hop="at_archive", message=""):
        self.bus.publish("Image.hop", {
            "obsId": obs_id, "instrument": "DemoCam", "exposureId": ObsId.parse(obs_id).exposure_id,
            "groupId": GROUP, "detector": detector, "detectorName": "R00_S00", "hop": hop, "place": "archive",
            "path": f"/nowhere/{obs_id}.fits", "hopTai": NIGHT + 60, "message": message,
        })  # fmt: skip

    def jobs(self):
        rows = self.db.query(
            "SELECT id, payload FROM orchestration.job WHERE kind = %s ORDER BY id", (PROCESS,)
        )
        return [(r["payload"]["image"]["obs_id"], [s["obs_id"] for s in r["payload"]["snaps"]]) for r in rows]

    def processed(self):
        hops = [m.fields for m in self.bus.replay(["Image.hop"]) if m.fields["hop"] == "processed"]
        hops = [fields for fields in hops if fields["detector"] == 0]
        return [(f["obsId"], f["outcome"]) for f in hops]


@pytest.fixture
def world(tmp_path, database, monkeypatch):
    monkeypatch.setattr(prompt_jobs, "WORKER", "support.prompt_jobs")
    made = World(tmp_path, database)
    yield made
    for service in made.services:
        service.close()
    made.bus.close()


def _run(service, n=12):
    for _ in range(n):
        service.step(0.0)


def test_a_pair_is_one_job_one_event_and_two_hops(world):
    service = world.start()
    world.announce()
    for number, obs_id in enumerate((FIRST, SECOND)):
        world.read_out(obs_id, NIGHT + 39 + 17 * number)
        world.arrive(obs_id)
    _run(service)
    assert world.jobs() == [(FIRST, [SECOND])]
    (deadline,) = world.db.execute("SELECT deadline_tai FROM orchestration.job WHERE kind = %s", (PROCESS,))
    assert deadline[0] == NIGHT + 56 + world.site.config.prompt.deadline_s
    assert world.processed() == [(SECOND, "ok"), (FIRST, "ok")]
    (told,) = [m.fields for m in world.bus.replay(["Prompt.detectorProcessed"])]
    assert (told["obsId"], told["visit"], told["nAlerts"]) == (FIRST, ObsId.parse(FIRST).exposure_id, 3)


@pytest.mark.parametrize("canceled", [False, True])
def test_a_restart_while_one_of_two_is_held(world, canceled):
    service = world.start()
    world.announce()
    _run(service)
    world.read_out(FIRST, NIGHT + 39)
    world.arrive(FIRST)
    _run(service)
    assert world.jobs() == []
    # killed: nothing is closed; what waited is in no table
    again = world.start()
    assert again.state.awaiting() == {GROUP}
    if canceled:
        world.bus.publish("ScriptQueue.nextVisitCanceled", {"groupId": GROUP})
        _run(again)
        assert world.jobs() == [(FIRST, [])]
    else:
        world.read_out(SECOND, NIGHT + 56)
        world.arrive(SECOND)
        _run(again)
        assert world.jobs() == [(FIRST, [SECOND])]
        assert world.processed() == [(SECOND, "ok"), (FIRST, "ok")]


def test_the_second_never_comes_then_comes_too_late_also_across_restarts(world):
    service = world.start()
    world.announce()
    world.read_out(FIRST, NIGHT + 1)
    world.read_out(SECOND, NIGHT + 2)
    world.arrive(FIRST)
    _run(service)
    world.later(2000.0)
    _run(service)
    assert world.jobs() == [(FIRST, [])]
    row = service.store.get(f"{PROCESS}/{FIRST}/0")
    assert row["payload"]["note"] == "1 of 2 exposures came"
    assert row["deadline_tai"] > NIGHT + 2000
    assert world.processed()[:2] == [(SECOND, "Deadline"), (FIRST, "ok")]
    again = world.start()
    world.arrive(SECOND)
    _run(again)
    assert world.jobs() == [(FIRST, [])]
    assert world.processed()[-1] == (SECOND, "Deadline")


def test_a_pair_brought_hours_later_is_still_one(world):
    service = world.start()
    world.announce()
    _run(service)
    world.later(20000.0)
    _run(service)
    assert service.state.awaiting() == set()  # forgotten
    for obs_id in (FIRST, SECOND):
        world.arrive(obs_id, hop="at_base", message="mode catch-up")
        world.arrive(obs_id)
    _run(service)
    rows = world.db.query("SELECT payload FROM orchestration.job WHERE kind = 'prompt.missed'", ())
    assert [
        (r["payload"]["image"]["obs_id"], r["payload"]["snaps"][0]["obs_id"], r["payload"]["missed"])
        for r in rows
    ] == [(FIRST, SECOND, "CaughtUp")]


def test_a_pair_that_is_left_out_is_left_out_as_one_also_across_a_restart(world, monkeypatch):
    service = world.start()
    monkeypatch.setattr("cumbre.orchestration.prompt.is_sampled", lambda unit, part: False)
    service.manager.dispatcher.is_behind = True
    world.announce()
    world.arrive(FIRST)
    service._take_in(0.0)
    again = world.start()
    world.arrive(SECOND)
    _run(again)
    assert world.jobs() == []
    told = [(obs_id, outcome) for obs_id, outcome in world.processed() if outcome == "SampledOut"]
    assert told == [(SECOND, "SampledOut"), (FIRST, "SampledOut")]


def test_ledger_and_report_count_from_the_last_read_out_and_one_result_a_visit(world):
    service = world.start()
    world.announce()
    for number, obs_id in enumerate((FIRST, SECOND)):
        index = number + 1
        world.bus.publish("Camera.startIntegration", {
            "instrument": "DemoCam", "groupId": GROUP, "imageName": obs_id, "imageIndex": index,
            "imagesInSequence": 2, "imageType": "OBJECT", "exposureTime": 15.0,
            "timestampAcquisitionStart": NIGHT - 40 + 17 * number,
        })  # fmt: skip
        world.read_out(obs_id, NIGHT - 23 + 17 * number)
        world.arrive(obs_id)
    _run(service)
    ledger = LedgerService(site=world.site, bus=world.bus, db=world.db, clock=world.clock)
    while ledger.step(0.0):
        pass
    ledger.close()
    rows = world.db.query("SELECT obs_id, exposure_id, visit FROM ledger.image ORDER BY obs_id", ())
    number = ObsId.parse(FIRST).exposure_id
    assert [(r["obs_id"], r["visit"]) for r in rows] == [(FIRST, number), (SECOND, number)]
    told = world.db.query("SELECT min(hop_tai) AS tai FROM ledger.hop WHERE hop = 'processed'", ())
    (latency,) = latencies(world.db)
    assert (latency["obs_id"], latency["outcome"]) == (FIRST, "ok")
    assert latency["latency_s"] == pytest.approx(told[0]["tai"] - (NIGHT - 6))
    assert visits(world.db) == {"taken": 1, "of_several_exposures": 1}
    table = {row["hop"]: row for row in hop_table(world.db)}
    assert table["processed"]["count"] == 2
    assert table["processed"]["p98"] == pytest.approx(latency["latency_s"], abs=0.01)
