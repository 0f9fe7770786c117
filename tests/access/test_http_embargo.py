"""Embargo on every path: one table of ways to an image, and who must not see it by any of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from xml.etree import ElementTree

import fastavro
import httpx
import pytest

from cumbre.alerts.packet import packet_bytes
from cumbre.core.geometry import sky_from_pixel
from cumbre.core.instrument import load_instrument
from support.archive_world import AUTHORITY, DEC, NEW, OLD, RA, ROTATION

CAMERA = load_instrument("democam")
CHIP = CAMERA.detector(0)
EXPOSURE = {OLD: 2026111600001, NEW: 2026111600002}
ALERT = {OLD: 501, NEW: 502}
SOURCE = {OLD: 1, NEW: 1001}
"""Difference sources of the times of the images."""
NS = "{http://www.ivoa.net/xml/UWS/v1.0}"
type Look = Callable[[httpx.Client, str], bool]


def did(obs_id: str) -> str:
    return f"ivo://{AUTHORITY}?raw/{obs_id}/{CHIP.name}"


def circle() -> str:
    ra, dec = sky_from_pixel(CAMERA, CHIP, RA, DEC, ROTATION, 500, 500)
    return f"{float(ra)} {float(dec)} 0.003"


def asked(adql: str) -> Look:
    def look(client: httpx.Client, obs_id: str) -> bool:
        names = {"obs": obs_id, "source": str(SOURCE[obs_id]), "exposure": str(EXPOSURE[obs_id])}
        query = {"QUERY": adql.format(**names), "LANG": "ADQL", "RESPONSEFORMAT": "csv"}
        answer = client.post("/tap/sync", data=query)
        assert answer.status_code == 200, answer.text
        return len(answer.text.strip().splitlines()) > 1

    return look


def job(path: str, parameters: Callable[[str], dict[str, str]], word: str) -> Look:
    """A way that ends in a job: seen when it completes with the word in its results."""

    def look(client: httpx.Client, obs_id: str) -> bool:
        url = client.post(path, data=parameters(obs_id) | {"PHASE": "RUN"}).headers["location"]
        for _ in range(20):
            root = ElementTree.fromstring(client.get(url, params={"WAIT": 10}).content)
            if root.findtext(f"{NS}phase") in ("COMPLETED", "ERROR"):
                break
        if root.findtext(f"{NS}phase") == "ERROR":
            return False
        results = [e.get("{http://www.w3.org/1999/xlink}href") for e in root.find(f"{NS}results")]
        return any(word.format(obs=obs_id).encode() in client.get(href).content for href in results)

    return look


def got(path: str, **parameters: str) -> Look:
    """A way that answers 200 or 404."""

    def look(client: httpx.Client, obs_id: str) -> bool:
        names = {
            "obs": obs_id,
            "did": did(obs_id),
            "chip": CHIP.name,
            "alert": str(ALERT[obs_id]),
            "circle": circle(),
        }
        answer = client.get(
            path.format(**names), params={k: v.format(**names) for k, v in parameters.items()}
        )
        assert answer.status_code in (200, 404), answer.text
        return answer.status_code == 200

    return look


WAYS: dict[str, Look] = {
    "ObsCore": asked("SELECT obs_id FROM ivoa.obscore WHERE obs_id = '{obs}'"),
    "ObsCore counted": asked("SELECT obs_id, count(*) FROM ivoa.obscore WHERE obs_id = '{obs}' GROUP BY obs_id"),
    "ledger": asked("SELECT obs_id FROM ledger.image WHERE exposure_id = {exposure}"),
    "hops": asked("SELECT checksum FROM ledger.hop WHERE obs_id = '{obs}'"),
    "sources": asked('SELECT "diaSourceId" FROM level1."DiaSource" WHERE "diaSourceId" = {source}'),
    "joined": asked(
        'SELECT s."diaSourceId" FROM level1."DiaObject" o JOIN level1."DiaSource" s'
        ' ON s."diaObjectId" = o."diaObjectId" WHERE s."diaSourceId" = {source}'
    ),
    "TAP job": job(
        "/tap/async",
        lambda obs: {"QUERY": f"SELECT obs_id FROM ivoa.obscore WHERE obs_id = '{obs}'", "RESPONSEFORMAT": "csv"},
        "{obs}",
    ),
    "SIA": lambda client, obs: obs in client.get("/sia/query", params={"POS": f"CIRCLE {circle()}"}).text,
    "SIA by identifier": lambda client, obs: f"{obs}</TD>" in client.get("/sia/query", params={"ID": did(obs)}).text,
    "DataLink": lambda client, obs: "#this" in client.get("/datalink/links", params={"ID": did(obs)}).text
    and "NotFoundFault" not in client.get("/datalink/links", params={"ID": did(obs)}).text,
    "file": got("/files/raw/{obs}/{chip}"),
    "cutout": got("/soda/sync", ID="{did}", CIRCLE="{circle}"),
    "picture": got("/soda/sync", ID="{did}", CIRCLE="{circle}", RESPONSEFORMAT="image/png"),
    "mosaic": got("/soda/sync", ID="{did}", CIRCLE="{circle}", COMBINE="MOSAIC"),
    "stack": got("/soda/sync", ID="{did}", CIRCLE="{circle}", COMBINE="STACK"),
    "cutout job": job("/soda/async", lambda obs: {"ID": did(obs), "CIRCLE": circle()}, "SIMPLE"),
    "light curve": lambda client, obs: any(
        line.endswith(f",{SOURCE[obs]}")
        for line in client.get("/lightcurve/1", params={"RESPONSEFORMAT": "csv"}).text.splitlines()
    ),
    "cone": lambda client, obs: f"\n{SOURCE[obs]}," in client.get(
        "/cone/level1.DiaSource", params={"RA": RA, "DEC": DEC, "SR": 1, "RESPONSEFORMAT": "csv"}).text,
    "alert": got("/alerts/{alert}"),
    "alert as text": got("/alerts/{alert}", RESPONSEFORMAT="json"),
}  # fmt: skip


@pytest.fixture(scope="module")
def world_with_alerts(world):
    for obs_id, number in ALERT.items():
        source = {"diaSourceId": number, "visit": EXPOSURE[obs_id], "detector": 0, "midpointMjdTai": 61364.1, "ra": RA,
                  "dec": DEC, "x": 1.5, "y": 2.5, "timeProcessedMjdTai": 61364.2, "psfNdata": 0, "trailNdata": 0,
                  "dipoleNdata": 0, "bboxSize": 9}  # fmt: skip
        packet = packet_bytes({"diaSourceId": number, "diaSource": source, "cutoutScience": b"pixels"})
        world.database.execute(
            "INSERT INTO level1.alert_outbox (alert_id, visit, detector, packet) VALUES (%s, %s, 0, %s)",
            (number, EXPOSURE[obs_id], packet),
        )
    return world


@pytest.fixture(scope="module")
def people(world_with_alerts):
    """Clients: somebody unknown, a member, a member with a browser's session of somebody who may, and that one."""
    world = world_with_alerts
    allowed = world.token("insider", "embargo")
    session = world.access.login.logins.open_session("insider")
    headers = {
        "anybody": {},
        "member": world.headers(world.token("member", "collaboration")),
        "cookie": {"Cookie": f"cumbre_session={session}"},
        "insider": world.headers(allowed),
    }
    clients = {name: httpx.Client(base_url=world.url, timeout=60, headers=h) for name, h in headers.items()}
    yield clients
    for client in clients.values():
        client.close()


@pytest.mark.parametrize("way", WAYS)
def test_an_image_under_embargo_is_seen_by_those_who_may(people, way):
    look = WAYS[way]
    for name, client in people.items():
        assert look(client, OLD), (name, "the released image is for all")
        assert look(client, NEW) == (name == "insider"), name


def test_an_alert_as_anybody_reads_it(people):
    answer = people["insider"].get(f"/alerts/{ALERT[NEW]}")
    (record,) = fastavro.reader(io.BytesIO(answer.content))
    assert (record["diaSourceId"], record["cutoutScience"]) == (ALERT[NEW], b"pixels")
    assert (
        people["insider"].get(f"/alerts/{ALERT[NEW]}?RESPONSEFORMAT=json").json()["cutoutScience"]
        == "cGl4ZWxz"
    )
    absent, secret = (people["anybody"].get(f"/alerts/{number}") for number in (999, ALERT[NEW]))
    assert absent.text.replace("999", "N") == secret.text.replace(str(ALERT[NEW]), "N")
    for wrong in ("x", "1" * 30, "-1", "%00"):
        assert people["anybody"].get(f"/alerts/{wrong}").status_code in (400, 404)
