"""Calibrations, reference stars and templates of a site as datasets, so that pipelines find them.

Everything is idempotent: what is there already stays as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.core.errors import UserError
from cumbre.core.instrument import Instrument
from cumbre.payloads.calibration import PARTS, Calibrations
from cumbre.payloads.refcat import RefCat
from cumbre.repository.calibrations import (
    FOREVER_TAI,
    KINDS,
    find_calibration,
    put_calibration,
    put_template,
    register_calibration,
)
from cumbre.repository.store import Repository, raw_run

if TYPE_CHECKING:
    from lsst.daf.butler import DatasetType

REFERENCE = "reference_stars"
HTM_LEVEL = 7
TILE_LEVEL = 13
"""Triangles of less than an arcminute: no two tiles have their centres in one."""


def defaults(instrument: str) -> str:
    """Name of the collection with all inputs of an instrument's pipelines."""
    return f"{instrument}/defaults"


def register_calibrations(
    repository: Repository,
    instrument: Instrument,
    files: Iterable[tuple[Path, str, str]],
    *,
    valid_begin_tai: float,
    valid_end_tai: float = FOREVER_TAI,
    version: str,
) -> int:
    """Store files of :class:`Calibrations`, each part as a dataset of its own; gives the number of new ones.

    Parameters
    ----------
    files
        (path, detector name, band or physical filter).
    version
        Names the RUN; the same version again changes nothing.
    """
    for kind in KINDS:
        register_calibration(repository, kind)
    done = 0
    for path, detector_name, light in files:
        whole = Calibrations.load(path)
        detector = instrument.detector(detector_name).id
        for kind in PARTS:
            plane = getattr(whole, kind)
            if plane is None:
                continue
            for physical in _filters(instrument, light) if "physical_filter" in KINDS[kind] else (None,):
                where: dict[str, Any] = {"instrument": instrument.name, "detector": detector}
                where["physical_filter"] = physical
                known = find_calibration(repository, kind, tai_s=valid_begin_tai, **where)
                if known is not None and f"/calib/{version}/" in str(known):
                    continue
                with tempfile.TemporaryDirectory(dir=repository.root) as folder:
                    alone = Path(folder) / f"{kind}.fits"
                    Calibrations(**{kind: plane}, metadata=whole.metadata).save(alone)
                    put_calibration(
                        repository, kind, alone, valid_begin_tai=valid_begin_tai, valid_end_tai=valid_end_tai,
                        version=version, **where,
                    )  # fmt: skip
                done += 1
    return done


def _filters(instrument: Instrument, light: str) -> list[str]:
    """Physical filters of a band, or the one of this name."""
    found = [item.name for item in instrument.filters if light in (item.name, item.band)]
    if not found:
        raise UserError(f"{instrument.name} has no filter or band {light!r}")
    return found


def register_reference(repository: Repository, catalogue: RefCat, *, version: str) -> int:
    """Store reference stars by HTM triangle; gives the number of new triangles."""
    from lsst.daf.butler import DatasetType
    from lsst.sphgeom import HtmPixelization, LonLat, UnitVector3d

    butler, run = repository.butler, f"refcats/{version}"
    kind: DatasetType = DatasetType(REFERENCE, (f"htm{HTM_LEVEL}",), "ArrowTable", universe=butler.dimensions)
    butler.registry.registerDatasetType(kind)
    butler.collections.register(run)
    known = {
        ref.dataId[f"htm{HTM_LEVEL}"]
        for ref in butler.query_datasets(REFERENCE, collections=run, explain=False, limit=None)
    }
    pixels = HtmPixelization(HTM_LEVEL)
    triangles = np.array(
        [
            pixels.index(UnitVector3d(LonLat.fromDegrees(ra, dec)))
            for ra, dec in zip(catalogue.ra.tolist(), catalogue.dec.tolist(), strict=True)
        ]
    )
    new = [int(triangle) for triangle in np.unique(triangles) if int(triangle) not in known]
    for triangle in new:
        stars = catalogue.take(np.flatnonzero(triangles == triangle))
        butler.put(stars.to_table(), REFERENCE, {f"htm{HTM_LEVEL}": triangle}, run=run)
    return len(new)


def register_templates(
    repository: Repository,
    instrument: Instrument,
    rows: Iterable[Mapping[str, Any]],
    *,
    version: str,
    transfer: str = "copy",
) -> int:
    """Store templates; gives their number.

    Parameters
    ----------
    rows
        ``ra``, ``dec`` of the tile's centre (degrees), ``detector`` (its name), ``band``, ``path`` of each, as in a
        site's template index. A tile is numbered by its centre, so it keeps its number when others come.
    """
    from lsst.sphgeom import HtmPixelization, LonLat, UnitVector3d

    from cumbre.payloads.exposure_file import load_exposure

    done = 0
    for row in rows:
        template = load_exposure(Path(row["path"]))
        if template.wcs is None:
            raise UserError(f"template {row['path']}: it has no WCS, so its place on the sky is not known")
        ny, nx = template.shape
        corners = template.wcs.pix2sky(np.array([0, nx - 1, nx - 1, 0.0]), np.array([0, 0, ny - 1, ny - 1.0]))
        centre = UnitVector3d(LonLat.fromDegrees(float(row["ra"]), float(row["dec"])))
        put_template(
            repository, Path(row["path"]), instrument=instrument.name, tile=HtmPixelization(TILE_LEVEL).index(centre),
            detector=instrument.detector(str(row["detector"])).id, band=str(row["band"]), corners_deg=corners,
            version=version, transfer=transfer,
        )  # fmt: skip
        done += 1
    return done


def chain_inputs(repository: Repository, instrument: Instrument) -> str:
    """Make or refresh the collection of all inputs of an instrument; gives its name."""
    from lsst.daf.butler import CollectionType

    collections, name = repository.butler.collections, defaults(instrument.name)
    collections.register(name, CollectionType.CHAINED)
    known = set(collections.query("*"))
    newest = [run for run in sorted(known, reverse=True) if run.startswith(f"{instrument.name}/templates/")]
    parts = [raw_run(instrument.name), f"{instrument.name}/calib", *newest]
    parts += sorted((run for run in known if run.startswith("refcats/")), reverse=True)
    collections.redefine_chain(name, [part for part in parts if part in known])
    return name
