"""Run one ADQL query: the one door of this room's heart."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Self

from cumbre.access.limits import Limits, QueryCancelledError, Watch
from cumbre.access.tables import Column, Tables
from cumbre.access.user import ANYBODY, User

if TYPE_CHECKING:
    import pyarrow as pa

    from cumbre.access.engines import Engines


class Result:
    """A running query: what its columns are, and its rows in batches, once.

    Attributes
    ----------
    columns
        What comes, in order; known before the first row.
    overflow
        After the last batch: None when everything came, else which limit cut it and how much it is.
    rows, bytes
        How much came so far.
    """

    def __init__(
        self,
        columns: tuple[Column, ...],
        schema: pa.Schema,
        stream: Iterator[pa.RecordBatch],
        *,
        watch: Watch,
        max_rows: int,
        row_limit: str,
        stop: Callable[[], None],
        close: Callable[[], None],
        listen: bool = False,
    ) -> None:
        self.columns = columns
        self.schema = schema
        self.overflow: str | None = None
        self.rows = 0
        self.bytes = 0
        self._stream = stream
        self._watch = watch
        self._max_rows = max_rows
        self._row_limit = row_limit
        self._stop = stop
        self._close = close
        self._listen = listen
        self._closed = False

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows; ends early with :attr:`overflow` set when a limit of rows or bytes is reached.

        Raises
        ------
        QueryTimeoutError, QueryTooBigError
            A limit of time or memory ended the query.
        QueryCancelledError
            Somebody cancelled.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            if self._listen:
                stack.enter_context(bell(self._watch.cancelled, self._stop))
            for full in self._stream:
                self._watch.check()
                batch = full
                if self.rows + batch.num_rows > self._max_rows:
                    batch = batch.slice(0, self._max_rows - self.rows)
                    self.overflow = self._row_limit
                self.bytes += batch.nbytes
                if self.bytes > self._watch.limits.bytes and self.overflow is None:
                    self.overflow = f"the limit of {self._watch.limits.bytes:,} bytes of result is reached"
                self.rows += batch.num_rows
                if batch.num_rows:
                    yield batch
                if self.overflow is not None:
                    return

    def cancel(self) -> None:
        """Stop the query in its engine, from any thread; :meth:`batches` then raises."""
        self._watch.cancelled.set()
        self._stop()

    def close(self) -> None:
        """Let go of the engine; stops the query when it still runs. May be called twice."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_all(self) -> pa.Table:
        """Everything at once, for small results and tests."""
        import pyarrow as pa

        return pa.Table.from_batches(list(self.batches()), schema=self.schema)


def run(
    adql: str,
    *,
    tables: Tables,
    engines: Engines,
    user: User = ANYBODY,
    limits: Limits | None = None,
    maxrec: int | None = None,
    uploads: Mapping[str, pa.Table] | None = None,
    cancel: threading.Event | None = None,
) -> Result:
    """Check, plan and start a query.

    Parameters
    ----------
    adql
        The query.
    tables
        What can be asked; the user sees the visible ones.
    engines
        The engines that hold the rows (:class:`cumbre.access.engines.Engines`).
    limits
        What it may cost.
    maxrec
        Most rows wanted (MAXREC); 0 gives the columns and no row; None leaves it to ``limits.rows``.
    uploads
        Tables of this query alone, by their name in ``TAP_UPLOAD``; descriptions of columns may be in the
        Arrow fields' metadata (unit, ucd, utype, description, xtype, datatype).
    cancel
        Stops the query when set, from any thread.

    Raises
    ------
    AdqlError
        The query is wrong: the message names the token, its place and the remedy.
    NotFoundError
        A table does not exist for this user.
    QueryTimeoutError, QueryTooBigError, QueryCancelledError
        A limit ended it before the first row.
    """
    from cumbre.access.planner import make_plan
    from cumbre.access.uploads import with_uploads

    limits = limits or Limits()
    watch = Watch(limits, cancel or threading.Event())
    plan = make_plan(adql, tables=with_uploads(tables, uploads or {}), user=user)
    asked = limits.rows if maxrec is None else maxrec
    most = min(asked, limits.rows)
    if maxrec is not None and maxrec <= limits.rows:
        text = f"MAXREC: the first {most:,} rows of more"
    else:
        text = f"the first {most:,} rows of more: that is the limit of rows of this service for this kind of request"
    started = engines.start(plan, watch, most)
    result = Result(
        plan.columns, plan.schema, started.batches, watch=watch, max_rows=most, row_limit=text,
        stop=started.cancel, close=started.close, listen=cancel is not None,
    )  # fmt: skip
    if most == 0:
        result.overflow = "MAXREC 0: only the description of the columns was asked for"
    return result


@contextlib.contextmanager
def bell(cancelled: threading.Event, stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` as soon as the event is set while the block runs.

    Raises
    ------
    QueryCancelledError
        It was set before the block began.
    """
    if cancelled.is_set():
        raise QueryCancelledError("the query was cancelled")
    done = threading.Event()

    def wait() -> None:
        while not done.is_set():
            if cancelled.wait(0.05):
                if not done.is_set():
                    stop()
                return

    threading.Thread(target=wait, name="query-bell", daemon=True).start()
    try:
        yield
    finally:
        done.set()  # the thread ends by itself: each query would wait for it up to the time of its look
