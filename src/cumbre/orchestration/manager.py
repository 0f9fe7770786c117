"""The orchestration manager: jobs table on one side, pools of workers on the other, retries between them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping

from cumbre.core.errors import TransientError
from cumbre.core.time import Clock
from cumbre.orchestration.dispatch import Dispatcher, Leave, OverloadPolicy, PoolRule, Pools, Start
from cumbre.orchestration.engine import Completion, ComputeEngine
from cumbre.orchestration.jobs import JobStore
from cumbre.orchestration.models import FAILED, LOST, FinishedJob, Job, JobResult, JobState

LEASE_S = 120.0
"""Real seconds."""
OFFLINE_S = 1.0
"""Real seconds between two looks for offline work that others have put into the table."""
LIVE = "live"
log = logging.getLogger(__name__)


def _rank(job: Job) -> int:
    """Order within the engine: by class, and within a class what has a deadline first."""
    return int(job.priority) * 2 + (job.deadline_tai == 0)


class JobManager:
    """Runs jobs to their end and records every try.

    A worker has one job at a time (and short preparations beside it), so that what waits is known here and can
    be given to whoever is free, or be left undone.

    Parameters
    ----------
    engine
        The live pool, or pools by name; ``rules`` says what each does.
    owner
        Name under which leases are held; one live process per name. A restarted owner takes its own jobs back
        at once, those of others when their lease has run out.
    policy, light
        See :class:`~cumbre.orchestration.dispatch.Dispatcher`.
    kind
        Only jobs of this kind; "" for all.
    """

    def __init__(
        self, store: JobStore, engine: ComputeEngine | Mapping[str, ComputeEngine], clock: Clock, *, owner: str,
        policy: OverloadPolicy | None = None, light: Iterable[str] = (), kind: str = "",
        rules: Mapping[str, PoolRule] | None = None,
    ) -> None:  # fmt: skip
        self.store, self.clock, self.owner = store, clock, owner
        self.pools = dict(engine) if isinstance(engine, Mapping) else {LIVE: engine}
        self.rules = {name: PoolRule() for name in self.pools} | dict(rules or {})
        self.dispatcher = Dispatcher(policy, light=light)
        self._kind = kind
        self._running: dict[str, tuple[Job, int]] = {}
        self._ends: deque[Completion] = deque()
        self._finished: list[FinishedJob] = []
        self._is_waiting = True
        self._look_at = 0.0
        self._lease_s = LEASE_S * clock.rate
        self._renew_at = 0.0
        held = store.release(owner)
        if held:
            log.info("%d jobs of a former life go on", held)
        self.start_waiting()

    def submit(self, job: Job) -> bool:
        """Record and start a job; False (and nothing happens) when its id is known."""
        return self.submit_all([job]) == 1

    def submit_all(self, jobs: list[Job]) -> int:
        """Record several and start them in order of priority; gives how many were new."""
        now = self.clock.now_tai_s()
        new = sum(self.store.add(job, now) for job in jobs)
        if new:
            self._is_waiting, self._look_at = True, 0.0
            self.start_waiting()
        return new

    def start_waiting(self) -> None:
        """Take what waits in the table and hand it to free workers."""
        now = self.clock.now_tai_s()
        if self._is_waiting:
            self._take(now, offline=False)
            self._is_waiting = False
        pools = self._pools()
        self._follow(now, pools)
        room = self.dispatcher.room(pools) if time.monotonic() >= self._look_at else 0
        if room:
            self._look_at = time.monotonic() + OFFLINE_S
            if self._take(now, offline=True, limit=room):
                self._follow(now, pools)

    def _take(self, now: float, *, offline: bool, limit: int = 1000) -> int:
        taken = self.store.take(self.owner, now, self._lease_s, limit=limit, offline=offline, kind=self._kind)
        for job, attempt in taken:
            self._running[job.id] = (job, attempt)
            self.dispatcher.add(job)
        return len(taken)

    def _pools(self) -> Pools:
        return {name: (self.rules[name], engine.workers()) for name, engine in self.pools.items()}

    def _follow(self, now: float, pools: Pools) -> None:
        for decision in self.dispatcher.plan(now, pools):
            match decision:
                case Start(job, (pool, worker)):
                    self.pools[pool].submit(
                        self._key(job), job.function, job.payload, priority=_rank(job), worker=worker
                    )
                case Leave(job, outcome, reason, slot):
                    if slot is not None:
                        self.pools[slot[0]].kill(self._key(job), slot[1])
                    log.warning("job %s: %s: %s", job.id, outcome, reason)
                    self._end(job, JobResult(outcome, reason), JobState.FAILED, now)

    def _key(self, job: Job) -> str:
        return f"{job.id}#{self._running[job.id][1]}"

    def _end(self, job: Job, result: JobResult, state: JobState, now: float) -> None:
        """Record an end and forget the job; with the database away nothing is forgotten."""
        attempt = self._running[job.id][1]
        self.store.record(job.id, result, attempt=attempt, state=state, now_tai=now)
        self._forget(job.id)
        if state.is_final:
            self._finished.append(FinishedJob(job, result, attempt, state))

    def _forget(self, job_id: str) -> None:
        del self._running[job_id]
        self.dispatcher.remove(job_id)

    def poll(self, timeout_s: float) -> list[FinishedJob]:
        """Wait at most ``timeout_s`` real seconds for an end; retries what may be retried."""
        now = self.clock.now_tai_s()
        if now >= self._renew_at:
            if self._renew_at:
                self.store.renew(self.owner, now + self._lease_s)
                self._is_waiting = True
            self._renew_at = now + self._lease_s / 4
        self.start_waiting()
        for engine in self.pools.values():
            wait = 0.0 if self._ends or self._finished or len(self.pools) > 1 else timeout_s
            self._ends.extend(engine.completed(wait))
        if self._ends:
            self._look_at = 0.0
        while self._ends:
            try:
                self._ended(self._ends[0])
            except TransientError:
                # The database is away. What the engine told is told once: it waits here, not in nobody's hands.
                if self._finished:
                    break
                raise
            self._ends.popleft()
        if not self._ends:
            self.start_waiting()
        finished, self._finished = self._finished, []
        return finished

    def _ended(self, completion: Completion) -> None:
        job_id, _, attempt_text = completion.key.rpartition("#")
        known = self._running.get(job_id)
        if known is None or known[1] != int(attempt_text):
            return
        job, attempt = known
        result, now = completion.result, self.clock.now_tai_s()
        if result.may_retry and attempt < job.max_attempts:
            log.warning(
                "job %s try %d: %s: %s; trying again", job.id, attempt, result.outcome, result.message
            )
            self._end(job, result, JobState.QUEUED, now)
            self._is_waiting = True
            return
        is_failure = result.may_retry or result.outcome in (FAILED, LOST, "Fatal")
        self._end(job, result, JobState.FAILED if is_failure else JobState.DONE, now)

    def cancel(self, job_id: str) -> bool:
        """Cancel a job that has not ended."""
        if job_id in self._running:
            slot = self.dispatcher.slot_of(job_id)
            if slot is not None:
                self.pools[slot[0]].cancel(self._key(self._running[job_id][0]))
            self._forget(job_id)
        return self.store.cancel(job_id, self.clock.now_tai_s())

    @property
    def running(self) -> int:
        """Jobs taken from the table and not ended."""
        return len(self._running)
