"""Distributor: receives files over the link into the raw cache of a place, tells the ledger, writes tape.

The sender is answered after the file is on disk; the hop and the tape follow. Whatever a crash leaves
undone is found by a scan of the raw cache at the start and again from time to time.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.addresses import parse_address, write_address
from cumbre.archive.journal import Journal, group_of, is_settled, raw_files
from cumbre.archive.protocol import Parcel
from cumbre.archive.receiver import Receiver
from cumbre.archive.tape import TapeArchive
from cumbre.capture.hops import Piece, detector_ids, hop_fields, piece_of, publish_hop, publish_hops
from cumbre.capture.keys import RawKey
from cumbre.core.errors import ConfigurationError, CumbreError
from cumbre.stores.files import sha256_of

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

ANNOUNCED = "announced"
TAPED = "taped"
"""On tape, and the ledger was told: a process killed between the two tells it when it comes back."""
UNUSABLE = "unusable"
TAPE_BATCH = 8


class Distributor:
    """One place's receiving end.

    Parameters
    ----------
    place
        Name of the place; also the service's name, of its hops ``at_<place>`` and ``<place>_tape``.
    scan_every_s
        Real seconds between scans of the raw cache.
    """

    def __init__(self, *, site: Site, bus: Bus, clock: Clock, place: str, scan_every_s: float = 60.0) -> None:
        self.name = self._place = place
        self._site, self._bus, self._clock = site, bus, clock
        settings = site.config.places[place]
        if "://" in settings.raw:
            raise ConfigurationError(
                f"{site.root}: places.{place}.raw = {settings.raw!r}: a distributor needs a folder"
            )
        self._raw = site.path(settings.raw)
        self._ids = detector_ids(site.config)
        self._journal = Journal(site.path(f"{place}/received"))
        self._tape = (
            TapeArchive(site.path(settings.tape), clock=clock, label=place) if settings.tape else None
        )
        self._to_tape: deque[tuple[Parcel, Path]] = deque()
        self._on_way: set[str] = set()
        self._arrivals: queue.SimpleQueue[tuple[Parcel, Path] | None] = queue.SimpleQueue()
        self._scan_every_s, self._next_scan = scan_every_s, 0.0
        self._scanned = False
        host, port = parse_address(settings.listen or "127.0.0.1:0")
        self._receiver = Receiver(
            root=self._raw,
            quarantine_folder=site.path(f"{place}/quarantine"),
            clock=clock,
            arrived=lambda parcel, path: self._arrivals.put((parcel, path)),
            refused=self._refused,
            host=host,
            port=port,
        )
        write_address(site, place, self._receiver.address)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self._receiver.address

    def step(self, timeout_s: float) -> int:
        """Announce what arrived, write tape; gives the number of files of both."""
        if time.monotonic() >= self._next_scan:
            self._scan()
            self._next_scan = time.monotonic() + self._scan_every_s
        arrived = self._drain(0.0 if self._to_tape else timeout_s)
        announced = self._announce(arrived)
        return announced + self._write_tape()

    def close(self) -> None:
        """Stop listening and close the volume."""
        self._receiver.close()
        if self._tape is not None:
            self._tape.close()

    def _drain(self, timeout_s: float) -> list[tuple[Parcel, Path]]:
        found: list[tuple[Parcel, Path]] = []
        while True:
            try:
                item = self._arrivals.get(timeout=timeout_s) if not found else self._arrivals.get_nowait()
            except queue.Empty:
                return found
            if item is not None:
                found.append(item)

    def _announce(self, arrived: list[tuple[Parcel, Path]]) -> int:
        """Publish hops of files that are new here, then remember that they were published."""
        hops, keys = [], dict[str, None]()
        for parcel, path in arrived:
            self._queue_for_tape(parcel, path)
            if parcel.key in keys or self._journal.has(parcel.key, ANNOUNCED):
                continue
            keys[parcel.key] = None
            key = RawKey.parse(parcel.key)
            if not key.is_detector:
                continue
            try:
                hops.append(self._hop(parcel, f"at_{self._place}", path))
            except CumbreError as error:
                log.error("%s: %s", parcel.key, error)
        publish_hops(self._bus, hops)
        for text in keys:
            self._journal.note(text, ANNOUNCED)
        return len(keys)

    def _hop(self, parcel: Parcel, hop: str, path: Path | str, **details: Any) -> dict[str, Any]:
        key = RawKey.parse(parcel.key)
        known = piece_of(key.instrument, key.obs_id, key.part, self._ids)
        piece = Piece(known.obs_id, known.instrument, parcel.group_id, known.detector, known.detector_name)
        return hop_fields(
            self._clock,
            piece,
            hop,
            place=self._place,
            path=path,
            byte_size=parcel.size,
            checksum=parcel.sha256,
            **details,
        )

    # tape

    def _queue_for_tape(self, parcel: Parcel, path: Path) -> None:
        if self._tape is None or parcel.key in self._on_way:
            return
        if self._journal.has(parcel.key, TAPED) or self._journal.has(parcel.key, UNUSABLE):
            return
        self._on_way.add(parcel.key)
        self._to_tape.append((parcel, path))

    def _write_tape(self) -> int:
        """Write some waiting files in their order; arrivals are looked at between the batches."""
        if self._tape is None or not self._to_tape:
            return 0
        batch = [self._to_tape.popleft() for _ in range(min(TAPE_BATCH, len(self._to_tape)))]
        hops, done = [], list[str]()
        try:
            for parcel, path in batch:
                try:
                    entry = self._tape.append(parcel.key, path, parcel.sha256)
                except CumbreError as error:
                    log.error("tape of %s: %s", self._place, error)
                    self._journal.note(parcel.key, UNUSABLE)
                    hops += self._tape_hops(parcel, "", outcome=error.outcome, message=str(error))
                    continue
                entry = entry or self._tape.entry(parcel.key)
                hops += self._tape_hops(parcel, f"{entry.volume}@{entry.offset}")
                done.append(parcel.key)
            self._tape.sync()
        except OSError:
            # Tape full or broken: nothing is forgotten, the whole batch comes again after the loop's pause.
            self._to_tape.extendleft(reversed(batch))
            raise
        publish_hops(self._bus, hops)
        for key in done:
            self._journal.note(key, TAPED)
        self._on_way.difference_update(parcel.key for parcel, _ in batch)
        return len(batch)

    def _tape_hops(self, parcel: Parcel, path: str, **details: Any) -> list[dict[str, Any]]:
        if not RawKey.parse(parcel.key).is_detector:
            return []
        try:
            return [self._hop(parcel, f"{self._place}_tape", path, **details)]
        except CumbreError as error:
            log.error("%s: %s", parcel.key, error)
            return []

    # recovery and refusals

    def _scan(self) -> None:
        """Find files in the raw cache whose hop or tape copy is missing."""
        for key in raw_files(self._raw):
            text = str(key)
            taped = (
                self._tape is None
                or text in self._on_way
                or self._journal.has(text, TAPED)
                or self._journal.has(text, UNUSABLE)
            )
            if taped and self._journal.has(text, ANNOUNCED):
                continue
            path = self._raw / text
            if self._scanned and not is_settled(path):
                continue  # arriving just now; its own arrival knows more of it
            try:
                parcel = Parcel(text, path.stat().st_size, sha256_of(path), group_of(path))
            except (CumbreError, OSError) as error:
                log.warning("%s: %s", path, error)
                continue
            self._arrivals.put((parcel, path))
        self._scanned = True
        self._arrivals.put(None)

    def _refused(self, said: dict[str, Any], outcome: str, message: str, kept: Path | None) -> None:
        """Tell the ledger of a refused file when it says which image it is of (called by receiver threads)."""
        log.error("refused: %s", message)
        try:
            key = RawKey.parse(str(said.get("key")))
            piece = piece_of(key.instrument, key.obs_id, key.part, self._ids)
        except CumbreError:
            return
        publish_hop(
            self._bus,
            self._clock,
            piece,
            "quarantined",
            place=self._place,
            outcome=outcome,
            path=kept or "",
            message=message,
        )
