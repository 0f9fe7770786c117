"""What one pair knows of its link: it pings its distributor, tests its stores, and registers in a pool."""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.addresses import link_of, route
from cumbre.archive.pairs import link_name
from cumbre.archive.pool import (
    DISTRIBUTOR,
    FULL,
    NONE,
    Beat,
    Checked,
    Ended,
    Event,
    Lost,
    Pool,
    Started,
    Tick,
)
from cumbre.archive.sender import Sender
from cumbre.core.errors import CumbreError

if TYPE_CHECKING:
    from cumbre.archive.jobs import Job
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site

log = logging.getLogger(__name__)

BEAT_EVERY_S = 1.0
PING_EVERY_S = 2.0
TEST_EVERY_S = 15.0
"""Real seconds."""


class LinkWatch:
    """The pool of one pair, kept by threads of its own so that a long step does not look like a dead pair.

    Parameters
    ----------
    queued
        How many files wait.
    stores
        Tests the own stores; gives name → what is wrong.
    changed
        Called when the pool changed.
    """

    def __init__(
        self,
        *,
        site: Site,
        bus: Bus,
        source: str,
        target: str,
        pair: int,
        name: str,
        queued: Callable[[], int],
        stores: Callable[[], dict[str, str]],
        changed: Callable[[], None],
    ) -> None:
        self._site, self._bus, self._source, self._target = site, bus, source, target
        self._who = {"name": name, "link": link_name(source, target), "pair": pair}
        self._pair, self._expected_s = pair, link_of(site, source, target).expected_s
        self._queued, self._stores, self._changed = queued, stores, changed
        self._lock = threading.Lock()
        self._machine = Pool(random.Random())
        self._sent = 0
        self._announcements: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._look = threading.Event()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._ping_forever, name=f"{name}-ping", daemon=True),
            threading.Thread(target=self._beat_forever, name=f"{name}-beat", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pool(self) -> str:
        """Pool that it is registered in."""
        return self._machine.pool

    def close(self) -> None:
        """Unregister and stop."""
        self._closed.set()
        self._look.set()
        for thread in self._threads:
            thread.join(timeout=1.0)
        if self.pool != NONE:
            self._publish(NONE, "stopped")

    def doubt(self) -> None:
        """A transfer failed: look at once whether the distributor still answers."""
        self._look.set()

    def announce(self, job: Job) -> None:
        """Tell the distributor what will come."""
        self._announcements.put(
            {
                "obs_id": job.obs_id,
                "instrument": job.instrument,
                "part": job.part,
                "detectors": sorted(job.detectors),
                "mode": job.mode,
            }
        )
        self._look.set()

    def started(self, what: str) -> None:
        """Something shall be sent within the expected time."""
        self._handle(Started(time.monotonic(), what, self._expected_s))

    def ended(self, what: str) -> None:
        """It was sent, or left to others."""
        self._handle(Ended(time.monotonic(), what))

    def sent(self, size: int) -> None:
        """So many bytes have left."""
        with self._lock:
            self._sent += size

    def _handle(self, event: Event) -> None:
        with self._lock:
            registration = self._machine.handle(event)
            if registration is None:
                return
            # Told under the lock, so that two threads never tell in another order than they happened.
            self._publish(registration.pool, registration.reason)
        log.info("%s: %s", registration.pool or "in no pool", registration.reason)
        self._changed()

    def _publish(self, pool: str, reason: str) -> None:
        try:
            host, port = route(self._site, self._source, self._target, self._pair)
            address = f"{host}:{port}"
        except CumbreError:
            address = ""
        try:
            said = self._who | {"pool": pool, "reason": reason[:500], "address": address}
            self._bus.publish("Replicator.registration", said)
        except Exception as error:
            # The bus may be away: sending goes on, the next registration tells.
            log.error("registration not told: %s", error)

    def _ping_forever(self) -> None:
        sender: Sender | None = None
        tested = -TEST_EVERY_S
        while not self._closed.is_set():
            self._look.clear()
            now = time.monotonic()
            why = ""
            try:
                if sender is None:
                    sender = Sender.to(self._site, self._source, self._target, pair=self._pair)
                sender.ping()
                while not self._announcements.empty():
                    sender.expect(self._announcements.get_nowait())
            except Exception as error:
                # The loop of a worker: whatever is wrong with the link, it is looked at again.
                why = str(error) or type(error).__name__
                if sender is not None:
                    sender.close()
                    sender = None
            if now - tested >= TEST_EVERY_S or self.pool == NONE:
                tested = now
                failures = self._stores() | ({DISTRIBUTOR: why} if why else {})
                self._handle(Checked(time.monotonic(), failures))
            else:
                self._handle(Lost(time.monotonic(), why) if why else Beat(time.monotonic()))
            self._look.wait(PING_EVERY_S if self.pool == FULL else PING_EVERY_S / 2)
            if why:
                self._closed.wait(0.2)  # failures may come faster than it makes sense to try
        if sender is not None:
            sender.close()

    def _beat_forever(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(BEAT_EVERY_S):
            now = time.monotonic()
            self._handle(Tick(now))
            with self._lock:
                sent, self._sent = self._sent, 0
            said = self._who | {
                "pool": self.pool,
                "queued": self._queued(),
                "bytesPerS": sent / max(now - last, 1e-3),
            }
            last = now
            try:
                self._bus.publish("Replicator.heartbeat", said)
            except Exception as error:
                log.warning("heartbeat not told: %s", error)


def probe_folders(folders: Mapping[str, Path]) -> dict[str, str]:
    """Names of folders that cannot be written, with the reason."""
    failures = {}
    for name, folder in folders.items():
        probe = folder / f".probe-{os.getpid()}-{threading.get_ident()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"probe")
            probe.unlink()
        except OSError as error:
            failures[name] = str(error)
    return failures
