"""What a query may cost, and how it is told when it costs more."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from cumbre.core.errors import CumbreError, UserError


@dataclass(frozen=True, slots=True)
class Limits:
    """Most that one query may use.

    Attributes
    ----------
    rows
        Rows of the result; more is cut and told (overflow).
    bytes
        Bytes of the result as Arrow holds it, and of everything copied between engines; cut or refused.
    seconds
        Time from the start to the last row.
    memory_mb
        Memory of the engine that runs it; more is spilled to disk or refused.
    """

    rows: int = 20_000_000
    bytes: int = 8 << 30
    seconds: float = 60.0
    memory_mb: int = 1024


class QueryTimeoutError(UserError):
    """The query took longer than its limit."""

    outcome = "Timeout"


class QueryTooBigError(UserError):
    """The query needs more memory or space than its limit."""

    outcome = "TooBig"


class QueryCancelledError(CumbreError):
    """Somebody cancelled the query."""

    outcome = "Cancelled"


@dataclass
class Watch:
    """The clock and the bell of one running query, shared by everything that works for it.

    Attributes
    ----------
    limits
        What the query may use.
    cancelled
        Set by whoever wants it to stop.
    """

    limits: Limits
    cancelled: threading.Event = field(default_factory=threading.Event)
    _start: float = field(default_factory=time.monotonic)

    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.limits.seconds - (time.monotonic() - self._start))

    def check(self) -> None:
        """Stop here when the time is over or somebody cancelled.

        Raises
        ------
        QueryCancelledError, QueryTimeoutError
        """
        if self.cancelled.is_set():
            raise QueryCancelledError("the query was cancelled")
        if self.remaining_s() <= 0:
            raise self.timeout()

    def timeout(self) -> QueryTimeoutError:
        """The error of a query that took too long."""
        return QueryTimeoutError(
            f"the query took longer than its limit of {self.limits.seconds:g} s; ask for less "
            "(a smaller region, fewer columns, TOP) or run it as an asynchronous job, which has more time"
        )

    def too_big(self, what: str) -> QueryTooBigError:
        """The error of a query that needs too much memory or space."""
        return QueryTooBigError(
            f"the query needs more than its limit of {what}; ask for less (a smaller region, fewer columns)"
        )
