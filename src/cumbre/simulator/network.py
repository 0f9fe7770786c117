"""A simulated network link: a TCP proxy with latency, a bandwidth cap and outages that can be commanded.

It listens once for each pair of the link and leads to the distributor of the same number; the bandwidth is
shared by all of them. What travels inside (TLS) is nothing to it.

``run/link-<source>-<target>.json`` controls it while it runs::

    {"down": true, "latency_ms": 60, "bandwidth_mbit_s": 1000, "corrupt": 0.01}

``corrupt`` is the part of chunks in which one bit is flipped. Keys that are absent keep the site's values.
While it is down, connections are cut and new ones refused.
Latency and bandwidth are those of the night: on a clock that runs six times faster both shrink and grow.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import random
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cumbre.archive.addresses import link_of, read_address, write_address
from cumbre.archive.pairs import distributor_name
from cumbre.core.errors import TransientError
from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

CHUNK_BYTES = 64 << 10
IN_FLIGHT_CHUNKS = 256
CONTROL_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class LinkState:
    """How the link behaves now: one-way latency in night ms, bandwidth in Mbit per night second (None = all)."""

    down: bool = False
    latency_ms: float = 0.0
    bandwidth_mbit_s: float | None = None
    corrupt: float = 0.0


def control_link(
    site: Site,
    source: str,
    target: str,
    *,
    down: bool | None = None,
    latency_ms: float | None = None,
    bandwidth_mbit_s: float | None = None,
    corrupt: float | None = None,
) -> None:
    """Change a running link; what is None goes back to the site's value."""
    said = {
        "down": down, "latency_ms": latency_ms, "bandwidth_mbit_s": bandwidth_mbit_s, "corrupt": corrupt
    }  # fmt: skip
    content = {key: value for key, value in said.items() if value is not None}
    write_atomic(site.path(f"run/link-{source}-{target}.json"), json.dumps(content).encode())


def _flipped(chunk: bytes) -> bytes:
    """The bytes with one bit wrong."""
    damaged = bytearray(chunk)
    damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
    return bytes(damaged)


class _Meter:
    """One direction's share of the bandwidth: every connection waits its turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at = 0.0

    def reserve(self, size: int, bytes_per_s: float | None) -> float:
        """Monotonic time at which ``size`` bytes have left."""
        now = time.monotonic()
        if bytes_per_s is None:
            return now
        with self._lock:
            self._free_at = max(self._free_at, now) + size / bytes_per_s
            return self._free_at


class LinkProxy:
    """One link of the site."""

    def __init__(self, *, site: Site, bus: Bus | None = None, clock: Clock, source: str, target: str) -> None:
        del bus  # every service is made alike; the network itself says nothing
        self.name = f"wan-{source}-{target}"
        self._site, self._clock, self._source, self._target = site, clock, source, target
        self._link = link_of(site, source, target)
        self._control = site.path(f"run/link-{source}-{target}.json")
        self._meters = {"out": _Meter(), "back": _Meter()}
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closed = False
        self._moved = 0
        self.state = LinkState()
        self._refresh()
        self._listeners = [
            socket.create_server(("127.0.0.1", 0), backlog=64) for _ in range(self._link.pairs)
        ]
        for pair, listener in enumerate(self._listeners, 1):
            write_address(site, f"{self.name}-{pair}", listener.getsockname()[:2])
            threading.Thread(target=self._accept, args=(listener, pair), daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """Where the sender of the first pair finds it."""
        host, port = self._listeners[0].getsockname()[:2]
        return host, port

    def step(self, timeout_s: float) -> int:
        """Follow the control file for a while; gives the number of chunks moved."""
        end = time.monotonic() + timeout_s
        before = self._moved
        while True:
            self._refresh()
            left = end - time.monotonic()
            if left <= 0 or self._closed:
                return self._moved - before
            time.sleep(min(CONTROL_EVERY_S, left))

    def close(self) -> None:
        """Cut everything."""
        self._closed = True
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._cut()

    def _refresh(self) -> None:
        said: dict[str, object] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = json.loads(self._control.read_bytes())
            said = found if isinstance(found, dict) else {}
        latency, bandwidth, corrupt = (said.get(key) for key in ("latency_ms", "bandwidth_mbit_s", "corrupt"))
        was_down = self.state.down
        self.state = LinkState(
            said.get("down") is True,
            float(latency) if isinstance(latency, int | float) else self._link.latency_ms,
            float(bandwidth)
            if isinstance(bandwidth, int | float) and bandwidth > 0
            else self._link.bandwidth_mbit_s,
            float(corrupt) if isinstance(corrupt, int | float) else 0.0,
        )
        if self.state.down:
            self._cut()
        if self.state.down != was_down:
            log.info("%s is %s", self.name, "down" if self.state.down else "up")

    def _cut(self) -> None:
        with self._lock:
            for item in self._sockets:
                with contextlib.suppress(OSError):
                    item.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket, pair: int) -> None:
        """Take the connections of one pair's sender to the distributor of the same number."""
        receiver = distributor_name(self._target, pair)
        while not self._closed:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            self._refresh()
            if self.state.down:
                near.close()
                continue
            try:
                far = socket.create_connection(read_address(self._site, receiver), timeout=5.0)
            except (OSError, TransientError) as error:
                log.warning("%s: %s does not answer: %s", self.name, receiver, error)
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._sockets |= {near, far}
            for item in (near, far):
                item.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for taken, given, way in ((near, far, "out"), (far, near, "back")):
                threading.Thread(target=self._pump, args=(taken, given, way), daemon=True).start()

    def _pump(self, taken: socket.socket, given: socket.socket, way: str) -> None:
        """Carry bytes one way: they leave at the link's pace and arrive one latency later."""
        flying: queue.Queue[tuple[float, bytes]] = queue.Queue(maxsize=IN_FLIGHT_CHUNKS)
        threading.Thread(target=self._deliver, args=(flying, given), daemon=True).start()
        try:
            while chunk := taken.recv(CHUNK_BYTES):
                state = self.state
                if state.corrupt and random.random() < state.corrupt:
                    chunk = _flipped(chunk)
                rate = state.bandwidth_mbit_s
                bytes_per_s = rate * 1e6 / 8 * self._clock.rate if rate else None
                left_at = self._meters[way].reserve(len(chunk), bytes_per_s)
                if (wait := left_at - time.monotonic()) > 0:
                    time.sleep(wait)
                flying.put((left_at + self._clock.wall_s(state.latency_ms / 1e3), chunk))
                self._moved += 1
        except OSError:
            pass
        finally:
            flying.put((0.0, b""))

    def _deliver(self, flying: queue.Queue[tuple[float, bytes]], given: socket.socket) -> None:
        """Hand over what has travelled long enough; an empty chunk is the end of this direction."""
        broken = False
        while True:
            due, chunk = flying.get()
            if not chunk:
                break
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            if broken or self.state.down:
                continue  # lost on the way; the queue is still emptied so that the other thread never hangs
            try:
                given.sendall(chunk)
            except OSError:
                broken = True
        with contextlib.suppress(OSError):
            given.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._sockets.discard(given)
        given.close()
