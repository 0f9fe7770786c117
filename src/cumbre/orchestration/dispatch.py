"""Which job goes to which worker, and which is left undone when there are too few workers: a pure machine.

Jobs of images (class ``PROMPT``) go to the live pool, the oldest first; to the spare pool too while the workers are
behind. Light jobs (preparations) queue at the worker that will process their detector. Everything else is offline
work: it begins where a pool's rule allows it and nothing more urgent waits there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from cumbre.orchestration.models import DEADLINE, DROPPED, KILLED, Job, Priority

LIGHT_AHEAD = 8
"""Light jobs that one worker may hold at once."""
BANNED_S = 60.0
"""Night seconds during which a worker that was ended gets nothing, unless it is gone before."""

Slot = tuple[str, str]
"""Pool and worker."""


@dataclass(frozen=True, slots=True)
class OverloadPolicy:
    """What happens when workers fall behind.

    Attributes
    ----------
    behind
        Waiting images per worker from which on the workers are behind; they are again in time when none waits.
    drop_above
        Most images that may wait; the oldest beyond are dropped. None for no limit.
    kill_after_s
        Night seconds beyond its deadline after which a job is ended, or not begun. None for never.
    """

    behind: float = 2.0
    drop_above: int | None = None
    kill_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class PoolRule:
    """What a pool of workers does.

    Attributes
    ----------
    prompt
        When it takes images: always, while the others are behind, or never.
    offline
        Whether it may begin offline work now.
    """

    prompt: Literal["always", "behind", "never"] = "always"
    offline: bool = True


@dataclass(frozen=True, slots=True)
class Start:
    """Hand a job to a worker."""

    job: Job
    slot: Slot


@dataclass(frozen=True, slots=True)
class Leave:
    """Do not run a job (any more); the driver calls :meth:`Dispatcher.remove` when that is recorded."""

    job: Job
    outcome: str
    reason: str
    slot: Slot | None
    """Where it runs and is to be ended; None for one that was not begun."""


Decision = Start | Leave
Pools = Mapping[str, tuple[PoolRule, Sequence[str]]]
"""Name → rule and living workers; the first that takes images always is the live one."""


@dataclass(slots=True)
class _Waiting:
    job: Job
    number: int


class Dispatcher:
    """Jobs that wait and jobs that run.

    Parameters
    ----------
    light
        Kinds of jobs that are short and useful on the worker of their affinity only.
    """

    def __init__(self, policy: OverloadPolicy | None = None, *, light: Iterable[str] = ()) -> None:
        self.policy = policy or OverloadPolicy()
        self.is_behind = False
        self._light = frozenset(light)
        self._count = 0
        self._waiting: dict[str, _Waiting] = {}
        self._running: dict[str, tuple[Job, Slot]] = {}
        self._banned: dict[Slot, float] = {}

    def add(self, job: Job) -> None:
        """Take in a job that is to be run."""
        self._count += 1
        self._running.pop(job.id, None)
        self._waiting[job.id] = _Waiting(job, self._count)

    def remove(self, job_id: str) -> None:
        """Forget a job that ended or is not wanted any more."""
        self._waiting.pop(job_id, None)
        self._running.pop(job_id, None)

    def slot_of(self, job_id: str) -> Slot | None:
        """Where a job runs; None when it does not."""
        known = self._running.get(job_id)
        return known[1] if known else None

    @property
    def waiting(self) -> int:
        """Images that wait for a worker."""
        return len(self._images())

    @property
    def running(self) -> int:
        """Images that are being processed."""
        return sum(self._is_image(job) for job, _ in self._running.values())

    @property
    def is_idle(self) -> bool:
        """Whether no image and no preparation waits or runs."""
        jobs = [*(item.job for item in self._waiting.values()), *(job for job, _ in self._running.values())]
        return not any(job.priority is Priority.PROMPT for job in jobs)

    def plan(self, now_tai: float, pools: Pools) -> list[Decision]:
        """Decide what to do now."""
        if not (self._waiting or self._running):
            self.is_behind = False
            return []
        self._banned = {
            slot: until
            for slot, until in self._banned.items()
            if until > now_tai and slot[1] in pools.get(slot[0], (None, ()))[1]
        }
        out: list[Decision] = list(self._late(now_tai))
        gone = {item.job.id for item in out if isinstance(item, Leave)}
        out += self._place_light(pools)
        out += self._place(self._images(gone), pools, "always")
        waiting = self._images(gone)
        workers = sum(len(slots) for rule, slots in pools.values() if rule.prompt == "always")
        self.is_behind = bool(waiting) and (
            self.is_behind or len(waiting) > self.policy.behind * max(workers, 1)
        )
        if self.is_behind:
            out += self._place(waiting, pools, "behind")
            waiting = self._images(gone)
        limit = self.policy.drop_above
        if limit is not None and len(waiting) > limit:
            why = f"{len(waiting)} images waited for a worker, at most {limit} may"
            out += [Leave(item.job, DROPPED, why, None) for item in waiting[: len(waiting) - limit]]
        if not waiting:
            out += self._place(self._others(), pools, "offline")
        return out

    def room(self, pools: Pools) -> int:
        """How many offline jobs could begin now."""
        if self._images():
            return 0
        allowed = (self._free(name, slots) for name, (rule, slots) in pools.items() if rule.offline)
        return max(sum(map(len, allowed)) - len(self._others()), 0)

    def _is_image(self, job: Job) -> bool:
        return job.priority is Priority.PROMPT and job.kind not in self._light

    def _images(self, without: Iterable[str] = ()) -> list[_Waiting]:
        """Images that wait, the oldest first."""
        found = [w for w in self._waiting.values() if self._is_image(w.job) and w.job.id not in without]
        return sorted(found, key=lambda w: (_age(w), w.number))

    def _others(self) -> list[_Waiting]:
        found = [w for w in self._waiting.values() if w.job.priority is not Priority.PROMPT]
        return sorted(found, key=lambda w: (_age(w), w.number))

    def _late(self, now_tai: float) -> Iterable[Leave]:
        patience = self.policy.kill_after_s
        if patience is None:
            return
        for item in self._images():
            if item.job.deadline_tai and now_tai > item.job.deadline_tai + patience:
                yield Leave(item.job, DEADLINE, f"not begun {patience:g} s after its deadline", None)
        for job, slot in self._running.values():
            if self._is_image(job) and job.deadline_tai and now_tai > job.deadline_tai + patience:
                self._banned[slot] = now_tai + BANNED_S
                yield Leave(job, KILLED, f"not done {patience:g} s after its deadline", slot)

    def _start(self, job: Job, slot: Slot) -> Start:
        del self._waiting[job.id]
        self._running[job.id] = job, slot
        return Start(job, slot)

    def _place_light(self, pools: Pools) -> list[Decision]:
        light = sorted(
            (w for w in self._waiting.values() if w.job.kind in self._light), key=lambda w: w.number
        )
        live = next(
            ((name, slots) for name, (rule, slots) in pools.items() if rule.prompt == "always" and slots),
            None,
        )
        if not light or live is None:
            return []
        name, slots = live
        held = Counter(slot for job, slot in self._running.values() if job.kind in self._light)
        out: list[Decision] = []
        for item in light:
            slot = (name, slots[max(item.job.affinity, 0) % len(slots)])
            if held[slot] < LIGHT_AHEAD and slot not in self._banned:
                held[slot] += 1
                out.append(self._start(item.job, slot))
        return out

    def _free(self, name: str, slots: Sequence[str]) -> list[Slot]:
        busy = {slot for job, slot in self._running.values() if job.kind not in self._light}
        mine = [(name, slot) for slot in slots]
        return [slot for slot in mine if slot not in busy and slot not in self._banned]

    def _place(
        self, waiting: list[_Waiting], pools: Pools, what: Literal["always", "behind", "offline"]
    ) -> list[Decision]:
        out: list[Decision] = []
        left = list(waiting)
        for name, (rule, slots) in pools.items():
            if not (rule.offline if what == "offline" else rule.prompt == what):
                continue
            free = self._free(name, slots)
            if not free or not left:
                continue
            own = {w.job.id: (name, slots[w.job.affinity % len(slots)]) for w in left if w.job.affinity >= 0}
            left.sort(key=_age)
            for _, group in groupby(left, key=_age):
                alike = list(group)  # the images of a visit: first those whose own worker is free
                for item in alike:
                    if own.get(item.job.id) in free:
                        free.remove(own[item.job.id])
                        out.append(self._start(item.job, own[item.job.id]))
                rest = (item for item in alike if item.job.id in self._waiting)
                for item, slot in list(zip(rest, free, strict=False)):
                    free.remove(slot)
                    out.append(self._start(item.job, slot))
            left = [w for w in left if w.job.id in self._waiting]
        return out


def _age(item: _Waiting) -> tuple[int, float]:
    return item.job.priority, item.job.deadline_tai or math.inf
