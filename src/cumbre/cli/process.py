"""``cumbre process``: science and reference images to alerts, without a site."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import click

from cumbre.cli.files import FilesAfterFlags
from cumbre.cli.main import print_json


@click.command(cls=FilesAfterFlags)
@click.option(
    "--science",
    "science",
    multiple=True,
    type=click.Path(path_type=Path),
    required=True,
    help="Science image(s).",
)
@click.option(
    "--reference",
    "reference",
    multiple=True,
    type=click.Path(path_type=Path),
    required=True,
    help="Reference image(s).",
)
@click.option(
    "--instrument", default=None, help="Name or file of an instrument description (gain, saturation)."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the results."
)
@click.option("--threshold", default=5.0, show_default=True, help="Detection threshold in sigma.")
@click.option(
    "--method",
    type=click.Choice(["alard_lupton", "zogy"]),
    default="alard_lupton",
    show_default=True,
    help="Subtract by a fitted kernel, or with both images filtered by their PSFs and noise.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def process(
    science: tuple[Path, ...],
    reference: tuple[Path, ...],
    instrument: str | None,
    out: Path,
    threshold: float,
    method: str,
    as_json: bool,
) -> None:
    """Find what is new or changed in science images against reference images.

    Any FITS images of one field (plain, .fz, .gz, .bz2): the largest 2-D image of each file is taken, and they are
    aligned by their stars, so that a rough, wrong or missing WCS does no harm. Several images are averaged first.
    Writes alerts.avro, sources.parquet, sources.csv, difference.fits, report.html and report.json to --out. Positions
    are ICRS degrees by the science image's WCS (the reference's when it has none) and 0-based pixels of the first
    science image; fluxes are in that image's unit.

    \b
    Examples:
      cumbre process --science new.fits --reference old.fits --out result
      cumbre process --science a.fits b.fits --reference ref.fits.fz --out result --json
    """
    # Small matrices: threads of the linear algebra only get in each other's way. Read when numpy is loaded.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from cumbre.payloads.difference import DifferenceConfig
    from cumbre.payloads.process_run import run

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    summary = run(
        list(science),
        list(reference),
        out,
        instrument=instrument,
        config=DifferenceConfig(threshold=threshold, method=method),
    )
    if as_json:
        print_json(summary)
        return
    numbers = summary["metrics"]
    click.echo(
        f"{summary['n_sources']} detections, {summary['n_reliable']} reliable (>= {summary['reliable_from']})"
    )
    click.echo(
        f"PSF {numbers['science_fwhm_px']:.2f} px science, {numbers['template_fwhm_px']:.2f} px reference; "
        f"noise {numbers['noise']:.4g}; kernel sum {numbers['kernel_sum']:.4f}; {summary['seconds']} s"
    )
    click.echo(f"report: {out / 'report.html'}")
