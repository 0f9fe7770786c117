"""The benchmark's verb, its peers and its floors; the benchmark itself takes minutes of rendering."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cumbre.cli.benchmark import benchmark
from cumbre.site import alert_benchmark

SCRIPT = Path(alert_benchmark.__file__).parents[1] / "cli" / "benchmark_peers.py"


def peer(*arguments: str) -> object:
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_help_tells_what_is_measured() -> None:
    answer = CliRunner().invoke(benchmark, ["alerts", "--help"])
    assert answer.exit_code == 0
    assert "4096 x 4096" in answer.output
    assert "--peers-python" in answer.output


def test_peers_are_named_and_absent_ones_said_to_be(tmp_path: Path) -> None:
    names = peer("list")
    assert isinstance(names, list)
    assert {"astroscrappy (cosmic rays)", "SWarp (one plane)"} <= set(names)
    if importlib.util.find_spec("astroscrappy") is not None:
        pytest.skip("astroscrappy is installed here")
    assert peer("astroscrappy (cosmic rays)", str(tmp_path)) == "not installed"


def test_the_steps_are_functions_that_are_there():
    for step in alert_benchmark.STEPS:
        for module, function in step.places:
            assert callable(getattr(importlib.import_module(module), function)), (
                f"{step.name}: {module}.{function}"
            )


def test_floors_are_bytes_and_operations() -> None:
    floors = alert_benchmark.floors({"bytes_per_s": 16e9, "operations_per_s": 50e9})
    (isr,) = [step for step in alert_benchmark.STEPS if step.name == "ISR"]
    assert floors["ISR"] == pytest.approx(4096**2 * (isr.bytes_px / 16e9 + isr.operations_px / 50e9))
    assert floors["difference"] > floors["warp template"] > 0


def test_publishing_puts_each_packet_on_the_topic(tmp_path: Path) -> None:
    from cumbre.bus import open_bus
    from cumbre.core.time import Clock

    assert alert_benchmark.publish_s([b"one", b"two"], tmp_path) >= 0
    bus = open_bus(f"sqlite:///{(tmp_path / 'benchmark-bus.db').resolve()}", identity="t", clock=Clock.real())
    assert [m.payload for m in bus.replay(["Alerts.packet"], start_offset=0)] == [b"one", b"two"]
    bus.close()
