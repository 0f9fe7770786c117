"""UWS 1.1 over a real server: what its text says must happen, one test each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import pytest
import pyvo
import requests

from cumbre.access.identity import Principal
from cumbre.access.uws import JobStore, worker_name

# pyvo leaves the connection of a result open that it did not read to the end
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)
UWS = "{http://www.ivoa.net/xml/UWS/v1.0}"
XLINK = "{http://www.w3.org/1999/xlink}href"
QUICK = "SELECT COUNT(*) AS n FROM level1.DiaObject"
LONG = (
    "SELECT COUNT(*) AS n FROM level1.DiaObject AS a, level1.DiaObject AS b, level1.DiaObject AS c,"
    " level1.DiaObject AS d WHERE a.ra + b.ra + c.ra + d.ra < 0"
)


def make(client, query=QUICK, **more):
    answer = client.post("/tap/async", data={"LANG": "ADQL", "QUERY": query} | more)
    assert answer.status_code == 303, answer.text
    return answer.headers["location"]


def job(client, url, **parameters):
    answer = client.get(url, params=parameters)
    assert answer.status_code == 200
    return ElementTree.fromstring(answer.content)


def phase(client, url):
    return client.get(f"{url}/phase").text


def wait(client, url):
    """Phase at the end."""
    end = time.monotonic() + 30
    while (now := job(client, url, WAIT=10).findtext(f"{UWS}phase")) in ("QUEUED", "EXECUTING"):
        assert time.monotonic() < end
    return now


def test_pyvo_runs_a_job(world):
    with requests.Session() as session:
        service = pyvo.dal.TAPService(f"{world.url}/tap", session=session)
        assert service.run_async(QUICK)["n"][0] == 441
        running = service.submit_job(QUICK)
        running.run().wait(timeout=30)
        assert running.phase == "COMPLETED"
        assert running.fetch_result()["n"][0] == 441
        running.delete()


def test_a_new_job_is_pending_with_all_its_parts(client):
    url = make(client, RUNID="my run")
    root = job(client, url)
    assert root.get("version") == "1.1"
    assert [e.tag.removeprefix(UWS) for e in root] == [
        "jobId", "runId", "ownerId", "phase", "quote", "creationTime", "startTime", "endTime", "executionDuration",
        "destruction", "parameters", "results",
    ]  # fmt: skip
    assert root.findtext(f"{UWS}phase") == "PENDING"
    assert root.findtext(f"{UWS}runId") == "my run"
    parameters = {e.get("id"): e.text for e in root.find(f"{UWS}parameters")}
    assert parameters == {"LANG": "ADQL", "QUERY": QUICK, "RUNID": "my run"}
    for part in ("phase", "executionduration", "destruction", "quote", "results", "parameters", "owner"):
        assert client.get(f"{url}/{part}").status_code == 200
    assert client.get(f"{url}/error").status_code == 404


def test_a_finished_job_has_its_result_its_times_and_its_counts(client):
    url = make(client, PHASE="RUN", RESPONSEFORMAT="csv")
    assert wait(client, url) == "COMPLETED"
    root = job(client, url)
    (result,) = root.find(f"{UWS}results")
    assert result.get("id") == "result"
    answer = client.get(result.get(XLINK))
    assert answer.text.split() == ["n", "441"]
    assert int(result.get("size")) == len(answer.content)
    assert client.get(f"{url}/results/result", headers={"Range": "bytes=0-0"}).content == b"n"
    info = {e.tag: e.text for e in root.find(f"{UWS}jobInfo")}
    assert info["rows"] == "1"
    times = [root.findtext(f"{UWS}{name}Time") for name in ("creation", "start", "end")]
    assert times == sorted(times)
    assert client.get(f"{url}/results/other").status_code == 404
    assert client.get(f"{url}/results/..%2f..%2fsite.yaml").status_code == 404


def test_wait_returns_when_the_phase_changes_and_not_before(client):
    url = make(client)
    begin = time.monotonic()
    assert job(client, url, WAIT=1, PHASE="PENDING").findtext(f"{UWS}phase") == "PENDING"
    assert time.monotonic() - begin > 0.9
    begin = time.monotonic()
    job(client, url, WAIT=60, PHASE="EXECUTING")  # it is not in that phase: nothing to wait for
    assert time.monotonic() - begin < 30
    assert client.get(url, params={"WAIT": "soon"}).status_code == 400
    client.post(f"{url}/phase", data={"PHASE": "RUN"})
    begin = time.monotonic()
    while job(client, url, WAIT=-1).findtext(f"{UWS}phase") not in ("COMPLETED", "ERROR"):
        assert time.monotonic() - begin < 20


def test_abort_stops_the_query_in_the_database(client, world):
    url = make(client, LONG, PHASE="RUN")
    end = time.monotonic() + 20
    active = (
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'COPY%%'"
        " AND datname = current_database()"
    )
    while world.database.execute(active) == [(0,)] and time.monotonic() < end:
        time.sleep(0.05)
    assert phase(client, url) == "EXECUTING"
    assert client.post(f"{url}/phase", data={"PHASE": "ABORT"}).status_code == 303
    assert phase(client, url) == "ABORTED"
    while world.database.execute(active) != [(0,)] and time.monotonic() < end:
        time.sleep(0.05)
    assert world.database.execute(active) == [(0,)]
    time.sleep(0.3)
    assert phase(client, url) == "ABORTED"  # the end of the work does not change it


def test_a_job_longer_than_its_execution_duration_ends_in_error(client):
    url = make(client, LONG)
    assert client.post(f"{url}/executionduration", data={"EXECUTIONDURATION": "1"}).status_code == 303
    assert client.get(f"{url}/executionduration").text == "1"
    client.post(f"{url}/phase", data={"PHASE": "RUN"})
    end = time.monotonic() + 30
    while phase(client, url) in ("QUEUED", "EXECUTING") and time.monotonic() < end:
        time.sleep(0.1)
    root = job(client, url)
    assert root.findtext(f"{UWS}phase") == "ERROR"
    assert "1 s" in root.findtext(f"{UWS}errorSummary/{UWS}message")


def test_an_error_is_a_votable_and_a_summary(client):
    url = make(client, "SELECT nothing FROM level1.DiaObject", PHASE="RUN")
    assert wait(client, url) == "ERROR"
    root = job(client, url)
    assert "nothing" in root.findtext(f"{UWS}errorSummary/{UWS}message")
    document = client.get(f"{url}/error")
    assert document.headers["content-type"].startswith("application/x-votable+xml")
    assert 'value="ERROR"' in document.text
    assert list(root.find(f"{UWS}results")) == []


def test_parameters_may_change_until_it_runs(client):
    url = make(client, "SELECT nothing")
    assert client.post(f"{url}/parameters", data={"QUERY": QUICK, "RESPONSEFORMAT": "csv"}).status_code == 303
    client.post(f"{url}/phase", data={"PHASE": "RUN"})
    assert wait(client, url) == "COMPLETED"
    assert client.post(f"{url}/parameters", data={"QUERY": "x"}).status_code == 409
    assert client.get(f"{url}/results/result").text.split() == ["n", "441"]
    assert client.post(f"{url}/phase", data={"PHASE": "DANCE"}).status_code == 400


def test_the_list_filters_by_phase_time_and_number(client):
    begin = datetime.now(UTC)
    urls = [make(client) for _ in range(4)]
    client.post(f"{urls[0]}/phase", data={"PHASE": "ABORT"})

    def listed(**parameters):
        root = job(client, "/tap/async", **parameters)
        return [e.get("id") for e in root]

    ids = [url.rsplit("/", 1)[1] for url in urls]
    after = begin.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert listed(AFTER=after) == ids
    assert listed(AFTER=after, PHASE="PENDING") == ids[1:]
    assert listed(AFTER=after, PHASE="ABORTED") == ids[:1]
    assert listed(LAST=2) == ids[:1:-1]  # the newest first
    for wrong in ({"PHASE": "DANCING"}, {"AFTER": "yesterday"}, {"LAST": "0"}, {"LAST": "all"}):
        assert client.get("/tap/async", params=wrong).status_code == 400
    first = job(client, "/tap/async", AFTER=after)[0]
    assert first.find(f"{UWS}creationTime") is not None
    assert first.get(XLINK) == urls[0]


def test_delete_ends_it_and_a_short_list_follows(client, world):
    url = make(client, PHASE="RUN", RESPONSEFORMAT="csv")
    assert wait(client, url) == "COMPLETED"
    folder = world.access.service.store.job_folder(url.rsplit("/", 1)[1])
    assert folder.is_dir()
    answer = client.delete(url)
    assert answer.status_code == 303
    assert "LAST=" in answer.headers["location"]
    assert client.get(url).status_code == 404
    assert not folder.exists()
    other = make(client)
    assert client.post(other, data={"ACTION": "DELETE"}).status_code == 303
    assert client.get(other).status_code == 404


def test_destruction_is_bounded_and_happens(client, world):
    url = make(client, PHASE="RUN", RESPONSEFORMAT="csv")
    wait(client, url)
    client.post(f"{url}/destruction", data={"DESTRUCTION": "2999-01-01T00:00:00Z"})
    assert client.get(f"{url}/destruction").text < "2999"
    past = (datetime.now(UTC) - timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    client.post(f"{url}/destruction", data={"DESTRUCTION": past})
    world.access.service.store.destroy_expired()
    assert client.get(url).status_code == 404
    assert client.post(f"{make(client)}/destruction", data={"DESTRUCTION": "soon"}).status_code == 400


def test_nobody_reads_the_job_of_another(client, world):
    owner, other = (world.headers(world.token(name)) for name in ("owner", "other"))
    url = client.post("/tap/async", data={"QUERY": QUICK, "PHASE": "RUN"}, headers=owner).headers["location"]
    assert client.get(url, headers=owner).status_code == 200
    for headers in (other, {}):
        for path in ("", "/phase", "/results", "/results/result", "/parameters", "/error", "/owner"):
            assert client.get(url + path, headers=headers).status_code == 403
        assert client.delete(url, headers=headers).status_code == 403
        assert client.post(f"{url}/phase", data={"PHASE": "ABORT"}, headers=headers).status_code == 403
        ids = [e.get("id") for e in ElementTree.fromstring(client.get("/tap/async", headers=headers).content)]
        assert url.rsplit("/", 1)[1] not in ids
    assert client.get(url, headers=world.headers(world.admin)).status_code == 200


def test_uploads_stay_with_the_job(client):
    content = b"id,ra\n1,53.1\n2,53.2\n"
    made = client.post(
        "/tap/async",
        data={"QUERY": "SELECT SUM(id) AS n FROM TAP_UPLOAD.t", "UPLOAD": "t,param:f", "RESPONSEFORMAT": "csv", "PHASE": "RUN"},
        files={"f": ("f.csv", content)},
    )  # fmt: skip
    url = made.headers["location"]
    assert wait(client, url) == "COMPLETED", client.get(f"{url}/error").text
    assert client.get(f"{url}/results/result").text.split() == ["n", "3"]


def test_a_job_of_a_server_that_died_is_queued_again_once_and_then_ends(database, tmp_path):
    store = JobStore(database, tmp_path)
    who = Principal(address="127.0.0.1")
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    died = worker_name().replace(f":{os.getpid()}:", f":{dead.stdout.strip()}:")
    made = store.create("tap", who, [("QUERY", "x")], execution_s=10)
    store.queue(made)
    assert store.claim(["tap"], died, owner_limit=2).job_id == made.job_id
    assert store.claim(["tap"], worker_name(), owner_limit=2) is None  # nobody takes it while it runs
    assert store.reclaim() == 1
    assert store.phase(made.job_id) == "QUEUED"
    again = store.claim(["tap"], died, owner_limit=2)
    assert again.attempt == 2
    assert store.reclaim() == 1
    ended = store.get("tap", made.job_id, who)
    assert ended.phase == "ERROR"
    assert "stopped 2 times" in ended.error["message"]
    assert not store.complete(again, [], {})  # the dead one's word does not count any more
    assert store.phase(made.job_id) == "ERROR"


def test_a_job_of_a_living_server_is_left_alone(database, tmp_path):
    store = JobStore(database, tmp_path)
    made = store.create("tap", Principal(), [], execution_s=10)
    store.queue(made)
    store.claim(["tap"], worker_name(), owner_limit=2)
    assert store.reclaim() == 0
    database.execute(
        "UPDATE access.job SET heartbeat = now() - interval '1 minute', worker = 'elsewhere:1:x'"
    )
    assert store.reclaim() == 1


def test_one_owner_does_not_take_all_places(database, tmp_path):
    store = JobStore(database, tmp_path)
    greedy, modest = Principal(address="a"), Principal(address="b")
    for who in (greedy, greedy, greedy, modest):
        store.queue(store.create("tap", who, [], execution_s=10))
    owners = [store.claim(["tap"], worker_name(), owner_limit=2).owner for _ in range(3)]
    assert owners == ["anonymous@a", "anonymous@a", "anonymous@b"]
    assert store.claim(["tap"], worker_name(), owner_limit=2) is None


def test_an_owner_cannot_fill_the_store_with_jobs(database, tmp_path, monkeypatch):
    from cumbre.access import uws
    from cumbre.core.errors import UserError

    monkeypatch.setattr(uws, "MAX_WAITING_ANONYMOUS", 3)
    store = JobStore(database, tmp_path)
    who = Principal(address="a")
    made = [store.create("tap", who, [], execution_s=10) for _ in range(3)]
    with pytest.raises(UserError, match="3 are allowed"):
        store.create("tap", who, [], execution_s=10)
    store.create("tap", Principal(address="b"), [], execution_s=10)
    store.abort(made[0])
    store.create("tap", who, [], execution_s=10)
