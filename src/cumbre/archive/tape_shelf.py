"""Where tape volumes stand: a folder, or a bucket whose objects nobody can change."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cumbre.archive.tape_index import INDEX_FILE, VOLUMES_FILE, TapeEntry, Volume
from cumbre.core.errors import NotFoundError
from cumbre.stores.files import sha256_of_bytes, write_atomic

if TYPE_CHECKING:
    from cumbre.stores.objects import ObjectStore

log = logging.getLogger(__name__)

READ_BYTES = 1 << 20


class Shelf(Protocol):
    """Something that volumes are read from."""

    def blocks(self, volume: str, offset: int = 0, size: int | None = None) -> Iterator[bytes]:
        """Bytes of a volume from ``offset`` on, all or ``size``; less when it ends before.

        Raises
        ------
        NotFoundError
            No such volume here.
        """


class FolderShelf:
    """Volumes in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def blocks(self, volume: str, offset: int = 0, size: int | None = None) -> Iterator[bytes]:
        """See :class:`Shelf`."""
        path = self._folder / volume
        try:
            stream = path.open("rb")
        except FileNotFoundError as error:
            raise NotFoundError(f"{path}: no such volume; mount its tape") from error
        with stream:
            stream.seek(offset)
            left = size if size is not None else path.stat().st_size - offset
            while left > 0 and (block := stream.read(min(left, READ_BYTES))):
                left -= len(block)
                yield block


class BucketShelf:
    """Closed volumes as objects that are put once; what is not up yet is read from the local folder.

    Parameters
    ----------
    store
        Bucket and prefix.
    folder
        Local folder in which volumes grow.
    lock_days
        Retention of each object in compliance mode; None leaves it to the bucket's default.
    """

    def __init__(self, store: ObjectStore, folder: Path, *, lock_days: float | None = None) -> None:
        self._store, self._folder, self._lock_days = store, folder, lock_days
        self._up: set[str] = set()

    def has(self, volume: str) -> bool:
        """Whether a volume is known to be in the bucket (told by :meth:`put` and by a mark beside the index)."""
        if volume not in self._up and self._mark(volume).exists():
            self._up.add(volume)
        return volume in self._up

    def put(self, volume: Volume, index: bytes) -> None:
        """Upload a closed volume with its lines of the index, prove it, and let go of the local copy.

        Raises
        ------
        TransientError
            The bucket does not answer.
        ConflictError
            Another object has the volume's name.
        """
        until = datetime.now(UTC) + timedelta(days=self._lock_days) if self._lock_days else None
        path = self._folder / volume.volume
        # The index lines first: a volume in the bucket always has its index beside it.
        self._store.put_new(f"{volume.volume}.index.jsonl", index, sha256_of_bytes(index), retain_until=until)
        self._store.put_new(volume.volume, path, volume.sha256, retain_until=until)
        record = json.dumps(asdict(volume)).encode()
        self._store.put_new(
            f"{volume.volume}.volume.json", record, sha256_of_bytes(record), retain_until=until
        )
        write_atomic(self._mark(volume.volume), record)
        self._up.add(volume.volume)
        path.unlink(missing_ok=True)
        log.info("%s: in %s, %d bytes", volume.volume, self._store.root, volume.size)

    def blocks(self, volume: str, offset: int = 0, size: int | None = None) -> Iterator[bytes]:
        """See :class:`Shelf`."""
        try:
            stream = (self._folder / volume).open("rb")
        except FileNotFoundError:
            total = self._store.size(volume)
            end = total if size is None else min(offset + size, total)
            for start in range(offset, end, 8 * READ_BYTES):
                yield self._store.read_range(volume, start, min(8 * READ_BYTES, end - start))
            return
        with stream:
            stream.seek(offset)
            left = size
            while left is None or left > 0:
                block = stream.read(READ_BYTES if left is None else min(left, READ_BYTES))
                if not block:
                    return
                left = None if left is None else left - len(block)
                yield block

    def restore(self, folder: Path) -> None:
        """Bring the index back from the bucket to a machine that has none; none there is fine."""
        lines, volumes = [], []
        for key in sorted(self._store.list()):
            if key.endswith(".volume.json"):
                record = self._store.get(key)
                volumes.append(record + b"\n")
                name = key.removesuffix(".volume.json")
                lines.append(self._store.get(f"{name}.index.jsonl"))
                write_atomic(self._mark(name), record)
        if volumes:
            write_atomic(folder / VOLUMES_FILE, b"".join(volumes))
            write_atomic(folder / INDEX_FILE, b"".join(lines))
            log.info("%s: index of %d volumes restored from %s", folder, len(volumes), self._store.root)

    def _mark(self, volume: str) -> Path:
        return self._folder / "uploaded" / f"{volume}.json"


def hash_volume(blocks: Iterator[bytes], entries: list[TapeEntry]) -> tuple[str, dict[int, str]]:
    """Read a volume once.

    Parameters
    ----------
    blocks
        All its bytes in order.
    entries
        Its files in the order of their offsets.

    Returns
    -------
    tuple
        Checksum of the whole volume, and that of each file by offset; files beyond the end are left out.
    """
    whole, found, position, number = hashlib.sha256(), dict[int, str](), 0, 0
    digest = hashlib.sha256()
    for block in blocks:
        whole.update(block)
        view, after = memoryview(block), position + len(block)
        while number < len(entries) and entries[number].offset < after:
            entry = entries[number]
            end = entry.offset + entry.size
            digest.update(view[max(entry.offset - position, 0) : end - position])
            if end > after:
                break
            found[entry.offset] = f"sha256:{digest.hexdigest()}"
            digest, number = hashlib.sha256(), number + 1
        position = after
    return f"sha256:{whole.hexdigest()}", found
