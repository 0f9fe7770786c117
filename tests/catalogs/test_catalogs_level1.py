from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from cumbre.catalogs.columns import circle_ranges, conform, hpx29, separation_deg
from cumbre.catalogs.level1 import Level1, prepare
from cumbre.catalogs.schema import level1_tables
from cumbre.core.errors import ConflictError, UnprocessableDataError
from cumbre.core.time import Clock
from cumbre.stores.postgres import Database

CLOCK = Clock(2e9, 0.0, rate=1e-12)  # stands still
NOW_MJD = 2e9 / 86400 + 40587
RA, DEC = 150.0, -30.0


@pytest.fixture
def level1(database: Database) -> Level1:
    return Level1(database, CLOCK)


def sources(
    n: int, *, first: int = 1, mjd: float = NOW_MJD, object_id: int = 0, spread: float = 0.1
) -> pa.Table:
    random = np.random.default_rng(first)
    return pa.table(
        {
            "diaSourceId": np.arange(first, first + n),
            "visit": np.full(n, 2026112000001),
            "detector": np.zeros(n, dtype=int),
            "diaObjectId": np.full(n, object_id),
            "midpointMjdTai": mjd + np.arange(n) / 1000,
            "ra": RA + random.uniform(-spread, spread, n),
            "dec": DEC + random.uniform(-spread, spread, n),
            "x": np.zeros(n),
            "y": np.zeros(n),
            "band": ["r"] * n,
            "psfFlux": np.where(np.arange(n) % 2, np.nan, 1e4 / 3).astype(np.float32),
            "isNegative": np.arange(n) % 2 == 0,
            "reliabilityVersion": ["" if i else "v1" for i in range(n)],
        }
    )


def objects(ids: list[int], ra: list[float], dec: list[float], **more: object) -> dict[str, object]:
    return {"diaObjectId": ids, "ra": ra, "dec": dec, **more}


def test_what_goes_in_comes_out(level1: Level1) -> None:
    rows = sources(50)
    level1.store(2026112000001, 0, dia_sources=rows)
    found = level1.load_region(RA, DEC, 1.0)["DiaSource"]
    assert found.schema.names == [column.name for column in level1_tables()["DiaSource"].columns]
    for name in ("diaSourceId", "ra", "dec", "midpointMjdTai", "isNegative", "band", "reliabilityVersion"):
        assert found.column(name).to_pylist() == rows.column(name).to_pylist()
    flux = found.column("psfFlux").to_pylist()
    assert flux[0] == np.float32(1e4 / 3)  # no digit lost on the way
    assert flux[1] is None  # NaN
    assert found.column("diaObjectId").null_count == 50  # 0
    assert found.column("psfNdata").to_pylist() == [0] * 50
    assert found.column("timeProcessedMjdTai")[0].as_py() == pytest.approx(NOW_MJD, abs=1e-9)


def test_a_detector_is_stored_once(level1: Level1, database: Database) -> None:
    level1.store(1, 0, dia_sources=sources(3), packets=[(1, b"\x00\x01"), (2, b"")])
    assert level1.is_stored(1, 0)
    assert not level1.is_stored(1, 1)
    with pytest.raises(ConflictError, match="visit 1, detector 0"):
        level1.store(1, 0, dia_sources=sources(3, first=100))
    assert database.execute("SELECT count(*) FROM level1.diasource") == [(3,)]
    assert database.execute(
        "SELECT alert_id, packet, sent_tai FROM level1.alert_outbox ORDER BY sequence"
    ) == [
        (1, b"\x00\x01", None),
        (2, b"", None),
    ]


def test_a_failed_store_leaves_nothing(level1: Level1, database: Database) -> None:
    with pytest.raises(ConflictError):  # the same source twice
        level1.store(1, 0, dia_sources=pa.concat_tables([sources(2), sources(2)]), packets=[(1, b"x")])
    assert not level1.is_stored(1, 0)
    assert database.execute("SELECT count(*) FROM level1.alert_outbox") == [(0,)]
    level1.store(1, 0, dia_sources=sources(2))


def test_objects_are_replaced_by_newer_versions_only(level1: Level1) -> None:
    level1.store(1, 0, dia_objects=objects([7, 8], [RA, RA], [DEC, DEC], nDiaSources=[1, 1]))
    newer = objects([8, 7], [RA, RA], [DEC, DEC], nDiaSources=[2, 2], validityStartMjdTai=[NOW_MJD + 1] * 2)
    level1.store(2, 0, dia_objects=newer)
    late = objects([7], [RA], [DEC], nDiaSources=[9], validityStartMjdTai=[NOW_MJD - 1])
    level1.store(3, 0, dia_objects=late)
    found = level1.cone(RA, DEC, 1 / 3600)
    assert dict(zip(*(found.column(c).to_pylist() for c in ("diaObjectId", "nDiaSources")), strict=True)) == {
        7: 2,
        8: 2,
    }


def test_region_brings_objects_with_a_year_of_history(level1: Level1) -> None:
    inside, outside = [RA, RA + 0.05], [RA + 5, RA + 6]
    level1.store(1, 0, dia_objects=objects([1, 2, 3, 4], inside + outside, [DEC] * 4))
    old, fresh = NOW_MJD - 400, NOW_MJD - 300
    level1.store(2, 0, dia_sources=sources(3, first=10, mjd=old, object_id=1))
    level1.store(3, 0, dia_sources=sources(3, first=20, mjd=fresh, object_id=1))
    level1.store(4, 0, dia_sources=sources(3, first=30, mjd=fresh, object_id=3))
    forced = {
        "diaForcedSourceId": [1, 2], "diaObjectId": [2, 4], "ra": [RA, RA], "dec": [DEC, DEC], "visit": [5, 5],
        "detector": [0, 0], "midpointMjdTai": [fresh, fresh], "psfFlux": [1.5, 2.5],
    }  # fmt: skip
    level1.store(5, 0, forced=forced)
    region = level1.load_region(RA, DEC, 0.2)
    assert sorted(region["DiaObject"].column("diaObjectId").to_pylist()) == [1, 2]
    assert region["DiaSource"].column("diaSourceId").to_pylist() == [20, 21, 22]
    assert region["DiaForcedSource"].column("psfFlux").to_pylist() == [1.5]
    curve = level1.light_curve(1)
    assert curve["DiaSource"].column("diaSourceId").to_pylist() == [10, 11, 12, 20, 21, 22]


@pytest.mark.parametrize(("ra", "dec"), [(0.0, 0.0), (359.9999, 45.0), (12.0, 90.0), (200.0, -89.99)])
@pytest.mark.parametrize("radius", [1 / 3600, 0.05, 3.0])
def test_cone_finds_exactly_what_is_inside(level1: Level1, ra: float, dec: float, radius: float) -> None:
    """Against brute force with vectors: over the RA seam and at the poles too."""
    random = np.random.default_rng(5)
    n = 300
    angle, distance = random.uniform(0, 2 * np.pi, n), radius * 2 * np.sqrt(random.uniform(0, 1, n))
    centre = _vector(ra, dec)
    east = np.array([-np.sin(np.radians(ra)), np.cos(np.radians(ra)), 0.0])
    north = np.cross(centre, east)
    d = np.radians(distance)[:, None]
    points = centre * np.cos(d) + np.sin(d) * (np.cos(angle)[:, None] * north + np.sin(angle)[:, None] * east)
    ras = np.degrees(np.arctan2(points[:, 1], points[:, 0])) % 360
    decs = np.degrees(np.arcsin(np.clip(points[:, 2], -1, 1)))
    level1.store(1, 0, dia_objects=objects(list(range(1, n + 1)), list(ras), list(decs)))
    found = level1.cone(ra, dec, radius).column("diaObjectId").to_pylist()
    sure = np.abs(distance - radius) > 1e-6 * radius + 1e-9
    expected = set((np.flatnonzero((distance <= radius) & sure) + 1).tolist())
    possible = set((np.flatnonzero((distance <= radius) | ~sure) + 1).tolist())
    assert expected <= set(found) <= possible
    assert np.all(np.diff(distance[np.array(found) - 1]) >= -1e-7)  # nearest first


def _vector(ra: float, dec: float) -> np.ndarray:
    a, d = np.radians(ra), np.radians(dec)
    return np.array([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)])


def test_pixels_are_healpix_nested_order_29() -> None:
    # base pixels of the nested scheme (Gorski et al. 2005, fig. 4): pole pixels 0-3, equator 4-7, south 8-11
    ra, dec = np.array([45.0, 135.0, 0.0, 90.0, 45.0]), np.array([60.0, 60.0, 0.0, 0.0, -60.0])
    assert (hpx29(ra, dec) >> 58).tolist() == [0, 1, 4, 5, 8]
    low, high = np.array(circle_ranges(10.0, 10.0, 0.01)).T
    pixel = hpx29(np.array([10.0]), np.array([10.0]))[0]
    assert np.any((low <= pixel) & (pixel < high))
    assert separation_deg(0.0, 0.0, np.array([0.0, 180.0]), np.array([1e-9, 0.0])) == pytest.approx(
        [1e-9, 180.0]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"psfflux": [1.0]}, "no column psfflux"),
        ({"ra": [np.nan]}, "ra and dec"),
        ({"dec": [91.0]}, "ra and dec"),
        ({"x": [None]}, "column x is required"),
        ({"detector": [2**40]}, "column detector"),
        ({"y": [1.0, 2.0]}, "different lengths"),
    ],
)
def test_rows_that_do_not_fit_are_named(change: dict[str, list[object]], words: str) -> None:
    row = {
        "diaSourceId": [1],
        "visit": [1],
        "detector": [0],
        "midpointMjdTai": [6e4],
        "ra": [1.0],
        "dec": [1.0],
    }
    row |= {"x": [0.0], "y": [0.0], "timeProcessedMjdTai": [6e4]}
    with pytest.raises(UnprocessableDataError, match=words):
        conform(level1_tables()["DiaSource"], row | change)


def test_structured_arrays_and_lists_of_rows_are_taken_too() -> None:
    table = level1_tables()["DiaObject"]
    array = np.array(
        [(5, 1.0, 2.0, 6e4)],
        [("diaObjectId", "i8"), ("ra", "f8"), ("dec", "f8"), ("validityStartMjdTai", "f8")],
    )
    from_array = conform(table, array)
    from_rows = conform(table, [{"diaObjectId": 5, "ra": 1.0, "dec": 2.0, "validityStartMjdTai": 6e4}])
    assert from_array == from_rows
    assert conform(table, []).num_rows == 0


def test_tables_gain_the_columns_they_lack(level1: Level1, database: Database) -> None:
    level1.store(1, 0, dia_sources=sources(2))
    database.execute("ALTER TABLE level1.diasource DROP COLUMN snr")
    database.execute("DELETE FROM level1.felis")
    prepare(database)
    assert database.execute("SELECT count(*), count(snr) FROM level1.diasource") == [(2, 0)]
    assert level1.load_region(RA, DEC, 1.0)["DiaSource"].column("snr").null_count == 2


def test_a_crowded_detector_is_stored_and_read_fast(level1: Level1) -> None:
    import time

    rows = sources(5000)
    begin = time.monotonic()
    level1.store(1, 0, dia_sources=rows)
    level1.load_region(RA, DEC, 1.0)
    assert time.monotonic() - begin < 10.0  # real seconds on loaded cores
