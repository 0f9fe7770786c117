"""What was done with each key, as lines that only grow: a memory that may be lost without losing anything.

Everything that a journal knows can be found out again (by hashing a file, by asking a receiver), so lines are
not synced; a torn last line is cut off. One file an observing day keeps each small.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from cumbre.capture.keys import SIDECAR_PART, RawKey
from cumbre.core.errors import BadFileError


class Journal:
    """Marks of keys, by observing day; safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._days: dict[int, dict[str, set[str]]] = {}

    def has(self, key: str, mark: str) -> bool:
        """Whether a key was marked."""
        with self._lock:
            return mark in self._day(RawKey.parse(key).obs_id.day_obs).get(key, ())

    def note(self, key: str, mark: str) -> None:
        """Mark a key."""
        day_obs = RawKey.parse(key).obs_id.day_obs
        with self._lock:
            marks = self._day(day_obs).setdefault(key, set())
            if mark in marks:
                return
            marks.add(mark)
            with self._path(day_obs).open("ab") as stream:
                stream.write(json.dumps([key, mark]).encode() + b"\n")

    def _path(self, day_obs: int) -> Path:
        return self._folder / f"{day_obs}.jsonl"

    def _day(self, day_obs: int) -> dict[str, set[str]]:
        if day_obs not in self._days:
            self._days[day_obs] = self._read(day_obs)
        return self._days[day_obs]

    def _read(self, day_obs: int) -> dict[str, set[str]]:
        path = self._path(day_obs)
        found: dict[str, set[str]] = {}
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            self._folder.mkdir(parents=True, exist_ok=True)
            return found
        good = 0
        for line in content.splitlines(keepends=True):
            try:
                key, mark = json.loads(line)
                RawKey.parse(key)
            except (ValueError, TypeError, BadFileError):
                break
            if not line.endswith(b"\n"):
                break
            found.setdefault(key, set()).add(mark)
            good += len(line)
        if good < len(content):
            with path.open("r+b") as stream:
                stream.truncate(good)
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


def is_settled(path: Path) -> bool:
    """Whether a file is old enough for a scan to take it up without its event."""
    try:
        return time.time() - path.stat().st_mtime > SETTLED_S
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
