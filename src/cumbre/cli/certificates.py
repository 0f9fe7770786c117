"""``cumbre certificates``: when they end, and new ones."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site
from cumbre.core.errors import ConfigurationError


@click.command()
@site_option
@click.option("--renew", is_flag=True, help="Make new certificates for the places, by the site's authority.")
@click.option("--place", "places", multiple=True, help="Only this place (may be given again).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def certificates(folder: Path, renew: bool, places: tuple[str, ...], as_json: bool) -> None:
    """Show or renew the certificates of the links. Services take new ones up without a restart.

    \b
    Examples:
      cumbre certificates --site ./site
      cumbre certificates --site ./site --renew --place base
    """
    from cumbre.archive.certificates import certificate_paths, expiries, issue

    site = Site.load(folder)
    if site.config.tls is None:
        raise ConfigurationError(f"{site.root}/site.yaml: no tls block; see docs/how-to/secure-links.md")
    if renew:
        unknown = sorted(set(places) - set(site.config.places))
        if unknown:
            raise ConfigurationError(
                f"place {', '.join(unknown)}: expected some of {', '.join(site.config.places)}"
            )
        authority = certificate_paths(site, site.config.tls, "")[0].parent
        for place in places or site.config.places:
            path = certificate_paths(site, site.config.tls, place)[1]
            if path != authority / f"{place}.crt":
                raise ConfigurationError(f"{path}: made elsewhere; renew it there and put it in its place")
            issue(authority, site.config.places[place].certificate_name or place, file_name=place)
    now = datetime.datetime.now(datetime.UTC)
    rows: list[dict[str, Any]] = [
        {"file": path, "ends": end.isoformat(), "days": (end - now).days}
        for path, end in expiries(site).items()
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(f"{row['ends'][:10]}  {row['days']:>5} days  {row['file']}")
