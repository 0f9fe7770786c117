"""Jobs as data: priority classes, states, outcome words."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

SUCCESS = "Success"
FAILED = "Failed"
LOST = "WorkerLost"
CANCELLED = "Cancelled"
DEADLINE = "Deadline"
DROPPED = "Dropped"
"""Too many images waited for a worker."""
KILLED = "Killed"
"""Ended while it ran, too long after its deadline."""
SAMPLED_OUT = "SampledOut"
"""Of a visit that was left out while the workers were behind."""
CAUGHT_UP = "CaughtUp"
"""Brought by the Catch-Up Archiver: not for the live workers."""


class Priority(IntEnum):
    """Classes of work; the smaller number goes first."""

    PROMPT = 1
    OFFLINE = 2
    ON_COMMAND = 3
    DATA_ACCESS = 4
    CALIBRATION = 5
    RELEASE = 6


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    """Ended with an outcome that no retry would change, good or not."""
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens to it."""
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work.

    Attributes
    ----------
    id
        Chosen by who asks; the same id is the same job, however often it is submitted.
    function
        ``package.module:function`` that takes the payload and returns plain data.
    deadline_tai
        When the result is worth less, TAI seconds; 0 for none. Among equals the earlier goes first.
    affinity
        Number of the worker slot that has warm caches for it; −1 for any.
    max_attempts
        Tries in all.
    """

    id: str
    kind: str
    function: str
    payload: dict[str, Any]
    priority: Priority = Priority.OFFLINE
    deadline_tai: float = 0.0
    affinity: int = -1
    max_attempts: int = 3


@dataclass(frozen=True, slots=True)
class JobResult:
    """What became of one try.

    Attributes
    ----------
    outcome
        ``Success``, ``NoWorkFound``, ``UnprocessableData``, ``Failed``, ``WorkerLost``…
    may_retry
        Whether the same job may give another outcome: nothing permanent was done and the fault may pass.
    value
        What the function returned.
    """

    outcome: str
    message: str = ""
    log_tail: str = ""
    worker: str = ""
    may_retry: bool = False
    value: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0

    @property
    def is_success(self) -> bool:
        """Whether the function returned."""
        return self.outcome == SUCCESS


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """A job that reached its end."""

    job: Job
    result: JobResult
    attempts: int
    state: JobState
