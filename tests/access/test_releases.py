"""Releases: the machine, loading and verification of real files, and what queries see."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumbre.access.identity import ADMINISTRATORS, RELEASE_TESTERS
from cumbre.access.releases.description import parse_description
from cumbre.access.releases.life import _NEXT, Known, step, to_close
from cumbre.access.releases.registry import Releases
from cumbre.access.user import ANYBODY, User
from cumbre.core.errors import (
    BadFileError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    UnprocessableDataError,
)
from cumbre.core.time import Clock

TEXT = """
name: dr1
description: A first release.
version: {current: "1"}
tables:
- name: Object
  description: Everything that stands still.
  primaryKey: "#Object.objectId"
  cumbre:position: {ra: ra, dec: decl}
  columns:
  - {name: objectId, datatype: long, nullable: false, description: Identifier., "ivoa:ucd": meta.id;meta.main}
  - {name: ra, datatype: double, nullable: false, "fits:tunit": deg, description: Right ascension.}
  - {name: decl, datatype: double, nullable: false, "fits:tunit": deg, description: Declination.}
  - {name: mag, datatype: float, description: Magnitude.}
- name: Visit
  description: Visits of the release.
  primaryKey: visit
  columns:
  - {name: visit, datatype: long, nullable: false, description: Identifier.}
  - {name: note, datatype: string, description: What was special.}
"""
N = 2_000
TESTER = User("eva", frozenset({RELEASE_TESTERS}))


def objects(n=N, seed=1):
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "objectId": rng.permutation(n).astype(np.int64),
            "decl": np.degrees(np.arcsin(rng.uniform(-1, 1, n))),
            "ra": rng.uniform(0, 360, n),
        }
    )


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    (folder / "Object").mkdir(parents=True)
    (folder / "release.yaml").write_text(TEXT)
    rows = objects()
    pq.write_table(rows.slice(0, 700), folder / "Object/b.parquet")
    pq.write_table(rows.slice(700), folder / "Object/a.parquet")
    (folder / "Visit.csv").write_text("visit,note\n1,\n2,cloudy\n")
    return folder


@pytest.fixture
def releases(database, tmp_path):
    return Releases(database, tmp_path / "releases", Clock.real(), who="test")


def names(releases, user):
    return [table.full_name for table in releases.tables(user)]


def test_every_state_and_verb():
    allowed = {(s, v): _NEXT.get((s, v), "refused") for s in ("hidden", "verified", "open", "closed")
               for v in ("verify", "reject", "open", "close", "drop")}  # fmt: skip
    for (state, verb), wanted in allowed.items():
        if wanted == "refused":
            with pytest.raises(ConflictError, match=f"dr1 is {state}"):
                step("dr1", state, verb)
        else:
            assert step("dr1", state, verb) == wanted
    assert [pair for pair, wanted in allowed.items() if wanted is None] == [
        ("hidden", "drop"),
        ("verified", "drop"),
    ]


@given(st.integers(1, 12))
def test_the_first_and_the_newest_two_stay_open(count):
    have: list[Known] = []
    for number in range(1, count + 1):
        name = f"dr{number}"
        closing = to_close([*have, Known(name, "verified", None)], name)
        have = [Known(r.name, "closed" if r.name in closing else r.state, r.number) for r in have]
        have.append(Known(name, "open", number))
    wanted = {1, count - 1, count} - {0}
    assert {r.number for r in have if r.state == "open"} == wanted
    # an old one opened again closes nothing
    assert to_close(have, "dr1") == []


def test_from_loading_to_closing(releases, source):
    seen = []
    made = releases.load(source, progress=lambda table, rows: seen.append((table, rows)))
    assert (made.state, made.rows, made.tables) == ("hidden", N + 2, {"Object": N, "Visit": 2})
    assert sum(rows for table, rows in seen if table == "Object") == N
    assert names(releases, ANYBODY) == []
    assert names(releases, TESTER) == ["dr1.Object", "dr1.Visit"]
    assert names(releases, User("admin", frozenset({ADMINISTRATORS}))) == ["dr1.Object", "dr1.Visit"]
    with pytest.raises(ConflictError, match="verify it first"):
        releases.open("dr1")
    assert releases.verify("dr1") == []
    assert releases.open("dr1") == []
    assert names(releases, ANYBODY) == ["dr1.Object", "dr1.Visit"]
    with pytest.raises(ConflictError, match="never dropped"):
        releases.drop("dr1")
    releases.close("dr1")
    assert names(releases, ANYBODY) == []
    releases.open("dr1")
    assert [row["verb"] for row in releases.history("dr1")] == ["load", "verify", "open", "close", "open"]


def test_rows_are_those_that_came_in_sorted_by_their_pixel(releases, source):
    import hpgeom

    releases.load(source)
    table = next(t for t in releases.tables(TESTER) if t.name == "Object")
    stored = pq.read_table(str(table.source).removesuffix("/*.parquet"))
    came = objects().append_column("mag", pa.nulls(N, pa.float32())).select(["objectId", "ra", "decl", "mag"])
    assert (
        stored.drop_columns("hpx29")
        .sort_by("objectId")
        .equals(came.sort_by("objectId").cast(stored.schema.remove(4)))
    )
    pixels = stored["hpx29"].to_numpy()
    assert (np.diff(pixels) >= 0).all()
    expected = hpgeom.angle_to_pixel(2**29, stored["ra"].to_numpy(), stored["decl"].to_numpy())
    np.testing.assert_array_equal(pixels, expected)
    assert (table.position.ra, table.position.dec, table.position.pixel) == ("ra", "decl", "hpx29")
    assert [c.name for c in table.columns] == ["objectId", "ra", "decl", "mag", "hpx29"]


def damage_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("state", ["hidden", "open"])
def test_damage_is_found_and_closes(releases, source, state):
    made = releases.load(source)
    if state == "open":
        releases.verify("dr1")
        releases.open("dr1")
    damage_byte(next((made.folder / "Object").glob("*.parquet")))
    assert "damaged" in releases.verify("dr1")[0]
    assert releases.find("dr1").state == {"hidden": "hidden", "open": "closed"}[state]
    assert names(releases, ANYBODY) == []


def test_missing_and_foreign_files_are_found(releases, source):
    made = releases.load(source)
    (made.folder / "Object/extra.parquet").write_bytes(b"x")
    next((made.folder / "Visit").glob("*.parquet")).unlink()
    wrong = releases.verify("dr1")
    assert ["not in the manifest" in w for w in wrong] == [True, False]
    assert "missing" in wrong[1]


def test_double_keys_are_found(releases, source):
    (source / "Visit.csv").write_text("visit,note\n1,a\n1,b\n2,c\n")
    releases.load(source)
    assert releases.verify("dr1") == ['table Visit: 1 values of the key "visit" stand in several rows']


def test_a_killed_load_is_completed_or_replaced(releases, source, database, tmp_path):
    releases.load(source)
    database.execute("DELETE FROM release.release")  # as if killed between the files and the database
    before = (tmp_path / "releases/dr1/manifest.json").stat().st_mtime_ns
    assert releases.load(source).rows == N + 2
    assert (tmp_path / "releases/dr1/manifest.json").stat().st_mtime_ns == before
    database.execute("DELETE FROM release.release")
    (source / "Visit.csv").write_text("visit,note\n1,other\n")
    assert releases.load(source).tables["Visit"] == 1
    with pytest.raises(ConflictError, match="there already"):
        releases.load(source)
    assert releases.load(source, name="dr1b").name == "dr1b"
    releases.drop("dr1b")
    assert not (tmp_path / "releases/dr1b").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: (f / "Visit.csv").unlink(), NotFoundError, "no file for table Visit"),
        (lambda f: (f / "Visit.csv").write_text("visit\nten\n"), UnprocessableDataError, "column visit: expected long"),
        (lambda f: (f / "Visit.csv").write_text("note\nx\n"), UnprocessableDataError, "required column visit is missing"),
        (lambda f: (f / "Visit.csv").write_text("visit,who\n1,me\n"), UnprocessableDataError, "column who is not in"),
        (lambda f: (f / "Object/a.parquet").write_bytes(b"PAR1 no"), BadFileError, "a.parquet: cannot be read"),
        (lambda f: pq.write_table(objects().slice(0, 1).set_column(2, "ra", [[float("nan")]]), f / "Object/a.parquet"),
         UnprocessableDataError, "1 rows without a position"),
        (lambda f: (f / "release.yaml").unlink(), NotFoundError, r"release\.yaml: not there"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_leaves_nothing(releases, source, tmp_path, change, error, message):
    change(source)
    with pytest.raises(error, match=message):
        releases.load(source)
    assert releases.all() == []
    assert not (tmp_path / "releases/dr1").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("datatype: float", "datatype: quad", "datatype = 'quad'"),
        ("{ra: ra, dec: decl}", "{ra: ra, dec: decll}", "'decll', which is no column"),
        ("name: mag", "name: RA", "differ in more than capitals"),
        ("name: mag", "name: hpx29", "made by the loader"),
        ("name: mag", 'name: "m; drop"', "name = 'm; drop'"),
        ("name: Visit", "name: object", "table names must differ"),
    ],
)
def test_a_wrong_description_is_named(old, new, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_description(TEXT.replace(old, new), "release.yaml")


@pytest.mark.parametrize("name", ["DR1", "tap_schema", "pg_x", "a" * 40, "../x", "1dr", "level1"])
def test_names_that_cannot_be_schemas(releases, source, name):
    with pytest.raises(Exception, match="release name"):
        releases.load(source, name=name)
