"""Consumers of the alert stream: each has its own place, none waits for another, and processing waits for none."""

from __future__ import annotations

import pytest

from cumbre.alerts.packet import HEAVY, decode_packet, packet_bytes
from cumbre.alerts.relay import LITE, TOPIC, OutboxRelay
from cumbre.catalogs.level1 import Level1
from cumbre.core.configuration import Site, parse_site
from cumbre.ledger import LedgerService

VISIT = 2026112000012
COUNT = 240
SITE = """
observatory: {latitude_deg: -30, longitude_deg: -70}
instruments: [democam]
places: {summit: {raw: summit/raw}}
"""


def packet(identifier: int) -> bytes:
    source = {"diaSourceId": identifier, "visit": VISIT, "detector": 3, "midpointMjdTai": 61364.1, "ra": 10.0,
              "dec": -20.0, "x": 1.5, "y": 2.5, "timeProcessedMjdTai": 61364.2, "psfNdata": 0, "trailNdata": 0,
              "dipoleNdata": 0, "bboxSize": 9, "psfFlux": 100.0 + identifier}  # fmt: skip
    past = [source | {"diaSourceId": identifier + 1000 * k} for k in range(1, 4)]
    record = {"diaSourceId": identifier, "diaSource": source, "prvDiaSources": past}
    return packet_bytes(record | dict.fromkeys(HEAVY[2:], bytes(6000)))


@pytest.fixture
def relay(place, tmp_path, database):
    site = Site(tmp_path, parse_site(SITE, "test"))
    bus = place("alerts")
    LedgerService(site=site, bus=bus, db=database).close()
    return OutboxRelay(site=site, bus=bus, db=database)


def drain(subscription, count: int, limit: int = 500) -> list[int]:
    """Read ``count`` messages; the stream says how many there are, the clock only when to give up."""
    out = []
    for _ in range(400):
        out += [
            message.key for message in subscription.poll(timeout_s=0.1, limit=min(limit, count - len(out)))
        ]
        if len(out) >= count:
            return [int(key) for key in out]
    raise AssertionError(f"{len(out)} of {count} came")


def test_consumers_are_independent_and_hold_nothing_up(relay, place, database):
    identifiers = list(range(1, COUNT + 1))
    level1 = Level1(database)
    level1.store(VISIT, 3, packets=[(i, packet(i)) for i in identifiers[: COUNT // 2]])
    names = ("community", "archive-copy", "slow")
    consumers = {name: place(name).subscribe([TOPIC], start="earliest", consumer=name) for name in names}
    # "slow" takes one alert and no more: the outbox empties all the same
    while relay.step(0):
        pass
    assert drain(consumers["slow"], 1) == [1]
    consumers["slow"].commit()
    assert drain(consumers["community"], COUNT // 2) == identifiers[: COUNT // 2]
    consumers["community"].commit()
    level1.store(VISIT, 4, packets=[(i, packet(i)) for i in identifiers[COUNT // 2 :]])
    while relay.step(0):
        pass
    assert database.execute("SELECT count(*) FROM level1.alert_outbox WHERE sent_tai IS NULL") == [(0,)]
    assert drain(consumers["community"], COUNT // 2) == identifiers[COUNT // 2 :]
    # one that dies in the middle goes on after what it committed, and moves nobody else's place
    assert drain(consumers["archive-copy"], 100) == identifiers[:100]
    consumers["archive-copy"].commit()
    assert drain(consumers["archive-copy"], 20) == identifiers[100:120]
    consumers["archive-copy"].close()
    again = place("archive-copy-2").subscribe([TOPIC], start="earliest", consumer="archive-copy")
    assert drain(again, COUNT - 100) == identifiers[100:]
    # the slow one finds every alert when it comes back
    assert drain(consumers["slow"], COUNT - 1, limit=7) == identifiers[1:]
    for subscription in (*consumers.values(), again):
        subscription.close()


def test_the_lite_stream_is_the_same_alerts_without_weight(relay, place, database):
    whole = [(i, packet(i)) for i in (5, 3, 9)]
    Level1(database).store(VISIT, 3, packets=[*whole, (11, b"not a packet")])
    full = place("full").subscribe([TOPIC], start="earliest", consumer="full")
    lite = place("lite").subscribe([LITE], start="earliest", consumer="lite")
    while relay.step(0):
        pass
    assert drain(full, 4) == [5, 3, 9, 11]
    got = []
    for _ in range(400):
        got += lite.poll(timeout_s=0.1)
        if len(got) >= 3:
            break
    assert [message.key for message in got] == ["5", "3", "9"]
    for message, (_, original) in zip(got, whole, strict=True):
        light, heavy = decode_packet(message.payload), decode_packet(original)
        assert all(light[name] is None for name in HEAVY)
        assert {k: v for k, v in light.items() if k not in HEAVY} == {
            k: v for k, v in heavy.items() if k not in HEAVY
        }
        assert len(message.payload) < len(original) / 10
    full.close()
    lite.close()
