"""Jobs by the Universal Worker Service pattern, stored in PostgreSQL and run by threads of any server.

A job's row is the truth: a server claims a queued row, tells each second that it lives, and writes the end only
if the row is still its own. So an aborted job stays aborted, a job of a server that died is queued again, once,
and then ends in ERROR with the reason. Results are files of the site; destruction deletes row and files. Times
are UTC of the real clock: they concern people who wait.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from cumbre.access.identity import AuthorizationError, Principal
from cumbre.core.errors import ConflictError, NotFoundError, UserError
from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Database

PENDING, QUEUED, EXECUTING = "PENDING", "QUEUED", "EXECUTING"
COMPLETED, ERROR, ABORTED, ARCHIVED = "COMPLETED", "ERROR", "ABORTED", "ARCHIVED"
PHASES = (PENDING, QUEUED, EXECUTING, COMPLETED, ERROR, ABORTED, ARCHIVED, "HELD", "SUSPENDED", "UNKNOWN")
ACTIVE = (PENDING, QUEUED, EXECUTING)
"""Phases in which a client may wait for a change."""
MAX_ATTEMPTS = 2
LOST_AFTER_S = 20
LIST_LIMIT = 1000
MAX_WAITING, MAX_WAITING_ANONYMOUS = 500, 100
"""Jobs of one owner that have not ended."""
STEPS = (
    """
    CREATE SCHEMA IF NOT EXISTS access;
    CREATE TABLE access.job (
        job_id text PRIMARY KEY,
        service text NOT NULL,
        owner text NOT NULL,
        principal jsonb NOT NULL,
        run_id text,
        phase text NOT NULL,
        parameters jsonb NOT NULL,
        created timestamptz NOT NULL DEFAULT now(),
        queued timestamptz,
        started timestamptz,
        ended timestamptz,
        destruction timestamptz NOT NULL,
        execution_s int NOT NULL,
        error jsonb,
        results jsonb NOT NULL DEFAULT '[]',
        info jsonb NOT NULL DEFAULT '{}',
        worker text,
        attempt int NOT NULL DEFAULT 0,
        heartbeat timestamptz
    );
    CREATE INDEX job_owner ON access.job (service, owner, created);
    CREATE INDEX job_waiting ON access.job (service, queued) WHERE phase = 'QUEUED';
    CREATE INDEX job_running ON access.job (worker) WHERE phase = 'EXECUTING';
    CREATE INDEX job_destruction ON access.job (destruction);
    """,
)
_COLUMNS = (
    "job_id, service, owner, principal, run_id, phase, parameters, created, started, ended, destruction,"
    " execution_s, error, results, info, worker, attempt"
)


@dataclass(frozen=True, slots=True)
class JobResult:
    """One result of a job: a file below the job's folder."""

    result_id: str
    file: str
    mime: str
    size: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One job as stored."""

    job_id: str
    service: str
    owner: str
    principal: Principal
    run_id: str | None
    phase: str
    parameters: tuple[tuple[str, str], ...]
    created: datetime
    started: datetime | None
    ended: datetime | None
    destruction: datetime
    execution_s: int
    error: dict[str, Any] | None
    results: tuple[JobResult, ...]
    info: dict[str, Any]
    worker: str | None
    attempt: int

    def value(self, name: str) -> str | None:
        """The last value of a parameter, its name without regard to case."""
        found = [value for key, value in self.parameters if key.upper() == name.upper()]
        return found[-1] if found else None

    def values(self, name: str) -> list[str]:
        """All values of a parameter."""
        return [value for key, value in self.parameters if key.upper() == name.upper()]


def worker_name() -> str:
    """Name of this process among all that may run jobs."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


class JobStore:
    """Jobs of a site.

    Parameters
    ----------
    db
        The site's database; the table is made when absent.
    folder
        Where results and uploads of jobs lie, one folder a job.
    retention
        Time from creation to destruction unless the client says otherwise; also the longest one.
    """

    def __init__(self, db: Database, folder: Path, *, retention: timedelta = timedelta(days=7)) -> None:
        self._db, self.folder, self._retention = db, folder, retention
        migrate(db, "access_uws", STEPS)
        self._changes: dict[str, int] = {}

    def job_folder(self, job_id: str) -> Path:
        """Folder of one job's files."""
        return self.folder / job_id

    # clients

    def create(
        self,
        service: str,
        who: Principal,
        parameters: Iterable[tuple[str, str]],
        *,
        execution_s: int,
        run_id: str | None = None,
        job_id: str | None = None,
    ) -> Job:
        """Store a new job in phase PENDING.

        Raises
        ------
        UserError
            The owner has too many that have not ended.
        """
        most = MAX_WAITING_ANONYMOUS if who.is_anonymous else MAX_WAITING
        waiting = self._db.execute(
            "SELECT count(*) FROM access.job WHERE service = %s AND owner = %s AND phase = ANY(%s)",
            (service, who.owner, list(ACTIVE)),
        )[0][0]
        if waiting >= most:
            raise UserError(
                f"{who.owner} has {waiting} jobs that have not ended, {most} are allowed: wait for some, or delete "
                "those that are not needed any more"
            )
        job_id = job_id or new_job_id()
        self._db.execute(
            "INSERT INTO access.job (job_id, service, owner, principal, run_id, phase, parameters,"
            " destruction, execution_s) VALUES (%s, %s, %s, %s, %s, 'PENDING', %s, %s, %s)",
            (
                job_id, service, who.owner, _principal_json(who), run_id, json.dumps(list(parameters)),
                datetime.now(UTC) + self._retention, execution_s,
            ),
        )  # fmt: skip
        return self.get(service, job_id, who)

    def get(self, service: str, job_id: str, who: Principal) -> Job:
        """One's own job; an administrator sees all.

        Raises
        ------
        NotFoundError
            There is none (any more).
        AuthorizationError
            It is another's.
        """
        rows = self._db.query(
            f"SELECT {_COLUMNS} FROM access.job WHERE job_id = %s AND service = %s",  # noqa: S608
            (job_id, service),
        )
        if not rows:
            raise NotFoundError(f"job {job_id}: there is none; it may have reached its destruction time")
        job = _job(rows[0])
        if job.owner != who.owner and not who.is_administrator:
            raise AuthorizationError(f"job {job_id} belongs to someone else")
        return job

    def list(
        self,
        service: str,
        who: Principal,
        *,
        phases: Sequence[str] = (),
        after: datetime | None = None,
        last: int | None = None,
    ) -> list[Job]:
        """One's own jobs in the order of creation, at most the newest ``LIST_LIMIT``.

        Parameters
        ----------
        phases
            Only these; without it all but ARCHIVED.
        after
            Only jobs created later.
        last
            Only this many of the newest, the newest first.
        """
        rows = self._db.query(
            f"SELECT {_COLUMNS} FROM access.job WHERE service = %(service)s AND owner = %(owner)s"  # noqa: S608
            " AND (CASE WHEN %(all)s THEN phase <> 'ARCHIVED' ELSE phase = ANY(%(phases)s) END)"
            " AND (%(after)s::timestamptz IS NULL OR created > %(after)s)"
            " ORDER BY created DESC LIMIT %(limit)s",
            {
                "service": service, "owner": who.owner, "all": not phases, "phases": list(phases),
                "after": after, "limit": min(last if last is not None else LIST_LIMIT, LIST_LIMIT),
            },
        )  # fmt: skip
        jobs = [_job(row) for row in rows]
        return jobs if last is not None else jobs[::-1]

    def set_parameters(self, job: Job, parameters: Iterable[tuple[str, str]]) -> None:
        """Add or replace parameters (and RUNID) of a job that has not begun."""
        given = list(parameters)
        names = {name.upper() for name, _ in given}
        kept = [pair for pair in job.parameters if pair[0].upper() not in names] + given
        run_id = next((value for name, value in given if name.upper() == "RUNID"), job.run_id)
        self._only_pending(
            job,
            self._db.execute(
                "UPDATE access.job SET parameters = %s, run_id = %s WHERE job_id = %s AND phase = 'PENDING'"
                " RETURNING 1",
                (json.dumps(kept), run_id, job.job_id),
            ),
        )

    def set_execution(self, job: Job, seconds: int) -> None:
        """Change the time a job may run; only before it begins."""
        self._only_pending(
            job,
            self._db.execute(
                "UPDATE access.job SET execution_s = %s WHERE job_id = %s AND phase = 'PENDING' RETURNING 1",
                (seconds, job.job_id),
            ),
        )

    @staticmethod
    def _only_pending(job: Job, changed: Sequence[Any]) -> None:
        if not changed:
            raise ConflictError(f"job {job.job_id} is {job.phase}: only a PENDING job can be changed")

    def set_destruction(self, job: Job, when: datetime) -> datetime:
        """Change the destruction time; never later than the retention allows. Returns what holds."""
        latest = job.created + self._retention * 4
        kept = min(when, latest)
        self._db.execute("UPDATE access.job SET destruction = %s WHERE job_id = %s", (kept, job.job_id))
        return kept

    def queue(self, job: Job) -> None:
        """PENDING → QUEUED; nothing happens to a job that is beyond it."""
        self._db.execute(
            "UPDATE access.job SET phase = 'QUEUED', queued = clock_timestamp()"
            " WHERE job_id = %s AND phase = 'PENDING'",
            (job.job_id,),
        )
        self.changed(job.job_id)

    def abort(self, job: Job) -> None:
        """Any active phase → ABORTED; a job that ended stays as it is."""
        self._db.execute(
            "UPDATE access.job SET phase = 'ABORTED', ended = clock_timestamp()"
            " WHERE job_id = %s AND phase = ANY(%s)",
            (job.job_id, list(ACTIVE)),
        )
        self.changed(job.job_id)

    def delete(self, job: Job) -> None:
        """Forget a job and its files."""
        self._db.execute("DELETE FROM access.job WHERE job_id = %s", (job.job_id,))
        self.changed(job.job_id)
        shutil.rmtree(self.job_folder(job.job_id), ignore_errors=True)

    # changes seen by those who wait in this process

    def changed(self, job_id: str) -> None:
        """Tell waiting requests of this process to look again."""
        if len(self._changes) > 10_000:
            self._changes.clear()
        self._changes[job_id] = self._changes.get(job_id, 0) + 1

    def version(self, job_id: str) -> int:
        """Changes of a job that this process made."""
        return self._changes.get(job_id, 0)

    def phase(self, job_id: str) -> str | None:
        """Phase now; None when the job is gone."""
        rows = self._db.execute("SELECT phase FROM access.job WHERE job_id = %s", (job_id,))
        return rows[0][0] if rows else None

    # workers

    def claim(self, services: Sequence[str], worker: str, *, owner_limit: int) -> Job | None:
        """Take the oldest queued job of an owner who has fewer than ``owner_limit`` running."""
        rows = self._db.query(
            "UPDATE access.job SET phase = 'EXECUTING', worker = %(worker)s, attempt = attempt + 1,"  # noqa: S608
            " started = clock_timestamp(), heartbeat = clock_timestamp()"
            " WHERE job_id = (SELECT j.job_id FROM access.job j WHERE j.phase = 'QUEUED'"
            "  AND j.service = ANY(%(services)s) AND (SELECT count(*) FROM access.job o"
            "   WHERE o.phase = 'EXECUTING' AND o.owner = j.owner) < %(limit)s"
            "  ORDER BY j.queued FOR UPDATE SKIP LOCKED LIMIT 1) RETURNING " + _COLUMNS,
            {"services": list(services), "worker": worker, "limit": owner_limit},
        )
        if not rows:
            return None
        self.changed(rows[0]["job_id"])
        return _job(rows[0])

    def beat(self, worker: str, info: Mapping[str, dict[str, Any]]) -> set[str]:
        """Tell that this worker's jobs run; returns those that are its own no more (aborted, deleted)."""
        rows = self._db.execute(
            "UPDATE access.job SET heartbeat = clock_timestamp() WHERE worker = %s AND phase = 'EXECUTING'"
            " AND job_id = ANY(%s) RETURNING job_id",
            (worker, list(info)),
        )
        mine = {row[0] for row in rows}
        for job_id in mine:
            if info[job_id]:
                self._db.execute(
                    "UPDATE access.job SET info = info || %s::jsonb WHERE job_id = %s AND phase = 'EXECUTING'",
                    (json.dumps(info[job_id]), job_id),
                )
        return set(info) - mine

    def complete(self, job: Job, results: Sequence[JobResult], info: Mapping[str, Any]) -> bool:
        """EXECUTING → COMPLETED, if the job is still this worker's."""
        packed = [
            {"result_id": r.result_id, "file": r.file, "mime": r.mime, "size": r.size, "name": r.name}
            for r in results
        ]
        return self._end(job, "COMPLETED", json.dumps(packed), None, info)

    def fail(
        self, job: Job, message: str, *, kind: str = "fatal", info: Mapping[str, Any] | None = None
    ) -> bool:
        """EXECUTING → ERROR; ``kind`` is ``fatal`` or ``transient``."""
        return self._end(job, "ERROR", "[]", {"type": kind, "message": message}, info or {})

    def _end(
        self, job: Job, phase: str, results: str, error: dict[str, Any] | None, info: Mapping[str, Any]
    ) -> bool:
        done = self._db.execute(
            "UPDATE access.job SET phase = %s, results = %s, error = %s, info = info || %s::jsonb,"
            " ended = clock_timestamp() WHERE job_id = %s AND phase = 'EXECUTING' AND worker = %s"
            " AND attempt = %s RETURNING 1",
            (
                phase, results, None if error is None else json.dumps(error), json.dumps(dict(info)),
                job.job_id, job.worker, job.attempt,
            ),
        )  # fmt: skip
        self.changed(job.job_id)
        return bool(done)

    def reclaim(self) -> int:
        """Queue again the jobs of servers that died; those that died twice end in ERROR. Returns how many."""
        lost = self._db.execute(
            "SELECT job_id, worker, attempt, heartbeat < clock_timestamp() - make_interval(secs => %s)"
            " FROM access.job WHERE phase = 'EXECUTING'",
            (LOST_AFTER_S,),
        )
        count = 0
        for job_id, worker, attempt, silent in lost:
            if not silent and not _is_dead(worker):
                continue
            again = attempt < MAX_ATTEMPTS
            error = {
                "type": "transient",
                "message": f"the server stopped {attempt} times while this job ran; send it again",
            }
            count += len(
                self._db.execute(
                    "UPDATE access.job SET phase = %s, worker = NULL, error = %s,"
                    " ended = CASE WHEN %s THEN NULL ELSE clock_timestamp() END"
                    " WHERE job_id = %s AND phase = 'EXECUTING' AND attempt = %s AND worker = %s RETURNING 1",
                    (
                        QUEUED if again else ERROR, None if again else json.dumps(error), again, job_id,
                        attempt, worker,
                    ),
                )
            )  # fmt: skip
            self.changed(job_id)
        return count

    def destroy_expired(self) -> int:
        """Delete jobs whose destruction time has come, with their files; returns how many."""
        rows = self._db.execute("DELETE FROM access.job WHERE destruction <= now() RETURNING job_id")
        for (job_id,) in rows:
            self.changed(job_id)
            shutil.rmtree(self.job_folder(job_id), ignore_errors=True)
        return len(rows)


def new_job_id() -> str:
    """An identifier that cannot be guessed."""
    return secrets.token_hex(10)


def parse_phase(text: str) -> str:
    """A phase of UWS.

    Raises
    ------
    UserError
        There is no such phase.
    """
    if text.upper() not in PHASES:
        raise UserError(f"PHASE = {text!r}: expected one of {', '.join(PHASES)}")
    return text.upper()


def _is_dead(worker: str | None) -> bool:
    """Whether a worker of this machine has ended; of other machines only the heartbeat tells."""
    host, _, rest = (worker or "").partition(":")
    pid = rest.partition(":")[0]
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _principal_json(who: Principal) -> str:
    return json.dumps(
        {
            "account": who.account, "rights": sorted(who.rights), "scopes": sorted(who.scopes),
            "groups": sorted(who.groups), "token_id": who.token_id, "address": who.address,
        }
    )  # fmt: skip


def _job(row: Mapping[str, Any]) -> Job:
    values = dict(row)
    who = values.pop("principal")
    for key in ("rights", "scopes", "groups"):
        who[key] = frozenset(who[key])
    return Job(
        principal=Principal(**who),
        parameters=tuple(cast("tuple[str, str]", tuple(pair)) for pair in values.pop("parameters")),
        results=tuple(JobResult(**item) for item in values.pop("results")),
        **values,
    )
