"""Alarms of stores: one event when something begins, one when it ends, none in between."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cumbre.bus import Bus

log = logging.getLogger(__name__)

TOPIC = "Storage.alarm"


class Alarm:
    """One thing that may be wrong with a store; safe to use from several threads.

    Parameters
    ----------
    name
        What and where, e.g. ``tape-base``; the key of its last value on the bus.
    place
        Place of the store.
    """

    def __init__(self, bus: Bus, name: str, place: str) -> None:
        self._bus, self._name, self._place = bus, name, place
        self._lock = threading.Lock()
        last = bus.latest(TOPIC, key=name)
        # A process that was killed in the middle of an alarm ends it when all is well.
        self._severity = int(last.fields["severity"]) if last is not None and last.fields["active"] else 0

    @property
    def is_active(self) -> bool:
        """Whether it holds."""
        return self._severity > 0

    def begin(self, message: str, *, severity: int = 2, used: float = 0.0, backlog: int = 0) -> None:
        """Tell that it holds; told again only when it becomes worse."""
        with self._lock:
            if severity <= self._severity:
                return
            self._severity = severity
            log.error("alarm %s: %s", self._name, message)
            self._tell(message, True, severity, used, backlog)

    def end(self, message: str) -> None:
        """Tell that it holds no more."""
        with self._lock:
            if self._severity:
                log.info("alarm %s is over: %s", self._name, message)
                self._tell(message, False, self._severity, 0.0, 0)
                self._severity = 0

    def _tell(self, message: str, active: bool, severity: int, used: float, backlog: int) -> None:
        self._bus.publish(
            TOPIC,
            {
                "name": self._name, "place": self._place, "active": active, "severity": severity,
                "message": message[:2000], "used": used, "backlog": backlog,
            },
        )  # fmt: skip
