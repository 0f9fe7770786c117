"""Instrument signature removal: a raw detector and its calibrations to an image in electrons."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import UnprocessableDataError
from cumbre.core.instrument import Amplifier
from cumbre.payloads.calibration import Calibrations
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels import isr as kernel
from cumbre.payloads.raw import RawDetector

MJD_1970 = 40587.0
SKIPPED_OVERSCAN_COLUMNS = 2
"""First overscan columns that are not used: charge of the last pixels trails into them."""


def subtract_overscan(
    array: NDArray[Any], amplifier: Amplifier, *, has_bias_frame: bool
) -> NDArray[np.float32]:
    """Light-sensitive pixels of one amplifier above its bias level, ADU.

    Without an overscan the bias level is left for the bias frame, or the description's ``bias_level`` is taken
    when there is no such frame.
    """
    data = array[amplifier.raw_box.slices].astype(np.float32)
    box = amplifier.overscan_box
    if box is None:
        return data if has_bias_frame else data - np.float32(amplifier.bias_level)
    columns = array[box.slices]
    if columns.shape[1] > 4 * SKIPPED_OVERSCAN_COLUMNS:
        columns = columns[:, SKIPPED_OVERSCAN_COLUMNS:]
    if columns.shape[0] == data.shape[0]:
        return np.asarray(data - kernel.overscan_level(columns)[:, None], np.float32)
    return np.asarray(data - np.float32(np.median(columns)), np.float32)


def detector_planes(
    raw: RawDetector, calibrations: Calibrations | None = None, *, in_adu: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint16]]:
    """Assembled image, variance and mask of one raw detector.

    Parameters
    ----------
    raw
        The read-out.
    calibrations
        What to apply; None applies overscan, linearity, crosstalk and gain only.
    in_adu
        Leave everything but overscan and assembly out (for making bias frames).

    Returns
    -------
    image, variance, mask
        Of the detector's shape; electrons, or ADU with ``in_adu``.
    """
    use = calibrations or Calibrations()
    detector = raw.detector
    use.check(detector.shape, raw.path)
    amplifiers = detector.amplifiers
    n = len(amplifiers)
    ny = max(a.raw_box.shape[0] for a in amplifiers)
    nx = max(a.raw_box.shape[1] for a in amplifiers)
    signal, saturated = np.zeros((n, ny, nx), np.float32), np.zeros((n, ny, nx), bool)
    for k, (amplifier, array) in enumerate(zip(amplifiers, raw.amplifiers, strict=True)):
        h, w = amplifier.raw_box.shape
        has_level = use.bias is not None or in_adu
        signal[k, :h, :w] = subtract_overscan(array, amplifier, has_bias_frame=has_level)
        saturated[k, :h, :w] = array[amplifier.raw_box.slices] >= amplifier.saturation
    linearity = np.zeros((n, 2), np.float32)
    if not in_adu:
        for k, amplifier in enumerate(amplifiers):
            terms = amplifier.linearity[:2]
            linearity[k, : len(terms)] = terms
    coupled = bool(detector.crosstalk) and not in_adu
    return kernel.correct(
        signal,
        saturated,
        np.array([a.detector_box for a in amplifiers], np.int64),
        np.array([(a.flip_x, a.flip_y) for a in amplifiers], bool),
        np.array([1.0 if in_adu else a.gain for a in amplifiers], np.float32),
        np.array([a.read_noise / (a.gain if in_adu else 1.0) for a in amplifiers], np.float32),
        shape=detector.shape,
        linearity=linearity,
        crosstalk=np.array(detector.crosstalk, np.float32) if coupled else None,
        bias=use.bias,
        dark=None if use.dark is None else use.dark * np.float32(raw.metadata.dark_s),
        flat=use.flat,
        defects=use.defects,
    )


def describe(raw: RawDetector) -> dict[str, Any]:
    """Metadata of an exposure in our own names."""
    m = raw.metadata
    return {
        "obs_id": m.obs_id,
        "instrument": m.instrument,
        "exposure_id": m.exposure_id,
        "visit": m.exposure_id,
        "day_obs": m.day_obs,
        "seq_num": m.seq_num,
        "group_id": m.group_id,
        "detector": m.detector_id,
        "detector_name": m.detector_name,
        "image_type": m.image_type,
        "physical_filter": m.filter,
        "band": m.band,
        "exposure_s": m.exposure_s,
        "begin_tai": m.begin_tai,
        "end_tai": m.end_tai,
        "mjd_mid_tai": MJD_1970 + (m.begin_ns + (m.end_ns - m.begin_ns) // 2) / 86400e9,
        "ra_deg": m.ra_deg,
        "dec_deg": m.dec_deg,
        "rotpa_deg": m.rotpa_deg,
        "airmass": m.airmass,
        "object": m.object,
        "raw_path": raw.path,
        "problems": list(m.problems),
    }


def assemble_and_correct(raw: RawDetector, calibrations: Calibrations | None = None) -> Exposure:
    """Instrument signature removal.

    Overscan, saturation flags, bias, linearity, crosstalk, gain, variance, dark, flat, defects; saturated stars'
    neighbours are flagged too, and defects are filled from their neighbours (flag INTRP).

    Parameters
    ----------
    raw
        The read-out.
    calibrations
        Of the same detector (and, for the flat, filter); None when there are none.

    Returns
    -------
    Exposure
        Electrons, background included, without WCS, PSF and zero point.

    Raises
    ------
    UnprocessableDataError
        The calibrations have another shape, or more than 90 % of the pixels are unusable.
    """
    image, variance, mask = detector_planes(raw, calibrations)
    kernel.grow(mask, np.uint16(MaskPlane.SAT), 1)
    unusable = float(np.mean((mask & MaskPlane.unusable()) > 0))
    if unusable > 0.9:
        raise UnprocessableDataError(
            f"{raw.path}: {unusable:.0%} of the pixels are saturated, bad or without data; nothing to measure"
        )
    kernel.fill_bad_pixels(image, variance, mask, int(MaskPlane.BAD | MaskPlane.NO_DATA))
    gains = [a.gain for a in raw.detector.amplifiers]
    metadata = describe(raw)
    metadata["gain"] = float(np.mean(gains))
    metrics = {
        "saturated_pixels": float(np.count_nonzero(mask & MaskPlane.SAT)),
        "bad_fraction": unusable,
        "sky_adu": float(np.median(image[::7, ::7])) / metadata["gain"],
    }
    return Exposure(image, variance, mask, metadata=metadata, metrics=metrics)
