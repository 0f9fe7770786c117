"""The network outage buffer: files that a link has not proven to have delivered, on one store or on two.

On each store ``data/<key>`` is the file, ``entries/<name>.json`` what is known of it; the entry is written after
the data and removed after it, so whatever has an entry is still owed. With two stores either may die at any
moment: writing goes on with the other, and what comes back is filled again (:mod:`cumbre.archive.buffer_store`).
"""

from __future__ import annotations

import heapq
import json
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.alarms import Alarm
from cumbre.archive.buffer_store import BufferStore, entry_name
from cumbre.archive.pairs import buffer_folders
from cumbre.archive.protocol import Parcel
from cumbre.capture.daq import DaqImage
from cumbre.capture.hops import Piece, publish_hop
from cumbre.capture.keys import RawKey
from cumbre.capture.writer import DAQ_FOLDER
from cumbre.core.errors import BadFileError, CumbreError, NotFoundError, TransientError
from cumbre.stores.files import sha256_of

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

Order = tuple[int, int, str, bool, str]

CALIBRATIONS = ("BIAS", "DARK", "FLAT")
WARN, CRITICAL, CALM = 0.8, 0.95, 0.75
"""Parts of the limit at which an alarm begins, becomes worse, and ends."""


@dataclass(slots=True)
class Entry:
    """One file that is owed to the other end."""

    parcel: Parcel
    piece: Piece
    source: Path
    """Where it was buffered from."""
    added_tai: float
    resumed: bool = False
    """From before a restart: the receiver may have it already."""
    attempts: int = 0
    failures_told: int = 0
    not_before: float = 0.0
    """Monotonic time before which it is not tried again."""
    key: RawKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = RawKey.parse(self.parcel.key)

    def body(self) -> bytes:
        """What is kept of it on disk."""
        body = {
            "parcel": asdict(self.parcel), "piece": asdict(self.piece), "source": str(self.source),
            "added_tai": self.added_tai,
        }  # fmt: skip
        return json.dumps(body).encode()


@dataclass(slots=True)
class Watch:
    """Whom a buffer tells, and what it may drop; by default nobody and nothing.

    Attributes
    ----------
    alarm
        Makes the alarm of a matter (``full``, ``store-1``…).
    may_drop
        Whether an entry is held elsewhere and is of the kind that policy lets go when the buffer is full.
    dropped
        Called for each entry dropped, with its path.
    """

    alarm: Callable[[str], Alarm] | None = None
    may_drop: Callable[[Entry], bool] = lambda _: False
    dropped: Callable[[Entry, Path], None] = lambda *_: None


class OutageBuffer:
    """Entries given out oldest image first; safe to use from several threads.

    Parameters
    ----------
    folders
        One folder, or one on each of two stores.
    limit_bytes
        Most that is kept; None for no limit.
    watch
        Alarms and policy.
    heal_every_s
        Real seconds between looks at a store that failed.
    """

    def __init__(
        self,
        folders: Path | Sequence[Path],
        *,
        limit_bytes: float | None = None,
        watch: Watch | None = None,
        heal_every_s: float = 10.0,
    ) -> None:
        folders = [folders] if isinstance(folders, Path) else list(folders)
        self.folder = folders[0]
        self._watch, self._limit = watch or Watch(), limit_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._used = 0
        self._taken: set[str] = set()
        self._heap: list[tuple[Order, str]] = []
        self._delayed: dict[str, float] = {}
        self._alarms: dict[str, Alarm] = {}
        self._stores = [BufferStore(folder) for folder in folders]
        fresh = not any(store.is_known for store in self._stores)
        for store in self._stores:
            if not store.begin(fresh=fresh or len(folders) == 1):
                self._failed(store, f"{store.folder}: not mounted")
        for store in self._working():
            self._load(store)
        self._look_at_room()
        if len(self._stores) > 1:
            self._start_healing(heal_every_s)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    @property
    def used_bytes(self) -> int:
        """Bytes of all files, each counted once."""
        return self._used

    def data_path(self, key: str) -> Path:
        """Where the buffer keeps a file: on the first working store that has it."""
        stores = self._working() or self._stores
        return next((s.data(key) for s in stores if s.data(key).is_file()), stores[0].data(key))

    def add(self, parcel: Parcel, piece: Piece, source: Path, at_tai: float) -> bool:
        """Keep a file until it is delivered; False when it is here already.

        Raises
        ------
        BadFileError
            The source has not the checksum of the parcel.
        NotFoundError
            There is no source.
        TransientError
            The buffer is full, or no store takes the file; it stays where it is and is found again.
        """
        with self._lock:
            if parcel.key in self._entries:
                return False
        entry = Entry(parcel, piece, source, at_tai)
        self._make_room(entry)
        kept = False
        for store in self._working():
            try:
                # One store may share the source's bytes, the other has its own.
                store.put(parcel.key, source, parcel.sha256, entry.body(), link=not kept)
                kept = True
                if len(self._stores) == 1:
                    self._calm(self._name(store), f"{store.folder} takes files again")
            except OSError as error:
                if not source.is_file():
                    raise NotFoundError(f"{source}: gone before it was buffered") from error
                self._failed(store, f"{store.folder}: {error}")
        if not kept:
            raise TransientError(
                f"{parcel.key}: no store of the outage buffer takes it; it waits at {source}"
            )
        with self._lock:
            if parcel.key not in self._entries:
                self._keep(entry)
        self._look_at_room()
        return True

    def take(self, now: float) -> Entry | None:
        """Give out the oldest entry that nobody has and that may be tried at monotonic time ``now``."""
        with self._lock:
            for key in [k for k in self._delayed if self._delayed[k] <= now]:
                del self._delayed[key]
                self._queue(key)
            while self._heap:
                _, key = heapq.heappop(self._heap)
                entry = self._entries.get(key)
                if entry is None or key in self._taken:
                    continue
                if entry.not_before > now:
                    self._delayed[key] = entry.not_before
                    continue
                self._taken.add(key)
                return entry
            return None

    def give_back(self, entry: Entry) -> None:
        """Not delivered: it stays."""
        with self._lock:
            self._taken.discard(entry.parcel.key)
            self._queue(entry.parcel.key)

    def remove(self, entry: Entry) -> None:
        """Delivered and verified at the other end (or moved to quarantine): forget it."""
        key = entry.parcel.key
        away = False
        with self._lock:
            if self._entries.pop(key, None) is not None:
                self._used -= entry.parcel.size
            self._taken.discard(key)
        for store in self._stores:
            try:
                if store.failed:
                    away = True
                else:
                    store.remove(key)
            except OSError as error:
                away = True
                self._failed(store, f"{store.folder}: {error}")
        for store in self._working() if away and len(self._stores) > 1 else ():
            try:
                store.note_gone(key)
            except OSError as error:
                # Both are in trouble: the entry may come back, and is offered again before it is sent.
                self._failed(store, f"{store.folder}: {error}")
        self._look_at_room()

    def repair(self, entry: Entry) -> bool:
        """Make sure that the kept file is what it should be, from the other store or its source if need be."""
        key, wanted = entry.parcel.key, entry.parcel.sha256
        good = None
        for path in (*(store.data(key) for store in self._working()), entry.source):
            try:
                if sha256_of(path) == wanted:
                    good = path
                    break
                log.error("%s: damaged", path)
            except (CumbreError, OSError) as error:
                log.warning("%s: %s", path, error)
        if good is None:
            log.error("%s: no good copy on any store, nor at %s", key, entry.source)
            return False
        kept = False
        for store in self._working():
            try:
                kept |= store.mend(key, good, wanted, entry.body())
            except (OSError, CumbreError) as error:
                self._failed(store, f"{store.folder}: {error}")
        return kept

    # room

    def _make_room(self, entry: Entry) -> None:
        """Let calibrations that the camera store holds go, oldest first; refuse what does not fit even then."""
        if self._limit is None or self._used + entry.parcel.size <= self._limit:
            return
        if not entry.key.is_detector:
            return  # a few bytes without which the pixels are worth less
        if not self._watch.may_drop(entry):
            with self._lock:
                waiting = sorted(self._entries.values(), key=lambda item: item.key.order)
            for old in waiting:
                if self._used + entry.parcel.size <= self._limit:
                    return
                if old.parcel.key not in self._taken and old.key.is_detector and self._watch.may_drop(old):
                    path = self.data_path(old.parcel.key)
                    # Told before it is done: never silent, whenever this process dies.
                    self._watch.dropped(old, path)
                    self.remove(old)
            if self._used + entry.parcel.size <= self._limit:
                return
        message = (
            f"outage buffer {self.folder} is full ({self._used / 1e9:.3g} of {self._limit / 1e9:.3g} GB); "
            "new images stay where they were written; bring the link back or ship a disk (cumbre ship)"
        )
        self._tell("full", message, severity=3, used=self._used / self._limit)
        raise TransientError(f"{entry.parcel.key}: {message}")

    def _look_at_room(self) -> None:
        if self._limit is None:
            return
        part = self._used / self._limit
        if part >= WARN:
            self._tell(
                "full",
                f"outage buffer {self.folder}: {part:.0%} of {self._limit / 1e9:.3g} GB, {len(self)} files wait",
                severity=2 if part >= CRITICAL else 1,
                used=part,
            )
        elif part < CALM:
            self._calm("full", f"{part:.0%} used")

    # stores

    def _working(self) -> list[BufferStore]:
        return [store for store in self._stores if not store.failed]

    def _failed(self, store: BufferStore, message: str) -> None:
        log.error("outage buffer: %s", message)
        if len(self._stores) > 1:
            store.failed = True  # one store alone has nothing to stand in for it: it is simply tried again
        left = len(self._working()) if len(self._stores) > 1 else 0
        self._tell(self._name(store), f"{message}; {left} other stores work", severity=2 if left else 3)

    def _name(self, store: BufferStore) -> str:
        return f"store-{self._stores.index(store) + 1}"

    def heal(self) -> None:
        """Bring stores that failed back when they can be written, and fill what any of them lacks."""
        for store in self._stores:
            try:
                if store.failed and not store.begin(fresh=False):
                    continue
                self._fill(store)
            except (OSError, CumbreError) as error:
                self._failed(store, f"{store.folder}: {error}")
                continue
            if store.failed:
                store.failed = False
                self._fill(store)  # what came between
            self._calm(self._name(store), f"{store.folder} works and has everything")

    def _fill(self, store: BufferStore) -> None:
        others = [other for other in self._working() if other is not store]
        known = store.names()
        gone = {name for other in others for name in other.gone()}
        with self._lock:
            entries = {entry_name(key): entry for key, entry in self._entries.items()}
        for name in sorted(known & gone - entries.keys()):
            store.remove(name.replace("+", "/").removesuffix(".json"))
        for name in sorted(known - entries.keys() - gone):
            self._load_one(store, name)
        for name, entry in entries.items():
            key = entry.parcel.key
            if name in known and store.data(key).is_file():
                continue
            for path in (*(other.data(key) for other in others), entry.source):
                try:
                    store.put(key, path, entry.parcel.sha256, entry.body(), link=False)
                    break
                except (BadFileError, NotFoundError) as error:
                    log.warning("%s: %s", key, error)
            if key not in self._entries:
                store.remove(key)
        if all(not other.failed for other in others):
            for other in others:
                other.forget_gone(gone)

    def _start_healing(self, every_s: float) -> None:
        stop, me = threading.Event(), weakref.ref(self)

        def look() -> None:
            while not stop.wait(every_s):
                buffer = me()
                if buffer is None:
                    return
                try:
                    buffer.heal()
                except Exception:
                    log.exception("outage buffer: healing failed; tried again")
                del buffer

        weakref.finalize(self, stop.set)
        threading.Thread(target=look, name="buffer-heal", daemon=True).start()

    # entries

    def _load(self, store: BufferStore) -> None:
        for name in sorted(store.names()):
            self._load_one(store, name)

    def _load_one(self, store: BufferStore, name: str) -> None:
        try:
            entry = _read_entry(store.read(name))
        except (ValueError, KeyError, TypeError, CumbreError, OSError) as error:
            log.error(
                "%s/%s: not an entry (%s); the scan will find its file again", store.folder, name, error
            )
            store.remove_entry(name)
            return
        with self._lock:
            if entry.parcel.key not in self._entries:
                self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        self._entries[entry.parcel.key] = entry
        self._used += entry.parcel.size
        self._queue(entry.parcel.key)

    def _queue(self, key: str) -> None:
        if key in self._entries:
            heapq.heappush(self._heap, (self._entries[key].key.order, key))

    # alarms

    def _alarm(self, what: str) -> Alarm | None:
        if what not in self._alarms and self._watch.alarm is not None:
            self._alarms[what] = self._watch.alarm(what)
        return self._alarms.get(what)

    def _tell(self, what: str, message: str, *, severity: int, used: float = 0.0) -> None:
        if alarm := self._alarm(what):
            alarm.begin(message, severity=severity, used=used, backlog=len(self))

    def _calm(self, what: str, message: str) -> None:
        if alarm := self._alarm(what):
            alarm.end(message)


def _read_entry(content: bytes) -> Entry:
    body: dict[str, Any] = json.loads(content)
    return Entry(
        Parcel.checked(body["parcel"]),
        Piece(**body["piece"]),
        Path(body["source"]),
        body["added_tai"],
        resumed=True,
    )


def open_buffer(*, site: Site, bus: Bus, clock: Clock, place: str, pair: int = 1) -> OutageBuffer:
    """The outage buffer of one pair of a place, as the site configures it: stores, limit, alarms, policy."""

    def dropped(entry: Entry, path: Path) -> None:
        publish_hop(
            bus,
            clock,
            entry.piece,
            "dropped",
            place=place,
            path=path,
            byte_size=entry.parcel.size,
            checksum=entry.parcel.sha256,
            message="calibration let go from the full outage buffer; the camera's store holds it",
        )

    settings = site.config.places[place]
    pairs = max((link.pairs for link in site.config.links if link.source == place), default=1)
    return OutageBuffer(
        buffer_folders(site, place, pair),
        limit_bytes=settings.buffer_gb * 1e9 / pairs if settings.buffer_gb else None,
        watch=Watch(
            alarm=lambda what: Alarm(bus, f"buffer-{place}-{pair}-{what}", place),
            may_drop=lambda entry: is_calibration_in_store(site.path(DAQ_FOLDER), entry),
            dropped=dropped,
        ),
    )


def is_calibration_in_store(daq: Path, entry: Entry) -> bool:
    """Whether an entry is of a bias, dark or flat whose array the camera's store holds, proven by its checksum."""
    try:
        image = DaqImage.open(daq / entry.piece.obs_id)
        wanted = image.checksum(entry.piece.detector_name)
        return (
            image.info.get("image_type") in CALIBRATIONS
            and wanted is not None
            and sha256_of(image.folder / f"{entry.piece.detector_name}.npy") == wanted
        )
    except (CumbreError, OSError):
        return False
