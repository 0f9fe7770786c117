"""Light curves by the number of an object: what was measured at its place, for whom it is released."""

from __future__ import annotations

import io
import shutil
import subprocess

import numpy as np
import pytest
import pyvo
from astropy.io.votable import parse_single_table

from cumbre.catalogs.level1 import Level1
from cumbre.core.time import Clock
from support.archive_world import AGE_S, CURVE_POINTS, NEW, NOW_TAI, OLD, grid

TWICE = "SELECT TOP 2 a.*, b.diaObjectId FROM level1.DiaObject a, level1.DiaObject b"
MJD = {obs: (NOW_TAI - age) / 86400 + 40587 for obs, age in AGE_S.items()}


@pytest.fixture(scope="module")
def forced(world):
    """Three forced measurements of object 1, the last under embargo, and one of object 2."""
    ra, dec = grid()
    times = np.array([MJD[OLD] - 3, MJD[OLD] - 2.01, MJD[NEW], MJD[OLD] - 3])
    owners = np.array([1, 1, 1, 2])
    rows = {
        "diaForcedSourceId": np.arange(1, 5), "diaObjectId": owners, "visit": np.arange(10, 14),
        "detector": np.zeros(4, int), "ra": ra[owners - 1], "dec": dec[owners - 1], "midpointMjdTai": times,
        "psfFlux": np.array([1.0, 2.0, 3.0, 4.0]), "psfFluxErr": np.ones(4), "band": ["r", "g", "r", "r"],
    }  # fmt: skip
    Level1(world.database, Clock.starting_at(NOW_TAI, rate=1e-9)).store(10, 0, forced=rows)


def table(answer):
    assert answer.status_code == 200, answer.text
    return parse_single_table(io.BytesIO(answer.content)).to_table()


def test_detections_and_forced_fluxes_in_the_order_of_time(client, forced):
    curve = table(client.get("/lightcurve/1"))
    assert len(curve) == CURVE_POINTS + 2  # those under embargo are left out
    assert np.all(np.diff(curve["midpointMjdTai"]) > 0)
    kinds = list(curve["measurement"])
    assert kinds.count("forced") == 2
    of_source = curve[np.array(kinds) == "detection"]
    np.testing.assert_allclose(
        of_source["psfFlux"], 1000 + 500 * np.sin(of_source["midpointMjdTai"]), rtol=1e-5
    )
    assert str(curve["psfFlux"].unit) == "nJy"


def test_under_embargo_for_those_who_may(client, world, forced):
    insider = world.headers(world.token("lena", "embargo"))
    curve = table(client.get("/lightcurve/1", headers=insider))
    assert len(curve) == CURVE_POINTS + 4  # the forced one of the last hours, and the detection
    assert max(curve["midpointMjdTai"]) == pytest.approx(MJD[NEW])


def test_many_objects_bands_and_formats(client, forced):
    both = client.post("/lightcurve", data={"ID": ["1", "2", "2"], "RESPONSEFORMAT": "csv"}).text.splitlines()
    assert [line.split(",")[0] for line in both[1:]] == ["1"] * (CURVE_POINTS + 2) + ["2"]
    green = client.get("/lightcurve/1", params={"BAND": "g", "RESPONSEFORMAT": "json"}).json()
    assert len(green["data"]) == 1
    assert green["data"][0][3] == 2.0
    cut = client.get("/lightcurve/1", params={"MAXREC": "5"})
    assert len(table(cut)) == 5
    assert b'value="OVERFLOW"' in cut.content


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/lightcurve", 400), ("/lightcurve/one", 400), ("/lightcurve/-1", 400), ("/lightcurve?ID=1%20OR%201=1", 400),
        ("/lightcurve/1?BAND=r'%20OR%20'a'='a", 400), ("/lightcurve/1?RESPONSEFORMAT=gif", 400),
        ("/lightcurve?" + "&".join(f"ID={i}" for i in range(1, 1002)), 400), ("/lightcurve/999999", 404),
        ("/lightcurve/99999999999999999999999", 400),
    ],
)  # fmt: skip
def test_what_cannot_be_answered(client, forced, path, status):
    answer = client.get(path)
    assert answer.status_code == status
    assert b'value="ERROR"' in answer.content


def test_an_object_first_seen_under_embargo_is_not_there(client, world):
    world.database.execute(
        "UPDATE level1.diaobject SET firstdiasourcemjdtai = %s WHERE diaobjectid = 441", (MJD[NEW],)
    )
    assert client.get("/lightcurve/441").status_code == 404
    insider = world.headers(world.token("lena", "embargo"))
    assert client.get("/lightcurve/441", headers=insider).status_code == 200


# pyvo leaves the connection of a result open that it did not read to the end
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_rows_with_objects_lead_to_their_light_curves(world, forced):
    service = pyvo.dal.TAPService(f"{world.url}/tap")
    found = service.run_sync(
        'SELECT TOP 2 ra, diaObjectId AS "diaObjectId" FROM level1.DiaObject ORDER BY diaObjectId'
    )
    step = found.get_adhocservice_by_id("light_curve")
    (param,) = (item for group in step.groups for item in group.entries if item.name == "ID")
    assert param.ref == next(
        field.ID for field in found.votable.get_first_table().fields if field.name == "diaObjectId"
    )
    curve = pyvo.dal.adhoc.DatalinkQuery.from_resource([found[0]], step).execute_votable().get_first_table()
    assert len(curve.array) == CURVE_POINTS + 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_images_lead_to_their_links(world):
    found = pyvo.dal.TAPService(f"{world.url}/tap").run_sync("SELECT obs_publisher_did FROM ivoa.obscore")
    assert len(found) == 2
    links = list(found.iter_datalinks())
    assert [sorted(of_image["semantics"])[-1] for of_image in links] == ["#this", "#this"]


def test_sia_tells_its_parameters(client):
    from cumbre.access.http.sia import PARAMETERS

    for most in ("0", "1"):
        document = client.get("/sia/query", params={"MAXREC": most})
        for name in (*PARAMETERS, "MAXREC"):
            assert f'<PARAM name="{name}"' in document.text
        assert "adhoc:service" in document.text


@pytest.mark.skipif(
    shutil.which("stilts") is None, reason="no stilts on this machine (Debian: apt-get install stilts)"
)
def test_documents_with_services_pass_the_validator(client, tmp_path):
    for name, answer in {
        "sia": client.get("/sia/query", params={"MAXREC": "0"}),
        "objects": client.post("/tap/sync", data={"QUERY": TWICE}),
        "images": client.post("/tap/sync", data={"QUERY": "SELECT * FROM ivoa.obscore"}),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(answer.content)
        result = subprocess.run(
            ["stilts", "votlint", f"votable={tmp_path / name}"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "ERROR" not in result.stdout + result.stderr, (name, result.stdout + result.stderr)
