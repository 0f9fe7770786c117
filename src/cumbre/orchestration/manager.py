"""The orchestration manager: jobs table on one side, engine on the other, retries between them."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import replace

from cumbre.core.errors import TransientError
from cumbre.core.time import Clock
from cumbre.orchestration.engine import Completion, ComputeEngine
from cumbre.orchestration.jobs import JobStore
from cumbre.orchestration.models import FAILED, LOST, FinishedJob, Job, JobState

LEASE_S = 120.0
"""Real seconds."""
log = logging.getLogger(__name__)


def _rank(job: Job) -> int:
    """Order within the engine: by class, and within a class what has a deadline first."""
    return int(job.priority) * 2 + (job.deadline_tai == 0)


class JobManager:
    """Runs jobs to their end and records every try.

    Parameters
    ----------
    owner
        Name under which leases are held; one live process per name. A restarted owner takes its own jobs back
        at once, those of others when their lease has run out.
    """

    def __init__(self, store: JobStore, engine: ComputeEngine, clock: Clock, *, owner: str) -> None:
        self.store, self.engine, self.clock, self.owner = store, engine, clock, owner
        self._running: dict[str, tuple[Job, int]] = {}
        self._ends: deque[Completion] = deque()
        self._is_waiting = False
        self._lease_s = LEASE_S * clock.rate
        self._renew_at = 0.0
        held = store.release(owner)
        if held:
            log.info("%d jobs of a former life go on", held)
        self.start_waiting()

    def submit(self, job: Job) -> bool:
        """Record and start a job; False (and nothing happens) when its id is known."""
        if not self.store.add(job, self.clock.now_tai_s()):
            return False
        self.start_waiting()
        return True

    def submit_all(self, jobs: list[Job]) -> int:
        """Record several and start them in order of priority; gives how many were new."""
        now = self.clock.now_tai_s()
        new = sum(self.store.add(job, now) for job in jobs)
        if new:
            self.start_waiting()
        return new

    def start_waiting(self) -> int:
        """Take what waits in the table and hand it to the engine."""
        taken = self.store.take(self.owner, self.clock.now_tai_s(), self._lease_s)
        self._is_waiting = False
        for job, attempt in taken:
            self._running[job.id] = (job, attempt)
            self.engine.submit(
                f"{job.id}#{attempt}", job.function, job.payload,
                priority=_rank(job), affinity=job.affinity,
            )  # fmt: skip
        return len(taken)

    def poll(self, timeout_s: float) -> list[FinishedJob]:
        """Wait at most ``timeout_s`` real seconds for an end; retries what may be retried."""
        now = self.clock.now_tai_s()
        if now >= self._renew_at:
            if self._renew_at:
                self.store.renew(self.owner, now + self._lease_s)
                self.start_waiting()
            self._renew_at = now + self._lease_s / 4
        self._ends.extend(self.engine.completed(0.0 if self._ends else timeout_s))
        finished: list[FinishedJob] = []
        while self._ends:
            try:
                item = self._ended(self._ends[0])
            except TransientError:
                # The database is away. What the engine told is told once: it waits here, not in nobody's hands.
                if finished:
                    break
                raise
            self._ends.popleft()
            if item is not None:
                finished.append(item)
        if self._is_waiting and not finished:
            self.start_waiting()
        return finished

    def _ended(self, completion: Completion) -> FinishedJob | None:
        job_id, _, attempt_text = completion.key.rpartition("#")
        known = self._running.get(job_id)
        if known is None or known[1] != int(attempt_text):
            return None
        job, attempt = known
        result, now = completion.result, self.clock.now_tai_s()
        retry = result.may_retry and attempt < job.max_attempts
        if retry:
            log.warning(
                "job %s try %d: %s: %s; trying again", job.id, attempt, result.outcome, result.message
            )
            self.store.record(job.id, result, attempt=attempt, state=JobState.QUEUED, now_tai=now)
            del self._running[job_id]
            self._is_waiting = True
            return None
        is_failure = result.may_retry or result.outcome in (FAILED, LOST, "Fatal")
        state = JobState.FAILED if is_failure else JobState.DONE
        self.store.record(job.id, replace(result, may_retry=False), attempt=attempt, state=state, now_tai=now)
        del self._running[job_id]
        return FinishedJob(job, result, attempt, state)

    def cancel(self, job_id: str) -> bool:
        """Cancel a job that has not ended."""
        known = self._running.pop(job_id, None)
        if known is not None:
            self.engine.cancel(f"{job_id}#{known[1]}")
        return self.store.cancel(job_id, self.clock.now_tai_s())

    @property
    def running(self) -> int:
        """Jobs handed to the engine and not ended."""
        return len(self._running)
