"""``cumbre orbits``: the catalogue of known solar-system objects, and the nights made of it."""

from __future__ import annotations

from pathlib import Path

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site


@click.group()
def orbits() -> None:
    """Load orbits of known objects, and integrate them to a night.

    \b
    Examples:
      cumbre orbits load --site ./site MPCORB.DAT.gz
      cumbre orbits night --site ./site 20261121
    """


@orbits.command()
@click.argument("file", type=click.Path(path_type=Path))
@site_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def load(file: Path, folder: Path, as_json: bool) -> None:
    """Replace the catalogue by FILE: MPCORB.DAT or the Center's JSON of orbits, also compressed (.gz)."""
    from cumbre.site.orbits import load_orbits

    count, version = load_orbits(Site.load(folder), file)
    if as_json:
        print_json({"orbits": count, "version": version})
    else:
        click.echo(f"{count} orbits, version {version} of the catalogue")


@orbits.command()
@click.argument("day_obs", type=int, required=False)
@site_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def night(day_obs: int | None, folder: Path, as_json: bool) -> None:
    """Integrate all orbits to the night DAY_OBS (YYYYMMDD; the present one by default) ahead of it.

    The first image of a night does it otherwise; a million orbits take about twenty seconds.
    """
    from cumbre.core.time import day_obs_from_tai
    from cumbre.site.orbits import make_night
    from cumbre.site.roles import open_site_clock

    site = Site.load(folder)
    chosen = day_obs or day_obs_from_tai(open_site_clock(site).now_tai_s())
    count = make_night(site, chosen)
    if as_json:
        print_json({"day_obs": chosen, "objects": count})
    else:
        click.echo(
            f"{count} objects in the table of {chosen}" if count else "no orbits: cumbre orbits load FILE"
        )
