"""One product of many images: the detectors of a visit as a mosaic, a position over time as a cube of stamps.

Every image is resampled (Lanczos 3) to one grid, north up and east left, with the pixels of the first image. Images
with a zero point are scaled to that of the first. What no image covers is NaN, and NO_DATA in the mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumbre.access.images.cutout import Cutout
from cumbre.access.images.shapes import Circle, Shape
from cumbre.access.images.source import PixelBox
from cumbre.core.errors import UserError
from cumbre.core.time import mjd_from_seconds

if TYPE_CHECKING:
    from cumbre.access.images.catalogue import Image
    from cumbre.payloads.kernels.wcs import PlaneWcs

MOSAIC, STACK = "MOSAIC", "STACK"
NO_DATA = np.uint16(256)
_MARGIN_PIXELS = 6
"""Around a region: what the resampling of its outermost pixels needs."""
_PLANE_TYPES: dict[str, Any] = {"IMAGE": np.float32, "VARIANCE": np.float32, "MASK": np.uint16}

type Part = tuple[Image, Cutout]
"""An image and the part of it that touches a region."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The pixels of a product: a tangent plane about the middle of a region."""

    wcs: PlaneWcs
    shape: tuple[int, int]
    centre: tuple[float, float]
    scale_arcsec: float

    def region(self) -> Circle:
        """A circle that holds the whole grid and what resampling needs around it."""
        half = math.hypot(*self.shape) / 2 + _MARGIN_PIXELS
        return Circle(*self.centre, min(half * self.scale_arcsec / 3600, 180.0))


def grid_of(shape: Shape | None, images: Sequence[Image]) -> Grid:
    """The grid of a region, or of everything that the images cover.

    Raises
    ------
    UserError
        The images have no place on the sky, or the region is too large for a plane.
    """
    from cumbre.payloads.kernels.wcs import PlaneWcs, to_tangent_plane

    known = [image for image in images if image.region and image.pixel_arcsec]
    if not known or not known[0].pixel_arcsec:
        raise UserError("these images have no place on the sky: they cannot be brought together")
    if shape is None:
        corners = np.array([value for image in known for value in image.region or ()]).reshape(-1, 2)
        ra, dec = corners.T
        a, d = np.radians(ra), np.radians(dec)
        mean = np.array([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)]).mean(axis=1)
        centre = (
            math.degrees(math.atan2(mean[1], mean[0])) % 360,
            math.degrees(math.atan2(mean[2], math.hypot(mean[0], mean[1]))),
        )
    else:
        centre, (ra, dec) = shape.centre(), shape.edge()
    xi, eta = to_tangent_plane(ra, dec, *centre)
    if not (np.isfinite(xi).all() and np.isfinite(eta).all() and max(np.ptp(xi), np.ptp(eta)) < 60):
        raise UserError("the region is wider than 60 degrees: ask for parts of it")
    scale = known[0].pixel_arcsec / 3600
    left, low = -xi.max() / scale, eta.min() / scale
    nx, ny = (max(math.ceil(np.ptp(v) / scale) + 1, 1) for v in (xi, eta))
    wcs = PlaneWcs.linear(*centre, -left, -low, [[-scale, 0.0], [0.0, scale]])
    # the middle of the grid, which is not the region's when that is lopsided
    middle = wcs.pix2sky((nx - 1) / 2, (ny - 1) / 2)
    return Grid(wcs, (ny, nx), (float(middle[0]), float(middle[1])), scale * 3600)


def mosaic(parts: Sequence[Part], grid: Grid, planes: Sequence[str]) -> Cutout | None:
    """Images of one visit as one image; where they overlap their mean, weighted by variance.

    Returns
    -------
    Cutout or None
        None when no image has a pixel there.
    """
    ny, nx = grid.shape
    total, weight = np.zeros((ny, nx), np.float32), np.zeros((ny, nx), np.float32)
    mask = np.zeros((ny, nx), np.uint16)
    used: list[tuple[Image, Cutout, float]] = []
    for image, part in parts:
        scale = _scale(part, used[0][1] if used else part)
        warped = _warped(part, grid, scale)
        if warped is None:
            continue
        pixels, variance, bits = warped
        good = (bits & NO_DATA) == 0
        share = np.where(good, 1 / variance, 0).astype(np.float32)
        total += np.where(good, pixels, 0) * share
        weight += share
        mask |= np.where(good, bits, 0).astype(np.uint16)
        used.append((image, part, scale))
    if not used:
        return None
    empty = weight == 0
    with np.errstate(invalid="ignore", divide="ignore"):
        out: dict[str, NDArray[Any]] = {"IMAGE": total / weight, "VARIANCE": 1 / weight, "MASK": mask}
    out["VARIANCE"][empty] = np.nan
    mask[empty] |= NO_DATA
    return _product(MOSAIC, used, grid, {name: out[name] for name in planes})


def stack(parts: Sequence[Part], grid: Grid, planes: Sequence[str]) -> Cutout | None:
    """Stamps of one region over time as a cube, the earliest first.

    Returns
    -------
    Cutout or None
        None when no image has a pixel there.
    """
    layers: list[dict[str, NDArray[Any]]] = []
    used: list[tuple[Image, Cutout, float]] = []
    for image, part in sorted(parts, key=lambda pair: (pair[0].begin_tai or -math.inf, pair[0].image_id)):
        scale = _scale(part, used[0][1] if used else part)
        warped = _warped(part, grid, scale)
        if warped is None:
            continue
        pixels, variance, bits = warped
        bad = (bits & NO_DATA) != 0
        pixels[bad] = variance[bad] = np.nan
        whole: dict[str, NDArray[Any]] = {"IMAGE": pixels, "VARIANCE": variance, "MASK": bits}
        layers.append({name: whole[name] for name in planes})
        used.append((image, part, scale))
    if not used:
        return None
    cube = {name: np.stack([layer[name] for layer in layers]).astype(_PLANE_TYPES[name]) for name in planes}
    return _product(STACK, used, grid, cube)


def _scale(part: Cutout, first: Cutout) -> float:
    """Factor that brings an image to the zero point of the first; 1 when one is not known."""
    ours, theirs = part.header.get("MAGZERO"), first.header.get("MAGZERO")
    if ours is None or theirs is None:
        return 1.0
    return float(10 ** (-0.4 * (float(ours) - float(theirs))))


def _warped(
    part: Cutout, grid: Grid, scale: float
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint16]] | None:
    from cumbre.payloads.kernels.warp import NO_VARIANCE, warp_between
    from cumbre.payloads.kernels.wcs import PlaneWcs

    image = part.planes["IMAGE"].astype(np.float32)
    variance = part.planes.get("VARIANCE", np.ones_like(image)).astype(np.float32)
    mask = part.planes.get("MASK", np.zeros(image.shape, np.uint16)).astype(np.uint16)
    bad = ~(np.isfinite(image) & (variance > 0) & (variance < NO_VARIANCE * np.float32(1e-4)))
    image[bad], variance[bad] = 0, NO_VARIANCE
    pixels, noise, bits = warp_between(
        image, variance, mask, PlaneWcs.from_header(part.header), grid.wcs, grid.shape
    )
    if (bits & NO_DATA).all():
        return None
    return pixels * np.float32(scale), noise * np.float32(scale * scale), bits


def _product(
    kind: str, used: Sequence[tuple[Image, Cutout, float]], grid: Grid, planes: dict[str, NDArray[Any]]
) -> Cutout:
    first = used[0][1].header
    header: dict[str, Any] = {"COMBINE": kind, "NIMAGES": len(used)}
    for key in ("TELESCOP", "INSTRUME", "OBSID", "BAND", "FILTER"):
        values = {part.header.get(key) for _, part, _ in used}
        if len(values) == 1 and None not in values:
            header[key] = values.pop()
    if first.get("MAGZERO") is not None:
        header["MAGZERO"] = first["MAGZERO"]
    header |= grid.wcs.to_header()
    inputs = [
        {
            "image_id": image.image_id, "obs_id": image.obs_id, "detector": image.detector, "band": image.band or "",
            "mjd_begin_tai": math.nan if image.begin_tai is None else mjd_from_seconds(image.begin_tai),
            "exposure_s": math.nan if image.exposure_s is None else image.exposure_s, "scale": scale,
        }
        for image, _, scale in used
    ]  # fmt: skip
    ny, nx = grid.shape
    return Cutout(planes, header, PixelBox(0, nx, 0, ny), inputs)


def contact_sheet(cube: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Layers of a cube side by side, the first at the upper left of the picture; one pixel between them."""
    count, ny, nx = cube.shape
    across = math.ceil(math.sqrt(count * ny / nx))
    down = -(-count // across)
    sheet = np.full((down * (ny + 1) - 1, across * (nx + 1) - 1), np.nan, np.float32)
    for number, layer in enumerate(cube):
        # pictures are turned upside down when they are made: the first row of a sheet is its last
        row, column = down - 1 - number // across, number % across
        sheet[row * (ny + 1) : row * (ny + 1) + ny, column * (nx + 1) : column * (nx + 1) + nx] = layer
    return sheet
