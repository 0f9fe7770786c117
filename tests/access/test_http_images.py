"""SIA 2.0, DataLink 1.1, SODA 1.0 and cone search over a real server; pixels checked against their own places."""

from __future__ import annotations

import io
import math
import shutil
import subprocess
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest
import pyvo
import requests
from astropy.io import fits
from astropy.io.votable import parse_single_table
from astropy.wcs import WCS

from cumbre.core.geometry import pixel_from_sky, separation_deg, sky_from_pixel
from cumbre.core.instrument import load_instrument
from support.archive_world import (
    AUTHORITY,
    DEC,
    DETECTORS,
    NEW,
    OLD,
    RA,
    ROTATION,
    STEP_DEG,
    World,
    grid,
    pixel_value,
)  # fmt: skip

# pyvo leaves the connection of a result open that it did not read to the end
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)
CAMERA = load_instrument("democam")
PIXEL_DEG = 0.6 / 3600
VO = "{http://www.ivoa.net/xml/VOTable/v1.3}"


@pytest.fixture
def insider(world: World):
    with httpx.Client(base_url=world.url, timeout=30, headers=world.headers(world.admin)) as client:
        yield client


def did(obs_id: str, detector: int) -> str:
    return f"ivo://{AUTHORITY}?raw/{obs_id}/{CAMERA.detector(detector).name}"


def sky(detector: int, x: float, y: float) -> tuple[float, float]:
    ra, dec = sky_from_pixel(CAMERA, CAMERA.detector(detector), RA, DEC, ROTATION, x, y)
    return float(ra), float(dec)


def opened(answer: httpx.Response) -> fits.HDUList:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/fits"
    return fits.open(io.BytesIO(answer.content), checksum=True)


def check_pixels(hdu, detector: int) -> tuple[int, int, int, int]:
    """Every pixel is where the header says; returns x0, y0, nx, ny."""
    x0, y0 = round(-hdu.header["LTV1"]), round(-hdu.header["LTV2"])
    ny, nx = hdu.data.shape
    y, x = np.mgrid[y0 : y0 + ny, x0 : x0 + nx]
    assert np.array_equal(hdu.data, pixel_value(x, y, detector))
    # the WCS of the part says the same as camera geometry and pointing
    ra, dec = WCS(hdu.header).all_pix2world(nx / 2, ny / 2, 0)
    px, py = pixel_from_sky(CAMERA, CAMERA.detector(detector), RA, DEC, ROTATION, ra, dec)
    assert math.hypot(float(px) - x0 - nx / 2, float(py) - y0 - ny / 2) < 0.2
    return x0, y0, nx, ny


# cutouts


@pytest.mark.parametrize(("x", "y"), [(500.0, 300.0), (256.0, 512.0), (100.5, 900.25), (767.0, 511.5)])
def test_a_circle_gives_the_pixels_around_it(client, x, y):
    ra, dec = sky(0, x, y)
    answer = client.get("/soda/sync", params={"ID": did(OLD, 0), "CIRCLE": f"{ra} {dec} {100 * PIXEL_DEG}"})
    (hdu,) = opened(answer)
    x0, y0, nx, ny = check_pixels(hdu, 0)
    assert abs(x0 + (nx - 1) / 2 - x) <= 1.5
    assert abs(y0 + (ny - 1) / 2 - y) <= 1.5
    assert 199 <= nx <= 203
    assert 199 <= ny <= 203
    assert hdu.header["OBSID"] == OLD


def test_at_the_edge_only_what_is_there(client):
    ra, dec = sky(3, 5, 1020)
    (hdu,) = opened(
        client.get("/soda/sync", params={"ID": did(OLD, 3), "CIRCLE": f"{ra} {dec} {50 * PIXEL_DEG}"})
    )
    x0, y0, nx, ny = check_pixels(hdu, 3)
    assert (x0, y0 + ny) == (0, 1024)
    assert 50 <= nx <= 60
    assert 50 <= ny <= 60


@pytest.mark.parametrize("shape", ["POLYGON", "POS POLYGON", "POS CIRCLE", "POS RANGE", "none"])
def test_each_shape_holds_what_it_must(client, shape):
    corners = [sky(0, x, y) for x, y in ((200, 300), (400, 300), (400, 450), (200, 450))]
    flat = " ".join(f"{a} {d}" for a, d in corners)
    ra, dec = sky(0, 300, 375)
    ras, decs = zip(*corners, strict=True)
    value = {
        "POLYGON": ("POLYGON", flat),
        "POS POLYGON": ("POS", f"POLYGON {flat}"),
        "POS CIRCLE": ("POS", f"CIRCLE {ra} {dec} {130 * PIXEL_DEG}"),
        "POS RANGE": ("POS", f"RANGE {min(ras)} {max(ras)} {min(decs)} {max(decs)}"),
        "none": ("POL", ""),
    }[shape]
    (hdu,) = opened(client.post("/soda/sync", data={"ID": did(OLD, 0), value[0]: value[1]}))
    x0, y0, nx, ny = check_pixels(hdu, 0)
    assert x0 <= 200
    assert y0 <= 300
    assert x0 + nx > 400
    assert y0 + ny > 450
    if shape == "none":
        assert (x0, y0, nx, ny) == (0, 0, 1024, 1024)
    elif "POLYGON" in shape:
        assert nx <= 204
        assert ny <= 154


def test_several_images_and_shapes_come_in_one_file(client):
    one, other = sky(0, 500, 500), sky(3, 300, 300)
    data = {
        "ID": [did(OLD, 0), did(OLD, 3)],
        "CIRCLE": [f"{ra} {dec} {20 * PIXEL_DEG}" for ra, dec in (one, other)],
    }
    hdus = opened(client.post("/soda/sync", data=data))
    assert [hdu.name for hdu in hdus[1:]] == ["IMAGE_1", "IMAGE_2"]  # the two that overlap, of four
    check_pixels(hdus[1], 0)
    check_pixels(hdus[2], 3)


@pytest.mark.parametrize(
    "more",
    [{"CIRCLE": "10 10 0.1"}, {"POS": "RANGE 10 11 10 11"}, {"POLYGON": "10 10 11 10 11 11"}, {"TIME": "1 2"},
     {"BAND": "1e-3 1"}, {"POL": "I"}],
)  # fmt: skip
def test_nothing_in_common_is_204_and_empty(client, more):
    answer = client.get("/soda/sync", params={"ID": did(OLD, 0)} | more)
    assert (answer.status_code, answer.content) == (204, b"")


def test_time_and_band_that_fit_give_the_image(client):
    mjd = 61364.0
    found = client.get(
        "/soda/sync", params={"ID": did(OLD, 0), "TIME": "-Inf +Inf", "BAND": "6e-7", "CIRCLE": "0 90 1"}
    )
    assert found.status_code == 204
    ra, dec = sky(0, 500, 500)
    circle = f"{ra} {dec} 0.001"
    for more in ({"TIME": f"{mjd - 100} {mjd + 100}"}, {"BAND": "6e-7"}, {"BAND": "-Inf 6e-7"}):
        assert (
            client.get("/soda/sync", params={"ID": did(OLD, 0), "CIRCLE": circle} | more).status_code == 200
        )


@pytest.mark.parametrize(
    ("parameters", "status", "word"),
    [
        ({}, 400, "UsageError"),
        ({"ID": "x", "CIRCLE": "1 2"}, 400, "UsageError"),
        ({"ID": "x", "CIRCLE": "1 2 three"}, 400, "UsageError"),
        ({"ID": "x", "CIRCLE": "1 2 nan"}, 400, "UsageError"),
        ({"ID": "x", "CIRCLE": "400 2 1"}, 400, "UsageError"),
        ({"ID": "x", "CIRCLE": "10 2 -1"}, 400, "UsageError"),
        ({"ID": "x", "POLYGON": "1 2 3 4"}, 400, "UsageError"),
        ({"ID": "x", "POS": "SQUARE 1 2 3"}, 400, "UsageError"),
        ({"ID": "x", "POS": "RANGE 5 4 1 2"}, 400, "UsageError"),
        ({"ID": "x", "TIME": "b a"}, 400, "UsageError"),
        ({"ID": "x", "RESPONSEFORMAT": "image/tiff"}, 400, "UsageError"),
        ({"ID": "x", "CUTOUTDETAIL": "All"}, 400, "UsageError"),
        ({"ID": "raw/../../etc/passwd"}, 404, "UsageError"),
        ({"ID": "ivo://elsewhere?raw/x/y"}, 404, "UsageError"),
        ({"ID": [f"x{i}" for i in range(101)]}, 400, "MultiValuedParamNotSupported"),
    ],
)  # fmt: skip
def test_errors_are_text_that_begins_with_dalis_word(client, parameters, status, word):
    answer = client.post("/soda/sync", data=parameters)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.startswith(f"{word}: ")


def test_a_preview_is_a_picture_with_north_where_the_image_has_it(client):
    import cv2

    ra, dec = sky(0, 500, 500)
    answer = client.get(
        "/soda/sync",
        params={"ID": did(OLD, 0), "CIRCLE": f"{ra} {dec} {30 * PIXEL_DEG}", "RESPONSEFORMAT": "image/png"},
    )
    assert answer.headers["content-type"] == "image/png"
    picture = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert picture.shape[0] in range(59, 64)
    assert (
        picture[0].mean() > picture[-1].mean()
    )  # values grow with y, and the first row of a picture is the top


def test_asynchronous_cutouts_give_a_result_for_each_combination(client):
    ra, dec = sky(0, 500, 500)
    data = {"ID": [did(OLD, 0), did(OLD, 3)], "CIRCLE": f"{ra} {dec} {20 * PIXEL_DEG}", "PHASE": "RUN"}
    url = client.post("/soda/async", data=data).headers["location"]
    ns = "{http://www.ivoa.net/xml/UWS/v1.0}"
    for _ in range(20):
        root = ElementTree.fromstring(client.get(url, params={"WAIT": 5}).content)
        if root.findtext(f"{ns}phase") in ("COMPLETED", "ERROR"):
            break
    assert root.findtext(f"{ns}phase") == "COMPLETED"
    results = {e.get("id"): e.get("{http://www.w3.org/1999/xlink}href") for e in root.find(f"{ns}results")}
    assert list(results) == ["cutout_1", "cutout_2"]
    check_pixels(opened(client.get(results["cutout_1"]))[0], 0)
    assert client.get(results["cutout_2"]).text.startswith("UsageError")


def test_exposures_give_image_variance_and_mask(client, world, tmp_path):
    from cumbre.access.images.catalogue import Image
    from cumbre.payloads.exposure import Exposure
    from cumbre.payloads.exposure_file import save_exposure
    from cumbre.payloads.kernels.wcs import PlaneWcs

    y, x = np.mgrid[0:300, 0:400]
    planes = {"image": (x + 1000 * y).astype(np.float32), "variance": np.full((300, 400), 4.0, np.float32)}
    wcs = PlaneWcs.linear(10.0, 20.0, 199.5, 149.5, [[-PIXEL_DEG, 0], [0, PIXEL_DEG]])
    mask = (x % 3).astype(np.uint16)
    save_exposure(Exposure(**planes, mask=mask, wcs=wcs, psf=None, zero_point=27.0), tmp_path / "e.fits")
    world.access.catalogue.register(
        [Image("calibrated/x/R00_S00", "calibrated", 2, "DemoCam", OLD, 0, "R00_S00", str(tmp_path / "e.fits"), 400, 300,
               begin_tai=0.0)]
    )  # fmt: skip
    data = {"ID": "calibrated/x/R00_S00", "CIRCLE": f"10 20 {10 * PIXEL_DEG}", "CUTOUTDETAIL": "MaskedImage"}
    hdus = opened(client.post("/soda/sync", data=data))
    assert [hdu.name for hdu in hdus[1:]] == ["IMAGE", "VARIANCE", "MASK"]
    x0, y0 = (round(-hdus[1].header[key]) for key in ("LTV1", "LTV2"))
    ny, nx = hdus[1].data.shape
    assert (nx, ny) == (20, 20) or max(nx, ny) <= 22
    assert np.array_equal(hdus[1].data, planes["image"][y0 : y0 + ny, x0 : x0 + nx])
    assert np.array_equal(hdus[3].data, mask[y0 : y0 + ny, x0 : x0 + nx])
    refused = client.post("/soda/sync", data={"ID": did(OLD, 0), "CUTOUTDETAIL": "MaskedImage"})
    assert refused.status_code == 400
    world.database.execute("DELETE FROM access.image WHERE product = 'calibrated'")


# embargo


def test_an_embargoed_image_is_on_no_path(client, insider, world):
    name = CAMERA.detector(0).name
    member = world.headers(world.token("member", "collaboration"))
    ra, dec = sky(0, 500, 500)
    for headers in ({}, member):
        assert client.get("/soda/sync", params={"ID": did(NEW, 0)}, headers=headers).status_code == 404
        assert client.get(f"/files/raw/{NEW}/{name}", headers=headers).status_code == 404
        links = client.get("/datalink/links", params={"ID": did(NEW, 0)}, headers=headers)
        assert "NotFoundFault" in links.text
        assert f"files/raw/{NEW}" not in links.text
        found = client.get("/sia/query", params={"POS": f"CIRCLE {ra} {dec} 1"}, headers=headers)
        assert OLD in found.text
        assert NEW not in found.text
        job = client.post("/soda/async", data={"ID": did(NEW, 0), "PHASE": "RUN"}, headers=headers).headers[
            "location"
        ]
        for _ in range(20):
            text = client.get(job, params={"WAIT": 5}, headers=headers).text
            if "<phase>ERROR" in text:
                break
        assert "<phase>ERROR" in text
    assert insider.get("/soda/sync", params={"ID": did(NEW, 0)}).status_code == 200
    assert insider.get(f"/files/raw/{NEW}/{name}").status_code == 200
    assert NEW in insider.get("/sia/query", params={"POS": f"CIRCLE {ra} {dec} 1"}).text
    assert f"files/raw/{NEW}" in insider.get("/datalink/links", params={"ID": did(NEW, 0)}).text


def test_what_is_absent_and_what_is_secret_look_the_same(client):
    secret = client.get("/soda/sync", params={"ID": did(NEW, 0)})
    absent = client.get("/soda/sync", params={"ID": did("XC_O_20261120_000008", 0)})
    assert secret.status_code == absent.status_code
    assert secret.text.replace(NEW, "") == absent.text.replace("XC_O_20261120_000008", "")


def test_an_image_is_released_when_its_time_has_come(client, world):
    from support.archive_world import AGE_S, NOW_TAI

    catalogue = world.access.catalogue
    embargo_s = world.site.config.retention.embargo_hours * 3600
    due = NOW_TAI - AGE_S[NEW] + embargo_s
    catalogue.move_horizon(due - 1)
    assert client.get("/soda/sync", params={"ID": did(NEW, 3)}).status_code == 404
    catalogue.move_horizon(due + 1)
    assert client.get("/soda/sync", params={"ID": did(NEW, 3)}).status_code == 200
    catalogue.move_horizon(due - 1000)  # nothing is ever taken back
    assert client.get("/soda/sync", params={"ID": did(NEW, 3)}).status_code == 200
    world.database.execute(
        "UPDATE access.horizon SET public_tai = %s, collaboration_tai = %s", (due - 2, due - 2)
    )


@pytest.mark.parametrize(
    "path", ["../../site.yaml", "raw/../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "raw"]
)
def test_files_are_images_only(insider, path):
    assert insider.get(f"/files/{path}").status_code == 404


def test_a_file_comes_whole_and_in_parts(client, world):
    name = CAMERA.detector(0).name
    path = world.site.root / "archive" / "raw" / f"{OLD}_{name}.fits"
    whole = client.get(f"/files/raw/{OLD}/{name}")
    assert whole.content == path.read_bytes()
    part = client.get(f"/files/raw/{OLD}/{name}", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole.content[100:200])


# SIA


def rows(answer) -> list[str]:
    assert answer.status_code == 200, answer.text
    return sorted(parse_single_table(io.BytesIO(answer.content)).array["obs_publisher_did"].tolist())


def test_pyvo_finds_images_and_cuts_them(world):
    with requests.Session() as session:
        session.headers.update(world.headers(world.admin))
        service = pyvo.dal.SIA2Service(f"{world.url}/sia", session=session)
        found = service.search(pos=(*sky(0, 500, 500), 0.01))
        assert sorted(found["obs_publisher_did"]) == sorted(did(obs, 0) for obs in (OLD, NEW))
        # pyvo sends no token with the cutout itself: the released image
        record = next(row for row in found if OLD in row["obs_publisher_did"])
        links = record.getdatalink()
        assert [link.semantics for link in links] == ["#this", "#preview", "#cutout"]
        soda = links.get_first_proc()
        cut = fits.open(io.BytesIO(soda.process(circle=(*sky(0, 500, 500), 20 * PIXEL_DEG)).read()))
        check_pixels(cut[0], 0)


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ({}, True), ({"POS": "CIRCLE 10 10 1"}, False), ({"POS": f"RANGE {RA - 1} {RA + 1} {DEC - 1} {DEC + 1}"}, True),
        ({"POS": f"POLYGON {RA} {DEC - 1} {RA + 1} {DEC} {RA} {DEC + 1} {RA - 1} {DEC}"}, True),
        ({"POS": ["CIRCLE 10 10 1", f"CIRCLE {RA} {DEC} 1"]}, True),  # one or the other
        ({"POS": f"CIRCLE {RA} {DEC} 1", "BAND": "1e-3"}, False),  # both
        ({"BAND": "6e-7"}, True), ({"BAND": "-Inf 5e-7"}, False), ({"BAND": "6e-7 +Inf"}, True), ({"BAND": ["1", "6e-7"]}, True),
        ({"TIME": "60000 +Inf"}, True), ({"TIME": "50000 50001"}, False), ({"TIME": "-Inf +Inf"}, True),
        ({"POL": "I"}, False), ({"FOV": "0 10"}, True), ({"FOV": "20 30"}, False), ({"SPATRES": "0 1"}, False),
        ({"SPECRP": "1 10"}, True), ({"EXPTIME": "30"}, True), ({"EXPTIME": "31 +Inf"}, False), ({"TIMERES": "0 60"}, True),
        ({"COLLECTION": "DemoCam/raw"}, True), ({"COLLECTION": "other"}, False), ({"FACILITY": "Cumbre demonstration"}, True),
        ({"INSTRUMENT": "DemoCam"}, True), ({"INSTRUMENT": ["x", "DemoCam"]}, True), ({"DPTYPE": "image"}, True),
        ({"DPTYPE": "cube"}, False), ({"CALIB": "1"}, True), ({"CALIB": "2"}, False), ({"CALIB": ["2", "1"]}, True),
        ({"TARGET": "M31"}, False), ({"TARGET": "'; DROP TABLE access.image; --"}, False),
        ({"FORMAT": "application/x-votable+xml;content=datalink"}, True), ({"FORMAT": "image/fits"}, False),
        ({"ID": f"ivo://{AUTHORITY}?raw/{OLD}/R00_S00"}, True), ({"ID": "ivo://x?y"}, False), ({"UNKNOWN": "1"}, True),
    ],
)  # fmt: skip
def test_every_parameter_of_sia_is_taken(client, parameters, found):
    assert bool(rows(client.get("/sia/query", params=parameters))) == found
    assert bool(rows(client.post("/sia/query", data=parameters))) == found


@pytest.mark.parametrize(
    "parameters",
    [{"POS": "CIRCLE 1 2"}, {"POS": "1 2 3"}, {"BAND": "2 1"}, {"BAND": "red"}, {"TIME": "nan"}, {"CALIB": "9"},
     {"POL": "Z"}, {"MAXREC": "-1"}, {"POS": ["CIRCLE 1 2 3"] * 201}],
)  # fmt: skip
def test_sia_refuses_in_a_votable(client, parameters):
    answer = client.get("/sia/query", params=parameters)
    assert answer.status_code == 400
    assert 'value="ERROR"' in answer.text


def test_sia_describes_itself_and_says_when_it_cuts(client):
    empty = client.get("/sia/query", params={"MAXREC": "0"})
    table = parse_single_table(io.BytesIO(empty.content))
    assert {"s_region", "access_url", "obs_publisher_did"} <= {field.name for field in table.fields}
    assert len(table.array) == 0
    assert 'value="OVERFLOW"' in client.get("/sia/query", params={"MAXREC": "1"}).text
    assert "ivo://ivoa.net/std/SIA#query-2.0" in client.get("/sia/capabilities").text
    for name, standard in (("soda", "SODA#sync-1.0"), ("datalink", "DataLink#links-1.1")):
        assert standard in client.get(f"/{name}/capabilities").text
        assert "<vosi:available>true" in client.get(f"/{name}/availability").text


# DataLink


def test_links_of_many_images_in_one_request(client):
    wanted = [did(OLD, 0), "ivo://nobody?nothing", did(OLD, 3)] + [f"ivo://nobody?{i}" for i in range(3000)]
    answer = client.post("/datalink/links", data={"ID": wanted})
    assert answer.status_code == 200
    table = parse_single_table(io.BytesIO(answer.content)).array
    assert len(table) == 2 * 3 + 3001
    errors = [text for text in table["error_message"] if text]
    assert len(errors) == 3001
    assert all(text.startswith("NotFoundFault") for text in errors)
    cut = client.post("/datalink/links", data={"ID": wanted, "MAXREC": "5"})
    assert 'value="OVERFLOW"' in cut.text
    assert client.get("/datalink/links").status_code == 200
    assert (
        client.get("/datalink/links", params={"ID": did(OLD, 0), "RESPONSEFORMAT": "csv"}).status_code == 400
    )


@pytest.mark.skipif(
    shutil.which("stilts") is None, reason="no stilts on this machine (Debian: apt-get install stilts)"
)
def test_links_and_tables_pass_the_validators(client, tmp_path):
    links = client.get("/datalink/links", params={"ID": [did(OLD, 0), "ivo://nobody?nothing"]})
    (tmp_path / "links.vot").write_bytes(links.content)
    (tmp_path / "sia.vot").write_bytes(client.get("/sia/query").content)
    for tool, name in (("datalinklint", "links"), ("votlint", "sia"), ("votlint", "links")):
        where = "votable" if tool == "votlint" else "in"
        result = subprocess.run(
            ["stilts", tool, f"{where}={tmp_path}/{name}.vot"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        said = result.stdout + result.stderr
        assert "ERROR" not in said, said


# cone


def test_a_cone_is_what_the_grid_says(client, world):
    ra, dec = grid()
    radius = 2.5 * STEP_DEG
    expected = (np.flatnonzero(separation_deg(RA, DEC, ra, dec) <= radius) + 1).tolist()
    with requests.Session() as session:
        found = pyvo.dal.SCSService(f"{world.url}/cone/level1.DiaObject", session=session).search(
            pos=(RA, DEC), radius=radius
        )
        assert sorted(found["diaObjectId"].tolist()) == expected
        assert found["diaObjectId"][0] == world_centre()
    answer = client.get("/cone", params={"ra": RA, "dec": DEC, "sr": radius})
    table = parse_single_table(io.BytesIO(answer.content))
    ucds = {field.ucd: field.name for field in table.fields}
    assert (ucds["ID_MAIN"], ucds["POS_EQ_RA_MAIN"], ucds["POS_EQ_DEC_MAIN"]) == ("diaObjectId", "ra", "dec")
    counts = []
    for verbosity in (1, 2, 3):
        answer = client.get("/cone", params={"RA": RA, "DEC": DEC, "SR": radius, "VERB": verbosity})
        counts.append(len(parse_single_table(io.BytesIO(answer.content)).fields))
    assert counts[0] <= counts[1] < counts[2]
    empty = client.get("/cone", params={"RA": RA, "DEC": DEC, "SR": 0})
    assert len(parse_single_table(io.BytesIO(empty.content)).array) == 0


def world_centre() -> int:
    ra, dec = grid()
    return int(separation_deg(RA, DEC, ra, dec).argmin()) + 1


@pytest.mark.parametrize(
    "parameters",
    [{"RA": "1", "DEC": "2"}, {"RA": "x", "DEC": "2", "SR": "1"}, {"RA": "1", "DEC": "91", "SR": "1"},
     {"RA": "1", "DEC": "2", "SR": "181"}, {"RA": "nan", "DEC": "2", "SR": "1"}, {"RA": "1", "DEC": "2", "SR": "1", "VERB": "7"}],
)  # fmt: skip
def test_a_wrong_cone_says_so_as_the_standard_wants(client, parameters):
    answer = client.get("/cone", params=parameters)
    assert answer.status_code == 400
    infos = [e for e in ElementTree.fromstring(answer.content).iter(f"{VO}INFO") if e.get("name") == "Error"]
    assert len(infos) == 1
    assert client.get("/cone/ledger.hop", params={"RA": "1", "DEC": "2", "SR": "1"}).status_code == 400
    assert client.get("/cone/no.table", params={"RA": "1", "DEC": "2", "SR": "1"}).status_code == 404


def test_detectors_of_the_world_are_two(world):
    found = world.database.execute("SELECT count(*) FROM access.image WHERE product = 'raw'")
    assert found == [(2 * len(DETECTORS),)]
