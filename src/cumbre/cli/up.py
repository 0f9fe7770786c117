"""``cumbre up``, ``down`` and ``status``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from cumbre.cli.main import print_json
from cumbre.core.configuration import Site

WEB_WAIT_S = 30.0
site_option = click.option(
    "--site",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("night-site"),
    show_default=True,
    help="Folder of the site.",
)


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
    _show(site, as_json)


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


@click.command()
@site_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(folder: Path, as_json: bool) -> None:
    """Show services and addresses of a site. Exit code 1 when it is down or a service is not running.

    \b
    Examples:
      cumbre status --site ./site
      cumbre status --site ./site --json | jq .urls.web
    """
    if not _show(Site.load(folder), as_json):
        raise click.exceptions.Exit(1)


def status_of(site: Site) -> dict[str, Any]:
    """Services (name, state, pid) and urls of a site."""
    from cumbre.site.supervisor import read_state

    state = read_state(site)
    urls: dict[str, str] = {}
    web = site.root / "run" / "web.url"
    if state is not None and web.exists():
        urls["web"] = web.read_text().strip()
        urls |= {name: urls["web"] + name for name in ("tap", "sia", "soda", "datalink", "cone")}
    if site.config.bus.startswith("kafka://"):
        urls["kafka"] = site.config.bus
    return {
        "site": str(site.root),
        "up": state is not None,
        "services": state["services"] if state else [],
        "urls": urls,
    }


def _show(site: Site, as_json: bool) -> bool:
    report = status_of(site)
    good = report["up"] and all(s["state"] == "running" for s in report["services"])
    if as_json:
        print_json(report)
        return bool(good)
    if not report["up"]:
        click.echo(f"{site.root}: down; start it with: cumbre up --site {site.root}")
        return False
    for service in report["services"]:
        mark = "●" if service["state"] == "running" else "▲"
        click.echo(
            f"{mark} {service['name']:<20} {service['state']:<10} pid {service['pid'] or '-':<8}"
            f" restarts {service['restarts']}"
        )
    for name, url in report["urls"].items():
        click.echo(f"{name}: {url}")
    return bool(good)
