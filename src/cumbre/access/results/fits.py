"""FITS binary table: the number of rows stands first, so rows wait in a file until all are there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.access.results.ending import Rows
from cumbre.access.results.types import is_array
from cumbre.access.tables import Column

if TYPE_CHECKING:
    import pyarrow as pa

    from cumbre.access.query import Result
    from cumbre.access.results.formats import Write

_BLOCK = 2880
_PIECE = 1 << 20
_LETTERS = {
    "boolean": ("L", "S1"), "unsignedByte": ("B", "u1"), "short": ("I", ">i2"), "int": ("J", ">i4"),
    "long": ("K", ">i8"), "float": ("E", ">f4"), "double": ("D", ">f8"),
}  # fmt: skip
NULLS = {"short": -(1 << 15), "int": -(1 << 31), "long": -(1 << 63)}
"""Numbers that stand for null (TNULL)."""


def write(result: Result, write_bytes: Write, info: Mapping[str, str]) -> str:
    """One table; the rows wait on disk as Arrow, so memory does not grow."""
    import pyarrow as pa

    rows = Rows(result)
    with tempfile.TemporaryFile(prefix="cumbre-fits-") as spool:
        widths = [1] * len(result.columns)
        with pa.ipc.new_stream(spool, result.schema) as sink:
            for batch in rows:
                sink.write_batch(batch)
                widths = [
                    max(width, _width(array, column))
                    for width, array, column in zip(widths, batch.columns, result.columns, strict=True)
                ]
        layout, cards = _layout(result.columns, widths)
        for block in _headers(layout, cards, result, rows, info):
            write_bytes(block)
        spool.seek(0)
        size = 0
        for batch in pa.ipc.open_stream(spool):
            content = _encode(batch, result.columns, layout, widths)
            size += len(content)
            for at in range(0, len(content), _PIECE):
                write_bytes(content[at : at + _PIECE])
        write_bytes(b"\0" * (-size % _BLOCK))
    return rows.outcome


def _width(array: pa.Array, column: Column) -> int:
    """Longest value of a batch: bytes of text, items of an array."""
    import pyarrow.compute as pc

    if column.datatype in ("char", "unicodeChar"):
        return int(pc.max(pc.binary_length(array)).as_py() or 1)
    if is_array(column):
        return int(pc.max(pc.list_value_length(array)).as_py() or 1)
    return 1


def _layout(columns: tuple[Column, ...], widths: list[int]) -> tuple[np.dtype[Any], list[str]]:
    parts: list[Any] = []
    cards: list[str] = []
    for i, (column, width) in enumerate(zip(columns, widths, strict=True), 1):
        if column.datatype in ("char", "unicodeChar"):
            parts.append((f"v{i}", f"S{width}"))
            form = f"{width}A"
        else:
            letter, kind = _LETTERS[column.datatype]
            parts.append((f"v{i}", kind, (width,)) if is_array(column) else (f"v{i}", kind))
            form = f"{width if is_array(column) else 1}{letter}"
        cards.append(_card(f"TTYPE{i}", column.name))
        cards.append(_card(f"TFORM{i}", form))
        if column.unit:
            cards.append(_card(f"TUNIT{i}", column.unit))
        if column.datatype in NULLS:
            cards.append(_card(f"TNULL{i}", NULLS[column.datatype]))
        if column.ucd:
            cards.append(_card(f"TUCD{i}", column.ucd))
        if column.description:
            cards.append(_card(f"TCOMM{i}", column.description))
    return np.dtype(parts), cards


def _headers(
    layout: np.dtype[Any], cards: list[str], result: Result, rows: Rows, info: Mapping[str, str]
) -> list[bytes]:
    primary = [_card("SIMPLE", True), _card("BITPIX", 8), _card("NAXIS", 0), _card("EXTEND", True)]
    word, text = rows.status
    table = [
        _card("XTENSION", "BINTABLE"), _card("BITPIX", 8), _card("NAXIS", 2), _card("NAXIS1", layout.itemsize),
        _card("NAXIS2", result.rows), _card("PCOUNT", 0), _card("GCOUNT", 1),
        _card("TFIELDS", len(result.columns)), _card("EXTNAME", "result"), *cards, _card("QSTATUS", word),
    ]  # fmt: skip
    if word != "OK":
        table += _history(f"{word}: {text}")
    for name, value in info.items():
        table += _history(f"{name} = {value}")
    return [_block(primary), _block(table)]


def _card(key: str, value: str | int | bool) -> str:
    """A header card; text that does not fit is cut."""
    if isinstance(value, bool):
        return f"{key:<8}= {'T' if value else 'F':>20}".ljust(80)
    if isinstance(value, int):
        return f"{key:<8}= {value:>20}".ljust(80)
    quoted = _ascii(value).replace("'", "''")[:67]
    if (len(quoted) - len(quoted.rstrip("'"))) % 2 and len(quoted) == 67:
        quoted = quoted[:-1]  # half of a doubled quote
    return f"{key:<8}= '{quoted:<8}'".ljust(80)


def _history(text: str) -> list[str]:
    plain = _ascii(" ".join(text.split()))
    return [f"HISTORY {plain[at : at + 72]}".ljust(80) for at in range(0, min(len(plain), 72 * 40), 72)]


def _ascii(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def _block(cards: list[str]) -> bytes:
    text = "".join(cards) + "END".ljust(80)
    return text.ljust(-(-len(text) // _BLOCK) * _BLOCK).encode("ascii")


def _encode(
    batch: pa.RecordBatch, columns: tuple[Column, ...], layout: np.dtype[Any], widths: list[int]
) -> bytes:
    rows = np.zeros(batch.num_rows, dtype=layout)
    for i, (array, column, width) in enumerate(zip(batch.columns, columns, widths, strict=True), 1):
        if column.datatype in ("char", "unicodeChar"):
            rows[f"v{i}"] = [text.encode() for text in array.fill_null("").to_pylist()]
        elif is_array(column):
            fill: Any = (
                float("nan") if column.datatype in ("float", "double") else NULLS.get(column.datatype, 0)
            )
            values = rows[f"v{i}"]
            values[:] = fill if column.datatype != "boolean" else b"\0"
            for row, items in enumerate(array.to_pylist()):
                for k, item in enumerate((items or [])[:width]):
                    if item is not None:
                        values[row, k] = (b"T" if item else b"F") if column.datatype == "boolean" else item
        elif column.datatype == "boolean":
            truth = np.asarray(array.fill_null(False).to_numpy(zero_copy_only=False))
            text = np.where(truth, b"T", b"F")
            text[np.asarray(array.is_null().to_numpy(zero_copy_only=False))] = b"\0"
            rows[f"v{i}"] = text
        else:
            fill = float("nan") if column.datatype in ("float", "double") else NULLS.get(column.datatype, 0)
            rows[f"v{i}"] = array.fill_null(fill).to_numpy(zero_copy_only=False)
    return rows.tobytes()
