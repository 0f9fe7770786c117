"""Engines: what turns a plan into Arrow batches. One ``Protocol``; PostgreSQL and DuckDB implement it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

    from cumbre.access.limits import Watch
    from cumbre.access.planner import Plan
    from cumbre.stores.postgres import Database


@dataclass(frozen=True, slots=True)
class Started:
    """A query that runs in an engine."""

    batches: Iterator[pa.RecordBatch]
    cancel: Callable[[], None]
    close: Callable[[], None]


class Engine(Protocol):
    """Something that runs SQL of one dialect over the tables it holds."""

    def start(self, plan: Plan, watch: Watch, max_rows: int) -> Started:
        """Run the plan; batches have exactly the plan's schema; at most ``max_rows`` + 1 rows are needed."""


class Engines:
    """The engines of a site.

    Parameters
    ----------
    db
        PostgreSQL with Level 1 and everything relational; None where there is none.
    scratch
        Folder where big intermediate results may spill; a temporary one when not given.
    threads
        Threads of one DuckDB query.
    """

    def __init__(self, db: Database | None = None, *, scratch: Path | None = None, threads: int = 2) -> None:
        from cumbre.access.engines.duck import Instances

        self.db = db
        self._instances = Instances(scratch, threads)
        self._prepared = False

    def start(self, plan: Plan, watch: Watch, max_rows: int) -> Started:
        """Run a plan in the engine it was made for."""
        from cumbre.access.engines.duck import DuckEngine
        from cumbre.access.engines.postgres import PostgresEngine

        engine: Engine
        if plan.engine == "postgres":
            engine = PostgresEngine(self._database())
        else:
            engine = DuckEngine(self._database() if plan.fetches else None, self._instances)
        return engine.start(plan, watch, max_rows)

    def _database(self) -> Database:
        if self.db is None:
            from cumbre.core.errors import NotFoundError

            raise NotFoundError("this site has no database; only catalogues in files can be asked")
        if not self._prepared:
            from cumbre.access.engines.postgres_functions import prepare

            prepare(self.db)
            self._prepared = True
        return self.db
