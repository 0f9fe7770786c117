"""The page about ADQL names every function, type, format and limit that there is."""

from __future__ import annotations

from pathlib import Path

from cumbre.access.adql import expressions, parser, tokens
from cumbre.access.adql.signatures import ARGUMENTS, CAST_TYPES, EXTENSIONS
from cumbre.access.results import FORMATS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "adql.md").read_text()


def test_every_function_and_type_is_on_the_page() -> None:
    words = set(PAGE.replace("`", " ").replace("(", " ").replace(",", " ").split())
    assert not set(ARGUMENTS) - words
    assert not {word for kind in CAST_TYPES for word in kind.split()} - words
    for name in EXTENSIONS:
        assert f"`{name}`*" in PAGE


def test_every_format_is_on_the_page() -> None:
    for form in FORMATS:
        assert f"`{form.name}`" in PAGE
        assert form.media_type.split(";header")[0] in PAGE


def test_limits_are_those_of_the_program() -> None:
    assert f"{tokens.MAX_CHARACTERS // 1_000_000} million characters" in PAGE
    assert f"{tokens.MAX_TOKENS:,}".replace(",", " ") + " tokens" in PAGE
    assert f"{tokens.MAX_DEPTH} parentheses deep" in PAGE
    assert f"{expressions.MAX_CHAIN} terms" in PAGE
    assert f"{parser.MAX_JOINS} joins, {parser.MAX_SET_OPERATIONS} set operations" in PAGE
