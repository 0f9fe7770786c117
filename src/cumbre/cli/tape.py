"""``cumbre tape``: what is on a place's tape, its files back from it, and the proof that it can be read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cumbre.cli.main import print_json
from cumbre.cli.progress import byte_bar
from cumbre.cli.ship import site_ledger
from cumbre.cli.times import tai_of
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site
from cumbre.core.errors import CumbreError, NotFoundError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cumbre.archive.tape_index import TapeEntry, TapeIndex

_place = click.option("--place", default="archive", show_default=True, help="Place of the tape.")


def _selection[**P, R](command: Callable[P, R]) -> Callable[P, R]:
    """Add the options that choose files of a tape."""
    for option in (
        click.option("--ra", type=float, help="Centre of a cone, degrees ICRS."),
        click.option("--dec", type=float, help="Centre of a cone, degrees ICRS."),
        click.option("--radius", type=float, help="Radius of the cone, degrees; 0 for a point."),
        click.option(
            "--from", "since", type=tai_of, help="Exposures that began at or after this time (UTC)."
        ),
        click.option("--to", "until", type=tai_of, help="Exposures that began before this time (UTC)."),
        click.option("--obs-id", "obs_ids", multiple=True, help="Only these images."),
    ):
        command = option(command)
    return command


@click.group()
def tape() -> None:
    """List, read and verify the tape of a place.

    \b
    Examples:
      cumbre tape list --site ./site --ra 150.1 --dec 2.2 --radius 0.5
      cumbre tape read --site ./site --from 20261120 --to 20261121 --out ./back
      cumbre tape verify --site ./site --place base
    """


@tape.command("list")
@site_option
@_place
@_selection
@click.option("--json", "as_json", is_flag=True, help="Print JSON rows.")
def list_(folder: Path, place: str, as_json: bool, **wanted: Any) -> None:
    """Show files by sky region, time or image; all without a condition.

    \b
    Examples:
      cumbre tape list --site ./site --ra 150.1 --dec 2.2 --radius 0.5
      cumbre tape list --site ./site --from 2026-11-21T02:00:00 --to 2026-11-21T03:00:00 --json
    """
    from cumbre.archive.tape import view_tape
    from cumbre.core.time import isot, utc_from_tai

    index, _ = view_tape(_site(folder, place), place)
    entries = _select(index, wanted)
    if as_json:
        names = ("key", "volume", "offset", "size", "sha256", "begin_tai", "ra", "dec", "radius_deg")
        print_json([{name: getattr(entry, name) for name in names} for entry in entries])
        return
    for entry in entries:
        begin = isot(utc_from_tai(entry.begin_tai), 0) if entry.begin_tai is not None else "-"
        sky = f"{entry.ra:10.5f} {entry.dec:+10.5f}" if entry.ra is not None else f"{'-':>10} {'-':>10}"
        click.echo(f"{entry.volume} {entry.offset:>12} {entry.size:>10} {begin:>19} {sky} {entry.key}")
    click.echo(f"{len(entries)} files, {sum(entry.size for entry in entries) / 1e9:.3f} GB", err=True)


@tape.command()
@site_option
@_place
@_selection
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the files.")
@click.option("--json", "as_json", is_flag=True, help="Print what was read as JSON rows.")
def read(folder: Path, place: str, out: Path, as_json: bool, **wanted: Any) -> None:
    """Bring files back, each verified; those that are there already with the right bytes are left.

    The exit code is 1 when a file could not be read; the others are read all the same.

    \b
    Examples:
      cumbre tape read --site ./site --ra 150.1 --dec 2.2 --radius 0.5 --out ./back
    """
    from cumbre.archive.tape import read_entry, view_tape
    from cumbre.stores.files import sha256_of, write_atomic

    site = _site(folder, place)
    index, shelf = view_tape(site, place)
    entries = _select(index, wanted)
    rows = []
    with byte_bar("read", sum(entry.size for entry in entries), quiet=as_json) as progress:
        for entry in entries:
            path, outcome, message = out / entry.key, "ok", ""
            try:
                if not path.is_file() or sha256_of(path) != entry.sha256:
                    write_atomic(path, read_entry(shelf, entry))
            except CumbreError as error:
                outcome, message = error.outcome, str(error)
            rows.append({"key": entry.key, "path": str(path), "outcome": outcome, "message": message})
            progress(entry.size)
    bad = [row for row in rows if row["outcome"] != "ok"]
    if as_json:
        print_json(rows)
    else:
        click.echo(f"{len(rows) - len(bad)} of {len(rows)} files in {out}")
        for row in bad:
            click.echo(f"▲ {row['message']}")
    if bad:
        raise click.exceptions.Exit(1)


@tape.command()
@site_option
@_place
@click.option("--repair", is_flag=True, help="Write damaged files again from a verified copy elsewhere.")
@click.option("--ledger/--no-ledger", "with_ledger", default=True, help="Compare with the ledger too.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify(folder: Path, place: str, repair: bool, with_ledger: bool, as_json: bool) -> None:
    """Read every byte of a tape and compare with the index, the volumes' checksums and the ledger.

    Damage is told to the ledger, which then counts the copy no more. With --repair a good copy is appended to
    the tape; the damaged one stays where it is. Exit code 1 when something is damaged and not repaired.

    \b
    Examples:
      cumbre tape verify --site ./site --place base
      cumbre tape verify --site ./site --place archive --repair --json
    """
    from cumbre.archive import tape_check, tape_repair
    from cumbre.archive.tape import view_tape
    from cumbre.site.roles import open_site_bus, open_site_clock

    site = _site(folder, place)
    index, shelf = view_tape(site, place)
    ledger = site_ledger(site, needed=False) if with_ledger else None
    told = tape_check.told_by(ledger, place) if ledger is not None else None
    with byte_bar("verify", tape_check.total_bytes(index), quiet=as_json) as progress:
        report = tape_check.verify(index, shelf, told, progress)
    if report.damaged:
        clock = open_site_clock(site)
        with open_site_bus(site, f"tape-{place}") as bus:
            tape_repair.tell_damage(site, place, report, bus=bus, clock=clock)
            without = tape_repair.repair(site, place, report, bus=bus, clock=clock) if repair else []
        for key in without:
            click.echo(f"{key}: no good copy on this site; ship one (cumbre ship import)", err=True)
    rows = [finding.row() for finding in report.findings]
    left = [
        finding for finding in report.findings
        if finding.problem not in tape_check.HARMLESS and not finding.repaired
    ]  # fmt: skip
    if as_json:
        print_json(
            {
                "place": place, "volumes": report.volumes, "files": report.files, "bytes": report.bytes,
                "ledger": told is not None, "good": not left, "findings": rows,
            }
        )  # fmt: skip
    else:
        click.echo(
            f"tape of {place}: {report.volumes} volumes, {report.files} files, {report.bytes / 1e9:.3f} GB read"
        )
        for row in rows:
            fixed = f"; written again from {row['repaired_from']}" if row["repaired_from"] else ""
            click.echo(f"▲ {row['problem']}: {row['key'] or row['where']}: {row['message']}{fixed}")
    if left:
        raise click.exceptions.Exit(1)


def _site(folder: Path, place: str) -> Site:
    site = Site.load(folder)
    if place not in site.config.places or site.config.places[place].tape is None:
        having = [name for name, settings in site.config.places.items() if settings.tape]
        raise UserError(f"--place {place}: it has no tape; expected one of {', '.join(having) or 'none'}")
    return site


def _select(index: TapeIndex, wanted: dict[str, Any]) -> list[TapeEntry]:
    cone = (wanted["ra"], wanted["dec"], wanted["radius"])
    given = sum(value is not None for value in cone)
    if given not in (0, 3):
        raise UserError("--ra, --dec and --radius belong together")
    if given and not (-90 <= wanted["dec"] <= 90 and wanted["radius"] >= 0):
        raise UserError("--dec: expected −90 to 90 degrees; --radius: expected 0 or more")
    found = index.select(
        cone=cone if given else None,
        since_tai=wanted["since"],
        until_tai=wanted["until"],
        obs_ids=wanted["obs_ids"],
    )
    if not found:
        raise NotFoundError("nothing on this tape fulfils the conditions")
    return found
