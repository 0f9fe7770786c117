"""A small site with data, served over HTTP: what tests of data access ask.

Two exposures of DemoCam at the same place, one long released, one under embargo. Each raw pixel tells where it is:
``value = (7 x + 13 y + 1000 detector) mod 60000`` with x and y of the assembled detector. Objects lie on a grid, so
what a cone holds is known from the grid and not from us.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cumbre.capture.raw_fits import raw_fits_bytes
from cumbre.catalogs.level1 import Level1
from cumbre.core.configuration import Site
from cumbre.core.instrument import Detector, load_instrument
from cumbre.core.time import Clock, tai_from_utc
from cumbre.ledger import prepare
from cumbre.site.access import SiteAccess
from cumbre.site.profiles import create_site
from cumbre.stores.files import write_atomic
from cumbre.stores.postgres import Database
from cumbre.web.service import WebService

NOW_TAI = tai_from_utc(1795222837.0)  # 2026-11-21
RA, DEC, ROTATION = 53.1, -27.8, 30.0
OLD, NEW = "XC_O_20261116_000001", "XC_O_20261120_000007"
AGE_S = {OLD: 120 * 3600.0, NEW: 3600.0}
STEP_DEG = 0.01
SIDE = 21
DETECTORS = (0, 3)
CURVE_POINTS = 40
AUTHORITY = "cumbre.local"


@dataclass
class World:
    """A running site."""

    url: str
    site: Site
    access: SiteAccess
    database: Database

    @property
    def admin(self) -> str:
        return (self.site.root / "run" / "admin.token").read_text().strip()

    def token(self, user: str, *groups: str, scopes: tuple[str, ...] = ("read:tap", "read:image")) -> str:
        identity = self.access.service.identity
        for group in groups:
            identity.add_member(user, group)
        return identity.create_token(user, scopes, 1).token

    @staticmethod
    def headers(token: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {token}"}


def pixel_value(x: np.ndarray, y: np.ndarray, detector: int) -> np.ndarray:
    """What the raw pixel at (x, y) of the assembled detector holds."""
    return ((7 * x + 13 * y + 1000 * detector) % 60000).astype(np.uint16)


def raw_array(detector: Detector) -> np.ndarray:
    """The amplifiers as the camera reads them out."""
    out = []
    for amplifier in detector.amplifiers:
        ny, nx = amplifier.raw_shape
        array = np.full((ny, nx), 1000, np.uint16)
        area, raw = amplifier.detector_box, amplifier.raw_box
        y, x = np.mgrid[area.y0 : area.y1, area.x0 : area.x1]
        pixels = pixel_value(x, y, detector.id)
        pixels = pixels[:: -1 if amplifier.flip_y else 1, :: -1 if amplifier.flip_x else 1]
        array[raw.y0 : raw.y1, raw.x0 : raw.x1] = pixels
        out.append(array)
    return np.stack(out)


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Positions of the objects; the i-th has diaObjectId i + 1."""
    steps = (np.arange(SIDE) - SIDE // 2) * STEP_DEG
    dec, ra = np.meshgrid(DEC + steps, RA + steps / np.cos(np.radians(DEC)), indexing="ij")
    return ra.ravel(), dec.ravel()


def fill(database: Database, root: Path) -> None:
    """Level 1, ledger and files."""
    instrument = load_instrument("democam")
    prepare(database)
    level1 = Level1(database, Clock.starting_at(NOW_TAI, rate=1e-9))
    ra, dec = grid()
    count = len(ra)
    mjd = {obs: (NOW_TAI - age) / 86400 + 40587 for obs, age in AGE_S.items()}
    objects = {
        "diaObjectId": np.arange(1, count + 1), "ra": ra, "dec": dec, "nDiaSources": np.full(count, 2),
        "firstDiaSourceMjdTai": np.full(count, mjd[OLD]),
    }  # fmt: skip
    level1.store(1, 0, dia_objects=objects)
    times = mjd[OLD] - np.arange(CURVE_POINTS) * 0.05
    for visit, (at, first) in enumerate(((times, 1), (np.array([mjd[NEW]]), 1001)), 2):
        n = len(at)
        rows = {
            "diaSourceId": np.arange(first, first + n), "visit": np.full(n, visit), "detector": np.zeros(n, int),
            "diaObjectId": np.full(n, 1), "midpointMjdTai": at, "ra": np.full(n, ra[0]), "dec": np.full(n, dec[0]),
            "x": np.zeros(n), "y": np.zeros(n), "band": ["r"] * n,
            "psfFlux": 1000 + 500 * np.sin(at), "psfFluxErr": np.full(n, 10.0),
        }  # fmt: skip
        level1.store(visit, 0, dia_sources=rows)
    for number, (obs_id, age) in enumerate(AGE_S.items()):
        begin = NOW_TAI - age
        database.execute(
            "INSERT INTO ledger.image (obs_id, instrument, exposure_id, group_id, day_obs, seq_num, image_type, band,"
            " filter, exposure_s, ra, dec, rotation, begin_tai, end_tai) VALUES"
            " (%s, 'DemoCam', %s, %s, %s, %s, 'OBJECT', 'r', 'r_demo', 30, %s, %s, %s, %s, %s)",
            (obs_id, 2026111600001 + number, f"group-{number}", int(obs_id[5:13]), 1 + number, RA, DEC, ROTATION,
             begin, begin + 30),
        )  # fmt: skip
        for key in DETECTORS:
            detector = instrument.detector(key)
            path = root / "archive" / "raw" / f"{obs_id}_{detector.name}.fits"
            path.parent.mkdir(parents=True, exist_ok=True)
            cards = [
                {"name": "OBSID", "value": obs_id, "comment": ""},
                {"name": "BAND", "value": "r", "comment": ""},
            ]
            content = raw_fits_bytes(detector, raw_array(detector), cards)
            written = write_atomic(path, content)
            database.execute(
                "INSERT INTO ledger.hop (obs_id, detector, detector_name, hop, outcome, place, path, byte_size,"
                " checksum, hop_tai, recv_tai) VALUES (%s, %s, %s, 'at_archive', 'ok', 'archive', %s, %s, %s, %s, %s)",
                (obs_id, key, detector.name, str(path), written.size, written.sha256, begin + 60, begin + 60),
            )


@contextmanager
def serve(database: Database, root: Path, **access: object) -> Iterator[World]:
    """A site with data, running; keywords change ``access`` of its configuration."""
    create_site(root)
    site = Site.load(root)
    if access:
        site.config.access = site.config.access.model_copy(update=access)
    fill(database, root)
    clock = Clock.starting_at(NOW_TAI, rate=1e-9)
    mounted = SiteAccess(site=site, bus=None, clock=clock, db=database)
    mounted.step()
    web = WebService(site=site, bus=None, clock=clock, db=database, mounted=[mounted])  # type: ignore[arg-type]
    try:
        yield World((root / "run" / "web.url").read_text().strip().rstrip("/"), site, mounted, database)
    finally:
        web.close()
