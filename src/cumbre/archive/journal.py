"""What was done with each key, as lines that only grow: a memory that may be lost without losing anything.

Everything that a journal knows can be found out again (by hashing a file, by asking a receiver), so lines are
not synced. One file an observing day keeps each small.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from cumbre.capture.keys import SIDECAR_PART, RawKey
from cumbre.core.errors import BadFileError

DAYS_IN_MEMORY = 3
SETTLED_S = 5.0
"""Real seconds after which a file's own event must have come, if it ever comes."""


class Journal:
    """Marks of keys, by observing day; safe to use from several threads and several processes.

    A line is appended in one write under a lock on the file; what others appended is read when a mark is not
    known yet. A line that a crash tore is skipped: the next one begins on a line of its own. Only the days
    asked for last are kept in memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._days: OrderedDict[int, dict[str, frozenset[str]]] = OrderedDict()
        self._known_marks: dict[frozenset[str], frozenset[str]] = {}
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
            return self._follow(day_obs).get(key, frozenset())

    def note(self, key: str, mark: str) -> None:
        """Mark a key."""
        day_obs = RawKey.parse(key).obs_id.day_obs
        with self._lock:
            known = self._follow(day_obs)
            if mark in known.get(key, ()):
                return
            self._mark(known, key, mark)
            line = json.dumps([key, mark]).encode() + b"\n"
            with self._path(day_obs).open("a+b", buffering=0) as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                end = stream.seek(0, os.SEEK_END)
                if end and os.pread(stream.fileno(), 1, end - 1) != b"\n":
                    line = b"\n" + line
                stream.write(line)

    def _path(self, day_obs: int) -> Path:
        return self._folder / f"{day_obs}.jsonl"

    def _follow(self, day_obs: int) -> dict[str, frozenset[str]]:
        """Read what was appended since the last time."""
        found = self._days.setdefault(day_obs, {})
        self._days.move_to_end(day_obs)
        while len(self._days) > DAYS_IN_MEMORY:
            self._read_to.pop(self._days.popitem(last=False)[0], None)
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
            self._mark(found, key, mark)
        self._read_to[day_obs] = start + whole
        return found

    def _mark(self, known: dict[str, frozenset[str]], key: str, mark: str) -> None:
        """Most keys of a night have the same marks: one object stands for all of them."""
        marks = known.get(key, frozenset()) | {mark}
        known[key] = self._known_marks.setdefault(marks, marks) if len(self._known_marks) < 64 else marks


def raw_files(root: Path) -> list[RawKey]:
    """Keys of all files in a raw cache, oldest image first; files with other names are not ours."""
    keys = (key for folder in _image_folders(root) for key in _keys(root, folder.path))
    return sorted(keys, key=lambda key: key.order)


class RawRounds:
    """Looks at a raw cache again and again, without opening what has nothing left to do.

    A folder in which every file was done is listed again only after something in it changed, so that a look
    costs what is new, not what is there.

    Parameters
    ----------
    is_done
        Whether nothing is ever to be done about a key again.
    """

    def __init__(self, root: Path, is_done: Callable[[str], bool]) -> None:
        self._root, self._is_done = root, is_done
        self._finished: dict[str, int] = {}

    def left(self) -> Iterator[RawKey]:
        """Keys that are not done, oldest image first."""
        found: list[RawKey] = []
        finished: dict[str, int] = {}
        for folder in _image_folders(self._root):
            changed_ns = folder.stat().st_mtime_ns
            if self._finished.get(folder.path) == changed_ns:
                finished[folder.path] = changed_ns
                continue
            left = [key for key in _keys(self._root, folder.path) if not self._is_done(str(key))]
            found += left
            # A folder that changes just now may change once more within the same tick of its clock.
            if not left and time.time_ns() - changed_ns > SETTLED_S * 1e9:
                finished[folder.path] = changed_ns
        self._finished = finished
        yield from sorted(found, key=lambda key: key.order)


def _image_folders(root: Path) -> Iterator[os.DirEntry[str]]:
    level = [str(root)]
    for _ in range(2):
        level = [entry.path for folder in level for entry in _subfolders(folder)]
    for folder in level:
        yield from _subfolders(folder)


def _subfolders(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except FileNotFoundError:
        return []


def _keys(root: Path, folder: str) -> Iterator[RawKey]:
    prefix = os.path.relpath(folder, root)
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(BadFileError):
                yield RawKey.parse(f"{prefix}/{entry.name}")


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
