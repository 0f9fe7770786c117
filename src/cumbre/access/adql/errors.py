"""What is wrong with a query, where, and what to do."""

from __future__ import annotations

from cumbre.core.errors import UserError


class AdqlError(UserError):
    """A query that cannot run.

    Attributes
    ----------
    reason
        What is wrong.
    remedy
        What to do; may be empty.
    line, column
        Place of the token in the text, from 1; 0 when it has none.
    token
        The token itself; empty when there is none.
    """

    outcome = "BadQuery"

    def __init__(
        self, reason: str, *, remedy: str = "", line: int = 0, column: int = 0, token: str = ""
    ) -> None:
        self.reason, self.remedy, self.line, self.column, self.token = reason, remedy, line, column, token
        place = f"line {line}, column {column}: " if line else ""
        super().__init__(f"{place}{reason}" + (f"; {remedy}" if remedy else ""))
