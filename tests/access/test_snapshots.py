"""The day's snapshot of Level 1 and the records of calibrations: made, asked over HTTP, pinned, checked."""

from __future__ import annotations

import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from cumbre.access.calibrations import FOLDER as CALIBRATIONS
from cumbre.access.calibrations import CalibrationKeeper
from cumbre.access.snapshots import FOLDER, MANIFEST, Snapshots, verify
from cumbre.catalogs.level1 import Level1
from cumbre.core.errors import BadFileError
from cumbre.core.instrument import load_instrument
from cumbre.core.time import Clock, day_obs_from_tai
from cumbre.payloads.calibration import Calibrations
from support.archive_world import AGE_S, CURVE_POINTS, NEW, NOW_TAI, grid

DAY_S = 86400.0


def at(tai_s: float) -> Clock:
    return Clock.starting_at(tai_s, rate=1e-9)


def rows(world, query: str, token: str | None = None) -> list[str]:
    import httpx

    answer = httpx.post(
        f"{world.url}/tap/sync", data={"LANG": "ADQL", "QUERY": query, "RESPONSEFORMAT": "csv"}, timeout=60,
        headers=world.headers(token) if token else {},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    return answer.text.split()[1:]


@pytest.fixture
def snapshots(world) -> Snapshots:
    return Snapshots(world.database, world.site.path(FOLDER), at(NOW_TAI), keep=2)


def test_a_snapshot_holds_what_is_public_and_never_changes(world, snapshots):
    end = time.monotonic() + 60  # the site makes it by itself
    while len(rows(world, "SELECT table_name FROM tap_schema.tables WHERE schema_name = 'snapshot'")) < 3:
        assert time.monotonic() < end
        time.sleep(0.1)
    made = snapshots.make()
    counts = {table.name: table.rows for table in made.tables}
    # the newest point of the light curve is under embargo
    assert counts == {"DiaSource": CURVE_POINTS, "DiaObject": len(grid()[0]), "DiaForcedSource": 0}
    query = "SELECT count(*) AS n FROM {}.DiaSource WHERE diaObjectId = 1"
    assert rows(world, query.format("snapshot")) == [str(CURVE_POINTS)]
    assert rows(world, query.format("snapshot"), world.admin) == [str(CURVE_POINTS)]
    assert rows(world, query.format("level1"), world.admin) == [str(CURVE_POINTS + 1)]
    mjd = (NOW_TAI - 200 * 3600) / DAY_S + 40587
    level1 = Level1(world.database, at(NOW_TAI))
    source = {
        "diaSourceId": [5000], "visit": [9], "detector": [0], "diaObjectId": [1], "midpointMjdTai": [mjd],
        "ra": [float(grid()[0][0])], "dec": [float(grid()[1][0])], "x": [0.0], "y": [0.0], "band": ["r"],
        "psfFlux": [1.0], "psfFluxErr": [1.0],
    }  # fmt: skip
    level1.store(9, 0, dia_sources=source)
    assert rows(world, query.format("level1")) == [str(CURVE_POINTS + 1)]
    assert snapshots.make() == made
    assert rows(world, query.format(made.schema)) == [str(CURVE_POINTS)]


def test_it_is_due_once_the_night_is_over(world, tmp_path):
    assert not Snapshots(world.database, tmp_path, at(NOW_TAI - AGE_S[NEW] + 60)).due()
    snapshots = Snapshots(world.database, tmp_path, at(NOW_TAI))
    assert snapshots.due()
    snapshots.make()
    assert not snapshots.due()
    assert Snapshots(world.database, tmp_path, at(NOW_TAI + DAY_S)).due()


def test_rows_are_those_of_the_live_tables_along_the_sky(world, snapshots):
    made = snapshots.make()
    path = world.site.path(FOLDER) / str(made.day_obs) / "DiaObject.parquet"
    table = pq.read_table(path)
    assert (np.diff(table.column("hpx29").to_numpy()) >= 0).all()
    columns = "diaObjectId, ra, dec, nDiaSources, hpx29"
    order = "ORDER BY diaObjectId"
    live = rows(world, f"SELECT {columns} FROM level1.DiaObject {order}")
    assert rows(world, f"SELECT {columns} FROM snapshot.DiaObject {order}") == live
    ra, dec = grid()
    cone = f"WHERE DISTANCE(ra, dec, {ra[200]}, {dec[200]}) < 0.0001"
    assert rows(world, f"SELECT diaObjectId FROM {made.schema}.DiaObject {cone}") == ["201"]


def test_what_a_killed_one_left_is_made_again_and_old_ones_go(world, snapshots):
    folder = world.site.path(FOLDER)
    first = snapshots.make()
    for days in (1, 2):
        later = Snapshots(world.database, folder, at(NOW_TAI + days * DAY_S), keep=2)
        part = folder / f".making-{day_obs_from_tai(NOW_TAI + days * DAY_S)}"
        part.mkdir()
        (part / "DiaSource.parquet").write_bytes(b"PAR1 and then the power went")
        newest = later.make()
        assert not part.exists()
    assert [s.day_obs for s in later.all()] == [newest.day_obs, day_obs_from_tai(NOW_TAI + DAY_S)]
    assert not (folder / str(first.day_obs)).exists()
    names = rows(world, "SELECT schema_name FROM tap_schema.schemas WHERE schema_name LIKE 'snapshot%'")
    assert sorted(names) == sorted(["snapshot", *(s.schema for s in later.all())])


def test_damage_is_found(world, tmp_path):
    snapshots = Snapshots(world.database, tmp_path, at(NOW_TAI))
    folder = tmp_path / str(snapshots.make().day_obs)
    assert verify(folder) == []
    path = folder / "DiaSource.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert [line.split(":")[0] for line in verify(folder)] == [str(path)]
    (folder / MANIFEST).write_text("{}")
    assert len(verify(folder)) == 1
    with pytest.raises(BadFileError):
        Snapshots(world.database, tmp_path, at(NOW_TAI)).all()


def test_a_calibration_holds_until_another_takes_its_place(world):
    camera = load_instrument("democam")
    path = world.site.path(CALIBRATIONS) / camera.name / f"r_{camera.detector(0).name}.fits"
    path.parent.mkdir(parents=True)
    plane = np.ones((8, 8), np.float32)
    Calibrations(bias=plane, flat=plane).save(path)
    assert keeper(world, camera, NOW_TAI).step() == 2
    assert keeper(world, camera, NOW_TAI + 5).step() == 0
    Calibrations(bias=2 * plane, flat=plane, defects=np.zeros((8, 8), np.uint8)).save(path)
    (path.parent / "r_R99_S99.fits").write_bytes(path.read_bytes())  # no detector of this camera
    again = keeper(world, camera, NOW_TAI + 10)
    assert (again.step(), again.step()) == (3, 0)
    found = rows(
        world,
        "SELECT kind, valid_begin_tai, valid_end_tai FROM calibration.record WHERE detector = 0 AND band = 'r'"
        " ORDER BY kind, recorded_tai",
    )
    change = f"{NOW_TAI + 10:.1f}"
    held = [line.split(",") for line in found]
    assert [kind for kind, *_ in held] == ["bias", "bias", "defects", "flat", "flat"]
    times = [[float(v) if v else None for v in line[1:]] for line in held]
    assert times[0] == [None, pytest.approx(float(change), abs=1)]
    assert times[1] == [pytest.approx(float(change), abs=1), None]
    assert times[2] == [None, None]


def keeper(world, camera, tai_s: float) -> CalibrationKeeper:
    return CalibrationKeeper(world.database, world.site.path(CALIBRATIONS), {camera.name: camera}, at(tai_s))
