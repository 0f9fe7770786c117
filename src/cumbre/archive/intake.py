"""Taking a file in: its bytes go to a hidden name, are verified, and only then get their place in the cache.

A big file whose connection broke keeps what came: the next try, over whatever pair, goes on from there. The
part that is kept is trusted by its checksum alone, which the sender compares with its own bytes first.
Several receivers may share a cache: a part belongs to whoever holds the lock on it, and no name is given twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cumbre.archive.protocol import Parcel, ProtocolError, Stream
from cumbre.archive.wire import receiver_of
from cumbre.capture.quarantine import quarantine
from cumbre.core.errors import BadFileError, ConflictError
from cumbre.core.time import Clock
from cumbre.stores.files import PREFIX, blocks_of, sha256_of, sync_folder

log = logging.getLogger(__name__)

RESUME_BYTES = 1 << 20
"""What came of a broken transfer is kept from this size on."""
KEEP_PARTS_S = 86400.0
"""Real seconds after which a part that nobody went on with is thrown away."""
PART_SUFFIX = ".part"

Arrived = Callable[[Parcel, Path], None]
Refused = Callable[[dict[str, Any], str, str, Path | None], None]


@dataclass(frozen=True, slots=True)
class Part:
    """What is here of a file that did not come whole: so many bytes with this checksum."""

    size: int = 0
    sha256: str = PREFIX + hashlib.sha256().hexdigest()


class Intake:
    """The door of a raw cache.

    Parameters
    ----------
    root
        Raw cache; parts are in its folder ``.incoming``.
    quarantine_folder
        Where files with the key of another go.
    arrived
        Called after a file is on disk and before the sender hears of it (also when it was there already).
    refused
        Called with (what the sender said, outcome word, message, kept file or None).
    """

    def __init__(
        self, *, root: Path, quarantine_folder: Path, clock: Clock, arrived: Arrived, refused: Refused
    ) -> None:
        self._root, self._quarantine, self._clock = root, quarantine_folder, clock
        self._arrived, self._refused = arrived, refused
        self._incoming = root / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self.resumed_bytes = 0
        self.tidy()

    def workplace(self) -> tempfile.TemporaryDirectory[str]:
        """A folder on the cache's file system for files that are made here, removed with all that is in it."""
        return tempfile.TemporaryDirectory(dir=self._incoming)

    def tidy(self) -> None:
        """Throw away what no transfer can go on with."""
        for path in self._incoming.iterdir():
            if path.is_dir():
                if time.time() - path.stat().st_mtime > KEEP_PARTS_S:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            with contextlib.suppress(OSError), path.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                facts = os.fstat(stream.fileno())
                old = time.time() - facts.st_mtime > KEEP_PARTS_S
                if old or facts.st_size < RESUME_BYTES or path.suffix != PART_SUFFIX:
                    path.unlink()

    def offered(self, parcel: Parcel) -> dict[str, Any]:
        """Answer an offer: ``have``, or ``send`` with what is here already of a broken transfer."""
        path = self._root / parcel.key
        # Read anew, every time: what the sender then deletes depends on it.
        if path.is_file() and sha256_of(path) == parcel.sha256:
            self._arrived(parcel, path)
            return {"answer": "have", "sha256": parcel.sha256}
        # Other content is received too: it is kept in quarantine as evidence.
        part = self._part(parcel)
        return {"answer": "send", "offset": part.size, "prefix": part.sha256}

    def put(self, stream: Stream, parcel: Parcel, *, offset: int = 0, encoding: str = "") -> dict[str, Any]:
        """Receive the bytes of a file from ``offset`` on, verify and store them.

        Raises
        ------
        ProtocolError
            The stream broke; what came may be gone on with.
        """
        receive = receiver_of(encoding)
        with self._locked_part(parcel, offset) as (path, part):
            begin = part.tell()
            if offset not in (0, begin):
                # Somebody else goes on with it, or it was tidied away: the bytes that come fit nothing here.
                receive(stream, parcel.size - offset, lambda _: None)
                return {"answer": "later", "error": f"no part of {offset} bytes here any more"}
            self.resumed_bytes += offset
            digest, failure = self._take_in(stream, parcel, part, offset, receive)
            if failure is not None:
                path.unlink(missing_ok=True)
                return {"answer": "later", "error": failure}
            found = PREFIX + digest
            try:
                if found != parcel.sha256:
                    return {"answer": "corrupt", "sha256": found}
                return self.store(parcel, path)
            finally:
                path.unlink(missing_ok=True)

    # parts

    def _part_path(self, parcel: Parcel) -> Path:
        name = f"{parcel.sha256.removeprefix(PREFIX)[:40]}-{zlib.crc32(parcel.key.encode()):08x}"
        return self._incoming / (name + PART_SUFFIX)

    def _part(self, parcel: Parcel) -> Part:
        """What a broken transfer left; nothing when it is in use just now."""
        path = self._part_path(parcel)
        with contextlib.suppress(OSError), path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            digest, size = hashlib.sha256(), 0
            for block in blocks_of(path):
                digest.update(block)
                size += len(block)
            if RESUME_BYTES <= size <= parcel.size:
                return Part(size, PREFIX + digest.hexdigest())
        return Part()

    @contextlib.contextmanager
    def _locked_part(self, parcel: Parcel, offset: int) -> Iterator[tuple[Path, BinaryIO]]:
        """The part to write to, locked and at ``offset``; one of its own where another transfer holds it."""
        path = self._part_path(parcel)
        stream = self._lock(path)
        if stream is None:
            path = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}")
            stream = self._lock(path)
        if stream is None:
            raise ProtocolError(f"{path}: cannot be locked")
        with stream:
            if os.fstat(stream.fileno()).st_size >= offset:
                stream.truncate(offset)
                stream.seek(offset)
            try:
                yield path, stream
            except BaseException:
                if path.suffix != PART_SUFFIX or stream.tell() < RESUME_BYTES:
                    path.unlink(missing_ok=True)
                raise

    @staticmethod
    def _lock(path: Path) -> BinaryIO | None:
        for _ in range(5):
            stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.close()
                return None
            ours = os.fstat(stream.fileno())
            try:
                named = path.stat()
            except FileNotFoundError:
                named = None
            if named is not None and named.st_ino == ours.st_ino:
                if ours.st_nlink == 1:
                    return stream  # type: ignore[return-value]
                path.unlink()  # killed between giving the file its name and this: never write to what is in the cache
            # Finished between the two calls: what we hold is the file in the cache now, and must not be written to.
            stream.close()
        return None

    def _take_in(
        self, stream: Stream, parcel: Parcel, part: BinaryIO, offset: int, receive: Callable[..., None]
    ) -> tuple[str, str | None]:
        """Stream bytes to disk; a disk failure is told after the rest of the bytes was read away."""
        digest = hashlib.sha256()
        failure: str | None = None
        part.seek(0)
        left = offset
        while left:
            block = part.read(min(left, 1 << 20))
            if not block:
                raise ProtocolError(f"{parcel.key}: the kept part ends {left} bytes too early")
            digest.update(block)
            left -= len(block)

        def take(block: memoryview) -> None:
            nonlocal failure
            digest.update(block)
            if failure is None:
                try:
                    part.write(block)
                except OSError as error:
                    failure = os.strerror(error.errno or errno.EIO)
                    log.error("%s: cannot write: %s", parcel.key, error)

        receive(stream, parcel.size - offset, take)
        if failure is None:
            try:
                os.fsync(part.fileno())
            except OSError as error:
                failure = os.strerror(error.errno or errno.EIO)
        return digest.hexdigest(), failure

    # into the cache

    def store(self, parcel: Parcel, temporary: Path) -> dict[str, Any]:
        """Give a verified file its name, unless the name is taken; gives the answer for its sender."""
        path = self._root / parcel.key
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._take_name(temporary, path):
            sync_folder(path.parent)
        else:
            present = sha256_of(path)
            if present != parcel.sha256:
                return self._conflict(parcel, temporary, present)
        self._arrived(parcel, path)
        return {"answer": "ok", "sha256": parcel.sha256}

    def _take_name(self, temporary: Path, path: Path) -> bool:
        """Link, which fails where a rename would replace; False when the name is taken."""
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            # No links on this file system: receivers of this machine take turns.
            with (self._incoming.parent / ".names.lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if path.exists():
                    return False
                temporary.rename(path)
        return True

    def _conflict(self, parcel: Parcel, temporary: Path, present: str) -> dict[str, Any]:
        error = ConflictError(
            f"{parcel.key}: here with {present}, came again with {parcel.sha256}; the first one is kept"
        )
        kept = quarantine(
            self._quarantine, parcel.key, temporary, error, at_tai=self._clock.now_tai_s(), origin="link"
        )
        self._refused(parcel.fields("put"), error.outcome, str(error), kept)
        return {"answer": "conflict", "sha256": present}


def resume_point(said: dict[str, Any], parcel: Parcel) -> int:
    """``offset`` of a put frame.

    Raises
    ------
    BadFileError
        Not a place in the file.
    """
    offset = said.get("offset", 0)
    if not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset <= parcel.size:
        raise BadFileError(f"{parcel.key}: offset = {str(offset)[:40]!r}: expected 0 to {parcel.size}")
    return offset
