"""A PostgreSQL server for tests: one a session, one database a test."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cumbre.stores.postgres import Database, EmbeddedPostgres

_COUNT = itertools.count()


@contextmanager
def server() -> Iterator[str]:
    """DSN of a throw-away server (CUMBRE_TEST_POSTGRES names one that runs already)."""
    if given := os.environ.get("CUMBRE_TEST_POSTGRES"):
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix="cumbre-pg-"))  # short: pytest's paths do not fit in a socket name
    folder.chmod(0o711)
    postgres = EmbeddedPostgres(folder / "pg", durable=False)
    try:
        yield postgres.start()
    finally:
        postgres.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def fresh_database(dsn: str) -> Iterator[Database]:
    """A new, empty database on the server, dropped afterwards."""
    import psycopg
    from psycopg import conninfo, sql

    name = f"test_{os.getpid()}_{next(_COUNT)}"
    with psycopg.connect(dsn, autocommit=True) as link:
        link.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    parts = conninfo.conninfo_to_dict(dsn)
    user, password = parts.get("user", ""), parts.get("password", "")
    host, port = str(parts.get("host", "")), parts.get("port", "")
    if host.startswith("/"):
        target = f"postgresql://{user}:{password}@/{name}?host={host.replace('/', '%2F')}&port={port}"
    else:
        target = f"postgresql://{user}:{password}@{host}:{port}/{name}"
    database = Database(target)
    try:
        yield database
    finally:
        database.close()
        with psycopg.connect(dsn, autocommit=True) as link:
            link.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
