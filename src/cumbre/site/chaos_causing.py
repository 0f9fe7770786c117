"""Causing the faults of a plan at their times, and writing down what was done."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from cumbre.core.time import isot
from cumbre.simulator.faults import Fault, FaultInjector, Skipped

log = logging.getLogger(__name__)

END_S = 30.0
"""Real seconds after which a fault that cannot be ended ends the run."""
FLUSH_S = 1.0
TICK_S = 0.05


class Journal:
    """Lines of what was done, written beside the site's data and shown to the operator."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._say, self._begun = path, say, time.monotonic()
        self._unwritten: list[str] = []

    def write(self, event: str, fault: Fault, message: str = "") -> None:
        """One line: begin, end or skipped."""
        at = time.monotonic() - self._begun
        entry = {"t_s": round(at, 2), "utc": isot(time.time()), "event": event, **fault.public()}
        self._unwritten.append(json.dumps(entry | ({"message": message} if message else {})) + "\n")
        self._say(f"{event}: {fault}" + (f": {message}" if message else ""))
        self.flush()

    def flush(self) -> None:
        """The journal may lie on the disk that is full: its lines wait."""
        with contextlib.suppress(OSError):
            with self.path.open("a") as stream:
                stream.writelines(self._unwritten)
            self._unwritten.clear()


class Causing:
    """Begins and ends faults.

    Parameters
    ----------
    over
        Called when a fault has ended.

    Attributes
    ----------
    faults, skipped
        Kind → how many were caused, and how many had no object.
    """

    def __init__(self, injector: FaultInjector, journal: Journal, over: Callable[[], None]) -> None:
        self._injector, self._journal, self._over = injector, journal, over
        self.faults: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()

    def run(self, plan: Sequence[Fault], seconds: float) -> None:
        """Cause a plan until the time is over; all faults are ended when this returns, whatever happens.

        Raises
        ------
        OSError
            A fault cannot be ended.
        """
        begun = next_flush = time.monotonic()
        pending, active = list(plan), list[tuple[Fault, float]]()
        tried: dict[Fault, float] = {}
        try:
            while (now := time.monotonic()) - begun < seconds or active:
                for fault, since in list(active):
                    with contextlib.suppress(OSError):  # a full disk: at the next tick again
                        self._injector.tick(fault, now - since)
                    if now - since < fault.lasts_s:
                        continue
                    # Counted from the first try: filling a disk may have kept this loop busy for long.
                    first = tried.setdefault(fault, time.monotonic())
                    if self._end(fault, must=time.monotonic() - first > END_S):
                        active.remove((fault, since))
                while pending and pending[0].at_s <= now - begun:
                    fault = pending.pop(0)
                    if any(_same_object(fault, other) for other, _ in active):
                        self.skipped[fault.kind] += 1
                    elif self._begin(fault) and fault.lasts_s:
                        active.append((fault, time.monotonic()))
                if now >= next_flush:
                    next_flush = now + FLUSH_S
                    self._journal.flush()
                time.sleep(TICK_S)
        finally:
            deadline = time.monotonic() + END_S
            while active := [item for item in active if not self._end(item[0])]:
                if time.monotonic() > deadline:
                    break
                time.sleep(TICK_S)
            self._journal.flush()

    def _begin(self, fault: Fault) -> bool:
        try:
            message = self._injector.begin(fault)
        except (Skipped, OSError) as reason:
            # OSError: such as a full disk of the whole site, where the fault itself cannot be written down.
            self.skipped[fault.kind] += 1
            self._journal.write("skipped", fault, str(reason))
            return False
        self.faults[fault.kind] += 1
        self._journal.write("begin", fault, message)
        if not fault.lasts_s:
            self._over()
        return True

    def _end(self, fault: Fault, *, must: bool = False) -> bool:
        """End a fault; False when that has to wait for the end of another one, such as a full disk."""
        try:
            self._injector.end(fault)
        except OSError as error:
            if must:
                raise
            log.debug("%s does not end yet: %s", fault, error)
            return False
        self._over()
        self._journal.write("end", fault)
        return True


def _same_object(one: Fault, other: Fault) -> bool:
    return one.kind.split("_")[0] == other.kind.split("_")[0] and one.target == other.target
