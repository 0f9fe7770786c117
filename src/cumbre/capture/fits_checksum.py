"""CHECKSUM and DATASUM of FITS files in memory, the same bytes whenever they are written.

The FITS library puts the time of writing into the comments of both keywords, so that two nodes that write the
same image would make two files. Here the comments are fixed; the sums follow the FITS standard, appendix J.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

BLOCK, CARD = 2880, 80
_MARK = b"DAQSUM  ="
"""Card that only files of our writer have."""
_ZERO = b"0000000000000000"
_PUNCTUATION = frozenset([*range(0x3A, 0x41), *range(0x5B, 0x61)])
COMMENTS = {b"CHECKSUM": b"HDU checksum", b"DATASUM ": b"data unit checksum"}


def ones_complement_sum(content: bytes | memoryview, start: int = 0) -> int:
    """Sum of big-endian 32-bit words with end-around carry; the length is a multiple of 4."""
    total = start + int(np.frombuffer(content, ">u4").sum(dtype=np.uint64))
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total


def encoded(total: int) -> bytes:
    """16 letters and digits whose sum, in place, makes the HDU's sum all ones."""
    value = ~total & 0xFFFFFFFF
    out = bytearray(16)
    for i in range(4):
        byte = value >> 24 - 8 * i & 0xFF
        quotient, remainder = byte // 4 + 0x30, byte % 4
        letters = [quotient + remainder, quotient, quotient, quotient]
        while any(letter in _PUNCTUATION for letter in letters):
            for j in (0, 2):
                if letters[j] in _PUNCTUATION or letters[j + 1] in _PUNCTUATION:
                    letters[j] += 1
                    letters[j + 1] -= 1
        for j in range(4):
            out[4 * j + i] = letters[j]
    return bytes(out[-1:] + out[:-1])


def stable(content: bytes) -> bytes:
    """The same file with checksum cards that do not depend on the time of writing.

    Parameters
    ----------
    content
        A whole FITS file whose HDUs all have CHECKSUM and DATASUM.
    """
    data = bytearray(content)
    for begin, header_end, end in _units(content):
        for at in range(begin, header_end, CARD):
            name = bytes(data[at : at + 8])
            if name in COMMENTS:
                value = data[at + 10 : at + CARD].split(b"/")[0].rstrip()
                card = name + b"= " + value.ljust(20) + b" / " + COMMENTS[name]
                data[at : at + CARD] = card.ljust(CARD)
            if name == b"CHECKSUM":
                checksum_at = at + 11
        data[checksum_at : checksum_at + 16] = _ZERO
        total = ones_complement_sum(memoryview(data)[begin:end])
        data[checksum_at : checksum_at + 16] = encoded(total)
    return bytes(data)


def _units(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Begin, end of header and end of each HDU, in bytes; ValueError or KeyError when it is no FITS."""
    at = 0
    while at < len(content):
        begin, size = at, 0
        keys: dict[bytes, int] = {}
        ended = False
        while not ended:
            if at >= len(content):
                raise ValueError("no END card")
            for card_at in range(at, at + BLOCK, CARD):
                card = content[card_at : card_at + CARD]
                if card.startswith(b"END     "):
                    ended = True
                    break
                name = card[:8].rstrip()
                if name in (b"BITPIX", b"NAXIS", b"PCOUNT", b"GCOUNT") or name.startswith(b"NAXIS"):
                    keys[name] = int(card[10:30])
            at += BLOCK
        if keys[b"NAXIS"]:
            size = abs(keys[b"BITPIX"]) // 8 * keys.get(b"GCOUNT", 1)
            cells = 1
            for axis in range(1, keys[b"NAXIS"] + 1):
                cells *= keys[b"NAXIS%d" % axis]
            size *= keys.get(b"PCOUNT", 0) + cells
        header_end = at
        at += -(-size // BLOCK) * BLOCK
        yield begin, header_end, at


def is_sound(content: bytes) -> bool:
    """Whether every HDU of a file in memory still has the sum that its CHECKSUM promises (all ones)."""
    try:
        units = list(_units(content))
    except (KeyError, ValueError):
        return False
    if not units or units[-1][2] != len(content):
        return False
    return all(ones_complement_sum(memoryview(content)[begin:end]) == 0xFFFFFFFF for begin, _, end in units)


def claims_and_fails(path: Path) -> bool:
    """Whether a raw file that our writer made has rotted; files of other cameras promise nothing and never have."""
    content = path.read_bytes()
    return _MARK in content[: 10 * BLOCK] and not is_sound(content)
