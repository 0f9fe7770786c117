"""STILTS taplint, the Virtual Observatory's own judge: no error and no failure in any stage."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

STAGES = {
    "TMV", "TME", "TMS", "TMC", "CPV", "CAP", "AVV", "QGE", "QPO", "QAS", "UWS", "MDQ", "OBS", "LOC", "UPL", "EXA",
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    shutil.which("stilts") is None, reason="no stilts on this machine (Debian: apt-get install stilts)"
)


@pytest.fixture(scope="module")
def world_with_a_plan(world):
    world.database.execute(
        "INSERT INTO access.plan (plan_id, group_id, announced_tai, start_tai, duration_s, exposures, instrument, survey,"
        " filter, ra, \"dec\", rotation, region, fov_deg, em_min, em_max) VALUES ('DemoCam-1', 'later', 1.79e9, 1.79e9, 30, 1,"
        " 'DemoCam', 'T1', 'r_demo', 53, -27, 0, '{53,-27,53,-26,52,-26}', 1, 5.5e-7, 7e-7)"
    )
    return world


@pytest.mark.timeout(960)
def test_taplint_has_nothing_to_complain_of(world_with_a_plan):
    command = ["stilts", "taplint", f"tapurl={world_with_a_plan.url}/tap", "report=EF", "format=json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    report = json.loads(result.stdout)
    found = [
        f"{section['code']} {item['level']} {item['code']}: {item.get('text', '')}"
        for section in report["sections"]
        for item in section["reports"]
    ]
    assert found == []
    assert {section["code"] for section in report["sections"]} >= STAGES
    assert report["totals"]["ERROR"] == report["totals"]["FAILURE"] == 0
