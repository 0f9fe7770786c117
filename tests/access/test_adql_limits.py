"""Texts made to hurt: refused at once, with a reason."""

from __future__ import annotations

import time

import pytest

from cumbre.access.adql.errors import AdqlError
from cumbre.access.adql.parser import parse
from cumbre.access.planner import make_plan
from cumbre.access.tables import Column, Position, Table, Tables
from cumbre.access.user import ANYBODY

HOSTILE = {
    "ten megabytes of terms": "SELECT " + "1 + " * 2_500_000 + "1 FROM t",
    "ten megabytes of one word": "SELECT " + "a" * 10_000_000 + " FROM t",
    "ten megabytes of text": "SELECT '" + "x" * 10_000_000 + "' FROM t",
    "deep parentheses": "SELECT " + "(" * 100_000 + "1" + ")" * 100_000 + " FROM t",
    "deep functions": "SELECT " + "ABS(" * 5_000 + "1" + ")" * 5_000 + " FROM t",
    "deep queries": "SELECT * FROM " + "(SELECT * FROM " * 1_000 + "t" + ") AS q" * 1_000,
    "a long sum": "SELECT " + "1 + " * 5_000 + "1 FROM t",
    "many set operations": "SELECT a FROM t UNION " * 500 + "SELECT a FROM t",
    "many joins": "SELECT 1 FROM t" + ", t" * 500,
    "many signs, then nothing": "SELECT " + "- " * 40_000 + " FROM t",
    "a string without end": "SELECT '" + "x" * 900_000,
    "only quotes": '"' * 999_999,
    "two statements": "SELECT 1 FROM t; DROP TABLE t",
    "a comment that hides": "SELECT 1 FROM t --\n; DELETE FROM t",
    "writing": "DELETE FROM t",
    "updating": "UPDATE t SET a = 1",
    "into": "SELECT 1 INTO t2 FROM t",
    "backslash": "SELECT 'a\\' FROM t",
    "dollar quotes": "SELECT $$a$$ FROM t",
    "brackets": "SELECT [a] FROM t",
    "C comment": "SELECT /* a */ 1 FROM t",
    "system function": "SELECT current_setting('x') FROM t",
    "system cast": "SELECT 'a'::regclass FROM t",
    "zero byte": "SELECT 'a' \0 FROM t",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused_at_once(name: str) -> None:
    if (
        name == "backslash"
    ):  # a backslash is no escape in ADQL: this one is right, and the string is two characters
        parse(HOSTILE[name])
        return
    start = time.process_time()
    with pytest.raises(AdqlError) as caught:
        parse(HOSTILE[name])
    assert time.process_time() - start < 3.0  # parsing them would take minutes, or all memory
    assert len(str(caught.value)) < 400


def test_what_is_long_but_honest_is_taken() -> None:
    parse("SELECT a FROM t WHERE id IN (" + ", ".join(str(i) for i in range(30_000)) + ")")
    parse("SELECT a FROM t WHERE " + " OR ".join(f"id = {i}" for i in range(5_000)))
    parse("SELECT " + ", ".join(f"c{i}" for i in range(2_000)) + " FROM t")


def nested(call: str, depth: int) -> str:
    inner = "ra"
    for _ in range(depth):
        inner = call.format(inner)
    return inner


@pytest.mark.parametrize(
    "adql",
    [
        f"SELECT {nested('DISTANCE(ra, {}, 1, 2)', 40)} FROM t",  # doubles with each step
        "SELECT ra FROM t WHERE "
        + " OR ".join(f"DISTANCE(ra, dec, {i % 360}, 2) < 0.1" for i in range(5000)),
    ],
)
def test_what_grows_when_it_is_regenerated_is_refused(adql: str) -> None:
    columns = (Column("ra", "double"), Column("dec", "double"), Column("hpx29", "long"))
    table = Table("c", "t", columns, engine="postgres", source="c.t", position=Position("ra", "dec", "hpx29"))
    begin = time.process_time()
    with pytest.raises(AdqlError, match="too large"):
        make_plan(adql, tables=Tables([table]), user=ANYBODY)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("adql", "line", "column", "words"),
    [
        ("SELECT size FROM t", 1, 8, '"size"'),
        ("SELECT a,\n  b\nFROM t\nWHERE a = = 1", 4, 11, "found ="),
        ("SELECT a FROM t LIMIT 10", 1, 17, "TOP"),
        ("SELECT a FORM t", 1, 15, "FROM"),
        ("SELECT a FROM t WERE b = 1", 1, 22, "the end of the query"),
        ("SELECT CEIL(a) FROM t", 1, 8, "CEILING"),
        ("SELECT a FROM t WHERE a", 1, 23, "condition"),
        ("SELECT MOD(a) FROM t", 1, 8, "takes 2"),
        ("SELECT CAST(a AS FLOAT) FROM t", 1, 18, "DOUBLE PRECISION"),
        ("SELECT a FROM (SELECT a FROM t)", 1, 32, "AS name"),
        ("SELECT a FROM t WHERE s = 'abc", 1, 27, "closing"),
        ("SELECT _a FROM t", 1, 8, '"_name"'),
        ("SELECT a % 2 FROM t", 1, 10, "MOD"),
    ],
)
def test_errors_name_place_and_remedy(adql: str, line: int, column: int, words: str) -> None:
    with pytest.raises(AdqlError) as caught:
        parse(adql)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert words in str(caught.value)
