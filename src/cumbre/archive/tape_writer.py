"""Tape writer: what has come to a place goes to its tape, in the order of time.

Fed by the hops ``at_<place>`` and by a scan of the raw cache, so a lost event or a crash costs nothing. A
tape that is away, full or read-only is told once as an alarm; the files wait and are written when it is back.
"""

from __future__ import annotations

import heapq
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.alarms import Alarm
from cumbre.archive.journal import Journal, group_of, is_settled, raw_files
from cumbre.archive.protocol import Parcel
from cumbre.archive.tape import TapeArchive, TapeEntry, open_tape, tape_state
from cumbre.archive.tape_index import Sky, sky_of
from cumbre.archive.tape_rewrite import request_rewrite, serve_rewrites
from cumbre.archive.told import told_parcels
from cumbre.capture.hops import HOP_TOPIC, Piece, detector_ids, hop_fields, piece_of, publish_hops
from cumbre.capture.keys import RawKey
from cumbre.core.errors import (
    BadFileError,
    ConfigurationError,
    ConflictError,
    CumbreError,
    NotFoundError,
    TransientError,
    UnprocessableDataError,
)
from cumbre.core.instrument import load_instrument
from cumbre.stores.files import normal_checksum, sha256_of

if TYPE_CHECKING:
    from cumbre.bus import Bus, Message, Subscription
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

TAPED = "taped"
"""On tape, and the ledger was told: a process killed between the two tells it when it comes back."""
UNUSABLE = "unusable"
BATCH = 8


class TapeWriter:
    """The one writer of a place's tape.

    A tape that is away, full, read-only or another one is an alarm; it is mounted anew again and again.

    Parameters
    ----------
    place
        Name of the place; its hop is ``<place>_tape``.
    scan_every_s
        Real seconds between scans of the raw cache.
    max_pause_s
        Longest wait between tries of a tape that is away, real seconds.
    """

    def __init__(
        self,
        *,
        site: Site,
        bus: Bus,
        clock: Clock,
        place: str,
        scan_every_s: float = 60.0,
        max_pause_s: float = 30.0,
    ) -> None:
        settings = site.config.places[place]
        if settings.tape is None:
            raise ConfigurationError(f"{site.root}: places.{place}.tape: expected a folder, found none")
        self.name = f"tape-{place}"
        self._site, self._place, self._bus, self._clock = site, place, bus, clock
        self._raw = site.path(settings.raw)
        self._ids = detector_ids(site.config)
        self._instruments = {item.name: item for item in map(load_instrument, site.config.instruments)}
        self._journal = Journal(tape_state(site, place))
        self._tape: TapeArchive | None = None
        self._alarm = Alarm(bus, self.name, place)
        self._faults, self._next_try, self._max_pause_s = 0, 0.0, max_pause_s
        self._subscription: Subscription | None = None
        self._queue: list[tuple[tuple[Any, ...], Parcel]] = []
        self._on_way: dict[str, Parcel] = {}
        self._scan_every_s, self._next_scan = scan_every_s, 0.0
        self._scanned = False

    def step(self, timeout_s: float) -> int:
        """Take in what arrived, write some of it; gives the number of files that are safe on tape now."""
        waits = not self._queue or time.monotonic() < self._next_try
        if self._subscription is None:
            self._subscription = self._bus.subscribe([HOP_TOPIC], "earliest", f"{self.name}-hops")
        for message in self._subscription.poll(timeout_s if waits else 0.0):
            try:
                self._arrived(message)
            except (CumbreError, OSError) as error:
                log.error("%s %s: %s", message.fields["obsId"], message.fields["detectorName"], error)
        self._subscription.commit()
        if time.monotonic() >= self._next_scan:
            self._scan()
            self._next_scan = time.monotonic() + self._scan_every_s
        if time.monotonic() < self._next_try:
            return 0
        try:
            count = self._write() + self._rewrite()
        except (OSError, CumbreError) as error:
            self._lose_tape(error)
            return 0
        self._faults = 0
        self._alarm.end(f"the tape of {self._place} takes files again")
        return count

    def close(self) -> None:
        """Let go of the volume; what is not written is found again."""
        if self._tape is not None:
            try:
                self._tape.close()
            except (OSError, CumbreError) as error:
                log.error("%s: %s", self.name, error)
                self._tape.abandon()
        if self._subscription is not None:
            self._subscription.close()

    def _mounted(self) -> TapeArchive:
        if self._tape is None:
            self._tape = open_tape(self._site, self._place, self._clock, self._unreadable)
        return self._tape

    def _unreadable(self, entries: list[TapeEntry]) -> None:
        """Have files written again that a full volume does not give back; the ledger counts them no more."""
        hops: list[dict[str, Any]] = []
        for entry in entries:
            message = f"{entry.place} did not read back as it was written"
            try:
                request_rewrite(tape_state(self._site, self._place), entry, self._raw / entry.key)
            except CumbreError as error:
                message += f", and there is no good copy here: {error}"
                log.error("%s: %s", entry.key, message)
            parcel = Parcel(entry.key, entry.size, entry.sha256)
            hops += self._hops(parcel, entry.place, outcome=BadFileError.outcome, message=message)
        publish_hops(self._bus, hops)

    def _lose_tape(self, error: Exception) -> None:
        """Tell it and try again later, from what the medium itself says then; all files wait."""
        if self._tape is not None:
            self._tape.abandon()
            self._tape = None
        self._faults += 1
        self._next_try = time.monotonic() + min(0.25 * 2**self._faults, self._max_pause_s)
        waiting = len(self._on_way)
        self._alarm.begin(f"tape of {self._place}: {error}; {waiting} files wait", backlog=waiting)
        log.warning("%s: %s; %d files wait", self.name, error, waiting)

    # what is to be written

    def _arrived(self, message: Message) -> None:
        fields = message.fields
        if (fields["hop"], fields["outcome"], fields["place"]) != (f"at_{self._place}", "ok", self._place):
            return
        path = Path(fields["path"])
        try:
            key = RawKey.parse(str(path.relative_to(self._raw)))
        except ValueError as error:
            raise BadFileError(f"{path}: outside {self._raw}; only its files go to tape") from error
        if str(key) in self._on_way or self._journal.has(str(key), TAPED):
            return  # one that was unusable is tried again: it is told anew when it was mended
        for sidecar in sorted(path.parent.glob("*.json")):
            self._found(sidecar, fields["groupId"])
        checksum = normal_checksum(fields["checksum"])
        self._add(Parcel(str(key), fields["byteSize"], checksum, fields["groupId"]))

    def _found(self, path: Path, group_id: str) -> None:
        try:
            key = str(RawKey.parse(str(path.relative_to(self._raw))))
        except BadFileError:
            return
        if not self._is_known(key):
            self._add(Parcel(key, path.stat().st_size, sha256_of(path), group_id))

    def _scan(self) -> None:
        """Find files of the raw cache that are not on tape, whatever became of their events."""
        unknown = [
            key
            for key in raw_files(self._raw)
            if not self._is_known(str(key)) and (not self._scanned or is_settled(self._raw / str(key)))
        ]
        told = told_parcels(self._bus, f"at_{self._place}", self._place, self._raw, unknown)
        for key in unknown:
            path = self._raw / str(key)
            try:
                if str(key) in told:
                    self._add(told[str(key)])
                else:
                    self._found(path, group_of(path))
            except (CumbreError, OSError) as error:
                log.warning("%s: %s", path, error)
        self._scanned = True

    def _is_known(self, key: str) -> bool:
        return key in self._on_way or self._journal.has(key, TAPED) or self._journal.has(key, UNUSABLE)

    def _add(self, parcel: Parcel) -> None:
        self._on_way[parcel.key] = parcel
        heapq.heappush(self._queue, (RawKey.parse(parcel.key).order, parcel))

    # writing

    def _write(self) -> int:
        """Write the oldest waiting files; new ones are looked at between the batches."""
        tape = self._mounted()
        batch = [heapq.heappop(self._queue) for _ in range(min(BATCH, len(self._queue)))]
        safe: list[TapeEntry] = []
        bad: list[dict[str, Any]] = []
        try:
            for _, parcel in batch:
                try:
                    safe += self._append(tape, parcel)
                except (UnprocessableDataError, ConflictError, NotFoundError) as error:
                    log.error("tape of %s: %s", self._place, error)
                    self._journal.note(parcel.key, UNUSABLE)
                    self._on_way.pop(parcel.key, None)
                    bad += self._hops(parcel, "", outcome=error.outcome, message=str(error))
            safe += tape.sync()
        except (OSError, CumbreError):
            for item in batch:
                if item[1].key in self._on_way:
                    heapq.heappush(self._queue, item)
            raise
        finally:
            publish_hops(self._bus, bad)
        return self._told(safe)

    def _append(self, tape: TapeArchive, parcel: Parcel) -> list[TapeEntry]:
        """Append one file; gives its entry when it was on the tape before."""
        path, key = self._raw / parcel.key, RawKey.parse(parcel.key)
        sky = sky_of(path, key, self._instruments.get(key.instrument)) if path.is_file() else Sky()
        try:
            entry = tape.append(parcel.key, path, parcel.sha256, sky=sky)
        except FileNotFoundError as error:
            if path.is_file():
                raise  # the tape is gone, not the file
            raise NotFoundError(f"{path}: gone before it was on tape") from error
        if entry is not None:
            return []
        here = tape.index.entries.get(parcel.key)
        return [here] if here is not None and tape.is_safe(here) else []

    def _told(self, safe: list[TapeEntry]) -> int:
        """Tell the ledger of files that are on tape, then remember that it was told."""
        hops: list[dict[str, Any]] = []
        for entry in safe:
            parcel = self._on_way.get(entry.key) or Parcel(entry.key, entry.size, entry.sha256)
            hops += self._hops(parcel, entry.place)
        publish_hops(self._bus, hops)
        for entry in safe:
            self._journal.note(entry.key, TAPED)
            self._on_way.pop(entry.key, None)
        return len(safe)

    def serve_rewrites(self) -> int:
        """Write only what a verification asked for; nothing while another process holds the tape."""
        try:
            return self._rewrite()
        except (OSError, TransientError) as error:
            log.info("%s: %s", self.name, error)
            return 0

    def _rewrite(self) -> int:
        """Write copies that a verification asks for in place of damaged ones."""
        return self._told(serve_rewrites(self._mounted(), tape_state(self._site, self._place)))

    def _hops(self, parcel: Parcel, path: str, **details: Any) -> list[dict[str, Any]]:
        key = RawKey.parse(parcel.key)
        if not key.is_detector:
            return []
        try:
            known = piece_of(key.instrument, key.obs_id, key.part, self._ids)
        except CumbreError as error:
            log.error("%s: %s", parcel.key, error)
            return []
        piece = Piece(known.obs_id, known.instrument, parcel.group_id, known.detector, known.detector_name)
        return [
            hop_fields(
                self._clock,
                piece,
                f"{self._place}_tape",
                place=self._place,
                path=path,
                byte_size=parcel.size,
                checksum=parcel.sha256,
                **details,
            )
        ]
