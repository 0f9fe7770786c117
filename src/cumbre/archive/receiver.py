"""The receiving end: a TCP server that puts verified files into a raw cache and answers only when they are safe.

With certificates it serves only places of the site, and only the sources of its links may put. Whoever is not
known yet gets little: a short time to say who they are, and a place that the next unknown one may take.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cumbre.archive.certificates import Security
from cumbre.archive.guard import (
    HANDSHAKE_S,
    IDLE_S,
    MAX_CONNECTIONS,
    MAX_FAULTS,
    MAX_UNKNOWN,
    FrameRate,
    Guard,
    IdlePeerError,
    Patience,
    Refusal,
    SlowPeerError,
    reason_of,
)
from cumbre.archive.intake import Arrived, Intake, Refused, resume_point
from cumbre.archive.protocol import MAX_FILE_BYTES, Parcel, ProtocolError, read_frame, send_frame
from cumbre.archive.server import ImageServer
from cumbre.archive.wire import receiver_of
from cumbre.core.errors import BadFileError, ConfigurationError, TransientError
from cumbre.core.time import Clock

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Peer:
    """Who is at the other end of a connection, and what they may do."""

    address: str
    place: str = ""
    may_put: bool = True
    may_get: bool = True
    faults: int = 0


class Receiver:
    """Serves senders and workers, one thread a connection.

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
    security
        Certificates of the own place; None accepts plain connections from anybody.
    sources
        Places that may put; others may not, whatever certificate they have.
    turned_away
        Called with each refusal that shall be told.
    expected
        Called with what a sender announces.
    images
        Serves workers; None refuses them.
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
        name: str = "receiver",
        security: Security | None = None,
        sources: Collection[str] = (),
        turned_away: Callable[[Refusal], None] = lambda _: None,
        expected: Callable[[dict[str, Any]], None] = lambda _: None,
        images: ImageServer | None = None,
    ) -> None:
        self.intake = Intake(
            root=root, quarantine_folder=quarantine_folder, clock=clock, arrived=arrived, refused=refused
        )
        self.guard = Guard(turned_away)
        self.received_bytes = 0
        self._name, self._refused, self._max_bytes = name, refused, max_bytes
        self._security, self._sources = security, frozenset(sources)
        self._expected, self._images = expected, images
        self._lock = threading.Lock()
        self._unknown: dict[socket.socket, str] = {}
        self._known: set[socket.socket] = set()
        if security is not None:
            security.context(server=True)  # a wrong file is told now, not at the first connection
        self._listener = socket.create_server((host, port), backlog=128)
        self._closed = False
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port it listens on."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    @property
    def connections(self) -> int:
        """How many peers are connected and known."""
        return len(self._known)

    def close(self) -> None:
        """Stop listening and drop all connections; unanswered senders come again."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in (*self._unknown, *self._known):
                _cut(connection)

    # who may come in

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, peer = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                log.error("accept: %s", error)  # out of files: the connection stays in the queue
                threading.Event().wait(0.1)
                continue
            where = f"{peer[0]}:{peer[1]}"
            with self._lock:
                full = len(self._known) >= MAX_CONNECTIONS
                if not full and len(self._unknown) >= MAX_UNKNOWN:
                    oldest = next(iter(self._unknown))
                    pushed = self._unknown.pop(oldest)
                    _cut(oldest)
                    self.guard.refuse("too-many-connections", pushed, f"{MAX_UNKNOWN} unknown ones at once")
                if not full:
                    self._unknown[connection] = where
            if full:
                self.guard.refuse("too-many-connections", where, f"{MAX_CONNECTIONS} served already")
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection, where), daemon=True).start()

    def _serve(self, connection: socket.socket, where: str) -> None:
        """Thread of one connection."""
        raw = connection
        peer: Peer | None = None
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection, peer = self._introduce(connection, where)
            if peer is not None:
                self._converse(connection, peer, raw)
        except SlowPeerError as error:
            if isinstance(error, IdlePeerError) and connection in self._known:
                log.info("%s: %s", where, error)
            else:
                self._drop("too-slow", where, error, peer)
        except ProtocolError as error:
            self._drop("bad-frame", where, error, peer)
        except ssl.SSLError as error:
            self._drop("bad-record", where, error, peer)
        except OSError as error:
            if not self._closed:
                log.info("%s: connection lost: %s", where, error)
        except Exception:
            # The loop of a worker: the sender hears nothing and comes again.
            log.exception("%s: connection ended", where)
        finally:
            with self._lock:
                self._unknown.pop(raw, None)
                self._known.discard(connection)
            connection.close()

    def _drop(self, reason: str, where: str, error: Exception, peer: Peer | None) -> None:
        if not self._closed:
            self.guard.refuse(reason, where, str(error), identity=peer.place if peer else "")

    def _introduce(self, connection: socket.socket, where: str) -> tuple[socket.socket, Peer | None]:
        """Learn who it is from their certificate; None when they may not come in."""
        if self._security is None:
            return connection, Peer(where)
        connection.settimeout(HANDSHAKE_S)
        try:
            wrapped = self._security.context(server=True).wrap_socket(connection, server_side=True)
        except ConfigurationError as error:
            log.error("%s", error)
            return connection, None
        except OSError as error:
            if not self._closed:
                self.guard.refuse(reason_of(error), where, str(error))
            return connection, None
        try:
            place = self._security.peer(wrapped)
        except TransientError as error:
            self.guard.refuse("wrong-place", where, str(error))
            return wrapped, None
        peer = Peer(where, place, place in self._sources, place == self._security.place)
        if not peer.may_put and not peer.may_get:
            self.guard.refuse("wrong-place", where, "no link comes from there", identity=place)
            return wrapped, None
        return wrapped, peer

    def _converse(self, connection: socket.socket, peer: Peer, raw: socket.socket) -> None:
        stream, rate = Patience(connection), FrameRate()
        if self._security is not None:
            self._is_known(connection, raw)
        first = True
        while True:
            stream.for_frame(HANDSHAKE_S if first and self._security is None else IDLE_S)
            said = read_frame(stream)
            if said is None:
                return
            if first and self._security is None:
                self._is_known(connection, raw)
            first = False
            if not rate.one_more():
                self.guard.refuse("too-many-frames", peer.address, "connection ended", identity=peer.place)
                return
            connection.settimeout(IDLE_S)
            answer = self._answer(connection, stream, said, peer)
            if answer is None:
                continue
            connection.settimeout(IDLE_S)
            send_frame(connection, answer)
            if answer.get("close") or peer.faults >= MAX_FAULTS:
                return

    def _is_known(self, connection: socket.socket, raw: socket.socket) -> None:
        with self._lock:
            self._unknown.pop(raw, None)
            self._known.add(connection)

    # what they may say

    def _answer(
        self, connection: socket.socket, stream: Patience, said: dict[str, Any], peer: Peer
    ) -> dict[str, Any] | None:
        """Handle one frame and, for ``put``, the bytes behind it; None when the answer was sent already."""
        operation = said.get("op")
        if operation == "ping":
            return {"answer": "pong", "name": self._name}
        if operation == "get" and self._images is not None and peer.may_get:
            return self._images.serve(connection, said, lambda: self._closed)
        if operation not in ("offer", "put", "expect") or not peer.may_put:
            word = "not-allowed" if operation in ("get", "offer", "put", "expect") else "bad-frame"
            return self._no(peer, word, f"op = {str(operation)[:40]!r}: not for you", close=True)
        if operation == "expect":
            self._expected({key: value for key, value in said.items() if key != "op"})
            return {"answer": "ok"}
        try:
            parcel = Parcel.checked(said, max_bytes=self._max_bytes)
            offset, encoding = resume_point(said, parcel), said.get("encoding", "")
            receiver_of(encoding)
        except (BadFileError, ConfigurationError) as error:
            self._refused(said, error.outcome, str(error), None)
            # After a bad put nobody knows how many bytes follow: the connection cannot be used further.
            return self._no(peer, "bad-parcel", str(error), close=operation == "put")
        if operation == "offer":
            return self.intake.offered(parcel)
        stream.for_bytes(parcel.size - offset)
        answer = self.intake.put(stream, parcel, offset=offset, encoding=encoding)
        self.received_bytes += parcel.size - offset
        if answer["answer"] in ("corrupt", "conflict"):
            self.guard.refuse(answer["answer"], peer.address, f"{parcel.key}: {answer}", identity=peer.place)
        return answer

    def _no(self, peer: Peer, reason: str, message: str, *, close: bool) -> dict[str, Any]:
        peer.faults += 1
        self.guard.refuse(reason, peer.address, message, identity=peer.place)
        return {"answer": "refused", "error": message, "close": close}


def _cut(connection: socket.socket) -> None:
    """End a connection of another thread; the TLS part of it stays that thread's."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
