"""``cumbre chaos`` as an operator runs it, for a few seconds of faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cumbre.core.configuration import Site
from cumbre.simulator.faults import mounted_below
from cumbre.site.proof import prove, taken_images

CUMBRE = Path(sys.executable).parent / "cumbre"


def chaos(*words, timeout=60):
    return subprocess.run(
        [CUMBRE, "chaos", *map(str, words)], capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.timeout(600)
def test_a_short_run_loses_nothing_and_says_what_it_did(tmp_path):
    root = tmp_path / "site"
    done = chaos("--minutes", 0.3, "--seed", 5, "--site", root, "--json", timeout=560)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    data = json.loads(done.stdout)  # progress goes elsewhere: the object is all there is
    assert data["images_taken"] > 0
    assert data["images_taken"] == data["verified_base"] == data["verified_archive"]
    assert (data["lost"], data["duplicated"]) == (0, 0)
    assert sum(data["faults"].values()) >= 1
    assert data["worst_catch_up_s"] >= 0
    journal = [json.loads(line) for line in Path(data["journal"]).read_text().splitlines()]
    begun = [entry["kind"] for entry in journal if entry["event"] == "begin"]
    assert {kind: begun.count(kind) for kind in begun} == data["faults"]
    assert {"t_s", "utc", "target"} <= journal[0].keys()
    # the site stays, on its own disk, with everything in it
    assert mounted_below(root) == []
    site = Site.load(root)
    assert len(taken_images(site)) == data["images_taken"]
    assert prove(site).ok


def test_the_plan_can_be_seen_before(tmp_path):
    first, second = (
        chaos("--plan", "--minutes", 2, "--seed", 9, "--site", tmp_path / "site") for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    plan = [json.loads(line) for line in first.stdout.splitlines()]
    assert len(plan) > 10
    assert all(0 <= fault["at_s"] <= 120 for fault in plan)


def test_a_real_observatory_is_left_alone(tmp_path):
    from cumbre.site.profiles import create_site

    create_site(tmp_path / "site", simulated=False)
    done = chaos("--minutes", 0.1, "--site", tmp_path / "site")
    assert done.returncode == 2
    assert "not a simulated site" in done.stderr
