"""Functions that a query may call, and with how many arguments. There are no others."""

from __future__ import annotations

from typing import Final

ANY: Final = 1_000_000
COORDINATE_FUNCTIONS: Final = {"POINT": 2, "CIRCLE": 3, "BOX": 4}
"""Geometry that may begin with a (deprecated) coordinate system: number of arguments without it."""

ARGUMENTS: Final[dict[str, tuple[int, int]]] = {
    # numbers
    "ABS": (1, 1), "CEILING": (1, 1), "DEGREES": (1, 1), "EXP": (1, 1), "FLOOR": (1, 1), "LOG": (1, 1),
    "LOG10": (1, 1), "MOD": (2, 2), "PI": (0, 0), "POWER": (2, 2), "RADIANS": (1, 1), "RAND": (0, 1),
    "ROUND": (1, 2), "SQRT": (1, 1), "TRUNCATE": (1, 2), "SIGN": (1, 1),
    # angles
    "ACOS": (1, 1), "ASIN": (1, 1), "ATAN": (1, 1), "ATAN2": (2, 2), "COS": (1, 1), "COT": (1, 1),
    "SIN": (1, 1), "TAN": (1, 1),
    # aggregates
    "AVG": (1, 1), "COUNT": (1, 1), "MAX": (1, 1), "MIN": (1, 1), "SUM": (1, 1),
    "STDDEV": (1, 1), "MEDIAN": (1, 1),
    # strings, conditions, units
    "LOWER": (1, 1), "UPPER": (1, 1), "COALESCE": (1, ANY), "NULLIF": (2, 2), "IN_UNIT": (2, 2),
    # geometry
    "POINT": (2, 3), "CIRCLE": (2, 4), "BOX": (3, 5), "POLYGON": (3, ANY), "REGION": (1, 1),
    "CENTROID": (1, 1), "AREA": (1, 1), "COORD1": (1, 1), "COORD2": (1, 1), "COORDSYS": (1, 1),
    "CONTAINS": (2, 2), "INTERSECTS": (2, 2), "DISTANCE": (2, 4),
    # IVOA's catalogue of user functions
    "IVO_HEALPIX_INDEX": (2, 3),
}  # fmt: skip
"""Name → least and most arguments."""

AGGREGATES: Final = frozenset({"AVG", "COUNT", "MAX", "MIN", "SUM", "STDDEV", "MEDIAN"})
GEOMETRIES: Final = frozenset({"POINT", "CIRCLE", "BOX", "POLYGON", "REGION", "CENTROID"})
"""Functions whose value is a geometry."""
EXTENSIONS: Final = frozenset({"SIGN", "STDDEV", "MEDIAN", "NULLIF"})
"""Beyond ADQL 2.1."""

CAST_TYPES: Final = frozenset(
    {"SMALLINT", "INTEGER", "BIGINT", "REAL", "DOUBLE PRECISION", "CHAR", "VARCHAR", "TIMESTAMP", "POINT",
     "CIRCLE", "POLYGON"}
)  # fmt: skip
"""Types that CAST can give."""


def arguments_text(name: str) -> str:
    """How many arguments, in words."""
    low, high = ARGUMENTS[name]
    if name == "DISTANCE":
        return "2 points or 4 coordinates"
    if high == ANY:
        return f"at least {low}"
    return str(low) if low == high else f"{low} to {high}"
