"""TAP over a real server with the client that people use, and what must hold whoever asks."""

from __future__ import annotations

import io
import threading
import time

import httpx
import numpy as np
import pytest
import pyvo
import requests
from astropy.io.votable import parse_single_table

from cumbre.core.geometry import separation_deg
from support.archive_world import CURVE_POINTS, DEC, RA, STEP_DEG, World, grid


@pytest.fixture
def service(world: World):
    with requests.Session() as session:
        yield pyvo.dal.TAPService(f"{world.url}/tap", session=session)


def ask(client, query, **more):
    return client.post("/tap/sync", data={"LANG": "ADQL", "QUERY": query} | more)


def status_of(text):
    from xml.etree import ElementTree

    infos = ElementTree.fromstring(text).iter("{http://www.ivoa.net/xml/VOTable/v1.3}INFO")
    return [(i.get("value"), i.text or "") for i in infos if i.get("name") == "QUERY_STATUS"]


def test_a_cone_through_pyvo_is_what_the_grid_says(service):
    radius = 3.5 * STEP_DEG
    found = service.run_sync(
        f"SELECT diaObjectId, ra, dec FROM level1.DiaObject WHERE DISTANCE(ra, dec, {RA}, {DEC}) < {radius}"
    )
    ra, dec = grid()
    expected = np.flatnonzero(separation_deg(RA, DEC, ra, dec) < radius) + 1
    assert len(expected) > 20
    assert sorted(found["diaObjectId"].tolist()) == expected.tolist()


@pytest.mark.parametrize("form", ["votable", "votable/td", "csv", "tsv", "json", "fits", "parquet"])
def test_each_format_has_its_type_and_the_rows(client, form):
    answer = ask(
        client, "SELECT TOP 5 diaObjectId, ra FROM level1.DiaObject ORDER BY diaObjectId", RESPONSEFORMAT=form
    )
    assert answer.status_code == 200
    kind = answer.headers["content-type"]
    assert {"votable": "application/x-votable+xml", "csv": "text/csv", "tsv": "text/tab-separated-values",
            "json": "application/json", "fits": "application/fits",
            "parquet": "application/vnd.apache.parquet"}[form.partition("/")[0]] in kind  # fmt: skip
    if form == "csv":
        assert [line.split(",")[0] for line in answer.text.split()] == [
            "diaObjectId",
            "1",
            "2",
            "3",
            "4",
            "5",
        ]
    elif form == "parquet":
        import pyarrow.parquet as pq

        assert pq.read_table(io.BytesIO(answer.content)).column("diaObjectId").to_pylist() == [1, 2, 3, 4, 5]
    elif form.startswith("votable"):
        assert parse_single_table(io.BytesIO(answer.content)).array["diaObjectId"].tolist() == [1, 2, 3, 4, 5]


def test_maxrec_cuts_and_says_so_and_zero_gives_the_columns_only(client):
    cut = ask(client, "SELECT diaObjectId FROM level1.DiaObject", MAXREC="7")
    assert status_of(cut.content)[-1][0] == "OVERFLOW"
    assert "7" in status_of(cut.content)[-1][1]
    table = parse_single_table(io.BytesIO(cut.content))
    assert len(table.array) == 7
    empty = ask(client, "SELECT diaObjectId, ra FROM level1.DiaObject", MAXREC="0")
    table = parse_single_table(io.BytesIO(empty.content))
    assert ([f.name for f in table.fields], len(table.array)) == (["diaObjectId", "ra"], 0)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"LANG": "ADQL"}, "QUERY"),
        ({"QUERY": "SELECT 1 FROM level1.DiaObject", "LANG": "SQL"}, "LANG"),
        ({"QUERY": "SELECT nothing FROM level1.DiaObject"}, "no column nothing"),
        ({"QUERY": "SELECT ra FROM level1.Nothing"}, "no table"),
        ({"QUERY": "SELECT ra FROM level1.DiaObject", "MAXREC": "-1"}, "MAXREC"),
        ({"QUERY": "SELECT ra FROM level1.DiaObject", "MAXREC": "many"}, "MAXREC"),
        ({"QUERY": "SELECT ra FROM level1.DiaObject", "RESPONSEFORMAT": "word"}, "RESPONSEFORMAT"),
        ({"QUERY": "SELECT ra FROM level1.DiaObject", "REQUEST": "getMe"}, "REQUEST"),
        ({"QUERY": "SELECT ra FROM level1.DiaObject; DROP TABLE level1.diaobject"}, ";"),
        ({"QUERY": "DELETE FROM level1.DiaObject"}, "DELETE"),
        ({"QUERY": "SELECT pg_read_file('/etc/passwd') FROM level1.DiaObject"}, "pg_read_file"),
        ({"QUERY": "SELECT * FROM pg_catalog.pg_authid"}, "no table"),
        ({"QUERY": "SELECT * FROM access.token"}, "no table"),
        ({"QUERY": "SELECT ra FROM level1.DiaObject", "UPLOAD": "t,file:///etc/passwd"}, "UPLOAD"),
        ({"QUERY": "SELECT ra FROM level1.DiaObject", "UPLOAD": "t,http://127.0.0.1:1/x"}, "private network"),
        ({"QUERY": "SELECT ra FROM level1.DiaObject", "UPLOAD": "t,http://[::ffff:127.0.0.1]/x"}, "private network"),
        ({"QUERY": "SELECT ra FROM level1.DiaObject", "UPLOAD": "t,param:none"}, "no file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_wrong_request_is_400_and_a_votable_that_says_why(client, world, method, parameters, words):
    where = {"params": parameters} if method == "GET" else {"data": parameters}
    answer = client.request(method, "/tap/sync", **where)
    assert answer.status_code in (400, 404), answer.text
    assert answer.headers["content-type"].startswith("application/x-votable+xml")
    ((status, text),) = status_of(answer.content)
    assert status == "ERROR"
    assert words in text
    assert world.database.execute("SELECT count(*) FROM level1.diaobject") == [(441,)]


def test_a_query_of_ten_megabytes_is_refused_before_it_is_read(client):
    query = "SELECT ra FROM level1.DiaObject WHERE ra IN (" + "1.5, " * 2_000_000 + "1)"
    begin = time.process_time()
    answer = ask(client, query)
    assert answer.status_code == 413
    assert time.process_time() - begin < 5
    assert ask(client, "SELECT TOP 1 ra FROM level1.DiaObject").status_code == 200


def test_anonymous_people_see_released_rows_only(service, client, world):
    query = "SELECT COUNT(*) AS n, MAX(midpointMjdTai) AS latest FROM level1.DiaSource"
    assert service.run_sync(query)["n"][0] == CURVE_POINTS
    for groups, count in (((), CURVE_POINTS), (("embargo",), CURVE_POINTS + 1)):
        token = world.token("user" + "".join(groups), *groups)
        answer = client.post(
            "/tap/sync", data={"QUERY": query, "RESPONSEFORMAT": "csv"}, headers=world.headers(token)
        )
        assert answer.text.split()[1].split(",")[0] == str(count)
    for table in ("ivoa.obscore", "ledger.image", "ledger.hop"):
        counts = []
        for headers in ({}, world.headers(world.admin)):
            data = {"QUERY": f"SELECT COUNT(*) AS n FROM {table}", "RESPONSEFORMAT": "csv"}
            counts.append(int(client.post("/tap/sync", data=data, headers=headers).text.split()[1]))
        assert 0 < counts[0] < counts[1], table


def test_a_bad_token_is_401_and_a_token_without_the_scope_403(client, world):
    data = {"QUERY": "SELECT TOP 1 ra FROM level1.DiaObject"}
    bad = client.post("/tap/sync", data=data, headers=world.headers("cmb_000000000000_" + "A" * 43))
    assert bad.status_code == 401
    assert bad.headers["www-authenticate"].startswith("Bearer")
    other = world.token("painter", scopes=("read:image",))
    refused = client.post("/tap/sync", data=data, headers=world.headers(other))
    assert refused.status_code == 403
    assert "read:tap" in refused.text
    audit = world.database.execute(
        "SELECT action, target, outcome FROM access.audit WHERE account = 'painter'"
    )
    assert ("POST", "/tap/sync", "AuthorizationError") in audit
    basic = client.post("/tap/sync", data=data, auth=("x", world.token("typist")))
    assert basic.status_code == 200


def test_uploads_of_every_kind_are_joined(service, client):
    from astropy.table import Table

    ra, dec = grid()
    rows = Table({"name": ["a", "b", "far"], "ra": [ra[0], ra[100], 10.0], "dec": [dec[0], dec[100], 10.0]})
    rows["ra"].unit = rows["dec"].unit = "deg"
    query = (
        "SELECT u.name, o.diaObjectId FROM TAP_UPLOAD.mine AS u JOIN level1.DiaObject AS o"
        " ON DISTANCE(u.ra, u.dec, o.ra, o.dec) < 0.001 ORDER BY u.name"
    )
    found = service.run_sync(query, uploads={"mine": rows})
    assert list(zip(found["name"], found["diaObjectId"], strict=True)) == [("a", 1), ("b", 101)]
    import pyarrow as pa
    import pyarrow.parquet as pq

    parquet = io.BytesIO()
    pq.write_table(pa.table({name: rows[name].tolist() for name in rows.colnames}), parquet)
    csv, fits = io.StringIO(), io.BytesIO()
    rows.write(csv, format="ascii.csv")
    rows.write(fits, format="fits")
    for content in (csv.getvalue().encode(), parquet.getvalue(), fits.getvalue()):
        answer = client.post(
            "/tap/sync", data={"QUERY": query, "UPLOAD": "mine,param:file", "RESPONSEFORMAT": "csv"},
            files={"file": ("x", content)},
        )  # fmt: skip
        assert answer.text.split() == ["name,diaObjectId", "a,1", "b,101"], answer.text


BOMB = b"""<?xml version="1.0"?><!DOCTYPE VOTABLE [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;">]>
<VOTABLE><RESOURCE><TABLE><FIELD name="x" datatype="char" arraysize="*"/><DATA><TABLEDATA><TR><TD>&c;</TD></TR>
</TABLEDATA></DATA></TABLE></RESOURCE></VOTABLE>"""
EXTERNAL = BOMB.replace(b'<!ENTITY a "ha">', b'<!ENTITY a SYSTEM "file:///etc/passwd">')
STREAM = b"""<VOTABLE><RESOURCE><TABLE><FIELD name="x" datatype="int"/><DATA><BINARY><STREAM href="file:///etc/passwd"/>
</BINARY></DATA></TABLE></RESOURCE></VOTABLE>"""
WIDE = b"""<VOTABLE><RESOURCE><TABLE><FIELD name="x" datatype="double" arraysize="900000000"/><DATA><TABLEDATA><TR><TD>1</TD>
</TR></TABLEDATA></DATA></TABLE></RESOURCE></VOTABLE>"""


def _many_rows():
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()  # 30 million times the same number: some kilobytes
    pq.write_table(pa.table({"x": pa.array(np.zeros(30_000_000, np.int8))}), out, compression="zstd")
    return out.getvalue()


def _gzip():
    import gzip

    return gzip.compress(b"x\n" + b"1\n" * 1_000_000)


@pytest.mark.parametrize(
    "content",
    [BOMB, EXTERNAL, STREAM, WIDE, b"<VOTABLE" + b"<a>" * 100_000, b"\0\1\2\3", b"", b"SIMPLE  = T", b"PAR1xxxx",
     b"PAR1" + b"\xff" * 200 + b"PAR1", _many_rows, _gzip, b"a,a\n1,2\n", b"<VOTABLE/>"],
    ids=["entities", "external", "stream", "wide", "deep", "bytes", "nothing", "fits", "parquet", "parquet2", "rows",
         "gzip", "twice", "no-table"],
)  # fmt: skip
def test_a_hostile_upload_is_refused_in_words(client, content):
    body = content() if callable(content) else content
    answer = client.post(
        "/tap/sync",
        data={"QUERY": "SELECT * FROM TAP_UPLOAD.t", "UPLOAD": "t,param:f"},
        files={"f": ("x", body)},
    )
    assert answer.status_code in (400, 413), answer.text
    ((status, text),) = status_of(answer.content)
    assert status == "ERROR"
    assert "upload t" in text
    assert "root:" not in text


def test_a_body_larger_than_allowed_is_refused(client, world):
    limit = world.access.service.settings.upload_bytes
    block = b"x" * (1 << 20)

    def body():
        yield b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n'
        for _ in range(limit // len(block) + 2):
            yield block

    answer = client.post(
        "/tap/sync", content=body(), headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code == 413


def test_a_long_query_ends_when_the_client_leaves(client, world):
    query = (
        "SELECT COUNT(*) AS n FROM level1.DiaObject AS a, level1.DiaObject AS b, level1.DiaObject AS c,"
        " level1.DiaObject AS d WHERE a.ra + b.ra + c.ra + d.ra < 0"
    )
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{world.url}/tap/sync", data={"QUERY": query}, timeout=1.0)
    end = time.monotonic() + 5  # the query itself takes longer
    running = [(1,)]
    while running != [(0,)] and time.monotonic() < end:
        running = world.database.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'COPY%%'"
            " AND datname = current_database()"
        )
        time.sleep(0.1)
    assert running == [(0,)]


def test_small_queries_do_not_wait_for_long_ones(world):
    long = (
        "SELECT COUNT(*) AS n FROM level1.DiaObject AS a, level1.DiaObject AS b, level1.DiaObject AS c,"
        " level1.DiaObject AS d WHERE a.ra + b.ra + c.ra + d.ra < 0"
    )

    def ask_long():
        try:
            httpx.post(f"{world.url}/tap/sync", data={"QUERY": long}, timeout=4.0)
        except httpx.TimeoutException:
            return

    threads = [threading.Thread(target=ask_long) for _ in range(12)]
    for thread in threads:
        thread.start()
    time.sleep(2.2)  # more than the quick lane has places: all of its places are long ones at first
    answer = httpx.post(
        f"{world.url}/tap/sync", data={"QUERY": "SELECT TOP 1 ra FROM level1.DiaObject"}, timeout=10
    )
    assert answer.status_code == 200
    for thread in threads:
        thread.join()


def test_requests_are_counted_and_told(client, world):
    answer = ask(client, "SELECT TOP 1 ra FROM level1.DiaObject")
    limit, left, used = (int(answer.headers[f"x-ratelimit-{key}"]) for key in ("limit", "remaining", "used"))
    assert (limit, left) == (3000, 3000 - used)
    assert answer.headers["x-ratelimit-resource"] == "requests"
    world.database.execute("UPDATE access.request_count SET used = 5000")
    refused = ask(client, "SELECT TOP 1 ra FROM level1.DiaObject")
    if refused.status_code == 200:  # a minute began in between
        world.database.execute("UPDATE access.request_count SET used = 5000")
        refused = ask(client, "SELECT TOP 1 ra FROM level1.DiaObject")
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 61
    assert refused.headers["x-ratelimit-remaining"] == "0"
    with_token = client.post(
        "/tap/sync",
        data={"QUERY": "SELECT TOP 1 ra FROM level1.DiaObject"},
        headers=world.headers(world.token("limitless")),
    )
    assert with_token.status_code == 200
    world.database.execute("DELETE FROM access.request_count")


def test_guessing_tokens_is_counted(client, world):
    bad = world.headers("cmb_000000000000_" + "A" * 43)
    assert client.get("/tap/availability", headers=bad).status_code == 401
    for _ in range(2):  # a minute may begin in between
        world.database.execute("UPDATE access.request_count SET used = 500 WHERE resource = 'authentication'")
        refused = client.get("/tap/availability", headers=bad)
        if refused.status_code == 429:
            break
    assert refused.status_code == 429
    assert client.get("/tap/availability").status_code == 200
    world.database.execute("DELETE FROM access.request_count")


def test_pages_elsewhere_may_ask(client):
    for path in ("/tap/capabilities", "/tap/nothing-such", "/soda/sync"):
        answer = client.get(path)
        if answer.status_code != 404:
            assert answer.headers["access-control-allow-origin"] == "*"
            assert answer.headers["x-content-type-options"] == "nosniff"


def test_every_query_is_in_the_audit(client, world):
    token = world.token("auditee")
    query = "SELECT TOP 1 ra, dec FROM level1.DiaObject"
    client.post("/tap/sync", data={"QUERY": query}, headers=world.headers(token))
    rows = world.database.execute(
        "SELECT action, target, outcome FROM access.audit WHERE account = 'auditee'"
    )
    assert ("query", query, "OK") in rows


def test_vosi(client, service):
    assert service.maxrec == 20_000_000
    assert {"level1.DiaObject", "ivoa.obscore", "ledger.hop"} <= set(service.tables.keys())
    brief = client.get("/tap/tables", params={"detail": "min"}).text
    assert "<column" not in brief
    assert "level1.DiaSource" in brief
    one = client.get("/tap/tables/level1.diaobject").text
    assert "<name>nDiaSources</name>" in one
    assert client.get("/tap/tables/nothing.there").status_code == 404
    assert "<vosi:available>true" in client.get("/tap/availability").text
    assert client.get("/tap/tables", params={"detail": "huge"}).status_code == 400


def test_examples_run(service):
    examples = list(service.examples)
    assert len(examples) >= 3
    for example in examples:
        example.execute()
