"""The network outage buffer: files that a link has not proven to have delivered.

``data/<key>`` is the file (a hard link where the file system can), ``entries/<name>.json`` what is known of
it; the entry is written after the data and removed after it, so whatever has an entry is still owed.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
import os
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.pairs import buffer_folders
from cumbre.archive.protocol import Parcel
from cumbre.capture.hops import Piece
from cumbre.capture.keys import RawKey
from cumbre.core.errors import CumbreError
from cumbre.stores.files import copy_verified, sha256_of, sync_folder, write_atomic

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

Order = tuple[int, int, str, bool, str]


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


class OutageBuffer:
    """A folder of entries, given out oldest image first; safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries_folder = folder / "entries"
        self._entries_folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._taken: set[str] = set()
        self._heap: list[tuple[Order, str]] = []
        self._delayed: dict[str, float] = {}
        for path in self._entries_folder.glob("*.json"):
            try:
                entry = _read_entry(path)
            except (ValueError, KeyError, TypeError, CumbreError) as error:
                log.error("%s: not an entry (%s); the catch-up scan will find its file again", path, error)
                path.unlink()
                continue
            self._entries[entry.parcel.key] = entry
            self._queue(entry.parcel.key)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def data_path(self, key: str) -> Path:
        """Where the buffer keeps a file."""
        return self.folder / "data" / key

    def add(self, parcel: Parcel, piece: Piece, source: Path, at_tai: float) -> bool:
        """Keep a file until it is delivered; False when it is here already.

        Raises
        ------
        BadFileError
            The source has not the checksum of the parcel.
        NotFoundError
            There is no source.
        """
        with self._lock:
            if parcel.key in self._entries:
                return False
        path = self.data_path(parcel.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            os.link(source, path)
            sync_folder(path.parent)
        except OSError:
            copy_verified(source, path, parcel.sha256)
        entry = Entry(parcel, piece, source, at_tai)
        body = {
            "parcel": asdict(parcel), "piece": asdict(piece), "source": str(source), "added_tai": at_tai
        }  # fmt: skip
        write_atomic(self._entry_path(entry), json.dumps(body).encode())
        with self._lock:
            self._entries[parcel.key] = entry
            self._queue(parcel.key)
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

    def _queue(self, key: str) -> None:
        if key in self._entries:
            heapq.heappush(self._heap, (self._entries[key].key.order, key))

    def give_back(self, entry: Entry) -> None:
        """Not delivered: it stays."""
        with self._lock:
            self._taken.discard(entry.parcel.key)
            self._queue(entry.parcel.key)

    def remove(self, entry: Entry) -> None:
        """Delivered and verified at the other end (or moved to quarantine): forget it."""
        path = self.data_path(entry.parcel.key)
        path.unlink(missing_ok=True)
        self._entry_path(entry).unlink(missing_ok=True)
        with self._lock:
            self._entries.pop(entry.parcel.key, None)
            self._taken.discard(entry.parcel.key)
        for folder in list(path.parents)[:3]:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only when empty

    def repair(self, entry: Entry) -> bool:
        """Make sure that the kept file is what it should be, from its source if need be."""
        path = self.data_path(entry.parcel.key)
        try:
            if sha256_of(path) == entry.parcel.sha256:
                return True
        except (CumbreError, OSError) as error:
            log.warning("%s: %s", path, error)
        try:
            copy_verified(entry.source, path, entry.parcel.sha256)
        except (CumbreError, OSError) as error:
            log.error("%s cannot be repaired from %s: %s", path, entry.source, error)
            return False
        return True

    def _entry_path(self, entry: Entry) -> Path:
        return self._entries_folder / f"{entry.parcel.key.replace('/', '+')}.json"


def _read_entry(path: Path) -> Entry:
    body: dict[str, Any] = json.loads(path.read_bytes())
    return Entry(
        Parcel.checked(body["parcel"]),
        Piece(**body["piece"]),
        Path(body["source"]),
        body["added_tai"],
        resumed=True,
    )


def open_buffer(*, site: Site, bus: Bus, clock: Clock, place: str, pair: int = 1) -> OutageBuffer:
    """The outage buffer of one pair of a place, as the site configures it."""
    del bus, clock
    return OutageBuffer(buffer_folders(site, place, pair)[0])
