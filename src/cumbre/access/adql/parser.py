"""The grammar of queries: SELECT, FROM, joins, set operations, WITH."""

from __future__ import annotations

from cumbre.access.adql import tree
from cumbre.access.adql.expressions import ExpressionParser
from cumbre.access.adql.tokens import tokenize

MAX_SET_OPERATIONS = 64
MAX_JOINS = 32
_JOIN_WORDS = frozenset({"NATURAL", "INNER", "LEFT", "RIGHT", "FULL", "JOIN", "CROSS"})


class _Parser(ExpressionParser):
    """Recursive descent; nothing that it does not know can pass."""

    def statement(self) -> tree.Statement:
        names: list[tuple[tree.Name, tuple[tree.Name, ...], tree.Query]] = []
        if self.accept("WITH"):
            while True:
                name = self.identifier("a name for the query")
                columns: tuple[tree.Name, ...] = ()
                if self.accept_operator("("):
                    columns = self.name_list()
                self.expect("AS")
                self.expect_operator("(")
                query = self.query()
                self.expect_operator(")")
                names.append((name, columns, query))
                if not self.accept_operator(","):
                    break
        query = self.query()
        if self.is_operator(";"):
            self.advance()
            if self.token.kind != "end":
                raise self.error("only one statement is allowed", "send each query by itself")
        if self.token.kind != "end":
            raise self.unexpected("the end of the query")
        return tree.Statement(tuple(names), query)

    def query(self) -> tree.Query:
        """Set operations: INTERSECT binds stronger than UNION and EXCEPT; ORDER BY and OFFSET belong to all."""
        at = self.token.start
        query = self._intersections()
        count = 0
        while self.token.kind == "word" and self.token.value in ("UNION", "EXCEPT"):
            operator, keep_all, here = self.advance().value, self.accept("ALL"), self.token.start
            query = tree.SetOperation(operator, keep_all, query, self._intersections(), (), None, here)
            count += 1
            if count > MAX_SET_OPERATIONS:
                raise self.error(f"more than {MAX_SET_OPERATIONS} set operations", "split the query")
        return self._ordered(query, at)

    def _ordered(self, query: tree.Query, at: int) -> tree.Query:
        order: list[tree.Order] = []
        if self.is_word("ORDER"):
            self.advance()
            self.expect("BY")
            while True:
                value = self.value()
                descending = self.accept("DESC")
                if not descending:
                    self.accept("ASC")
                order.append(tree.Order(value, descending))
                if not self.accept_operator(","):
                    break
        offset = self.whole_number("OFFSET") if self.accept("OFFSET") else None
        if not order and offset is None:
            return query
        if isinstance(query, tree.Select) and not query.order and query.offset is None:
            return tree.Select(
                query.items, query.relation, query.where, query.group, query.having, query.distinct, query.top,
                tuple(order), offset, query.at,
            )  # fmt: skip
        if isinstance(query, tree.SetOperation) and not query.order and query.offset is None:
            return tree.SetOperation(
                query.operator, query.keep_all, query.left, query.right, tuple(order), offset, at
            )
        raise self.error("ORDER BY or OFFSET is given twice", "keep the one outside the parentheses")

    def _intersections(self) -> tree.Query:
        query = self._term()
        count = 0
        while self.is_word("INTERSECT"):
            at = self.advance().start
            query = tree.SetOperation("INTERSECT", self.accept("ALL"), query, self._term(), (), None, at)
            count += 1
            if count > MAX_SET_OPERATIONS:
                raise self.error(f"more than {MAX_SET_OPERATIONS} set operations", "split the query")
        return query

    def _term(self) -> tree.Query:
        if self.accept_operator("("):
            if self.is_word("WITH"):
                raise self.error("WITH inside a query", "put it before the first SELECT")
            query = self.query()
            self.expect_operator(")")
            return query
        return self._select()

    def _select(self) -> tree.Select:
        at = self.token.start
        if self.is_word("WITH"):
            raise self.error("WITH inside a query", "put it before the first SELECT")
        if not self.is_word("SELECT"):
            raise self.unexpected("SELECT")
        self.advance()
        distinct = self.accept("DISTINCT")
        if not distinct:
            self.accept("ALL")
        top = self.whole_number("TOP") if self.accept("TOP") else None
        items = [self._item()]
        while self.accept_operator(","):
            items.append(self._item())
        if self.is_word("INTO"):
            raise self.error("INTO is not part of ADQL", "save the result with the service's own means")
        self.expect("FROM")
        relation = self._relations()
        where = self.condition("WHERE") if self.accept("WHERE") else None
        group: list[tree.Expression] = []
        if self.is_word("GROUP"):
            self.advance()
            self.expect("BY")
            group.append(self.value())
            while self.accept_operator(","):
                group.append(self.value())
        having = self.condition("HAVING") if self.accept("HAVING") else None
        if self.is_name("LIMIT"):
            raise self.error("LIMIT is not part of ADQL", "write SELECT TOP n …")
        return tree.Select(tuple(items), relation, where, tuple(group), having, distinct, top, (), None, at)

    def _item(self) -> tree.Item:
        if self.is_operator("*"):
            return tree.Item(tree.Star((), self.advance().start), None)
        star = self._qualified_star()
        if star is not None:
            return tree.Item(star, None)
        return tree.Item(self.value(), self._alias())

    def _qualified_star(self) -> tree.Star | None:
        """``t.*`` or ``s.t.*`` when that comes next."""
        ahead = self.index
        while self.tokens[ahead].kind in ("word", "quoted") and self.tokens[ahead + 1].value == ".":
            if self.tokens[ahead + 2].text == "*":
                at = self.token.start
                parts = [self.identifier("a table")]
                while self.accept_operator(".") and not self.is_operator("*"):
                    parts.append(self.identifier("a table"))
                self.advance()
                return tree.Star(tuple(parts), at)
            ahead += 2
        return None

    def _alias(self) -> tree.Name | None:
        if self.accept("AS"):
            return self.identifier("a name after AS")
        if self.token.kind == "quoted" or (self.token.kind == "word" and not self.token.reserved):
            if self.is_name("LIMIT"):
                return None
            return self.identifier("a name")
        return None

    def _relations(self) -> tree.Relation:
        """Comma: a cross product."""
        relation = self._joins()
        count = 0
        while self.is_operator(","):
            at = self.advance().start
            relation = tree.Join(relation, self._joins(), "CROSS", False, None, (), at)
            count += 1
            self._check_joins(count)
        return relation

    def _check_joins(self, count: int) -> None:
        if count > MAX_JOINS:
            raise self.error(f"more than {MAX_JOINS} tables joined", "use WITH or split the query")

    def _joins(self) -> tree.Relation:
        relation = self._primary_relation()
        count = 0
        while self.token.kind == "word" and self.token.value in _JOIN_WORDS:
            relation = self._join(relation)
            count += 1
            self._check_joins(count)
        return relation

    def _join(self, left: tree.Relation) -> tree.Join:
        at = self.token.start
        if self.accept("CROSS"):
            self.expect("JOIN")
            return tree.Join(left, self._primary_relation(), "CROSS", False, None, (), at)
        natural = self.accept("NATURAL")
        kind = "INNER"
        if self.token.kind == "word" and self.token.value in ("LEFT", "RIGHT", "FULL"):
            kind = self.advance().value
            self.accept("OUTER")
        else:
            self.accept("INNER")
        self.expect("JOIN")
        right = self._primary_relation()
        if natural:
            return tree.Join(left, right, kind, True, None, (), at)
        if self.accept("ON"):
            return tree.Join(left, right, kind, False, self.condition("ON"), (), at)
        if self.accept("USING"):
            self.expect_operator("(")
            return tree.Join(left, right, kind, False, None, self.name_list(), at)
        return tree.Join(left, right, kind, False, None, (), at)

    def _primary_relation(self) -> tree.Relation:
        at = self.token.start
        if not self.is_operator("("):
            parts = [self.identifier("a table")]
            while self.accept_operator("."):
                parts.append(self.identifier("a table"))
            if len(parts) > 3:
                raise self.error_at(at, "a table has at most catalogue, schema and name")
            if self.is_operator("("):
                raise self.error("functions in FROM are not part of ADQL")
            return tree.TableRef(tuple(parts), self._alias(), at)
        if self._query_ahead():
            self.advance()
            query = self.query()
            self.expect_operator(")")
            alias = self._alias()
            if alias is None:
                raise self.error("a query in FROM needs a name", "write (SELECT …) AS name")
            return tree.Derived(query, alias, at)
        self.advance()
        relation = self._joins()
        self.expect_operator(")")
        return relation

    def _query_ahead(self) -> bool:
        """Whether the parentheses that come next hold a query (not a join)."""
        ahead = self.index
        while self.tokens[ahead].text == "(" and self.tokens[ahead].kind == "operator":
            ahead += 1
        return self.tokens[ahead].kind == "word" and self.tokens[ahead].value in ("SELECT", "WITH")

    def name_list(self) -> tuple[tree.Name, ...]:
        """Names up to the closing parenthesis."""
        names = [self.identifier("a column")]
        while self.accept_operator(","):
            names.append(self.identifier("a column"))
        self.expect_operator(")")
        return tuple(names)


def parse(text: str) -> tree.Statement:
    """The tree of one ADQL query.

    Raises
    ------
    AdqlError
        What is wrong, where, and what to do.
    """
    return _Parser(text, tokenize(text)).statement()
