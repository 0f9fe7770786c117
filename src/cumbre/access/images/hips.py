"""HiPS: images of the sky as HEALPix tiles that any viewer pans and zooms, with the MOC of what they cover.

Tiles of the deepest order are resampled from images (positions of all HEALPix pixels of a tile, looked up in each
image by its WCS, averaged by weight), those above from the four below, by means. A tile whose images are the same is not made
again, so a run that was stopped goes on, and a run with new images makes what they touch. Fluxes are nJy where the
images have zero points.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import NotFoundError, UserError
from cumbre.core.time import isot
from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    from cumbre.access.images.catalogue import Image

log = logging.getLogger(__name__)

FOLDER = "access/hips"
WIDTH, SHIFT = 512, 9
"""Side of a tile in pixels, and how many orders its pixels are deeper than itself."""
LEAST_ORDER = 3
ALLSKY_SIDE, ALLSKY_ACROSS = 64, 27
MAX_ORDER = 20
MOC_SHIFT = 3
"""Orders by which the coverage is finer than the tiles."""
_HELD = 12
_UNUSABLE = 256  # NO_DATA
_NJY = 3631e9

type Floats = NDArray[np.float32]
Tell = Callable[[int, int], None]
"""Called with how many tiles are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a HiPS is made of.

    Attributes
    ----------
    name
        Of its folder and in its identifier ``ivo://AUTHORITY/hips/NAME``.
    title, observatory, authority
        For its properties.
    order
        Of the deepest tiles; None for the one whose pixels are as small as those of the images.
    """

    name: str
    title: str
    observatory: str
    authority: str
    images: tuple[Image, ...]
    order: int | None = None


def order_of(pixel_arcsec: float) -> int:
    """Order of the tiles whose pixels are no larger than an image's."""
    side = math.degrees(math.sqrt(4 * math.pi / 12)) * 3600
    return min(max(math.ceil(math.log2(side / pixel_arcsec)) - SHIFT, LEAST_ORDER), MAX_ORDER)


def tile_path(folder: Path, order: int, tile: int, ending: str) -> Path:
    """Where a tile lies."""
    return folder / f"Norder{order}" / f"Dir{tile // 10000 * 10000}" / f"Npix{tile}.{ending}"


def tile_order() -> NDArray[np.int64]:
    """Nested number within the tile of each pixel of the tile's array, shape (512, 512).

    East is at the array's first pixel, north at the end of its first row: a picture of it, last row first, has the
    south at its upper left.
    """
    row, column = np.mgrid[:WIDTH, :WIDTH]
    x, y = WIDTH - 1 - row, column
    out = np.zeros((WIDTH, WIDTH), np.int64)
    for bit in range(SHIFT):
        out |= ((x >> bit) & 1) << (2 * bit) | ((y >> bit) & 1) << (2 * bit + 1)
    return out


class _Pixels:
    """Images of a survey, the last few in memory."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, tuple[Floats, Floats, Any]] = OrderedDict()

    def get(self, image: Image) -> tuple[Floats, Floats, Any]:
        """Fluxes (NaN without data), weights, and WCS."""
        from cumbre.access.images.cutout import exposure_cutout
        from cumbre.payloads.kernels.wcs import PlaneWcs

        if image.image_id not in self._held:
            part = exposure_cutout(image.path, None, planes=("IMAGE", "VARIANCE", "MASK"))
            assert part is not None
            flux, variance = (part.planes[name].astype(np.float32) for name in ("IMAGE", "VARIANCE"))
            bad = (
                ~np.isfinite(flux) | ~(variance > 0) | (part.planes["MASK"].astype(np.int64) & _UNUSABLE != 0)
            )
            zero_point = part.header.get("MAGZERO")
            scale = 1.0 if zero_point is None else _NJY * 10 ** (-0.4 * float(zero_point))
            with np.errstate(divide="ignore", invalid="ignore"):
                weight = np.where(bad, 0, 1 / (variance * scale**2)).astype(np.float32)
            flux = np.where(bad, np.nan, flux * scale).astype(np.float32)
            self._held[image.image_id] = flux, weight, PlaneWcs.from_header(part.header)
        self._held.move_to_end(image.image_id)
        while len(self._held) > _HELD:
            self._held.popitem(last=False)
        return self._held[image.image_id]


def deepest_tile(order: int, tile: int, images: Sequence[tuple[Floats, Floats, Any]]) -> Floats | None:
    """One tile of images (fluxes, weights, WCS); None when none of them has a pixel in it."""
    import cv2
    import hpgeom

    number = (np.int64(tile) << (2 * SHIFT)) + tile_order()
    ra, dec = hpgeom.pixel_to_angle(1 << (order + SHIFT), number.ravel())
    total, weight = np.zeros((WIDTH, WIDTH), np.float64), np.zeros((WIDTH, WIDTH), np.float64)
    for flux, image_weight, wcs in images:
        x, y = (np.asarray(v).reshape(WIDTH, WIDTH).astype(np.float32) for v in wcs.sky2pix(ra, dec))
        x, y = (np.where(np.isfinite(v), v, -10).astype(np.float32) for v in (x, y))
        settings: dict[str, Any] = {
            "interpolation": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_CONSTANT,
        }  # fmt: skip
        here = cv2.remap(flux, x, y, borderValue=float("nan"), **settings)
        share = cv2.remap(image_weight, x, y, borderValue=0.0, **settings)
        good = np.isfinite(here) & (share > 0)
        total[good] += here[good] * share[good]
        weight[good] += share[good]
    if not weight.any():
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total / weight).astype(np.float32)


def parent_tile(children: Mapping[int, Floats]) -> Floats:
    """A tile of the four below it, by quarter (0 south, 1 east, 2 west, 3 north)."""
    half = WIDTH // 2
    out = np.full((WIDTH, WIDTH), np.nan, np.float32)
    for quarter, pixels in children.items():
        blocks = pixels.reshape(half, 2, half, 2)
        known = np.isfinite(blocks)
        count = known.sum(axis=(1, 3))
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(known, blocks, 0).sum(axis=(1, 3), dtype=np.float64) / count
        row, column = (0 if quarter & 1 else half), (half if quarter & 2 else 0)
        out[row : row + half, column : column + half] = mean
    return out


class HipsMaker:
    """Makes the tiles of one survey in a folder.

    Parameters
    ----------
    folder
        Of this HiPS; what fits in it is kept.
    """

    def __init__(self, folder: Path, survey: Survey) -> None:
        self._folder, self._survey = folder, survey
        self._images = [image for image in survey.images if image.region and image.pixel_arcsec]
        if not self._images:
            raise NotFoundError(f"HiPS {survey.name}: there are no images with a place on the sky")
        finest = min(image.pixel_arcsec or 1.0 for image in self._images)
        self.order = order_of(finest) if survey.order is None else survey.order
        if not LEAST_ORDER <= self.order <= MAX_ORDER:
            raise UserError(f"order {self.order}: expected {LEAST_ORDER} to {MAX_ORDER}")
        self._pixels = _Pixels()
        self.made = self.kept = 0

    def make(self, tell: Tell | None = None, *, now_utc_s: float) -> int:
        """Make what is missing; returns the number of tiles of the deepest order.

        Raises
        ------
        NotFoundError
            An image is gone.
        """
        wanted = self._tiles()
        cuts = self._cuts()
        covered: dict[int, NDArray[np.int64]] = {}
        for done, (tile, images) in enumerate(sorted(wanted.items()), 1):
            cells = self._deepest(tile, images, cuts)
            if len(cells):
                covered[tile] = cells
            if tell:
                tell(done, len(wanted))
        self._forget_others(self.order, set(covered))
        below = set(covered)
        for order in range(self.order - 1, LEAST_ORDER - 1, -1):
            tiles = {tile >> 2 for tile in below}
            for tile in sorted(tiles):
                self._parent(order, tile, below, cuts)
            self._forget_others(order, tiles)
            below = tiles
        self._allsky(below, cuts)
        cells = np.concatenate(list(covered.values())) if covered else np.zeros(0, np.int64)
        moc = merged_cells(self.order + MOC_SHIFT, cells)
        write_atomic(self._folder / "Moc.fits", moc_bytes(moc))
        self._properties(cuts, moc, now_utc_s)
        return len(covered)

    def _tiles(self) -> dict[int, list[Image]]:
        """Tile of the deepest order → images that may touch it."""
        import hpgeom

        out: dict[int, list[Image]] = {}
        for image in self._images:
            corners = np.array(image.region).reshape(-1, 2)
            found = hpgeom.query_polygon(1 << self.order, corners[:, 0], corners[:, 1], inclusive=True)
            for tile in found.tolist():
                out.setdefault(tile, []).append(image)
        return out

    def _cuts(self) -> tuple[float, float]:
        """Black and white of the pictures: once chosen they stay, so that all tiles are alike."""
        path = self._folder / "cuts.json"
        try:
            low, high = json.loads(path.read_text())
        except FileNotFoundError:
            some = self._images[:: max(len(self._images) // 8, 1)][:8]
            values = np.concatenate([self._pixels.get(image)[0][::8, ::8].ravel() for image in some])
            values = values[np.isfinite(values)]
            low, high = (float(v) for v in np.percentile(values, (30, 99.8))) if len(values) else (0.0, 1.0)
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps([low, high]).encode())
        return low, high

    def _deepest(self, tile: int, images: Sequence[Image], cuts: tuple[float, float]) -> NDArray[np.int64]:
        """See that a tile is there; returns the cells of the coverage in it."""
        path, note = (tile_path(self._folder, self.order, tile, ending) for ending in ("fits", "json"))
        inputs = _mark(images)
        try:
            about = json.loads(note.read_text())
            if about["inputs"] == inputs and (path.exists() or not about["cells"]):
                self.kept += 1
                return np.array(about["cells"], np.int64)
        except (FileNotFoundError, ValueError, KeyError):
            pass
        pixels = deepest_tile(self.order, tile, [self._pixels.get(image) for image in images])
        cells: list[int] = []
        note.parent.mkdir(parents=True, exist_ok=True)
        if pixels is not None:
            self._write(self.order, tile, pixels, cuts)
            nested = np.empty(WIDTH * WIDTH, bool)
            nested[tile_order().ravel()] = np.isfinite(pixels).ravel()
            blocks = nested.reshape(1 << (2 * MOC_SHIFT), -1).any(axis=1)
            cells = ((tile << (2 * MOC_SHIFT)) + np.flatnonzero(blocks)).tolist()
            self.made += 1
        write_atomic(note, json.dumps({"inputs": inputs, "cells": cells}).encode())  # last: the tile is whole
        return np.array(cells, np.int64)

    def _parent(self, order: int, tile: int, below: set[int], cuts: tuple[float, float]) -> None:
        paths = {
            quarter: tile_path(self._folder, order + 1, 4 * tile + quarter, "fits")
            for quarter in range(4)
            if 4 * tile + quarter in below
        }
        path, note = (tile_path(self._folder, order, tile, ending) for ending in ("fits", "json"))
        mark = hashlib.sha256(
            "".join(f"{q} {p.stat().st_mtime_ns}\n" for q, p in paths.items()).encode()
        ).hexdigest()
        try:
            if path.exists() and json.loads(note.read_text())["inputs"] == mark:
                return
        except (FileNotFoundError, ValueError, KeyError):
            pass
        self._write(order, tile, parent_tile({quarter: read_tile(p) for quarter, p in paths.items()}), cuts)
        write_atomic(note, json.dumps({"inputs": mark}).encode())
        self.made += 1

    def _write(self, order: int, tile: int, pixels: Floats, cuts: tuple[float, float]) -> None:
        path = tile_path(self._folder, order, tile, "fits")
        path.parent.mkdir(parents=True, exist_ok=True)
        cards = [
            {"name": "ORDER", "value": order, "comment": "HEALPix order of the tile"},
            {"name": "NPIX", "value": tile, "comment": "nested number of the tile"},
        ]
        write_atomic(path, _fits(pixels, cards))
        write_atomic(tile_path(self._folder, order, tile, "png"), _png(pixels, cuts))

    def _forget_others(self, order: int, tiles: set[int]) -> None:
        """Delete tiles that no image touches any more."""
        for path in (self._folder / f"Norder{order}").glob("Dir*/Npix*.fits"):
            if int(path.stem.removeprefix("Npix")) not in tiles:
                path.unlink()
                path.with_suffix(".png").unlink(missing_ok=True)

    def _allsky(self, tiles: set[int], cuts: tuple[float, float]) -> None:
        """All tiles of the least order as one small image."""
        import cv2

        down = -(-(12 << (2 * LEAST_ORDER)) // ALLSKY_ACROSS)
        sheet = np.full((down * ALLSKY_SIDE, ALLSKY_ACROSS * ALLSKY_SIDE), np.nan, np.float32)
        for tile in tiles:
            pixels = read_tile(tile_path(self._folder, LEAST_ORDER, tile, "fits"))
            known = np.isfinite(pixels).astype(np.float32)
            size = (ALLSKY_SIDE, ALLSKY_SIDE)
            share = cv2.resize(known, size, interpolation=cv2.INTER_AREA)
            with np.errstate(invalid="ignore", divide="ignore"):
                small = cv2.resize(np.nan_to_num(pixels), size, interpolation=cv2.INTER_AREA) / share
            # the first tile is at the upper left of the picture, and pictures begin with the last row
            row, column = down - 1 - tile // ALLSKY_ACROSS, tile % ALLSKY_ACROSS
            sheet[
                row * ALLSKY_SIDE : (row + 1) * ALLSKY_SIDE, column * ALLSKY_SIDE : (column + 1) * ALLSKY_SIDE
            ] = small
        folder = self._folder / f"Norder{LEAST_ORDER}"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "Allsky.fits", _fits(sheet, []))
        write_atomic(folder / "Allsky.png", _png(sheet, cuts))

    def _properties(
        self, cuts: tuple[float, float], moc: Sequence[tuple[int, int]], now_utc_s: float
    ) -> None:
        survey = self._survey
        first = self._images[0]
        sky = sum(1.0 / (12 << (2 * order)) for order, _ in moc)
        pixel = math.degrees(math.sqrt(4 * math.pi / 12)) / (1 << (self.order + SHIFT))
        lines: dict[str, object] = {
            "creator_did": f"ivo://{survey.authority}/hips/{survey.name}",
            "obs_title": survey.title,
            "obs_collection": survey.name,
            "prov_progenitor": f"{len(self._images)} images",
            "dataproduct_type": "image",
            "hips_version": "1.4",
            "hips_builder": "cumbre",
            "hips_release_date": isot(now_utc_s)[:16] + "Z",
            "hips_status": "public master clonableOnce",
            "hips_frame": "equatorial",
            "hips_order": self.order,
            "hips_order_min": LEAST_ORDER,
            "hips_tile_width": WIDTH,
            "hips_tile_format": "png fits",
            "hips_pixel_bitpix": -32,
            "hips_pixel_cut": f"{cuts[0]:.6g} {cuts[1]:.6g}",
            "hips_pixel_scale": f"{pixel:.6g}",
            "s_pixel_scale": f"{min(image.pixel_arcsec or math.inf for image in self._images) / 3600:.6g}",
            "hips_initial_ra": f"{first.ra:.5f}",
            "hips_initial_dec": f"{first.dec:.5f}",
            "hips_initial_fov": f"{max(image.fov_deg or 0.1 for image in self._images) * 2:.4f}",
            "moc_sky_fraction": f"{sky:.6g}",
            "moc_order": self.order + MOC_SHIFT,
        }
        for name in ("em_min", "em_max"):
            if (value := getattr(first, name)) is not None:
                lines[name] = f"{value:.6g}"
        begins = [image.begin_tai for image in self._images if image.begin_tai is not None]
        if begins:
            from cumbre.core.time import mjd_from_seconds

            lines["t_min"] = f"{mjd_from_seconds(min(begins)):.5f}"
        lines["obs_copyright"] = survey.observatory
        text = "".join(f"{key:<20} = {value}\n" for key, value in lines.items())
        write_atomic(self._folder / "properties", text.encode())


def read_tile(path: Path) -> Floats:
    """Pixels of a FITS tile."""
    import fitsio

    return np.asarray(fitsio.read(str(path)), np.float32)


def _mark(images: Iterable[Image]) -> str:
    """What tells whether a tile's images are the same as before."""
    parts = []
    for image in sorted(images, key=lambda item: item.image_id):
        try:
            about = Path(image.path).stat()
        except FileNotFoundError as error:
            raise NotFoundError(f"{image.image_id}: {image.path} is not here any more") from error
        parts.append(f"{image.image_id} {about.st_size} {about.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _fits(pixels: Floats, cards: Sequence[Mapping[str, Any]]) -> bytes:
    import fitsio

    with fitsio.FITS("mem://", "rw") as file:
        file.write(pixels, header=list(cards))
        return bytes(file.read_raw())


def _png(pixels: Floats, cuts: tuple[float, float]) -> bytes:
    """A picture, transparent where there is nothing."""
    import cv2

    low, high = cuts
    soft = max((high - low) / 8, 1e-12)
    good = np.isfinite(pixels)
    top = math.asinh((high - low) / soft)
    grey = np.arcsinh(np.clip(np.where(good, pixels, low) - low, 0, high - low) / soft) / top
    value = (grey[::-1] * 255).astype(np.uint8)
    alpha = np.where(good[::-1], 255, 0).astype(np.uint8)
    ok, encoded = cv2.imencode(".png", cv2.merge([value, value, value, alpha]))
    assert ok
    return bytes(encoded)


def merged_cells(order: int, cells: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cells of one order as (order, number), four neighbours joined wherever all are there."""
    out: list[tuple[int, int]] = []
    cells = np.unique(cells)
    while order > 0 and len(cells):
        parents, counts = np.unique(cells >> 2, return_counts=True)
        whole = parents[counts == 4]
        out += [(order, int(cell)) for cell in cells[~np.isin(cells >> 2, whole)]]
        cells, order = whole, order - 1
    return out + [(order, int(cell)) for cell in cells]


def moc_bytes(cells: Sequence[tuple[int, int]]) -> bytes:
    """A MOC as FITS (MOC 2.0, NUNIQ)."""
    import fitsio

    numbers = np.sort(np.array([4 * (1 << (2 * order)) + cell for order, cell in cells], np.int64))
    header: list[dict[str, Any]] = [
        {"name": "PIXTYPE", "value": "HEALPIX"}, {"name": "ORDERING", "value": "NUNIQ"},
        {"name": "COORDSYS", "value": "C"}, {"name": "MOCDIM", "value": "SPACE"}, {"name": "MOCVERS", "value": "2.0"},
        {"name": "MOCORDER", "value": max((order for order, _ in cells), default=0)},
        {"name": "MOCTOOL", "value": "cumbre"},
    ]  # fmt: skip
    with fitsio.FITS("mem://", "rw") as file:
        file.write({"UNIQ": numbers}, header=header)
        return bytes(file.read_raw())
