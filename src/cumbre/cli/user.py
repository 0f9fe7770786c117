"""``cumbre user`` and ``cumbre login``: people of the built-in provider, and tokens got by logging in."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site
from cumbre.core.errors import DeadlineError, TransientError, UserError

if TYPE_CHECKING:
    from cumbre.access.identity_local import Users


def _users(folder: Path) -> Users:
    from cumbre.access.identity_local import USERS_FILE, Users

    return Users(Site.load(folder).path(USERS_FILE))


@click.group()
def user() -> None:
    """People who log in with a password at the built-in provider of one machine.

    \b
    Examples:
      cumbre user add vera --group collaboration --site ./site
      cumbre user list --site ./site
    """


@user.command()
@site_option
@click.option("--group", "groups", multiple=True, help="collaboration, embargo, administrators; several.")
@click.option(
    "--password-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Instead of asking for it.",
)
@click.argument("name")
def add(folder: Path, groups: tuple[str, ...], password_file: Path | None, name: str) -> None:
    """Add NAME, or give NAME another password and other groups."""
    if password_file is not None:
        password = password_file.read_text().strip()
    else:
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    _users(folder).set(name, password, list(groups))
    click.echo(f"{name}: {', '.join(groups) or 'public only'}")


@user.command(name="list")
@site_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_users(folder: Path, as_json: bool) -> None:
    """List names and groups."""
    names = _users(folder).names()
    if as_json:
        print_json([{"user": name, "groups": groups} for name, groups in names.items()])
        return
    for name, groups in names.items():
        click.echo(f"{name:<24} {', '.join(groups) or 'public only'}")


@user.command()
@site_option
@click.argument("name")
def remove(folder: Path, name: str) -> None:
    """Take NAME out; tokens that NAME has stay valid until they are revoked."""
    _users(folder).remove(name)
    click.echo(f"{name}: removed; tokens: cumbre token list --user {name}")


@click.command()
@click.option("--url", required=True, help="Address of the site's pages.")
@click.option("--scope", "scopes", multiple=True, default=("read:tap", "read:image"), show_default=True)
@click.option("--days", type=click.IntRange(1, 90), default=30, show_default=True, help="Life of the token.")
def login(url: str, scopes: tuple[str, ...], days: int) -> None:
    """Print a token for the services at URL, after you log in with a browser (any browser, anywhere).

    \b
    Examples:
      TOKEN=$(cumbre login --url http://127.0.0.1:8080)
    """
    asked = _post(url, "login/device", {"scope": " ".join(scopes), "days": str(days)})
    click.echo(f"Open {asked['verification_uri_complete']} and allow the code {asked['user_code']}", err=True)
    end = time.monotonic() + float(asked["expires_in"])
    while time.monotonic() < end:
        time.sleep(float(asked["interval"]))
        answer = _post(url, "login/device/token", {"device_code": asked["device_code"]})
        if "access_token" in answer:
            click.echo(answer["access_token"])
            click.echo(f"{answer['user']}: {answer['scope']}, until {answer['expires']}", err=True)
            return
    raise DeadlineError("nobody allowed the code in time; begin again: cumbre login")


def _post(url: str, path: str, form: dict[str, str]) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url {url!r}: expected http:// or https://")
    address = f"{url.rstrip('/')}/{path}"
    try:
        with urllib.request.urlopen(address, urllib.parse.urlencode(form).encode(), timeout=30) as answer:  # noqa: S310
            content: dict[str, Any] = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(2000).decode("utf-8", "replace")
        if error.code == 400 and "authorization_pending" in said:
            return {}
        raise UserError(f"{address}: {said.strip() or error}") from error
    except OSError as error:
        raise TransientError(f"{address}: {error}") from error
    return content
