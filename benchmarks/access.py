"""Queries through planner, engines and encoders: ``python benchmarks/access.py [--rows 10_000_000] [--json]``.

A synthetic catalogue of 14 columns is made once in a scratch folder (``--scratch``, else a temporary one that is
removed): Parquet sorted by HEALPix, and the same rows in a PostgreSQL of its own. Each figure stands beside the
bare engine, which is the limit. 10 M rows need 2.5 GB of disk and about 2 minutes to make.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cumbre.access.engines import Engines
from cumbre.access.limits import Limits
from cumbre.access.planner import make_plan
from cumbre.access.query import run
from cumbre.access.results import write
from cumbre.access.tables import Column, Position, Table, Tables
from cumbre.access.user import ANYBODY
from cumbre.stores.postgres import Database, EmbeddedPostgres

LIMITS = Limits(rows=100_000_000, bytes=1 << 40, seconds=600, memory_mb=4096)
CHUNK = 1_000_000
_KINDS = {"long": "bigint", "double": "float8", "float": "real", "int": "int", "boolean": "boolean"}
COLUMNS = (
    Column("objectId", "long", sql_name="objectid"), Column("ra", "double", unit="deg"),
    Column("dec", "double", unit="deg"), Column("hpx29", "long"),
    *(Column(f"{band}_mag", "float", unit="mag") for band in "ugrizy"),
    Column("pm_ra", "double"), Column("pm_dec", "double"), Column("visits", "int"), Column("extended", "boolean"),
)  # fmt: skip


def rows_of(first: int, count: int, total: int) -> pa.Table:
    """Part of the catalogue: pixels grow with the row number, so that all of it is sorted."""
    import hpgeom

    rng = np.random.default_rng(first)
    span = 12 * (1 << 58)
    low, high = first * (span // total), (first + count) * (span // total)
    pixel = np.sort(rng.integers(low, high, count))
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
        part = rows_of(first, min(CHUNK, total - first), total)
        writer = writer or pq.ParquetWriter(waiting, part.schema, compression="zstd", compression_level=1)
        writer.write_table(part, row_group_size=100_000)
    assert writer is not None
    writer.close()
    waiting.rename(path)


def fill_postgres(db: Database, parquet: Path) -> None:
    """The same rows in PostgreSQL."""
    if db.execute("SELECT to_regclass('cat.ready')")[0][0]:
        return
    listed = ", ".join(f'"{c.stored_name}" {_KINDS[c.datatype]}' for c in COLUMNS)
    db.execute(
        f"DROP SCHEMA IF EXISTS cat CASCADE; CREATE SCHEMA cat; CREATE UNLOGGED TABLE cat.object ({listed})"
    )
    for batch in pq.ParquetFile(parquet).iter_batches(CHUNK):
        part = pa.Table.from_batches([batch])
        db.copy("cat.object", part.column_names, part)
    db.execute("CREATE INDEX ON cat.object (hpx29)")
    with db.connection() as link:
        link.commit()
        link.autocommit = True
        link.execute("VACUUM (ANALYZE) cat.object")
        link.autocommit = False
    db.execute("CREATE TABLE cat.ready ()")


def timed(work: Callable[[], Any], repeat: int = 3) -> float:
    """Best wall time in seconds."""
    best = float("inf")
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


class Bench:
    """The catalogue in both engines."""

    def __init__(self, scratch: Path, total: int) -> None:
        self.total = total
        self.parquet = scratch / f"object-{total}.parquet"
        make_parquet(self.parquet, total)
        self.server = EmbeddedPostgres(scratch / f"pg-{total}", durable=False)
        self.db = Database(self.server.start())
        fill_postgres(self.db, self.parquet)
        place = Position("ra", "dec", "hpx29")
        self.engines = Engines(self.db, scratch=scratch)
        self.tables = Tables(
            [
                Table("pg", "object", COLUMNS, engine="postgres", source="cat.object", position=place, rows=total),
                Table("files", "object", COLUMNS, engine="parquet", source=str(self.parquet), position=place, rows=total),
            ]
        )  # fmt: skip

    def close(self) -> None:
        self.db.close()
        self.server.stop()

    def ask(self, adql: str, **more: Any) -> pa.Table:
        return run(adql, tables=self.tables, engines=self.engines, limits=LIMITS, **more).read_all()

    def document(self, adql: str, form: str) -> dict[str, float]:
        """Rows a second and seconds to the first byte of a whole document."""
        first, size = 0.0, 0
        begin, cpu = time.perf_counter(), time.process_time()

        def take(piece: bytes) -> None:
            nonlocal first, size
            first = first or time.perf_counter() - begin
            size += len(piece)

        result = run(adql, tables=self.tables, engines=self.engines, limits=LIMITS)
        outcome = write(result, form, take)
        assert outcome == "OK", outcome
        seconds = time.perf_counter() - begin
        return {
            "rows_per_s": round(result.rows / seconds), "first_byte_s": round(first, 3), "seconds": round(seconds, 2),
            "cpu_s": round(time.process_time() - cpu, 2), "bytes_per_row": round(size / max(result.rows, 1), 1),
        }  # fmt: skip

    def cones(self, schema: str, radius: float, count: int = 40) -> dict[str, float]:
        """Median of many small cones as a VOTable, and of the bare SQL that the plan has."""
        rng = np.random.default_rng(7)
        centres = [(rng.uniform(0, 360), np.degrees(np.arcsin(rng.uniform(-1, 1)))) for _ in range(count)]
        ours, bare, planning, found = [], [], [], 0
        for ra, dec in centres:
            adql = f"SELECT * FROM {schema}.object WHERE 1 = CONTAINS(POINT(ra, dec), CIRCLE({ra}, {dec}, {radius}))"
            begin = time.perf_counter()
            result = run(adql, tables=self.tables, engines=self.engines, limits=LIMITS)
            write(result, "votable", len)
            ours.append(time.perf_counter() - begin)
            found += result.rows
            begin = time.perf_counter()
            plan = make_plan(adql, tables=self.tables, user=ANYBODY)
            planning.append(time.perf_counter() - begin)
            bare.append(self._bare(schema, plan.sql()))
        return {
            "median_ms": round(1000 * statistics.median(ours), 2),
            "p95_ms": round(1000 * sorted(ours)[int(0.95 * count)], 2),
            "bare_ms": round(1000 * statistics.median(bare), 2),
            "planning_ms": round(1000 * statistics.median(planning), 2), "rows": round(found / count, 1),
        }  # fmt: skip

    def _bare(self, schema: str, sql: str) -> float:
        begin = time.perf_counter()
        if schema == "pg":
            self.db.execute(sql)
        else:
            self._duck().execute(sql).fetchall()
        return time.perf_counter() - begin

    def _duck(self) -> Any:
        import duckdb

        if not hasattr(self, "_link"):
            self._link = duckdb.connect(config={"threads": 2})
            self._link.execute("SET parquet_metadata_cache = true")
        return self._link

    def scan(self) -> dict[str, float]:
        """An aggregate over everything, and the same in bare DuckDB."""
        sql = "SELECT count(*), avg(g_mag - r_mag), max(visits) FROM {} WHERE r_mag < 21 AND extended = {}"
        source = f"read_parquet('{self.parquet}')"
        ours = timed(lambda: self.ask(sql.format("files.object", "TRUE")), 5)
        bare = timed(lambda: self._duck().execute(sql.format(source, "TRUE")).fetchall(), 5)
        return {"seconds": round(ours, 3), "bare_s": round(bare, 3), "ratio": round(ours / bare, 2)}

    def match(self, schema: str, count: int) -> dict[str, float]:
        """Upload of positions near rows of the catalogue, matched at 2 arcseconds."""
        rng = np.random.default_rng(3)
        rows = np.sort(rng.choice(self.total, count, replace=False))
        picked = pq.read_table(self.parquet, columns=["ra", "dec"]).take(pa.array(rows))
        upload = pa.table(
            {
                "n": np.arange(count), "ra": picked.column("ra").to_numpy(),
                "dec": np.clip(picked.column("dec").to_numpy() + 1 / 3600, -90, 90),
            }
        )  # fmt: skip
        adql = (
            f"SELECT u.n, o.objectId FROM TAP_UPLOAD.mine AS u JOIN {schema}.object AS o"
            f" ON DISTANCE(u.ra, u.dec, o.ra, o.dec) < {2 / 3600}"
        )
        found = 0

        def work() -> None:
            nonlocal found
            found = self.ask(adql, uploads={"mine": upload}).num_rows

        return {"seconds": round(timed(work), 3), "pairs": found, "positions": count}


def measure(bench: Bench) -> dict[str, Any]:
    """All figures."""
    everything = "SELECT * FROM {}.object"
    figures: dict[str, Any] = {"rows": bench.total}
    for schema in ("pg", "files"):
        bench.cones(schema, 0.1, 5)
        for radius in (1 / 60, 0.1, 1.0):
            figures[f"cone {radius:.3g} deg, {schema}"] = bench.cones(schema, radius)
    figures["BINARY2 from PostgreSQL"] = bench.document(everything.format("pg"), "votable")
    for form in ("votable", "votable-tabledata", "parquet", "fits", "csv", "json"):
        some = (
            everything.format("files")
            if form in ("votable", "parquet")
            else "SELECT TOP 1000000 * FROM files.object"
        )
        figures[f"{form} from Parquet"] = bench.document(some, form)
    figures["scan and aggregate"] = bench.scan()
    for schema in ("files", "pg"):
        figures[f"match 50k, {schema}"] = bench.match(schema, min(50_000, bench.total // 10))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=lambda text: int(text.replace("_", "")), default=10_000_000)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    scratch = given.scratch or Path(tempfile.mkdtemp(prefix="cumbre-access-"))
    scratch.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    try:
        bench = Bench(scratch, given.rows)
        made = time.perf_counter() - begin
        try:
            figures = measure(bench)
        finally:
            bench.close()
    finally:
        if given.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)
    figures["preparation_s"] = round(made, 1)
    if given.json:
        json.dump(figures, sys.stdout, indent=1)
        return
    for name, value in figures.items():
        print(
            f"{name:32}",
            ", ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else value,
        )


if __name__ == "__main__":
    main()
