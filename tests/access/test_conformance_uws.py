"""UWS 1.1 (REC 2016-10-24) for both services with jobs; the section stands in the docstring of each test."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import pytest

from support.archive_world import AUTHORITY, OLD
from support.conformance import UWS, XLINK

ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
QUICK = {
    "tap": {"LANG": "ADQL", "QUERY": "SELECT COUNT(*) AS n FROM level1.DiaObject", "RESPONSEFORMAT": "csv"},
    "soda": {"ID": f"ivo://{AUTHORITY}?raw/{OLD}/R00_S00", "CIRCLE": "12 34 0.5"},
}
WRONG = {
    "tap": {"LANG": "ADQL", "QUERY": "SELECT nothing FROM level1.DiaObject"},
    "soda": {"ID": "ivo://nobody?x"},
}


@pytest.fixture(params=["tap", "soda"])
def service(request) -> str:
    return request.param


def make(client, service, data=None, **more) -> str:
    answer = client.post(f"/{service}/async", data=(data or QUICK[service]) | more)
    assert answer.status_code == 303, answer.text
    return answer.headers["location"]


def xml(client, url, **parameters):
    answer = client.get(url, params=parameters)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith(("text/xml", "application/xml"))
    return ElementTree.fromstring(answer.content)


def text(client, url) -> str:
    answer = client.get(url)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.text


def ended(client, url):
    end = time.monotonic() + 30
    while (root := xml(client, url, WAIT=10)).findtext(f"{UWS}phase") in ("QUEUED", "EXECUTING"):
        assert time.monotonic() < end
    return root


def to_job(answer, url):
    assert answer.status_code == 303, answer.text
    assert answer.headers["location"] == url


def test_resources_are_a_tree_of_uris(client, service):
    """2.2.1: below the job list the job, and below it the fixed names, each with its form."""
    url = make(client, service)
    base = f"{str(client.base_url).rstrip('/')}/{service}/async"
    assert url.rpartition("/")[0] == base
    assert xml(client, base).tag == f"{UWS}jobs"
    assert xml(client, url).tag == f"{UWS}job"
    assert text(client, f"{url}/phase") == "PENDING"
    assert int(text(client, f"{url}/executionduration")) > 0
    assert ISO.fullmatch(text(client, f"{url}/destruction"))
    assert text(client, f"{url}/quote") == ""
    assert text(client, f"{url}/owner") == ""
    assert xml(client, f"{url}/results").tag == f"{UWS}results"
    assert xml(client, f"{url}/parameters").tag == f"{UWS}parameters"
    for missing in (f"{base}/nojob", f"{url}/nothing", f"{url}/results/nothing"):
        assert client.get(missing).status_code == 404


def test_times_are_iso_8601_with_t_and_z(client, service):
    """2.2.1: a T between date and time, and the letter Z."""
    root = ended(client, make(client, service, PHASE="RUN"))
    for name in ("creationTime", "startTime", "endTime", "destruction"):
        assert ISO.fullmatch(root.findtext(f"{UWS}{name}")), name


def test_documents_tell_their_version(client, service):
    """2.2.1.1: the attribute version is 1.1 in the list and in a job."""
    url = make(client, service)
    assert xml(client, url).get("version") == xml(client, url.rpartition("/")[0]).get("version") == "1.1"


def test_waiting_ends_with_the_time(client, service):
    """2.2.1.2: with WAIT=N it returns after N seconds at the latest even if nothing changed."""
    url = make(client, service)
    begin = time.monotonic()
    assert xml(client, url, WAIT=1).findtext(f"{UWS}phase") == "PENDING"
    assert time.monotonic() - begin > 0.9


def test_waiting_is_for_active_phases_only(client, service):
    """2.2.1.2: out of the active phases it returns at once, and with PHASE when the job is in another one."""
    url = make(client, service)
    begin = time.monotonic()
    xml(client, url, WAIT=50, PHASE="QUEUED")
    client.post(f"{url}/phase", data={"PHASE": "ABORT"})
    for wait in (50, -1):
        assert xml(client, url, WAIT=wait).findtext(f"{UWS}phase") == "ABORTED"
    assert time.monotonic() - begin < 25
    assert client.get(url, params={"WAIT": "1.5"}).status_code == 400


def test_waiting_ends_when_the_phase_changes(client, service):
    """2.2.1.2: it returns when the phase changes, also for any time (-1)."""
    url = make(client, service)
    begin = time.monotonic()
    client.post(f"{url}/phase", data={"PHASE": "RUN"})
    while (phase := xml(client, url, WAIT=-1).findtext(f"{UWS}phase")) in ("QUEUED", "EXECUTING"):
        assert time.monotonic() - begin < 30
    assert phase == "COMPLETED"


def test_the_list_has_links_phases_and_times_and_filters(client, service):
    """2.2.2.1: jobref with id, href, phase, creationTime; PHASE (many), AFTER, LAST, all at once by AND."""
    begin = datetime.now(UTC)
    urls = [make(client, service, RUNID=f"run {number}") for number in range(3)]
    client.post(f"{urls[0]}/phase", data={"PHASE": "ABORT"})
    base, after = urls[0].rpartition("/")[0], begin.strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    def listed(**parameters):
        return [item.get(f"{XLINK}href") for item in xml(client, base, **parameters)]

    assert listed(AFTER=after) == urls
    assert listed(AFTER=after, PHASE="ABORTED") == urls[:1]
    assert listed(AFTER=after, PHASE=["ABORTED", "PENDING"]) == urls
    assert listed(LAST=2) == [urls[2], urls[1]]  # the newest first
    assert listed(LAST=5, AFTER=after, PHASE="PENDING") == [urls[2], urls[1]]
    item = xml(client, base, AFTER=after)[0]
    assert item.get("id") == urls[0].rpartition("/")[2]
    assert item.findtext(f"{UWS}phase") == "ABORTED"
    assert item.findtext(f"{UWS}runId") == "run 0"
    assert ISO.fullmatch(item.findtext(f"{UWS}creationTime"))


def test_archived_jobs_are_not_listed_unless_asked_for(client, service, world):
    """2.2.2.1: jobs in phase ARCHIVED are listed only with PHASE=ARCHIVED."""
    url = make(client, service)
    base, _, job_id = url.rpartition("/")
    world.database.execute("UPDATE access.job SET phase = 'ARCHIVED' WHERE job_id = %s", (job_id,))
    assert job_id not in [item.get("id") for item in xml(client, base)]
    assert [item.get("id") for item in xml(client, base, PHASE="ARCHIVED")] == [job_id]


def test_results_are_listed_with_unique_names(client, service):
    """2.2.2.3: each result has an id of its own and a link that works, in the job and in its list."""
    url = make(client, service, PHASE="RUN")
    root = ended(client, url)
    assert root.findtext(f"{UWS}phase") == "COMPLETED"
    inside, alone = root.find(f"{UWS}results"), xml(client, f"{url}/results")
    ids = [item.get("id") for item in alone]
    assert ids
    assert ids == [item.get("id") for item in inside]
    assert len(set(ids)) == len(ids)
    for item in alone:
        answer = client.get(item.get(f"{XLINK}href"))
        assert answer.status_code == 200
        assert answer.headers["content-type"].partition(";")[0] == item.get("mime-type").partition(";")[0]
        assert len(answer.content) == int(item.get("size"))


def test_parameters_are_listed_by_name(client, service):
    """2.2.2.4, 2.2.3.1.1: what was sent is listed, without PHASE, also with characters that XML keeps for itself."""
    url = make(client, service, RUNID="a < b & c > d")
    listed = {item.get("id"): item.text for item in xml(client, f"{url}/parameters")}
    assert listed == QUICK[service] | {"RUNID": "a < b & c > d"}
    assert xml(client, url).findtext(f"{UWS}runId") == "a < b & c > d"


def test_an_error_is_in_the_phase_the_summary_and_the_document(client, service):
    """2.2.2.5: PHASE becomes ERROR; errorSummary says why, with the kind and whether there is more at /error."""
    url = make(client, service, WRONG[service], PHASE="RUN")
    root = ended(client, url)
    assert root.findtext(f"{UWS}phase") == "ERROR"
    summary = root.find(f"{UWS}errorSummary")
    assert summary.get("type") in ("fatal", "transient")
    assert summary.get("hasDetail") == "true"
    assert summary.findtext(f"{UWS}message")
    assert client.get(f"{url}/error").status_code == 200
    assert client.get(f"{make(client, service)}/error").status_code == 404


def test_making_a_job_points_to_it_and_it_is_pending(client, service):
    """2.2.3.1: 303 with the job's place; it waits until it is told to run, unless PHASE=RUN came with it."""
    assert xml(client, make(client, service)).findtext(f"{UWS}phase") == "PENDING"
    assert xml(client, make(client, service, PHASE="RUN")).findtext(f"{UWS}phase") != "PENDING"


@pytest.mark.parametrize("way", ["DELETE", "POST"])
def test_deleting_a_job_points_to_the_list(client, service, way):
    """2.2.3.2: DELETE, or POST with ACTION=DELETE: 303 to the job list (LAST may limit it); the job is gone."""
    url = make(client, service)
    answer = client.delete(url) if way == "DELETE" else client.post(url, data={"ACTION": "DELETE"})
    assert answer.status_code == 303
    assert answer.headers["location"].partition("?")[0] == url.rpartition("/")[0]
    assert client.get(answer.headers["location"]).status_code == 200
    assert client.get(url).status_code == 404


def test_changing_the_destruction_points_to_the_job_with_what_holds(client, service):
    """2.2.3.3: 303 to the job, which shows the time that the service has set."""
    url = make(client, service)
    wanted = (datetime.now(UTC) + timedelta(hours=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    to_job(client.post(f"{url}/destruction", data={"DESTRUCTION": wanted}), url)
    assert xml(client, url).findtext(f"{UWS}destruction")[:19] == wanted[:19]
    assert text(client, f"{url}/destruction")[:19] == wanted[:19]


def test_changing_the_execution_duration_points_to_the_job_with_what_holds(client, service):
    """2.2.3.4: 303 to the job, which shows the duration that the service has set."""
    url = make(client, service)
    to_job(client.post(f"{url}/executionduration", data={"EXECUTIONDURATION": "42"}), url)
    assert xml(client, url).findtext(f"{UWS}executionDuration") == "42"


def test_running_and_aborting_point_to_the_job(client, service):
    """2.2.3.5, 2.2.3.6: POST of PHASE=RUN or PHASE=ABORT: 303 to the job, which is then in a later phase, or ABORTED."""
    url = make(client, service)
    to_job(client.post(f"{url}/phase", data={"PHASE": "RUN"}), url)
    assert ended(client, url).findtext(f"{UWS}phase") == "COMPLETED"
    other = make(client, service)
    to_job(client.post(f"{other}/phase", data={"PHASE": "ABORT"}), other)
    assert xml(client, other).findtext(f"{UWS}phase") == "ABORTED"


def test_jobs_of_others_are_forbidden(client, service, world):
    """3: who does not own a job gets 403 and does not see it in the list."""
    owner, other = (world.headers(world.token(name)) for name in ("one", "two"))
    made = client.post(f"/{service}/async", data=QUICK[service], headers=owner).headers["location"]
    assert client.get(made, headers=owner).status_code == 200
    assert client.get(made, headers=other).status_code == 403
    assert made.rpartition("/")[2] not in client.get(f"/{service}/async", headers=other).text


@pytest.mark.skipif(
    shutil.which("stilts") is None, reason="no stilts on this machine (Debian: apt-get install stilts)"
)
def test_a_job_is_as_the_schema_says(client, tmp_path):
    """2.2.2: the schema is the definitive description of the XML."""
    url = make(client, "soda", WRONG["soda"], PHASE="RUN", RUNID="x")
    ended(client, url)
    (tmp_path / "job.xml").write_bytes(client.get(url).content)
    said = subprocess.run(
        ["stilts", "xsdvalidate", "uselocals=true", f"doc={tmp_path}/job.xml"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr
    assert "ERROR" not in (said.stdout + said.stderr).upper().replace("ERRORS: 0", "")
