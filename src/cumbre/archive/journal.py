"""What was done with each key, as lines that only grow: a memory that may be lost without losing anything.

Everything that a journal knows can be found out again (by hashing a file, by asking a receiver), so lines are
not synced. One file an observing day keeps each small.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from pathlib import Path

from cumbre.capture.keys import SIDECAR_PART, RawKey
from cumbre.core.errors import BadFileError


class Journal:
    """Marks of keys, by observing day; safe to use from several threads and several processes.

    A line is appended in one write under a lock on the file; what others appended is read when a mark is not
    known yet. A line that a crash tore is skipped: the next one begins on a line of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._days: dict[int, dict[str, set[str]]] = {}
        self._read_to: dict[int, int] = {}

    def has(self, key: str, mark: str) -> bool:
        """Whether a key was marked, by whomever."""
        day_obs = RawKey.parse(key).obs_id.day_obs
        with self._lock:
            if mark in self._days.get(day_obs, {}).get(key, ()):
                return True
            return mark in self._follow(day_obs).get(key, ())

    def marks(self, key: str) -> frozenset[str]:
        """All marks of a key."""
        day_obs = RawKey.parse(key).obs_id.day_obs
        with self._lock:
            return frozenset(self._follow(day_obs).get(key, ()))

    def note(self, key: str, mark: str) -> None:
        """Mark a key."""
        day_obs = RawKey.parse(key).obs_id.day_obs
        with self._lock:
            marks = self._follow(day_obs).setdefault(key, set())
            if mark in marks:
                return
            marks.add(mark)
            line = json.dumps([key, mark]).encode() + b"\n"
            with self._path(day_obs).open("a+b", buffering=0) as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                end = stream.seek(0, os.SEEK_END)
                if end and os.pread(stream.fileno(), 1, end - 1) != b"\n":
                    line = b"\n" + line
                stream.write(line)

    def _path(self, day_obs: int) -> Path:
        return self._folder / f"{day_obs}.jsonl"

    def _follow(self, day_obs: int) -> dict[str, set[str]]:
        """Read what was appended since the last time."""
        found = self._days.setdefault(day_obs, {})
        start = self._read_to.get(day_obs, 0)
        try:
            if self._path(day_obs).stat().st_size <= start:
                return found
            with self._path(day_obs).open("rb") as stream:
                stream.seek(start)
                content = stream.read()
        except FileNotFoundError:
            return found
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].splitlines():
            try:
                key, mark = json.loads(line)
                RawKey.parse(key)
            except (ValueError, TypeError, BadFileError):
                continue
            found.setdefault(key, set()).add(mark)
        self._read_to[day_obs] = start + whole
        return found


def raw_files(root: Path) -> list[RawKey]:
    """Keys of all files in a raw cache, oldest image first; files with other names are not ours."""
    found = []
    for path in root.glob("*/*/*/*"):
        try:
            found.append(RawKey.parse(str(path.relative_to(root))))
        except BadFileError:
            continue
    return sorted(found, key=lambda key: key.order)


SETTLED_S = 5.0
"""Real seconds after which a file's own event must have come, if it ever comes."""


def is_settled(path: Path, seconds: float = SETTLED_S) -> bool:
    """Whether a file is old enough for a scan to take it up without its event."""
    try:
        return time.time() - path.stat().st_mtime > seconds
    except FileNotFoundError:
        return False


def group_of(path: Path) -> str:
    """Group of an image from the header sidecar beside a file, for files found without their event."""
    for sidecar in path.parent.glob(f"*_{SIDECAR_PART}.json"):
        try:
            header = json.loads(sidecar.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(header, dict):
            return str(header.get("group_id", ""))[:256]
    return ""
