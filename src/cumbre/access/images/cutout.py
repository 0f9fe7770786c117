"""Cutouts: which pixels a region needs, and only those read from the file.

Raw files have an HDU for each amplifier: the parts of those that the region touches are read, turned and put
together, nothing is subtracted. Exposure files have planes: image, variance, mask. Positions of raw pixels follow
from pointing and camera geometry, those of exposures from their header. The answer is a small FITS file whose WCS
is right, or a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.access.images.shapes import Shape
from cumbre.access.images.source import PixelBox, Section, opened
from cumbre.core.errors import BadFileError
from cumbre.core.instrument import Amplifier, Detector, Instrument

_GRID = 33
MAX_PIXELS = 64_000_000
PLANES = ("IMAGE", "VARIANCE", "MASK")
_KEPT = (
    "TELESCOP", "INSTRUME", "OBSID", "DAYOBS", "SEQNUM", "EXPID", "GROUPID", "IMGTYPE", "FILTER", "BAND",
    "EXPTIME", "TIMESYS", "DATE-BEG", "DATE-END", "MJD-BEG", "MJD-END", "AIRMASS", "CHIPID", "DETECTOR", "MAGZERO",
)  # fmt: skip
"""Keywords of the whole image that its cutouts carry on."""


@dataclass(frozen=True, slots=True)
class Cutout:
    """Part of an image.

    Attributes
    ----------
    planes
        Name → pixels of shape (ny, nx); ``IMAGE`` is always there.
    header
        Keywords of the whole image and the WCS of this part.
    box
        Which pixels of the whole image these are.
    inputs
        The images that a product was made of, one row each; empty for a part of a single image.
    """

    planes: dict[str, NDArray[Any]]
    header: dict[str, Any]
    box: PixelBox
    inputs: list[dict[str, Any]] = field(default_factory=list)


def box_of(shape: Shape, nx: int, ny: int, to_pixel: Any, to_sky: Any) -> PixelBox | None:
    """The smallest box of pixels that surely holds what a region and an image share; None when nothing.

    Parameters
    ----------
    to_pixel, to_sky
        ``(ra, dec) → (x, y)`` and back; pixel (0, 0) is the centre of the first pixel.
    """
    x, y = (np.asarray(v, float) for v in to_pixel(*shape.edge()))
    with np.errstate(invalid="ignore"):
        within = (x >= -0.5) & (x <= nx - 0.5) & (y >= -0.5) & (y <= ny - 0.5)
    if within.all():
        return _clip(x.min(), x.max(), y.min(), y.max(), nx, ny)
    grid_x, grid_y = np.meshgrid(np.linspace(-0.5, nx - 0.5, _GRID), np.linspace(-0.5, ny - 0.5, _GRID))
    inside = shape.contains(*(np.asarray(v, float) for v in to_sky(grid_x, grid_y)))
    step_x, step_y = nx / (_GRID - 1), ny / (_GRID - 1)
    # what lies between two points of the grid may be inside too
    xs = np.concatenate([x[within], grid_x[inside] - step_x, grid_x[inside] + step_x])
    ys = np.concatenate([y[within], grid_y[inside] - step_y, grid_y[inside] + step_y])
    if not len(xs):
        centre = to_pixel(*shape.centre())
        cx, cy = float(centre[0]), float(centre[1])
        if not (-0.5 <= cx <= nx - 0.5 and -0.5 <= cy <= ny - 0.5):
            return None
        xs, ys = np.array([cx]), np.array([cy])
    low_x, high_x, low_y, high_y = xs.min(), xs.max(), ys.min(), ys.max()
    if np.isfinite(x).all() and np.isfinite(y).all():
        low_x, high_x = max(low_x, x.min()), min(high_x, x.max())
        low_y, high_y = max(low_y, y.min()), min(high_y, y.max())
    return _clip(low_x, high_x, low_y, high_y, nx, ny)


def _clip(x0: float, x1: float, y0: float, y1: float, nx: int, ny: int) -> PixelBox | None:
    box = PixelBox(
        max(int(np.floor(x0 + 0.5)), 0), min(int(np.floor(x1 + 0.5)) + 1, nx),
        max(int(np.floor(y0 + 0.5)), 0), min(int(np.floor(y1 + 0.5)) + 1, ny),
    )  # fmt: skip
    return box if box.x1 > box.x0 and box.y1 > box.y0 else None


def raw_cutout(
    path: str | Path,
    instrument: Instrument,
    detector: Detector,
    pointing: tuple[float, float, float],
    shape: Shape | None,
) -> Cutout | None:
    """Part of a raw file, amplifiers put together; None when the region does not touch it.

    Parameters
    ----------
    pointing
        Boresight right ascension, declination and rotation in degrees.
    shape
        None for all of it.

    Raises
    ------
    NotFoundError
        The file is not there.
    BadFileError
        It cannot be read.
    """
    from cumbre.core.geometry import approximate_wcs, pixel_from_sky, sky_from_pixel

    where = (instrument, detector, *pointing)
    box = (
        PixelBox(0, detector.nx, 0, detector.ny)
        if shape is None
        else box_of(
            shape, detector.nx, detector.ny,
            lambda ra, dec: pixel_from_sky(*where, ra, dec), lambda x, y: sky_from_pixel(*where, x, y),
        )
    )  # fmt: skip
    if box is None:
        return None
    parts: list[tuple[Amplifier, PixelBox]] = []
    for amplifier in detector.amplifiers:
        area = amplifier.detector_box
        part = PixelBox(
            max(box.x0, area.x0), min(box.x1, area.x1), max(box.y0, area.y0), min(box.y1, area.y1)
        )
        if part.x1 > part.x0 and part.y1 > part.y0:
            parts.append((amplifier, part))
    if not parts:
        return None
    with opened(path) as file:
        header = file.header()
        read = file.sections([_in_raw(amplifier, part) for amplifier, part in parts])
    pixels = np.zeros(box.shape, read[0].dtype.newbyteorder("="))
    for (amplifier, part), array in zip(parts, read, strict=True):
        pixels[part.y0 - box.y0 : part.y1 - box.y0, part.x0 - box.x0 : part.x1 - box.x0] = array[
            :: -1 if amplifier.flip_y else 1, :: -1 if amplifier.flip_x else 1
        ]
    wcs = approximate_wcs(instrument, detector, *pointing)
    return Cutout({"IMAGE": pixels}, _header(header, wcs, box), box)


def _in_raw(amplifier: Amplifier, part: PixelBox) -> Section:
    """Where a part of the detector lies in the amplifier's own array, which may be read out mirrored."""
    area, raw = amplifier.detector_box, amplifier.raw_box
    left = raw.x0 + (area.x1 - part.x1 if amplifier.flip_x else part.x0 - area.x0)
    low = raw.y0 + (area.y1 - part.y1 if amplifier.flip_y else part.y0 - area.y0)
    ny, nx = part.shape
    return amplifier.hdu, PixelBox(left, left + nx, low, low + ny)


def exposure_cutout(
    path: str | Path, shape: Shape | None, *, planes: tuple[str, ...] = ("IMAGE",)
) -> Cutout | None:
    """Part of an exposure file; None when the region does not touch it.

    Parameters
    ----------
    planes
        Of ``IMAGE``, ``VARIANCE``, ``MASK``.

    Raises
    ------
    NotFoundError
        The file or a plane is not there.
    BadFileError
        It cannot be read, or has no WCS.
    """
    from cumbre.payloads.kernels.wcs import PlaneWcs

    with opened(path) as file:
        header = file.header()
        ny, nx = file.shape("IMAGE")
        if "CRVAL1" not in header:
            raise BadFileError(f"{file.name}: the image has no WCS")
        wcs = PlaneWcs.from_header(header)
        box = PixelBox(0, nx, 0, ny) if shape is None else box_of(shape, nx, ny, wcs.sky2pix, wcs.pix2sky)
        if box is None:
            return None
        out = dict(zip(planes, file.sections([(name, box) for name in planes]), strict=True))
    keywords = {key: value for key, value in header.items() if key and _is_wcs(key)}
    return Cutout(out, _header(header, keywords, box), box)


def _is_wcs(key: str) -> bool:
    return key.startswith(
        ("CTYPE", "CUNIT", "CRVAL", "CRPIX", "CD1_", "CD2_", "A_", "B_", "AP_", "BP_")
    ) or key in (
        "RADESYS",
        "EQUINOX",
    )


def _header(whole: Mapping[str, Any], wcs: Mapping[str, Any], box: PixelBox) -> dict[str, Any]:
    out = {key: whole[key] for key in _KEPT if whole.get(key) is not None}
    out |= wcs
    out["CRPIX1"], out["CRPIX2"] = float(wcs["CRPIX1"]) - box.x0, float(wcs["CRPIX2"]) - box.y0
    # where the part lies in the whole image: column = LTV-corrected column, the convention of IRAF
    out |= {"LTV1": float(-box.x0), "LTV2": float(-box.y0), "LTM1_1": 1.0, "LTM2_2": 1.0}
    return out


def fits_bytes(cutouts: list[Cutout]) -> bytes:
    """A FITS file of one cutout or several: planes as extensions, a single plane as the primary image.

    Products of several images have a table ``INPUTS`` of what they were made of.
    """
    import fitsio

    with fitsio.FITS("mem://", "rw") as file:
        if len(cutouts) == 1 and len(cutouts[0].planes) == 1 and not cutouts[0].inputs:
            file.write(np.ascontiguousarray(cutouts[0].planes["IMAGE"]), header=_cards(cutouts[0].header))
            file[0].write_checksum()
        else:
            file.write(None)
            for number, cutout in enumerate(cutouts, 1):
                suffix = f"_{number}" if len(cutouts) > 1 else ""
                for name, plane in cutout.planes.items():
                    file.write(
                        np.ascontiguousarray(plane), header=_cards(cutout.header), extname=name + suffix
                    )
                    file[-1].write_checksum()
                if cutout.inputs:
                    columns = {key: np.array([row[key] for row in cutout.inputs]) for key in cutout.inputs[0]}
                    file.write(
                        {k: v.astype("S") if v.dtype.kind == "U" else v for k, v in columns.items()},
                        extname="INPUTS" + suffix,
                    )
                    file[-1].write_checksum()
        return bytes(file.read_raw())


def _cards(header: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": key, "value": value} for key, value in header.items()]


def picture(pixels: NDArray[Any]) -> bytes:
    """PNG of an array of shape (ny, nx): its last row is the first, black to white between robust limits by asinh.

    What is not finite is black.
    """
    import cv2

    data = np.asarray(pixels, np.float32)
    good = data[np.isfinite(data)]
    if not good.size:
        good = np.zeros(1, np.float32)
    low, middle, high = (float(v) for v in np.percentile(good, (1, 50, 99.7)))
    scale = max((middle - low) * 2, (high - middle) / 20, 1e-6)
    top = max(float(np.arcsinh((high - low) / scale)), 1e-6)
    values = np.arcsinh(np.clip(np.nan_to_num(data, nan=low) - low, 0, None) / scale) / top
    ok, encoded = cv2.imencode(".png", (np.clip(values, 0, 1)[::-1] * 255).astype(np.uint8))
    if not ok:
        raise BadFileError("the picture cannot be encoded")
    return bytes(encoded)
