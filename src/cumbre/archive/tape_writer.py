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

from cumbre.archive.journal import Journal, group_of, is_settled, raw_files
from cumbre.archive.protocol import Parcel
from cumbre.archive.tape import TapeArchive
from cumbre.capture.hops import HOP_TOPIC, Piece, detector_ids, hop_fields, piece_of, publish_hops
from cumbre.capture.keys import RawKey
from cumbre.core.errors import BadFileError, ConfigurationError, CumbreError
from cumbre.stores.files import normal_checksum, sha256_of

if TYPE_CHECKING:
    from cumbre.bus import Bus, Message
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

TAPED = "taped"
"""On tape, and the ledger was told: a process killed between the two tells it when it comes back."""
UNUSABLE = "unusable"
BATCH = 8


class TapeWriter:
    """The one writer of a place's tape.

    Parameters
    ----------
    place
        Name of the place; its hop is ``<place>_tape``.
    scan_every_s
        Real seconds between scans of the raw cache.
    """

    def __init__(self, *, site: Site, bus: Bus, clock: Clock, place: str, scan_every_s: float = 60.0) -> None:
        settings = site.config.places[place]
        if settings.tape is None:
            raise ConfigurationError(f"{site.root}: places.{place}.tape: expected a folder, found none")
        self.name = f"tape-{place}"
        self._place, self._bus, self._clock = place, bus, clock
        self._raw = site.path(settings.raw)
        self._ids = detector_ids(site.config)
        self._journal = Journal(site.path(f"{place}/taped"))
        self._tape = TapeArchive(site.path(settings.tape), clock=clock, label=place)
        self._subscription = bus.subscribe([HOP_TOPIC], start="earliest", consumer=f"{self.name}-hops")
        self._queue: list[tuple[tuple[Any, ...], Parcel]] = []
        self._on_way: set[str] = set()
        self._scan_every_s, self._next_scan = scan_every_s, 0.0
        self._scanned = False

    def step(self, timeout_s: float) -> int:
        """Take in what arrived, write some of it; gives the number of files written."""
        for message in self._subscription.poll(0.0 if self._queue else timeout_s):
            try:
                self._arrived(message)
            except (CumbreError, OSError) as error:
                log.error("%s %s: %s", message.fields["obsId"], message.fields["detectorName"], error)
        self._subscription.commit()
        if time.monotonic() >= self._next_scan:
            self._scan()
            self._next_scan = time.monotonic() + self._scan_every_s
        return self._write()

    def close(self) -> None:
        """Let go of the volume; what is not written is found again."""
        self._tape.close()
        self._subscription.close()

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
        if self._is_known(str(key)):
            return
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
        for key in raw_files(self._raw):
            path = self._raw / str(key)
            if self._is_known(str(key)) or (self._scanned and not is_settled(path)):
                continue
            try:
                self._found(path, group_of(path))
            except (CumbreError, OSError) as error:
                log.warning("%s: %s", path, error)
        self._scanned = True

    def _is_known(self, key: str) -> bool:
        return key in self._on_way or self._journal.has(key, TAPED) or self._journal.has(key, UNUSABLE)

    def _add(self, parcel: Parcel) -> None:
        self._on_way.add(parcel.key)
        heapq.heappush(self._queue, (RawKey.parse(parcel.key).order, parcel))

    # writing

    def _write(self) -> int:
        """Write the oldest waiting files; new ones are looked at between the batches."""
        batch = [heapq.heappop(self._queue) for _ in range(min(BATCH, len(self._queue)))]
        if not batch:
            return 0
        hops: list[dict[str, Any]] = []
        done: list[str] = []
        try:
            for _, parcel in batch:
                try:
                    entry = self._tape.append(parcel.key, self._raw / parcel.key, parcel.sha256)
                except CumbreError as error:
                    log.error("tape of %s: %s", self._place, error)
                    self._journal.note(parcel.key, UNUSABLE)
                    hops += self._hops(parcel, "", outcome=error.outcome, message=str(error))
                    continue
                entry = entry or self._tape.entry(parcel.key)
                hops += self._hops(parcel, f"{entry.volume}@{entry.offset}")
                done.append(parcel.key)
            self._tape.sync()
        except OSError:
            # Tape full or broken: nothing is forgotten, the whole batch comes again after the loop's pause.
            for item in batch:
                heapq.heappush(self._queue, item)
            raise
        publish_hops(self._bus, hops)
        for key in done:
            self._journal.note(key, TAPED)
        self._on_way.difference_update(parcel.key for _, parcel in batch)
        return len(batch)

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
