"""Every test that the table of failures names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_names_tests_that_exist() -> None:
    text = (ROOT / "docs/explanation/failures.md").read_text()
    named = re.findall(r"`(tests/\S+?\.py)::(\w+)`", text)
    assert len(named) > 30
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    assert missing == []


def test_every_failure_test_is_in_the_table() -> None:
    text = (ROOT / "docs/explanation/failures.md").read_text()
    here = [
        name
        for path in Path(__file__).parent.glob("test_failure_*.py")
        if path.name not in ("test_failure_table.py", "test_failure_chaos.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
    ]
    assert [name for name in here if f"::{name}`" not in text] == []
