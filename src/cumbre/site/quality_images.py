"""Simulated detector images of known truth, from raw files on: what the quality of alerts is measured with.

A folder keeps skies, calibrations, templates and raw frames of every seed; asking again renders nothing. Every seed
is another sky, weather and set of sensors. Seeds below ``FIRST_TEST_SEED`` train classifiers, the others test them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.configuration import SITE_FILE, Site
from cumbre.core.instrument import Instrument, load_instrument
from cumbre.simulator.exposure import ExposureRequest
from cumbre.site import preparation
from cumbre.site.profiles import create_site

if TYPE_CHECKING:
    from cumbre.payloads.calibration import Calibrations
    from cumbre.payloads.exposure import Exposure
    from cumbre.payloads.raw import RawDetector
    from cumbre.payloads.refcat import RefCat
    from cumbre.simulator.sky import Sky

FIRST_TEST_SEED = 200
VISIT_DAYS = (0, 2, 5, 9, 14, 20, 27)
"""Days after the first night: supernovae rise and fade between them, variables go through their phases."""
INSTRUMENTS = {"1k": "democam", "4k": "democam4k"}
USUAL_SKY = ""
RICH_SKY = "  transients_per_detector: 14\n  variables_fraction: 0.03\n  asteroids_per_deg2: 120\n"
"""More of everything than a demonstration night has."""
RICH_SKY_4K = "  star_density: 16\n  transients_per_detector: 150\n  variables_fraction: 0.03\n  asteroids_per_deg2: 120\n"
"""With 9,000 stars on the detector."""
ALONE_FWHM = 5.0
"""Distance of the nearest other source from a star that is alone."""
MAKERS = ("coadd.py", "calibrat*.py", "isr.py", "raw.py", "stars.py", "kernels/*.py")
"""Modules of the payloads that calibrations and templates come out of."""


@dataclass(frozen=True, slots=True)
class Case:
    """One detector image with all that its processing needs, and its truth.

    Attributes
    ----------
    truth
        Columns of :func:`cumbre.simulator.truth.detector_truth`.
    sky, request
        What the image shows; for :func:`debris`.
    """

    name: str
    raw: RawDetector
    calibrations: Calibrations
    template: Exposure
    reference: RefCat
    instrument: Instrument
    truth: dict[str, NDArray[Any]]
    sky: Sky
    request: ExposureRequest
    seed: int


def sky_of_seed(size: str, *, rich: bool) -> str:
    """Lines for the ``simulator`` block of a site file."""
    return USUAL_SKY if not rich else RICH_SKY_4K if size == "4k" else RICH_SKY


def makers_digest() -> str:
    """What names the code that makes calibrations and templates."""
    import hashlib

    import cumbre.payloads

    folder = Path(cumbre.payloads.__file__).parent
    files = sorted({path for pattern in MAKERS for path in folder.glob(pattern)})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def drop_outdated(root: Path, calibrations: Path, templates: Path) -> bool:
    """Remove what other code made from the frames of a cached field: figures are of one state of the payload.

    Returns
    -------
    True when something was removed.
    """
    from cumbre.stores.files import write_atomic

    mark, digest = root / "made-by.txt", makers_digest()
    if mark.exists() and mark.read_text().strip() == digest:
        return False
    old = [path for folder in (calibrations, templates) for path in folder.rglob("*.fits")]
    for path in old:
        path.unlink()
    write_atomic(mark, f"{digest}\n".encode())
    return bool(old)


def make_cases(
    folder: Path, seed: int, *, detectors: int, visits: int, size: str = "1k", rich: bool = False
) -> Iterator[Case]:
    """Render what is missing of one seed's field, and yield its detector images.

    Parameters
    ----------
    folder
        Cache; each seed and size has a folder of its own in it. Frames stay; calibrations and templates are made again
        when the code that makes them has changed.
    detectors, visits
        How many of the camera's science detectors, and how many visits of the field (at most seven).
    size
        ``1k`` (demonstration camera) or ``4k`` (one sensor of 4096 × 4096 with sixteen amplifiers).
    rich
        More transients, variables and asteroids than a demonstration night has.
    """
    from cumbre.core.ids import ObsId
    from cumbre.core.time import day_obs_from_tai
    from cumbre.payloads.calibration import Calibrations
    from cumbre.payloads.exposure_file import load_exposure
    from cumbre.payloads.refcat import RefCat
    from cumbre.simulator.preparation import SIDEREAL_DAY_S, prepare_sky
    from cumbre.simulator.truth import detector_truth

    root = folder / f"{size}{'-rich' if rich else ''}-seed{seed}"
    if not (root / SITE_FILE).exists():
        create_site(root, seed=seed, instrument=INSTRUMENTS[size])
        text = (root / SITE_FILE).read_text().replace("tiles: 3", "tiles: 1")
        (root / SITE_FILE).write_text(text + sky_of_seed(size, rich=rich))
    site = Site.load(root)
    instrument = load_instrument(site.config.instruments[0])
    sky = prepare_sky(site)
    chosen = [d.name for d in instrument.detectors if d.purpose == "SCIENCE"][:detectors]
    where = preparation.paths(site)
    drop_outdated(root, where["calibs"], where["templates"])
    wanted = [task for task in preparation.tasks(site, instrument, sky) if task.detector in chosen]
    for task in sorted(wanted, key=lambda t: t.kind):
        if not Path(task.out).exists():
            preparation.make(task)
    reference = RefCat.load(where["refcat"])
    tile, band = sky.tiles[0], site.config.scheduler.filters[0]
    exposure_s = site.config.scheduler.exposure_s * site.config.scheduler.snaps
    filter_name = instrument.filter(band).name
    for number, day in enumerate(VISIT_DAYS[:visits]):
        begin = sky.start_tai + 1800.0 + day * SIDEREAL_DAY_S + 900.0 * number
        obs_id = str(ObsId(day_obs_from_tai(begin), 500 + number, instrument.prefix))
        request = ExposureRequest(
            obs_id, "OBJECT", exposure_s, filter_name, tile.ra, tile.dec, 0.0, begin,
            group_id=f"v{number}",
        )  # fmt: skip
        for name in chosen:
            yield Case(
                name=f"{seed}/{obs_id}/{name}",
                raw=preparation.take_frame(site, instrument, name, request, sky),
                calibrations=Calibrations.load(preparation.calibration_path(site, instrument, name, band)),
                template=load_exposure(where["templates"] / tile.name / f"{band}_{name}.fits"),
                reference=reference,
                instrument=instrument,
                truth=detector_truth(instrument, instrument.detector(name), request, sky, seed),
                sky=sky,
                request=request,
                seed=seed,
            )


@dataclass(frozen=True, slots=True)
class Debris:
    """What imitates sources on one detector image.

    Attributes
    ----------
    cosmic_rays
        float32 (ny, nx): electrons that particles left.
    trail
        float32 (ny, nx): electrons of a satellite's trail.
    glints
        (n, 3): x, y, electrons of a satellite's flashes.
    stars, galaxies
        (n, 3): x, y, electrons of the sources that do not change.
    defects
        bool (ny, nx).
    """

    cosmic_rays: NDArray[np.float32]
    trail: NDArray[np.float32]
    glints: NDArray[np.float64]
    stars: NDArray[np.float64]
    galaxies: NDArray[np.float64]
    defects: NDArray[np.bool_]


def debris(case: Case) -> Debris:
    """The truth about everything on an image that is no change of the sky."""
    from cumbre.simulator.chip import chip
    from cumbre.simulator.render import glints, particle_tracks, trail_light
    from cumbre.simulator.sky import GALAXY, STAR

    detector = case.raw.detector
    light = case.sky.light(case.instrument, detector, case.request)
    s = light.sources
    table = np.column_stack([s.x, s.y, s.flux_e])
    return Debris(
        cosmic_rays=particle_tracks(case.instrument, detector, case.request, case.sky, case.seed),
        trail=trail_light(detector, case.request, light, case.seed),
        glints=glints(detector, case.request, light, case.seed),
        stars=table[s.kind == STAR],
        galaxies=table[s.kind == GALAXY],
        defects=chip(case.instrument, detector, case.seed).defects,
    )


def constant_stars(case: Case) -> dict[str, NDArray[Any]]:
    """Stars whose fluxes any image must give: constant, alone, not saturated.

    Returns
    -------
    dict of arrays
        ``ra``, ``dec`` (degrees), ``flux_njy``.
    """
    from scipy.spatial import cKDTree

    from cumbre.simulator.chip import chip
    from cumbre.simulator.sky import STAR

    detector = case.raw.detector
    light = case.sky.light(case.instrument, detector, case.request)
    s, fwhm = light.sources, light.psf.fwhm_px
    if len(s.x) < 2:
        return {name: np.zeros(0) for name in ("ra", "dec", "flux_njy")}
    places = np.column_stack([s.x, s.y])
    apart = cKDTree(places).query(places, k=2)[0][:, 1]
    inside = (s.x > 16) & (s.y > 16) & (s.x < detector.nx - 17) & (s.y < detector.ny - 17)
    full = float(chip(case.instrument, detector, case.seed).full_well_e.min())
    faint = s.flux_e * light.psf.peak_fraction() + light.background_e < 0.8 * full
    good = (s.kind == STAR) & inside & faint & (apart > ALONE_FWHM * fwhm)
    return {"ra": s.ra[good], "dec": s.dec[good], "flux_njy": 3631e9 * 10 ** (-0.4 * s.mag[good])}
