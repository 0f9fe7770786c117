"""``cumbre chaos`` as an operator runs it, for a few seconds of faults."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from cumbre.core.configuration import Site
from cumbre.core.time import Clock
from cumbre.simulator.faults import Fault, FaultInjector, drop_disks, mounted_below
from cumbre.site.chaos import chaos_site
from cumbre.site.chaos_causing import Causing, Journal
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


def test_a_fault_that_cannot_end_before_another_waits_for_it(tmp_path):
    """The clock cannot be written back while the disk is full, and the disk is emptied all the same."""
    site = chaos_site(tmp_path / "site", 1, 1)
    try:
        if not site.root.is_mount():
            pytest.skip("disks of their own need root")
        before = Clock(1.8e9, 0.0, 4.0)
        before.save(site.clock_path)
        over = []
        journal = Journal(site.root / "chaos/faults.jsonl", lambda text: None)
        injector = FaultInjector(site, pids=dict, chance=random.Random(1))
        causing = Causing(injector, journal, lambda: over.append(1))
        plan = [
            Fault(0.0, "clock_step", "camera", 0.3, {"step_s": 50.0}),
            Fault(0.1, "disk_full", "site", 1.0),
        ]
        causing.run(plan, 1.0)
        assert len(over) == 2
        assert Clock.load(site.clock_path) == before
        told = [json.loads(line) for line in journal.path.read_text().splitlines()]
        ends = [entry["kind"] for entry in told if entry["event"] == "end"]
        assert ends == ["disk_full", "clock_step"]
    finally:
        drop_disks(tmp_path / "site")


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
