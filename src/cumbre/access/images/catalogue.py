"""The catalogue of images: one row for each detector's image that can be fetched, and who may have it.

Raw files come from the ledger: what is verified at the archive. Templates come from their index. Other products
are put here by whoever makes them (:meth:`ImageCatalogue.register`). When an image becomes public is one row,
``access.horizon``, which moves with the site's clock; views and look-ups compare with it, so an image is released
everywhere at the same moment and nowhere earlier.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cumbre.access.identity import COLLABORATION, EMBARGO, Principal
from cumbre.core.errors import CumbreError, NotFoundError
from cumbre.core.instrument import Instrument, load_instrument
from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Database

log = logging.getLogger(__name__)

RAW, TEMPLATE = "raw", "template"
OVERLAP_S = 120.0
SCIENCE_TYPES = ("OBJECT",)
STEPS = (
    """
    CREATE SCHEMA IF NOT EXISTS access;
    CREATE TABLE access.image (
        image_id text PRIMARY KEY,
        product text NOT NULL,
        calib_level int NOT NULL,
        instrument text NOT NULL,
        obs_id text NOT NULL,
        detector int NOT NULL,
        detector_name text NOT NULL,
        path text NOT NULL,
        byte_size bigint,
        image_type text NOT NULL DEFAULT '',
        target text NOT NULL DEFAULT '',
        program text NOT NULL DEFAULT '',
        band text,
        em_min float8,
        em_max float8,
        exposure_s float8,
        begin_tai float8,
        end_tai float8,
        boresight_ra float8,
        boresight_dec float8,
        rotation float8,
        ra float8,
        "dec" float8,
        region float8[],
        fov_deg float8,
        hpx29 bigint,
        nx int NOT NULL,
        ny int NOT NULL,
        pixel_arcsec float8,
        release_at_once boolean NOT NULL DEFAULT false,
        changed_tai float8 NOT NULL DEFAULT 0
    );
    CREATE INDEX image_hpx29 ON access.image (hpx29);
    CREATE INDEX image_begin ON access.image (begin_tai);
    CREATE INDEX image_obs ON access.image (obs_id, detector);
    CREATE TABLE access.horizon (
        one boolean PRIMARY KEY DEFAULT true CHECK (one),
        public_tai float8 NOT NULL,
        collaboration_tai float8 NOT NULL
    );
    INSERT INTO access.horizon VALUES (true, '-infinity', '-infinity');
    """,
)
_COLUMNS = (
    "image_id", "product", "calib_level", "instrument", "obs_id", "detector", "detector_name", "path", "byte_size",
    "image_type", "target", "program", "band", "em_min", "em_max", "exposure_s", "begin_tai", "end_tai",
    "boresight_ra", "boresight_dec", "rotation", "ra", "dec", "region", "fov_deg", "hpx29", "nx", "ny",
    "pixel_arcsec", "release_at_once",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Image:
    """One image; degrees, seconds TAI, metres. Corners are (ra, dec, ra, dec…)."""

    image_id: str
    product: str
    calib_level: int
    instrument: str
    obs_id: str
    detector: int
    detector_name: str
    path: str
    nx: int
    ny: int
    byte_size: int | None = None
    image_type: str = "OBJECT"
    target: str = ""
    program: str = ""
    band: str | None = None
    em_min: float | None = None
    em_max: float | None = None
    exposure_s: float | None = None
    begin_tai: float | None = None
    end_tai: float | None = None
    boresight_ra: float | None = None
    boresight_dec: float | None = None
    rotation: float | None = None
    ra: float | None = None
    dec: float | None = None
    region: tuple[float, ...] | None = None
    fov_deg: float | None = None
    hpx29: int | None = None
    pixel_arcsec: float | None = None
    release_at_once: bool = False


class ImageCatalogue:
    """Images of a site.

    Parameters
    ----------
    db
        The site's database; tables are made when absent.
    instruments
        Names or files of the site's instruments.
    embargo_s, proprietary_s
        Seconds from the begin of an exposure until members, and until everybody, may see it.
    """

    def __init__(
        self, db: Database, instruments: Sequence[str], *, embargo_s: float, proprietary_s: float = 0.0
    ) -> None:
        self._db = db
        migrate(db, "access_images", STEPS)
        self.instruments: dict[str, Instrument] = {}
        for name in instruments:
            instrument = load_instrument(name)
            self.instruments[instrument.name] = instrument
        self._embargo_s, self._proprietary_s = embargo_s, max(proprietary_s, embargo_s)
        self._mark = -math.inf

    # filling

    def move_horizon(self, now_tai: float) -> None:
        """Release what has waited long enough; never takes a release back."""
        self._db.execute(
            "UPDATE access.horizon SET public_tai = greatest(public_tai, %s),"
            " collaboration_tai = greatest(collaboration_tai, %s)",
            (now_tai - self._proprietary_s, now_tai - self._embargo_s),
        )

    def horizons(self) -> tuple[float, float]:
        """Up to which begin of exposure images are released: to everybody, to the collaboration; TAI seconds."""
        ((public, collaboration),) = self._db.execute(
            "SELECT public_tai, collaboration_tai FROM access.horizon"
        )
        return float(public), float(collaboration)

    def register(self, images: Iterable[Image]) -> int:
        """Store images or replace what is known of them; returns how many."""
        rows = [asdict(image) for image in images]
        if not rows:
            return 0
        sets = ", ".join(f'"{name}" = excluded."{name}"' for name in _COLUMNS if name != "image_id")
        columns = ", ".join(f'"{name}"' for name in _COLUMNS)
        values = ", ".join(f"%({name})s" for name in _COLUMNS)
        statement = (
            f"INSERT INTO access.image ({columns}) VALUES ({values})"  # noqa: S608 (names are ours)
            f" ON CONFLICT (image_id) DO UPDATE SET {sets}"
        )
        with self._db.connection() as link, link.cursor() as cursor:
            cursor.executemany(
                statement.encode(), [row | {"region": row["region"] and list(row["region"])} for row in rows]
            )
        return len(rows)

    def take_from_ledger(self) -> int:
        """Register raw files that were verified at the archive since the last call."""
        found = self._db.query(
            "SELECT h.detector, h.detector_name, h.path, h.byte_size, h.recv_tai, i.*"
            " FROM ledger.hop h JOIN ledger.image i USING (obs_id)"
            " WHERE h.hop = 'at_archive' AND h.outcome = 'ok' AND h.detector >= 0 AND h.path <> ''"
            " AND h.recv_tai > %s AND NOT EXISTS (SELECT 1 FROM access.image a"
            "  WHERE a.image_id = 'raw/' || h.obs_id || '/' || h.detector_name AND a.path = h.path"
            "  AND a.begin_tai IS NOT DISTINCT FROM i.begin_tai AND a.end_tai IS NOT DISTINCT FROM i.end_tai)"
            " ORDER BY h.recv_tai LIMIT 5000",
            (self._mark - OVERLAP_S,),
        )
        images = []
        for row in found:
            try:
                images.append(self._raw_image(row))
            except CumbreError as error:
                log.warning("%s detector %s is not published: %s", row["obs_id"], row["detector"], error)
        count = self.register(images)
        if found:
            self._mark = max(row["recv_tai"] for row in found)
        return count

    def _raw_image(self, row: dict[str, Any]) -> Image:
        from cumbre.core.geometry import detector_corners

        if row["instrument"] not in self.instruments:
            raise NotFoundError(f"instrument {row['instrument']!r} is not one of this site's")
        instrument = self.instruments[row["instrument"]]
        detector = instrument.detector(row["detector"])
        sky: dict[str, Any] = {}
        if row["ra"] is not None and row["dec"] is not None and row["image_type"] in SCIENCE_TYPES:
            rotation = row["rotation"] or 0.0
            ra, dec = detector_corners(instrument, detector, row["ra"], row["dec"], rotation)
            sky = _sky(ra, dec) | {
                "boresight_ra": row["ra"], "boresight_dec": row["dec"], "rotation": rotation,
            }  # fmt: skip
        passed = [f for f in instrument.filters if f.name == row["filter"] or f.band == row["band"]]
        return Image(
            image_id=f"{RAW}/{row['obs_id']}/{detector.name}",
            product=RAW, calib_level=1, instrument=instrument.name, obs_id=row["obs_id"],
            detector=detector.id, detector_name=detector.name, path=row["path"], byte_size=row["byte_size"],
            image_type=row["image_type"], program=row["program"] or "", band=row["band"],
            em_min=passed[0].wavelength_nm[0] * 1e-9 if passed else None,
            em_max=passed[0].wavelength_nm[1] * 1e-9 if passed else None,
            exposure_s=row["exposure_s"], begin_tai=row["begin_tai"], end_tai=row["end_tai"],
            nx=detector.nx, ny=detector.ny, pixel_arcsec=detector.pixel_mm * instrument.plate_scale, **sky,
        )  # fmt: skip

    def take_templates(self, index: Path, instrument: str) -> int:
        """Register the templates of an index that are not here yet.

        Parameters
        ----------
        index
            JSON list of {tile, band, detector, path}; paths are relative to it.
        instrument
            Name of the camera.
        """
        import fitsio

        from cumbre.payloads.kernels.wcs import PlaneWcs

        try:
            entries = json.loads(index.read_text())
        except FileNotFoundError:
            return 0
        known = {
            row[0]
            for row in self._db.execute("SELECT image_id FROM access.image WHERE product = %s", (TEMPLATE,))
        }
        images = []
        camera = self.instruments[instrument]
        for entry in entries:
            image_id = f"{TEMPLATE}/{entry['tile']}/{entry['band']}_{entry['detector']}"
            if "version" in entry:
                image_id += f"_{entry['version']}"
            if image_id in known:
                continue
            path = index.parent / entry["path"]
            try:
                with fitsio.FITS(str(path)) as file:
                    wcs = PlaneWcs.from_header(file[0].read_header())
                    ny, nx = (int(v) for v in file["IMAGE"].get_dims())
            except OSError as error:
                log.warning("template %s is not published: %s", path, str(error)[:200])
                continue
            right, top = nx - 0.5, ny - 0.5
            ra, dec = wcs.pix2sky(np.array([-0.5, right, right, -0.5]), np.array([-0.5, -0.5, top, top]))
            passed = [f for f in camera.filters if f.band == entry["band"]]
            detector = camera.detector(entry["detector"])
            images.append(
                Image(
                    image_id=image_id, product=TEMPLATE, calib_level=3, instrument=camera.name,
                    obs_id=f"{entry['tile']}_{entry['band']}", detector=detector.id, detector_name=detector.name,
                    path=str(path), byte_size=path.stat().st_size, target=entry["tile"], band=entry["band"],
                    em_min=passed[0].wavelength_nm[0] * 1e-9 if passed else None,
                    em_max=passed[0].wavelength_nm[1] * 1e-9 if passed else None,
                    nx=nx, ny=ny, pixel_arcsec=wcs.pixel_scale_arcsec, release_at_once=True, **_sky(ra, dec),
                )
            )  # fmt: skip
        return self.register(images)

    # reading

    def find(self, image_id: str, who: Principal) -> Image:
        """One image, if the one who asks may see it.

        Raises
        ------
        NotFoundError
            There is none, or it is not released to this one: nobody learns which.
        """
        found = self.find_many([image_id], who)
        if image_id not in found:
            raise NotFoundError(f"image {image_id[:200]}: there is none, or it is not released to you yet")
        return found[image_id]

    def find_many(self, image_ids: Sequence[str], who: Principal) -> dict[str, Image]:
        """Images by identifier; those that are absent or not released to the one who asks are left out."""
        return {
            image.image_id: image for image in self._select("image_id = ANY(%s)", (list(image_ids),), who)
        }

    def of_product(self, product: str, band: str, who: Principal) -> list[Image]:
        """All images of a product in a band that are released to the one who asks."""
        return self._select("product = %s AND band = %s ORDER BY image_id", (product, band), who)

    def _select(self, condition: str, values: Sequence[Any], who: Principal) -> list[Image]:
        columns = ", ".join(f'"{name}"' for name in _COLUMNS)
        rows = self._db.query(
            f"SELECT {columns} FROM access.image, access.horizon"  # noqa: S608 (names are ours)
            f" WHERE ({released_sql(who.rights)}) AND {condition}",
            values,
        )
        return [Image(**(row | {"region": row["region"] and tuple(row["region"])})) for row in rows]


def released_sql(rights: Iterable[str]) -> str:
    """Condition on ``access.image`` and ``access.horizon``: released to somebody with these rights."""
    have = set(rights)
    if EMBARGO in have:
        return "true"
    column = "collaboration_tai" if COLLABORATION in have else "public_tai"
    return f"release_at_once OR begin_tai <= {column}"


def _sky(ra: Any, dec: Any) -> dict[str, Any]:
    """Centre, corners (counter-clockwise on the sky), size and index of an outline."""
    from cumbre.catalogs.columns import hpx29
    from cumbre.core.geometry import separation_deg

    a, d = np.radians(np.asarray(ra, float)), np.radians(np.asarray(dec, float))
    mean = np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)]).mean(axis=1)
    centre_ra = math.degrees(math.atan2(mean[1], mean[0])) % 360.0
    centre_dec = math.degrees(math.atan2(mean[2], math.hypot(mean[0], mean[1])))
    order = range(4)
    east = np.mod(np.asarray(ra) - centre_ra + 180, 360) - 180
    area = sum(float(east[i] * dec[(i + 1) % 4] - east[(i + 1) % 4] * dec[i]) for i in range(4))
    if area > 0:  # counter-clockwise with east to the right: seen on the sky east is to the left
        order = range(3, -1, -1)
    return {
        "ra": centre_ra,
        "dec": centre_dec,
        "region": tuple(float(v) for i in order for v in (ra[i], dec[i])),
        "fov_deg": 2 * float(separation_deg(centre_ra, centre_dec, ra, dec).max()),
        "hpx29": int(hpx29(np.array([centre_ra]), np.array([centre_dec]))[0]),
    }
