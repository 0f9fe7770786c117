"""The grammar of values and conditions, and the small steps over tokens that all grammar uses."""

from __future__ import annotations

import abc
from difflib import get_close_matches

from cumbre.access.adql import tree
from cumbre.access.adql.errors import AdqlError
from cumbre.access.adql.signatures import ARGUMENTS, CAST_TYPES, COORDINATE_FUNCTIONS, arguments_text
from cumbre.access.adql.tokens import Token, place_of
from cumbre.access.adql.words import RESERVED

MAX_CHAIN = 200
_COMPARISONS = frozenset({"=", "<>", "!=", "<", ">", "<=", ">="})
_GEOMETRY_CALLS = frozenset({"POINT", "CIRCLE", "BOX", "POLYGON", "REGION", "CENTROID"})
_HINTS = {
    "SUBSTRING": "", "NOW": "", "CONCAT": "join strings with ||", "CEIL": "write CEILING", "LN": "write LOG",
    "POW": "write POWER", "RANDOM": "write RAND", "TRUNC": "write TRUNCATE", "IF": "write CASE WHEN … END",
    "IFNULL": "write COALESCE", "NVL": "write COALESCE", "LOG2": "write LOG(x) / LOG(2)",
    "Q3C_RADIAL_QUERY": "write DISTANCE(ra, dec, ra0, dec0) < r",
}  # fmt: skip


class ExpressionParser(abc.ABC):
    """Values and conditions."""

    def __init__(self, text: str, tokens: list[Token]) -> None:
        self.text = text
        self.tokens = tokens
        self.index = 0

    # -- tokens --

    @property
    def token(self) -> Token:
        """The token that comes next."""
        return self.tokens[self.index]

    def advance(self) -> Token:
        """Take a token."""
        token = self.tokens[self.index]
        self.index += 1
        return token

    def is_word(self, word: str) -> bool:
        """Whether a word of the language comes next."""
        return self.token.kind == "word" and self.token.value == word

    is_name = is_word

    def is_operator(self, text: str) -> bool:
        """Whether an operator comes next."""
        return self.token.kind == "operator" and self.token.text == text

    def accept(self, word: str) -> bool:
        """Take a word if it comes next."""
        if self.is_word(word):
            self.index += 1
            return True
        return False

    def accept_operator(self, text: str) -> bool:
        """Take an operator if it comes next."""
        if self.is_operator(text):
            self.index += 1
            return True
        return False

    def expect(self, word: str) -> None:
        """Take a word that must come."""
        if not self.accept(word):
            raise self.unexpected(word)

    def expect_operator(self, text: str) -> None:
        """Take an operator that must come."""
        if not self.accept_operator(text):
            raise self.unexpected(text)

    def error_at(self, at: int, reason: str, remedy: str = "", token: str = "") -> AdqlError:
        """An error at a place of the text."""
        line, column = place_of(self.text, at)
        return AdqlError(reason, remedy=remedy, line=line, column=column, token=token)

    def error(self, reason: str, remedy: str = "") -> AdqlError:
        """An error at the token that comes next."""
        return self.error_at(self.token.start, reason, remedy, self.token.text)

    def unexpected(self, wanted: str) -> AdqlError:
        """Say that the next token is not what must come."""
        token = self.token
        if token.kind == "end":
            return self.error(f"the query ends where {wanted} is expected")
        remedy = ""
        if token.reserved and not wanted.isupper():
            remedy = f'{token.value} is a word of ADQL; as a name write it in double quotes: "{token.text}"'
        elif token.text == ";":
            remedy = "only one statement is allowed"
        elif token.kind == "word":
            near = get_close_matches(token.value, [word for word in RESERVED if len(word) > 2], 1, 0.8)
            remedy = f"did you mean {near[0]}?" if near and not token.reserved else ""
        return self.error(f"found {token.text[:60]} where {wanted} is expected", remedy)

    def identifier(self, wanted: str) -> tree.Name:
        """A name, quoted or not a word of the language."""
        token = self.token
        if token.kind == "quoted" or (token.kind == "word" and not token.reserved):
            self.index += 1
            return tree.Name(token.value if token.kind == "quoted" else token.text, token.kind == "quoted",
                             token.start)  # fmt: skip
        raise self.unexpected(wanted)

    def whole_number(self, after: str) -> int:
        """A number without sign, point or exponent."""
        token = self.token
        if token.kind == "number" and token.text.isdigit() and len(token.text) <= 18:
            self.index += 1
            return int(token.text)
        raise self.unexpected(f"a whole number after {after}")

    # -- conditions and values --

    def condition(self, after: str) -> tree.Expression:
        """What WHERE, HAVING and ON need: true or false."""
        at = self.token.start
        found = self._disjunction()
        if not is_condition(found):
            raise self.error_at(at, *_no_condition(found, after))
        return found

    def value(self) -> tree.Expression:
        """A value that is not a condition."""
        at = self.token.start
        found = self._sum()
        if is_condition(found):
            raise self.error_at(
                at,
                "a condition stands where a value is expected",
                "write CASE WHEN condition THEN 1 ELSE 0 END",
            )
        return found

    def _disjunction(self) -> tree.Expression:
        terms = [self._conjunction()]
        at = self.token.start
        while self.accept("OR"):
            terms.append(self._conjunction())
        return self._balanced("OR", terms, at)

    def _conjunction(self) -> tree.Expression:
        terms = [self._negation()]
        at = self.token.start
        while self.accept("AND"):
            terms.append(self._negation())
        return self._balanced("AND", terms, at)

    def _balanced(self, operator: str, terms: list[tree.Expression], at: int) -> tree.Expression:
        """As a balanced tree: a thousand ORs must not be a thousand deep."""
        if len(terms) > 1:
            for term in terms:
                if not is_condition(term):
                    raise self.error_at(at, *_no_condition(term, operator))
        while len(terms) > 1:
            paired = [
                tree.Binary(operator, terms[i], terms[i + 1], at) if i + 1 < len(terms) else terms[i]
                for i in range(0, len(terms), 2)
            ]
            terms = list(paired)
        return terms[0]

    def _negation(self) -> tree.Expression:
        at, count = self.token.start, 0
        while self.accept("NOT"):
            count += 1
        found = self._predicate()
        if count:
            if not is_condition(found):
                raise self.error_at(at, *_no_condition(found, "NOT"))
            if count % 2:
                found = tree.Unary("NOT", found, at)
        return found

    def _predicate(self) -> tree.Expression:
        at = self.token.start
        if self.accept("EXISTS"):
            return tree.Exists(self._subquery(), at)
        left = self._sum()
        token = self.token
        if token.kind == "operator" and token.text in _COMPARISONS:
            self.advance()
            operator = "<>" if token.text == "!=" else token.text
            self._value_only(left, token)
            right = self._sum()
            self._value_only(right, token)
            return tree.Binary(operator, left, right, token.start)
        if self.accept("IS"):
            negated = self.accept("NOT")
            if not self.accept("NULL"):
                raise self.unexpected("NULL")
            return tree.IsNull(left, negated, at)
        negated = self.accept("NOT")
        if self.accept("BETWEEN"):
            self._value_only(left, token)
            low = self._sum()
            self.expect("AND")
            return tree.Between(left, low, self._sum(), negated, token.start)
        if self.accept("IN"):
            self._value_only(left, token)
            return tree.InList(left, self._in_items(), negated, token.start)
        if self.is_word("LIKE") or self.is_word("ILIKE"):
            self._value_only(left, token)
            ignore_case = self.advance().value == "ILIKE"
            return tree.Like(left, self._sum(), negated, ignore_case, token.start)
        if negated:
            raise self.unexpected("BETWEEN, IN, LIKE or ILIKE")
        return left

    def _value_only(self, side: tree.Expression, token: Token) -> None:
        if is_condition(side) and not isinstance(side, tree.Constant):
            raise self.error_at(token.start, f"a condition cannot be compared with {token.text}")

    def _in_items(self) -> tuple[tree.Expression, ...] | tree.Query:
        if not self.is_operator("("):
            raise self.unexpected("(")
        if self._query_ahead():
            return self._subquery()
        self.advance()
        items = [self._sum()]
        while self.accept_operator(","):
            items.append(self._sum())
        self.expect_operator(")")
        return tuple(items)

    def _subquery(self) -> tree.Query:
        self.expect_operator("(")
        query = self.query()
        self.expect_operator(")")
        return query

    @abc.abstractmethod
    def query(self) -> tree.Query:
        """A query; the grammar of queries gives it."""

    @abc.abstractmethod
    def _query_ahead(self) -> bool: ...

    def _sum(self) -> tree.Expression:
        """Sums and concatenations, from left to right."""
        found = self._product()
        chain = 0
        while self.token.kind == "operator" and self.token.text in ("+", "-", "||"):
            token = self.advance()
            right = self._product()
            for side in (found, right):
                self._plain(side, token)
            found = tree.Binary(token.text, found, right, token.start)
            chain = self._chain(chain)
        return found

    def _product(self) -> tree.Expression:
        found = self._factor()
        chain = 0
        while self.token.kind == "operator" and self.token.text in ("*", "/"):
            token = self.advance()
            right = self._factor()
            for side in (found, right):
                self._plain(side, token)
            found = tree.Binary(token.text, found, right, token.start)
            chain = self._chain(chain)
        return found

    def _chain(self, count: int) -> int:
        if count >= MAX_CHAIN:
            raise self.error(f"more than {MAX_CHAIN} terms in one expression", "compute it in steps (WITH)")
        return count + 1

    def _plain(self, side: tree.Expression, token: Token) -> None:
        if isinstance(side, tree.Call) and side.name in _GEOMETRY_CALLS:
            raise self.error_at(
                token.start, f"a geometry ({side.name}) has no {token.text}", token=token.text
            )
        if is_condition(side):
            raise self.error_at(token.start, f"a condition has no {token.text}", token=token.text)

    def _factor(self) -> tree.Expression:
        at, sign, signed = self.token.start, 1, False
        while self.token.kind == "operator" and self.token.text in ("+", "-"):
            token = self.advance()
            sign, signed = (-sign if token.text == "-" else sign), True
        found = self._primary()
        if signed:
            self._plain(found, self.tokens[self.index - 1])
            return tree.Unary("-" if sign < 0 else "+", found, at)
        return found

    def _primary(self) -> tree.Expression:
        token = self.token
        if token.kind == "number":
            self.advance()
            return tree.Number(token.text, token.start)
        if token.kind == "string":
            self.advance()
            return tree.String(token.value + self._continued(token), token.start)
        if token.kind == "operator" and token.text == "(":
            if self._query_ahead():
                return tree.Scalar(self._subquery(), token.start)
            self.advance()
            found = self._disjunction()
            self.expect_operator(")")
            return found
        if token.kind == "word":
            if token.value in ("TRUE", "FALSE", "NULL"):
                self.advance()
                constant = None if token.value == "NULL" else token.value == "TRUE"
                return tree.Constant(constant, token.start)
            if token.value == "CASE":
                return self._case()
            if token.value == "CAST":
                return self._cast()
            if self.tokens[self.index + 1].text == "(" and self.tokens[self.index + 1].kind == "operator":
                return self._call()
        parts = [self.identifier("a value")]
        while self.accept_operator("."):
            parts.append(self.identifier("a column"))
        if len(parts) > 4:
            raise self.error_at(token.start, "a column has at most catalogue, schema, table and name")
        return tree.ColumnRef(tuple(parts), token.start)

    def _continued(self, token: Token) -> str:
        """Strings on the following lines belong to a string (SQL92)."""
        rest = ""
        while (
            self.token.kind == "string"
            and "\n" in self.text[token.start + len(token.text) : self.token.start]
        ):
            token = self.advance()
            rest += token.value
        return rest

    def _case(self) -> tree.Case:
        at = self.advance().start
        operand = None if self.is_word("WHEN") else self._sum()
        branches = []
        while self.accept("WHEN"):
            test = self.condition("WHEN") if operand is None else self._sum()
            self.expect("THEN")
            branches.append((test, self.value()))
        if not branches:
            raise self.unexpected("WHEN")
        otherwise = self.value() if self.accept("ELSE") else None
        self.expect("END")
        return tree.Case(operand, tuple(branches), otherwise, at)

    def _cast(self) -> tree.Cast:
        at = self.advance().start
        self.expect_operator("(")
        value = self.value()
        self.expect("AS")
        token = self.token
        kind = self.advance().value if token.kind == "word" else ""
        if kind == "DOUBLE":
            self.expect("PRECISION")
            kind = "DOUBLE PRECISION"
        kind = {"INT": "INTEGER", "CHARACTER": "CHAR"}.get(kind, kind)
        if kind not in CAST_TYPES:
            known = ", ".join(sorted(CAST_TYPES))
            remedy = "write REAL or DOUBLE PRECISION" if kind == "FLOAT" else f"known are {known}"
            raise self.error_at(token.start, f"CAST cannot give {token.text}", remedy, token.text)
        size = None
        if kind in ("CHAR", "VARCHAR", "TIMESTAMP") and self.accept_operator("("):
            size = self.whole_number(kind)
            self.expect_operator(")")
        self.expect_operator(")")
        return tree.Cast(value, kind, size, at)

    def _call(self) -> tree.Expression:
        token = self.advance()
        name = token.value
        if name not in ARGUMENTS:
            near = get_close_matches(name, ARGUMENTS, 1, 0.75)
            hint = _HINTS.get(name) or (
                f"did you mean {near[0]}?" if near else "the service's capabilities list them"
            )
            raise self.error_at(token.start, f"there is no function {token.text}", hint, token.text)
        self.advance()
        arguments: list[tree.Expression] = []
        distinct = star = False
        if name == "COUNT" and self.accept_operator("*"):
            star = True
        elif not self.is_operator(")"):
            if name in ("AVG", "COUNT", "MAX", "MIN", "SUM"):
                distinct = self.accept("DISTINCT")
                if not distinct:
                    self.accept("ALL")
            arguments.append(self.value())
            while self.accept_operator(","):
                arguments.append(self.value())
        self.expect_operator(")")
        call = tree.Call(name, tuple(arguments), token.start, distinct, star)
        if not star:
            self._check_arguments(call, token)
        return call

    def _check_arguments(self, call: tree.Call, token: Token) -> None:
        low, high = ARGUMENTS[call.name]
        count = len(call.arguments)
        wrong = not low <= count <= high or (call.name == "DISTANCE" and count == 3)
        first = call.arguments[0] if call.arguments else None
        system = isinstance(first, tree.String) or (isinstance(first, tree.Constant) and first.value is None)
        if call.name in COORDINATE_FUNCTIONS and not wrong:
            wanted = COORDINATE_FUNCTIONS[call.name]
            count -= system and count > 1
            points = {"CIRCLE": (2, 3), "BOX": (3, 4)}.get(call.name, (wanted, wanted))
            wrong = count not in points
            if system and call.name == "CIRCLE" and count == 2:
                # with a coordinate system a circle of two arguments must begin with a point
                wrong = isinstance(call.arguments[1], tree.Number)
        if call.name == "POLYGON" and not wrong:
            count -= system
            points_only = all(isinstance(a, tree.Call | tree.ColumnRef) for a in call.arguments[system:])
            wrong = count < 3 or (not points_only and (count % 2 == 1 or count < 6))
        if wrong:
            raise self.error_at(
                token.start, f"{call.name} with {len(call.arguments)} arguments",
                f"it takes {arguments_text(call.name)}{_form(call.name)}", token.text,
            )  # fmt: skip


def _form(name: str) -> str:
    forms = {
        "POINT": "POINT(ra, dec)", "CIRCLE": "CIRCLE(ra, dec, radius)", "BOX": "BOX(ra, dec, width, height)",
        "POLYGON": "POLYGON(ra1, dec1, ra2, dec2, ra3, dec3, …)",
        "DISTANCE": "DISTANCE(ra1, dec1, ra2, dec2)",
    }  # fmt: skip
    return f": {forms[name]}" if name in forms else ""


def is_condition(node: tree.Expression) -> bool:
    """Whether a node is true or false (and not a value)."""
    if isinstance(node, tree.Between | tree.InList | tree.Like | tree.IsNull | tree.Exists):
        return True
    if isinstance(node, tree.Constant):
        return node.value is not None
    if isinstance(node, tree.Unary):
        return node.operator == "NOT"
    return isinstance(node, tree.Binary) and node.operator in _COMPARISONS | {"AND", "OR"}


def _no_condition(node: tree.Expression, after: str) -> tuple[str, str]:
    if isinstance(node, tree.Call) and node.name in ("CONTAINS", "INTERSECTS"):
        return f"{node.name} is a number (1 or 0), {after} needs a condition", f"write {node.name}(…) = 1"
    if isinstance(node, tree.ColumnRef):
        return f"{after} needs a condition, found only a column", f"write {node} = 1, {node} IS NOT NULL, …"
    return f"{after} needs a condition, found only a value", "compare it with something"
