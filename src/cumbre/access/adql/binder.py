"""From values of the tree to typed SQL: every name is found, every type checked, before anything runs."""

from __future__ import annotations

import abc
import math
from dataclasses import replace

from cumbre.access.adql import functions as f
from cumbre.access.adql import tree
from cumbre.access.adql.dialect import Dialect
from cumbre.access.adql.errors import AdqlError
from cumbre.access.adql.geometry import ShapeError
from cumbre.access.adql.geometry_binder import GeometryBinder
from cumbre.access.adql.scope import Scope
from cumbre.access.adql.signatures import AGGREGATES, GEOMETRIES
from cumbre.access.adql.tokens import place_of
from cumbre.access.adql.values import Geometry, Value
from cumbre.access.tables import Column

MAX_SQL = 2_000_000
_GEOMETRIC = GEOMETRIES | {"AREA", "COORD1", "COORD2", "COORDSYS", "CONTAINS", "INTERSECTS", "DISTANCE"}


class ExpressionBinder(GeometryBinder):
    """Values and conditions of one query text."""

    def __init__(self, text: str, dialect: Dialect) -> None:
        self.text = text
        self.dialect = dialect
        self.scope = Scope()
        self.seed: float | None = None

    def error(self, at: int, reason: str, remedy: str = "", token: str = "") -> AdqlError:
        """An error at a place of the text."""
        line, column = place_of(self.text, at)
        return AdqlError(reason, remedy=remedy, line=line, column=column, token=token)

    # -- values --

    def value(self, node: tree.Expression) -> Value:
        """A scalar."""
        found = self.any(node)
        if not isinstance(found, Value):
            raise self.error(
                node.at,
                "a geometry stands where a value is expected",
                "use COORD1, COORD2, AREA, DISTANCE, CONTAINS",
            )
        return found

    def any(self, node: tree.Expression) -> Value | Geometry:
        """A scalar or a geometry."""
        try:
            found = self._any(node)
        except f.TypeMismatchError as error:
            raise self.error(node.at, str(error), error.remedy) from error
        except ShapeError as error:
            raise self.error(node.at, str(error)) from error
        if isinstance(found, Value) and len(found.sql) > MAX_SQL:
            raise self.error(node.at, "the expression is too large", "compute it in steps (WITH)")
        return found

    def _any(self, node: tree.Expression) -> Value | Geometry:
        match node:
            case tree.Number():
                return self._number(node)
            case tree.String(text):
                if "\0" in text:
                    raise self.error(node.at, "text with a zero character")
                column = f.TEXT if text.isascii() else replace(f.TEXT, datatype="unicodeChar")
                return Value(self.dialect.string(text), column, text=text)
            case tree.Constant(None):
                return Value("NULL", Column("", "null"))
            case tree.Constant(truth):
                return Value("TRUE" if truth else "FALSE", f.BOOLEAN)
            case tree.ColumnRef():
                return self.column(node)
            case tree.Call():
                return self._call(node)
            case tree.Cast():
                return self._cast(node)
            case tree.Case():
                return self._case(node)
            case tree.Unary("NOT", _):
                return self.condition(node)
            case tree.Unary(operator, inner):
                return f.negative(self.dialect, operator, self.value(inner))
            case tree.Binary("||", left, right):
                return f.concatenate(self.dialect, self.value(left), self.value(right))
            case tree.Binary(operator, left, right) if operator in "+-*/":
                return f.arithmetic(self.dialect, operator, self.value(left), self.value(right))
            case tree.Scalar(query):
                return self.scalar_query(query, node.at)
            case tree.Star():
                raise self.error(node.at, "* stands where a value is expected")
            case _:
                return self.condition(node)

    def _number(self, node: tree.Number) -> Value:
        text = node.text
        if text[:2] in ("0x", "0X") or text.isdigit():
            whole = int(text, 16 if text[:2] in ("0x", "0X") else 10)
            if whole < 1 << 63:
                return Value(
                    str(whole), Column("", "int" if whole < 1 << 31 else "long"), constant=float(whole)
                )
        number = float(text)
        if math.isinf(number):
            raise self.error(node.at, f"the number {text[:40]} is too large")
        return Value(self.dialect.number(number), f.DOUBLE, constant=number)

    def column(self, node: tree.ColumnRef) -> Value:
        """A column by its name, here or in a query around."""
        name, qualifier = node.parts[-1], node.parts[:-1]
        scope: Scope | None = self.scope
        while scope is not None:
            found = self._in_scope(node, scope, name, qualifier)
            if found is not None:
                return found
            scope = scope.outer
        raise self._no_column(node, name, qualifier)

    def _in_scope(
        self, node: tree.ColumnRef, scope: Scope, name: tree.Name, qualifier: tuple[tree.Name, ...]
    ) -> Value | None:
        if qualifier:
            relations = scope.qualified(qualifier)
            if not relations:
                return None
            if len(relations) > 1:
                raise self.error(
                    node.at, f"{qualifier[-1]} is in FROM more than once", "give each its own name: … AS a"
                )
            matches = relations[0].value(name)
            if not matches:
                raise self._no_column(node, name, qualifier)
            if len(matches) > 1:
                raise self.error(
                    node.at, f"{node} is ambiguous", "write the name in double quotes, as it is spelled"
                )
            relations[0].used.add(matches[0][0])
            return matches[0][1]
        found = scope.find(name)
        if not found:
            return None
        if len(found) > 1:
            owners = [scope.relation(alias) for column in found for alias in column.relations]
            names = ", ".join(f"{owner.name}.{name}" for owner in owners if owner)
            raise self.error(node.at, f"{name} is ambiguous", f"write one of {names}")
        for alias in found[0].relations:
            owner = scope.relation(alias)
            if owner is not None:
                owner.used.add(found[0].name)
        return found[0].value

    def _no_column(
        self, node: tree.ColumnRef, name: tree.Name, qualifier: tuple[tree.Name, ...]
    ) -> AdqlError:
        relation = None
        if qualifier:
            relations = self.scope.qualified(qualifier)
            if not relations:
                hidden = self.scope.hidden(qualifier[-1])
                if hidden is not None and hidden.label is not None:
                    return self.error(node.at, f"{qualifier[-1]} is called {hidden.label} here",
                                      f"write {hidden.label}.{name}", str(node))  # fmt: skip
                return self.error(
                    node.at, f"there is no {'.'.join(map(str, qualifier))} in FROM", token=str(node)
                )
            relation = relations[0]
        near = self.scope.near(name.value, relation)
        known = ", ".join(dict.fromkeys(r.name for r in self.scope.relations))
        remedy = f"near: {near}" if near else f"tap_schema.columns lists the columns of {known}"
        if name.quoted and (relation or self.scope) and near.lower() == name.value.lower():
            remedy = f"a quoted name must agree in capitals: {near}"
        return self.error(node.at, f"there is no column {node}", remedy, str(node))

    def _call(self, node: tree.Call) -> Value | Geometry:
        name = node.name
        if name in AGGREGATES:
            value = None if node.star else self.value(node.arguments[0])
            return f.aggregate(self.dialect, name, value, distinct=node.distinct)
        if name in _GEOMETRIC:
            return self.geometric(node)
        if name == "IVO_HEALPIX_INDEX":
            return self._healpix(node)
        values = [self.value(argument) for argument in node.arguments]
        if name in ("LOWER", "UPPER"):
            if not (values[0].string or values[0].null):
                raise self.error(node.at, f"{name} of {values[0].kind}", "it takes text")
            return f.make(
                f"{name.lower()}({values[0].sql})", replace(values[0].column, name=name.lower()), *values
            )
        if name == "COALESCE":
            column = f.common_type(values)
            parts = ", ".join(f.as_type(self.dialect, value, column) for value in values)
            return f.make(f"COALESCE({parts})", replace(column, name="coalesce"), *values)
        if name == "NULLIF":
            column = f.common_type(values)
            parts = ", ".join(f.as_type(self.dialect, value, column) for value in values)
            return f.make(f"NULLIF({parts})", replace(column, name="nullif"), *values)
        if name == "IN_UNIT":
            if values[1].text is None:
                raise self.error(
                    node.arguments[1].at, "the unit of IN_UNIT is not a string", "IN_UNIT(ra, 'rad')"
                )
            return f.in_unit(self.dialect, values[0], values[1].text)
        if name == "RAND" and values and values[0].constant is not None:
            self.seed = values[0].constant
        return f.scalar(self.dialect, name, values)

    def _healpix(self, node: tree.Call) -> Value:
        order = self.value(node.arguments[0])
        if order.constant is None or not 0 <= order.constant <= 29 or not order.integer:
            raise self.error(node.at, "the order of IVO_HEALPIX_INDEX is a whole number from 0 to 29")
        column = Column("healpix", "long", ucd="pos.healpix")
        point = self.point(node, node.arguments[1:])
        pixel = self.pixel_of(point)
        level = int(order.constant)
        if pixel is not None:
            return f.make(f"({pixel} >> {2 * (29 - level)})", column, point.lon, point.lat)
        return f.make(
            self.dialect.healpix(str(level), point.lon.sql, point.lat.sql), column, point.lon, point.lat
        )

    def _cast(self, node: tree.Cast) -> Value | Geometry:
        if node.kind in ("POINT", "CIRCLE", "POLYGON"):
            return self.geometry_of_text(node)
        return f.cast(self.dialect, self.value(node.value), node.kind, node.size)

    def _case(self, node: tree.Case) -> Value:
        tests, results, parts = [], [], []
        operand = None if node.operand is None else self.value(node.operand)
        for when, then in node.branches:
            if operand is None:
                test = self.condition(when)
                tests.append(test.sql)
                parts.append(test)
            else:
                choice = self.value(when)
                tests.append(f.comparison(self.dialect, "=", operand, choice))
                parts += [operand, choice]
            results.append(self.value(then))
        otherwise = (
            Value("NULL", Column("", "null")) if node.otherwise is None else self.value(node.otherwise)
        )
        column = f.common_type([*results, otherwise])
        branches = " ".join(
            f"WHEN {test} THEN {f.as_type(self.dialect, result, column)}"
            for test, result in zip(tests, results, strict=True)
        )
        last = f.as_type(self.dialect, otherwise, column)
        return f.make(f"(CASE {branches} ELSE {last} END)", column, *parts, *results, otherwise)

    # -- conditions --

    def condition(self, node: tree.Expression) -> Value:
        """True, false or unknown."""
        try:
            found = self._condition(node)
        except f.TypeMismatchError as error:
            raise self.error(node.at, str(error), error.remedy) from error
        except ShapeError as error:
            raise self.error(node.at, str(error)) from error
        if len(found.sql) > MAX_SQL:
            raise self.error(
                node.at,
                "the condition is too large",
                "put the values or regions into an uploaded table and join it",
            )
        return found

    def _condition(self, node: tree.Expression) -> Value:
        match node:
            case tree.Binary("AND" | "OR" as word, left, right):
                a, b = self.condition(left), self.condition(right)
                return f.make(f"({a.sql} {word} {b.sql})", f.BOOLEAN, a, b)
            case tree.Unary("NOT", inner):
                a = self.condition(inner)
                return f.make(f"(NOT {a.sql})", f.BOOLEAN, a)
            case tree.Binary(operator, left, right) if operator in ("=", "<>", "<", ">", "<=", ">="):
                region = self.region_comparison(node)
                if region is not None:
                    return region
                a, b = self.value(left), self.value(right)
                return f.make(f.comparison(self.dialect, operator, a, b), f.BOOLEAN, a, b)
            case tree.Between(inner, low, high, negated):
                a, b, c = self.value(inner), self.value(low), self.value(high)
                f.comparison(self.dialect, ">=", a, b)
                f.comparison(self.dialect, "<=", a, c)
                between = "NOT BETWEEN" if negated else "BETWEEN"
                return f.make(f"({a.sql} {between} {b.sql} AND {c.sql})", f.BOOLEAN, a, b, c)
            case tree.InList():
                return self._in_list(node)
            case tree.Like(inner, pattern, negated, ignore_case):
                a, b = self.value(inner), self.value(pattern)
                for side in (a, b):
                    if not (side.string or side.null):
                        raise self.error(node.at, f"LIKE of {side.kind}", "it takes text")
                like = self.dialect.like(a.sql, b.sql, ignore_case=ignore_case)
                return f.make(f"({'NOT ' if negated else ''}({like}))", f.BOOLEAN, a, b)
            case tree.IsNull(inner, negated):
                return self._is_null(inner, negated=negated)
            case tree.Exists(query):
                return self.exists(query)
            case tree.Constant(truth) if truth is not None:
                return Value("TRUE" if truth else "FALSE", f.BOOLEAN)
            case _:
                raise self.error(
                    node.at, "a value stands where a condition is expected", "compare it with something"
                )

    def _is_null(self, inner: tree.Expression, *, negated: bool) -> Value:
        found = self.any(inner)
        word = "IS NOT NULL" if negated else "IS NULL"
        if isinstance(found, Value):
            return f.make(f"({found.sql} {word})", f.BOOLEAN, found)
        stored = self.array_of(inner, found)
        return f.make(f"({stored.sql} {word})", f.BOOLEAN, stored)

    def _in_list(self, node: tree.InList) -> Value:
        value = self.value(node.value)
        word = "NOT IN" if node.negated else "IN"
        if not isinstance(node.items, tuple):
            query, inner = self.in_query(node.items, node.at)
            f.comparison(self.dialect, "=", value, inner)
            return f.make(f"({value.sql} {word} {query})", f.BOOLEAN, value, inner)
        items = [self.value(item) for item in node.items]
        if value.boolean:
            tests = [f.comparison(self.dialect, "=", value, item) for item in items]
            joined = f"({' OR '.join(tests)})"
            return f.make(f"(NOT {joined})" if node.negated else joined, f.BOOLEAN, value, *items)
        for item in items:
            f.comparison(self.dialect, "=", value, item)
        listed = ", ".join(item.sql for item in items)
        relations = f.make("", f.BOOLEAN, value, *items)
        return replace(relations, sql=f"({value.sql} {word} ({listed}))")

    # -- what the binder of queries adds --

    @abc.abstractmethod
    def scalar_query(self, query: tree.Query, at: int) -> Value:
        """A query as a value."""

    @abc.abstractmethod
    def exists(self, query: tree.Query) -> Value:
        """EXISTS."""

    @abc.abstractmethod
    def in_query(self, query: tree.Query, at: int) -> tuple[str, Value]:
        """The query of IN and its column."""
