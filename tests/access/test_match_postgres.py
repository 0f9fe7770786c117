"""A match of uploaded positions with a live table: what is asked of PostgreSQL gives exactly the rows wanted, and ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import psycopg
import pyarrow as pa
import pytest
from access_data import Place, in_postgres, sky

from cumbre.access.engines.copy_stream import copy_rows
from cumbre.access.limits import Limits, QueryCancelledError
from cumbre.access.planner import make_plan
from cumbre.access.query import run
from cumbre.access.uploads import with_uploads
from cumbre.access.user import ANYBODY
from support.pg import fresh_database

RADIUS = 5.0
LATER = "SELECT n, id FROM (SELECT TOP 20 n, id FROM q ORDER BY n, id OFFSET 3) AS r ORDER BY 1, 2"
MATCH = "mine u JOIN stars s ON DISTANCE(u.ra, u.dec, s.ra, s.dec) < 5"


@pytest.fixture(scope="module")
def place(postgres_dsn: str) -> Iterator[Place]:
    with fresh_database(postgres_dsn) as db:
        yield in_postgres(db)


def positions(count: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    other = np.random.default_rng(seed + 1000)
    return pa.table(
        {
            "n": np.arange(count), "ra": rng.uniform(0, 360, count), "dec": np.degrees(np.arcsin(rng.uniform(-1, 1, count))),
            "ra_b": other.uniform(0, 360, count), "dec_b": other.uniform(-80, 80, count),
        }
    )  # fmt: skip


def near(upload: pa.Table, ra: str = "ra", dec: str = "dec") -> set[tuple[int, int]]:
    """Pairs (n, id) that are nearer than the radius, from unit vectors."""

    def vectors(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
        lon, lat = np.radians(lon), np.radians(lat)
        return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)

    ours = vectors(upload[ra].to_numpy(), upload[dec].to_numpy())
    theirs = vectors(sky()["ra"].to_numpy(), sky()["dec"].to_numpy())
    chord = 2 * np.sin(np.radians(RADIUS) / 2)
    pairs = np.argwhere(np.linalg.norm(ours[:, None] - theirs[None], axis=2) < chord)
    ids = sky()["id"].to_numpy()
    return {(int(n), int(ids[i])) for n, i in pairs}


MINE = positions(60, 5)
PAIRS = sorted(near(MINE))


def ask(place: Place, adql: str, **more):
    return place.rows(adql, uploads={"mine": MINE}, **more)


def test_it_is_asked_by_ranges_of_pixels(place: Place) -> None:
    plan = make_plan(
        f"SELECT u.n, s.id FROM {MATCH}", tables=with_uploads(place.tables, {"mine": MINE}), user=ANYBODY
    )
    assert plan.engine == "postgres"
    assert len(plan.covers) == 1
    assert len(PAIRS) > 200


@pytest.mark.parametrize("offset", [0, 1, 17, 199, 10**6])
@pytest.mark.parametrize("top", [1, 20, 10**6])
def test_order_top_and_offset(place: Place, top: int, offset: int) -> None:
    got = ask(place, f"SELECT TOP {top} u.n, s.id FROM {MATCH} ORDER BY u.n, s.id OFFSET {offset}")
    assert got == PAIRS[offset : offset + top]


@pytest.mark.parametrize("offset", [0, 30])
def test_maxrec_cuts_and_says_so_only_when_there_is_more(place: Place, offset: int) -> None:
    left = len(PAIRS) - offset
    for maxrec, top, cut in (
        (left - 1, "", True), (left, "", False), (left + 1, "", False), (7, "TOP 7", False), (7, "TOP 8", True),
        (9, "TOP 8", False), (1, "", True),
    ):  # fmt: skip
        adql = f"SELECT {top} u.n, s.id FROM {MATCH} ORDER BY 1, 2 OFFSET {offset}"
        with run(
            adql, tables=place.tables, engines=place.engines, maxrec=maxrec, uploads={"mine": MINE}
        ) as result:
            rows = result.read_all()
        wanted = PAIRS[offset:][: min(maxrec, int(top.split()[1]) if top else maxrec)]
        assert list(zip(*(c.to_pylist() for c in rows.columns), strict=True)) == wanted, (maxrec, top)
        assert (result.overflow is not None) is cut, (maxrec, top, result.overflow)
        if cut:
            assert f"MAXREC: the first {maxrec} rows" in result.overflow
    assert ask(place, f"SELECT u.n FROM {MATCH}", maxrec=0) == []
    assert ask(place, f"SELECT TOP 0 u.n FROM {MATCH}") == []


@pytest.mark.parametrize(
    "adql",
    [
        f"SELECT n, id FROM (SELECT TOP 20 u.n, s.id FROM {MATCH} ORDER BY u.n, s.id OFFSET 3) AS q ORDER BY 1, 2",
        f"WITH q AS (SELECT TOP 20 u.n, s.id FROM {MATCH} ORDER BY u.n, s.id OFFSET 3) SELECT n, id FROM q ORDER BY 1, 2",
        f"WITH q AS (SELECT u.n, s.id FROM {MATCH}) {LATER}",
    ],
)
def test_top_inside(place: Place, adql: str) -> None:
    assert ask(place, adql) == PAIRS[3:23]
    plan = make_plan(adql, tables=with_uploads(place.tables, {"mine": MINE}), user=ANYBODY)
    assert "AS MATERIALIZED" in plan.sql(1000)  # else PostgreSQL begins with the whole catalogue


def test_top_inside_other_queries(place: Place) -> None:
    assert ask(place, f"SELECT COUNT(*) FROM (SELECT TOP 50 s.id FROM {MATCH}) AS q") == [(50,)]
    first = PAIRS[0][1]
    assert ask(
        place, f"SELECT id FROM stars WHERE id = (SELECT TOP 1 s.id FROM {MATCH} ORDER BY u.n, s.id)"
    ) == [(first,)]
    both = ask(
        place,
        f"SELECT n FROM (SELECT TOP 5 u.n FROM {MATCH} ORDER BY u.n, s.id) AS a UNION ALL"
        f" SELECT n FROM (SELECT TOP 7 u.n FROM {MATCH} ORDER BY u.n, s.id) AS b",
    )
    assert sorted(both) == sorted([(n,) for n, _ in PAIRS[:5]] + [(n,) for n, _ in PAIRS[:7]])


def test_two_positions_of_one_upload(place: Place) -> None:
    """Each match asks around its own position."""
    second = near(MINE, "ra_b", "dec_b")
    rows = ask(
        place,
        "SELECT u.n, a.id, b.id FROM mine u LEFT JOIN stars a ON DISTANCE(u.ra, u.dec, a.ra, a.dec) < 5"
        " LEFT JOIN stars b ON DISTANCE(u.ra_b, u.dec_b, b.ra, b.dec) < 5",
    )
    assert {(n, i) for n, i, _ in rows if i is not None} == set(PAIRS)
    assert {(n, i) for n, _, i in rows if i is not None} == second
    assert {n for n, _, _ in rows} == set(range(len(MINE)))
    mixed = ask(
        place,
        "SELECT u.n, b.id FROM mine u JOIN stars a ON DISTANCE(u.ra, u.dec, a.ra, a.dec) < 5"
        " LEFT JOIN stars b ON DISTANCE(u.ra_b, u.dec_b, b.ra, b.dec) < 5",
    )
    with_first = {n for n, _ in PAIRS}
    assert {(n, i) for n, i in mixed if i is not None} == {pair for pair in second if pair[0] in with_first}


def active(place: Place) -> int:
    assert place.engines.db is not None
    return int(
        place.engines.db.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE state <> 'idle' AND pid <> pg_backend_pid()"
            " AND datname = current_database()"
        )[0][0]
    )


def wait_for(place: Place, number: int) -> None:
    end = time.monotonic() + 20
    while active(place) != number:
        assert time.monotonic() < end, f"{active(place)} queries are running"
        time.sleep(0.02)


CROWD = pa.table({"n": np.arange(3000), "ra": np.full(3000, 100.0), "dec": np.full(3000, 10.0)})
MANY = "SELECT u.n, s.id FROM mine u JOIN stars s ON DISTANCE(u.ra, u.dec, s.ra, s.dec) < 14"


def test_who_wants_few_ends_the_query_in_the_server(place: Place) -> None:
    assert place.ask(MANY, uploads={"mine": CROWD}, maxrec=5).num_rows == 5
    wait_for(place, 0)
    several_batches = place.ask(MANY.replace("SELECT", "SELECT TOP 20000", 1), uploads={"mine": CROWD})
    assert several_batches.num_rows == 20_000
    result = run(MANY, tables=place.tables, engines=place.engines, uploads={"mine": CROWD})
    next(iter(result.batches()))
    result.close()
    wait_for(place, 0)
    assert place.rows("SELECT COUNT(*) FROM stars") == [(4000,)]


def test_cancel(place: Place) -> None:
    slow = MANY.replace("< 14", "< 14 AND SIN(u.ra * s.ra) * COS(s.dec) * LOG10(1 + s.ra) > 5")
    for wanted in (
        slow,
        slow.replace("SELECT", "SELECT TOP 3", 1),
        f"SELECT COUNT(*) FROM ({slow}) AS q, stars x, stars y",
    ):
        result = run(
            wanted,
            tables=place.tables,
            engines=place.engines,
            uploads={"mine": CROWD},
            limits=Limits(seconds=60),
        )
        result.cancel()  # before it begins
        with pytest.raises(QueryCancelledError):
            result.read_all()
    result = run(
        wanted, tables=place.tables, engines=place.engines, uploads={"mine": CROWD}, limits=Limits(seconds=60)
    )
    threads = [threading.Thread(target=lambda: (wait_for(place, 1), result.cancel()))]
    threads[0].start()
    with pytest.raises(QueryCancelledError):
        result.read_all()
    threads[0].join(20)
    wait_for(place, 0)


def test_a_cancel_that_came_too_early_for_the_server_is_told_again(place: Place) -> None:
    """The request to cancel reaches a server that has not begun: nothing is there to be stopped, then it begins."""
    assert place.engines.db is not None
    cancelled = threading.Event()
    link = psycopg.connect(place.engines.db.dsn)
    link.cancel_safe(timeout=5)
    cancelled.set()
    with pytest.raises(psycopg.errors.QueryCanceled):
        list(copy_rows(link, b"COPY (SELECT pg_sleep(60)) TO STDOUT (FORMAT binary)", cancelled))
    link.close()
    wait_for(place, 0)
