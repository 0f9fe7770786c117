"""``cumbre ship``: images and telemetry on a disk, for an outage that is longer than the buffers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cumbre.cli.main import print_json
from cumbre.cli.progress import byte_bar
from cumbre.cli.times import tai_of
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site
from cumbre.core.errors import NotFoundError, TransientError, UserError

if TYPE_CHECKING:
    from cumbre.ledger import Ledger


@click.group()
def ship() -> None:
    """Carry images and telemetry on a disk: export, verify, import.

    \b
    Examples:
      cumbre ship export --site ./site --to /media/disk --missing-at archive
      cumbre ship verify /media/disk
      cumbre ship import --site ./site --from-disk /media/disk --place archive
    """


@ship.command("export")
@site_option
@click.option("--to", "disk", required=True, type=click.Path(path_type=Path), help="Folder on the disk.")
@click.option("--from", "since", type=tai_of, help="Exposures that began at or after this time.")
@click.option("--until", type=tai_of, help="Exposures that began before this time.")
@click.option("--missing-at", help="Only what has no verified copy at this place, by the ledger.")
@click.option("--place", default="summit", show_default=True, help="Place whose copies are preferred.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export(
    folder: Path, disk: Path, since: float | None, until: float | None, missing_at: str | None, place: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Copy images with their telemetry to a disk. Run it again to go on after an interruption, or to add more.

    \b
    Examples:
      cumbre ship export --site ./site --to /media/disk --missing-at archive
      cumbre ship export --site ./site --to /media/disk --from 20261120 --until 2026-11-21T12:00:00
    """
    from cumbre.archive.shipping import Export, Selection
    from cumbre.site.roles import open_site_bus, open_site_clock

    site = Site.load(folder)
    _known_place(site, place)
    if missing_at is not None:
        _known_place(site, missing_at)
    elif since is None and until is None:
        raise UserError("expected --missing-at PLACE, or --from and --until: what shall be exported?")
    with open_site_bus(site, "ship") as bus:
        work = Export(
            site=site, bus=bus, clock=open_site_clock(site), disk=disk, source=place,
            ledger=site_ledger(site, needed=missing_at is not None),
        )  # fmt: skip
        try:
            with byte_bar("export", None, quiet=as_json) as progress:
                report = work.run(Selection(since, until, missing_at), progress)
        except OSError as error:
            raise TransientError(
                f"{disk}: {error}; what is copied stays, run the same command again"
            ) from error
    _show(asdict(report), f"{disk}: {report.copied} files copied, {report.present} there already", as_json)


@ship.command("import")
@site_option
@click.option(
    "--from-disk", "disk", required=True, type=click.Path(path_type=Path), help="Folder of the disk."
)
@click.option("--place", required=True, help="Place that takes the images.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def import_(folder: Path, disk: Path, place: str, as_json: bool) -> None:
    """Take a disk in: every byte is verified; what is not as the manifest says goes to quarantine.

    Run it as often as you like, nothing is taken twice. The exit code is 1 when something was refused.

    \b
    Examples:
      cumbre ship import --site ./site --from-disk /media/disk --place archive
    """
    from cumbre.archive.shipment import read_manifest
    from cumbre.archive.shipping_import import Import
    from cumbre.core.errors import BadFileError
    from cumbre.site.roles import open_site_bus, open_site_clock

    site = Site.load(folder)
    _known_place(site, place)
    try:
        total = read_manifest(disk).total_bytes
    except BadFileError:
        total = 0  # the import says it and keeps the evidence
    with open_site_bus(site, "ship") as bus:
        work = Import(
            site=site, bus=bus, clock=open_site_clock(site), disk=disk, place=place,
            ledger=site_ledger(site, needed=False),
        )  # fmt: skip
        try:
            with byte_bar("import", total, quiet=as_json) as progress:
                report = work.run(progress)
        except OSError as error:
            raise TransientError(
                f"{place}: {error}; what is taken stays, run the same command again"
            ) from error
    _show(asdict(report), f"{place}: {report.copied} files taken, {report.present} there already", as_json)


@ship.command()
@click.argument("disk", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def verify(disk: Path, as_json: bool) -> None:
    """Read every byte of a disk and compare with its manifest. Exit code 1 when something is wrong.

    \b
    Examples:
      cumbre ship verify /media/disk
    """
    from cumbre.archive.shipment import read_manifest
    from cumbre.archive.shipment import verify as verify_disk

    manifest = read_manifest(disk)
    with byte_bar("verify", manifest.total_bytes, quiet=as_json) as progress:
        wrong = verify_disk(disk, progress)
    report = {
        "shipment": manifest.shipment, "files": len(manifest.items), "telemetry_files": len(manifest.recordings),
        "bytes": manifest.total_bytes, "refused": wrong,
    }  # fmt: skip
    _show(report, f"{disk}: {len(manifest.items)} files, {manifest.total_bytes / 1e9:.3f} GB read", as_json)


def _show(report: dict[str, Any], line: str, as_json: bool) -> None:
    if as_json:
        print_json(report)
    else:
        click.echo(line)
        for item in report["refused"]:
            click.echo(f"▲ {item['file']}: {item.get('message') or item.get('problem')}")
    if report["refused"]:
        raise click.exceptions.Exit(1)


def _known_place(site: Site, name: str) -> None:
    if name not in site.config.places:
        raise UserError(f"place {name!r}: expected one of {', '.join(site.config.places)}")


def site_ledger(site: Site, *, needed: bool) -> Ledger | None:
    """The site's ledger; None when its database does not run and nobody needs it.

    Raises
    ------
    NotFoundError, TransientError
        It is needed and does not run.
    """
    from cumbre.ledger import Ledger, prepare
    from cumbre.site.roles import site_database

    try:
        db = site_database(site)
        prepare(db)
    except (NotFoundError, TransientError):
        if needed:
            raise
        click.echo("the site's database does not run: the ledger is not asked", err=True)
        return None
    return Ledger(db)
