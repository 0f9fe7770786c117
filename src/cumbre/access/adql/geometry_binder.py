"""Geometry of the tree to typed SQL: regions, distances, and the pixels that make them fast."""

from __future__ import annotations

import abc
from dataclasses import replace
from typing import TYPE_CHECKING

from cumbre.access.adql import functions as f
from cumbre.access.adql import tree
from cumbre.access.adql.geometry import (
    ShapeError,
    array_sql,
    bounding_circle,
    constant_shape,
    in_shape_sql,
    is_constant,
    ranges_sql,
    region_ranges,
    within_sql,
)
from cumbre.access.adql.regions_text import parse_region
from cumbre.access.adql.values import Box, Circle, Geometry, Point, Polygon, Stored, Value, values_of
from cumbre.access.pixels import circle_pixels, region_key_ranges
from cumbre.access.tables import Column

if TYPE_CHECKING:
    from cumbre.access.adql.dialect import Dialect
    from cumbre.access.adql.errors import AdqlError
    from cumbre.access.adql.scope import Scope

MAX_CORNERS_IN_SQL = 40
"""Polygons with more corners are tested by a function: their SQL would be longer than it is fast."""
SHAPES = ("point", "circle", "polygon")
_SYSTEMS = ("", "ICRS", "FK5", "ICRS GEOCENTER", "ICRS BARYCENTER", "J2000", "UNKNOWNFRAME")
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "<>": "<>"}


class GeometryBinder(abc.ABC):
    """The geometric half of the binder."""

    dialect: Dialect
    scope: Scope

    @abc.abstractmethod
    def error(self, at: int, reason: str, remedy: str = "", token: str = "") -> AdqlError:
        """An error at a place of the text."""

    @abc.abstractmethod
    def value(self, node: tree.Expression) -> Value:
        """A scalar."""

    @abc.abstractmethod
    def any(self, node: tree.Expression) -> Value | Geometry:
        """A scalar or a geometry."""

    @abc.abstractmethod
    def match_pixels(self, node: tree.Expression, one: Point, other: Point, radius: Value) -> str | None:
        """Condition on pixels for a match of two relations; None when it cannot be helped."""

    # -- geometries --

    def geometry(self, node: tree.Expression) -> Geometry:
        """A geometry: a function, or a column that holds one."""
        found = self.any(node)
        if not isinstance(found, Value):
            return found
        if found.column.xtype in SHAPES and found.column.arraysize is not None:
            return Stored(found, found.column.xtype)
        if found.column.storage == "polygon" and found.origin is not None:
            corners = self.dialect.corners(found.origin.relation, found.column)
            return Stored(replace(found, sql=corners), "polygon")
        raise self.error(
            node.at, f"{found.kind} where a geometry is expected", "POINT(ra, dec), CIRCLE(…), POLYGON(…)"
        )

    def point(self, node: tree.Expression, arguments: tuple[tree.Expression, ...]) -> Point:
        """A position: two numbers or a point."""
        if len(arguments) == 2:
            return Point(self._coordinate(arguments[0]), self._coordinate(arguments[1]))
        found = self.geometry(arguments[0])
        if isinstance(found, Stored) and found.shape == "point":
            return self._parts(found)
        if not isinstance(found, Point):
            raise self.error(node.at, "a point is expected", "POINT(ra, dec)")
        return found

    def _parts(self, stored: Stored) -> Point:
        """Coordinates of a stored point."""
        lon, lat = (
            f.make(self.dialect.item(stored.value.sql, i), Column(name, "double", unit="deg"), stored.value)
            for i, name in ((1, "coord1"), (2, "coord2"))
        )
        return Point(lon, lat)

    def _coordinate(self, node: tree.Expression) -> Value:
        value = self.value(node)
        if not (value.numeric or value.null):
            raise self.error(node.at, f"{value.kind} where a coordinate in degrees is expected")
        if value.constant is not None and 0 < abs(value.constant) < 1e-100:
            # squares of it leave the range of doubles, which PostgreSQL takes for an error
            return Value(self.dialect.number(0.0), value.column, constant=0.0)
        return value

    def _without_system(self, node: tree.Call) -> tuple[tree.Expression, ...]:
        """Arguments after the coordinate system, which must be ICRS if it is there."""
        first = node.arguments[0]
        if isinstance(first, tree.Constant) and first.value is None:
            return node.arguments[1:]
        if not isinstance(first, tree.String):
            return node.arguments
        if first.value.strip().upper() not in _SYSTEMS:
            raise self.error(
                first.at,
                f"coordinate system {first.value!r}",
                "positions are ICRS; transform them before, or leave it out",
            )
        return node.arguments[1:]

    def geometric(self, node: tree.Call) -> Value | Geometry:
        """A function of geometry."""
        match node.name:
            case "POINT":
                arguments = self._without_system(node)
                return Point(self._coordinate(arguments[0]), self._coordinate(arguments[1]))
            case "CIRCLE":
                arguments = self._without_system(node)
                return Circle(self.point(node, arguments[:-1]), self._coordinate(arguments[-1]))
            case "BOX":
                arguments = self._without_system(node)
                return Box(
                    self.point(node, arguments[:-2]),
                    self._coordinate(arguments[-2]),
                    self._coordinate(arguments[-1]),
                )
            case "POLYGON":
                return self._polygon(node)
            case "REGION":
                value = self.value(node.arguments[0])
                if value.text is None:
                    raise self.error(
                        node.at, "REGION takes a string that is known", "REGION('CIRCLE ICRS 10 20 1')"
                    )
                return self._constant_geometry(value.text)
            case "CENTROID":
                return self._centroid(node)
            case "CONTAINS" | "INTERSECTS":
                return self._as_number(node)
            case "DISTANCE":
                return self._distance(node)
            case _:
                return self._measure(node)

    def _polygon(self, node: tree.Call) -> Polygon:
        arguments = self._without_system(node)
        first = self.any(arguments[0])
        if isinstance(first, Value) and not (first.column.xtype == "point" and first.column.arraysize):
            if len(arguments) % 2 or len(arguments) < 6:
                raise self.error(node.at, "POLYGON takes pairs of coordinates", "at least three corners")
            numbers = [self._coordinate(argument) for argument in arguments]
            return Polygon(tuple(Point(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=True)))
        return Polygon(tuple(self.point(node, (argument,)) for argument in arguments))

    def _constant_geometry(self, text: str) -> Geometry:
        shape, numbers = parse_region(text)
        values = [
            Value(self.dialect.number(n), Column("", "double", unit="deg"), constant=n) for n in numbers
        ]
        points = [Point(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        if shape == "point":
            return points[0]
        if shape == "circle":
            return Circle(points[0], values[2])
        if shape == "box":
            return Box(points[0], values[2], values[3])
        return Polygon(tuple(points))

    def geometry_of_text(self, node: tree.Cast) -> Geometry:
        """CAST of text to a geometry: numbers with blanks between."""
        value = self.value(node.value)
        kind = node.kind.lower()
        if value.text is not None:
            return self._constant_geometry(f"{kind} {value.text}")
        if not (value.string or value.null):
            raise self.error(
                node.at, f"CAST of {value.kind} to {node.kind}", "it takes text like '12.3 45.6'"
            )
        sql = self.dialect.numbers_of_text(value.sql)
        return Stored(f.make(sql, Column("", "double", "*", kind, unit="deg"), value), kind)

    def array_of(self, node: tree.Expression, geometry: Geometry) -> Value:
        """A geometry as a value of a result: an array of degrees."""
        try:
            sql, shape = array_sql(self.dialect, geometry)
        except ShapeError as error:
            raise self.error(node.at, str(error)) from error
        size = {"point": "2", "circle": "3"}.get(shape, "*")
        column = Column(shape, "double", size, shape, unit="deg", ucd="pos.outline" if size == "*" else "pos")
        if isinstance(geometry, Stored):
            return geometry.value
        return f.make(sql, column, *values_of(geometry))

    # -- measures --

    def _centroid(self, node: tree.Call) -> Geometry:
        found = self.geometry(node.arguments[0])
        match found:
            case Point() | Stored(_, "point"):
                return found
            case Circle(centre, _) | Box(centre, _, _):
                return centre
            case _:
                array = self.array_of(node.arguments[0], found)
                sql = self.dialect.region("centroid", [array.sql])
                return Stored(f.make(sql, Column("", "double", "2", "point", unit="deg"), array), "point")

    def _measure(self, node: tree.Call) -> Value:
        found = self.geometry(node.arguments[0])
        if node.name == "COORDSYS":
            return Value(self.dialect.string("ICRS"), Column("coordsys", "char", "*"))
        if node.name == "AREA":
            column = Column("area", "double", unit="deg**2", ucd="phys.angArea")
            if isinstance(found, Point):
                return f.make(self.dialect.number(0.0), column, found.lon)
            sql, shape = array_sql(self.dialect, found)
            return f.make(
                self.dialect.region("area", [self.dialect.string(shape), sql]), column, *values_of(found)
            )
        if isinstance(found, Stored) and found.shape == "point":
            found = self._parts(found)
        if not isinstance(found, Point):
            raise self.error(node.at, f"{node.name} takes a point", f"{node.name}(CENTROID(…))")
        return found.lon if node.name == "COORD1" else found.lat

    def _distance(self, node: tree.Call) -> Value:
        one, other = self._two_points(node)
        sql = self.dialect.distance(
            *(self.dialect.double(v.sql) for v in (one.lon, one.lat, other.lon, other.lat))
        )
        column = Column("distance", "double", unit="deg", ucd="pos.angDistance")
        return f.make(sql, column, one.lon, one.lat, other.lon, other.lat)

    def _two_points(self, node: tree.Call) -> tuple[Point, Point]:
        if len(node.arguments) == 4:
            return self.point(node, node.arguments[:2]), self.point(node, node.arguments[2:])
        return self.point(node, node.arguments[:1]), self.point(node, node.arguments[1:])

    # -- conditions --

    def _as_number(self, node: tree.Call) -> Value:
        test = self._region_test(node, node)
        return f.make(f"(CASE WHEN {test.sql} THEN 1 ELSE 0 END)", Column(node.name.lower(), "int"), test)

    def region_comparison(self, node: tree.Binary) -> Value | None:
        """``CONTAINS(…) = 1``, ``DISTANCE(…) < r`` and their mirrors; None for anything else."""
        for call, number, operator in (
            (node.left, node.right, node.operator), (node.right, node.left, _FLIPPED[node.operator])
        ):  # fmt: skip
            if not isinstance(call, tree.Call):
                continue
            if (
                call.name in ("CONTAINS", "INTERSECTS")
                and operator == "="
                and isinstance(number, tree.Number)
            ):
                if number.text == "1":
                    return self._region_test(call, node)
                if number.text == "0":
                    test = self._region_test(call, None)
                    return f.make(f"(NOT {test.sql})", f.BOOLEAN, test)
            if call.name == "DISTANCE" and operator in ("<", "<="):
                radius = f.number(self.dialect, self.value(number))
                one, other = self._two_points(call)
                return self._near(node, one, other, radius, strict=operator == "<")
        return None

    def _region_test(self, call: tree.Call, node: tree.Expression | None) -> Value:
        """Inside, or touching; ``node`` is the condition when it may help a match of two relations."""
        first, second = self.geometry(call.arguments[0]), self.geometry(call.arguments[1])
        touching = call.name == "INTERSECTS"
        first, second = (
            self._parts(g) if isinstance(g, Stored) and g.shape == "point" else g for g in (first, second)
        )
        if isinstance(second, Point) and not isinstance(first, Point):
            if not touching:
                raise self.error(call.at, "a region is never inside a point",
                                 "the point comes first: CONTAINS(POINT(…), CIRCLE(…))")  # fmt: skip
            first, second = second, first
        match first, second:
            case Point(), Circle(centre, radius):
                return self._near(node, first, centre, radius, strict=False)
            case Point(), Point():
                zero = Value(self.dialect.number(0.0), f.DOUBLE, constant=0.0)
                return self._near(node, first, second, zero, strict=False)
            case Circle(a, r), Circle(b, s):
                radius = (
                    f.arithmetic(self.dialect, "+", r, s)
                    if touching
                    else f.arithmetic(self.dialect, "-", s, r)
                )
                return self._near(node, a, b, radius, strict=False)
            case Point(), Box() | Polygon():
                shape = constant_shape(second)
                if shape is not None and len(shape.ra) <= MAX_CORNERS_IN_SQL:
                    test = f.make(in_shape_sql(self.dialect, first, shape), f.BOOLEAN, first.lon, first.lat)
                    return self._with_pixels(first, second, test)
        (one, shape_one), (two, shape_two) = array_sql(self.dialect, first), array_sql(self.dialect, second)
        words = [self.dialect.string(shape_one), one, self.dialect.string(shape_two), two]
        name = "intersects" if touching else "contains"
        test = f.make(self.dialect.region(name, words), f.BOOLEAN, *values_of(first), *values_of(second))
        if isinstance(first, Point):
            test = self._with_pixels(first, second, test)
        return self._with_keys(first, second, self._with_keys(second, first, test))

    def _with_pixels(self, point: Point, region: Geometry, test: Value) -> Value:
        pixel = self.pixel_of(point)
        ranges = region_ranges(region) if pixel is not None else None
        if pixel is None or ranges is None:
            return test
        return f.make(f"({ranges_sql(self.dialect, pixel, ranges)} AND {test.sql})", f.BOOLEAN, test)

    def _with_keys(self, stored: Geometry, other: Geometry, test: Value) -> Value:
        """With the index of a column of regions, when it has one and the other region is known."""
        if not (isinstance(stored, Stored) and stored.shape == "polygon" and stored.value.column.indexed):
            return test
        around = bounding_circle(other)
        if around is None or not -90 <= around[1] <= 90:
            return test
        near = self.dialect.region_near(stored.value.sql, region_key_ranges(*around))
        return test if near is None else f.make(f"({near} AND {test.sql})", f.BOOLEAN, test)

    def _near(
        self, node: tree.Expression | None, one: Point, other: Point, radius: Value, *, strict: bool
    ) -> Value:
        """Two positions nearer than a radius."""
        test = within_sql(self.dialect, one, other, radius, strict=strict)
        extra: list[str] = []
        if radius.constant is not None:
            for moving, fixed in ((one, other), (other, one)):
                pixel = self.pixel_of(moving)
                if pixel is None or not is_constant(fixed.lon, fixed.lat):
                    continue
                lon, lat = fixed.lon.constant, fixed.lat.constant
                if lat is not None and lon is not None and -90 <= lat <= 90:
                    ranges = circle_pixels(lon, lat, radius.constant)
                    extra += [ranges_sql(self.dialect, pixel, ranges)] if ranges is not None else []
            if not extra and node is not None:
                match = self.match_pixels(node, one, other, radius)
                extra += [match] if match else []
        made = f.make(test, f.BOOLEAN, one.lon, one.lat, other.lon, other.lat, radius)
        if not extra:
            return made
        return f.make(f"({' AND '.join(extra)} AND {test})", f.BOOLEAN, made)

    def pixel_of(self, point: Point) -> str | None:
        """SQL of the pixel column of a position, when it is a relation's main one."""
        lon, lat = point.lon.origin, point.lat.origin
        if lon is None or lat is None or lon.relation != lat.relation:
            return None
        relation = self.scope.relation(lon.relation)
        if relation is None or relation.position is None or not relation.position.pixel:
            return None
        if (lon.column, lat.column) != (relation.position.ra, relation.position.dec):
            return None
        name = relation.position.pixel
        found = dict(relation.columns).get(name)
        if found is None:
            return None
        relation.used.add(name)
        return found.sql
