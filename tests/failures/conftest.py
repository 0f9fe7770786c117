"""One small site with real processes for all failure tests; each test ends by reading every stored byte."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from cumbre.core.configuration import SITE_FILE, Site
from cumbre.core.errors import CumbreError
from cumbre.core.instrument import load_instrument
from cumbre.simulator.faults import Fault, FaultInjector, drop_disks
from cumbre.site.chaos import chaos_site, prepare_sky_only, site_pids
from cumbre.site.night import set_clock, wait_ready
from cumbre.site.proof import outstanding, prove, taken_images
from cumbre.site.roles import open_site_bus, roles_of, site_database
from cumbre.site.supervisor import start_detached, stop_site

NOT_NEEDED = {"scheduler", "oods", "embargo", "prompt", "relay", "retention", "web"}
LIMIT_S = 60.0


class Running:
    """A site that runs."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.bus = open_site_bus(site, "test")
        self.db = site_database(site)
        self.injector = FaultInjector(site, pids=lambda: site_pids(site), chance=random.Random(1))
        self.instrument = load_instrument(site.config.instruments[0])

    def take(self, count: int = 1, *, exposure_s: float = 1.0) -> list[str]:
        """Have the camera take images; gives their obs_ids when all are read out."""
        for _ in range(3):
            ack = self.bus.command("Camera.takeImages", self.order(count, exposure_s), timeout_s=60.0)
            if ack.error == 0:
                return ack.result.split()
            time.sleep(1.0)  # a camera that has just restarted aborts what was under way
        raise AssertionError(ack)

    @staticmethod
    def order(count: int = 1, exposure_s: float = 1.0) -> dict[str, object]:
        """Fields of a command to the camera."""
        return {
            "numImages": count, "expTime": exposure_s, "imageType": "DARK", "filter": "r_chaos", "ra": 0.0,
            "dec": 0.0,
        }  # fmt: skip

    @contextmanager
    def fault(self, kind: str, target: str, **details: float) -> Iterator[Fault]:
        """Something is wrong while the block runs."""
        fault = Fault(0.0, kind, target, 0.0, details)
        self.injector.begin(fault)
        try:
            yield fault
        finally:
            self.injector.end(fault)

    def kill(self, name: str) -> int:
        """Kill a process with SIGKILL and wait until another one runs in its place; gives the new pid."""
        old = self.until(lambda: site_pids(self.site).get(name))
        self.injector.begin(Fault(0.0, "kill_service", name))

        def new() -> int | None:
            pid = site_pids(self.site).get(name)
            return pid if pid and pid != old and psutil.pid_exists(pid) else None

        return self.until(new)

    def kill_only(self, name: str) -> None:
        """Kill a process that nobody starts again by itself, and wait for its end."""
        pid = site_pids(self.site)[name]
        self.injector.begin(Fault(0.0, "kill_service", name))
        self.until(lambda: not psutil.pid_exists(pid) or site_pids(self.site).get(name) != pid)

    def hops(self, obs_id: str, hop: str) -> list[dict[str, object]]:
        """Hops of an image that the bus carried."""
        told = [message.fields for message in self.bus.replay(["Image.hop"])]
        return [fields for fields in told if (fields["obsId"], fields["hop"]) == (obs_id, hop)]

    def has(self, hop: str, obs_ids: list[str]) -> bool:
        """Whether the ledger knows a hop of every detector of some images."""
        rows = self.db.query(
            "SELECT count(DISTINCT (obs_id, detector)) AS n FROM ledger.hop WHERE hop = %s AND outcome = 'ok'"
            " AND detector >= 0 AND obs_id = ANY(%s)",
            (hop, obs_ids),
        )
        return bool(rows[0]["n"] == len(obs_ids) * len(self.instrument.detectors))

    def until(self, condition: Callable[[], object], seconds: float = LIMIT_S, what: str = "") -> object:
        """Wait for something; what goes wrong on the way is asked again."""
        deadline = time.monotonic() + seconds
        while True:
            value: object = None
            try:
                value = condition()
            except (CumbreError, OSError) as error:
                what = f"{what} {error}"[-300:]
            if value:
                return value
            assert time.monotonic() < deadline, f"waited in vain: {what}; see {self.site.root}/logs"
            time.sleep(0.1)

    def nothing_is_lost(self, obs_ids: list[str], seconds: float = LIMIT_S) -> None:
        """Wait for both sites and both tapes, then read every byte of the site and compare."""
        assert obs_ids
        self.until(lambda: not outstanding(self.site, self.db), seconds, "images are owed")
        assert set(obs_ids) <= set(taken_images(self.site))
        problems: list[str] = []

        def proven() -> bool:
            problems[:] = prove(self.site, self.db).problems()
            return not problems

        try:
            self.until(proven, 30.0)
        except AssertionError:
            raise AssertionError("\n".join(problems)) from None


@pytest.fixture(scope="module")
def _site() -> Iterator[Running]:
    """The site of all tests here; disks of its own where this process may mount them."""
    folder = Path(tempfile.mkdtemp(prefix="cumbre-failures-")) / "site"
    site = chaos_site(folder, 1, 3)
    path = site.path(SITE_FILE)
    data = yaml.safe_load(path.read_text())
    data["roles"] = [name for name in roles_of(site) if name not in NOT_NEEDED]
    data["control"] = {"start": {"Archiver": "science", "CatchUpArchiver": "science"}}
    data["simulator"]["rate"] = 4.0
    data["catch_up"] = {"grace_s": 20, "every_s": 1}
    data["retention"] |= {"scrub_every_s": 3}
    for link in data["links"]:
        link |= {"timeout_s": 3.0, "expected_s": 3.0}
    path.write_text(yaml.safe_dump(data))
    site = Site.load(folder)
    prepare_sky_only(site)
    set_clock(site)
    try:
        start_detached(site)
        wait_ready(site, wait_s=300.0)
        yield Running(site)
    finally:
        stop_site(site, wait_s=120.0)
        drop_disks(folder)
        shutil.rmtree(folder.parent, ignore_errors=True)


@pytest.fixture
def running(_site: Running) -> Running:
    """The site, with every service running."""
    _site.until(lambda: set(roles_of(_site.site)) <= set(site_pids(_site.site)))
    return _site
