"""The tree of a query: a closed set of nodes, so nothing else can be asked. ``at`` is a character's place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Name:
    """An identifier; ``quoted`` ones must agree in capitals."""

    value: str
    quoted: bool
    at: int

    def matches(self, other: str) -> bool:
        """Whether it names ``other``."""
        return self.value == other if self.quoted else self.value.lower() == other.lower()

    def __str__(self) -> str:
        return '"' + self.value.replace('"', '""') + '"' if self.quoted else self.value


# -- values --


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written: integers without point or exponent, hexadecimal ones with 0x."""

    text: str
    at: int


@dataclass(frozen=True, slots=True)
class String:
    """A string, quotes removed."""

    value: str
    at: int


@dataclass(frozen=True, slots=True)
class Constant:
    """``True``, ``False`` or ``None`` for NULL."""

    value: bool | None
    at: int


@dataclass(frozen=True, slots=True)
class ColumnRef:
    """A column, up to three qualifiers before it."""

    parts: tuple[Name, ...]
    at: int

    def __str__(self) -> str:
        return ".".join(map(str, self.parts))


@dataclass(frozen=True, slots=True)
class Star:
    """``*`` or ``table.*``."""

    parts: tuple[Name, ...]
    at: int


@dataclass(frozen=True, slots=True)
class Call:
    """A function, name in capitals."""

    name: str
    arguments: tuple[Expression, ...]
    at: int
    distinct: bool = False
    star: bool = False


@dataclass(frozen=True, slots=True)
class Cast:
    """``CAST(value AS kind)``; ``size`` of CHAR(n) and VARCHAR(n)."""

    value: Expression
    kind: str
    size: int | None
    at: int


@dataclass(frozen=True, slots=True)
class Case:
    """``CASE [operand] WHEN … THEN … ELSE … END``."""

    operand: Expression | None
    branches: tuple[tuple[Expression, Expression], ...]
    otherwise: Expression | None
    at: int


@dataclass(frozen=True, slots=True)
class Unary:
    """``-``, ``+`` or ``NOT``."""

    operator: str
    value: Expression
    at: int


@dataclass(frozen=True, slots=True)
class Binary:
    """Arithmetic, ``||``, comparison, AND or OR."""

    operator: str
    left: Expression
    right: Expression
    at: int


@dataclass(frozen=True, slots=True)
class Between:
    """``value [NOT] BETWEEN low AND high``."""

    value: Expression
    low: Expression
    high: Expression
    negated: bool
    at: int


@dataclass(frozen=True, slots=True)
class InList:
    """``value [NOT] IN (…)``: a list of values or one query."""

    value: Expression
    items: tuple[Expression, ...] | Query
    negated: bool
    at: int


@dataclass(frozen=True, slots=True)
class Like:
    """``value [NOT] LIKE|ILIKE pattern``."""

    value: Expression
    pattern: Expression
    negated: bool
    ignore_case: bool
    at: int


@dataclass(frozen=True, slots=True)
class IsNull:
    """``value IS [NOT] NULL``."""

    value: Expression
    negated: bool
    at: int


@dataclass(frozen=True, slots=True)
class Exists:
    """``EXISTS (query)``."""

    query: Query
    at: int


@dataclass(frozen=True, slots=True)
class Scalar:
    """A query in parentheses used as a value."""

    query: Query
    at: int


type Expression = (
    Number | String | Constant | ColumnRef | Star | Call | Cast | Case | Unary | Binary | Between | InList
    | Like | IsNull | Exists | Scalar
)  # fmt: skip

# -- queries --


@dataclass(frozen=True, slots=True)
class Item:
    """One column of the SELECT list."""

    value: Expression
    alias: Name | None


@dataclass(frozen=True, slots=True)
class TableRef:
    """A table, up to two qualifiers, and its alias."""

    parts: tuple[Name, ...]
    alias: Name | None
    at: int

    def __str__(self) -> str:
        return ".".join(map(str, self.parts))


@dataclass(frozen=True, slots=True)
class Derived:
    """A query in FROM."""

    query: Query
    alias: Name
    at: int


@dataclass(frozen=True, slots=True)
class Join:
    """Two relations; ``kind`` is INNER, LEFT, RIGHT, FULL or CROSS."""

    left: Relation
    right: Relation
    kind: str
    natural: bool
    on: Expression | None
    using: tuple[Name, ...]
    at: int


type Relation = TableRef | Derived | Join


@dataclass(frozen=True, slots=True)
class Order:
    """One key of ORDER BY: an expression, or the number of a column."""

    value: Expression
    descending: bool


@dataclass(frozen=True, slots=True)
class Select:
    """One SELECT."""

    items: tuple[Item, ...]
    relation: Relation
    where: Expression | None
    group: tuple[Expression, ...]
    having: Expression | None
    distinct: bool
    top: int | None
    order: tuple[Order, ...]
    offset: int | None
    at: int


@dataclass(frozen=True, slots=True)
class SetOperation:
    """``UNION``, ``EXCEPT`` or ``INTERSECT`` of two queries."""

    operator: str
    keep_all: bool
    left: Query
    right: Query
    order: tuple[Order, ...]
    offset: int | None
    at: int


type Query = Select | SetOperation


@dataclass(frozen=True, slots=True)
class Statement:
    """The whole: named queries and the query."""

    names: tuple[tuple[Name, tuple[Name, ...], Query], ...]
    query: Query
