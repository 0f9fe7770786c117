"""Reaching PostgreSQL: one small class over psycopg, and its errors in our words."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from cumbre.core.errors import (
    ConflictError,
    CumbreError,
    FatalError,
    TransientError,
    UnprocessableDataError,
)
from cumbre.stores.embedded import EmbeddedPostgres

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Database", "EmbeddedPostgres", "describe_error", "qualified"]

type Parameters = Sequence[Any] | Mapping[str, Any] | None
type Connection = psycopg.Connection[tuple[Any, ...]]
_IDLE = 16


def qualified(name: str) -> sql.Identifier:
    """Quote the identifier ``schema.table`` or ``table``."""
    return sql.Identifier(*name.split("."))


def describe_error(error: psycopg.Error) -> CumbreError:
    """One of our errors for a database error: transient, conflict, unprocessable data or fatal."""
    text = " ".join(str(error).split())
    if isinstance(error, psycopg.errors.IntegrityError):
        return ConflictError(f"database: {text}")
    if isinstance(error, psycopg.errors.DataError):
        return UnprocessableDataError(f"database: {text}")
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return TransientError(f"database: {text}")
    return FatalError(f"database: {text}")


class Database:
    """A PostgreSQL database by its DSN; connections are opened when needed and up to four are kept.

    Usable from several threads, each in its own connection, and after a fork (the child opens its own).
    A server that restarted is noticed before a kept connection is used again.

    Raises
    ------
    TransientError
        From every method: no server, connection lost, deadlock; try again.
    ConflictError
        From every method: a key or constraint is violated.
    UnprocessableDataError
        From every method: a value does not fit its column.
    FatalError
        From every method: the statement itself is wrong.
    """

    def __init__(self, dsn: str, *, application: str = "cumbre") -> None:
        self.dsn = dsn.replace("postgresql+psycopg2://", "postgresql://", 1)
        self._application = application
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """One transaction: committed at the end of the block, rolled back by an exception."""
        try:
            link = self._take()
        except psycopg.Error as error:
            raise describe_error(error) from error
        try:
            yield link
            link.commit()
        except psycopg.Error as error:
            self._abandon(link)
            raise describe_error(error) from error
        except BaseException:
            self._abandon(link)
            raise
        self._give_back(link)

    def execute(self, statement: str | sql.Composable, params: Parameters = None) -> list[tuple[Any, ...]]:
        """Run one statement in its own transaction; rows as tuples, empty when it returns none."""
        with self.connection() as link:
            cursor = link.execute(_trusted(statement), params)
            return cursor.fetchall() if cursor.description else []

    def query(self, statement: str | sql.Composable, params: Parameters = None) -> list[dict[str, Any]]:
        """Run one statement in its own transaction; rows as dictionaries by column name."""
        with self.connection() as link, link.cursor(row_factory=dict_row) as cursor:
            cursor.execute(_trusted(statement), params)
            return cursor.fetchall() if cursor.description else []

    def copy(
        self,
        table: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]] | pa.Table,
        *,
        connection: Connection | None = None,
    ) -> int:
        """Insert many rows by COPY.

        Parameters
        ----------
        table
            ``schema.table``.
        columns
            Names, in the order of the values; for an Arrow table, columns taken from it by name.
        rows
            Sequences of values, or an Arrow table (null → NULL; NaN stays NaN).
        connection
            Transaction to work in; without one the copy is its own transaction.

        Returns
        -------
        int
            Number of rows.
        """
        if connection is None:
            with self.connection() as link:
                return self.copy(table, columns, rows, connection=link)
        arrow = hasattr(rows, "schema")
        head = sql.SQL("COPY {} ({}) FROM STDIN" + (" (FORMAT csv)" if arrow else "")).format(
            qualified(table), sql.SQL(", ").join(map(sql.Identifier, columns))
        )
        with connection.cursor() as cursor:
            with cursor.copy(head) as stream:
                if arrow:
                    stream.write(_csv(cast("pa.Table", rows), columns))
                else:
                    for row in cast("Iterable[Sequence[Any]]", rows):
                        stream.write_row(row)
            return cursor.rowcount

    def close(self) -> None:
        """Close the kept connections; the database can be used again after it."""
        with self._lock:
            idle, self._idle = self._idle, []
        if self._pid == os.getpid():
            for link in idle:
                link.close()

    def __del__(self) -> None:
        self.close()

    def _take(self) -> Connection:
        with self._lock:
            if self._pid != os.getpid():  # after a fork the parent's connections are not ours to use or close
                self._parents = self._idle
                self._idle, self._pid = [], os.getpid()
        while True:
            with self._lock:
                if not self._idle:
                    break
                link = self._idle.pop()
            # Asking the system lets other threads run: with the lock held all would stand behind this one.
            if not link.closed and not _has_news(link):
                return link
            link.close()
        return psycopg.connect(
            self.dsn, application_name=self._application, connect_timeout=10, prepare_threshold=5
        )

    def _give_back(self, link: Connection) -> None:
        with self._lock:
            if len(self._idle) < _IDLE and not link.closed and self._pid == os.getpid():
                self._idle.append(link)
                return
        link.close()

    def _abandon(self, link: Connection) -> None:
        try:
            link.rollback()
        except psycopg.Error:
            link.close()
            return
        self._give_back(link)


def _trusted(statement: str | sql.Composable) -> bytes:
    """Statements are written by us; values always travel as parameters."""
    return statement.encode() if isinstance(statement, str) else statement.as_bytes(None)


def _has_news(link: Connection) -> bool:
    """Whether an idle connection became readable: the server closed it."""
    poll = select.poll()
    poll.register(link.fileno(), select.POLLIN | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))


def _csv(table: pa.Table, columns: Sequence[str]) -> memoryview:
    """CSV of an Arrow table: nulls as nothing, strings quoted, bytes as PostgreSQL's hex form."""
    import pyarrow as pa
    import pyarrow.csv

    arrays = []
    for name in columns:
        column = table.column(name)
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            column = pa.array(["\\x" + v.hex() if v is not None else None for v in column.to_pylist()])
        arrays.append(column)
    sink = pa.BufferOutputStream()
    options = pyarrow.csv.WriteOptions(include_header=False)
    pyarrow.csv.write_csv(pa.table(arrays, names=list(columns)), sink, options)
    return memoryview(sink.getvalue())
