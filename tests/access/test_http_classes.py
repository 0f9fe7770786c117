"""Limits of groups: each has its own, people without a token too, and the most generous of several counts."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import httpx
import pytest
from astropy.io.votable import parse

from cumbre.core.configuration import QueryLimits, UserClass

ACCESS = {
    "rows": 300,
    "sync_s": 20.0,
    "classes": {
        "anonymous": UserClass(sync=QueryLimits(rows=10), job=QueryLimits(rows=20, seconds=50)),
        "collaboration": UserClass(
            sync=QueryLimits(rows=500, gigabytes=1e-6), job=QueryLimits(seconds=7200, rows=400), per_minute=50
        ),
        "embargo": UserClass(sync=QueryLimits(rows=350, gigabytes=1, seconds=0.5)),
        "releases": UserClass(per_minute=0),
    },
}
ALL = "SELECT diaObjectId, ra, dec, nDiaSources FROM level1.DiaObject"
LONG = "SELECT COUNT(*) FROM level1.DiaObject a, level1.DiaObject b, level1.DiaObject c WHERE SIN(a.ra * b.ra * c.ra) > 2"
NS = "{http://www.ivoa.net/xml/UWS/v1.0}"


@pytest.fixture(scope="module")
def people(world):
    groups = {"anonymous": None, "member": ("collaboration",), "both": ("collaboration", "embargo"), "plain": (),
              "nobody": ("releases",)}  # fmt: skip
    clients = {
        name: httpx.Client(
            base_url=world.url, timeout=60, headers={} if g is None else world.headers(world.token(name, *g))
        )
        for name, g in groups.items()
    }
    yield clients
    for client in clients.values():
        client.close()


def rows_of(content: bytes) -> tuple[int, str]:
    """How many rows came, and what the document says of more."""
    document = parse(io.BytesIO(content))
    told = [i for i in document.resources[0].infos if i.name == "QUERY_STATUS" and i.value == "OVERFLOW"]
    return len(document.get_first_table().array), " ".join(str(i.content) for i in told)


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("anonymous", 10, "10 rows"),
        ("plain", 300, "300 rows"),
        ("member", None, "1,073 bytes"),
        ("both", 441, ""),
    ],
)
def test_queries_at_once(people, name, rows, words):
    answer = people[name].post("/tap/sync", data={"QUERY": ALL})
    assert answer.status_code == 200
    count, told = rows_of(answer.content)
    assert words in told
    assert rows is None or count == rows
    assert bool(told) is bool(words)


def test_time_at_once(people):
    answer = people["both"].post("/tap/sync", data={"QUERY": LONG})
    assert answer.status_code == 400
    assert "0.5 s" in answer.text


def duration(client: httpx.Client, wanted: int | None = None) -> int:
    """Seconds that a new job may take."""
    job = client.post("/tap/async", data={"QUERY": ALL}).headers["location"]
    if wanted is not None:
        client.post(f"{job}/executionduration", data={"EXECUTIONDURATION": str(wanted)})
    return int(client.get(f"{job}/executionduration").text)


def test_jobs_have_limits_of_their_own(people):
    assert duration(people["anonymous"]) == 50
    assert duration(people["member"]) == 7200
    assert duration(people["plain"]) == 3600
    assert duration(people["anonymous"], 4000) == 50
    assert duration(people["member"], 4000) == 4000
    for name, wanted in (("anonymous", 20), ("member", 400)):
        made = people[name].post("/tap/async", data={"QUERY": ALL, "PHASE": "RUN"}).headers["location"]
        for _ in range(20):
            job = ElementTree.fromstring(people[name].get(made, params={"WAIT": 10}).content)
            if job.findtext(f"{NS}phase") in ("COMPLETED", "ERROR"):
                break
        assert rows_of(people[name].get(f"{made}/results/result").content)[0] == wanted


def test_requests_a_minute(people):
    for name, limit in (("anonymous", "3000"), ("plain", "12000"), ("member", "50"), ("both", "50")):
        assert people[name].get("/tap/availability").headers["x-ratelimit-limit"] == limit
    refused = people["nobody"].get("/tap/availability")
    assert refused.status_code == 403
    assert "not allowed" in refused.text


def test_capabilities_tell_the_limits_of_who_asks(people):
    def told(name: str) -> list[str]:
        root = ElementTree.fromstring(people[name].get("/tap/capabilities").content)
        return [
            e.text for path in ("executionDuration", "outputLimit") for e in root.findall(f".//{path}/hard")
        ]

    assert told("anonymous") == ["50", "20"]
    assert told("member") == ["7200", "400"]
    assert told("plain") == ["3600", "300"]
