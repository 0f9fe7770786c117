"""What only the embedded log does."""

import resource
import sqlite3
import threading
import time

import pytest

from cumbre.bus import default_topics, open_bus
from cumbre.core.errors import FatalError, TransientError


def test_batch_is_all_or_nothing(tmp_path):
    with open_bus(f"sqlite://{tmp_path}/bus.db", identity="a") as bus:
        bus.publish("Image.hop", {"exposureId": 1})
        # a disk that is full in the middle of a batch, as SQLite reports it
        with sqlite3.connect(tmp_path / "bus.db") as db:
            db.execute(
                "CREATE TRIGGER full BEFORE INSERT ON log WHEN new.seq_num % 3 = 0"
                " BEGIN SELECT raise(ABORT, 'full'); END"
            )
        db.close()
        with pytest.raises((TransientError, FatalError)):
            bus.publish_many([("Image.hop", {"exposureId": n}) for n in range(3)])
        assert [m.fields["exposureId"] for m in bus.replay()] == [1]


def test_a_file_that_is_no_log_is_named(tmp_path):
    (tmp_path / "bus.db").write_bytes(b"not a database" * 100)
    with pytest.raises(FatalError, match=r"bus\.db: .*not a database"):
        open_bus(f"sqlite://{tmp_path}/bus.db", identity="a")


def test_events_wait_for_the_disk_and_telemetry_does_not(tmp_path):
    with open_bus(f"sqlite://{tmp_path}/bus.db", identity="a") as bus:
        for topic, level in (("Image.hop", 2), ("Service.heartbeat", 1), ("Camera.takeImages", 2)):
            bus.publish(topic, {})
            assert bus._db.execute("PRAGMA synchronous").fetchone() == (level,)


def test_offsets_are_never_given_twice(tmp_path):
    with open_bus(f"sqlite://{tmp_path}/bus.db", identity="a") as bus:
        subscription = bus.subscribe(["Service.heartbeat"], start="now")
        first = bus.publish("Service.heartbeat", {})
        assert len(subscription.poll(5)) == 1
        assert bus.prune(1e12) == 1
        second = bus.publish("Service.heartbeat", {})
        assert second > first
        assert [m.offset for m in subscription.poll(5)] == [second]


def test_topics_unknown_here_are_skipped_and_counted(tmp_path):
    with open_bus(f"sqlite://{tmp_path}/bus.db", identity="a") as bus:
        bus.publish("Image.hop", {})
        bus.publish("Service.heartbeat", {})
        few = type(default_topics())([default_topics()["Image.hop"]])
        with open_bus(f"sqlite://{tmp_path}/bus.db", identity="b", topics=few) as other:
            assert [m.topic for m in other.replay()] == ["Image.hop"]
            assert other.unknown_fields == {("Service.heartbeat", ""): 1}


def test_waiting_costs_little(tmp_path):
    with open_bus(f"sqlite://{tmp_path}/bus.db", identity="a") as bus:
        readers = [bus.subscribe(["Image.hop"], start="now") for _ in range(15)]
        threads = [threading.Thread(target=reader.poll, args=(0.6,)) for reader in readers]
        before, begun = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after, took = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - begun
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert used / took < 0.25  # 15 readers, one core; 0.04 when measured


def test_abandoned_subscriptions_are_closed(tmp_path):
    with open_bus(f"sqlite://{tmp_path}/bus.db", identity="a") as bus:
        for _ in range(50):
            bus.subscribe(["Image.hop"])
        assert len(bus._readers) <= 1
