"""The embedded bus: a durable log in one SQLite file, written and read by several processes.

Writers append in one transaction each (WAL: readers never wait for writers nor writers for readers). Readers
look at ``PRAGMA data_version``, a counter in shared memory, every 2 to 25 ms: often after a message, seldom
in silence; readers in the writer's own process are woken at once. See docs/decisions/0002-bus.md.
"""

from __future__ import annotations

import base64
import json
import logging
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cumbre.bus.base import Bus, Only, Outgoing, Start, Subscription
from cumbre.bus.messages import Message
from cumbre.bus.topics import Topic, TopicCatalog
from cumbre.core.errors import CumbreError, FatalError, TransientError, UserError
from cumbre.core.time import Clock

log = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 30.0
BEGIN_PAUSE_S = 0.01
POLL_MIN_S, POLL_MAX_S = 0.002, 0.025
REPLAY_CHUNK = 1000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (
    offset INTEGER PRIMARY KEY AUTOINCREMENT, topic TEXT NOT NULL, kind TEXT NOT NULL, idx INTEGER NOT NULL,
    key TEXT NOT NULL, snd_tai REAL NOT NULL, snd_utc REAL NOT NULL, seq_num INTEGER NOT NULL,
    identity TEXT NOT NULL, origin INTEGER NOT NULL, fields TEXT NOT NULL, payload BLOB);
CREATE TABLE IF NOT EXISTS last (
    topic TEXT NOT NULL, idx INTEGER NOT NULL, key TEXT NOT NULL, offset INTEGER NOT NULL,
    PRIMARY KEY (topic, idx, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS consumers (
    name TEXT NOT NULL, topic TEXT NOT NULL, offset INTEGER NOT NULL, last_pending INTEGER NOT NULL,
    PRIMARY KEY (name, topic)) WITHOUT ROWID;
"""
_COLUMNS = "offset, topic, kind, idx, key, snd_tai, snd_utc, seq_num, identity, origin, fields, payload"
_INSERT = (
    "INSERT INTO log (topic, kind, idx, key, snd_tai, snd_utc, seq_num, identity, origin, fields, payload)"
    " VALUES (?,?,?,?,?,?,?,?,?,?,?)"
)
_LAST = (
    "INSERT INTO last VALUES (?,?,?,?) ON CONFLICT (topic, idx, key) DO UPDATE SET offset = excluded.offset"
)
_COMMIT = (
    "INSERT INTO consumers VALUES (?,?,?,?) ON CONFLICT (name, topic) DO UPDATE"
    " SET offset = max(offset, excluded.offset), last_pending = min(last_pending, excluded.last_pending)"
)


def _connect(path: Path, busy_timeout_s: float = BUSY_TIMEOUT_S) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise FatalError(f"bus {path}: cannot open: {error}; expected a writable folder") from error
    try:
        _prepare(db)
    except sqlite3.Error as error:
        db.close()
        raise FatalError(
            f"bus {path}: cannot open: {error}; expected the log of a bus, or no file"
        ) from error
    return db


def _prepare(db: sqlite3.Connection) -> None:
    # to WAL goes the first opener alone, and SQLite does not wait for a busy file there: try again
    for attempt in range(100):
        try:
            db.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:
            if attempt == 99:
                raise
            time.sleep(0.02)
    db.execute("PRAGMA synchronous=NORMAL")


def _marks(values: Iterable[Any]) -> str:
    return ",".join("?" for _ in values)


def _encode(fields: dict[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"), default=lambda raw: base64.b64encode(raw).decode())


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "boolean": (bool,), "int": (int,), "long": (int,), "float": (float, int), "double": (float, int),
    "string": (str,), "bytes": (str,),
}  # fmt: skip


def _decode(topic: Topic, text: str) -> dict[str, Any]:
    """Fields of a stored row.

    Raises
    ------
    ValueError
        Not what a bus writes: a damaged line, or another program's.
    """
    fields: dict[str, Any] = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object, found {type(fields).__name__}")
    for name, field in topic.fields.items():
        if name in fields:
            value = fields[name]
            whole = isinstance(value, list if field.is_list else _JSON_TYPES[field.scalar])
            if not whole or (
                field.is_list and not all(isinstance(v, _JSON_TYPES[field.scalar]) for v in value)
            ):
                raise ValueError(f"{name} = {str(value)[:80]!r}: expected {field.type}")
        if field.scalar == "bytes" and name in fields:
            raw = fields[name]
            fields[name] = [base64.b64decode(one) for one in raw] if field.is_list else base64.b64decode(raw)
    return fields


class SqliteBus(Bus):
    """Bus in one SQLite file; any number of processes of one machine.

    Parameters
    ----------
    path
        The file; it and its folder are made when missing. Local disks only: WAL uses shared memory.
    """

    def __init__(
        self, path: Path, *, identity: str, clock: Clock | None = None, topics: TopicCatalog | None = None
    ) -> None:
        super().__init__(identity=identity, clock=clock, topics=topics)
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = _connect(path, 0.0)
        self._look = _connect(path)
        for connection in (self._db, self._look):
            weakref.finalize(self, connection.close)
        self._readers: weakref.WeakSet[_SqliteSubscription] = weakref.WeakSet()
        self._durable = False
        self._lock, self._look_lock = threading.Lock(), threading.Lock()
        self._published = threading.Condition()
        self._serial = 0
        with self._writing() as db:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)

    @contextmanager
    def _writing(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """One write transaction; the lock makes the connection safe among threads.

        Not ``durable`` survives the death of the process, durable also that of the machine.
        """
        with self._lock:
            try:
                if durable != self._durable:
                    self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                    self._durable = durable
                self._begin()
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._translated(error) from error

    def _begin(self) -> None:
        """Wait for our turn. SQLite's own waiting sleeps up to 0.1 s, a hundred times what a turn takes."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        pause = 0.001
        while True:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.1 * pause, pause))
                pause = min(
                    pause * 1.2, BEGIN_PAUSE_S
                )  # of a hundred that wait, most need not look that often

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> CumbreError:
        if isinstance(error, sqlite3.OperationalError):
            return TransientError(f"bus {self.path}: {error}; disk full or locked? try again")
        if isinstance(error, sqlite3.ProgrammingError):
            return FatalError(f"bus {self.path} of {self.identity}: used after close ({error})")
        return FatalError(f"bus {self.path}: {error}; is it the log of a bus? restore it from a copy")

    def _rows(self, query: str, values: Iterable[Any] = ()) -> list[Any]:
        with self._look_lock, self._reading():
            return self._look.execute(query, tuple(values)).fetchall()

    def _append(self, messages: list[Outgoing]) -> list[int]:
        rows = [
            (m.topic.name, m.topic.kind, m.index, m.key, m.snd_tai, m.snd_utc, m.seq_num, m.identity,
             m.origin, _encode(m.fields), m.payload or None)
            for m in messages
        ]  # fmt: skip
        offsets = []
        # telemetry flows without waiting for the disk: nobody acts on a lost sample
        with self._writing(durable=any(m.topic.kind != "telemetry" for m in messages)) as db:
            for message, row in zip(messages, rows, strict=True):
                offset = db.execute(_INSERT, row).lastrowid
                assert offset is not None
                offsets.append(offset)
                if message.topic.kind == "event":
                    # without last_by there is one last value an index, whatever the key
                    key = message.key if message.topic.last_by else ""
                    db.execute(_LAST, (message.topic.name, message.index, key, offset))
        with self._published:
            self._serial += 1
            self._published.notify_all()
        return offsets

    def _message(self, row: Any) -> Message | None:
        """Message of a row; None for topics that this version does not know and for damaged rows."""
        offset, name, kind, index, key, snd_tai, snd_utc, seq_num, identity, origin, fields, payload = row
        if name not in self.topics:
            self.unknown_fields[name, ""] += 1
            return None
        topic = self.topics[name]
        try:
            known = self._known_fields(topic, _decode(topic, fields))
        except (ValueError, TypeError) as error:
            # one bad message never stops the next; it stays in the log for who wants to look
            self.unknown_fields[name, ""] += 1
            log.error("topic %s, offset %d: skipped: %s", name, offset, error)
            return None
        return Message(
            name, kind, index, known, snd_tai, snd_utc, seq_num, identity, origin, offset, payload or b"", key
        )

    def latest(self, topic: str, index: int = 0, key: str | None = None) -> Message | None:
        """Last value of an event; see :meth:`Bus.latest`."""
        self._event(topic)
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM log WHERE offset = (SELECT max(offset) FROM last"  # noqa: S608
            " WHERE topic = ? AND idx = ? AND key = coalesce(?, key))",
            (topic, index, key),
        )
        return self._message(rows[0]) if rows else None

    def latest_all(self, topic: str) -> list[Message]:
        """Last values of an event; see :meth:`Bus.latest_all`."""
        self._event(topic)
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM log WHERE offset IN (SELECT offset FROM last WHERE topic = ?)"  # noqa: S608
            " ORDER BY offset",
            (topic,),
        )
        return [message for row in rows if (message := self._message(row))]

    def subscribe(
        self,
        topics: Iterable[str],
        start: Start = "latest",
        consumer: str | None = None,
        *,
        only: Only | None = None,
    ) -> Subscription:
        """Start to read; see :meth:`Bus.subscribe`."""
        if not isinstance(start, int) and start not in ("latest", "now", "earliest"):
            raise UserError(f"subscribe: start = {start!r}: expected latest, now, earliest or an offset")
        return _SqliteSubscription(self, self._known_topics(topics), start, consumer, only or {})

    def replay(
        self,
        topics: Iterable[str] | None = None,
        start_offset: int = 0,
        since_tai: float | None = None,
        until_tai: float | None = None,
    ) -> Iterator[Message]:
        """Everything stored up to now, in order; see :meth:`Bus.replay`."""
        names = None if topics is None else [topic.name for topic in self._known_topics(topics)]
        end = self._end()
        where = "offset >= ? AND offset <= ? AND snd_tai >= ? AND snd_tai < ?"
        if names is not None:
            where += f" AND topic IN ({_marks(names)})"
        since, until = (
            (-1e300 if since_tai is None else since_tai),
            (1e300 if until_tai is None else until_tai),
        )
        offset = start_offset or 0
        while True:
            rows = self._rows(
                f"SELECT {_COLUMNS} FROM log WHERE {where} ORDER BY offset LIMIT {REPLAY_CHUNK}",  # noqa: S608
                (offset, end, since, until, *(names or ())),
            )
            yield from (message for row in rows if (message := self._message(row)))
            if len(rows) < REPLAY_CHUNK:
                return
            offset = rows[-1][0] + 1

    def prune(self, older_than_tai: float) -> int:
        """Forget telemetry sent before; gives how many."""
        with self._writing() as db:
            return db.execute(
                "DELETE FROM log WHERE kind = 'telemetry' AND snd_tai < ?", (older_than_tai,)
            ).rowcount

    def _end(self) -> int:
        # not max(offset): pruning may take the last rows away
        rows = self._rows("SELECT seq FROM sqlite_sequence WHERE name = 'log'")
        return int(rows[0][0]) if rows else 0

    def _pause(self, seconds: float) -> None:
        """Sleep, woken at once when this process publishes."""
        with self._published:
            serial = self._serial
            self._published.wait_for(lambda: self._serial != serial, seconds)

    def close(self) -> None:
        """Close the file and the subscriptions still open."""
        for reader in list(self._readers):
            reader.close()
        with self._lock, self._look_lock:
            self._db.close()
            self._look.close()


class _SqliteSubscription(Subscription):
    """Reader with a connection of its own, so that waiting readers and writers never share a lock."""

    def __init__(
        self, bus: SqliteBus, topics: list[Topic], start: Start, consumer: str | None, only: Only
    ) -> None:
        self._bus = bus
        self._names = [topic.name for topic in topics]
        # Looked for in the stored text, which costs a tenth of reading a message that nobody wants.
        self._only = [(name, _encode({key: value})[1:-1])
                      for name, wanted in only.items() for key, value in wanted.items()]  # fmt: skip
        self._consumer = consumer
        self._db = _connect(bus.path)
        weakref.finalize(self, self._db.close)
        bus._readers.add(self)
        self._version: int | None = None
        self._backlog_returned = 0
        self._floors: dict[str, int] = {}
        self._backlog: list[Any] = []
        with bus._writing() as db:
            end = db.execute(
                "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name='log'), 0)"
            ).fetchone()[0]
            stored: dict[str, tuple[int, int]] = {}
            if consumer is not None:
                query = "SELECT topic, offset, last_pending FROM consumers WHERE name = ?"
                stored = {name: (offset, pending) for name, offset, pending in db.execute(query, (consumer,))}
            fresh = {"latest": end, "now": end, "earliest": 0}.get(str(start), 0)
            if isinstance(start, int):
                fresh = start - 1
            pending = []
            for topic in topics:
                floor, waiting = stored.get(
                    topic.name, (fresh, int(start == "latest" and topic.kind == "event"))
                )
                self._floors[topic.name] = floor
                if waiting:
                    # last values as of the first subscription; newer ones come as ordinary messages
                    pending.append((topic, floor))
                if consumer is not None:
                    # written at once: a crash before the first commit must not move the start
                    db.execute(_COMMIT, (consumer, topic.name, floor, waiting))
            values: tuple[Any, ...]
            for topic, floor in pending:
                if topic.name not in stored:
                    chosen, values = "SELECT offset FROM last WHERE topic = ?", (topic.name,)
                else:
                    # resumed before they were done: `last` may have moved on since
                    chosen = "SELECT max(offset) FROM log WHERE topic = ? AND offset <= ?"
                    chosen += " GROUP BY idx, key" if topic.last_by else " GROUP BY idx"
                    values = (topic.name, floor)
                query = f"SELECT {_COLUMNS} FROM log WHERE offset IN ({chosen})"  # noqa: S608
                self._backlog += db.execute(query, values).fetchall()
        self._backlog.sort(key=lambda row: row[0])
        self._backlog_end = self._backlog[-1][0] if self._backlog else 0
        self._position = min(self._floors.values())

    def _changed(self) -> bool:
        version = self._db.execute("PRAGMA data_version").fetchone()[0]
        changed = version != self._version
        self._version = version
        return bool(changed)

    def _fetch(self, limit: int) -> list[Any]:
        # one read transaction: what is beyond the last row found is known not to be ours
        self._db.execute("BEGIN")
        try:
            end = self._db.execute("SELECT coalesce(max(offset), 0) FROM log").fetchone()[0]
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM log WHERE offset > ? AND +topic IN ({_marks(self._names)})"  # noqa: S608
                + " AND (topic <> ? OR instr(fields, ?))" * len(self._only)
                + " ORDER BY offset LIMIT ?",
                (self._position, *self._names, *(one for pair in self._only for one in pair), limit),
            ).fetchall()
        finally:
            self._db.execute("COMMIT")
        self._position = rows[-1][0] if len(rows) == limit else max(end, self._position)
        return [row for row in rows if row[0] > self._floors[row[1]]]

    def _next(self, limit: int) -> list[Message]:
        """Messages at hand: last values first, then the log page by page until one has something for us."""
        while self._backlog:
            taken, self._backlog = self._backlog[:limit], self._backlog[limit:]
            self._backlog_returned = taken[-1][0]
            if messages := [message for row in taken if (message := self._bus._message(row))]:
                return messages
        while True:
            before = self._position
            rows = self._fetch(limit)
            if messages := [message for row in rows if (message := self._bus._message(row))]:
                return messages
            if self._position == before:
                return []

    def poll(self, timeout_s: float = 0.0, limit: int = 500) -> list[Message]:
        """Next messages; see :meth:`Subscription.poll`."""
        with self._bus._reading():
            return self._poll(time.monotonic() + timeout_s, limit)

    def _poll(self, deadline: float, limit: int) -> list[Message]:
        pause = POLL_MIN_S
        # a page may have more behind it although nothing changed since: the first look is unconditional
        look = True
        while True:
            if look:
                self._changed()
                if messages := self._next(limit):
                    return messages
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            self._bus._pause(min(pause, left))
            pause = min(pause * 1.3, POLL_MAX_S)
            look = self._changed()

    def commit(self, message: Message | None = None) -> None:
        """Mark what was returned (up to ``message``) as done; see :meth:`Subscription.commit`."""
        if self._consumer is None:
            return
        if message is None:
            done, waiting = self._position, self._backlog_returned < self._backlog_end
        elif message.offset <= self._floors[message.topic]:
            done, waiting = (
                0,
                message.offset < self._backlog_end,
            )  # one of the last values: no place in the log
        else:
            done, waiting = message.offset, False
        with self._bus._writing() as db:
            for name in self._names:
                db.execute(_COMMIT, (self._consumer, name, done, int(waiting)))

    def close(self) -> None:
        """Close the reader's connection."""
        self._db.close()
