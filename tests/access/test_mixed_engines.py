"""One query over PostgreSQL, Parquet, memory and an upload; only what is needed is brought together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pytest
from access_data import Place, in_files, in_postgres, sky

from cumbre.access.engines import Engines
from cumbre.access.limits import Limits, QueryTooBigError
from cumbre.access.planner import make_plan
from cumbre.access.query import run
from cumbre.access.tables import Table, Tables
from cumbre.access.uploads import upload_table, with_uploads
from cumbre.access.user import ANYBODY, User
from cumbre.core.errors import NotFoundError
from support.pg import fresh_database


@pytest.fixture(scope="module")
def place(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    files = in_files(tmp_path_factory.mktemp("files"))
    with fresh_database(postgres_dsn) as db:
        live = in_postgres(db)
        tables = [replace(t, schema="live") for t in live.tables.tables]
        tables += [replace(t, schema="release") for t in files.tables.tables]
        yield Place("mixed", Tables(tables), Engines(db))


def test_a_live_table_a_catalogue_and_an_upload(place: Place) -> None:
    uploads = {"mine": pa.table({"id": [1, 2, 3], "ra": [10.0, 50.0, 200.0], "dec": [0.0, 20.0, -30.0]})}
    adql = """SELECT u.id, l.id AS live, r.id AS released, l.mag - r.mag AS change
        FROM TAP_UPLOAD.mine AS u
        JOIN release.stars AS r ON DISTANCE(u.ra, u.dec, r.ra, r.dec) < 4
        JOIN live.stars AS l ON l.id = r.id
        WHERE l.mag < 21 AND r.night <= 3"""
    rows = place.rows(adql, uploads=uploads)
    one = place.rows(adql.replace("release.stars", "live.stars"), uploads=uploads)
    other = place.rows(adql.replace("live.stars", "release.stars"), uploads=uploads)
    assert rows
    assert sorted(rows) == sorted(one) == sorted(other)
    assert {row[3] for row in rows} == {0.0}


def test_only_needed_columns_and_rows_are_brought(place: Place) -> None:
    adql = """SELECT r.id, l.mag FROM release.stars r JOIN live.stars l ON l.id = r.id
        WHERE 1 = CONTAINS(POINT(l.ra, l.dec), CIRCLE(10, 20, 1)) AND l.kind LIKE 'st%' AND r.mag > l.mag - 1"""
    plan = make_plan(adql, tables=place.tables, user=ANYBODY)
    assert plan.engine == "duckdb"
    (fetch,) = plan.fetches
    assert set(fetch.schema.names) == {"id", "mag", "ra", "dec", "kind", "hpx29"}
    assert 'hpx29" >=' in fetch.sql
    assert "LIKE" in fetch.sql


def test_rows_of_an_outer_join_are_not_filtered_too_early(place: Place) -> None:
    adql = "SELECT COUNT(*) FROM release.stars r LEFT JOIN live.stars l ON l.id = r.id AND l.night = 1 WHERE l.mag IS NULL"
    assert place.rows(adql) == place.rows(adql.replace("live.", "release."))
    nulls = sum(
        m is None and n == 1
        for m, n in zip(sky()["mag"].to_pylist(), sky()["night"].to_pylist(), strict=True)
    )
    others = sum(n != 1 for n in sky()["night"].to_pylist())
    assert place.rows(adql) == [(nulls + others,)]


def test_two_live_tables_matched_by_position(place: Place) -> None:
    adql = "SELECT COUNT(*) FROM live.stars a JOIN live.stars b ON DISTANCE(a.ra, a.dec, b.ra, b.dec) < 0.5"
    assert make_plan(adql, tables=place.tables, user=ANYBODY).engine == "duckdb"
    assert place.rows(adql) == place.rows(adql.replace("live", "release"))


def test_live_tables_and_an_upload_stay_in_the_database(place: Place) -> None:
    tables = with_uploads(place.tables, {"mine": pa.table({"ra": [1.0], "dec": [2.0]})})
    adql = "SELECT s.id FROM mine u JOIN live.stars s ON DISTANCE(u.ra, u.dec, s.ra, s.dec) < 0.1"
    plan = make_plan(adql, tables=tables, user=ANYBODY)
    assert plan.engine == "postgres"
    assert [(c.ra, c.dec) for c in plan.covers] == [("ra", "dec")]


def test_too_much_to_bring_is_refused(place: Place) -> None:
    with pytest.raises(QueryTooBigError, match="conditions on that table alone"):
        run(
            "SELECT COUNT(*) FROM live.stars l JOIN release.stars r ON l.id = r.id",
            tables=place.tables, engines=place.engines, limits=Limits(bytes=10_000),
        ).read_all()  # fmt: skip


def test_tables_of_others_are_not_there(place: Place) -> None:
    private = replace(upload_table("secret", pa.table({"a": [1]})), schema="u_ann", public="user:ann")
    shared = replace(upload_table("common", pa.table({"a": [2]})), schema="u_ann", public="survey")
    tables = Tables([*place.tables.tables, private, shared])

    def ask(name: str, user: User) -> list[object]:
        made = run(f"SELECT a FROM u_ann.{name}", tables=tables, engines=place.engines, user=user)
        return made.read_all().column("a").to_pylist()

    ann, bob = User("ann"), User("bob", frozenset({"survey"}))
    assert ask("secret", ann) == [1]
    assert ask("common", bob) == [2]
    for name, user in (("secret", bob), ("secret", ANYBODY), ("common", ANYBODY), ("common", ann)):
        with pytest.raises(Exception, match=f"no table u_ann.{name}"):
            ask(name, user)
    assert [t.name for t in tables.visible(bob)].count("secret") == 0
    assert {s.name for s in tables.visible_schemas(ANYBODY)} == {"live", "release"}
    with pytest.raises(NotFoundError, match="several schemas"):
        tables.find(None, "stars", ANYBODY)


def test_tables_that_appear_later(place: Place) -> None:
    made: list[Table] = []
    tables = Tables(place.tables.tables, providers=[lambda user: [t for t in made if user.name == "ann"]])
    made.append(replace(upload_table("new", pa.table({"a": [7]})), schema="u_ann", public="user:ann"))
    result = run("SELECT a FROM u_ann.new", tables=tables, engines=place.engines, user=User("ann"))
    assert result.read_all().column("a").to_pylist() == [7]
