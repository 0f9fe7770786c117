"""Relays: what was written at one place goes to the next, through an outage buffer, oldest image first.

The replicator takes ``written`` at the summit to the base, the forwarder ``at_base`` to the archive. A file
leaves the buffer only when the receiver says that it has it on disk with the same checksum.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cumbre.archive.addresses import link_of
from cumbre.archive.buffer import Entry, open_buffer
from cumbre.archive.journal import Journal, group_of, is_settled, raw_files
from cumbre.archive.pairs import raft_of, relay_name, share
from cumbre.archive.protocol import Parcel
from cumbre.archive.sender import Sender
from cumbre.capture.hops import (
    HOP_TOPIC,
    Piece,
    detector_ids,
    hop_fields,
    piece_of,
    publish_hop,
    publish_hops,
)
from cumbre.capture.keys import RawKey
from cumbre.capture.quarantine import quarantine
from cumbre.core.errors import (
    BadFileError,
    ConflictError,
    CumbreError,
    NotFoundError,
    TransientError,
    UnprocessableDataError,
)
from cumbre.stores.files import normal_checksum, sha256_of

if TYPE_CHECKING:
    from cumbre.bus import Bus, Message
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

TRANSMITTED = "transmitted"
"""Hop of single transmissions; no copy and no step of an image's way, so it never hides one."""
SENT = "sent"
LOST = "given up"
MAX_PAUSE_S = 5.0
QUICK_TRIES = 3


class Relay:
    """Sends files of one place to another.

    Parameters
    ----------
    scan_every_s
        Real seconds between catch-up scans of the source's raw files.
    """

    name = "relay"
    source = "summit"
    target = "base"
    watched_hop = "written"
    tells_buffered = False
    tells_sent = False

    def __init__(
        self, *, site: Site, bus: Bus, clock: Clock, pair: int = 1, scan_every_s: float = 20.0
    ) -> None:
        self._site, self._bus, self._clock, self._pair = site, bus, clock, pair
        self.name = relay_name(self.source, pair)
        place = site.config.places[self.source]
        self._link = link_of(site, self.source, self.target)
        self._raw = site.path(place.raw)
        self.buffer = open_buffer(site=site, bus=bus, clock=clock, place=self.source, pair=pair)
        self._journal = Journal(site.path(f"{self.source}/sent-{self.target}"))
        self._ids = detector_ids(site.config)
        self._subscription = bus.subscribe([HOP_TOPIC], start="earliest", consumer=f"{self.name}-hops")
        self._results: queue.SimpleQueue[tuple[Entry, CumbreError | None]] = queue.SimpleQueue()
        self._wake = threading.Condition()
        self._closed = False
        self._scan_every_s, self._next_scan = scan_every_s, 0.0
        self._threads = [
            threading.Thread(target=self._send_forever, name=f"{self.name}-{n}", daemon=True)
            for n in range(self._link.connections)
        ]
        for thread in self._threads:
            thread.start()

    def step(self, timeout_s: float) -> int:
        """Buffer what was written, report what was delivered; gives the number of files of both."""
        done = self._settle()
        messages = self._subscription.poll(0.0 if done else timeout_s)
        hops = []
        for message in messages:
            try:
                hops += self._buffer_message(message)
            except CumbreError as error:
                log.error("%s %s: %s", message.fields["obsId"], message.fields["detectorName"], error)
                hops.append(
                    hop_fields(
                        self._clock,
                        Piece.from_hop(message.fields),
                        "buffered" if self.tells_buffered else TRANSMITTED,
                        place=self.source,
                        outcome=error.outcome,
                        path=message.fields["path"],
                        message=str(error),
                    )
                )
        publish_hops(self._bus, hops)
        if messages:
            self._subscription.commit()
            with self._wake:
                self._wake.notify_all()
        if time.monotonic() >= self._next_scan:
            self._scan()
            self._next_scan = time.monotonic() + self._scan_every_s
        return done + len(hops) + self._settle()

    def close(self) -> None:
        """Stop sending; what is not delivered stays in the buffer."""
        self._closed = True
        with self._wake:
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(timeout=1.0)
        self._subscription.close()

    # into the buffer

    def _buffer_message(self, message: Message) -> list[dict[str, object]]:
        fields = message.fields
        if (fields["hop"], fields["outcome"], fields["place"]) != (self.watched_hop, "ok", self.source):
            return []
        if fields["detector"] < 0:
            return []
        path = Path(fields["path"])
        try:
            key = RawKey.parse(str(path.relative_to(self._raw)))
        except ValueError as error:
            raise BadFileError(
                f"{path}: outside {self._raw}; only files of {self.source} are sent"
            ) from error
        piece = Piece.from_hop(fields)
        for sidecar in sorted(path.parent.glob("*.json")):
            self._buffer_sidecar(sidecar, piece)
        if not self._is_mine(key):
            return []
        parcel = Parcel(str(key), fields["byteSize"], normal_checksum(fields["checksum"]), piece.group_id)
        added = self._add(parcel, piece)
        return [self._buffered_hop(piece, parcel)] if added and self.tells_buffered else []

    def _buffered_hop(self, piece: Piece, parcel: Parcel) -> dict[str, object]:
        path = self.buffer.data_path(parcel.key)
        return hop_fields(
            self._clock,
            piece,
            "buffered",
            place=self.source,
            path=path,
            byte_size=parcel.size,
            checksum=parcel.sha256,
        )

    def _buffer_sidecar(self, path: Path, piece: Piece) -> None:
        try:
            key = RawKey.parse(str(path.relative_to(self._raw)))
        except CumbreError:
            return
        if self._is_mine(key) and str(key) not in self.buffer and not self._journal.has(str(key), SENT):
            parcel = Parcel(str(key), path.stat().st_size, sha256_of(path), piece.group_id)
            self._add(parcel, Piece(piece.obs_id, piece.instrument, piece.group_id))

    def _is_mine(self, key: RawKey) -> bool:
        """Whether this pair sends a file: each part of an image by one pair, the sidecars by one."""
        part = raft_of(key.part) if key.is_detector else ""
        return share(key.obs_id, part, self._link.pairs) == self._pair

    def _add(self, parcel: Parcel, piece: Piece) -> bool:
        if self._journal.has(parcel.key, SENT):
            return False
        return self.buffer.add(parcel, piece, self._raw / parcel.key, self._clock.now_tai_s())

    def _scan(self) -> None:
        """Catch up: files of the source that were neither sent nor buffered, whatever became of their events."""
        for key in raw_files(self._raw):
            text = str(key)
            if (
                not self._is_mine(key)
                or text in self.buffer
                or self._journal.has(text, SENT)
                or self._journal.has(text, LOST)
            ):
                continue
            path = self._raw / text
            if not is_settled(path):
                continue  # its event, which knows more of it, is on the way
            try:
                group_id = group_of(path)
                piece = Piece(str(key.obs_id), key.instrument, group_id)
                if key.is_detector:
                    known = piece_of(key.instrument, key.obs_id, key.part, self._ids)
                    piece = replace(piece, detector=known.detector, detector_name=known.detector_name)
                parcel = Parcel(text, path.stat().st_size, sha256_of(path), group_id)
                added = self._add(parcel, piece)
            except (CumbreError, OSError) as error:
                log.warning("%s: %s", path, error)
                continue
            if added and key.is_detector and self.tells_buffered:
                publish_hops(self._bus, [self._buffered_hop(piece, parcel)])
        with self._wake:
            self._wake.notify_all()

    # over the link

    def _send_forever(self) -> None:
        """Loop of one connection."""
        sender: Sender | None = None
        pause_s = 0.05
        while not self._closed:
            entry = self.buffer.take(time.monotonic())
            if entry is None:
                with self._wake:
                    self._wake.wait(0.2)
                continue
            try:
                if sender is None:
                    sender = Sender.to(self._site, self.source, self.target, pair=self._pair)
            except CumbreError as error:
                self.buffer.give_back(entry)
                log.warning("%s → %s: %s; %d files wait", self.source, self.target, error, len(self.buffer))
                pause_s = self._pause(pause_s)
                continue
            try:
                self._send(sender, entry)
                pause_s = 0.05
            except Exception as error:
                # The loop of a worker: one file must never stop the link.
                sender.close()
                sender = None
                self._try_later(entry, error)
                pause_s = self._pause(pause_s)
        if sender is not None:
            sender.close()

    def _pause(self, pause_s: float) -> float:
        """Wait and give the next, longer wait."""
        end = time.monotonic() + pause_s
        while not self._closed and (left := end - time.monotonic()) > 0:
            with self._wake:
                self._wake.wait(left)
        return min(pause_s * 2, MAX_PAUSE_S)

    def _send(self, sender: Sender, entry: Entry) -> None:
        entry.attempts += 1
        path = self.buffer.data_path(entry.parcel.key)
        if (entry.attempts > 1 or not path.is_file()) and not self.buffer.repair(entry):
            answer = sender.ask(entry.parcel)
            if answer.get("answer") != "have":
                error = BadFileError(f"{path}: damaged here, and no good copy to repair it from")
                self._results.put((entry, error))
                return
        else:
            answer = sender.deliver(entry.parcel, path, ask_first=entry.resumed or entry.attempts > 1)
        word, said = answer.get("answer"), answer.get("error", "")
        if word in ("ok", "have") and answer.get("sha256") == entry.parcel.sha256:
            self._results.put((entry, None))
        elif word == "conflict":
            self._results.put((entry, ConflictError(f"{entry.parcel.key}: {self.target} has other content")))
        elif word == "refused":
            self._results.put((entry, UnprocessableDataError(f"{entry.parcel.key}: refused: {said}")))
        else:
            self._try_later(entry, TransientError(f"{entry.parcel.key}: answer {word!r} {said}"))

    def _try_later(self, entry: Entry, error: Exception) -> None:
        """Keep an entry for another try; the first and then ever rarer failures are told."""
        log.warning("%s → %s, try %d: %s", self.source, self.target, entry.attempts, error)
        if entry.attempts > QUICK_TRIES:
            # A file that fails again and again steps back, so that the younger ones get through.
            entry.not_before = time.monotonic() + min(0.5 * 2 ** (entry.attempts - QUICK_TRIES), 30.0)
        self.buffer.give_back(entry)
        if entry.attempts & (entry.attempts - 1) == 0:
            entry.failures_told += 1
            outcome = error.outcome if isinstance(error, CumbreError) else "Transient"
            self._transmission(entry, outcome, str(error))

    def _transmission(self, entry: Entry, outcome: str, message: str = "") -> None:
        """Record a transmission that failed, or that succeeded after failures; ``sent`` where it is a hop."""
        if not entry.key.is_detector:
            return
        details = {"outcome": outcome, "message": message, "attempt": max(entry.attempts, 1)}
        if outcome != "ok" or entry.failures_told:
            publish_hop(self._bus, self._clock, entry.piece, TRANSMITTED, place=self.source, **details)
        if outcome == "ok" and self.tells_sent:
            publish_hop(self._bus, self._clock, entry.piece, "sent", place=self.source, **details)

    # out of the buffer

    def _settle(self) -> int:
        """Report delivered files and let go of them."""
        count = 0
        while True:
            try:
                entry, error = self._results.get_nowait()
            except queue.Empty:
                return count
            count += 1
            if error is None:
                self._transmission(entry, "ok")
                self._journal.note(entry.parcel.key, SENT)
            else:
                self._give_up(entry, error)
            self.buffer.remove(entry)

    def _give_up(self, entry: Entry, error: CumbreError) -> None:
        """Take a file out of the way that can never be delivered."""
        log.error("%s → %s: %s", self.source, self.target, error)
        self._transmission(entry, error.outcome, str(error))
        self._journal.note(entry.parcel.key, LOST)
        try:
            kept = quarantine(
                self._site.path(f"{self.source}/quarantine"),
                entry.parcel.key,
                self.buffer.data_path(entry.parcel.key),
                error,
                at_tai=self._clock.now_tai_s(),
            )
        except NotFoundError:
            return
        publish_hop(
            self._bus,
            self._clock,
            entry.piece,
            "quarantined",
            place=self.source,
            outcome=error.outcome,
            path=kept,
            message=str(error),
        )


class Replicator(Relay):
    """Summit to base."""

    name = "replicator"
    tells_buffered = True


class Forwarder(Relay):
    """Base to archive."""

    name = "forwarder"
    source = "base"
    target = "archive"
    watched_hop = "at_base"
    tells_sent = True
