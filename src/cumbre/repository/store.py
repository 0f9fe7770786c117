"""A Butler repository of ours: made, opened, filled.

One process writes to a repository (:mod:`cumbre.repository.ingest`); any number read. SQLite registries serve
one machine; a ``postgresql+psycopg2://`` URL is for a server that has ``btree_gist``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cumbre.core.errors import ConflictError, NotFoundError, TransientError, UserError
from cumbre.core.header import ObservationMetadata
from cumbre.core.ids import ObsId
from cumbre.core.instrument import Instrument
from cumbre.repository.records import BY_GROUP, ONE_TO_ONE, exposure_records, sees_sky, visit_records
from cumbre.repository.storage import FORMATTERS, RAW, STORAGE_CLASSES, declare

if TYPE_CHECKING:
    from lsst.daf.butler import Butler, DatasetRef

SQLITE = "sqlite"


@dataclass(frozen=True, slots=True)
class RawFile:
    """A raw file and what its header says."""

    path: Path
    metadata: ObservationMetadata


def raw_run(instrument: str) -> str:
    """RUN collection of an instrument's raws."""
    return f"{instrument}/raw/all"


def exists(root: Path) -> bool:
    """Whether a repository is in the folder."""
    return (root / "butler.yaml").is_file()


def create_repository(
    root: Path, instruments: Iterable[Instrument], database: str = SQLITE, *, namespace: str = ""
) -> Repository:
    """Make a repository (or open the one that is there) and register instruments.

    Parameters
    ----------
    root
        Folder of the repository.
    instruments
        Descriptions to register; registering again updates them.
    database
        ``sqlite``, or a ``postgresql+psycopg2://`` URL of a database with the extension ``btree_gist``.
    namespace
        PostgreSQL schema of the registry.

    Raises
    ------
    UserError
        The database URL has another form.
    """
    from lsst.daf.butler import Butler, Config

    if not exists(root):
        config = Config()
        config["storageClasses"] = STORAGE_CLASSES
        config["datastore", "formatters"] = FORMATTERS
        if database != SQLITE:
            if not database.startswith("postgresql+psycopg2://"):
                raise UserError(
                    f"repository database {database!r}: expected 'sqlite' or postgresql+psycopg2://USER@HOST/NAME"
                )
            config["registry", "db"] = database
            if namespace:
                config["registry", "namespace"] = namespace
        root.mkdir(parents=True, exist_ok=True)
        Butler.makeRepo(str(root), config=config)
    declare(root)
    repository = Repository(root, writeable=True)
    for instrument in instruments:
        repository.register(instrument)
    return repository


class Repository:
    """One Butler repository.

    Parameters
    ----------
    root
        Its folder.
    writeable
        Only the ingest service and maintenance commands open it for writing.

    Raises
    ------
    NotFoundError
        There is no repository in the folder.
    """

    def __init__(self, root: Path, *, writeable: bool = False) -> None:
        from lsst.daf.butler import Butler

        if not exists(root):
            raise NotFoundError(
                f"{root}: no Butler repository here (no butler.yaml); make one with create_repository"
            )
        self.root = root
        self.butler: Butler = Butler.from_config(str(root), writeable=writeable)
        self._instruments: dict[str, Instrument] = {}
        self._known: set[tuple[str, int]] = set()

    def close(self) -> None:
        """Close database connections."""
        self.butler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def register(self, instrument: Instrument) -> None:
        """Write an instrument's dimensions, the raw dataset type and its RUN; again does no harm."""
        from lsst.daf.butler import DatasetType

        from cumbre.repository.instruments import instrument_class

        instrument_class(instrument)().register(self.butler.registry, update=True)
        self.butler.registry.registerDatasetType(
            DatasetType("raw", ("instrument", "exposure", "detector"), RAW, universe=self.butler.dimensions)
        )
        self.butler.collections.register(raw_run(instrument.name))
        self._instruments[instrument.name] = instrument

    def instrument(self, name: str) -> Instrument:
        """Description of a registered instrument."""
        if name not in self._instruments:
            from lsst.pipe.base import Instrument as MiddlewareInstrument

            try:
                self._instruments[name] = MiddlewareInstrument.fromName(
                    name, self.butler.registry
                ).description
            except LookupError as error:
                raise NotFoundError(f"{self.root}: instrument {name!r} is not registered here") from error
        return self._instruments[name]

    def ref(self, metadata: ObservationMetadata) -> DatasetRef:
        """Reference of a raw; its UUID is the same at every place."""
        from lsst.daf.butler import DataCoordinate, DatasetIdGenEnum, DatasetRef

        kind = self.butler.get_dataset_type("raw")
        data_id = DataCoordinate.standardize(
            instrument=metadata.instrument,
            exposure=metadata.exposure_id,
            detector=metadata.detector_id,
            dimensions=kind.dimensions,
        )
        return DatasetRef(
            kind, data_id, raw_run(metadata.instrument), id_generation_mode=DatasetIdGenEnum.DATAID_TYPE_RUN
        )

    def ingest(
        self, files: Sequence[RawFile], *, transfer: str = "direct", visit_system: int | None = ONE_TO_ONE
    ) -> None:
        """Ingest raws in one transaction: all or none. What is there already is left as it is.

        Parameters
        ----------
        files
            Of any instruments and exposures.
        transfer
            Butler transfer mode: direct, copy, hardlink, symlink, move.
        visit_system
            How visits are defined for exposures of the sky (:meth:`define_visit`); None for no visits.

        Raises
        ------
        ConflictError
            An exposure of that id is there with other values.
        TransientError
            The database was busy or the connection lost: try again.
        """
        from lsst.daf.butler import FileDataset
        from lsst.daf.butler.registry import ConflictingDefinitionError
        from sqlalchemy.exc import OperationalError

        from cumbre.repository.formatter import FitsFormatter

        fresh = {(f.metadata.instrument, f.metadata.exposure_id): f.metadata for f in files}
        fresh = {key: metadata for key, metadata in fresh.items() if key not in self._known}
        datasets = [FileDataset(str(f.path), [self.ref(f.metadata)], formatter=FitsFormatter) for f in files]
        try:
            with self.butler.transaction():
                for metadata in fresh.values():
                    self._write_exposure(metadata)
                    if visit_system is not None and sees_sky(metadata):
                        self.define_visit(metadata, visit_system)
                self.butler.ingest(
                    *datasets,
                    transfer=transfer,
                    skip_existing=True,
                    record_validation_info=transfer != "direct",
                )
        except ConflictingDefinitionError as error:
            raise ConflictError(
                f"{', '.join(sorted(f.metadata.obs_id for f in files)[:3])}: {error}"
            ) from error
        except OperationalError as error:
            raise TransientError(f"{self.root}: the registry is busy or gone: {error}") from error
        self._known |= set(fresh)

    def _write_exposure(self, metadata: ObservationMetadata) -> None:
        rows = exposure_records(metadata)
        for element, row in rows.items():
            self.butler.registry.syncDimensionData(element, row)

    def define_visit(self, metadata: ObservationMetadata, system: int = ONE_TO_ONE) -> int | None:
        """Define the visit of an exposure that is in the registry, with regions on the sky.

        The exposures of one ``takeImages`` with a group id are one visit, as their headers say. It has number and name
        of the first of them, whichever comes first. With ``BY_GROUP`` all exposures of a group are one visit too,
        named by the group and numbered by the first that came.

        Returns
        -------
        int or None
            The visit; None when the exposure has no position.
        """
        exposure = exposure_records(metadata)["exposure"]
        if exposure["tracking_ra"] is None:
            return None
        registry = self.butler.registry
        defined = self.butler.query_dimension_records(
            "visit_definition", instrument=metadata.instrument, exposure=metadata.exposure_id, explain=False
        )
        if defined:
            return int(defined[0].visit)
        visit, name = metadata.visit_id, metadata.obs_id
        if metadata.sequence_length > 1:
            name = str(replace(ObsId.parse(metadata.obs_id), seq_num=visit % 100000))
            system = BY_GROUP
        elif system == BY_GROUP:
            name = metadata.group_id
        earlier: Sequence[Any] = ()
        if system == BY_GROUP:
            earlier = self.butler.query_dimension_records(
                "visit",
                instrument=metadata.instrument,
                where="visit.name = :n",
                bind={"n": name},
                explain=False,
            )
        if earlier:
            visit = earlier[0].id
            exposure = self._joined(exposure, earlier[0], is_first=metadata.exposure_id == visit)
        instrument = self.instrument(metadata.instrument)
        rows = visit_records(instrument, exposure, visit=visit, name=name, system=system)
        if earlier:
            # Regions stay those of the exposure that came first.
            rows["visit"][0]["region"] = earlier[0].region
            rows.pop("visit_detector_region")
        elif visit != metadata.exposure_id:
            rows["visit"][0]["seq_num"] = visit % 100000
        registry.syncDimensionData("visit", rows.pop("visit")[0], update=system == BY_GROUP)
        for element, many in rows.items():
            registry.insertDimensionData(element, *many, skip_existing=True)
        return visit

    @staticmethod
    def _joined(exposure: dict[str, Any], visit: Any, *, is_first: bool) -> dict[str, Any]:
        """The visit of a group after one more exposure: the sum of open times, the union of spans."""
        from lsst.daf.butler import Timespan

        span, other = visit.timespan, exposure["timespan"]
        begin, end = min(span.begin, other.begin), max(span.end, other.end)
        words = ("observation_reason", "azimuth", "zenith_angle", "target_name")
        first = {key: exposure[key] if is_first else getattr(visit, key) for key in words}
        return (
            exposure
            | first
            | {
                "seq_num": min(visit.seq_num, exposure["seq_num"]),
                "exposure_time": visit.exposure_time + exposure["exposure_time"],
                "timespan": Timespan(begin, end),
            }
        )

    def ingested_detectors(self, instrument: str, exposure_id: int) -> set[int]:
        """Detectors of an exposure whose raw is here."""
        refs = self.butler.query_datasets(
            "raw",
            collections=raw_run(instrument),
            instrument=instrument,
            exposure=exposure_id,
            explain=False,
            limit=None,
        )
        return {int(ref.dataId["detector"]) for ref in refs}
