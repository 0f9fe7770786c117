"""``cumbre query``: the ledger in words, the tables in SQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cumbre.cli.main import print_json
from cumbre.cli.up import site_option
from cumbre.core.configuration import Site
from cumbre.core.errors import UserError


@click.command()
@site_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON rows.")
@click.option("--limit", default=1000, show_default=True, help="At most so many rows.")
@click.argument("words", nargs=-1, required=True)
def query(folder: Path, as_json: bool, limit: int, words: tuple[str, ...]) -> None:
    """Ask the ledger, or any table with one SQL SELECT.

    \b
    cumbre query ledger                     one line an image
    cumbre query ledger where OBS_ID        every copy and hop of an image
    cumbre query ledger missing [PLACE]     what is not yet at a place (archive)
    cumbre query ledger why OBS_ID          where each detector stands, and why
    cumbre query ledger night DAY_OBS       expected, written, transferred, missing, resent
    cumbre query "SELECT * FROM ledger.image"

    \b
    Examples:
      cumbre query --json "SELECT hop, count(*) FROM ledger.hop GROUP BY hop"
      cumbre query ledger why XC_O_20261120_000012
    """
    from cumbre.site.roles import site_database

    site = Site.load(folder)
    db = site_database(site)
    tapes = [f"{name}_tape" for name, place in site.config.places.items() if place.tape]
    rows = _ledger(db, words[1:], tapes) if words[0] == "ledger" else select(db, " ".join(words), limit)
    if as_json:
        print_json(rows)
    else:
        _table(rows)


def select(db: Any, sql: str, limit: int) -> list[dict[str, Any]]:
    """Run one read-only statement with a deadline of 60 s.

    Raises
    ------
    UserError
        Not one SELECT, or the database refuses it; the message is the database's.
    """
    import psycopg
    from psycopg.rows import dict_row

    with psycopg.connect(db.dsn, autocommit=False, row_factory=dict_row) as connection:
        # The server enforces what we promise: read-only, one statement (extended protocol), bounded time.
        connection.read_only = True
        connection.execute("SET LOCAL statement_timeout = '60s'")
        try:
            cursor = connection.execute(sql.encode(), None, prepare=True)
            if cursor.description is None:
                raise UserError("expected one SELECT; this statement returns no rows")
            rows: list[dict[str, Any]] = cursor.fetchmany(limit + 1)
        except psycopg.Error as error:
            raise UserError(f"the database refuses the query: {str(error).strip()}") from error
    if len(rows) > limit:
        click.echo(f"overflow: only the first {limit} rows; ask for more with --limit", err=True)
    return rows[:limit]


def _ledger(db: Any, words: tuple[str, ...], tapes: list[str]) -> list[dict[str, Any]]:
    from cumbre.ledger import Ledger

    ledger = Ledger(db)
    verb = words[0] if words else "summary"
    argument = words[1] if len(words) > 1 else None
    if verb == "summary":
        return list(ledger.summary(int(argument) if argument else None))
    if verb == "missing":
        return list(ledger.missing(argument or "archive"))
    if verb == "night" and argument and argument.isdigit():
        return [ledger.night(int(argument), tapes)]
    if verb in ("where", "why") and argument:
        if verb == "where":
            return list(ledger.where(argument))
        answer = ledger.why(argument)
        return [item if isinstance(item, dict) else {"why": item} for item in answer]
    raise UserError(
        "ledger: expected where OBS_ID, why OBS_ID, missing [PLACE], summary [DAY_OBS] or night DAY_OBS"
    )


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        click.echo("no rows")
        return
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    # As wide as the rows are: a terminal scrolls, a pipe wants whole values.
    Console(width=max(sum(map(len, map(str, row.values()))) + 40 * len(row) for row in rows)).print(table)
