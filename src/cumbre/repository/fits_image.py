"""A FITS file in memory: the Python type of the storage class ``CumbreFits``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.core.header_files import plain_header
from cumbre.core.instrument import Detector


@dataclass(frozen=True, slots=True)
class FitsHdu:
    """One HDU: EXTNAME ("" when there is none), header without commentary, pixels or None."""

    name: str
    header: dict[str, Any] = field(default_factory=dict)
    data: NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class FitsImage:
    """All HDUs of a FITS file in order. Pixel arrays have shape (ny, nx)."""

    hdus: tuple[FitsHdu, ...]

    @property
    def header(self) -> dict[str, Any]:
        """The primary header."""
        return self.hdus[0].header

    def pixels(self, key: int | str) -> NDArray[Any]:
        """Pixels of an HDU by EXTNAME or by number; number 0 means the first HDU that has any.

        Raises
        ------
        NotFoundError
            There is no such HDU, or it has no pixels.
        """
        if key in (0, "0"):
            found = next((hdu for hdu in self.hdus if hdu.data is not None), None)
        elif isinstance(key, int):
            found = self.hdus[key] if key < len(self.hdus) else None
        else:
            found = next((hdu for hdu in self.hdus if hdu.name.lower() == key.lower()), None)
        if found is None or found.data is None:
            names = ", ".join(f"{i}:{hdu.name or '-'}" for i, hdu in enumerate(self.hdus))
            raise NotFoundError(f"no pixels in HDU {key!r}; the file has {names}")
        return found.data

    def assemble(self, detector: Detector) -> NDArray[Any]:
        """Trim, flip and place the amplifiers.

        Parameters
        ----------
        detector
            Says which HDU holds each amplifier and where its pixels go.

        Returns
        -------
        numpy.ndarray
            Raw numbers of shape ``detector.shape``; nothing is subtracted.

        Raises
        ------
        BadFileError
            An amplifier's array is smaller than its description says.
        NotFoundError
            An amplifier's HDU is not in the file.
        """
        first = self.pixels(detector.amplifiers[0].hdu)
        out = np.zeros(detector.shape, first.dtype.newbyteorder("="))
        for amplifier in detector.amplifiers:
            raw = self.pixels(amplifier.hdu)[amplifier.raw_box.slices]
            if raw.shape != amplifier.raw_box.shape:
                raise BadFileError(
                    f"amplifier {amplifier.name} of {detector.name}: HDU {amplifier.hdu!r} is too small for "
                    f"raw_box {tuple(amplifier.raw_box)}"
                )
            rows = slice(None, None, -1) if amplifier.flip_y else slice(None)
            columns = slice(None, None, -1) if amplifier.flip_x else slice(None)
            out[amplifier.detector_box.slices] = raw[rows, columns]
        return out


def read_fits(path: Path) -> FitsImage:
    """Read a whole FITS file, compressed or not.

    Raises
    ------
    BadFileError
        It is not a FITS file, or it is truncated.
    """
    from astropy.io import fits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with fits.open(path, memmap=False) as hdus:
                return FitsImage(
                    tuple(
                        FitsHdu(
                            str(hdu.header.get("EXTNAME", "")).strip(),
                            plain_header(hdu.header),
                            np.asarray(hdu.data) if hdu.is_image and hdu.data is not None else None,
                        )
                        for hdu in hdus
                    )
                )
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise BadFileError(f"{path}: not a readable FITS file: {error}") from error


def write_fits(image: FitsImage, path: Path) -> None:
    """Write all HDUs; the pixels must be of a type that FITS knows."""
    from astropy.io import fits

    structure = {"SIMPLE", "XTENSION", "BITPIX", "EXTEND", "PCOUNT", "GCOUNT", "TFIELDS", "EXTNAME"}
    out = fits.HDUList()
    for number, hdu in enumerate(image.hdus):
        header = fits.Header()
        for key, value in hdu.header.items():
            if key not in structure and not key.startswith(
                ("NAXIS", "BZERO", "BSCALE", "CHECKSUM", "DATASUM")
            ):
                header[key if len(key) <= 8 else f"HIERARCH {key}"] = value
        kind = fits.PrimaryHDU if number == 0 else fits.ImageHDU
        out.append(kind(hdu.data, header, **({"name": hdu.name} if hdu.name and number else {})))
    out.writeto(path, overwrite=True, checksum=True)
