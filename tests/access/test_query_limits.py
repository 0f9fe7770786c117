"""Limits of rows, bytes, time and memory hold in both engines, and cancel reaches the server."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import psutil
import pyarrow as pa
import pytest
from access_data import Place, in_files, in_postgres

from cumbre.access.engines.postgres import PostgresReader
from cumbre.access.limits import Limits, QueryCancelledError, QueryTimeoutError, QueryTooBigError, Watch
from cumbre.access.query import run
from cumbre.core.errors import CumbreError
from cumbre.stores.postgres import Database
from support.pg import fresh_database

LONG = "SELECT COUNT(*) FROM stars a, stars b, stars c WHERE SIN(a.ra * b.ra) + COS(b.dec * c.ra) < -5"


@pytest.fixture(scope="module", params=["postgres", "duckdb"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if request.param == "duckdb":
        yield in_files(tmp_path_factory.mktemp("files"))
        return
    with fresh_database(request.getfixturevalue("postgres_dsn")) as db:
        yield in_postgres(db)


def start(place: Place, adql: str, **more):
    return run(adql, tables=place.tables, engines=place.engines, **more)


def test_rows(place: Place) -> None:
    result = start(place, "SELECT id FROM stars", maxrec=10)
    assert result.read_all().num_rows == 10
    assert result.overflow == "MAXREC: the first 10 rows of more"
    result = start(place, "SELECT id FROM stars", limits=Limits(rows=20), maxrec=1000)
    assert result.read_all().num_rows == 20
    assert "limit of rows" in result.overflow
    for text, maxrec in (
        ("SELECT TOP 10 id FROM stars", 10),
        ("SELECT id FROM stars", 4000),
        ("SELECT id FROM stars", None),
    ):
        result = start(place, text, maxrec=maxrec)
        result.read_all()
        assert result.overflow is None, text


def test_maxrec_zero_describes_the_columns(place: Place) -> None:
    result = start(place, "SELECT id, kind FROM stars", maxrec=0)
    assert result.read_all().num_rows == 0
    assert [c.name for c in result.columns] == ["id", "kind"]
    assert "MAXREC 0" in result.overflow


def test_bytes(place: Place) -> None:
    result = start(place, "SELECT a.*, b.* FROM stars a, stars b", limits=Limits(bytes=3_000_000))
    size = sum(batch.nbytes for batch in result.batches())
    assert 3_000_000 < size < 60_000_000
    assert "3,000,000 bytes" in result.overflow


def test_time(place: Place) -> None:
    begin = time.monotonic()
    with pytest.raises(QueryTimeoutError, match="1 s"):
        start(place, LONG, limits=Limits(seconds=1)).read_all()
    assert time.monotonic() - begin < 10
    assert place.rows("SELECT COUNT(*) FROM stars") == [(4000,)]


@pytest.mark.parametrize("way", ["method", "event"])
def test_cancel(place: Place, way: str) -> None:
    event = threading.Event()
    result = start(place, LONG, cancel=event if way == "event" else None, limits=Limits(seconds=60))
    threading.Timer(0.5, event.set if way == "event" else result.cancel).start()
    begin = time.monotonic()
    with pytest.raises(QueryCancelledError):
        result.read_all()
    assert time.monotonic() - begin < 10
    assert place.rows("SELECT COUNT(*) FROM stars") == [(4000,)]


def test_a_result_left_half_read_leaves_nothing_behind(place: Place) -> None:
    for _ in range(12):
        result = start(place, "SELECT a.id, b.ra FROM stars a, stars b")
        next(iter(result.batches()))
        result.close()
    start(place, "SELECT id FROM stars").close()  # never read at all
    gc.collect()
    assert place.rows("SELECT COUNT(*) FROM stars") == [(4000,)]


def test_cancel_ends_the_query_in_the_server(database: Database) -> None:
    place = in_postgres(database)
    running = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE state = 'active' AND query LIKE 'COPY (SELECT%%' AND datname = current_database()"
    )

    def wait_for(number: int) -> None:
        end = time.monotonic() + 20
        while database.execute(running)[0][0] != number:
            assert time.monotonic() < end
            time.sleep(0.02)

    result = start(place, LONG, limits=Limits(seconds=60))

    def read() -> None:
        with pytest.raises(QueryCancelledError):
            result.read_all()

    thread = threading.Thread(target=read)
    thread.start()
    wait_for(1)
    result.cancel()
    wait_for(0)
    thread.join(20)
    assert not thread.is_alive()


def test_memory_of_duckdb(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = in_files(tmp_path_factory.mktemp("memory"))
    with pytest.raises(QueryTooBigError, match=r"memory|bytes|limit"):
        start(
            place, "SELECT a.ra * b.ra AS x, COUNT(*) FROM stars a, stars b GROUP BY x ORDER BY x",
            limits=Limits(memory_mb=64, bytes=64 << 20),
        ).read_all()  # fmt: skip


def test_memory_of_this_process_is_bounded(place: Place) -> None:
    """A million rows pass through a process that stays small."""
    me = psutil.Process()
    before = peak = me.memory_info().rss
    rows = size = 0
    for batch in start(
        place, "SELECT a.id, b.id FROM stars a, stars b", limits=Limits(rows=1_000_000)
    ).batches():
        rows += batch.num_rows
        size += batch.nbytes
        peak = max(peak, me.memory_info().rss)
    assert rows == 1_000_000
    assert peak - before < 100 << 20


def test_the_connection_may_only_read(database: Database) -> None:
    """Were there ever a way to call a function that writes, the transaction refuses it."""
    place = in_postgres(database)
    database.execute("CREATE SEQUENCE counter")
    reader = PostgresReader(database, Watch(Limits()))
    with pytest.raises(CumbreError, match="read-only"):
        list(reader.read("SELECT nextval('counter') AS a", pa.schema([("a", pa.int64())])))
    assert place.rows("SELECT COUNT(*) FROM stars") == [(4000,)]


def test_an_instance_is_kept_as_it_is_until_other_limits_come(tmp_path) -> None:
    from cumbre.access.engines.duck import Instances

    instances = Instances(tmp_path, 1)

    def with_memory(megabytes: int) -> Watch:
        return Watch(Limits(memory_mb=megabytes), threading.Event())

    def memory_of(link) -> str:
        return link.execute("SELECT current_setting('memory_limit')").fetchone()[0]

    small, large = instances.take(with_memory(100)), instances.take(with_memory(800))
    assert (memory_of(small), memory_of(large)) == ("95.3 MiB", "762.9 MiB")
    small.execute("SET memory_limit = '123MiB'")  # a mark: it would be gone were the limit set again
    instances.give_back(small)
    instances.give_back(large)
    again = instances.take(with_memory(100))
    assert memory_of(again) == "123.0 MiB"
    instances.give_back(again)
    other = instances.take(with_memory(400))
    assert memory_of(other) == "381.4 MiB"
    instances.drop(other)
    assert memory_of(instances.take(with_memory(400))) == "381.4 MiB"
