"""``cumbre calibrate``: raw frames to calibrated ones with their own bias and flats."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cumbre.cli.files import FilesAfterFlags
from cumbre.cli.main import print_json


@click.command(cls=FilesAfterFlags)
@click.option("--instrument", required=True, help="Name or file of the instrument description.")
@click.option("--bias", multiple=True, type=click.Path(path_type=Path), help="Bias frames.")
@click.option("--flat", multiple=True, type=click.Path(path_type=Path), help="Flats, of any filters.")
@click.option(
    "--science", multiple=True, required=True, type=click.Path(path_type=Path), help="Science frames."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the results."
)
@click.option(
    "--brighter-fatter",
    is_flag=True,
    help="Measure the brighter-fatter kernel from pairs of the flats, and correct with it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def calibrate(
    instrument: str,
    bias: tuple[Path, ...],
    flat: tuple[Path, ...],
    science: tuple[Path, ...],
    out: Path,
    brighter_fatter: bool,
    as_json: bool,
) -> None:
    """Raw frames of a camera to calibrated images, with their own bias frames and flats.

    The master bias and one master flat a filter are made first; each science frame gets the flat of its filter. Then
    sky, cosmic rays, stars and PSF are measured; a frame without stars (a spectrum) is calibrated all the same, with the
    outcome NoWorkFound for its stars. Writes NAME.calibrated.fits (electrons: image, variance, mask), NAME.stars.csv
    and NAME.png (before and after) a science frame, the master frames, and report.json to --out.

    A file that cannot be used is named with its outcome, and the next one is taken; the exit code is 1 then.

    \b
    Examples:
      cumbre calibrate --instrument cafos --bias bias/*.fits --flat flat/*/*.fits --science ngc2420/*.fits --out result
      cumbre calibrate --instrument mycamera.yaml --bias b*.fits --science s1.fits --out result --json
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from cumbre.core.instrument import load_instrument
    from cumbre.payloads.calibrate_run import run

    report = run(
        bias,
        flat,
        science,
        out,
        instrument=load_instrument(instrument),
        brighter_fatter=brighter_fatter,
        progress=None if as_json else _line,
    )
    if as_json:
        print_json(report)
    else:
        _summary(report, out)
    if report["refused"]:
        raise click.exceptions.Exit(1)


def _line(row: dict[str, Any]) -> None:
    if "picture" not in row:
        return
    numbers = f"sky {row['sky_electrons']} e-"
    if row["psf_fwhm_px"] is not None:
        numbers += f", {row['n_stars']} PSF stars of {row['n_detections']}, FWHM {row['psf_fwhm_px']} px"
    mark = "●" if row["outcome"] == "ok" else "○"
    note = f" ({row['message']})" if row["message"] else ""
    click.echo(f"{mark} {row['file']}: {row['outcome']}, {row['filter']}, {numbers}{note}")


def _summary(report: dict[str, Any], out: Path) -> None:
    for row in report["bias"]:
        noise = row["read_noise_adu"]
        text = f", read noise {noise} ADU" if noise else ""
        click.echo(f"bias, detector {row['detector']}: level {row['level_adu']} ADU{text}")
    for row in report["brighter_fatter"]:
        click.echo(
            f"brighter-fatter, detector {row['detector']}: covariance of neighbours {row['neighbour_covariance']:.2e} ± "
            f"{row['neighbour_covariance_err']:.1e} per electron, {row['pairs']} pairs"
        )
    for row in report["refused"]:
        click.echo(f"▲ {row['file']}: {row['outcome']}: {row['message']}", err=True)
    click.echo(
        f"{len(report['frames'])} frames calibrated in {report['seconds']} s; report: {out / 'report.json'}"
    )
