"""``cumbre night``: the main job, a simulated night from shutter to alert."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cumbre.cli.main import print_json
from cumbre.core.configuration import Site
from cumbre.core.errors import UserError

if TYPE_CHECKING:
    from cumbre.site.night import NightState


@click.command()
@click.option("--site", "folder", type=click.Path(path_type=Path), default=Path("night-site"), show_default=True,
              help="Folder of the site; made when it is not there.")  # fmt: skip
@click.option("--seed", default=1, show_default=True, help="Seed of the sky, the weather and the faults.")
@click.option(
    "--visits", default=8, show_default=True, help="Visits of the night.", type=click.IntRange(1, 2000)
)
@click.option("--rate", default=6.0, show_default=True, help="Night seconds per real second.")
@click.option("--instrument", default="democam", show_default=True, help="Shipped name or .yaml file.")
@click.option(
    "--faults", default="", help="kill:SERVICE[@PART], down:LINK[@PART], random, each; comma separated."
)
@click.option("--keep", is_flag=True, help="Leave the site up and print its address.")
@click.option("--fresh", is_flag=True, help="Begin with a new simulated site in the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print night.json before the last line.")
def night(
    folder: Path,
    seed: int,
    visits: int,
    rate: float,
    instrument: str,
    faults: str,
    keep: bool,
    fresh: bool,
    as_json: bool,
) -> None:
    """Run one simulated night with real services as processes, and write the night report.

    The exit code is 0 only if no image was lost.

    \b
    Examples:
      cumbre night --visits 4
      cumbre night --seed 7 --faults kill:writer,down:base-archive
      cumbre night --keep
    """
    from cumbre.site import night as nights
    from cumbre.site.orbits import load_simulated
    from cumbre.site.preparation import prepare
    from cumbre.site.profiles import create_site
    from cumbre.site.report import write_report
    from cumbre.site.supervisor import read_state, start_detached, stop_site

    started = time.monotonic()
    if fresh:
        nights.demonstration_folder(folder)
    if (folder / "site.yaml").exists():
        site = Site.load(folder)
    else:
        site = create_site(folder, instrument=instrument, seed=seed, rate=rate)
    if site.config.simulator is None:
        raise UserError(f"{folder}: not a simulated site; a real camera's files enter by: cumbre ingest")
    plan = nights.parse_faults(faults, site, seed)
    snaps = site.config.scheduler.snaps
    screen = Screen(visits * snaps)
    screen.say(f"site {site.root}, seed {site.config.simulator.seed}, {_of(visits, snaps)}")
    prepare(site, screen.say)
    nights.set_clock(site)
    was_up = read_state(site) is not None
    screen.say("starting the services")
    if not was_up:
        start_detached(site)
    try:
        nights.wait_ready(site)
        if loaded := load_simulated(site):
            screen.say(f"{loaded[0]} known asteroids")
        screen.say(f"services ready after {time.monotonic() - started:.0f} s; the night begins")
        earlier = len(nights.daq_images(site))
        nights.begin(site, visits)
        with screen:
            state = nights.watch(site, visits, plan, screen.show, earlier=earlier)
        report = write_report(site, faults=state.faults, started_mono=started)
    finally:
        if not keep and not was_up:
            stop_site(site)
    if as_json:
        print_json(report.data)
    for line in report.lines:
        click.echo(line)
    if keep:
        click.echo(f"the site stays up: {(site.root / 'run' / 'web.url').read_text().strip()}")
        click.echo(f"stop it with: cumbre down --site {folder}")
    click.echo(f"night report: {report.path}")
    if report.data["lost"]:
        raise click.exceptions.Exit(1)


def _of(visits: int, snaps: int) -> str:
    return f"{visits} visits" + (f" of {snaps} exposures" if snaps > 1 else "")


class Screen:
    """Live progress in a terminal, one line a change elsewhere."""

    HOPS = (
        ("read out", "read_out"),
        ("written", "written"),
        ("base", "at_base"),
        ("archive", "at_archive"),
        ("tape", "archive_tape"),
        ("Butler", "ingested_embargo"),
        ("processed", "processed"),
    )

    def __init__(self, images: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(file=sys.stdout)
        self.live = self.console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"), console=self.console,
        )  # fmt: skip
        self.bars = {"night": self.progress.add_task("night", total=images, note="")}
        self.last = ""
        self.begun = time.monotonic()

    def __enter__(self) -> Screen:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.progress.stop()

    def say(self, text: str) -> None:
        """One line."""
        click.echo(f"[{time.monotonic() - self.begun:5.1f} s] {text}")

    def show(self, state: NightState) -> None:
        """The state of the night."""
        lag = "" if state.lag_s is None else f"lag {state.lag_s:.0f} s (night time)"
        if not self.live:
            counts = ", ".join(f"{label} {state.hops.get(hop, 0)}" for label, hop in self.HOPS)
            line = (
                f"images {state.taken - state.earlier}/{state.images}; {counts}; alerts {state.alerts}; {lag}"
            )
            if line != self.last:
                self.say(line + (f"; {state.message}" if state.message else ""))
                self.last, state.message = line, ""
            return
        self.progress.update(
            self.bars["night"],
            completed=state.taken - state.earlier,
            note=f"alerts {state.alerts} {lag} {state.message}",
        )
        for label, hop in self.HOPS:
            if label not in self.bars:
                self.bars[label] = self.progress.add_task(label, total=state.expected, note="")
            self.progress.update(self.bars[label], completed=state.hops.get(hop, 0))
