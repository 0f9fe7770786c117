"""Users' tables and releases over a real server, with pyvo as people use it."""

from __future__ import annotations

import io

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pyvo
import requests

from support.archive_world import DEC, RA, World

VOSI = b"""<?xml version="1.0"?>
<vosi:table xmlns:vosi="http://www.ivoa.net/xml/VOSITables/v1.0" xmlns:vs="http://www.ivoa.net/xml/VODataService/v1.1"
 xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" type="output">
<name>targets</name><description>What I look for.</description>
<column><name>name</name><dataType xsi:type="vs:VOTableType" arraysize="*">char</dataType></column>
<column><name>ra</name><unit>deg</unit><ucd>pos.eq.ra;meta.main</ucd>
 <dataType xsi:type="vs:VOTableType">double</dataType></column>
<column><name>dec</name><unit>deg</unit><ucd>pos.eq.dec;meta.main</ucd>
 <dataType xsi:type="vs:VOTableType">double</dataType></column>
</vosi:table>"""
TSV = f"name\tra\tdec\nnear\t{RA}\t{DEC}\nfar\t{RA + 90}\t{-DEC}\n".encode()


def session_of(world: World, user: str, *groups: str, scopes=("read:tap", "write:table")):
    session = requests.Session()
    session.headers.update(world.headers(world.token(user, *groups, scopes=scopes)))
    return session


@pytest.fixture
def eva(world):
    with session_of(world, "eva") as session:
        yield pyvo.dal.TAPService(f"{world.url}/tap", session=session)


@pytest.fixture(autouse=True)
def prototypes():
    pyvo.utils.activate_features("cadc-tb-upload")


def test_create_load_index_join_and_drop_with_pyvo(world, eva):
    eva.create_table("u_eva.targets", io.BytesIO(VOSI))
    eva.load_table("u_eva.targets", io.BytesIO(TSV), format="tsv")
    eva.create_index("u_eva.targets", "name", unique=True)
    found = eva.run_sync(
        "SELECT t.name, o.diaObjectId FROM u_eva.targets t JOIN level1.DiaObject o"
        " ON DISTANCE(t.ra, t.dec, o.ra, o.dec) < 0.0001"
    )
    assert found["name"].tolist() == ["near"]
    columns = {row["column_name"]: row["ucd"] for row in eva.run_sync(
        "SELECT column_name, ucd FROM tap_schema.columns WHERE table_name = 'u_eva.targets'")}  # fmt: skip
    assert columns["ra"] == "pos.eq.ra;meta.main"
    with session_of(world, "bob") as session:
        bob = pyvo.dal.TAPService(f"{world.url}/tap", session=session)
        with pytest.raises(pyvo.dal.DALQueryError, match="no table u_eva"):
            bob.run_sync("SELECT * FROM u_eva.targets")
        assert session.delete(f"{world.url}/tap/tables/u_eva.targets").status_code == 403
        assert session.post(f"{world.url}/tap/load/u_eva.targets", data=TSV).status_code == 403
    eva.remove_table("u_eva.targets")
    with pytest.raises(pyvo.dal.DALQueryError):
        eva.run_sync("SELECT * FROM u_eva.targets")


def test_sharing_with_a_group(world):
    world.database.execute(
        "INSERT INTO access.account_group VALUES ('friends', '{public}') ON CONFLICT DO NOTHING"
    )
    with session_of(world, "carl") as carl, session_of(world, "dora", "friends") as dora:
        made = carl.post(f"{world.url}/tap/load/shared?create=true", data=TSV)
        assert (made.status_code, made.text) == (200, "shared has 2 rows\n")
        query = {"LANG": "ADQL", "QUERY": "SELECT count(*) AS n FROM u_carl.shared", "RESPONSEFORMAT": "csv"}
        assert dora.post(f"{world.url}/tap/sync", data=query).status_code == 400
        carl.post(f"{world.url}/tap/share/shared", data={"GROUP": "friends"}).raise_for_status()
        assert dora.post(f"{world.url}/tap/sync", data=query).text.split() == ["n", "2"]
        usage = carl.get(f"{world.url}/tap/usage").json()
        assert usage["schema"] == "u_carl"
        assert 0 < usage["used_bytes"] < usage["quota_bytes"]


def test_the_rows_of_a_query_become_a_table(world, eva):
    session = eva._session
    query = f"SELECT diaObjectId, ra, dec FROM level1.DiaObject WHERE DISTANCE(ra, dec, {RA}, {DEC}) < 0.03"
    wanted = sorted(eva.run_sync(query)["diaObjectId"].tolist())
    answer = session.post(
        f"{world.url}/tap/save", data={"LANG": "ADQL", "QUERY": query, "TABLE": "cone", "PHASE": "RUN"},
        allow_redirects=False,
    )  # fmt: skip
    job = pyvo.dal.AsyncTAPJob(answer.headers["Location"], session=session)
    job.wait(timeout=60)
    job.raise_if_error()
    saved = eva.run_sync("SELECT diaObjectId FROM u_eva.cone")["diaObjectId"].tolist()
    assert sorted(saved) == wanted
    assert len(wanted) > 10
    eva.remove_table("cone")


def test_a_failed_save_leaves_no_table(world, eva):
    answer = eva._session.post(
        f"{world.url}/tap/save", allow_redirects=False,
        data={"LANG": "ADQL", "QUERY": "SELECT nothing FROM level1.DiaObject", "TABLE": "bad", "PHASE": "RUN"},
    )  # fmt: skip
    job = pyvo.dal.AsyncTAPJob(answer.headers["Location"], session=eva._session)
    job.wait(phases=["ERROR", "COMPLETED"], timeout=60)
    assert job.phase == "ERROR"
    tables = eva.run_sync("SELECT table_name FROM tap_schema.tables WHERE schema_name = 'u_eva'")[
        "table_name"
    ]
    assert "u_eva.bad" not in list(tables)


def test_over_the_quota_nothing_is_written(world):
    with session_of(world, "max") as session:
        world.access.service.own.tables.set_quota("max", 20_000)
        big = b"n\n" + b"\n".join(b"%d" % k for k in range(5000))
        answer = session.post(f"{world.url}/tap/load/big?create=true", data=big)
        assert answer.status_code == 400
        assert "drop a table" in answer.text
        assert world.database.execute("SELECT count(*) FROM access.user_table WHERE account = 'max'") == [
            (0,)
        ]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PUT", "/tap/tables/t", b"<!DOCTYPE x [<!ENTITY a 'b'>]><table>&a;</table>", 400),
        ("PUT", "/tap/tables/t", b"<nothing/>", 400),
        ("PUT", "/tap/tables/t", b"x" * (2 << 20), 413),
        ("PUT", "/tap/tables/t", b"", 400),
        ("PUT", "/tap/tables/level1.DiaObject", VOSI, 403),
        ("PUT", "/tap/tables/a%20b", VOSI, 400),
        ("POST", "/tap/load/absent", TSV, 404),
        ("POST", "/tap/load/absent?create=true", b"\x1f\x8bcompressed", 400),
        ("DELETE", "/tap/tables/absent", b"", 404),
        ("DELETE", "/tap/tables/access.token", b"", 403),
        ("POST", "/tap/table-update", b"", 400),
    ],
)
def test_what_cannot_be_is_refused(world, method, path, body, status):
    headers = world.headers(world.token("eva", scopes=("read:tap", "write:table")))
    kind = {"Content-Type": "application/x-www-form-urlencoded"} if path.endswith("update") else {}
    answer = httpx.request(method, world.url + path, content=body, headers=headers | kind, timeout=30)
    assert answer.status_code == status, answer.text


def test_a_token_must_allow_it(world):
    for headers, status in (({}, 403), (world.headers(world.token("eva", scopes=("read:tap",))), 403)):
        answer = httpx.put(f"{world.url}/tap/tables/t", content=VOSI, headers=headers, timeout=30)
        assert answer.status_code == status, answer.text


def test_a_release_is_seen_by_testers_then_by_all(world, tmp_path):
    from cumbre.access.releases.registry import Releases
    from cumbre.core.time import Clock

    (tmp_path / "release.yaml").write_text(
        "name: dr7\ndescription: A test.\ntables:\n- name: Object\n  description: Objects.\n  primaryKey: objectId\n"
        "  cumbre:position: {ra: ra, dec: dec}\n  columns:\n"
        "  - {name: objectId, datatype: long, nullable: false, description: Id.}\n"
        "  - {name: ra, datatype: double, nullable: false, description: Position.}\n"
        "  - {name: dec, datatype: double, nullable: false, description: Position.}\n"
    )
    rng = np.random.default_rng(3)
    ra, dec = rng.uniform(0, 360, 3000), np.degrees(np.arcsin(rng.uniform(-1, 1, 3000)))
    pq.write_table(pa.table({"objectId": np.arange(3000), "ra": ra, "dec": dec}), tmp_path / "Object.parquet")
    releases = Releases(world.database, world.site.path("archive/releases"), Clock.real())
    releases.load(tmp_path)
    assert releases.verify("dr7") == []
    query = {"LANG": "ADQL", "QUERY": f"SELECT count(*) AS n FROM dr7.Object WHERE DISTANCE(ra, dec, {RA}, {DEC}) < 20",
             "RESPONSEFORMAT": "csv"}  # fmt: skip
    cosine = np.sin(np.radians(dec)) * np.sin(np.radians(DEC)) + np.cos(np.radians(dec)) * np.cos(
        np.radians(DEC)
    ) * np.cos(np.radians(ra - RA))
    inside = int((np.degrees(np.arccos(cosine)) < 20).sum())
    anybody = httpx.post(f"{world.url}/tap/sync", data=query, timeout=30)
    assert (anybody.status_code, "no table dr7" in anybody.text) == (400, True)
    tester = world.headers(world.token("tina", "releases"))
    assert httpx.post(f"{world.url}/tap/sync", data=query, headers=tester, timeout=30).text.split() == [
        "n",
        str(inside),
    ]
    releases.open("dr7")
    assert httpx.post(f"{world.url}/tap/sync", data=query, timeout=30).text.split() == ["n", str(inside)]
    releases.close("dr7")
    assert httpx.post(f"{world.url}/tap/sync", data=query, timeout=30).status_code == 400
