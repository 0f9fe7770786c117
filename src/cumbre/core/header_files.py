"""Headers of FITS files on disk, whatever their compression (.gz, .bz2, .fz, and files that hide it)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.core.header import ObservationMetadata, is_own_raw, translate
from cumbre.core.instrument import Instrument

_COMMENTARY = ("COMMENT", "HISTORY", "")


def plain_header(header: Any) -> dict[str, Any]:
    """Keyword → value without commentary; unreadable cards are left out."""
    out: dict[str, Any] = {}
    for card in header.cards:
        try:
            if card.keyword not in _COMMENTARY and card.keyword not in out:
                out[card.keyword] = card.value
        except ValueError:
            continue
    return out


def read_headers(path: Path, *, primary_only: bool = False) -> list[dict[str, Any]]:
    """Headers of all HDUs in order, or only the primary one (a few milliseconds).

    Raises
    ------
    NotFoundError
        There is no such file.
    BadFileError
        It is not a FITS file, or it is truncated.
    """
    from astropy.io import fits

    if not path.is_file():
        raise NotFoundError(f"{path}: there is no such file")
    with warnings.catch_warnings():
        # Non-standard cards are the rule in foreign headers; what matters of them is listed as problems.
        warnings.simplefilter("ignore")
        try:
            if primary_only and path.suffix in (".fits", ".fit"):
                with path.open("rb") as stream:
                    if stream.read(6) == b"SIMPLE":
                        stream.seek(0)
                        return [plain_header(fits.Header.fromfile(stream))]
            with fits.open(path, memmap=False, lazy_load_hdus=True) as hdus:
                return [plain_header(hdu.header) for hdu in (hdus[:1] if primary_only else hdus)]
        except (OSError, ValueError, TypeError, EOFError, fits.VerifyError) as error:
            raise BadFileError(f"{path}: not a readable FITS file: {error}") from error


def read_metadata(instrument: Instrument, path: Path) -> ObservationMetadata:
    """Metadata of one file; cumbre's own raws need only their primary header.

    Raises
    ------
    BadFileError, NotFoundError
        As :func:`read_headers` and :func:`~cumbre.core.header.translate`.
    """
    headers = read_headers(path, primary_only=True)
    if instrument.header and not is_own_raw(instrument, headers[0]):
        headers = read_headers(path)
    return translate(instrument, headers, str(path))
