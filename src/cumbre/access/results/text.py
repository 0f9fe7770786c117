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
    rows = Rows(result)
    columns = [
        {name: value for name, value in asdict(column).items() if value not in ("", None, False)}
        for column in result.columns
    ]
    head = json.dumps({"info": dict(info), "metadata": columns}, ensure_ascii=False)
    write((head[:-1] + ', "data": [').encode())
    begun = False
    for batch in rows:
        lists = [_plain(array.to_pylist()) for array in batch.columns]
        text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in zip(*lists, strict=True))
        write(((",\n" if begun else "\n") + text).encode())
        begun = True
    word, words = rows.status
    end = {"status": word, "rows": result.rows} | ({"message": words} if word != "OK" else {})
    write(("\n], " + json.dumps(end, ensure_ascii=False)[1:] + "\n").encode())
    return rows.outcome


def _plain(values: list[Any]) -> list[Any]:
    if not any(isinstance(value, float | list) for value in values):
        return values
    return [_finite(value) for value in values]


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
