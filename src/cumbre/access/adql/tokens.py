"""From text to tokens, with their places and the limits that hold before anything is parsed."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from cumbre.access.adql.errors import AdqlError
from cumbre.access.adql.words import RESERVED

MAX_CHARACTERS = 1_000_000
MAX_TOKENS = 100_000
MAX_DEPTH = 48

type Kind = Literal["word", "quoted", "string", "number", "operator", "end"]

_TOKEN = re.compile(
    r"""
    (?P<skip>\s+|--[^\n]*)
  | (?P<number>0[xX][0-9a-fA-F]+(?![0-9a-zA-Z_])|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
  | (?P<word>[A-Za-z][A-Za-z0-9_]*)
  | (?P<quoted>"(?:[^"]++|"")++")
  | (?P<string>'(?:[^']++|'')*+')
  | (?P<operator><>|!=|<=|>=|\|\||[-+*/(),.=<>;])
    """,
    re.VERBOSE,
)


class Token(NamedTuple):
    """One token: ``value`` is the word in capitals, the name or string without quotes, or the text."""

    kind: Kind
    value: str
    text: str
    start: int

    @property
    def reserved(self) -> bool:
        """Whether it is a word of the language."""
        return self.kind == "word" and self.value in RESERVED


def place_of(text: str, start: int) -> tuple[int, int]:
    """Line and column, from 1, of a character."""
    return text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)


def tokenize(text: str) -> list[Token]:
    """Tokens of a query, the last of kind ``end``.

    Raises
    ------
    AdqlError
        Too long, too deep, a character that ADQL does not know, or a string without an end.
    """
    if len(text) > MAX_CHARACTERS:
        raise AdqlError(
            f"the query has {len(text):,} characters, the limit is {MAX_CHARACTERS:,}",
            remedy="put long lists of values into an uploaded table and join it",
        )
    tokens: list[Token] = []
    position, depth, end = 0, 0, len(text)
    match = _TOKEN.match
    while position < end:
        found = match(text, position)
        if found is None:
            raise _bad_character(text, position)
        kind = found.lastgroup
        start, position = position, found.end()
        if kind == "skip":
            continue
        raw = found.group()
        if kind == "word":
            tokens.append(Token("word", raw.upper(), raw, start))
        elif kind == "operator":
            depth += (raw == "(") - (raw == ")")
            if depth > MAX_DEPTH:
                line, column = place_of(text, start)
                raise AdqlError(
                    f"more than {MAX_DEPTH} parentheses inside each other",
                    remedy="write the query flatter, or use WITH", line=line, column=column, token=raw,
                )  # fmt: skip
            tokens.append(Token("operator", raw, raw, start))
        elif kind == "number":
            tokens.append(Token("number", raw, raw, start))
        elif kind == "string":
            tokens.append(Token("string", raw[1:-1].replace("''", "'"), raw, start))
        else:
            tokens.append(Token("quoted", raw[1:-1].replace('""', '"'), raw, start))
        if len(tokens) > MAX_TOKENS:
            raise AdqlError(
                f"the query has more than {MAX_TOKENS:,} tokens",
                remedy="put long lists of values into an uploaded table and join it",
            )
    tokens.append(Token("end", "", "", end))
    return tokens


def _bad_character(text: str, position: int) -> AdqlError:
    line, column = place_of(text, position)
    character = text[position]
    if character == "'":
        reason, remedy = "a string without its closing '", "a ' inside a string is written twice: 'it''s'"
    elif character == '"':
        reason, remedy = 'a quoted name without its closing "', "a quoted name has at least one character"
    elif character == "_":
        reason, remedy = "a name cannot begin with _", 'write it in double quotes: "_name"'
    elif character in "[]`":
        reason, remedy = (
            f"{character} is not part of ADQL",
            "names with odd characters stand in double quotes",
        )
    elif character == "%":
        reason, remedy = "% is not part of ADQL", "the rest of a division is MOD(a, b)"
    else:
        reason, remedy = f"the character {character!r} is not part of ADQL", ""
    return AdqlError(reason, remedy=remedy, line=line, column=column, token=character)
