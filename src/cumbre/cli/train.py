"""``cumbre train``: the reliability network from simulated and real images with planted sources."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from cumbre.cli.main import print_json


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for reliability.onnx and reliability.json.",
)
@click.option(
    "--seed", default=1, show_default=True, help="Of the network's first weights and the order of examples."
)
@click.option(
    "--skies", default="111,112,113,114,115,116", show_default=True, help="Simulated skies; below 200."
)
@click.option(
    "--detectors", default=4, show_default=True, type=click.IntRange(1, 200), help="Detectors of each."
)
@click.option("--visits", default=4, show_default=True, type=click.IntRange(1, 7), help="Visits of each.")
@click.option("--fine", default="", help="Further skies seen with the 4k camera of finer pixels.")
@click.option(
    "--real",
    "pairs",
    multiple=True,
    type=(click.Path(path_type=Path, exists=True), click.Path(path_type=Path, exists=True), str),
    help="A real image, its reference, and a table with columns x, y of new sources in it that are known and left out"
    " (- for none); sources are planted in the image. May be given again.",
)
@click.option(
    "--work", type=click.Path(path_type=Path), help="Keeps what was simulated. [default: a temporary folder]"
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes.")
@click.option("--json", "as_json", is_flag=True, help="Print reliability.json.")
def train(
    out: Path, seed: int, skies: str, detectors: int, visits: int, fine: str, pairs: tuple[tuple[Path, Path, str], ...],
    work: Path | None, workers: int, as_json: bool,
) -> None:  # fmt: skip
    """Train the network that gives every difference source its reliability, and write it as ONNX.

    The same images and seed give the same file. Classes, numbers and curves stand in the JSON beside it.

    \b
    Examples:
      cumbre train --out model --work training-sky --workers 2
      cumbre train --out model --real new.fits old.fits -
    """
    from cumbre.core.errors import UserError
    from cumbre.site import quality_training as training
    from cumbre.site.quality_images import FIRST_TEST_SEED

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        coarse = [int(text) for text in skies.split(",") if text]
        finer = [int(text) for text in fine.split(",") if text]
    except ValueError as error:
        raise UserError(
            f"--skies {skies!r} --fine {fine!r}: expected whole numbers, comma separated"
        ) from error
    if max([*coarse, *finer], default=0) >= FIRST_TEST_SEED:
        raise UserError(f"--skies: seeds from {FIRST_TEST_SEED} up are kept for tests")
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(work or temporary)
        jobs = [training.Job(folder, s, detectors=detectors, visits=visits) for s in coarse]
        jobs += [training.Job(folder, s, size="4k", detectors=1, visits=min(visits, 2)) for s in finer]
        jobs += [
            training.Job(folder, 0, science=str(a), template=str(b), known="" if c == "-" else c)
            for a, b, c in pairs
        ]
        if not jobs:
            raise UserError("nothing to train on: give --skies, --fine or --real")
        about = training.train(jobs, out, seed=seed, workers=workers)
    if as_json:
        print_json(about)
        return
    click.echo(f"{about['n_real']} real and {about['n_false']} false examples; version {about['version']}")
    for name, row in about["held_out"]["classes"].items():
        kept = row["at_least"][10]
        click.echo(
            f"  {name:<24} {'real ' if row['is_real'] else 'false'} {row['n']:>6}   {100 * kept:6.1f} % at 0.5 or above"
        )
    click.echo(f"model: {out / 'reliability.onnx'}")
