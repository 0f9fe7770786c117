"""Raw files to arrays: our own one-HDU-per-amplifier files and foreign single-HDU ones.

The structure of the file is checked before any library touches its pixels: block by block, with the sizes
that the headers claim compared with the bytes that are there. A broken file gives :class:`BadFileError`,
never a crash, and never an allocation that its header asked for.
"""

from __future__ import annotations

import bz2
import gzip
import io
import math
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import BadFileError, CumbreError, NotFoundError
from cumbre.core.header import ObservationMetadata, translate
from cumbre.core.instrument import Amplifier, Detector, Instrument

BLOCK = 2880
MAX_PIXELS = 1_000_000_000
MAX_HEADER_BLOCKS = 2000
MAX_HDUS = 1000
_DTYPES = {8: ">u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}


@dataclass(frozen=True, slots=True)
class RawDetector:
    """One detector as it was read out.

    Attributes
    ----------
    amplifiers
        One array (ny_raw, nx_raw) per amplifier in the order of ``detector.amplifiers``, overscan included;
        with ``one_hdu`` files all are the same array. uint16, or what the file holds.
    header
        Primary header: keyword → value.
    detector, instrument
        Descriptions.
    metadata
        The observation in our own words.
    path
        The file.
    """

    amplifiers: list[NDArray[Any]]
    header: dict[str, Any]
    detector: Detector
    instrument: Instrument
    metadata: ObservationMetadata
    path: str = ""


@dataclass(slots=True)
class Hdu:
    """Header-data unit: its header as it is, structural keywords, and where its data lie in the file."""

    index: int
    text: bytes
    cards: dict[str, str]
    data_offset: int
    data_bytes: int
    extname: str = ""
    shape: tuple[int, ...] = field(default_factory=tuple)

    @property
    def compressed(self) -> bool:
        """Whether it holds a tile-compressed image."""
        return self.cards.get("ZIMAGE", "F") == "T"


def _cards(text: bytes) -> dict[str, str]:
    """Value text of the structural keywords; the first of each counts."""
    out: dict[str, str] = {}
    for start in range(0, len(text), 80):
        card = text[start : start + 80]
        if card[8:10] != b"= ":
            continue
        key = card[:8].decode("latin-1").strip()
        value = card[10:].decode("latin-1")
        stripped = value.lstrip()
        if stripped.startswith("'"):
            end = stripped.find("'", 1)
            value = stripped[1:end] if end > 0 else stripped[1:]
        else:
            value = value.split("/")[0]
        out.setdefault(key, value.strip())
    return out


def _integer(cards: dict[str, str], key: str, default: int | None, where: str) -> int:
    text = cards.get(key)
    if text is None:
        if default is None:
            raise BadFileError(f"{where}: keyword {key} is missing; the file is not FITS or is damaged")
        return default
    try:
        return int(text)
    except ValueError as error:
        raise BadFileError(f"{where}: {key} = {text!r}: expected a whole number") from error


def scan(stream: BinaryIO, size: int, path: str) -> list[Hdu]:
    """Walk over the HDUs, checking that each claims only what the file has."""
    hdus: list[Hdu] = []
    offset = 0
    while offset < size and len(hdus) < MAX_HDUS:
        where = f"{path}: HDU {len(hdus)}"
        stream.seek(offset)
        blocks: list[bytes] = []
        while True:
            block = stream.read(BLOCK)
            if len(block) < BLOCK:
                if not blocks and hdus and not block.strip(b"\0 "):
                    return hdus
                raise BadFileError(
                    f"{where}: truncated: the header ends after {offset + len(block)} bytes without END"
                )
            if not blocks and block[:9] not in (b"SIMPLE  =", b"XTENSION="):
                if hdus and not block.strip(b"\0 "):
                    return hdus
                raise BadFileError(
                    f"{where}: not FITS: it starts with {block[:9]!r}, expected SIMPLE or XTENSION"
                )
            blocks.append(block)
            if any(block[i : i + 8] == b"END     " for i in range(0, BLOCK, 80)):
                break
            if len(blocks) > MAX_HEADER_BLOCKS:
                raise BadFileError(
                    f"{where}: header of more than {MAX_HEADER_BLOCKS} blocks; the file is damaged"
                )
        text = b"".join(blocks)
        hdu = _describe(text, len(hdus), offset, where)
        if hdu.data_offset + hdu.data_bytes > size:
            raise BadFileError(
                f"{where}: truncated: the header claims {hdu.data_bytes} bytes of data, "
                f"the file has {max(0, size - hdu.data_offset)}; fetch it again"
            )
        hdus.append(hdu)
        offset = hdu.data_offset + -(-hdu.data_bytes // BLOCK) * BLOCK
    if not hdus:
        raise BadFileError(f"{path}: empty file; expected FITS")
    return hdus


def _axes(cards: dict[str, str], prefix: str, where: str) -> tuple[int, ...]:
    naxis = _integer(cards, f"{prefix}NAXIS", None, where)
    if not 0 <= naxis <= 8:
        raise BadFileError(f"{where}: {prefix}NAXIS = {naxis}: expected 0 to 8")
    axes = tuple(_integer(cards, f"{prefix}NAXIS{i + 1}", None, where) for i in range(naxis))
    if any(n < 0 for n in axes) or math.prod(axes) > MAX_PIXELS:
        raise BadFileError(
            f"{where}: axes {axes}: expected at most {MAX_PIXELS} pixels; the header is damaged"
        )
    return axes


def _describe(text: bytes, index: int, offset: int, where: str) -> Hdu:
    cards = _cards(text)
    bitpix = _integer(cards, "BITPIX", None, where)
    if bitpix not in _DTYPES:
        raise BadFileError(f"{where}: BITPIX = {bitpix}: expected one of {', '.join(map(str, _DTYPES))}")
    axes = _axes(cards, "", where)
    pcount, gcount = _integer(cards, "PCOUNT", 0, where), _integer(cards, "GCOUNT", 1, where)
    if pcount < 0 or gcount != 1 or pcount > 8 * MAX_PIXELS:
        raise BadFileError(f"{where}: PCOUNT = {pcount}, GCOUNT = {gcount}: expected a plain image or table")
    count = math.prod(axes) if axes else 0
    hdu = Hdu(index, text, cards, offset + len(text), (count + pcount) * abs(bitpix) // 8)
    hdu.extname = cards.get("EXTNAME", "").strip()
    hdu.shape = axes[::-1]
    if hdu.compressed:
        hdu.shape = _axes(cards, "Z", where)[::-1]
        if _integer(cards, "ZBITPIX", None, where) not in _DTYPES:
            raise BadFileError(f"{where}: ZBITPIX = {cards['ZBITPIX']}: not a pixel type")
        tile = [
            _integer(cards, f"ZTILE{i + 1}", n if i == 0 else 1, where) for i, n in enumerate(hdu.shape[::-1])
        ]
        if any(t < 1 or t > n for t, n in zip(tile, hdu.shape[::-1], strict=True)):
            raise BadFileError(f"{where}: tiles {tile} do not fit the image {hdu.shape[::-1]}")
        tiles = math.prod(-(-n // t) for n, t in zip(hdu.shape[::-1], tile, strict=True))
        if len(axes) != 2 or axes[1] != tiles:
            raise BadFileError(f"{where}: {axes[-1] if axes else 0} compressed tiles, expected {tiles}")
    return hdu


def _content(path: Path) -> tuple[BinaryIO, int, bool]:
    """Open stream, its size, and whether it is in memory."""
    with path.open("rb") as stream:
        magic = stream.read(3)
    openers: dict[bytes, Any] = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open}
    opener = openers.get(magic)
    if opener is None:
        return path.open("rb"), path.stat().st_size, False
    limit = 8 * MAX_PIXELS
    try:
        with opener(path, "rb") as packed:
            parts, total = [], 0
            while part := packed.read(1 << 24):
                total += len(part)
                if total > limit:
                    raise BadFileError(f"{path}: unpacks to more than {limit} bytes; refused")
                parts.append(part)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise BadFileError(f"{path}: the compressed file is damaged: {error}") from error
    data = b"".join(parts)
    return io.BytesIO(data), len(data), True


def _plain_image(stream: BinaryIO, hdu: Hdu, where: str) -> NDArray[Any]:
    bitpix = int(hdu.cards["BITPIX"])
    stream.seek(hdu.data_offset)
    raw = np.frombuffer(stream.read(math.prod(hdu.shape) * abs(bitpix) // 8), dtype=_DTYPES[bitpix])
    raw = raw.reshape(hdu.shape)
    try:
        zero, scale = float(hdu.cards.get("BZERO", "0")), float(hdu.cards.get("BSCALE", "1"))
    except ValueError as error:
        raise BadFileError(f"{where}: BZERO or BSCALE is not a number") from error
    if scale == 1 and zero == 32768 and bitpix == 16:
        return raw.astype(np.int16).view(np.uint16) ^ np.uint16(0x8000)
    native = raw.astype(raw.dtype.newbyteorder("="))
    if scale == 1 and zero == 0:
        return native
    return (native * np.float64(scale) + zero).astype(np.float32)


def _compressed_image(
    path: Path, stream: BinaryIO, in_memory: bool, hdu: Hdu, opened: list[Any]
) -> NDArray[Any]:
    try:
        if in_memory:
            from astropy.io import fits

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if not opened:
                    stream.seek(0)
                    opened.append(fits.open(stream, memmap=False))
                return np.asarray(opened[0][hdu.index].data)
        import fitsio

        if not opened:
            opened.append(fitsio.FITS(str(path), "r"))
        return np.asarray(opened[0][hdu.index].read())
    except CumbreError:
        raise
    except Exception as error:  # what the libraries raise on damaged tiles has no common root
        raise BadFileError(f"{path}: HDU {hdu.index}: the compressed pixels are damaged: {error}") from error


def _header(hdu: Hdu, where: str) -> dict[str, Any]:
    from astropy.io import fits

    out: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            header = fits.Header.fromstring(hdu.text)
            for card in header.cards:
                try:
                    if card.keyword not in ("COMMENT", "HISTORY", "") and card.keyword not in out:
                        out[card.keyword] = card.value
                except (ValueError, TypeError, fits.VerifyError):
                    continue
        except (ValueError, TypeError, UnicodeDecodeError, fits.VerifyError) as error:
            raise BadFileError(f"{where}: unreadable header: {error}") from error
    return out


def _find(hdus: list[Hdu], key: int | str, instrument: Instrument, path: str) -> Hdu:
    if isinstance(key, int):
        if key < len(hdus):
            return hdus[key]
        # a tile-compressed image can not be the primary HDU: writers move it to the next one
    else:
        for hdu in hdus:
            if hdu.extname.lower() == key.lower():
                return hdu
    names = ", ".join(hdu.extname or str(hdu.index) for hdu in hdus)
    raise BadFileError(f"{path}: no HDU {key!r} for instrument {instrument.name}; the file has {names}")


def check_boxes(amplifier: Amplifier, shape: tuple[int, ...], where: str) -> None:
    """Refuse an array that is smaller than an amplifier's description says.

    Raises
    ------
    BadFileError
        It is.
    """
    boxes = (
        amplifier.raw_box,
        amplifier.overscan_box,
        amplifier.prescan_box,
        amplifier.parallel_overscan_box,
    )
    for box in boxes:
        if box is not None and (len(shape) != 2 or box.y1 > shape[0] or box.x1 > shape[1]):
            raise BadFileError(
                f"{where}: amplifier {amplifier.name} needs pixels to x {box.x1}, y {box.y1}; "
                f"the image has the shape (ny, nx) = {shape}"
            )


def observation_of(
    instrument: Instrument, headers: list[dict[str, Any]], path: str
) -> tuple[ObservationMetadata, Detector]:
    """What the headers of a raw file say, and the detector that they name.

    Raises
    ------
    BadFileError
        They cannot be understood.
    """
    try:
        metadata = translate(instrument, headers, path)
        return metadata, instrument.detector(metadata.detector_id)
    except NotFoundError as error:
        raise BadFileError(f"{path}: {error}") from error
    except (ValueError, TypeError, ArithmeticError, KeyError) as error:
        raise BadFileError(f"{path}: the header can not be understood: {error}") from error


def check_finite(array: NDArray[Any], where: str) -> None:
    """Refuse raw pixels that are no counts.

    Raises
    ------
    BadFileError
        NaN or infinite pixels.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = int(np.count_nonzero(~np.isfinite(array)))
        raise BadFileError(f"{where}: {count} pixels are NaN or infinite; raw pixels are counts")


def read_raw(path: str | Path, instrument: Instrument) -> RawDetector:
    """Read one detector's raw file.

    Parameters
    ----------
    path
        ``.fits``, ``.fits.fz``, or either packed with gzip or bzip2.
    instrument
        The camera it came from.

    Raises
    ------
    NotFoundError
        No such file.
    BadFileError
        Not FITS, truncated, absurd sizes, missing amplifiers or keywords, NaN pixels.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"{path}: there is no such file")
    stream, size, in_memory = _content(path)
    opened: list[Any] = []
    try:
        hdus = scan(stream, size, str(path))
        header = _header(hdus[0], f"{path}: HDU 0")
        headers = [header]
        if instrument.header:
            headers += [_header(hdu, f"{path}: HDU {hdu.index}") for hdu in hdus[1:]]
        metadata, detector = observation_of(instrument, headers, str(path))
        arrays: dict[int, NDArray[Any]] = {}
        amplifiers = []
        for amplifier in detector.amplifiers:
            hdu = _find(hdus, amplifier.hdu, instrument, str(path))
            if not hdu.shape and hdu.index + 1 < len(hdus):
                hdu = hdus[hdu.index + 1]
            where = f"{path}: HDU {hdu.index}"
            check_boxes(amplifier, hdu.shape, where)
            if hdu.index not in arrays:
                array = (
                    _compressed_image(path, stream, in_memory, hdu, opened)
                    if hdu.compressed
                    else _plain_image(stream, hdu, where)
                )
                if array.shape != hdu.shape:
                    raise BadFileError(f"{where}: read the shape {array.shape}, expected {hdu.shape}")
                check_finite(array, where)
                arrays[hdu.index] = array
            amplifiers.append(arrays[hdu.index])
    finally:
        stream.close()
        for item in opened:
            item.close()
    return RawDetector(amplifiers, header, detector, instrument, metadata, str(path))
