"""Tables that can be asked: what they are called, what their columns mean, where their rows are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from cumbre.access.user import ANYBODY, User
from cumbre.core.errors import NotFoundError

if TYPE_CHECKING:
    import pyarrow as pa

CURVE_UTYPE = "cumbre:light_curve."
"""Begin of the utype of columns whose values have light curves; the release follows."""

type EngineName = Literal["postgres", "parquet", "arrow"]
type Source = str | pa.Table | Callable[[User], pa.Table]


@dataclass(frozen=True, slots=True)
class Column:
    """A column as the Virtual Observatory describes it.

    Attributes
    ----------
    name
        As published; ADQL finds it whatever the capitals.
    datatype, arraysize, xtype
        VOTable type: boolean, unsignedByte, short, int, long, float, double, char; None for a scalar.
    sql_name, storage
        Name in the engine (the published one when empty); type there when it is not the usual one:
        ``timestamptz`` is published as ISO 8601 text in UTC, ``polygon`` (an array of corners) as STC-S text.
    principal, indexed, std
        As in TAP_SCHEMA: worth showing first, fast to search, defined by a standard.
    """

    name: str
    datatype: str
    arraysize: str | None = None
    xtype: str = ""
    unit: str = ""
    ucd: str = ""
    utype: str = ""
    description: str = ""
    principal: bool = False
    indexed: bool = False
    std: bool = False
    sql_name: str = ""
    storage: str = ""

    @property
    def stored_name(self) -> str:
        """Name in the engine."""
        return self.sql_name or self.name


@dataclass(frozen=True, slots=True)
class Position:
    """Names of the columns that hold a table's main position (ICRS degrees) and its HEALPix index.

    ``pixel`` is the nested order-29 pixel of the position, indexed or sorted; empty when there is none.
    """

    ra: str
    dec: str
    pixel: str = ""


@dataclass(frozen=True, slots=True)
class CurveColumns:
    """Names of the columns of a table whose rows are points of light curves.

    Attributes
    ----------
    object, time, band, flux, flux_error
        Whose point it is, when (MJD), in which band, how bright. ``time`` and ``band`` may be columns of the table
        ``visits`` that is joined by the column ``visit`` of both.
    kind
        What a row is: ``detection`` or ``forced``.
    """

    object: str
    time: str
    band: str
    flux: str
    flux_error: str
    kind: str
    visits: str = ""
    visit: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A published table.

    Attributes
    ----------
    schema, name
        Published name.
    engine, source
        ``postgres``: SQL name of a table or view; ``parquet``: path pattern of the files; ``arrow``: a table
        in memory, or a function that makes it for a user.
    position
        Where its rows are on the sky, None when they are nowhere.
    public
        True for everybody, else the name of the group (or ``user:NAME``) that may read it.
    rows
        About how many rows it has, None when unknown.
    curve
        Set where the rows are points of light curves.
    """

    schema: str
    name: str
    columns: tuple[Column, ...]
    description: str = ""
    engine: EngineName = "postgres"
    source: Source = ""
    position: Position | None = None
    public: bool | str = True
    utype: str = ""
    rows: int | None = None
    curve: CurveColumns | None = None

    @property
    def full_name(self) -> str:
        """``schema.table``."""
        return f"{self.schema}.{self.name}"

    def column(self, name: str) -> Column | None:
        """A column by name, capitals ignored."""
        wanted = name.lower()
        return next((column for column in self.columns if column.name.lower() == wanted), None)

    def arrow(self, user: User) -> pa.Table:
        """Rows of a table that is in memory."""
        made: Any = self.source(user) if callable(self.source) else self.source
        return made


@dataclass(frozen=True, slots=True)
class Schema:
    """A published schema."""

    name: str
    description: str = ""
    utype: str = ""


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """Columns of one table that point to columns of another."""

    key_id: str
    from_table: str
    target_table: str
    pairs: tuple[tuple[str, str], ...]
    description: str = ""


type Provider = Callable[[User], Iterable[Table]]


@dataclass
class Tables:
    """Everything that can be asked.

    Attributes
    ----------
    tables
        Those that stay.
    providers
        Functions that give more of them for a user (tables of users, snapshots); called at each look-up.
    """

    tables: Sequence[Table] = ()
    schemas: Sequence[Schema] = ()
    keys: Sequence[ForeignKey] = ()
    providers: list[Provider] = field(default_factory=list)

    def visible(self, user: User = ANYBODY) -> Iterator[Table]:
        """Tables a user may read."""
        yield from (table for table in self.tables if user.may_read(table.public))
        for provider in self.providers:
            yield from (table for table in provider(user) if user.may_read(table.public))

    def seen_by(self, user: User) -> Tables:
        """What a user sees now, looked up once."""
        return Tables(list(self.visible(user)), self.schemas, self.keys)

    def visible_schemas(self, user: User = ANYBODY) -> list[Schema]:
        """Schemas with at least one visible table, in the order of their tables."""
        described = {schema.name: schema for schema in self.schemas}
        names = dict.fromkeys(table.schema for table in self.visible(user))
        return [described.get(name, Schema(name)) for name in names]

    def find(
        self,
        schema: str | None,
        name: str,
        user: User = ANYBODY,
        *,
        exact: tuple[bool, bool] = (False, False),
    ) -> Table:
        """One table.

        Parameters
        ----------
        schema
            None looks in all schemas and needs exactly one match.
        exact
            Whether schema and name must agree in capitals (they were given in double quotes).

        Raises
        ------
        NotFoundError
            No such table is visible, or several schemas have one; says which are near.
        """
        visible = list(self.visible(user))
        found = [
            table
            for table in visible
            if _same(table.name, name, exact[1]) and (schema is None or _same(table.schema, schema, exact[0]))
        ]
        if len(found) == 1:
            return found[0]
        asked = name if schema is None else f"{schema}.{name}"
        if found:
            names = ", ".join(table.full_name for table in found)
            raise NotFoundError(f"table {asked} is in several schemas; write one of {names}")
        near = get_close_matches(
            asked.lower(), [t.full_name.lower() for t in visible] + [t.name.lower() for t in visible], 3, 0.6
        )
        real = dict.fromkeys(
            t.full_name for t in visible if {t.full_name.lower(), t.name.lower()} & set(near)
        )
        hint = f"; near: {', '.join(real)}" if real else "; tap_schema.tables lists them"
        raise NotFoundError(f"no table {asked}{hint}")

    def extended(self, *tables: Table) -> Tables:
        """The same with more tables."""
        return replace(self, tables=[*self.tables, *tables])


def _same(have: str, asked: str, exact: bool) -> bool:
    return have == asked if exact else have.lower() == asked.lower()
