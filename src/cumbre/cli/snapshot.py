"""``cumbre snapshot``: Level 1 of a day in Parquet."""

from __future__ import annotations

from pathlib import Path

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site


@click.command()
@site_option
@click.option("--list", "only_list", is_flag=True, help="List those that are there, make none.")
@click.option("--verify", "check", is_flag=True, help="Read every byte of those that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def snapshot(folder: Path, only_list: bool, check: bool, as_json: bool) -> None:
    """Make today's snapshot of Level 1: what is public now, as the schema `snapshot`.

    A site makes one by itself each day, when no image has come for half an hour of the night's clock. It never
    changes; the newest seven are kept, also as `snapshot_YYYYMMDD`.

    \b
    Examples:
      cumbre snapshot --site ./site
      cumbre snapshot --site ./site --list --json
      cumbre snapshot --site ./site --verify
    """
    from dataclasses import asdict

    from cumbre.access.snapshots import FOLDER, Snapshots, verify
    from cumbre.site.roles import open_site_clock, site_database

    loaded = Site.load(folder)
    where = loaded.path(FOLDER)
    snapshots = Snapshots(site_database(loaded), where, open_site_clock(loaded))
    found = snapshots.all() if only_list or check else [snapshots.make()]
    wrong = [line for one in found for line in verify(where / str(one.day_obs))] if check else []
    if as_json:
        print_json({"snapshots": [asdict(one) for one in found], "wrong": wrong})
    else:
        for one in found:
            rows = ", ".join(f"{part.name} {part.rows:,}" for part in one.tables)
            click.echo(f"{one.schema}: {rows}")
        for line in wrong:
            click.echo(line, err=True)
    if wrong:
        raise SystemExit(1)
