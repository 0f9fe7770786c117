"""``cumbre calibrate``: raw frames of any described camera to calibrated images with their own bias and flats."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import CumbreError, NoWorkFoundError, UnprocessableDataError
from cumbre.core.instrument import Instrument
from cumbre.payloads.calibrate import calibrate
from cumbre.payloads.calibration import (
    BrighterFatter,
    Calibrations,
    combine_bias,
    combine_flat,
    measure_brighter_fatter,
)
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.exposure_file import save_exposure
from cumbre.payloads.isr import assemble_and_correct, detector_planes
from cumbre.payloads.raw import RawDetector, read_raw

MIN_STARS = 5
"""Fewer clean stars than this make no PSF that deserves the name."""
LAMP_FLOOR = 400.0
"""Electrons of lamp light below which a spectrograph's flat is all noise and is left at 1."""
VIGNETTED_BELOW = 0.3
"""Flat response below which a pixel counts as vignetted: dividing would only blow up its noise."""


def run(
    bias: Sequence[Path],
    flat: Sequence[Path],
    science: Sequence[Path],
    out: Path,
    *,
    instrument: Instrument,
    brighter_fatter: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Make master frames, apply them, measure stars, write everything into a folder.

    Parameters
    ----------
    bias, flat, science
        Raw files; flats are grouped by detector and filter.
    out
        Gets ``master_*.fits``, ``NAME.calibrated.fits`` and ``NAME.png`` a science frame, and ``report.json``.
    brighter_fatter
        Measure the brighter-fatter kernel of each detector from pairs of its flats, and correct with it.
    progress
        Called with the row of each science frame when it is done.

    Returns
    -------
    dict
        The report: ``bias``, ``flats``, ``brighter_fatter``, ``frames``, ``refused`` (file, outcome, message), ``seconds``.
        A file that cannot be used is in ``refused`` and the others go on.

    Raises
    ------
    NoWorkFoundError
        No science file was given.
    """
    if not science:
        raise NoWorkFoundError("calibrate: no science file; give at least one after --science")
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    refused: list[dict[str, str]] = []
    masters: dict[int, NDArray[np.float32]] = {}
    bias_rows, flat_rows = [], []
    for detector, raws in _by_detector(_read_all(bias, instrument, refused)).items():
        masters[detector] = combine_bias(raws)
        bias_rows.append(_bias_numbers(raws, masters[detector]))
        _save_master(Calibrations(bias=masters[detector]), out / f"master_bias_{detector:03d}.fits", raws)
    flats: dict[tuple[int, str], NDArray[np.float32]] = {}
    spectra: set[tuple[int, str]] = set()
    groups: dict[tuple[int, str], list[RawDetector]] = defaultdict(list)
    lit = _read_all(flat, instrument, refused)
    kernels: dict[int, NDArray[np.float32]] = {}
    kernel_rows = []
    for detector, raws in _by_detector(lit).items() if brighter_fatter else ():
        try:
            found = measure_brighter_fatter(raws, masters.get(detector))
        except UnprocessableDataError as error:
            refused.append(_refusal(raws[0].path, error))
            continue
        kernels[detector] = found.kernel
        kernel_rows.append(_kernel_numbers(detector, found))
        _save_master(
            Calibrations(brighter_fatter=found.kernel),
            out / f"master_brighter_fatter_{detector:03d}.fits",
            raws,
        )
    for raw in lit:
        groups[raw.metadata.detector_id, raw.metadata.filter].append(raw)
    for (detector, name), raws in groups.items():
        try:
            made = combine_flat(raws, masters.get(detector))
            axis = dispersion_axis(made)
            if axis is not None:
                level = _lamp_level(raws, masters.get(detector), made)
                made = take_out_lamp(
                    made, axis, level, [a.detector_box.slices for a in raws[0].detector.amplifiers]
                )
        except UnprocessableDataError as error:
            refused += [_refusal(raw.path, error) for raw in raws]
            continue
        flats[detector, name] = made
        if axis is not None:
            spectra.add((detector, name))
        flat_rows.append(_flat_numbers(raws, made, name) | {"dispersed_along": axis})
        _save_master(Calibrations(flat=made), out / f"master_flat_{detector:03d}_{_word(name)}.fits", raws)
    frames = []
    for path in science:
        try:
            row = _one(path, out, instrument, masters, flats, spectra, kernels)
        except CumbreError as error:
            refused.append(_refusal(path, error))
            row = refused[-1]
        else:
            frames.append(row)
        if progress is not None:
            progress(row)
    report = {
        "instrument": instrument.name, "bias": bias_rows, "flats": flat_rows, "frames": frames,
        "brighter_fatter": kernel_rows,
        "refused": refused, "seconds": round(time.monotonic() - started, 2),
    }  # fmt: skip
    from cumbre.stores.files import write_atomic

    write_atomic(out / "report.json", json.dumps(report, indent=2, allow_nan=False).encode())
    return report


def _one(
    path: Path,
    out: Path,
    instrument: Instrument,
    masters: dict[int, NDArray[np.float32]],
    flats: dict[tuple[int, str], NDArray[np.float32]],
    spectra: set[tuple[int, str]],
    kernels: dict[int, NDArray[np.float32]],
) -> dict[str, Any]:
    """One science frame: ISR, stars where there are any, files, numbers."""
    raw = read_raw(path, instrument)
    detector, name = raw.metadata.detector_id, raw.metadata.filter
    flat = flats.get((detector, name))
    if flats and flat is None:
        known = ", ".join(sorted({f"{n} (detector {d})" for d, n in flats}))
        raise UnprocessableDataError(
            f"{path}: no flat in filter {name!r} of detector {detector}; the flats given are in {known}"
        )
    part = Calibrations(bias=masters.get(detector), flat=flat, brighter_fatter=kernels.get(detector))
    exposure = assemble_and_correct(raw, part)
    if flat is not None:
        dark = ~(flat > VIGNETTED_BELOW)
        exposure.mask[dark] |= np.uint16(MaskPlane.VIGNETTED)
    outcome, message = "ok", ""
    result = exposure
    try:
        if (detector, name) in spectra:
            raise NoWorkFoundError("the flat shows a dispersed lamp: a spectrum has no stars to measure")
        # Vignetted pixels take no part in the measurement but are no defects: they keep their own flag in the file.
        hidden = exposure.mask.copy()
        hidden[(hidden & MaskPlane.VIGNETTED) > 0] |= np.uint16(MaskPlane.EDGE)
        result = _with_stars(replace(exposure, mask=hidden), instrument)
    except NoWorkFoundError as error:
        outcome, message = error.outcome, str(error)
    stem = _stem(path)
    save_exposure(result, out / f"{stem}.calibrated.fits")
    stars = result.metadata.get("stars")
    if stars is not None:
        _write_stars(stars, out / f"{stem}.stars.csv")
    row = _frame_numbers(path, raw, exposure, result)
    row |= {
        "outcome": outcome,
        "message": message,
        "image": f"{stem}.calibrated.fits",
        "picture": f"{stem}.png",
    }
    _picture(raw, result, row, out / f"{stem}.png")
    return row


def _with_stars(exposure: Exposure, instrument: Instrument) -> Exposure:
    """Sky, stars, PSF.

    Raises
    ------
    NoWorkFoundError
        Too few clean stars for a PSF.
    """
    result = calibrate(exposure, None, instrument=instrument)
    count = int(result.metrics.get("n_stars", 0))
    if count < MIN_STARS:
        raise NoWorkFoundError(
            f"{count} clean stars; at least {MIN_STARS} are needed for a PSF, so the sky was left in too"
        )
    return result


def dispersion_axis(flat: NDArray[np.float32]) -> str | None:
    """``x`` or ``y`` when a flat is the spectrum of its lamp, None when it is an image.

    The light of an imaging flat does not change by a factor of three over the inner 80 % of an axis.
    """
    ny, nx = flat.shape
    middle = flat[ny // 4 : ny - ny // 4, nx // 10 : nx - nx // 10]
    along_x = np.median(middle, axis=0)
    middle = flat[ny // 10 : ny - ny // 10, nx // 4 : nx - nx // 4]
    along_y = np.median(middle, axis=1)
    for name, profile in (("x", along_x), ("y", along_y)):
        low, high = np.percentile(profile, [5, 95])
        if high > 3 * max(float(low), 0.0):
            return name
    return None


def _lamp_level(
    raws: Sequence[RawDetector], bias: NDArray[np.float32] | None, flat: NDArray[np.float32]
) -> float:
    """Electrons in one frame where the flat is 1, times the number of frames."""
    image = detector_planes(raws[0], Calibrations(bias=bias))[0]
    lit = flat > 0.5
    return float(np.median(image[lit] / flat[lit])) * len(raws)


def take_out_lamp(
    flat: NDArray[np.float32], axis: str, level: float, amplifiers: Sequence[tuple[slice, slice]]
) -> NDArray[np.float32]:
    """A spectrograph's flat without the spectrum of its lamp.

    The lamp is a smooth curve (Legendre polynomial of the logarithm) along the dispersion, with one step an
    amplifier: the steps are differences of gain, and stay in the flat.

    Parameters
    ----------
    flat
        (ny, nx), response times lamp.
    axis
        ``x`` or ``y``, the direction of the dispersion.
    level
        Electrons where ``flat`` is 1; where the lamp gives less than ``LAMP_FLOOR`` the result is 1.
    amplifiers
        Slices of the amplifiers in the flat.
    """
    work = flat if axis == "x" else flat.T
    boxes = [(rows, columns) if axis == "x" else (columns, rows) for rows, columns in amplifiers]
    nx = work.shape[1]
    slit = np.median(work, axis=1)
    lit = slit > 0.5 * np.percentile(slit, 90)
    profile = np.median(work[lit], axis=0)
    member = np.zeros((len(boxes), nx))
    for k, (_, columns) in enumerate(boxes):
        member[k, columns] = 1
    member = np.unique(member, axis=0)
    at = np.linspace(-1, 1, nx)
    use = profile * level > LAMP_FLOOR / 4
    if use.sum() < 50:
        raise UnprocessableDataError("flat: hardly any light of the lamp along the dispersion")
    smooth = np.polynomial.legendre.legvander(at, 11)
    terms = np.column_stack([smooth, member[1:].T]) if len(member) > 1 else smooth
    logarithm = np.log(np.maximum(profile, 1e-9))
    for _ in range(4):
        solution, *_ = np.linalg.lstsq(terms[use], logarithm[use], rcond=None)
        rest = logarithm - terms @ solution
        spread = 1.4826 * float(np.median(np.abs(rest[use]))) + 1e-4
        use &= np.abs(rest) < 6 * spread
    lamp = np.exp(smooth @ solution[: smooth.shape[1]])
    out = work / np.maximum(lamp, 1e-9).astype(np.float32)
    out = out / np.float32(np.median(out[lit][:, use]))
    dim = profile * level < LAMP_FLOOR
    out[:, dim] = np.where(lit[:, None], 1.0, 0.0) if dim.any() else out[:, dim]
    result = out if axis == "x" else out.T
    return np.ascontiguousarray(result, np.float32)


def _read_all(
    paths: Sequence[Path], instrument: Instrument, refused: list[dict[str, str]]
) -> list[RawDetector]:
    out = []
    for path in paths:
        try:
            out.append(read_raw(path, instrument))
        except CumbreError as error:
            refused.append(_refusal(path, error))
    return out


def _refusal(path: Path | str, error: CumbreError) -> dict[str, str]:
    return {"file": Path(path).name, "outcome": error.outcome, "message": str(error)}


def _by_detector(raws: Sequence[RawDetector]) -> dict[int, list[RawDetector]]:
    out: dict[int, list[RawDetector]] = defaultdict(list)
    for raw in raws:
        out[raw.metadata.detector_id].append(raw)
    return dict(out)


def _word(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name) or "none"


def _stem(path: Path) -> str:
    """The file's name without its endings."""
    return path.name.split(".")[0] or path.name


def _bias_level(raw: RawDetector) -> list[float]:
    """Median of each amplifier's overscan, or of its pixels when it has none, ADU."""
    out = []
    for amplifier, array in zip(raw.detector.amplifiers, raw.amplifiers, strict=True):
        out.append(float(np.median(array[(amplifier.overscan_box or amplifier.raw_box).slices])))
    return out


def _bias_numbers(raws: Sequence[RawDetector], master: NDArray[np.float32]) -> dict[str, Any]:
    """Levels and read noise; the noise needs two frames, whose fixed pattern cancels in the difference."""
    row: dict[str, Any] = {
        "detector": raws[0].metadata.detector_id,
        "files": [Path(raw.path).name for raw in raws],
        "level_adu": np.median([_bias_level(raw) for raw in raws], axis=0).round(2).tolist(),
        "pattern_adu": round(float(np.std(master - np.median(master))), 3),
        "read_noise_adu": None,
        "read_noise_electrons": None,
    }
    if len(raws) > 1:
        first, second = (detector_planes(raw, in_adu=True)[0] for raw in raws[:2])
        noise, gains = [], []
        for amplifier in raws[0].detector.amplifiers:
            part = (first - second)[amplifier.detector_box.slices]
            low, high = np.percentile(part, [15.8655, 84.1345])
            # whole ADU make percentiles coarse: the clipped rms of what lies within 5 of these sigma
            centre, spread = float(np.median(part)), max(float(high - low) / 2, 1.0)
            kept = part[np.abs(part - centre) < 5 * spread]
            noise.append(float(kept.std()) / math.sqrt(2))
            gains.append(amplifier.gain)
        row["read_noise_adu"] = [round(value, 3) for value in noise]
        row["read_noise_electrons"] = [round(v * g, 3) for v, g in zip(noise, gains, strict=True)]
    return row


def _flat_numbers(raws: Sequence[RawDetector], made: NDArray[np.float32], name: str) -> dict[str, Any]:
    return {
        "detector": raws[0].metadata.detector_id, "filter": name, "files": [Path(raw.path).name for raw in raws],
        "level_adu": round(float(np.median([np.median(raw.amplifiers[0]) for raw in raws])), 1),
        "vignetted_fraction": round(float(np.mean(~(made > VIGNETTED_BELOW))), 4),
    }  # fmt: skip


def _kernel_numbers(detector: int, found: BrighterFatter) -> dict[str, Any]:
    return {
        "detector": detector, "pairs": found.n_pairs, "levels_electrons": [round(float(v), 1) for v in found.levels],
        "neighbour_covariance": float(f"{found.neighbour:.4g}"),
        "neighbour_covariance_err": float(f"{found.neighbour_err:.2g}"),
    }  # fmt: skip


def _save_master(part: Calibrations, path: Path, raws: Sequence[RawDetector]) -> None:
    first = raws[0].metadata
    about = {
        "instrume": first.instrument,
        "detector": first.detector_id,
        "filter": first.filter,
        "nframes": len(raws),
    }
    replace(part, metadata=about).save(path)


def _number(value: Any, digits: int = 3) -> float | None:
    number = float(value) if value is not None else math.nan
    return round(number, digits) if math.isfinite(number) else None


def _frame_numbers(path: Path, raw: RawDetector, exposure: Exposure, result: Exposure) -> dict[str, Any]:
    metrics = result.metrics
    usable = (exposure.mask & (MaskPlane.unusable() | MaskPlane.VIGNETTED)) == 0
    sky = float(np.median(exposure.image[usable])) if usable.any() else math.nan
    return {
        "file": path.name, "obs_id": raw.metadata.obs_id, "object": raw.metadata.object,
        "image_type": raw.metadata.image_type, "filter": raw.metadata.filter, "exposure_s": raw.metadata.exposure_s,
        "sky_electrons": _number(metrics.get("sky_electrons", sky), 2),
        "sky_noise_electrons": _number(metrics.get("sky_noise_electrons"), 2),
        "psf_fwhm_px": _number(metrics.get("psf_fwhm_px")),
        "seeing_arcsec": _number(metrics.get("seeing_arcsec")),
        "n_stars": int(metrics.get("n_stars", 0)), "n_detections": int(metrics.get("n_detections", 0)),
        "cosmic_ray_pixels": int(metrics.get("cosmic_ray_pixels", 0)),
        "saturated_pixels": int(exposure.metrics.get("saturated_pixels", 0)),
        "vignetted_fraction": _number(np.mean((exposure.mask & MaskPlane.VIGNETTED) > 0), 4),
        "problems": list(raw.metadata.problems),
    }  # fmt: skip


def _write_stars(stars: NDArray[np.void], path: Path) -> None:
    """Detected sources: 0-based pixels, electrons."""
    from cumbre.stores.files import write_atomic

    names = ("x", "y", "flux", "flux_err", "snr", "half_light_px", "bits", "isolated", "is_psf_star")
    lines = [",".join(names)]
    for star in stars:
        values = [f"{float(star[n]):.6g}" for n in names[:6]] + [str(int(star[n])) for n in names[6:]]
        lines.append(",".join(values))
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def _picture(raw: RawDetector, result: Exposure, row: dict[str, Any], path: Path) -> None:
    """Before and after, side by side."""
    from cumbre.payloads.pictures import DOUBT, new_figure, save_png, show

    before = np.zeros(raw.detector.shape, np.float32)
    for amplifier, array in zip(raw.detector.amplifiers, raw.amplifiers, strict=True):
        part = array[amplifier.raw_box.slices]
        part = part[:: -1 if amplifier.flip_y else 1, :: -1 if amplifier.flip_x else 1]
        before[amplifier.detector_box.slices] = part
    hidden = (result.mask & (MaskPlane.VIGNETTED | MaskPlane.NO_DATA)) > 0
    after = np.where(hidden, np.nan, result.image)
    ny, nx = before.shape
    wide = nx > 2 * ny
    figure = new_figure(8.4, 4.6 if wide else 4.5)
    rows, columns = (2, 1) if wide else (1, 2)
    longest = 640 if wide else 330
    left, right = figure.add_subplot(rows, columns, 1), figure.add_subplot(rows, columns, 2)
    show(left, before, f"{_stem(path)}: raw [ADU]", longest=longest)
    fwhm = row["psf_fwhm_px"]
    words = f"{row['n_stars']} PSF stars, FWHM {fwhm:.2f} px" if fwhm is not None else "no stars"
    show(right, after, f"calibrated [electrons], {words}", longest=longest)
    stars = result.metadata.get("stars")
    if stars is not None:
        picked = stars[stars["is_psf_star"]]
        right.scatter(picked["x"], picked["y"], s=26, facecolors="none", edgecolors=DOUBT, linewidths=0.6)
    save_png(figure, path)
