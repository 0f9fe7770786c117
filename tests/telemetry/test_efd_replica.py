"""The EFD's replica: every message once, in order, whatever dies; led by its entity."""

from __future__ import annotations

import json
import os

import pytest

from cumbre.bus import open_bus
from cumbre.core.configuration import Site, SiteConfig
from cumbre.core.errors import BadFileError
from cumbre.core.time import Clock
from cumbre.telemetry.efd_replica import EfdReplicatorService, read_efd, verify_efd

DAY = 2.0e9 - 2.0e9 % 86400 + 43200 + 37  # 12:00 UTC: a day_obs begins


def make(tmp_path, *, start=DAY + 3600.0, control=True):
    config = SiteConfig.model_validate(
        {
            "observatory": {"latitude_deg": -30, "longitude_deg": -70},
            "instruments": ["democam"],
            "places": {"archive": {"raw": "archive/raw"}},
            "archive": {"control": control},
        }
    )
    site = Site(tmp_path, config)
    clock = Clock.starting_at(start, rate=1.0)
    bus = open_bus(f"sqlite:///{tmp_path}/bus.db", identity="test", clock=clock)
    return site, clock, bus


def service(world):
    site, clock, bus = world
    return EfdReplicatorService(site=site, bus=bus, clock=clock)


def publish(bus, numbers):
    for number in numbers:
        bus.publish("Service.heartbeat", {"name": f"n{number}", "pid": number})


def names(site):
    return [m["fields"]["name"] for m in read_efd(site.path("archive/efd"), topics={"Service.heartbeat"})]


def drain(replicator):
    while replicator.step(0.0):
        pass


def test_every_message_is_there_once_and_in_order(tmp_path):
    site, _, bus = world = make(tmp_path)
    publish(bus, range(3))
    bus.publish("Environment.weather" if "Environment.weather" in bus.topics else "Prompt.visitQuality", {})
    replicator = service(world)
    drain(replicator)
    publish(bus, range(3, 6))
    drain(replicator)
    assert names(site) == [f"n{i}" for i in range(6)]
    assert verify_efd(site.path("archive/efd")) == replicator.copied >= 7
    (text,) = {path.read_text() for path in site.path("archive/efd").glob("*[0-9].jsonl")}
    assert "NaN" not in text
    json.loads(text.splitlines()[0])


def test_it_goes_on_after_a_crash_at_each_place(tmp_path, monkeypatch):
    site, _, bus = world = make(tmp_path)
    publish(bus, range(2))
    drain(service(world))
    (data,) = site.path("archive/efd").glob("*[0-9].jsonl")
    index = data.with_name(data.name.replace(".jsonl", ".index.jsonl"))

    # died before the index line: the data behind the index are cut off and copied again
    publish(bus, [2])
    with data.open("ab") as stream:
        stream.write(b'{"topic":"Service.hea')
    with index.open("ab") as stream:
        stream.write(b'{"from":')
    drain(service(world))
    assert names(site) == ["n0", "n1", "n2"]

    # died after the index line, before the place on the bus was committed: not copied twice
    publish(bus, [3, 4])
    replicator = service(world)
    monkeypatch.setattr(replicator._subscription, "commit", lambda: None)
    replicator.step(0.0)
    publish(bus, [5])
    drain(service(world))
    assert names(site) == [f"n{i}" for i in range(6)]
    verify_efd(site.path("archive/efd"))


def test_a_changed_byte_and_a_missing_batch_are_seen(tmp_path):
    site, _, bus = world = make(tmp_path)
    replicator = service(world)
    for number in range(3):
        publish(bus, [number])
        drain(replicator)
    folder = site.path("archive/efd")
    (data,) = folder.glob("*[0-9].jsonl")
    index = data.with_name(data.name.replace(".jsonl", ".index.jsonl"))
    good, lines = data.read_bytes(), index.read_bytes().splitlines(keepends=True)
    data.write_bytes(good.replace(b'"n1"', b'"n9"'))
    with pytest.raises(BadFileError, match="are not what"):
        verify_efd(folder)
    data.write_bytes(good)
    index.write_bytes(b"".join(lines[:-2] + lines[-1:]))
    with pytest.raises(BadFileError, match="are not what"):
        verify_efd(folder)


def test_a_day_has_its_own_file(tmp_path):
    site, clock, bus = make(tmp_path, start=DAY - 1000.0)
    publish(bus, [0])
    later = Clock.starting_at(DAY + 1000.0, rate=1.0)
    publish(open_bus(f"sqlite:///{tmp_path}/bus.db", identity="test", clock=later), [1])
    drain(service((site, clock, bus)))
    days = sorted(path.name for path in site.path("archive/efd").glob("*[0-9].jsonl"))
    assert len(days) == 2
    assert names(site) == ["n0", "n1"]
    assert [m["fields"]["name"] for m in read_efd(
        site.path("archive/efd"), since_tai=DAY, until_tai=DAY + 5000.0, topics={"Service.heartbeat"}
    )] == ["n1"]  # fmt: skip


def test_the_entity_leads_it(tmp_path):
    site, _, bus = world = make(tmp_path)
    replicator = service(world)

    def said(processing, epoch):
        bus.publish("EfdReplicator.detailedState", {"processing": processing, "epoch": epoch})
        replicator._follower._next = 0.0
        publish(bus, [0])
        replicator.step(0.0)
        return len(names(site))

    assert said("disabled", 2) == 0
    assert said("enabled", 1) == 0, "a former control system's word does not count"
    assert said("enabled", 2) == 3
    assert said("draining", 3) == 3
    told = [m.fields for m in bus.replay(["EfdReplicator.replica"])]
    assert told[0]["reachable"]


def test_without_control_it_copies(tmp_path):
    site, _, bus = world = make(tmp_path, control=False)
    bus.publish("EfdReplicator.detailedState", {"processing": "disabled", "epoch": 1})
    publish(bus, [0])
    drain(service(world))
    assert names(site) == ["n0"]


def test_a_replica_that_cannot_be_written_is_told_and_nothing_is_lost(tmp_path):
    site, _, bus = world = make(tmp_path)
    replicator = service(world)
    drain(replicator)
    publish(bus, [0])
    folder = site.path("archive/efd")
    moved = folder.rename(folder.with_name("away"))
    folder.write_bytes(b"")  # a file where the folder should be: as a mount that is gone
    replicator._day = None
    with pytest.raises(OSError, match="efd"):
        replicator.step(0.0)
    told = [m.fields for m in bus.replay(["EfdReplicator.replica"])]
    assert not told[-1]["reachable"]
    assert told[-1]["message"]
    os.unlink(folder)
    moved.rename(folder)
    replicator.close()
    drain(service(world))
    assert names(site) == ["n0"]
