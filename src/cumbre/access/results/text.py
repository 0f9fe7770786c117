"""CSV, TSV and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cumbre.access.results.ending import Rows
from cumbre.access.results.tabledata import as_text

if TYPE_CHECKING:
    from cumbre.access.query import Result
    from cumbre.access.results.formats import Write


def write_separated(result: Result, write: Write, mark: str) -> str:
    """One row a line; a first line with names. What cut it short is said in a last line after ``#``."""
    import pyarrow.compute as pc

    rows = Rows(result)
    write((mark.join(_quoted(column.name, mark) for column in result.columns) + "\r\n").encode())
    for batch in rows:
        cells: list[Any] = []
        for array, column in zip(batch.columns, result.columns, strict=True):
            text = as_text(array, column)
            if column.datatype in ("char", "unicodeChar"):
                text = _quote_column(text, mark)
            cells.append(text.fill_null(""))
        lines = pc.binary_join_element_wise(*cells, mark)
        write(("\r\n".join(lines.to_pylist()) + "\r\n").encode())
    word, words = rows.status
    if word != "OK":
        write(f"# {word}: {' '.join(words.split())}\r\n".encode())
    return rows.outcome


def _quote_column(text: Any, mark: str) -> Any:
    """Quotes where the text needs them; an empty string is quoted, so that it is not taken for null."""
    import pyarrow.compute as pc

    if mark == "\t":  # TSV has no quotes: what would break a line becomes a blank
        return pc.replace_substring_regex(text, r"[\t\r\n]", " ")
    needs = pc.match_substring_regex(text, r'[",\r\n#]|^$|^\s|\s$')
    quoted = pc.binary_join_element_wise('"', pc.replace_substring(text, '"', '""'), '"', "")
    return pc.if_else(needs, quoted, text)


def _quoted(name: str, mark: str) -> str:
    if mark == "\t":
        return " ".join(name.split())
    return '"' + name.replace('"', '""') + '"' if any(c in name for c in '",\r\n') else name


def write_json(result: Result, write: Write, info: Mapping[str, str]) -> str:
    """``{"metadata": [columns], "data": [[…], …], "status": …}``; NaN and infinities are null."""
    import pyarrow.compute as pc

    rows = Rows(result)
    columns = [
        {name: value for name, value in asdict(column).items() if value not in ("", None, False)}
        for column in result.columns
    ]
    head = json.dumps({"info": dict(info), "metadata": columns}, ensure_ascii=False)
    write((head[:-1] + ', "data": [').encode())
    begun = False
    for batch in rows:
        cells = [_cells(array) for array in batch.columns]
        lines = pc.binary_join_element_wise("[", pc.binary_join_element_wise(*cells, ", "), "]", "")
        write(((",\n" if begun else "\n") + ",\n".join(lines.to_pylist())).encode())
        begun = True
    word, words = rows.status
    end = {"status": word, "rows": result.rows} | ({"message": words} if word != "OK" else {})
    write(("\n], " + json.dumps(end, ensure_ascii=False)[1:] + "\n").encode())
    return rows.outcome


def _cells(array: Any) -> Any:
    """Values of a column as JSON."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_boolean(kind):
        return pc.if_else(array, "true", "false").fill_null("null")
    if pa.types.is_integer(kind):
        return array.cast(pa.string()).fill_null("null")
    if pa.types.is_floating(kind):
        text = array.cast(pa.string())
        return pc.if_else(pc.is_finite(array), text, "null").fill_null("null")
    return pa.array(
        [json.dumps(_finite(value), ensure_ascii=False) for value in array.to_pylist()], pa.string()
    )


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
