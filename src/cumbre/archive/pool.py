"""In which pool a replicator stands: a pure machine, events in, registrations out.

Fully-operational: its one distributor answers, its own stores work, and its jobs take the time they should.
Local-only: the stores work, but the distributor does not answer, or a job took too long; in the second case it
comes back after a random time if the distributor is still heard, so that pairs do not all come back at once.
In no pool: its own stores do not work (or it has just booted), so it could not even keep what it is given.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

FULL, LOCAL, CATCH_UP, NONE = "fully-operational", "local-only", "catch-up", ""
DISTRIBUTOR, TAPE = "distributor", "tape"
"""Names of tests; all others are those of the replicator's own stores."""


@dataclass(frozen=True, slots=True)
class Checked:
    """Tests were made; ``failures`` gives name → what is wrong, empty when all is well."""

    at_s: float
    failures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Beat:
    """The distributor has answered."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection to the distributor is broken."""

    at_s: float
    why: str = "connection lost"


@dataclass(frozen=True, slots=True)
class Started:
    """A job has all it needs and should be done within ``expected_s``."""

    at_s: float
    job: str
    expected_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A job is done, or somebody else's."""

    at_s: float
    job: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes."""

    at_s: float


Event = Checked | Beat | Lost | Started | Ended | Tick


@dataclass(frozen=True, slots=True)
class Registration:
    """Leave the pool it is in and enter this one (none when empty)."""

    pool: str
    reason: str


class Pool:
    """Where one replicator stands.

    Parameters
    ----------
    chance
        Draws the intervals.
    pause_s
        Shortest and longest time in the local-only pool after a slow job.
    silence_s
        Time without a word of the distributor after which it is lost.
    """

    def __init__(
        self,
        chance: random.Random,
        *,
        pause_s: tuple[float, float] = (10.0, 60.0),
        silence_s: float = 6.0,
    ) -> None:
        self._chance, self._pause_s, self._silence_s = chance, pause_s, silence_s
        self.pool = NONE
        self._stores: str | None = "not tested"
        self._heard_s: float | None = None
        self._lost = "no answer yet"
        self._slow_until_s: float | None = None
        self._due: dict[str, float] = {}

    def handle(self, event: Event) -> Registration | None:
        """Take an event in; gives the registration to be made, if the pool changes."""
        reason = ""
        match event:
            case Checked(at_s, failures):
                reason = self._tested(at_s, failures)
            case Beat(at_s):
                self._heard_s = at_s
            case Lost(why=why):
                self._heard_s, self._lost = None, why
            case Started(at_s, job, expected_s):
                self._due.setdefault(job, at_s + expected_s)
            case Ended(job=job):
                self._due.pop(job, None)
        if self._heard_s is None:
            self._due.clear()  # late for a reason that is known already
        reason = self._time(event.at_s) or reason
        return self._settle(reason)

    def _tested(self, at_s: float, failures: Mapping[str, str]) -> str:
        own = {name: why for name, why in failures.items() if name not in (DISTRIBUTOR, TAPE)}
        self._stores = "; ".join(f"{name}: {why}" for name, why in sorted(own.items())) or None
        if DISTRIBUTOR in failures:
            self._heard_s, self._lost = None, failures[DISTRIBUTOR]
        else:
            self._heard_s = at_s
        # The tape has a writer of its own: a broken one is told and keeps nobody from sending.
        return f"tape: {failures[TAPE]}" if TAPE in failures else ""

    def _time(self, now_s: float) -> str:
        """What only time brings; gives the reason when something came."""
        if self._heard_s is not None and now_s - self._heard_s > self._silence_s:
            self._heard_s, self._lost = None, f"nothing heard for {self._silence_s:g} s"
        late = [job for job, due_s in self._due.items() if due_s < now_s]
        if late:
            for job in late:
                del self._due[job]
            self._slow_until_s = now_s + self._chance.uniform(*self._pause_s)
            return f"slow: {late[0]} not done in its time"
        if self._slow_until_s is not None and now_s >= self._slow_until_s:
            if self._heard_s is None:
                self._slow_until_s = now_s + self._chance.uniform(*self._pause_s)
                return ""
            self._slow_until_s = None
            return "tried again after a slow job"
        return ""

    def _settle(self, reason: str) -> Registration | None:
        if self._stores is not None:
            wanted, why = NONE, self._stores
        elif self._heard_s is None:
            wanted, why = LOCAL, self._lost
        elif self._slow_until_s is not None:
            wanted, why = LOCAL, reason or "slow"
        else:
            wanted, why = FULL, reason or ("connection back" if self.pool == LOCAL else "all tests passed")
        if wanted == self.pool:
            return None
        self.pool = wanted
        return Registration(wanted, why)
