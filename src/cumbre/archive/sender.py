"""The sending end of one connection."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cumbre.archive.protocol import BLOCK_BYTES, Parcel, ProtocolError, read_frame, send_frame
from cumbre.core.errors import DeadlineError, TransientError


class Sender:
    """One connection to a receiver; used by one thread.

    Parameters
    ----------
    address
        Host and port.
    timeout_s
        Deadline of one file's transfer, real seconds.
    """

    def __init__(self, address: tuple[str, int], *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        try:
            self._connection = socket.create_connection(address, timeout=min(timeout_s, 5.0))
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise TransientError(f"no connection to {address[0]}:{address[1]}: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._connection.close()

    def deliver(self, parcel: Parcel, path: Path, *, ask_first: bool) -> dict[str, Any]:
        """Send a file and wait for the receiver's word.

        Parameters
        ----------
        ask_first
            Offer it before its bytes: after an interruption the receiver may have it already.

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
        with self._one_transfer(parcel) as deadline:
            if ask_first:
                answer = self._offer(parcel, deadline)
                if answer.get("answer") != "send":
                    return answer
            send_frame(self._connection, parcel.fields("put"))
            self._send_bytes(parcel, path, deadline)
            return self._answer(deadline)

    def ask(self, parcel: Parcel) -> dict[str, Any]:
        """Ask whether the receiver has a file, without sending it; errors as in :meth:`deliver`."""
        with self._one_transfer(parcel) as deadline:
            return self._offer(parcel, deadline)

    @contextlib.contextmanager
    def _one_transfer(self, parcel: Parcel) -> Iterator[float]:
        """Give the monotonic deadline of one transfer; faults of the network become our errors."""
        try:
            yield time.monotonic() + self._timeout_s
        except TimeoutError as error:
            raise DeadlineError(f"{parcel.key}: not delivered within {self._timeout_s:g} s") from error
        except OSError as error:
            raise TransientError(f"{parcel.key}: connection lost: {error}") from error

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

    def _send_bytes(self, parcel: Parcel, path: Path, deadline: float) -> None:
        sent = 0
        with path.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                sent += len(block)
                if sent > parcel.size:
                    break
                self._patience(deadline)
                self._connection.sendall(block)
        if sent != parcel.size:
            raise TransientError(f"{path}: {sent} bytes or more, expected {parcel.size}; it changed on disk")
