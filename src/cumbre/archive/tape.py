"""Tape: write-once volumes in tar format with an index, on any mounted tape, disk or object mount.

A volume only grows; its end is where the index says, so a torn tail is cut off and written again. Each
volume can be read with plain ``tar`` at any time, and each member by offset alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from cumbre.core.errors import BadFileError, ConflictError, FatalError, NotFoundError
from cumbre.core.time import Clock, utc_from_tai
from cumbre.stores.files import blocks_of, sha256_of_bytes, sync_folder, write_atomic

log = logging.getLogger(__name__)

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
VOLUME_BYTES = 4 << 30
INDEX_FILE = "index.jsonl"


@dataclass(frozen=True, slots=True)
class TapeEntry:
    """One file on tape; ``offset`` is where its bytes begin in the volume."""

    volume: str
    key: str
    offset: int
    size: int
    sha256: str
    tai: float

    @property
    def end(self) -> int:
        """Where the next member's header begins."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


class TapeArchive:
    """Volumes of one place; one writing process, safe to use from several of its threads.

    Parameters
    ----------
    folder
        Where volumes and index are.
    volume_bytes
        A volume that has reached this size is closed and made read-only.
    """

    def __init__(
        self, folder: Path, *, clock: Clock, label: str = "tape", volume_bytes: int = VOLUME_BYTES
    ) -> None:
        self._folder, self._clock, self._label, self._volume_bytes = folder, clock, label, volume_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._entries: dict[str, TapeEntry] = {}
        self._unsynced: list[TapeEntry] = []
        self._number, self._end = 1, 0
        self._stream: BinaryIO | None = None
        self._recover()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def entry(self, key: str) -> TapeEntry:
        """Where a file is.

        Raises
        ------
        NotFoundError
            Not on these volumes.
        """
        try:
            return self._entries[key]
        except KeyError:
            raise NotFoundError(f"{self._folder}: {key!r} is on none of these volumes") from None

    def keys(self) -> list[str]:
        """All keys, in the order they were written."""
        return list(self._entries)

    def append(self, key: str, source: Path, sha256: str) -> TapeEntry | None:
        """Write a file to the end of the volume; safe only after :meth:`sync`.

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
            present = self._entries.get(key) or next((e for e in self._unsynced if e.key == key), None)
            if present is not None:
                if present.sha256 == sha256:
                    return None
                raise ConflictError(f"{key}: on {present.volume} with {present.sha256}, now {sha256}")
            stream = self._open()
            begin, size = self._end, source.stat().st_size
            info = tarfile.TarInfo(key)
            info.size, info.mtime, info.mode = size, int(utc_from_tai(self._clock.now_tai_s())), 0o444
            head = info.tobuf(format=tarfile.GNU_FORMAT)
            stream.seek(begin)
            stream.write(head)
            digest, written = hashlib.sha256(), 0
            for block in blocks_of(source):
                digest.update(block)
                written += stream.write(block)
            found = f"sha256:{digest.hexdigest()}"
            if found != sha256 or written != size:
                stream.truncate(begin)
                raise BadFileError(f"{source}: {written} bytes with {found}, expected {size} with {sha256}")
            stream.write(bytes(-size % BLOCK))
            entry = TapeEntry(
                self._volume_name(), key, begin + len(head), size, sha256, self._clock.now_tai_s()
            )
            self._end = entry.end
            stream.write(END_OF_ARCHIVE)
            self._unsynced.append(entry)
            return entry

    def sync(self) -> None:
        """Make what was appended durable: first the volume, then its lines in the index."""
        with self._lock:
            if self._stream is None or not self._unsynced:
                return
            self._stream.flush()
            os.fsync(self._stream.fileno())
            with self._index_path.open("ab") as index:
                index.writelines(json.dumps(asdict(entry)).encode() + b"\n" for entry in self._unsynced)
                index.flush()
                os.fsync(index.fileno())
            for entry in self._unsynced:
                self._entries[entry.key] = entry
            self._unsynced.clear()
            if self._end >= self._volume_bytes:
                self._stream.close()
                self._stream = None
                self._volume_path(self._number).chmod(0o444)
                self._number, self._end = self._number + 1, 0

    def read(self, key: str) -> bytes:
        """Bytes of a file, verified.

        Raises
        ------
        NotFoundError
            Not on these volumes.
        BadFileError
            The volume is damaged there.
        """
        entry = self.entry(key)
        path = self._folder / entry.volume
        with path.open("rb") as stream:
            stream.seek(entry.offset)
            content = stream.read(entry.size)
        if sha256_of_bytes(content) != entry.sha256:
            raise BadFileError(f"{path}: {key} at {entry.offset} is damaged; take the copy of another place")
        return content

    def close(self) -> None:
        """Sync and let go."""
        self.sync()
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    @property
    def _index_path(self) -> Path:
        return self._folder / INDEX_FILE

    def _volume_name(self) -> str:
        return f"{self._label}-{self._number:06d}.tar"

    def _volume_path(self, number: int) -> Path:
        return self._folder / f"{self._label}-{number:06d}.tar"

    def _open(self) -> BinaryIO:
        if self._stream is None:
            path = self._volume_path(self._number)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._stream = os.fdopen(descriptor, "r+b")
            sync_folder(self._folder)
        return self._stream

    def _recover(self) -> None:
        """Read the index and cut off what a crash left behind it."""
        entries: list[TapeEntry] = []
        try:
            lines = self._index_path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            lines = []
        for number, line in enumerate(lines, 1):
            try:
                entry = TapeEntry(**json.loads(line))
            except (ValueError, TypeError) as error:
                if number < len(lines):
                    raise FatalError(
                        f"{self._index_path}: line {number} is damaged ({error}); mend it from the volumes "
                        "(tar -tvf) before anything more is written"
                    ) from error
                break
            if not line.endswith(b"\n"):
                break
            entries.append(entry)
        good = [entry for entry in entries if self._is_there(entry)]
        if len(good) < len(lines):
            log.warning("%s: %d of %d lines kept", self._index_path, len(good), len(lines))
            content = b"".join(json.dumps(asdict(entry)).encode() + b"\n" for entry in good)
            write_atomic(self._index_path, content)
        self._entries = {entry.key: entry for entry in good}
        volumes = sorted({entry.volume for entry in good})
        if volumes:
            self._number = int(volumes[-1].rpartition("-")[2].removesuffix(".tar"))
            self._end = max(entry.end for entry in good if entry.volume == volumes[-1])
            if self._end >= self._volume_bytes:
                self._number, self._end = self._number + 1, 0
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
