"""``cumbre up`` and ``down``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from cumbre.cli.status import show, site_option
from cumbre.core.configuration import Site

WEB_WAIT_S = 30.0
__all__ = ["down", "site_option", "up"]


@click.command()
@site_option
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
def up(folder: Path, as_json: bool) -> None:
    """Start the services of a site; they go on until `cumbre down`.

    \b
    Examples:
      cumbre up --site ./site
    """
    from cumbre.site.supervisor import read_state, start_detached

    site = Site.load(folder)
    address = site.root / "run" / "web.url"
    if read_state(site) is None:
        address.unlink(missing_ok=True)  # of an earlier run: the port may be another now
    state = start_detached(site)
    end = time.monotonic() + WEB_WAIT_S
    while any(service["name"] == "web" for service in state["services"]) and not address.exists():
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    show(site, as_json)


@click.command()
@site_option
def down(folder: Path) -> None:
    """Stop the services of a site; what they had in work goes on at the next `cumbre up`.

    \b
    Examples:
      cumbre down --site ./site
    """
    from cumbre.site.supervisor import stop_site

    site = Site.load(folder)
    click.echo("stopped" if stop_site(site) else f"{site.root}: was not up")
