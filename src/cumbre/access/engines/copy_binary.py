"""PostgreSQL's binary COPY to Arrow: whole columns at a time, no Python object for a value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.core.errors import FatalError

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

_HEADER = b"PGCOPY\n\xff\r\n\0"
_HEADER_SIZE = 19
BATCH_ROWS = 65_536
BATCH_BYTES = 16 << 20
FLUSH_S = 0.25


def read_batches(lists: Iterable[list[Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Batches of rows.

    Parameters
    ----------
    lists
        What the server sends, one message a row, some at a time.
    schema
        Types of the columns; the query must give exactly them (a uint8 comes as smallint).
    """
    parts: list[bytes] = []  # joined at once: a batch of small objects would keep the garbage collector busy
    lengths: list[int] = []
    size, first, started = 0, True, monotonic()
    for pieces in lists:
        if first:
            first = False
            if bytes(pieces[0][: len(_HEADER)]) != _HEADER:
                raise FatalError("PostgreSQL's COPY does not begin as binary COPY does")
            pieces[0] = pieces[0][_HEADER_SIZE:]
            if not len(pieces[0]):
                del pieces[0]
        if pieces and len(pieces[-1]) == 2:  # the trailer: no row is so short
            del pieces[-1]
        lengths += map(len, pieces)
        parts.append(b"".join(pieces))
        size += len(parts[-1])
        if len(lengths) >= BATCH_ROWS or size >= BATCH_BYTES or monotonic() - started > FLUSH_S:
            if lengths:
                yield _decode(b"".join(parts), lengths, schema)
            parts, lengths, size, started = [], [], 0, monotonic()
    if lengths:
        yield _decode(b"".join(parts), lengths, schema)


def _decode(joined: bytes, sizes: list[int], schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    content = np.frombuffer(joined, dtype=np.uint8)
    plain = _structure(schema)
    count = len(sizes)
    lengths = np.array(sizes, dtype=np.int64)
    if plain is not None and (lengths == plain.itemsize).all():
        # nothing is null when every row has its full length (a null would make it shorter)
        table = content.view(plain)
        columns = [_finish(np.asarray(table[f"v{i}"]), None, field.type) for i, field in enumerate(schema)]
        return pa.RecordBatch.from_arrays(columns, schema=schema)
    at = np.zeros(count, dtype=np.int64)
    np.cumsum(lengths[:-1], out=at[1:])
    at += 2
    arrays = []
    for field in schema:
        size = _gather(content, at, ">i4").astype(np.int64)
        null = size < 0
        start = at + 4
        arrays.append(_column(content, start, size, null, field.type))
        at = start + np.where(null, 0, size)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _numpy_type(kind: pa.DataType) -> str | None:
    """Big-endian type on the wire; None for what has no fixed size."""
    import pyarrow as pa

    return {
        pa.bool_(): "u1", pa.uint8(): ">i2", pa.int16(): ">i2", pa.int32(): ">i4", pa.int64(): ">i8",
        pa.float32(): ">f4", pa.float64(): ">f8",
    }.get(kind)  # fmt: skip


def _structure(schema: pa.Schema) -> np.dtype[Any] | None:
    """Layout of a row without nulls; None when a column has no fixed size."""
    parts: list[tuple[str, str]] = [("count", ">i2")]
    for i, field in enumerate(schema):
        kind = _numpy_type(field.type)
        if kind is None:
            return None
        parts += [(f"n{i}", ">i4"), (f"v{i}", kind)]
    return np.dtype(parts)


def _gather(content: NDArray[np.uint8], at: NDArray[np.int64], kind: str) -> NDArray[Any]:
    """Numbers at any bytes."""
    dtype = np.dtype(kind)
    if len(content) < dtype.itemsize:
        return np.zeros(len(at), dtype=dtype)
    windows = np.ndarray((len(content) - dtype.itemsize + 1,), dtype, content.data, strides=(1,))
    return windows[np.minimum(at, len(windows) - 1)]


def _column(
    content: NDArray[np.uint8], start: NDArray[np.int64], size: NDArray[np.int64], null: NDArray[np.bool_],
    kind: pa.DataType,
) -> pa.Array:  # fmt: skip
    import pyarrow as pa

    wire = _numpy_type(kind)
    if wire is not None:
        return _finish(_gather(content, start, wire), null, kind)
    lengths = np.where(null, 0, size)
    if pa.types.is_string(kind):
        return _strings(content, start, lengths, null)
    values = [
        None if gone else _array(content[a : a + n], kind)
        for a, n, gone in zip(start.tolist(), lengths.tolist(), null.tolist(), strict=True)
    ]
    return pa.array(values, type=kind)


def _finish(values: NDArray[Any], null: NDArray[np.bool_] | None, kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    native = values.astype(values.dtype.newbyteorder("="))
    if pa.types.is_boolean(kind):
        native = native != 0
    elif pa.types.is_uint8(kind):
        native = native.astype(np.uint8)
    mask = None if null is None or not null.any() else null
    return pa.array(native, type=kind, mask=mask)


def _strings(
    content: NDArray[np.uint8], start: NDArray[np.int64], lengths: NDArray[np.int64], null: NDArray[np.bool_]
) -> pa.Array:
    import pyarrow as pa

    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    total = int(offsets[-1])
    index = np.repeat(start - offsets[:-1], lengths) + np.arange(total)
    data = content[index]
    validity = None
    if null.any():
        validity = pa.py_buffer(np.packbits(~null, bitorder="little").tobytes())
    buffers = [validity, pa.py_buffer(offsets.tobytes()), pa.py_buffer(data.tobytes())]
    return pa.Array.from_buffers(pa.string(), len(lengths), buffers, int(null.sum()))


def _array(content: NDArray[np.uint8], kind: pa.DataType) -> list[Any]:
    """A one-dimensional array."""
    raw = content.tobytes()
    if int.from_bytes(raw[0:4], "big") == 0:
        return []
    count = int.from_bytes(raw[12:16], "big")
    wire = _numpy_type(kind.value_type)
    assert wire is not None
    if int.from_bytes(raw[4:8], "big") == 0:
        layout = np.dtype([("n", ">i4"), ("v", wire)])
        return np.frombuffer(raw, dtype=layout, count=count, offset=20)["v"].tolist()
    values: list[Any] = []
    at, width = 20, np.dtype(wire).itemsize
    for _ in range(count):
        here = int.from_bytes(raw[at : at + 4], "big", signed=True)
        at += 4
        if here < 0:
            values.append(None)
        else:
            values.append(np.frombuffer(raw, dtype=wire, count=1, offset=at)[0].item())
            at += width
    return values
