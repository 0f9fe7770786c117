"""Simple Cone Search 1.03 on every published table that has a position."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from cumbre.access.http.base import (
    VOTABLE_MIME,
    Parameters,
    UsageError,
    error_headers,
    in_pool,
    read_parameters,
    status_of,
    xml_attribute,
    xml_text,
)
from cumbre.access.http.tap import Question, Tap, user_of
from cumbre.access.identity import Principal
from cumbre.access.results import find_format
from cumbre.access.tables import Column, Table
from cumbre.core.errors import CumbreError

DEFAULT_TABLE = "level1.DiaObject"


def cone_error(error: CumbreError) -> Response:
    """An error as cone search wants it, and as DALI does."""
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<VOTABLE version="1.4" xmlns="http://www.ivoa.net/xml/VOTable/v1.3">\n'
        f'<INFO ID="Error" name="Error" value={xml_attribute(error)}/>\n<RESOURCE type="results">\n'
        f'<INFO name="QUERY_STATUS" value="ERROR">{xml_text(error)}</INFO>\n</RESOURCE>\n</VOTABLE>\n'
    )
    return Response(text, status_of(error), error_headers(error), VOTABLE_MIME)


def _number(parameters: Parameters, name: str, low: float, high: float) -> float:
    text = parameters.required(name)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise UsageError(f"{name} = {text[:40]!r}: expected a number of degrees from {low:g} to {high:g}")
    return value


@dataclass(frozen=True)
class Cone:
    """Cones on the tables of a site."""

    tap: Tap

    async def search(self, request: Request, who: Principal) -> Response:
        """``/cone/SCHEMA.TABLE?RA=&DEC=&SR=``; ``/cone`` asks the objects of Level 1."""
        parameters = await read_parameters(request)
        ra = _number(parameters, "RA", 0, 360)
        dec = _number(parameters, "DEC", -90, 90)
        radius = _number(parameters, "SR", 0, 180)
        verbosity = parameters.integer("VERB") or 2
        if verbosity > 3:
            raise UsageError(f"VERB = {verbosity}: expected 1, 2 or 3")
        name = request.path_params.get("table", DEFAULT_TABLE)
        schema, _, bare = name.rpartition(".")
        table = await in_pool(self.tap.pool, self.tap.tables.find, schema or None, bare, user_of(who))
        maxrec = 0 if radius == 0 else parameters.integer("MAXREC")
        form = find_format(parameters.value("RESPONSEFORMAT"))
        question = Question(cone_adql(table, ra, dec, radius, verbosity), form, "1.4", maxrec)
        return await self.tap.answer(request, question, who, describe=lambda column: _old_ucd(table, column))


def cone_adql(table: Table, ra: float, dec: float, radius: float, verbosity: int) -> str:
    """The query of a cone.

    Raises
    ------
    UsageError
        The table has no position.
    """
    place = table.position
    if place is None:
        raise UsageError(f"table {table.full_name} has no positions; tap_schema.columns shows which have")
    identifier = _identifier(table)
    wanted = [
        column.name
        for column in table.columns
        if verbosity == 3 or column.principal or column.name in (place.ra, place.dec, identifier)
    ]
    chosen = ", ".join(f'"{name}"' for name in wanted)
    distance = f'DISTANCE("{place.ra}", "{place.dec}", {ra!r}, {dec!r})'
    return (
        f'SELECT {chosen} FROM "{table.schema}"."{table.name}"'  # noqa: S608 (ADQL of our own names and numbers)
        f" WHERE {distance} <= {radius!r} ORDER BY {distance}"
    )


def _identifier(table: Table) -> str | None:
    """The column that names a row: the one with meta.main, or the first identifier."""
    marked = [c.name for c in table.columns if c.ucd.startswith("meta.id") and "meta.main" in c.ucd]
    named = [c.name for c in table.columns if c.ucd.startswith("meta.id")]
    return next(iter(marked + named), None)


def _old_ucd(table: Table, column: Column) -> Column:
    """The standard asks for UCDs of the first kind on three columns."""
    place = table.position
    assert place is not None
    old = {place.ra: "POS_EQ_RA_MAIN", place.dec: "POS_EQ_DEC_MAIN", _identifier(table): "ID_MAIN"}
    return replace(column, ucd=old.get(column.name, column.ucd))
