"""The command as a person types it: help, exit codes, clear errors on one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cumbre.cli.main import VERBS
from cumbre.core.errors import UserError
from cumbre.site.night import Fault, parse_faults
from cumbre.site.profiles import create_site
from cumbre.site.roles import roles_of

CUMBRE = Path(sys.executable).parent / "cumbre"


def run(*words, **options):
    return subprocess.run(
        [CUMBRE, *map(str, words)], capture_output=True, text=True, timeout=120, check=False, **options
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb):
    from click.testing import CliRunner

    from cumbre.cli.main import cli

    result = CliRunner().invoke(cli, [verb, "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output or "Commands:" in result.output
    assert f"cumbre {verb}" in result.output or "Commands:" in result.output


def test_help_lists_the_verbs_quickly():
    result = run("--help")
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in VERBS)


def test_no_site_is_not_found_and_says_what_to_do(tmp_path):
    result = run("status", "--site", tmp_path)
    assert result.returncode == 3
    assert "cumbre init" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_site_that_is_down_is_an_exit_code_and_json(tmp_path):
    assert run("init", tmp_path / "s").returncode == 0
    result = run("status", "--site", tmp_path / "s", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["up"] is False
    again = run("init", tmp_path / "s")
    assert again.returncode == 1
    assert "already" in again.stderr


def test_a_folder_with_other_things_is_never_deleted(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = run("night", "--fresh", "--site", tmp_path)
    assert result.returncode == 2
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_faults_are_read_and_drawn_from_the_seed(tmp_path):
    site = create_site(tmp_path / "s")
    assert parse_faults("kill:camera@0.5", site, 1) == [Fault("kill", "camera", 0.5)]
    assert parse_faults("kill:writer@0.5", site, 1)[0].target in ("writer-1", "writer-2")
    assert parse_faults("random", site, 4) == parse_faults("random", site, 4)
    assert len(parse_faults("random,down:base-archive", site, 4)) == 5
    each = parse_faults("each", site, 4)
    assert {fault.target for fault in each} == {*roles_of(site), "postgres", "worker"}
    assert all(0 < fault.at < 1 for fault in each)
    for wrong in ("kill:cook", "explode:writer", "kill:writer@noon"):
        with pytest.raises(UserError, match="expected"):
            parse_faults(wrong, site, 1)
