"""What can be gathered before the image of a visit is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from lsst.pex.config import Field
from lsst.pipe.base import (
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connectionTypes import Output, PrerequisiteInput

from cumbre.catalogs.schema import level1_tables
from cumbre.payloads.refcat import RefCat
from cumbre.pipelines.words import outcomes

VISIT_DETECTOR = ("instrument", "visit", "detector")
_EMPTY = np.zeros(0)
HISTORY = {"objects": "DiaObject", "sources": "DiaSource", "forced": "DiaForcedSource"}


def circle_of(data_id: Any, padding_arcsec: float) -> tuple[float, float, float]:
    """(ra, dec, radius) in degrees of the circle that holds a visit's detector, and a little more."""
    from lsst.sphgeom import LonLat

    circle = data_id.region.getBoundingCircle()
    centre = LonLat(circle.getCenter())
    radius = circle.getOpeningAngle().asDegrees() + padding_arcsec / 3600.0
    return centre.getLon().asDegrees(), centre.getLat().asDegrees(), radius


class GatherReferenceConnections(PipelineTaskConnections, dimensions=VISIT_DETECTOR):  # type: ignore[misc, call-arg]
    """The parts of the reference catalogue that touch the detector."""

    catalogue = PrerequisiteInput(
        doc="Reference stars by HTM triangle: ra, dec (degrees, ICRS), mag_<band>.",
        name="reference_stars",
        storageClass="ArrowTable",
        dimensions=("htm7",),
        multiple=True,
        deferLoad=True,
        minimum=0,
    )
    stars = Output(
        doc="Reference stars on and near the detector.",
        name="reference_stars_detector",
        storageClass="ArrowTable",
        dimensions=VISIT_DETECTOR,
    )


class GatherReferenceConfig(  # type: ignore[call-arg]
    PipelineTaskConfig,  # type: ignore[misc]
    pipelineConnections=GatherReferenceConnections,
):
    """How far about the detector."""

    padding_arcsec = Field("Margin about the detector, for the error of the pointing.", float, default=50.0)


class GatherReferenceTask(PipelineTask):  # type: ignore[misc]
    """Reference stars of one detector of a visit."""

    ConfigClass = GatherReferenceConfig
    _DefaultName = "gatherReference"

    def runQuantum(self, butlerQC: QuantumContext, inputRefs: Any, outputRefs: Any) -> None:  # noqa: N802
        """Read the parts, write the stars within the circle."""
        parts = [handle.get() for handle in butlerQC.get(inputRefs).get("catalogue", [])]
        circle = circle_of(butlerQC.quantum.dataId, self.config.padding_arcsec)
        with outcomes():
            made = self.run(parts, circle)
        butlerQC.put(made, outputRefs)

    def run(self, parts: list[pa.Table], circle: tuple[float, float, float]) -> Struct:
        """Stars of Arrow tables within a circle (ra, dec, radius in degrees); none without any part."""
        if not parts:
            return Struct(stars=RefCat(_EMPTY, _EMPTY, {"none": _EMPTY}).to_table())
        whole = RefCat.from_table(pa.concat_tables(parts, promote_options="default"), "reference_stars")
        return Struct(stars=whole.cone(*circle).to_table())


class GatherHistoryConnections(PipelineTaskConnections, dimensions=VISIT_DETECTOR):  # type: ignore[misc, call-arg]
    """What the Level 1 database knows of the sky under a detector."""

    objects = Output(
        doc="DiaObjects in the circle.",
        name="dia_object_history",
        storageClass="ArrowTable",
        dimensions=VISIT_DETECTOR,
    )
    sources = Output(
        doc="Their DiaSources of the last 12 months, and those without an object.",
        name="dia_source_history",
        storageClass="ArrowTable",
        dimensions=VISIT_DETECTOR,
    )
    forced = Output(
        doc="Their forced photometry of the last 12 months.",
        name="dia_forced_source_history",
        storageClass="ArrowTable",
        dimensions=VISIT_DETECTOR,
    )


class GatherHistoryConfig(PipelineTaskConfig, pipelineConnections=GatherHistoryConnections):  # type: ignore[misc, call-arg]
    """Where the history stands."""

    database = Field(
        "PostgreSQL URL of the Level 1 database, read only; empty for no history: every source then makes a new object.",
        str,
        default="",
    )
    padding_arcsec = Field("Margin about the detector, for the error of the pointing.", float, default=50.0)


class GatherHistoryTask(PipelineTask):  # type: ignore[misc]
    """History of one detector's sky up to the beginning of the visit."""

    ConfigClass = GatherHistoryConfig
    _DefaultName = "gatherHistory"

    def runQuantum(self, butlerQC: QuantumContext, inputRefs: Any, outputRefs: Any) -> None:  # noqa: N802
        """Ask the database, write what it knows."""
        del inputRefs
        data_id = butlerQC.quantum.dataId
        begin = data_id.records["visit"].timespan.begin
        with outcomes():
            made = self.run(circle_of(data_id, self.config.padding_arcsec), until_mjd=float(begin.tai.mjd))
        butlerQC.put(made, outputRefs)

    def run(self, circle: tuple[float, float, float], *, until_mjd: float) -> Struct:
        """Tables of a circle (ra, dec, radius in degrees); empty without a database."""
        if not self.config.database:
            tables = level1_tables()
            return Struct(**{key: tables[name].arrow().empty_table() for key, name in HISTORY.items()})
        from cumbre.catalogs.level1 import Level1
        from cumbre.stores.postgres import Database

        found = Level1(Database(self.config.database, application="cumbre pipeline")).load_region(
            *circle, until_mjd=until_mjd
        )
        return Struct(**{key: found[name] for key, name in HISTORY.items()})
