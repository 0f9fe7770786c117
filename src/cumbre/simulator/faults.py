"""Faults that a test or ``cumbre chaos`` causes: processes, links, disks, tapes, clock, sensors, the bus.

Each fault begins, lasts, and ends; ending puts back what it took away. Nothing here knows what should happen
then: the site must get along, and :mod:`cumbre.site.proof` says whether it did.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cumbre.archive.tape import view_tape
from cumbre.core.configuration import Site
from cumbre.core.errors import CumbreError, NotFoundError, UserError
from cumbre.core.time import Clock
from cumbre.simulator.camera import GARBAGE, SILENT, break_sensors, broken_sensors
from cumbre.simulator.network import control_link

BALLAST = ".ballast"
AWAY = ".away"
WORKER_MIN_BYTES = 80e6
WHOLE_SITE = "site"
STORES = (
    "summit/daq", "summit/raw", "summit/buffer", "base/raw", "base/buffer", "base/tape", "archive/raw",
    "archive/tape",
)  # fmt: skip
"""Stores that get a disk of their own."""
CACHES = ("summit/raw", "summit/buffer", "base/buffer", "base/raw", "archive/raw")
"""Where bytes rot."""


@dataclass(frozen=True, slots=True, eq=False)
class Fault:
    """One thing that goes wrong, ``at_s`` real seconds after the beginning, for ``lasts_s``.

    Attributes
    ----------
    kind
        One of :data:`KINDS`.
    target
        Role, link, store, place or detector.
    details
        Numbers that belong to it: bandwidth, step, period…
    """

    at_s: float
    kind: str
    target: str
    lasts_s: float = 0.0
    details: dict[str, float] = field(default_factory=dict)

    def public(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    def __str__(self) -> str:
        more = ", ".join(f"{key} {value:g}" for key, value in self.details.items())
        lasts = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.kind} {self.target}{lasts}" + (f" ({more})" if more else "")


class Skipped(Exception):  # noqa: N818 (no error: the fault has no object now)
    """The fault could not be caused; the text says why."""


class FaultInjector:
    """Begins and ends faults of one site.

    Parameters
    ----------
    pids
        Gives the present processes: role (also ``postgres`` and ``supervisor``) → pid.
    chance
        Chooses bytes and files; not what happens when.

    Attributes
    ----------
    rotten_tape
        Where on tapes bytes were changed, as their entries' ``place``.
    """

    def __init__(self, site: Site, *, pids: Callable[[], dict[str, int]], chance: random.Random) -> None:
        self.site, self._pids, self._chance = site, pids, chance
        self._begin: dict[str, Callable[[Fault], str]] = {
            "kill_service": self._kill,
            "kill_database": self._kill,
            "kill_supervisor": self._kill,
            "kill_worker": self._kill_worker,
            "hang_service": self._stop,
            "hang_database": self._stop,
            "link_down": lambda f: self._link(f, down=True),
            "link_slow": self._slow,
            "link_flapping": lambda f: self._link(f, down=True),
            "link_corrupt": lambda f: self._link(f, corrupt=f.details["part"]),
            "disk_full": self._fill,
            "rotten_file": self._rot,
            "rotten_tape": self._rot_tape,
            "tape_away": self._folder_away,
            "buffer_store_away": self._folder_away,
            "clock_step": self._step_clock,
            "sensor_silent": lambda f: self._sensor(f, SILENT),
            "sensor_garbage": lambda f: self._sensor(f, GARBAGE),
            "bus_locked": self._lock_bus,
        }
        self._end: dict[str, Callable[[Fault], None]] = {
            "hang_service": self._continue,
            "hang_database": self._continue,
            "link_down": self._link_up,
            "link_slow": self._link_up,
            "link_flapping": self._link_up,
            "link_corrupt": self._link_up,
            "disk_full": self._empty,
            "tape_away": self._folder_back,
            "buffer_store_away": self._folder_back,
            "clock_step": self._clock_back,
            "sensor_silent": self._sensor_back,
            "sensor_garbage": self._sensor_back,
            "bus_locked": self._unlock_bus,
        }
        self.rotten_tape: set[str] = set()
        self._stopped: dict[Fault, list[psutil.Process]] = {}
        self._stepped: dict[Fault, tuple[Clock, set[int]]] = {}
        self._locks: dict[Fault, sqlite3.Connection] = {}

    def begin(self, fault: Fault) -> str:
        """Make it happen; gives what was done.

        Raises
        ------
        Skipped
            There was nothing to do it to.
        UserError
            No such kind.
        """
        if fault.kind not in self._begin:
            raise UserError(f"fault {fault.kind!r}: expected one of {', '.join(self._begin)}")
        return self._begin[fault.kind](fault)

    def end(self, fault: Fault) -> None:
        """Put back what :meth:`begin` took away."""
        if fault.kind in self._end:
            self._end[fault.kind](fault)

    def tick(self, fault: Fault, age_s: float) -> None:
        """Go on with a fault that changes while it lasts."""
        if fault.kind == "link_flapping":
            self._link(fault, down=int(age_s / fault.details["period_s"]) % 2 == 0)

    # processes

    def _pid(self, name: str) -> int:
        pid = self._pids().get(name)
        if not pid:
            raise Skipped(f"{name} was not running")
        return pid

    def _kill(self, fault: Fault) -> str:
        pid = self._pid(fault.target)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            raise Skipped(f"{fault.target} had just ended") from None
        return f"pid {pid}"

    def _kill_worker(self, fault: Fault) -> str:
        pid = self._pid(fault.target)
        try:
            below = psutil.Process(pid).children(recursive=True)
            workers = [process for process in below if process.memory_info().rss > WORKER_MIN_BYTES]
            if not workers:
                raise Skipped(f"{fault.target} has no worker yet")
            chosen = self._chance.choice(workers)
            chosen.kill()
        except psutil.NoSuchProcess:
            raise Skipped("it had just ended") from None
        return f"pid {chosen.pid}"

    def _stop(self, fault: Fault) -> str:
        pid = self._pid(fault.target)
        try:
            process = psutil.Process(pid)
            hung = [process, *(process.children(recursive=True) if fault.kind == "hang_database" else [])]
            for one in hung:
                one.suspend()
        except psutil.NoSuchProcess:
            raise Skipped("it had just ended") from None
        self._stopped[fault] = hung
        return f"pid {pid}"

    def _continue(self, fault: Fault) -> None:
        for process in self._stopped.pop(fault, []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    # links

    def _link(self, fault: Fault, **how: Any) -> str:
        source, _, target = fault.target.partition("-")
        control_link(self.site, source, target, **how)
        return ""

    def _slow(self, fault: Fault) -> str:
        return self._link(
            fault,
            bandwidth_mbit_s=fault.details["bandwidth_mbit_s"],
            latency_ms=fault.details["latency_ms"],
        )

    def _link_up(self, fault: Fault) -> None:
        self._link(fault)

    # disks

    def _fill(self, fault: Fault) -> str:
        folder = self.site.root if fault.target == WHOLE_SITE else self.site.path(fault.target)
        if not folder.is_mount():
            raise Skipped(f"{folder} is not a disk of its own (needs root)")
        return f"{fill_disk(folder)} bytes of ballast"

    def _empty(self, fault: Fault) -> None:
        folder = self.site.root if fault.target == WHOLE_SITE else self.site.path(fault.target)
        (folder / BALLAST).unlink(missing_ok=True)

    def _rot(self, fault: Fault) -> str:
        folder = self.site.path(fault.target)
        files = sorted(p for p in folder.rglob("*.fits*") if not p.name.startswith("."))
        if not files:
            raise Skipped(f"{folder} is empty")
        path = self._chance.choice(files[-40:])
        try:
            offset = flip_bit(path, self._chance)
        except (FileNotFoundError, ValueError):
            raise Skipped(f"{path} had just gone") from None
        return f"{path.relative_to(self.site.root)} byte {offset}"

    def _rot_tape(self, fault: Fault) -> str:
        """One byte of a file on a volume: of what was written last, where the writer is at work."""
        folder = self.site.path(fault.target)
        place = next(name for name, item in self.site.config.places.items() if item.tape == fault.target)
        try:
            index, _ = view_tape(self.site, place)
            entries = [entry for entry in index.entries.values() if entry.place not in self.rotten_tape]
            if not entries:
                raise Skipped(f"{folder} is empty")
            entry = self._chance.choice(entries[-40:])
            offset = flip_bit(folder / entry.volume, self._chance, entry.offset, entry.size)
        except (CumbreError, OSError) as error:
            raise Skipped(str(error)) from None
        self.rotten_tape.add(entry.place)  # volumes are named after their place
        return f"{entry.key} on {entry.volume}, byte {offset}"

    def _folder_away(self, fault: Fault) -> str:
        folder = self.site.path(fault.target)
        if folder.is_mount():
            # What happens when a file system drops out: below its mount point is an empty folder.
            subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=4k", "none", str(folder)], check=True)
            return "an empty read-only folder lies over it"
        if not folder.is_dir():
            raise Skipped(f"{folder} is not there")
        folder.rename(folder.with_name(folder.name + AWAY))
        return "folder moved away"

    def _folder_back(self, fault: Fault) -> None:
        folder = self.site.path(fault.target)
        away = folder.with_name(folder.name + AWAY)
        if away.is_dir():
            if folder.is_dir():
                # Written in its absence: the disk that comes back hides this, as a mount would.
                folder.rename(folder.with_name(f"{folder.name}.interim-{time.monotonic_ns()}"))
            away.rename(folder)
        else:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        if fault.details.get("lost"):
            # An empty disk in the place of the one that broke.
            for item in folder.iterdir():
                shutil.rmtree(item) if item.is_dir() else item.unlink()

    # clock

    def _step_clock(self, fault: Fault) -> str:
        before = Clock.load(self.site.clock_path)
        step = fault.details["step_s"]
        Clock(before.tai0_s + step, before.mono0_s, before.rate).save(self.site.clock_path)
        self._stepped[fault] = (before, set(self._pids().values()))
        # A process reads the clock when it starts: this one now lives in another time than the others.
        with contextlib.suppress(Skipped, ProcessLookupError):
            os.kill(self._pid(fault.target), signal.SIGTERM)
        return f"{step:+.0f} s of night time"

    def _clock_back(self, fault: Fault) -> None:
        clock, before = self._stepped[fault]
        clock.save(self.site.clock_path)  # may fail while the site's disk is full: then this is done again
        del self._stepped[fault]
        for name, pid in self._pids().items():
            if name not in ("postgres", "supervisor") and pid not in before:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    # sensors

    def _sensor(self, fault: Fault, how: str) -> str:
        break_sensors(self.site, broken_sensors(self.site) | {fault.target: how})
        return ""

    def _sensor_back(self, fault: Fault) -> None:
        left = {name: how for name, how in broken_sensors(self.site).items() if name != fault.target}
        break_sensors(self.site, left)

    # bus

    def _lock_bus(self, fault: Fault) -> str:
        path = self.site.root / "bus" / "bus.db"
        if not path.is_file():
            raise Skipped("the bus is not a file")
        link = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            link.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            link.close()
            raise Skipped(str(error)) from error
        self._locks[fault] = link
        return "no one can write"

    def _unlock_bus(self, fault: Fault) -> None:
        link = self._locks.pop(fault, None)
        if link is not None:
            link.execute("ROLLBACK")
            link.close()


KINDS = (
    "kill_service", "kill_database", "kill_supervisor", "kill_worker", "hang_service", "hang_database",
    "link_down", "link_slow", "link_flapping", "link_corrupt", "disk_full", "rotten_file", "rotten_tape", "tape_away",
    "buffer_store_away", "clock_step", "sensor_silent", "sensor_garbage", "bus_locked",
)  # fmt: skip


def flip_bit(path: Path, chance: random.Random, begin: int = 0, length: int | None = None) -> int:
    """Flip one bit of a file, or of a part of it, in place; gives the byte's offset."""
    offset = begin + chance.randrange(path.stat().st_size if length is None else length)
    with path.open("r+b") as stream:
        stream.seek(offset)
        value = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([value ^ 1 << chance.randrange(8)]))
    return offset


def fill_disk(folder: Path) -> int:
    """Fill a disk to the last block; gives the size of the ballast."""
    block = bytes(1 << 20)
    path = folder / BALLAST
    with path.open("ab", buffering=0) as stream:
        size = 1 << 20
        while size >= 512:
            try:
                if stream.write(block[:size]) < size:
                    size //= 2
            except OSError:
                size //= 2
        return stream.tell()


# disks of their own


def can_mount() -> bool:
    """Whether this process may mount small disks."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", "--version"], capture_output=True, check=False).returncode == 0


def mount_disk(folder: Path, megabytes: int) -> bool:
    """Give a folder a small disk in memory; False when that is not allowed here."""
    folder.mkdir(parents=True, exist_ok=True)
    if not can_mount() or any(folder.iterdir()):
        return folder.is_mount()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "cumbre-chaos", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def mounted_below(root: Path) -> list[Path]:
    """Mount points at or below a folder, deepest first."""
    root = root.resolve()
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        place = Path(line.split()[1].encode().decode("unicode_escape"))
        if place == root or root in place.parents:
            found.append(place)
    return sorted(found, key=lambda place: len(place.parts), reverse=True)


def drop_disks(root: Path) -> None:
    """Unmount small disks and forget what was on them."""
    for place in mounted_below(root):
        subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def settle_disks(root: Path) -> None:
    """Copy what lies on small disks to the folder's own disk and unmount them, so that it stays.

    Raises
    ------
    NotFoundError
        A disk cannot be copied or unmounted.
    """
    for place in mounted_below(root):
        keep = place.with_name(f".{place.name}.settling")
        if place != root.resolve():
            shutil.rmtree(keep, ignore_errors=True)
        copied = subprocess.run(
            ["cp", "-a", str(place), str(keep)], capture_output=True, text=True, check=False
        )
        if copied.returncode != 0:
            raise NotFoundError(f"{place}: cannot be copied to {keep}: {copied.stderr.strip()[-300:]}")
        # All is copied: what still looks at the disk, such as a process about to end, sees the old one.
        gone = subprocess.run(["umount", "-l", str(place)], capture_output=True, text=True, check=False)
        if gone.returncode != 0:
            shutil.rmtree(keep, ignore_errors=True)
            raise NotFoundError(f"{place}: cannot be unmounted: {gone.stderr.strip()}")
        place.rmdir()
        keep.rename(place)
