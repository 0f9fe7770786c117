"""Small steps over conditions, keys and columns of a query."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace

from cumbre.access.adql import tree
from cumbre.access.tables import Column


def key(sql: str, order: tree.Order) -> str:
    """One key of ORDER BY: NULL comes last in both directions."""
    return f"{sql} {'DESC' if order.descending else 'ASC'} NULLS LAST"


def flatten(node: tree.Expression) -> Iterator[tree.Expression]:
    """Conditions that AND joins."""
    if isinstance(node, tree.Binary) and node.operator == "AND":
        yield from flatten(node.left)
        yield from flatten(node.right)
    else:
        yield node


def children(node: object) -> Iterator[tree.Expression]:
    """Expressions directly inside; queries are left out."""
    if not is_dataclass(node):
        return
    for item in fields(node):
        content = getattr(node, item.name)
        for part in content if isinstance(content, tuple) else (content,):
            for piece in part if isinstance(part, tuple) else (part,):
                if is_dataclass(piece) and not isinstance(piece, tree.Name | tree.Select | tree.SetOperation):
                    yield piece  # type: ignore[misc]


def unique(columns: list[Column]) -> list[Column]:
    """Names that differ, capitals ignored: a second ``ra`` is ``ra_2``."""
    seen: set[str] = set()
    out = []
    for column in columns:
        name, count = column.name, 1
        while name.lower() in seen:
            count += 1
            name = f"{column.name}_{count}"
        seen.add(name.lower())
        out.append(replace(column, name=name))
    return out
