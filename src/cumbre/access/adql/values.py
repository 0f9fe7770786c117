"""What the binder holds of a value: its SQL, its type and meaning, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cumbre.access.tables import Column

RANKS = {"unsignedByte": 0, "short": 1, "int": 2, "long": 3, "float": 4, "double": 5}
"""Numeric types in the order in which they swallow each other."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The column of a relation in FROM that a value is, unchanged."""

    relation: str
    column: str


@dataclass(frozen=True, slots=True)
class Value:
    """A scalar value.

    Attributes
    ----------
    sql
        Text in the engine's dialect, safe to put anywhere.
    column
        Type, unit, UCD; ``name`` is what the column would be called.
    constant
        Its number when it is known before the query runs.
    text
        Its string when it is a string literal.
    origin
        The column it is.
    relations
        Aliases of the relations it is made of.
    aggregate
        Whether an aggregate is inside.
    """

    sql: str
    column: Column
    constant: float | None = None
    text: str | None = None
    origin: Origin | None = None
    relations: frozenset[str] = field(default_factory=frozenset)
    aggregate: bool = False

    @property
    def numeric(self) -> bool:
        """Whether it is one number."""
        return self.column.datatype in RANKS and self.column.arraysize is None

    @property
    def integer(self) -> bool:
        """Whether it is one whole number."""
        return self.numeric and RANKS[self.column.datatype] <= RANKS["long"]

    @property
    def string(self) -> bool:
        """Whether it is text."""
        return self.column.datatype in ("char", "unicodeChar")

    @property
    def boolean(self) -> bool:
        """Whether it is true or false."""
        return self.column.datatype == "boolean"

    @property
    def null(self) -> bool:
        """Whether it is the word NULL, which fits everywhere."""
        return self.column.datatype == "null"

    @property
    def kind(self) -> str:
        """Its type in words."""
        if self.string:
            return "text"
        if self.column.arraysize is not None:
            return f"array of {self.column.datatype}"
        return {"boolean": "true or false", "null": "NULL"}.get(self.column.datatype, "number")

    def named(self, name: str) -> Value:
        """The same, called ``name``."""
        return replace(self, column=replace(self.column, name=name))


@dataclass(frozen=True, slots=True)
class Point:
    """A position, degrees."""

    lon: Value
    lat: Value


@dataclass(frozen=True, slots=True)
class Circle:
    """Centre and radius, degrees."""

    centre: Point
    radius: Value


@dataclass(frozen=True, slots=True)
class Box:
    """Centre, width and height, degrees: a rectangle of great circles about the centre."""

    centre: Point
    width: Value
    height: Value


@dataclass(frozen=True, slots=True)
class Polygon:
    """Corners joined by great circles; smaller than half the sky."""

    corners: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A geometry in a column: an array of degrees; ``shape`` is point, circle or polygon."""

    value: Value
    shape: str


type Geometry = Point | Circle | Box | Polygon | Stored


def values_of(geometry: Geometry) -> tuple[Value, ...]:
    """The scalars a geometry is made of."""
    match geometry:
        case Point(lon, lat):
            return lon, lat
        case Circle(centre, radius):
            return centre.lon, centre.lat, radius
        case Box(centre, width, height):
            return centre.lon, centre.lat, width, height
        case Polygon(corners):
            return tuple(value for corner in corners for value in (corner.lon, corner.lat))
        case Stored(value, _):
            return (value,)


def merged(values: tuple[Value, ...]) -> tuple[frozenset[str], bool]:
    """Relations of several values together, and whether any has an aggregate."""
    relations: frozenset[str] = frozenset().union(*(value.relations for value in values))
    return relations, any(value.aggregate for value in values)
