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
from cumbre.core.time import SECONDS_PER_DAY, day_obs_from_tai, parse_isot, tai_from_utc

if TYPE_CHECKING:
    from cumbre.payloads.raw import RawDetector
    from cumbre.simulator.exposure import ExposureRequest
    from cumbre.simulator.sky import Sky

Say = Callable[[str], None]

N_BIAS = 7
N_FLAT = 5
FLAT_EXPOSURE_S = 10.0
NIGHTS_BACK = 30
"""The first template night is this many days before; supernovae of the night are not there yet."""
DITHER_DEG = (0.0, 0.0)
TEMPLATE_CADENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Task:
    """One product: the calibrations or one template of a detector."""

    kind: str
    root: str
    instrument: str
    detector: str
    out: str
    tile: dict[str, Any] | None = None
    band: str = ""


def paths(site: Site) -> dict[str, Path]:
    """Folders of what is prepared."""
    return {
        "sky": site.root / "simulator",
        "refcat": site.root / "refcat" / "refcat.parquet",
        "calibs": site.root / "archive" / "calibs",
        "templates": site.root / "archive" / "templates",
        "earlier": site.root / "earlier",
    }


def night_start(site: Site) -> float:
    """TAI seconds of the first night's start."""
    assert site.config.simulator is not None
    return tai_from_utc(parse_isot(site.config.simulator.start))


def prepare(site: Site, say: Say) -> None:
    """Make what a first night needs and is not there yet."""
    instrument = load_instrument(site.config.instruments[0])
    _make_sky(site, instrument, say)
    tasks = [task for task in _tasks(site, instrument) if not Path(task.out).exists()]
    for kind, name in (("calibration", "calibrations (bias, flat, defects)"), ("template", "templates")):
        todo = [task for task in tasks if task.kind == kind]
        if todo:
            _run(todo, name, say)
    _write_index(site, instrument)


def _make_sky(site: Site, instrument: Instrument, say: Say) -> None:
    from cumbre.simulator.catalogue import Tile, make_catalogue, write_catalogue
    from cumbre.simulator.refcat import write_reference_catalogue
    from cumbre.simulator.tiles import choose_tiles

    config = site.config
    assert config.simulator is not None
    folder = paths(site)["sky"]
    survey = site.root / "survey.json"
    if not (folder / "sky.json").exists():
        start = night_start(site)
        tiles = [Tile(*item) for item in choose_tiles(config.observatory, start, config.scheduler.tiles)]
        tables = make_catalogue(
            config=config.simulator,
            observatory=config.observatory,
            instrument=instrument,
            tiles=tiles,
            start_tai=start,
        )
        write_catalogue(
            folder,
            tables,
            seed=config.simulator.seed,
            observatory=config.observatory,
            tiles=tiles,
            start_tai=start,
        )
        counts = ", ".join(f"{len(next(iter(t.values())))} {name}" for name, t in tables.items())
        say(f"simulated sky: {len(tiles)} tiles, {counts}")
    sky = _sky(site.root)
    if not paths(site)["refcat"].exists():
        write_reference_catalogue(paths(site)["refcat"], sky.tables["stars"], seed=config.simulator.seed)
    if not survey.exists():
        _write_json(survey, [asdict(tile) for tile in sky.tiles])
    templates = folder / "templates.json"
    if not templates.exists():
        listed = [
            {"tile": tile.name, "band": band, "mid_tai": request.mid_tai, "obs_id": request.obs_id}
            for tile in sky.tiles
            for band in config.scheduler.filters
            for request in template_requests(site, instrument, asdict(tile), band)
        ]
        _write_json(templates, listed)


def _sky(root: Path) -> Sky:
    from cumbre.simulator.sky import Sky

    return Sky.load(root / "simulator")


def _write_json(path: Path, data: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1))
    temporary.replace(path)


def template_requests(
    site: Site, instrument: Instrument, tile: dict[str, Any], band: str
) -> list[ExposureRequest]:
    """Earlier visits of a tile, one a night, in a band."""
    from cumbre.simulator.exposure import ExposureRequest

    config = site.config
    assert config.simulator is not None
    names = [t["name"] for t in json.loads((site.root / "survey.json").read_text())] if tile else []
    slot = names.index(tile["name"]) * len(config.scheduler.filters) + config.scheduler.filters.index(band)
    out = []
    for epoch in range(config.simulator.template_epochs):
        # A sidereal day is 236 s shorter: the tile stands as high as on the night itself.
        begin = night_start(site) - (NIGHTS_BACK + epoch) * (SECONDS_PER_DAY - 236.0) + 90.0 * slot
        out.append(
            ExposureRequest(
                obs_id=f"{instrument.prefix}_O_{day_obs_from_tai(begin)}_{100 + slot:06d}",
                image_type="OBJECT",
                exposure_s=config.scheduler.exposure_s,
                filter=instrument.filter(band).name,
                ra=tile["ra"],
                dec=tile["dec"],
                rotpa=0.0,
                begin_tai=begin,
            )
        )
    return out


def _tasks(site: Site, instrument: Instrument) -> Iterable[Task]:
    config, where = site.config, paths(site)
    root, name = str(site.root), config.instruments[0]
    science = [d.name for d in instrument.detectors if d.purpose == "SCIENCE"]
    for detector in science:
        for band in config.scheduler.filters:
            yield Task(
                "calibration",
                root,
                name,
                detector,
                str(calibration_path(site, instrument, detector, band)),
                None,
                band,
            )
    for tile in json.loads((site.root / "survey.json").read_text()):
        for band in config.scheduler.filters:
            for detector in science:
                out = where["templates"] / tile["name"] / f"{band}_{detector}.fits"
                yield Task("template", root, name, detector, str(out), tile, band)


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


def _raw(
    site: Site, instrument: Instrument, detector_name: str, request: ExposureRequest, sky: Sky
) -> RawDetector:
    """Take one frame: rendered, written as a raw file, read back; the same file format as on the night."""
    from cumbre.capture.daq import DaqImage
    from cumbre.capture.primary import completed_header, primary_cards
    from cumbre.capture.raw_fits import raw_fits_bytes
    from cumbre.core.ids import ObsId, image_key
    from cumbre.payloads.raw import read_raw
    from cumbre.simulator.render import render
    from cumbre.stores.files import sha256_of_bytes, write_atomic

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


def _make_calibrations(site: Site, instrument: Instrument, task: Task, out: Path) -> None:
    from cumbre.payloads.calibration import Calibrations, combine_bias, combine_flat, find_defects
    from cumbre.simulator.exposure import ExposureRequest

    sky = _sky(site.root)
    afternoon = night_start(site) - (NIGHTS_BACK + 1) * SECONDS_PER_DAY - 6 * 3600
    day_obs = day_obs_from_tai(afternoon)

    def frames(kind: str, n: int, exposure_s: float, first: int) -> list[RawDetector]:
        return [
            _raw(
                site,
                instrument,
                task.detector,
                ExposureRequest(
                    obs_id=f"{instrument.prefix}_O_{day_obs}_{first + i:06d}",
                    image_type=kind,
                    exposure_s=exposure_s,
                    filter=instrument.filter(task.band).name,
                    ra=0.0,
                    dec=0.0,
                    rotpa=0.0,
                    begin_tai=afternoon + 30.0 * i,
                ),
                sky,
            )
            for i in range(n)
        ]

    slot = site.config.scheduler.filters.index(task.band)
    bias = combine_bias(frames("BIAS", N_BIAS, 0.0, 1))
    flat = combine_flat(frames("FLAT", N_FLAT, FLAT_EXPOSURE_S, 20 + 10 * slot), bias)
    defects = find_defects(bias=bias, flat=flat)
    Calibrations(bias=bias, flat=flat, defects=defects).save(out)


def _make_template(site: Site, instrument: Instrument, task: Task, out: Path) -> None:
    from cumbre.payloads.calibrate import calibrate
    from cumbre.payloads.calibration import Calibrations
    from cumbre.payloads.coadd import make_template, save_exposure
    from cumbre.payloads.isr import assemble_and_correct
    from cumbre.payloads.refcat import RefCat

    assert task.tile is not None
    sky = _sky(site.root)
    calibrations = Calibrations.load(calibration_path(site, instrument, task.detector, task.band))
    reference = RefCat.load(paths(site)["refcat"])
    exposures = []
    for request in template_requests(site, instrument, task.tile, task.band):
        raw = _raw(site, instrument, task.detector, request, sky)
        exposures.append(calibrate(assemble_and_correct(raw, calibrations), reference, instrument=instrument))
    if exposures:
        save_exposure(make_template(exposures), out)


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
    where.mkdir(parents=True, exist_ok=True)
    _write_json(where / "index.json", rows)
