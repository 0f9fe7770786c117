"""Before the first simulated night: a sky, calibrations from simulated frames, templates from earlier nights.

Templates are coadds of earlier simulated visits, taken through the same raw files, ISR and calibration as the
night itself; nothing of the truth goes into them but the sky that the camera saw. Every product is a file that
appears by rename, so a preparation that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.core.configuration import Site
from cumbre.core.instrument import Instrument, load_instrument
from cumbre.simulator.exposure import ExposureRequest
from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    from cumbre.payloads.raw import RawDetector
    from cumbre.simulator.sky import Sky

Say = Callable[[str], None]
SAME_TILE_DEG = 0.1
TEMPLATE_MARGIN_PX = 48


@dataclass(frozen=True, slots=True)
class Task:
    """One product: the calibrations or one template of a detector."""

    kind: str
    root: str
    instrument: str
    detector: str
    out: str
    requests: tuple[ExposureRequest, ...]
    calibrations: str = ""
    tile: tuple[float, float] | None = None


def paths(site: Site) -> dict[str, Path]:
    """Folders of what is prepared."""
    return {
        "sky": site.root / "simulator",
        "refcat": site.root / "refcat" / "refcat.parquet",
        "calibs": site.root / "archive" / "calibs",
        "templates": site.root / "archive" / "templates",
        "earlier": site.root / "earlier",
    }


def prepare(site: Site, say: Say) -> None:
    """Make what a first night needs and is not there yet."""
    from cumbre.simulator.orbit_file import write_orbit_file
    from cumbre.simulator.preparation import prepare_sky
    from cumbre.site.orbits import SIMULATED

    instrument = load_instrument(site.config.instruments[0])
    new = not (paths(site)["sky"] / "sky.json").exists()
    sky = prepare_sky(site)
    if new:
        counts = ", ".join(f"{len(table['id'])} {name}" for name, table in sky.tables.items())
        say(f"simulated sky: {len(sky.tiles)} tiles, {counts}")
    known = site.root / SIMULATED
    if not known.exists():
        simulator = site.config.simulator
        assert simulator is not None
        write_orbit_file(known, sky.tables["asteroids"], part=simulator.known_asteroids, seed=simulator.seed)
    survey = site.root / "survey.json"
    if not survey.exists():
        _write_json(survey, [asdict(tile) for tile in sky.tiles])
    missing = [task for task in tasks(site, instrument, sky) if not Path(task.out).exists()]
    for kind, name in (("calibration", "calibrations (bias, flat, defects)"), ("template", "templates")):
        todo = [task for task in missing if task.kind == kind]
        if todo:
            _run(todo, name, say)
    _write_index(site, instrument)


def _write_json(path: Path, data: Any) -> None:
    write_atomic(path, json.dumps(data, indent=1).encode())


def tasks(site: Site, instrument: Instrument, sky: Sky) -> Iterable[Task]:
    """All products of a site's survey: calibrations first."""
    from cumbre.core.geometry import separation_deg
    from cumbre.simulator.preparation import calibration_requests, record_templates, template_requests

    config, where = site.config, paths(site)
    assert config.simulator is not None
    root, name, bands = str(site.root), config.instruments[0], config.scheduler.filters
    science = [d.name for d in instrument.detectors if d.purpose == "SCIENCE"]
    frames = calibration_requests(instrument, sky.start_tai, filters=bands)
    visits = template_requests(
        instrument,
        sky,
        epochs=config.simulator.template_epochs,
        exposure_s=config.scheduler.exposure_s * config.scheduler.snaps,
        filters=bands,
    )
    record_templates(where["sky"], instrument, sky, visits)
    for band in bands:
        mine = [f for f in frames if f.image_type == "BIAS" or instrument.filter(f.filter).band == band]
        for detector in science:
            out = calibration_path(site, instrument, detector, band)
            yield Task("calibration", root, name, detector, str(out), tuple(mine))
    for tile in sky.tiles:
        for band in bands:
            mine = [
                v
                for v in visits
                if instrument.filter(v.filter).band == band
                and float(separation_deg(v.ra, v.dec, tile.ra, tile.dec)) < SAME_TILE_DEG
            ]
            for detector in science if mine else ():
                out = where["templates"] / tile.name / f"{band}_{detector}.fits"
                calibrations = str(calibration_path(site, instrument, detector, band))
                yield Task(
                    "template", root, name, detector, str(out), tuple(mine), calibrations, (tile.ra, tile.dec)
                )


def calibration_path(site: Site, instrument: Instrument, detector: str, band: str) -> Path:
    """File of one detector's calibrations in one band."""
    return paths(site)["calibs"] / instrument.name / f"{band}_{detector}.fits"


def _run(tasks: list[Task], name: str, say: Say) -> None:
    workers = min(os.cpu_count() or 1, len(tasks))
    say(f"{name}: {len(tasks)} to make on {workers} processes")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(make, task) for task in tasks]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            if done % max(len(tasks) // 3, 1) == 0 or done == len(tasks):
                say(f"{name}: {done} of {len(tasks)}")


def make(task: Task) -> str:
    """Make one product (in a worker process)."""
    import cv2

    cv2.setNumThreads(1)
    site = Site.load(Path(task.root))
    instrument = load_instrument(task.instrument)
    out = Path(task.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if task.kind == "calibration":
        _make_calibrations(site, instrument, task, out)
    else:
        _make_template(site, instrument, task, out)
    return task.out


def take_frame(
    site: Site, instrument: Instrument, detector_name: str, request: ExposureRequest, sky: Sky
) -> RawDetector:
    """Take one frame: rendered, written as a raw file, read back; the same file format as on the night."""
    from cumbre.capture.daq import DaqImage
    from cumbre.capture.primary import completed_header, primary_cards
    from cumbre.capture.raw_fits import raw_fits_bytes
    from cumbre.core.ids import ObsId, image_key
    from cumbre.payloads.raw import read_raw
    from cumbre.simulator.render import render
    from cumbre.stores.files import sha256_of_bytes

    detector = instrument.detector(detector_name)
    assert site.config.simulator is not None
    obs_id = ObsId.parse(request.obs_id)
    path = paths(site)["earlier"] / image_key(instrument.name, obs_id, detector.name)
    if not path.exists():
        array = render(instrument, detector, request, sky, site.config.simulator.seed)
        info = {
            "obs_id": request.obs_id,
            "instrument": instrument.name,
            "detectors": [detector.name],
            "image_type": request.image_type,
            "exposure_s": request.exposure_s,
            "dark_s": request.exposure_s,
            "filter": request.filter,
            "band": instrument.filter(request.filter).band,
            "begin_tai": request.begin_tai,
            "end_tai": request.begin_tai + request.exposure_s,
            "ra": request.ra,
            "dec": request.dec,
            "rotation": request.rotpa,
            "group_id": request.group_id or request.obs_id,
        }
        header = completed_header(None, DaqImage(path.parent, info))
        cards = primary_cards(header, detector, sha256_of_bytes(array.tobytes()))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, raw_fits_bytes(detector, array, cards))
    return read_raw(path, instrument)


def _sky(root: Path) -> Sky:
    from cumbre.simulator.sky import Sky

    return Sky.load(root / "simulator")


def _make_calibrations(site: Site, instrument: Instrument, task: Task, out: Path) -> None:
    from cumbre.payloads.calibration import Calibrations, combine_bias, combine_flat, find_defects

    raws: dict[str, list[RawDetector]] = {"BIAS": [], "FLAT": []}
    sky = _sky(site.root)
    for request in task.requests:
        raws[request.image_type].append(take_frame(site, instrument, task.detector, request, sky))
    bias = combine_bias(raws["BIAS"])
    flat = combine_flat(raws["FLAT"], bias)
    Calibrations(bias=bias, flat=flat, defects=find_defects(bias=bias, flat=flat)).save(out)


def _make_template(site: Site, instrument: Instrument, task: Task, out: Path) -> None:
    from cumbre.core.geometry import approximate_wcs
    from cumbre.payloads.calibrate import calibrate
    from cumbre.payloads.calibration import Calibrations
    from cumbre.payloads.coadd import make_template
    from cumbre.payloads.exposure_file import save_exposure
    from cumbre.payloads.isr import assemble_and_correct
    from cumbre.payloads.kernels.wcs import PlaneWcs
    from cumbre.payloads.refcat import RefCat

    sky = _sky(site.root)
    calibrations = Calibrations.load(task.calibrations)
    reference = RefCat.load(paths(site)["refcat"])
    exposures = [
        calibrate(
            assemble_and_correct(take_frame(site, instrument, task.detector, request, sky), calibrations),
            reference,
            instrument=instrument,
        )
        for request in task.requests
    ]
    assert task.tile is not None
    detector = instrument.detector(task.detector)
    header = approximate_wcs(instrument, detector, task.tile[0], task.tile[1], 0.0)
    # Wider than the detector on each side, so that a dithered visit still lies inside.
    header |= {key: header[key] + TEMPLATE_MARGIN_PX for key in ("CRPIX1", "CRPIX2")}
    shape = (detector.ny + 2 * TEMPLATE_MARGIN_PX, detector.nx + 2 * TEMPLATE_MARGIN_PX)
    save_exposure(make_template(exposures, PlaneWcs.from_header(header), shape), out)


def _write_index(site: Site, instrument: Instrument) -> None:
    """``index.json`` of the templates: tile, place, band, detector, path."""
    where = paths(site)["templates"]
    rows = []
    for tile in json.loads((site.root / "survey.json").read_text()):
        for band in site.config.scheduler.filters:
            for detector in instrument.detectors:
                path = where / tile["name"] / f"{band}_{detector.name}.fits"
                if path.exists():
                    rows.append(
                        {
                            "tile": tile["name"],
                            "ra": tile["ra"],
                            "dec": tile["dec"],
                            "band": band,
                            "detector": detector.name,
                            "path": str(path),
                        }
                    )
    from cumbre.orchestration.templates import update_index

    # those made of the site's own visits stay
    update_index(where, lambda known: [*rows, *(row for row in known if "version" in row)])
