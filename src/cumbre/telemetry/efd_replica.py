"""The EFD's replica at the archive: every bus message, in append-only daily files with checksums.

``<day_obs>.jsonl`` has one message a line; ``<day_obs>.index.jsonl`` one line a batch: its bytes, its offsets on
the bus, its times, its sha256, and a chain over all of them, so that neither a changed byte nor a missing batch
goes unseen. The index line is written last: what stands behind it in the data file after a crash is cut off and
copied again. Alert packets (streams) are not telemetry and have their own archive.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from cumbre.bus import Bus, Message
from cumbre.core.configuration import Site
from cumbre.core.errors import BadFileError
from cumbre.core.time import Clock, day_obs_from_tai
from cumbre.observatory.control.following import Follower
from cumbre.stores.files import sync_folder

log = logging.getLogger(__name__)

FOLDER = "archive/efd"
BATCH = 2000
TELL_S = 1.0
IDLE_S = 0.2


def _line(message: Message) -> bytes:
    fields = {
        "topic": message.topic, "index": message.index, "key": message.key, "offset": message.offset,
        "snd_tai": message.snd_tai, "seq_num": message.seq_num, "identity": message.identity,
        "origin": message.origin, "fields": message.fields,
    }  # fmt: skip
    try:
        text = json.dumps(fields, separators=(",", ":"), allow_nan=False, default=bytes.hex)
    except ValueError:  # JSON has no NaN
        text = json.dumps(_finite(fields), separators=(",", ":"), default=bytes.hex)
    return text.encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


class EfdDay:
    """One day's file and its index.

    Raises
    ------
    BadFileError
        The data file is shorter than its index says.
    """

    def __init__(self, folder: Path, day_obs: int) -> None:
        self.path = folder / f"{day_obs}.jsonl"
        self.index_path = folder / f"{day_obs}.index.jsonl"
        self.batches: int = 0
        self.end, self.chain = 0, ""
        self.last: dict[str, int] = {}

    def open(self) -> None:
        """Cut off what a crash left behind the last whole batch."""
        good = 0
        if self.index_path.exists():
            with self.index_path.open("rb") as index:
                for line in index:
                    entry = _entry(line)
                    if entry is None:
                        break
                    good += len(line)
                    self.batches += 1
                    self.end, self.chain, self.last = entry["to"], entry["chain"], entry["last"]
            os.truncate(self.index_path, good)
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self.end:
            raise BadFileError(
                f"{self.path}: {size} bytes, its index says {self.end}; restore it from a copy of the replica"
            )
        if size > self.end:
            log.warning("%s: %d bytes of a batch that was not finished cut off", self.path, size - self.end)
            os.truncate(self.path, self.end)

    def append(self, messages: list[Message]) -> None:
        """Write a batch: data, then its index line, both on disk when this returns."""
        content = b"".join(map(_line, messages))
        digest = hashlib.sha256(content).hexdigest()
        chain = hashlib.sha256((self.chain + digest).encode()).hexdigest()
        entry: dict[str, Any] = {
            "from": self.end, "to": self.end + len(content), "messages": len(messages),
            "since_tai": min(m.snd_tai for m in messages), "until_tai": max(m.snd_tai for m in messages),
            "last": {m.topic: m.offset for m in messages}, "sha256": digest, "chain": chain,
        }  # fmt: skip
        new = self.batches == 0
        try:
            _append(self.path, content)
            _append(self.index_path, json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        except OSError:
            self.batches = 0
            self.open()  # as after a crash: nothing half-written stays
            raise
        if new:
            sync_folder(self.path.parent)
        self.batches += 1
        self.end, self.chain, self.last = entry["to"], chain, entry["last"]


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _entry(line: bytes) -> dict[str, Any] | None:
    """One line of an index; None for one that was not finished."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry


class EfdReplicatorService:
    """Copies the bus to the replica while the EfdReplicator entity is enabled.

    Its place on the bus is committed after the batch is on disk; what comes again after a crash between the two
    is known by its offset and left out.
    """

    name = "efd-replicator"

    def __init__(self, *, site: Site, bus: Bus, clock: Clock) -> None:
        self.bus, self.clock = bus, clock
        self.folder = site.path(FOLDER)
        self._follower = Follower(site, bus, "EfdReplicator")
        topics = [topic.name for topic in bus.topics if topic.kind != "stream"]
        self._subscription = bus.subscribe(topics, start="earliest", consumer=self.name)
        self._day: tuple[int, EfdDay] | None = None
        self._known: dict[str, int] = {}
        self.copied, self._lag_s = 0, 0.0
        self._next_tell = 0.0
        self._problem = ""
        self._open_newest()

    def _open_newest(self) -> None:
        """Find what the last batches had, of the newest two days: a batch may span midnight."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            days = sorted(int(path.name.split(".")[0]) for path in self.folder.glob("*.index.jsonl"))
            for day_obs in days[-2:]:
                day = EfdDay(self.folder, day_obs)
                day.open()
                self._known |= day.last
        except OSError as error:
            self._problem = str(error)

    def step(self, timeout_s: float) -> int:
        """Copy what is there; waits at most ``timeout_s`` real seconds for it."""
        self._tell()
        if not self._follower.is_enabled:
            time.sleep(min(timeout_s, IDLE_S))
            return 0
        messages = self._subscription.poll(timeout_s, limit=BATCH)
        if not messages:
            self._lag_s = 0.0
            return 0
        try:
            self._write(messages)
        except OSError as error:
            self._problem = str(error)
            self._tell(force=True)
            raise
        self._problem = ""
        self._subscription.commit()
        now = self.clock.now_tai_s()
        self._lag_s = now - messages[-1].snd_tai if len(messages) >= BATCH else 0.0
        return len(messages)

    def _write(self, messages: Iterable[Message]) -> None:
        days: dict[int, list[Message]] = {}
        for message in messages:
            if message.offset > self._known.get(message.topic, -1):
                days.setdefault(day_obs_from_tai(message.snd_tai), []).append(message)
        for day_obs, part in days.items():
            if self._day is None or self._day[0] != day_obs:
                day = EfdDay(self.folder, day_obs)
                day.open()
                self._day = day_obs, day
            self._day[1].append(part)
            self.copied += len(part)

    def _tell(self, *, force: bool = False) -> None:
        if not force and time.monotonic() < self._next_tell:
            return
        self._next_tell = time.monotonic() + TELL_S
        reachable = self._probe()
        day = self._day[1] if self._day else None
        self.bus.publish(
            "EfdReplicator.replica",
            {
                "reachable": reachable, "copied": self.copied, "lagS": self._lag_s,
                "bytes": day.end if day else 0, "path": day.path if day else "", "message": self._problem,
            },
        )  # fmt: skip

    def _probe(self) -> bool:
        """Try to write at the replica."""
        probe = self.folder / ".probe"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            self._problem = str(error)
            return False
        return not self._problem

    def close(self) -> None:
        """Release the bus."""
        self._subscription.close()


def read_efd(
    folder: Path, *, since_tai: float = 0.0, until_tai: float = math.inf, topics: Container[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Messages of a replica in order of copying, ``since_tai <= snd_tai < until_tai``.

    Raises
    ------
    BadFileError
        A batch does not have the checksum of its index.
    """
    for index_path in sorted(folder.glob("*.index.jsonl")):
        for entry, content in _batches(index_path):
            if entry["until_tai"] < since_tai or entry["since_tai"] >= until_tai:
                continue
            for line in content.splitlines():
                message: dict[str, Any] = json.loads(line)
                if since_tai <= message["snd_tai"] < until_tai and (
                    topics is None or message["topic"] in topics
                ):
                    yield message


def verify_efd(folder: Path) -> int:
    """Check every batch and the chain of each day; gives the number of messages.

    Raises
    ------
    BadFileError
        A byte differs, or a batch is missing.
    """
    return sum(
        entry["messages"] for path in sorted(folder.glob("*.index.jsonl")) for entry, _ in _batches(path)
    )


def _batches(index_path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    path = index_path.with_name(index_path.name.replace(".index.jsonl", ".jsonl"))
    chain, end = "", 0
    with index_path.open("rb") as index, path.open("rb") as data:
        for line in index:
            entry = _entry(line)
            if entry is None:
                return  # being written
            content = data.read(entry["to"] - entry["from"])
            digest = hashlib.sha256(content).hexdigest()
            chain = hashlib.sha256((chain + digest).encode()).hexdigest()
            if (entry["from"], entry["sha256"], entry["chain"]) != (end, digest, chain):
                raise BadFileError(
                    f"{path}: bytes {entry['from']} to {entry['to']} are not what {index_path.name} says; "
                    "restore the file from a copy"
                )
            end = entry["to"]
            yield entry, content
