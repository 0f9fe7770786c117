"""The same ADQL gives the same rows on PostgreSQL and on DuckDB; the truth is numpy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from access_data import Place, in_files, in_postgres, sky

from cumbre.access.adql.errors import AdqlError
from cumbre.access.planner import make_plan
from cumbre.access.uploads import with_uploads
from cumbre.access.user import ANYBODY
from support.pg import fresh_database


@pytest.fixture(scope="module", params=["postgres", "duckdb"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if request.param == "duckdb":
        yield in_files(tmp_path_factory.mktemp("files"))
        return
    with fresh_database(request.getfixturevalue("postgres_dsn")) as db:
        yield in_postgres(db)


def column(name: str) -> np.ndarray:
    return sky().column(name).to_numpy(zero_copy_only=False)


def separation(ra: float, dec: float) -> np.ndarray:
    """Degrees by the angle of unit vectors (not the formula under test)."""

    def vector(a, d):
        return np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)], -1)

    one = vector(np.radians(column("ra")), np.radians(column("dec")))
    other = vector(np.radians(ra), np.radians(dec))
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(one, other), axis=-1), one @ other))


REGIONS = [
    "1 = CONTAINS(POINT('ICRS', ra, dec), CIRCLE('ICRS', {ra}, {dec}, {r}))",
    "CONTAINS(POINT(ra, dec), CIRCLE({ra}, {dec}, {r})) = 1",
    "1 = CONTAINS(POINT(s.ra, s.dec), CIRCLE(POINT({ra}, {dec}), {r}))",
    "1 = INTERSECTS(CIRCLE({ra}, {dec}, {r}), POINT(ra, dec))",
    "DISTANCE(ra, dec, {ra}, {dec}) < {r}",
    "{r} >= DISTANCE(POINT(ra, dec), POINT({ra}, {dec}))",
    "DISTANCE(POINT({ra}, {dec}), POINT(ra, dec)) <= {r}",
    "NOT (0 = CONTAINS(POINT(ra, dec), CIRCLE({ra}, {dec}, {r})))",
]


@pytest.mark.parametrize("form", REGIONS)
@pytest.mark.parametrize(
    ("ra", "dec", "r"), [(10, 20, 8), (0.5, -40, 15), (123, 89.5, 5), (200, -90, 30), (5, 5, 120)]
)
def test_every_form_of_a_cone_finds_the_same_rows(
    place: Place, form: str, ra: float, dec: float, r: float
) -> None:
    found = place.rows(f"SELECT id FROM cat.stars AS s WHERE {form.format(ra=ra, dec=dec, r=r)} ORDER BY id")
    wanted = sorted(column("id")[separation(ra, dec) < r])
    assert [row[0] for row in found] == wanted
    assert wanted


@pytest.mark.parametrize("form", REGIONS[:-1])
def test_a_small_cone_is_asked_by_pixels(place: Place, form: str) -> None:
    adql = f"SELECT id FROM stars AS s WHERE {form.format(ra=10, dec=20, r=0.1)}"
    assert "hpx29" in make_plan(adql, tables=place.tables, user=ANYBODY).sql()


def test_what_is_not_inside(place: Place) -> None:
    inside = place.rows("SELECT COUNT(*) FROM stars WHERE CONTAINS(POINT(ra, dec), CIRCLE(10, 20, 30)) = 1")[
        0
    ][0]
    outside = place.rows("SELECT COUNT(*) FROM stars WHERE CONTAINS(POINT(ra, dec), CIRCLE(10, 20, 30)) = 0")[
        0
    ][0]
    assert inside + outside == 4000
    assert inside == (separation(10, 20) <= 30).sum()


def test_expressions(place: Place) -> None:
    rows = place.rows(
        """SELECT TOP 1 7/2 AS a, -7/2 AS b, 7/2.0 AS c, MOD(-7, 3) AS d, MOD(7.5, 2) AS e, ROUND(2.5) AS f,
        ROUND(-1.25, 1) AS g, TRUNCATE(-2.39, 1) AS h, TRUNCATE(2.3, 2) AS i, CEILING(1.2) AS j, FLOOR(-1.2) AS k,
        LOG10(1000) AS l, LOG(1) AS m, POWER(2, 10) AS n, SQRT(16) AS o, ABS(-3) AS p, SIGN(-2.5) AS q,
        DEGREES(PI()) AS r, ATAN2(1, 1) AS s, COT(1) AS t, 0x1F AS u, 1e3 AS v, 'it''s' || 5 AS w,
        UPPER('abc') || LOWER('DEF') AS x, COALESCE(NULL, 3) AS y, NULLIF(2, 2) AS z FROM stars"""
    )[0]
    wanted = (
        3, -3, 3.5, -1, 1.5, 3.0, -1.3, -2.3, 2.3, 2.0, -2.0, 3.0, 0.0, 1024.0, 4.0, 3, -1.0, 180.0, np.pi / 4,
        float(1 / np.tan(1)), 31, 1000.0, "it's5", "ABCdef", 3, None,
    )  # fmt: skip
    for got, want in zip(rows, wanted, strict=True):
        assert got == (pytest.approx(want, abs=1e-12) if isinstance(want, float) else want)
        assert type(got) is type(want)


def test_arithmetic_without_an_answer_is_null(place: Place) -> None:
    row = place.rows(
        "SELECT TOP 1 1/0, 1.5/0, MOD(5, 0), MOD(5.5, 0), LOG(0), LOG10(-1), 1 + NULL FROM stars"
    )[0]
    assert row == (None,) * 7


def test_casts(place: Place) -> None:
    row = place.rows(
        """SELECT TOP 1 CAST(2.7 AS INTEGER) AS a, CAST(-2.7 AS BIGINT) AS b, CAST('12' AS SMALLINT) AS c,
        CAST(3 AS VARCHAR) AS d, CAST('abcdef' AS VARCHAR(3)) AS e, CAST('1.5' AS DOUBLE PRECISION) AS f,
        CAST('2021-01-14T11:25:00' AS TIMESTAMP) AS g, CAST('1 2 0.5' AS CIRCLE) AS h, CAST(1 AS REAL) AS i
        FROM stars"""
    )[0]
    assert row == (2, -2, 12, "3", "abc", 1.5, "2021-01-14T11:25:00.000", [1.0, 2.0, 0.5], 1.0)


def test_aggregates_against_numpy(place: Place) -> None:
    mag, night = sky().column("mag").to_pylist(), column("night")
    rows = place.rows(
        """SELECT night, COUNT(*), COUNT(mag), AVG(mag), MIN(mag), MAX(mag), SUM(id), COUNT(DISTINCT kind),
        STDDEV(mag), MEDIAN(mag) FROM stars GROUP BY night HAVING COUNT(*) > 1 ORDER BY night"""
    )
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        good = np.array(
            [m for m, n in zip(mag, night, strict=True) if n == row[0] and m is not None], dtype=float
        )
        assert row[1] == (night == row[0]).sum()
        assert row[2] == len(good)
        assert row[3] == pytest.approx(good.mean())
        assert row[4:6] == (np.float32(good.min()), np.float32(good.max()))
        assert row[6] == column("id")[night == row[0]].sum()
        assert row[7] == 3
        assert row[8] == pytest.approx(good.std(ddof=1))
        assert row[9] == pytest.approx(np.median(good))


def test_text_and_truth(place: Place) -> None:
    kinds = sky().column("kind").to_pylist()
    flags = sky().column("flag").to_pylist()

    def count(condition: str) -> int:
        return place.rows(f"SELECT COUNT(*) AS n FROM stars WHERE {condition}")[0][0]

    assert count("kind LIKE 'st%'") == kinds.count("star")
    assert count("kind LIKE 'ST%'") == 0
    assert count("kind ILIKE 'ST%'") == kinds.count("star")
    assert count("kind NOT LIKE '%a%'") == kinds.count('it\'s, "odd" é')
    assert count("kind = 'it''s, \"odd\" é'") == kinds.count('it\'s, "odd" é')
    assert count("kind IN ('star', 'galaxy')") == kinds.count("star") + kinds.count("galaxy")
    assert count("kind IS NULL") == kinds.count(None)
    assert count(r"kind LIKE '\%'") == 0
    for truth in ("flag = 1", "flag = 'true'", "flag = TRUE", "flag <> 0", "flag IN (1)"):
        assert count(truth) == flags.count(True), truth


def test_names_of_the_result(place: Place) -> None:
    table = place.ask(
        'SELECT TOP 1 s.ra, k.kind, s.kind, RA AS "My ra", ra + 1, COUNT, count FROM stars AS s, kinds k'.replace(
            ", COUNT, count", ""
        )
    )
    assert table.column_names == ["ra", "kind", "kind_2", "My ra", "col5"]
    assert table.schema.field("ra").metadata[b"unit"] == b"deg"
    assert table.schema.field("My ra").metadata[b"ucd"] == b"pos.eq.ra;meta.main"


def test_joins(place: Place) -> None:
    kinds = sky().column("kind").to_pylist()
    both = place.rows("SELECT COUNT(*) FROM stars JOIN kinds USING (kind)")[0][0]
    assert both == kinds.count("star") + kinds.count("galaxy")
    assert place.rows("SELECT COUNT(*) FROM stars NATURAL JOIN kinds")[0][0] == both
    assert place.rows("SELECT COUNT(*) FROM stars s, kinds k WHERE s.kind = k.kind")[0][0] == both
    left = place.rows("SELECT COUNT(*), COUNT(label) FROM stars LEFT JOIN kinds ON stars.kind = kinds.kind")[
        0
    ]
    assert left == (4000, both)
    lone = place.rows(
        'SELECT label, "size", kind FROM stars RIGHT OUTER JOIN kinds USING (kind) WHERE id IS NULL'
    )
    assert lone == [("Dust", 3, "dust")]
    full = place.rows("SELECT COUNT(*), COUNT(kind) FROM stars FULL JOIN kinds USING (kind)")[0]
    assert full == (4001, 4001 - kinds.count(None))
    assert place.ask("SELECT TOP 1 * FROM kinds JOIN stars USING (kind)").column_names[:3] == [
        "kind",
        "label",
        "size",
    ]


def test_queries_in_queries(place: Place) -> None:
    kinds = sky().column("kind").to_pylist()
    known = kinds.count("star") + kinds.count("galaxy")
    assert place.rows("SELECT COUNT(*) FROM stars WHERE kind IN (SELECT kind FROM kinds)")[0][0] == known
    text = "SELECT COUNT(*) FROM stars s WHERE {} (SELECT * FROM kinds k WHERE k.kind = s.kind)"
    assert place.rows(text.format("EXISTS"))[0][0] == known
    assert place.rows(text.format("NOT EXISTS"))[0][0] == 4000 - known
    assert place.rows("SELECT COUNT(*) FROM stars WHERE mag = (SELECT MIN(mag) FROM stars)")[0][0] == 1
    rows = place.rows(
        "WITH bright AS (SELECT night, mag FROM stars WHERE mag < 18), n (night, many) AS "
        "(SELECT night, COUNT(*) FROM bright GROUP BY night) SELECT SUM(many) FROM n"
    )
    assert rows == [(sum(m is not None and m < 18 for m in sky().column("mag").to_pylist()),)]


def test_set_operations(place: Place) -> None:
    assert place.rows("SELECT kind FROM kinds UNION SELECT kind FROM stars WHERE kind LIKE 's%' ORDER BY kind") == [
        ("dust",), ("galaxy",), ("star",),
    ]  # fmt: skip
    assert place.rows("SELECT kind FROM kinds EXCEPT SELECT kind FROM stars") == [("dust",)]
    assert len(place.rows("SELECT id FROM stars INTERSECT SELECT TOP 5 id FROM stars ORDER BY 1")) == 5
    assert place.rows(
        "SELECT COUNT(*) FROM (SELECT kind FROM kinds UNION ALL SELECT kind FROM kinds) AS q"
    ) == [(6,)]
    mixed = place.rows('SELECT "size" AS v FROM kinds UNION SELECT 2.5 FROM kinds ORDER BY v DESC OFFSET 1')
    assert mixed == [(2.5,), (2.0,), (1.0,)]


def test_order_top_offset(place: Place) -> None:
    ids = sorted(column("id").tolist())
    assert [r[0] for r in place.rows("SELECT TOP 3 id FROM stars ORDER BY id OFFSET 5")] == ids[5:8]
    assert place.rows("SELECT TOP 0 id FROM stars") == []
    mags = [r[0] for r in place.rows("SELECT mag FROM stars ORDER BY mag DESC")]
    nulls = mags.count(None)
    assert nulls
    assert mags[-nulls:] == [None] * nulls
    assert [r[0] for r in place.rows("SELECT DISTINCT night FROM stars ORDER BY night")] == [1, 2, 3, 4, 5]
    case = "SELECT CASE WHEN night < 3 THEN 'early' ELSE 'late' END AS w, COUNT(*) AS n FROM stars GROUP BY w ORDER BY w"
    assert [r[0] for r in place.rows(case)] == ["early", "late"]
    simple = place.rows("SELECT TOP 1 CASE night WHEN 9 THEN 1 WHEN 8 THEN 2.5 END FROM stars")
    assert simple == [(None,)]


def test_regions_in_columns(place: Place) -> None:
    """Squares of one degree around each row: those that hold a position are near it."""
    rows = place.rows(
        "SELECT id, DISTANCE(ra, dec, 40, 10) FROM stars WHERE 1 = CONTAINS(POINT(40, 10), outline)"
    )
    near = column("id")[separation(40, 10) < 0.45]
    assert set(near) <= {row[0] for row in rows}
    assert all(row[1] < 0.75 for row in rows)
    touching = {
        r[0] for r in place.rows("SELECT id FROM stars WHERE INTERSECTS(outline, CIRCLE(40, 10, 5)) = 1")
    }
    distance = dict(zip(column("id").tolist(), separation(40, 10), strict=True))
    assert {i for i, d in distance.items() if d < 5.4} <= touching
    assert touching <= {i for i, d in distance.items() if d < 5.8}
    inside = {r[0] for r in place.rows("SELECT id FROM stars WHERE CONTAINS(outline, CIRCLE(40, 10, 5)) = 1")}
    assert {i for i, d in distance.items() if d < 4.2} <= inside
    assert inside <= {i for i, d in distance.items() if d < 4.6}
    boxes = {
        r[0] for r in place.rows("SELECT id FROM stars WHERE INTERSECTS(outline, BOX(40, 10, 4, 4)) = 1")
    }
    assert {i for i, d in distance.items() if d < 2.4} <= boxes


def test_a_polygon_with_many_corners(place: Place) -> None:
    """Two hundred corners on a circle of 20 degrees: nearly the circle."""
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    ra = 40 + np.degrees(np.arctan2(np.sin(np.radians(20)) * np.sin(angle), np.cos(np.radians(20))))
    dec = np.degrees(np.arcsin(np.sin(np.radians(20)) * np.cos(angle)))
    listed = ", ".join(f"{a}, {d}" for a, d in zip(ra.tolist(), dec.tolist(), strict=True))
    sql = make_plan(
        f"SELECT id FROM stars WHERE 1 = CONTAINS(POINT(ra, dec), POLYGON({listed}))",
        tables=place.tables,
        user=ANYBODY,
    ).sql()
    assert len(sql) < 20_000
    assert "hpx29" in sql
    found = {
        r[0]
        for r in place.rows(f"SELECT id FROM stars WHERE 1 = CONTAINS(POINT(ra, dec), POLYGON({listed}))")
    }
    distance = separation(40, 0)
    assert set(column("id")[distance < 19.98]) <= found
    assert found <= set(column("id")[distance < 20.001])
    assert found


def test_measures_of_geometry(place: Place) -> None:
    row = place.rows(
        """SELECT TOP 1 AREA(CIRCLE(10, 20, 180)), AREA(POLYGON(0, 0, 90, 0, 0, 90)), COORD1(POINT(12, 34)),
        COORD2(CENTROID(CIRCLE(1, 2, 3))), CENTROID(POLYGON(10, -1, 12, -1, 12, 1, 10, 1)),
        DISTANCE(POINT(0, 0), POINT(180, 0)), DISTANCE(0, 0, 0, 1e-9), POINT(1, 2), CIRCLE(1, 2, 3),
        POLYGON(0, 0, 1, 0, 0, 1), COORDSYS(POINT(1, 2)), AREA(outline) FROM stars WHERE dec BETWEEN -10 AND 10"""
    )[0]
    whole = 4 * np.pi * np.degrees(1) ** 2
    assert row[0] == pytest.approx(whole)
    assert row[1] == pytest.approx(whole / 8)
    assert row[2:4] == (12.0, 2.0)
    assert row[4] == pytest.approx([11, 0], abs=1e-9)
    assert row[5] == pytest.approx(180, abs=1e-5)
    assert row[6] == pytest.approx(1e-9, rel=1e-6)
    assert row[7:11] == ([1.0, 2.0], [1.0, 2.0, 3.0], [0.0, 0.0, 1.0, 0.0, 0.0, 1.0], "ICRS")
    assert row[11] == pytest.approx(1, rel=1e-3)


def test_healpix_function_against_hpgeom(place: Place) -> None:
    import hpgeom

    for order in (0, 3, 12, 29):
        rows = place.rows(
            f"SELECT ra, dec, IVO_HEALPIX_INDEX({order}, ra, dec), IVO_HEALPIX_INDEX({order}, ra + 0.0, dec + 0.0) FROM stars"
        )
        ra, dec, stored, computed = map(np.array, zip(*rows, strict=True))
        wanted = hpgeom.angle_to_pixel(1 << order, ra, dec)
        np.testing.assert_array_equal(stored, wanted)
        # at the finest order the last bits of sine and cosine decide between two pixels
        assert (computed == wanted).mean() > (0.99 if order == 29 else 0.9999)


UPLOAD = pa.table(
    {
        "n": [1, 2, 3, 4],
        "ra": [10.0, 200.0, None, 359.99],
        "dec": [20.0, -45.0, 3.0, 0.0],
        "r": [5.0, 6.0, 7.0, 8.0],
    }
)


def test_match_with_an_upload(place: Place) -> None:
    wanted = {
        (n, int(i))
        for n, ra, dec in zip(*(UPLOAD.column(c).to_pylist() for c in ("n", "ra", "dec")), strict=True)
        if ra is not None
        for i in column("id")[separation(ra, dec) < 6]
    }
    assert wanted
    for text in (
        "SELECT u.n, s.id FROM TAP_UPLOAD.mine AS u JOIN stars AS s ON DISTANCE(u.ra, u.dec, s.ra, s.dec) < 6",
        "SELECT u.n, s.id FROM stars AS s JOIN tap_upload.mine AS u ON 1=CONTAINS(POINT(s.ra,s.dec), CIRCLE(u.ra,u.dec,6))",
        "SELECT u.n, s.id FROM stars s, tap_upload.mine u WHERE DISTANCE(POINT(s.ra,s.dec), POINT(u.ra,u.dec)) < 6",
        "SELECT u.n, s.id FROM mine u LEFT JOIN stars s ON DISTANCE(u.ra, u.dec, s.ra, s.dec) < 6 WHERE s.id IS NOT NULL",
        "SELECT n, id FROM (SELECT * FROM mine) AS u, stars AS s WHERE DISTANCE(u.ra, u.dec, s.ra, s.dec) < 6",
    ):
        assert set(place.rows(text, uploads={"mine": UPLOAD})) == wanted, text
    left = place.rows(
        "SELECT s.id, u.n FROM stars s LEFT JOIN mine u ON DISTANCE(u.ra, u.dec, s.ra, s.dec) < 6",
        uploads={"mine": UPLOAD},
    )
    assert len(left) == 4000 - len({i for _, i in wanted}) + len(wanted)
    kept = place.rows(
        "SELECT u.n, s.id FROM mine u LEFT JOIN stars s ON DISTANCE(u.ra, u.dec, s.ra, s.dec) < 6 AND s.night < 9",
        uploads={"mine": UPLOAD},
    )
    assert sorted(row for row in kept if row[1] is not None) == sorted(wanted)
    assert [row for row in kept if row[1] is None] == [(3, None)]  # the position that is null
    few = place.rows(
        "SELECT n, id FROM stars s RIGHT JOIN mine u ON DISTANCE(u.ra, u.dec, s.ra, s.dec) < 0.001",
        uploads={"mine": UPLOAD},
    )
    assert sorted(few) == [(1, None), (2, None), (3, None), (4, None)]
    nested = place.rows(
        "SELECT u.n, s.id, k.label FROM mine u LEFT JOIN (stars s JOIN kinds k ON k.kind = s.kind)"
        " ON DISTANCE(u.ra, u.dec, s.ra, s.dec) < 6",
        uploads={"mine": UPLOAD},
    )
    kinds = dict(zip(sky()["id"].to_pylist(), sky()["kind"].to_pylist(), strict=True))
    labelled = {(n, i) for n, i in wanted if kinds[i] in ("star", "galaxy")}
    assert {row[:2] for row in nested if row[1] is not None} == labelled
    assert {row[0] for row in nested} == {1, 2, 3, 4}
    own = place.rows(
        "SELECT u.n, s.id FROM mine u JOIN stars s ON DISTANCE(u.ra, u.dec, s.ra, s.dec) < u.r",
        uploads={"mine": UPLOAD},
    )
    assert {row for row in own if row[0] == 2} == {row for row in wanted if row[0] == 2}


def test_an_outer_match_is_asked_by_pixels(place: Place) -> None:
    tables = with_uploads(place.tables, {"mine": UPLOAD})
    adql = "SELECT u.n, s.id FROM mine u LEFT JOIN stars s ON DISTANCE(u.ra, u.dec, s.ra, s.dec) < 0.1"
    assert "adql_of = t1.adql_row" in make_plan(adql, tables=tables, user=ANYBODY).sql()


def test_match_with_itself(place: Place) -> None:
    rows = place.rows(
        "SELECT a.id, b.id FROM stars a JOIN stars b ON DISTANCE(a.ra, a.dec, b.ra, b.dec) < 0.4 WHERE a.id < b.id"
    )
    ra, dec, ids = column("ra"), column("dec"), column("id")
    wanted = set()
    for i in range(len(ids)):
        for k in np.flatnonzero(separation(ra[i], dec[i]) < 0.4):
            if ids[i] < ids[k]:
                wanted.add((int(ids[i]), int(ids[k])))
    assert wanted
    assert len(rows) == len(set(rows))
    assert set(rows) == wanted


def test_upload_without_match(place: Place) -> None:
    uploads = {"ids": pa.table({"id": [3, 5, 7], "name": ["a", "é", None]})}
    rows = place.rows(
        "SELECT s.id, u.name FROM stars s JOIN tap_upload.ids u ON s.id = u.id ORDER BY s.id", uploads=uploads
    )
    assert rows == [(3, "a"), (5, "é"), (7, None)]


@pytest.mark.parametrize(
    ("adql", "words"),
    [
        ("SELECT rra FROM stars", "near: ra"),
        ("SELECT ra FROM starz", "near: cat.stars"),
        ("SELECT size FROM kinds", '"size"'),
        ("SELECT ra FROM stars WHERE kind > 5", "CAST"),
        ("SELECT ra, COUNT(*) FROM stars", "GROUP BY"),
        ("SELECT kind FROM stars s JOIN kinds k ON s.kind = k.kind", "ambiguous"),
        ("SELECT stars.ra FROM stars AS s", "called s here"),
        ("SELECT ra FROM stars JOIN kinds", "USING"),
        ("SELECT ra FROM stars WHERE CONTAINS(POINT(ra, dec), CIRCLE(1, 2, 3))", "= 1"),
        ("SELECT ra FROM stars WHERE 1 = CONTAINS(POINT('GALACTIC', ra, dec), CIRCLE(1, 2, 3))", "ICRS"),
        ("SELECT ra FROM stars WHERE 1 = CONTAINS(CIRCLE(1, 2, 3), POINT(ra, dec))", "the point comes first"),
        ("SELECT ra FROM stars WHERE 1 = CONTAINS(POINT(ra, dec), POLYGON(0,0, 120,0, 240,0))", "half the sky"),
        ("SELECT AVG(MAX(ra)) FROM stars", "inner"),
        ("SELECT ra FROM stars WHERE AVG(ra) > 1", "HAVING"),
        ("SELECT ra FROM stars ORDER BY 2", "1 columns"),
        ("SELECT ra FROM stars UNION SELECT ra, dec FROM stars", "same"),
        ("SELECT pg_sleep(10) FROM stars", "no function"),
        ("SELECT ra FROM pg_catalog.pg_user", "no table"),
        ("SELECT ra FROM read_csv('/etc/passwd')", "FROM"),
        ('SELECT "Ra" FROM stars', "capitals"),
        ("SELECT IN_UNIT(ra, 'kg') FROM stars", "kg"),
    ],
)  # fmt: skip
def test_wrong_queries_say_what_to_do(place: Place, adql: str, words: str) -> None:
    with pytest.raises(AdqlError) as caught:
        place.ask(adql)
    assert words in str(caught.value)
    assert str(caught.value).startswith("line 1, column ")


def test_units(place: Place) -> None:
    row = place.rows("SELECT TOP 1 ra, IN_UNIT(ra, 'rad'), IN_UNIT(ra * 2, 'arcsec') FROM stars")[0]
    assert row[1] == pytest.approx(np.radians(row[0]))
    assert row[2] == pytest.approx(row[0] * 7200)
