"""Whatever is sent, the answer is an answer: no fault of the service, never a secret, and it goes on serving."""

from __future__ import annotations

import urllib.parse

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.archive_world import NEW, OLD

ACCESS = {"anonymous_per_minute": 10**6, "sync_s": 5.0}
NAMES = [
    "QUERY", "LANG", "REQUEST", "RESPONSEFORMAT", "FORMAT", "MAXREC", "UPLOAD", "RUNID", "PHASE", "WAIT", "LAST", "AFTER", "RA",
    "DEC", "SR", "VERB", "POS", "CIRCLE", "POLYGON", "BAND", "TIME", "POL", "FOV", "ID", "CALIB", "TARGET", "DETAIL", "ACTION",
    "CUTOUTDETAIL", "EXECUTIONDURATION", "DESTRUCTION",
]  # fmt: skip
WORDS = [
    "", "0", "-1", "1e400", "nan", "CIRCLE 1 2 3", "CIRCLE 0 90 180", "RANGE -Inf +Inf -Inf +Inf", "POLYGON 0 0 0 0 0 0",
    "ADQL", "csv",
    "SELECT TOP 3 * FROM level1.DiaObject", "SELECT * FROM ivoa.obscore", "SELECT 1/0 FROM level1.DiaObject", "t,param:QUERY",
    f"ivo://cumbre.local?raw/{OLD}/R00_S00",
    f"ivo://cumbre.local?raw/{NEW}/R00_S00",
    "' OR '1'='1", "\x00", "\ud7ff", "%s%s%n", "RUN",
    "ABORT", "DELETE", "2026-11-21T00:00:00Z", "9999999999999999999999", "votable/td", "fits", "parquet", "image/png",
    "../../site.yaml",
]  # fmt: skip
PATHS = [
    "/tap/sync", "/tap/async", "/tap/tables", "/tap/tables/x", "/tap/capabilities", "/tap/availability", "/tap/examples", "/cone",
    "/cone/level1.DiaSource", "/sia/query", "/sia/capabilities", "/soda/sync", "/soda/async", "/datalink/links", "/files/raw/x/y",
    "/tap/async/0123456789abcdef0123", "/tap/async/x/results/y", "/tap", "/soda", "/datalink",
]  # fmt: skip
texts = st.one_of(st.sampled_from(WORDS), st.text(max_size=40))
quiet = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, (answer.status_code, answer.request.url, answer.text[:500])
    if answer.headers.get("content-type", "").startswith(
        ("text/", "application/x-votable", "application/json")
    ):
        assert "Traceback" not in answer.text
        assert "postgresql://" not in answer.text


@quiet
@given(st.sampled_from(PATHS), st.lists(st.tuples(st.sampled_from(NAMES), texts), max_size=5), st.booleans())
def test_any_parameters(client, path, pairs, post):
    coded = urllib.parse.urlencode([(k, v.encode("utf-8", "surrogatepass")) for k, v in pairs])
    if post:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        check(client.post(path, content=coded, headers=form))
    else:
        check(client.get(f"{path}?{coded}"))


@quiet
@given(
    st.sampled_from(PATHS), st.binary(max_size=300),
    st.sampled_from(["multipart/form-data; boundary=b", "multipart/form-data",
     "application/x-www-form-urlencoded", "text/xml", ""]),
)  # fmt: skip
def test_any_body(client, path, body, kind):
    check(client.post(path, content=body, headers={"Content-Type": kind}))


@quiet
@given(
    st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), max_size=80),
    st.sampled_from(["Bearer ", "Basic ", "Digest ", ""]),
)
def test_any_authorization(client, text, scheme):
    answer = client.get("/tap/availability", headers={"Authorization": (scheme + text).strip()})
    assert answer.status_code in (200, 401)
    if scheme and text:
        assert answer.status_code == 401


@quiet
@given(st.binary(max_size=400), st.sampled_from([b"", b"<VOTABLE>", b"SIMPLE  = ", b"PAR1", b"a,b\n"]))
def test_any_upload(client, body, head):
    answer = client.post(
        "/tap/sync", data={"QUERY": "SELECT * FROM TAP_UPLOAD.t", "UPLOAD": "t,param:f", "RESPONSEFORMAT": "csv"},
        files={"f": ("x", head + body)},
    )  # fmt: skip
    check(answer)


@pytest.mark.parametrize(
    "path", ["/tap/async/%00", "/tap/tables/%00", "/cone/%00", "/files/%00", "/soda/async/x/results/%00"]
)
def test_nul_in_a_path_is_404(client, path):
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    "path", ["/tap/async", "/soda/async", "/tap/sync", "/soda/sync", "/sia/query", "/datalink/links"]
)
def test_nul_in_a_parameter_is_400(client, path):
    assert client.post(path, data={"QUERY": "SELECT 1", "ID": "x\0y"}).status_code == 400
    assert client.post(path, data={"A\0": "x"}).status_code == 400


def test_no_secret_came_out_and_it_still_serves(client, world):
    for path in PATHS:
        answer = client.get(
            path,
            params={"ID": f"ivo://cumbre.local?raw/{NEW}/R00_S00", "QUERY": "SELECT * FROM ivoa.obscore"},
        )
        assert f"files/raw/{NEW}" not in answer.text
    answer = client.post(
        "/tap/sync", data={"QUERY": "SELECT COUNT(*) AS n FROM level1.DiaObject", "RESPONSEFORMAT": "csv"}
    )
    assert answer.text.split() == ["n", "441"]
    assert world.database.execute("SELECT count(*) FROM access.token") == [(1,)]
