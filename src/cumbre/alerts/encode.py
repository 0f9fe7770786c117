"""Avro records of a whole table at once: history goes into packets as bytes that were made in one pass.

A year of history is some 180 records a packet; encoding each from a dictionary takes fifty times as long as all else in
the packet. Here a table's columns are laid out by the schema's fields and written by one compiled loop; a packet then
takes the bytes of its object's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cumbre.core.errors import UnprocessableDataError

if TYPE_CHECKING:
    import pyarrow as pa

_LONG, _DOUBLE, _FLOAT, _BOOLEAN, _STRING = range(5)
_KINDS = {
    "long": _LONG,
    "int": _LONG,
    "double": _DOUBLE,
    "float": _FLOAT,
    "boolean": _BOOLEAN,
    "string": _STRING,
}
_MOST_BYTES = {_LONG: 11, _DOUBLE: 9, _FLOAT: 5, _BOOLEAN: 2, _STRING: 11}


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Records ready to be items of an Avro array.

    Attributes
    ----------
    count
        Number of records.
    content
        Their bytes, one after another.
    record
        Their kind.
    """

    count: int
    content: bytes
    record: str

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import io

        import fastavro

        stream = io.BytesIO(self.content)
        for _ in range(self.count):
            read = fastavro.schemaless_reader(stream, _record_schema(self.record), None)
            assert isinstance(read, dict)
            yield read


@dataclass(frozen=True, slots=True)
class EncodedTable:
    """All records of a table: ``content[offsets[k] : offsets[k + 1]]`` is record k."""

    content: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    record: str

    def span(self, first: int, last: int) -> EncodedRows:
        """Records ``first`` … ``last − 1``."""
        content = self.content[self.offsets[first] : self.offsets[last]].tobytes()
        return EncodedRows(last - first, content, self.record)


@lru_cache(maxsize=1)
def _records() -> dict[str, Any]:
    """The record types within a packet."""
    from cumbre.alerts.packet import schema

    found: dict[str, Any] = {}

    def walk(kind: Any) -> None:
        if isinstance(kind, list):
            for item in kind:
                walk(item)
        elif isinstance(kind, dict):
            if kind["type"] == "record":
                found[kind["name"].rpartition(".")[2]] = kind
                for field in kind["fields"]:
                    walk(field["type"])
            elif kind["type"] == "array":
                walk(kind["items"])

    walk(schema())
    return found


@lru_cache(maxsize=8)
def _record_schema(record: str) -> Any:
    """The parsed schema of one kind of record by itself."""
    import fastavro

    return fastavro.parse_schema(_records()[record], named_schemas={})


@lru_cache(maxsize=8)
def _layout(record: str) -> tuple[tuple[str, int, bool], ...]:
    """(name, kind, nullable) of the fields of a record of schema v11.1."""
    out = []
    for field in _records()[record]["fields"]:
        kinds = field["type"] if isinstance(field["type"], list) else [field["type"]]
        plain = [k["type"] if isinstance(k, dict) else k for k in kinds]
        (kind,) = [k for k in plain if k != "null"]
        if len(plain) == 2 and plain[0] != "null":
            raise UnprocessableDataError(f"alert schema: {record}.{field['name']}: null must come first")
        out.append((field["name"], _KINDS[kind], len(plain) == 2))
    return tuple(out)


@njit(cache=True)
def _put_long(out, at, value):  # type: ignore[no-untyped-def]
    """Zigzag, then seven bits a byte."""
    bits = np.uint64((value << 1) ^ (value >> 63))
    while bits >= np.uint64(128):
        out[at] = np.uint8((bits & np.uint64(127)) | np.uint64(128))
        bits >>= np.uint64(7)
        at += 1
    out[at] = np.uint8(bits)
    return at + 1


@njit(cache=True)
def _encode(kinds, nullable, slots, is_valid, longs, doubles, floats, texts, text_offsets, out, offsets):  # type: ignore[no-untyped-def]
    at = 0
    for row in range(is_valid.shape[0]):
        offsets[row] = at
        for f in range(kinds.size):
            if nullable[f]:
                if not is_valid[row, f]:
                    out[at] = 0
                    at += 1
                    continue
                out[at] = 2
                at += 1
            kind, slot = kinds[f], slots[f]
            if kind == _LONG:
                at = _put_long(out, at, longs[row, slot])
            elif kind == _DOUBLE:
                bits = doubles[row, slot]
                for _ in range(8):
                    out[at] = np.uint8(bits & np.uint64(255))
                    bits >>= np.uint64(8)
                    at += 1
            elif kind == _FLOAT:
                single = floats[row, slot]
                for _ in range(4):
                    out[at] = np.uint8(single & np.uint32(255))
                    single >>= np.uint32(8)
                    at += 1
            elif kind == _BOOLEAN:
                out[at] = np.uint8(longs[row, slot])
                at += 1
            else:
                number = longs[row, slot]
                first, last = text_offsets[number], text_offsets[number + 1]
                at = _put_long(out, at, last - first)
                for k in range(first, last):
                    out[at] = texts[k]
                    at += 1
    offsets[is_valid.shape[0]] = at
    return at


def encode_table(record: str, table: pa.Table) -> EncodedTable:
    """Encode every row of a table as one record of schema v11.1.

    Parameters
    ----------
    record
        ``diaSource`` or ``diaForcedSource``.
    table
        Columns by the schema's names; others are left out, absent ones are null. NaN in a nullable column is null.

    Raises
    ------
    UnprocessableDataError
        A required column is absent or has nulls.
    """
    import pyarrow.compute as pc

    fields, n = _layout(record), table.num_rows
    valid = np.zeros((n, len(fields)), np.bool_)
    columns: dict[int, list[NDArray[Any]]] = {_LONG: [], _DOUBLE: [], _FLOAT: []}
    slots = np.zeros(len(fields), np.int64)
    texts, text_offsets, most = b"", [0], 0
    names = set(table.column_names)
    for f, (name, kind, is_nullable) in enumerate(fields):
        most += _MOST_BYTES[kind]
        column = table.column(name) if name in names else None
        group = _LONG if kind in (_BOOLEAN, _STRING) else kind
        slots[f] = len(columns[group])
        if column is None or column.null_count == n:
            if not is_nullable and n:
                raise UnprocessableDataError(f"alert packet: {record} lacks {name}")
            columns[group].append(np.zeros(n, np.int64 if group == _LONG else float))
            continue
        there = np.ones(n, np.bool_)
        if column.null_count:
            there = column.is_valid().to_numpy()
        if kind == _STRING:
            coded = pc.fill_null(column.cast("string"), "").combine_chunks().dictionary_encode()
            number = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64) + len(text_offsets) - 1
            for word in coded.dictionary.to_pylist():
                texts += word.encode()
                text_offsets.append(len(texts))
            most += max((len(w.encode()) for w in coded.dictionary.to_pylist()), default=0)
            values: NDArray[Any] = number
        elif group == _LONG:
            filled = pc.fill_null(column, False if kind == _BOOLEAN else 0)
            values = filled.to_numpy().astype(np.int64)
        else:
            values = column.to_numpy().astype(np.float64)
            if is_nullable:
                there = there & ~np.isnan(values)
        if not is_nullable and not there.all():
            raise UnprocessableDataError(f"alert packet: {record} lacks {name}")
        valid[:, f] = there
        columns[group].append(values)

    def together(group: int, dtype: type[Any]) -> NDArray[Any]:
        parts = columns[group]
        out = np.zeros((n, max(len(parts), 1)), dtype)
        with np.errstate(over="ignore"):
            for k, part in enumerate(parts):
                out[:, k] = part
        return out

    content, offsets = np.empty(max(n, 1) * most, np.uint8), np.zeros(n + 1, np.int64)
    used = _encode(
        np.array([kind for _, kind, _ in fields], np.int64), np.array([nullable for *_, nullable in fields]), slots, valid,
        together(_LONG, np.int64), together(_DOUBLE, np.float64).view(np.uint64), together(_FLOAT, np.float32).view(np.uint32),
        np.frombuffer(texts or b"\0", np.uint8), np.array(text_offsets, np.int64), content, offsets,
    )  # fmt: skip
    return EncodedTable(content[:used].copy(), offsets, record)


def as_table(rows: Any) -> pa.Table | None:
    """An Arrow table of a table or of a list of rows; None when there are none."""
    import pyarrow as pa

    if rows is None:
        return None
    if isinstance(rows, pa.Table):
        return rows if rows.num_rows else None
    listed: list[Mapping[str, Any]] = list(rows)
    return pa.Table.from_pylist([dict(row) for row in listed]) if listed else None


def by_object(record: str, rows: Any) -> dict[int, EncodedRows]:
    """The encoded history of each object.

    Parameters
    ----------
    record
        ``diaSource`` or ``diaForcedSource``.
    rows
        Arrow table, or a list of rows, with ``diaObjectId``; rows without one are left out.
    """
    table = as_table(rows)
    if table is None or "diaObjectId" not in table.column_names:
        return {}
    import pyarrow.compute as pc

    table = table.filter(pc.is_valid(table.column("diaObjectId")))
    if not table.num_rows:
        return {}
    # A stable order by object keeps each one's order of time, and makes its rows neighbours.
    identifiers = table.column("diaObjectId").to_numpy()
    order = np.argsort(identifiers, kind="stable")
    table, identifiers = table.take(order), identifiers[order]
    encoded = encode_table(record, table)
    first = np.flatnonzero(np.r_[True, identifiers[1:] != identifiers[:-1]])
    last = np.r_[first[1:], len(identifiers)]
    return {
        int(identifiers[a]): encoded.span(int(a), int(b))
        for a, b in zip(first.tolist(), last.tolist(), strict=True)
    }
