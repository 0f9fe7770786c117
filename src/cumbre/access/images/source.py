"""Image files wherever they lie: on disk, or in an object store of which only the needed bytes are fetched.

A remote file becomes a sparse one in memory: headers first, then the rows of descriptors and the compressed tiles
(or the rows of pixels) that a section needs, each at its own place. The library that reads FITS sees a file like any
other, and looks only where bytes are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import BadFileError, NotFoundError, TransientError

if TYPE_CHECKING:
    from cumbre.payloads.raw import Hdu
    from cumbre.stores.objects import ObjectStore

BLOCK = 1 << 14
"""Bytes of one unit of what is fetched."""
AHEAD = 2 * BLOCK
"""Bytes that are fetched with a header: the next header is often among them."""
_BRIDGE = 4
"""Blocks between two needed ones that are fetched too: cheaper than a further request."""
_FORM = re.compile(r"(\d*)([LXBIJKAEDCMPQ])")
_WIDTH = {"L": 1, "B": 1, "A": 1, "I": 2, "J": 4, "E": 4, "K": 8, "D": 8, "C": 8, "M": 16, "P": 8, "Q": 16}


@dataclass(frozen=True, slots=True)
class PixelBox:
    """Half-open ranges of columns and rows."""

    x0: int
    x1: int
    y0: int
    y1: int

    @property
    def shape(self) -> tuple[int, int]:
        """(ny, nx)."""
        return self.y1 - self.y0, self.x1 - self.x0


type Section = tuple[int | str, PixelBox]
"""An HDU (number or name) and which of its pixels."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is that of an object store."""
    return str(path).startswith("s3://")


@lru_cache(maxsize=16)
def _store(bucket: str) -> ObjectStore:
    from cumbre.stores.objects import ObjectStore

    return ObjectStore(f"s3://{bucket}")


def place_of(url: str) -> tuple[ObjectStore, str]:
    """Store and key of ``s3://bucket/key``."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return _store(bucket), key


class RemoteFile:
    """A file in an object store whose blocks come when they are needed; readable and seekable.

    Attributes
    ----------
    size
        Bytes of the whole file.
    fetched
        Bytes that came over the network.
    requests
        Ranges that were asked for.
    """

    def __init__(self, url: str) -> None:
        self._objects, self._key = place_of(url)
        self.size = self._objects.size(self._key)
        self.fetched = self.requests = 0
        self._at = 0
        self._have = bytearray(-(-self.size // BLOCK))
        self._memory = os.memfd_create("cumbre-image", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, self.size)

    @property
    def path(self) -> str:
        """Path of the sparse file, for this process."""
        return f"/proc/self/fd/{self._memory}"

    def need(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch what is not here of half-open ranges of bytes, as few requests as are reasonable."""
        wanted = np.zeros(len(self._have), np.bool_)
        for start, end in ranges:
            wanted[max(start, 0) // BLOCK : -(-min(end, self.size) // BLOCK)] = True
        missing = np.flatnonzero(wanted & (np.frombuffer(self._have, np.uint8) == 0))
        if not len(missing):
            return
        for run in np.split(missing, np.flatnonzero(np.diff(missing) > _BRIDGE) + 1):
            first, last = int(run[0]), int(run[-1])
            start, size = first * BLOCK, min((last + 1) * BLOCK, self.size) - first * BLOCK
            content = self._objects.read_range(self._key, start, size)
            if len(content) != size:
                raise TransientError(
                    f"{self._key}: {len(content)} bytes came of {size}; the object changed meanwhile"
                )
            os.pwrite(self._memory, content, start)
            self._have[first : last + 1] = b"\1" * (last + 1 - first)
            self.fetched += size
            self.requests += 1

    def seek(self, offset: int) -> None:
        """Go to a byte."""
        self._at = offset

    def read(self, size: int) -> bytes:
        """Bytes from here on."""
        self.need([(self._at, self._at + max(size, AHEAD))])
        content = os.pread(self._memory, size, self._at)
        self._at += len(content)
        return content

    def close(self) -> None:
        """Give the memory back."""
        os.close(self._memory)


class ImageFile:
    """An opened FITS file: its header, shapes, and sections of its images.

    Attributes
    ----------
    remote
        The file's blocks when it lies in an object store, None on disk.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = Path(str(path)).name
        self.remote: RemoteFile | None = None
        self._hdus: list[Hdu] = []
        if is_remote(path):
            from cumbre.payloads.raw import scan

            self.remote = RemoteFile(str(path))
            try:
                self._hdus = scan(self.remote, self.remote.size, str(path))  # type: ignore[arg-type]
            except BaseException:
                self.remote.close()
                raise
            path = self.remote.path
        elif not Path(path).is_file():
            raise NotFoundError(f"{self.name}: the file is not in the cache any more")
        self._path = str(path)
        self._fits = self._open()

    def _open(self) -> Any:
        import fitsio

        try:
            return fitsio.FITS(self._path)
        except OSError as error:
            raise BadFileError(f"{self.name}: cannot be read: {str(error)[:200]}") from error

    def close(self) -> None:
        """Close the file."""
        self._fits.close()
        if self.remote is not None:
            self.remote.close()

    def header(self) -> dict[str, Any]:
        """Keywords of the primary HDU."""
        return dict(self._fits[0].read_header())

    def number(self, key: int | str) -> int:
        """Number of an HDU.

        Raises
        ------
        NotFoundError
            There is none of this name.
        """
        if isinstance(key, int):
            return key
        for number in range(len(self._fits)):
            if self._fits[number].get_extname().lower() == key.lower():
                return number
        raise NotFoundError(f"the file has no HDU {key}")

    def shape(self, key: int | str) -> tuple[int, int]:
        """(ny, nx) of an image."""
        ny, nx = (int(v) for v in self._fits[self.number(key)].get_dims())
        return ny, nx

    def sections(self, wanted: Sequence[Section]) -> list[NDArray[Any]]:
        """Pixels of sections, in order.

        Raises
        ------
        BadFileError
            An image is smaller than its section, or damaged.
        """
        numbers = [self.number(key) for key, _ in wanted]
        if self.remote is not None:
            described = [(self._hdus[n], box) for n, (_, box) in zip(numbers, wanted, strict=True)]
            self.remote.need(part for hdu, box in described for part in _table_rows(hdu, box))
            self.remote.need(part for hdu, box in described for part in _pixels(self.remote, hdu, box))
            # opened anew: the library keeps blocks that it read before the pixels were there
            self._fits.close()
            self._fits = self._open()
        out = []
        for number, (_, box) in zip(numbers, wanted, strict=True):
            try:
                part = self._fits[number][box.y0 : box.y1, box.x0 : box.x1]
            except OSError as error:
                raise BadFileError(f"{self.name}: HDU {number}: {str(error)[:200]}") from error
            if part.shape != box.shape:
                raise BadFileError(f"{self.name}: HDU {number} has fewer pixels than expected")
            out.append(part)
        return out


@contextmanager
def opened(path: str | Path) -> Iterator[ImageFile]:
    """An image file, on disk or ``s3://bucket/key``.

    Raises
    ------
    NotFoundError
        It is not there.
    BadFileError
        It is not FITS.
    """
    file = ImageFile(path)
    try:
        yield file
    finally:
        file.close()


# which bytes a section needs


def _number(hdu: Hdu, key: str, default: int = 0) -> int:
    try:
        return int(hdu.cards.get(key, default))
    except ValueError as error:
        raise BadFileError(f"HDU {hdu.index}: {key}: expected a whole number") from error


def _tile_rows(hdu: Hdu, box: PixelBox) -> list[tuple[int, int]]:
    """Half-open runs of rows of the table of tiles."""
    ny, nx = hdu.shape
    wide, high = _number(hdu, "ZTILE1", nx), _number(hdu, "ZTILE2", 1)
    across = -(-nx // wide)
    left, right = box.x0 // wide, (box.x1 - 1) // wide + 1
    rows = range(box.y0 // high, (min(box.y1, ny) - 1) // high + 1)
    if (left, right) == (0, across):
        return [(rows.start * across, rows.stop * across)]
    return [(row * across + left, row * across + right) for row in rows]


def _table_rows(hdu: Hdu, box: PixelBox) -> Iterator[tuple[int, int]]:
    if hdu.compressed:
        size = _number(hdu, "NAXIS1")
        for first, last in _tile_rows(hdu, box):
            yield hdu.data_offset + first * size, hdu.data_offset + last * size


def _pixels(file: RemoteFile, hdu: Hdu, box: PixelBox) -> Iterator[tuple[int, int]]:
    if not hdu.compressed:
        depth, nx = abs(_number(hdu, "BITPIX")) // 8, hdu.shape[1]
        for y in range(box.y0, box.y1):
            start = hdu.data_offset + (y * nx + box.x0) * depth
            yield start, start + (box.x1 - box.x0) * depth
        return
    size, count = _number(hdu, "NAXIS1"), _number(hdu, "NAXIS2")
    heap = hdu.data_offset + _number(hdu, "THEAP", size * count)
    columns = _descriptors(hdu)
    for first, last in _tile_rows(hdu, box):
        file.seek(hdu.data_offset + first * size)
        table = np.frombuffer(file.read((last - first) * size), np.uint8).reshape(-1, size)
        for at, kind, width in columns:
            word = ">i4" if kind == "P" else ">i8"
            pairs = np.ascontiguousarray(table[:, at : at + _WIDTH[kind]]).view(word)
            for length, offset in pairs.tolist():
                if length:
                    yield heap + offset, heap + offset + length * width


def _descriptors(hdu: Hdu) -> list[tuple[int, str, int]]:
    """Columns of variable length: place in the row, kind of descriptor, bytes of one element."""
    out, at = [], 0
    for number in range(1, _number(hdu, "TFIELDS") + 1):
        form = hdu.cards.get(f"TFORM{number}", "").strip()
        match = _FORM.match(form)
        if match is None:
            raise BadFileError(f"HDU {hdu.index}: TFORM{number} = {form!r} is not understood")
        kind, repeat = match[2], int(match[1] or 1)
        if kind in "PQ":
            out.append((at, kind, _WIDTH.get(form[match.end() : match.end() + 1], 1)))
        at += -(-repeat // 8) if kind == "X" else repeat * _WIDTH[kind]
    return out
