"""``cumbre ingest``: files of a real camera enter the flow as if the camera had just written them."""

from __future__ import annotations

from pathlib import Path

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site


@click.command()
@site_option
@click.option("--instrument", help="Shipped name or .yaml file; the site's first instrument by default.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON row a file.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def ingest(folder: Path, instrument: str | None, as_json: bool, files: tuple[Path, ...]) -> None:
    """Take FILES into the flow: repaired headers, ledger, archive, Butler.

    A file that cannot be used goes to quarantine with its reason, and the next one is taken. Files that were
    taken before are recognised. The exit code is 1 when a file was refused.

    \b
    Examples:
      cumbre ingest --site ./site --instrument mycamera.yaml /data/tonight/*.fits
    """
    from cumbre.capture.directory import DirectoryCamera
    from cumbre.core.instrument import load_instrument
    from cumbre.site.roles import open_site_bus, open_site_clock

    site = Site.load(folder)
    bus = open_site_bus(site, "ingest")
    camera = DirectoryCamera(
        site=site,
        bus=bus,
        clock=open_site_clock(site),
        instrument=load_instrument(instrument or site.config.instruments[0]),
    )
    taken = camera.ingest(files)
    bus.close()
    rows = [
        {
            "file": str(item.source),
            "outcome": item.outcome,
            "obs_id": item.obs_id,
            "detector": item.detector,
            "message": item.message,
        }
        for item in taken
    ]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            mark = "●" if row["outcome"] == "ok" else "▲"
            click.echo(
                f"{mark} {Path(str(row['file'])).name}: {row['outcome']} {row['obs_id'] or ''} {row['message']}"
            )
    if any(row["outcome"] != "ok" for row in rows):
        raise click.exceptions.Exit(1)
