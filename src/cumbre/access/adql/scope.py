"""Names that a query can use: relations of FROM and their columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches

from cumbre.access.adql import tree
from cumbre.access.adql.dialect import quote
from cumbre.access.adql.values import Origin, Value
from cumbre.access.tables import Column, Position, Table


@dataclass
class Relation:
    """Something in FROM: a table, a query in parentheses, a named query.

    Attributes
    ----------
    alias
        Its name in the SQL, ours.
    label
        Its name in the query; None when only ``schema.table`` names it.
    columns
        Name and value of each column.
    position
        Names of the columns with position and pixel, when it has them.
    used
        Columns that the query needs.
    attached
        Relation to whose rows the candidates of this one are attached beforehand (an outer match).
    cover
        Radius (degrees) and order of the pixels around each row that a match needs; none when None.
    """

    alias: str
    label: tree.Name | None
    table: Table | None
    columns: list[tuple[str, Value]]
    source: str
    position: Position | None = None
    used: set[str] = field(default_factory=set)
    cover: Cover | None = None
    attached: Attached | None = None

    @property
    def name(self) -> str:
        """What a person calls it."""
        if self.label is not None:
            return self.label.value
        return self.table.full_name if self.table else self.alias

    def value(self, name: tree.Name) -> list[tuple[str, Value]]:
        """Columns that a name means."""
        return [(own, value) for own, value in self.columns if name.matches(own)]


@dataclass(frozen=True, slots=True)
class Cover:
    """Pixels of an order around each row of a relation: SQL and names of its coordinates."""

    order: int
    radius_deg: float
    ra_sql: str
    dec_sql: str
    ra: str
    dec: str


@dataclass(frozen=True, slots=True)
class Attached:
    """Rows of a relation that may match rows of another one, by equal pixels; ``pixel`` is SQL."""

    around: Relation
    cover: Cover
    pixel: str


@dataclass
class Visible:
    """A column that can be named without its table; merged ones (USING, NATURAL) belong to several."""

    name: str
    value: Value
    relations: frozenset[str]


@dataclass
class Scope:
    """Names of one SELECT, and those of the queries around it."""

    relations: list[Relation] = field(default_factory=list)
    visible: list[Visible] = field(default_factory=list)
    outer: Scope | None = None

    def relation(self, alias: str) -> Relation | None:
        """A relation by its alias in the SQL, here or outside."""
        for own in self.relations:
            if own.alias == alias:
                return own
        return self.outer.relation(alias) if self.outer else None

    def qualified(self, parts: tuple[tree.Name, ...]) -> list[Relation]:
        """Relations that a qualifier means."""
        if len(parts) == 1:
            by_label = [r for r in self.relations if r.label is not None and parts[0].matches(r.label.value)]
            if by_label:
                return by_label
            return [
                r for r in self.relations if r.label is None and r.table and parts[0].matches(r.table.name)
            ]
        schema, name = parts[-2], parts[-1]
        return [
            r
            for r in self.relations
            if r.label is None and r.table and name.matches(r.table.name) and schema.matches(r.table.schema)
        ]

    def hidden(self, name: tree.Name) -> Relation | None:
        """A relation whose table is called so but has another name here."""
        return next(
            (r for r in self.relations if r.label is not None and r.table and name.matches(r.table.name)),
            None,
        )

    def find(self, name: tree.Name) -> list[Visible]:
        """Columns that an unqualified name means here."""
        return [column for column in self.visible if name.matches(column.name)]

    def near(self, name: str, relation: Relation | None = None) -> str:
        """Names like one that is not there."""
        if relation is not None:
            known = [own for own, _ in relation.columns]
        else:
            known = [column.name for column in self.visible]
        found = get_close_matches(name.lower(), [own.lower() for own in known], 3, 0.6)
        real = dict.fromkeys(own for own in known if own.lower() in found)
        return ", ".join(map(_shown, real))


def _shown(name: str) -> str:
    from cumbre.access.adql.words import RESERVED

    plain = name.replace("_", "a").isalnum() and name.isascii() and name[0].isalpha()
    return name if plain and name.upper() not in RESERVED else quote(name)


def table_columns(table: Table, alias: str, stored: dict[str, str]) -> list[tuple[str, Value]]:
    """Values of a table's columns; ``stored`` gives the SQL of each."""
    return [
        (
            column.name,
            Value(
                stored[column.name], column, origin=Origin(alias, column.name), relations=frozenset({alias})
            ),
        )
        for column in table.columns
    ]


def output_column(name: str, value: Value) -> Column:
    """The column of a result."""
    from dataclasses import replace

    column = value.column
    if column.datatype == "null":
        column = Column(name, "char", "*")
    if column.datatype in ("char", "unicodeChar") and column.arraysize is None:
        column = replace(column, arraysize="*")
    return replace(column, name=name, sql_name="", storage="")
