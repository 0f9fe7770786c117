"""The sending end of one connection."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.addresses import link_of, route
from cumbre.archive.certificates import Security
from cumbre.archive.intake import RESUME_BYTES
from cumbre.archive.protocol import BLOCK_BYTES, Parcel, ProtocolError, read_frame, send_frame
from cumbre.archive.wire import PACKED_BYTES, is_worth_it, packed
from cumbre.core.errors import DeadlineError, TransientError
from cumbre.stores.files import PREFIX

if TYPE_CHECKING:
    from cumbre.core.configuration import Site

CONNECT_S = 5.0


class Sender:
    """One connection to a receiver; used by one thread.

    Parameters
    ----------
    address
        Host and port.
    timeout_s
        Deadline of one try of a file, real seconds.
    security, target
        Certificates of the own place, and the place that must be at the other end; None for a plain connection.
    compression
        ``zstd`` compresses what becomes smaller by it.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        timeout_s: float,
        security: Security | None = None,
        target: str = "",
        compression: str = "none",
    ) -> None:
        self._timeout_s, self._compression = timeout_s, compression
        self._secure = security is not None
        self.sent_bytes = 0
        self.resumed_at = 0
        """Where the last delivery went on, after a part of the file had come before."""
        self._connection = connect(address, timeout_s=timeout_s, security=security, target=target)

    @classmethod
    def to(cls, site: Site, source: str, target: str, *, pair: int = 1) -> Sender:
        """Connect one pair of a link, as the site configures it.

        Raises
        ------
        TransientError
            Nobody is there, or another place than expected.
        """
        link = link_of(site, source, target)
        return cls(
            route(site, source, target, pair),
            timeout_s=link.timeout_s,
            security=Security.of(site, source),
            target=target,
            compression=link.compression,
        )

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._connection.close()

    def ping(self, timeout_s: float = CONNECT_S) -> str:
        """Name of the receiver; errors as in :meth:`deliver`."""
        return str(self._ask_small({"op": "ping"}, timeout_s).get("name", ""))

    def expect(self, said: dict[str, Any], timeout_s: float = CONNECT_S) -> None:
        """Announce what will be sent; errors as in :meth:`deliver`."""
        self._ask_small({"op": "expect"} | said, timeout_s)

    def deliver(self, parcel: Parcel, path: Path, *, ask_first: bool) -> dict[str, Any]:
        """Send a file and wait for the receiver's word.

        Parameters
        ----------
        ask_first
            Offer it before its bytes: after an interruption the receiver may have it already, or a part of it
            from which the transfer goes on.

        Returns
        -------
        dict
            The receiver's answer, see :mod:`cumbre.archive.protocol`.

        Raises
        ------
        DeadlineError
            Not done within the deadline.
        TransientError
            The connection broke; make a new one.
        """
        self.resumed_at = 0
        with self._one_transfer(parcel.key) as deadline:
            if ask_first:
                answer = self._offer(parcel, deadline)
                if answer.get("answer") != "send":
                    return answer
                self.resumed_at = _good_part(answer, parcel, path)
            encoding = self._encoding(parcel, path)
            body = parcel.fields("put") | {"offset": self.resumed_at, "encoding": encoding}
            send_frame(self._connection, body)
            self._send_bytes(parcel, path, encoding, deadline)
            return self._answer(deadline)

    def ask(self, parcel: Parcel) -> dict[str, Any]:
        """Ask whether the receiver has a file, without sending it; errors as in :meth:`deliver`."""
        with self._one_transfer(parcel.key) as deadline:
            return self._offer(parcel, deadline)

    @contextlib.contextmanager
    def _one_transfer(self, what: str, timeout_s: float | None = None) -> Iterator[float]:
        """Give the monotonic deadline of one transfer; faults of the network become our errors."""
        limit_s = timeout_s or self._timeout_s
        try:
            yield time.monotonic() + limit_s
        except TimeoutError as error:
            raise DeadlineError(f"{what}: not delivered within {limit_s:g} s") from error
        except OSError as error:
            raise TransientError(f"{what}: connection lost: {error}") from error

    def _ask_small(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        with self._one_transfer(str(body["op"]), timeout_s) as deadline:
            self._patience(deadline)
            send_frame(self._connection, body)
            answer = self._answer(deadline)
        if answer.get("answer") not in ("pong", "ok"):
            raise TransientError(f"{body['op']}: {answer.get('answer')}: {answer.get('error', '')}")
        return answer

    def _offer(self, parcel: Parcel, deadline: float) -> dict[str, Any]:
        self._patience(deadline)
        send_frame(self._connection, parcel.fields("offer"))
        return self._answer(deadline)

    def _patience(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)

    def _answer(self, deadline: float) -> dict[str, Any]:
        self._patience(deadline)
        answer = read_frame(self._connection)
        if answer is None:
            raise ProtocolError("the receiver closed the connection")
        return answer

    def _encoding(self, parcel: Parcel, path: Path) -> str:
        if self._compression != "none":
            with path.open("rb") as stream:
                if is_worth_it(stream.read(PACKED_BYTES)):
                    return self._compression
        # Under TLS no damaged byte gets through; without it a big file's blocks are checked on their way.
        return "" if self._secure or parcel.size < RESUME_BYTES else "blocks"

    def _send_bytes(self, parcel: Parcel, path: Path, encoding: str, deadline: float) -> None:
        read = self.resumed_at

        def blocks(size: int) -> Iterator[bytes]:
            nonlocal read
            with path.open("rb") as stream:
                stream.seek(read)
                while block := stream.read(size):
                    read += len(block)
                    if read > parcel.size:
                        return
                    yield block

        for block in packed(blocks(PACKED_BYTES), encoding) if encoding else blocks(BLOCK_BYTES):
            self._patience(deadline)
            self._connection.sendall(block)
            self.sent_bytes += len(block)
        if read != parcel.size:
            raise TransientError(f"{path}: {read} bytes or more, expected {parcel.size}; it changed on disk")


def connect(
    address: tuple[str, int], *, timeout_s: float, security: Security | None, target: str
) -> socket.socket:
    """Connect to a receiver and make sure who it is.

    Raises
    ------
    TransientError
        Nobody is there, or another place than expected.
    """
    where = f"{address[0]}:{address[1]}"
    try:
        connection = socket.create_connection(address, timeout=min(timeout_s, CONNECT_S))
    except OSError as error:
        raise TransientError(f"no connection to {where}: {error}") from error
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if security is None:
            return connection
        wrapped = security.context(server=False).wrap_socket(connection)
        connection = wrapped
        found = security.peer(wrapped)
        if found != target:
            raise TransientError(f"{where} is {found}, expected {target}: nothing is sent there")
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        connection.close()
        raise TransientError(
            f"no connection to {where}: it was closed before both ends had said who they are"
        ) from error
    except ssl.SSLError as error:
        connection.close()
        raise TransientError(f"{where}: not trusted: {error}") from error
    except OSError as error:
        connection.close()
        raise TransientError(f"no connection to {where}: {error}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _good_part(answer: dict[str, Any], parcel: Parcel, path: Path) -> int:
    """How much of the file the receiver has, if that part equals ours; else 0."""
    offset = answer.get("offset", 0)
    if not isinstance(offset, int) or not 0 < offset <= parcel.size:
        return 0
    digest, left = hashlib.sha256(), offset
    with path.open("rb") as stream:
        while block := stream.read(min(left, 1 << 20)):
            digest.update(block)
            left -= len(block)
    return offset if not left and answer.get("prefix") == PREFIX + digest.hexdigest() else 0
