"""Tables of one query: what a user sent along with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from cumbre.access.results.types import column_of_field, conform_table
from cumbre.access.tables import Column, Position, Schema, Table, Tables

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = "TAP_UPLOAD"


def upload_table(name: str, rows: pa.Table) -> Table:
    """An upload as a table: columns described by the Arrow fields and their metadata."""
    rows = conform_table(rows)
    columns = tuple(_column(field, rows) for field in rows.schema)
    return Table(
        SCHEMA, name, columns, "Uploaded with the query.", "arrow", rows, _position(rows), rows=rows.num_rows
    )


def _column(field: pa.Field, rows: pa.Table) -> Column:
    """A column of an upload; text with more than ASCII is declared as such."""
    import pyarrow.compute as pc

    column = column_of_field(field)
    if (
        column.datatype == "char"
        and not column.xtype
        and not pc.all(pc.string_is_ascii(rows.column(field.name))).as_py()
    ):
        return replace(column, datatype="unicodeChar")
    return column


def with_uploads(tables: Tables, uploads: Mapping[str, pa.Table]) -> Tables:
    """The tables and the uploads beside them."""
    if not uploads:
        return tables
    made = [upload_table(name, rows) for name, rows in uploads.items()]
    extended = tables.extended(*made)
    return replace(extended, schemas=[*tables.schemas, Schema(SCHEMA, "Tables uploaded with the query.")])


def _position(rows: pa.Table) -> Position | None:
    names = {name.lower(): name for name in rows.column_names}
    ra, dec = names.get("ra"), names.get("dec")
    return Position(ra, dec) if ra and dec else None
