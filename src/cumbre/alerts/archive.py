"""The archive of sent alerts: a container file and a manifest of each visit, and each packet by its diaSourceId.

A file is one Avro container with a block for every packet, so one packet is read without the rest of the file. It is
made from the outbox when all detectors of a visit that were processed have their alerts out; what comes later (a
detector processed again after a failure) goes into a further part. Everything follows from the database: a process
that dies makes the same file again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import fastavro

from cumbre.alerts.packet import SCHEMA_ID, schema
from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.core.time import Clock, day_obs_from_tai
from cumbre.stores.files import write_atomic
from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Database

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site

log = logging.getLogger(__name__)

FOLDER = "archive/alerts"
SETTLE_S = 20.0
"""Night seconds after a visit's last alert before its file is made."""
_POLL_S = 0.5
_HEAD = 5
"""Bytes of Confluent's header before a packet's Avro."""
_MAGIC = b"Obj\x01"
_STEPS = [
    """
CREATE TABLE level1.alert_file (
    visit bigint NOT NULL, part int NOT NULL, path text NOT NULL, alerts int NOT NULL, bytes bigint NOT NULL,
    sha256 text NOT NULL, made_tai float8 NOT NULL, PRIMARY KEY (visit, part));
CREATE TABLE level1.alert_index (
    alert_id bigint PRIMARY KEY, visit bigint NOT NULL, part int NOT NULL, at bigint NOT NULL, size int NOT NULL);
"""
]
_DUE = """
SELECT o.visit, max(o.sent_tai) AS last_tai, count(*) AS n FROM level1.alert_outbox o
WHERE NOT EXISTS (SELECT FROM level1.alert_index x WHERE x.alert_id = o.alert_id)
  AND NOT EXISTS (SELECT FROM level1.visit_detector v WHERE v.visit = o.visit AND v.alerted_tai IS NULL)
GROUP BY o.visit HAVING bool_and(o.sent_tai IS NOT NULL) AND max(o.sent_tai) <= %s ORDER BY o.visit LIMIT 20
"""
_PACKETS = """
SELECT o.alert_id, o.packet FROM level1.alert_outbox o WHERE o.visit = %s
  AND NOT EXISTS (SELECT FROM level1.alert_index x WHERE x.alert_id = o.alert_id) ORDER BY o.sequence
"""


class Writable(Protocol):
    """What a container file is written to."""

    def write(self, block: bytes | memoryview[int], /) -> object:
        """Take a block."""


class AlertArchive:
    """Writes and reads the archive.

    Parameters
    ----------
    root
        Folder of the container files.
    """

    def __init__(self, db: Database, root: Path, clock: Clock) -> None:
        self._db, self._root, self._clock = db, root, clock
        migrate(db, "alert_archive", _STEPS)

    def due(self) -> list[int]:
        """Visits whose alerts are all out and not all archived."""
        return [row["visit"] for row in self._db.query(_DUE, (self._clock.now_tai_s() - SETTLE_S,))]

    def archive(self, visit: int) -> Path | None:
        """Write what is not archived of a visit; None when there is nothing.

        Raises
        ------
        TransientError
            The database is away; nothing is lost.
        """
        rows = self._db.execute(_PACKETS, (visit,))
        if not rows:
            return None
        part = self._db.execute("SELECT count(*) FROM level1.alert_file WHERE visit = %s", (visit,))[0][0]
        day = day_obs_from_tai(self._clock.now_tai_s())
        path = self._root / str(day) / f"{visit}{f'_{part}' if part else ''}.avro"
        places: list[tuple[int, int]] = []
        packets = [bytes(packet) for _, packet in rows]

        def content(stream: Writable) -> None:
            places[:] = write_blocks(stream, packets, name=f"{visit}/{part}")

        made = write_atomic(path, content)
        with self._db.connection() as link:
            link.execute(
                "INSERT INTO level1.alert_file VALUES (%s, %s, %s, %s, %s, %s, %s)",
                (visit, part, str(path), len(rows), made.size, made.sha256, self._clock.now_tai_s()),
            )
            index = [(row[0], visit, part, at, size) for row, (at, size) in zip(rows, places, strict=True)]
            self._db.copy(
                "level1.alert_index", ["alert_id", "visit", "part", "at", "size"], index, connection=link
            )
        return path

    def packet(self, alert_id: int) -> bytes:
        """A packet as it was sent, by its diaSourceId.

        Raises
        ------
        NotFoundError
            No alert of this id was made.
        BadFileError
            Its file is gone or damaged.
        """
        rows = self._db.execute(
            "SELECT f.path, x.at, x.size FROM level1.alert_index x JOIN level1.alert_file f USING (visit, part)"
            " WHERE x.alert_id = %s",
            (alert_id,),
        )
        if not rows:
            kept = self._db.execute("SELECT packet FROM level1.alert_outbox WHERE alert_id = %s", (alert_id,))
            if not kept:
                raise NotFoundError(
                    f"no alert {alert_id}: expected the diaSourceId of an alert that was made"
                )
            return bytes(kept[0][0])
        path, at, size = rows[0]
        try:
            with Path(path).open("rb") as stream:
                stream.seek(at)
                content = stream.read(size)
        except OSError as error:
            raise BadFileError(f"alert {alert_id}: {path}: {error}") from error
        if len(content) != size:
            raise BadFileError(
                f"alert {alert_id}: {path}: ends at {at + len(content)}, expected {at + size} bytes"
            )
        return b"\0" + SCHEMA_ID.to_bytes(4, "big") + content

    def manifest(self, visit: int) -> dict[str, Any]:
        """What became of a visit's difference sources: made, sent, not sent by reason; its files.

        Raises
        ------
        NotFoundError
            The visit was not processed.
        """
        detectors = self._db.query(
            "SELECT detector, n_sources, n_alerts, rejected, alerted_tai IS NOT NULL AS is_sent FROM level1.visit_detector"
            " WHERE visit = %s ORDER BY detector",
            (visit,),
        )
        if not detectors:
            raise NotFoundError(f"visit {visit} is not in Level 1")
        rejected: Counter[str] = Counter()
        for row in detectors:
            rejected.update(row["rejected"])
        sent = "SELECT count(*) FROM level1.alert_outbox WHERE visit = %s AND sent_tai IS NOT NULL"
        files = self._db.query(
            "SELECT path, alerts, bytes, sha256 FROM level1.alert_file WHERE visit = %s ORDER BY part",
            (visit,),
        )
        return {
            "visit": visit,
            "detectors": len(detectors),
            "sources": sum(row["n_sources"] for row in detectors),
            "alerts_made": sum(row["n_alerts"] for row in detectors),
            "alerts_sent": int(self._db.execute(sent, (visit,))[0][0]),
            "rejected": dict(rejected),
            "complete": all(row["is_sent"] for row in detectors),
            "files": files,
        }


def write_blocks(stream: Writable, packets: Sequence[bytes], *, name: str) -> list[tuple[int, int]]:
    """Write a container file with one block for each packet; gives where each packet's Avro begins and its size.

    Parameters
    ----------
    packets
        In Confluent's wire format.
    name
        Makes the file's sync marker, so that the same packets give the same bytes.
    """
    sync = hashlib.sha256(name.encode()).digest()[:16]
    head = io.BytesIO()
    meta = {"avro.schema": json.dumps(_plain(schema())).encode(), "avro.codec": b"null"}
    fastavro.schemaless_writer(head, {"type": "map", "values": "bytes"}, meta)
    start = _MAGIC + head.getvalue() + sync
    stream.write(start)
    at, places = len(start), []
    for packet in packets:
        body = memoryview(packet)[_HEAD:]
        lead = _long(1) + _long(len(body))
        stream.write(lead)
        stream.write(body)
        stream.write(sync)
        places.append((at + len(lead), len(body)))
        at += len(lead) + len(body) + len(sync)
    return places


def _plain(parsed: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without the parser's own marks."""
    return {key: value for key, value in parsed.items() if not key.startswith("__")}


def _long(value: int) -> bytes:
    """Avro's variable-length integer of a number that is not negative."""
    zigzag, out = value << 1, bytearray()
    while zigzag > 0x7F:
        out.append(0x80 | zigzag & 0x7F)
        zigzag >>= 7
    out.append(zigzag)
    return bytes(out)


def rejections(sources: Iterable[Mapping[str, Any]], sent: Iterable[int], least: float) -> dict[str, int]:
    """Number of difference sources that became no alert, by the first reason that applies.

    Parameters
    ----------
    sources
        DiaSource rows.
    sent
        diaSourceId of the alerts.
    least
        Reliability from which on a source is trusted.
    """
    gone = set(sent)
    reasons: tuple[tuple[str, Callable[[Mapping[str, Any]], Any]], ...] = (
        ("streak", lambda s: s.get("pixelFlags_streakCenter")),
        ("cosmic_ray", lambda s: s.get("pixelFlags_crCenter")),
        ("saturated", lambda s: s.get("pixelFlags_saturatedCenter")),
        ("no_data", lambda s: s.get("pixelFlags_nodataCenter") or s.get("pixelFlags_edge")),
        ("dipole", lambda s: s.get("isDipole")),
        ("unreliable", lambda s: (s.get("reliability") or 0.0) < least),
    )
    counts: Counter[str] = Counter()
    for source in sources:
        if source["diaSourceId"] not in gone:
            counts[next((word for word, applies in reasons if applies(source)), "other")] += 1
    return dict(counts)


class AlertArchiveService:
    """Archives visits as their alerts are out."""

    name = "alert-archive"

    def __init__(self, *, site: Site, bus: Bus, db: Database, clock: Clock) -> None:
        del bus  # the database tells when a visit is done
        self._db, self._clock = db, clock
        self._root = site.path(FOLDER)
        self._archive: AlertArchive | None = None

    def step(self, timeout_s: float) -> int:
        """Archive what is due; looks again for at most ``timeout_s`` real seconds when nothing is."""
        deadline = time.monotonic() + timeout_s
        while True:
            done = self._round()
            left = deadline - time.monotonic()
            if done or left <= 0:
                return done
            time.sleep(min(_POLL_S, left))

    def _round(self) -> int:
        if self._archive is None:
            if self._db.execute("SELECT to_regclass('level1.alert_outbox')")[0][0] is None:
                return 0
            self._archive = AlertArchive(self._db, self._root, self._clock)
        visits = self._archive.due()
        for visit in visits:
            path = self._archive.archive(visit)
            log.info("visit %d: alerts archived in %s", visit, path)
        return len(visits)

    def close(self) -> None:
        """Release the database."""
        self._db.close()
