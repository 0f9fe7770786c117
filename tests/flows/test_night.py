"""Whole nights: real services as real processes, the simulator's sky, the report against the truth."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

CUMBRE = Path(sys.executable).parent / "cumbre"
DETECTORS = 4


def night(root, *words):
    return subprocess.run(
        [CUMBRE, "night", "--site", root, *map(str, words)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def report_of(result):
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    last = result.stdout.rstrip().splitlines()[-1]
    assert last.startswith("night report: ")
    page = Path(last.removeprefix("night report: "))
    assert page.read_text().startswith("<!doctype html>")
    return json.loads(page.with_name("night.json").read_text())


def running_below(root):
    return [p for p in psutil.process_iter(["cmdline"]) if str(root) in " ".join(p.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("night") / "site"
    yield root
    subprocess.run([CUMBRE, "down", "--site", root], check=False, capture_output=True, timeout=60)
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.timeout(700)
def test_a_night_loses_nothing_and_finds_what_changed(site):
    data = report_of(night(site, "--fresh", "--seed", 11, "--visits", 3))
    assert data["images_taken"] == data["verified_base"] == data["verified_archive"] == 3
    assert data["lost"] == 0
    assert data["processed"] == 3 * DETECTORS, data["outcomes"]
    assert data["alerts"] > 0
    assert data["n_truth"] >= 10
    assert data["completeness"] >= 0.85  # a few dozen sources: the demonstration itself must reach 0.9
    assert data["purity"] >= 0.8
    assert data["latency_s"]["p50"] > 0
    assert {"late", "wall_s", "hops", "outcomes"} <= set(data)
    counts = {row["hop"]: row["count"] for row in data["hops"]}
    for hop in (
        "written",
        "at_base",
        "base_tape",
        "at_archive",
        "archive_tape",
        "ingested_oods",
        "ingested_embargo",
    ):
        assert counts[hop] == 3 * DETECTORS, hop
    assert running_below(site) == []


@pytest.mark.timeout(700)
def test_every_service_may_be_killed_once(site):
    """The next night of the same site: each service process is killed with SIGKILL while images are taken."""
    data = report_of(night(site, "--visits", 5, "--faults", "each", "--seed", 12))
    assert len(data["faults"]) >= 18
    assert all("killed" in fault for fault in data["faults"])
    assert data["lost"] == 0
    assert data["images_taken"] == data["verified_base"] == data["verified_archive"] >= 3 + 4
    assert data["processed"] == data["images_taken"] * DETECTORS, data["outcomes"]
    assert running_below(site) == []
