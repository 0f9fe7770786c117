"""A file with several detectors becomes one file a detector; pixels and their headers are copied byte for byte.

Each image HDU says whose it is in ``CHIPID``. The primary header is common; in the pieces it names the detector.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.core.errors import BadFileError
from cumbre.stores.files import Checksummed, HashingWriter, write_atomic

if TYPE_CHECKING:
    from cumbre.core.instrument import Detector, Instrument

DETECTOR_KEYWORD = "CHIPID"
BLOCK = 1 << 20

Span = tuple[int, int]
"""First byte and number of bytes of an HDU."""


def detectors_in(path: Path, instrument: Instrument) -> dict[str, list[Span]]:
    """Where the HDUs of each detector are; the primary HDU is none of theirs.

    Raises
    ------
    BadFileError
        Not a FITS file, an HDU that names no detector of the instrument, or fewer bytes than it says.
    """
    from astropy.io import fits

    known = {detector.name for detector in instrument.detectors}
    found: dict[str, list[Span]] = {}
    size = path.stat().st_size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with fits.open(path, disable_image_compression=True, memmap=True) as hdus:
                for number, hdu in enumerate(hdus):
                    if number == 0:
                        continue
                    name = str(hdu.header.get(DETECTOR_KEYWORD, ""))
                    if name not in known:
                        raise BadFileError(
                            f"{path}: HDU {number}: {DETECTOR_KEYWORD} = {name[:40]!r}: no detector of "
                            f"{instrument.name}"
                        )
                    where = hdu.fileinfo()
                    end = where["datLoc"] + where["datSpan"]
                    if end > size:
                        raise BadFileError(f"{path}: HDU {number} ends at byte {end}, the file at {size}")
                    found.setdefault(name, []).append((where["hdrLoc"], end - where["hdrLoc"]))
    except BadFileError:
        raise
    except Exception as error:
        # Whatever a stranger's file makes the FITS reader raise, it is the file's fault.
        raise BadFileError(f"{path}: not a readable FITS file: {error}") from error
    if not found:
        raise BadFileError(f"{path}: no image of any detector")
    return found


def split(
    path: Path, instrument: Instrument, target: Path, name_of: str
) -> Iterator[tuple[Detector, Checksummed]]:
    """Write one file for each detector.

    Parameters
    ----------
    target
        Folder.
    name_of
        File name with ``{detector}`` in the place of the detector's name.

    Yields
    ------
    Detector, Checksummed
        What was written, in the order of the file; a piece that is there already is written again.

    Raises
    ------
    BadFileError
        As :func:`detectors_in`; then nothing was written.
    """
    spans = detectors_in(path, instrument)
    for name, parts in spans.items():
        detector = instrument.detector(name)
        primary = _primary(path, detector)

        def copy(writer: HashingWriter, primary: bytes = primary, parts: list[Span] = parts) -> None:
            writer.write(primary)
            with path.open("rb") as stream:
                for start, size in parts:
                    stream.seek(start)
                    left = size
                    while left:
                        block = stream.read(min(left, BLOCK))
                        if not block:
                            raise BadFileError(f"{path}: became shorter while it was read")
                        writer.write(block)
                        left -= len(block)

        yield detector, write_atomic(target / name_of.format(detector=name), copy)


def _primary(path: Path, detector: Detector) -> bytes:
    """The common primary header with the detector's names and a new checksum."""
    from astropy.io import fits

    header: Any = fits.getheader(path, 0)
    raft, _, slot = detector.name.partition("_")
    header[DETECTOR_KEYWORD] = detector.name
    header["DETECTOR"] = detector.id
    header["RAFTBAY"], header["CCDSLOT"] = raft, slot
    header["NAXIS"] = 0
    hdu = fits.PrimaryHDU(header=header)
    hdu.add_checksum()
    return str(hdu.header.tostring()).encode("ascii")
