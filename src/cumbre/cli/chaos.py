"""``cumbre chaos``: everything goes wrong at random moments, and nothing may be lost."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import click

from cumbre.cli.main import print_json


@click.command()
@click.option("--minutes", default=3.0, show_default=True, type=click.FloatRange(0.1, 2880),
              help="How long faults are caused, real minutes.")  # fmt: skip
@click.option("--seed", default=1, show_default=True, help="Seed of the plan of faults and of the sky.")
@click.option("--site", "folder", type=click.Path(path_type=Path),
              help="Simulated site to use; made there when there is none.  [default: ./chaos-site, fresh]")  # fmt: skip
@click.option("--plan", is_flag=True, help="Only print the plan of faults, one JSON object a line.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last; progress goes to stderr.")
def chaos(minutes: float, seed: int, folder: Path | None, plan: bool, as_json: bool) -> None:
    """Run a simulated night while services are killed, links break, disks fill and bytes rot.

    Afterwards every stored byte is read: each image of the camera must be at both sites and on both tapes,
    once, pixel for pixel. The exit code is 0 only if nothing was lost or duplicated. The same seed, length and
    site give the same faults; what was done when is in chaos/faults.jsonl of the site.

    \b
    Examples:
      cumbre chaos --minutes 3 --seed 7 --json
      cumbre chaos --minutes 600 --seed 1 --site /data/chaos
    """
    from cumbre.site import chaos as runs
    from cumbre.site import chaos_plan
    from cumbre.site import night as nights
    from cumbre.site.supervisor import stop_site

    begun = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - begun:6.1f} s] {text}", err=as_json)
        sys.stdout.flush()

    root = folder or Path("chaos-site")
    made = folder is None or not (root / "site.yaml").exists()
    if plan:
        with tempfile.TemporaryDirectory() as scratch:
            site = runs.chaos_site(Path(scratch) if made else root, seed, minutes, small_disks=False)
            for fault in chaos_plan.make_plan(seed, minutes * 60, chaos_plan.Targets.of(site)):
                click.echo(json.dumps(fault.public()))
        return
    if folder is None:
        runs.clear(root)
        nights.demonstration_folder(root)
    site = runs.chaos_site(root, seed, minutes)
    run = runs.Chaos(site, seed=seed, seconds=minutes * 60, say=say)
    say(f"site {site.root}, seed {seed}, {minutes:g} minutes")
    if not run.targets.disks:
        say("disks of their own need root: no disk will be filled")
    try:
        outcome = run.run()
    except BaseException as error:
        say(f"the run did not end: {error}")
        raise
    finally:
        if made:
            stop_site(site, wait_s=runs.STOP_S)
            runs.release_disks(root)
    for line in outcome.proof.problems():
        say(f"▲ {line}")
    data = outcome.public()
    if as_json:
        print_json(data)
    else:
        for key in (
            "images_taken",
            "verified_base",
            "verified_archive",
            "lost",
            "duplicated",
            "worst_catch_up_s",
        ):
            click.echo(f"{key.replace('_', ' '):<18}{data[key]}")
        click.echo(
            "faults            " + ", ".join(f"{kind} {count}" for kind, count in data["faults"].items())
        )
        click.echo(f"journal           {data['journal']}")
    if not outcome.ok:
        raise click.exceptions.Exit(1)
