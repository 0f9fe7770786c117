"""The templates of a site: their index, versions, and the resampled visits that they are averaged of.

Below ``archive/templates``: ``index.json`` lists what prompt processing chooses from, the newest version of each place,
band and range of airmass. ``TILE/BAND_DETECTOR_xLOW_vN.fits`` is a version and the ``.json`` beside it its provenance;
versions stay when newer ones come. ``resampled`` holds the visits of the newest versions on the templates' grid, so that
a visit more costs that visit only. Everything appears by rename, the index last.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cumbre.payloads.coadd import Warp
    from cumbre.payloads.exposure import Exposure

FOLDER = "archive/templates"
FORMAT = "CUMBRE-TEMPLATE-1"
RESAMPLED = "resampled"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """What a template is of: a field of the survey, a band, a detector.

    ``ra`` and ``dec`` are the pointing's, in degrees.
    """

    tile: str
    ra: float
    dec: float
    band: str
    detector: str


def update_index(folder: Path, change: Callable[[list[Row]], list[Row]]) -> list[Row]:
    """Replace the index by what ``change`` makes of its entries; one writer at a time."""
    from cumbre.orchestration.inputs import read_index

    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.json"
    with (folder / ".index.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = change(read_index(index) if index.exists() else [])
        write_atomic(index, json.dumps(rows, indent=1).encode())
    return rows


@dataclass(slots=True)
class StoredWarp:
    """A resampled visit in a file, read some rows at a time."""

    path: Path
    shape: tuple[int, int]
    share: float
    zero_point_err: float
    fwhm_px: float
    metadata: dict[str, Any] = field(default_factory=dict)
    made_of: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> StoredWarp:
        """Read everything but the pixels.

        Raises
        ------
        BadFileError
            Not such a file, or damaged.
        """
        from cumbre.payloads.exposure_file import load_about

        told = load_about(path)["metadata"]
        try:
            return cls(
                path, (int(told["ny"]), int(told["nx"])), float(told["share"]), float(told["zero_point_err"]),
                float(told["fwhm_px"]), json.loads(told["about"]), json.loads(told["made_of"]),
            )  # fmt: skip
        except (KeyError, ValueError) as error:
            raise BadFileError(f"{path}: not a resampled visit: {error}") from error

    def rows(self, begin: int, end: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Image, variance and mask of some rows."""
        import fitsio

        kinds = (("IMAGE", np.float32), ("VARIANCE", np.float32), ("MASK", np.uint16))
        with fitsio.FITS(str(self.path)) as fits:
            image, variance, mask = (np.ascontiguousarray(fits[n][begin:end, :], k) for n, k in kinds)
        return image, variance, mask


class TemplateStore:
    """Reads and writes the templates of a site.

    Parameters
    ----------
    root
        Folder of the site.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / FOLDER

    def rows(self) -> list[Row]:
        """Entries of the index; none where there is no index."""
        from cumbre.orchestration.inputs import read_index

        index = self.folder / "index.json"
        return read_index(index) if index.exists() else []

    def versions(self, place: Place, low: float) -> list[dict[str, Any]]:
        """Provenance of the published versions of a place and range of airmass, the oldest first."""
        pattern = re.compile(re.escape(_stem(place, low)) + r"_v(\d+)\.json")
        folder = self.folder / place.tile
        found = sorted(
            (int(match[1]), path) for path in folder.glob("*.json") if (match := pattern.fullmatch(path.name))
        )
        return [read_about(path) for _, path in found]

    def all_versions(self) -> Iterator[dict[str, Any]]:
        """Provenance of every version of every place."""
        for path in sorted(self.folder.glob("*/*_v*.json")):
            yield read_about(path)

    def publish(
        self,
        place: Place,
        limits: tuple[float, float],
        template: Exposure,
        about: dict[str, Any],
        *,
        made_tai: float,
    ) -> Row:
        """Store a new version and make it the one that is used; gives its entry in the index.

        A process that dies before the last rename leaves the version before in use; what it wrote is replaced.
        """
        from cumbre.payloads.exposure_file import save_exposure

        known = self.versions(place, limits[0])
        number = known[-1]["number"] + 1 if known else 1
        path = self.folder / place.tile / f"{_stem(place, limits[0])}_v{number}.fits"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_exposure(template, path)
        row: Row = {
            "tile": place.tile, "ra": place.ra, "dec": place.dec, "band": place.band, "detector": place.detector,
            "path": str(path), "airmass": list(limits), "version": f"x{limits[0]:g}_v{number}", "made_tai": made_tai,
            "visits": sorted({one["obs_id"] for one in about["inputs"]}),
        }  # fmt: skip
        told = {"format": FORMAT, "number": number} | row | about | {"metrics": template.metrics}
        write_atomic(path.with_suffix(".json"), json.dumps(told, indent=1, allow_nan=False).encode())
        self._list(row)
        return row

    def list_again(self, told: dict[str, Any]) -> None:
        """Put a stored version into the index: the process that made it may have died before."""
        names = ("tile", "ra", "dec", "band", "detector", "path", "airmass", "version", "made_tai", "visits")
        self._list({name: told[name] for name in names})

    def _list(self, row: Row) -> None:
        key = _key(row)
        update_index(self.folder, lambda rows: [*(r for r in rows if _key(r) != key), row])

    # resampled visits

    def warp_path(self, place: Place, name: str) -> Path:
        """Where a visit's detector image (``OBS-ID_DETECTOR``) on the grid of a place is kept."""
        return self.folder / RESAMPLED / place.tile / f"{place.band}_{place.detector}" / f"{name}.fits"

    def save_warp(self, path: Path, warp: Warp, made_of: dict[str, Any]) -> StoredWarp:
        """Keep a resampled visit, with what it was made of."""
        from cumbre.payloads.exposure import Exposure
        from cumbre.payloads.exposure_file import save_exposure

        told = {
            "ny": warp.shape[0], "nx": warp.shape[1], "share": warp.share, "zero_point_err": warp.zero_point_err,
            "fwhm_px": warp.fwhm_px, "about": json.dumps(warp.metadata), "made_of": json.dumps(made_of),
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        save_exposure(
            Exposure(warp.image, warp.variance, warp.mask, is_background_subtracted=True, metadata=told), path
        )
        return StoredWarp.open(path)

    def drop_warps(self, place: Place, keep: Sequence[Path]) -> int:
        """Remove the resampled visits of a place that no newest version uses; gives their number."""
        wanted, removed = set(keep), 0
        folder = self.warp_path(place, "any").parent
        for path in folder.glob("*.fits"):
            if path not in wanted:
                path.unlink(missing_ok=True)
                removed += 1
        return removed


def _stem(place: Place, low: float) -> str:
    return f"{place.band}_{place.detector}_x{low:g}"


def _key(row: Row) -> tuple[Any, ...]:
    """What one entry of the index is of; an entry without version is for all airmasses."""
    return row["tile"], row["band"], row["detector"], tuple(row.get("airmass", ()))


def read_about(path: Path) -> dict[str, Any]:
    """Provenance of a version.

    Raises
    ------
    NotFoundError, BadFileError
        There is no such file, or it is none.
    """
    try:
        told: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: there is no such template") from error
    except ValueError as error:
        raise BadFileError(f"{path}: not a template's provenance: {error}") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise BadFileError(f"{path}: not a template's provenance: expected {FORMAT}")
    return told


@contextmanager
def one_maker(folder: Path) -> Iterator[None]:
    """Hold the right to make templates of a site; waits for another process that makes them."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".maker.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
