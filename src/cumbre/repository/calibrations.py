"""Bias, dark and flat frames with the time in which they hold, and templates of sky tiles, as datasets.

Payloads write FITS files; here the files become datasets that a pipeline (or :func:`find_calibration`) finds by
time, detector and filter. Times are TAI seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.core.errors import NotFoundError, UserError
from cumbre.repository.records import UNKNOWN, polygon, timespan
from cumbre.repository.storage import EXPOSURE, RAW
from cumbre.repository.store import Repository

if TYPE_CHECKING:
    from lsst.daf.butler import DatasetRef, DatasetType

NS = 1_000_000_000
KINDS = {
    "bias": ("instrument", "detector"),
    "dark": ("instrument", "detector"),
    "flat": ("instrument", "detector", "physical_filter"),
    "fringe": ("instrument", "detector", "physical_filter"),
    "defects": ("instrument", "detector"),
    "brighter_fatter": ("instrument", "detector"),
}
FOREVER_TAI = 4102444800.0
"""2100-01-01: the end of validity when none is given."""


def calibration_collection(instrument: str) -> str:
    """CALIBRATION collection of an instrument."""
    return f"{instrument}/calib"


def put_calibration(
    repository: Repository,
    kind: str,
    path: Path,
    *,
    instrument: str,
    detector: int,
    valid_begin_tai: float,
    valid_end_tai: float = FOREVER_TAI,
    physical_filter: str | None = None,
    version: str,
    transfer: str = "copy",
) -> DatasetRef:
    """Store a calibration frame and certify it for a time.

    A new frame takes over the time it is certified for; what held before keeps the rest of its time.

    Parameters
    ----------
    kind
        A key of ``KINDS``: ``bias``, ``dark``, ``flat``, ``fringe``, ``defects``, ``brighter_fatter``.
    path
        FITS file.
    version
        Names the RUN (``INSTRUMENT/calib/VERSION``); the same version again is the same dataset.
    transfer
        ``copy`` puts the file into the repository, ``direct`` leaves it where it is.

    Raises
    ------
    UserError
        Unknown kind, a flat without filter, or an empty time.
    NotFoundError
        There is no such file.
    """
    if not path.is_file():
        raise NotFoundError(f"{kind} {path}: there is no such file")
    if not valid_begin_tai < valid_end_tai:
        raise UserError(
            f"{kind} {path}: valid from {valid_begin_tai} to {valid_end_tai}: expected begin < end"
        )
    values = _data_id(kind, instrument, detector, physical_filter)
    dataset_type = register_calibration(repository, kind)
    run, collection = f"{instrument}/calib/{version}", calibration_collection(instrument)
    span = timespan(round(valid_begin_tai * NS), round(valid_end_tai * NS))
    ref = _ingest(repository, dataset_type, values, run, path, transfer)
    from lsst.daf.butler import CollectionType
    from lsst.daf.butler.registry import ConflictingDefinitionError

    butler = repository.butler
    butler.collections.register(collection, CollectionType.CALIBRATION)
    try:
        with butler.transaction():
            butler.registry.certify(collection, [ref], span)
    except ConflictingDefinitionError:
        # Not decertified at once: the middleware fails where nothing of the kind is certified yet.
        with butler.transaction():
            butler.registry.decertify(collection, dataset_type, span, dataIds=[ref.dataId])
            butler.registry.certify(collection, [ref], span)
    return ref


def find_calibration(
    repository: Repository,
    kind: str,
    *,
    instrument: str,
    detector: int,
    tai_s: float,
    physical_filter: str | None = None,
) -> Path | None:
    """Path of the calibration that holds at a time; None when there is none.

    Raises
    ------
    UserError
        Unknown kind, or a flat without filter.
    """
    from lsst.daf.butler import MissingCollectionError, MissingDatasetTypeError

    values = _data_id(kind, instrument, detector, physical_filter)
    at_ns = round(tai_s * NS)
    try:
        ref = repository.butler.find_dataset(
            kind, values, collections=calibration_collection(instrument), timespan=timespan(at_ns, at_ns)
        )
    except (MissingDatasetTypeError, MissingCollectionError):
        return None
    return None if ref is None else Path(repository.butler.getURI(ref).ospath)


def put_template(
    repository: Repository,
    path: Path,
    *,
    instrument: str,
    tile: int,
    detector: int,
    band: str,
    corners_deg: tuple[Any, Any],
    version: str,
    transfer: str = "copy",
) -> DatasetRef:
    """Store the template of one detector's place in one sky tile.

    Tiles are the tracts and detectors the patches of a sky map ``INSTRUMENT_tiles``, so that pipelines find
    templates by overlap.

    Parameters
    ----------
    corners_deg
        (ra, dec) in degrees of the template's corners, e.g. of
        :func:`cumbre.core.geometry.detector_corners`.

    Raises
    ------
    NotFoundError
        There is no such file.
    """
    from hashlib import sha1

    from lsst.daf.butler import DatasetType

    if not path.is_file():
        raise NotFoundError(f"template {path}: there is no such file")
    butler, skymap = repository.butler, f"{instrument}_tiles"
    region = polygon(*corners_deg)
    key = {"skymap": skymap, "tract": tile}
    with butler.transaction():
        digest = sha1(skymap.encode(), usedforsecurity=False).digest()
        size = {"tract_max": 1 << 30, "patch_nx_max": 256, "patch_ny_max": 1}
        butler.registry.syncDimensionData("skymap", {"name": skymap, "hash": digest} | size)
        butler.registry.insertDimensionData(
            "tract", {"skymap": skymap, "id": tile, "region": region}, skip_existing=True
        )
        butler.registry.insertDimensionData(
            "patch",
            key | {"id": detector, "cell_x": detector, "cell_y": 0, "region": region},
            skip_existing=True,
        )
    kind = DatasetType("template", ("skymap", "tract", "patch", "band"), EXPOSURE, universe=butler.dimensions)
    butler.registry.registerDatasetType(kind)
    values = key | {"patch": detector, "band": band}
    return _ingest(repository, kind, values, f"{instrument}/templates/{version}", path, transfer)


def find_template(
    repository: Repository, *, instrument: str, tile: int, detector: int, band: str
) -> Path | None:
    """Path of the newest version (by name) of a template; None when there is none."""
    from lsst.daf.butler import MissingDatasetTypeError

    runs = repository.butler.collections.query(f"{instrument}/templates/*")
    values = {"skymap": f"{instrument}_tiles", "tract": tile, "patch": detector, "band": band}
    try:
        ref = repository.butler.find_dataset("template", values, collections=sorted(runs, reverse=True))
    except MissingDatasetTypeError:
        return None
    return None if ref is None else Path(repository.butler.getURI(ref).ospath)


def _data_id(kind: str, instrument: str, detector: int, physical_filter: str | None) -> dict[str, Any]:
    if kind not in KINDS:
        raise UserError(f"calibration kind {kind!r}: expected one of {', '.join(KINDS)}")
    values: dict[str, Any] = {"instrument": instrument, "detector": detector}
    if "physical_filter" in KINDS[kind]:
        if not physical_filter:
            raise UserError(f"a {kind} needs its physical_filter ({UNKNOWN!r} when there is none)")
        values["physical_filter"] = physical_filter
    return values


def register_calibration(repository: Repository, kind: str) -> DatasetType:
    """Dataset type of a kind of calibration, registered if it was not."""
    from lsst.daf.butler import DatasetType

    found = DatasetType(kind, KINDS[kind], RAW, universe=repository.butler.dimensions, isCalibration=True)
    repository.butler.registry.registerDatasetType(found)
    return found


def _ingest(
    repository: Repository, kind: DatasetType, values: dict[str, Any], run: str, path: Path, transfer: str
) -> DatasetRef:
    from lsst.daf.butler import DataCoordinate, DatasetIdGenEnum, DatasetRef, FileDataset

    butler = repository.butler
    butler.collections.register(run)
    data_id = butler.registry.expandDataId(DataCoordinate.standardize(values, dimensions=kind.dimensions))
    ref = DatasetRef(kind, data_id, run, id_generation_mode=DatasetIdGenEnum.DATAID_TYPE_RUN)
    file = FileDataset(str(path), [ref])  # read by what its storage class says
    butler.ingest(file, transfer=transfer, skip_existing=True)
    return ref
