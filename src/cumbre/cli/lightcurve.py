"""``cumbre lightcurve``: frames of one field to light curves, and to DiaObjects of a site."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cumbre.cli.main import print_json


def position(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[float, float] | None:
    """RA,DEC in degrees."""
    del context, parameter
    if value is None:
        return None
    try:
        ra, dec = (float(word) for word in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: expected RA,DEC in degrees, e.g. 31.0428,46.6878") from error
    if not (0 <= ra < 360 and -90 <= dec <= 90):
        raise click.BadParameter(f"{value!r}: expected 0 <= RA < 360 and -90 <= DEC <= 90 degrees")
    return ra, dec


@click.command()
@click.option("--instrument", required=True, help="Name or file of the instrument description.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the results."
)
@click.option("--target", callback=position, metavar="RA,DEC", help="The star to fit, ICRS degrees.")
@click.option("--aperture", type=click.FloatRange(0.5, 100), help="Radius in pixels; 1.6 FWHM by default.")
@click.option(
    "--site",
    "folder",
    type=click.Path(path_type=Path),
    help="Take the frames from this site's archive when no FILES are given, and store its light curves there.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def lightcurve(
    instrument: str,
    out: Path,
    target: tuple[float, float] | None,
    aperture: float | None,
    folder: Path | None,
    as_json: bool,
    files: tuple[Path, ...],
) -> None:
    """Light curves of all stars of one field in raw FILES, and a transit fitted to one of them.

    The frames may drift and need no WCS: they are registered on one another by their stars. Positions on the sky come
    from the first frame's header and are as good as its pointing; so the star to fit is the one with the most significant
    dip within that error of --target, or of the whole field. Writes lightcurves.parquet, lightcurves.csv, lightcurve.png
    and report.json to --out.

    With --site each star becomes one DiaObject and each of its measurements a DiaForcedSource of Level 1 (scienceFlux in
    nJy by the filter's nominal zero point, psfFlux the difference to the star's median). A series is stored once.

    The exit code is 1 when a file was refused.

    \b
    Examples:
      cumbre lightcurve hatp32/*.FITS.bz2 --instrument microobservatory --out result
      cumbre lightcurve night/*.fits --instrument mycamera.yaml --target 31.0428,46.6878 --out result --json
      cumbre lightcurve --site ./site --instrument microobservatory --target 31.0428,46.6878 --out result
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from cumbre.core.configuration import Site
    from cumbre.core.errors import UserError
    from cumbre.core.instrument import load_instrument
    from cumbre.payloads.lightcurve_run import run
    from cumbre.site.time_series import archived, store

    camera = load_instrument(instrument)
    site = Site.load(folder) if folder is not None else None
    if not files:
        if site is None:
            raise UserError("lightcurve: give FILES, or --site to take the frames from its archive")
        files = tuple(archived(site, camera))
    out.mkdir(parents=True, exist_ok=True)
    report, series = run(files, out, instrument=camera, target=target, aperture_px=aperture)
    if site is not None:
        report["level1"] = store(site, series, int(report["target"]["object"]))
    if as_json:
        print_json(report)
    else:
        show(report, out)
    if report["refused"]:
        raise click.exceptions.Exit(1)


def show(report: dict[str, Any], out: Path) -> None:
    """Print a report for a person."""
    target, transit = report["target"], report["transit"]
    for row in report["refused"]:
        click.echo(f"▲ {row['file']}: {row['outcome']}: {row['message']}", err=True)
    click.echo(f"{report['frames']} frames, {report['stars']} stars, drift {report['drift_px']} px")
    near = f", {target['offset_deg']} deg from the target" if target["asked"] else ""
    click.echo(
        f"star {target['object']} at ({target['ra']}, {target['dec']}) ± {report['position_error_deg']} deg{near}: dip of "
        f"Δχ² {target['delta_chi2']} (next best star {target['next_best_delta_chi2']})"
    )
    mark = "●" if target["is_credible"] else "○ not significant:"
    click.echo(
        f"{mark} mid {transit['mid_utc']} UTC ± {transit['mid_err_min']} min, depth {100 * transit['depth']:.2f} ± "
        f"{100 * (transit['depth_err'] or 0):.2f} % of the disc, {transit['duration_h']} h"
    )
    if "level1" in report:
        stored = report["level1"]
        click.echo(
            f"Level 1: DiaObject {stored['diaObjectId']} of {stored['objects']}; {stored['forced_sources']} forced sources"
        )
    click.echo(f"picture: {out / 'lightcurve.png'}")
