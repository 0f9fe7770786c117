from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cumbre.alerts.relay import OutboxRelay
from cumbre.bus import Bus, open_bus
from cumbre.catalogs.level1 import Level1
from cumbre.core.configuration import Site, parse_site
from cumbre.core.time import Clock
from cumbre.ledger import Ledger, LedgerService
from cumbre.stores.postgres import Database

OBS, VISIT = "XC_O_20261120_000012", 2026112000012
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


def published(bus: Bus) -> list[tuple[str, bytes]]:
    return [(message.key, message.payload) for message in bus.replay(["Alerts.packet"])]


def know_image(bus: Bus, site: Site, database: Database) -> LedgerService:
    hop = {
        "obsId": OBS,
        "instrument": "DemoCam",
        "exposureId": VISIT,
        "detector": 3,
        "detectorName": "R00_S03",
    }
    bus.publish("Image.hop", hop | {"hop": "processed", "hopTai": 2e9})
    ledger = LedgerService(site=site, bus=bus, db=database)
    ledger.step(0)
    return ledger


def test_both_exposures_of_a_visit_are_alerted_when_the_ledger_knows_them(
    bus: Bus, site: Site, database: Database
) -> None:
    second = "XC_O_20261120_000013"
    ledger = LedgerService(site=site, bus=bus, db=database)
    for index, obs_id in ((1, OBS), (2, second)):
        sequence = {"imageIndex": index, "imagesInSequence": 2, "groupId": "g", "instrument": "DemoCam"}
        bus.publish(
            "Camera.endReadout", sequence | {"imageName": obs_id, "detectors": ["R00_S00", "R00_S01"]}
        )
    ledger.step(0)
    level1 = Level1(database)
    for detector in (0, 1):
        level1.store(VISIT, detector, packets=[(detector + 1, b"x")])
    relay = OutboxRelay(site=site, bus=bus, db=database)
    while relay.step(0):
        pass
    assert len(published(bus)) == 2
    assert "alerted" not in {row["hop"] for row in Ledger(database).where(OBS)}, (
        "which were used is not known yet"
    )
    # of the second detector the second exposure came too late
    for obs_id, detector, outcome in (
        (second, 0, "ok"),
        (OBS, 0, "ok"),
        (second, 1, "Deadline"),
        (OBS, 1, "ok"),
    ):
        hop = {
            "obsId": obs_id,
            "instrument": "DemoCam",
            "detector": detector,
            "hop": "processed",
            "hopTai": 2e9,
        }
        bus.publish("Image.hop", hop | {"outcome": outcome})
    ledger.step(0)
    while relay.step(0):
        pass
    ledger.step(0)
    alerted = {
        obs_id: {row["detector"] for row in Ledger(database).where(obs_id) if row["hop"] == "alerted"}
        for obs_id in (OBS, second)
    }
    assert alerted == {OBS: {0, 1}, second: {0}}
    ledger.close()


def test_packets_leave_in_order_and_the_ledger_hears_of_it(bus: Bus, site: Site, database: Database) -> None:
    relay = OutboxRelay(site=site, bus=bus, db=database)
    assert relay.step(0) == 0  # no tables yet
    ledger = know_image(bus, site, database)
    level1 = Level1(database)
    packets = [(i, bytes([i])) for i in (9, 3, 7)]
    level1.store(VISIT, 3, packets=packets)
    level1.store(VISIT, 4, packets=[(11, b"last")])
    level1.store(VISIT, 5)  # nothing found there, which is news too
    while relay.step(0):
        pass
    assert published(bus) == [*((str(i), content) for i, content in packets), ("11", b"last")]
    assert database.execute("SELECT count(*) FROM level1.alert_outbox WHERE sent_tai IS NULL") == [(0,)]
    ledger.step(0)
    rows = [row for row in Ledger(database).where(OBS) if row["hop"] == "alerted"]
    assert [(row["detector"], row["message"]) for row in rows] == [
        (3, "3 alerts"),
        (4, "1 alerts"),
        (5, "0 alerts"),
    ]
    assert rows[0]["detector_name"] == "R00_S03"
    ledger.close()


def test_killed_between_bus_and_database_it_sends_again(
    bus: Bus, site: Site, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    know_image(bus, site, database).close()
    Level1(database).store(VISIT, 3, packets=[(1, b"a"), (2, b"b")])
    relay = OutboxRelay(site=site, bus=bus, db=database)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(database, "execute", killed)
        patch.setattr(relay, "_ready", True)
        with pytest.raises(KeyboardInterrupt):
            relay.step(0)
    assert len(published(bus)) == 2
    second = OutboxRelay(site=site, bus=bus, db=database)
    while second.step(0):
        pass
    assert dict(published(bus)) == {"1": b"a", "2": b"b"}  # each at least once
    assert database.execute("SELECT count(*) FROM level1.alert_outbox WHERE sent_tai IS NULL") == [(0,)]


def test_alerts_do_not_wait_for_the_ledger(bus: Bus, site: Site, database: Database) -> None:
    LedgerService(site=site, bus=bus, db=database).close()
    Level1(database).store(VISIT, 3, packets=[(1, b"a")])
    relay = OutboxRelay(site=site, bus=bus, db=database)
    assert relay.step(0) == 1
    assert relay.step(0) == 0  # the hop waits until the ledger knows the image
    know_image(bus, site, database).close()
    assert relay.step(0) == 1
