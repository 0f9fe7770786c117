"""Regions as text: DALI's numbers and the simple forms of STC-S."""

from __future__ import annotations

import math

from cumbre.access.adql.geometry import ShapeError

_COUNTS = {"point": 2, "circle": 3, "box": 4}
_FRAMES = frozenset(
    {"ICRS", "FK5", "J2000", "UNKNOWNFRAME", "GEOCENTER", "BARYCENTER", "TOPOCENTER", "SPHERICAL2"}
)


def parse_region(text: str) -> tuple[str, list[float]]:
    """Shape (point, circle, box, polygon) and its numbers.

    Raises
    ------
    ShapeError
        Not one of these shapes, another frame than ICRS, a wrong count of numbers.
    """
    words = text.replace(",", " ").split()
    shape = words[0].lower() if words else ""
    shape = {"position": "point"}.get(shape, shape)
    if shape not in (*_COUNTS, "polygon"):
        raise ShapeError(f"region {text[:60]!r}: expected POSITION, CIRCLE, BOX or POLYGON with its numbers")
    numbers: list[float] = []
    for word in words[1:]:
        if word.upper() in _FRAMES and not numbers:
            continue
        try:
            number = float(word)
        except ValueError:
            raise ShapeError(f"region {text[:60]!r}: {word!r} is neither ICRS nor a number") from None
        if not math.isfinite(number):
            raise ShapeError(f"region {text[:60]!r}: {word!r} is not a number on the sky")
        numbers.append(number)
    good = len(numbers) == _COUNTS[shape] if shape in _COUNTS else len(numbers) >= 6 and len(numbers) % 2 == 0
    if not good:
        wanted = _COUNTS.get(shape, "pairs, at least three")
        raise ShapeError(f"region {text[:60]!r}: {shape} has {wanted} numbers, found {len(numbers)}")
    return shape, numbers
