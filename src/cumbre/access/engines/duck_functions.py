"""Functions that DuckDB lacks: pixels and regions, a whole column at a time."""

from __future__ import annotations

from typing import Any

import duckdb
import pyarrow as pa  # DuckDB evaluates the annotations

from cumbre.access.regions import area, centroid, contains, intersects


def add_functions(link: duckdb.DuckDBPyConnection) -> None:
    """Make them known to an instance."""
    from duckdb.func import FunctionNullHandling, PythonUDFType

    def add(name: str, function: Any, parameters: list[str], result: str) -> None:
        link.create_function(
            name,
            function,
            parameters,
            result,
            type=PythonUDFType.ARROW,
            null_handling=FunctionNullHandling.SPECIAL,
        )

    add("adql_neighbourhood", _neighbourhood, ["INTEGER", "DOUBLE", "DOUBLE"], "BIGINT[]")
    add("adql_healpix", _healpix, ["INTEGER", "DOUBLE", "DOUBLE"], "BIGINT")
    add("adql_contains", _region_test(contains), ["VARCHAR", "DOUBLE[]", "VARCHAR", "DOUBLE[]"], "BOOLEAN")
    add(
        "adql_intersects",
        _region_test(intersects),
        ["VARCHAR", "DOUBLE[]", "VARCHAR", "DOUBLE[]"],
        "BOOLEAN",
    )
    add("adql_area", _area, ["VARCHAR", "DOUBLE[]"], "DOUBLE")
    add("adql_centroid", _centroid, ["DOUBLE[]"], "DOUBLE[]")


def _floats(values: pa.ChunkedArray) -> Any:
    import numpy as np

    return np.asarray(values.cast("float64").to_numpy(zero_copy_only=False), dtype=np.float64)


def _neighbourhood(order: pa.ChunkedArray, ra: pa.ChunkedArray, dec: pa.ChunkedArray) -> pa.Array:
    import numpy as np

    from cumbre.access.pixels import neighbourhood

    if not len(order):
        return pa.array([], type=pa.list_(pa.int64()))
    pixels = neighbourhood(_floats(ra), _floats(dec), order[0].as_py())
    offsets = np.arange(0, 9 * len(pixels) + 1, 9, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pixels.ravel())


def _healpix(order: pa.ChunkedArray, ra: pa.ChunkedArray, dec: pa.ChunkedArray) -> pa.Array:
    import hpgeom
    import numpy as np

    lon, lat = _floats(ra), _floats(dec)
    good = np.isfinite(lon) & np.isfinite(lat) & (np.abs(lat) <= 90)
    out = np.zeros(len(lon), dtype=np.int64)
    if good.any():
        out[good] = hpgeom.angle_to_pixel(1 << order[0].as_py(), np.mod(lon[good], 360.0), lat[good])
    return pa.array(out, mask=~good)


def _region_test(decide: Any) -> Any:
    def test(
        one: pa.ChunkedArray, a: pa.ChunkedArray, other: pa.ChunkedArray, b: pa.ChunkedArray
    ) -> pa.Array:

        rows = zip(one.to_pylist(), a.to_pylist(), other.to_pylist(), b.to_pylist(), strict=True)
        return pa.array([decide(*row) if None not in row else None for row in rows], type=pa.bool_())

    return test


def _area(shape: pa.ChunkedArray, numbers: pa.ChunkedArray) -> pa.Array:

    rows = zip(shape.to_pylist(), numbers.to_pylist(), strict=True)
    return pa.array([None if b is None else area(a, b) for a, b in rows], type=pa.float64())


def _centroid(numbers: pa.ChunkedArray) -> pa.Array:

    return pa.array(
        [None if row is None else centroid(row) for row in numbers.to_pylist()],
        type=pa.list_(pa.float64()),
    )
