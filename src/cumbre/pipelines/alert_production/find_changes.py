"""Calibrated image and template to sources, objects, forced photometry and alert packets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from lsst.pex.config import ConfigField, Field
from lsst.pipe.base import (
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connectionTypes import Input, Output, PrerequisiteInput

from cumbre.catalogs.columns import conform
from cumbre.catalogs.schema import level1_tables
from cumbre.core.errors import NoWorkFoundError
from cumbre.core.time import Clock, mjd_from_seconds
from cumbre.payloads.alert_production import produce
from cumbre.payloads.difference import DifferenceConfig
from cumbre.payloads.exposure import Exposure
from cumbre.payloads.injection import InjectionConfig, is_chosen
from cumbre.pipelines.alert_production.preload import HISTORY
from cumbre.pipelines.settings import settings_class, values
from cumbre.pipelines.words import outcomes
from cumbre.repository.storage import ALERTS, EXPOSURE

VISIT_DETECTOR = ("instrument", "visit", "detector")
DifferenceSettings = settings_class(DifferenceConfig, __name__, "DifferenceSettings")
InjectionSettings = settings_class(InjectionConfig, __name__, "InjectionSettings")


def _table(name: str, doc: str) -> Any:
    return Output(doc=doc, name=name, storageClass="ArrowTable", dimensions=VISIT_DETECTOR)


def _history(name: str) -> Any:
    doc = f"{name} before this visit."
    return Input(doc=doc, name=name, storageClass="ArrowTable", dimensions=VISIT_DETECTOR)


class FindChangesConnections(PipelineTaskConnections, dimensions=VISIT_DETECTOR):  # type: ignore[misc, call-arg]
    """An image, the templates that overlap it, and the history of its sky."""

    exposure = Input(
        doc="Calibrated image.",
        name="preliminary_visit_image",
        storageClass=EXPOSURE,
        dimensions=VISIT_DETECTOR,
    )
    templates = PrerequisiteInput(
        doc="Templates of the same band that overlap the detector; the one that covers most of it is used.",
        name="template",
        storageClass=EXPOSURE,
        dimensions=("skymap", "tract", "patch", "band"),
        multiple=True,
        deferLoad=True,
        minimum=0,
    )
    objects = _history("dia_object_history")
    sources = _history("dia_source_history")
    forced = _history("dia_forced_source_history")
    difference = Output(
        doc="Image minus matched template, with calibrated variance and the mask of detections.",
        name="difference_image",
        storageClass=EXPOSURE,
        dimensions=VISIT_DETECTOR,
    )
    dia_sources = _table("dia_source", "Sources of the difference, columns of DiaSource.")
    dia_objects = _table("dia_object", "Objects as they are after this visit, columns of DiaObject.")
    dia_forced = _table("dia_forced_source", "Forced photometry of all objects, columns of DiaForcedSource.")
    alerts = Output(
        doc="Alert packets of the reliable sources; nothing is published.",
        name="dia_alerts",
        storageClass=ALERTS,
        dimensions=VISIT_DETECTOR,
    )
    quality = Output(
        doc="Numbers of the visit for the telemetry gateway.",
        name="visit_quality",
        storageClass="StructuredDataDict",
        dimensions=VISIT_DETECTOR,
    )
    injected = _table("injected_sources", "Planted sources, and whether each was found.")

    def __init__(self, *, config: FindChangesConfig | None = None) -> None:
        super().__init__(config=config)
        if config is not None and not config.injection_fraction > 0:
            del self.injected


class FindChangesConfig(PipelineTaskConfig, pipelineConnections=FindChangesConnections):  # type: ignore[misc, call-arg]
    """Choices of differencing, detection and injection."""

    difference = ConfigField("Subtraction, detection and classification.", DifferenceSettings)
    injection_fraction = Field(
        "Part of the visits that carry planted sources, which are in none of the other outputs.",
        float,
        default=0.0,
        check=lambda value: 0 <= value <= 1,
    )
    injection = ConfigField("What is planted.", InjectionSettings)


class FindChangesTask(PipelineTask):  # type: ignore[misc]
    """Differencing, detection, measurement, association and alerts of one detector image."""

    ConfigClass = FindChangesConfig
    _DefaultName = "findChanges"

    def runQuantum(self, butlerQC: QuantumContext, inputRefs: Any, outputRefs: Any) -> None:  # noqa: N802
        """Choose the template, process, write."""
        data_id = butlerQC.quantum.dataId
        with outcomes():
            chosen = best_template(data_id.region, [ref.dataId for ref in inputRefs.templates])
            if chosen is None:
                raise NoWorkFoundError(f"no template of this band overlaps {data_id}")
            template = butlerQC.get(inputRefs.templates[chosen]).get()
            history = {name: butlerQC.get(getattr(inputRefs, key)) for key, name in HISTORY.items()}
            made = self.run(butlerQC.get(inputRefs.exposure), template, history)
        butlerQC.put(made, outputRefs)

    def run(self, exposure: Exposure, template: Exposure, history: Mapping[str, pa.Table]) -> Struct:
        """Process one image; see :func:`cumbre.payloads.alert_production.produce`."""
        visit, fraction = int(exposure.metadata["exposure_id"]), self.config.injection_fraction
        made = produce(
            exposure,
            None,
            template,
            None,
            history=history,
            processed_mjd_tai=mjd_from_seconds(Clock.real().now_tai_s()),
            config=values(self.config.difference),
            inject=values(self.config.injection) if is_chosen(visit, fraction) else None,
        )
        for warning in made.warnings:
            self.log.warning("%s", warning)
        tables = level1_tables()
        out = Struct(
            difference=made.result.exposure,
            dia_sources=conform(tables["DiaSource"], made.dia_sources),
            dia_objects=conform(tables["DiaObject"], made.dia_objects),
            dia_forced=conform(tables["DiaForcedSource"], made.forced),
            alerts=made.alerts,
            quality=made.quality | {"warnings": made.warnings},
        )
        if fraction > 0:
            out = Struct(**out.getDict(), injected=pa.Table.from_pylist(made.injected or []))
        return out


def best_template(region: Any, candidates: Sequence[Any]) -> int | None:
    """Index of the data ID whose region covers most of a detector's region; None when none touches it."""
    shares = [_overlap(region, candidate.region) for candidate in candidates]
    best = max(range(len(shares)), key=shares.__getitem__, default=None)
    return best if best is not None and shares[best] > 0 else None


def _overlap(region: Any, other: Any) -> float:
    """Part of a small convex region that another covers, from points spread over it."""
    import numpy as np

    corners = np.array([tuple(vertex) for vertex in region.getVertices()])
    middle = corners.mean(axis=0)
    # Points on rays from the middle to the corners and to the middles of the sides.
    rims = np.concatenate([corners, (corners + np.roll(corners, 1, axis=0)) / 2])
    points = np.concatenate([middle + part * (rims - middle) for part in (0.1, 0.3, 0.5, 0.7, 0.9)])
    points /= np.linalg.norm(points, axis=1)[:, None]
    return float(np.mean(other.contains(*np.ascontiguousarray(points.T))))
