"""Cutouts as FITS bytes, made from a header template: no FITS library on the way of an alert."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.core.errors import UnprocessableDataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    type Image = NDArray[np.floating[Any]]

MIN_SIZE = 30
"""Least side of an alert's cutouts in pixels."""
_BLOCK = 2880


def stamp(image: Image, x: float, y: float, size: int = 51) -> tuple[NDArray[np.float32], int, int]:
    """Cut a square out of an image; what lies outside the image is NaN.

    Parameters
    ----------
    image
        Shape ``(ny, nx)``.
    x, y
        0-based position that the central pixel shall hold.
    size
        Side in pixels.

    Returns
    -------
    tuple
        The stamp, shape ``(size, size)``, and column and row of its first pixel in the image.
    """
    ny, nx = image.shape
    x0, y0 = math.floor(x + 0.5) - size // 2, math.floor(y + 0.5) - size // 2
    out = np.full((size, size), np.nan, dtype=np.float32)
    left, right = max(x0, 0), min(x0 + size, nx)
    low, high = max(y0, 0), min(y0 + size, ny)
    if left < right and low < high:
        out[low - y0 : high - y0, left - x0 : right - x0] = image[low:high, left:right]
    return out, x0, y0


def encode_cutout(
    image: Image,
    wcs: Mapping[str, float | str] | None = None,
    *,
    origin: tuple[int, int] = (0, 0),
    unit: str = "nJy",
    uncertainty: Image | None = None,
    psf: Image | None = None,
) -> bytes:
    """Encode a cutout as a FITS file.

    Parameters
    ----------
    image
        Shape ``(ny, nx)``, at least 30 × 30; written as 32-bit floats.
    wcs
        Keywords of the whole detector's WCS (CTYPEn, CRVALn, CRPIXn, CDi_j…); the reference pixel is moved
        into the cutout.
    origin
        Column and row of the cutout's first pixel on the detector, 0-based; also written as the physical
        WCS (LTV).
    unit
        BUNIT of image and uncertainty.
    uncertainty, psf
        Further HDUs ``UNCERT`` (standard deviation, same shape) and ``PSFIMAGE``, as in Rubin's cutouts.

    Raises
    ------
    UnprocessableDataError
        The image is smaller than 30 × 30 or not two-dimensional.
    """
    if image.ndim != 2 or min(image.shape) < MIN_SIZE:
        raise UnprocessableDataError(
            f"cutout of shape {image.shape}: expected at least {MIN_SIZE} × {MIN_SIZE}"
        )
    cards = [("BUNIT", unit), ("LTV1", -float(origin[0])), ("LTV2", -float(origin[1]))]
    cards += list(_shifted(wcs or {}, origin).items())
    extra = [("UNCERT", uncertainty, [("BUNIT", unit)]), ("PSFIMAGE", psf, [])]
    more = any(item is not None for _, item, _ in extra)
    parts = [_head(image.shape, "", more), _cards(tuple(cards)), _data(image)]
    out = [_padded(parts[0] + parts[1] + _END, b" "), parts[2]]
    for name, item, its_cards in extra:
        if item is not None:
            head = _head(item.shape, name, False) + _cards(tuple(its_cards)) + _END
            out += [_padded(head, b" "), _data(item)]
    return b"".join(out)


def _shifted(wcs: Mapping[str, float | str], origin: tuple[int, int]) -> dict[str, float | str]:
    out = dict(wcs)
    for axis, first in zip(("CRPIX1", "CRPIX2"), origin, strict=True):
        if axis in out:
            out[axis] = float(out[axis]) - first
    return out


@lru_cache(maxsize=64)
def _head(shape: tuple[int, int], extension: str, extensions_follow: bool) -> bytes:
    """The cards that only depend on the shape."""
    first: list[tuple[str, Any]] = [("XTENSION", "IMAGE   ")] if extension else [("SIMPLE", True)]
    cards = [*first, ("BITPIX", -32), ("NAXIS", 2), ("NAXIS1", shape[1]), ("NAXIS2", shape[0])]
    if extension:
        cards += [("PCOUNT", 0), ("GCOUNT", 1), ("EXTNAME", extension)]
    elif extensions_follow:
        cards += [("EXTEND", True)]
    return _cards(tuple(cards))


def _cards(cards: tuple[tuple[str, Any], ...]) -> bytes:
    return b"".join(_card(key, value) for key, value in cards)


def _card(key: str, value: bool | float | str) -> bytes:
    """One 80-byte card in fixed format."""
    if isinstance(value, bool):
        text = f"{'T' if value else 'F':>20}"
    elif isinstance(value, str):
        quoted = value.replace("'", "''")[:66]
        text = f"'{quoted:<8}'"
    elif isinstance(value, int | np.integer):
        text = f"{int(value):>20d}"
    elif math.isfinite(value):
        text = f"{float(value):>#20.13G}"
    else:
        return b""  # FITS cannot say NaN; an absent keyword says "not known"
    return f"{key[:8]:<8}= {text}".ljust(80).encode("ascii", "replace")


_END = b"END".ljust(80)


def _data(image: Image) -> bytes:
    return _padded(np.ascontiguousarray(image, dtype=">f4").tobytes(), b"\0")


def _padded(content: bytes, filler: bytes) -> bytes:
    return content + filler * (-len(content) % _BLOCK)
