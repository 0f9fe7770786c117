"""Prompt workers that fall behind: real worker processes that stand still, and what is recorded of it."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from cumbre.bus import open_bus
from cumbre.core.configuration import Site
from cumbre.core.time import Clock, parse_isot, tai_from_utc
from cumbre.ledger import LedgerService
from cumbre.orchestration import prompt_jobs
from cumbre.orchestration.engine import DaskEngine
from cumbre.orchestration.missed import summary, waiting
from cumbre.orchestration.prompt import PromptService
from cumbre.stores.postgres import Database

NIGHT = tai_from_utc(parse_isot("2026-11-21T02:00:00"))
IMAGES = 14
DROP_ABOVE = 6
LIMIT_S = 120.0


class Overloaded:
    """A prompt service with two live workers and a spare one, and the ledger."""

    def __init__(self, root: Path, database: Database) -> None:
        self.db = database
        text = {
            "observatory": {"latitude_deg": -30.24, "longitude_deg": -70.74},
            "instruments": ["democam"],
            "places": {"summit": {"raw": "summit/raw"}},
            "prompt": {
                "deadline_s": 60,
                "retries": 0,
                "overload": {"behind": 1.0, "drop_above": DROP_ABOVE, "kill_after_s": 60},
            },
        }
        (root / "site.yaml").write_text(yaml.safe_dump(text))
        site = Site.load(root)
        clock = Clock.starting_at(NIGHT, rate=20.0)
        self.bus = open_bus(f"sqlite:///{root}/bus.db", identity="prompt", clock=clock)
        self.live = DaskEngine(n_workers=2)
        self.spare = DaskEngine(n_workers=1)
        pools = {"live": self.live, "spare": self.spare}
        self.service = PromptService(site=site, bus=self.bus, clock=clock, db=database, engine=pools)
        self.ledger = LedgerService(site=site, bus=self.bus, db=database, clock=clock)

    def arrive(self, number: int) -> None:
        self.bus.publish(
            "Image.hop",
            {
                "obsId": f"XC_O_20261120_{number:06d}", "instrument": "DemoCam", "groupId": f"g{number}",
                "exposureId": 2026112000000 + number, "detector": 0, "detectorName": "R00_S00",
                "hop": "at_archive", "place": "archive", "path": "/nowhere/x.fits",
                "hopTai": self.bus.clock.now_tai_s(),
            },
        )  # fmt: skip

    def until(self, condition) -> None:
        end = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < end, f"waited in vain; {summary(self.db)}, {self.told()}"
            self.service.step(0.05)
            self.ledger.step(0.0)

    def told(self) -> list[dict[str, object]]:
        return [message.fields for message in self.bus.replay(["Prompt.overload"])]

    def words(self, table: str) -> Counter[str]:
        rows = self.db.query(f"SELECT outcome FROM ledger.{table} WHERE hop = 'processed'")
        return Counter(row["outcome"] for row in rows)

    def close(self) -> None:
        self.service.close()
        self.ledger.close()


@pytest.fixture
def overloaded(tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Overloaded]:
    tests = str(Path(__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(prompt_jobs, "WORKER", "support.prompt_jobs")
    made = Overloaded(tmp_path, database)
    yield made
    made.close()


def test_workers_that_stand_still_are_relieved_ended_and_their_images_done_later(
    overloaded: Overloaded,
) -> None:
    pids = list(overloaded.live.pids().values())
    assert len(pids) == 2
    (spare,) = overloaded.spare.pids().values()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for number in range(1, IMAGES + 1):
            overloaded.arrive(number)
        # two are with the workers that stand still, one with the spare, the oldest of the others are dropped
        overloaded.until(lambda: overloaded.words("hop_history")["Dropped"])
        assert overloaded.words("hop_history")["Dropped"] >= IMAGES - 3 - DROP_ABOVE
        # the spare goes on while the others stand still; these are ended after their deadline
        overloaded.until(lambda: overloaded.words("hop_history")["Killed"] == 2)
    finally:
        for pid in pids:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGCONT)
    overloaded.until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    overloaded.until(lambda: len(overloaded.live.workers()) == 2)
    assert not set(pids) & set(overloaded.live.pids().values()), "other processes took their places"
    assert any(told["behind"] for told in overloaded.told())
    # everything that was left is done now, once each
    overloaded.until(lambda: not waiting(overloaded.db))
    overloaded.until(lambda: overloaded.words("hop") == {"ok": IMAGES})
    assert overloaded.words("hop_history")["ok"] == IMAGES
    done = summary(overloaded.db)
    assert done["Killed"] == {"done": 2}
    assert done["Dropped"]["done"] >= IMAGES - 3 - DROP_ABOVE
    last: dict[str, object] = {}

    def calm() -> bool:
        last.update(overloaded.told()[-1])
        return not last["behind"] and last["missed"] == 0

    overloaded.until(calm)
    rows = overloaded.db.query("SELECT worker FROM orchestration.job WHERE kind = 'prompt.process'")
    assert any(row["worker"].endswith(f":{spare}") for row in rows), "the spare pool took images"
    assert last["spareWorkers"] == 1
    assert (last["killed"], last["dropped"]) == (2, done["Dropped"]["done"])
