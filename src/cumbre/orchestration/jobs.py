"""The jobs table: what was asked for, who runs it, how each try ended."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from cumbre.orchestration.models import FinishedJob, Job, JobResult, JobState, Priority
from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Database

MIGRATIONS = [
    """
    CREATE SCHEMA IF NOT EXISTS orchestration;
    CREATE TABLE orchestration.job (
        id              text PRIMARY KEY,
        kind            text NOT NULL,
        function        text NOT NULL,
        priority        smallint NOT NULL,
        payload         jsonb NOT NULL,
        affinity        int NOT NULL DEFAULT -1,
        max_attempts    int NOT NULL,
        state           text NOT NULL
                        CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
        attempts        int NOT NULL DEFAULT 0,
        deadline_tai    double precision NOT NULL DEFAULT 0,
        lease_owner     text NOT NULL DEFAULT '',
        lease_until_tai double precision NOT NULL DEFAULT 0,
        outcome         text NOT NULL DEFAULT '',
        message         text NOT NULL DEFAULT '',
        log_tail        text NOT NULL DEFAULT '',
        worker          text NOT NULL DEFAULT '',
        result          jsonb,
        wall_s          double precision,
        created_tai     double precision NOT NULL,
        started_tai     double precision,
        ended_tai       double precision,
        is_reported     boolean NOT NULL DEFAULT false
    );
    CREATE INDEX job_open ON orchestration.job (priority, deadline_tai, created_tai)
        WHERE state IN ('queued', 'running');
    CREATE INDEX job_unreported ON orchestration.job (kind) WHERE NOT is_reported;
    CREATE INDEX job_kind ON orchestration.job (kind, created_tai);
    CREATE TABLE orchestration.attempt (
        job_id     text NOT NULL REFERENCES orchestration.job (id) ON DELETE CASCADE,
        attempt    int NOT NULL,
        outcome    text NOT NULL,
        message    text NOT NULL,
        log_tail   text NOT NULL,
        worker     text NOT NULL,
        wall_s     double precision NOT NULL,
        ended_tai  double precision NOT NULL,
        PRIMARY KEY (job_id, attempt)
    );
    """,
]
_COLUMNS = "id, kind, function, payload, priority, deadline_tai, affinity, max_attempts"


def _json(value: Any) -> str:
    """JSON as PostgreSQL takes it: numbers that are not finite become null."""

    def clean(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, dict):
            return {str(key): clean(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [clean(inner) for inner in item]
        return item

    return json.dumps(clean(value))


def _job(row: tuple[Any, ...]) -> Job:
    return Job(row[0], row[1], row[2], row[3], Priority(row[4]), row[5], row[6], row[7])


class JobStore:
    """Jobs in PostgreSQL. Times are TAI seconds given by the caller."""

    def __init__(self, db: Database) -> None:
        self.db = db
        migrate(db, "orchestration", MIGRATIONS)

    def add(self, job: Job, now_tai: float) -> bool:
        """Record a new job as queued; False when its id is known already."""
        rows = self.db.execute(
            f"INSERT INTO orchestration.job ({_COLUMNS}, state, created_tai)"  # noqa: S608
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, 'queued', %s) ON CONFLICT (id) DO NOTHING RETURNING id",
            (
                job.id, job.kind, job.function, _json(job.payload), int(job.priority), job.deadline_tai,
                job.affinity, job.max_attempts, now_tai,
            ),
        )  # fmt: skip
        return bool(rows)

    def take(
        self, owner: str, now_tai: float, lease_s: float, *, limit: int = 1000, offline: bool | None = None,
        kind: str = "",
    ) -> list[tuple[Job, int]]:  # fmt: skip
        """Take open jobs that nobody holds, in order of priority, deadline, age; (job, number of this try).

        A running job whose lease ran out, or that this owner held in a former life, is taken again.

        Parameters
        ----------
        offline
            Only jobs of the class ``PROMPT`` (False), or only others (True); None for all.
        kind
            Only jobs of this kind; "" for all.
        """
        rows = self.db.execute(
            f"""
            UPDATE orchestration.job j
            SET state = 'running', lease_owner = %(owner)s, lease_until_tai = %(until)s,
                attempts = attempts + 1, started_tai = %(now)s
            FROM (
                SELECT id AS chosen FROM orchestration.job
                WHERE (state = 'queued' OR (state = 'running' AND lease_until_tai < %(now)s))
                  AND (%(offline)s::bool IS NULL OR (priority > %(prompt)s) = %(offline)s)
                  AND (%(kind)s = '' OR kind = %(kind)s)
                ORDER BY priority, NULLIF(deadline_tai, 0) NULLS LAST, created_tai
                LIMIT %(limit)s FOR UPDATE SKIP LOCKED
            ) open
            WHERE j.id = open.chosen
            RETURNING {_COLUMNS}, attempts, created_tai
            """,  # noqa: S608
            {
                "owner": owner,
                "until": now_tai + lease_s,
                "now": now_tai,
                "limit": limit,
                "offline": offline,
                "prompt": int(Priority.PROMPT),
                "kind": kind,
            },
        )
        rows.sort(key=lambda row: (row[4], row[5] or float("inf"), row[9]))
        return [(_job(row), row[8]) for row in rows]

    def release(self, owner: str) -> int:
        """Let go of what this owner held in a former life (it died); gives how many."""
        rows = self.db.execute(
            "UPDATE orchestration.job SET lease_until_tai = 0"
            " WHERE state = 'running' AND lease_owner = %s RETURNING id",
            (owner,),
        )
        return len(rows)

    def renew(self, owner: str, until_tai: float) -> None:
        """Hold on to everything this owner runs."""
        self.db.execute(
            "UPDATE orchestration.job SET lease_until_tai = %s WHERE state = 'running' AND lease_owner = %s",
            (until_tai, owner),
        )

    def record(
        self, job_id: str, result: JobResult, *, attempt: int, state: JobState, now_tai: float
    ) -> None:
        """Record how a try ended; a state that is not final puts the job back into the queue."""
        outcome = (result.outcome, result.message[:4000], result.log_tail, result.worker, result.wall_s)
        with self.db.connection() as link:
            link.execute(
                "INSERT INTO orchestration.attempt"
                " (job_id, attempt, outcome, message, log_tail, worker, wall_s, ended_tai)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                (job_id, attempt, *outcome, now_tai),
            )
            link.execute(
                "UPDATE orchestration.job SET state = %s, outcome = %s, message = %s, log_tail = %s,"
                " worker = %s, wall_s = %s, result = %s, ended_tai = %s, lease_until_tai = 0 WHERE id = %s",
                (str(state), *outcome, _json(result.value), now_tai, job_id),
            )

    def cancel(self, job_id: str, now_tai: float) -> bool:
        """Cancel a job that has not ended; False when it has."""
        rows = self.db.execute(
            "UPDATE orchestration.job SET state = 'cancelled', outcome = 'Cancelled', ended_tai = %s"
            " WHERE id = %s AND state IN ('queued', 'running') RETURNING id",
            (now_tai, job_id),
        )
        return bool(rows)

    def unreported(self, kind: str) -> list[FinishedJob]:
        """Ended jobs whose result was not told yet: the process died between recording and publishing."""
        rows = self.db.execute(
            f"SELECT {_COLUMNS}, attempts, state, outcome, message, log_tail, worker, result, wall_s"  # noqa: S608
            " FROM orchestration.job WHERE kind = %s AND NOT is_reported AND state IN ('done', 'failed')"
            " ORDER BY ended_tai",
            (kind,),
        )
        return [
            FinishedJob(
                _job(row),
                JobResult(row[10], row[11], row[12], row[13], False, row[14] or {}, row[15] or 0.0),
                row[8],
                JobState(row[9]),
            )
            for row in rows
        ]

    def mark_reported(self, ids: Iterable[str]) -> None:
        """The results of these jobs were told."""
        self.db.execute("UPDATE orchestration.job SET is_reported = true WHERE id = ANY(%s)", (list(ids),))

    def payloads(self, kind: str, since_tai: float) -> list[dict[str, Any]]:
        """Payload, id, state and times of the jobs of a kind made since; the oldest first."""
        return self.db.query(
            "SELECT id, state, outcome, payload, created_tai, ended_tai FROM orchestration.job"
            " WHERE kind = %s AND created_tai >= %s ORDER BY created_tai",
            (kind, since_tai),
        )

    def count_open(self, kind: str) -> int:
        """Jobs of a kind that have not ended."""
        rows = self.db.execute(
            "SELECT count(*) FROM orchestration.job WHERE state IN ('queued', 'running') AND kind = %s",
            (kind,),
        )
        return int(rows[0][0])

    def count_waiting(self, kind: str) -> int:
        """Jobs of a kind that nobody runs."""
        rows = self.db.execute(
            "SELECT count(*) FROM orchestration.job WHERE state = 'queued' AND kind = %s", (kind,)
        )
        return int(rows[0][0])

    def requeue(self, kind: str) -> int:
        """Put the failed jobs of a kind back into the queue, with all their tries; gives how many."""
        rows = self.db.execute(
            "UPDATE orchestration.job SET state = 'queued', is_reported = false, lease_until_tai = 0,"
            " max_attempts = max_attempts + attempts WHERE state = 'failed' AND kind = %s RETURNING id",
            (kind,),
        )
        return len(rows)

    def get(self, job_id: str) -> dict[str, Any] | None:
        """Everything known of a job; None when there is none."""
        rows = self.db.query("SELECT * FROM orchestration.job WHERE id = %s", (job_id,))
        return rows[0] if rows else None

    def attempts(self, job_id: str) -> list[dict[str, Any]]:
        """How each try of a job ended."""
        return self.db.query(
            "SELECT * FROM orchestration.attempt WHERE job_id = %s ORDER BY attempt", (job_id,)
        )
