"""Values as text: TABLEDATA of VOTable, CSV and TSV."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cumbre.access.results.types import is_array
from cumbre.access.tables import Column

if TYPE_CHECKING:
    import pyarrow as pa


def as_text(array: pa.Array, column: Column, *, null: str | None = None) -> pa.Array:
    """Strings of a column; nulls stay null, or become ``null``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if is_array(column):
        rows = [None if row is None else " ".join(map(_number, row)) for row in array.to_pylist()]
        text = pa.array(rows, type=pa.string())
    elif pa.types.is_boolean(array.type):
        text = pc.if_else(array, "true", "false")
    elif pa.types.is_floating(array.type):
        text = _floats(array)
    else:
        text = array.cast(pa.string())
    return text if null is None else text.fill_null(null)


def _number(value: float | None) -> str:
    if value is None or value != value:  # noqa: PLR0124 (NaN)
        return "NaN"
    return repr(value)


def _floats(array: pa.Array) -> pa.Array:
    """Shortest text that reads back the same; NaN and infinities as VOTable writes them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    text = array.cast(pa.string())
    special = pc.invert(pc.is_finite(array))
    if not pc.any(special).as_py():
        return text
    words = pc.if_else(pc.is_nan(array), "NaN", pc.if_else(pc.greater(array, 0), "Inf", "-Inf"))
    return pc.if_else(special, words, text)


def encode_rows(batch: pa.RecordBatch, columns: tuple[Column, ...]) -> bytes:
    """Rows as ``<TR><TD>…</TD></TR>``; an empty cell is null."""
    import pyarrow.compute as pc

    cells = []
    for array, column in zip(batch.columns, columns, strict=True):
        text = as_text(array, column, null="")
        if column.datatype in ("char", "unicodeChar"):
            for char, word in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
                text = pc.replace_substring(text, char, word)
            text = pc.replace_substring_regex(text, r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "")
        cells.append(text)
    if not cells:
        return b""
    parts: list[pa.Array | str] = ["<TR>"]
    for cell in cells:
        parts += ["<TD>", cell, "</TD>"]
    parts.append("</TR>\n")
    lines = pc.binary_join_element_wise(*parts, "")
    return "".join(lines.to_pylist()).encode()
