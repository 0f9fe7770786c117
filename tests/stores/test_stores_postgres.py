from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from cumbre.core.errors import ConflictError, FatalError, TransientError, UnprocessableDataError
from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Database, EmbeddedPostgres


@pytest.fixture
def data_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cumbre-pg-"))
    yield folder / "pg"
    EmbeddedPostgres(folder / "pg").stop()
    shutil.rmtree(folder, ignore_errors=True)


def _server_pid(data_dir: Path) -> int:
    return int((data_dir / "postmaster.pid").read_text().split()[0])


def test_server_outlives_its_killed_starter_and_recovers_when_killed_itself(data_dir: Path) -> None:
    program = (
        "import sys, os, signal; from pathlib import Path\n"
        "from cumbre.stores.postgres import EmbeddedPostgres, Database\n"
        "db = Database(EmbeddedPostgres(Path(sys.argv[1])).start())\n"
        "db.execute('CREATE TABLE t (i int)'); db.copy('t', ['i'], [(i,) for i in range(1000)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(data_dir)], check=False)
    assert killed.returncode == -signal.SIGKILL

    first = _server_pid(data_dir)
    postgres = EmbeddedPostgres(data_dir)
    database = Database(postgres.start())
    assert _server_pid(data_dir) == first  # adopted, not started anew
    assert database.execute("SELECT count(*) FROM t") == [(1000,)]

    os.kill(first, signal.SIGKILL)
    psutil.Process(first).wait(5) if psutil.pid_exists(first) else None
    assert postgres.dsn_if_running() is None
    with pytest.raises(TransientError):
        Database(database.dsn).execute("SELECT 1")
    postgres.start()
    assert database.execute("SELECT count(*) FROM t") == [(1000,)]  # the kept connection was noticed dead
    postgres.stop()
    assert postgres.dsn_if_running() is None


def test_pid_file_of_somebody_elses_process_is_not_believed(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir, durable=False)
    postgres.start()
    os.kill(_server_pid(data_dir), signal.SIGKILL)
    lines = (data_dir / "postmaster.pid").read_text().splitlines()
    (data_dir / "postmaster.pid").write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
    assert postgres.dsn_if_running() is None
    assert Database(postgres.start()).execute("SELECT 1") == [(1,)]


def test_long_paths_get_a_loopback_port(data_dir: Path) -> None:
    deep = data_dir.parent / ("x" * 60) / ("y" * 60) / "pg"
    postgres = EmbeddedPostgres(deep, durable=False)
    dsn = postgres.start()
    assert "@127.0.0.1:" in dsn
    assert Database(dsn).execute("SELECT 1") == [(1,)]
    with pytest.raises(TransientError, match="password"):
        Database(dsn.replace("postgres:", "postgres:x", 1)).execute("SELECT 1")
    postgres.stop()


def test_half_made_data_folder_is_made_again(data_dir: Path) -> None:
    (data_dir.parent / ".pg.init-0123").mkdir()
    data_dir.mkdir()
    assert Database(EmbeddedPostgres(data_dir, durable=False).start()).execute("SELECT 1") == [(1,)]
    assert not list(data_dir.parent.glob(".pg.init-*"))


def test_rows_and_arrow_tables_are_copied(database: Database) -> None:
    database.execute("CREATE SCHEMA s")
    database.execute("CREATE TABLE s.t (i bigint, x float8, w text, ok boolean, b bytea)")
    rows = [(2**62, 0.1, 'say "a",\n', True, b"\x00\xff"), (None, None, None, None, None)]
    assert database.copy("s.t", ["i", "x", "w", "ok", "b"], rows) == 2
    columns = dict(zip(["i", "x", "w", "ok", "b"], map(list, zip(*rows, strict=True)), strict=True))
    assert database.copy("s.t", ["b", "i", "x", "w", "ok"], pa.table(columns)) == 2
    assert database.execute("SELECT * FROM s.t ORDER BY i") == [rows[0], rows[0], rows[1], rows[1]]
    assert database.query("SELECT i, w FROM s.t WHERE ok LIMIT 1") == [{"i": 2**62, "w": 'say "a",\n'}]


def test_empty_strings_are_not_null(database: Database) -> None:
    database.execute("CREATE TABLE t (w text)")
    database.copy("t", ["w"], pa.table({"w": ["", None]}))
    assert database.execute("SELECT w FROM t ORDER BY w") == [("",), (None,)]


def test_a_transaction_is_all_or_nothing(database: Database) -> None:
    database.execute("CREATE TABLE t (i int PRIMARY KEY)")

    def insert_twice() -> None:
        with database.connection() as link:
            link.execute("INSERT INTO t VALUES (1)")
            link.execute("INSERT INTO t VALUES (1)")

    with pytest.raises(ConflictError, match="t_pkey"):
        insert_twice()
    assert database.execute("SELECT count(*) FROM t") == [(0,)]


def test_errors_have_our_classes(database: Database) -> None:
    with pytest.raises(UnprocessableDataError):
        database.execute("SELECT %s::int", ("word",))
    with pytest.raises(FatalError):
        database.execute("SELEKT 1")
    with pytest.raises(TransientError):
        Database("postgresql://nobody@127.0.0.1:1/x").execute("SELECT 1")


STEPS = ["CREATE TABLE a (i int); INSERT INTO a VALUES (1)", "ALTER TABLE a ADD COLUMN j int DEFAULT 7"]


def test_migrations_run_once_and_in_order(database: Database) -> None:
    assert migrate(database, "room", STEPS[:1]) == 1
    assert migrate(database, "room", STEPS) == 1
    assert migrate(database, "room", STEPS) == 0
    assert database.execute("SELECT i, j FROM a") == [(1, 7)]


def test_edited_and_future_migrations_are_refused(database: Database) -> None:
    migrate(database, "room", STEPS)
    with pytest.raises(ConflictError, match="step 1 differs"):
        migrate(database, "room", ["CREATE TABLE a ()", STEPS[1]])
    with pytest.raises(ConflictError, match="newer cumbre"):
        migrate(database, "room", STEPS[:1])


def test_failed_migration_leaves_nothing(database: Database) -> None:
    with pytest.raises(FatalError):
        migrate(database, "room", [STEPS[0], "CREATE TABLE b (); NONSENSE"])
    assert database.execute("SELECT to_regclass('a'), to_regclass('b')") == [(None, None)]


def _migrate_and_use(dsn: str) -> None:
    migrate(Database(dsn), "room", STEPS)


def test_processes_that_migrate_together_wait_for_each_other(database: Database) -> None:
    workers = [
        multiprocessing.get_context("spawn").Process(target=_migrate_and_use, args=(database.dsn,))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert database.execute("SELECT count(*) FROM a") == [(1,)]
