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
@click.option("--adql", help="One ADQL query over every table: live ones, releases, users' own.")
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --adql: a file; its ending says the format (vot, parquet, fits, csv, tsv, json).",
)
@click.argument("words", nargs=-1)
def query(
    folder: Path, as_json: bool, limit: int, adql: str | None, output: Path | None, words: tuple[str, ...]
) -> None:  # fmt: skip
    """Ask the ledger, or any table with one ADQL query or one SQL SELECT.

    \b
    cumbre query --adql "SELECT TOP 5 * FROM ivoa.obscore"
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
    if (adql is None) == (not words):
        raise UserError('expected either --adql "SELECT …" or words; see cumbre query --help')
    if output is not None:
        if adql is None:
            raise UserError("--output needs --adql")
        _document(site, db, adql, output)
        return
    tapes = [f"{name}_tape" for name, place in site.config.places.items() if place.tape]
    if adql is not None:
        rows = ask(site, db, adql, limit)
    elif words[0] == "ledger":
        rows = _ledger(db, words[1:], tapes)
    else:
        rows = select(db, " ".join(words), limit)
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


def start_adql(site: Site, db: Any, adql: str, limit: int | None) -> Any:
    """Start an ADQL query with the rights of who may read the site's folder: all of them.

    Raises
    ------
    AdqlError
        The query is wrong; says where and what to do.
    """
    from cumbre.access.engines import Engines
    from cumbre.access.identity import RIGHTS
    from cumbre.access.limits import Limits
    from cumbre.access.query import run
    from cumbre.access.user import User
    from cumbre.site.access import tables_of
    from cumbre.site.roles import open_site_clock

    config = site.config.access
    limits = Limits(rows=config.rows, seconds=config.job_s, memory_mb=config.memory_mb)
    user = User("site", frozenset(RIGHTS))
    tables = tables_of(site, db, open_site_clock(site))
    return run(adql, tables=tables, engines=Engines(db), user=user, limits=limits, maxrec=limit)


def ask(site: Site, db: Any, adql: str, limit: int) -> list[dict[str, Any]]:
    """Rows of an ADQL query."""
    result = start_adql(site, db, adql, limit)
    rows: list[dict[str, Any]] = result.read_all().to_pylist()
    if result.overflow is not None:
        click.echo(f"overflow: {result.overflow}; ask for more with --limit", err=True)
    return rows


def _document(site: Site, db: Any, adql: str, path: Path) -> None:
    """A whole result as a file; written beside it and renamed when it is whole."""
    from cumbre.access.results import FORMATS, write

    form = next((f for f in FORMATS if f.extension == path.suffix.lstrip(".").lower()), None)
    if form is None:
        raise UserError(
            f"{path}: expected an ending among {', '.join(dict.fromkeys(f.extension for f in FORMATS))}"
        )
    result = start_adql(site, db, adql, None)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            outcome = write(result, form, file.write, info={"QUERY": adql})
        if outcome.startswith("ERROR"):
            raise UserError(outcome)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    click.echo(f"{path}: {result.rows} rows, {outcome}", err=True)


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
