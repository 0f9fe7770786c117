"""``cumbre process-missed``: do the images that prompt processing left for later."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site


@click.command("process-missed")
@site_option
@click.option("--list", "only_list", is_flag=True, help="Show them, with reason and state; do nothing.")
@click.option("--again", is_flag=True, help="Those that failed, too.")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Worker processes; 0: this process.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def process_missed(folder: Path, only_list: bool, again: bool, workers: int, as_json: bool) -> None:
    """Process images that were dropped, ended, left out, caught up, or failed for a passing reason.

    A running site does them by itself when `prompt.missed.when` is `idle` or `daytime`. Each image is stored
    once, whoever does it. Exit code 1: some of them failed.

    \b
    Examples:
      cumbre process-missed --site ./site --list
      cumbre process-missed --site ./site --workers 2
    """
    from cumbre.orchestration import missed
    from cumbre.orchestration.engine import ComputeEngine, DaskEngine, InlineEngine
    from cumbre.orchestration.jobs import JobStore
    from cumbre.orchestration.prompt_jobs import WORKER
    from cumbre.site.roles import open_site_bus, open_site_clock, site_database

    site = Site.load(folder)
    db = site_database(site)
    JobStore(db)  # its tables may not be there yet
    if only_list:
        rows = missed.missed_images(db)
        if as_json:
            print_json(rows)
        for row in [] if as_json else rows:
            end = f": {row['outcome']} {row['message']}".rstrip() if row["outcome"] else ""
            click.echo(f"{row['obs_id']} {row['detector']:3d}  {row['reason']}, {row['state']}{end}")
        return
    owner = f"process-missed-{socket.gethostname()}-{os.getpid()}"
    engine: ComputeEngine = InlineEngine()
    if workers:
        engine = DaskEngine(
            n_workers=workers, warm_up=f"{WORKER}:warm_up", warm_payload={"site": str(site.root)}
        )
    outcomes: dict[str, int] = {}
    failed = 0
    try:
        for item in missed.process_missed(
            bus=open_site_bus(site, owner), clock=open_site_clock(site), db=db, engine=engine, owner=owner,
            again=again,
        ):  # fmt: skip
            word = "ok" if item.result.is_success else item.result.outcome
            outcomes[word] = outcomes.get(word, 0) + 1
            failed += item.state == "failed"
            if not as_json:
                image = item.job.payload["image"]
                click.echo(f"{image['obs_id']} {image['detector']:3d}  {word} {item.result.message}".rstrip())
    finally:
        engine.close()
    if as_json:
        print_json({"outcomes": outcomes, "left": JobStore(db).count_waiting("prompt.missed")})
    elif not outcomes:
        click.echo("nothing is missed")
    if failed:
        raise click.exceptions.Exit(1)
