"""Instrument signature removal: a raw detector and its calibrations to an image in electrons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import UnprocessableDataError
from cumbre.core.instrument import Amplifier
from cumbre.payloads.calibration import Calibrations
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels import isr as kernel
from cumbre.payloads.kernels.brighter_fatter import TOLERANCE_E
from cumbre.payloads.kernels.brighter_fatter import correct as give_back
from cumbre.payloads.raw import RawDetector, read_raw

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


def coupled_detectors(raw: RawDetector) -> tuple[list[RawDetector], list[str]]:
    """Read-outs of the detectors whose signal appears in this one, from the files beside its own.

    Returns
    -------
    Those that are there, and in words those that are not.
    """
    there, missing = [], []
    for name in raw.detector.crosstalk_from:
        path = Path(raw.path)
        beside = path.with_name(path.name.replace(raw.detector.name, name))
        if beside != path and beside.is_file():
            there.append(read_raw(beside, raw.instrument))
        else:
            missing.append(f"no file of {name} beside this one: its crosstalk is not removed")
    return there, missing


def _coupled_signal(raw: RawDetector, others: Sequence[RawDetector]) -> NDArray[np.float32] | None:
    """ADU that other detectors leave in each amplifier, in read-out order; None for none."""
    total: NDArray[np.float32] | None = None
    for other in others:
        matrix = np.array(raw.detector.crosstalk_from[other.detector.name], np.float32)
        sources = []
        for amplifier, array in zip(other.detector.amplifiers, other.amplifiers, strict=True):
            signal = subtract_overscan(array, amplifier, has_bias_frame=False)
            terms = [*amplifier.linearity[:2], 0.0, 0.0]
            sources.append(signal * (1 + signal * (np.float32(terms[0]) + signal * np.float32(terms[1]))))
        part = np.tensordot(matrix, np.stack(sources), axes=1)
        total = part if total is None else total + part
    return total


def detector_planes(
    raw: RawDetector,
    calibrations: Calibrations | None = None,
    *,
    in_adu: bool = False,
    others: Sequence[RawDetector] = (),
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
    others
        Detectors read out at the same time whose signal appears in this one (``crosstalk_from``).

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
    elsewhere = None if in_adu else _coupled_signal(raw, others)
    if elsewhere is not None:
        signal -= elsewhere
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


def subtract_fringe(
    image: NDArray[np.float32], mask: NDArray[np.uint16], fringe: NDArray[np.float32]
) -> float:
    """Subtract the night sky's interference pattern in place; its strength follows from the image.

    Parameters
    ----------
    image, mask
        Flattened electrons with the sky, and flags.
    fringe
        Pattern relative to the sky's level (mean 0).

    Returns
    -------
    Electrons by which the pattern was multiplied; 0 when the sky shows none of it.
    """
    ny, nx = image.shape
    use = (mask & np.uint16(MaskPlane.unusable())) == 0
    yy, xx = np.nonzero(use & np.isfinite(fringe))
    step = max(yy.size // 100_000, 1)
    yy, xx = yy[::step], xx[::step]
    if yy.size < 1000:
        return 0.0
    u, v = xx / nx - 0.5, yy / ny - 0.5
    basis = np.stack([fringe[yy, xx].astype(np.float64), np.ones_like(u), u, v, u * u, u * v, v * v], axis=1)
    values = image[yy, xx].astype(np.float64)
    good = np.ones(values.size, bool)
    for _ in range(8):  # stars leave
        terms, *_ = np.linalg.lstsq(basis[good], values[good], rcond=None)
        residual = values - basis @ terms
        sigma = 1.4826 * np.median(np.abs(residual[good] - np.median(residual[good])))
        good = np.abs(residual) < 3 * sigma
    error = sigma * np.sqrt(np.linalg.inv(basis[good].T @ basis[good])[0, 0])
    strength = float(terms[0])
    if not strength > 3 * error:
        return 0.0
    image -= np.float32(strength) * np.where(np.isfinite(fringe), fringe, 0).astype(np.float32)
    return strength


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


def _with_brighter_fatter(
    raw: RawDetector, calibrations: Calibrations, others: Sequence[RawDetector]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint16], dict[str, float]]:
    """:func:`detector_planes` with charge given back before the flat; and numbers of it."""
    assert calibrations.brighter_fatter is not None
    image, variance, mask = detector_planes(raw, replace(calibrations, flat=None), others=others)
    # what a defect holds is no charge that pushed others
    kernel.fill_bad_pixels(image, variance, mask, int(MaskPlane.BAD | MaskPlane.NO_DATA))
    held = (mask & np.uint16(MaskPlane.SAT | MaskPlane.NO_DATA)) > 0
    numbers = give_back(image, calibrations.brighter_fatter, held)
    if calibrations.flat is not None:
        kernel.divide_by_flat(image, variance, mask, calibrations.flat)
    return image, variance, mask, {f"brighter_fatter_{name}": value for name, value in numbers.items()}


def assemble_and_correct(raw: RawDetector, calibrations: Calibrations | None = None) -> Exposure:
    """Instrument signature removal.

    Overscan, saturation flags, crosstalk of other detectors, bias, linearity, crosstalk of its own amplifiers,
    gain, variance, dark, brighter-fatter effect (with a kernel only), flat, fringe, defects; saturated stars' neighbours
    are flagged too, and defects are filled from their neighbours (flag INTRP).

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
    others, missing = coupled_detectors(raw)
    told: dict[str, float] = {}
    if calibrations is None or calibrations.brighter_fatter is None:
        image, variance, mask = detector_planes(raw, calibrations, others=others)
    else:
        image, variance, mask, told = _with_brighter_fatter(raw, calibrations, others)
        if told["brighter_fatter_last_change"] > TOLERANCE_E:
            missing.append(
                f"brighter-fatter correction: after {told['brighter_fatter_iterations']:.0f} iterations pixels still change "
                f"by {told['brighter_fatter_last_change']:.2f} electrons"
            )
    kernel.grow(mask, np.uint16(MaskPlane.SAT), 1)
    unusable = float(np.mean((mask & MaskPlane.unusable()) > 0))
    if unusable > 0.9:
        raise UnprocessableDataError(
            f"{raw.path}: {unusable:.0%} of the pixels are saturated, bad or without data; nothing to measure"
        )
    kernel.fill_bad_pixels(image, variance, mask, int(MaskPlane.BAD | MaskPlane.NO_DATA))
    gains = [a.gain for a in raw.detector.amplifiers]
    metadata = describe(raw)
    metadata["problems"] += missing
    metadata["gain"] = float(np.mean(gains))
    metrics = {
        "saturated_pixels": float(np.count_nonzero(mask & MaskPlane.SAT)),
        "bad_fraction": unusable,
        "sky_adu": float(np.median(image[::7, ::7])) / metadata["gain"],
        **told,
    }
    if calibrations is not None and calibrations.fringe is not None:
        metrics["fringe_electrons"] = subtract_fringe(image, mask, calibrations.fringe)
    return Exposure(image, variance, mask, metadata=metadata, metrics=metrics)
