"""The pages over a real database: numbers as in the ledger, the same as JSON, and a browser that goes live."""

from __future__ import annotations

import gc
import json
import shutil
import socket
import subprocess

import httpx
import pytest

from cumbre.archive.alarms import Alarm
from cumbre.core.configuration import Site
from cumbre.core.time import Clock
from cumbre.ledger import prepare
from cumbre.site.profiles import create_site
from cumbre.site.roles import open_site_bus
from cumbre.web.service import WebService

OBS_ID = "XC_O_20261120_000001"
BEGIN = 1795222837.0


@pytest.fixture
def site(tmp_path):
    create_site(tmp_path / "site")
    return Site.load(tmp_path / "site")


@pytest.fixture
def ledger(database):
    prepare(database)
    database.execute(
        "INSERT INTO ledger.image (obs_id, instrument, day_obs, seq_num, exposure_id, image_type, band)"
        " VALUES (%s, 'DemoCam', 20261120, 1, 2026112000001, 'OBJECT', 'r')",
        (OBS_ID,),
    )
    for hop, lag, outcome in (("read_out", 0.0, "ok"), ("written", 2.5, "ok"), ("at_base", 4.0, "BadFile")):
        database.execute(
            "INSERT INTO ledger.hop (obs_id, detector, detector_name, hop, outcome, place, path, byte_size, checksum,"
            " message, hop_tai, recv_tai, attempt) VALUES (%s, 0, 'R00_S00', %s, %s, 'x', '', 1, '', %s, %s, %s, 1)",
            (OBS_ID, hop, outcome, "<script>alert(1)</script>", BEGIN + lag, BEGIN + lag),
        )
    database.execute(
        "INSERT INTO ledger.hop (obs_id, detector, detector_name, hop, outcome, place, path, byte_size, checksum,"
        " message, hop_tai, recv_tai, attempt) VALUES (%s, -1, '', 'header', 'ok', 'x', '', 1, '', '', %s, %s, 1)",
        (OBS_ID, BEGIN + 1, BEGIN + 1),
    )
    return database


@pytest.fixture
def bus(site):
    with open_site_bus(site, "test") as bus:
        yield bus


@pytest.fixture
def url(site, ledger, bus):
    service = WebService(site=site, bus=bus, clock=Clock.real(), db=ledger)
    yield (site.root / "run" / "web.url").read_text().strip()
    service.close()


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=20) as client:
        yield client


def test_flow_tells_count_lag_and_backlog(client):
    hops = {hop["hop"]: hop for hop in client.get("/flow.json").json()["hops"]}
    assert hops["written"]["count"] == 1
    assert hops["written"]["lag_s"] == 2.5
    assert hops["written"]["backlog"] == 0
    assert (hops["header"]["count"], hops["header"]["lag_s"]) == (1, 1.0)  # told once for the whole image
    assert hops["at_base"] == {  # what failed has not passed
        "hop": "at_base", "count": 0, "lag_s": None, "backlog": 1, "last_utc": None, "failures": {"BadFile": 1},
    }  # fmt: skip
    assert (hops["archive_tape"]["count"], hops["archive_tape"]["backlog"]) == (0, 1)
    assert hops["alerted"]["backlog"] is None  # not every image has alerts


def test_alarms_come_and_go(client, bus):
    assert client.get("/alarms.json").json() == []
    alarm = Alarm(bus, "tape-base", "base")
    alarm.begin("<b>the tape</b> is away", severity=2, backlog=7)
    (row,) = client.get("/alarms.json").json()
    assert {key: row[key] for key in ("component", "text", "severity", "backlog")} == {
        "component": "tape-base", "text": "<b>the tape</b> is away", "severity": 2, "backlog": 7,
    }  # fmt: skip
    since = row["since"]
    alarm.begin("it is worse", severity=3)
    (row,) = client.get("/alarms.json").json()
    assert (row["severity"], row["since"]) == (3, since)
    assert "tape-base: it is worse" in client.get("/").text
    Alarm(bus, "tape-base", "base").end("it is back")  # another process of the same role
    assert client.get("/alarms.json").json() == []
    assert "No alarms." in client.get("/alarms").text


@pytest.mark.parametrize("path", ["/", "/flow", "/alarms", "/components", f"/exposures/{OBS_ID}"])
def test_each_page_is_html_and_the_same_path_is_json(client, path):
    page = client.get(path)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    data = client.get("/index.json" if path == "/" else f"{path}.json")
    assert data.headers["content-type"] == "application/json"


def test_what_comes_from_outside_is_escaped(client):
    page = client.get(f"/exposures/{OBS_ID}").text
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


@pytest.mark.parametrize(
    "path", ["/exposures/nothing", "/exposures/..%2f..%2fetc", "/report", "/static/../service.py"]
)
def test_what_is_not_there_is_404(client, path):
    assert client.get(path).status_code == 404


def test_events_bring_the_flow(client):
    with client.stream("GET", "/events") as stream:
        lines = iter(stream.iter_lines())
        event = [next(lines) for _ in range(3)]
    assert event[:2] == ["id: 1", "event: flow"]
    hops = {hop["hop"]: hop for hop in json.loads(event[2].removeprefix("data: "))["hops"]}
    assert hops["written"]["count"] == 1


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)
def test_a_browser_shows_the_page(url, tmp_path):
    result = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path}/chromium", "--dump-dom", url],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "<h1>Tonight</h1>" in result.stdout
    assert OBS_ID in result.stdout


def test_answers_do_not_wait_for_acknowledgements(url, client):
    assert client.get("/").status_code == 200  # the connection stays open
    port = int(url.rsplit(":", 1)[1].strip("/"))
    ours = [
        item
        for item in gc.get_objects()
        if type(item) is socket.socket and item.fileno() >= 0 and item.getsockname()[1:2] == (port,)
    ]
    assert len(ours) >= 2  # one listens, one is the client's
    assert all(item.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for item in ours)
