"""``cumbre doctor``: check this machine and a site, say what to do."""

from __future__ import annotations

import datetime
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from cumbre.cli.main import print_json
from cumbre.core.configuration import Site
from cumbre.core.errors import CumbreError, UserError

MODULES = ("numpy", "numba", "cv2", "sep", "fitsio", "astropy", "pyarrow", "psycopg", "lsst.daf.butler",
           "distributed", "confluent_kafka", "fastavro")  # fmt: skip
MIN_FREE_GB = 5.0
MIN_MEMORY_GB = 4.0
MIN_FILES = 1024
MIN_CERTIFICATE_DAYS = 30


@click.command()
@click.option("--site", "folder", type=click.Path(path_type=Path), help="Also check this site.")
@click.option(
    "--accept-software", is_flag=True, help="Record that what is installed here may run at this site."
)
@click.option(
    "--prove",
    is_flag=True,
    help="Read every stored byte and compare it with the camera's store (takes long).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(folder: Path | None, accept_software: bool, prove: bool, as_json: bool) -> None:
    """Check everything that a site needs, and say what to do about what is wrong.

    \b
    Examples:
      cumbre doctor
      cumbre doctor --site ./site --json
      cumbre doctor --site ./site --accept-software
      cumbre doctor --site ./site --prove
    """
    if prove and folder is None:
        raise UserError("--prove: expected --site DIR, the site whose files are read")
    if accept_software:
        _accept(folder)
    results = [_run(name, check) for name, check in _checks(folder)]
    if prove and folder is not None:
        results.append(_run("stored bytes", lambda: _prove(folder)))
    if as_json:
        print_json(results)
    else:
        for item in results:
            click.echo(f"{'✓' if item['ok'] else '✗'} {item['check']}: {item['message']}")
    if not all(item["ok"] for item in results):
        raise click.exceptions.Exit(1)


def _run(name: str, check: Callable[[], tuple[bool, str]]) -> dict[str, Any]:
    try:
        good, message = check()
    except (CumbreError, ImportError, OSError) as error:
        good, message = False, str(error)
    return {"check": name, "ok": good, "message": message}


def _checks(folder: Path | None) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    yield "interpreter", _interpreter
    for module in MODULES:
        yield f"package {module}", lambda module=module: _module(module)  # type: ignore[misc]
    yield "memory", _memory
    yield "open files", _open_files
    yield "disk", lambda: _disk(folder or Path.cwd())
    if folder is not None:
        yield "site file", lambda: (True, f"{Site.load(folder).config.profile} profile is valid")
        yield "services", lambda: _services(folder)
        yield "ledger", lambda: _ledger(folder)
        yield "certificates", lambda: _certificates(folder)
        yield "software", lambda: _software(folder)


def _interpreter() -> tuple[bool, str]:
    version = sys.version_info
    return (3, 12) <= version < (
        3,
        14,
    ), f"Python {version.major}.{version.minor}.{version.micro} (3.12 or 3.13 wanted)"


def _module(name: str) -> tuple[bool, str]:
    module = importlib.import_module(name)
    return True, f"{getattr(module, '__version__', 'installed')}"


def _memory() -> tuple[bool, str]:
    import psutil

    free = psutil.virtual_memory().available / 1e9
    return free > MIN_MEMORY_GB, f"{free:.1f} GB free ({MIN_MEMORY_GB:.0f} GB wanted for the demonstration)"


def _open_files() -> tuple[bool, str]:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft >= MIN_FILES, f"limit {soft} ({MIN_FILES} wanted; raise it with: ulimit -n 65536)"


def _disk(folder: Path) -> tuple[bool, str]:
    there = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(there).free / 1e9
    return free > MIN_FREE_GB, f"{free:.0f} GB free at {there} ({MIN_FREE_GB:.0f} GB wanted)"


def _services(folder: Path) -> tuple[bool, str]:
    from cumbre.cli.status import status_of

    report = status_of(Site.load(folder))
    if not report["up"]:
        return True, "down (start with: cumbre up)"
    bad = [s["name"] for s in report["services"] if s["state"] != "running"]
    return not bad, f"{len(report['services'])} services" + (
        f"; not running: {', '.join(bad)}" if bad else ""
    )


def _ledger(folder: Path) -> tuple[bool, str]:
    from cumbre.cli.status import status_of

    site = Site.load(folder)
    if not status_of(site)["up"]:
        return True, "not checked: the site is down"
    from cumbre.ledger import Ledger
    from cumbre.site.roles import site_database

    missing = list(Ledger(site_database(site)).missing("archive"))
    return not missing, f"{len(missing)} detector images not at the archive" + (
        "; see: cumbre query ledger missing" if missing else ""
    )


def _prove(folder: Path) -> tuple[bool, str]:
    from cumbre.cli.status import status_of
    from cumbre.site.proof import prove
    from cumbre.site.roles import site_database

    site = Site.load(folder)
    proof = prove(site, site_database(site) if status_of(site)["up"] else None)
    told = proof.public()
    counts = ", ".join(f"{told[f'verified_{place}']} at {place}" for place in proof.verified)
    message = f"{len(proof.taken)} images in the camera's store; verified: {counts}"
    return proof.ok, "; ".join([message, *proof.problems(5)])


def _accept(folder: Path | None) -> None:
    """Record the installed software in the control database."""
    from cumbre.observatory.component.client import person
    from cumbre.observatory.control.schema import prepare
    from cumbre.observatory.control.software import accept_installed
    from cumbre.site.roles import open_site_clock, site_database

    if folder is None:
        raise UserError("--accept-software: expected --site too: it is recorded in the site's database")
    site = Site.load(folder)
    db = site_database(site)
    prepare(db)
    version, digest = accept_installed(db, by=person(), now_tai=open_site_clock(site).now_tai_s())
    click.echo(f"accepted: version {version}, {digest}", err=True)


def _software(folder: Path) -> tuple[bool, str]:
    from cumbre import __version__
    from cumbre.cli.status import status_of
    from cumbre.observatory.control.schema import prepare
    from cumbre.observatory.control.software import installed_hash, is_accepted
    from cumbre.site.roles import site_database

    site, digest = Site.load(folder), installed_hash()
    here = f"version {__version__}, {digest[:19]}…"
    if not site.config.archive.control or site.config.control.software == "installed":
        return True, here
    if not status_of(site)["up"]:
        return True, f"{here}; not checked: the site is down"
    db = site_database(site)
    prepare(db)
    if is_accepted(db, __version__, digest):
        return True, f"{here}, accepted"
    return (
        False,
        f"{here} is not accepted here; when it is what it should be: cumbre doctor --accept-software",
    )


def _certificates(folder: Path) -> tuple[bool, str]:
    from cumbre.archive.certificates import expiries

    ends = expiries(Site.load(folder))
    if not ends:
        return True, "none: links are not encrypted (tls: in site.yaml)"
    path, end = min(ends.items(), key=lambda item: item[1])
    days = (end - datetime.datetime.now(datetime.UTC)).days
    return days >= MIN_CERTIFICATE_DAYS, f"{path} ends in {days} days" + (
        "" if days >= MIN_CERTIFICATE_DAYS else "; renew with: cumbre certificates --renew"
    )
