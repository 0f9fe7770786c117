"""``cumbre init``: create a site."""

from __future__ import annotations

from pathlib import Path

import click

from cumbre.site.profiles import create_site


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--instrument", default="democam", show_default=True, help="Shipped name or .yaml file.")
@click.option("--seed", default=1, show_default=True, help="Seed of the simulated sky.")
@click.option("--real", is_flag=True, help="No simulator: images come from a real camera.")
def init(folder: Path, instrument: str, seed: int, real: bool) -> None:
    """Create a site in FOLDER: a whole observatory on this machine.

    \b
    Examples:
      cumbre init ./site
      cumbre init ./site --instrument mycamera.yaml --real
    """
    site = create_site(folder, instrument=instrument, seed=seed, simulated=not real)
    click.echo(f"site created: {site.root}")
    click.echo(f"next: cumbre up --site {folder}")
