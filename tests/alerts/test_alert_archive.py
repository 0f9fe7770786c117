"""The archive of alerts: container files that a stranger's reader understands, packets by id, manifests."""

from __future__ import annotations

import fastavro
import pytest

from cumbre.alerts.archive import SETTLE_S, AlertArchive, AlertArchiveService, _long, rejections
from cumbre.alerts.packet import decode_packet, packet_bytes
from cumbre.catalogs.level1 import Level1
from cumbre.core.configuration import Site, parse_site
from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.core.time import Clock

VISIT = 2026112000012
NOW = 2e9


def packet(number: int) -> bytes:
    return packet_bytes(
        {
            "diaSourceId": number,
            "diaSource": {"diaSourceId": number, "visit": VISIT, "detector": 3, "midpointMjdTai": 61000.0,
                          "ra": 10.0 + number, "dec": -5.0, "x": 1.0, "y": 2.0, "timeProcessedMjdTai": 61000.1, "bboxSize": 31,
                          "dipoleNdata": 0, "psfNdata": 9, "trailNdata": 0},
            "cutoutScience": bytes(range(256)) * number,
        }
    )  # fmt: skip


@pytest.fixture
def clock():
    return Clock.starting_at(NOW, rate=1e-9)


@pytest.fixture
def level1(database, clock):
    return Level1(database, clock)


@pytest.fixture
def archive(database, level1, tmp_path, clock):
    return AlertArchive(database, tmp_path / "alerts", clock)


def send(database, visit=VISIT, at=NOW - SETTLE_S - 1):
    database.execute(
        "UPDATE level1.alert_outbox SET sent_tai = %s WHERE visit = %s AND sent_tai IS NULL", (at, visit)
    )
    database.execute(
        "UPDATE level1.visit_detector SET alerted_tai = %s WHERE visit = %s AND alerted_tai IS NULL",
        (at, visit),
    )


def records(path):
    with open(path, "rb") as stream:
        return list(fastavro.reader(stream))


def test_a_visit_is_archived_when_all_its_alerts_are_out(level1, archive, database):
    level1.store(VISIT, 3, packets=[(n, packet(n)) for n in (2, 1)])
    level1.store(VISIT, 4, packets=[(3, packet(3))])
    assert archive.due() == []
    database.execute("UPDATE level1.alert_outbox SET sent_tai = %s WHERE detector = 3", (NOW - 100,))
    assert archive.due() == []
    send(database, at=NOW)
    assert archive.due() == []  # a moment may still bring more
    database.execute("UPDATE level1.alert_outbox SET sent_tai = %s", (NOW - SETTLE_S - 1,))
    assert archive.due() == [VISIT]
    path = archive.archive(VISIT)
    assert [r["diaSourceId"] for r in records(path)] == [2, 1, 3]
    assert records(path)[2] == decode_packet(packet(3))
    assert archive.due() == []
    assert archive.archive(VISIT) is None


def test_packets_come_back_as_they_were_sent(level1, archive, database):
    sent = {n: packet(n) for n in range(1, 40)}
    level1.store(VISIT, 3, packets=list(sent.items()))
    assert archive.packet(7) == sent[7]  # from the outbox
    send(database)
    archive.archive(VISIT)
    database.execute("DELETE FROM level1.alert_outbox")
    assert {n: archive.packet(n) for n in sent} == sent
    with pytest.raises(NotFoundError, match="no alert 99"):
        archive.packet(99)


def test_a_late_detector_gets_a_further_part(level1, archive, database):
    level1.store(VISIT, 3, packets=[(1, packet(1))])
    send(database)
    first = archive.archive(VISIT)
    level1.store(VISIT, 4, packets=[(2, packet(2))])
    assert archive.due() == []
    send(database)
    assert archive.due() == [VISIT]
    second = archive.archive(VISIT)
    assert (first.name, second.name) == (f"{VISIT}.avro", f"{VISIT}_1.avro")
    assert [r["diaSourceId"] for r in records(second)] == [2]
    assert archive.packet(1) == packet(1)


def test_killed_before_the_database_knew_it_makes_the_same_file(level1, archive, database, monkeypatch):
    level1.store(VISIT, 3, packets=[(1, packet(1))])
    send(database)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(database, "copy", killed)
        with pytest.raises(KeyboardInterrupt):
            archive.archive(VISIT)
    assert archive.due() == [VISIT]
    path = next(archive._root.rglob("*.avro"))
    before = path.read_bytes()
    assert archive.archive(VISIT) == path
    assert path.read_bytes() == before
    assert archive.packet(1) == packet(1)


def test_a_lost_or_cut_file_is_named(level1, archive, database):
    level1.store(VISIT, 3, packets=[(1, packet(1))])
    send(database)
    path = archive.archive(VISIT)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadFileError, match=r"ends at .* expected"):
        archive.packet(1)
    path.unlink()
    with pytest.raises(BadFileError, match="No such file"):
        archive.packet(1)


def test_the_manifest_adds_up(level1, archive, database):
    level1.store(VISIT, 3, packets=[(1, packet(1))], rejected={"dipole": 2, "unreliable": 1})
    level1.store(VISIT, 4, rejected={"unreliable": 4})
    made = archive.manifest(VISIT)
    assert (made["detectors"], made["alerts_made"], made["alerts_sent"], made["complete"]) == (2, 1, 0, False)
    assert made["rejected"] == {"dipole": 2, "unreliable": 5}
    send(database)
    path = archive.archive(VISIT)
    made = archive.manifest(VISIT)
    assert (made["alerts_sent"], made["complete"], made["files"][0]["path"]) == (1, True, str(path))
    with pytest.raises(NotFoundError):
        archive.manifest(1)


def test_first_reason_that_applies():
    sources = [
        {"diaSourceId": 1, "reliability": 0.9},
        {"diaSourceId": 2, "reliability": 0.1, "isDipole": True},
        {"diaSourceId": 3, "reliability": 0.1, "isDipole": True, "pixelFlags_streakCenter": True},
        {"diaSourceId": 4, "reliability": 0.2},
        {"diaSourceId": 5, "reliability": None},
        {"diaSourceId": 6, "reliability": 0.9},
    ]
    assert rejections(sources, [1], 0.5) == {"dipole": 1, "streak": 1, "unreliable": 2, "other": 1}


@pytest.mark.parametrize("value", [0, 1, 63, 64, 127, 128, 8191, 8192, 10**12])
def test_long_is_avros(value):
    import io

    out = io.BytesIO()
    fastavro.schemaless_writer(out, "long", value)
    assert _long(value) == out.getvalue()


def test_the_service_waits_for_tables_and_archives(database, tmp_path, clock):
    site = Site(
        tmp_path,
        parse_site(
            "observatory: {latitude_deg: -30, longitude_deg: -70}\ninstruments: [democam]\n"
            "places: {summit: {raw: summit/raw}}\n",
            "test",
        ),
    )
    service = AlertArchiveService(site=site, bus=None, db=database, clock=clock)
    assert service.step(0) == 0
    Level1(database, clock).store(VISIT, 3, packets=[(1, packet(1))])
    send(database)
    assert service.step(0) == 1
    assert len(list((tmp_path / "archive/alerts").rglob("*.avro"))) == 1
    service.close()
