"""Images that prompt processing left for later: how many, why, and doing them on command."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from cumbre.bus import Bus
from cumbre.core.time import Clock
from cumbre.orchestration.engine import ComputeEngine
from cumbre.orchestration.jobs import JobStore
from cumbre.orchestration.manager import JobManager
from cumbre.orchestration.models import FinishedJob
from cumbre.orchestration.prompt_jobs import MISSED
from cumbre.orchestration.prompt_telling import Teller
from cumbre.stores.postgres import Database

WAIT_S = 0.2


def missed_images(db: Database) -> list[dict[str, Any]]:
    """All images that were left for later, the oldest first: obs_id, detector, reason, state, outcome, message."""
    return db.query(
        "SELECT payload->'image'->>'obs_id' AS obs_id, (payload->'image'->>'detector')::int AS detector,"
        " payload->>'missed' AS reason, state, outcome, message, attempts, created_tai, ended_tai"
        " FROM orchestration.job WHERE kind = %s ORDER BY created_tai, id",
        (MISSED,),
    )


def summary(db: Database) -> dict[str, dict[str, int]]:
    """Reason → state (queued, running, done, failed) → number of detector images; {} without any."""
    if not db.execute("SELECT to_regclass('orchestration.job')")[0][0]:
        return {}
    rows = db.query(
        "SELECT payload->>'missed' AS reason, state, count(*) AS n FROM orchestration.job WHERE kind = %s"
        " GROUP BY 1, 2 ORDER BY 1, 2",
        (MISSED,),
    )
    out: dict[str, dict[str, int]] = {}
    for row in rows:
        out.setdefault(row["reason"], {})[row["state"]] = int(row["n"])
    return out


def waiting(db: Database) -> int:
    """Detector images that were left for later and have not reached their end."""
    return sum(states.get(word, 0) for states in summary(db).values() for word in ("queued", "running"))


def process_missed(
    *, bus: Bus, clock: Clock, db: Database, engine: ComputeEngine, owner: str, again: bool = False
) -> Iterator[FinishedJob]:
    """Do what waits, beside a prompt service or without one; results are told as those of live images.

    Parameters
    ----------
    owner
        Name of this process among those that run jobs.
    again
        Also those that failed before.

    Yields
    ------
    FinishedJob
        Each image that reached its end.
    """
    store, teller = JobStore(db), Teller(bus, clock)
    if again:
        store.requeue(MISSED)
    manager = JobManager(store, engine, clock, owner=owner, kind=MISSED)
    while store.count_waiting(MISSED) or manager.running:
        finished = manager.poll(WAIT_S)
        for item in finished:
            teller.result(item, prepared_tai=None)
            store.mark_reported([item.job.id])
            yield item
        if not finished:
            time.sleep(0.02)
