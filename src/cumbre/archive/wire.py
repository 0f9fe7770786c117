"""The bytes of a file on the wire: plain, or in checked blocks, compressed where that makes them fewer.

A block is its length, its packed length, the CRC-32 of its bytes (each 4 bytes, big endian) and the packed
bytes; a block that does not shrink travels as it is, with both lengths equal. Lengths are bounded, so a forged
block can never unfold to more than it may, and what a bad line damages is found within a block. Under TLS
plain bytes are as safe.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cumbre.archive.protocol import BLOCK_BYTES, ProtocolError, Stream, read_exactly
from cumbre.core.errors import ConfigurationError

PACKED_HEAD = struct.Struct(">III")
PACKED_BYTES = 1 << 20
WORTH_IT = 0.9
"""A file is compressed when its first block shrinks at least to this part."""
ENCODINGS = ("", "blocks", "zstd")


def _codec() -> Any:
    import pyarrow

    return pyarrow.Codec("zstd", compression_level=1)


def is_worth_it(first: bytes) -> bool:
    """Whether compression makes a file's first bytes smaller; tile-compressed images do not shrink."""
    return len(_codec().compress(first, asbytes=True)) <= WORTH_IT * len(first)


def packed(blocks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Blocks of at most ``PACKED_BYTES`` as they travel."""
    codec = _codec() if encoding == "zstd" else None
    for block in blocks:
        small = block if codec is None else codec.compress(block, asbytes=True)
        if len(small) >= len(block):
            small = block
        yield PACKED_HEAD.pack(len(block), len(small), zlib.crc32(block))
        yield small


def receive_plain(stream: Stream, size: int, take: Callable[[memoryview], None]) -> None:
    """Read ``size`` bytes and hand them on.

    Raises
    ------
    ProtocolError
        The stream ends before.
    """
    # TLS gives 16 KiB at a time: a whole block is gathered before it is hashed and written.
    view = memoryview(bytearray(min(BLOCK_BYTES, size)))
    left, filled = size, 0
    try:
        while left:
            got = stream.recv_into(view[filled : min(filled + left, len(view))])
            if got == 0:
                raise ProtocolError(f"connection ended {left} bytes before the end")
            left -= got
            filled += got
            if filled == len(view):
                filled = 0
                take(view)
    finally:
        if filled:
            take(view[:filled])


def receive_packed(stream: Stream, size: int, take: Callable[[memoryview], None]) -> None:
    """Read blocks of ``size`` bytes together and hand on what was in them.

    Raises
    ------
    ProtocolError
        A block is longer than allowed, damaged, or the stream ends before.
    """
    codec, left = None, size
    block: bytes | bytearray | None
    while left:
        head = read_exactly(stream, PACKED_HEAD.size)
        if head is None:
            raise ProtocolError(f"connection ended {left} bytes before the end")
        length, small, check = PACKED_HEAD.unpack(head)
        if not 0 < length <= min(left, PACKED_BYTES) or not 0 < small <= length:
            raise ProtocolError(f"block of {small} for {length} bytes, {left} left: not allowed")
        block = read_exactly(stream, small)
        if block is None:
            raise ProtocolError(f"connection ended {left} bytes before the end")
        if small < length:
            codec = codec or _codec()
            try:
                block = codec.decompress(block, length, asbytes=True)
            except (OSError, ValueError) as error:
                raise ProtocolError(f"block does not unpack: {error}") from error
        if len(block) != length or zlib.crc32(block) != check:
            raise ProtocolError(f"block of {length} bytes damaged on the way, {left} left")
        left -= length
        take(memoryview(block))


def receiver_of(encoding: object) -> Callable[[Stream, int, Callable[[memoryview], None]], None]:
    """How bytes of an encoding are read.

    Raises
    ------
    ConfigurationError
        Not one of ours.
    """
    if encoding not in ENCODINGS:
        raise ConfigurationError(f"encoding = {str(encoding)[:40]!r}: expected one of {ENCODINGS}")
    return receive_packed if encoding else receive_plain
