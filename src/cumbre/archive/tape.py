"""Tape: write-once volumes in tar format with an index, on any mounted tape or disk, or for a bucket.

A volume only grows; its end is where the index says, so a torn tail is cut off and written again. Each
volume can be read with plain ``tar`` at any time, and each member by offset alone. A full volume is read back
as a whole before it counts as closed; for a bucket it grows on a local disk and is on tape when it is uploaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import tarfile
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cumbre.archive.tape_index import (
    BLOCK,
    INDEX_FILE,
    VOLUMES_FILE,
    Sky,
    TapeEntry,
    TapeIndex,
    Volume,
    read_lines,
)
from cumbre.archive.tape_shelf import BucketShelf, FolderShelf, Shelf, hash_volume
from cumbre.core.errors import BadFileError, ConflictError, TransientError
from cumbre.core.time import Clock, utc_from_tai
from cumbre.stores.files import blocks_of, sha256_of_bytes, sync_folder, write_atomic

if TYPE_CHECKING:
    from cumbre.core.configuration import Site

__all__ = ["TapeArchive", "TapeEntry", "open_tape", "tape_state", "view_tape"]

log = logging.getLogger(__name__)

END_OF_ARCHIVE = bytes(2 * BLOCK)
VOLUME_BYTES = 4 << 30
LABEL_FILE = "tape.json"


class TapeArchive:
    """Volumes of one place; one writing process, safe to use from several of its threads.

    Parameters
    ----------
    folder
        Where volumes and index are.
    volume_bytes
        A volume that has reached this size is closed and made read-only.
    state
        Folder of this machine that remembers which tape belongs here and keeps others from writing to it.
        Without one nothing is checked.
    shelf
        Bucket that closed volumes go to; without one the folder is the tape.
    close_after_s
        Night time after which a volume for the bucket is closed, full or not.
    on_bad
        Called with the files of a full volume that do not read back as they were written.

    Raises
    ------
    TransientError
        The tape is not mounted, or another process writes to it.
    FatalError
        The index is damaged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        clock: Clock,
        label: str = "tape",
        volume_bytes: int = VOLUME_BYTES,
        state: Path | None = None,
        shelf: BucketShelf | None = None,
        close_after_s: float = float("inf"),
        on_bad: Callable[[list[TapeEntry]], None] = lambda _: None,
    ) -> None:
        self._folder, self._clock, self._label, self._volume_bytes = folder, clock, label, volume_bytes
        self._bucket, self._close_after_s, self._on_bad = shelf, close_after_s, on_bad
        self._lock = threading.Lock()
        self._index = TapeIndex()
        self._unsynced: list[TapeEntry] = []
        self._bad: set[str] = set()
        self._number, self._end = 1, 0
        self._begun_tai: float | None = None
        self._stream: io.FileIO | None = None
        self._guard = _locked(state, folder) if state is not None else None
        try:
            if state is None:
                folder.mkdir(parents=True, exist_ok=True)
            else:
                _check_label(folder, state / LABEL_FILE, label, clock)
            self._recover()
        except BaseException:
            self._unlock()
            raise

    def __len__(self) -> int:
        return len(self._index.entries)

    def __contains__(self, key: str) -> bool:
        return key in self._index.entries

    @property
    def shelf(self) -> Shelf:
        """Where volumes are read."""
        return self._bucket or FolderShelf(self._folder)

    @property
    def index(self) -> TapeIndex:
        """What is on the volumes."""
        return self._index

    def entry(self, key: str) -> TapeEntry:
        """Where a file is.

        Raises
        ------
        NotFoundError
            Not on these volumes.
        """
        return self._index.entry(key)

    def keys(self) -> list[str]:
        """All keys, in the order they were written."""
        return list(self._index.entries)

    def is_safe(self, entry: TapeEntry) -> bool:
        """Whether a file is on the tape itself, not only on its way to the bucket."""
        return self._bucket is None or self._bucket.has(entry.volume)

    def append(
        self, key: str, source: Path, sha256: str, *, sky: Sky | None = None, replaces: str = ""
    ) -> TapeEntry | None:
        """Write a file to the end of the volume; safe only when :meth:`sync` has given its entry.

        Parameters
        ----------
        sky
            When and where it was taken, for the index.
        replaces
            ``volume@offset`` of the damaged copy that this one is to stand for.

        Returns
        -------
        TapeEntry or None
            None when the same file is there already.

        Raises
        ------
        ConflictError
            The key is there with other content: tapes are never overwritten.
        BadFileError
            The source has another checksum than told; nothing is kept of it.
        """
        with self._lock:
            present = next((e for e in self._unsynced if e.key == key), None) or self._index.entries.get(key)
            if present is not None and present.place != replaces:
                if present.sha256 == sha256:
                    return None
                raise ConflictError(f"{key}: on {present.volume} with {present.sha256}, now {sha256}")
            begin, size = self._end, source.stat().st_size
            stream = self._open()
            info = tarfile.TarInfo(key)
            info.size, info.mtime, info.mode = size, int(utc_from_tai(self._clock.now_tai_s())), 0o444
            head = info.tobuf(format=tarfile.GNU_FORMAT)
            stream.seek(begin)
            try:
                _write(stream, head)
                digest, written = hashlib.sha256(), 0
                for block in blocks_of(source):
                    digest.update(block)
                    written += _write(stream, block)
                found = f"sha256:{digest.hexdigest()}"
                if found != sha256 or written != size:
                    raise BadFileError(
                        f"{source}: {written} bytes with {found}, expected {size} with {sha256}"
                    )
                _write(stream, bytes(-size % BLOCK) + END_OF_ARCHIVE)
            except BaseException:
                with contextlib.suppress(OSError):
                    stream.truncate(begin)
                raise
            sky = sky or Sky()
            entry = TapeEntry(
                self._volume_name(), key, begin + len(head), size, sha256, self._clock.now_tai_s(),
                **asdict(sky), replaces=replaces,
            )  # fmt: skip
            self._end = entry.end
            self._unsynced.append(entry)
            return entry

    def sync(self) -> list[TapeEntry]:
        """Make what was appended durable: the volume, then its lines in the index; close what is full.

        Returns
        -------
        list of TapeEntry
            Files that are safe on tape now: at once on a folder, after its upload in a volume for a bucket.

        Raises
        ------
        TransientError
            The bucket does not answer; the volume stays here and goes up later.
        """
        with self._lock:
            safe: list[TapeEntry] = []
            if self._stream is not None and self._unsynced:
                os.fsync(self._stream.fileno())
                self._append_line(self._index_path, b"".join(entry.line() for entry in self._unsynced))
                for entry in self._unsynced:
                    self._index.add(entry)
                if self._bucket is None:
                    safe += self._unsynced
                self._unsynced = []
            if self._end and (self._end >= self._volume_bytes or self._is_due()):
                self._close_volume()
            return [entry for entry in safe + self._upload() if entry.place not in self._bad]

    def read(self, key: str) -> bytes:
        """Bytes of a file, verified.

        Raises
        ------
        NotFoundError
            Not on these volumes.
        BadFileError
            The volume is damaged there.
        """
        return read_entry(self.shelf, self.entry(key))

    def close(self) -> None:
        """Sync and let go."""
        try:
            self.sync()
        finally:
            if self._stream is not None:
                self._stream.close()
                self._stream = None
            self._unlock()

    def abandon(self) -> None:
        """Let go without a last word, after a fault of the medium; what was not synced is written again."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None
        self._unlock()

    def _unlock(self) -> None:
        if self._guard is not None:
            os.close(self._guard)
            self._guard = None

    # volumes

    @property
    def _index_path(self) -> Path:
        return self._folder / INDEX_FILE

    def _volume_name(self) -> str:
        return f"{self._label}-{self._number:06d}.tar"

    def _volume_path(self, number: int) -> Path:
        return self._folder / f"{self._label}-{number:06d}.tar"

    def _open(self) -> io.FileIO:
        if self._stream is None:
            descriptor = os.open(self._volume_path(self._number), os.O_RDWR | os.O_CREAT, 0o644)
            self._stream = io.FileIO(descriptor, "r+b")
            sync_folder(self._folder)
        return self._stream

    @staticmethod
    def _append_line(path: Path, content: bytes) -> None:
        """Append whole lines durably; what could only be written in part is taken back."""
        with path.open("ab", buffering=0) as stream:
            before = stream.seek(0, os.SEEK_END)
            try:
                _write(stream, content)
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(before)
                raise

    def _is_due(self) -> bool:
        if self._bucket is None:
            return False
        if self._begun_tai is None:
            mine = self._index.by_volume().get(self._volume_name(), [])
            self._begun_tai = min((entry.tai for entry in mine), default=None)
        begun = self._begun_tai
        return begun is not None and self._clock.now_tai_s() - begun >= self._close_after_s

    def _close_volume(self) -> None:
        """Read the volume back from the medium and note the checksum of the whole."""
        name, path = self._volume_name(), self._volume_path(self._number)
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        entries = self._index.by_volume().get(name, [])
        checksum, found = hash_volume(blocks_of(path), entries)
        bad = [entry for entry in entries if found.get(entry.offset) != entry.sha256]
        if bad:
            self._bad |= {entry.place for entry in bad}
            log.error(
                "%s: %d of %d files do not read back as they were written", path, len(bad), len(entries)
            )
            # Before the volume counts as closed: after a crash it is read back, and this done, again.
            self._on_bad([entry for entry in bad if self._index.entries[entry.key] == entry])
        volume = Volume(name, path.stat().st_size, checksum, len(entries), self._clock.now_tai_s())
        self._append_line(self._folder / VOLUMES_FILE, _volume_line(volume))
        self._index.volumes[name] = volume
        path.chmod(0o444)
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._number, self._end, self._begun_tai = self._number + 1, 0, None

    def _upload(self) -> list[TapeEntry]:
        if self._bucket is None:
            return []
        safe: list[TapeEntry] = []
        for volume in list(self._index.volumes.values()):
            if self._bucket.has(volume.volume):
                continue
            entries = self._index.by_volume().get(volume.volume, [])
            self._bucket.put(volume, b"".join(entry.line() for entry in entries))
            safe += [entry for entry in entries if self._index.entries[entry.key] == entry]
        return safe

    def _recover(self) -> None:
        """Read the index and cut off what a crash left behind it."""
        if self._bucket is not None and not self._index_path.exists():
            self._bucket.restore(self._folder)
        good = [entry for entry in read_lines(self._index_path, TapeEntry) if self._is_there(entry)]
        volumes = read_lines(self._folder / VOLUMES_FILE, Volume)
        _keep_only(self._index_path, b"".join(entry.line() for entry in good))
        _keep_only(self._folder / VOLUMES_FILE, b"".join(map(_volume_line, volumes)))
        for entry in good:
            self._index.add(entry)
        self._index.volumes = {item.volume: item for item in volumes}
        names = sorted({entry.volume for entry in good} | set(self._index.volumes))
        if names:
            self._number = int(names[-1].rpartition("-")[2].removesuffix(".tar"))
            if names[-1] in self._index.volumes:
                self._number += 1
            else:
                self._end = max(entry.end for entry in good if entry.volume == names[-1])
        path = self._volume_path(self._number)
        if path.exists():
            with path.open("r+b") as stream:
                stream.truncate(self._end)
                stream.seek(self._end)
                stream.write(END_OF_ARCHIVE)

    def _is_there(self, entry: TapeEntry) -> bool:
        try:
            return (self._folder / entry.volume).stat().st_size >= entry.offset + entry.size
        except FileNotFoundError:
            # A volume on the shelf: its index lines stay true.
            return True


def _volume_line(volume: Volume) -> bytes:
    return json.dumps(asdict(volume)).encode() + b"\n"


def _keep_only(path: Path, content: bytes) -> None:
    """Cut off torn lines and those whose bytes are gone."""
    if path.exists() and path.read_bytes() != content:
        log.warning("%s: lines of an unfinished write taken away", path)
        write_atomic(path, content)


def _write(stream: io.FileIO, content: bytes) -> int:
    """Write all of it: a raw file may take less than it is given."""
    view = memoryview(content)
    while view:
        view = view[stream.write(view) :]
    return len(content)


def read_entry(shelf: Shelf, entry: TapeEntry) -> bytes:
    """Bytes of one file on a tape, verified.

    Raises
    ------
    NotFoundError
        The volume is not here.
    BadFileError
        It is damaged there.
    """
    content = b"".join(shelf.blocks(entry.volume, entry.offset, entry.size))
    if sha256_of_bytes(content) != entry.sha256:
        raise BadFileError(
            f"{entry.volume}: {entry.key} at {entry.offset} is damaged; take the copy of another place"
        )
    return content


def _locked(state: Path, folder: Path) -> int:
    """Take the right to write: a descriptor that holds the lock."""
    state.mkdir(parents=True, exist_ok=True)
    guard = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(guard)
        raise TransientError(f"{folder}: another process writes to this tape") from None
    return guard


def _check_label(folder: Path, remembered: Path, label: str, clock: Clock) -> None:
    """Make sure that the tape in the folder is the one that belongs here, or give a new one its label.

    Raises
    ------
    TransientError
        Another tape is there, or none.
    """
    here = folder / LABEL_FILE
    if not remembered.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not here.exists():
            body = {"label": label, "id": uuid.uuid4().hex, "made_tai": clock.now_tai_s()}
            write_atomic(here, json.dumps(body).encode())
        write_atomic(remembered, here.read_bytes())
        return
    expected = json.loads(remembered.read_bytes())
    try:
        found = json.loads(here.read_bytes())
    except (OSError, ValueError) as error:
        raise TransientError(
            f"{folder}: tape {expected['label']} ({expected['id'][:8]}) is not mounted here ({error}); mount "
            f"it, or delete {remembered} to begin a new tape in this folder"
        ) from error
    if found.get("id") != expected["id"]:
        raise TransientError(
            f"{folder}: another tape ({str(found.get('id'))[:8]}) is mounted, expected {expected['id'][:8]}; "
            f"mount the right one, or delete {remembered} to go on with this one"
        )


def tape_state(site: Site, place: str) -> Path:
    """Folder of this machine's memory of a place's tape."""
    return site.path(f"{place}/taped")


def _folder_and_shelf(site: Site, place: str) -> tuple[Path, BucketShelf | None]:
    from cumbre.stores.objects import ObjectStore

    settings = site.config.places[place]
    assert settings.tape is not None
    if "://" not in settings.tape:
        return site.path(settings.tape), None
    folder = site.path(f"{place}/tape-open")
    return folder, BucketShelf(ObjectStore(settings.tape), folder, lock_days=settings.tape_lock_days)


def open_tape(
    site: Site, place: str, clock: Clock, on_bad: Callable[[list[TapeEntry]], None] = lambda _: None
) -> TapeArchive:
    """The tape of a place for writing; errors as in :class:`TapeArchive`."""
    settings = site.config.places[place]
    folder, shelf = _folder_and_shelf(site, place)
    return TapeArchive(
        folder,
        clock=clock,
        label=place,
        volume_bytes=int(settings.tape_volume_mb * 1e6),
        state=tape_state(site, place),
        shelf=shelf,
        close_after_s=settings.tape_close_s,
        on_bad=on_bad,
    )


def view_tape(site: Site, place: str) -> tuple[TapeIndex, Shelf]:
    """The tape of a place for reading, whoever writes to it."""
    folder, shelf = _folder_and_shelf(site, place)
    return TapeIndex.read(folder), shelf or FolderShelf(folder)
