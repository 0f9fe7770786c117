"""The receiving end: a TCP server that puts verified files into a raw cache and answers only when they are safe."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cumbre.archive.protocol import (
    BLOCK_BYTES,
    MAX_FILE_BYTES,
    Parcel,
    ProtocolError,
    read_frame,
    send_frame,
)
from cumbre.capture.quarantine import quarantine
from cumbre.core.errors import BadFileError, ConflictError
from cumbre.core.time import Clock
from cumbre.stores.files import sha256_of, sync_folder

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
IDLE_S = 120.0
"""Real seconds after which a silent sender is taken for dead."""

Arrived = Callable[[Parcel, Path], None]
Refused = Callable[[dict[str, Any], str, str, Path | None], None]


class Receiver:
    """Serves senders, one thread a connection.

    Parameters
    ----------
    root
        Raw cache.
    quarantine_folder
        Where files with the key of another go.
    arrived
        Called after a file is on disk and before the sender hears of it (also when it was there already).
    refused
        Called with (what the sender said, outcome word, message, kept file or None).
    """

    def __init__(
        self,
        *,
        root: Path,
        quarantine_folder: Path,
        clock: Clock,
        arrived: Arrived,
        refused: Refused,
        host: str = "127.0.0.1",
        port: int = 0,
        max_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self._root, self._quarantine, self._clock = root, quarantine_folder, clock
        self._arrived, self._refused = arrived, refused
        self._max_bytes = max_bytes
        self._incoming = root / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        for leftover in self._incoming.iterdir():
            leftover.unlink()  # halves from before a crash: their senders were never answered
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._listener = socket.create_server((host, port), backlog=MAX_CONNECTIONS)
        self._closed = False
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port it listens on."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def close(self) -> None:
        """Stop listening and drop all connections; unanswered senders come again."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                return
            with self._lock:
                full = len(self._connections) >= MAX_CONNECTIONS
                if not full:
                    self._connections.add(connection)
            if full:
                log.warning("%s refused: %d connections already", peer, MAX_CONNECTIONS)
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        counter = 0
        try:
            connection.settimeout(IDLE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while (said := read_frame(connection)) is not None:
                counter += 1
                answer = self._answer(connection, said, f"{id(connection):x}-{counter}")
                send_frame(connection, answer)
                if answer.get("close"):
                    return
        except (ProtocolError, OSError) as error:
            if not self._closed:
                log.warning("connection dropped: %s", error)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _answer(self, connection: socket.socket, said: dict[str, Any], tag: str) -> dict[str, Any]:
        """Handle one frame and, for ``put``, the bytes behind it."""
        operation = said.get("op")
        if operation not in ("offer", "put"):
            return {
                "answer": "refused",
                "error": f"op = {str(operation)[:40]!r}: expected offer or put",
                "close": True,
            }
        try:
            parcel = Parcel.checked(said, max_bytes=self._max_bytes)
        except BadFileError as error:
            self._refused(said, error.outcome, str(error), None)
            # After a bad put nobody knows how many bytes follow: the connection cannot be used further.
            return {"answer": "refused", "error": str(error), "close": operation == "put"}
        if operation == "offer":
            return self._offered(parcel)
        return self._put(connection, parcel, tag)

    def _present(self, parcel: Parcel) -> str | None:
        """Checksum of the file of this key in the cache, read anew: what the sender then deletes depends on it."""
        path = self._root / parcel.key
        return sha256_of(path) if path.is_file() else None

    def _offered(self, parcel: Parcel) -> dict[str, Any]:
        present = self._present(parcel)
        if present == parcel.sha256:
            self._arrived(parcel, self._root / parcel.key)
            return {"answer": "have", "sha256": present}
        # Other content is received too: it is kept in quarantine as evidence.
        return {"answer": "send"}

    def _put(self, connection: socket.socket, parcel: Parcel, tag: str) -> dict[str, Any]:
        temporary = self._incoming / f"{tag}.part"
        try:
            failure, found = self._take_in(connection, parcel, temporary)
            if failure is not None:
                return {"answer": "later", "error": failure}
            if found != parcel.sha256:
                return {"answer": "corrupt", "sha256": found}
            return self._store(parcel, temporary)
        finally:
            temporary.unlink(missing_ok=True)

    def _take_in(self, connection: socket.socket, parcel: Parcel, temporary: Path) -> tuple[str | None, str]:
        """Stream the bytes to disk; a disk failure is told after the rest of the bytes was read away."""
        digest, left, failure = hashlib.sha256(), parcel.size, None
        block = bytearray(min(BLOCK_BYTES, parcel.size))
        view = memoryview(block)
        with temporary.open("wb", buffering=0) as stream:
            while left:
                got = connection.recv_into(view[: min(left, len(block))])
                if got == 0:
                    raise ProtocolError(f"{parcel.key}: connection ended {left} bytes before the end")
                left -= got
                digest.update(view[:got])
                if failure is None:
                    try:
                        stream.write(view[:got])
                    except OSError as error:
                        failure = f"{os.strerror(error.errno or errno.EIO)}"
                        log.error("%s: cannot write: %s", temporary, error)
            if failure is None:
                os.fsync(stream.fileno())
        return failure, f"sha256:{digest.hexdigest()}"

    def _store(self, parcel: Parcel, temporary: Path) -> dict[str, Any]:
        """Give a verified file its name, unless the name is taken by other content."""
        path = self._root / parcel.key
        with self._lock:
            if parcel.key in self._busy:
                return {"answer": "later", "error": "the same key is being stored by another connection"}
            self._busy.add(parcel.key)
        try:
            present = self._present(parcel)
            if present is not None and present != parcel.sha256:
                error = ConflictError(
                    f"{parcel.key}: here with {present}, came again with {parcel.sha256}; the first one is kept"
                )
                kept = quarantine(
                    self._quarantine,
                    parcel.key,
                    temporary,
                    error,
                    at_tai=self._clock.now_tai_s(),
                    origin="link",
                )
                self._refused(parcel.fields("put"), error.outcome, str(error), kept)
                return {"answer": "conflict", "sha256": present}
            if present is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.replace(path)
                sync_folder(path.parent)
            self._arrived(parcel, path)
            return {"answer": "ok", "sha256": parcel.sha256}
        finally:
            with self._lock:
                self._busy.discard(parcel.key)
