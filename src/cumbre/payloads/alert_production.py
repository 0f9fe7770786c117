"""Prompt processing of one detector image: raw file in; sources, objects, forced photometry and alerts out.

A function of its arguments: it reads no database, publishes nothing and writes no image, so that it runs in any worker
and gives the same answer when it is run again. Alerts leave first: whoever keeps the images of ``DetectorResult`` writes
them after the packets have been handed over.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.core.errors import NoWorkFoundError, UnprocessableDataError
from cumbre.core.ids import COUNTER_BITS
from cumbre.core.time import Clock, mjd_from_seconds
from cumbre.payloads.alert_records import SourceContext, alert, dia_source, stamps_of
from cumbre.payloads.association import associate, summarise_object
from cumbre.payloads.difference import DifferenceConfig
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.forced import difference_psf, force
from cumbre.payloads.kernels.planes import has_no_variance
from cumbre.payloads.kernels.psf import PsfModel
from cumbre.payloads.kernels.warp import warp_between
from cumbre.payloads.plausibility import ELONGATED, check_same_sky, ellipticity
from cumbre.payloads.processing import DifferenceResult, process_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from cumbre.core.instrument import Instrument
    from cumbre.payloads.calibration import Calibrations
    from cumbre.payloads.injection import InjectionConfig
    from cumbre.payloads.raw import RawDetector
    from cumbre.payloads.refcat import RefCat
    from cumbre.payloads.solar_system.attribution import KnownObjects

ASSOCIATION_RADIUS_ARCSEC = 1.0


@dataclass(slots=True)
class DetectorResult:
    """What one detector image gave; every list holds rows with the column names of Level 1.

    Attributes
    ----------
    dia_sources, dia_objects, forced
        Rows of DiaSource, of DiaObject (new and updated, whole), and of DiaForcedSource.
    alerts
        Packets (schema v11.1) as records, most significant first.
    quality
        Fields of ``Prompt.visitQuality``; what is not known is absent.
    warnings
        What was left out of the lists, in words; empty for an image that was done in full.
    ss_sources
        Rows of SSSource: the sources that are known solar-system objects.
    wall_s
        Seconds by step.
    injected
        The fakes that were planted, with ``found``; None when none were asked for. Their sources are in none of the
        lists above.
    """

    dia_sources: list[dict[str, Any]]
    dia_objects: list[dict[str, Any]]
    forced: list[dict[str, Any]]
    alerts: list[dict[str, Any]]
    quality: dict[str, Any]
    exposure: Exposure
    result: DifferenceResult
    wall_s: dict[str, float] = field(default_factory=dict)
    injected: list[dict[str, Any]] | None = None
    warnings: list[str] = field(default_factory=list)
    ss_sources: list[dict[str, Any]] = field(default_factory=list)


def warm_up() -> None:
    """Compile and import everything on a small artificial pair, so that the first real image does not wait."""
    from cumbre.payloads import calibrate, isr, raw, snaps  # noqa: F401 (their compilation is part of the warm-up)
    from cumbre.payloads.kernels.wcs import PlaneWcs

    rng = np.random.default_rng(1)
    ny = nx = 256
    yy, xx = np.mgrid[:ny, :nx].astype(np.float32)
    sky = np.zeros((ny, nx), dtype=np.float32)
    for x, y in rng.uniform(30, 226, (25, 2)):
        sky += (4000 * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * 1.7**2))).astype(np.float32)
    wcs = PlaneWcs.linear(10.0, -30.0, 128.0, 128.0, np.array([[-2e-4, 0], [0, 2e-4]]))
    pair = []
    for _ in range(2):
        image = (sky + rng.normal(0, 5, (ny, nx))).astype(np.float32)
        pair.append(
            Exposure(
                image=image,
                variance=np.full((ny, nx), 25, np.float32),
                mask=np.zeros((ny, nx), np.uint16),
                wcs=wcs,
                is_background_subtracted=True,
                metadata={"exposure_id": 1, "detector": 0, "mjd_mid_tai": 60000.0},
            )
        )
    yy, xx = yy - 101, xx - 61
    spot = (2e4 / (2 * np.pi * 1.7**2) * np.exp(-(xx**2 + yy**2) / (2 * 1.7**2))).astype(np.float32)
    pair[0].image += spot
    # two lobes, and a bar of light
    pair[0].image += np.roll(spot, (90, 90), (0, 1)) - np.roll(spot, (90, 93), (0, 1))
    for shift in range(10):
        pair[0].image += np.roll(spot, (60, shift - 40), (0, 1)) / 5
    made = produce(pair[0], None, pair[1], None)
    if made.dia_objects:
        # history as a database gives it: its encoding is compiled too
        import pyarrow as pa

        rows = {"DiaObject": made.dia_objects, "DiaSource": made.dia_sources, "DiaForcedSource": made.forced}
        history = {name: pa.Table.from_pylist(listed) for name, listed in rows.items()}
        produce(pair[0], None, pair[1], None, history=history)


def produce(
    image: RawDetector | Exposure | str | Path | Sequence[RawDetector | str | Path],
    calibrations: Calibrations | None,
    template: Exposure,
    reference: RefCat | None,
    *,
    instrument: Instrument | None = None,
    history: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    processed_mjd_tai: float | None = None,
    config: DifferenceConfig | None = None,
    inject: InjectionConfig | None = None,
    solar_system: Callable[[float], KnownObjects | None] | None = None,
) -> DetectorResult:
    """Process one detector image.

    Parameters
    ----------
    image
        A raw read-out, the path of one, several of them (the snaps of a visit), or an exposure that is calibrated
        already.
    calibrations, reference
        For raw images: bias, flat, …; reference stars for WCS and zero point.
    template
        Calibrated template with its own WCS; warped onto the image.
    instrument
        Needed for raw images.
    history
        ``DiaObject``, ``DiaSource``, ``DiaForcedSource`` around the image (Arrow tables or lists of rows), as
        ``Level1.load_region`` gives them; None for no history. A function is called when the sources are measured,
        so that what other detectors stored meanwhile is there too.
    processed_mjd_tai
        Time of processing; now when not given.
    config
        Threshold and kernel; sources below ``config.reliable`` are stored, but neither sent nor made new objects.
    inject
        Fakes to plant in the calibrated image. Sources and forced photometry on their pixels are left out of every
        list: nothing of a fake is stored or sent.
    solar_system
        Gives the known objects in and around the image at a moment (MJD TAI). Sources that are one of them get its
        ``ssObjectId`` and neither find nor found a DiaObject.

    Raises
    ------
    NoWorkFoundError
        No template coverage, or too few stars.
    UnprocessableDataError
        The image cannot be used, or it does not show the template's sky.
    """
    config = config or DifferenceConfig()
    wall: dict[str, float] = {}
    begun = time.monotonic()
    exposure = _calibrated(image, calibrations, reference, instrument)
    fakes = None
    if inject is not None:
        exposure, fakes = _with_fakes(exposure, inject)
    begun = _lap(wall, "calibrate", begun)
    result = process_pair(exposure, warp_template(template, exposure), config)
    changed_part = check_same_sky(exposure, result.exposure, difference_psf(result))
    if changed_part is not None:
        result.metrics["changed_stars"] = changed_part
    begun = _lap(wall, "difference", begun)
    processed = mjd_from_seconds(Clock.real().now_tai_s()) if processed_mjd_tai is None else processed_mjd_tai
    context = _context(exposure, processed, result.reliability_version)
    sources = [
        dia_source(row, context, counter)
        for counter, row in enumerate(result.sources[: (1 << COUNTER_BITS) - 1], start=1)
        if math.isfinite(row["ra"])
        and math.isfinite(row["dec"])
        and not row["pixelFlagsCentre"] & MaskPlane.INJECTED
    ]
    known = (history() if callable(history) else history) or {}
    known_objects = _rows(known.get("DiaObject"))
    moving = _moving(sources, solar_system, context.midpoint_mjd_tai)
    fixed = [source for source in sources if source["ssObjectId"] is None]
    objects, new_objects = _associate(fixed, known_objects, config.reliable)
    forced = force(result, context, [*known_objects, *new_objects])
    past = {name: _rows_of(known.get(name), objects) for name in ("DiaSource", "DiaForcedSource")}
    changed = _summaries(sources, objects, past, forced, processed)
    begun = _lap(wall, "associate", begun)
    alerts = _alerts(result, context, sources, changed, known, config.reliable, moving)
    _lap(wall, "alerts", begun)
    return DetectorResult(
        sources,
        list(changed.values()),
        forced,
        alerts,
        _quality(exposure, result, context),
        exposure,
        result,
        wall,
        None if fakes is None else _injected(fakes, result, config.reliable),
        _warnings(exposure, result, config),
        [row for row, _ in moving.values()],
    )


Moving = dict[int, tuple[dict[str, Any], "Mapping[str, Any] | None"]]
"""diaSourceId → its SSSource row and the object's row of mpc_orbits."""


def _moving(
    sources: list[dict[str, Any]], solar_system: Callable[[float], KnownObjects | None] | None, mjd_tai: float
) -> Moving:
    """Find the known objects of the solar system among the sources."""
    known = solar_system(mjd_tai) if solar_system is not None else None
    if known is None:
        return {}
    from cumbre.payloads.solar_system.attribution import attribute, named

    rows = attribute(sources, known)
    orbits = known.orbits({row["ssObjectId"] for row in rows}) if rows else {}
    named(rows, orbits)
    return {row["diaSourceId"]: (row, orbits.get(row["ssObjectId"])) for row in rows}


def _warnings(exposure: Exposure, result: DifferenceResult, config: DifferenceConfig) -> list[str]:
    """What an operator should know about a result that is not whole."""
    told = []
    peaks = int(result.metrics["n_peaks"])
    if peaks > config.max_sources:
        text = f"{peaks} detections, only the {config.max_sources} most significant were measured"
        told.append(f"{text}: the subtraction failed, or the field is full of artefacts")
    given, used = exposure.metadata.get("n_snaps_given", 1), exposure.metadata.get("n_snaps", 1)
    if given > used:
        told.append(f"{given} exposures that do not show the same sky: only the first was used")
    if isinstance(exposure.psf, PsfModel) and (shape := ellipticity(exposure.psf)) > ELONGATED:
        told.append(f"stars are elongated (ellipticity {shape:.2f}): the telescope did not follow the sky")
    return told


def _with_fakes(exposure: Exposure, inject: InjectionConfig) -> tuple[Exposure, NDArray[np.void]]:
    """Plant fakes that depend on visit and detector only, so that a second try plants the same."""
    from cumbre.payloads.injection import plan, plant, seed_of

    rng = seed_of("fakes", exposure.metadata.get("exposure_id"), exposure.metadata.get("detector"))
    fakes = plan(exposure, rng, inject)
    return plant(exposure, fakes, rng), fakes


def _injected(fakes: NDArray[np.void], result: DifferenceResult, reliable: float) -> list[dict[str, Any]]:
    """One row a fake: what it was and whether it was found."""
    from cumbre.payloads.injection import recovered

    radius = max(1.5, 0.6 * result.difference.science_psf.fwhm_px)
    found = recovered(fakes, result.sources, reliable=reliable, radius_px=radius)
    names = fakes.dtype.names or ()
    return [
        {name: fake[name].item() for name in names} | {"found": bool(hit)}
        for fake, hit in zip(fakes, found, strict=True)
    ]


def _lap(wall: dict[str, float], name: str, begun: float) -> float:
    now = time.monotonic()
    wall[name] = round(now - begun, 4)
    return now


def _calibrated(
    image: RawDetector | Exposure | str | Path | Sequence[RawDetector | str | Path],
    calibrations: Calibrations | None,
    reference: RefCat | None,
    instrument: Instrument | None,
) -> Exposure:
    if isinstance(image, Exposure):
        return image
    if instrument is None:
        raise UnprocessableDataError("a raw image needs its instrument description")
    from cumbre.payloads.isr import assemble_and_correct
    from cumbre.payloads.raw import RawDetector, read_raw
    from cumbre.payloads.snaps import calibrate_snaps

    given = [image] if isinstance(image, str | Path | RawDetector) else image
    raws = (read_raw(item, instrument) if isinstance(item, str | Path) else item for item in given)
    snaps = [assemble_and_correct(raw, calibrations) for raw in raws]
    return calibrate_snaps(snaps, reference, instrument=instrument)


def warp_template(template: Exposure, exposure: Exposure) -> Exposure:
    """The template on the exposure's pixels.

    Raises
    ------
    NoWorkFoundError
        One has no WCS, or the template does not reach the image.
    """
    if template.wcs is None or exposure.wcs is None:
        raise NoWorkFoundError("template and image need a WCS each to be brought together")
    image, variance, mask = template.image, template.variance, template.mask
    if has_no_variance(variance):
        good = np.isfinite(image) & (variance > 0)
        variance = np.where(good, variance, np.float32(1e20))
        mask = mask | np.where(good, 0, MaskPlane.NO_DATA).astype(np.uint16)
    warped = warp_between(image, variance, mask, template.wcs, exposure.wcs, exposure.shape)  # type: ignore[arg-type]
    if np.count_nonzero(warped[2] & MaskPlane.NO_DATA) > 0.98 * warped[2].size:
        raise NoWorkFoundError("the template does not cover the image")
    # Its PSF model belongs to the other grid (turned, shifted): it is measured again on the warped stars.
    return replace(
        template, image=warped[0], variance=warped[1], mask=warped[2], wcs=exposure.wcs, psf=None, background=None,
        is_background_subtracted=True,
    )  # fmt: skip


def _context(exposure: Exposure, processed: float, version: str) -> SourceContext:
    meta = exposure.metadata
    try:
        visit, detector, middle = int(meta["exposure_id"]), int(meta["detector"]), float(meta["mjd_mid_tai"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnprocessableDataError(
            f"exposure metadata: exposure_id, detector, mjd_mid_tai are needed: {error}"
        ) from error
    scale = exposure.njy_per_electron() if math.isfinite(exposure.zero_point) else 1.0
    return SourceContext(
        visit=visit, detector=detector, band=str(meta.get("band") or ""), midpoint_mjd_tai=middle,
        exposure_s=float(meta.get("exposure_s") or math.nan), processed_mjd_tai=processed, flux_scale=scale,
        reliability_version=version,
    )  # fmt: skip


def _rows(table: Any) -> list[dict[str, Any]]:
    if table is None:
        return []
    return list(table.to_pylist()) if hasattr(table, "to_pylist") else [dict(row) for row in table]


def _rows_of(table: Any, identifiers: Collection[int]) -> Any:
    """The part of a history that belongs to some objects: a region holds many more."""
    if table is None:
        return []
    if not hasattr(table, "to_pylist"):
        return [row for row in table if row.get("diaObjectId") in identifiers]
    if not table.num_rows:
        return table
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column("diaObjectId")
    return table.filter(pc.is_in(column, value_set=pa.array(sorted(identifiers), column.type)))


def _associate(
    sources: list[dict[str, Any]], known: list[dict[str, Any]], reliable: float
) -> tuple[dict[int, dict[str, Any] | None], list[dict[str, Any]]]:
    """Give every source its object; reliable ones without one found a new object.

    Returns
    -------
    Object id → its row so far (None for a new one), and the new objects' first positions.
    """
    index, _ = associate(
        [s["ra"] for s in sources], [s["dec"] for s in sources], [o["ra"] for o in known], [o["dec"] for o in known],
        radius_arcsec=ASSOCIATION_RADIUS_ARCSEC,
    )  # fmt: skip
    touched: dict[int, dict[str, Any] | None] = {}
    new: list[dict[str, Any]] = []
    for source, at in zip(sources, index.tolist(), strict=True):
        is_reliable = (source["reliability"] or 0.0) >= reliable
        if at >= 0:
            source["diaObjectId"] = known[at]["diaObjectId"]
            if is_reliable:
                touched[int(known[at]["diaObjectId"])] = known[at]
        elif is_reliable:
            source["diaObjectId"] = source["diaSourceId"]
            touched[source["diaSourceId"]] = None
            new.append({"diaObjectId": source["diaSourceId"], "ra": source["ra"], "dec": source["dec"]})
    return touched, new


def force_at(
    made: DetectorResult, objects: Sequence[Mapping[str, Any]], *, processed_mjd_tai: float, first: int = 1
) -> list[dict[str, Any]]:
    """Forced photometry on an image that was processed before, at the places of objects found later.

    Parameters
    ----------
    made
        Of the image, processed again as then.
    objects
        With ``diaObjectId``, ``ra``, ``dec``; those off the image get no row.
    first
        Number of the first row in the detector image: its earlier rows keep theirs.

    Returns
    -------
    Rows of DiaForcedSource.
    """
    context = _context(made.exposure, processed_mjd_tai, made.result.reliability_version)
    return force(made.result, context, objects, first=first)


def _by_object(rows: Any) -> dict[int, list[dict[str, Any]]]:
    out: dict[int, list[dict[str, Any]]] = {}
    for row in _rows(rows):
        if row.get("diaObjectId") is not None:
            out.setdefault(int(row["diaObjectId"]), []).append(row)
    return out


def _summaries(
    sources: list[dict[str, Any]],
    touched: dict[int, dict[str, Any] | None],
    past: dict[str, Any],
    forced: list[dict[str, Any]],
    processed: float,
) -> dict[int, dict[str, Any]]:
    """New whole rows of the objects that got a reliable source."""
    old, new = _by_object(past["DiaSource"]), _by_object(sources)
    old_forced, new_forced = _by_object(past["DiaForcedSource"]), _by_object(forced)
    return {
        identifier: summarise_object(
            identifier,
            [*old.get(identifier, []), *new[identifier]],
            [*old_forced.get(identifier, []), *new_forced.get(identifier, [])],
            valid_from_mjd_tai=processed,
            before=before,
        )
        for identifier, before in touched.items()
    }


def _alerts(
    result: DifferenceResult,
    context: SourceContext,
    sources: list[dict[str, Any]],
    objects: dict[int, dict[str, Any]],
    past: Mapping[str, Any],
    reliable: float,
    moving: Moving,
) -> list[dict[str, Any]]:
    """Packets of the reliable sources with 12 months of history and three stamps."""
    old = _history("diaSource", _rows_of(past.get("DiaSource"), objects))
    old_forced = _history("diaForcedSource", _rows_of(past.get("DiaForcedSource"), objects))
    has_zero_point = math.isfinite(result.exposure.zero_point)
    out = []
    for source in sources:
        if (source["reliability"] or 0.0) < reliable:
            continue
        identifier = source["diaObjectId"]
        stamps = stamps_of(
            result,
            source["x"],
            source["y"],
            unit="nJy" if has_zero_point else "adu",
            scale=context.flux_scale,
        )
        out.append(
            alert(
                source,
                dia_object=objects.get(identifier),
                previous=old.get(identifier) or None,
                forced=old_forced.get(identifier) or None,
                stamps=stamps,
                ss_source=moving.get(source["diaSourceId"], (None, None))[0],
                mpc_orbits=moving.get(source["diaSourceId"], (None, None))[1],
            )
        )
    return out


def _history(record: str, rows: Any) -> dict[int, Any]:
    """History by object: encoded already where it comes as an Arrow table, else rows of the packet's columns."""
    if hasattr(rows, "to_pylist"):
        from cumbre.alerts.encode import by_object

        return dict(by_object(record, rows))
    return {
        identifier: [{k: v for k, v in row.items() if k != "hpx29"} for row in listed]
        for identifier, listed in _by_object(rows).items()
    }


def exposure_quality(exposure: Exposure, exposure_s: float) -> dict[str, float]:
    """What calibration measured, by the names of ``Prompt.visitQuality``; what is not known is absent."""
    metrics = exposure.metrics
    zero_point = exposure.zero_point
    if exposure_s > 0:
        zero_point -= 2.5 * math.log10(exposure_s)
    numbers = {
        "seeing": metrics.get("seeing_arcsec"),
        "zeroPoint": zero_point,
        "zeroPointErr": exposure.zero_point_err,
        "colourTerm": metrics.get("colour_term"),
        "colourTermErr": metrics.get("colour_term_err"),
        "skyLevel": metrics.get("sky_electrons"),
        "skyNoise": metrics.get("sky_noise_electrons"),
        "nStars": metrics.get("n_stars"),
        "astrometricRms": metrics.get("astrometric_rms_arcsec"),
        "maskedFraction": np.count_nonzero(exposure.mask & MaskPlane.unusable()) / exposure.mask.size,
        "psfEllipticity": ellipticity(exposure.psf) if isinstance(exposure.psf, PsfModel) else None,
        "limitingMagnitude": metrics.get("m5"),
    }
    return {k: float(v) for k, v in numbers.items() if v is not None and math.isfinite(float(v))}


def _quality(exposure: Exposure, result: DifferenceResult, context: SourceContext) -> dict[str, Any]:
    out: dict[str, Any] = {
        "visit": context.visit,
        "detector": context.detector,
        "band": context.band,
        **exposure_quality(exposure, context.exposure_s),
        "templateCoverage": float(result.metrics["template_coverage"]),
        "nSources": int(result.metrics["n_sources"]),
    }
    if "nStars" in out:
        out["nStars"] = int(out["nStars"])
    return out
