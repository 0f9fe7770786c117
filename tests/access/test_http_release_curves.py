"""Light curves of releases and snapshots: pinned, while Level 1 goes on."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pyvo
import yaml
from astropy.io.votable import parse_single_table

from cumbre.access.identity import RELEASE_TESTERS
from cumbre.access.releases.registry import Releases
from cumbre.access.snapshots import FOLDER, Snapshots
from cumbre.core.errors import ConfigurationError
from cumbre.core.time import Clock
from cumbre.site.release import level1_descriptions, write_level1
from support.archive_world import CURVE_POINTS, NOW_TAI
from support.conformance import VO, votable_root

JOINED = """
name: dr2
description: Forced photometry, with times in the table of visits.
tables:
- name: Object
  description: Objects.
  primaryKey: objectId
  cumbre:position: {ra: ra, dec: dec}
  columns:
  - {name: objectId, datatype: long, nullable: false, description: Identifier.}
  - {name: ra, datatype: double, nullable: false, description: Right ascension.}
  - {name: dec, datatype: double, nullable: false, description: Declination.}
- name: ForcedSource
  description: Forced measurements.
  cumbre:light_curve: {object: objectId, time: expMidptMJD, band: band, flux: flux, fluxErr: err, visits: Visit}
  columns:
  - {name: objectId, datatype: long, nullable: false, description: Identifier.}
  - {name: visit, datatype: long, nullable: false, description: Visit.}
  - {name: flux, datatype: double, description: Flux., "fits:tunit": nJy}
  - {name: err, datatype: double, description: Error of flux., "fits:tunit": nJy}
- name: Visit
  description: Visits.
  columns:
  - {name: visit, datatype: long, nullable: false, description: Visit.}
  - {name: band, datatype: string, description: Band.}
  - {name: expMidptMJD, datatype: double, description: Middle., "fits:tunit": d}
"""


@pytest.fixture(scope="module")
def releases(world, tmp_path_factory) -> Releases:
    """``dr1`` of Level 1 as it is public, open; ``dr2`` with times in another table, hidden."""
    clock = Clock.starting_at(NOW_TAI, rate=1e-9)
    made = Releases(world.database, world.site.path("archive/releases"), clock, who="test")
    one = tmp_path_factory.mktemp("dr1")
    write_level1(world.database, one)
    about = {"name": "dr1", "description": "Level 1 of this site.", "tables": level1_descriptions()}
    (one / "release.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
    two = tmp_path_factory.mktemp("dr2")
    (two / "release.yaml").write_text(JOINED)
    visits = {"visit": [30, 10, 20], "band": ["r", "g", "r"], "expMidptMJD": [61003.0, 61001.0, 61002.0]}
    forced = {
        "objectId": [7, 7, 8, 7],
        "visit": [20, 30, 10, 10],
        "flux": [2.0, 3.0, 9.0, 1.0],
        "err": [0.5] * 4,
    }
    objects = {"objectId": [7, 8, 9], "ra": [1.0, 2.0, 3.0], "dec": [1.0, 2.0, 3.0]}
    for name, rows in (("Visit", visits), ("ForcedSource", forced), ("Object", objects)):
        pq.write_table(pa.table(rows), two / f"{name}.parquet")
    for name, folder in (("dr1", one), ("dr2", two)):
        made.load(folder)
        assert made.verify(name) == []
    made.open("dr1")
    return made


def table(answer):
    assert answer.status_code == 200, answer.text
    return parse_single_table(io.BytesIO(answer.content)).to_table()


def test_a_release_stays_as_it_is_while_level_1_changes(client, world, releases):
    before = table(client.get("/lightcurve/dr1/1"))
    assert len(before) == CURVE_POINTS  # what was under embargo when the release was made is not in it
    np.testing.assert_allclose(before["psfFlux"], 1000 + 500 * np.sin(before["midpointMjdTai"]), rtol=1e-5)
    assert set(before["release"]) == {"dr1"}
    assert set(before["measurement"]) == {"detection"}
    world.database.execute("UPDATE level1.diasource SET psfflux = psfflux + 1 WHERE diaobjectid = 1")
    after = table(client.get("/lightcurve", params={"ID": 1, "RELEASE": "dr1"}))
    assert np.array_equal(before["psfFlux"], after["psfFlux"])
    assert abs(table(client.get("/lightcurve/1"))["psfFlux"][0] - before["psfFlux"][0] - 1) < 1e-3


def test_times_and_bands_may_be_in_the_table_of_visits(client, world, releases):
    tester = world.headers(world.token("eva", RELEASE_TESTERS))
    curve = table(client.get("/lightcurve/dr2/7", headers=tester))
    assert curve["expMidptMJD"].tolist() == [61001.0, 61002.0, 61003.0]
    assert curve["flux"].tolist() == [1.0, 2.0, 3.0]
    assert str(curve["flux"].unit) == "nJy"
    red = table(client.get("/lightcurve/dr2/7", params={"BAND": "r"}, headers=tester))
    assert red["flux"].tolist() == [2.0, 3.0]
    none = table(client.get("/lightcurve/dr2/9", headers=tester))
    assert len(none) == 0  # an object without measurements is one


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/lightcurve/dr2/7", 404), ("/lightcurve/dr9/7", 404), ("/lightcurve/ledger/7", 404), ("/lightcurve/dr1/999999", 404),
        ("/lightcurve/dr1/x", 400), ("/lightcurve/dr1;DROP/1", 404), ("/lightcurve/dr1/1?BAND=r'", 400),
        ("/lightcurve/1?RELEASE=dr1&RELEASE=dr2", 400),
    ],
)  # fmt: skip
def test_what_is_hidden_or_absent_is_not_there(client, releases, path, status):
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    assert b'value="ERROR"' in answer.content


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_rows_of_a_release_lead_to_its_own_light_curves(world, releases):
    found = pyvo.dal.TAPService(f"{world.url}/tap").run_sync(
        "SELECT TOP 1 ra, diaObjectId FROM dr1.DiaObject WHERE diaObjectId = 1"
    )
    step = found.get_adhocservice_by_id("light_curve_dr1")
    curve = pyvo.dal.adhoc.DatalinkQuery.from_resource([found[0]], step).execute_votable().get_first_table()
    assert set(curve.array["release"]) == {"dr1"}
    assert len(curve.array) == CURVE_POINTS


def test_snapshots_are_pinned_too(client, world):
    snapshots = Snapshots(world.database, world.site.path(FOLDER), Clock.starting_at(NOW_TAI, rate=1e-9))
    name = snapshots.make().schema
    curve = table(client.get(f"/lightcurve/{name}/1"))
    assert len(curve) == CURVE_POINTS
    assert set(curve["release"]) == {name}
    rows = client.get("/tap/sync", params={"QUERY": "SELECT TOP 1 diaObjectId FROM snapshot.DiaObject"})
    (pin,) = [e for e in votable_root(rows).iter(f"{VO}PARAM") if e.get("name") == "RELEASE"]
    assert pin.get("value") == name


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("flux: flux,", "flux: nothing,", "'nothing' is no column"),
        ("visits: Visit", "visits: Nights", "'Nights', which is no table"),
        ("time: expMidptMJD", "time: never", "'never' is no column of table Visit"),
        ("object: objectId", "object: flux", "expected long"),
    ],
)
def test_a_wrong_description_is_refused(old, new, word):
    from cumbre.access.releases.description import parse_description

    assert old in JOINED
    with pytest.raises(ConfigurationError, match=word):
        parse_description(JOINED.replace(old, new), "release.yaml")
