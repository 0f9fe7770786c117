"""SQL of the two engines: the same words with the same meaning, NULL where arithmetic has no answer."""

from __future__ import annotations

import abc
from typing import ClassVar, override

from cumbre.access.pixels import MAX_RANGES, Ranges
from cumbre.access.tables import Column


def quote(name: str) -> str:
    """An identifier in double quotes."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string in single quotes; both engines take backslashes as they are."""
    return "'" + text.replace("'", "''") + "'"


POLYGON_TEXT = "POLYGON ICRS "
"""How a stored polygon begins when it is published as text (STC-S)."""


class Dialect(abc.ABC):
    """What both engines share; each method gives a piece of SQL that is whole in itself (parentheses, calls)."""

    name = ""
    TYPES: ClassVar[dict[str, str]] = {}
    RANGES: ClassVar[int] = MAX_RANGES
    """Most ranges of pixels in a condition."""

    def type_of(self, column: Column) -> str:
        """SQL type of a column."""
        kind = self.TYPES[column.datatype]
        if column.arraysize is not None and column.datatype not in ("char", "unicodeChar"):
            return f"{kind}[]"
        return kind

    def cast(self, sql: str, datatype: str) -> str:
        """To a scalar VOTable type."""
        return f"CAST({sql} AS {self.TYPES[datatype]})"

    def double(self, sql: str) -> str:
        """To double."""
        return self.cast(sql, "double")

    @abc.abstractmethod
    def number(self, value: float) -> str:
        """A double."""

    @abc.abstractmethod
    def string(self, text: str) -> str:
        """A string."""

    @abc.abstractmethod
    def divide(self, left: str, right: str, *, integer: bool) -> str:
        """NULL when divided by nothing; whole numbers give whole numbers."""

    @abc.abstractmethod
    def round(self, sql: str, digits: str | None) -> str:
        """Half away from zero."""

    @abc.abstractmethod
    def truncate(self, sql: str, digits: str | None) -> str:
        """Towards zero."""

    @abc.abstractmethod
    def mod(self, left: str, right: str, *, integer: bool) -> str:
        """Rest of a division, sign of the dividend; NULL when divided by nothing."""

    @abc.abstractmethod
    def median(self, sql: str) -> str:
        """Median of a group."""

    @abc.abstractmethod
    def like(self, value: str, pattern: str, *, ignore_case: bool) -> str:
        """Without an escape character."""

    @abc.abstractmethod
    def timestamp(self, sql: str) -> str:
        """Text to ISO 8601 with milliseconds."""

    @abc.abstractmethod
    def array(self, items: list[str]) -> str:
        """Array of doubles."""

    def item(self, array: str, index: int) -> str:
        """Element of an array, the first is 1; NULL beyond the end."""
        return f"({array})[{index}]"

    @abc.abstractmethod
    def numbers_of_text(self, sql: str) -> str:
        """Array of doubles from text with blanks between."""

    def stored(self, alias: str, column: Column) -> str:
        """A stored column as its published type."""
        return f"{alias}.{quote(column.stored_name)}"

    def corners(self, alias: str, column: Column) -> str:
        """Numbers of a polygon that is published as text."""
        return self.numbers_of_text(f"substr({self.stored(alias, column)}, {len(POLYGON_TEXT) + 1})")

    @abc.abstractmethod
    def healpix(self, order: str, lon: str, lat: str) -> str:
        """Nested HEALPix pixel of a position."""

    @abc.abstractmethod
    def region(self, name: str, arguments: list[str]) -> str:
        """One of the functions of regions: contains, intersects, area, centroid."""

    def region_near(self, array: str, keys: Ranges) -> str | None:
        """A polygon's key of place and size is in one of the ranges; None where no index knows it."""
        del array, keys
        return None

    def logarithm(self, function: str, sql: str) -> str:
        """NULL where there is none."""
        return f"{function}(NULLIF(GREATEST({self.double(sql)}, 0), 0))"

    def haversine(self, lon1: str, lat1: str, lon2: str, lat2: str) -> str:
        """The square of the sine of half the distance of two positions in degrees."""
        return (
            f"(power(sin(radians({lat1} - {lat2}) / 2), 2)"
            f" + cos(radians({lat1})) * cos(radians({lat2})) * power(sin(radians({lon1} - {lon2}) / 2), 2))"
        )

    def distance(self, lon1: str, lat1: str, lon2: str, lat2: str) -> str:
        """Degrees between two positions."""
        # the factor keeps rounding from asking for the arc sine of more than one
        square = self.haversine(lon1, lat1, lon2, lat2)
        return f"(2 * degrees(asin(sqrt({square} * {self.number(1 - 1e-15)}))))"


class Postgres(Dialect):
    """PostgreSQL."""

    name = "postgres"
    TYPES: ClassVar[dict[str, str]] = {
        "boolean": "boolean", "unsignedByte": "smallint", "short": "smallint", "int": "integer",
        "long": "bigint", "float": "real", "double": "double precision", "char": "text", "unicodeChar": "text",
        "null": "text",
    }  # fmt: skip

    @override
    def number(self, value: float) -> str:
        return f"'{value!r}'::float8"

    @override
    def string(self, text: str) -> str:
        return f"CAST({literal(text)} AS text)"

    @override
    def divide(self, left: str, right: str, *, integer: bool) -> str:
        return f"({left} / NULLIF({right}, 0))"

    @override
    def round(self, sql: str, digits: str | None) -> str:
        return self.double(
            f"round(CAST({sql} AS numeric), {f'CAST({digits} AS integer)' if digits else '0'})"
        )

    @override
    def truncate(self, sql: str, digits: str | None) -> str:
        return self.double(
            f"trunc(CAST({sql} AS numeric), {f'CAST({digits} AS integer)' if digits else '0'})"
        )

    @override
    def mod(self, left: str, right: str, *, integer: bool) -> str:
        if integer:
            return f"({left} % NULLIF({right}, 0))"
        return self.double(f"mod(CAST({left} AS numeric), NULLIF(CAST({right} AS numeric), 0))")

    @override
    def median(self, sql: str) -> str:
        return f"percentile_cont(0.5) WITHIN GROUP (ORDER BY {self.double(sql)})"

    @override
    def like(self, value: str, pattern: str, *, ignore_case: bool) -> str:
        return f"{value} {'ILIKE' if ignore_case else 'LIKE'} {pattern} ESCAPE ''"

    @override
    def timestamp(self, sql: str) -> str:
        return f"to_char(CAST({sql} AS timestamp), 'YYYY-MM-DD\"T\"HH24:MI:SS.MS')"

    @override
    def array(self, items: list[str]) -> str:
        return f"CAST(ARRAY[{', '.join(items)}] AS double precision[])"

    @override
    def numbers_of_text(self, sql: str) -> str:
        return f"CAST(string_to_array(trim({sql}), ' ') AS double precision[])"

    @override
    def stored(self, alias: str, column: Column) -> str:
        plain = f"{alias}.{quote(column.stored_name)}"
        if column.storage == "timestamptz":
            return f"to_char({plain} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS')"
        if column.storage == "polygon":
            return f"('{POLYGON_TEXT}' || array_to_string({plain}, ' '))"
        return plain

    @override
    def corners(self, alias: str, column: Column) -> str:
        return f"{alias}.{quote(column.stored_name)}"

    @override
    def region(self, name: str, arguments: list[str]) -> str:
        return f"adql.{name}({', '.join(arguments)})"

    @override
    def region_near(self, array: str, keys: Ranges) -> str | None:
        ranges = ",".join(f"[{low},{high})" for low, high in keys)
        return f"(adql.region_key({array}) && '{{{ranges}}}'::int8multirange)"

    @override
    def healpix(self, order: str, lon: str, lat: str) -> str:
        return f"adql.healpix({order}, {self.double(lon)}, {self.double(lat)})"


class DuckDB(Dialect):
    """DuckDB."""

    name = "duckdb"
    TYPES: ClassVar[dict[str, str]] = {
        "boolean": "BOOLEAN", "unsignedByte": "UTINYINT", "short": "SMALLINT", "int": "INTEGER",
        "long": "BIGINT", "float": "FLOAT", "double": "DOUBLE", "char": "VARCHAR", "unicodeChar": "VARCHAR",
        "null": "VARCHAR",
    }  # fmt: skip

    # whole row groups are skipped or read: more ranges cost more to plan than they save
    RANGES: ClassVar[int] = 6

    @override
    def number(self, value: float) -> str:
        text = repr(value)
        return text if "e" in text else text + "e0"

    @override
    def string(self, text: str) -> str:
        return literal(text)

    @override
    def divide(self, left: str, right: str, *, integer: bool) -> str:
        return f"({left} // NULLIF({right}, 0))" if integer else f"({left} / NULLIF({right}, 0))"

    @override
    def round(self, sql: str, digits: str | None) -> str:
        return f"round({self.double(sql)}, {f'CAST({digits} AS INTEGER)' if digits else '0'})"

    @override
    def truncate(self, sql: str, digits: str | None) -> str:
        if digits is None:
            return f"trunc({self.double(sql)})"
        # 2.3 * 100 is 229.99999999999997: rounded far behind the point before it is cut
        power = f"power(10e0, CAST({digits} AS INTEGER))"
        return f"(trunc(round({self.double(sql)} * {power}, 6)) / {power})"

    @override
    def mod(self, left: str, right: str, *, integer: bool) -> str:
        if integer:
            return f"({left} % NULLIF({right}, 0))"
        return f"mod({self.double(left)}, NULLIF({self.double(right)}, 0))"

    @override
    def median(self, sql: str) -> str:
        return f"median({self.double(sql)})"

    @override
    def like(self, value: str, pattern: str, *, ignore_case: bool) -> str:
        return f"{value} {'ILIKE' if ignore_case else 'LIKE'} {pattern}"

    @override
    def timestamp(self, sql: str) -> str:
        return f"strftime(CAST({sql} AS TIMESTAMP), '%Y-%m-%dT%H:%M:%S.%g')"

    @override
    def array(self, items: list[str]) -> str:
        return f"CAST([{', '.join(items)}] AS DOUBLE[])"

    @override
    def numbers_of_text(self, sql: str) -> str:
        return f"CAST(string_split(trim({sql}), ' ') AS DOUBLE[])"

    @override
    def region(self, name: str, arguments: list[str]) -> str:
        return f"adql_{name}({', '.join(arguments)})"

    @override
    def healpix(self, order: str, lon: str, lat: str) -> str:
        return f"adql_healpix(CAST({order} AS INTEGER), {self.double(lon)}, {self.double(lat)})"
