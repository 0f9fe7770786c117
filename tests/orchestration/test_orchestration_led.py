"""Prompt processing as the Alert Production Cluster leads it."""

from __future__ import annotations

import pytest
import yaml

from cumbre.bus import open_bus
from cumbre.core.configuration import Site
from cumbre.core.time import Clock, parse_isot, tai_from_utc
from cumbre.orchestration import prompt, prompt_jobs
from cumbre.orchestration.engine import InlineEngine
from cumbre.orchestration.prompt import PromptService

NIGHT = tai_from_utc(parse_isot("2026-11-21T02:00:00"))
OBS = "XC_O_20261120_00000{}"


class Led:
    """The service, what it is told, and what came of it."""

    def __init__(self, root, database, *, control=True):
        self.database, self.control, self.epoch = database, control, 1
        text = {
            "observatory": {"latitude_deg": -30.24, "longitude_deg": -70.74},
            "instruments": ["democam"],
            "places": {"summit": {"raw": "summit/raw"}},
            "archive": {"control": control},
        }
        (root / "site.yaml").write_text(yaml.safe_dump(text))
        self.bus = open_bus(
            f"sqlite:///{root}/bus.db", identity="prompt", clock=Clock.starting_at(NIGHT, rate=6.0)
        )
        self.service = PromptService(
            site=Site.load(root), bus=self.bus, clock=self.bus.clock, db=database, engine=InlineEngine()
        )

    def said(self, processing, settings="{}", epoch=None):
        fields = {"processing": processing, "settings": settings, "epoch": epoch or self.epoch}
        self.bus.publish("AlertProductionCluster.detailedState", fields)

    def visit(self, group):
        fields = {
            "groupId": group, "position": [10.0, -30.0], "instrument": "DemoCam", "filters": "r_demo",
            "startTime": self.bus.clock.now_tai_s() + 22, "duration": 30.0, "nimages": 1, "survey": "a",
        }  # fmt: skip
        self.bus.publish("ScriptQueue.nextVisit", fields)
        self.run()

    def image(self, group, number):
        hop = {
            "obsId": OBS.format(number), "instrument": "DemoCam", "exposureId": 2026112000000 + number,
            "groupId": group, "detector": 0, "detectorName": "R00_S00", "hop": "at_archive",
            "place": "archive", "path": "/nowhere/x.fits", "hopTai": self.bus.clock.now_tai_s(),
        }  # fmt: skip
        self.bus.publish("Image.hop", hop)
        self.run()

    def run(self):
        for _ in range(10):
            self.service.step(0.0)

    @property
    def prepared(self):
        return {row["payload"]["visit"]["group_id"] for row in self.service.store.payloads(prompt.PRELOAD, 0)}

    @property
    def processed(self):
        return [m.fields["groupId"] for m in self.bus.replay(["Prompt.detectorProcessed"])]


@pytest.fixture
def led(tmp_path, database, monkeypatch):
    monkeypatch.setattr(prompt_jobs, "WORKER", "support.prompt_jobs")
    made = Led(tmp_path, database)
    yield made
    made.service.close()


def test_it_tells_control_how_many_workers_there_are(led):
    led.run()
    (told,) = [m.fields for m in led.bus.replay(["AlertProductionCluster.pool"])]
    assert told["workers"] == 1


def test_without_a_word_from_control_it_works(led):
    led.visit("a")
    led.image("a", 1)
    assert (led.prepared, led.processed) == ({"a"}, ["a"])


def test_disabling_ends_nothing_of_the_current_visit_and_takes_up_no_new_one(led):
    led.said("enabled")
    led.visit("a")
    led.said("draining")
    led.visit("b")
    led.image("a", 1)
    led.image("b", 2)
    led.image("c", 3)  # nobody has announced it
    assert (led.prepared, led.processed) == ({"a"}, ["a"])
    led.said("enabled")
    led.image("b", 4)  # not in the middle of a visit
    led.visit("d")
    led.image("d", 5)
    assert (led.prepared, led.processed) == ({"a", "d"}, ["a", "d"])


def test_a_mode_without_visits_processes_none(led):
    led.said("enabled", '{"trigger": "none"}')
    led.visit("a")
    led.image("a", 1)
    assert (led.prepared, led.processed) == (set(), [])


def test_what_a_former_control_system_says_late_does_not_count(led):
    led.said("enabled", epoch=2)
    led.visit("a")
    led.said("disabled", epoch=1)
    led.visit("b")
    assert led.prepared == {"a", "b"}


def test_a_site_without_control_is_not_led(tmp_path, database, monkeypatch):
    monkeypatch.setattr(prompt_jobs, "WORKER", "support.prompt_jobs")
    alone = Led(tmp_path, database, control=False)
    alone.said("disabled")
    alone.visit("a")
    assert alone.prepared == {"a"}
    alone.service.close()
