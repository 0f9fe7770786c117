"""Users' tables: made, filled, shared and dropped on a real server; quota and strangers refused."""

from __future__ import annotations

import hpgeom
import numpy as np
import pyarrow as pa
import pytest

from cumbre.access.identity import AuthorizationError
from cumbre.access.tables import Column
from cumbre.access.user import ANYBODY, User
from cumbre.access.user_tables import QuotaError, UserTables
from cumbre.core.errors import ConflictError, NotFoundError, UserError

COLUMNS = [
    Column("Name", "char", "*", description="What I call it."),
    Column("ra", "double", unit="deg", ucd="pos.eq.ra;meta.main"),
    Column("dec", "double", unit="deg"),
    Column("n", "int"),
]
EVA, BOB = User("eva"), User("bob", frozenset({"friends"}))


@pytest.fixture
def mine(database):
    return UserTables(database)


def rows(n=3):
    return pa.table(
        {"name": [f"s{k}" for k in range(n)], "RA": np.linspace(0, 359, n), "dec": np.linspace(-89, 89, n)}
    )


def names(mine, user):
    return [table.full_name for table in mine.tables(user)]


def test_a_table_is_made_filled_and_found(mine, database):
    assert mine.create("eva", "Stars", COLUMNS, "My stars.") == "u_eva.stars"
    assert mine.append("eva", "stars", rows()) == 3
    assert mine.append("eva", "u_eva.stars", rows(2)) == 5
    (table,) = mine.tables(EVA)
    assert (table.rows, table.description, table.public) == (5, "My stars.", "user:eva")
    assert [c.name for c in table.columns] == ["Name", "ra", "dec", "n", "hpx29"]
    assert (table.position.ra, table.position.pixel) == ("ra", "hpx29")
    found = database.execute(f"SELECT ra, dec, n, hpx29 FROM {table.source}")
    assert all(row[3] == hpgeom.angle_to_pixel(2**29, row[0], row[1]) for row in found)
    assert {row[2] for row in found} == {None}


def test_only_the_owner_and_friends_see_it(mine):
    mine.create("eva", "stars", COLUMNS)
    assert names(mine, EVA) == ["u_eva.stars"]
    assert names(mine, BOB) == names(mine, ANYBODY) == []
    mine.share("eva", "stars", ["friends"])
    assert names(mine, BOB) == ["u_eva.stars"]
    assert names(mine, User("carl")) == []
    with pytest.raises(AuthorizationError, match="not your schema; yours is u_bob"):
        mine.append("bob", "u_eva.stars", rows())
    with pytest.raises(AuthorizationError):
        mine.drop("bob", "u_eva.stars")
    mine.share("eva", "stars", [])
    assert names(mine, BOB) == []


def test_accounts_that_differ_in_signs_have_their_own_schema(mine):
    made = {mine.schema_of(name) for name in ("a.b", "a-b", "a_b", "A.B")}
    assert len(made) == 4
    assert mine.schema_of("a.b") == "u_a_b"


def test_the_quota_is_enforced_before_writing(mine, database):
    mine.create("eva", "stars", COLUMNS)
    mine.set_quota("eva", mine.usage("eva").used + 100_000)
    big = pa.table({"n": np.arange(20_000, dtype=np.int32)})
    with pytest.raises(QuotaError, match=r"use .* MB of .* need about"):
        mine.append("eva", "stars", big)
    assert database.execute("SELECT count(*) FROM u_eva.stars") == [(0,)]
    mine.append("eva", "stars", big.slice(0, 500))
    assert mine.usage("eva").used <= mine.usage("eva").quota
    mine.set_quota("eva", None)
    assert mine.append("eva", "stars", big) == 20_500


def test_indexes(mine, database):
    mine.create("eva", "stars", COLUMNS)
    mine.append("eva", "stars", pa.table({"n": [1, 1]}))
    mine.add_index("eva", "stars", "N")
    mine.add_index("eva", "stars", "n")
    count = "SELECT count(*) FROM pg_indexes WHERE schemaname = 'u_eva'"
    assert database.execute(count) == [(2,)]  # this one and the pixels'
    with pytest.raises(UserError, match="not unique"):
        mine.add_index("eva", "stars", "n", unique=True)
    with pytest.raises(UserError, match="no column"):
        mine.add_index("eva", "stars", 'n"; DROP TABLE access.token; --')


def test_dropping_frees_the_name(mine):
    mine.create("eva", "stars", COLUMNS)
    with pytest.raises(ConflictError, match="there already"):
        mine.create("eva", "STARS", COLUMNS)
    mine.drop("eva", "stars")
    with pytest.raises(NotFoundError):
        mine.drop("eva", "stars")
    mine.create("eva", "stars", COLUMNS[:1])
    assert [c.name for t in mine.tables(EVA) for c in t.columns] == ["Name"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([], "0 columns"),
        ([Column('a" int); DROP TABLE access.token; --', "int")], "column name"),
        ([Column("hpx29", "long")], "made here"),
        ([Column("a", "int"), Column("A", "int")], "stands twice"),
        ([Column("a", "double", "3")], "arraysize 3"),
        ([Column("a", "doubleComplex")], "datatype doubleComplex"),
    ],
)
def test_columns_that_cannot_be(mine, columns, message):
    with pytest.raises(UserError, match=message):
        mine.create("eva", "stars", columns)
    assert names(mine, EVA) == []


@pytest.mark.parametrize("name", ["", "a b", 'x"; --', "1st", "a" * 64, "pg_catalog.pg_class"])
def test_names_that_cannot_be(mine, name):
    with pytest.raises(UserError):
        mine.create("eva", name, COLUMNS)


def test_rows_that_do_not_fit_leave_nothing(mine, database):
    mine.create("eva", "stars", COLUMNS)
    for bad, message in (
        (pa.table({"who": [1]}), "no column who"),
        (pa.table({"n": ["x"]}), "column n: expected int"),
        (pa.table({"n": [2**40]}), "column n: expected int"),
    ):
        with pytest.raises(UserError, match=message):
            mine.append("eva", "stars", bad)
    mine.append("eva", "stars", pa.table({"ra": [float("nan")], "dec": [0.0]}))
    assert database.execute("SELECT count(*), count(hpx29) FROM u_eva.stars") == [(1, 0)]
