"""``cumbre``: few verbs, each loaded only when it is called, so that ``--help`` is instant."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import click

from cumbre import __version__
from cumbre.core.errors import CumbreError

VERBS = {
    "init": ("cumbre.cli.init", "init", "Create a site in a folder."),
    "up": ("cumbre.cli.up", "up", "Start a site's services."),
    "down": ("cumbre.cli.up", "down", "Stop a site's services."),
    "status": ("cumbre.cli.status", "status", "Show a site's services, alarms and addresses."),
    "night": ("cumbre.cli.night", "night", "Run a simulated night and report on it."),
    "chaos": (
        "cumbre.cli.chaos",
        "chaos",
        "Run a simulated night full of faults and prove that nothing is lost.",
    ),
    "ingest": ("cumbre.cli.ingest", "ingest", "Take files of a real camera into the flow."),
    "process": ("cumbre.cli.process", "process", "Science and reference images to alerts, without a site."),
    "pipeline": ("cumbre.cli.pipeline", "pipeline", "Make a repository ready for pipetask."),
    "calibrate": (
        "cumbre.cli.calibrate",
        "calibrate",
        "Raw frames to calibrated ones with their own bias and flats.",
    ),
    "lightcurve": ("cumbre.cli.lightcurve", "lightcurve", "Frames of one field to light curves."),
    "tape": ("cumbre.cli.tape", "tape", "List, read and verify tape volumes."),
    "ship": ("cumbre.cli.ship", "ship", "Carry images and telemetry on a disk."),
    "process-missed": (
        "cumbre.cli.missed",
        "process_missed",
        "Do the images that prompt processing left for later.",
    ),
    "report": ("cumbre.cli.report", "report", "Measure the quality of alerts on simulated images."),
    "train": ("cumbre.cli.train", "train", "Train the network that gives sources their reliability."),
    "benchmark": ("cumbre.cli.benchmark", "benchmark", "Measure the speed of this machine with our code."),
    "query": ("cumbre.cli.query", "query", "Ask the ledger or the tables."),
    "alerts": ("cumbre.cli.alerts", "alerts", "Read alerts of the archive."),
    "orbits": ("cumbre.cli.orbits", "orbits", "Load orbits of known solar-system objects."),
    "template": ("cumbre.cli.template", "template", "Make templates of the archived visits."),
    "precover": ("cumbre.cli.precover", "precover", "Measure new objects on the images before."),
    "release": ("cumbre.cli.release", "release", "Load, verify, open and close release catalogues."),
    "snapshot": ("cumbre.cli.snapshot", "snapshot", "Make a day's snapshot of Level 1."),
    "instrument": ("cumbre.cli.instrument", "instrument", "List, show and check instrument descriptions."),
    "certificates": (
        "cumbre.cli.certificates",
        "certificates",
        "Show and renew the certificates of the links.",
    ),
    "token": ("cumbre.cli.token", "token", "Make API tokens and put users into groups."),
    "hips": ("cumbre.cli.hips", "hips", "Make sky images that viewers pan and zoom."),
    "user": ("cumbre.cli.user", "user", "People with passwords at the built-in provider."),
    "login": ("cumbre.cli.user", "login", "Get a token by logging in with a browser."),
    "command": ("cumbre.cli.command", "command", "Command an entity of the control system."),
    "doctor": ("cumbre.cli.doctor", "doctor", "Check this machine and a site, and say what to do."),
}


class LazyGroup(click.Group):
    """A group whose verbs are imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs in the order of use."""
        del ctx
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        del ctx
        if cmd_name not in VERBS:
            return None
        module, attribute, _ = VERBS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List verbs without importing them."""
        del ctx
        with formatter.section("Verbs"):
            formatter.write_dl([(name, help_text) for name, (_, _, help_text) in VERBS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cumbre")
def cli() -> None:
    """An observatory's data management system: from the shutter to alerts, archives and queries.

    \b
    Examples:
      cumbre night --site ./night-site --visits 8      a simulated night, with a report
      cumbre process --science new.fits --reference old.fits --out result
      cumbre query --site ./night-site ledger missing
    """


def print_json(data: Any) -> None:
    """One JSON object on standard output."""
    click.echo(json.dumps(data, default=str, indent=2, allow_nan=False))


def main() -> None:
    """Entry point: our errors become one clear line and an exit code.

    Exit codes: 0 done; 1 failed; 2 bad input; 3 not found; 130 interrupted.
    """
    try:
        # Outside standalone mode click returns the code of an Exit instead of raising it.
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except CumbreError as error:
        click.echo(f"cumbre: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
