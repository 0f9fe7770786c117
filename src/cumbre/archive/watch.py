"""The watch: tells as alarms what no store tells of itself (links, database, clocks, silent services, faults).

Alarms of stores come from who uses them; here are those that need a view from outside. All are events
``Storage.alarm`` with a beginning and an end (:mod:`cumbre.archive.alarms`).
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cumbre.archive.alarms import Alarm
from cumbre.archive.pairs import link_name, relay_name
from cumbre.archive.pool import FULL
from cumbre.core.errors import CumbreError

if TYPE_CHECKING:
    from cumbre.bus import Bus, Message
    from cumbre.core.configuration import Link, Site
    from cumbre.core.time import Clock
    from cumbre.stores.postgres import Database

log = logging.getLogger(__name__)

ENTITIES = ("Archiver", "CatchUpArchiver", "EfdReplicator", "AlertProductionCluster")
LOOK_S = 1.0
SILENT_S = 15.0
"""Real seconds without a heartbeat, while others are heard, after which a service is told to be silent."""
DATABASE_S = 5.0
"""Real seconds that the database may take to answer."""
BEATS = 5
"""Heartbeats from which the clock of a service is judged."""
OFF_S = 3.0
"""Real seconds that a service's clock may differ from those of the others."""
STEP_S = 1.0
"""A larger step of the machine's clock within one look is told."""
CALM_S = 30.0
"""How long a step of the machine's clock stays on the list: nothing else ends it."""


@dataclass(slots=True)
class _Heard:
    """Last heartbeats of one process of a service."""

    pid: int
    at_s: float = 0.0
    offs_s: deque[float] = field(default_factory=lambda: deque(maxlen=BEATS))

    @property
    def off_s(self) -> float:
        """By how much its clock is ahead of ours: of the heartbeat that was under way for the shortest time."""
        return max(self.offs_s)


class _Asking(threading.Thread):
    """Asks the database each second; one that hangs holds up nothing but this thread.

    Attributes
    ----------
    answered_s
        When it answered last, monotonic.
    error
        Why it did not, "" when it did.
    restarted
        Set when another server process answers than before.
    """

    def __init__(self, db: Database) -> None:
        super().__init__(name="watch-database", daemon=True)
        self._db = db
        self._ended = threading.Event()
        self._began: object = None
        self.answered_s, self.error = time.monotonic(), ""
        self.restarted = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(LOOK_S):
            try:
                began = self._db.execute("SELECT pg_postmaster_start_time()")[0][0]
            except CumbreError as error:
                self.error = str(error)
                continue
            if self._began not in (None, began):
                self.restarted.set()
            self._began, self.error, self.answered_s = began, "", time.monotonic()

    def end(self) -> None:
        """Ask no more; one that hangs is left to its end."""
        self._ended.set()
        self.join(timeout=LOOK_S)
        if not self.is_alive():
            self._db.close()


class Watch:
    """The service; one a site.

    Parameters
    ----------
    wall
        The machine's clock, seconds.
    """

    name = "watch"

    def __init__(
        self, *, site: Site, bus: Bus, clock: Clock, db: Database, wall: Callable[[], float] = time.time
    ) -> None:
        self._bus, self._clock, self._wall = bus, clock, wall
        self._links = site.config.links
        self._alarms: dict[str, Alarm] = {}
        self._heard: dict[str, _Heard] = {}
        self._pools: dict[str, Message] = {}
        self._bad_looks: dict[str, int] = {}
        self._asking = _Asking(db)
        self._asking.start()
        self._drift_s = wall() - time.monotonic()
        self._stepped_s: float | None = None
        self._next_look = time.monotonic() + LOOK_S
        faults = [f"{name}.errorCode" for name in ENTITIES]
        self._subscription = bus.subscribe(
            ["Service.heartbeat", "Replicator.registration", *faults], start="latest"
        )

    def step(self, timeout_s: float) -> int:
        """Hear what is said, look once a second; gives the number of messages."""
        messages = self._subscription.poll(timeout_s)
        for message in messages:
            self._hear(message)
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            self._look()
        return len(messages)

    def close(self) -> None:
        """Let go of bus and database; what is told stays told."""
        self._subscription.close()
        self._asking.end()

    def _hear(self, message: Message) -> None:
        match message.topic:
            case "Service.heartbeat":
                name = str(message.fields["name"])
                off_s = self._clock.wall_s(message.snd_tai - self._clock.now_tai_s())
                heard = self._heard.get(name)
                if heard is None or heard.pid != message.fields["pid"]:
                    heard = self._heard[name] = _Heard(int(message.fields["pid"]))
                heard.at_s = time.monotonic()
                heard.offs_s.append(off_s)
            case "Replicator.registration":
                self._pools[str(message.fields["name"])] = message
            case _:
                entity = message.topic.partition(".")[0]
                why = str(message.fields["errorReport"]) or f"error {message.fields['errorCode']}"
                self._set(
                    f"component-{entity}",
                    f"{entity} is in FAULT: {why}; see: cumbre command {entity}" * bool(message.fields["errorCode"]),
                    over=f"{entity} is in no error state",
                )  # fmt: skip

    def _look(self) -> None:
        self._look_at_database()
        for link in self._links:
            self._look_at_link(link)
        self._look_at_services()
        self._look_at_wall()

    def _set(self, name: str, message: str, *, over: str, severity: int = 2) -> None:
        """Begin or, with an empty message, end an alarm."""
        if name not in self._alarms:
            self._alarms[name] = Alarm(self._bus, name, "")
        if message:
            self._alarms[name].begin(message, severity=severity)
        else:
            self._alarms[name].end(over)

    def _held(self, name: str, message: str) -> str:
        """The message when it was there at the look before, too: what passes by itself is no alarm."""
        self._bad_looks[name] = self._bad_looks.get(name, 0) + 1 if message else 0
        return message if self._bad_looks[name] > 1 else ""

    def _look_at_database(self) -> None:
        error, silent_s = self._asking.error, time.monotonic() - self._asking.answered_s
        message = ""
        if error or silent_s > DATABASE_S:
            message = f"the database does not answer: {error or f'silent for {silent_s:.0f} s'}"
        elif self._asking.restarted.is_set():
            message = "the database server had ended and was started again"
        if message:
            message += "; images are archived all the same; see postgres.log"
        self._asking.restarted.clear()
        self._set("database", message, over="the database answers", severity=3)

    def _look_at_link(self, link: Link) -> None:
        name = link_name(link.source, link.target)
        told = [self._pools.get(relay_name(link.source, pair)) for pair in range(1, link.pairs + 1)]
        away = [pair for pair in told if pair is not None and pair.fields["pool"] != FULL]
        message = ""
        if away:
            why = "; ".join(sorted({str(pair.fields["reason"]) for pair in away}))
            message = (
                f"{len(away)} of {link.pairs} pairs do not send ({why}); images wait in the outage buffer of "
                f"{link.source}; call network operations"
            )
        severity = 3 if len(away) == link.pairs else 2 if 2 * len(away) >= link.pairs else 1
        self._set(
            f"network-{name}", self._held(name, message), severity=severity,
            over=f"all {link.pairs} pairs send",
        )  # fmt: skip

    def _look_at_services(self) -> None:
        if not self._heard:
            return
        newest = max(heard.at_s for heard in self._heard.values())
        middle = statistics.median(heard.off_s for heard in self._heard.values())
        for name, heard in self._heard.items():
            silent_s = newest - heard.at_s
            self._set(
                f"service-{name}",
                f"no heartbeat of {name} for {silent_s:.0f} s; see logs/{name}.log" * (silent_s > SILENT_S),
                over=f"{name} is heard",
            )
            off_s = heard.off_s - middle
            is_off = len(heard.offs_s) > 1 and abs(off_s) > OFF_S
            self._set(
                f"clock-{name}",
                f"the clock of {name} is {off_s:+.1f} s from the others; see: cumbre doctor" * is_off,
                over=f"{name} has the time of the others",
            )

    def _look_at_wall(self) -> None:
        now = time.monotonic()
        drift_s = self._wall() - now
        step_s, self._drift_s = drift_s - self._drift_s, drift_s
        if abs(step_s) > STEP_S:
            self._stepped_s = now
            message = f"this machine's clock stepped by {step_s:+.1f} s; night time goes on unchanged"
            self._set("clock-machine", message, over="")
        elif self._stepped_s is None or now - self._stepped_s > CALM_S:
            self._stepped_s = None
            self._set("clock-machine", "", over=f"no step for {CALM_S:.0f} s")
