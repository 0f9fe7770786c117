"""From whatever holds rows to Arrow tables of a catalogue's schema, and positions to HEALPix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.catalogs.schema import Column, Table
from cumbre.core.errors import UnprocessableDataError

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

type Rows = pa.Table | NDArray[np.void] | Mapping[str, Any] | Sequence[Mapping[str, Any]]

ORDER = 29
_NSIDE = 1 << ORDER


def hpx29(ra_deg: NDArray[np.float64], dec_deg: NDArray[np.float64]) -> NDArray[np.int64]:
    """HEALPix pixels (nested, order 29) of ICRS positions in degrees, shape ``(n,)``."""
    import hpgeom

    pixels = hpgeom.angle_to_pixel(_NSIDE, np.mod(ra_deg, 360.0), dec_deg)
    return np.atleast_1d(np.asarray(pixels, dtype=np.int64))


def circle_ranges(ra_deg: float, dec_deg: float, radius_deg: float) -> list[tuple[int, int]]:
    """Half-open ranges of order-29 pixels that cover a circle (and a little more)."""
    import hpgeom

    # pixels about a quarter of the radius wide: a few tens of ranges whatever the radius
    order = int(np.clip(np.ceil(np.log2(58.6 / max(radius_deg / 4, 1e-9))), 0, ORDER - 2))
    ranges = hpgeom.query_circle(
        1 << order, ra_deg % 360.0, dec_deg, radius_deg, inclusive=True, return_pixel_ranges=True
    )
    shift = 2 * (ORDER - order)
    return [(int(low) << shift, int(high) << shift) for low, high in ranges]


def circle_pixels(ra_deg: float, dec_deg: float, radius_deg: float, order: int) -> list[int]:
    """Nested pixels of an order that a circle touches, ascending."""
    import hpgeom

    pixels = hpgeom.query_circle(1 << order, ra_deg % 360.0, dec_deg, radius_deg, inclusive=True)
    return sorted(int(pixel) for pixel in pixels)


def separation_deg(
    ra_deg: float, dec_deg: float, ras_deg: NDArray[np.float64], decs_deg: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Great-circle distances in degrees, exact for small ones (haversine); shape ``(n,)``."""
    dec, decs = np.radians(dec_deg), np.radians(decs_deg)
    half = np.sin((decs - dec) / 2) ** 2
    half += np.cos(dec) * np.cos(decs) * np.sin(np.radians(ras_deg - ra_deg) / 2) ** 2
    return np.asarray(np.degrees(2 * np.arcsin(np.sqrt(np.clip(half, 0.0, 1.0)))))


def conform(table: Table, rows: Rows, **given: Any) -> pa.Table:
    """Rows as an Arrow table with every column of ``table``.

    Parameters
    ----------
    rows
        Arrow table, numpy structured array, mapping of columns, or sequence of mappings. Columns that are
        absent are null, or have the schema's default; NaN in a nullable column is null, and so is 0 in a
        nullable identifier.
    given
        Constant values of columns that are absent or null in ``rows``.

    Raises
    ------
    UnprocessableDataError
        A column that the schema does not have, one that is missing, or a value that does not fit.
    """
    import pyarrow as pa

    columns, length = _columns(rows)
    known = {column.name: column for column in table.columns}
    if unknown := sorted(set(columns) - set(known)):
        raise UnprocessableDataError(
            f"table {table.name}: no column {', '.join(unknown)}; see catalogs/level1.yaml"
        )
    if "hpx29" in known and length:
        ra, dec = (np.asarray(columns.get(name, np.nan), dtype=np.float64) for name in ("ra", "dec"))
        if not (np.isfinite(ra).all() and (np.abs(dec) <= 90).all()):
            raise UnprocessableDataError(
                f"table {table.name}: ra and dec must be finite degrees in every row"
            )
        columns["hpx29"] = hpx29(ra, dec)
    schema = table.arrow()
    arrays = []
    for column in table.columns:
        try:
            array = _array(columns.get(column.name), schema.field(column.name).type, column, length)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, ValueError, TypeError) as error:
            raise UnprocessableDataError(f"table {table.name}: column {column.name}: {error}") from error
        fill = given.get(column.name, column.default)
        if array.null_count and fill is not None:
            array = array.fill_null(pa.scalar(fill, array.type))
        if array.null_count and not column.nullable:
            raise UnprocessableDataError(f"table {table.name}: column {column.name} is required in every row")
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=schema)


def _columns(rows: Rows) -> tuple[dict[str, Any], int]:
    """Columns by name and number of rows."""
    if hasattr(rows, "column_names"):
        arrow: Any = rows
        return {name: arrow.column(name) for name in arrow.column_names}, arrow.num_rows
    if isinstance(rows, np.ndarray):
        return {name: rows[name] for name in rows.dtype.names or ()}, len(rows)
    if isinstance(rows, Mapping):
        lengths = {len(values) for values in rows.values()}
        if len(lengths) > 1:
            raise UnprocessableDataError(f"columns of different lengths: {sorted(lengths)}")
        return dict(rows), next(iter(lengths), 0)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}, len(rows)


def _array(values: Any, kind: pa.DataType, column: Column, length: int) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    if values is None:
        return pa.nulls(length, kind)
    if isinstance(values, pa.ChunkedArray):
        array = values.combine_chunks()
    elif isinstance(values, np.ndarray):
        array = pa.array(values.astype(str) if values.dtype.kind == "S" else np.ascontiguousarray(values))
    else:
        array = pa.array(values)
    if array.type != kind:
        array = array.cast(kind)
    if pa.types.is_floating(kind):
        array = pc.if_else(pc.is_finite(array), array, pa.scalar(None, kind))
    elif column.nullable and pa.types.is_int64(kind):
        array = pc.if_else(pc.equal(array, 0), pa.scalar(None, kind), array)
    return array
