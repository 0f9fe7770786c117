"""Raw exposure to an image in electrons."""

from __future__ import annotations

from typing import Any

from lsst.pex.config import Field
from lsst.pipe.base import (
    Instrument,
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connectionTypes import Input, Output, PrerequisiteInput

from cumbre.core.instrument import Instrument as Description
from cumbre.payloads.calibration import Calibrations
from cumbre.payloads.isr import assemble_and_correct
from cumbre.payloads.raw import RawDetector, check_boxes, check_finite, observation_of
from cumbre.pipelines.words import outcomes
from cumbre.repository.calibrations import KINDS
from cumbre.repository.fits_image import FitsImage
from cumbre.repository.storage import EXPOSURE, RAW

EXPOSURE_DETECTOR = ("instrument", "exposure", "detector")


def _calibration(kind: str, doc: str) -> Any:
    return PrerequisiteInput(
        doc=doc, name=kind, storageClass=RAW, dimensions=KINDS[kind], isCalibration=True, minimum=0
    )


class IsrConnections(PipelineTaskConnections, dimensions=EXPOSURE_DETECTOR):  # type: ignore[misc, call-arg]
    """A raw and the calibrations that hold at its time; each of these may be absent."""

    raw = Input(doc="Read-out of one detector.", name="raw", storageClass=RAW, dimensions=EXPOSURE_DETECTOR)
    bias = _calibration("bias", "ADU above the overscan.")
    dark = _calibration("dark", "Electrons per second.")
    flat = _calibration("flat", "Response relative to the detector's median.")
    fringe = _calibration("fringe", "Pattern of the night sky, relative to its level.")
    defects = _calibration("defects", "Pixels that cannot be used.")
    brighter_fatter = _calibration("brighter_fatter", "Kernel of the brighter-fatter effect, per electron.")
    exposure = Output(
        doc="Electrons with variance and mask, background included.",
        name="post_isr_image",
        storageClass=EXPOSURE,
        dimensions=EXPOSURE_DETECTOR,
    )

    def __init__(self, *, config: IsrConfig | None = None) -> None:
        super().__init__(config=config)
        for kind in KINDS:
            if config is not None and not getattr(config, f"do_{kind}"):
                delattr(self, kind)


class IsrConfig(PipelineTaskConfig, pipelineConnections=IsrConnections):  # type: ignore[misc, call-arg]
    """Which calibrations to apply."""

    do_bias = Field("Subtract the bias frame where there is one.", bool, default=True)
    do_dark = Field("Subtract the dark frame where there is one.", bool, default=True)
    do_flat = Field("Divide by the flat where there is one.", bool, default=True)
    do_fringe = Field("Subtract the fringe frame where there is one.", bool, default=True)
    do_defects = Field("Flag and fill the defects where there is a list of them.", bool, default=True)
    do_brighter_fatter = Field(
        "Give charge back that was pushed into neighbours, where there is a kernel.", bool, default=True
    )


class IsrTask(PipelineTask):  # type: ignore[misc]
    """Instrument signature removal of one detector."""

    ConfigClass = IsrConfig
    _DefaultName = "isr"

    def runQuantum(self, butlerQC: QuantumContext, inputRefs: Any, outputRefs: Any) -> None:  # noqa: N802
        """Read, correct, write."""
        inputs = butlerQC.get(inputRefs)
        data_id = butlerQC.quantum.dataId
        with outcomes():
            raw = raw_detector(
                inputs.pop("raw"), Instrument.from_data_id(data_id).description, where=str(data_id)
            )
            made = self.run(raw, calibrations_of(inputs))
        butlerQC.put(made, outputRefs)

    def run(self, raw: RawDetector, calibrations: Calibrations) -> Struct:
        """Correct one read-out; see :func:`cumbre.payloads.isr.assemble_and_correct`."""
        return Struct(exposure=assemble_and_correct(raw, calibrations))


def raw_detector(image: FitsImage, description: Description, *, where: str) -> RawDetector:
    """A raw that is in memory already, checked as :func:`cumbre.payloads.raw.read_raw` checks files.

    Raises
    ------
    BadFileError
        Its header or its pixels are not what the description says.
    """
    headers = [hdu.header for hdu in image.hdus] if description.header else [image.header]
    metadata, detector = observation_of(description, headers, where)
    arrays = []
    for amplifier in detector.amplifiers:
        array = image.pixels(amplifier.hdu)
        check_boxes(amplifier, array.shape, where)
        check_finite(array, where)
        arrays.append(array)
    return RawDetector(arrays, image.header, detector, description, metadata, where)


def calibrations_of(frames: dict[str, FitsImage | None]) -> Calibrations:
    """Calibrations from datasets, each with its plane in an HDU of its name or alone in the file."""
    parts = {}
    for kind, frame in frames.items():
        if frame is not None:
            named = any(hdu.name.lower() == kind for hdu in frame.hdus)
            parts[kind] = frame.pixels(kind if named else 0)
    return Calibrations.of_planes(parts)
