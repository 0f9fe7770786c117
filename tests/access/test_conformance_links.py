"""DataLink 1.1 (REC 2023-12-15), one test for each sentence that binds a service; its section stands in the docstring."""

from __future__ import annotations

from itertools import groupby

import pytest

from support.archive_world import AUTHORITY, NEW, OLD
from support.conformance import INFO, VO, capability, fields_of, infos, votable_root

COLUMNS = {
    "ID": ("char", "meta.id;meta.main"), "access_url": ("char", "meta.ref.url"), "service_def": ("char", "meta.ref"),
    "error_message": ("char", "meta.code.error"), "description": ("char", "meta.note"), "semantics": ("char", "meta.code"),
    "content_type": ("char", "meta.code.mime"), "content_length": ("long", "phys.size;meta.file"),
    "content_qualifier": ("char", "meta.code"), "link_auth": ("char", "meta.code"), "link_authorized": ("boolean", "meta.code"),
}  # fmt: skip


@pytest.fixture(scope="module")
def dids(world) -> list[str]:
    rows = world.database.execute(
        "SELECT image_id FROM access.image WHERE obs_id = %s ORDER BY image_id", (OLD,)
    )
    return [f"ivo://{AUTHORITY}?{image_id}" for (image_id,) in rows]


def rows_of(answer) -> list[dict[str, str]]:
    assert answer.status_code == 200, answer.text
    root = votable_root(answer)
    names = list(fields_of(root))
    return [
        dict(zip(names, (cell.text or "" for cell in row), strict=True)) for row in root.iter(f"{VO}TR")
    ]  # fmt: skip


def test_many_identifiers_by_get_or_post(client, dids):
    """2.1.1: ID may occur many times; GET and POST; each gets at least one row, one after the other."""
    wanted = [dids[1], "ivo://nobody?x", dids[0]]
    for answer in (
        client.get("/datalink/links", params={"ID": wanted}),
        client.post("/datalink/links", data={"ID": wanted}),
    ):
        found = rows_of(answer)
        assert [key for key, _ in groupby(row["ID"] for row in found)] == wanted


def test_links_of_one_identifier_are_not_cut(client, dids):
    """2.1.1: more than the service takes: OVERFLOW, but never between the links of one identifier."""
    whole = rows_of(client.get("/datalink/links", params={"ID": dids}))
    each = len(whole) // len(dids)
    for most in range(1, len(whole) + 1):
        answer = client.get("/datalink/links", params={"ID": dids, "MAXREC": most})
        assert len(rows_of(answer)) % each == 0
        assert (infos(votable_root(answer))["QUERY_STATUS"] == "OVERFLOW") == (most < len(whole))


def test_no_identifier_is_a_normal_answer(client):
    """2.1.1: without ID the answer is a normal one, with no rows."""
    answer = client.get("/datalink/links")
    assert rows_of(answer) == []
    assert infos(votable_root(answer))["QUERY_STATUS"] == "OK"


def test_formats(client, dids):
    """2.1.2, 4.1: VOTable in TABLEDATA with a media type of VOTable; what is not known is refused."""
    for form in ({}, {"RESPONSEFORMAT": "votable"}, {"RESPONSEFORMAT": "application/x-votable+xml"}):
        answer = client.get("/datalink/links", params={"ID": dids[0]} | form)
        assert answer.headers["content-type"].startswith(("application/x-votable+xml", "text/xml"))
        assert next(votable_root(answer).iter(f"{VO}TABLEDATA")) is not None
    assert client.get("/datalink/links", params={"ID": dids[0], "RESPONSEFORMAT": "fits"}).status_code == 400


def test_the_capability(client):
    """2.2, 2.4: the endpoint as vs:ParamHTTP, beside both VOSI resources."""
    interface = capability(client, "datalink", "ivo://ivoa.net/std/DataLink#links-1.1")
    assert interface.kind == "vs:ParamHTTP"
    assert rows_of(client.get(interface.url)) == []


def test_columns_have_the_types_of_the_table(client):
    """3.2: all fields with their types, UCDs and units."""
    fields = fields_of(votable_root(client.get("/datalink/links")))
    assert {name: (field.get("datatype"), field.get("ucd")) for name, field in fields.items()} == COLUMNS
    assert fields["content_length"].get("unit") == "byte"
    assert fields["ID"].get("ID")


def test_each_row_is_a_link_a_service_or_an_error(client, dids):
    """3.2: exactly one of access_url, service_def, error_message; semantics always, as a relative URI; links work."""
    for row in rows_of(client.get("/datalink/links", params={"ID": [*dids, "ivo://nobody?x"]})):
        assert sum(bool(row[name]) for name in ("access_url", "service_def", "error_message")) == 1
        assert row["semantics"].startswith("#")
        assert row["link_auth"] in ("", "false", "optional", "true")
        if row["access_url"]:
            with client.stream("GET", row["access_url"]) as answer:
                assert answer.status_code == 200
                assert answer.headers["content-type"].partition(";")[0] == row["content_type"]
                if row["content_length"]:
                    assert int(answer.headers["content-length"]) == int(row["content_length"])


def test_errors_of_an_identifier_are_rows(client):
    """3.2.4, 4.2: an error of one ID is a row with its ID, beginning with a fault's word; embargoed ones look absent."""
    wanted = ["ivo://nobody?x", f"ivo://{AUTHORITY}?raw/{NEW}/R00_S00"]
    found = rows_of(client.get("/datalink/links", params={"ID": wanted}))
    assert [row["ID"] for row in found] == wanted
    assert all(row["error_message"].startswith("NotFoundFault: ") for row in found)


def test_errors_of_the_request_are_votables(client):
    """4.2: the document of an error is a VOTable, its text begins with a fault's word."""
    for wrong in ({"RESPONSEFORMAT": "fits"}, {"MAXREC": "x"}):
        answer = client.get("/datalink/links", params=wrong)
        info = next(e for e in votable_root(answer).iter(INFO) if e.get("name") == "QUERY_STATUS")
        assert (answer.status_code, info.get("value")) == (400, "ERROR")
        assert info.text.startswith("UsageFault: ")


def test_the_document_tells_that_it_is_a_table_of_links(client, dids):
    """4.1.1: RESOURCE results with the INFO standardID."""
    root = votable_root(client.get("/datalink/links", params={"ID": dids[0]}))
    (results,) = [e for e in root.findall(f"{VO}RESOURCE") if e.get("type") == "results"]
    told = {item.get("name"): item.get("value") for item in results.findall(INFO)}
    assert told["standardID"].lower() == "ivo://ivoa.net/std/datalink#links-1.1"


def test_services_are_described_as_they_can_be_called(client, dids):
    """5.1 to 5.3: each service_def names a descriptor with standardID, accessURL, inputParams; ID refers to the column."""
    root = votable_root(client.get("/datalink/links", params={"ID": dids[0]}))
    named = {row["service_def"] for row in rows_of(client.get("/datalink/links", params={"ID": dids[0]}))} - {
        ""
    }
    described = {e.get("ID"): e for e in root.findall(f"{VO}RESOURCE") if e.get("type") == "meta"}
    assert named <= set(described)
    assert named
    column = fields_of(root)["ID"].get("ID")
    for resource in described.values():
        assert resource.get("utype") == "adhoc:service"
        told = {item.get("name"): item.get("value") for item in resource.findall(f"{VO}PARAM")}
        name = told["standardID"].partition("#")[2].partition("-")[0]
        assert told["accessURL"] == capability(client, "soda", told["standardID"]).url
        assert told["accessURL"].endswith(name)
        group = resource.find(f"{VO}GROUP")
        assert group.get("name") == "inputParams"
        inputs = {item.get("name"): item for item in group}
        assert inputs["ID"].get("ref") == column
        assert {"POS", "CIRCLE", "POLYGON", "BAND", "TIME"} <= set(inputs)
