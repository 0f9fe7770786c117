"""Relays: what was written at one place goes to the next, through an outage buffer, oldest image first.

The replicator takes ``written`` at the summit to the base, the forwarder ``at_base`` to the archive. A file
leaves the buffer only when the receiver says that it has it on disk with the same checksum. Where there is a
control system a replicator sends what its jobs say and leaves the rest to the Catch-Up Archiver; else the pairs
of a link share all that comes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.addresses import link_of
from cumbre.archive.buffer import Entry, open_buffer
from cumbre.archive.guard import KEEP_ALIVE_S
from cumbre.archive.journal import Journal, RawRounds, group_of, is_settled
from cumbre.archive.link_watch import LinkWatch, probe_folders
from cumbre.archive.orders import JOB_TOPIC, Orders
from cumbre.archive.pairs import PairLock, buffer_folders, link_name, raft_of, relay_name, share
from cumbre.archive.pool import FULL, TAPE
from cumbre.archive.protocol import Parcel
from cumbre.archive.sender import Sender
from cumbre.archive.told import told_parcels
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
MAX_MODE_CHARS = 200
PARK_S = 60.0
"""Real seconds that a file is left to other pairs and the Catch-Up Archiver."""
ORPHAN_S = 60.0
"""Real seconds after which a pair takes over a file whose own pair does not run."""
QUICK_TRIES = 3
QUIET_AFTER_S, QUIET_LOOK_S = 3.0, 0.1
"""Real seconds."""
COMMIT_EVERY_S = 2.0
"""Real seconds of events that come again after a crash, and are known then; each commit is a turn at the bus."""


class Relay:
    """One pair's sending end.

    Parameters
    ----------
    pair
        Number of the pair.
    scan_every_s
        Real seconds between scans of the source's raw files (only where no jobs are assigned).
    """

    source = "summit"
    target = "base"
    watched_hop = "written"
    tells_buffered = False
    tells_sent = False
    obeys_jobs = False
    """Whether the control system, where there is one, says what is sent; else the pairs share what comes."""

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
        self._rounds = RawRounds(
            self._raw, lambda key: self._journal.has(key, SENT) or self._journal.has(key, LOST)
        )
        self._ids = detector_ids(site.config)
        self._results: queue.SimpleQueue[tuple[Entry, CumbreError | None]] = queue.SimpleQueue()
        self._wake = threading.Condition()
        self._closed = False
        self._scan_every_s, self._next_scan = scan_every_s, 0.0
        self._uncommitted, self._next_commit = False, 0.0
        self._heard_s = time.monotonic()
        self._progress: dict[str, int] = {}
        self._running = PairLock(site, self.name)
        self.orders: Orders | None = None
        recovered: list[dict[str, Any]] = []
        topics = [HOP_TOPIC]
        if self.obeys_jobs and site.config.archive.control:
            self.orders = Orders(link_name(self.source, self.target), pair, bus, clock)
            recovered = self.orders.recover(self.watched_hop, self.source)
            topics.append(JOB_TOPIC)
        self._subscription = bus.subscribe(
            topics, start="earliest", consumer=f"{self.name}-hops",
            only={HOP_TOPIC: {"hop": self.watched_hop, "place": self.source}},
        )  # fmt: skip
        self.watch = LinkWatch(
            site=site, bus=bus, source=self.source, target=self.target, pair=pair, name=self.name,
            queued=lambda: len(self.buffer), stores=self._test_stores, changed=self._wake_up,
        )  # fmt: skip
        self._threads = [
            threading.Thread(target=self._send_forever, name=f"{self.name}-{n}", daemon=True)
            for n in range(self._link.connections)
        ]
        for thread in self._threads:
            thread.start()
        for fields in recovered:
            self._take_in(fields)

    def step(self, timeout_s: float) -> int:
        """Buffer what was written, report what was delivered; gives the number of files of both."""
        done = self._settle()
        messages = self._poll(0.0 if done else timeout_s)
        hops: list[dict[str, object]] = []
        for message in messages:
            if message.topic == JOB_TOPIC:
                hops += self._order(message)
            elif _is_hop(message.fields, self.watched_hop, self.source):
                hops += self._take_in(message.fields)
        publish_hops(self._bus, hops)
        if messages:
            self._uncommitted = True
            self._wake_up()
        if self._uncommitted and time.monotonic() >= self._next_commit:
            self._commit()
        if (
            time.monotonic() >= self._next_scan and not messages
        ):  # else more events may come that tell of files
            if self.orders is None:
                self._scan()
            else:
                self.orders.book.forget(self._clock.now_tai_s())
            self._next_scan = time.monotonic() + self._scan_every_s
        return done + len(hops) + self._settle()

    def _poll(self, timeout_s: float) -> list[Message]:
        """Next messages; between two images looked for less often, because many pairs look at one bus."""
        now = time.monotonic()
        end = now + timeout_s
        while now < end and now - self._heard_s > QUIET_AFTER_S and self._results.empty():
            if messages := self._subscription.poll(0.0):
                self._heard_s = now
                return messages
            with self._wake:
                self._wake.wait(min(QUIET_LOOK_S, end - now))
            now = time.monotonic()
        messages = self._subscription.poll(max(end - now, 0.0))
        if messages:
            self._heard_s = time.monotonic()
        return messages

    def close(self) -> None:
        """Stop sending; what is not delivered stays in the buffer."""
        self._closed = True
        self._wake_up()
        if self._uncommitted:
            self._commit()
        self.watch.close()
        for thread in self._threads:
            thread.join(timeout=1.0)
        self._subscription.close()
        self._running.close()

    def _commit(self) -> None:
        self._subscription.commit()
        self._uncommitted = False
        self._next_commit = time.monotonic() + COMMIT_EVERY_S

    def _wake_up(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _test_stores(self) -> dict[str, str]:
        """What is wrong with the own stores, by name; empty when nothing is."""
        failures = probe_folders({"raw cache": self._raw})
        stores = buffer_folders(self._site, self.source, self._pair)
        broken = probe_folders({str(folder): folder for folder in stores})
        if len(broken) == len(stores):  # one of two is enough, and the buffer's alarm tells of the other
            failures["outage buffer"] = "; ".join(broken.values())
        tape = self._site.config.places[self.source].tape
        if tape and "://" not in tape:
            failures |= probe_folders({TAPE: self._site.path(tape)})
        return failures

    # into the buffer

    def _order(self, message: Message) -> list[dict[str, object]]:
        """A job of the control system: announce it, and take what it claims and is written already."""
        assert self.orders is not None
        job, files = self.orders.order(message.fields)
        if job is not None and job.pair == self._pair:
            self.watch.announce(job)
        return [hop for fields in files for hop in self._take_in(fields)]

    def _take_in(self, fields: dict[str, Any]) -> list[dict[str, object]]:
        """A file was written; gives the hops to tell."""
        try:
            return self._buffer_file(fields)
        except CumbreError as error:
            log.error("%s %s: %s", fields["obsId"], fields["detectorName"], error)
            hop = "buffered" if self.tells_buffered else TRANSMITTED
            return [
                hop_fields(
                    self._clock,
                    Piece.from_hop(fields),
                    hop,
                    place=self.source,
                    outcome=error.outcome,
                    path=fields["path"],
                    message=str(error),
                )
            ]

    def _buffer_file(self, fields: dict[str, Any]) -> list[dict[str, object]]:
        path = Path(fields["path"])
        try:
            key = RawKey.parse(str(path.relative_to(self._raw)))
        except ValueError as error:
            raise BadFileError(
                f"{path}: outside {self._raw}; only files of {self.source} are sent"
            ) from error
        piece = Piece.from_hop(fields)
        job = self.orders.written(fields) if self.orders is not None else None
        if job is not None or (self.orders is None and share(key.obs_id, "", self._link.pairs) == self._pair):
            for sidecar in sorted(path.parent.glob("*.json")):
                self._buffer_sidecar(sidecar, piece)
        if job is None and (self.orders is not None or not self._is_mine(key)):
            return []
        mode = job.mode[:MAX_MODE_CHARS] if job is not None else ""
        checksum = normal_checksum(fields["checksum"])
        parcel = Parcel(str(key), fields["byteSize"], checksum, piece.group_id, mode)
        if self.orders is not None and self._journal.has(parcel.key, SENT):
            self.orders.sent(piece, 0)
            return []
        if not self._add(parcel, piece):
            return []
        self.watch.started(parcel.key)
        if job is not None and self.orders is not None:
            self.orders.begin(job)
        return [self._buffered_hop(piece, parcel)] if self.tells_buffered else []

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
        if str(key) in self.buffer or self._journal.has(str(key), SENT):
            return
        parcel = Parcel(str(key), path.stat().st_size, sha256_of(path), piece.group_id)
        self._add(parcel, Piece(piece.obs_id, piece.instrument, piece.group_id))

    def _is_mine(self, key: RawKey) -> bool:
        """Whether this pair sends a file: each part of an image by one pair, the sidecars by one."""
        part = raft_of(key.part) if key.is_detector else ""
        return share(key.obs_id, part, self._link.pairs) == self._pair

    def _is_orphan(self, key: RawKey, path: Path) -> bool:
        """Whether a file of another pair has waited long and that pair does not run."""
        part = raft_of(key.part) if key.is_detector else ""
        other = relay_name(self.source, share(key.obs_id, part, self._link.pairs))
        return is_settled(path, ORPHAN_S) and not PairLock.is_held(self._site, other)

    def _add(self, parcel: Parcel, piece: Piece) -> bool:
        if self._journal.has(parcel.key, SENT):
            return False
        return self.buffer.add(parcel, piece, self._raw / parcel.key, self._clock.now_tai_s())

    def _scan(self) -> None:
        """Catch up: files of the source that were neither sent nor buffered, whatever became of their events."""
        waiting = []
        for key in self._rounds.left():
            path = self._raw / str(key)
            # A young one's event, which knows more of it, is on the way; others are another pair's.
            is_ours = is_settled(path) and (self._is_mine(key) or self._is_orphan(key, path))
            if is_ours and str(key) not in self.buffer:
                waiting.append(key)
        told = told_parcels(self._bus, self.watched_hop, self.source, self._raw, waiting)
        for key in waiting:
            path = self._raw / str(key)
            try:
                group_id = group_of(path)
                piece = Piece(str(key.obs_id), key.instrument, group_id)
                if (key.instrument, key.part) in self._ids:
                    known = piece_of(key.instrument, key.obs_id, key.part, self._ids)
                    piece = replace(piece, detector=known.detector, detector_name=known.detector_name)
                found = sha256_of(path)
                parcel = told.get(str(key)) or Parcel(str(key), path.stat().st_size, found, group_id)
                if found != parcel.sha256:
                    raise BadFileError(f"has {found}, came with {parcel.sha256}; left until it is mended")
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
        pause_s, used = 0.05, time.monotonic()
        while not self._closed:
            # With control, a local-only pair keeps what it has: its jobs go to pairs that can send.
            may_send = self.orders is None or self.watch.pool == FULL
            entry = self.buffer.take(time.monotonic()) if may_send else None
            if entry is None:
                with self._wake:
                    self._wake.wait(0.2)
                if sender is not None and time.monotonic() - used > KEEP_ALIVE_S:
                    sender, used = _kept_alive(sender), time.monotonic()
                continue
            try:
                if self._is_not_needed(entry):
                    continue
                if sender is None:
                    sender = Sender.to(self._site, self.source, self.target, pair=self._pair)
            except (CumbreError, OSError) as error:
                self.buffer.give_back(entry)
                log.warning("%s → %s: %s; %d files wait", self.source, self.target, error, len(self.buffer))
                pause_s = self._pause(pause_s)
                continue
            try:
                self._send(sender, entry)
                pause_s, used = 0.05, time.monotonic()
            except Exception as error:
                # The loop of a worker: one file must never stop the link.
                if sender.resumed_at > self._progress.get(entry.parcel.key, 0):
                    # A big file that gets on, however slowly, is not a file that fails.
                    self._progress[entry.parcel.key] = sender.resumed_at
                    entry.attempts = min(entry.attempts, 1)
                sender.close()
                sender = None
                self.watch.doubt()
                self._try_later(entry, error)
                pause_s = self._pause(pause_s)
        if sender is not None:
            sender.close()

    def _is_not_needed(self, entry: Entry) -> bool:
        """Deal with a file that another pair or the Catch-Up Archiver has sent, or shall send."""
        if self._journal.has(entry.parcel.key, SENT):
            self._results.put((entry, None))
            return True
        if self.orders is not None and self.orders.is_elsewhere(entry.piece):
            self._park(entry)
            return True
        return False

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
            before = sender.sent_bytes
            try:
                ask_first = entry.resumed or entry.attempts > 1 or not entry.key.is_detector
                answer = sender.deliver(entry.parcel, path, ask_first=ask_first)
            finally:
                self.watch.sent(sender.sent_bytes - before)
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
        if self.orders is not None and entry.attempts > self._link.retries:
            self.orders.gave_up(entry.piece, error)
            self._park(entry)
            return
        if entry.attempts > QUICK_TRIES:
            # A file that fails again and again steps back, so that the younger ones get through.
            entry.not_before = time.monotonic() + min(0.5 * 2 ** (entry.attempts - QUICK_TRIES), 30.0)
        self.buffer.give_back(entry)
        if entry.attempts & (entry.attempts - 1) == 0:
            entry.failures_told += 1
            outcome = error.outcome if isinstance(error, CumbreError) else "Transient"
            publish_hops(self._bus, self._transmission(entry, outcome, str(error)))

    def _park(self, entry: Entry) -> None:
        """Leave a file to others for a while; should they send it, it is only removed here."""
        entry.not_before = time.monotonic() + PARK_S
        entry.attempts = min(entry.attempts, 1)
        entry.resumed = True
        self.watch.ended(entry.parcel.key)
        self.buffer.give_back(entry)

    def _transmission(self, entry: Entry, outcome: str, message: str = "") -> list[dict[str, Any]]:
        """Hops of a transmission that failed, or succeeded after failures; ``sent`` where it is a hop."""
        if not entry.key.is_detector:
            return []
        told = [TRANSMITTED] if outcome != "ok" or entry.failures_told else []
        if outcome == "ok" and self.tells_sent:
            told.append(SENT)
        return [
            hop_fields(
                self._clock, entry.piece, hop, place=self.source, outcome=outcome, message=message,
                attempt=max(entry.attempts, 1),
            )
            for hop in told
        ]  # fmt: skip

    # out of the buffer

    def _settle(self) -> int:
        """Report what was delivered, all together, and let go of it."""
        results: list[tuple[Entry, CumbreError | None]] = []
        while not self._results.empty():
            results.append(self._results.get_nowait())
        fresh = [
            entry for entry, error in results
            if error is None and not self._journal.has(entry.parcel.key, SENT)
        ]  # fmt: skip
        publish_hops(self._bus, [hop for entry in fresh for hop in self._transmission(entry, "ok")])
        for entry in fresh:
            self._journal.note(entry.parcel.key, SENT)
        for entry, error in results:
            self._progress.pop(entry.parcel.key, None)
            self.watch.ended(entry.parcel.key)
            if error is not None:
                self._give_up(entry, error)
            if self.orders is not None and error is not None:
                self.orders.gave_up(entry.piece, error)
            elif self.orders is not None:
                self.orders.sent(entry.piece, entry.parcel.size)
            self.buffer.remove(entry)
        return len(results)

    def _give_up(self, entry: Entry, error: CumbreError) -> None:
        """Take a file out of the way that can never be delivered."""
        log.error("%s → %s: %s", self.source, self.target, error)
        publish_hops(self._bus, self._transmission(entry, error.outcome, str(error)))
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

    tells_buffered = True
    obeys_jobs = True


class Forwarder(Relay):
    """Base to archive."""

    source = "base"
    target = "archive"
    watched_hop = "at_base"
    tells_sent = True


def _kept_alive(sender: Sender) -> Sender | None:
    """A connection without work, still good; None when it broke meanwhile."""
    try:
        sender.ping()
    except CumbreError as error:
        log.info("connection made anew at the next file: %s", error)
        sender.close()
        return None
    return sender


def _is_hop(fields: dict[str, Any], hop: str, place: str) -> bool:
    return (fields["hop"], fields["outcome"], fields["place"]) == (hop, "ok", place) and fields[
        "detector"
    ] >= 0
