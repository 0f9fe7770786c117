"""Raw FITS files: a primary header and one compressed image an amplifier, made in memory in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fitsio
import numpy as np

from cumbre.capture.daq import RawArray
from cumbre.capture.fits_checksum import stable
from cumbre.core.errors import BadFileError, UnprocessableDataError
from cumbre.core.instrument import Box, Detector

SOURCE_KEYWORD = "DAQSUM"
"""Primary keyword with the checksum of the camera's array: two files of one key are the same image if equal."""

Card = dict[str, Any]


def fits_section(box: Box, *, flip_x: bool = False, flip_y: bool = False) -> str:
    """``[x0:x1,y0:y1]`` as FITS writes it: 1-based, inclusive, reversed where read the other way."""
    x = (box.x1, box.x0 + 1) if flip_x else (box.x0 + 1, box.x1)
    y = (box.y1, box.y0 + 1) if flip_y else (box.y0 + 1, box.y1)
    return f"[{x[0]}:{x[1]},{y[0]}:{y[1]}]"


def _extension_header(detector: Detector, index: int) -> list[Card]:
    amplifier = detector.amplifiers[index]
    cards: list[Card] = [
        {"name": "CHANNEL", "value": index + 1, "comment": "amplifier number"},
        {"name": "AMPNAME", "value": amplifier.name, "comment": "amplifier"},
        {"name": "DATASEC", "value": fits_section(amplifier.raw_box), "comment": "light-sensitive pixels"},
    ]
    if amplifier.overscan_box is not None:
        cards.append(
            {"name": "BIASSEC", "value": fits_section(amplifier.overscan_box), "comment": "serial overscan"}
        )
    if amplifier.prescan_box is not None:
        cards.append({"name": "PRESEC", "value": fits_section(amplifier.prescan_box), "comment": "prescan"})
    detsec = fits_section(amplifier.detector_box, flip_x=amplifier.flip_x, flip_y=amplifier.flip_y)
    return [
        *cards,
        {"name": "DETSEC", "value": detsec, "comment": "place in the assembled detector"},
        {"name": "DETSIZE", "value": f"[1:{detector.nx},1:{detector.ny}]", "comment": "assembled detector"},
        {"name": "GAIN", "value": amplifier.gain, "comment": "[electron/adu]"},
        {"name": "RDNOISE", "value": amplifier.read_noise, "comment": "[electron] rms"},
        {"name": "SATURATE", "value": amplifier.saturation, "comment": "[adu]"},
    ]


def raw_fits_bytes(detector: Detector, array: RawArray, primary: list[Card]) -> bytes:
    """The whole file of one detector.

    Parameters
    ----------
    detector
        Its description; one HDU is written for each amplifier, named after ``amplifier.hdu``.
    array
        uint16 of shape (n_amplifiers, ny_raw, nx_raw).
    primary
        Cards of the primary header: dicts of name, value, comment.

    Returns
    -------
    bytes
        FITS with RICE tile compression (lossless) and CHECKSUM and DATASUM in every HDU; the same arguments
        give the same bytes whenever and by whomever they are made.

    Raises
    ------
    UnprocessableDataError
        A card or an array that FITS cannot hold.
    """
    try:
        return _in_memory(detector, array, primary)
    except OSError as error:
        # cfitsio says so of everything; nothing here touches a disk, so trying again would not help
        raise UnprocessableDataError(f"{detector.name}: cannot be written as FITS: {error}") from error


def _in_memory(detector: Detector, array: RawArray, primary: list[Card]) -> bytes:
    with fitsio.FITS("mem://", "rw") as fits:
        fits.write(None, header=primary)
        fits[0].write_checksum()
        for index, amplifier in enumerate(detector.amplifiers):
            ny, nx = amplifier.raw_shape
            name = amplifier.hdu if isinstance(amplifier.hdu, str) else f"Segment{amplifier.name[1:]}"
            fits.write(
                np.ascontiguousarray(array[index, :ny, :nx]),
                header=_extension_header(detector, index),
                extname=name,
                compress="RICE_1",
            )
            fits[-1].write_checksum()
        return stable(bytes(fits.read_raw()))


def read_source_checksum(path: Path) -> str:
    """``sha256:…`` of the camera's array that a raw file was made of.

    Raises
    ------
    BadFileError
        The file cannot be read as one of ours.
    """
    try:
        with fitsio.FITS(str(path)) as fits:
            return f"sha256:{fits[0].read_header()[SOURCE_KEYWORD]}"
    except (OSError, ValueError, KeyError) as error:
        raise BadFileError(f"{path}: not a raw file of ours: {error}") from error
