"""Regions on the sphere, one at a time: inside, touching, area, middle. Degrees; polygons below half the sky.

The same steps in the same order as the functions that PostgreSQL gets (``engines/postgres_functions.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

type Vector = tuple[float, float, float]
type Numbers = Sequence[float]


def contains(one: str, a: Numbers, other: str, b: Numbers) -> bool:
    """Whether the first region lies in the second (its edge belongs to it)."""
    if one == "point":
        if other == "point":
            return distance(a, b) == 0
        return distance(a, b) <= b[2] if other == "circle" else in_polygon(vector(a[0], a[1]), corners(b))
    if other == "point":
        return False
    if one == "circle":
        if other == "circle":
            return distance(a, b) + a[2] <= b[2]
        centre, polygon = vector(a[0], a[1]), corners(b)
        return in_polygon(centre, polygon) and edge_distance(centre, polygon) >= a[2]
    if other == "circle":
        return all(distance((lon, lat), b) <= b[2] for lon, lat in zip(a[::2], a[1::2], strict=True))
    inner, outer = corners(a), corners(b)
    return all(in_polygon(v, outer) for v in inner) and not edges_cross(inner, outer)


def intersects(one: str, a: Numbers, other: str, b: Numbers) -> bool:
    """Whether the two regions have a point in common."""
    if one == "point":
        return contains(one, a, other, b)
    if other == "point":
        return contains(other, b, one, a)
    if one == "circle" and other == "circle":
        return distance(a, b) <= a[2] + b[2]
    if one == "circle":
        return _circle_meets(a, corners(b))
    if other == "circle":
        return _circle_meets(b, corners(a))
    first, second = corners(a), corners(b)
    return (
        any(in_polygon(v, second) for v in first)
        or any(in_polygon(v, first) for v in second)
        or edges_cross(first, second)
    )


def _circle_meets(circle: Numbers, polygon: list[Vector]) -> bool:
    centre = vector(circle[0], circle[1])
    return in_polygon(centre, polygon) or edge_distance(centre, polygon) <= circle[2]


def area(shape: str, numbers: Numbers) -> float:
    """Square degrees."""
    if shape == "point":
        return 0.0
    if shape == "circle":
        return 2 * math.pi * (1 - math.cos(math.radians(min(max(numbers[2], 0.0), 180.0)))) * _SQUARE
    polygon = corners(numbers)
    first, total = polygon[0], 0.0
    for second, third in pairwise(polygon[1:]):
        below = 1 + dot(first, second) + dot(second, third) + dot(third, first)
        total += 2 * math.atan2(dot(first, cross(second, third)), below)
    return abs(total) * _SQUARE


def centroid(numbers: Numbers) -> list[float]:
    """Longitude and latitude of a polygon's middle (its centre of mass)."""
    polygon = corners(numbers)
    x = y = z = 0.0
    for i, one in enumerate(polygon):
        other = polygon[(i + 1) % len(polygon)]
        normal = cross(one, other)
        length = math.sqrt(dot(normal, normal))
        if length > 0:
            angle = math.atan2(length, dot(one, other)) / length
            x, y, z = x + angle * normal[0], y + angle * normal[1], z + angle * normal[2]
    middle = _middle(polygon)
    if x * middle[0] + y * middle[1] + z * middle[2] < 0:
        x, y, z = -x, -y, -z
    if x == y == z == 0:
        x, y, z = middle
    return [math.degrees(math.atan2(y, x)) % 360.0, math.degrees(math.atan2(z, math.hypot(x, y)))]


_SQUARE = (180 / math.pi) ** 2


def vector(lon: float, lat: float) -> Vector:
    """Unit vector of degrees."""
    a, b = math.radians(lon), math.radians(lat)
    return math.cos(b) * math.cos(a), math.cos(b) * math.sin(a), math.sin(b)


def corners(numbers: Numbers) -> list[Vector]:
    """Unit vectors of a polygon's corners."""
    return [vector(lon, lat) for lon, lat in zip(numbers[::2], numbers[1::2], strict=True)]


def dot(a: Vector, b: Vector) -> float:
    """Scalar product."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Vector, b: Vector) -> Vector:
    """Vector product."""
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def distance(a: Numbers, b: Numbers) -> float:
    """Degrees between the first two numbers of each."""
    square = math.sin(math.radians(a[1] - b[1]) / 2) ** 2
    square += (
        math.cos(math.radians(a[1]))
        * math.cos(math.radians(b[1]))
        * math.sin(math.radians(a[0] - b[0]) / 2) ** 2
    )
    return math.degrees(2 * math.asin(math.sqrt(min(1.0, square))))


def _middle(polygon: list[Vector]) -> Vector:
    x, y, z = (sum(v[i] for v in polygon) for i in range(3))
    length = math.sqrt(x * x + y * y + z * z) or 1.0
    return x / length, y / length, z / length


def in_polygon(point: Vector, polygon: list[Vector]) -> bool:
    """Crossings of a ray in the plane that touches the sphere in the polygon's middle."""
    middle = _middle(polygon)
    if dot(point, middle) <= 0:
        return False
    east = cross((0.0, 0.0, 1.0) if abs(middle[2]) < 0.9 else (1.0, 0.0, 0.0), middle)
    north = cross(middle, east)

    def plane(v: Vector) -> tuple[float, float]:
        depth = dot(v, middle)
        return dot(v, east) / depth, dot(v, north) / depth

    x, y = plane(point)
    inside = False
    flat = [plane(v) for v in polygon]
    before = flat[-1]
    for here in flat:
        if (here[1] > y) != (before[1] > y) and x < (before[0] - here[0]) * (y - here[1]) / (
            before[1] - here[1]
        ) + here[0]:
            inside = not inside
        before = here
    return inside


def edge_distance(point: Vector, polygon: list[Vector]) -> float:
    """Degrees to the nearest point of a polygon's edge."""
    nearest = math.pi
    for i, one in enumerate(polygon):
        other = polygon[(i + 1) % len(polygon)]
        normal = cross(one, other)
        length = math.sqrt(dot(normal, normal))
        if length > 0 and dot(cross(normal, one), point) >= 0 and dot(cross(other, normal), point) >= 0:
            found = abs(math.asin(max(-1.0, min(1.0, dot(point, normal) / length))))
        else:
            found = min(_angle(point, one), _angle(point, other))
        nearest = min(nearest, found)
    return math.degrees(nearest)


def _angle(a: Vector, b: Vector) -> float:
    normal = cross(a, b)
    return math.atan2(math.sqrt(dot(normal, normal)), dot(a, b))


def edges_cross(first: list[Vector], second: list[Vector]) -> bool:
    """Whether an edge of one crosses an edge of the other."""
    for i, a in enumerate(first):
        b = first[(i + 1) % len(first)]
        ab = cross(a, b)
        for k, c in enumerate(second):
            d = second[(k + 1) % len(second)]
            cd = cross(c, d)
            sides = (-dot(ab, c), dot(ab, d), -dot(cd, b), dot(cd, a))
            if all(side > 0 for side in sides) or all(side < 0 for side in sides):
                return True
    return False
