"""``cumbre alerts``: alerts of the archive, by their id or by visit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site

if TYPE_CHECKING:
    from cumbre.alerts.archive import AlertArchive


@click.group()
def alerts() -> None:
    """Alerts that were sent: one packet, a visit's file, what became of a visit's sources.

    \b
    Examples:
      cumbre alerts get 170587293923082241 --site ./site | jq .diaSource.psfFlux
      cumbre alerts get 170587293923082241 --site ./site --out alert.avro
      cumbre alerts manifest 2026112000012 --site ./site
      cumbre alerts read archive/alerts/20261120/2026112000012.avro
    """


def archive_of(folder: Path) -> AlertArchive:
    """The alert archive of a site."""
    from cumbre.alerts.archive import FOLDER, AlertArchive
    from cumbre.site.roles import open_site_clock, site_database

    site = Site.load(folder)
    return AlertArchive(site_database(site), site.path(FOLDER), open_site_clock(site))


@alerts.command()
@site_option
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write a container file instead."
)
@click.argument("alert_id", type=int)
def get(folder: Path, out: Path | None, alert_id: int) -> None:
    """Print the alert of diaSourceId ALERT_ID as JSON; stamps in base64."""
    from cumbre.alerts.packet import decode_packet, printable, write_container

    record = decode_packet(archive_of(folder).packet(alert_id))
    if out is None:
        print_json(printable(record))
    else:
        write_container(out, [record])
        click.echo(f"● {out}")


@alerts.command()
@site_option
@click.argument("visit", type=int)
def manifest(folder: Path, visit: int) -> None:
    """Print what became of the difference sources of VISIT, as JSON: made, sent, rejected by reason, files."""
    print_json(archive_of(folder).manifest(visit))


@alerts.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
def read(path: Path) -> None:
    """Print every alert of the container file PATH, one JSON object a line."""
    import json

    from cumbre.alerts.packet import printable, read_packets

    for record in read_packets(path):
        sys.stdout.write(json.dumps(printable(record), allow_nan=False) + "\n")
