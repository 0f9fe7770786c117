"""``cumbre pipeline``: a site's repository made ready for ``pipetask``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site
from cumbre.core.errors import NotFoundError, UserError

ALERT_PRODUCTION = "resource://cumbre.pipelines/alert_production/pipeline.yaml"


@click.group()
def pipeline() -> None:
    """Run the pipelines on a site's repository with the middleware's own ``pipetask``.

    \b
    Examples:
      cumbre pipeline inputs --site ./night-site
      cumbre pipeline path
    """


@pipeline.command()
def path() -> None:
    """Print where the alert production pipeline stands, as ``pipetask -p`` takes it."""
    click.echo(ALERT_PRODUCTION)


@pipeline.command("inputs")
@site_option
@click.option("--place", default="archive", show_default=True, help="Place whose repository is filled.")
@click.option("--version", default="v1", show_default=True, help="Names the collections of what is new.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inputs_(folder: Path, place: str, version: str, as_json: bool) -> None:
    """Put the site's calibrations, templates and reference stars into its repository.

    What is there already stays. The repository must exist: it is made when the site first starts.
    """
    from cumbre.observatory.instruments import site_instruments
    from cumbre.orchestration.inputs import one_each, read_index
    from cumbre.payloads.refcat import RefCat
    from cumbre.pipelines import inputs
    from cumbre.repository.storage import declare
    from cumbre.repository.store import Repository
    from cumbre.site.preparation import calibration_path, paths

    site = Site.load(folder)
    known = site.config.places.get(place)
    if known is None or known.repository is None:
        raise UserError(f"{folder}: place {place!r} has no repository in site.yaml")
    root = site.path(known.repository)
    declare(root)
    where = paths(site)
    index = where["templates"] / "index.json"
    if not where["refcat"].is_file():
        raise NotFoundError(
            f"{where['refcat']}: no reference stars; put a catalogue there (ra, dec, mag_<band>)"
        )
    report: dict[str, dict[str, Any]] = {}
    with Repository(root, writeable=True) as repository:
        triangles = inputs.register_reference(repository, RefCat.load(where["refcat"]), version=version)
        for number, (_, instrument) in enumerate(site_instruments(site).values()):
            # The index is of the first camera, which is the one that the prompt pipeline serves.
            rows = one_each(read_index(index)) if index.is_file() and number == 0 else []
            bands = sorted({item.band for item in instrument.filters})
            files = [
                (path, detector.name, band)
                for detector in instrument.detectors
                for band in bands
                if (path := calibration_path(site, instrument, detector.name, band)).is_file()
            ]
            done: dict[str, Any] = {
                "calibrations": inputs.register_calibrations(
                    repository, instrument, files, valid_begin_tai=0.0, version=version
                ),
                "templates": inputs.register_templates(repository, instrument, rows, version=version),
                "reference_triangles": triangles,
            }
            done["collection"] = inputs.chain_inputs(repository, instrument)
            report[instrument.name] = done
    if as_json:
        print_json({"repository": str(root), "instruments": report})
        return
    for name, done in report.items():
        click.echo(
            f"{name}: {done['calibrations']} calibrations, {done['templates']} templates, "
            f"{done['reference_triangles']} triangles of reference stars are new"
        )
        click.echo(f"pipetask run -b {root} -i {done['collection']} -o u/NAME/alerts \\")
        click.echo(f"  -p '{ALERT_PRODUCTION}#preload,prompt' -d \"instrument='{name}' AND visit=NUMBER\"")
