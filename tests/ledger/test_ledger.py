from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cumbre.bus import Bus, open_bus
from cumbre.core.configuration import Site, parse_site
from cumbre.core.errors import NotFoundError, TransientError
from cumbre.core.time import Clock
from cumbre.ledger import Ledger, LedgerService
from cumbre.stores.postgres import Database

OBS = "XC_O_20261120_000012"
A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
SITE = """
observatory: {latitude_deg: -30, longitude_deg: -70}
instruments: [democam]
places: {summit: {raw: summit/raw}}
"""


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    with open_bus(
        f"sqlite://{tmp_path}/bus.db", identity="test", clock=Clock.starting_at(2e9, rate=1)
    ) as opened:
        yield opened


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, parse_site(SITE, "test"))


@pytest.fixture
def service(site: Site, bus: Bus, database: Database) -> Iterator[LedgerService]:
    opened = LedgerService(site=site, bus=bus, db=database)
    yield opened
    opened.close()


@pytest.fixture
def ledger(database: Database) -> Ledger:
    return Ledger(database)


def hop(bus: Bus, name: str, tai: float, **changes: Any) -> None:
    fields = {
        "obsId": OBS, "instrument": "DemoCam", "exposureId": 2026112000012, "groupId": "g", "detector": 0,
        "detectorName": "R00_S00", "hop": name, "place": "base", "checksum": A, "hopTai": tai, "byteSize": 10,
    }  # fmt: skip
    bus.publish("Image.hop", fields | changes)


def take_image(bus: Bus, detectors: list[str]) -> None:
    common = {
        "instrument": "DemoCam", "imageName": OBS, "groupId": "g", "timestampAcquisitionStart": 1000.0,
        "additionalKeys": ["filter", "ra", "dec", "program"], "additionalValues": ["r", "150.1", "0", "deep"],
    }  # fmt: skip
    bus.publish("Camera.startIntegration", common | {"exposureTime": 30.0, "imageType": "OBJECT"})
    bus.publish(
        "Camera.endReadout",
        common | {"requestedExposureTime": 30.0, "timestampEndOfReadout": 1033.0, "detectors": detectors},
    )
    bus.publish(
        "Camera.endOfImageTelemetry", common | {"timestampDateObs": 1000.5, "timestampDateEnd": 1030.5}
    )


def test_camera_events_make_the_image_and_its_first_hops(
    bus: Bus, service: LedgerService, ledger: Ledger, database: Database
) -> None:
    from cumbre.core.instrument import load_instrument

    instrument = load_instrument("democam")
    names = [detector.name for detector in instrument.detectors]
    take_image(bus, names)
    assert service.step(0) == 3
    image = ledger.image(OBS)
    assert (image["day_obs"], image["seq_num"], image["exposure_id"]) == (20261120, 12, 2026112000012)
    assert (image["exposure_s"], image["image_type"], image["ra"], image["dec"]) == (
        30.0,
        "OBJECT",
        150.1,
        0.0,
    )
    assert (image["begin_tai"], image["end_tai"]) == (1000.5, 1030.5)
    assert image["expected_detectors"] == len(names)
    read = [row for row in ledger.where(OBS) if row["hop"] == "read_out" and row["detector"] >= 0]
    assert {row["detector"] for row in read} == {detector.id for detector in instrument.detectors}
    assert {row["latency_s"] for row in ledger.latencies("exposed", "read_out")} == {33.0}
    assert len(ledger.missing("archive")) == len(names)
    assert ledger.summary()[0]["read_out"] == len(names)
    assert ledger.summary(20200101) == []


def test_replays_change_nothing(
    bus: Bus, site: Site, service: LedgerService, ledger: Ledger, database: Database
) -> None:
    hop(bus, "written", 1000.0, place="summit")
    hop(bus, "at_base", 1001.0, outcome="Transient", message="link down")
    hop(bus, "at_base", 1002.0, attempt=2)
    service.step(0)
    before, history = ledger.where(OBS), ledger.history(OBS)
    again = bus.replay(["Image.hop"])
    for message in list(again):  # the same events a second time, as after a kill before the commit
        bus.publish("Image.hop", message.fields)
    service.step(0)
    drop = "recv_tai"
    assert [{**row, drop: 0} for row in ledger.where(OBS)] == [{**row, drop: 0} for row in before]
    assert ledger.history(OBS) == history
    assert [(row["outcome"], row["attempt"]) for row in history if row["hop"] == "at_base"] == [
        ("Transient", 1),
        ("ok", 2),
    ]


def test_an_old_report_does_not_undo_a_newer_one(bus: Bus, service: LedgerService, ledger: Ledger) -> None:
    hop(bus, "at_base", 1002.0)
    hop(bus, "at_base", 1001.0, outcome="Transient")
    service.step(0)
    assert [row["outcome"] for row in ledger.where(OBS)] == ["ok"]


def test_ledger_goes_on_where_it_was(
    bus: Bus, site: Site, service: LedgerService, ledger: Ledger, database: Database
) -> None:
    hop(bus, "written", 1000.0, place="summit")
    assert service.step(0) == 1
    service.close()
    hop(bus, "at_base", 1001.0)
    second = LedgerService(site=site, bus=bus, db=database)
    assert second.step(0) == 1
    assert [row["hop"] for row in ledger.where(OBS)] == ["written", "at_base"]
    second.close()


def test_bad_messages_are_set_aside_and_counted(
    bus: Bus, service: LedgerService, ledger: Ledger, database: Database
) -> None:
    hop(bus, "written", 1000.0, obsId="")
    hop(bus, "written", float("nan"))
    hop(bus, "written", 1000.0, attempt=2**31 - 1, byteSize=2**62, message="nul \0 inside")
    bus.publish("Camera.endReadout", {"instrument": "nobody", "imageName": OBS, "detectors": ["x"]})
    hop(bus, "at_base", 1001.0)
    assert service.step(0) == 5
    assert service.outcomes == {"ok": 2, "quarantined": 3}
    assert database.execute("SELECT count(*), min(outcome) FROM ledger.bad_message") == [(3, "quarantined")]
    assert [row["hop"] for row in ledger.where(OBS)] == ["written", "at_base"]


def test_a_batch_survives_a_database_outage(bus: Bus, service: LedgerService, ledger: Ledger) -> None:
    hop(bus, "written", 1000.0)
    good = service._db.dsn
    service._db.close()
    service._db.dsn = "postgresql://x@127.0.0.1:1/x"
    with pytest.raises(TransientError):
        service.step(0)
    service._db.dsn = good
    assert service.step(0) == 1
    assert len(ledger.where(OBS)) == 1


def test_deletion_needs_proof_at_every_place(bus: Bus, service: LedgerService, ledger: Ledger) -> None:
    policy = ["base", "archive", "archive_tape"]

    def allowed() -> bool:
        service.step(0)
        return ledger.may_delete(OBS, 0, policy)

    assert not allowed()
    hop(bus, "written", 1000.0, place="summit")
    hop(bus, "at_base", 1001.0)
    hop(bus, "at_archive", 1002.0, place="archive")
    hop(bus, "archive_tape", 1003.0, place="archive-tape", outcome="Transient")
    assert not allowed()
    hop(bus, "archive_tape", 1004.0, place="archive-tape")
    assert allowed()
    assert not ledger.may_delete(OBS, 1, policy)
    assert not ledger.may_delete(OBS, 0, [])

    hop(bus, "at_archive", 1005.0, place="archive", outcome="BadFile")  # re-verified, found damaged
    assert not allowed()
    hop(bus, "at_archive", 1006.0, place="archive")
    assert allowed()
    hop(bus, "quarantined", 1007.0, outcome="BadFile")  # at base
    assert not allowed()
    hop(bus, "at_base", 1008.0)
    assert allowed()
    hop(bus, "deleted", 1009.0)  # by retention
    assert not allowed()


def test_copies_with_other_checksums_are_no_copies(bus: Bus, service: LedgerService, ledger: Ledger) -> None:
    hop(bus, "written", 1000.0, place="summit")
    hop(bus, "at_base", 1001.0, checksum=B)
    hop(bus, "at_archive", 1002.0, checksum=B, place="archive")
    hop(bus, "processed", 1003.0, checksum="", place="archive")
    service.step(0)
    assert not ledger.may_delete(OBS, 0, ["base", "archive"])
    hop(bus, "written", 1004.0, place="summit", checksum=B.upper().replace("SHA256", "sha256"))
    service.step(0)
    assert ledger.may_delete(OBS, 0, ["base", "archive"])


def test_a_copy_with_other_bytes_is_still_owed(bus: Bus, service: LedgerService, ledger: Ledger) -> None:
    def owed() -> list[str]:
        service.step(0)
        return [row["detector_name"] for row in ledger.owed("base", "archive", before_tai=2000.0)]

    take_image(bus, ["R00_S00"])
    hop(bus, "written", 1040.0, place="summit")
    hop(bus, "at_base", 1041.0)
    assert owed() == ["R00_S00"]
    hop(bus, "archive_tape", 1042.0, place="archive", checksum=B)  # the file had rotted before it was sent
    hop(bus, "at_archive", 1043.0, place="archive", checksum=B)
    assert owed() == ["R00_S00"]
    hop(bus, "at_archive", 1044.0, place="archive")
    assert owed() == []


def test_why_speaks_to_people(bus: Bus, service: LedgerService, ledger: Ledger) -> None:
    take_image(bus, ["R00_S00", "R00_S01"])
    hop(bus, "written", 1040.0, place="summit")
    hop(bus, "at_base", 1100.0, outcome="BadFile", message="checksum differs", attempt=3)
    service.step(0)
    first, second = ledger.why(OBS)
    assert "written at the summit, 60 s ago" in first
    assert "at_base failed at base (BadFile, attempt 3, 0 s ago): checksum differs" in first
    assert "read out of the camera, 67 s ago" in second
    with pytest.raises(NotFoundError, match="not in the ledger"):
        ledger.why("XC_O_20261120_000099")


def test_status_and_missing_tell_the_last_hop(
    bus: Bus, service: LedgerService, ledger: Ledger, database: Database
) -> None:
    hop(bus, "written", 1000.0, place="summit")
    hop(bus, "at_base", 1001.0)
    hop(bus, "quarantined", 1002.0, outcome="BadFile", place="archive", message="truncated")
    service.step(0)
    (row,) = database.query("SELECT * FROM ledger.status")
    assert (row["last_hop"], row["hops_ok"], row["failures"]) == ("at_base", ["written", "at_base"], 1)
    assert [(m["obs_id"], m["detector"], m["last_hop"]) for m in ledger.missing("archive")] == [
        (OBS, 0, "at_base")
    ]
    assert ledger.missing("base") == []
