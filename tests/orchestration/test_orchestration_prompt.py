"""Prompt processing: announced or not, with or without image, once, also across a restart."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cumbre.bus import open_bus
from cumbre.core.configuration import Site
from cumbre.core.time import Clock, parse_isot, tai_from_utc
from cumbre.observatory.visits import AnnouncedVisit
from cumbre.orchestration import prompt, prompt_jobs
from cumbre.orchestration.engine import InlineEngine
from cumbre.orchestration.prompt import PromptService
from cumbre.orchestration.prompt_state import (
    DetectorImage,
    DropPreload,
    GiveUp,
    Preload,
    Process,
    PromptState,
    ReadOut,
    Reject,
)

NIGHT = tai_from_utc(parse_isot("2026-11-21T02:00:00"))
DETECTORS = {"DemoCam": {0: "R00_S00", 1: "R00_S01"}}
GROUP = "2026-11-21T02:00:37.000"
VISIT = AnnouncedVisit(GROUP, "DemoCam", 10.0, -30.0, 0.0, "r_demo", NIGHT + 22, 30.0, 1, "a")


def _image(detector=0, obs="XC_O_20261120_000001", group=GROUP, instrument="DemoCam"):
    return DetectorImage(obs, instrument, 2026112000001, group, detector, "R00_S00", "/x.fits", NIGHT + 60)


@pytest.fixture
def state():
    return PromptState(DETECTORS, image_timeout_s=180.0, ignored={"DemoCam": frozenset({9})})


def test_a_visit_is_prepared_then_processed(state):
    made = state.announced(VISIT, NIGHT, NIGHT)
    assert made == [Preload(VISIT, 0, "R00_S00"), Preload(VISIT, 1, "R00_S01")]
    assert state.read_out(ReadOut(GROUP, "XC_O_20261120_000001", NIGHT + 54), NIGHT + 55) == []
    assert state.at_archive(_image(1), NIGHT + 60) == [Process(_image(1), VISIT, NIGHT + 54)]
    assert state.at_archive(_image(0), NIGHT + 61) == [Process(_image(0), VISIT, NIGHT + 54)]
    assert state.waiting == 0
    assert state.tick(NIGHT + 1000) == []


def test_messages_told_twice_act_once(state):
    assert state.announced(VISIT, NIGHT, NIGHT)
    assert state.announced(VISIT, NIGHT, NIGHT) == []
    assert state.at_archive(_image(), NIGHT + 60)
    assert state.at_archive(_image(), NIGHT + 61) == []


def test_image_without_visit_is_processed(state):
    assert state.at_archive(_image(), NIGHT) == [Process(_image(), None, 0.0)]
    # the announcement comes late: only what is still expected is prepared
    assert state.announced(VISIT, NIGHT, NIGHT + 1) == [Preload(VISIT, 1, "R00_S01")]


def test_visit_without_image_is_given_up_once(state):
    state.announced(VISIT, NIGHT, NIGHT)
    assert state.tick(NIGHT + 22 + 30 + 179) == []
    lost = state.tick(NIGHT + 22 + 30 + 181)
    assert [(type(item), item.detector) for item in lost] == [(GiveUp, 0), (GiveUp, 1)]
    assert "announced end" in lost[0].reason
    assert state.tick(NIGHT + 300) == []
    assert len(state.at_archive(_image(), NIGHT + 400)) == 1  # better late than never


def test_timeout_counts_from_the_read_out(state):
    state.announced(VISIT, NIGHT, NIGHT)
    state.read_out(ReadOut(GROUP, "o", NIGHT + 154), NIGHT + 155)
    assert state.tick(NIGHT + 334) == []
    assert len(state.tick(NIGHT + 336)) == 2


def test_cancelled_visit_is_not_waited_for(state):
    state.announced(VISIT, NIGHT, NIGHT)
    assert state.canceled(GROUP, NIGHT) == [DropPreload(GROUP, 0), DropPreload(GROUP, 1)]
    assert state.canceled("unknown", NIGHT) == []
    assert state.tick(NIGHT + 900) == []
    assert len(state.at_archive(_image(), NIGHT + 60)) == 1


def test_foreign_and_old_announcements_are_left_alone(state):
    other = AnnouncedVisit(GROUP, "OtherCam", 10.0, -30.0, 0.0, "r", NIGHT, 30.0, 1, "a")
    assert state.announced(other, NIGHT, NIGHT) == []
    assert state.announced(VISIT, NIGHT, NIGHT + 4000) == []


def test_unknown_camera_or_detector_is_rejected_and_guiders_ignored(state):
    (one,) = state.at_archive(_image(instrument="OtherCam"), NIGHT)
    (two,) = state.at_archive(_image(77), NIGHT)
    assert isinstance(one, Reject)
    assert "OtherCam" in one.reason
    assert isinstance(two, Reject)
    assert "77" in two.reason
    assert state.at_archive(_image(9), NIGHT) == []


events = st.lists(
    st.one_of(
        st.tuples(st.just("visit"), st.integers(0, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 3)),
        st.tuples(st.just("image"), st.integers(0, 3), st.integers(0, 1)),
        st.tuples(st.just("read"), st.integers(0, 3)),
        st.tuples(st.just("tick"), st.integers(1, 400)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(events)
def test_any_order_of_messages_processes_each_image_once(story):
    state, now = PromptState(DETECTORS, image_timeout_s=180.0), NIGHT
    processed, sent, given_up, prepared = [], set(), [], []
    for word, number, *rest in story:
        group = f"g{number}"
        made = []
        if word == "visit":
            visit = AnnouncedVisit(group, "DemoCam", 1.0, 2.0, 0.0, "r", now + 22, 30.0, 1, "a")
            made = state.announced(visit, now, now)
        elif word == "cancel":
            made = state.canceled(group, now)
        elif word == "image":
            sent.add((f"obs{number}", rest[0]))
            made = state.at_archive(_image(rest[0], f"obs{number}", group), now)
        elif word == "read":
            made = state.read_out(ReadOut(group, f"obs{number}", now), now)
        else:
            now += number
            made = state.tick(now)
        processed += [(i.image.obs_id, i.image.detector) for i in made if isinstance(i, Process)]
        given_up += [(i.visit.group_id, i.detector) for i in made if isinstance(i, GiveUp)]
        prepared += [(i.visit.group_id, i.detector) for i in made if isinstance(i, Preload)]
    assert sorted(processed) == sorted(sent)
    assert set(given_up) <= set(prepared)
    if max(now - NIGHT, 0) < 3600:
        assert len(given_up) == len(set(given_up))


# -- the service: real bus, real database, jobs in this process --


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_jobs, "WORKER", "support.prompt_jobs")
    text = {
        "observatory": {"latitude_deg": -30.24, "longitude_deg": -70.74},
        "instruments": ["democam"],
        "places": {"summit": {"raw": "summit/raw"}},
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(text))
    return Site.load(tmp_path)


@pytest.fixture
def bus(tmp_path):
    clock = Clock.starting_at(NIGHT, rate=6.0)
    with open_bus(f"sqlite:///{tmp_path}/bus.db", identity="prompt", clock=clock) as opened:
        subscribe, made = opened.subscribe, []
        opened.subscribe = lambda *a, **k: made.append(subscribe(*a, **k)) or made[-1]
        yield opened
        for subscription in made:
            subscription.close()


@pytest.fixture
def service(site, bus, database):
    return PromptService(site=site, bus=bus, clock=bus.clock, db=database, engine=InlineEngine())


def _announce(bus, group=GROUP):
    fields = {
        "groupId": group, "position": [10.0, -30.0], "instrument": "DemoCam", "filters": "r_demo",
        "startTime": bus.clock.now_tai_s() + 22, "duration": 30.0, "nimages": 1, "survey": "a",
    }  # fmt: skip
    bus.publish("ScriptQueue.nextVisit", fields)


def _arrive(bus, detector=0, name="x.fits", *, folder="/nowhere", obs="XC_O_20261120_000001", group=GROUP):
    bus.publish(
        "Image.hop",
        {
            "obsId": obs, "instrument": "DemoCam", "exposureId": 2026112000001, "groupId": group,
            "detector": detector, "detectorName": "R00_S00", "hop": "at_archive", "place": "archive",
            "path": f"{folder}/{name}", "hopTai": bus.clock.now_tai_s(),
        },
    )  # fmt: skip


def _run(service, n=30):
    for _ in range(n):
        service.step(0.0)


def _told(bus):
    return [m.fields for m in bus.replay(["Prompt.detectorProcessed"])]


def _hops(bus):
    hops = [m.fields for m in bus.replay(["Image.hop"]) if m.fields["hop"] != "at_archive"]
    return [(f["hop"], f["detector"], f["outcome"]) for f in hops]


def test_from_next_visit_to_alerts(service, bus):
    _announce(bus)
    _run(service)
    assert len(service.store.payloads(prompt.PRELOAD, 0)) == 4
    read_out = bus.clock.now_tai_s()
    bus.publish(
        "Camera.endReadout",
        {"groupId": GROUP, "imageName": "XC_O_20261120_000001", "timestampEndOfReadout": read_out},
    )
    for detector in range(4):
        _arrive(bus, detector)
    _run(service)
    told = _told(bus)
    assert sorted(f["detector"] for f in told) == [0, 1, 2, 3]
    assert {f["outcome"] for f in told} == {"ok"}
    assert all(f["nAlerts"] == 3 and 0 < f["latencyS"] < 60 for f in told)
    assert _hops(bus).count(("processed", 2, "ok")) == 1
    assert _hops(bus).count(("preloaded", 2, "ok")) == 1
    quality = [m.fields for m in bus.replay(["Prompt.visitQuality"])]
    assert len(quality) == 4
    assert quality[0]["seeing"] == 0.9


def test_outcome_words_reach_the_bus(service, bus, tmp_path):
    _arrive(bus, 0, "notemplate.fits")
    _arrive(bus, 1, "flaky.fits", folder=tmp_path)
    _run(service)
    told = {f["detector"]: f for f in _told(bus)}
    assert (told[0]["outcome"], told[0]["message"]) == ("NoWorkFound", "no template")
    assert told[1]["outcome"] == "ok"
    assert service.store.get("prompt.process/XC_O_20261120_000001/1")["attempts"] == 2


def test_no_image_is_told(site, bus, database):
    site.config.prompt.image_timeout_s = 0.001
    service = PromptService(site=site, bus=bus, clock=bus.clock, db=database, engine=InlineEngine())
    bus.publish(
        "ScriptQueue.nextVisit",
        {"groupId": GROUP, "position": [10.0, -30.0], "instrument": "DemoCam", "startTime": NIGHT - 100},
    )
    _run(service)
    assert {(f["outcome"], f["detector"]) for f in _told(bus)} == {("Deadline", d) for d in range(4)}


def test_nonsense_is_left_aside_and_the_night_goes_on(service, bus):
    bus.publish("ScriptQueue.nextVisit", {"groupId": "g", "position": [1.0], "instrument": "DemoCam"})
    bus.publish("ScriptQueue.nextVisit", {"groupId": "", "position": [1.0, 2.0], "instrument": ""})
    _arrive(bus, 55)
    _arrive(bus, 0)
    _run(service)
    assert [f["detector"] for f in _told(bus)] == [0]
    assert ("processed", 55, "UnprocessableData") in _hops(bus)


def test_a_killed_service_goes_on(service, site, bus, database):
    _announce(bus)
    _arrive(bus, 0)
    _arrive(bus, 1)
    # messages are taken in, jobs are in the table; killed before any ran
    service._take_in(0.0)
    assert _told(bus) == []
    again = PromptService(site=site, bus=bus, clock=bus.clock, db=database, engine=InlineEngine())
    assert again.state.waiting == 2
    _run(again)
    _arrive(bus, 2)
    _run(again)
    assert sorted(f["detector"] for f in _told(bus)) == [0, 1, 2]


def test_killed_between_recording_and_telling(service, site, bus, database, monkeypatch):
    _arrive(bus, 0)
    service._take_in(0.0)
    monkeypatch.setattr(service, "_report", lambda finished: None)
    _run(service, 3)
    assert _told(bus) == []
    PromptService(site=site, bus=bus, clock=bus.clock, db=database, engine=InlineEngine())
    assert [f["detector"] for f in _told(bus)] == [0]
