"""Tables cut into months of their time column, so that a year's history never looks at older rows.

A month is 30 days of MJD TAI. Partitions are made when their first row comes, beside the others: readers and writers
do not wait. A table of an older program, not cut, becomes the partition of everything until its last month.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from cumbre.catalogs.schema import Table
from cumbre.stores.postgres import Connection, Database

DAYS = 30
_LOCK = 0x6C31_7061  # "l1pa"
LEDGER = """
CREATE TABLE level1.partition (
    parent text NOT NULL, low float8 NOT NULL, high float8 NOT NULL, name text NOT NULL UNIQUE,
    PRIMARY KEY (parent, low));
"""


def cut_older(link: Connection, table: Table, ddl: str) -> None:
    """Make a table that is not there, or one that is not cut into months, a cut one; keep all of its rows."""
    name = table.name.lower()
    kind = link.execute(
        "SELECT c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = 'level1' AND c.relname = %s",
        (name,),
    ).fetchone()
    if kind is None or kind[0] == "p":
        link.execute(ddl.encode())
        return
    old = f"{name}_before"
    link.execute(f"ALTER TABLE level1.{name} RENAME TO {old}".encode())
    link.execute(f"ALTER TABLE level1.{old} DROP CONSTRAINT {name}_pkey".encode())
    indexes = link.execute(
        "SELECT indexname FROM pg_indexes WHERE schemaname = 'level1' AND tablename = %s", (old,)
    )
    for (index,) in indexes.fetchall():
        link.execute(f'DROP INDEX level1."{index}"'.encode())
    link.execute(ddl.encode())
    for column in table.columns:
        link.execute(f"ALTER TABLE level1.{old} ADD COLUMN IF NOT EXISTS {column.sql()}".encode())
    found = link.execute(f"SELECT max({table.partition.lower()}) FROM level1.{old}".encode()).fetchone()  # noqa: S608
    last = found[0] if found else None
    if last is None:
        link.execute(f"DROP TABLE level1.{old}".encode())
        return
    high = (math.floor(last / DAYS) + 1) * DAYS
    link.execute(
        f"ALTER TABLE level1.{name} ATTACH PARTITION level1.{old} FOR VALUES FROM (MINVALUE) TO ({high})".encode()
    )
    link.execute(
        "INSERT INTO level1.partition (parent, low, high, name) VALUES (%s, '-infinity', %s, %s)",
        (name, high, old),
    )


class Partitions:
    """The months of some tables, made when they are needed."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._known: dict[str, list[tuple[float, float]]] = {}

    def ensure(self, table: Table, times: Iterable[float]) -> None:
        """Have a partition for every time (MJD TAI)."""
        parent = table.name.lower()
        months = {math.floor(time / DAYS) for time in times}
        for month in sorted(months):
            if not self._has(parent, month):
                self._make(parent, month)

    def _has(self, parent: str, month: int) -> bool:
        middle = (month + 0.5) * DAYS
        return any(low <= middle < high for low, high in self._known.get(parent, ()))

    def _make(self, parent: str, month: int) -> None:
        low, high = month * DAYS, (month + 1) * DAYS
        name = f"{parent}_{low}" if low >= 0 else f"{parent}_m{-low}"
        with self._db.connection() as link:
            link.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            rows = link.execute(
                "SELECT low, high FROM level1.partition WHERE parent = %s", (parent,)
            ).fetchall()
            self._known[parent] = [(float(a), float(b)) for a, b in rows]
            if self._has(parent, month):
                return
            # attached when it is there: reading and writing of the other months goes on meanwhile
            link.execute(f"CREATE TABLE level1.{name} (LIKE level1.{parent} INCLUDING DEFAULTS)".encode())
            link.execute(
                f"ALTER TABLE level1.{parent} ATTACH PARTITION level1.{name} FOR VALUES FROM ({low}) TO ({high})".encode()
            )
            link.execute(
                "INSERT INTO level1.partition (parent, low, high, name) VALUES (%s, %s, %s, %s)",
                (parent, low, high, name),
            )
        self._known[parent].append((low, high))
