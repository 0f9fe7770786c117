"""Image in electrons to a calibrated one: background, PSF, astrometry, zero point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from lsst.pex.config import ConfigField
from lsst.pipe.base import (
    Instrument,
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connectionTypes import Input, Output

from cumbre.core.instrument import Instrument as Description
from cumbre.payloads.calibrate import CalibrateConfig
from cumbre.payloads.exposure import Exposure
from cumbre.payloads.refcat import RefCat
from cumbre.payloads.snaps import calibrate_snaps
from cumbre.pipelines.settings import settings_class, values
from cumbre.pipelines.words import outcomes
from cumbre.repository.storage import EXPOSURE

VISIT_DETECTOR = ("instrument", "visit", "detector")
CalibrateSettings = settings_class(CalibrateConfig, __name__, "CalibrateSettings")


class CalibrateImageConnections(PipelineTaskConnections, dimensions=VISIT_DETECTOR):  # type: ignore[misc, call-arg]
    """The exposures of a visit and the reference stars about them."""

    exposures = Input(
        doc="One exposure, or the snaps of the visit.",
        name="post_isr_image",
        storageClass=EXPOSURE,
        dimensions=("instrument", "exposure", "detector"),
        multiple=True,
    )
    reference = Input(
        doc="Reference stars on and near the detector.",
        name="reference_stars_detector",
        storageClass="ArrowTable",
        dimensions=VISIT_DETECTOR,
    )
    exposure = Output(
        doc="Calibrated image without background.",
        name="preliminary_visit_image",
        storageClass=EXPOSURE,
        dimensions=VISIT_DETECTOR,
    )


class CalibrateImageConfig(  # type: ignore[call-arg]
    PipelineTaskConfig,  # type: ignore[misc]
    pipelineConnections=CalibrateImageConnections,
):
    """Choices of the calibration."""

    calibrate = ConfigField("Detection, background, astrometry.", CalibrateSettings)


class CalibrateImageTask(PipelineTask):  # type: ignore[misc]
    """Calibration of one detector image."""

    ConfigClass = CalibrateImageConfig
    _DefaultName = "calibrateImage"

    def runQuantum(self, butlerQC: QuantumContext, inputRefs: Any, outputRefs: Any) -> None:  # noqa: N802
        """Read, calibrate, write."""
        inputs = butlerQC.get(inputRefs)
        data_id = butlerQC.quantum.dataId
        with outcomes():
            made = self.run(
                inputs["exposures"], inputs["reference"], Instrument.from_data_id(data_id).description
            )
        # The visit's number in this repository: by it sources are numbered.
        made.exposure.metadata["exposure_id"] = made.exposure.metadata["visit"] = int(data_id["visit"])
        butlerQC.put(made, outputRefs)

    def run(self, exposures: Sequence[Exposure], reference: pa.Table, description: Description) -> Struct:
        """Calibrate; see :func:`cumbre.payloads.snaps.calibrate_snaps`."""
        stars = RefCat.from_table(reference, "reference_stars_detector")
        config = values(self.config.calibrate)
        return Struct(exposure=calibrate_snaps(exposures, stars, instrument=description, config=config))
