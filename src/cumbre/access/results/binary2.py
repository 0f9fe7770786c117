"""VOTable BINARY2: for each row a mask of nulls, then the values, big-endian."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.access.results.types import is_array
from cumbre.access.tables import Column

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

_TYPES = {
    "boolean": "S1", "unsignedByte": "u1", "short": ">i2", "int": ">i4", "long": ">i8", "float": ">f4",
    "double": ">f8",
}  # fmt: skip


def encode(batch: pa.RecordBatch, columns: tuple[Column, ...]) -> bytes:
    """Bytes of a batch of rows."""
    count = batch.num_rows
    masks = [_nulls(array) for array in batch.columns]
    flags = np.zeros((count, (len(columns) + 7) // 8), dtype=np.uint8)
    for i, mask in enumerate(masks):
        if mask is not None:
            flags[:, i // 8] |= (mask.astype(np.uint8) << (7 - i % 8)).astype(np.uint8)
    if all(_fixed(column) for column in columns):
        return _fixed_rows(batch, columns, flags)
    return _variable_rows(batch, columns, flags)


def _fixed(column: Column) -> bool:
    return column.datatype not in ("char", "unicodeChar") and not is_array(column)


def _nulls(array: pa.Array) -> NDArray[np.bool_] | None:
    if not array.null_count:
        return None
    return np.asarray(array.is_null().to_numpy(zero_copy_only=False))


def _numbers(array: pa.Array, column: Column) -> NDArray[Any]:
    """Values as on the wire; NaN or 0 where null."""
    if column.datatype == "boolean":
        truth = np.asarray(array.fill_null(False).to_numpy(zero_copy_only=False))
        out = np.where(truth, b"T", b"F")
        if array.null_count:
            out[np.asarray(array.is_null().to_numpy(zero_copy_only=False))] = b"?"
        return out
    if array.null_count:
        array = array.fill_null(float("nan") if column.datatype in ("float", "double") else 0)
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _fixed_rows(batch: pa.RecordBatch, columns: tuple[Column, ...], flags: NDArray[np.uint8]) -> bytes:
    layout = np.dtype(
        [("f", np.uint8, (flags.shape[1],))] + [(f"v{i}", _TYPES[c.datatype]) for i, c in enumerate(columns)]
    )
    rows = np.empty(batch.num_rows, dtype=layout)
    rows["f"] = flags
    for i, (array, column) in enumerate(zip(batch.columns, columns, strict=True)):
        rows[f"v{i}"] = _numbers(array, column)
    return rows.tobytes()


def _variable_rows(batch: pa.RecordBatch, columns: tuple[Column, ...], flags: NDArray[np.uint8]) -> bytes:
    """Where strings or arrays make rows of different lengths: each column is scattered to its places."""
    count = batch.num_rows
    parts = [_piece(array, column) for array, column in zip(batch.columns, columns, strict=True)]
    sizes = np.full(count, flags.shape[1], dtype=np.int64)
    for _, lengths in parts:
        sizes += lengths
    starts = np.zeros(count, dtype=np.int64)
    np.cumsum(sizes[:-1], out=starts[1:])
    out = np.empty(int(sizes.sum()), dtype=np.uint8)
    out[(starts[:, None] + np.arange(flags.shape[1])).ravel()] = flags.ravel()
    at = starts + flags.shape[1]
    for content, lengths in parts:
        if content.ndim == 2:  # the same length in every row
            width = content.shape[1]
            out[(at[:, None] + np.arange(width)).ravel()] = content.ravel()
            at += width
        else:
            begin = np.zeros(count, dtype=np.int64)
            np.cumsum(lengths[:-1], out=begin[1:])
            out[np.repeat(at - begin, lengths) + np.arange(len(content))] = content
            at += lengths
    return out.tobytes()


def _piece(array: pa.Array, column: Column) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Bytes of a column, and how many in each row; two-dimensional when all have the same."""
    count = len(array)
    if column.datatype in ("char", "unicodeChar"):
        return _text(array, wide=column.datatype == "unicodeChar")
    if is_array(column):
        return _arrays(array, column)
    numbers = np.ascontiguousarray(_numbers(array, column).astype(_TYPES[column.datatype]))
    width = numbers.dtype.itemsize
    return numbers.view(np.uint8).reshape(count, width), np.full(count, width, dtype=np.int64)


def _with_counts(
    data: NDArray[np.uint8], counts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Variable content with its count before it."""
    sizes = lengths + 4
    begin = np.zeros(len(sizes), dtype=np.int64)
    np.cumsum(sizes[:-1], out=begin[1:])
    out = np.empty(int(sizes.sum()), dtype=np.uint8)
    out[(begin[:, None] + np.arange(4)).ravel()] = np.ascontiguousarray(counts.astype(">i4")).view(np.uint8)
    first = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], out=first[1:])
    out[np.repeat(begin + 4 - first, lengths) + np.arange(len(data))] = data
    return out, sizes


def _text(array: pa.Array, *, wide: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Strings with their length: ASCII bytes (readers refuse others), or UCS-2."""
    texts = array.fill_null("") if array.null_count else array
    if wide:
        encoded = [_ucs2(text) for text in texts.to_pylist()]
        counts = np.fromiter((len(text) // 2 for text in encoded), dtype=np.int64, count=len(encoded))
        return _with_counts(np.frombuffer(b"".join(encoded), dtype=np.uint8), counts, 2 * counts)
    _, offsets, data = texts.buffers()
    first = np.frombuffer(offsets, dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(
        np.int64
    )
    lengths = np.diff(first)
    raw = (
        np.frombuffer(data, dtype=np.uint8)[first[0] : first[-1]]
        if data is not None
        else np.empty(0, np.uint8)
    )
    if len(raw) and int(raw.max()) >= 128:
        plain = [text.encode("ascii", "replace") for text in texts.to_pylist()]
        lengths = np.fromiter(map(len, plain), dtype=np.int64, count=len(plain))
        raw = np.frombuffer(b"".join(plain), dtype=np.uint8)
    return _with_counts(raw, lengths, lengths)


def _ucs2(text: str) -> bytes:
    """Characters beyond the first plane have no place in UCS-2 and become U+FFFD."""
    return "".join(c if c <= "\uffff" else "\ufffd" for c in text).encode("utf-16-be", "replace")


def _arrays(array: pa.Array, column: Column) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    import pyarrow as pa

    size = column.arraysize or ""
    fixed = int(size) if size.isdigit() else None
    empty: list[Any] = [None] * fixed if fixed else []
    rows = [empty if row is None else row for row in array.to_pylist()]
    flat = [item for row in rows for item in row]
    scalar = Column("", column.datatype)
    numbers = _numbers(pa.array(flat, type=array.type.value_type), scalar).astype(_TYPES[column.datatype])
    data = np.ascontiguousarray(numbers).view(np.uint8).ravel()
    counts = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    width = np.dtype(_TYPES[column.datatype]).itemsize
    if fixed and (counts == fixed).all():
        return data.reshape(len(rows), fixed * width), counts * width
    return _with_counts(data, counts, counts * width)
