"""What a prompt worker does: prepare a detector of a visit; process its image; store the result once.

These functions take and give plain data, run in worker processes, and publish nothing: the service does.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.core.errors import (
    ConflictError,
    CumbreError,
    NotFoundError,
    NoWorkFoundError,
    UnprocessableDataError,
)
from cumbre.core.instrument import Detector, Instrument, load_instrument
from cumbre.core.time import Clock, mjd_from_seconds
from cumbre.orchestration.inputs import Field, InputLoader, Inputs, airmass_at, read_index
from cumbre.orchestration.provenance import write_record
from cumbre.orchestration.raw_images import local_image

if TYPE_CHECKING:
    from cumbre.catalogs.level1 import Level1
    from cumbre.orchestration.known_objects import KnownObjectLoader
    from cumbre.payloads.alert_production import DetectorResult
    from cumbre.payloads.exposure import Exposure
    from cumbre.payloads.raw import RawDetector
    from cumbre.payloads.solar_system.attribution import KnownObjects

MAX_PREPARED = 24
"""Prepared detectors that a worker remembers; reference stars are small, the rest is shared in the cache."""
INJECTED = "archive/injected"
"""Folder of a site with what became of planted sources, one file a detector image."""
log = logging.getLogger(__name__)
_prepared: OrderedDict[tuple[str, int], Inputs] = OrderedDict()


@lru_cache(maxsize=4)
def _loader(site: str) -> InputLoader:
    return InputLoader(Path(site))


@lru_cache(maxsize=4)
def _level1(dsn: str, site: str) -> Level1:
    from cumbre.catalogs.level1 import Level1
    from cumbre.stores.postgres import Database

    return Level1(Database(dsn, application="cumbre prompt worker"), Clock.load(Path(site) / "clock.json"))


@lru_cache(maxsize=4)
def _known_objects(dsn: str, site: str) -> KnownObjectLoader:
    from cumbre.orchestration.known_objects import KnownObjectLoader
    from cumbre.stores.postgres import Database

    return KnownObjectLoader(Path(site), Database(dsn, application="cumbre prompt worker"))


def warm_up(payload: dict[str, Any]) -> dict[str, Any]:
    """Import and compile what the first image would wait for."""
    from cumbre.payloads import alert_production
    from cumbre.payloads.solar_system import tables

    begun = time.monotonic()
    alert_production.warm_up()
    tables.warm_up()
    if payload.get("site"):
        try:
            _rehearse(Path(payload["site"]))
        except CumbreError as error:
            log.warning("warm-up on the site's own template: %s", error)
    return {"wall_s": time.monotonic() - begun}


def _rehearse(site: Path) -> None:
    """Run the payload on the site's first template and a noisy copy of it with new stars.

    A real field goes through branches that an artificial one does not; what is compiled there is compiled now.
    """
    import numpy as np

    from cumbre.payloads.alert_production import produce
    from cumbre.payloads.exposure_file import load_exposure

    index = site / "archive" / "templates" / "index.json"
    if not index.exists():
        return
    template = load_exposure(index.parent / read_index(index)[0]["path"])
    rng = np.random.default_rng(1)
    noise = np.sqrt(np.clip(np.nan_to_num(template.variance), 1.0, 1e8)).astype(np.float32)
    image = template.image + noise * rng.standard_normal(template.shape, dtype=np.float32)
    ny, nx = template.shape
    for y, x in rng.uniform(0.1, 0.9, (8, 2)) * (ny, nx):
        image[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2] += 100.0 * noise[int(y), int(x)]
    science = replace(
        template,
        image=image,
        variance=template.variance + noise**2,
        mask=template.mask.copy(),
        metadata=template.metadata | {"exposure_id": 1, "detector": 0, "mjd_mid_tai": 60000.0},
    )
    produce(science, None, template, None)


def preload(payload: dict[str, Any]) -> dict[str, Any]:
    """Hold ready everything but the image for one detector of an announced visit.

    Parameters
    ----------
    payload
        ``site``, ``dsn``, ``instrument``, ``visit`` (fields of an AnnouncedVisit), ``detector``.

    Returns
    -------
    dict
        ``note`` for the ledger and ``wall_s`` by part.
    """
    visit = payload["visit"]
    instrument = load_instrument(payload["instrument"])
    detector = instrument.detector(payload["detector"])
    field = Field.predict(instrument, detector, visit["ra"], visit["dec"], rotation=visit["rotation"])
    band = instrument.filter(visit["filter"]).band
    begin_tai = visit["start_tai"]
    airmass = airmass_at(Path(payload["site"]), begin_tai, visit["ra"], visit["dec"])
    inputs = _loader(payload["site"]).load(instrument, detector, field, band, airmass=airmass)
    _prepared[visit["group_id"], detector.id] = inputs
    while len(_prepared) > MAX_PREPARED:
        _prepared.popitem(last=False)
    # The history is read again with the image, when results stored meanwhile are there too; reading it now
    # opens the connection and brings the region's pages into the database's memory.
    begun = time.monotonic()
    region = _level1(payload["dsn"], payload["site"]).load_region(
        field.centre_ra, field.centre_dec, field.radius_deg
    )
    inputs.wall_s["history"] = round(time.monotonic() - begun, 4)
    begun = time.monotonic()
    _known_objects(payload["dsn"], payload["site"]).near(
        field.centre_ra, field.centre_dec, field.radius_deg, mjd_from_seconds(begin_tai)
    )
    inputs.wall_s["solar_system"] = round(time.monotonic() - begun, 4)
    return {"note": f"{inputs.describe()}, {region['DiaObject'].num_rows} objects", "wall_s": inputs.wall_s}


def process(payload: dict[str, Any]) -> dict[str, Any]:
    """From one detector's raw file to stored sources and alerts.

    Parameters
    ----------
    payload
        What :func:`preload` takes, with ``image`` (fields of a DetectorImage), ``snaps`` (further exposures of the
        visit), ``note`` and ``visit`` or None.

    Returns
    -------
    dict
        ``visit``, ``n_sources``, ``n_alerts``, ``quality`` (fields of Prompt.visitQuality), ``preload``.

    Raises
    ------
    NoWorkFoundError
        Not an exposure of the sky, no template, no stars.
    UnprocessableDataError
        The file or the image cannot be used.
    TransientError
        Database, file system or distributors are away.
    """
    with ExitStack() as files:
        local = files.enter_context(local_image(payload))
        snaps = [
            files.enter_context(local_image(payload | {"image": snap}))["image"]
            for snap in payload.get("snaps", ())
        ]
        return _process(local | {"snaps": snaps})


def _process(payload: dict[str, Any]) -> dict[str, Any]:
    begun = time.monotonic()
    image, visit = payload["image"], payload["visit"]
    instrument = load_instrument(payload["instrument"])
    detector = instrument.detector(image["detector"])
    level1 = _level1(payload["dsn"], payload["site"])
    if level1.is_stored(image["exposure_id"], detector.id):
        return {"message": "stored by an earlier try", "is_repeat": True}
    raw = _read(image, instrument, detector)
    # The number is that of the visit's first exposure, also where only a later one came.
    visit_id = raw.metadata.visit_id
    if visit_id != image["exposure_id"]:
        if level1.is_stored(visit_id, detector.id):
            return {"message": "its visit is stored without it", "visit": visit_id, "is_repeat": True}
        raw = replace(raw, metadata=replace(raw.metadata, exposure_id=visit_id))
    if raw.metadata.image_type.lower() not in ("", "science", "object"):
        raise NoWorkFoundError(f"{image['obs_id']} is a {raw.metadata.image_type} exposure")
    if not (_is_number(raw.metadata.ra_deg) and _is_number(raw.metadata.dec_deg)):
        raise UnprocessableDataError(
            f"{image['path']}: no position in the header (RA, DEC); calibrate it without the prompt pipeline"
        )
    field = Field.predict(
        instrument, detector, raw.metadata.ra_deg, raw.metadata.dec_deg, rotation=raw.metadata.rotpa_deg
    )
    band = raw.metadata.band
    inputs, is_late = _inputs(payload, visit, field, raw=raw)
    preloaded = {"note": inputs.describe(), "is_late": is_late}
    if inputs.template is None:
        raise NoWorkFoundError(
            f"no template in {band} for {detector.name} at {field.ra:.4f} {field.dec:+.4f}"
        )
    from cumbre.alerts.archive import rejections

    with ExitStack() as held:
        others, unread = _read_snaps(payload["snaps"], instrument, detector)
        raws = [raw, *others]
        made, packets = _produce(payload, raws, inputs, level1, held)
        rejected = rejections(
            made.dia_sources, (identifier for identifier, _ in packets), float(payload["reliability"])
        )
        if packets and not payload.get("publish_alerts", True):
            rejected, packets = rejected | {"late": len(packets)}, []
        try:
            level1.store(
                visit_id,
                detector.id,
                dia_sources=made.dia_sources,
                dia_objects=made.dia_objects,
                forced=made.forced,
                ss_sources=made.ss_sources,
                packets=packets,
                rejected=rejected,
            )
        except ConflictError:
            log.info("stored meanwhile by another try")
    if made.injected is not None:
        write_injected(Path(payload["site"]), visit_id, detector.id, band, made.injected)
    if inputs.files:
        try:
            write_record(Path(payload["site"]), raws=raws, inputs=inputs, made=made, payload=payload)
        except OSError as error:
            log.warning("how it was made is not recorded, its images cannot be made again: %s", error)
    wall = time.monotonic() - begun
    log.info("steps: %s", made.wall_s)
    for warning in made.warnings:
        log.warning("%s", warning)
    return {
        "visit": visit_id,
        "message": "; ".join(text for text in (payload.get("note", ""), *unread, *made.warnings) if text),
        "n_sources": len(made.dia_sources),
        "n_alerts": len(packets),
        "quality": _quality(made.quality, band, wall),
        "preload": preloaded,
        "wall_s": made.wall_s | {"all": round(wall, 4)},
    }


def correct(payload: dict[str, Any]) -> dict[str, Any]:
    """Instrument signature removal and quality numbers of one image of any type; nothing is stored or sent.

    Parameters
    ----------
    payload
        As of :func:`process`; ``work`` says which calibrations to apply and whether the PSF is measured.

    Returns
    -------
    dict
        ``message`` (what was left out) and ``quality`` (fields of Prompt.visitQuality).

    Raises
    ------
    UnprocessableDataError
        The file or the image cannot be used.
    """
    from cumbre.payloads.calibration import Calibrations
    from cumbre.payloads.isr import assemble_and_correct

    begun = time.monotonic()
    instrument = load_instrument(payload["instrument"])
    detector = instrument.detector(payload["image"]["detector"])
    with local_image(payload) as local:
        raw = _read(local["image"], instrument, detector)
    work, notes = payload["work"], [f"ISR only ({payload['work']['mode'] or 'no mode'})"]
    calibrations = Calibrations()
    if work["corrections"]:
        try:
            found = _loader(payload["site"]).calibrations(instrument, detector, raw.metadata.band)
            calibrations = Calibrations(**{name: getattr(found, name) for name in work["corrections"]})
        except NotFoundError:
            notes.append(f"no calibrations for {detector.name} in {raw.metadata.band or 'no band'}")
    exposure = assemble_and_correct(raw, calibrations)
    quality = _levels(exposure)
    if work["psf"]:
        try:
            quality |= _psf_numbers(exposure, instrument, detector)
        except UnprocessableDataError as error:
            notes.append(f"no PSF: {error}")
    wall = time.monotonic() - begun
    return {"message": "; ".join(notes), "quality": _quality(quality, raw.metadata.band, wall)}


def _levels(exposure: Exposure) -> dict[str, Any]:
    """Level and noise (electrons) of the usable pixels, and the part that is not usable."""
    import numpy as np

    from cumbre.payloads.exposure import MaskPlane

    masked = (exposure.mask & MaskPlane.unusable()) > 0
    good = exposure.image[~masked & np.isfinite(exposure.image)]
    level = float(np.median(good))
    noise = 1.4826 * float(np.median(np.abs(good - level)))
    return {"skyLevel": level, "skyNoise": noise, "maskedFraction": float(np.mean(masked))}


def _psf_numbers(exposure: Exposure, instrument: Instrument, detector: Detector) -> dict[str, Any]:
    """Width of the PSF and its stars.

    Raises
    ------
    UnprocessableDataError
        No stars, or none that could be used.
    """
    from cumbre.payloads.calibrate import calibrate

    metrics = calibrate(exposure, None, instrument=instrument).metrics
    return {
        "seeing": metrics["psf_fwhm_px"] * instrument.pixel_scale(detector),
        "nStars": metrics["n_stars"],
        "skyLevel": metrics["sky_electrons"],
        "skyNoise": metrics["sky_noise_electrons"],
    }


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _produce(
    payload: dict[str, Any], raws: list[RawDetector], inputs: Inputs, level1: Level1, held: ExitStack
) -> tuple[DetectorResult, list[tuple[int, bytes]]]:
    """Run the payload; (its result, the alerts as (diaSourceId, packet)).

    ``held`` keeps the region from the reading of its history until the result is stored.
    """
    from cumbre.alerts.packet import packet_bytes
    from cumbre.payloads.alert_production import produce
    from cumbre.payloads.difference import DifferenceConfig
    from cumbre.payloads.injection import InjectionConfig, is_chosen

    field, least = inputs.field, float(payload["reliability"])
    clock = Clock.load(Path(payload["site"]) / "clock.json")

    def history() -> dict[str, Any]:
        circle = (field.centre_ra, field.centre_dec, field.radius_deg)
        held.enter_context(level1.exclusive(*circle))
        return dict(level1.load_region(*circle))

    def solar_system(mjd_tai: float) -> KnownObjects | None:
        loader = _known_objects(payload["dsn"], payload["site"])
        return loader.near(field.centre_ra, field.centre_dec, field.radius_deg, mjd_tai)

    made = produce(
        raws,
        inputs.calibrations,
        inputs.template,
        inputs.reference,
        instrument=raws[0].instrument,
        history=history,
        processed_mjd_tai=mjd_from_seconds(clock.now_tai_s()),
        config=DifferenceConfig(
            threshold=float(payload["detection_sigma"]),
            reliable=least,
            method=payload.get("difference_method", "alard_lupton"),
        ),
        inject=InjectionConfig()
        if is_chosen(raws[0].metadata.exposure_id, float(payload.get("injection_fraction", 0.0)))
        else None,
        solar_system=solar_system,
    )
    trusted = [item for item in made.alerts if (item["diaSource"]["reliability"] or 0.0) >= least]
    return made, [(item["diaSourceId"], packet_bytes(item)) for item in trusted]


def write_injected(root: Path, visit: int, detector: int, band: str, rows: list[dict[str, Any]]) -> None:
    """Keep what became of the fakes of one detector image, for the night report."""
    from cumbre.stores.files import write_atomic

    path = root / INJECTED / f"{visit}_{detector}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"visit": visit, "detector": detector, "band": band, "fakes": rows}
    write_atomic(path, json.dumps(about).encode())


def _quality(measured: dict[str, Any], band: str, wall_s: float) -> dict[str, Any]:
    """Fields of Prompt.visitQuality from the payload's numbers."""
    out = {key: item for key, item in measured.items() if item is not None}
    out |= {"band": band, "durationS": wall_s}
    if "m5" in out:
        out["limitingMagnitude"] = out.pop("m5")
    for name in ("nStars", "nSources"):
        if name in out:
            out[name] = int(out[name])
    return out


def _read(image: dict[str, Any], instrument: Instrument, detector: Detector) -> RawDetector:
    from cumbre.payloads.raw import read_raw

    try:
        raw = read_raw(image["path"], instrument)
    except NotFoundError as error:
        raise UnprocessableDataError(f"{error}; the archive said it had it") from error
    if raw.detector.id != detector.id or raw.metadata.obs_id != image["obs_id"]:
        raise UnprocessableDataError(
            f"{image['path']}: holds {raw.metadata.obs_id} {raw.detector.name}, "
            f"expected {image['obs_id']} {detector.name}"
        )
    return raw


def _read_snaps(
    snaps: list[dict[str, Any]], instrument: Instrument, detector: Detector
) -> tuple[list[RawDetector], list[str]]:
    """Further exposures of the visit, and why some cannot be used: the visit is worth processing without them."""
    good, unread = [], []
    for snap in snaps:
        try:
            good.append(_read(snap, instrument, detector))
        except UnprocessableDataError as error:
            log.warning("%s", error)
            unread.append(f"without {snap['obs_id']}: {error}")
    return good, unread


def _inputs(
    payload: dict[str, Any], visit: dict[str, Any] | None, field: Field, *, raw: RawDetector
) -> tuple[Inputs, bool]:
    """(Inputs, whether they were loaded only now): those prepared when they fit the image's own header."""
    detector, about = raw.detector, raw.metadata
    if visit is not None:
        ready = _prepared.pop((visit["group_id"], detector.id), None)
        if ready is not None:
            if ready.band == about.band and ready.field.is_near(field.ra, field.dec, field.rotation):
                return ready, False
            log.warning("the image does not look where nextVisit said: prepared again")
    loader = _loader(payload["site"])
    made = loader.load(
        raw.instrument, detector, field, about.band, airmass=about.airmass, obs_id=about.obs_id
    )
    return made, True
