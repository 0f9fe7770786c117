"""The bus against its limits: messages a second, latency, and what waiting costs.

Run ``python benchmarks/bus.py``; it takes under 20 s and prints one table. The limits are what this machine's
SQLite does with the same bytes and nothing else, and a copy of them in memory. The Kafka rows are against
librdkafka's in-process mock brokers, so they tell what our side costs, not what a cluster does.
"""

from __future__ import annotations

import argparse
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cumbre.bus import Bus, open_bus

HOP = {
    "obsId": "XC_O_20261120_000012", "instrument": "DemoCam", "exposureId": 2026112000012, "detector": 4,
    "detectorName": "R00_S04", "hop": "at_archive", "place": "archive", "byteSize": 8_123_520,
    "path": "/site/archive/raw/DemoCam/20261120/XC_O_20261120_000012/XC_O_20261120_000012_R00_S04.fits",
    "checksum": "sha256:" + "0" * 64, "hopTai": 1_795_230_000.0,
}  # fmt: skip
TOPIC = "Image.hop"
BOX_S = 0.4
LIMIT_S = 17.0
LATENCY_HZ = 200
WRITE_S = 0.8

Row = tuple[str, float, tuple[float, ...], str]


def boxed(work: Callable[[], int], seconds: float = BOX_S) -> tuple[float, list[float]]:
    """Messages a second and the seconds of each call."""
    times, count, begun = [], 0, time.perf_counter()
    while (now := time.perf_counter()) - begun < seconds:
        count += work()
        times.append(time.perf_counter() - now)
    return count / (time.perf_counter() - begun), times


def percentiles(times: list[float]) -> tuple[float, ...]:
    return tuple(1e3 * np.percentile(times, [50, 98, 99])) if times else ()


def raw_sqlite(folder: Path, synchronous: str, text: str) -> Row:
    with sqlite3.connect(folder / f"raw-{synchronous}.db", isolation_level=None) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={synchronous}")
        db.execute("CREATE TABLE log (offset INTEGER PRIMARY KEY AUTOINCREMENT, fields TEXT)")

        def insert() -> int:
            db.execute("INSERT INTO log (fields) VALUES (?)", (text,))
            return 1

        rate, times = boxed(insert)
    db.close()
    return f"limit: bare SQLite insert, synchronous={synchronous}", rate, percentiles(times), ""


def memory_copy(text: str) -> Row:
    source = bytearray(text.encode())

    def copy() -> int:
        for _ in range(1000):
            bytes(source)
        return 1000

    rate, _ = boxed(copy, 0.3)
    return "limit: copy of the same bytes in memory", rate, (), f"{rate * len(source) / 1e9:.1f} GB/s"


def publishing(name: str, bus: Bus) -> Iterator[Row]:
    def sample() -> int:
        bus.publish("Service.heartbeat", {"name": "bench", "pid": 1})
        return 1

    bus.publish(TOPIC, HOP)

    def one() -> int:
        bus.publish(TOPIC, HOP)
        return 1

    def batch() -> int:
        return len(bus.publish_many([(TOPIC, HOP)] * 100))

    rate, times = boxed(one)
    yield f"{name}: publish an event", rate, percentiles(times), ""
    rate, times = boxed(sample)
    yield f"{name}: publish telemetry", rate, percentiles(times), ""
    rate, times = boxed(batch)
    yield f"{name}: publish_many of 100 events", rate, percentiles(times), "latency of the 100"
    begun = time.perf_counter()
    with bus.subscribe([TOPIC], start="earliest") as subscription:
        count = 0
        while time.perf_counter() - begun < BOX_S and (got := subscription.poll(0.5)):
            count += len(got)
    yield f"{name}: read", count / (time.perf_counter() - begun), (), ""


_WRITER = """
import sys, time
from cumbre.bus import open_bus
url, hertz, seconds = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
fields = eval(sys.argv[4])
bus = open_bus(url, identity="writer")
bus.publish("Service.heartbeat", {"name": "warm"})
count, begun = 0, time.monotonic()
while time.monotonic() - begun < seconds:
    # the clock of all processes of this machine, carried in hopTai
    fields["hopTai"] = time.monotonic()
    bus.publish("Image.hop", fields)
    count += 1
    if hertz:
        time.sleep(max(begun + count / hertz - time.monotonic(), 0))
print(count / (time.monotonic() - begun))
"""


def writer(url: str, hertz: float, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, url, str(hertz), str(seconds), repr(HOP)],
        stdout=subprocess.PIPE,
        text=True,
    )


def latency_between_processes(name: str, url: str, bus: Bus) -> Row:
    times: list[float] = []
    with bus.subscribe([TOPIC], start="now") as subscription:
        process = writer(url, LATENCY_HZ, WRITE_S)
        while process.poll() is None:
            got = subscription.poll(0.1)
            now = time.monotonic()
            times += [now - message.fields["hopTai"] for message in got]
        process.communicate()
    return (
        f"{name}: from another process, {LATENCY_HZ} Hz",
        len(times) / WRITE_S,
        percentiles(times),
        "publish to poll",
    )


def several_writers(name: str, url: str, count: int) -> Row:
    processes = [writer(url, 0, WRITE_S) for _ in range(count)]
    total = sum(float(process.communicate()[0]) for process in processes)
    return f"{name}: {count} processes publish at once", total, (), f"{os.cpu_count()} cores"


def waiting(name: str, bus: Bus, seconds: float = 0.8) -> Row:
    readers = [bus.subscribe([TOPIC], start="now", consumer=f"idle{n}") for n in range(15)]
    threads = [threading.Thread(target=reader.poll, args=(seconds,)) for reader in readers]
    before = resource.getrusage(resource.RUSAGE_SELF)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    for reader in readers:
        reader.close()
    return f"{name}: 15 readers wait, nothing comes", 0.0, (), f"{100 * used / seconds:.1f} % of one core"


@contextmanager
def mock_kafka() -> Iterator[str]:
    from confluent_kafka import Producer

    host = Producer({"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0})
    servers = ",".join(f"{b.host}:{b.port}" for b in host.list_topics(timeout=10).brokers.values())
    yield f"kafka://{servers}?prefix=bench&create=no&fetch.wait.max.ms=5"
    del host


def measure() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = str(HOP)
        yield memory_copy(text)
        for synchronous in ("NORMAL", "FULL"):
            yield raw_sqlite(folder, synchronous, text)
        url = f"sqlite://{folder}/bus.db"
        with open_bus(url, identity="bench") as bus:
            yield from publishing("embedded", bus)
            yield latency_between_processes("embedded", url, bus)
            yield several_writers("embedded", url, 4)
            yield waiting("embedded", bus)
        with mock_kafka() as url, open_bus(url, identity="bench") as bus:
            yield from publishing("Kafka (mock)", bus)
            yield latency_between_processes("Kafka (mock)", url, bus)
            yield waiting("Kafka (mock)", bus)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    begun = time.perf_counter()
    print(f"{'':48} {'messages/s':>11} {'p50 ms':>8} {'p98 ms':>8} {'p99 ms':>8}")
    for name, rate, latency, note in measure():
        shown = "".join(f" {value:8.3f}" for value in latency) or " " * 27
        print(f"{name:48} {f'{rate:,.0f}' if rate else '':>11}{shown}  {note}", flush=True)
        if time.perf_counter() - begun > LIMIT_S:
            print(f"stopped after {LIMIT_S:g} s: the machine is busy, what would follow was not measured")
            break
    print(f"load {os.getloadavg()[0]:.1f}, {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main()
