"""COPY … TO STDOUT at the speed of libpq: rows as they come, in lists, without a Python call for each wait."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn, PGresult

_LIST = 8192
_WAIT_S = 1.0


def copy_rows(
    link: psycopg.Connection[Any], statement: bytes, cancelled: threading.Event | None = None
) -> Iterator[list[Any]]:
    """Messages of a COPY: for binary format one a row, the first with the header, the last is the trailer.

    Parameters
    ----------
    cancelled
        Stops it in the server while it is waited for, also when a cancel request came before the server had begun.

    Raises
    ------
    psycopg.Error
        As the server says.
    """
    pgconn = link.pgconn
    pgconn.send_query(statement)
    finished = False
    try:
        result = _result(pgconn, lambda: _stop_if(cancelled, link))
        if result is None or result.status != ExecStatus.COPY_OUT:
            _raise(result)
        rows: list[Any] = []
        append, get = rows.append, pgconn.get_copy_data
        while True:
            size, content = get(1)
            if size > 0:
                append(content)
                if len(rows) < _LIST:
                    continue
            if rows:
                yield rows
                rows = []
                append = rows.append
            if size == 0:
                _stop_if(cancelled, link)
                _wait(pgconn)
                pgconn.consume_input()
            elif size < 0:
                break
        result = _result(pgconn, lambda: _stop_if(cancelled, link))
        finished = True
        if result is None or result.status != ExecStatus.COMMAND_OK:
            _raise(result)
    finally:
        if not finished:
            _abandon(link)
        while _result(pgconn) is not None:
            pass


def _stop_if(cancelled: threading.Event | None, link: psycopg.Connection[Any]) -> None:
    if cancelled is not None and cancelled.is_set():
        with suppress(psycopg.Error):
            link.cancel_safe(timeout=5)


def _wait(pgconn: PGconn) -> None:
    """Until something can be read, a second at the most."""
    poll = select.poll()
    poll.register(pgconn.socket, select.POLLIN)
    poll.poll(_WAIT_S * 1000)


def _result(pgconn: PGconn, look: Callable[[], None] = lambda: None) -> PGresult | None:
    """The next result, once the server has sent it; ``look`` is called now and then until it has."""
    while pgconn.flush():
        poll = select.poll()
        poll.register(pgconn.socket, select.POLLIN | select.POLLOUT)
        poll.poll(_WAIT_S * 1000)
        pgconn.consume_input()
    while pgconn.is_busy():
        look()
        _wait(pgconn)
        pgconn.consume_input()
    return pgconn.get_result()


def _raise(result: PGresult | None) -> None:
    if result is None:
        raise psycopg.OperationalError("the server gave no answer to COPY")
    raise psycopg.errors.error_from_result(result, encoding="utf-8")


def _abandon(link: psycopg.Connection[Any]) -> None:
    """Stop the server and read what is still on the way."""
    with suppress(psycopg.Error):
        link.cancel_safe(timeout=5)
    pgconn = link.pgconn
    with suppress(psycopg.Error):
        while True:
            size, _ = pgconn.get_copy_data(1)
            if size < 0:
                return
            if size == 0:
                _wait(pgconn)
                pgconn.consume_input()
