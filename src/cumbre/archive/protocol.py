"""The transfer protocol: framed JSON and raw bytes over one TCP connection a stream.

A frame is the word ``CMB1``, the length and the CRC-32 of its body (both 4 bytes, big endian), and the body:
one JSON object of at most 64 KiB. The sender says::

    {"op": "ping"}                                   are you there?
    {"op": "expect", obs_id, part, …}                these files will come
    {"op": "offer", key, size, sha256, group_id, mode}      do you have it, do you want it?
    {"op": "put", …the same…, offset, encoding}      followed by the bytes from ``offset`` on
    {"op": "get", instrument, obs_id, detector, wait_s}     give me this image, wait until it is there

and the receiver answers each with ``{"answer": …}``; docs/reference/transfer-protocol.md has all of them.
Nothing is trusted: lengths are checked before memory is taken.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from cumbre.capture.keys import RawKey
from cumbre.core.errors import BadFileError, TransientError

MAGIC = b"CMB1"
HEAD = struct.Struct(">4sII")
MAX_BODY_BYTES = 64 << 10
MAX_FILE_BYTES = 4 << 30
BLOCK_BYTES = 256 << 10
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_WORD = 256


class ProtocolError(TransientError):
    """The stream is not what the protocol says; the connection must be closed and made anew."""


class Stream(Protocol):
    """What frames are read from: the one method of a socket that is needed."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Fill a part of the buffer; 0 at the end of the stream."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """One file on its way.

    Attributes
    ----------
    key
        Relative key, see :mod:`cumbre.capture.keys`.
    size, sha256
        Bytes, and ``sha256:<hex>`` of them.
    group_id
        Group of exposures, which the key does not have.
    mode
        Configuration of the archiver under which it is sent; the copies are tagged with it.
    """

    key: str
    size: int
    sha256: str
    group_id: str = ""
    mode: str = ""

    @classmethod
    def checked(cls, fields: dict[str, Any], *, max_bytes: int = MAX_FILE_BYTES) -> Parcel:
        """Validate what a sender says.

        Raises
        ------
        BadFileError
            A field is missing or not what it may be.
        """
        key, size, sha256 = fields.get("key"), fields.get("size"), fields.get("sha256")
        group_id, mode = fields.get("group_id", ""), fields.get("mode", "")
        if not isinstance(key, str):
            raise BadFileError("key: expected a text")
        RawKey.parse(key)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= max_bytes:
            raise BadFileError(f"{key}: size = {size!r}: expected 1 to {max_bytes} bytes")
        if not isinstance(sha256, str) or _SHA256.fullmatch(sha256) is None:
            raise BadFileError(f"{key}: sha256 = {str(sha256)[:80]!r}: expected sha256: and 64 hex digits")
        for name, word in (("group_id", group_id), ("mode", mode)):
            if not isinstance(word, str) or len(word) > _MAX_WORD:
                raise BadFileError(f"{key}: {name}: expected a text of at most {_MAX_WORD} characters")
        return cls(key, size, sha256, group_id, mode)

    def fields(self, operation: str) -> dict[str, Any]:
        """The body of an ``offer`` or ``put`` frame."""
        return {"op": operation} | asdict(self)


def encode_frame(body: dict[str, Any]) -> bytes:
    """Bytes of one frame.

    Raises
    ------
    ProtocolError
        The body is too long.
    """
    raw = json.dumps(body, separators=(",", ":")).encode()
    if len(raw) > MAX_BODY_BYTES:
        raise ProtocolError(f"frame of {len(raw)} bytes; at most {MAX_BODY_BYTES}")
    return HEAD.pack(MAGIC, len(raw), zlib.crc32(raw)) + raw


def read_exactly(stream: Stream, count: int) -> bytearray | None:
    """``count`` bytes; None when the stream ends before the first.

    Raises
    ------
    ProtocolError
        The stream ends in the middle.
    """
    buffer = bytearray(count)
    view, got = memoryview(buffer), 0
    while got < count:
        size = stream.recv_into(view[got:])
        if size == 0:
            if got == 0:
                return None
            raise ProtocolError(f"connection ended after {got} of {count} bytes")
        got += size
    return buffer


def read_frame(stream: Stream) -> dict[str, Any] | None:
    """Read the next frame's body; None at a clean end of the stream.

    Raises
    ------
    ProtocolError
        Not a frame: other magic, too long, damaged, not a JSON object.
    """
    head = read_exactly(stream, HEAD.size)
    if head is None:
        return None
    magic, length, crc = HEAD.unpack(head)
    if magic != MAGIC:
        raise ProtocolError(f"expected {MAGIC!r}, got {magic!r}")
    if length > MAX_BODY_BYTES:
        raise ProtocolError(f"frame of {length} bytes announced; at most {MAX_BODY_BYTES}")
    raw = read_exactly(stream, length) if length else bytearray()
    if raw is None or zlib.crc32(raw) != crc:
        raise ProtocolError("frame damaged or cut short")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"frame is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ProtocolError(f"frame is a JSON {type(body).__name__}, expected an object")
    return body


def send_frame(connection: socket.socket, body: dict[str, Any]) -> None:
    """Send one frame."""
    connection.sendall(encode_frame(body))
