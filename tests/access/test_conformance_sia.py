"""SIA 2.0 (REC 2015-12-23), one test for each sentence that binds a service; its section stands in the docstring.

The world has two images of one exposure that everybody may see, in the r band, near (53.1, -27.8).
"""

from __future__ import annotations

import io

import pytest
from astropy.io.votable import parse, parse_single_table
from astropy.time import Time

from support.archive_world import AGE_S, AUTHORITY, DEC, NOW_TAI, OLD, RA
from support.conformance import INFO, capability, fields_of, infos, votable_root

DID = f"ivo://{AUTHORITY}?raw/{OLD}/R00_S00"
BEGIN = float(Time((NOW_TAI - AGE_S[OLD]) / 86400 + 40587, format="mjd", scale="tai").utc.mjd)
OBSCORE = {
    "dataproduct_type", "calib_level", "obs_collection", "obs_id", "obs_publisher_did", "access_url", "access_format",
    "access_estsize", "target_name", "s_ra", "s_dec", "s_fov", "s_region", "s_xel1", "s_xel2", "s_resolution", "t_min",
    "t_max", "t_exptime", "t_resolution", "t_xel", "em_min", "em_max", "em_res_power", "em_xel", "o_ucd", "pol_states",
    "pol_xel", "facility_name", "instrument_name",
}  # fmt: skip


def ask(client, **parameters):
    answer = client.get("/sia/query", params=parameters)
    assert answer.status_code == 200, answer.text
    return parse_single_table(io.BytesIO(answer.content)).array


def count(client, **parameters) -> int:
    return len(ask(client, **parameters))


def test_get_and_post_are_the_same(client):
    """2.1: parameters may be sent by GET or by POST."""
    got = client.get("/sia/query", params={"CALIB": 1, "POS": f"CIRCLE {RA} {DEC} 1"})
    posted = client.post("/sia/query", data={"CALIB": 1, "POS": f"CIRCLE {RA} {DEC} 1"})
    found = [
        parse_single_table(io.BytesIO(answer.content)).array["obs_id"].tolist() for answer in (got, posted)
    ]
    assert found[0] == found[1] == [OLD, OLD]


def test_no_parameter_is_needed(client):
    """2.1: a request may have none of the parameters."""
    assert count(client) == 2


def test_values_are_alternatives_and_parameters_must_all_hold(client):
    """2.1: occurrences of one parameter are combined by OR, different parameters by AND."""
    assert count(client, INSTRUMENT=["Other", "DemoCam"]) == 2
    assert count(client, INSTRUMENT=["Other", "DemoCam"], CALIB="3") == 0


def test_names_of_parameters_in_any_case_and_unknown_ones(client):
    """2.1 with DALI 3: names are the same in capital and small letters; what a service does not know is left out."""
    assert count(client, Instrument="Other") == 0
    assert count(client, nonsense="1") == 2


@pytest.mark.parametrize(
    ("name", "value"), [("POL", "I"), ("SPATRES", "-Inf +Inf"), ("SPATRES", "1"), ("TARGET", "M31")]
)
def test_what_is_not_known_satisfies_nothing(client, name, value):
    """2.1: where the metadata is null the constraint is not satisfied."""
    assert count(client, **{name: value}) == 0


@pytest.mark.parametrize(("value", "found"), [
    ("30 60", 2), ("30", 2), ("30 30", 2), ("0 30", 2), ("30 +Inf", 2), ("-Inf 30", 2), ("-Inf +Inf", 2), ("31 +Inf", 0),
    ("-Inf 29", 0),
])  # fmt: skip
def test_intervals_hold_their_ends_and_may_be_open(client, value, found):
    """2.1: one number or two, ±Inf where open, and the boundary belongs to the interval."""
    assert count(client, EXPTIME=value) == found


def test_texts_are_compared_exactly(client):
    """2.1: texts are case-sensitive and match exactly."""
    assert count(client, INSTRUMENT="democam") == 0
    assert count(client, INSTRUMENT="Demo") == 0
    assert count(client, INSTRUMENT="Demo%") == 0


def test_identifiers_are_the_same_in_any_case(client):
    """2.1.10: identifiers are compared case-insensitively."""
    assert [count(client, ID=text) for text in (DID, DID.upper(), DID.lower(), DID[:-1])] == [1, 1, 1, 0]


@pytest.mark.parametrize(("pos", "found"), [
    (f"CIRCLE {RA} {DEC} 0.5", 2), ("CIRCLE 12.0 34.0 0.5", 0),
    (f"RANGE {RA - 1} {RA + 1} {DEC - 1} {DEC + 1}", 2), ("RANGE 12.0 12.5 34.0 36.0", 0),
    (f"POLYGON {RA - 1} {DEC - 1} {RA + 1} {DEC - 1} {RA + 1} {DEC + 1} {RA - 1} {DEC + 1}", 2),
    (f"POLYGON {RA - 1} {DEC + 1} {RA + 1} {DEC + 1} {RA + 1} {DEC - 1} {RA - 1} {DEC - 1}", 2),
    ("POLYGON 12.0 34.0 14.0 35.0 14. 36.0 12.0 35.0", 0),
    ("RANGE 0 360.0 -2.0 2.0", 0), ("RANGE 0 360.0 -28.5 -27.5", 2), ("RANGE 0 360.0 89.0 +Inf", 0),
    ("RANGE 0 360 -Inf 0", 2),
    ("RANGE -Inf +Inf -Inf +Inf", 2), ("RANGE 0 360 -90 90", 2), ("RANGE 60 360 -90 90", 0),
])  # fmt: skip
def test_each_shape_of_pos_and_the_examples_of_the_text(client, pos, found):
    """2.1.1: CIRCLE, RANGE and POLYGON that intersect s_region, ranges open at an end, a band, a pole, the whole sky."""
    assert count(client, POS=pos) == found


def test_a_point_is_a_range_too(client):
    """2.1.1: boundary values belong to a range, so it may be a line or a point."""
    row = ask(client, ID=DID)[0]
    ra, dec = float(row["s_ra"]), float(row["s_dec"])
    assert ask(client, POS=f"RANGE {ra} {ra} {dec} {dec}")["obs_publisher_did"].tolist() == [DID]
    assert DID in ask(client, POS=f"RANGE {ra} {ra} {dec - 1} {dec + 1}")["obs_publisher_did"].tolist()
    assert count(client, POS=f"RANGE {ra - 3} {ra - 3} {dec} {dec}") == 0


def test_wavelengths_are_metres_of_air_or_vacuum_as_they_are(client):
    """2.1.2: BAND in metres intersects [em_min, em_max]; one number is a wavelength that the image holds."""
    row = ask(client)[0]
    low, high = float(row["em_min"]), float(row["em_max"])
    assert 5e-7 < low < high < 8e-7
    for value, found in (
        (f"{low / 2} {low}", 2), (f"{high} {high * 2}", 2), (f"{(low + high) / 2}", 2), (f"-Inf {low * 0.99}", 0),
        (f"{high * 1.01} +Inf", 0), ("300 +Inf", 0), ("-Inf 0.21", 2), ("0.21", 0),
    ):  # fmt: skip
        assert count(client, BAND=value) == found, value


def test_times_are_mjd_in_utc(client):
    """2.1.3: TIME is MJD, days, UTC, and intersects [t_min, t_max]."""
    row = ask(client)[0]
    second = 1 / 86400
    assert abs(float(row["t_min"]) - BEGIN) < 1e-3 * second
    assert abs(float(row["t_max"]) - BEGIN - 30 * second) < 1e-3 * second
    assert count(client, TIME=f"{BEGIN + second}") == 2
    assert count(client, TIME=f"-Inf {BEGIN - second}") == 0
    assert count(client, TIME=f"{BEGIN + 29 * second} +Inf") == 2
    assert count(client, TIME=f"{BEGIN + 31 * second} +Inf") == 0  # in TAI it would be one of them


@pytest.mark.parametrize(("name", "inside", "outside"), [
    ("FOV", "0.01 5", "20 +Inf"), ("SPECRP", "1 100", "1000 +Inf"), ("TIMERES", "-Inf 30", "-Inf 1.0"),
    ("COLLECTION", "DemoCam/raw", "raw"), ("FACILITY", "Cumbre demonstration", "Cumbre"), ("DPTYPE", "image", "cube"),
    ("CALIB", "1", "2"), ("FORMAT", "application/x-votable+xml;content=datalink", "application/fits"),
])  # fmt: skip
def test_each_other_parameter_chooses(client, name, inside, outside):
    """2.1.5 to 2.1.17: every parameter must be supported: compared with the column that it belongs to."""
    assert count(client, **{name: inside}) == 2
    assert count(client, **{name: outside}) == 0


def test_truncated_answers_say_so_and_none_is_metadata(client):
    """2.1.18: an answer cut by the limit tells OVERFLOW; MAXREC=0 gives the columns and no record."""
    cut = votable_root(client.get("/sia/query", params={"MAXREC": 1}))
    assert infos(cut)["QUERY_STATUS"] == "OVERFLOW"
    empty = client.get("/sia/query", params={"MAXREC": 0})
    assert len(parse_single_table(io.BytesIO(empty.content)).array) == 0
    assert set(fields_of(votable_root(empty))) >= OBSCORE


def test_answers_are_votables_with_all_columns_of_obscore(client):
    """3.1: VOTable unless asked otherwise, with the required fields of ObsCore, their utypes and UCDs, from RESOURCE results."""
    answer = client.get("/sia/query")
    assert answer.headers["content-type"].startswith(("application/x-votable+xml", "text/xml"))
    root = votable_root(answer)
    fields = fields_of(root)
    assert set(fields) >= OBSCORE
    for name in OBSCORE - {"pol_xel", "t_xel", "em_xel", "s_xel1", "s_xel2"}:
        assert fields[name].get("utype", "").lower().startswith("obscore:"), name
    assert fields["s_ra"].get("ucd") == "pos.eq.ra"
    assert fields["em_min"].get("unit") == "m"
    assert next(e.get("type") for e in root if e.tag.endswith("RESOURCE")) == "results"
    for row in parse_single_table(io.BytesIO(answer.content)).array:
        for name in (
            "dataproduct_type",
            "calib_level",
            "obs_collection",
            "obs_id",
            "obs_publisher_did",
            "facility_name",
        ):
            assert row[name] not in ("", None), name
        assert row["dataproduct_type"] in ("image", "cube")


def test_an_answer_tells_of_the_links_and_of_itself(client):
    """3.1.1, 3.1.2: a descriptor of DataLink by obs_publisher_did, and one named "this" of the search, in every answer."""
    document = parse(io.BytesIO(client.get("/sia/query").content))
    described = {}
    for resource in document.resources:
        values = {param.name: str(param.value) for param in resource.params}
        described[values.get("standardID", "").lower()] = resource
    assert any("datalink" in key for key in described)
    mine = described["ivo://ivoa.net/std/sia#query-2.0"]
    assert mine.name == "this"
    names = {entry.name for entry in mine.groups[0].entries}
    assert {"POS", "BAND", "TIME", "POL", "FOV", "SPATRES", "SPECRP", "EXPTIME", "TIMERES", "ID", "COLLECTION", "FACILITY",
            "INSTRUMENT", "DPTYPE", "CALIB", "TARGET", "FORMAT", "MAXREC"} <= names  # fmt: skip


def test_links_have_the_media_type_of_links(client):
    """3.1.3: an access_url of DataLink has its media type as access_format, and works."""
    row = ask(client)[0]
    assert row["access_format"] == "application/x-votable+xml;content=datalink"
    assert client.get(row["access_url"]).headers["content-type"] == row["access_format"]


@pytest.mark.parametrize("wrong", [
    {"POS": "SQUARE 1 2 3"}, {"POS": "CIRCLE 1 2"}, {"POS": "CIRCLE 400 0 1"}, {"POS": "CIRCLE 0 91 1"},
    {"POS": "POLYGON 1 2 3 4"},
    {"BAND": "-2 -3"}, {"TIME": "today"}, {"POL": "Z"}, {"CALIB": "high"}, {"MAXREC": "many"}, {"RESPONSEFORMAT": "image/gif"},
])  # fmt: skip
def test_errors_are_votables_that_begin_with_the_word(client, wrong):
    """3.2: the document is a VOTable with QUERY_STATUS ERROR, its text begins with UsageFault and a colon."""
    answer = client.get("/sia/query", params=wrong)
    assert answer.status_code == 400
    info = next(e for e in votable_root(answer).iter(INFO) if e.get("name") == "QUERY_STATUS")
    assert info.get("value") == "ERROR"
    assert info.text.startswith("UsageFault: ")


def test_who_asks_for_text_gets_errors_as_text(client):
    """3.2: with a plain text format the error is text/plain too."""
    for form in ("csv", "text/csv", "tsv"):
        answer = client.get("/sia/query", params={"POS": "here", "RESPONSEFORMAT": form})
        assert answer.headers["content-type"].startswith("text/plain")
        assert answer.text.startswith("UsageFault: ")
    assert client.get("/sia/query", params={"RESPONSEFORMAT": "csv"}).text.count(OLD) >= 2


def test_capabilities_and_availability_are_beside_the_query(client):
    """2.2, 2.3: both VOSI resources; the capability with its standardID; siblings of the query."""
    interface = capability(client, "sia", "ivo://ivoa.net/std/SIA#query-2.0")
    assert interface.url.rsplit("/", 1)[0] == f"{str(client.base_url).rstrip('/')}/sia"
    assert client.get(interface.url, params={"MAXREC": 0}).status_code == 200
