"""Files that are either whole or absent, and copies that are proven.

A write goes to a hidden temporary name in the target's folder, is synced, and takes its name by rename; the
folder is synced too. The checksum is made from the bytes on their way, so a copy reads its source once.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cumbre.core.errors import BadFileError, NotFoundError

BLOCK = 1 << 20
PREFIX = "sha256:"


@dataclass(frozen=True, slots=True)
class Checksummed:
    """A file that was written, with what was written.

    ``sha256`` carries its algorithm: ``sha256:<64 hex digits>``, the form that the bus and the ledger keep.
    """

    path: Path
    size: int
    sha256: str


class HashingWriter:
    """A writable binary file that counts and hashes what passes (sequential writes only)."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, block: bytes | bytearray | memoryview) -> int:
        """Write all of ``block``; returns its length in bytes."""
        self._stream.write(block)
        self._digest.update(block)
        length = memoryview(block).nbytes
        self.size += length
        return length

    def flush(self) -> None:
        """Push buffered bytes to the system."""
        self._stream.flush()

    @property
    def sha256(self) -> str:
        """Checksum of what was written so far."""
        return PREFIX + self._digest.hexdigest()


type Content = bytes | bytearray | memoryview | Iterable[bytes] | Callable[[HashingWriter], object]


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_name(path: Path) -> Iterator[Path]:
    """Give a hidden name beside ``path`` to code that must write a file by name; removed if not renamed.

    ``publish(temporary, path)`` gives the finished file its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:180]}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Sync a finished temporary file and rename it to ``path`` (replacing what was there)."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_folder(path.parent)


def write_atomic(path: Path, content: Content, *, mode: int = 0o644) -> Checksummed:
    """Write a file that others see whole or not at all.

    Parameters
    ----------
    path
        Target; missing folders are made.
    content
        Bytes, an iterable of blocks, or a function that gets a :class:`HashingWriter`.
    mode
        Permission bits of the file.

    Returns
    -------
    Checksummed
        Path, size in bytes and ``sha256:…`` of what was written.
    """
    with temporary_name(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as stream:
            writer = HashingWriter(stream)
            if isinstance(content, bytes | bytearray | memoryview):
                writer.write(content)
            elif callable(content):
                content(writer)
            else:
                for block in content:
                    writer.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    return Checksummed(path, writer.size, writer.sha256)


def blocks_of(path: Path) -> Iterator[bytes]:
    """Read a file in blocks.

    Raises
    ------
    NotFoundError
        There is no such file.
    """
    try:
        with path.open("rb") as stream:
            while block := stream.read(BLOCK):
                yield block
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file") from error


def sha256_of(path: Path) -> str:
    """``sha256:…`` of a file.

    Raises
    ------
    NotFoundError
        There is no such file.
    """
    digest = hashlib.sha256()
    for block in blocks_of(path):
        digest.update(block)
    return PREFIX + digest.hexdigest()


def copy_verified(source: Path, target: Path, expected_sha256: str | None = None) -> Checksummed:
    """Copy a file, hashing the bytes on their way; a wrong copy never gets the target's name.

    Parameters
    ----------
    source, target
        File to read (once) and file to write.
    expected_sha256
        ``sha256:…`` that the source must have; ``None`` accepts any.

    Raises
    ------
    NotFoundError
        No source.
    BadFileError
        The bytes read have another checksum than expected; the target is untouched.
    """

    def stream(writer: HashingWriter) -> None:
        for block in blocks_of(source):
            writer.write(block)
        if expected_sha256 is not None and writer.sha256 != normal_checksum(expected_sha256):
            raise BadFileError(
                f"{source}: checksum {writer.sha256}, expected {expected_sha256}; "
                "the source is damaged: take another copy and quarantine this one"
            )

    return write_atomic(target, stream)


def sha256_of_bytes(content: bytes) -> str:
    """``sha256:…`` of bytes in memory."""
    return PREFIX + hashlib.sha256(content).hexdigest()


def normal_checksum(text: str) -> str:
    """``sha256:…`` in lower case, from a checksum written with or without the prefix."""
    return PREFIX + text.strip().lower().removeprefix(PREFIX)
