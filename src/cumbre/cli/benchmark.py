"""``cumbre benchmark``: figures of speed that anyone can repeat."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from cumbre.cli.main import print_json


@click.group()
def benchmark() -> None:
    """Measure this machine with our code.

    \b
    Examples:
      cumbre benchmark alerts
      cumbre benchmark alerts --field crowded --json
      cumbre benchmark access --rows 10_000_000 --work /tmp/bench
    """


@benchmark.command()
@click.option(
    "--rows",
    type=lambda text: int(str(text).replace("_", "")),
    default="1_000_000",
    show_default=True,
    help="Rows of the catalogue.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the data [default: temporary].",
)
@click.option(
    "--outlines", type=click.IntRange(1), help="Images in ivoa.obscore [default: a tenth of the rows]."
)
@click.option(
    "--clients", type=click.IntRange(1, 2000), default=200, show_default=True, help="People at once."
)
@click.option(
    "--big", type=click.IntRange(0, 50), default=4, show_default=True, help="Of them, those who ask for much."
)
@click.option("--seconds", type=float, default=20.0, show_default=True, help="How long they ask.")
@click.option("--peer", help="Address of another TAP service with the same rows (benchmarks/dachs.rd).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def access(
    rows: int, work: Path | None, outlines: int | None, clients: int, big: int, seconds: float, peer: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Queries over HTTP beside the bare engines, cutouts, jobs, and many clients at once.

    The first run makes the data, 250 MB and 20 seconds for each million rows; with --work later runs take them from
    there. Figures: milliseconds, rows a second and processor seconds of service and database.

    \b
    Examples:
      cumbre benchmark access
      cumbre benchmark access --rows 10_000_000 --work /tmp/bench --seconds 600 --json
      cumbre benchmark access --work /tmp/bench --peer http://127.0.0.1:8080/tap
    """
    from cumbre.site.access_benchmark import WANTED, run

    def tell(name: str, value: dict[str, Any]) -> None:
        told = ", ".join(f"{k} {v:,}" if isinstance(v, int | float) else f"{k} {v}" for k, v in value.items())
        wanted = f"   [wanted: {WANTED[name]}]" if name in WANTED else ""
        click.echo(f"{name:26s} {told}{wanted}", err=as_json)

    with tempfile.TemporaryDirectory(prefix="cumbre-bench-") as temporary:
        figures = run(
            (work or Path(temporary)).resolve(), rows, outlines=outlines or max(rows // 10, 1), clients=clients, big=big,
            seconds=seconds, peer=peer, tell=tell,
        )  # fmt: skip
    if as_json:
        print_json(figures)


@benchmark.command()
@click.option("--field", type=click.Choice(["ordinary", "crowded"]), default="ordinary", show_default=True)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of rendered images [default: temporary].",
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes at once."
)
@click.option(
    "--peers/--no-peers", default=True, show_default=True, help="Other programs on the same pixels."
)
@click.option(
    "--peers-python", type=click.Path(path_type=Path, dir_okay=False), help="Interpreter that has the peers."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def alerts(
    field: str, cache: Path | None, workers: int, peers: bool, peers_python: Path | None, as_json: bool
) -> None:
    """From one raw file of 4096 x 4096 pixels to alerts on a topic: processor seconds by step, memory, peers.

    The first run renders the images, some minutes; with --cache later runs take them from there. Peers that are not
    installed are named so; `uv sync --group peers` (or pip install --group peers, best into an environment of its own,
    named with --peers-python) and `apt install source-extractor swarp` bring them.

    \b
    Examples:
      cumbre benchmark alerts --cache /tmp/bench
      cumbre benchmark alerts --cache /tmp/bench --workers 2 --no-peers --json
    """
    from cumbre.site.alert_benchmark import run

    with tempfile.TemporaryDirectory(prefix="cumbre-bench-") as temporary:
        scratch = Path(temporary)
        answers = run(cache or scratch / "images", field, scratch=scratch if peers else None, workers=workers)
        figures = answers[0]
        if workers > 1:
            figures["workers"] = workers
            figures["cpu_s_each"] = [answer["cpu_s"] for answer in answers]
            figures["rss_mb_each"] = [answer["rss_mb"] for answer in answers]
        figures["peers"] = _peers(scratch, peers_python) if peers else {}
    if as_json:
        print_json(figures)
        return
    _print(figures)


def _peers(scratch: Path, interpreter: Path | None) -> dict[str, Any]:
    """Run the peers one after another, each in a process of its own."""
    import json

    script = Path(__file__).with_name("benchmark_peers.py")
    out: dict[str, Any] = {}
    for name in json.loads(subprocess.check_output([sys.executable, "-P", str(script), "list"], text=True)):
        # -P: names of our modules beside the script must not hide those of the library
        command = [str(interpreter or sys.executable), "-P", str(script), name, str(scratch)]
        from cumbre.site.alert_benchmark import environment

        try:
            done = subprocess.run(
                command, env=environment(), capture_output=True, text=True, timeout=900, check=False
            )
        except subprocess.TimeoutExpired:
            out[name] = "more than 900 s"
            continue
        lines = done.stdout.strip().splitlines()
        reason = (done.stderr.strip().splitlines() or ["ended without an answer"])[-1]
        out[name] = json.loads(lines[-1]) if done.returncode == 0 and lines else f"failed: {reason}"
    return out


def _print(figures: dict[str, Any]) -> None:
    width = min(shutil.get_terminal_size().columns, 100)
    click.echo(f"{figures['machine']}, load {figures['load']}; one thread; field: {figures['field']}")
    click.echo(f"{'step':32s}{'CPU s':>9s}{'floor s':>9s}{'ratio':>8s}")
    for name, seconds in figures["steps"].items():
        floor = figures["floors"].get(name, 0.0)
        ratio = f"{seconds / floor:8.1f}" if floor > 0.0005 else f"{'':8s}"
        click.echo(f"{name:32s}{seconds:9.3f}{floor:9.3f}{ratio}")
    total = sum(figures["floors"].values())
    click.echo(
        f"{'all':32s}{figures['cpu_s']:9.3f}{total:9.3f}{figures['cpu_s'] / total:8.1f}   wanted < 5 s"
    )
    click.echo(f"{'publish on an embedded topic':32s}{figures['publish_s']:9.3f}")
    if figures.get("cpu_s_each"):
        click.echo(f"{figures['workers']} at once: {figures['cpu_s_each']} s CPU each")
    click.echo("-" * min(width, 58))
    for name in (
        "rss_mb",
        "alerts_per_s",
        "packet_bytes",
        "detections",
        "sources",
        "alerts",
        "forced",
        "raw_bytes",
    ):
        click.echo(f"{name:32s}{figures[name]:9d}")
    for name, value in figures["peers"].items():
        click.echo(f"peer {name:36s}" + (f"{value:9.2f} s" if isinstance(value, int | float) else str(value)))
