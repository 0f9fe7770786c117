"""``cumbre release``: load, verify, open and close release catalogues."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site

if TYPE_CHECKING:
    from cumbre.access.releases.load import Progress
    from cumbre.access.releases.registry import Releases

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def release() -> None:
    """Release catalogues: staged, tested, opened, closed.

    A release is a folder with release.yaml (its tables in Felis) and Parquet or CSV files. It is loaded hidden: only
    users in the group `releases` see it, as a schema of its name. Verifying reads every byte. Opening a new release
    closes the older ones, except the newest two and the first.

    \b
    Examples:
      cumbre release make ./dr1 --name dr1 --site ./site
      cumbre release load ./dr1 --site ./site
      cumbre release verify dr1 --site ./site
      cumbre release open dr1 --site ./site
      cumbre release list --site ./site --json
      cumbre release close dr1 --site ./site
    """


def releases_of(folder: Path) -> Releases:
    """The releases of a site."""
    from cumbre.access.releases.registry import Releases
    from cumbre.site.roles import open_site_clock, site_database

    site = Site.load(folder)
    who = f"operator:{getpass.getuser()}"
    return Releases(site_database(site), site.path("archive/releases"), open_site_clock(site), who=who)


@contextmanager
def _bar(quiet: bool) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    with Progress(
        *Progress.get_default_columns(), TextColumn("{task.completed:,.0f} rows"), console=Console(stderr=True),
        transient=True, disable=quiet,
    ) as progress:  # fmt: skip
        tasks: dict[str, int] = {}

        def tell(table: str, rows: int) -> None:
            if table not in tasks:
                tasks[table] = progress.add_task(table, total=None)
            progress.advance(tasks[table], rows)  # type: ignore[arg-type]

        yield tell


@release.command()
@site_option
@click.option("--name", default="dr1", show_default=True, help="Name of the release.")
@json_option
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
def make(folder: Path, name: str, as_json: bool, out: Path) -> None:
    """Make a small release of the site's own data in folder OUT: objects of its coadds, and its visits."""
    from rich.console import Console
    from rich.progress import Progress

    from cumbre.site.release import make_release

    with Progress(console=Console(stderr=True), transient=True, disable=as_json) as progress:
        task = progress.add_task("coadds", total=None)
        rows = make_release(
            Site.load(folder),
            out,
            name,
            progress=lambda done, of: progress.update(task, completed=done, total=of),
        )
    if as_json:
        print_json({"name": name, "folder": str(out), "tables": rows})
    else:
        click.echo(f"● {out}: {', '.join(f'{count:,} rows of {table}' for table, count in rows.items())}")
        click.echo(f"next: cumbre release load {out} --site {folder}")


@release.command()
@site_option
@click.option("--name", help="Name other than the one in release.yaml.")
@json_option
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
def load(folder: Path, name: str | None, as_json: bool, source: Path) -> None:
    """Take the release in folder SOURCE, hidden: checked against its description, sorted along the sky."""
    with _bar(as_json) as progress:
        made = releases_of(folder).load(source, name=name, progress=progress)
    if as_json:
        print_json(made.public())
    else:
        click.echo(f"● {made.name} is {made.state}: {made.rows:,} rows, {made.bytes / 1e6:,.1f} MB")
        click.echo(f"next: cumbre release verify {made.name} --site {folder}")


@release.command()
@site_option
@json_option
@click.argument("name")
def verify(folder: Path, as_json: bool, name: str) -> None:
    """Read every byte of release NAME again; damage closes it. The exit code is 1 when something is wrong."""
    releases = releases_of(folder)
    with _bar(as_json) as progress:
        wrong = releases.verify(name, progress)
    now = releases.find(name)
    if as_json:
        print_json({"name": name, "state": now.state, "wrong": wrong})
    else:
        for line in wrong:
            click.echo(f"▲ {line}")
        found = f"▲ {name}: {len(wrong)} things wrong" if wrong else f"● {name}: all right"
        click.echo(f"{found}; it is {now.state}")
    if wrong:
        raise click.exceptions.Exit(1)


@release.command("open")
@site_option
@json_option
@click.argument("name")
def open_release(folder: Path, as_json: bool, name: str) -> None:
    """Open the verified release NAME to everybody; older ones are closed by the rule."""
    closed = releases_of(folder).open(name)
    if as_json:
        print_json({"name": name, "state": "open", "closed": closed})
    else:
        click.echo(f"● {name} is open" + (f"; closed: {', '.join(closed)}" if closed else ""))


@release.command()
@site_option
@json_option
@click.argument("name")
def close(folder: Path, as_json: bool, name: str) -> None:
    """Close release NAME: from now on only its testers read it. It may be opened again."""
    releases_of(folder).close(name)
    if as_json:
        print_json({"name": name, "state": "closed"})
    else:
        click.echo(f"● {name} is closed")


@release.command()
@site_option
@click.confirmation_option(prompt="Its files are deleted. Go on?")
@click.argument("name")
def drop(folder: Path, name: str) -> None:
    """Delete release NAME, which was never open."""
    releases_of(folder).drop(name)
    click.echo(f"● {name} is gone")


@release.command("list")
@site_option
@json_option
def list_releases(folder: Path, as_json: bool) -> None:
    """Every release and its state."""
    rows = [item.public() for item in releases_of(folder).all()]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(
            f"{row['name']:<16} {row['state']:<9} {row['rows']:>14,} rows {row['bytes'] / 1e6:>10,.1f} MB  {row['description']}"
        )
    if not rows:
        click.echo("no releases")


@release.command()
@site_option
@json_option
@click.argument("name")
def history(folder: Path, as_json: bool, name: str) -> None:
    """Every step of release NAME: when, who, what."""
    rows = releases_of(folder).history(name)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(
            f"{row['at']}Z {row['verb']:<7} {row['state'] or 'gone':<9} {row['who']}: {row['message']}"
        )
