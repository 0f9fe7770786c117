"""``cumbre report``: measured figures as tables, plots and JSON."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import click

from cumbre.cli.main import print_json


@click.group()
def report() -> None:
    """Measure what the system does, and publish it.

    \b
    Examples:
      cumbre report quality --detectors 2 --out quality
    """


@report.command()
@click.option(
    "--detectors", default=4, show_default=True, type=click.IntRange(1, 200), help="Science detectors."
)
@click.option(
    "--visits", default=4, show_default=True, type=click.IntRange(1, 7), help="Visits of each field."
)
@click.option(
    "--seeds",
    default="201,301",
    show_default=True,
    help="Skies, comma separated; from 200 up none was trained on.",
)
@click.option(
    "--size",
    type=click.Choice(["1k", "4k"]),
    default="1k",
    show_default=True,
    help="Demonstration camera, or one 4k x 4k sensor.",
)
@click.option(
    "--published",
    is_flag=True,
    help="The figures of the documentation: skies 309 and 310 with the demonstration camera, 405 with a 4k sensor.",
)
@click.option(
    "--usual", is_flag=True, help="As many transients as a demonstration night has, not three times more."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Keeps what was simulated; a second run renders nothing. [default: a temporary folder]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("quality-report"),
    show_default=True,
    help="Folder of the report.",
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes.")
@click.option("--json", "as_json", is_flag=True, help="Print quality.json.")
def quality(
    detectors: int,
    visits: int,
    seeds: str,
    size: str,
    published: bool,
    usual: bool,
    work: Path | None,
    out: Path,
    workers: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Simulate detector images with realistic defects, run the payload from raw files, compare with the truth.

    \b
    Examples:
      cumbre report quality --detectors 1 --visits 2 --seeds 201
      cumbre report quality --size 4k --detectors 1 --visits 2 --seeds 401 --work sky4k
      cumbre report quality --published --work skies
    """
    from cumbre.core.errors import UserError
    from cumbre.site import quality as measuring
    from cumbre.site import quality_page

    try:
        numbers = [int(text) for text in seeds.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {seeds!r}: expected whole numbers, comma separated") from error
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = {"size": size, "seeds": numbers, "detectors": detectors, "visits": visits, "rich": not usual}
    wanted = list(measuring.PUBLISHED) if published else [options]
    with tempfile.TemporaryDirectory() as temporary:
        data, *others = (_measured(work or Path(temporary), workers, **made_of) for made_of in wanted)
    if others:
        data["also"] = {other["made_of"]["size"]: other for other in others}
    if published:
        data["made_of"]["command"] = "cumbre report quality --published"
    files = quality_page.write(out, data)
    if as_json:
        print_json(data)
        return
    for row in quality_page.targets(data):
        mark = "✔" if row["is_met"] else "✘"
        click.echo(
            f"{mark} {row['name']:<32} {quality_page.shown(row['value'], is_part=row['is_part']):>8}   required {row['required']}"
        )
    click.echo(f"report: {files['quality.html']}")


def _measured(
    folder: Path, workers: int, *, size: str, seeds: list[int], detectors: int, visits: int, rich: bool
) -> dict[str, Any]:
    """Figures of the skies of one size of detector, and what they are made of."""
    from cumbre.site import quality as measuring

    jobs = [
        measuring.Job(str(folder), seed, size=size, rich=rich, detectors=detectors, visits=visits)
        for seed in seeds
    ]
    data = measuring.measure(jobs, workers=workers)
    command = f"cumbre report quality --size {size} --detectors {detectors} --visits {visits}"
    command += f" --seeds {','.join(map(str, seeds))}" + ("" if rich else " --usual")
    made_of = {"size": size, "seeds": seeds, "detectors": detectors, "visits": visits, "rich": rich}
    return data | {"made_of": made_of | {"command": command}}
