"""What a receiver allows its peers, and what it does about those who take more: refuse, count, tell."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cumbre.archive.protocol import ProtocolError

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
MAX_UNKNOWN = 32
"""Connections that have not yet said who they are; a new one pushes the oldest out."""
HANDSHAKE_S = 5.0
IDLE_S = 120.0
"""Real seconds after which a silent peer is taken for dead."""
KEEP_ALIVE_S = 40.0
"""Real seconds after which a sender without work pings."""
FRAME_S = 10.0
"""Real seconds from the first to the last byte of a frame."""
STALL_S = 30.0
LEAST_BYTES_PER_S = 10e3
FRAMES_PER_S = 2000
MAX_FAULTS = 8
"""Refused frames after which a connection ends."""
TELL_EVERY_S = 2.0

CERTIFICATE_EXPIRED = 10
UNKNOWN_ISSUERS = (18, 19, 20, 21)
"""OpenSSL's verification codes."""


class SlowPeerError(ProtocolError):
    """The peer sends too slowly to be served."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that a peer was refused.

    ``count`` tells how many of this reason there were since the one told before.
    """

    reason: str
    peer: str
    identity: str
    detail: str
    count: int


class Guard:
    """Counts refusals and tells of them, rarely enough that a flood of them does not become another flood."""

    def __init__(self, tell: Callable[[Refusal], None]) -> None:
        self.counts: Counter[str] = Counter()
        self._tell = tell
        self._lock = threading.Lock()
        self._told: dict[str, tuple[float, int]] = {}

    def refuse(self, reason: str, peer: str, detail: str, *, identity: str = "") -> None:
        """Count a refusal; it is told unless one of the same reason was told just now."""
        with self._lock:
            self.counts[reason] += 1
            count = self.counts[reason]
            last, told = self._told.get(reason, (-TELL_EVERY_S, 0))
            now = time.monotonic()
            if now - last < TELL_EVERY_S:
                return
            self._told[reason] = now, count
        log.warning("refused (%s) %s %s: %s [%d so far]", reason, identity, peer, detail, count)
        try:
            self._tell(Refusal(reason, peer, identity, detail[:500], count - told))
        except Exception as error:
            # The bus may be away; it is counted and in the log.
            log.error("refusal not told: %s", error)


class IdlePeerError(SlowPeerError):
    """The peer has said nothing for long, between two frames."""


class Patience:
    """A stream that reads from a connection as long as the peer keeps its times."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._until = 0.0
        self._stall_s = IDLE_S
        self._rest_s: float | None = None
        self._applied_s = 0.0

    def for_frame(self, first_s: float = IDLE_S) -> None:
        """The next frame may take ``first_s`` to begin, then it must come soon."""
        self._until, self._stall_s, self._rest_s = time.monotonic() + first_s, first_s, FRAME_S
        self._applied_s = 0.0

    def for_bytes(self, size: int) -> None:
        """The next ``size`` bytes may take their time, without long pauses."""
        self._until = time.monotonic() + STALL_S + size / LEAST_BYTES_PER_S
        self._stall_s, self._rest_s = STALL_S, None
        self._applied_s = 0.0

    def recv_into(self, buffer: memoryview, /) -> int:
        """Fill a part of the buffer; 0 at the end of the stream.

        Raises
        ------
        SlowPeerError
            The peer took too long (:class:`IdlePeerError`: it has not begun).
        """
        now = time.monotonic()
        left = min(self._until - now, self._stall_s)
        if left <= 0:
            raise SlowPeerError("too slow: not complete in its time")
        if not 0.75 * self._applied_s <= left <= self._applied_s:  # a system call, too dear for each record
            self._connection.settimeout(left)
            self._applied_s = left
        try:
            got = self._connection.recv_into(buffer)
        except TimeoutError:
            kind = IdlePeerError if self._rest_s is not None else SlowPeerError
            raise kind(f"nothing came for {left:.0f} s") from None
        if self._rest_s is not None:
            self._until, self._rest_s = time.monotonic() + self._rest_s, None
        return got


class FrameRate:
    """Frames of one connection in the second that runs."""

    def __init__(self, limit: int = FRAMES_PER_S) -> None:
        self._limit, self._second, self._count = limit, 0.0, 0

    def one_more(self) -> bool:
        """Count a frame; False when there were too many."""
        now = time.monotonic()
        if now - self._second >= 1.0:
            self._second, self._count = now, 0
        self._count += 1
        return self._count <= self._limit


def reason_of(error: OSError) -> str:
    """One word for why a TLS handshake failed."""
    if isinstance(error, TimeoutError):
        return "too-slow"
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == CERTIFICATE_EXPIRED:
            return "expired"
        return "unknown-authority" if error.verify_code in UNKNOWN_ISSUERS else "bad-certificate"
    if isinstance(error, ssl.SSLError) and error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "no-certificate"
    return "not-tls"
