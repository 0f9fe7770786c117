"""From a query's text to a plan: which engine, which SQL, what has to be brought to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING

from cumbre.access.adql import tree
from cumbre.access.adql.dialect import Dialect, DuckDB, Postgres, literal, quote
from cumbre.access.adql.errors import AdqlError
from cumbre.access.adql.parser import parse
from cumbre.access.adql.queries import BoundQuery, Condition, MatchNeedsDuckDBError, QueryBinder
from cumbre.access.adql.scope import Cover, Relation, Scope, Visible, table_columns
from cumbre.access.results.types import arrow_schema
from cumbre.access.tables import Column, Table, Tables
from cumbre.access.user import User
from cumbre.core.errors import NotFoundError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SQL = 3_000_000
"""Characters of SQL that are given to an engine."""
MAX_UPLOAD_TO_POSTGRES = 500_000
"""Uploads with more rows are joined by the other engine."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A table in memory that the SQL calls ``name``."""

    name: str
    table: Table
    user: User

    def rows(self) -> pa.Table:
        """Its rows."""
        return self.table.arrow(self.user)


@dataclass(frozen=True, slots=True)
class PixelCover:
    """Pixels around each row of a table in memory, for PostgreSQL: row number and range."""

    name: str
    memory: Memory
    order: int
    ra: str
    dec: str


@dataclass(frozen=True, slots=True)
class Fetch:
    """What has to be brought from PostgreSQL into DuckDB, as table ``name``."""

    name: str
    sql: str
    schema: pa.Schema


@dataclass(frozen=True)
class Plan:
    """A query ready to run.

    Attributes
    ----------
    engine
        ``postgres`` or ``duckdb``.
    query
        Its SQL; columns are called c1, c2, …
    columns, schema
        What comes.
    seed
        Of RAND, None when there is none.
    """

    engine: str
    query: BoundQuery
    columns: tuple[Column, ...]
    schema: pa.Schema
    memories: tuple[Memory, ...] = ()
    covers: tuple[PixelCover, ...] = ()
    fetches: tuple[Fetch, ...] = ()
    seed: float | None = None

    def sql(self, max_rows: int | None = None) -> str:
        """The SQL; with a number of rows at most one more is asked for."""
        limit = self.most(max_rows) if max_rows is not None else self.query.limit
        if self.covers:
            # The planner takes a match on ranges for billions of rows: to give the first of them soon it would
            # look at every row of the catalogue. Who reads stops after those that are wanted.
            limit = None
        return replace(self.query, limit=limit, matched=False).whole()

    def most(self, max_rows: int) -> int:
        """Rows after which nobody reads on."""
        return max_rows + 1 if self.query.limit is None else min(self.query.limit, max_rows + 1)


def make_plan(adql: str, *, tables: Tables, user: User) -> Plan:
    """Check a query and plan it.

    Raises
    ------
    AdqlError
        It is wrong; where, and what to do.
    """
    statement = parse(adql)
    tables = tables.seen_by(user)
    used = _tables_of(statement, tables, user)
    in_postgres = any(table.engine == "postgres" for table in used)
    in_files = any(table.engine == "parquet" for table in used)
    in_memory = sum(table.rows or 0 for table in used if table.engine == "arrow")
    if in_postgres and not in_files and in_memory <= MAX_UPLOAD_TO_POSTGRES:
        try:
            return _Planner(adql, statement, tables, user, Postgres()).plan()
        except MatchNeedsDuckDBError:
            pass
    return _Planner(adql, statement, tables, user, DuckDB()).plan()


@dataclass
class _Planner:
    """Plans one statement for one engine."""

    text: str
    statement: tree.Statement
    tables: Tables
    user: User
    dialect: Dialect
    memories: dict[str, Memory] = field(default_factory=dict)
    covers: list[PixelCover] = field(default_factory=list)

    def plan(self) -> Plan:
        binder = QueryBinder(self.text, self.dialect, self._find, self._source, self._cover, self._attach)
        query = binder.statement(self.statement)
        if len(query.sql) > MAX_SQL:
            raise AdqlError(
                "the query is too large for an engine",
                remedy="put long lists of values or regions into an uploaded table and join it",
            )
        columns = tuple(query.columns)
        fetches = () if self.dialect.name == "postgres" else tuple(self._fetches(binder))
        return Plan(
            self.dialect.name, query, columns, arrow_schema(columns), tuple(self.memories.values()),
            tuple(self.covers), fetches, binder.seed,
        )  # fmt: skip

    def _find(self, schema: str | None, name: str, exact: tuple[bool, bool]) -> Table:
        return self.tables.find(schema, name, self.user, exact=exact)

    def _source(self, table: Table, alias: str) -> str:
        """How the engine's SQL names a table."""
        if table.engine == "arrow":
            known = self.memories.setdefault(
                table.full_name, Memory(f"adql_memory_{len(self.memories) + 1}", table, self.user)
            )
            return known.name
        if table.engine == "parquet":
            return f"read_parquet({literal(str(table.source))}, hive_partitioning = false)"
        if self.dialect.name == "postgres":
            return str(table.source)
        return f"adql_fetch_{alias}"

    def _cover(self, relation: Relation) -> str:
        """A relation with a row for each pixel around its position."""
        cover, alias = relation.cover, relation.alias
        assert cover is not None
        if self.dialect.name != "postgres":
            around = f"adql_neighbourhood({cover.order}, {cover.ra_sql}, {cover.dec_sql})"
            return f"SELECT {alias}.*, unnest({around}) AS adql_pixel FROM {relation.source} AS {alias}"  # noqa: S608
        name = self._pixel_cover(relation, cover)
        return (
            f"SELECT {alias}.*, m.adql_low, m.adql_high FROM {relation.source} AS {alias}"  # noqa: S608
            f" JOIN {name} AS m ON m.adql_row = {alias}.adql_row"
        )

    def _attach(self, relation: Relation) -> str:
        """A relation's rows, each with the number of a row of another relation that it may match."""
        attached, alias = relation.attached, relation.alias
        assert attached is not None
        around, cover = attached.around, attached.cover
        if self.dialect.name != "postgres":
            pixels = f"adql_neighbourhood({cover.order}, {cover.ra_sql}, {cover.dec_sql})"
            return (
                f"(SELECT {alias}.*, m.adql_row AS adql_of FROM (SELECT adql_row, unnest({pixels}) AS adql_pixel"  # noqa: S608
                f" FROM {around.source} AS {around.alias}) AS m JOIN {relation.source} AS {alias}"
                f" ON ({attached.pixel} >> {2 * (29 - cover.order)}) = m.adql_pixel)"
            )
        name = self._pixel_cover(around, cover)
        return (
            f"LATERAL (SELECT {alias}.*, m.adql_row AS adql_of FROM {name} AS m JOIN {relation.source} AS {alias}"  # noqa: S608
            f" ON {attached.pixel} >= m.adql_low AND {attached.pixel} < m.adql_high"
            f" WHERE m.adql_row = {around.alias}.adql_row)"
        )

    def _pixel_cover(self, relation: Relation, cover: Cover) -> str:
        """Ranges of pixels around the rows of an upload, made by the engine."""
        assert relation.table is not None
        memory = self.memories[relation.table.full_name]
        for known in self.covers:
            if (known.memory.name, known.order, known.ra, known.dec) == (
                memory.name,
                cover.order,
                cover.ra,
                cover.dec,
            ):
                return known.name
        name = f"adql_cover_{len(self.covers) + 1}"
        self.covers.append(PixelCover(name, memory, cover.order, cover.ra, cover.dec))
        return name

    def _fetches(self, binder: QueryBinder) -> Iterator[Fetch]:
        """Tables of PostgreSQL: only the columns and, as far as conditions on them alone say, the rows needed."""
        for relation in binder.relations:
            table = relation.table
            if table is None or table.engine != "postgres":
                continue
            source = _Planner(self.text, self.statement, self.tables, self.user, Postgres())
            conditions = [
                text
                for condition in binder.conditions
                if condition.relations == {relation.alias} and relation.alias in condition.filters
                for text in source.filter_of(relation, condition)
            ]
            used = [column for column in table.columns if column.name in relation.used] or [table.columns[0]]
            listed = ", ".join(
                f"{source.dialect.stored(relation.alias, column)} AS {quote(column.stored_name)}"
                for column in used
            )
            sql = f"SELECT {listed} FROM {table.source} AS {relation.alias}"  # noqa: S608 (made of our own names)
            if conditions:
                sql += f" WHERE {' AND '.join(conditions)}"
            names = tuple(Column(c.stored_name, c.datatype, c.arraysize) for c in used)
            yield Fetch(f"adql_fetch_{relation.alias}", sql, arrow_schema(names))

    def filter_of(self, relation: Relation, condition: Condition) -> Iterator[str]:
        """A condition on one table alone, in PostgreSQL's words; nothing when it cannot be said so."""
        table = relation.table
        assert table is not None
        if _has_query(condition.node):
            return
        binder = QueryBinder(self.text, self.dialect, self._find, self._source, self._cover, self._attach)
        stored = {column.name: self.dialect.stored(relation.alias, column) for column in table.columns}
        columns = table_columns(table, relation.alias, stored)
        twin = Relation(relation.alias, relation.label, table, columns, "", table.position)
        visible = [Visible(name, value, frozenset({relation.alias})) for name, value in columns]
        binder.scope = Scope([twin], visible)
        try:
            yield binder.condition(condition.node).sql
        except AdqlError:
            return  # it names a merged column of a join: the other engine checks it


def _tables_of(statement: tree.Statement, tables: Tables, user: User) -> list[Table]:
    """Every table that a statement names."""
    named = [name for name, _, _ in statement.names]
    found: dict[str, Table] = {}
    for node in _walk(statement):
        if not isinstance(node, tree.TableRef):
            continue
        if len(node.parts) == 1 and any(node.parts[0].matches(name.value) for name in named):
            continue
        schema = node.parts[-2] if len(node.parts) > 1 else None
        try:
            table = tables.find(
                schema.value if schema else None, node.parts[-1].value, user,
                exact=(schema.quoted if schema else False, node.parts[-1].quoted),
            )  # fmt: skip
        except NotFoundError:
            continue  # the binder says so, with the place
        found[table.full_name] = table
    return list(found.values())


def _walk(node: object) -> Iterator[object]:
    stack = [node]
    while stack:
        current = stack.pop()
        if isinstance(current, tuple):
            stack.extend(current)
        elif is_dataclass(current):
            yield current
            stack.extend(getattr(current, item.name) for item in fields(current))


def _has_query(node: tree.Expression) -> bool:
    return any(isinstance(part, tree.Select | tree.SetOperation) for part in _walk(node))
