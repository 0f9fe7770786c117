"""Geometry to SQL: pixel ranges first where the position has them, then the exact test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cumbre.access.adql.dialect import Dialect
from cumbre.access.adql.values import Box, Circle, Geometry, Point, Polygon, Stored, Value
from cumbre.access.pixels import Ranges, circle_pixels, fewer, polygon_pixels, unit_vectors


@dataclass(frozen=True, slots=True)
class Shape:
    """Corners of a constant polygon, and what is known of it."""

    ra: tuple[float, ...]
    dec: tuple[float, ...]
    convex: bool
    triangles: tuple[tuple[int, int, int], ...]
    vectors: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    centre: np.ndarray[tuple[int], np.dtype[np.float64]]


class ShapeError(ValueError):
    """A region that cannot be used; the message says why."""


def constant_polygon(ra: tuple[float, ...], dec: tuple[float, ...]) -> Shape:
    """A polygon whose corners are known.

    Raises
    ------
    ShapeError
        Latitudes beyond the poles, or half the sky and more.
    """
    if any(not -90 <= value <= 90 for value in dec):
        raise ShapeError("latitudes are between −90 and 90 degrees")
    vectors = unit_vectors(np.asarray(ra, dtype=np.float64), np.asarray(dec, dtype=np.float64))
    centre = vectors.sum(axis=0)
    length = float(np.linalg.norm(centre))
    centre = centre / length if length > 1e-9 else centre
    if length <= 1e-9 or float((vectors @ centre).min()) < 0.01:
        raise ShapeError("polygons must be smaller than half the sky")
    turns = []
    count = len(ra)
    for i in range(count):
        a, b, c = vectors[i], vectors[(i + 1) % count], vectors[(i + 2) % count]
        turns.append(float(np.dot(np.cross(a, b), c)))
    significant = [turn for turn in turns if abs(turn) > 1e-15]
    convex = all(turn > 0 for turn in significant) or all(turn < 0 for turn in significant)
    if convex and count > 4:
        convex = _winds_once(vectors, centre)
    fan = tuple((0, i, i + 1) for i in range(1, count - 1))
    return Shape(ra, dec, convex, fan, vectors, centre)


def _winds_once(vectors: np.ndarray, centre: np.ndarray) -> bool:  # type: ignore[type-arg]
    """A star of five points turns the same way at each corner but goes around twice."""
    east = np.cross([0.0, 0.0, 1.0] if abs(centre[2]) < 0.9 else [1.0, 0.0, 0.0], centre)
    north = np.cross(centre, east)
    angle = np.unwrap(np.arctan2(vectors @ north, vectors @ east))
    last = float(np.angle(np.exp(1j * (angle[0] - angle[-1]))))
    return abs(abs(float(angle[-1] - angle[0]) + last) - 2 * math.pi) < 1e-6


def box_corners(
    ra: float, dec: float, width: float, height: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Corners of a box: great circles at right angles to the ends of its arms.

    Raises
    ------
    ShapeError
        A side of 180 degrees or more, or below 0.
    """
    if not (0 <= width < 180 and 0 <= height < 180):
        raise ShapeError("width and height of a box are between 0 and 180 degrees")
    if not -90 <= dec <= 90:
        raise ShapeError("latitudes are between −90 and 90 degrees")
    lon, lat = math.radians(ra), math.radians(dec)
    centre = np.array([math.cos(lat) * math.cos(lon), math.cos(lat) * math.sin(lon), math.sin(lat)])
    east = np.array([-math.sin(lon), math.cos(lon), 0.0])
    north = np.cross(centre, east)
    x, y = math.tan(math.radians(width / 2)), math.tan(math.radians(height / 2))
    corners = [centre + sx * x * east + sy * y * north for sx, sy in ((1, -1), (1, 1), (-1, 1), (-1, -1))]
    ras = tuple(math.degrees(math.atan2(v[1], v[0])) % 360.0 for v in corners)
    decs = tuple(math.degrees(math.atan2(v[2], math.hypot(v[0], v[1]))) for v in corners)
    return ras, decs


def is_constant(*values: Value) -> bool:
    """Whether all numbers are known."""
    return all(value.constant is not None for value in values)


def constant_shape(region: Geometry) -> Shape | None:
    """A polygon or box whose corners are known, None for anything else."""
    if isinstance(region, Box) and is_constant(
        region.centre.lon, region.centre.lat, region.width, region.height
    ):
        numbers = [_number(v) for v in (region.centre.lon, region.centre.lat, region.width, region.height)]
        return constant_polygon(*box_corners(*numbers))
    if isinstance(region, Polygon) and is_constant(*(v for c in region.corners for v in (c.lon, c.lat))):
        return constant_polygon(
            tuple(_number(corner.lon) for corner in region.corners),
            tuple(_number(corner.lat) for corner in region.corners),
        )
    return None


def _number(value: Value) -> float:
    assert value.constant is not None
    return value.constant


def region_ranges(region: Geometry) -> Ranges | None:
    """Pixels of a region whose numbers are known; None when they are not, or for most of the sky."""
    if isinstance(region, Circle) and is_constant(region.centre.lon, region.centre.lat, region.radius):
        return circle_pixels(_number(region.centre.lon), _number(region.centre.lat), _number(region.radius))
    shape = constant_shape(region)
    return None if shape is None else polygon_pixels(shape.ra, shape.dec, convex=shape.convex)


def bounding_circle(region: Geometry) -> tuple[float, float, float] | None:
    """Centre and radius, degrees, of a circle around a region whose numbers are known; None when they are not."""
    if isinstance(region, Point) and is_constant(region.lon, region.lat):
        return _number(region.lon), _number(region.lat), 0.0
    if isinstance(region, Circle) and is_constant(region.centre.lon, region.centre.lat, region.radius):
        return _number(region.centre.lon), _number(region.centre.lat), _number(region.radius)
    shape = constant_shape(region)
    if shape is None:
        return None
    x, y, z = (float(part) for part in shape.centre)
    reach = math.degrees(math.acos(max(-1.0, float((shape.vectors @ shape.centre).min()))))
    return math.degrees(math.atan2(y, x)), math.degrees(math.asin(max(-1.0, min(1.0, z)))), reach


def ranges_sql(dialect: Dialect, pixel: str, ranges: Ranges) -> str:
    """The pixel is in one of the ranges, or of fewer that hold them."""
    if not ranges:
        return "FALSE"
    ranges = fewer(ranges, dialect.RANGES)
    terms = [f"({pixel} >= {low} AND {pixel} < {high})" for low, high in ranges]
    if len(terms) == 1:
        return terms[0]
    # one more, redundant, range: files and row groups outside of all are skipped by it
    return f"({pixel} >= {ranges[0][0]} AND {pixel} < {ranges[-1][1]} AND ({' OR '.join(terms)}))"


def within_sql(dialect: Dialect, one: Point, other: Point, radius: Value, *, strict: bool) -> str:
    """Two positions are nearer than a radius (degrees); without an arc sine."""
    square = haversine_sql(dialect, one, other)
    sign = "<" if strict else "<="
    if radius.constant is not None:
        if radius.constant < 0 or (strict and radius.constant == 0):
            return f"({square} < 0)"
        limit = math.sin(math.radians(min(radius.constant, 180.0)) / 2) ** 2
        if radius.constant > 180 or (not strict and radius.constant == 180):
            limit = 2.0
        return f"({square} {sign} {dialect.number(limit)})"
    half = f"radians(LEAST(GREATEST({radius.sql}, 0), 180)) / 2"
    return f"({radius.sql} >= 0 AND {square} {sign} power(sin({half}), 2))"


def haversine_sql(dialect: Dialect, one: Point, other: Point) -> str:
    """The square of the sine of half the distance of two positions."""
    return dialect.haversine(
        dialect.double(one.lon.sql), dialect.double(one.lat.sql),
        dialect.double(other.lon.sql), dialect.double(other.lat.sql),
    )  # fmt: skip


def in_shape_sql(dialect: Dialect, point: Point, shape: Shape) -> str:
    """A position is in a polygon whose corners are known (its edge belongs to it)."""
    lon, lat = f"radians({dialect.double(point.lon.sql)})", f"radians({dialect.double(point.lat.sql)})"
    x, y, z = f"cos({lat}) * cos({lon})", f"cos({lat}) * sin({lon})", f"sin({lat})"

    def side(normal: np.ndarray, sign: str) -> str:  # type: ignore[type-arg]
        a, b, c = (dialect.number(float(part)) for part in normal)
        return f"{a} * {x} + {b} * {y} + {c} * {z} {sign}"

    front = side(shape.centre, "> 0")
    if shape.convex:
        return f"({front} AND {' AND '.join(_half_spaces(shape.vectors, side, shape.centre))})"
    # a fan of triangles: a position inside is in an odd number of them
    counts = []
    for triangle in shape.triangles:
        corners = shape.vectors[list(triangle)]
        if abs(float(np.dot(np.cross(corners[0], corners[1]), corners[2]))) < 1e-15:
            continue
        inside = " AND ".join(_half_spaces(corners, side, shape.centre))
        counts.append(f"CASE WHEN {inside} THEN 1 ELSE 0 END")
    if not counts:
        return f"({x} < -2)"
    return f"({front} AND ({' + '.join(counts)}) % 2 = 1)"


def _half_spaces(corners, side, centre) -> list[str]:  # type: ignore[no-untyped-def]
    """The sides of a triangle or a convex polygon, all from within."""
    count = len(corners)
    # By the corners themselves: seen from the centre a thin triangle of long arcs may seem to turn the other way.
    turn = sum(
        float(np.dot(np.cross(corners[i], corners[(i + 1) % count]), corners[(i + 2) % count]))
        for i in range(count)
    )
    sign = 1.0 if turn >= 0 else -1.0
    out = []
    for i in range(count):
        normal = sign * np.cross(corners[i], corners[(i + 1) % count])
        length = float(np.linalg.norm(normal))
        if length > 1e-14:
            out.append(side(normal / length, ">= 0"))
    return out or [side(centre, "> 2")]


def array_sql(dialect: Dialect, geometry: Geometry) -> tuple[str, str]:
    """A geometry as an array of degrees, and the word for its shape.

    Raises
    ------
    ShapeError
        A box whose numbers are not known.
    """
    match geometry:
        case Point(lon, lat):
            return dialect.array([lon.sql, lat.sql]), "point"
        case Circle(centre, radius):
            return dialect.array([centre.lon.sql, centre.lat.sql, radius.sql]), "circle"
        case Polygon(corners):
            return dialect.array([v.sql for c in corners for v in (c.lon, c.lat)]), "polygon"
        case Stored(value, shape):
            return value.sql, shape
        case Box():
            box = constant_shape(geometry)
            if box is None:
                raise ShapeError("a BOX needs numbers; with columns use POLYGON or compare coordinates")
            flat = [dialect.number(v) for pair in zip(box.ra, box.dec, strict=True) for v in pair]
            return dialect.array(flat), "polygon"
