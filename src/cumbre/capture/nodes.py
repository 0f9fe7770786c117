"""Nodes of the image writer: who is alive, who writes what, what has been done.

Nodes know each other by their ``Writer.alive`` samples. Each detector of each image belongs to one live node by
rendezvous hashing, so all nodes agree without asking, and when one falls silent only its detectors move. What
was done is a line in the node's own journal in the shared folder; the others read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cumbre.core.ids import ObsId
from cumbre.stores.files import Checksummed, sha256_of, sha256_of_bytes, sync_folder, temporary_name

if TYPE_CHECKING:
    from cumbre.bus import Bus

ALIVE = "Writer.alive"
BEAT_S = 0.5


def owner(nodes: Iterable[str], *what: str) -> str:
    """Choose one of some nodes for a thing: every node that knows the same nodes chooses the same."""
    text = "\x1f".join(what)
    return max(nodes, key=lambda node: hashlib.blake2b(f"{node}\x1f{text}".encode(), digest_size=8).digest())


def at_work(live: Iterable[str], regular: Sequence[str], spares: Sequence[str]) -> list[str]:
    """Nodes that share the work: the live regular ones, and a live spare for each that is silent."""
    alive = set(live)
    working = [name for name in regular if name in alive]
    for name in spares:
        if len(working) < len(regular) and name in alive:
            working.append(name)
    return working


class Membership:
    """What one node knows of the others.

    Parameters
    ----------
    name
        This node; always alive to itself.
    regular, spares
        Names of all nodes.
    silence_s
        Real seconds after which a node counts as dead. At the start everybody counts as alive.
    """

    def __init__(
        self, bus: Bus, name: str, *, regular: Sequence[str], spares: Sequence[str], silence_s: float
    ) -> None:
        self._bus, self.name, self._silence_s = bus, name, silence_s
        self._regular, self._spares = tuple(regular), tuple(spares)
        now = time.monotonic()
        self._seen = dict.fromkeys((*regular, *spares), now)
        self._subscription = bus.subscribe([ALIVE], start="now")
        self._next_beat = 0.0

    def beat(self, pending: int) -> None:
        """Say that this node lives, twice a second at most."""
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
            self._bus.publish(ALIVE, {"name": self.name, "pending": pending, "pid": os.getpid()})

    def listen(self) -> None:
        """Take in what the others said.

        The time of hearing counts: a node that itself hung takes nobody for dead before it has listened.
        """
        for message in self._subscription.poll(0.0):
            if message.fields["name"] in self._seen:
                self._seen[message.fields["name"]] = time.monotonic()

    def working(self) -> list[str]:
        """Nodes that share the work now; this one may be none of them when it is a spare."""
        horizon = time.monotonic() - self._silence_s
        live = {name for name, seen in self._seen.items() if seen > horizon} | {self.name}
        return at_work(live, self._regular, self._spares)

    def close(self) -> None:
        """Let go of the subscription."""
        self._subscription.close()


@dataclass(frozen=True, slots=True)
class Done:
    """What became of one detector.

    Attributes
    ----------
    source
        Checksum that the camera gave for the array (empty when it gave none).
    token
        Empty for the stream; the command's identity for what was commanded.
    """

    obs_id: str
    detector: str
    source: str
    token: str
    outcome: str
    sha256: str = ""
    size: int = 0
    message: str = ""
    node: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it answers."""
        return self.obs_id, self.detector, self.source, self.token


class NodeJournals:
    """Journals of all nodes, by observing day; a node writes only its own.

    A line is written after the hop was published. Lost lines cost a repetition of something idempotent.
    """

    def __init__(self, folder: Path, node: str) -> None:
        self._folder, self._node = folder, node
        self._lock = threading.Lock()
        self._read: dict[Path, int] = {}
        self._known: dict[int, dict[tuple[str, str, str, str], Done]] = {}

    def note(self, done: Done) -> None:
        """Write what this node did."""
        day = ObsId.parse(done.obs_id).day_obs
        path = self._folder / str(day) / f"{self._node}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as stream:
            end = stream.seek(0, os.SEEK_END)
            if end:
                stream.seek(end - 1)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")  # a line torn by a crash stays alone
            stream.write(json.dumps(asdict(done)).encode() + b"\n")
        with self._lock:
            self._known.setdefault(day, {})[done.key] = done

    def look(self, day: int) -> None:
        """Read what the nodes wrote of a day since the last look."""
        for path in sorted((self._folder / str(day)).glob("*.jsonl")):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
                stream.seek(self._read.get(path, 0))
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    self._read[path] = self._read.get(path, 0) + len(line)
                    with contextlib.suppress(ValueError, TypeError):
                        done = Done(**json.loads(line))
                        with self._lock:
                            self._known.setdefault(day, {})[done.key] = done

    def find(self, obs_id: ObsId, detector: str, source: str, token: str) -> Done | None:
        """What is known of a detector."""
        with self._lock:
            return self._known.get(obs_id.day_obs, {}).get((str(obs_id), detector, source, token))

    def forget_before(self, day: int) -> None:
        """Let go of what is known of earlier days; the files stay."""
        with self._lock:
            for old in [known for known in self._known if known < day]:
                del self._known[old]
        for path in [path for path in self._read if int(path.parent.name) < day]:
            del self._read[path]


def write_once(path: Path, content: bytes) -> Checksummed | None:
    """Give a file its name only if nobody else has: whole or not at all, and never a second time.

    Returns
    -------
    Checksummed or None
        None when there was a file already; it was not touched.
    """
    with temporary_name(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return None
        sync_folder(path.parent)
    return Checksummed(path, len(content), sha256_of_bytes(content))


def described(path: Path) -> Checksummed:
    """Size and checksum of a file that is there."""
    return Checksummed(path, path.stat().st_size, sha256_of(path))
