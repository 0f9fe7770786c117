"""``cumbre token``: API tokens and groups of a site's users."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site

if TYPE_CHECKING:
    from cumbre.access.identity import Identity

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _identity(folder: Path) -> Identity:
    from cumbre.access.identity import Identity
    from cumbre.site.roles import site_database

    return Identity(site_database(Site.load(folder)))


@click.group()
def token() -> None:
    """Make, list and revoke API tokens; put users into groups.

    \b
    Examples:
      cumbre token create --site ./site --user vera --scope read:tap --days 30
      cumbre token group --site ./site --user vera --add collaboration
    """


@token.command()
@site_option
@click.option("--user", required=True, help="Account; made when it is not there.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    help="read:tap, read:image, write:table or admin; several may be given.",
)
@click.option("--days", type=float, default=30.0, show_default=True, help="Until the token expires.")
@_json
def create(folder: Path, user: str, scopes: tuple[str, ...], days: float, as_json: bool) -> None:
    """Make a token. Its text is shown once: only a hash of it is stored.

    \b
    Examples:
      cumbre token create --site ./site --user vera --scope read:tap --scope read:image
    """
    made = _identity(folder).create_token(user, scopes, days)
    if as_json:
        print_json(
            {
                "token": made.token,
                "token_id": made.token_id,
                "user": made.account,
                "scopes": list(made.scopes),
                "expires": made.expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )
        return
    click.echo(made.token)
    click.echo(
        f"id {made.token_id} of {made.account}: {', '.join(made.scopes)}, until {made.expires:%Y-%m-%dT%H:%M:%SZ}",
        err=True,
    )


@token.command(name="list")
@site_option
@click.option("--user", default=None, help="Only this account's.")
@_json
def list_tokens(folder: Path, user: str | None, as_json: bool) -> None:
    """List tokens without their secrets."""
    rows = _identity(folder).tokens(user)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        state = "valid" if row["valid"] else "revoked" if row["revoked"] else "expired"
        click.echo(
            f"{row['token_id']}  {row['account']:<16} {state:<8} until {row['expires']:%Y-%m-%dT%H:%M:%SZ}"
            f"  {', '.join(row['scopes'])}"
        )


@token.command()
@site_option
@click.argument("token_id")
def revoke(folder: Path, token_id: str) -> None:
    """Make a token worthless at once."""
    _identity(folder).revoke(token_id)
    click.echo(f"{token_id}: revoked")


@token.command()
@site_option
@click.option("--user", required=True, help="Account; made when it is not there.")
@click.option("--add", "added", multiple=True, help="Group: collaboration, embargo or administrators.")
@click.option("--remove", "removed", multiple=True, help="Group to leave.")
@_json
def group(folder: Path, user: str, added: tuple[str, ...], removed: tuple[str, ...], as_json: bool) -> None:
    """Give or take data rights: what a user's tokens may see follows the groups at once."""
    identity = _identity(folder)
    identity.ensure_account(user)
    for name in added:
        identity.add_member(user, name)
    for name in removed:
        identity.remove_member(user, name)
    answer: dict[str, Any] = {"user": user, "groups": sorted(identity.groups_of(user))}
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{user}: {', '.join(answer['groups']) or 'public only'}")
