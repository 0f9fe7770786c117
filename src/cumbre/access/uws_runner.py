"""Threads that run stored jobs: claim, work, tell each second that they live, stop when told."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cumbre.access.uws import Job, JobResult, JobStore, worker_name
from cumbre.core.errors import CumbreError, TransientError

log = logging.getLogger(__name__)

BEAT_S = 1.0
UPKEEP_S = 10.0


@dataclass
class JobContext:
    """What a job's work needs: where to write, and whether to go on.

    Attributes
    ----------
    folder
        The job's folder.
    cancelled
        Set when the job was aborted, deleted, or took too long.
    info
        Told to clients in jobInfo while the job runs and after it.
    """

    folder: Path
    deadline_s: float
    cancelled: threading.Event = field(default_factory=threading.Event)
    info: dict[str, Any] = field(default_factory=dict)
    timed_out: bool = False
    stops: list[Callable[[], None]] = field(default_factory=list)
    """What stops the work at once, called when it is cancelled."""

    def cancel(self) -> None:
        """Tell the work to stop, and stop what it waits for."""
        self.cancelled.set()
        for stop in list(self.stops):
            stop()

    def on_cancel(self, stop: Callable[[], None]) -> None:
        """Have ``stop`` called when the job is cancelled, at once if it is already."""
        self.stops.append(stop)
        if self.cancelled.is_set():
            stop()


Work = Callable[[Job, JobContext], list[JobResult]]


class JobRunner:
    """Runs jobs of some services.

    Parameters
    ----------
    store
        The jobs.
    work
        Service → what its jobs do. It returns results, or raises; our errors become the job's message.
    threads
        Jobs at a time. One owner gets at most all but one, so that nobody waits for one person's jobs only.
    """

    def __init__(self, store: JobStore, work: Mapping[str, Work], *, threads: int = 3) -> None:
        self._store, self._work = store, dict(work)
        self._worker = worker_name()
        self._owner_limit = max(threads - 1, 1)
        self._bell = threading.Condition()
        self._stop = threading.Event()
        self._running: dict[str, JobContext] = {}
        self._threads = [
            threading.Thread(target=self._loop, name=f"job-{number}", daemon=True)
            for number in range(threads)
        ]
        self._threads.append(threading.Thread(target=self._watch, name="job-watch", daemon=True))

    def start(self) -> None:
        """Take up what a dead server left, then begin."""
        self._store.reclaim()
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Look for work at once."""
        with self._bell:
            self._bell.notify_all()

    def stop_job(self, job_id: str) -> None:
        """Stop a job of this process at once; the watch finds those of others."""
        context = self._running.get(job_id)
        if context is not None:
            context.cancel()

    def close(self) -> None:
        """Stop; jobs that run are cancelled and queued again by whoever comes next."""
        self._stop.set()
        for context in list(self._running.values()):
            context.cancel()
        self.wake()
        for thread in self._threads:
            thread.join(5)

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                job = self._store.claim(list(self._work), self._worker, owner_limit=self._owner_limit)
            except CumbreError as error:
                log.warning("no job can be claimed: %s", error)
                self._stop.wait(1.0)
                continue
            if job is None:
                with self._bell:
                    self._bell.wait(1.0)
                continue
            self._run(job)

    def _run(self, job: Job) -> None:
        context = JobContext(
            self._store.job_folder(job.job_id), time.monotonic() + (job.execution_s or float("inf"))
        )
        self._running[job.job_id] = context
        try:
            context.folder.mkdir(parents=True, exist_ok=True)
            results = self._work[job.service](job, context)
        except Exception as error:
            self._failed(job, context, error)
        else:
            self._end(lambda: self._store.complete(job, results, context.info))
        finally:
            self._running.pop(job.job_id, None)

    def _failed(self, job: Job, context: JobContext, error: Exception) -> None:
        if self._stop.is_set() and context.cancelled.is_set():
            return  # still EXECUTING: the next server takes it up
        if context.timed_out:
            message = f"the job ran longer than its execution duration of {job.execution_s} s"
            self._end(lambda: self._store.fail(job, message, info=context.info))
            return
        if isinstance(error, CumbreError):
            message = str(error)
        else:
            log.exception("job %s", job.job_id, exc_info=error)
            message = "a fault of the service; it is in its log"
        kind = "transient" if isinstance(error, TransientError) else "fatal"
        self._end(lambda: self._store.fail(job, message, kind=kind, info=context.info))

    def _end(self, write: Callable[[], bool]) -> None:
        """Write how a job ended; a database that is away for a moment loses nothing."""
        for pause_s in (0.2, 1.0, 3.0, 5.0, None):
            try:
                write()
            except TransientError as error:
                log.warning("the end of a job cannot be written: %s", error)
                if pause_s is not None:
                    self._stop.wait(pause_s)
            else:
                return

    def _watch(self) -> None:
        """Heartbeats, deadlines, aborted jobs, destruction."""
        upkeep_s = time.monotonic()
        while not self._stop.wait(BEAT_S):
            try:
                running = dict(self._running)
                for context in running.values():
                    if time.monotonic() > context.deadline_s and not context.cancelled.is_set():
                        context.timed_out = True
                        context.cancel()
                if running:
                    lost = self._store.beat(self._worker, {key: dict(c.info) for key, c in running.items()})
                    for job_id in lost:
                        running[job_id].cancel()
                if time.monotonic() - upkeep_s > UPKEEP_S:
                    upkeep_s = time.monotonic()
                    self._store.reclaim()
                    self._store.destroy_expired()
            except CumbreError as error:
                log.warning("watch over jobs: %s", error)
