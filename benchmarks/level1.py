"""Level 1 at scale: preload of a detector's history, storing a detector's results, known asteroids of an image.

    python benchmarks/level1.py [--objects 10000000] [--area 5000] [--orbits 1000000] [--regions 20] [--json FILE]

Rows are generated in an embedded PostgreSQL: objects at random over ``--area`` square degrees, in no order (every row
of a region on another page), sources and forced photometry of random objects in every month of a year, and a full
history of the objects in the regions that are read. Nothing is in the connection's or Python's memory before; the
first read of each region is counted. ``limit`` is the same index scans as bare SQL (binary COPY, bytes thrown away).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cumbre.catalogs.columns import circle_ranges, hpx29
from cumbre.catalogs.level1 import Level1
from cumbre.catalogs.partitions import Partitions
from cumbre.catalogs.schema import Table, stored_tables
from cumbre.core.time import Clock
from cumbre.stores.postgres import Database, EmbeddedPostgres

NOW_TAI = 2e9
NOW_MJD = NOW_TAI / 86400 + 40587
RADIUS_DEG = 0.2
PER_OBJECT = {"DiaSource": 20, "DiaForcedSource": 60}
CHUNK = 500_000
TABLES = {table.name: table for table in stored_tables()}
Columns = dict[str, Any]


def sky(rng: np.random.Generator, n: int, area: float) -> tuple[np.ndarray, np.ndarray]:
    """Random places in a band around the equator of the wanted area."""
    top = np.degrees(np.arcsin(min(area / (2 * 360 * np.degrees(1)), 1.0)))
    dec = np.degrees(np.arcsin(rng.uniform(-1, 1, n) * np.sin(np.radians(top))))
    return rng.uniform(0, 360, n), dec


def measurements(
    rng: np.random.Generator, name: str, ids: np.ndarray, ra: np.ndarray, dec: np.ndarray, first: int
):
    """Rows of sources or forced photometry of some objects over the last year."""
    n = len(ids)
    numbers = np.arange(first, first + n)
    out: Columns = {
        "diaobjectid": ids, "visit": numbers // 50, "detector": (numbers % 189).astype(np.int32),
        "midpointmjdtai": NOW_MJD - rng.uniform(0, 365, n), "ra": ra, "dec": dec, "hpx29": hpx29(ra, dec),
        "timeprocessedmjdtai": np.full(n, NOW_MJD), "psfflux": rng.normal(1e4, 10, n).astype(np.float32),
        "psffluxerr": np.full(n, 100, np.float32), "scienceflux": rng.normal(2e4, 10, n).astype(np.float32),
        "sciencefluxerr": np.full(n, 120, np.float32), "band": np.array(list("ugrizy"))[numbers % 6],
    }  # fmt: skip
    if name == "DiaSource":
        out |= {
            "diasourceid": numbers, "x": rng.uniform(0, 4000, n), "y": rng.uniform(0, 4000, n),
            "snr": rng.uniform(5, 50, n).astype(np.float32), "reliability": rng.uniform(0, 1, n).astype(np.float32),
            "apflux": rng.normal(1e4, 10, n).astype(np.float32), "psfchi2": rng.normal(400, 9, n).astype(np.float32),
            "extendedness": rng.uniform(0, 1, n).astype(np.float32),
        }  # fmt: skip
    else:
        out["diaforcedsourceid"] = numbers
    return out


def fill(
    db: Database, rng: np.random.Generator, objects: int, area: float, background: int, regions: np.ndarray
) -> None:
    """Generate everything; indexes and keys are built after the rows."""
    level1 = Level1(db, Clock(NOW_TAI, 0.0, rate=1e-12))
    del level1
    months = np.arange(NOW_MJD - 395, NOW_MJD + 1, 15)
    partitions = Partitions(db)
    for name in PER_OBJECT:
        partitions.ensure(TABLES[name], months)
    db.execute("DROP INDEX level1.diaobject_hpx29")
    db.execute("ALTER TABLE level1.diaobject DROP CONSTRAINT diaobject_pkey")
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, objects, CHUNK):
        n = min(CHUNK, objects - start)
        ra, dec = sky(rng, n, area)
        ids = np.arange(start + 1, start + n + 1) * 7919
        flux = rng.normal(1e4, 100, n).astype(np.float32)
        rows = {
            "diaobjectid": ids, "ra": ra, "dec": dec, "hpx29": hpx29(ra, dec), "ndiasources": np.full(n, 20, np.int32),
            "validitystartmjdtai": np.full(n, NOW_MJD), "firstdiasourcemjdtai": np.full(n, NOW_MJD - 365),
            "lastdiasourcemjdtai": np.full(n, NOW_MJD),
            **{f"{band}_psffluxmean": flux for band in "gri"}, **{f"{band}_psffluxsigma": flux for band in "gri"},
        }  # fmt: skip
        copy(db, TABLES["DiaObject"], rows)
        inside = np.zeros(n, bool)
        for centre in regions:
            # a little more than the circle: what lies just outside has a history too
            inside |= np.hypot((ra - centre[0]) * np.cos(np.radians(dec)), dec - centre[1]) < 1.5 * RADIUS_DEG
        kept.append((ids[inside], ra[inside], dec[inside]))
        if background:
            for name, factor in (("DiaSource", 1), ("DiaForcedSource", 3)):
                m = int(background * factor * n / objects)
                pick = rng.integers(0, n, m)
                first = 1 + 10**12 + start * 10
                copy(db, TABLES[name], measurements(rng, name, ids[pick], ra[pick], dec[pick], first))
    ids, ra, dec = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    for name, factor in PER_OBJECT.items():
        pick = np.repeat(np.arange(len(ids)), factor)
        copy(db, TABLES[name], measurements(rng, name, ids[pick], ra[pick], dec[pick], 1))
    db.execute("ALTER TABLE level1.diaobject ADD PRIMARY KEY (diaobjectid)")
    db.execute("CREATE INDEX diaobject_hpx29 ON level1.diaobject (hpx29)")
    for name in ("diaobject", "diasource", "diaforcedsource"):
        db.execute(f"ANALYZE level1.{name}")


def copy(db: Database, table: Table, columns: Columns) -> None:
    """COPY, measured rows first."""
    db.copy(table.sql_name, list(columns), pa.table(columns))


def bare(db: Database, ra: float, dec: float) -> float:
    """Seconds of the same index scans without us."""
    ranges = circle_ranges(ra, dec, RADIUS_DEG)
    low, high = [pair[0] for pair in ranges], [pair[1] for pair in ranges]
    around = "FROM unnest(%s::bigint[], %s::bigint[]) AS r(low, high) JOIN level1.{} t ON t.hpx29 >= r.low AND t.hpx29 < r.high"
    with db.connection() as link:
        ids = [
            row[0] for row in link.execute(f"SELECT diaobjectid {around.format('diaobject')}", (low, high))
        ]
        span = (NOW_MJD - 365.25, NOW_MJD + 1)
        begun = time.perf_counter()
        statements: list[tuple[str, tuple[Any, ...]]] = [
            (f"SELECT t.* {around.format('diaobject')}", (low, high)),
            (f"SELECT t.* {around.format('diasource')} WHERE diaobjectid IS NULL AND midpointmjdtai BETWEEN %s AND %s",
             (low, high, *span)),
        ]  # fmt: skip
        for name in ("diasource", "diaforcedsource"):
            text = f"SELECT * FROM level1.{name} WHERE diaobjectid = ANY(%s) AND midpointmjdtai BETWEEN %s AND %s"
            statements.append((text, (ids, *span)))
        for text, values in statements:
            with (
                link.cursor() as cursor,
                cursor.copy(f"COPY ({text}) TO STDOUT (FORMAT binary)".encode(), values) as out,
            ):
                for _ in out:
                    pass
        return time.perf_counter() - begun


def preload(db: Database, regions: np.ndarray) -> dict[str, Any]:
    """Read regions once each, ours and bare; every second one bare first, so that neither profits from the other."""
    level1 = Level1(db, Clock(NOW_TAI, 0.0, rate=1e-12))
    first: dict[str, list[float]] = {"ours": [], "limit": []}
    again: dict[str, list[float]] = {"ours": [], "limit": []}
    counts: dict[str, list[int]] = {}

    def ours(ra: float, dec: float) -> float:
        begun = time.perf_counter()
        found = level1.load_region(ra, dec, RADIUS_DEG)
        took = time.perf_counter() - begun
        for name, table in found.items():
            counts.setdefault(name, []).append(table.num_rows)
        return took

    for k, (ra, dec) in enumerate(regions.tolist()):
        if k % 2:
            first["ours"].append(ours(ra, dec))
        else:
            first["limit"].append(bare(db, ra, dec))
        again["ours"].append(ours(ra, dec))
        again["limit"].append(bare(db, ra, dec))
    return {
        "rows": {name: int(np.median(values)) for name, values in counts.items()},
        "first_s": {name: statistics.median(values) for name, values in first.items() if values},
        "warm_s": {name: statistics.median(values) for name, values in again.items()},
        "warm_best_s": {name: min(values) for name, values in again.items()},
    }


def storing(db: Database, detectors: int) -> dict[str, Any]:
    """One transaction a detector: 60 sources, 300 forced, 60 objects, 60 packets of 40 kB; then all again."""
    from cumbre.core.errors import ConflictError

    level1 = Level1(db, Clock(NOW_TAI, 0.0, rate=1e-12))
    rng = np.random.default_rng(9)
    took, refused = [], []
    for k in range(detectors):
        visit = 3 * 10**12 + k
        ids = np.arange(60) + 10**14 + 60 * k
        ra, dec = sky(rng, 60, 100.0)
        common = {
            "visit": np.full(60, visit),
            "detector": np.zeros(60, int),
            "midpointMjdTai": np.full(60, NOW_MJD),
        }
        sources = common | {
            "diaSourceId": ids,
            "diaObjectId": ids,
            "ra": ra,
            "dec": dec,
            "x": ra,
            "y": ra,
            "psfFlux": ra,
        }
        objects = {
            "diaObjectId": ids,
            "ra": ra,
            "dec": dec,
            "firstDiaSourceMjdTai": np.full(60, NOW_MJD),
            "nDiaSources": np.ones(60, int),
        }
        many = np.arange(300)
        forced = {
            "diaForcedSourceId": many + 10**15 + 300 * k, "diaObjectId": many + 10**15 + 300 * k,
            "visit": np.full(300, visit), "detector": np.zeros(300, int), "midpointMjdTai": np.full(300, NOW_MJD),
            "ra": np.full(300, 10.0), "dec": np.full(300, 1.0), "psfFlux": np.ones(300),
        }  # fmt: skip
        packets = [(int(identifier), bytes(40_000)) for identifier in ids]
        arguments = {"dia_sources": sources, "dia_objects": objects, "forced": forced, "packets": packets}
        begun = time.perf_counter()
        level1.store(visit, 0, **arguments)
        took.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        try:
            level1.store(visit, 0, **arguments)
        except ConflictError:
            refused.append(time.perf_counter() - begun)
    return {
        "store_s": statistics.median(took),
        "replay_refused_s": statistics.median(refused),
        "replays_refused": len(refused),
    }


def asteroids(n: int, regions: np.ndarray, folder: Path) -> dict[str, Any]:
    """A night's table of n orbits at one epoch 60 days before: CPU seconds to make it and to find an image's."""
    from cumbre.payloads.solar_system.bodies import Observer
    from cumbre.payloads.solar_system.night import NightTable
    from cumbre.payloads.solar_system.orbits import Orbits

    rng = np.random.default_rng(3)
    near = np.arange(n) % 40 == 0
    a = np.where(near, rng.uniform(0.8, 1.8, n), rng.uniform(2.1, 3.3, n))
    e = np.where(near, rng.uniform(0.1, 0.6, n), rng.uniform(0, 0.3, n))
    angles = rng.uniform(0, 360, (2, n))
    orbits = Orbits.of_columns(
        {
            "ssObjectId": np.arange(1, n + 1), "q": a * (1 - e), "e": e, "i": rng.rayleigh(8, n), "node": angles[0],
            "argperi": angles[1], "peri_time": rng.uniform(60000, 61300, n), "epoch_mjd": np.full(n, 61300.0),
            "h": np.full(n, 18.0), "g": np.full(n, 0.15),
        }
    )  # fmt: skip
    observer = Observer.at(-30.2446, -70.7494, 2663.0)
    few = Orbits(*(getattr(orbits, name)[:2] for name in orbits.__slots__))
    NightTable.build(few, 20261120, observer).near(0, 0, 1, 61364.6)  # compiled
    begun = time.process_time()
    NightTable.build(orbits, 20261120, observer).save(folder / "night.tab")
    made = time.process_time() - begun
    night = NightTable.open(folder / "night.tab", observer)
    took, found = [], []
    for ra, _ in regions.tolist():
        # along the ecliptic, where they are
        dec = 23.44 * np.sin(np.radians(ra))
        begun = time.process_time()
        found.append(len(night.near(ra, float(dec), RADIUS_DEG, 61364.6)))
        took.append(time.process_time() - begun)
    return {
        "orbits": n, "table_cpu_s": made, "near_cpu_s": statistics.median(took), "near_first_cpu_s": took[0],
        "objects_found": int(np.median(found)), "table_mb": (folder / "night.tab").stat().st_size / 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", type=int, default=10_000_000)
    parser.add_argument("--area", type=float, default=5000.0, help="square degrees of the objects")
    parser.add_argument(
        "--background", type=int, default=2_000_000, help="sources of random objects; thrice as many forced"
    )
    parser.add_argument("--regions", type=int, default=20)
    parser.add_argument("--orbits", type=int, default=1_000_000)
    parser.add_argument("--detectors", type=int, default=30, help="of the storing part")
    parser.add_argument("--folder", type=Path, help="of the database; kept, and used again when it is filled")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(1)
    regions = np.stack(sky(rng, arguments.regions, arguments.area * 0.9), axis=1)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="cumbre-level1-"))
    folder.mkdir(parents=True, exist_ok=True)
    server = EmbeddedPostgres(folder / "postgres", durable=False)
    db = Database(server.start())
    try:
        begun = time.monotonic()
        if not (folder / "filled").exists():
            fill(db, rng, arguments.objects, arguments.area, arguments.background, regions)
            (folder / "filled").write_text(str(arguments.objects))
            print(f"filled in {time.monotonic() - begun:.0f} s")
        sizes = db.execute(
            "SELECT (SELECT count(*) FROM level1.diaobject), (SELECT count(*) FROM level1.diasource),"
            " (SELECT count(*) FROM level1.diaforcedsource), pg_database_size(current_database()) / 1e9"
        )[0]
        result: dict[str, Any] = {
            "objects": sizes[0], "sources": sizes[1], "forced": sizes[2], "database_gb": float(sizes[3]),
            "preload": preload(db, regions), "store": storing(db, arguments.detectors),
        }  # fmt: skip
        result["solar_system"] = asteroids(arguments.orbits, regions, folder)
    finally:
        db.close()
        server.stop()
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


def show(result: dict[str, Any]) -> None:
    """The table."""
    read, stored, moving = result["preload"], result["store"], result["solar_system"]
    print(
        f"{result['objects']:,} objects, {result['sources']:,} sources, {result['forced']:,} forced, "
        f"{result['database_gb']:.1f} GB; a region: {read['rows']}"
    )
    print(f"{'':38s}{'ours':>10s}{'limit':>10s}{'ratio':>8s}")
    for label, key in (
        ("preload, region not read before (s)", "first_s"),
        ("preload, median of warm (s)", "warm_s"),
        ("preload, best of warm (s)", "warm_best_s"),
    ):
        ours, limit = read[key].get("ours"), read[key].get("limit")
        if ours and limit:
            print(f"{label:38s}{ours:10.3f}{limit:10.3f}{ours / limit:8.1f}")
    print(f"{'store of a detector (s)':38s}{stored['store_s']:10.3f}")
    print(f"{'replay refused (s)':38s}{stored['replay_refused_s']:10.3f}")
    print(
        f"{moving['orbits']:,} orbits: table {moving['table_cpu_s']:.1f} s CPU, {moving['table_mb']:.0f} MB;"
    )
    print(
        f"  one image: {1000 * moving['near_cpu_s']:.1f} ms CPU, first {1000 * moving['near_first_cpu_s']:.1f} ms"
    )


if __name__ == "__main__":
    main()
