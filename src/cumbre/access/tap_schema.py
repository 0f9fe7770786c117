"""TAP_SCHEMA 1.1: the published tables as tables, each user's own view of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cumbre.access.tables import Column, ForeignKey, Schema, Table, Tables
from cumbre.access.user import User

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = "tap_schema"
_Rows = Callable[[Tables, User], Iterator[tuple[Any, ...]]]


def _schemas(tables: Tables, user: User) -> Iterator[tuple[Any, ...]]:
    for index, schema in enumerate(tables.visible_schemas(user)):
        yield schema.name, schema.utype or None, schema.description or None, index


def _tables(tables: Tables, user: User) -> Iterator[tuple[Any, ...]]:
    for index, table in enumerate(tables.visible(user)):
        yield table.schema, table.full_name, "table", table.utype or None, table.description or None, index


def _columns(tables: Tables, user: User) -> Iterator[tuple[Any, ...]]:
    for table in tables.visible(user):
        for index, column in enumerate(table.columns):
            size = column.arraysize.rstrip("*") if column.arraysize else ""
            yield (
                table.full_name, written(column.name), column.datatype, column.arraysize, column.xtype or None,
                int(size) if size.isdigit() else None, column.description or None, column.utype or None,
                column.unit or None, column.ucd or None, int(column.indexed), int(column.principal),
                int(column.std), index,
            )  # fmt: skip


def written(name: str) -> str:
    """A column's name as it must be written in a query: in double quotes when it is a word of the language."""
    from cumbre.access.adql.words import RESERVED

    plain = name.isascii() and name.isidentifier() and not name.startswith("_")
    return name if plain and name.upper() not in RESERVED else '"' + name.replace('"', '""') + '"'


def _visible_keys(tables: Tables, user: User) -> Iterator[ForeignKey]:
    names = {table.full_name for table in tables.visible(user)}
    yield from (key for key in tables.keys if {key.from_table, key.target_table} <= names)


def _keys(tables: Tables, user: User) -> Iterator[tuple[Any, ...]]:
    for key in _visible_keys(tables, user):
        yield key.key_id, key.from_table, key.target_table, key.description or None, None


def _key_columns(tables: Tables, user: User) -> Iterator[tuple[Any, ...]]:
    for key in _visible_keys(tables, user):
        for source, target in key.pairs:
            yield key.key_id, source, target


_TABLES: dict[str, tuple[str, _Rows, str]] = {
    # name: (description, rows, columns: name/type/description with ; between)
    "schemas": (
        "Schemas that can be asked.", _schemas,
        "schema_name char Name|utype char Utype|description char What it holds|schema_index int Order",
    ),
    "tables": (
        "Tables that can be asked.", _tables,
        ("schema_name char Its schema|table_name char Name with schema|table_type char table or view|utype char Utype|"
        "description char What it holds|table_index int Order"),
    ),
    "columns": (
        "Columns of the tables.", _columns,
        ("table_name char Its table|column_name char Name|datatype char VOTable type|arraysize char VOTable arraysize|"
        "xtype char VOTable xtype|size int Length of a fixed array|description char What it means|utype char Utype|"
        "unit char Unit|ucd char UCD|indexed int 1: fast to search|principal int 1: worth showing first|"
        "std int 1: defined by a standard|column_index int Order"),
    ),
    "keys": (
        "Tables that belong together.", _keys,
        ("key_id char Name|from_table char Table that points|target_table char Table pointed to|description char Meaning|"
        "utype char Utype"),
    ),
    "key_columns": (
        "Columns by which tables belong together.", _key_columns,
        "key_id char Name of the key|from_column char Column that points|target_column char Column pointed to",
    ),
}  # fmt: skip
_SCHEMA = Schema(SCHEMA, "What can be asked here: schemas, tables, columns and keys.")
_KEYS = tuple(
    ForeignKey(f"tap_schema_{number}", f"{SCHEMA}.{source}", f"{SCHEMA}.{target}", ((column, pointed),))
    for number, (source, target, column, pointed) in enumerate(
        (
            ("tables", "schemas", "schema_name", "schema_name"),
            ("columns", "tables", "table_name", "table_name"),
            ("keys", "tables", "from_table", "table_name"),
            ("keys", "tables", "target_table", "table_name"),
            ("key_columns", "keys", "key_id", "key_id"),
        ), 1,
    )
)  # fmt: skip


def with_tap_schema(tables: Tables) -> Tables:
    """The tables, and TAP_SCHEMA that describes them and itself."""
    made = Tables(
        [*tables.tables], [*tables.schemas, _SCHEMA], [*tables.keys, *_KEYS], list(tables.providers)
    )
    made.tables = [*made.tables, *(_table(name, made) for name in _TABLES)]
    return made


def _table(name: str, tables: Tables) -> Table:
    description, rows, described = _TABLES[name]
    columns = []
    for item in described.split("|"):
        label, kind, meaning = item.split(" ", 2)
        columns.append(
            Column(
                label, kind, "*" if kind == "char" else None, description=meaning, principal=True, std=True
            )
        )
    chosen = tuple(columns)
    return Table(SCHEMA, name, chosen, description, "arrow", lambda user: _arrow(chosen, rows(tables, user)))


def _arrow(columns: tuple[Column, ...], rows: Iterator[tuple[Any, ...]]) -> pa.Table:
    import pyarrow as pa

    kinds = {"char": pa.string(), "int": pa.int32()}
    schema = pa.schema([pa.field(column.name, kinds[column.datatype]) for column in columns])
    listed = list(rows)
    values = zip(*listed, strict=True) if listed else [()] * len(columns)
    return pa.Table.from_arrays(
        [pa.array(part, field.type) for part, field in zip(values, schema, strict=True)], schema=schema
    )
