"""The PostgreSQL engine: binary COPY out, everything in one read-only transaction with a deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg

from cumbre.access.adql.dialect import Postgres, quote
from cumbre.access.engines import Started
from cumbre.access.engines.copy_binary import read_batches
from cumbre.access.engines.copy_stream import copy_rows
from cumbre.access.limits import QueryCancelledError, QueryTooBigError, Watch
from cumbre.core.errors import CumbreError, FatalError, TransientError, UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from cumbre.access.planner import PixelCover, Plan
    from cumbre.stores.postgres import Database

_DIALECT = Postgres()


class PostgresEngine:
    """Runs plans in the site's database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def start(self, plan: Plan, watch: Watch, max_rows: int) -> Started:
        """Run a plan; nothing is asked of the server before the first batch is."""
        running = _Running(self._db, watch)
        sql = "" if max_rows == 0 else plan.sql(max_rows)
        batches = running.batches(plan, sql)
        if plan.covers:
            batches = _first(batches, plan.most(max_rows), running.close)
        return Started(batches, running.cancel, running.close)


def _first(
    batches: Iterator[pa.RecordBatch], most: int, stop: Callable[[], None]
) -> Iterator[pa.RecordBatch]:
    """So many rows at the most; then the query is stopped."""
    for batch in batches:
        yield batch.slice(0, most)
        most -= batch.num_rows
        if most <= 0:
            stop()
            return


class _Running:
    """One query on one connection."""

    def __init__(self, db: Database, watch: Watch) -> None:
        self._db = db
        self._watch = watch
        self._link: psycopg.Connection[Any] | None = None
        self._lock = threading.Lock()
        self._stream: Iterator[pa.RecordBatch] | None = None

    def batches(self, plan: Plan, sql: str) -> Iterator[pa.RecordBatch]:
        typed = _typed(sql, plan.schema)
        self._stream = self._run(plan, typed, plan.schema) if sql else iter(())
        return self._stream

    def select(self, sql: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Rows of a SELECT that needs nothing brought."""
        self._stream = self._run(None, sql, schema)
        return self._stream

    def _run(self, plan: Plan | None, sql: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        self._watch.check()
        try:
            with self._db.connection() as link:
                with self._lock:
                    self._link = link
                try:
                    self._prepare(link, plan)
                    self._watch.check()
                    yield from copy_out(link, sql, schema, self._watch.cancelled)
                finally:
                    with self._lock:
                        self._link = None
                    with suppress(psycopg.Error):
                        link.rollback()
        except psycopg.Error as error:
            raise explain(error, self._watch) from error
        except CumbreError as error:
            if isinstance(error.__cause__, psycopg.Error):
                raise explain(error.__cause__, self._watch) from error
            raise

    def _prepare(self, link: psycopg.Connection[Any], plan: Plan | None) -> None:
        begin(link, self._watch)
        for memory in plan.memories if plan else ():
            upload(self._db, link, memory.name, memory.rows())
        for cover in plan.covers if plan else ():
            _upload_cover(self._db, link, cover)
        if plan is not None and plan.seed is not None:
            link.execute("SELECT setseed(%s)", (((plan.seed * 0.6180339887) % 2.0) - 1.0,))
        link.execute(b"SET LOCAL transaction_read_only = on")

    def cancel(self) -> None:
        """Stop it in the server."""
        with self._lock:
            if self._link is not None:
                with suppress(psycopg.Error):
                    self._link.cancel_safe(timeout=5)

    def close(self) -> None:
        """Stop it if it runs and give the connection back."""
        stream = self._stream
        if stream is not None and hasattr(stream, "close"):
            with suppress(ValueError):  # another thread reads it: that one closes it
                stream.close()


class PostgresReader:
    """Rows of one SELECT for another engine."""

    def __init__(self, db: Database, watch: Watch) -> None:
        self._running = _Running(db, watch)

    def read(self, sql: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Batches of exactly the schema."""
        names = [f"CAST(r.{quote(field.name)} AS {_sql_type(field.type)})" for field in schema]
        return self._running.select(f"SELECT {', '.join(names)} FROM ({sql}) AS r", schema)  # noqa: S608

    def cancel(self) -> None:
        """Stop it in the server."""
        self._running.cancel()

    def close(self) -> None:
        """Stop it if it runs and give the connection back."""
        self._running.close()


def begin(link: psycopg.Connection[Any], watch: Watch) -> None:
    """Limits of the transaction."""
    milliseconds = max(1, int(watch.remaining_s() * 1000))
    work = max(1, min(watch.limits.memory_mb // 4, 512))
    link.execute(
        f"SET LOCAL statement_timeout = {milliseconds}; SET LOCAL work_mem = '{work}MB'; "
        "SET LOCAL extra_float_digits = 1; SET LOCAL jit = off".encode()
    )


def copy_out(
    link: psycopg.Connection[Any], sql: str, schema: pa.Schema, cancelled: threading.Event | None = None
) -> Iterator[pa.RecordBatch]:
    """Rows of a query whose types are exactly the schema's."""
    statement = f"COPY ({sql}) TO STDOUT (FORMAT binary)".encode()
    yield from read_batches(copy_rows(link, statement, cancelled), schema)


def _typed(sql: str, schema: pa.Schema) -> str:
    """The same query with exactly the types of the schema."""
    kinds = [_sql_type(field.type) for field in schema]
    listed = ", ".join(f"CAST(r.c{i} AS {kind})" for i, kind in enumerate(kinds, 1))
    return f"SELECT {listed} FROM ({sql}) AS r"  # noqa: S608 (regenerated from the tree)


def _sql_type(kind: pa.DataType) -> str:
    import pyarrow as pa

    scalars = {
        pa.bool_(): "boolean", pa.uint8(): "smallint", pa.int16(): "smallint", pa.int32(): "integer",
        pa.int64(): "bigint", pa.float32(): "real", pa.float64(): "double precision", pa.string(): "text",
    }  # fmt: skip
    if pa.types.is_list(kind):
        return f"{scalars[kind.value_type]}[]"
    return scalars[kind]


def upload(db: Database, link: psycopg.Connection[Any], name: str, rows: pa.Table) -> None:
    """A table in memory as a temporary table with a row number."""
    import numpy as np
    import pyarrow as pa

    columns = [f"{quote(field.name)} {_sql_type(field.type)}" for field in rows.schema]
    link.execute(
        f"CREATE TEMPORARY TABLE {name} (adql_row integer, {', '.join(columns)}) ON COMMIT DROP".encode()
    )
    numbered = rows.add_column(0, "adql_row", pa.array(np.arange(rows.num_rows, dtype=np.int32)))
    if any(pa.types.is_list(field.type) for field in rows.schema):
        values = zip(*(column.to_pylist() for column in numbered.columns), strict=True)
        db.copy(name, numbered.column_names, values, connection=link)
    else:
        db.copy(name, numbered.column_names, numbered, connection=link)
    link.execute(f"ANALYZE {name}".encode())


def _upload_cover(db: Database, link: psycopg.Connection[Any], cover: PixelCover) -> None:
    """Ranges of order-29 pixels around each row of an upload, in the order of the sky."""
    import pyarrow as pa

    from cumbre.access.pixels import neighbourhood

    rows = cover.memory.rows()
    ra, dec = (
        rows.column(name).cast("float64").to_numpy(zero_copy_only=False) for name in (cover.ra, cover.dec)
    )
    row, low, high = _joined(neighbourhood(ra, dec, cover.order))
    shift = 2 * (29 - cover.order)
    link.execute(
        f"CREATE TEMPORARY TABLE {cover.name} (adql_row integer, adql_low bigint, adql_high bigint)"
        " ON COMMIT DROP".encode()
    )
    ranges = pa.table({"adql_row": row, "adql_low": low << shift, "adql_high": high << shift})
    db.copy(cover.name, ranges.column_names, ranges, connection=link)
    link.execute(f"CREATE INDEX ON {cover.name} (adql_row)".encode())
    link.execute(f"ANALYZE {cover.name}".encode())


def _joined(pixels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row, begin and end of ranges of pixels, those side by side as one; sorted by begin.

    Parameters
    ----------
    pixels
        Of shape (row, 9), −1 for none.
    """
    import numpy as np

    ordered = np.sort(pixels, axis=1)
    row, place = np.nonzero(ordered >= 0)
    pixel = ordered[row, place]
    new = np.ones(len(pixel), dtype=bool)
    new[1:] = (row[1:] != row[:-1]) | (pixel[1:] != pixel[:-1] + 1)
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(pixel)) - 1 if len(first) else first
    along = np.argsort(pixel[first], kind="stable")
    first, last = first[along], last[along]
    return row[first], pixel[first], pixel[last] + 1


def explain(error: psycopg.Error, watch: Watch) -> CumbreError:
    """What a database error means to who asked."""
    text = " ".join(str(error).split())
    if isinstance(error, psycopg.errors.QueryCanceled):
        if watch.cancelled.is_set():
            return QueryCancelledError("the query was cancelled")
        return watch.timeout()
    if isinstance(error, psycopg.errors.InsufficientResources | psycopg.errors.ProgramLimitExceeded):
        return QueryTooBigError(f"the database cannot hold what the query needs: {text}; ask for less")
    if isinstance(error, psycopg.errors.DataError):
        return UserError(f"a value does not fit: {text.split(' CONTEXT:')[0]}")
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return TransientError(f"the database does not answer: {text}")
    if isinstance(error, psycopg.ProgrammingError):
        return FatalError(f"the database refuses our SQL: {text}")
    return FatalError(f"database: {text}")
