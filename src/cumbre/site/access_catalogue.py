"""The data that ``cumbre benchmark access`` asks: a catalogue in both engines, outlines of images, one large image.

Everything is made once in a folder and taken from there afterwards. Ten million rows of 14 columns need about 2.5 GB.
"""

# ruff: noqa: S608 (queries of our own names and numbers)
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cumbre.access.tables import Column, Position, Table
from cumbre.stores.postgres import Database, EmbeddedPostgres

CHUNK = 1_000_000
CAMERA = "lsstcam"
POINTING = (200.0, -30.0, 70.0)
OBS_ID = "MC_O_20261116_000001"
_KINDS = {"long": "bigint", "double": "float8", "float": "real", "int": "int", "boolean": "boolean"}
COLUMNS = (
    Column("objectId", "long", sql_name="objectid"), Column("ra", "double", unit="deg"),
    Column("dec", "double", unit="deg"), Column("hpx29", "long"),
    *(Column(f"{band}_mag", "float", unit="mag") for band in "ugrizy"),
    Column("pm_ra", "double"), Column("pm_dec", "double"), Column("visits", "int"), Column("extended", "boolean"),
)  # fmt: skip


def parquet_of(work: Path, rows: int) -> Path:
    """Where the catalogue's file is."""
    return work / f"object-{rows}.parquet"


def tables_of(work: Path, rows: int) -> list[Table]:
    """``pg.object`` and ``files.object``: the same rows in PostgreSQL and in Parquet."""
    place = Position("ra", "dec", "hpx29")
    return [
        Table("pg", "object", COLUMNS, engine="postgres", source="cat.object", position=place, rows=rows),
        Table("files", "object", COLUMNS, engine="parquet", source=str(parquet_of(work, rows)), position=place,
              rows=rows),
    ]  # fmt: skip


def server_of(work: Path, rows: int) -> EmbeddedPostgres:
    """The database's server."""
    return EmbeddedPostgres(work / f"pg-{rows}", durable=False)


def _rows(first: int, count: int, total: int) -> pa.Table:
    """Part of the catalogue: pixels grow with the row number, so that all of it is sorted."""
    import hpgeom

    rng = np.random.default_rng(first)
    span = 12 * (1 << 58)
    pixel = np.sort(rng.integers(first * (span // total), (first + count) * (span // total), count))
    ra, dec = hpgeom.pixel_to_angle(1 << 29, pixel)
    data: dict[str, Any] = {"objectid": np.arange(first, first + count), "ra": ra, "dec": dec, "hpx29": pixel}
    for band in "ugrizy":
        data[f"{band}_mag"] = rng.normal(22, 2, count).astype(np.float32)
    data |= {"pm_ra": rng.normal(size=count), "pm_dec": rng.normal(size=count)}
    data |= {
        "visits": rng.integers(0, 900, count).astype(np.int32),
        "extended": rng.uniform(size=count) < 0.3,
    }
    return pa.table(data)


def make_parquet(path: Path, total: int) -> None:
    """The catalogue as one sorted file."""
    if path.exists():
        return
    waiting = path.with_suffix(".part")
    writer = None
    for first in range(0, total, CHUNK):
        part = _rows(first, min(CHUNK, total - first), total)
        writer = writer or pq.ParquetWriter(waiting, part.schema, compression="zstd", compression_level=1)
        writer.write_table(part, row_group_size=100_000)
    assert writer is not None
    writer.close()
    waiting.rename(path)


def _once(db: Database, name: str) -> bool:
    """Whether a part has still to be made."""
    return not db.execute("SELECT to_regclass(%s)", (f"cat.{name}",))[0][0]


def fill_catalogue(db: Database, parquet: Path) -> None:
    """The same rows in PostgreSQL."""
    # a server that was killed empties tables without a log
    if not _once(db, "ready") and db.execute("SELECT 1 FROM cat.object LIMIT 1"):
        return
    listed = ", ".join(f'"{c.stored_name}" {_KINDS[c.datatype]}' for c in COLUMNS)
    db.execute(
        "CREATE SCHEMA IF NOT EXISTS cat; DROP TABLE IF EXISTS cat.object, cat.ready;"
        f" CREATE UNLOGGED TABLE cat.object ({listed})"
    )
    for batch in pq.ParquetFile(parquet).iter_batches(CHUNK):
        part = pa.Table.from_batches([batch])
        db.copy("cat.object", part.column_names, part)
    db.execute("CREATE INDEX ON cat.object (hpx29)")
    _vacuum(db, "cat.object")
    db.execute("CREATE TABLE cat.ready ()")


def _vacuum(db: Database, table: str) -> None:
    with db.connection() as link:
        link.commit()
        link.autocommit = True
        link.execute(f"VACUUM (ANALYZE) {table}".encode())
        link.autocommit = False


def fill_images(db: Database, folder: Path, outlines: int) -> None:
    """One raw image of a large camera at the archive, and as many outlines of other images as asked.

    The tables of images, of the ledger and of what is published must be there.
    """
    if _once(db, "image_ready"):
        _one_image(db, folder)
        db.execute("CREATE TABLE cat.image_ready ()")
    if _once(db, f"outlines_{outlines}"):
        # squares of 0.2 degrees over the sky but its poles, as detectors' images are
        db.execute(
            "DELETE FROM access.image WHERE product = 'outline'; INSERT INTO access.image (image_id, product,"
            " calib_level, instrument, obs_id, detector, detector_name, path, image_type, ra, dec, region, fov_deg, nx,"
            " ny, release_at_once) SELECT 'outline/' || i, 'outline', 1, 'LSSTCam', 'outline' || i, 0, 'R22_S11', '',"
            " 'OBJECT', a, b, ARRAY[a-h, b-0.1, a+h, b-0.1, a+h, b+0.1, a-h, b+0.1], 0.28, 4072, 4000, true"
            " FROM (SELECT i, a, b, 0.1 / cos(radians(b)) AS h FROM (SELECT i, 360 * random() AS a,"
            f" degrees(asin(1.97 * random() - 0.985)) AS b FROM generate_series(1, {outlines}) i) p) q"
        )
        _vacuum(db, "access.image")
        db.execute(f"CREATE TABLE cat.outlines_{outlines} ()")


def _one_image(db: Database, folder: Path) -> None:
    from cumbre.capture.raw_fits import raw_fits_bytes
    from cumbre.core.instrument import load_instrument
    from cumbre.stores.files import write_atomic

    chip = next(d for d in load_instrument(CAMERA).detectors if d.purpose == "SCIENCE")
    rng = np.random.default_rng(1)
    shape = (len(chip.amplifiers), *chip.amplifiers[0].raw_shape)
    written = write_atomic(
        folder / f"{OBS_ID}.fits", raw_fits_bytes(chip, rng.normal(1000, 12, shape).astype(np.uint16), [])
    )
    db.execute(
        "INSERT INTO ledger.image (obs_id, instrument, exposure_id, group_id, day_obs, seq_num, image_type, band,"
        " filter, exposure_s, ra, dec, rotation, begin_tai, end_tai) VALUES (%s, 'LSSTCam', 1, '', 20261116, 1,"
        " 'OBJECT', 'r', 'r', 30, %s, %s, %s, 1.7e9, 1.7e9) ON CONFLICT DO NOTHING",
        (OBS_ID, *POINTING),
    )
    db.execute(
        "INSERT INTO ledger.hop (obs_id, detector, detector_name, hop, outcome, place, path, byte_size, checksum,"
        " hop_tai, recv_tai) VALUES (%s, %s, %s, 'at_archive', 'ok', 'archive', %s, %s, %s, 1.7e9, 1.7e9)"
        " ON CONFLICT DO NOTHING",
        (OBS_ID, chip.id, chip.name, str(folder / f"{OBS_ID}.fits"), written.size, written.sha256),
    )


def serve(work: Path, rows: int, outlines: int, dsn: str) -> None:
    """A site's data access over this data, until standard input ends; prints its address first."""
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock
    from cumbre.site.access import SiteAccess
    from cumbre.site.profiles import create_site
    from cumbre.web.service import WebService

    root = work / "site"
    if not (root / "site.yaml").exists():
        create_site(root, instrument=CAMERA, simulated=False)
    site = Site.load(root)
    site.config.web = site.config.web.model_copy(update={"port": 0})
    site.config.access = site.config.access.model_copy(
        update={"rows": 10**9, "sync_s": 600.0, "memory_mb": 2048, "anonymous_per_minute": 10**7}
    )
    db = Database(dsn)
    clock = Clock.starting_at(1.8e9, rate=1.0)
    mounted = SiteAccess(site=site, bus=None, clock=clock, db=db)
    mounted.service.tables.providers.append(lambda _user: tables_of(work, rows))
    fill_images(db, work, outlines)
    mounted.step()
    web = WebService(site=site, bus=None, clock=clock, db=db, mounted=[mounted])  # type: ignore[arg-type]
    try:
        url = (root / "run" / "web.url").read_text().strip().rstrip("/")
        sys.stdout.write(json.dumps({"url": url, "authority": site.config.access.authority}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        web.close()
        db.close()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
