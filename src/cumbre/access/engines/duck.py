"""The DuckDB engine: files, tables in memory, and what is brought from PostgreSQL."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cumbre.access.engines import Started
from cumbre.access.limits import QueryCancelledError, QueryTooBigError, Watch
from cumbre.core.errors import CumbreError, FatalError, NotFoundError, TransientError, UserError

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from cumbre.access.planner import Fetch, Plan
    from cumbre.stores.postgres import Database

BATCH_ROWS = 65_536
_KEPT = 8


class Instances:
    """DuckDB instances: one query each at a time, kept for the next."""

    def __init__(self, scratch: Path | None, threads: int) -> None:
        self._scratch = scratch
        self._threads = threads
        self._idle: list[duckdb.DuckDBPyConnection] = []
        self._limits: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def take(self, watch: Watch) -> duckdb.DuckDBPyConnection:
        """An instance with the limits of a query."""
        wanted = max(watch.limits.memory_mb, 64), max(watch.limits.bytes >> 20, 64)
        with self._lock:
            fits = [number for number, link in enumerate(self._idle) if self._limits.get(id(link)) == wanted]
            link = self._idle.pop(fits[-1] if fits else -1) if self._idle else None
        if link is None:
            link = self._make()
        if self._limits.get(id(link)) != wanted:
            # only then: DuckDB lets go of the memory that it keeps, and the next query has to get it anew
            link.execute(f"SET memory_limit = '{wanted[0]}MB'")
            link.execute(f"SET max_temp_directory_size = '{wanted[1]}MB'")
            with self._lock:
                self._limits[id(link)] = wanted
        return link

    def give_back(self, link: duckdb.DuckDBPyConnection) -> None:
        """Keep it, or close it when enough are kept."""
        with self._lock:
            if len(self._idle) < _KEPT:
                self._idle.append(link)
                return
        self.drop(link)

    def drop(self, link: duckdb.DuckDBPyConnection) -> None:
        """Close one that cannot be used again."""
        with self._lock:
            self._limits.pop(id(link), None)
        link.close()

    def _make(self) -> duckdb.DuckDBPyConnection:
        import duckdb

        from cumbre.access.engines.duck_functions import add_functions

        scratch = self._scratch or Path(tempfile.gettempdir())
        link = duckdb.connect(
            ":memory:",
            config={
                "threads": self._threads, "temp_directory": str(scratch / "cumbre-duckdb"),
                "autoinstall_known_extensions": False, "autoload_known_extensions": False,
                "allow_community_extensions": False,
            },
        )  # fmt: skip
        link.execute("SET parquet_metadata_cache = true")
        add_functions(link)
        return link


class DuckEngine:
    """Runs plans in DuckDB."""

    def __init__(self, db: Database | None, instances: Instances) -> None:
        self._db = db
        self._instances = instances

    def start(self, plan: Plan, watch: Watch, max_rows: int) -> Started:
        """Run a plan; nothing happens before the first batch is asked for."""
        running = _Running(self._db, self._instances, watch)
        return Started(running.batches(plan, max_rows), running.cancel, running.close)


class _Running:
    """One query in one instance."""

    def __init__(self, db: Database | None, instances: Instances, watch: Watch) -> None:
        self._db = db
        self._instances = instances
        self._watch = watch
        self._link: duckdb.DuckDBPyConnection | None = None
        self._fetching: Callable[[], None] | None = None
        self._failed: CumbreError | None = None
        self._lock = threading.Lock()
        self._stream: Iterator[pa.RecordBatch] | None = None

    def batches(self, plan: Plan, max_rows: int) -> Iterator[pa.RecordBatch]:
        self._stream = self._run(plan, plan.sql(max_rows)) if max_rows else iter(())
        return self._stream

    def _run(self, plan: Plan, sql: str) -> Iterator[pa.RecordBatch]:
        import duckdb

        self._watch.check()
        link = self._instances.take(self._watch)
        clean: list[str] = []
        timer = threading.Timer(self._watch.remaining_s(), self._interrupt)
        timer.daemon = True
        with self._lock:
            self._link = link
        timer.start()
        try:
            for memory in plan.memories:
                link.register(memory.name, _numbered(memory.rows()))
                clean.append(f"view {memory.name}")
            for fetch in plan.fetches:
                clean.append(f"table {fetch.name}")
                self._fetch(link, fetch)
            if plan.seed is not None:
                link.execute("SELECT setseed(?)", [(plan.seed * 0.6180339887) % 1.0]).fetchall()
            self._watch.check()
            with link.sql(sql).to_arrow_reader(BATCH_ROWS) as reader:
                for batch in reader:
                    yield _conform(batch, plan.schema)
        except duckdb.Error as error:
            raise self._explain(error) from error
        finally:
            timer.cancel()
            with self._lock:
                self._link = None
            self._clean(link, clean)

    def _fetch(self, link: duckdb.DuckDBPyConnection, fetch: Fetch) -> None:
        """Bring rows from PostgreSQL, a batch at a time; DuckDB spills what memory does not hold."""
        import pyarrow as pa

        from cumbre.access.engines.postgres import PostgresReader

        if self._db is None:
            raise NotFoundError("this site has no database; only catalogues in files can be asked")
        reader = PostgresReader(self._db, self._watch)
        self._fetching = reader.cancel
        try:
            source = pa.RecordBatchReader.from_batches(
                fetch.schema, self._counted(reader.read(fetch.sql, fetch.schema))
            )
            link.register("adql_stream", source)
            rows = "SELECT row_number() OVER () AS adql_row, * FROM adql_stream"
            link.execute(f"CREATE TEMPORARY TABLE {fetch.name} AS {rows}")
        finally:
            self._fetching = None
            link.unregister("adql_stream")
            reader.close()

    def _counted(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Stop when more is brought than the limit of bytes."""
        size, limit = 0, self._watch.limits.bytes
        try:
            for batch in batches:
                self._watch.check()
                size += batch.nbytes
                if size > limit:
                    raise self._too_much(limit)
                yield batch
        except CumbreError as error:
            self._failed = error  # DuckDB makes only words of it
            raise

    def _too_much(self, limit: int) -> QueryTooBigError:
        return QueryTooBigError(
            f"the query needs more than {limit:,} bytes of a table of the database beside its other tables; "
            "add conditions on that table alone (a region, a range of an indexed column)"
        )

    def _interrupt(self) -> None:
        with self._lock:
            if self._link is not None:
                self._link.interrupt()
        fetching = self._fetching
        if fetching is not None:
            fetching()

    def cancel(self) -> None:
        """Stop it."""
        self._interrupt()

    def close(self) -> None:
        """Stop it if it runs and give the instance back."""
        stream = self._stream
        if stream is not None and hasattr(stream, "close"):
            with suppress(ValueError):  # another thread reads it: that one closes it
                stream.close()

    def _clean(self, link: duckdb.DuckDBPyConnection, made: list[str]) -> None:
        import duckdb

        try:
            for item in made:
                kind, name = item.split(" ")
                if kind == "view":
                    link.unregister(name)
                else:
                    link.execute(f"DROP TABLE IF EXISTS {name}")
        except duckdb.Error:
            self._instances.drop(link)
        else:
            self._instances.give_back(link)

    def _explain(self, error: duckdb.Error) -> Exception:
        import duckdb

        text = " ".join(str(error).split())
        if self._failed is not None:
            return self._failed
        if isinstance(error, duckdb.InterruptException) or "INTERRUPT" in text.upper():
            if self._watch.cancelled.is_set():
                return QueryCancelledError("the query was cancelled")
            return self._watch.timeout()
        if isinstance(error, duckdb.OutOfMemoryException):
            return self._watch.too_big(f"{self._watch.limits.memory_mb} MB of memory")
        if isinstance(
            error, duckdb.ConversionException | duckdb.OutOfRangeException | duckdb.InvalidInputException
        ):
            return UserError(f"a value does not fit: {text}")
        if isinstance(error, duckdb.IOException):
            return TransientError(f"the files of the catalogue cannot be read: {text}")
        return FatalError(f"DuckDB refuses our SQL: {text}")


def _numbered(rows: pa.Table) -> pa.Table:
    """With a number for each row."""
    import numpy as np
    import pyarrow as pa

    return rows.append_column("adql_row", pa.array(np.arange(rows.num_rows)))


def _conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Exactly the types of the plan."""
    import pyarrow as pa

    arrays = [
        column if column.type == field.type else column.cast(field.type)
        for column, field in zip(batch.columns, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
