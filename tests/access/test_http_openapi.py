"""What the description of the HTTP face promises is what it does, whatever a machine makes of it."""

from __future__ import annotations

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

ACCESS = {"anonymous_per_minute": 10**6, "sync_s": 5.0}
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance)
GENTLE = settings(
    max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate, Phase.reuse], derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip


def test_answers_are_those_that_are_described(world):
    face = schemathesis.openapi.from_url(f"{world.url}/openapi.json")
    tried = 0
    for found in face.get_all_operations():

        @GENTLE
        @given(case=found.ok().as_strategy())
        def check(case):
            case.call_and_validate(checks=list(CHECKS))

        check()
        tried += 1
    assert tried > 25


def test_every_route_of_data_is_described(world):
    paths = httpx.get(f"{world.url}/openapi.json").json()["paths"]
    known = {path.replace("{", "").replace("}", "").split("/")[1] for path in paths}
    served = {route.path.split("/")[1] for route in world.access.service.routes()}
    assert served - known <= {"openapi.json", "hipslist"}


def test_required_parameters_are_required(world, client):
    """Without any parameter each operation that needs one refuses."""
    paths = client.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        if "{" in path or "get" not in methods:
            continue
        needs = any(item["required"] for item in methods["get"]["parameters"])
        status = client.get(path, follow_redirects=True).status_code
        assert (status == 400) is needs, (path, status)
