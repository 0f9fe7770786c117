"""Data access over HTTP beside the bare engines: what ``cumbre benchmark access`` measures.

A site's web service runs in a process of its own over a catalogue in PostgreSQL and in Parquet. Each figure has the
wall time that a client sees, the processor seconds of service and database, and, where an engine is the limit, the
same work by the bare engine in this process.
"""

# ruff: noqa: S608 (queries of our own names and numbers)
from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cumbre.access.engines.copy_stream import copy_rows
from cumbre.access.pixels import neighbourhood
from cumbre.access.planner import make_plan
from cumbre.access.tables import Tables
from cumbre.access.user import ANYBODY
from cumbre.site import access_catalogue as catalogue
from cumbre.site.access_client import CONES, JOBS, Service, centres, multipart
from cumbre.site.access_load import crowd
from cumbre.site.access_peer import Peer
from cumbre.stores.postgres import Database

START_S = 1800.0
MATCH_DEG = 2 / 3600
WANTED = {
    "cone 0.1 deg, pg": "median < 30 ms", "cone 0.1 deg, files": "median < 30 ms",
    "BINARY2 from PostgreSQL": ">= 0.8 M rows/s, first byte < 0.5 s",
    "BINARY2 from Parquet": ">= 2 M rows/s, first byte < 0.5 s", "scan and aggregate": "ratio < 1.5",
    "match 50k, files": "< 1 s", "match 50k, pg": "< 1 s", "async count": "< 0.3 s", "cutout 200x200": "< 100 ms",
    "crowd": "no failure, small p95 < 1 s",
}  # fmt: skip


class Meter:
    """Processor seconds and memory of the service and of its database."""

    def __init__(self, service: int, postmaster: int) -> None:
        import psutil

        self._service, self._postmaster = psutil.Process(service), psutil.Process(postmaster)
        self.database = postmaster

    def seconds(self) -> float:
        """Of the service, and of every server process of the database that is or was."""
        import psutil

        own, gone = self._service.cpu_times(), self._postmaster.cpu_times()
        total = own.user + own.system + gone.children_user + gone.children_system
        for child in self._postmaster.children():
            try:
                used = child.cpu_times()
                total += used.user + used.system
            except psutil.NoSuchProcess:
                continue
        return float(total)

    def memory_mb(self) -> int:
        """Resident memory of the service."""
        return int(self._service.memory_info().rss) >> 20


class Bench(Service):
    """The running service, and the bare engines beside it."""

    def __init__(self, url: str, authority: str, work: Path, rows: int, db: Database, meter: Meter) -> None:
        super().__init__(url)
        self.url, self.authority, self.rows, self.db, self.meter = url, authority, rows, db, meter
        self.parquet = catalogue.parquet_of(work, rows)
        self.tables = Tables(catalogue.tables_of(work, rows))

    def many(self, calls: list[Callable[[], dict[str, Any]]]) -> dict[str, float]:
        """Wall times of many small requests, and processor time of one."""
        cpu = self.meter.seconds()
        found = self.times(calls)
        return found | {"cpu_ms": round(1000 * (self.meter.seconds() - cpu) / (len(calls) + 1), 1)}

    # bare

    def duck(self) -> Any:
        """DuckDB as it comes."""
        import duckdb

        if not hasattr(self, "_duck"):
            self._duck = duckdb.connect(config={"threads": 2})
            self._duck.execute("SET parquet_metadata_cache = true")
        return self._duck

    def sql(self, query: str) -> str:
        """The SQL that our planner makes."""
        return make_plan(query, tables=self.tables, user=ANYBODY).sql()

    def bare(self, schema: str, sql: str) -> float:
        """Seconds of the engine alone."""
        begin = time.perf_counter()
        if schema == "pg":
            self.db.execute(sql)
        else:
            self.duck().execute(sql).fetchall()
        return time.perf_counter() - begin

    # figures

    def cones(self, schema: str, radius: float) -> dict[str, float]:
        """Cones as VOTables over HTTP, and their bare SQL."""
        queries = [
            f"SELECT * FROM {schema}.object WHERE DISTANCE(ra, dec, {ra}, {dec}) < {radius}"
            for ra, dec in centres()
        ]
        found = self.many([lambda q=query: self.ask(q) for query in queries])  # type: ignore[misc]
        plans = [self.sql(query) for query in queries]
        self.bare(schema, plans[0])
        bare = statistics.median(self.bare(schema, sql) for sql in plans)
        return found | {"bare_ms": round(1000 * bare, 1)}

    def document(self, query: str, form: str, rows: int) -> dict[str, float]:
        """A large result as a document over HTTP."""
        cpu = self.meter.seconds()
        got = self.ask(query, RESPONSEFORMAT=form)
        used = self.meter.seconds() - cpu
        return {
            "rows_per_s": round(rows / got["seconds"]), "rows_per_cpu_s": round(rows / max(used, 0.01)),
            "first_byte_s": round(got["first"], 3), "seconds": round(got["seconds"], 2), "cpu_s": round(used, 2),
            "bytes_per_row": round(got["bytes"] / rows, 1), "service_mb": self.meter.memory_mb(),
        }  # fmt: skip

    def bare_copy(self) -> dict[str, float]:
        """What PostgreSQL sends by binary COPY to a reader that looks at nothing: the limit of documents from it."""
        begin, cpu = time.perf_counter(), time.process_time() + self.meter.seconds()
        with self.db.connection() as link:
            for _ in copy_rows(link, b"COPY cat.object TO STDOUT (FORMAT binary)"):
                pass
        seconds = time.perf_counter() - begin
        used = time.process_time() + self.meter.seconds() - cpu
        return {
            "rows_per_s": round(self.rows / seconds),
            "rows_per_cpu_s": round(self.rows / max(used, 0.01)),
        }

    def bare_scan(self) -> dict[str, float]:
        """DuckDB's Arrow batches of the whole file: the limit of documents from Parquet."""
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in self.duck().sql(f"SELECT * FROM read_parquet('{self.parquet}')").to_arrow_reader(65_536):
            pass
        seconds, used = time.perf_counter() - begin, time.process_time() - cpu
        return {
            "rows_per_s": round(self.rows / seconds),
            "rows_per_cpu_s": round(self.rows / max(used, 0.01)),
        }

    def scan(self) -> dict[str, float]:
        """An aggregate over everything, over HTTP and in bare DuckDB, in turns."""
        sql = "SELECT count(*), avg(g_mag - r_mag), max(visits) FROM {} WHERE r_mag < 21 AND extended = TRUE"
        source = f"read_parquet('{self.parquet}')"
        ours, bare, ours_cpu, bare_cpu = [], [], [], []
        for _ in range(6):
            cpu = self.meter.seconds()
            ours.append(self.ask(sql.format("files.object"))["seconds"])
            ours_cpu.append(self.meter.seconds() - cpu)
            cpu = time.process_time()
            bare.append(self.bare("files", sql.format(source)))
            bare_cpu.append(time.process_time() - cpu)
        return {
            "seconds": round(min(ours), 3), "bare_s": round(min(bare), 3), "ratio": round(min(ours) / min(bare), 2),
            "cpu_s": round(min(ours_cpu), 3), "bare_cpu_s": round(min(bare_cpu), 3),
            "cpu_ratio": round(min(ours_cpu) / min(bare_cpu), 2),
        }  # fmt: skip

    def positions(self, count: int) -> pa.Table:
        """Positions one arc second from rows of the catalogue."""
        rng = np.random.default_rng(3)
        rows = np.sort(rng.choice(self.rows, count, replace=False))
        picked = pq.read_table(self.parquet, columns=["ra", "dec"]).take(pa.array(rows))
        dec = np.clip(picked.column("dec").to_numpy() + 1 / 3600, -90, 90)
        return pa.table({"n": np.arange(count), "ra": picked.column("ra").to_numpy(), "dec": dec})

    def match(self, schema: str, count: int) -> dict[str, float]:
        """Positions near rows of the catalogue, uploaded as Parquet and matched at 2 arc seconds."""
        upload = self.positions(count)
        query = (
            f"SELECT u.n, o.objectId FROM TAP_UPLOAD.mine AS u JOIN {schema}.object AS o"
            f" ON DISTANCE(u.ra, u.dec, o.ra, o.dec) < {MATCH_DEG}"
        )
        parquet = io.BytesIO()
        pq.write_table(upload, parquet)
        body, kind = multipart(query, parquet.getvalue(), "mine.parquet")
        times, used, answer = [], [], {}
        for _ in range(3):
            cpu = self.meter.seconds()
            answer = self.fetch("/tap/sync", body=body, kind=kind)
            times.append(answer["seconds"])
            used.append(self.meter.seconds() - cpu)
        figures = {"seconds": round(min(times), 3), "cpu_s": round(min(used), 3), "positions": count}
        if schema == "files":
            figures["bare_s"] = round(self._bare_match(upload), 3)
        return figures | {"bytes": answer["bytes"]}

    def _bare_match(self, upload: pa.Table) -> float:
        """The same join on pixels that are computed beforehand."""
        ra, dec = upload.column("ra").to_numpy(), upload.column("dec").to_numpy()
        pixels = neighbourhood(ra, dec, 14)
        flat = pa.table({"n": np.repeat(np.arange(len(ra)), 9), "pixel": pixels.ravel()})
        link = self.duck()
        link.register("flat", flat)
        return min(
            self.bare(
                "files",
                f"SELECT f.n, o.objectid, o.ra, o.dec FROM flat f JOIN read_parquet('{self.parquet}') o"
                " ON (o.hpx29 >> 30) = f.pixel",
            )
            for _ in range(2)
        )

    def job(self) -> dict[str, float]:
        """Asynchronous jobs from their making to their result."""
        return self.many([lambda: self.one_job("SELECT count(*) AS n FROM tap_schema.schemas")] * JOBS)

    def cutouts(self) -> dict[str, float]:
        """200 × 200 pixels of a compressed image of a large camera, at different places of it."""
        from cumbre.core.geometry import sky_from_pixel
        from cumbre.core.instrument import load_instrument

        camera = load_instrument(catalogue.CAMERA)
        chip = next(d for d in camera.detectors if d.purpose == "SCIENCE")
        radius = 100 * chip.pixel_mm * camera.plate_scale / 3600
        rng = np.random.default_rng(2)
        paths = []
        for x, y in rng.uniform(300, 3700, (20, 2)):
            ra, dec = sky_from_pixel(camera, chip, *catalogue.POINTING, x, y)
            words = {
                "ID": f"ivo://{self.authority}?raw/{catalogue.OBS_ID}/{chip.name}",
                "CIRCLE": f"{float(ra)} {float(dec)} {radius}",
            }
            paths.append("/soda/sync?" + urllib.parse.urlencode(words))
        return self.many([lambda p=path: self.fetch(p) for path in paths])  # type: ignore[misc]

    def outlines(self) -> dict[str, float]:
        """Images that touch a circle, by the index of regions."""
        rng = np.random.default_rng(9)
        queries = [
            "SELECT obs_id, s_region FROM ivoa.obscore"
            f" WHERE 1 = INTERSECTS(s_region, CIRCLE({ra}, {dec}, 0.1))"
            for ra, dec in zip(rng.uniform(0, 360, CONES), rng.uniform(-70, 70, CONES), strict=True)
        ]
        return self.many([lambda q=query: self.ask(q) for query in queries])  # type: ignore[misc]


@contextmanager
def running(work: Path, rows: int, outlines: int) -> Iterator[Bench]:
    """Data, database and service, made when they are not there."""
    work.mkdir(parents=True, exist_ok=True)
    catalogue.make_parquet(catalogue.parquet_of(work, rows), rows)
    server = catalogue.server_of(work, rows)
    dsn = server.start()
    db = Database(dsn)
    try:
        catalogue.fill_catalogue(db, catalogue.parquet_of(work, rows))
        command = [sys.executable, "-m", catalogue.__name__, str(work), str(rows), str(outlines), dsn]
        service = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert service.stdout is not None
            told = json.loads(service.stdout.readline() or "null")
            if told is None:
                raise RuntimeError("the service did not start")
            postmaster = int((work / f"pg-{rows}" / "postmaster.pid").read_text().split()[0])
            yield Bench(told["url"], told["authority"], work, rows, db, Meter(service.pid, postmaster))
        finally:
            service.communicate(timeout=60)
    finally:
        db.close()
        server.stop()


def run(
    work: Path,
    rows: int,
    *,
    outlines: int,
    clients: int,
    big: int,
    seconds: float,
    peer: str | None = None,
    tell: Callable[[str, Any], None] = lambda *_: None,
) -> dict[str, Any]:
    """All figures, each with the load of the machine when it ended; ``tell`` gets each as soon as it is known.

    Parameters
    ----------
    peer
        Address of another TAP service with the same rows as ``cat.object``.
    """
    begin = time.perf_counter()
    with running(work, rows, outlines) as bench:
        figures: dict[str, Any] = {"rows": rows, "preparation_s": round(time.perf_counter() - begin, 1)}
        some = min(rows, 1_000_000)
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            f"cone {radius:.3g} deg, {schema}": lambda s=schema, r=radius: bench.cones(s, r)  # type: ignore[misc]
            for schema in ("pg", "files")
            for radius in (1 / 60, 0.1, 1.0)
        }
        steps |= {
            "bare COPY of PostgreSQL": bench.bare_copy,
            "BINARY2 from PostgreSQL": lambda: bench.document("SELECT * FROM pg.object", "votable", rows),
            "bare Arrow of DuckDB": bench.bare_scan,
            "BINARY2 from Parquet": lambda: bench.document("SELECT * FROM files.object", "votable", rows),
        }
        for form in ("parquet", "fits", "csv", "json", "votable/td"):
            steps[f"{form} from Parquet"] = lambda f=form: bench.document(  # type: ignore[misc]
                f"SELECT TOP {some} * FROM files.object", f, some
            )
        steps |= {
            "scan and aggregate": bench.scan,
            "match 50k, files": lambda: bench.match("files", min(50_000, rows // 10)),
            "match 50k, pg": lambda: bench.match("pg", min(50_000, rows // 10)),
            "async count": bench.job,
            "cutout 200x200": bench.cutouts,
            f"outlines of {outlines:,}": bench.outlines,
            "crowd": lambda: crowd(bench.url, rows, clients=clients, big=big, seconds=seconds),
        }
        if peer is not None:
            beside = Peer(peer, rows).steps(bench.positions(min(50_000, rows // 10)), MATCH_DEG)
            steps = beside | steps
        for name, step in steps.items():
            figures[name] = step() | {"load": round(os.getloadavg()[0], 2)}
            tell(name, figures[name])
        figures["service_mb"] = bench.meter.memory_mb()
    return figures
