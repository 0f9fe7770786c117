"""Catch-Up Archiver: what the usual way left behind arrives, once, oldest first, and is summed up."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transfer_double import DETECTORS, hops, key_of, obs_id, running, until, write_image

from cumbre.archive.catch_up import CatchUpArchiver
from cumbre.archive.catch_up_way import Pace
from cumbre.archive.distributor import Distributor
from cumbre.archive.tape_writer import TapeWriter
from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.time import Clock
from cumbre.ledger import Ledger, LedgerService
from cumbre.stores.files import copy_verified, sha256_of
from cumbre.stores.postgres import Database

EAGER = "catch_up: {grace_s: 0, every_s: 0.1, connections: 1}\n"


@pytest.fixture
def site(tmp_path: Path, site: Site) -> Site:
    path = site.path("site.yaml")
    text = path.read_text()
    # Straight to the receivers: the simulated network is another test's matter.
    text = text.replace("latency_ms: 1, bandwidth_mbit_s: 10000", "latency_ms: 0")
    text = text.replace("latency_ms: 60, bandwidth_mbit_s: 1000", "latency_ms: 0")
    path.write_text(text + EAGER)
    return Site.load(path.parent)


def limited(site: Site, **settings: float) -> Site:
    config = site.config.model_copy(update={"catch_up": site.config.catch_up.model_copy(update=settings)})
    return Site(site.root, config)


class Night:
    """Both receivers, the ledger and the Catch-Up Archiver; no replicators."""

    def __init__(self, site: Site, bus: Bus, clock: Clock, db: Database) -> None:
        self.site, self.bus, self.clock, self.db = site, bus, clock, db
        self.ledger = Ledger(db)

    @contextlib.contextmanager
    def running(self, *more: Any) -> Iterator[None]:
        services = [
            LedgerService(site=self.site, bus=self.bus, db=Database(self.db.dsn)),
            Distributor(site=self.site, bus=self.bus, clock=self.clock, place="base"),
            Distributor(site=self.site, bus=self.bus, clock=self.clock, place="archive"),
            CatchUpArchiver(site=self.site, bus=self.bus, clock=self.clock, db=Database(self.db.dsn)),
        ]
        with running(*services, *more):
            yield

    def at(self, place: str) -> set[tuple[str, int]]:
        return {(hop["obsId"], hop["detector"]) for hop in hops(self.bus, f"at_{place}")}

    def sent(self) -> list[tuple[int, str]]:
        found = hops(self.bus, "transmitted")
        return [(hop["exposureId"] % 100000, hop["place"]) for hop in found]


@pytest.fixture
def night(site: Site, bus: Bus, clock: Clock, database: Database) -> Night:
    return Night(site, bus, clock, database)


def everything(*numbers: int) -> set[tuple[str, int]]:
    return {(obs_id(number), detector) for number in numbers for detector in range(4)}


def test_images_that_nobody_sent_arrive_at_both_places_tagged(night: Night) -> None:
    for number in (2, 1):
        write_image(night.site, night.bus, number)
    with night.running():
        until(lambda: night.at("archive") == everything(1, 2))
        until(lambda: len(hops(night.bus, "transmitted")) == 16)
        until(lambda: night.ledger.missing("archive") == [])
    for place in ("base", "archive"):
        for number in (1, 2):
            for name in DETECTORS:
                key = key_of(number, name)
                assert sha256_of(night.site.path(f"{place}/raw/{key}")) == sha256_of(
                    night.site.path(f"summit/raw/{key}")
                )
            sidecar = key_of(number).replace("_R00_S00.fits", "_expectedSensors.json")
            assert night.site.path(f"{place}/raw/{sidecar}").is_file()
    assert all(hop["message"].startswith("catch-up: sent to") for hop in hops(night.bus, "transmitted"))
    summit = [number for number, place in night.sent() if place == "summit"]
    assert summit == sorted(summit)  # oldest first on its one connection
    pools = {m.fields["pool"] for m in night.bus.replay(["Replicator.registration"])}
    assert "catch-up" in pools


def test_what_is_there_is_offered_and_never_sent_again(night: Night) -> None:
    paths = write_image(night.site, night.bus, 1)
    for path in paths:  # both places have it, and no event ever said so
        for place in ("base", "archive"):
            copy_verified(
                path, night.site.path(f"{place}/raw/{path.relative_to(night.site.path('summit/raw'))}")
            )
    before = {p: p.stat().st_mtime_ns for p in night.site.path("base/raw").rglob("*.fits")}
    with night.running():
        until(lambda: night.at("archive") == everything(1) and night.ledger.missing("archive") == [])
    assert night.sent() == []
    assert {p: p.stat().st_mtime_ns for p in night.site.path("base/raw").rglob("*.fits")} == before


def test_nothing_begins_while_the_entity_is_disabled(night: Night) -> None:
    night.bus.publish("CatchUpArchiver.detailedState", {"protocolState": "IDLE", "processing": "disabled"})
    write_image(night.site, night.bus, 1)
    with night.running():
        until(lambda: any(night.bus.replay(["Replicator.registration"])))
        until(lambda: len(night.ledger.missing("base")) == 4)
        time.sleep(0.5)
        assert night.at("base") == set()
        night.bus.publish("CatchUpArchiver.detailedState", {"protocolState": "IDLE", "processing": "enabled"})
        until(lambda: night.at("base") == everything(1))


def test_images_in_their_grace_or_with_a_live_job_are_left_alone(night: Night) -> None:
    night.db.execute("CREATE SCHEMA control")
    night.db.execute(
        "CREATE TABLE control.job (obs_id text, detectors text[], kind text, link text, ended_tai float8,"
        " deadline_tai float8)"
    )
    later = night.clock.now_tai_s() + 10_000
    night.db.execute(
        "INSERT INTO control.job VALUES (%s, %s, 'replicate', 'summit-base', NULL, %s)",
        (obs_id(1), ["R00_S00", "R00_S01"], later),
    )
    write_image(night.site, night.bus, 1)
    with night.running():
        until(lambda: night.at("base") == {(obs_id(1), 2), (obs_id(1), 3)})
        time.sleep(0.3)
        assert len(night.at("base")) == 2
        night.db.execute("UPDATE control.job SET ended_tai = 1")
        until(lambda: night.at("base") == everything(1))
    slow = Night(limited(night.site, grace_s=1e6), night.bus, night.clock, night.db)
    write_image(night.site, night.bus, 2)
    with slow.running():
        until(lambda: len(slow.ledger.missing("base")) == 4)
        time.sleep(0.3)
        assert night.at("base") == everything(1)


def test_damaged_raw_files_come_from_the_outage_buffer(night: Night) -> None:
    paths = write_image(night.site, night.bus, 1)
    good = sha256_of(paths[0])
    copy_verified(paths[0], night.site.path(f"summit/buffer/pair-1/data/{key_of(1)}"))
    paths[0].write_bytes(b"rot")
    with night.running():
        until(lambda: night.at("base") == everything(1))
    assert sha256_of(night.site.path(f"base/raw/{key_of(1)}")) == good


def in_camera(site: Site, number: int, detectors: Sequence[str]) -> Path:
    folder = site.path(f"summit/daq/{obs_id(number)}")
    folder.mkdir(parents=True)
    for name in detectors:
        np.save(folder / f"{name}.npy", np.zeros(3, np.uint16))
    info = {"obs_id": obs_id(number), "instrument": "DemoCam", "detectors": list(detectors)}
    (folder / "exposure.json").write_text(json.dumps(info))
    return folder


def test_an_image_without_a_good_copy_is_an_alarm(night: Night) -> None:
    paths = write_image(night.site, night.bus, 1)
    good = paths[1].read_bytes()
    paths[1].unlink()

    def alarm() -> dict[str, Any]:
        found = night.bus.latest("Storage.alarm", key="catch-up-summit-base-lost")
        return found.fields if found else {}

    with night.running():
        until(lambda: alarm().get("active") is True)
        assert (alarm()["severity"], alarm()["backlog"]) == (3, 1)
        assert key_of(1, "R00_S01") in alarm()["message"]
        paths[1].write_bytes(good)  # somebody found one
        until(lambda: alarm()["active"] is False and night.at("base") == everything(1))


def test_what_only_the_camera_has_is_written_again(night: Night) -> None:
    paths = write_image(night.site, night.bus, 1)
    in_camera(night.site, 1, DETECTORS)
    good = paths[1].read_bytes()
    paths[1].write_bytes(b"rot")
    asked = night.bus.subscribe(["Writer.recapture"], start="earliest")
    with night.running():
        until(lambda: len(night.at("base")) == 3)
        (order,) = asked.poll(5.0)
        assert order.fields == {"obsId": obs_id(1), "detectors": ["R00_S01"]}
        time.sleep(0.5)
        assert asked.poll(0.0) == []  # not once a scan
        paths[1].write_bytes(good)  # the writer did it
        until(lambda: night.at("base") == everything(1))


def test_a_sensor_with_garbage_is_not_tried_for_ever_and_hides_nothing(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger.owed, "__kwdefaults__", Ledger.owed.__kwdefaults__ | {"limit": 2})
    for number in (1, 2, 3):
        paths = write_image(night.site, night.bus, number, announce=number == 3)
        for detector in range(4):
            if number < 3:
                common = {
                    "obsId": obs_id(number), "instrument": "DemoCam", "exposureId": 2026112000000 + number,
                    "detector": detector, "detectorName": DETECTORS[detector], "hopTai": night.clock.now_tai_s(),
                }  # fmt: skip
                night.bus.publish("Image.hop", common | {"hop": "read_out", "place": "camera"})
                night.bus.publish(
                    "Image.hop", common | {"hop": "written", "place": "summit", "outcome": "BadFile"}
                )
                paths[detector].unlink()
    asked = night.bus.subscribe(["Writer.recapture"], start="earliest")
    with night.running():
        until(lambda: night.at("base") == everything(3))
    assert asked.poll(0.0) == []


def test_an_image_of_the_camera_store_that_no_event_names(night: Night) -> None:
    folder = in_camera(night.site, 7, DETECTORS[:1])
    os.utime(folder, (time.time() - 1000, time.time() - 1000))
    asked = night.bus.subscribe(["Writer.recapture"], start="earliest")
    with night.running():
        found = []
        until(lambda: bool(found.extend(asked.poll(0.05)) or found))
    assert found[0].fields["obsId"] == obs_id(7)


def test_raw_files_that_no_event_names(night: Night) -> None:
    for path in write_image(night.site, night.bus, 1, announce=False):
        os.utime(path, (time.time() - 1000, time.time() - 1000))
    with night.running():
        until(lambda: night.at("archive") == everything(1))


def test_the_base_tape_feeds_the_archive_when_the_cache_is_gone(night: Night) -> None:
    write_image(night.site, night.bus, 1)
    night.bus.publish("CatchUpArchiver.detailedState", {"protocolState": "IDLE", "processing": "enabled"})
    slow = Night(limited(night.site, grace_s=1e6), night.bus, night.clock, night.db)
    tape = TapeWriter(site=night.site, bus=night.bus, clock=night.clock, place="base")
    for path in night.site.path("summit/raw").rglob("*.*"):
        copy_verified(path, night.site.path("base/raw") / path.relative_to(night.site.path("summit/raw")))
    with slow.running(tape):
        until(lambda: len(hops(night.bus, "base_tape")) == 4 and night.at("base") == everything(1))
        until(lambda: night.ledger.missing("base") == [])
    shutil.rmtree(night.site.path("base/raw"))
    night.site.path("base/raw").mkdir()
    with night.running():
        until(lambda: night.at("archive") == everything(1))
    found = {hop["message"] for hop in hops(night.bus, "transmitted")}
    assert found == {"catch-up: sent to archive from tape"}
    assert not [p for p in night.site.path("base/catch-up").rglob("*") if p.is_file()]


def test_a_night_is_summed_up_in_an_event_and_a_file(night: Night) -> None:
    write_image(night.site, night.bus, 1)
    write_image(night.site, night.bus, 2)
    night.site.path(f"summit/raw/{key_of(2)}").unlink()
    with night.running():
        until(lambda: len(night.at("archive")) == 7)

        def last() -> dict[str, Any]:
            message = night.bus.latest("Storage.nightSummary", key="20261120")
            return message.fields if message else {}

        until(lambda: last().get("atArchive") == 7 and last().get("resent") == 7)
    told = last()
    assert told["dayObs"] == 20261120
    assert (told["expected"], told["written"], told["atBase"], told["missing"]) == (8, 8, 7, 1)
    assert told["complete"] is False
    assert json.loads(night.site.path("report/archive-20261120.json").read_text())["missing"] == 1


def test_the_bandwidth_cap_holds_for_all_connections_together() -> None:
    pace = Pace(1e6)
    waits = [pace.reserve(500_000) for _ in range(5)]
    assert waits == pytest.approx([0, 0.5, 1.0, 1.5, 2.0], abs=0.05)
    assert Pace(None).reserve(10**12) == 0
