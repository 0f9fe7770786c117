"""A site with a simulated sky, a template of one detector, and raw files of it: what prompt processing needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cumbre.core.configuration import SITE_FILE, Site
from cumbre.core.ids import ObsId
from cumbre.core.instrument import load_instrument
from cumbre.core.time import parse_isot, tai_from_utc
from cumbre.observatory.visits import AnnouncedVisit
from cumbre.orchestration.prompt_state import DetectorImage

NIGHT = tai_from_utc(parse_isot("2026-11-21T01:00:00"))
GROUP = "2026-11-21T01:00:37.000"
CAMERA = load_instrument("democam")
DETECTOR = CAMERA.detector(0)
AMPLIFIER = DETECTOR.amplifiers[0]
PLANTED_E = 60000.0
SIGMA_PX = 1.0


def make_site(root: Path) -> Site:
    """A site of one tile."""
    from cumbre.simulator.preparation import prepare_sky
    from cumbre.site.profiles import create_site

    create_site(root)
    path = root / SITE_FILE
    path.write_text(path.read_text().replace("tiles: 3", "tiles: 1"))
    made = Site.load(root)
    prepare_sky(made)
    return made


def frame(
    site: Site, obs_id: str, begin_tai: float, *, planted: tuple[int, int] | None = None,
    image_type: str = "OBJECT", exposure_s: float = 30.0, index: int = 1, total: int = 1,
):  # fmt: skip
    """One raw file of detector 0, taken as the camera and the writer do."""
    from cumbre.capture.daq import DaqImage
    from cumbre.capture.primary import completed_header, primary_cards
    from cumbre.capture.raw_fits import raw_fits_bytes
    from cumbre.simulator.exposure import ExposureRequest
    from cumbre.simulator.render import render
    from cumbre.simulator.sky import Sky
    from cumbre.stores.files import sha256_of_bytes, write_atomic

    sky = Sky.load(site.root / "simulator")
    tile = sky.tiles[0]
    request = ExposureRequest(
        obs_id=obs_id, image_type=image_type, exposure_s=exposure_s, filter="r_demo", ra=tile.ra, dec=tile.dec,
        rotpa=0.0, begin_tai=begin_tai, group_id=GROUP,
    )  # fmt: skip
    array = render(CAMERA, DETECTOR, request, sky, 1)
    if planted:
        column, row = planted
        y, x = np.mgrid[-12:13, -12:13]
        star = PLANTED_E / AMPLIFIER.gain * np.exp(-(x**2 + y**2) / (2 * SIGMA_PX**2))
        star /= 2 * np.pi * SIGMA_PX**2
        cut = array[0, row - 12 : row + 13, column - 12 : column + 13]
        cut[...] = np.minimum(cut + star, 65535).astype(np.uint16)
    info = {
        "obs_id": obs_id, "instrument": CAMERA.name, "detectors": [DETECTOR.name], "image_type": image_type,
        "exposure_s": exposure_s, "dark_s": exposure_s, "filter": "r_demo", "band": "r",
        "begin_tai": begin_tai, "end_tai": begin_tai + exposure_s, "ra": tile.ra, "dec": tile.dec,
        "rotation": 0.0, "group_id": GROUP, "index": index, "total": total,
    }  # fmt: skip
    path = site.root / "raws" / f"{obs_id}_{DETECTOR.name}.fits"
    header = completed_header(None, DaqImage(path.parent, info))
    cards = primary_cards(header, DETECTOR, sha256_of_bytes(array.tobytes()))
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, raw_fits_bytes(DETECTOR, array, cards))
    return path, tile


def make_template(site: Site) -> None:
    """Calibrations and template of detector 0."""
    from cumbre.payloads.calibrate import calibrate
    from cumbre.payloads.calibration import Calibrations
    from cumbre.payloads.exposure_file import save_exposure
    from cumbre.payloads.isr import assemble_and_correct
    from cumbre.payloads.raw import read_raw
    from cumbre.payloads.refcat import RefCat

    calibrations = Calibrations(flat=np.ones(DETECTOR.shape, np.float32))
    calibrations.save(site.root / "archive" / "calibs" / CAMERA.name / f"r_{DETECTOR.name}.fits")
    path, tile = frame(site, "XC_O_20261010_000001", NIGHT - 38 * 86164.0905)
    reference = RefCat.load(site.root / "refcat" / "refcat.parquet")
    corrected = assemble_and_correct(read_raw(path, CAMERA), calibrations)
    folder = site.root / "archive" / "templates"
    save_exposure(calibrate(corrected, reference, instrument=CAMERA), folder / "T" / "r_R00_S00.fits")
    row = {"tile": "T", "ra": tile.ra, "dec": tile.dec, "band": "r", "detector": DETECTOR.name}
    (folder / "index.json").write_text(json.dumps([row | {"path": "T/r_R00_S00.fits"}]))


def make_payload(site: Site, dsn: str) -> dict:
    """Job of an image with a planted star."""
    raw_column, raw_row = AMPLIFIER.raw_box.x0 + 120, AMPLIFIER.raw_box.y0 + 200
    path, tile = frame(site, "XC_O_20261120_000001", NIGHT + 60, planted=(raw_column, raw_row))
    obs_id = ObsId.parse("XC_O_20261120_000001")
    image = DetectorImage(
        str(obs_id), CAMERA.name, obs_id.exposure_id, GROUP, 0, DETECTOR.name, str(path), NIGHT + 95
    )
    visit = AnnouncedVisit(GROUP, CAMERA.name, tile.ra, tile.dec, 0.0, "r_demo", NIGHT + 60, 30.0, 1, "T")
    return {
        "site": str(site.root), "dsn": dsn, "instrument": "democam", "detection_sigma": 5.0,
        "reliability": 0.5, "visit": asdict(visit), "detector": 0, "image": asdict(image),
    }  # fmt: skip


def process_and_keep(payload: dict, file: str) -> None:
    """What a worker does with an image; the pixels that it had are written aside, which no worker does."""
    from cumbre.orchestration import prompt_worker

    produce = prompt_worker._produce

    def spy(*arguments):
        made, packets = produce(*arguments)
        for kind, exposure in (("calibrated", made.exposure), ("difference", made.result.exposure)):
            kept = {"image": exposure.image, "variance": exposure.variance, "mask": exposure.mask}
            np.savez(f"{file}_{kind}.npz", **kept)
        return made, packets

    prompt_worker._produce = spy
    prompt_worker.process(payload)
