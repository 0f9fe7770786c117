"""``cumbre status``: what runs, where it is reached, and what needs a person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cumbre.cli.main import print_json
from cumbre.core.configuration import Site
from cumbre.core.errors import CumbreError

site_option = click.option(
    "--site",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("night-site"),
    show_default=True,
    help="Folder of the site.",
)
SEVERITIES = {1: "△ look today", 2: "▲ look now", 3: "▲▲ images are in danger"}


@click.command()
@site_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(folder: Path, as_json: bool) -> None:
    """Show services, alarms and addresses of a site. Exit code 1 when it is down or a service is not running.

    \b
    Examples:
      cumbre status --site ./site
      cumbre status --site ./site --json | jq .urls.web
      cumbre status --site ./site --json | jq '.alarms[] | select(.severity >= 2)'
    """
    if not show(Site.load(folder), as_json):
        raise click.exceptions.Exit(1)


def status_of(site: Site) -> dict[str, Any]:
    """Services (name, state, pid), alarms (since, component, text, severity) and urls of a site."""
    from cumbre.site.supervisor import read_state

    state = read_state(site)
    urls: dict[str, str] = {}
    web = site.root / "run" / "web.url"
    if state is not None and web.exists():
        urls["web"] = web.read_text().strip()
        urls |= {
            name: urls["web"] + name for name in ("tap", "sia", "soda", "datalink", "cone", "lightcurve")
        }
        archive = site.config.places.get("archive")
        if archive is not None and archive.repository is not None:
            urls["butler"] = urls["web"] + "butler/"
    if site.config.bus.startswith("kafka://"):
        urls["kafka"] = site.config.bus
    return {
        "site": str(site.root),
        "up": state is not None,
        "services": state["services"] if state else [],
        "alarms": _alarms(site) if state else [],
        "urls": urls,
    }


def _alarms(site: Site) -> list[dict[str, Any]]:
    from cumbre.archive.alarms import active_alarms
    from cumbre.site.roles import open_site_bus

    try:
        with open_site_bus(site, "status") as bus:
            return active_alarms(bus)
    except CumbreError as error:
        text = f"the bus does not answer, so other alarms are not known: {error}"
        return [{"since": None, "component": "bus", "text": text, "severity": 3, "place": "", "backlog": 0}]


def show(site: Site, as_json: bool) -> bool:
    """Print the status; whether the site is up and all services run."""
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
    for alarm in report["alarms"]:
        click.echo(
            f"{SEVERITIES[alarm['severity']]} since {alarm['since']}: {alarm['component']}: {alarm['text']}"
        )
    if not report["alarms"]:
        click.echo("no alarms")
    for name, url in report["urls"].items():
        click.echo(f"{name}: {url}")
    return bool(good)
