"""Pages that show a query show it as ADQL, for pyvo and for curl, and each query on them runs."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest
from pyvo.dal import TAPService

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(
    str(path.relative_to(DOCS))
    for folder in ("tutorials", "how-to", "reference")
    for path in (DOCS / folder).glob("*.md")
    if "```sql" in path.read_text() or "/sync" in path.read_text()
)


def queries(page: str) -> list[str]:
    """Queries that stand alone: a block of them, one after another."""
    found = re.findall(r"```(?:sql)?\n((?:SELECT|WITH)\b.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return [query for block in found for query in re.split(r"(?<!ALL)\n+(?=SELECT|WITH)", block)]


@pytest.mark.parametrize("page", PAGES)
def test_a_query_is_there_in_three_ways(page):
    text = (DOCS / page).read_text()
    assert re.search(r"^SELECT ", text, re.MULTILINE)
    assert "pyvo.dal." in text
    assert "curl " in text


@pytest.mark.parametrize("page", PAGES)
def test_each_query_runs(world, page):
    mine = pa.table({"name": ["a", "b"], "ra": [53.1, 355.1], "dec": [-27.8, -65.1]})
    service = TAPService(f"{world.url}/tap")
    assert queries(page)
    for query in queries(page):
        uploads = {"mine": _votable(mine)} if "TAP_UPLOAD" in query else None
        assert service.run_sync(query, uploads=uploads).fieldnames


def _votable(rows: pa.Table):
    from astropy.table import Table

    return Table({name: rows.column(name).to_pylist() for name in rows.column_names})


def test_there_are_pages():
    assert {
        "tutorials/query-the-archive.md",
        "how-to/light-curves.md",
        "how-to/cutouts.md",
        "reference/adql.md",
    } <= set(PAGES)
