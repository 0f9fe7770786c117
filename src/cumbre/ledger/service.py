"""The one writer of the ledger: bus messages in, rows out, in batches."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import astuple, fields
from typing import Any

from cumbre.bus import Bus, Message
from cumbre.core.configuration import Site
from cumbre.core.errors import ConflictError, CumbreError, FatalError, TransientError, UnprocessableDataError
from cumbre.core.time import Clock
from cumbre.ledger.records import Entry, Hop, Instruments, entry_of
from cumbre.ledger.schema import prepare
from cumbre.stores.postgres import Connection, Database

log = logging.getLogger(__name__)
TOPICS = (
    "Image.hop",
    "Camera.startIntegration",
    "Camera.endReadout",
    "Camera.endOfImageTelemetry",
    "Prompt.detectorProcessed",
)
_IMAGE = (
    "obs_id", "instrument", "exposure_id", "group_id", "day_obs", "seq_num", "image_type", "band", "filter",
    "exposure_s", "ra", "dec", "rotation", "program", "begin_tai", "end_tai", "expected_detectors",
    "visit",
)  # fmt: skip
_HOP = tuple(item.name for item in fields(Hop))
_INSERT_GIVEN_UP = (
    "INSERT INTO ledger.visit_without_image (group_id, detector, outcome, message, told_tai) "
    "VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"
)
_HISTORY = tuple(name for name in _HOP if name != "detector_name")


def _upsert_image() -> str:
    """Later messages fill what is not known yet and replace numbers by better ones; nothing is emptied."""
    kept = ("instrument", "group_id", "image_type")
    sets = [f"{c} = CASE WHEN excluded.{c} <> '' THEN excluded.{c} ELSE i.{c} END" for c in kept]
    sets += [f'"{c}" = coalesce(excluded."{c}", i."{c}")' for c in _IMAGE if c not in (*kept, "obs_id")]
    columns = ", ".join(f'"{c}"' for c in _IMAGE)
    values = ", ".join(f"%({c})s" for c in _IMAGE)
    return (
        f"INSERT INTO ledger.image AS i ({columns}) VALUES ({values}) "  # noqa: S608 (names are ours)
        f"ON CONFLICT (obs_id) DO UPDATE SET {', '.join(sets)}"
    )


def _upsert_hop() -> str:
    """The newest word holds; the same success again keeps the time of the first."""
    sets = ", ".join(f"{c} = excluded.{c}" for c in _HOP if c not in ("obs_id", "detector", "hop", "place"))
    return (
        f"INSERT INTO ledger.hop AS h ({', '.join(_HOP)}) VALUES ({', '.join(['%s'] * len(_HOP))}) "  # noqa: S608
        f"ON CONFLICT (obs_id, detector, hop, place) DO UPDATE SET {sets} "
        "WHERE excluded.hop_tai >= h.hop_tai AND NOT "
        "(h.outcome = 'ok' AND excluded.outcome = 'ok' AND h.checksum = excluded.checksum)"
    )


_UPSERT_IMAGE = _upsert_image()
_UPSERT_HOP = _upsert_hop()
_INSERT_HISTORY = (
    f"INSERT INTO ledger.hop_history ({', '.join(_HISTORY)}) "  # noqa: S608
    f"VALUES ({', '.join(['%s'] * len(_HISTORY))}) ON CONFLICT DO NOTHING"
)


class LedgerService:
    """Writes the ledger from the bus.

    A batch is one transaction; the place on the bus is committed after it, so a killed ledger reads the last
    batch again and the upserts make that harmless. A message that cannot be recorded goes to
    ``ledger.bad_message`` with outcome ``quarantined`` and the next one follows.

    Attributes
    ----------
    outcomes
        Counts of messages by outcome (``ok``, ``quarantined``) in this process.
    """

    name = "ledger"

    def __init__(self, *, site: Site, bus: Bus, db: Database, clock: Clock | None = None) -> None:
        self._db = db
        self._clock = clock or bus.clock
        self._instruments = Instruments(tuple(site.config.instruments))
        self._pending: list[Message] = []
        self.outcomes: Counter[str] = Counter()
        prepare(db)
        self._subscription = bus.subscribe(TOPICS, start="earliest", consumer=self.name)

    def step(self, timeout_s: float) -> int:
        """Record what is on the bus; waits at most ``timeout_s`` real seconds for the first message.

        Raises
        ------
        TransientError
            The database is not there; the batch is kept and tried again by the next step.
        """
        if not self._pending:
            self._pending = self._subscription.poll(timeout_s, limit=1000)
        if not self._pending:
            return 0
        good, bad = self._translate(self._pending)
        try:
            self._store([entry for _, entry in good], bad)
        except (UnprocessableDataError, ConflictError, FatalError):
            bad += self._store_one_by_one(good)
            self._store([], bad)
        handled = len(self._pending)
        self._subscription.commit()
        self._pending = []
        self.outcomes["quarantined"] += len(bad)
        self.outcomes["ok"] += handled - len(bad)
        return handled

    def close(self) -> None:
        """Release the bus and the database."""
        self._subscription.close()
        self._db.close()

    def _translate(
        self, messages: list[Message]
    ) -> tuple[list[tuple[Message, Entry]], list[tuple[Message, Exception]]]:
        good: list[tuple[Message, Entry]] = []
        bad: list[tuple[Message, Exception]] = []
        now = self._clock.now_tai_s()
        for message in messages:
            try:
                good.append((message, entry_of(message, now, self._instruments)))
            except (CumbreError, KeyError, TypeError, ValueError, OverflowError) as error:
                bad.append((message, error))
        return good, bad

    def _store_one_by_one(self, good: list[tuple[Message, Entry]]) -> list[tuple[Message, Exception]]:
        """The batch as a whole was refused: find the message the database cannot take."""
        bad: list[tuple[Message, Exception]] = []
        for message, entry in good:
            try:
                self._store([entry], [])
            except TransientError:
                raise
            except CumbreError as error:
                bad.append((message, error))
        return bad

    def _store(self, entries: list[Entry], bad: list[tuple[Message, Exception]]) -> None:
        hops = [hop for entry in entries for hop in entry.hops]
        with self._db.connection() as link, link.cursor() as cursor:
            if entries:
                cursor.executemany(_UPSERT_IMAGE, [_image_row(row) for row in _merged(entries)])
            if hops:
                cursor.executemany(_UPSERT_HOP, [astuple(hop) for hop in hops])
                history = [tuple(getattr(hop, name) for name in _HISTORY) for hop in hops]
                cursor.executemany(_INSERT_HISTORY, history)
            if given_up := [row for entry in entries for row in entry.given_up]:
                cursor.executemany(_INSERT_GIVEN_UP, [astuple(row) for row in given_up])
            if bad:
                self._set_aside(link, bad)

    def _set_aside(self, link: Connection, bad: list[tuple[Message, Exception]]) -> None:
        now = self._clock.now_tai_s()
        for message, error in bad:
            log.warning("%s at %d set aside: %s", message.topic, message.offset, error)
            text = json.dumps(message.fields, default=str).replace("\\u0000", "\\ufffd")
            link.execute(
                "INSERT INTO ledger.bad_message (topic, bus_offset, outcome, error, fields, recv_tai) "
                "VALUES (%s, %s, 'quarantined', %s, %s, %s) ON CONFLICT DO NOTHING",
                (message.topic, message.offset, f"{type(error).__name__}: {error}"[:2000], text, now),
            )


def _merged(entries: list[Entry]) -> list[dict[str, Any]]:
    """One row an image: many hops of a batch speak of the same one."""
    merged: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if not entry.image:
            continue
        known = merged.setdefault(entry.image["obs_id"], {})
        known.update({key: value for key, value in entry.image.items() if value not in (None, "")})
    return [merged[obs_id] for obs_id in sorted(merged)]


def _image_row(image: dict[str, Any]) -> dict[str, Any]:
    texts = ("instrument", "group_id", "image_type")
    return {column: image.get(column, "" if column in texts else None) for column in _IMAGE}
