"""Alarms: one event when something begins, one when it becomes worse, one when it ends, none in between."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from cumbre.core.time import isot, utc_from_tai

if TYPE_CHECKING:
    from cumbre.bus import Bus, Message

log = logging.getLogger(__name__)

TOPIC = "Storage.alarm"


class Alarm:
    """One thing that may be wrong; safe to use from several threads.

    Parameters
    ----------
    name
        What and where, e.g. ``tape-base``; the key of its last value on the bus.
    place
        Place of the store, if any.
    """

    def __init__(self, bus: Bus, name: str, place: str) -> None:
        self._bus, self._name, self._place = bus, name, place
        self._lock = threading.Lock()
        last = bus.latest(TOPIC, key=name)
        # A process that was killed in the middle of an alarm ends it when all is well.
        holds = last is not None and last.fields["active"]
        self._severity = int(last.fields["severity"]) if last is not None and holds else 0
        self._since_tai = begun_tai(last) if last is not None and holds else 0.0

    @property
    def is_active(self) -> bool:
        """Whether it holds."""
        return self._severity > 0

    def begin(self, message: str, *, severity: int = 2, used: float = 0.0, backlog: int = 0) -> None:
        """Tell that it holds; told again only when it becomes worse."""
        with self._lock:
            if severity <= self._severity:
                return
            log.error("alarm %s: %s", self._name, message)
            self._tell(message, True, severity, used, backlog)
            self._severity = severity  # when it was told: else it is begun again

    def end(self, message: str) -> None:
        """Tell that it holds no more."""
        with self._lock:
            if self._severity:
                log.info("alarm %s is over: %s", self._name, message)
                self._tell(message, False, self._severity, 0.0, 0)
                self._severity = 0

    def _tell(self, message: str, active: bool, severity: int, used: float, backlog: int) -> None:
        since_tai = self._since_tai or self._bus.clock.now_tai_s()
        self._bus.publish(
            TOPIC,
            {
                "name": self._name, "place": self._place, "active": active, "severity": severity,
                "message": message[:2000], "used": used, "backlog": backlog, "sinceTai": since_tai,
            },
        )  # fmt: skip
        self._since_tai = since_tai if active else 0.0


def begun_tai(message: Message) -> float:
    """When the alarm of an event began."""
    return float(message.fields["sinceTai"]) or message.snd_tai


def active_alarms(bus: Bus) -> list[dict[str, Any]]:
    """Alarms that hold, the worst first: since (UTC), component, text, severity (1 to 3), place, backlog."""
    holding = [message for message in bus.latest_all(TOPIC) if message.fields["active"]]
    holding.sort(key=lambda message: (-message.fields["severity"], begun_tai(message)))
    return [
        {
            "since": f"{isot(utc_from_tai(begun_tai(message)), 0)}Z",
            "component": message.fields["name"],
            "text": message.fields["message"],
            "severity": int(message.fields["severity"]),
            "place": message.fields["place"],
            "backlog": int(message.fields["backlog"]),
        }
        for message in holding
    ]
