"""What a night needs before it begins: sky, reference catalogue, calibration frames, template visits.

The sky of a site lies in ``<site>/simulator`` and the reference catalogue in ``<site>/refcat``. Nothing here
knows what becomes of the frames: :func:`render_epochs` gives pixels, the caller ingests them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cumbre.core.configuration import Site
from cumbre.core.errors import UserError
from cumbre.core.geometry import separation_deg
from cumbre.core.ids import ObsId
from cumbre.core.instrument import Detector, Instrument, load_instrument
from cumbre.core.time import SECONDS_PER_DAY, day_obs_from_tai, parse_isot, tai_from_utc
from cumbre.simulator.catalogue import Tile, make_catalogue, write_catalogue
from cumbre.simulator.exposure import ExposureRequest
from cumbre.simulator.randomness import generator
from cumbre.simulator.refcat import write_reference_catalogue
from cumbre.simulator.render import LAMP_E_S, render
from cumbre.simulator.sky import TEMPLATES_FILE, Sky
from cumbre.simulator.tiles import choose_tiles
from cumbre.stores.files import write_atomic

SKY_FOLDER = "simulator"
REFCAT_FILE = "refcat/refcat.parquet"
SIDEREAL_DAY_S = 86164.0905
TEMPLATES_BEFORE_DAYS = 38
"""Earlier than any supernova of the first night."""
DITHER_ARCSEC = 15.0
FLAT_LEVEL_E = 28000.0


def prepare_sky(site: Site) -> Sky:
    """Make the truth and reference catalogues of a simulated site, once; later calls read them.

    Raises
    ------
    UserError
        The site has no ``simulator`` block.
    """
    folder = site.path(SKY_FOLDER)
    if not (folder / "sky.json").is_file() or not site.path(REFCAT_FILE).is_file():
        config = site.config.simulator
        if config is None:
            raise UserError(f"{site.root}/site.yaml: no `simulator` block, expected one for a simulated sky")
        start_tai = tai_from_utc(parse_isot(config.start))
        observatory = site.config.observatory
        tiles = [Tile(*item) for item in choose_tiles(observatory, start_tai, site.config.scheduler.tiles)]
        tables = make_catalogue(
            config=config,
            observatory=observatory,
            instrument=load_instrument(site.config.instruments[0]),
            tiles=tiles,
            start_tai=start_tai,
        )
        write_reference_catalogue(site.path(REFCAT_FILE), tables["stars"], config.seed)
        write_catalogue(
            folder, tables, seed=config.seed, observatory=observatory, tiles=tiles, start_tai=start_tai
        )
    return Sky.load(folder)


def _obs_id(instrument: Instrument, tai_s: float, used: dict[int, int]) -> str:
    day = day_obs_from_tai(tai_s)
    used[day] = used.get(day, 0) + 1
    return str(ObsId(day, used[day], instrument.prefix))


def calibration_requests(
    instrument: Instrument,
    start_tai: float,
    *,
    biases: int = 7,
    flats: int = 5,
    filters: Iterable[str] = ("r",),
) -> list[ExposureRequest]:
    """Bias and flat frames of the afternoon of the day before the first night."""
    used: dict[int, int] = {}
    out = []
    tai_s = start_tai - SECONDS_PER_DAY - 5 * 3600.0
    plan = [("BIAS", 0.0, instrument.filters[0].name)] * biases
    for name in filters:
        plan += [("FLAT", FLAT_LEVEL_E / LAMP_E_S, instrument.filter(name).name)] * flats
    for image_type, exposure_s, name in plan:
        obs_id = _obs_id(instrument, tai_s, used)
        out.append(ExposureRequest(obs_id, image_type, exposure_s, name, 0.0, 0.0, 0.0, tai_s))
        tai_s += exposure_s + instrument.readout_s + 5.0
    return out


def template_requests(
    instrument: Instrument, sky: Sky, *, epochs: int, exposure_s: float, filters: Iterable[str] = ("r",)
) -> list[ExposureRequest]:
    """Earlier visits of every tile: one night an epoch, at the sidereal time of the first night's start."""
    used: dict[int, int] = {}
    out = []
    for epoch in range(epochs):
        tai_s = sky.start_tai + 1800.0 - (TEMPLATES_BEFORE_DAYS + epochs - 1 - epoch) * SIDEREAL_DAY_S
        for tile in sky.tiles:
            for name in filters:
                rng = generator(sky.seed, "dither", tile.name, name, epoch)
                east, north = rng.uniform(-DITHER_ARCSEC, DITHER_ARCSEC, 2) / 3600.0
                out.append(
                    ExposureRequest(
                        _obs_id(instrument, tai_s, used),
                        "OBJECT",
                        exposure_s,
                        instrument.filter(name).name,
                        float((tile.ra + east / np.cos(np.deg2rad(tile.dec))) % 360.0),
                        float(tile.dec + north),
                        0.0,
                        tai_s,
                        group_id=f"template-{tile.name}-{name}-{epoch}",
                    )
                )
                tai_s += exposure_s + instrument.readout_s + 5.0
    return out


def record_templates(
    folder: Path, instrument: Instrument, sky: Sky, requests: Iterable[ExposureRequest]
) -> None:
    """Write which visits made the templates (``templates.json``): the truth's differences refer to them."""
    rows = []
    times: dict[tuple[str, str], list[float]] = {}
    for request in requests:
        distance = [float(separation_deg(request.ra, request.dec, t.ra, t.dec)) for t in sky.tiles]
        tile = sky.tiles[int(np.argmin(distance))].name
        band = instrument.filter(request.filter).band
        rows.append({"tile": tile, "band": band, "mid_tai": request.mid_tai, "obs_id": request.obs_id})
        times.setdefault((tile, band), []).append(request.mid_tai)
    sky.template_tai = times
    write_atomic(folder / TEMPLATES_FILE, json.dumps(rows, indent=1).encode())


class Frame(NamedTuple):
    """One detector image of an earlier exposure."""

    exposure: ExposureRequest
    detector: Detector
    raw: NDArray[np.uint16]


def render_epochs(
    instrument: Instrument, requests: Iterable[ExposureRequest], sky: Sky, *, seed: int, threads: int = 2
) -> Iterator[Frame]:
    """Render exposures one after the other, detectors in parallel, a few ahead of the reader.

    Yields
    ------
    Frame
        In order of the requests and of ``instrument.detectors``.
    """
    waiting: list[tuple[ExposureRequest, Detector, Future[NDArray[np.uint16]]]] = []
    with ThreadPoolExecutor(threads) as pool:
        for request in requests:
            for detector in instrument.detectors:
                waiting.append(
                    (request, detector, pool.submit(render, instrument, detector, request, sky, seed))
                )
                # Bounded, so that a slow reader does not fill the memory with frames.
                while len(waiting) > 2 * threads:
                    exposure, chosen, future = waiting.pop(0)
                    yield Frame(exposure, chosen, future.result())
        for exposure, chosen, future in waiting:
            yield Frame(exposure, chosen, future.result())
