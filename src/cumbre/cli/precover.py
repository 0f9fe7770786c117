"""``cumbre precover``: forced photometry of new objects on the images of the weeks before."""

from __future__ import annotations

from pathlib import Path

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site


@click.command()
@site_option
@click.option("--days", type=click.FloatRange(min=0), default=30.0, show_default=True, help="How far back.")
@click.option("--limit", type=click.IntRange(min=1), default=200, show_default=True, help="Objects at most.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def precover(folder: Path, days: float, limit: int, as_json: bool) -> None:
    """Measure new objects on past images, the longest waiting first: work for the day after a night.

    \b
    Examples:
      cumbre precover --site ./site
      cumbre precover --site ./site --days 10 --limit 1000
    """
    from cumbre.orchestration.precovery import Precovery
    from cumbre.site.roles import open_site_clock, site_database

    site = Site.load(folder)
    done = Precovery(site.root, site_database(site), open_site_clock(site), days=days).run(limit)
    if as_json:
        print_json(done)
        return
    click.echo(
        f"{done['objects']} objects done, {done['again']} to be tried again; "
        f"{done['images']} images, {done['forced']} measurements"
    )
