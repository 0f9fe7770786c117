"""Tables that the tests ask: one sky in memory, in Parquet and in PostgreSQL, the truth in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import hpgeom
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cumbre.access.engines import Engines
from cumbre.access.engines.postgres_functions import prepare
from cumbre.access.query import run
from cumbre.access.tables import Column, Position, Schema, Table, Tables
from cumbre.stores.postgres import Database

COLUMNS = (
    Column("id", "long", ucd="meta.id;meta.main", principal=True, indexed=True),
    Column("ra", "double", unit="deg", ucd="pos.eq.ra;meta.main", indexed=True),
    Column("dec", "double", unit="deg", ucd="pos.eq.dec;meta.main", indexed=True),
    Column("mag", "float", unit="mag", ucd="phot.mag"),
    Column("kind", "char", "*", description="star, galaxy or nothing"),
    Column("flag", "boolean"),
    Column("night", "int"),
    Column("outline", "double", "*", "polygon", unit="deg", indexed=True),
    Column("hpx29", "long"),
)


@lru_cache(maxsize=1)
def sky(count: int = 4000) -> pa.Table:
    """Positions over the whole sky, some of everything null; a small square around each as region."""
    rng = np.random.default_rng(20261121)
    ra, dec = rng.uniform(0, 360, count), np.degrees(np.arcsin(rng.uniform(-1, 1, count)))
    ra[:4], dec[:4] = (0.0, 359.9999, 180.0, 90.0), (90.0, -89.9999, 0.0, 0.0)
    mag = rng.normal(20, 2, count).astype(np.float32)
    kinds = np.array(["star", "galaxy", 'it\'s, "odd" é'], dtype=object)[rng.integers(0, 3, count)]
    pixel = hpgeom.angle_to_pixel(1 << 29, ra, dec)
    half = 0.5
    width = half / np.maximum(np.cos(np.radians(dec)), 0.1)
    low, high = np.maximum(dec - half, -90), np.minimum(dec + half, 90)
    region = np.stack([ra - width, low, ra + width, low, ra + width, high, ra - width, high], axis=1)
    order = np.argsort(pixel)
    table = pa.table(
        {
            "id": np.arange(count), "ra": ra, "dec": dec,
            "mag": pa.array(mag, mask=rng.uniform(size=count) < 0.1),
            "kind": pa.array(kinds, mask=rng.uniform(size=count) < 0.1),
            "flag": pa.array(rng.uniform(size=count) < 0.5, mask=rng.uniform(size=count) < 0.1),
            "night": pa.array(rng.integers(1, 6, count), type=pa.int32()),
            "outline": pa.array(list(region), type=pa.list_(pa.float64())),
            "hpx29": pixel,
        }
    )  # fmt: skip
    return table.take(pa.array(order))


def stars(engine: str, source: Any) -> Table:
    """The table ``cat.stars`` in an engine."""
    return Table(
        "cat", "stars", COLUMNS, "All stars.", engine, source, Position("ra", "dec", "hpx29"), rows=4000
    )


def others(engine: str, source: Any) -> Table:
    """A second, small table: names of kinds."""
    columns = (Column("kind", "char", "*"), Column("label", "char", "*"), Column("size", "int"))
    return Table("cat", "kinds", columns, "Names of kinds.", engine, source, rows=3)


KINDS = pa.table(
    {
        "kind": ["star", "galaxy", "dust"],
        "label": ["Star", "Galaxy", "Dust"],
        "size": pa.array([1, 2, 3], pa.int32()),
    }
)


@dataclass
class Place:
    """One engine with the tables."""

    name: str
    tables: Tables
    engines: Engines

    def ask(self, adql: str, **more: Any) -> pa.Table:
        """Rows of a query."""
        return run(adql, tables=self.tables, engines=self.engines, **more).read_all()

    def rows(self, adql: str, **more: Any) -> list[tuple[Any, ...]]:
        """Rows as tuples."""
        table = self.ask(adql, **more)
        return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


SCHEMAS = [Schema("cat", "Tests.")]


def in_files(folder: Path) -> Place:
    """Parquet and DuckDB."""
    pq.write_table(sky(), folder / "stars.parquet", row_group_size=500)
    tables = Tables([stars("parquet", str(folder / "stars.parquet")), others("arrow", KINDS)], SCHEMAS)
    return Place("duckdb", tables, Engines(scratch=folder))


def in_postgres(db: Database) -> Place:
    """PostgreSQL."""
    db.execute("CREATE SCHEMA cat")
    db.execute(
        'CREATE TABLE cat.stars (id bigint, ra float8, "dec" float8, mag real, kind text, flag boolean, night int, '
        "outline float8[], hpx29 bigint)"
    )
    plain = sky()
    rows = zip(*(column.to_pylist() for column in plain.columns), strict=True)
    db.copy("cat.stars", plain.column_names, rows)
    prepare(db)
    db.execute("CREATE INDEX ON cat.stars (hpx29)")
    db.execute("CREATE INDEX ON cat.stars USING gist (adql.region_key(outline))")
    db.execute("CREATE TABLE cat.kinds (kind text, label text, size int)")
    db.copy("cat.kinds", KINDS.column_names, zip(*(c.to_pylist() for c in KINDS.columns), strict=True))
    db.execute("ANALYZE")
    tables = Tables([stars("postgres", "cat.stars"), others("postgres", "cat.kinds")], SCHEMAS)
    return Place("postgres", tables, Engines(db))
