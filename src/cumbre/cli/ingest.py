"""``cumbre ingest``: files of a real camera enter the flow as if the camera had just written them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cumbre.cli.lightcurve import position, show
from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site

if TYPE_CHECKING:
    from cumbre.core.instrument import Instrument

PATIENCE_S = 60.0
"""Real seconds without a new file at the archive after which the light curves are given up."""


@click.command()
@site_option
@click.option("--instrument", help="Shipped name or .yaml file; the site's first instrument by default.")
@click.option(
    "--target", callback=position, metavar="RA,DEC", help="Time series: the star to fit, ICRS degrees."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Time series: results; SITE/results/… by default.",
)
@click.option("--archive-only", is_flag=True, help="Time series: make no light curves.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON row a file, or with light curves one object."
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def ingest(
    folder: Path,
    instrument: str | None,
    target: tuple[float, float] | None,
    out: Path | None,
    archive_only: bool,
    as_json: bool,
    files: tuple[Path, ...],
) -> None:
    """Take FILES into the flow: repaired headers, ledger, archive, Butler.

    A file that cannot be used goes to quarantine with its reason, and the next one is taken. Files that were
    taken before are recognised. The exit code is 1 when a file was refused.

    Frames of an instrument that takes series of one field (``time_series: true`` in its description) also become
    light curves when the archive has them all: each star one DiaObject of Level 1, the star with the most
    significant dip (near --target, if given) fitted by a transit. See ``cumbre lightcurve --help``.

    \b
    Examples:
      cumbre ingest --site ./site --instrument mycamera.yaml /data/tonight/*.fits
      cumbre ingest --site ./site --instrument microobservatory --target 31.0428,46.6878 hatp32/*.FITS.bz2
    """
    from cumbre.capture.directory import DirectoryCamera
    from cumbre.core.instrument import load_instrument
    from cumbre.site.roles import open_site_bus, open_site_clock

    site = Site.load(folder)
    camera = load_instrument(instrument or site.config.instruments[0])
    bus = open_site_bus(site, "ingest")
    taken = DirectoryCamera(site=site, bus=bus, clock=open_site_clock(site), instrument=camera).ingest(files)
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
    good = [str(row["obs_id"]) for row in rows if row["outcome"] == "ok"]
    if not as_json:
        for row in rows:
            mark = "●" if row["outcome"] == "ok" else "▲"
            click.echo(
                f"{mark} {Path(str(row['file'])).name}: {row['outcome']} {row['obs_id'] or ''} {row['message']}"
            )
    series = camera.time_series and not archive_only and good
    report = _light_curves(site, camera, good, target, out, quiet=as_json) if series else None
    if as_json:
        print_json(rows if report is None else {"files": rows, "light_curves": report})
    if len(good) < len(rows) or (report is not None and report["refused"]):
        raise click.exceptions.Exit(1)


def _light_curves(
    site: Site,
    camera: Instrument,
    obs_ids: list[str],
    target: tuple[float, float] | None,
    out: Path | None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Wait for the archive, then measure its frames and store the light curves; the report, as printed."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from rich.console import Console
    from rich.progress import Progress

    from cumbre.payloads.lightcurve_run import run
    from cumbre.site.time_series import store, wait_archived

    images = sorted(set(obs_ids))
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task("on the way to the archive", total=len(images))
        paths = wait_archived(
            site,
            camera,
            images,
            patience_s=PATIENCE_S,
            progress=lambda done: progress.update(task, completed=done),
        )
        progress.add_task("light curves", total=None)
        folder = out or site.path(f"results/lightcurves/{images[0]}")
        folder.mkdir(parents=True, exist_ok=True)
        report, series = run(paths, folder, instrument=camera, target=target)
        report["level1"] = store(site, series, int(report["target"]["object"]))
    if not quiet:
        show(report, folder)
    return report
