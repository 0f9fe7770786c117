"""The tutorial "your own camera in ten minutes" does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from cumbre.cli.instrument import instrument as command

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "your-own-camera.md"


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, page):
    """A folder with the page's files; the frames are made."""
    folder = tmp_path_factory.mktemp("camera")
    for name, text in re.findall(r"^```(?:python|yaml) (\S+)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        (folder / name).write_text(text)
    subprocess.run([sys.executable, "make_frames.py"], cwd=folder, check=True)
    return folder


def shown(page, command_line):
    """Output lines of each time the page shows a command."""
    blocks = re.findall(r"^```console\n\$ (.*?)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return [text.splitlines() for line, text in blocks if line.startswith(command_line)]


def check(folder, monkeypatch):
    monkeypatch.chdir(folder)
    frames = sorted(path.name for path in folder.glob("hill_*.fits"))
    return CliRunner().invoke(command, ["check", "--instrument", "hilltop.yaml", *frames])


def test_the_page_step_by_step(folder, page, monkeypatch):
    before, after = shown(page, "cumbre instrument check")
    run = check(folder, monkeypatch)
    assert run.exit_code == 1
    lines = run.output.splitlines()
    assert (lines[0], lines[-1]) == (before[0], before[-1])

    description = yaml.safe_load((folder / "hilltop.yaml").read_text())
    description |= yaml.safe_load((folder / "hilltop-rules.yaml").read_text())
    (folder / "hilltop.yaml").write_text(yaml.safe_dump(description))
    # A description is read once a process; the reader's next command is another process.
    from cumbre.core.instrument import load_instrument

    load_instrument.cache_clear()
    run = check(folder, monkeypatch)
    assert run.exit_code == 0
    assert run.output.splitlines() == after

    (wanted,) = shown(page, "python to_repository.py")
    done = subprocess.run(
        [sys.executable, "to_repository.py"], cwd=folder, check=True, capture_output=True, text=True
    )
    assert sorted(done.stdout.splitlines()) == wanted

    butler = Path(sys.executable).with_name("butler")
    query = [butler, "query-dimension-records", "repository", "exposure", "--where", "instrument='Hilltop'"]
    environment = os.environ | {"CUMBRE_INSTRUMENTS": str(folder)}
    listed = subprocess.run(query, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    assert "HT_O_20260314_000001" in listed.stdout
