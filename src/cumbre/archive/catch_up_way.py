"""One link of the Catch-Up Archiver: a queue, and connections of its own in the pool ``catch-up``."""

from __future__ import annotations

import heapq
import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cumbre.archive.addresses import route
from cumbre.archive.owed import Finder, Owed
from cumbre.archive.sender import Sender
from cumbre.core.errors import CumbreError, NotFoundError

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Link, Site

log = logging.getLogger(__name__)

POOL = "catch-up"
BEAT_S = 1.0
PING_S = 5.0


class Pace:
    """A bandwidth cap that several threads share."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def reserve(self, size: int) -> float:
        """Real seconds to wait before sending so many bytes."""
        if self._rate is None:
            return 0.0
        with self._lock:
            begin = max(self._free_at, time.monotonic())
            self._free_at = begin + size / self._rate
            return begin - time.monotonic()


@dataclass(order=True)
class Work:
    """A file on its way, and how often it was tried; the oldest image comes first."""

    order: tuple[Any, ...]
    owed: Owed = field(compare=False)
    attempts: int = field(default=0, compare=False)


class Way:
    """One link: a queue and threads that each have a connection of their own."""

    def __init__(self, *, site: Site, bus: Bus, link: Link, finder: Finder) -> None:
        self.finder, self._site, self._bus, self._link = finder, site, bus, link
        self.name = f"{link.source}-{link.target}"
        settings = site.config.catch_up
        limit = settings.bandwidth_mbit_s
        self._pace = Pace(limit * 125e3 if limit else None)
        self.results: queue.SimpleQueue[tuple[Work, dict[str, Any] | CumbreError]] = queue.SimpleQueue()
        self._wake = threading.Condition()
        self._waiting: list[Work] = []
        self.on_way: set[str] = set()
        self.later: dict[str, tuple[float, int]] = {}
        """Keys that failed: monotonic time before which they are left alone, and tries so far."""
        self.sent_bytes = 0
        self._pools: dict[int, str] = {}
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, args=(n,), name=f"catch-up-{n}", daemon=True)
            for n in range(1, settings.connections + 1)
        ]
        for thread in self._threads:
            thread.start()

    def forget(self) -> None:
        """Forget tries of long ago."""
        long_ago = time.monotonic() - 3600.0
        for key in [key for key, (not_before, _) in self.later.items() if not_before < long_ago]:
            del self.later[key]

    def skips(self, key: str) -> bool:
        """Whether a file is on its way, or was tried a moment ago."""
        return key in self.on_way or time.monotonic() < self.later.get(key, (0.0, 0))[0]

    def add(self, owed: Owed) -> None:
        """Queue a file."""
        key = owed.parcel.key
        if self.skips(key):
            return
        with self._wake:
            self.on_way.add(key)
            heapq.heappush(self._waiting, Work(owed.key.order, owed, self.later.get(key, (0.0, 0))[1]))
            self._wake.notify()

    def clear(self) -> None:
        """Begin nothing more; what runs ends."""
        with self._wake:
            for work in self._waiting:
                self.on_way.discard(work.owed.parcel.key)
                self.finder.release(work.owed)
            self._waiting.clear()

    @property
    def waiting(self) -> int:
        """Files that are queued."""
        return len(self._waiting)

    def close(self) -> None:
        """Stop the threads and leave the pool."""
        self._closed = True
        with self._wake:
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(timeout=2.0)

    def beat(self) -> None:
        """Heartbeats of the connections that stand."""
        for number, pool in list(self._pools.items()):
            self._bus.publish(
                "Replicator.heartbeat",
                {
                    "name": self._role(number), "link": self.name, "pair": number, "pool": pool,
                    "queued": len(self._waiting), "bytesPerS": self.sent_bytes / BEAT_S / len(self._pools),
                },
            )  # fmt: skip
        self.sent_bytes = 0

    def _role(self, number: int) -> str:
        return f"catch-up-{self.name}-{number}"

    def _serve(self, number: int) -> None:
        """Loop of one connection."""
        sender: Sender | None = None
        pause_s, pinged = 0.2, 0.0
        while not self._closed:
            try:
                if sender is None:
                    pair = (number - 1) % self._link.pairs + 1
                    sender = Sender.to(self._site, self._link.source, self._link.target, pair=pair)
                    sender.ping()
                    self._register(number, POOL, "connected")
                    pause_s, pinged = 0.2, time.monotonic()
                work = self._next()
                if work is not None:
                    self._send(sender, work)
                    pinged = time.monotonic()
                elif time.monotonic() - pinged > PING_S:
                    sender.ping()
                    pinged = time.monotonic()
            except Exception as error:
                # The loop of a worker: one file must never stop the link.
                if self._pools.get(number):
                    log.warning("%s: %s", self._role(number), error)
                if sender is not None:
                    sender.close()
                    sender = None
                self._register(number, "", str(error))
                with self._wake:
                    self._wake.wait(pause_s)
                pause_s = min(pause_s * 2, 5.0)
        if sender is not None:
            sender.close()
        self._register(number, "", "stopped")

    def _next(self) -> Work | None:
        with self._wake:
            if not self._waiting:
                self._wake.wait(0.2)
            return heapq.heappop(self._waiting) if self._waiting and not self._closed else None

    def _send(self, sender: Sender, work: Work) -> None:
        work.attempts += 1
        before = sender.sent_bytes
        try:
            end = time.monotonic() + self._pace.reserve(work.owed.parcel.size)
            while not self._closed and (left := end - time.monotonic()) > 0:
                time.sleep(min(left, 0.5))
            answer = sender.deliver(work.owed.parcel, work.owed.path, ask_first=True)
        except CumbreError as error:
            self.results.put((work, error))
            raise
        except OSError as error:
            self.results.put((work, NotFoundError(f"{work.owed.path}: {error}")))
            raise
        self.sent_bytes += sender.sent_bytes - before
        self.results.put((work, answer))

    def _register(self, number: int, pool: str, reason: str) -> None:
        if self._pools.get(number, "") == pool:
            return
        if pool:
            self._pools[number] = pool
        else:
            self._pools.pop(number, None)
        try:
            address = ":".join(map(str, route(self._site, self._link.source, self._link.target)))
        except CumbreError:
            address = ""
        self._bus.publish(
            "Replicator.registration",
            {
                "name": self._role(number), "link": self.name, "pair": number, "pool": pool,
                "reason": reason[:500], "address": address,
            },
        )  # fmt: skip
