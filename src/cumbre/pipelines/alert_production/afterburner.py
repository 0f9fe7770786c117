"""What follows when the alerts are out: quality numbers, and images as others read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lsst.pex.config import Field
from lsst.pipe.base import (
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connectionTypes import Input, Output

from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels.planes import robust_rms
from cumbre.pipelines.words import outcomes
from cumbre.repository.storage import EXPOSURE

PLANES = {
    "BAD": "Defect, or without response.",
    "SAT": "Saturated, or beside a saturated pixel.",
    "INTRP": "Filled from its neighbours.",
    "CR": "Struck by a particle.",
    "EDGE": "Too near to the edge to be measured.",
    "DETECTED": "Above the threshold.",
    "DETECTED_NEGATIVE": "Below the negative threshold.",
    "SUSPECT": "Not all of the visit's exposures count.",
    "NO_DATA": "Nothing was measured here.",
    "STREAK": "Trail of a satellite or an aeroplane.",
    "VIGNETTED": "Less than half of the light arrives.",
    "INJECTED": "Touched by a planted source.",
    "SAT_TEMPLATE": "Saturated in the template.",
}
VISIT_DETECTOR = ("instrument", "visit", "detector")


class MeasureQualityConnections(PipelineTaskConnections, dimensions=VISIT_DETECTOR):  # type: ignore[misc, call-arg]
    """A difference, its sources, and the numbers of the visit."""

    dia_sources = Input(
        doc="Sources of the difference.",
        name="dia_source",
        storageClass="ArrowTable",
        dimensions=VISIT_DETECTOR,
    )
    difference = Input(
        doc="Difference image.", name="difference_image", storageClass=EXPOSURE, dimensions=VISIT_DETECTOR
    )
    visit_quality = Input(
        doc="Numbers of the visit.",
        name="visit_quality",
        storageClass="StructuredDataDict",
        dimensions=VISIT_DETECTOR,
    )
    metrics = Output(
        doc="Quality of the difference, names as in Rubin's core set.",
        name="detector_visit_quality_core",
        storageClass="StructuredDataDict",
        dimensions=VISIT_DETECTOR,
    )


class MeasureQualityConfig(PipelineTaskConfig, pipelineConnections=MeasureQualityConnections):  # type: ignore[misc, call-arg]
    """What counts as reliable."""

    reliable = Field("Reliability from which a source counts as real.", float, default=0.5)


class MeasureQualityTask(PipelineTask):  # type: ignore[misc]
    """Quality numbers of one difference."""

    ConfigClass = MeasureQualityConfig
    _DefaultName = "measureQuality"

    def runQuantum(self, butlerQC: QuantumContext, inputRefs: Any, outputRefs: Any) -> None:  # noqa: N802
        """Read, count, write."""
        with outcomes():
            made = self.run(**butlerQC.get(inputRefs))
        butlerQC.put(made, outputRefs)

    def run(self, dia_sources: pa.Table, difference: Exposure, visit_quality: dict[str, Any]) -> Struct:
        """Count sources, and compare the difference's noise with its variance (1 where both agree)."""
        reliability = np.asarray(pc.fill_null(dia_sources["reliability"], 0.0))
        good = (difference.mask & np.uint16(MaskPlane.unusable() | MaskPlane.DETECTED)) == 0
        pull = difference.image[good] / np.sqrt(difference.variance[good])
        high = int(np.count_nonzero(reliability >= self.config.reliable))
        metrics = {
            "numDiaSources": dia_sources.num_rows,
            "numDipoles": _count(dia_sources, "isDipole"),
            "numNegativeDiaSources": _count(dia_sources, "isNegative"),
            "numHighReliability": high,
            "numLowReliability": dia_sources.num_rows - high,
            "sciencePsfSize": visit_quality.get("seeing"),
            "templateCoveragePercent": 100 * float(visit_quality.get("templateCoverage", 0.0)),
            "differenceNoiseRatio": robust_rms(pull[::7]) if pull.size else None,
            "maskedFraction": 1 - float(good.mean()),
        }
        return Struct(metrics={key: value for key, value in metrics.items() if value is not None})


def _count(table: pa.Table, column: str) -> int:
    return int(pc.sum(pc.fill_null(table[column], False)).as_py() or 0)


class ExportImagesConnections(PipelineTaskConnections, dimensions=VISIT_DETECTOR):  # type: ignore[misc, call-arg]
    """Our images, and the same as ``lsst.images``."""

    exposure = Input(
        doc="Calibrated image.",
        name="preliminary_visit_image",
        storageClass=EXPOSURE,
        dimensions=VISIT_DETECTOR,
    )
    difference = Input(
        doc="Difference image.", name="difference_image", storageClass=EXPOSURE, dimensions=VISIT_DETECTOR
    )
    visit_image = Output(
        doc="Calibrated image with named mask planes and sky projection, nJy.",
        name="visit_masked_image",
        storageClass="MaskedImageV2",
        dimensions=VISIT_DETECTOR,
    )
    difference_image = Output(
        doc="Difference image with named mask planes and sky projection, nJy.",
        name="difference_masked_image",
        storageClass="MaskedImageV2",
        dimensions=VISIT_DETECTOR,
    )


class ExportImagesConfig(PipelineTaskConfig, pipelineConnections=ExportImagesConnections):  # type: ignore[misc, call-arg]
    """Nothing to choose."""


class ExportImagesTask(PipelineTask):  # type: ignore[misc]
    """Images in the form that ``lsst.images`` and its cutouts read."""

    ConfigClass = ExportImagesConfig
    _DefaultName = "exportImages"

    def runQuantum(self, butlerQC: QuantumContext, inputRefs: Any, outputRefs: Any) -> None:  # noqa: N802
        """Read, convert, write."""
        with outcomes():
            made = self.run(**butlerQC.get(inputRefs))
        butlerQC.put(made, outputRefs)

    def run(self, exposure: Exposure, difference: Exposure) -> Struct:
        """Convert both, with the zero point of the calibrated image."""
        scale = exposure.njy_per_electron()
        return Struct(
            visit_image=masked_image(exposure, scale), difference_image=masked_image(difference, scale)
        )


def masked_image(exposure: Exposure, njy_per_electron: float) -> Any:
    """``lsst.images.MaskedImage`` of an exposure, in nJy."""
    import astropy.units as u
    import lsst.images as li
    from astropy.io import fits
    from astropy.wcs import WCS

    ny, nx = exposure.shape
    schema = li.MaskSchema(
        [li.MaskPlane(str(p.name), PLANES[str(p.name)]) for p in MaskPlane], dtype=np.uint8
    )
    mask = li.Mask(schema=schema, shape=(ny, nx))
    for plane in MaskPlane:
        mask.set(str(plane.name), (exposure.mask & np.uint16(plane)) > 0)
    projection = None
    if exposure.wcs is not None:
        box = li.Box.from_shape((ny, nx))
        frame = li.DetectorFrame(
            instrument=str(exposure.metadata.get("instrument", "")),
            visit=int(exposure.metadata["exposure_id"]),
            detector=int(exposure.metadata["detector"]),
            bbox=box,
        )
        header = fits.Header(exposure.wcs.to_header(exposure.shape))
        projection = li.SkyProjection.from_fits_wcs(WCS(header), frame, pixel_bounds=box)
    scale = np.float32(njy_per_electron)
    return li.MaskedImage(
        li.Image(exposure.image * scale, unit=u.nJy),
        mask=mask,
        variance=li.Image(exposure.variance * scale * scale, unit=u.nJy**2),
        sky_projection=projection,
    )
