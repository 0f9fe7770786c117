"""``cumbre instrument``: list, show and check instrument descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cumbre.cli.main import print_json
from cumbre.core.instrument import Instrument, load_instrument, shipped_instruments

MOST_NOTES = 12


@click.group()
def instrument() -> None:
    """List, show and check instrument descriptions.

    \b
    Examples:
      cumbre instrument list
      cumbre instrument show lsstcam
      cumbre instrument check --instrument my-camera.yaml night/*.fits
    """


@instrument.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List the shipped descriptions.

    \b
    Example:
      cumbre instrument list
    """
    rows = [{"key": key, **_summary(load_instrument(key))} for key in shipped_instruments()]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(f"{row['key']:18} {row['detectors']:4d} detectors  {row['description']}")


@instrument.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the whole description as JSON.")
def show(name: str, as_json: bool) -> None:
    """Show a description: a shipped NAME or the path of a file.

    \b
    Examples:
      cumbre instrument show latiss
      cumbre instrument show my-camera.yaml --json
    """
    found = load_instrument(name)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    summary = _summary(found)
    click.echo(f"{found.name}: {found.description}")
    click.echo(
        f"  obs_id prefix {found.prefix}, {found.plate_scale:g} arcsec/mm, aperture {found.aperture_m:g} m"
    )
    click.echo(f"  filters: {', '.join(f'{item.name} ({item.band})' for item in found.filters)}")
    purposes = ", ".join(f"{count} {purpose.lower()}" for purpose, count in summary["purposes"].items())
    click.echo(f"  {len(found.detectors)} detectors: {purposes}")
    kinds: dict[tuple[int, int, int], list[str]] = {}
    for detector in found.detectors:
        kinds.setdefault((detector.nx, detector.ny, len(detector.amplifiers)), []).append(detector.name)
    for (nx, ny, amplifiers), names in kinds.items():
        few = ", ".join(names[:6]) + (f" … {names[-1]}" if len(names) > 6 else "")
        click.echo(f"    {nx} x {ny} pixels, {amplifiers} amplifiers: {few}")
    where = "its own rules" if found.header else "cumbre's own keywords"
    click.echo(f"  header: {where}; WCS of the header {'checked' if found.trust_header_wcs else 'not used'}")


@instrument.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-i", "--instrument", "name", help="Shipped name or a .yaml file; the best fitting one when absent."
)
@click.option("-v", "--verbose", is_flag=True, help="Print every note, and what was read from each file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(files: tuple[Path, ...], name: str | None, verbose: bool, as_json: bool) -> None:
    """Say what a description lacks for FILES, in words.

    Errors would send a file into quarantine or put pixels in a wrong place; notes are repaired by rule.
    Exit code 0: every file can be taken; 1: there are errors; 2: the description itself is wrong.

    \b
    Examples:
      cumbre instrument check --instrument my-camera.yaml night/*.fits
      cumbre instrument check unknown.fits --json
    """
    from cumbre.core.instrument_check import check_files, guess_instrument

    guessed = name is None
    if name is None:
        chosen = guess_instrument([load_instrument(key) for key in shipped_instruments()], files[0])
    else:
        chosen = load_instrument(name)
    report = check_files(chosen, files)
    if as_json:
        print_json(
            {
                "instrument": report.instrument,
                "guessed": guessed,
                "files": report.files,
                "errors": report.errors,
                "findings": [asdict(finding) for finding in report.findings],
                "metadata": {file: _finite(asdict(row)) for file, row in report.metadata.items()},
            }
        )
    else:
        if guessed:
            click.echo(f"No --instrument given; {report.instrument} fits best of the shipped ones.")
        _print_findings(report.findings, verbose=verbose)
        if verbose:
            for file, row in report.metadata.items():
                click.echo(f"{file}: {_one_line(asdict(row))}")
        notes = len({finding.message for finding in report.findings if finding.severity == "note"})
        click.echo(f"{report.instrument}: {report.files} files, {report.errors} errors, {notes} notes")
    if report.errors:
        raise click.exceptions.Exit(1)


def _print_findings(findings: Sequence[Any], *, verbose: bool) -> None:
    """Errors for each file; the same note of many files once."""
    for finding in findings:
        if finding.severity == "error":
            where = "" if finding.file in finding.message else f"{finding.file}: "
            click.echo(f"error  {where if finding.file else ''}{finding.message}")
    notes: dict[str, list[str]] = {}
    for finding in findings:
        if finding.severity == "note":
            notes.setdefault(finding.message, []).append(finding.file)
    for number, (message, noted) in enumerate(notes.items()):
        if number >= MOST_NOTES and not verbose:
            click.echo(f"note   … and {len(notes) - MOST_NOTES} more; see all with --verbose")
            break
        count = f" ({len(noted)} files)" if len(noted) > 1 else f" ({noted[0]})" if noted[0] else ""
        click.echo(f"note   {message}{count}")


def _summary(item: Instrument) -> dict[str, Any]:
    purposes: dict[str, int] = {}
    for detector in item.detectors:
        purposes[detector.purpose] = purposes.get(detector.purpose, 0) + 1
    return {
        "name": item.name,
        "prefix": item.prefix,
        "description": item.description,
        "detectors": len(item.detectors),
        "purposes": purposes,
        "bands": [f.band for f in item.filters],
    }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """NaN has no place in JSON."""
    return {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}  # noqa: PLR0124


def _one_line(row: dict[str, Any]) -> str:
    shown = (
        "obs_id",
        "image_type",
        "filter",
        "exposure_s",
        "ra_deg",
        "dec_deg",
        "detector_name",
        "wcs_usable",
    )
    return ", ".join(f"{key} {row[key]}" for key in shown)
