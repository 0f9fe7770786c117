"""The SQL that reaches an engine, read by sqlglot as a second judge: one SELECT of known functions and tables."""

from __future__ import annotations

import pyarrow as pa
import pytest
import sqlglot
from access_data import COLUMNS, others, stars
from sqlglot import exp

from cumbre.access.adql.signatures import ARGUMENTS
from cumbre.access.planner import make_plan
from cumbre.access.tables import Table, Tables
from cumbre.access.uploads import with_uploads
from cumbre.access.user import ANYBODY

UPLOAD = pa.table({"n": [1], "ra": [1.0], "dec": [2.0], "name": ["x"]})
STATEMENTS = (
    exp.Insert,
    exp.Update,
    exp.Delete,
    exp.Create,
    exp.Drop,
    exp.Command,
    exp.Copy,
    exp.Into,
    exp.Set,
)


def tables(engine: str) -> Tables:
    source = "cat.stars" if engine == "postgres" else "/data/it's/stars.parquet"
    base = Tables([stars("postgres" if engine == "postgres" else "parquet", source), others("arrow", UPLOAD)])
    return with_uploads(base, {"mine": UPLOAD})


def calls() -> list[str]:
    """Every function with fitting arguments, and texts that try to get out of their quotes."""
    geometry = {
        "POINT": "COORD1(POINT(s.ra, s.dec))", "CIRCLE": "AREA(CIRCLE(s.ra, s.dec, 1))", "BOX": "AREA(BOX(1, 2, 3, 4))",
        "POLYGON": "AREA(POLYGON(0, 0, 1, 0, 0, 1))", "REGION": "AREA(REGION('CIRCLE ICRS 1 2 3'))",
        "CENTROID": "COORD2(CENTROID(outline))", "AREA": "AREA(outline)", "COORD1": "COORD1(POINT(1, 2))",
        "COORD2": "COORD2(POINT(1, 2))", "COORDSYS": "COORDSYS(POINT(1, 2))",
        "CONTAINS": "CONTAINS(POINT(s.ra, s.dec), outline)", "INTERSECTS": "INTERSECTS(outline, CIRCLE(1, 2, 3))",
        "DISTANCE": "DISTANCE(s.ra, s.dec, 1, 2)", "LOWER": "LOWER(kind)", "UPPER": "UPPER(kind)",
        "IN_UNIT": "IN_UNIT(s.ra, 'rad')", "IVO_HEALPIX_INDEX": "IVO_HEALPIX_INDEX(4, s.ra, s.dec)", "COUNT": "COUNT(s.ra)",
        "COALESCE": "COALESCE(kind, 'a')", "NULLIF": "NULLIF(kind, 'a')",
    }  # fmt: skip
    made = [
        geometry.get(n) or f"{n}({', '.join(['mag'] * max(1, low))})" for n, (low, _) in ARGUMENTS.items()
    ]
    made = [call.replace("(mag)", "()") if call.startswith(("PI(", "RAND(")) else call for call in made]
    texts = [
        "'; DROP TABLE stars --",
        "\\'; SELECT 1; --",
        "$$",
        "a''b",
        '"',
        "*/ 1 /*",
        "E'\\x41'",
        "%s",
        "{x}",
    ]
    return made + [f"kind || '{text.replace(chr(39), chr(39) * 2)}'" for text in texts]


@pytest.mark.parametrize("engine", ["postgres", "duckdb"])
@pytest.mark.parametrize("call", calls())
def test_one_select_and_nothing_else(engine: str, call: str) -> None:
    adql = f"""SELECT TOP 5 {call} AS "na""me; DROP", s.night FROM stars AS s
        JOIN mine AS u ON DISTANCE(s.ra, s.dec, u.ra, u.dec) < 0.1 WHERE s.id IN (1, 2) GROUP BY {{}} ORDER BY 2"""
    aggregate = call.split("(", maxsplit=1)[0] in ("AVG", "COUNT", "MAX", "MIN", "SUM", "STDDEV", "MEDIAN")
    adql = adql.format("s.night") if aggregate else adql.replace(" GROUP BY {}", "")
    sql = make_plan(adql, tables=tables(engine), user=ANYBODY).sql(100)
    statements = sqlglot.parse(sql, read=engine)
    assert len(statements) == 1
    assert isinstance(statements[0], exp.Select)
    assert not list(statements[0].find_all(*STATEMENTS))
    named = {table.sql(engine) for table in statements[0].find_all(exp.Table)}
    for name in named:
        assert name.startswith(("cat.stars AS t", "adql_", "READ_PARQUET('/data/it''s/stars.parquet'")), name
    columns = {c.lower() for column in statements[0].find_all(exp.Column) for c in [column.name]}
    ours = {c.name for c in COLUMNS} | {
        "n",
        "ra",
        "dec",
        "name",
        "adql_row",
        "adql_low",
        "adql_high",
        "adql_pixel",
    }
    assert columns <= ours | {"*", "", "hive_partitioning"}, columns - ours


def test_every_table_of_the_corpus_stays_in_its_quotes() -> None:
    """A published name with quotes in it cannot get out of them."""
    column = COLUMNS[0].__class__('we"ird; --', "long")
    odd = Table("s", 'ta"ble', (column,), engine="postgres", source="cat.t")
    sql = make_plan('SELECT "we""ird; --" FROM "ta""ble"', tables=Tables([odd]), user=ANYBODY).sql()
    assert sql == 'SELECT t1."we""ird; --" AS c1 FROM cat.t AS t1'
