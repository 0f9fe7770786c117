"""SODA 1.0 (REC 2017-05-17), one test for each sentence that binds a service; its section stands in the docstring."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import pytest
from astropy.io import fits
from astropy.time import Time

from cumbre.core.geometry import sky_from_pixel
from cumbre.core.instrument import load_instrument
from support.archive_world import AGE_S, AUTHORITY, DEC, NOW_TAI, OLD, RA, ROTATION
from support.conformance import UWS, XLINK, capability

CAMERA = load_instrument("democam")
BEGIN = float(Time((NOW_TAI - AGE_S[OLD]) / 86400 + 40587, format="mjd", scale="tai").utc.mjd)
SECOND = 1 / 86400
WORDS = (
    "Error", "AuthenticationError", "AuthorizationError", "ServiceUnavailable", "UsageError",
    "MultiValuedParamNotSupported",
)  # fmt: skip


def did(detector: int) -> str:
    return f"ivo://{AUTHORITY}?raw/{OLD}/{CAMERA.detector(detector).name}"


def sky(detector: int, x: float, y: float) -> tuple[float, float]:
    ra, dec = sky_from_pixel(CAMERA, CAMERA.detector(detector), RA, DEC, ROTATION, x, y)
    return float(ra), float(dec)


def around(detector: int = 0, pixels: float = 20.0) -> str:
    ra, dec = sky(detector, 500, 500)
    return f"{ra} {dec} {pixels * 0.6 / 3600}"


def shapes(answer) -> list[tuple[int, ...]]:
    assert answer.status_code == 200, answer.text
    with fits.open(io.BytesIO(answer.content)) as file:
        return [hdu.data.shape for hdu in file if hdu.data is not None]


def run(client, **data) -> dict[str, str]:
    """Results of a job, by name."""
    made = client.post("/soda/async", data=data | {"PHASE": "RUN"})
    assert made.status_code == 303, made.text
    for _ in range(12):
        root = ElementTree.fromstring(client.get(made.headers["location"], params={"WAIT": 5}).content)
        if root.findtext(f"{UWS}phase") not in ("QUEUED", "EXECUTING"):
            break
    assert root.findtext(f"{UWS}phase") == "COMPLETED"
    return {item.get("id"): item.get(f"{XLINK}href") for item in root.find(f"{UWS}results")}


def test_both_resources_are_in_the_capabilities_with_one_segment_each(client):
    """2.1, 2.2, 2.5: standardIDs of sync and async; names of one segment beside the capabilities."""
    for word in ("sync", "async"):
        interface = capability(client, "soda", f"ivo://ivoa.net/std/SODA#{word}-1.0")
        assert interface.url == f"{str(client.base_url).rstrip('/')}/soda/{word}"
        assert (interface.kind, interface.role, interface.version) == ("vs:ParamHTTP", "std", "1.0")


def test_get_and_post_are_the_same(client):
    """2.1 with DALI-sync: parameters by GET or POST; their names in any case."""
    asked = {"ID": did(0), "CIRCLE": around()}
    small = {name.lower(): value for name, value in asked.items()}
    contents = [client.get("/soda/sync", params=asked), client.post("/soda/sync", data=asked),
                client.get("/soda/sync", params=small)]  # fmt: skip
    assert len({answer.content for answer in contents}) == 1
    assert shapes(contents[0])


def test_identifiers_are_taken_as_they_were_given(client):
    """3.2.1: the ID of a search is used as it is; without ID there is nothing to do."""
    from astropy.io.votable import parse_single_table

    found = parse_single_table(io.BytesIO(client.get("/sia/query").content)).array["obs_publisher_did"]
    assert len(found) == 2
    for text in found:
        assert shapes(client.get("/soda/sync", params={"ID": text}))
    missing = client.get("/soda/sync", params={"CIRCLE": around()})
    assert (missing.status_code, missing.text.partition(":")[0]) == (400, "UsageError")


@pytest.mark.parametrize("name", ["CIRCLE", "POLYGON"])
def test_each_region_is_the_same_in_pos(client, name):
    """3.3.1 to 3.3.3: CIRCLE and POLYGON give what POS with these words gives; POS knows all three words."""
    corners = [sky(0, x, y) for x, y in ((400, 400), (450, 400), (450, 460), (400, 460))]
    value = {"CIRCLE": around(), "POLYGON": " ".join(f"{a} {d}" for a, d in corners)}[name]
    one = client.get("/soda/sync", params={"ID": did(0), name: value})
    other = client.get("/soda/sync", params={"ID": did(0), "POS": f"{name} {value}"})
    assert shapes(one)
    assert one.content == other.content


@pytest.mark.parametrize(("value", "status"), [
    (f"RANGE {RA - 1} {RA + 1} {DEC - 1} {DEC + 1}", 200), ("RANGE 12 14 34 36", 204), ("RANGE 0 360 -2 2", 204),
    ("RANGE 0 360 89 90", 204), ("RANGE -Inf +Inf -Inf 0", 200), ("RANGE 0 360 -90 +Inf", 200),
])  # fmt: skip
def test_ranges_may_be_open(client, value, status):
    """3.3.1: RANGE with ±Inf where it is open; a band, a pole."""
    assert client.get("/soda/sync", params={"ID": did(0), "POS": value}).status_code == status


@pytest.mark.parametrize(("name", "value", "status"), [
    ("BAND", "5e-7 8e-7", 200), ("BAND", "-Inf 3e-7", 204), ("BAND", "7.5e-7 +Inf", 204), ("BAND", "6.2e-7 6.2e-7", 200),
    ("TIME", "55100.0 +Inf", 200), ("TIME", "55123.456 55123.466", 204), ("TIME", f"{BEGIN + SECOND} {BEGIN + SECOND}", 200),
    ("TIME", f"{BEGIN + 31 * SECOND} {BEGIN + 60 * SECOND}", 204), ("TIME", f"-Inf {BEGIN - SECOND}", 204),
])  # fmt: skip
def test_band_and_time_are_intervals_of_metres_and_of_mjd_in_utc(client, name, value, status):
    """3.3.4, 3.3.5: closed or open intervals; TIME in UTC."""
    answer = client.get("/soda/sync", params={"ID": did(0), "CIRCLE": around(), name: value})
    assert answer.status_code == status


def test_several_polarizations_are_one_filter(client):
    """3.1, 3.3.6: POL may have many values at once and as a job, and they never multiply the results."""
    states = {"ID": did(0), "POL": ["I", "Q", "U"]}
    assert (
        client.get("/soda/sync", params=states).status_code == 204
    )  # the image has no state of polarization
    (only,) = run(client, **states).values()
    assert client.get(only).text.startswith("UsageError")


def test_success_is_200_with_the_media_type(client):
    """5.1: status 200, the format that was asked for or the default, its media type in the header."""
    asked = {"ID": did(0), "CIRCLE": around()}
    for more, mime in (({}, "application/fits"), ({"RESPONSEFORMAT": "image/png"}, "image/png")):
        answer = client.get("/soda/sync", params=asked | more)
        assert (answer.status_code, answer.headers["content-type"]) == (200, mime)


def test_no_pixel_is_204_without_a_body(client):
    """5.1: where the region holds no pixel the answer is 204 with nothing in it."""
    answer = client.get("/soda/sync", params={"ID": did(0), "CIRCLE": "12 34 0.5"})
    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize(("parameters", "word"), [
    ({"CIRCLE": "1 2"}, "UsageError"), ({"CIRCLE": "1 2 3 4"}, "UsageError"), ({"POLYGON": "1 2 3 4"}, "UsageError"),
    ({"POS": "BOX 1 2 3 4"}, "UsageError"), ({"BAND": "red"}, "UsageError"), ({"TIME": "2 1"}, "UsageError"),
    ({"ID": "ivo://other?x"}, "UsageError"), ({"RESPONSEFORMAT": "image/gif"}, "UsageError"),
    ({"CIRCLE": [f"1 {number} 1" for number in range(-50, 51)]}, "MultiValuedParamNotSupported"),
    ({"BAND": ["1 2"] * 11, "TIME": ["1 2"] * 11}, "MultiValuedParamNotSupported"),
])  # fmt: skip
def test_errors_are_text_that_begins_with_a_word_of_the_list(client, parameters, word):
    """3.1, 5.2: text/plain, beginning with one of six words; too many values have a word of their own."""
    answer = client.post("/soda/sync", data={"ID": did(0)} | parameters)
    assert 400 <= answer.status_code < 500
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.partition(":")[0] == word
    assert word in WORDS


def test_a_token_that_is_none_is_an_authentication_error(client):
    """5.2: who shows a wrong token is told AuthenticationError."""
    answer = client.get("/soda/sync", params={"ID": did(0)}, headers={"Authorization": "Bearer nothing"})
    assert (answer.status_code, answer.text.partition(":")[0]) == (401, "AuthenticationError")


def test_a_job_has_a_result_for_each_combination(client):
    """6: two regions and two intervals of BAND are four results; an empty one is text that begins with a word of the list."""
    results = run(client, ID=did(0), CIRCLE=[around(), "12 34 0.5"], BAND=["5e-7 8e-7", "1 2"])
    assert len(results) == 4
    answers = [client.get(url) for url in results.values()]
    assert [a.headers["content-type"].partition(";")[0] for a in answers].count("application/fits") == 1
    empty = [answer for answer in answers if answer.headers["content-type"].startswith("text/plain")]
    assert len(empty) == 3
    assert all(answer.text.startswith(WORDS) for answer in empty)


def test_values_at_once_are_combined_in_the_same_way(client):
    """3.1: this service takes many values at once: what overlaps comes in one file, an extension each."""
    asked = {
        "ID": [did(0), did(3)],
        "CIRCLE": [around(0), around(3)],
        "TIME": ["0 1", f"{BEGIN} {BEGIN + SECOND}"],
    }
    assert len(shapes(client.post("/soda/sync", data=asked))) == 2
