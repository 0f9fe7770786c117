"""``cumbre template``: templates of the archived visits of a site."""

from __future__ import annotations

import os
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cumbre.orchestration.template_maker import Decision, TemplateMaker

_TILE = click.option("--tile", "tiles", multiple=True, help="Field of the survey; several may be given.")
_BAND = click.option("--band", "bands", multiple=True, help="Band; several may be given.")
_DETECTOR = click.option("--detector", "detectors", multiple=True, help="Detector; several may be given.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def template() -> None:
    """Make templates of a site's archived visits, and see what they are made of.

    \b
    Examples:
      cumbre template make --site ./site
      cumbre template list --site ./site
    """


@contextmanager
def _maker(folder: Path, say: Callable[[str], None]) -> Iterator[TemplateMaker]:
    """A maker on the site's database, which is started for it where the site is down."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from cumbre.core.instrument import load_instrument
    from cumbre.orchestration.template_maker import TemplateMaker
    from cumbre.site.roles import open_site_bus, open_site_clock
    from cumbre.site.supervisor import site_database_of_any

    site = Site.load(folder)
    instrument = load_instrument(site.config.instruments[0])
    with site_database_of_any(site) as database, closing(open_site_bus(site, "template")) as bus:
        yield TemplateMaker(site, database, open_site_clock(site), instrument, say=say, bus=bus)


@template.command("list")
@site_option
@_TILE
@_BAND
@_DETECTOR
@click.option("--all", "show_all", is_flag=True, help="Earlier versions, too.")
@click.option(
    "--inputs", "show_inputs", is_flag=True, help="The visits of each, and those left out, with reasons."
)
@_JSON
def list_templates(
    folder: Path,
    tiles: tuple[str, ...],
    bands: tuple[str, ...],
    detectors: tuple[str, ...],
    *,
    show_all: bool,
    show_inputs: bool,
    as_json: bool,
) -> None:
    """Show the templates that prompt processing chooses from.

    \b
    Examples:
      cumbre template list --site ./site
      cumbre template list --site ./site --tile T002 --band r --inputs
      cumbre template list --site ./site --all --json
    """
    from cumbre.orchestration.templates import TemplateStore

    store = TemplateStore(Site.load(folder).root)
    used = store.rows()
    told = {about["path"]: about for about in store.all_versions()}
    rows = [row | told.get(row["path"], {}) | {"in_use": True} for row in used]
    if show_all:
        in_use = {row["path"] for row in used}
        rows += [about | {"in_use": False} for path, about in told.items() if path not in in_use]
    chosen = [
        row
        for row in rows
        if (not tiles or row["tile"] in tiles)
        and (not bands or row["band"] in bands)
        and (not detectors or row["detector"] in detectors)
    ]
    if as_json:
        print_json(chosen)
        return
    for row in sorted(chosen, key=lambda r: (r["tile"], r["band"], r["detector"], r.get("version", ""))):
        _print(row, show_inputs=show_inputs)
    if not chosen:
        click.echo("no templates: cumbre template make")


def _print(row: dict[str, Any], *, show_inputs: bool) -> None:
    mark = "●" if row["in_use"] else "○"
    if "version" not in row:
        click.echo(f"{mark} {row['tile']} {row['band']} {row['detector']}  any airmass, made with the site")
        return
    low, high = row["airmass"]
    numbers = row["metrics"]
    click.echo(
        f"{mark} {row['tile']} {row['band']} {row['detector']}  airmass {low:g}-{high:g}  {row['version']}, "
        f"{len(row['inputs'])} visits, {numbers['coverage']:.0%} covered, FWHM {numbers['psf_fwhm_px']:.2f} px"
    )
    for one in row["inputs"] if show_inputs else []:
        click.echo(
            f"    {one['name']}  weight {one['weight']:.3f}, airmass {one['airmass']:.2f}, seeing {one['seeing']:.2f}"
        )
    for one in row["refused"] if show_inputs else []:
        click.echo(f"    {one['name']}  left out: {one['reason']}")


def _told(decision: Decision) -> dict[str, Any]:
    ranges = [
        {
            "airmass": [choice.low, choice.high],
            "chosen": [one.obs_id for one in choice.chosen],
            "refused": [{"name": r.obs_id, "reason": r.reason} for r in choice.refused],
        }
        for choice in decision.choices
    ]
    outside = [{"name": r.obs_id, "reason": r.reason} for r in decision.outside]
    place = decision.place
    return {
        "tile": place.tile,
        "band": place.band,
        "detector": place.detector,
        "ranges": ranges,
        "outside": outside,
    }


@template.command()
@site_option
@_TILE
@_BAND
@_DETECTOR
@_JSON
def choose(
    folder: Path, tiles: tuple[str, ...], bands: tuple[str, ...], detectors: tuple[str, ...], *, as_json: bool
) -> None:
    """Say which visits would make each template, and why each other one would not; make none.

    Visits that were never measured are, which takes some seconds each, once.

    \b
    Examples:
      cumbre template choose --site ./site --band r
      cumbre template choose --site ./site --tile T002 --json
    """
    out: list[dict[str, Any]] = []
    with _maker(folder, lambda text: click.echo(text, err=True)) as maker:
        for place in maker.places(tiles=tiles, bands=bands, detectors=detectors):
            out.append(_told(maker.decide(place)))
    if as_json:
        print_json(out)
        return
    for row in out:
        click.echo(f"{row['tile']} {row['band']} {row['detector']}")
        for one in row["ranges"]:
            click.echo(f"  airmass {one['airmass'][0]:g}-{one['airmass'][1]:g}: {len(one['chosen'])} visits")
            for name in one["chosen"]:
                click.echo(f"    ● {name}")
            for refused in one["refused"]:
                click.echo(f"    ○ {refused['name']}: {refused['reason']}")
        for refused in row["outside"]:
            click.echo(f"    ○ {refused['name']}: {refused['reason']}")
    if not out:
        click.echo("no visits at the archive")


@template.command()
@site_option
@_TILE
@_BAND
@_DETECTOR
@_JSON
def make(
    folder: Path, tiles: tuple[str, ...], bands: tuple[str, ...], detectors: tuple[str, ...], *, as_json: bool
) -> None:
    """Bring templates up to date with the visits at the archive; the site may run.

    Run again, it adds the good new visits: only they are calibrated and resampled, and the template is the same as if
    all had been there at once. Interrupted, it goes on where it stopped. Where nothing changed it makes nothing. Earlier
    versions stay. Exit code 1: a place failed; the others are done.

    \b
    Examples:
      cumbre template make --site ./site
      cumbre template make --site ./site --tile T002 --band r --json
    """
    from cumbre.core.errors import CumbreError

    made: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with _maker(folder, lambda text: click.echo(text, err=as_json)) as maker:
        places = maker.places(tiles=tiles, bands=bands, detectors=detectors)
        for number, place in enumerate(places, 1):
            where = {"tile": place.tile, "band": place.band, "detector": place.detector}
            try:
                made += maker.make(place)
            except CumbreError as error:
                failed.append(where | {"error": str(error)})
                click.echo(f"▲ {' '.join(where.values())}: {error}", err=True)
                continue
            if not as_json:
                click.echo(f"{number} of {len(places)} places, {len(made)} new templates")
    if as_json:
        print_json({"places": len(places), "made": made, "failed": failed})
    elif not places:
        click.echo("no visits at the archive")
    if failed:
        raise click.exceptions.Exit(1)
