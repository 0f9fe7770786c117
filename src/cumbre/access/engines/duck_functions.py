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
        import numpy as np

        if not len(one):
            return pa.array([], type=pa.bool_())
        shapes = one[0].as_py(), other[0].as_py()  # words of the query: the same in each row
        near, null = _may_touch(shapes[0], a, shapes[1], b)
        out = np.zeros(len(near), dtype=bool)
        rows = pa.array(np.flatnonzero(near))
        for row, first, second in zip(
            rows.to_pylist(), a.take(rows).to_pylist(), b.take(rows).to_pylist(), strict=True
        ):
            out[row] = decide(shapes[0], first, shapes[1], second)
        return pa.array(out, mask=null)

    return test


def _may_touch(one: str, a: pa.ChunkedArray, other: str, b: pa.ChunkedArray) -> Any:
    """Which rows' regions need the exact test: the circles around them meet; and which are null."""
    import numpy as np

    middle_a, reach_a, null_a = _around(one, a)
    middle_b, reach_b, null_b = _around(other, b)
    apart = np.degrees(np.arccos(np.clip(np.sum(middle_a * middle_b, axis=1), -1, 1)))
    null = null_a | null_b
    # an arc cosine knows small angles to 2e-6 degrees
    return (apart <= reach_a + reach_b + 1e-5) & ~null, null


def _around(shape: str, regions: pa.ChunkedArray) -> Any:
    """Middle and radius (degrees) of a circle around each region, and which are null."""
    import numpy as np
    import pyarrow.compute as pc

    from cumbre.access.pixels import unit_vectors

    rows = regions.combine_chunks()
    null = np.asarray(rows.is_null().to_numpy(zero_copy_only=False))
    sizes = np.asarray(pc.fill_null(pc.list_value_length(rows), 0).to_numpy(zero_copy_only=False))
    numbers = np.asarray(rows.flatten().to_numpy(zero_copy_only=False), dtype=np.float64)
    first = np.cumsum(sizes) - sizes
    if shape != "polygon":
        sizes = np.where(null, 0, 2)  # the radius of a circle is no corner
    corners = sizes // 2
    owner = np.repeat(np.arange(len(corners)), corners)
    at = np.repeat(first, corners) + 2 * (
        np.arange(len(owner)) - np.repeat(np.cumsum(corners) - corners, corners)
    )
    vectors = unit_vectors(numbers[at], numbers[at + 1])
    middle = np.stack([np.bincount(owner, vectors[:, i], len(corners)) for i in range(3)], axis=1)
    length = np.linalg.norm(middle, axis=1)
    middle /= np.where(length > 0, length, 1.0)[:, None]
    if shape == "circle":
        return middle, np.where(null, 0.0, numbers[np.minimum(first + 2, len(numbers) - 1)]), null
    depth = np.ones(len(corners))
    np.minimum.at(depth, owner, np.sum(vectors * middle[owner], axis=1))
    reach = np.degrees(np.arccos(np.clip(depth, -1, 1)))
    return middle, np.where(reach > 80, 180.0, reach), null


def _area(shape: pa.ChunkedArray, numbers: pa.ChunkedArray) -> pa.Array:

    rows = zip(shape.to_pylist(), numbers.to_pylist(), strict=True)
    return pa.array([None if b is None else area(a, b) for a, b in rows], type=pa.float64())


def _centroid(numbers: pa.ChunkedArray) -> pa.Array:

    return pa.array(
        [None if row is None else centroid(row) for row in numbers.to_pylist()],
        type=pa.list_(pa.float64()),
    )
