"""Months, versions, the precovery queue and the catalogue of orbits, in a real database."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cumbre.catalogs.level1 import Level1, prepare
from cumbre.catalogs.orbits import OrbitCatalogue
from cumbre.catalogs.schema import level1_tables
from cumbre.core.errors import UnprocessableDataError
from cumbre.core.time import Clock
from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Database

CLOCK = Clock(2e9, 0.0, rate=1e-12)  # stands still
NOW_MJD = 2e9 / 86400 + 40587
RA, DEC = 150.0, -30.0


def sources(ids: list[int], mjd: list[float], object_id: int) -> dict[str, object]:
    n = len(ids)
    return {
        "diaSourceId": ids, "visit": [1] * n, "detector": [0] * n, "diaObjectId": [object_id] * n, "midpointMjdTai": mjd,
        "ra": [RA] * n, "dec": [DEC] * n, "x": [0.0] * n, "y": [0.0] * n,
    }  # fmt: skip


def an_object(identifier: int, count: int = 1, valid: float = NOW_MJD) -> dict[str, object]:
    return {
        "diaObjectId": [identifier], "ra": [RA], "dec": [DEC], "nDiaSources": [count], "validityStartMjdTai": [valid],
        "firstDiaSourceMjdTai": [NOW_MJD - 1],
    }  # fmt: skip


def test_rows_go_to_their_months_and_old_months_are_not_read(database: Database) -> None:
    level1 = Level1(database, CLOCK)
    times = [NOW_MJD - 700, NOW_MJD - 200, NOW_MJD - 199, NOW_MJD]
    level1.store(1, 0, dia_objects=an_object(5), dia_sources=sources([1, 2, 3, 4], times, 5))
    rows = database.execute("SELECT tableoid::regclass::text, diasourceid FROM level1.diasource")
    assert len({name for name, _ in rows}) == len({int(t // 30) for t in times})
    for name, identifier in rows:
        low = int(name.rpartition("_")[2])
        assert low <= times[identifier - 1] < low + 30
    assert level1.load_region(RA, DEC, 0.1)["DiaSource"].column("diaSourceId").to_pylist() == [2, 3, 4]
    plan = database.execute(
        "EXPLAIN SELECT * FROM level1.diasource WHERE midpointmjdtai BETWEEN %s AND %s",
        (NOW_MJD - 1, NOW_MJD),
    )
    assert not any(f"diasource_{int(times[0] // 30) * 30}" in line for (line,) in plan)


def test_a_database_from_before_the_months_keeps_its_rows(database: Database) -> None:
    """As an older program made it: tables in one piece."""
    from cumbre.catalogs import level1 as module

    migrate(database, "level1", [module._OUTBOX, module._REJECTED])
    for name in ("DiaSource", "DiaObject", "DiaForcedSource"):
        database.execute(replace(level1_tables()[name], partition="").ddl())
    database.execute("ALTER TABLE level1.diasource DROP COLUMN glint_trail")
    database.execute(
        'INSERT INTO level1.diasource (diasourceid, visit, detector, midpointmjdtai, ra, "dec", x, y, hpx29,'
        " timeprocessedmjdtai) VALUES (1, 1, 0, %s, %s, %s, 0, 0, 7, 0)",
        (NOW_MJD - 40, RA, DEC),
    )
    prepare(database)
    prepare(database)  # nothing more to do
    level1 = Level1(database, CLOCK)
    level1.store(2, 0, dia_sources=sources([2, 3], [NOW_MJD - 45, NOW_MJD], 9))
    rows = dict(database.execute("SELECT diasourceid, tableoid::regclass::text FROM level1.diasource"))
    assert rows[1] == rows[2] == "level1.diasource_before"
    assert rows[3] != rows[1]
    indexed = database.execute("SELECT count(*) FROM pg_indexes WHERE tablename = 'diasource_before'")
    assert indexed[0][0] == 1 + len(level1_tables()["DiaSource"].indexes)


def test_every_version_of_an_object_stays(database: Database) -> None:
    level1 = Level1(database, CLOCK)
    level1.store(1, 0, dia_objects=an_object(7, 1))
    level1.store(2, 0, dia_objects=an_object(7, 2, NOW_MJD + 40))
    assert database.execute("SELECT ndiasources FROM level1.diaobject") == [(2,)]
    versions = database.execute(
        "SELECT ndiasources FROM level1.diaobjectversion ORDER BY validitystartmjdtai"
    )
    assert versions == [(1,), (2,)]


def test_new_objects_are_queued_once(database: Database) -> None:
    level1 = Level1(database, CLOCK)
    level1.store(1, 0, dia_objects=an_object(7, 1))
    level1.store(2, 3, dia_objects=an_object(7, 2, NOW_MJD + 1))
    rows = database.execute(
        "SELECT dia_object_id, visit, detector, first_mjd_tai, done_tai FROM level1.precovery"
    )
    assert rows == [(7, 1, 0, NOW_MJD - 1, None)]


def some_orbits(n: int, first: int = 100) -> dict[str, np.ndarray]:
    values = np.linspace(0.1, 0.2, n)
    return {
        "ssObjectId": np.arange(first, first + n), "packed": np.array([f"K26A{i:02d}A" for i in range(n)]),
        "designation": np.array([f"2026 AA{i}" for i in range(n)]), "q": 2 + values, "e": values, "i": 10 * values,
        "node": values, "argperi": values, "peri_time": 60000 + values, "epoch_mjd": np.full(n, 61000.0),
        "h": np.where(np.arange(n) % 2, np.nan, 15.0), "g": np.full(n, 0.15), "nopp": np.where(np.arange(n) % 2, 3, np.nan),
        "mean_anomaly": values,
    }  # fmt: skip


def test_orbits_come_back_and_are_replaced_as_a_whole(database: Database) -> None:
    catalogue = OrbitCatalogue(database, CLOCK)
    assert catalogue.version() == 0
    assert catalogue.elements()[0] == 0
    orbits = some_orbits(5)
    assert catalogue.replace(orbits, source="file") == catalogue.version() == 1
    version, columns = catalogue.elements()
    assert version == 1
    for name in ("q", "e", "peri_time", "h"):
        order = np.argsort(columns["ssObjectId"])
        assert np.array_equal(columns[name][order], orbits[name], equal_nan=True)
    row = catalogue.rows([103, 555])[103]
    assert row["packed_primary_provisional_designation"] == "K26A03A"
    assert row["h"] is None
    assert row["nopp"] == 3
    assert catalogue.rows([101, 102]).keys() == {101, 102}
    assert catalogue.replace(some_orbits(2, first=900), source="next") == 2
    assert catalogue.rows([103, 901]).keys() == {901}
    broken = some_orbits(2) | {"e": np.array(["x", "y"])}
    with pytest.raises(UnprocessableDataError):
        catalogue.replace(broken, source="broken")
    assert catalogue.rows([901]).keys() == {901}
