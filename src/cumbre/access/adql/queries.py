"""From queries of the tree to SQL of one engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import override

from cumbre.access.adql import functions as f
from cumbre.access.adql import tree
from cumbre.access.adql.binder import ExpressionBinder
from cumbre.access.adql.dialect import Dialect
from cumbre.access.adql.query_parts import children, flatten, key, unique
from cumbre.access.adql.scope import Attached, Cover, Relation, Scope, Visible, output_column, table_columns
from cumbre.access.adql.signatures import AGGREGATES
from cumbre.access.adql.values import Origin, Point, Value
from cumbre.access.pixels import match_order
from cumbre.access.tables import Column, Position, Table
from cumbre.core.errors import NotFoundError

type Finder = Callable[[str | None, str, tuple[bool, bool]], Table]
type Render = Callable[[], str]


class MatchNeedsDuckDBError(Exception):
    """Two tables of PostgreSQL are matched by position: the other engine does it better."""


@dataclass
class BoundQuery:
    """A query in SQL.

    Attributes
    ----------
    sql
        Without limit and offset when it is the outermost.
    columns
        Of the result; in the SQL they are called c1, c2, …
    matched
        Whether PostgreSQL joins ranges of pixels in it.
    """

    sql: str
    columns: list[Column]
    limit: int | None = None
    offset: int | None = None
    position: Position | None = None
    matched: bool = False

    def whole(self) -> str:
        """With its limit and offset."""
        text = self.sql
        if self.matched and self.limit is not None:
            # PostgreSQL takes a match on ranges for billions of rows, and would look at the whole catalogue to give
            # the first few soon. A query that stands by itself is planned for all rows, and still ends with the limit.
            text = f"WITH adql_matched AS MATERIALIZED ({text}) SELECT * FROM adql_matched"  # noqa: S608 (regenerated)
        if self.limit is not None:
            text += f" LIMIT {self.limit}"
        if self.offset:
            text += f" OFFSET {self.offset}"
        return text


@dataclass
class _Pushed:
    """Where a condition stands: relations that may be multiplied by pixels, those that may be looked up.

    Of an outer join: relations whose rows are all kept, and those that are filled with NULL.
    """

    node: tree.Expression
    may_multiply: frozenset[str]
    may_look_up: frozenset[str]
    kept: frozenset[str] = frozenset()
    filled: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Condition:
    """A condition that stands alone: of which relations it speaks, and whose rows it may filter beforehand."""

    scope: Scope
    node: tree.Expression
    relations: frozenset[str]
    filters: frozenset[str]


@dataclass
class QueryBinder(ExpressionBinder):
    """Binds one statement for one engine."""

    text: str
    dialect: Dialect
    find_table: Finder
    source_of: Callable[[Table, str], str]
    cover_sql: Callable[[Relation], str]
    attach_sql: Callable[[Relation], str]
    scope: Scope = field(default_factory=Scope)
    seed: float | None = None
    with_parts: list[str] = field(default_factory=list)
    named: dict[str, tuple[tree.Name, str, BoundQuery]] = field(default_factory=dict)
    relations: list[Relation] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    nullable: set[str] = field(default_factory=set)
    pushed: _Pushed | None = None
    matches: int = 0  # on ranges of pixels, in PostgreSQL

    def statement(self, statement: tree.Statement) -> BoundQuery:
        """The whole statement."""
        for name, columns, query in statement.names:
            bound = self._query(query, Scope())
            if columns:
                if len(columns) != len(bound.columns):
                    raise self.error(
                        name.at, f"{name} has {len(bound.columns)} columns, {len(columns)} names are given"
                    )
                bound.columns = [
                    replace(c, name=n.value) for c, n in zip(bound.columns, columns, strict=True)
                ]
                bound.position = None
            if any(name.matches(known.value) for known, _, _ in self.named.values()):
                raise self.error(name.at, f"{name} is defined twice in WITH")
            alias = f"q{len(self.named) + 1}"
            self.named[alias] = (name, alias, bound)
            self.with_parts.append(f"{alias} AS ({bound.whole()})")
        bound = self._query(statement.query, Scope())
        if self.with_parts:
            bound.sql = f"WITH {', '.join(self.with_parts)} {bound.sql}"
        return bound

    # -- queries --

    def _query(self, node: tree.Query, outer: Scope) -> BoundQuery:
        matches = self.matches
        if isinstance(node, tree.SetOperation):
            bound = self._set_operation(node, outer)
        else:
            before, pushed = self.scope, self.pushed
            self.scope, self.pushed = Scope(outer=outer), None
            try:
                bound = self._select(node)
            finally:
                self.scope, self.pushed = before, pushed
        bound.matched = self.matches > matches
        return bound

    def _set_operation(self, node: tree.SetOperation, outer: Scope) -> BoundQuery:
        left, right = self._query(node.left, outer), self._query(node.right, outer)
        if len(left.columns) != len(right.columns):
            raise self.error(
                node.at,
                f"{node.operator} of {len(left.columns)} and {len(right.columns)} columns",
                "both need the same",
            )
        columns = []
        for one, other in zip(left.columns, right.columns, strict=True):
            try:
                common = f.common_type([Value("", one), Value("", other)])
            except f.TypeMismatchError as error:
                raise self.error(
                    node.at, f"{node.operator}: column {one.name}: {error}", error.remedy
                ) from error
            columns.append(
                replace(one, datatype=common.datatype, arraysize=common.arraysize, xtype=common.xtype)
            )
        sides = " ".join(
            (
                self._side(left, columns),
                node.operator,
                "ALL" if node.keep_all else "",
                self._side(right, columns),
            )
        )
        bound = BoundQuery(sides, columns, offset=node.offset)
        keys = []
        for order in node.order:
            index = self._ordinal(order.value, columns)
            if index is None:
                raise self.error(
                    order.value.at, f"ORDER BY after {node.operator} takes names or numbers of columns",
                    "put the set operation into a query in FROM",
                )  # fmt: skip
            keys.append(key(str(index), order))
        if keys:
            bound.sql += f" ORDER BY {', '.join(keys)}"
        return bound

    def _side(self, bound: BoundQuery, columns: list[Column]) -> str:
        """One side, in the common types."""
        parts = []
        for i, (own, common) in enumerate(zip(bound.columns, columns, strict=True), 1):
            value = f.as_type(self.dialect, Value(f"s.c{i}", own), common)
            parts.append(f"{value} AS c{i}")
        if all(part == f"s.c{i} AS c{i}" for i, part in enumerate(parts, 1)):
            return f"({bound.whole()})"
        return f"(SELECT {', '.join(parts)} FROM ({bound.whole()}) AS s)"  # noqa: S608 (regenerated)

    def _ordinal(self, node: tree.Expression, columns: list[Column]) -> int | None:
        """Number of the column of a result that an ORDER BY key names."""
        if isinstance(node, tree.Number) and node.text.isdigit():
            index = int(node.text)
            if not 1 <= index <= len(columns):
                raise self.error(node.at, f"ORDER BY {index}: the result has {len(columns)} columns")
            return index
        if isinstance(node, tree.ColumnRef) and len(node.parts) == 1:
            for i, column in enumerate(columns, 1):
                if node.parts[0].matches(column.name):
                    return i
        return None

    def _select(self, node: tree.Select) -> BoundQuery:
        render = self._relation(node.relation)
        own = frozenset(relation.alias for relation in self.scope.relations)
        where = self._conjuncts(node.where, own, own, own - self.nullable) if node.where is not None else []
        if any(value.aggregate for value in where):
            assert node.where is not None
            raise self.error(node.where.at, "an aggregate in WHERE", "conditions on groups stand in HAVING")
        items = self._items(node)
        groups = [self._group_key(key, node) for key in node.group]
        having = self.condition(node.having) if node.having is not None else None
        columns = unique([output_column(value.column.name, value) for _, value in items])
        orders = [self._order_key(order, node, columns, items) for order in node.order]
        grouped = bool(groups) or having is not None or any(value.aggregate for _, value in items)
        if grouped:
            keys = {value.sql for _, value in groups}
            nodes = [n for n, _ in items] + ([node.having] if node.having else [])
            nodes += [o.value for o in node.order if self._ordinal(o.value, columns) is None]
            for expression in nodes:
                self._check_grouped(expression, keys)
        parts = [
            f"{value.sql if not value.null else f'CAST(NULL AS {self.dialect.TYPES["null"]})'} AS c{i}"
            for i, (_, value) in enumerate(items, 1)
        ]
        sql = f"SELECT {'DISTINCT ' if node.distinct else ''}{', '.join(parts)} FROM {render()}"  # noqa: S608 (regenerated)
        if where:
            sql += f" WHERE {' AND '.join(value.sql for value in where)}"
        if groups:
            sql += f" GROUP BY {', '.join(value.sql for _, value in groups)}"
        if having is not None:
            sql += f" HAVING {having.sql}"
        if orders:
            sql += f" ORDER BY {', '.join(orders)}"
        position = (
            None if grouped or node.distinct else self._position(columns, [value for _, value in items])
        )
        return BoundQuery(sql, columns, node.top, node.offset, position)

    def _position(self, columns: list[Column], values: list[Value]) -> Position | None:
        """Where rows of this query are, when a relation's position and pixel pass through unchanged."""
        names = {
            value.origin: column.name for column, value in zip(columns, values, strict=True) if value.origin
        }
        for relation in self.scope.relations:
            place = relation.position
            if place is None:
                continue
            found = [names.get(Origin(relation.alias, part)) for part in (place.ra, place.dec, place.pixel)]
            if found[0] and found[1]:
                return Position(found[0], found[1], found[2] or "")
        return None

    def _items(self, node: tree.Select) -> list[tuple[tree.Expression, Value]]:
        items: list[tuple[tree.Expression, Value]] = []
        for item in node.items:
            if isinstance(item.value, tree.Star):
                items += [(item.value, value.named(name)) for name, value in self._star(item.value)]
                continue
            found = self.any(item.value)
            value = found if isinstance(found, Value) else self.array_of(item.value, found)
            if item.alias is not None:
                value = value.named(item.alias.value)
            elif not value.column.name:
                value = value.named(f"col{len(items) + 1}")
            items.append((item.value, value))
        return items

    def _star(self, star: tree.Star) -> list[tuple[str, Value]]:
        if not star.parts:
            for relation in self.scope.relations:
                relation.used.update(name for name, _ in relation.columns)
            return [(column.name, column.value) for column in self.scope.visible]
        relations = self.scope.qualified(star.parts)
        if not relations:
            hidden = self.scope.hidden(star.parts[-1])
            remedy = f"it is called {hidden.label} here" if hidden else ""
            raise self.error(star.at, f"there is no {'.'.join(map(str, star.parts))} in FROM", remedy)
        relations[0].used.update(name for name, _ in relations[0].columns)
        return relations[0].columns

    def _group_key(self, key: tree.Expression, node: tree.Select) -> tuple[tree.Expression, Value]:
        """A key; a name that is no column may be that of an item."""
        if isinstance(key, tree.ColumnRef) and len(key.parts) == 1 and not self.scope.find(key.parts[0]):
            for item in node.items:
                if item.alias is not None and key.parts[0].matches(item.alias.value):
                    return item.value, self.value(item.value)
        value = self.value(key)
        if value.aggregate:
            raise self.error(key.at, "GROUP BY an aggregate")
        if value.constant is not None or value.text is not None:
            raise self.error(key.at, "GROUP BY a constant", "name the column")
        return key, value

    def _order_key(
        self, order: tree.Order, node: tree.Select, columns: list[Column],
        items: list[tuple[tree.Expression, Value]],
    ) -> str:  # fmt: skip
        index = self._ordinal(order.value, columns)
        if index is None:
            value = self.value(order.value)
            same = [i for i, (_, item) in enumerate(items, 1) if item.sql == value.sql]
            if not same and node.distinct:
                raise self.error(order.value.at, "ORDER BY of SELECT DISTINCT takes only selected columns")
            if not same:
                return key(value.sql if value.constant is None else f"({value.sql} + 0)", order)
            index = same[0]
        return key(str(index), order)

    def _check_grouped(self, node: tree.Expression, keys: set[str]) -> None:
        """Every column is in an aggregate or among the keys."""
        if isinstance(node, tree.Call) and node.name in AGGREGATES:
            return
        if isinstance(node, tree.Star):
            raise self.error(node.at, "* with GROUP BY or aggregates", "name the columns")
        own = {relation.alias for relation in self.scope.relations}
        if isinstance(node, tree.ColumnRef):
            value = self.column(node)
            if value.sql not in keys and value.relations & own:
                raise self.error(
                    node.at,
                    f"{node} is neither in GROUP BY nor in an aggregate",
                    "add it to GROUP BY",
                    str(node),
                )
            return
        if keys and not isinstance(node, tree.Number | tree.String | tree.Constant):
            found = self.any(node)
            if isinstance(found, Value) and found.sql in keys:
                return
        for child in children(node):
            self._check_grouped(child, keys)

    # -- FROM --

    def _relation(self, node: tree.Relation) -> Render:
        if isinstance(node, tree.Join):
            return self._join(node)
        if isinstance(node, tree.Derived):
            bound = self._query(node.query, Scope())
            relation = self._derived(node.alias, bound, f"({bound.whole()})")
        else:
            relation = self._table(node)
        self._check_name(relation, node.at)
        self.scope.relations.append(relation)
        self.relations.append(relation)
        for name, value in relation.columns:
            self.scope.visible.append(Visible(name, value, frozenset({relation.alias})))
        return lambda: self._render(relation)

    def _render(self, relation: Relation) -> str:
        if relation.attached is not None:
            return f"{self.attach_sql(relation)} AS {relation.alias}"
        if relation.cover is not None:
            return f"({self.cover_sql(relation)}) AS {relation.alias}"
        return f"{relation.source} AS {relation.alias}"

    def _check_name(self, relation: Relation, at: int) -> None:
        if relation.label is None:
            return
        for other in self.scope.relations:
            if other.label is not None and relation.label.matches(other.label.value):
                raise self.error(at, f"{relation.label} names two things in FROM", "give each its own name")

    def _derived(self, label: tree.Name | None, bound: BoundQuery, source: str) -> Relation:
        alias = f"t{len(self.relations) + 1}"
        columns = [
            (column.name, Value(f"{alias}.c{i}", column, origin=Origin(alias, column.name),
                                relations=frozenset({alias})))
            for i, column in enumerate(bound.columns, 1)
        ]  # fmt: skip
        return Relation(alias, label, None, columns, source, bound.position)

    def _table(self, node: tree.TableRef) -> Relation:
        if len(node.parts) == 1:
            for name, alias, bound in self.named.values():
                if node.parts[0].matches(name.value):
                    self.matches += bound.matched
                    return self._derived(node.alias or name, bound, alias)
        schema = node.parts[-2] if len(node.parts) > 1 else None
        name = node.parts[-1]
        try:
            table = self.find_table(
                schema.value if schema else None,
                name.value,
                (schema.quoted if schema else False, name.quoted),
            )
        except NotFoundError as error:
            raise self.error(node.at, str(error), token=str(node)) from error
        alias = f"t{len(self.relations) + 1}"
        stored = {column.name: self.dialect.stored(alias, column) for column in table.columns}
        columns = table_columns(table, alias, stored)
        return Relation(alias, node.alias, table, columns, self.source_of(table, alias), table.position)

    def _join(self, node: tree.Join) -> Render:
        first = len(self.scope.relations)
        left = self._relation(node.left)
        middle, middle_visible = len(self.scope.relations), len(self.scope.visible)
        right = self._relation(node.right)
        ours = self.scope.relations
        lefts = frozenset(r.alias for r in ours[first:middle])
        rights = frozenset(r.alias for r in ours[middle:])
        self.nullable |= {"LEFT": rights, "RIGHT": lefts, "FULL": lefts | rights}.get(node.kind, frozenset())
        if node.kind == "CROSS":
            return lambda: f"({left()} CROSS JOIN {right()})"
        if node.natural or node.using:
            condition = self._merge(node, middle_visible, lefts)
        elif node.on is not None:
            values = self._on(node, lefts, rights)
            condition = " AND ".join(value.sql for value in values)
        else:
            raise self.error(
                node.at,
                "a JOIN without its condition",
                "write ON …, USING (column), NATURAL JOIN, or CROSS JOIN",
            )
        if node.kind == "RIGHT":  # turned around: what is attached to a relation must stand behind it
            return lambda: f"({right()} LEFT OUTER JOIN {left()} ON {condition})"
        kind = {"INNER": "INNER"}.get(node.kind, f"{node.kind} OUTER")
        return lambda: f"({left()} {kind} JOIN {right()} ON {condition})"

    def _on(self, node: tree.Join, lefts: frozenset[str], rights: frozenset[str]) -> list[Value]:
        assert node.on is not None
        both = lefts | rights
        multiply = {"INNER": both, "LEFT": rights, "RIGHT": lefts}.get(node.kind, frozenset())
        look_up = {"INNER": both, "LEFT": lefts, "RIGHT": rights}.get(node.kind, frozenset())
        outer = {"LEFT": (lefts, rights), "RIGHT": (rights, lefts)}.get(node.kind)
        values = self._conjuncts(node.on, multiply, look_up, multiply, outer)
        if any(value.aggregate for value in values):
            raise self.error(node.on.at, "an aggregate in ON")
        return values

    def _merge(self, node: tree.Join, middle: int, lefts: frozenset[str]) -> str:
        """USING and NATURAL: equal columns become one."""
        visible = self.scope.visible
        left_side = [v for v in visible[:middle] if v.relations & lefts]
        right_side = visible[middle:]
        if node.natural:
            names = [v.name for v in left_side if any(v.name.lower() == o.name.lower() for o in right_side)]
            wanted = [tree.Name(name, False, node.at) for name in dict.fromkeys(names)]
            if not wanted:
                raise self.error(node.at, "NATURAL JOIN of tables without a common column", "write ON …")
        else:
            wanted = list(node.using)
        conditions, merged = [], []
        for name in wanted:
            pair = []
            for side in (left_side, right_side):
                found = [v for v in side if name.matches(v.name)]
                if len(found) != 1:
                    word = "ambiguous on one side" if found else "not on both sides"
                    raise self.error(name.at, f"column {name} of the join is {word}", token=str(name))
                pair.append(found[0])
            one, other = pair
            for visible_column in pair:
                for alias in visible_column.relations:
                    owner = self.scope.relation(alias)
                    if owner is not None:
                        owner.used.add(visible_column.name)
            conditions.append(f.comparison(self.dialect, "=", one.value, other.value))
            value = {"RIGHT": other.value, "LEFT": one.value, "INNER": one.value}.get(node.kind)
            if value is None:
                column = f.common_type([one.value, other.value])
                sides = ", ".join(f.as_type(self.dialect, v.value, column) for v in pair)
                value = f.make(f"COALESCE({sides})", one.value.column, one.value, other.value)
            merged.append(Visible(one.name, value, one.relations | other.relations))
            left_side.remove(one)
            right_side.remove(other)
        others = [v for v in visible[:middle] if not v.relations & lefts]
        self.scope.visible = [*others, *merged, *left_side, *right_side]
        return " AND ".join(conditions)

    # -- conditions that stand alone --

    def _conjuncts(
        self,
        node: tree.Expression,
        multiply: frozenset[str],
        look_up: frozenset[str],
        filters: frozenset[str],
        outer: tuple[frozenset[str], frozenset[str]] | None = None,
    ) -> list[Value]:
        """Conditions joined by AND, each bound knowing that it stands alone."""
        values = []
        for part in flatten(node):
            self.pushed = _Pushed(part, multiply, look_up, *(outer or ()))
            values.append(self.condition(part))
            self.conditions.append(Condition(self.scope, part, values[-1].relations, filters))
        self.pushed = None
        return values

    @override
    def match_pixels(self, node: tree.Expression, one: Point, other: Point, radius: Value) -> str | None:
        """Equal pixels for a match: one relation gets a row for each pixel around, the other is looked up."""
        pushed = self.pushed
        if pushed is None or pushed.node is not node or radius.constant is None:
            return None
        order = match_order(radius.constant)
        if order is None:
            return None
        choices = []
        for still, moved in ((one, other), (other, one)):
            pixel = self.pixel_of(still)
            around = self._owner(moved)
            owner = self._owner(still)
            if pixel is None or around is None or owner is None or owner is around:
                continue
            if around.alias in pushed.kept and owner.alias in pushed.filled:
                return self._attach(owner, around, _cover(order, radius.constant, moved), pixel)
            if owner.alias not in pushed.may_look_up or around.alias not in pushed.may_multiply:
                continue
            choices.append((_rows(around), pixel, around, moved))
        if not choices:
            return None
        _, pixel, around, moved = min(choices, key=lambda choice: choice[0])
        upload = around.table is not None and around.table.engine == "arrow"
        if self.dialect.name == "postgres" and not upload:
            raise MatchNeedsDuckDBError
        if around.cover is not None:
            return None
        around.cover = _cover(order, radius.constant, moved)
        if self.dialect.name == "postgres":
            self.matches += 1
            return f"{pixel} >= {around.alias}.adql_low AND {pixel} < {around.alias}.adql_high"
        return f"({pixel} >> {2 * (29 - order)}) = {around.alias}.adql_pixel"

    def _attach(self, owner: Relation, around: Relation, cover: Cover, pixel: str) -> str | None:
        """All rows of ``around`` are kept: to each the candidates of ``owner`` are attached before the join."""
        table = around.table
        if table is None or table.engine == "parquet" or owner.attached or owner.cover or around.attached:
            return None  # rows without a number cannot be told apart
        if self.dialect.name == "postgres" and table.engine != "arrow":
            raise MatchNeedsDuckDBError
        if self.dialect.name == "postgres":
            self.matches += 1
        owner.attached = Attached(around, cover, pixel)
        return f"{owner.alias}.adql_of = {around.alias}.adql_row"

    def _owner(self, point: Point) -> Relation | None:
        lon, lat = point.lon.origin, point.lat.origin
        if lon is None or lat is None or lon.relation != lat.relation:
            return None
        return next((r for r in self.scope.relations if r.alias == lon.relation), None)

    # -- queries inside expressions --

    @override
    def scalar_query(self, query: tree.Query, at: int) -> Value:
        bound = self._query(query, self.scope)
        if len(bound.columns) != 1:
            raise self.error(at, f"a query used as a value has {len(bound.columns)} columns", "select one")
        return Value(f"({bound.whole()})", replace(bound.columns[0], name=bound.columns[0].name))

    @override
    def exists(self, query: tree.Query) -> Value:
        bound = self._query(query, self.scope)
        return Value(f"(EXISTS ({bound.whole()}))", f.BOOLEAN)

    @override
    def in_query(self, query: tree.Query, at: int) -> tuple[str, Value]:
        bound = self._query(query, self.scope)
        if len(bound.columns) != 1:
            raise self.error(at, f"the query after IN has {len(bound.columns)} columns", "select one")
        return f"({bound.whole()})", Value("", bound.columns[0])


def _cover(order: int, radius_deg: float, point: Point) -> Cover:
    lon, lat = point.lon.origin, point.lat.origin
    assert lon is not None
    assert lat is not None
    return Cover(order, radius_deg, point.lon.sql, point.lat.sql, lon.column, lat.column)


def _rows(relation: Relation) -> float:
    """About how many rows; uploads first, tables of unknown size last."""
    if relation.table is None:
        return 1e6
    if relation.table.engine == "arrow":
        return float(relation.table.rows or 0)
    return float(relation.table.rows or 1e9)
