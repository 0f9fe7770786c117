"""One simulated night: start the services, let them observe, cause the faults asked for, wait for the end.

The night is over when every image that the camera took is verified at both sites, on both tapes, ingested and
processed, or when the deadline has passed; what is missing then is told by the report, never hidden.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.errors import CumbreError, DeadlineError, UserError
from cumbre.core.instrument import load_instrument
from cumbre.core.time import Clock, parse_isot, tai_from_utc
from cumbre.simulator.network import control_link
from cumbre.site.roles import open_site_bus, open_site_clock, roles_of, site_database
from cumbre.site.runner import ENABLED
from cumbre.site.supervisor import read_state
from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    from cumbre.stores.postgres import Database

log = logging.getLogger("cumbre")

CONTROL_FILE = "night.json"
NEEDED_ROLE = {
    "CatchUpArchiver": "catch-up",
    "EfdReplicator": "efd-replicator",
    "AlertProductionCluster": "prompt",
}
"""Role without which an entity cannot be enabled."""
DONE_FILE = "observatory/night_done.json"
FINAL_HOPS = (
    "at_base",
    "base_tape",
    "at_archive",
    "archive_tape",
    "ingested_oods",
    "ingested_embargo",
    "processed",
)
READY_DEADLINE_S = 120.0
SIDEREAL_DAY_S = 86164.0905
OUTAGE_S = 5.0

Progress = Callable[["NightState"], None]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong: ``kill:writer``, ``down:base-archive``, at a part of the night in [0, 1]."""

    kind: str
    target: str
    at: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.target}@{self.at:.2f}"


@dataclass(slots=True)
class NightState:
    """What the terminal shows."""

    images: int
    earlier: int = 0
    taken: int = 0
    hops: dict[str, int] = field(default_factory=dict)
    expected: int = 0
    alerts: int = 0
    lag_s: float | None = None
    message: str = ""
    faults: list[str] = field(default_factory=list)


def parse_faults(text: str, site: Site, seed: int) -> list[Fault]:
    """Read ``kill:writer@0.4,down:base-archive,random,each``; without ``@`` the moment is drawn from the seed.

    ``random`` is three kills and one outage; ``each`` kills every service once.

    Raises
    ------
    UserError
        An unknown fault or target; the message lists what there is.
    """
    roles = roles_of(site)
    links = [f"{link.source}-{link.target}" for link in site.config.links]
    chance = random.Random(seed)
    out = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word == "each":
            # Every service once, evenly over the night, in an order drawn from the seed.
            victims = chance.sample([*roles, "postgres", "worker"], len(roles) + 2)
            out += [Fault("kill", name, (i + 0.5) / len(victims)) for i, name in enumerate(victims)]
            continue
        if word == "random":
            for _ in range(3):
                out.append(Fault("kill", chance.choice(roles), chance.uniform(0.15, 0.85)))
            out.append(Fault("down", chance.choice(links), chance.uniform(0.2, 0.8)))
            continue
        kind, _, rest = word.partition(":")
        target, _, moment = rest.partition("@")
        known = {"kill": [*roles, "postgres", "worker"], "down": links}.get(kind)
        if kind == "kill" and target not in (known or []):
            # ``writer`` means one of writer-1, writer-2…
            several = [name for name in roles if name.rpartition("-")[0] == target]
            target = chance.choice(several) if several else target
        if known is None or target not in known:
            raise UserError(
                f"fault {word!r}: expected random, each, kill:SERVICE or down:LINK, optionally @0.0 to @1.0; "
                f"services: {', '.join(roles)}, postgres, worker; links: {', '.join(links)}"
            )
        try:
            at = float(moment) if moment else chance.uniform(0.2, 0.8)
        except ValueError:
            raise UserError(f"fault {word!r}: after @ expected a number from 0 to 1") from None
        out.append(Fault(kind, target, at))
    return sorted(out, key=lambda fault: fault.at)


def set_clock(site: Site) -> Clock:
    """Start the site's fast clock at the configured start of the night, or a later night's after earlier ones."""
    simulator = site.config.simulator
    if simulator is None:
        return Clock.real()
    start = tai_from_utc(parse_isot(simulator.start))
    taken = [
        json.loads((site.root / "summit" / "daq" / obs_id / "exposure.json").read_text())["end_tai"]
        for obs_id in daq_images(site)
    ]
    if taken:
        # The same sidereal time of the next night: the tiles stand as high again.
        start += (math.floor((max(taken) - start) / SIDEREAL_DAY_S) + 1) * SIDEREAL_DAY_S
    clock = Clock.starting_at(start, rate=simulator.rate)
    clock.save(site.clock_path)
    return clock


def wait_ready(site: Site, *, wait_s: float = READY_DEADLINE_S, without: Collection[str] = ()) -> None:
    """Wait until every role has said that it is enabled, and until control has enabled its entities.

    ``without`` some roles, whatever entity needs them is not waited for either.

    Raises
    ------
    DeadlineError
        Names the roles that did not, and their logs.
    """
    bus = open_site_bus(site, "night")
    roles = set(roles_of(site)) - set(without)
    waiting = set(roles)
    subscription = bus.subscribe(["Service.summaryState"], start="earliest")
    enabled: dict[str, int] = {}
    since = time.monotonic()
    while waiting:
        for message in subscription.poll(timeout_s=0.2):
            if message.fields["summaryState"] == ENABLED:
                enabled[message.fields["name"]] = message.fields["pid"]
        # A former night's word does not count: the process that runs now must have said it.
        state = read_state(site) or {"services": []}
        now = {service["name"]: service["pid"] for service in state["services"]}
        waiting = {name for name in roles if name not in now or enabled.get(name) != now[name]}
        if time.monotonic() - since > wait_s:
            logs = ", ".join(str(site.root / "logs" / f"{name}.log") for name in sorted(waiting))
            raise DeadlineError(f"not ready after {wait_s:.0f} s: {', '.join(sorted(waiting))}; see {logs}")
    if site.config.archive.control and not without:
        _wait_enabled(site, bus, enabled)


def _wait_enabled(site: Site, bus: Bus, pids: dict[str, int]) -> None:
    """Wait until control has enabled what ``control.start`` names: what begins before is not processed.

    Raises
    ------
    DeadlineError
        Names the entities that are not, and what they say.
    """
    acting = {str(pid) for name, pid in pids.items() if name.startswith("control-base")}
    deadline = time.monotonic() + READY_DEADLINE_S
    roles = set(roles_of(site))
    waiting = {
        name: "no control system acts"
        for name in site.config.control.start
        if NEEDED_ROLE.get(name, "control-base") in roles
    }
    while waiting:
        system = bus.latest("Control.system", key="control-base")
        if system is not None and system.fields["holder"].rpartition(" ")[2] in acting:
            for name in list(waiting):
                last = bus.latest(f"{name}.detailedState")
                if last is None or last.fields["epoch"] != system.fields["epoch"]:
                    continue
                if last.fields["processing"] == "enabled":
                    del waiting[name]
                else:
                    waiting[name] = last.fields["commandInProgress"] or last.fields["protocolState"]
        if waiting and time.monotonic() > deadline:
            said = ", ".join(f"{name} ({state})" for name, state in waiting.items())
            raise DeadlineError(
                f"not enabled after {READY_DEADLINE_S:.0f} s: {said}; see {site.root / 'logs' / 'control-base.log'}"
            )
        time.sleep(0.1 if waiting else 0.0)


def begin(site: Site, visits: int) -> None:
    """Tell the scheduler to observe."""
    path = site.root / CONTROL_FILE
    (site.root / DONE_FILE).unlink(missing_ok=True)
    clock = open_site_clock(site)
    order = {"visits": visits, "state": "running", "start_tai": clock.now_tai_s()}
    write_atomic(path, json.dumps(order).encode())


def is_over(site: Site) -> bool:
    """Whether the scheduler has ended the night that was begun last (not an earlier one)."""
    try:
        done = json.loads((site.root / DONE_FILE).read_text())
        return bool(done["night"] == str(json.loads((site.root / CONTROL_FILE).read_text())["start_tai"]))
    except FileNotFoundError:
        return False


def cause(site: Site, fault: Fault) -> str:
    """Make one fault happen; returns what was done."""
    if fault.kind == "down":
        control_link(site, *fault.target.split("-"), down=True)
        return f"link {fault.target} down for {OUTAGE_S:.0f} s"
    if fault.target == "worker":
        pid = _worker_pid(site)
    else:
        state = read_state(site) or {"services": []}
        pid = next((s["pid"] for s in state["services"] if s["name"] == fault.target), None)
    if not pid:
        return f"{fault.target} was not running"
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGKILL)
    return f"killed {fault.target} (pid {pid})"


def _worker_pid(site: Site) -> int | None:
    """Pid of one prompt worker: a grandchild of the prompt service (below its nanny)."""
    import psutil

    state = read_state(site) or {"services": []}
    prompt = next((s["pid"] for s in state["services"] if s["name"] == "prompt"), None)
    if not prompt:
        return None
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(int(prompt)).children(recursive=True)
        busy = [p for p in children if p.memory_info().rss > 80e6]
        return busy[-1].pid if busy else None
    return None


def daq_images(site: Site) -> list[str]:
    """obs_ids of all images that the camera has taken: those whose read-out is complete in its own store."""
    return sorted(path.parent.name for path in (site.root / "summit" / "daq").glob("*/exposure.json"))


def observe_state(db: Database, site: Site, state: NightState) -> None:
    """Fill the counts from the ledger and the camera's store."""
    from cumbre.orchestration.missed import waiting

    state.taken = len(daq_images(site))
    rows = db.query(
        "SELECT hop, count(DISTINCT (obs_id, detector)) AS n FROM ledger.hop"
        " WHERE detector >= 0 AND outcome = 'ok' GROUP BY hop", ()
    )  # fmt: skip
    state.hops = {row["hop"]: int(row["n"]) for row in rows}
    done = db.query(
        "SELECT count(DISTINCT (obs_id, detector)) AS n FROM ledger.hop WHERE detector >= 0 AND hop = 'processed'",
        (),
    )
    state.hops["processed"] = int(done[0]["n"])
    if site.config.prompt.missed.when == "idle":  # what was left for later is done before the night is over
        state.hops["processed"] -= waiting(db)
    alerts = db.query("SELECT count(*) AS n FROM level1.alert_outbox WHERE sent_tai IS NOT NULL", ())
    state.alerts = int(alerts[0]["n"])
    lag = db.query(
        "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY p.hop_tai - r.hop_tai) AS lag"
        " FROM ledger.hop p JOIN ledger.visit_read_out r USING (obs_id, detector)"
        " WHERE p.hop = 'processed' AND p.detector >= 0", ()
    )  # fmt: skip
    state.lag_s = None if lag[0]["lag"] is None else float(lag[0]["lag"])


def watch(site: Site, visits: int, faults: list[Fault], show: Progress, *, earlier: int = 0) -> NightState:
    """Follow the night to its end, causing faults on the way.

    ``earlier`` is the number of images of former nights in the camera's store.

    Raises
    ------
    DeadlineError
        Nothing moved for long.
    """
    clock = open_site_clock(site)
    config = site.config
    instrument = load_instrument(config.instruments[0])
    detectors = len(instrument.detectors)
    scheduler = config.scheduler
    images = visits * scheduler.snaps
    state = NightState(images=images, earlier=earlier, expected=(earlier + images) * detectors)
    db = site_database(site)
    pending, outages = list(faults), list[tuple[float, str]]()
    # Long enough for every visit at the slowest cadence, real seconds, with room for faults.
    visit_s = max(scheduler.cadence_s, scheduler.snaps * (scheduler.exposure_s + instrument.readout_s))
    limit_s = clock.wall_s(visits * (visit_s * 3 + 60) + 600) + 120
    started = moved = time.monotonic()
    last: Any = None
    while True:
        now = time.monotonic()
        with contextlib.suppress(CumbreError, OSError):
            observe_state(db, site, state)
        while pending and state.taken - earlier >= pending[0].at * images:
            fault = pending.pop(0)
            state.message = cause(site, fault)
            state.faults.append(state.message)
            if fault.kind == "down":
                outages.append((now + OUTAGE_S, fault.target))
        for item in [o for o in outages if o[0] <= now]:
            outages.remove(item)
            control_link(site, *item[1].split("-"))
        show(state)
        seen = (state.taken, tuple(sorted(state.hops.items())), state.alerts)
        if seen != last:
            last, moved = seen, now
        finished = is_over(site) and not outages
        if finished and all(state.hops.get(hop, 0) >= state.taken * detectors for hop in FINAL_HOPS):
            _wait_outbox(db)
            observe_state(db, site, state)
            return state
        if now - started > limit_s or (now - moved > 60 and finished):
            log.warning("the night did not complete; the report says what is missing")
            return state
        time.sleep(0.4)


def _wait_outbox(db: Database) -> None:
    """Let the relay send what is stored."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if db.query("SELECT count(*) AS n FROM level1.alert_outbox WHERE sent_tai IS NULL", ())[0]["n"] == 0:
            return
        time.sleep(0.1)


def demonstration_folder(root: Path) -> Path:
    """Remove a former simulated site, and nothing else.

    Raises
    ------
    UserError
        The folder holds something that is not a simulated site.
    """
    import shutil

    if not root.exists() or not any(root.iterdir()):
        return root
    if not (root / "site.yaml").exists() or Site.load(root).config.simulator is None:
        raise UserError(
            f"{root}: holds something that is not a simulated site; it is left alone. Use --site DIR"
        )
    from cumbre.site.supervisor import stop_site

    stop_site(Site.load(root))
    shutil.rmtree(root)
    return root
