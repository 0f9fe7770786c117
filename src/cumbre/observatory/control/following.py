"""For services that an entity leads: whether they may work, by what the entity published last."""

from __future__ import annotations

import json
import time
from typing import Any

from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.observatory.control.epochs import EpochGuard

LOOK_S = 0.3
ENABLED = "enabled"


class Follower:
    """The state of an entity as its service follows it.

    A site whose configuration has no control (``archive.control: false``), or whose entity has never spoken,
    works as if enabled.

    Parameters
    ----------
    entity
        Component, e.g. ``EfdReplicator``.
    """

    def __init__(self, site: Site, bus: Bus, entity: str) -> None:
        self._bus, self._topic = bus, f"{entity}.detailedState"
        self._led = site.config.archive.control
        self._guard = EpochGuard()
        self._state: dict[str, Any] | None = None
        self._next = 0.0

    @property
    def state(self) -> dict[str, Any] | None:
        """Fields of the last detailedState, looked up at most every 0.3 s; None when it never spoke."""
        if time.monotonic() >= self._next:
            self.look()
        return self._state

    def look(self) -> None:
        """Read the state as it is now: what is decided for good is not decided on one that may be 0.3 s old."""
        self._next = time.monotonic() + LOOK_S
        last = self._bus.latest(self._topic)
        # a former control system's late word does not count; its successor repeats its own
        if last is not None and self._guard.accepts(last.fields):
            self._state = last.fields

    @property
    def is_enabled(self) -> bool:
        """Whether new events and data may be taken up."""
        return not self._led or (state := self.state) is None or state["processing"] == ENABLED

    @property
    def mode_processes(self) -> bool:
        """Whether the configuration in force has an event that begins work (``trigger`` other than none)."""
        return self.settings.get("trigger") != "none"

    @property
    def mode(self) -> str:
        """Configuration in force; "" for none."""
        return str((self.state or {}).get("configurationName", "")) if self._led else ""

    @property
    def settings(self) -> dict[str, Any]:
        """Parameters of the configuration in force."""
        return dict(json.loads((self.state or {}).get("settings") or "{}")) if self._led else {}
