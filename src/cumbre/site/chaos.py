"""A night with everything going wrong: faults at random moments drawn from a seed, then the proof.

The same seed, length and site give the same plan. What was done when is written to ``chaos/faults.jsonl`` in
the site as it happens. After the last fault the site gets time to catch up; then :mod:`cumbre.site.proof`
reads every stored byte.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cumbre.archive import tape_check, tape_repair
from cumbre.archive.tape import view_tape
from cumbre.core.configuration import SITE_FILE, Site, parse_site
from cumbre.core.errors import CumbreError, UserError
from cumbre.simulator.faults import (
    STORES,
    FaultInjector,
    can_mount,
    mount_disk,
    mounted_below,
    settle_disks,
)
from cumbre.site import night as nights
from cumbre.site.chaos_causing import Causing, Journal
from cumbre.site.chaos_plan import Targets, make_plan
from cumbre.site.profiles import create_site
from cumbre.site.proof import Piece, Proof, outstanding, prove, taken_images
from cumbre.site.roles import open_site_bus, open_site_clock, site_database
from cumbre.site.supervisor import postgres_pid, read_state, start_detached, stop_site
from cumbre.stores.files import write_atomic

log = logging.getLogger("cumbre")

Say = Callable[[str], None]

FOLDER = "chaos"
JOURNAL = "faults.jsonl"
INSTRUMENT_FILE = "chaoscam.yaml"
LONGEST_NIGHT_S = 4.5 * 3600
FASTEST_RATE = 12.0
MANY_VISITS = 1_000_000
TAKEN_GRACE_S = 60.0
"""Real seconds that the last exposures get to end after the order to stop."""
CATCH_UP_S = 240.0
"""Real seconds to catch up after the last fault, at least; a sixth of the run when that is longer."""
READY_S = 600.0
"""A machine may be busy with other things when the run begins."""
SLOW_TO_START = ("oods", "embargo", "prompt")
"""Roles that load much and are not on the way of an image to its archive: they come when they come."""
STOP_S = 120.0
STUCK_S = 100.0
"""Real seconds after which problems of the proof that do not change are final."""
POLL_S = 1.0
DISK_MB = 48

INSTRUMENT = """\
# Small sensors: as many images as possible go through every hop in a minute.
name: ChaosCam
prefix: XX
description: Two rafts of two sensors and one wavefront sensor, 128 x 64 pixels each.
plate_scale: 40.0
aperture_m: 1.2
readout_s: 2.0
raw_layout: hdu_per_amplifier
filters:
  - {name: r_chaos, band: r, zero_point: 26.0, wavelength_nm: [550, 700]}
detector_types:
  tiny:
    nx: 128
    ny: 64
    pixel_mm: 0.015
    grid: {columns: 2, rows: 1, prescan: 4, overscan: 16, gain: [1.5, 1.5], read_noise: [6.0, 6.0],
           saturation: 56000, bias_level: [1000, 1010]}
detectors:
  - {type: tiny, id: 0, name: R00_S00, x_offset_mm: -1.0, y_offset_mm: -0.5}
  - {type: tiny, id: 1, name: R00_S01, x_offset_mm: 1.0, y_offset_mm: -0.5}
  - {type: tiny, id: 2, name: R01_S00, x_offset_mm: -1.0, y_offset_mm: 0.5}
  - {type: tiny, id: 3, name: R01_S01, x_offset_mm: 1.0, y_offset_mm: 0.5}
  - {type: tiny, id: 4, name: R04_SW0, x_offset_mm: 3.0, y_offset_mm: 0.0, purpose: WAVEFRONT}
"""


@dataclass(slots=True)
class Outcome:
    """What a run gives."""

    proof: Proof
    faults: Counter[str]
    skipped: Counter[str]
    worst_catch_up_s: float
    caught_up: bool
    wall_s: float
    restarts: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    journal: str = ""

    @property
    def ok(self) -> bool:
        """Nothing lost, nothing twice."""
        return not self.proof.lost and not self.proof.duplicated and bool(self.proof.taken)

    def public(self) -> dict[str, Any]:
        """The JSON object that is printed last."""
        return {
            **self.proof.public(),
            "faults": dict(sorted(self.faults.items())),
            "skipped_faults": dict(sorted(self.skipped.items())),
            "worst_catch_up_s": round(self.worst_catch_up_s, 1),
            "caught_up": self.caught_up,
            "restarts": self.restarts,
            "seed": self.seed,
            "wall_s": round(self.wall_s, 1),
            "journal": self.journal,
        }


# the site


def chaos_site(root: Path, seed: int, minutes: float, *, small_disks: bool = True) -> Site:
    """Make a site with small sensors, short exposures, and stores on small disks where that is allowed."""
    small_disks = small_disks and can_mount()
    if (root / SITE_FILE).exists():
        site = Site.load(root)
        if site.config.simulator is None:
            raise UserError(f"{root}: not a simulated site; faults are not caused in a real observatory")
        return site
    if small_disks:
        mount_disk(root, int(400 + 60 * minutes))
    root.mkdir(parents=True, exist_ok=True)
    root = root.resolve()
    write_atomic(root / INSTRUMENT_FILE, INSTRUMENT.encode())
    site = create_site(root, instrument=str(root / INSTRUMENT_FILE), seed=seed)
    data = yaml.safe_load((root / SITE_FILE).read_text())
    rate = min(FASTEST_RATE, LONGEST_NIGHT_S / (minutes * 60 + TAKEN_GRACE_S))
    data["scheduler"] = data["scheduler"] | {
        "exposure_s": 15, "cadence_s": 22, "notice_s": 20, "tiles": 6, "max_airmass": 5.0,
    }  # fmt: skip
    data["simulator"] = data["simulator"] | {
        "rate": round(rate, 3),
        "star_density": 0.2,
        "asteroids_per_deg2": 1,
    }
    data["retention"] = data["retention"] | {"scrub_every_s": 10}
    for link in data["links"]:
        link["timeout_s"] = 5.0
        store = data["places"][link["source"]]["buffer"]
        data["places"][link["source"]]["buffer"] = [store, f"{store}-2"]
    text = yaml.safe_dump(data, sort_keys=False)
    parse_site(text, str(root / SITE_FILE))
    write_atomic(root / SITE_FILE, text.encode())
    if small_disks:
        for store in STORES:
            mount_disk(root / store, DISK_MB)
    return Site.load(root)


def prepare_sky_only(site: Site) -> None:
    """Make sky and survey; templates and calibrations are left out: prompt processing says so, as it should."""
    from cumbre.simulator.preparation import prepare_sky

    sky = prepare_sky(site)
    survey = site.root / "survey.json"
    if not survey.exists():
        write_atomic(survey, json.dumps([asdict(tile) for tile in sky.tiles]).encode())


def clear(root: Path) -> None:
    """Stop and unmount what a former run that was killed may have left in a folder."""
    if mounted_below(root):
        if (root / SITE_FILE).exists():
            stop_site(Site.load(root))
        settle_disks(root)


def release_disks(root: Path) -> None:
    """Keep what lies on small disks as ordinary folders; call it when the site is down."""
    if mounted_below(root):
        settle_disks(root)


class _Keeper(threading.Thread):
    """What systemd is to a real site: starts the supervisor again when it is gone."""

    def __init__(self, site: Site) -> None:
        super().__init__(name="keeper", daemon=True)
        self._site = site
        self._ended = threading.Event()
        self.starts = 0

    def run(self) -> None:
        while not self._ended.wait(0.5):
            if read_state(self._site) is not None:
                continue
            try:
                start_detached(self._site)
                self.starts += 1
            except (CumbreError, OSError) as error:
                log.info("the supervisor does not come up yet: %s", error)
                self._ended.wait(1.0)

    def end(self) -> None:
        self._ended.set()
        if self.is_alive():
            self.join(timeout=90.0)


class _Watcher(threading.Thread):
    """Asks the ledger again and again what is owed; a database that hangs holds up nothing but this thread.

    Attributes
    ----------
    worst_s
        Longest time after the end of a fault until all that had been taken by then was verified everywhere.
    restarts
        Service → most restarts that one supervisor counted.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(name="watcher", daemon=True)
        self._site = site
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._ended: list[float] = []
        self._waiting: list[tuple[float, set[Piece]]] = []
        self._owed: tuple[float, set[Piece]] | None = None
        self.worst_s = 0.0
        self.restarts: dict[str, int] = {}

    def fault_ended(self) -> None:
        """From now on the time to catch up counts."""
        with self._lock:
            self._ended.append(time.monotonic())

    def owed_since(self, since: float) -> set[Piece] | None:
        """What was owed at the last look, when that was after a monotonic time."""
        with self._lock:
            return self._owed[1] if self._owed is not None and self._owed[0] >= since else None

    def run(self) -> None:
        """Look once a second."""
        while not self._stopped.wait(POLL_S):
            try:
                begun = time.monotonic()
                left = outstanding(self._site, site_database(self._site))
                self._look(left, begun)
            except (CumbreError, OSError) as error:
                log.info("the ledger cannot be asked now: %s", error)
            state = read_state(self._site) or {"services": []}
            for item in state["services"]:
                known = self.restarts.get(item["name"], 0)
                self.restarts[item["name"]] = max(known, int(item["restarts"]))

    def _look(self, left: set[Piece], begun: float) -> None:
        now = time.monotonic()
        with self._lock:
            self._owed = (begun, left)
            self._waiting += [(since, set(left)) for since in self._ended]
            self._ended.clear()
        still = []
        for since, pieces in self._waiting:
            rest = pieces & left
            if pieces:
                self.worst_s = max(self.worst_s, now - since)
            if rest:
                still.append((since, rest))
        self._waiting = still

    def end(self) -> None:
        """Look no more."""
        self._stopped.set()
        if self.is_alive():
            self.join(timeout=30.0)


def site_pids(site: Site) -> dict[str, int]:
    """Every process of a site that has a name: its roles, ``postgres``, ``supervisor``."""
    state = read_state(site)
    out: dict[str, int] = {}
    if state is not None:
        out = {item["name"]: int(item["pid"]) for item in state["services"] if item["pid"]}
        out["supervisor"] = int(state["pid"])
    with contextlib.suppress(OSError, ValueError, IndexError):
        if pid := postgres_pid(site):
            out["postgres"] = pid
    return out


class Chaos:
    """One run."""

    def __init__(self, site: Site, *, seed: int, seconds: float, say: Say) -> None:
        self.site, self.seed, self.seconds, self._say = site, seed, seconds, say
        self.targets = Targets.of(site)
        self.plan = make_plan(seed, seconds, self.targets)
        self._watcher = _Watcher(site)

    def run(self) -> Outcome:
        """Start the site, let it observe among faults, end them, wait, prove, stop it."""
        begun = time.monotonic()
        prepare_sky_only(self.site)
        nights.set_clock(self.site)
        was_up = read_state(self.site) is not None
        if not was_up:
            start_detached(self.site)
        keeper = _Keeper(self.site)
        injector = FaultInjector(
            self.site, pids=lambda: site_pids(self.site), chance=random.Random(f"bytes {self.seed}")
        )
        journal = Journal(self.site.root / FOLDER / JOURNAL, self._say)
        causing = Causing(injector, journal, self._watcher.fault_ended)
        try:
            nights.wait_ready(self.site, wait_s=READY_S, without=SLOW_TO_START)
            self._say(
                f"services ready after {time.monotonic() - begun:.0f} s; {len(self.plan)} faults to come"
            )
            nights.begin(self.site, MANY_VISITS)
            keeper.start()
            self._watcher.start()
            causing.run(self.plan, self.seconds)
            self._stop_observing()
            proof, caught_up = self._settle(injector.rotten_tape)
        finally:
            self._watcher.end()
            keeper.end()
            if not was_up:
                stop_site(self.site, wait_s=STOP_S)
        return Outcome(
            proof, causing.faults, causing.skipped, self._watcher.worst_s, caught_up, time.monotonic() - begun,
            self._watcher.restarts, self.seed, str(journal.path),
        )  # fmt: skip

    def _stop_observing(self) -> None:
        """Let what is announced or exposing end; nothing new begins."""
        path = self.site.root / nights.CONTROL_FILE
        order = json.loads(path.read_text())
        write_atomic(path, json.dumps(order | {"state": "done"}).encode())
        deadline = time.monotonic() + TAKEN_GRACE_S
        while time.monotonic() < deadline and not nights.is_over(self.site):
            time.sleep(POLL_S)
        self._say(f"{len(taken_images(self.site))} images taken; no faults any more; catching up")

    def _settle(self, rotten_tape: set[str]) -> tuple[Proof, bool]:
        """Wait until the ledger owes nothing, then prove; what can still heal gets time until the deadline."""
        deadline = time.monotonic() + max(CATCH_UP_S, self.seconds / 6)
        said: int | None = None
        shown: list[str] = []
        begun = same_since = time.monotonic()
        while True:
            left = self._watcher.owed_since(begun)
            late = time.monotonic() > deadline
            if left is not None and len(left) != said:
                said = len(left)
                self._say(f"{said} detector images still owed")
            if (left is not None and not left) or late:
                try:
                    unexplained = self._verify_tapes(rotten_tape)
                    proof = prove(self.site, site_database(self.site))
                    proof.books += unexplained
                except CumbreError as error:
                    if late:
                        raise
                    log.info("no proof yet: %s", error)
                    time.sleep(POLL_S)
                    continue
                problems = proof.problems(1000)
                if problems != shown:
                    shown, same_since = problems, time.monotonic()
                    if problems:
                        self._say(f"not proven yet: {len(problems)} problems, the first: {problems[0]}")
                if proof.ok or late or time.monotonic() - same_since > STUCK_S:
                    return proof, proof.ok
                time.sleep(5 * POLL_S)
            time.sleep(POLL_S)

    def _verify_tapes(self, rotten: set[str]) -> list[str]:
        """What an operator does about rotten tapes: verify, repair. Gives damage that no fault explains."""
        unexplained: list[str] = []
        if not rotten:
            return unexplained
        for place, settings in self.site.config.places.items():
            if settings.tape is None:
                continue
            report = tape_check.verify(*view_tape(self.site, place))
            unexplained += [
                f"tape of {place}: {finding.problem}: {finding.key} {finding.place}: {finding.message}"
                for finding in report.findings
                if finding.place not in rotten
            ]
            if report.damaged:
                clock = open_site_clock(self.site)
                with open_site_bus(self.site, f"tape-{place}") as bus:
                    tape_repair.tell_damage(self.site, place, report, bus=bus, clock=clock)
                    tape_repair.repair(self.site, place, report, bus=bus, clock=clock)
                mended = sum(bool(finding.repaired) for finding, _ in report.damaged)
                self._say(f"tape of {place}: {len(report.damaged)} files rotten, {mended} written again")
        return unexplained
