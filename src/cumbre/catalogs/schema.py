"""Tables as data: one Felis file gives PostgreSQL's tables, Avro's records and Arrow's types."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from cumbre.core.errors import ConfigurationError, NotFoundError

if TYPE_CHECKING:
    import pyarrow as pa

_SQL = {
    "long": "bigint", "int": "int", "float": "real", "double": "float8", "boolean": "boolean",
    "string": "text", "timestamp": "timestamptz",
}  # fmt: skip
SCHEMA_VERSION = "11.1"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its name and what it means."""

    name: str
    datatype: str
    nullable: bool
    default: int | float | None
    unit: str
    ucd: str
    description: str
    in_packet: bool

    @property
    def sql_name(self) -> str:
        """Name in PostgreSQL, where names have no capitals."""
        return self.name.lower()

    def sql(self) -> str:
        """Definition for CREATE TABLE."""
        text = f'"{self.sql_name}" {_SQL[self.datatype]}'
        if not self.nullable:
            text += " NOT NULL"
        if self.default is not None:
            text += f" DEFAULT {self.default}"
        return text

    def avro(self) -> dict[str, Any]:
        """Field of an Avro record; nullable ones are null by default."""
        kind: Any = self.datatype
        if kind == "timestamp":
            kind = {"type": "long", "logicalType": "timestamp-micros"}
        doc = self.description + (f" [{self.unit}]" if self.unit else "")
        if self.nullable:
            return {"name": self.name, "type": ["null", kind], "default": None, "doc": doc}
        return {"name": self.name, "type": kind, "doc": doc}


@dataclass(frozen=True, slots=True)
class Table:
    """A table: columns, key and indexes."""

    name: str
    description: str
    record: str
    stored: bool
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...]
    indexes: tuple[tuple[str, tuple[str, ...]], ...]
    partition: str = ""
    """Column of time by which the table is cut into months; empty for a table in one piece."""

    @property
    def sql_name(self) -> str:
        """Name with schema in PostgreSQL."""
        return f"level1.{self.name.lower()}"

    def column(self, name: str) -> Column:
        """A column by name.

        Raises
        ------
        NotFoundError
            The table has no such column.
        """
        for column in self.columns:
            if column.name == name:
                return column
        raise NotFoundError(f"table {self.name}: no column {name!r}")

    def ddl(self) -> str:
        """Make the table, or add the columns that an older one lacks; indexes and comments."""
        lines = [column.sql() for column in self.columns]
        # a key of a cut table must hold the column by which it is cut
        key = dict.fromkeys((*self.primary_key, *([self.partition] if self.partition else [])))
        lines.append(f"PRIMARY KEY ({', '.join(name.lower() for name in key)})")
        made = f"CREATE TABLE IF NOT EXISTS {self.sql_name} (\n  " + ",\n  ".join(lines) + ")"
        if self.partition:
            made += f" PARTITION BY RANGE ({self.partition.lower()})"
        parts = [made]
        parts += [f"ALTER TABLE {self.sql_name} ADD COLUMN IF NOT EXISTS {c.sql()}" for c in self.columns]
        for name, columns in self.indexes:
            keys = ", ".join(column.lower() for column in columns)
            parts.append(f"CREATE INDEX IF NOT EXISTS {name} ON {self.sql_name} ({keys})")
        parts.append(f"COMMENT ON TABLE {self.sql_name} IS {_literal(self.description)}")
        for column in self.columns:
            text = column.description + (f" [{column.unit}]" if column.unit else "")
            parts.append(f'COMMENT ON COLUMN {self.sql_name}."{column.sql_name}" IS {_literal(text)}')
        return ";\n".join(parts) + ";\n"

    def avro(self, namespace: str) -> dict[str, Any]:
        """The Avro record of the packet."""
        return {
            "type": "record",
            "namespace": namespace,
            "name": self.record,
            "doc": self.description,
            "fields": [column.avro() for column in self.columns if column.in_packet],
        }

    def arrow(self) -> pa.Schema:
        """Arrow schema, names as in the packet, unit, UCD and description in the fields' metadata."""
        import pyarrow as pa

        kinds = {
            "long": pa.int64(), "int": pa.int32(), "float": pa.float32(), "double": pa.float64(),
            "boolean": pa.bool_(), "string": pa.string(), "timestamp": pa.timestamp("us", tz="UTC"),
        }  # fmt: skip
        return pa.schema(
            [
                pa.field(
                    column.name, kinds[column.datatype], column.nullable,
                    {"unit": column.unit, "ucd": column.ucd, "description": column.description},
                )
                for column in self.columns
            ]
        )  # fmt: skip


@lru_cache(maxsize=1)
def level1_tables() -> dict[str, Table]:
    """The Level 1 tables by name, from ``level1.yaml``."""
    text = resources.files("cumbre.catalogs").joinpath("level1.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return parse_tables(yaml.load(text, Loader=loader), "catalogs/level1.yaml")  # noqa: S506 (safe loader)


def parse_tables(data: dict[str, Any], where: str) -> dict[str, Table]:
    """Tables of a Felis schema.

    Raises
    ------
    ConfigurationError
        A column lacks something or has a type that the packets do not know.
    """
    tables = {}
    for raw in data["tables"]:
        columns = []
        for item in raw["columns"]:
            name = f"{raw['name']}.{item.get('name')}"
            if item.get("datatype") not in _SQL or not item.get("description"):
                raise ConfigurationError(
                    f"{where}: {name}: expected a description and a datatype among {', '.join(_SQL)}, "
                    f"found {item.get('datatype')!r}"
                )
            columns.append(
                Column(
                    item["name"], item["datatype"], item.get("nullable", True), item.get("value"),
                    item.get("fits:tunit", ""), item.get("ivoa:ucd", ""), item["description"],
                    item.get("cumbre:packet", True),
                )
            )  # fmt: skip
        tables[raw["name"]] = Table(
            raw["name"], raw["description"], raw["cumbre:record"], raw.get("cumbre:stored", True),
            tuple(columns), tuple(_local(key) for key in raw["primaryKey"]),
            tuple(
                (index["name"], tuple(_local(key) for key in index["columns"]))
                for index in raw.get("indexes", [])
            ),
            _local(raw.get("cumbre:partition", "")),
        )  # fmt: skip
    return tables


def stored_tables() -> list[Table]:
    """The tables that the database has: those of the file, and every version of the objects."""
    tables = level1_tables()
    versions = replace(
        tables["DiaObject"], name="DiaObjectVersion", description="Every row that DiaObject ever had.",
        primary_key=("diaObjectId", "validityStartMjdTai"), indexes=(), partition="validityStartMjdTai",
    )  # fmt: skip
    return [*(table for table in tables.values() if table.stored), versions]


def level1_ddl() -> str:
    """CREATE TABLE of every stored table."""
    return "\n".join(table.ddl() for table in stored_tables())


def alert_schema() -> dict[str, Any]:
    """The whole alert packet's Avro schema, records inside where they are first used."""
    namespace = f"lsst.v{SCHEMA_VERSION.replace('.', '_')}"
    tables = level1_tables()

    def optional(kind: Any) -> dict[str, Any]:
        return {"type": ["null", kind], "default": None}

    source = tables["DiaSource"].avro(namespace)
    history = {"type": "array", "items": f"{namespace}.diaSource"}
    forced = {"type": "array", "items": tables["DiaForcedSource"].avro(namespace)}
    fields = [
        {"name": "diaSourceId", "type": "long", "doc": "The source that made this alert."},
        {"name": "observation_reason", **optional("string"), "doc": "Why the image was taken."},
        {"name": "target_name", **optional("string"), "doc": "What the image was meant to show."},
        {"name": "diaSource", "type": source},
        {"name": "prvDiaSources", **optional(history), "doc": "Earlier sources of the object, 12 months."},
        {"name": "prvDiaForcedSources", **optional(forced), "doc": "Forced photometry, 12 months."},
        {"name": "diaObject", **optional(tables["DiaObject"].avro(namespace))},
        {"name": "ssSource", **optional(tables["SSSource"].avro(namespace))},
        {"name": "mpc_orbits", **optional(tables["mpc_orbits"].avro(namespace))},
    ]
    fields += [
        {"name": f"cutout{kind}", **optional("bytes"), "doc": f"{kind} image around the source, FITS."}
        for kind in ("Difference", "Science", "Template")
    ]
    return {
        "type": "record", "namespace": namespace, "name": "alert",
        "doc": f"Alert packet, schema {SCHEMA_VERSION}", "fields": fields,
    }  # fmt: skip


def _local(reference: str) -> str:
    """``name`` of ``#Table.name``."""
    return reference.rpartition(".")[2]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
