"""Too few workers: what is left out, what is told of it, and that it is done later, once."""

from __future__ import annotations

import json

import pytest
import yaml
from click.testing import CliRunner

from cumbre.bus import open_bus
from cumbre.catalogs.level1 import Level1
from cumbre.cli.missed import process_missed
from cumbre.core.configuration import Site
from cumbre.core.time import Clock, parse_isot, tai_from_utc
from cumbre.ledger import LedgerService
from cumbre.orchestration import prompt_jobs
from cumbre.orchestration.engine import Completion, InlineEngine
from cumbre.orchestration.missed import missed_images, summary
from cumbre.orchestration.models import JobResult
from cumbre.orchestration.prompt import PromptService, is_sampled
from cumbre.orchestration.task import run_task

NIGHT = tai_from_utc(parse_isot("2026-11-21T02:00:00"))
OBS = "XC_O_20261120_{:06d}"


class HeldWorkers:
    """Workers that go on only when told; what they then run is real."""

    def __init__(self, *names):
        self.names, self.held, self.done, self.killed = list(names), {}, [], []

    def submit(self, key, function, payload, *, priority, worker=""):
        self.held[key] = (function, payload, worker)

    def completed(self, timeout_s):
        done, self.done = self.done, []
        return done

    def cancel(self, key):
        self.held.pop(key, None)

    def kill(self, key, worker):
        self.killed.append((key, worker))
        self.cancel(key)

    def workers(self):
        return self.names

    def close(self):
        self.held.clear()

    def go_on(self, what=""):
        for key in [key for key in self.held if what in key]:
            function, payload, _ = self.held.pop(key)
            self.done.append(Completion(key, JobResult(**run_task(function, payload))))

    @property
    def images(self):
        return [key.partition("#")[0].removeprefix("prompt.") for key in self.held if "preload" not in key]


class World:
    def __init__(self, root, database, **settings):
        self.root, self.db = root, database
        prompt = {"deadline_s": 60, **settings}
        text = {
            "observatory": {"latitude_deg": -30.24, "longitude_deg": -70.74},
            "instruments": ["democam"],
            "database": database.dsn,
            "bus": f"sqlite:///{root}/bus.db",
            "places": {"summit": {"raw": "summit/raw"}},
            "archive": {"control": True},
            "prompt": prompt,
        }
        (root / "site.yaml").write_text(yaml.safe_dump(text))
        self.site = Site.load(root)
        self.clock = Clock.starting_at(NIGHT, rate=1.0)
        self.clock.save(self.site.clock_path)
        self.bus = open_bus(self.site.config.bus, identity="prompt", clock=self.clock)
        self.workers = HeldWorkers("a", "b")
        self.pools = {"live": self.workers}
        self.service = None

    def start(self, pools=None):
        self.service = PromptService(
            site=self.site, bus=self.bus, clock=self.clock, db=self.db, engine=pools or self.pools
        )
        return self.service

    def visit(self, number):
        fields = {
            "groupId": f"g{number}", "position": [10.0, -30.0], "instrument": "DemoCam", "filters": "r_demo",
            "startTime": self.clock.now_tai_s() + 22, "duration": 30.0, "nimages": 1, "survey": "a",
        }  # fmt: skip
        self.bus.publish("ScriptQueue.nextVisit", fields)

    def image(self, number, detectors=(0,), *, name="x.fits", message="", hop="at_archive", age_s=0.0):
        for detector in detectors:
            fields = {
                "obsId": OBS.format(number), "instrument": "DemoCam", "exposureId": 2026112000000 + number,
                "groupId": f"g{number}", "detector": detector, "detectorName": f"R00_S0{detector}", "hop": hop,
                "place": "archive", "path": f"/nowhere/{name}", "message": message,
                "hopTai": self.clock.now_tai_s() - age_s,
            }  # fmt: skip
            self.bus.publish("Image.hop", fields)

    def run(self, n=6):
        for _ in range(n):
            self.service.step(0.0)

    def outcomes(self):
        told = [m.fields for m in self.bus.replay(["Prompt.detectorProcessed"])]
        hops = [m.fields for m in self.bus.replay(["Image.hop"]) if m.fields["hop"] == "processed"]
        seen = [(f["obsId"][-2:], f["detector"], f["outcome"]) for f in told]
        assert seen == [(f["obsId"][-2:], f["detector"], f["outcome"]) for f in hops], "event and hop agree"
        return seen

    def told(self):
        self.service._next_pool = 0.0
        self.service._tell_pool()
        return self.bus.latest("Prompt.overload").fields

    def waiting(self):
        return [
            (r["obs_id"][-2:], r["detector"], r["reason"])
            for r in missed_images(self.db)
            if not r["ended_tai"]
        ]


@pytest.fixture
def make(tmp_path, database, monkeypatch):
    monkeypatch.setattr(prompt_jobs, "WORKER", "support.prompt_jobs")
    made = []

    def build(**settings):
        made.append(World(tmp_path, database, **settings))
        return made[-1]

    yield build
    for world in made:
        if world.service is not None:
            world.service.close()


def test_the_oldest_are_dropped_told_and_done_when_the_workers_are_idle(make):
    world = make(overload={"drop_above": 2})
    world.start()
    for number in range(1, 6):
        world.image(number, age_s=50.0 - number)
    world.run()
    assert world.outcomes() == [("03", 0, "Dropped")]
    assert world.waiting() == [("03", 0, "Dropped")]
    told = world.told()
    assert (told["dropped"], told["missed"], told["waiting"], told["running"]) == (1, 1, 2, 2)
    # while images wait or run the missed one does not begin
    world.workers.go_on("000001")
    world.run()
    assert world.workers.images == [f"process/{OBS.format(2)}/0", f"process/{OBS.format(4)}/0"]
    for _ in range(4):
        world.workers.go_on()
        world.run()
    assert sorted(world.outcomes())[2:4] == [("03", 0, "Dropped"), ("03", 0, "ok")]
    assert world.waiting() == []
    assert summary(world.db) == {"Dropped": {"done": 1}}


def test_what_is_far_beyond_its_deadline_is_ended_and_not_begun(make):
    world = make(overload={"kill_after_s": 30})
    world.start()
    world.workers.names = ["a"]
    world.image(1)
    world.image(2)
    world.run()
    assert world.workers.images == [f"process/{OBS.format(1)}/0"]
    world.service.clock = world.service.manager.clock = Clock.starting_at(NIGHT + 91.0, rate=1.0)
    world.workers.names = []  # the process is gone; another one is on its way
    world.run()
    assert [worker for _, worker in world.workers.killed] == ["a"]
    assert sorted(world.outcomes()) == [("01", 0, "Killed"), ("02", 0, "Deadline")]
    assert sorted(world.waiting()) == [("01", 0, "Killed"), ("02", 0, "Deadline")]
    assert (world.told()["killed"], world.told()["late"]) == (1, 1)
    # the killed try ends all the same, late: nothing comes of it
    world.workers.done.append(Completion(f"prompt.process/{OBS.format(1)}/0#1", JobResult("Success")))
    world.run()
    assert len(world.outcomes()) == 2


def test_visits_are_sampled_while_behind_and_the_others_are_done_later(make):
    world = make(overload={"behind": 1.0, "sampling": 0.5})
    world.start()
    # three wait for two workers
    world.image(1, range(4))
    world.image(2)
    world.run()
    assert world.told()["behind"]
    numbers = range(3, 15)
    chosen = {n for n in numbers if is_sampled(f"g{n}", 0.5)}
    assert 2 <= len(chosen) <= 10
    for number in numbers:
        world.visit(number)
        world.image(number, range(3))
    world.run()
    left = {int(obs) for obs, _, word in world.outcomes() if word == "SampledOut"}
    assert left == set(numbers) - chosen
    assert world.told()["sampledOut"] == 3 * len(left)
    prepared = {
        row["payload"]["visit"]["group_id"] for row in world.service.store.payloads("prompt.preload", 0)
    }
    assert prepared == {f"g{n}" for n in chosen}
    # a service that is started anew leaves out the rest of such a visit too
    again = world.start()
    world.image(min(left), [3])
    world.run()
    assert (f"{min(left):02d}", 3, "SampledOut") in world.outcomes()
    for number in chosen:
        world.image(number, [3])
    for _ in range(60):
        world.workers.go_on()
        world.run(2)
    assert world.waiting() == []
    assert {word for _, _, word in world.outcomes()} == {"SampledOut", "ok"}
    assert again.manager.running == 0


def test_a_passing_failure_is_queued_and_one_of_the_image_is_not(make, tmp_path):
    world = make(retries=0, missed={"when": "command"})
    world.start()
    world.workers.names = ["a", "b", "c"]
    world.image(1, name="flaky.fits")
    world.image(2, name="notemplate.fits")
    world.image(3, name="breaks.fits")
    world.run()
    for _, payload, _ in world.workers.held.values():
        if "flaky" in payload["image"]["path"]:
            payload["image"]["path"] = str(tmp_path / "flaky.fits")
    world.workers.go_on()
    world.run()
    assert {o[0]: o[2] for o in world.outcomes()} == {
        "01": "Transient",
        "02": "NoWorkFound",
        "03": "Failed",
    }
    assert world.waiting() == [("01", 0, "Transient")]


def test_on_command_the_command_does_it_and_every_image_is_reported_once(make, tmp_path, monkeypatch):
    world = make(overload={"drop_above": 1}, missed={"when": "command", "alerts": False})
    world.start()
    world.image(1, range(4))
    world.run()
    world.workers.go_on()
    world.run()
    world.workers.go_on()
    world.run()
    assert world.service.manager.running == 0
    assert len(world.waiting()) == 1, "the service leaves it alone"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    listed = CliRunner().invoke(process_missed, ["--site", str(tmp_path), "--list", "--json"])
    (row,) = json.loads(listed.output)
    assert (row["reason"], row["state"]) == ("Dropped", "queued")
    done = CliRunner().invoke(process_missed, ["--site", str(tmp_path), "--json"], catch_exceptions=False)
    assert json.loads(done.output) == {"outcomes": {"ok": 1}, "left": 0}
    payload = world.service.store.get(f"prompt.missed/{row['obs_id']}/{row['detector']}")["payload"]
    assert payload["publish_alerts"] is False
    assert world.outcomes()[-1] == ("01", row["detector"], "ok")
    again = CliRunner().invoke(process_missed, ["--site", str(tmp_path)])
    assert "nothing is missed" in again.output


def test_failed_ones_are_done_again_when_asked(make, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    world = make(overload={"drop_above": 1}, missed={"when": "command", "attempts": 1})
    world.start()
    world.image(1, range(4), name="breaks.fits")
    world.run()
    first = CliRunner().invoke(process_missed, ["--site", str(tmp_path), "--json"])
    assert (first.exit_code, json.loads(first.output)["outcomes"]) == (1, {"Failed": 1})
    without = CliRunner().invoke(process_missed, ["--site", str(tmp_path), "--json"])
    assert json.loads(without.output)["outcomes"] == {}
    again = CliRunner().invoke(process_missed, ["--site", str(tmp_path), "--json", "--again"])
    assert json.loads(again.output)["outcomes"] == {"Failed": 1}


def test_caught_up_images_take_no_time_of_the_live_workers(make):
    world = make()
    own = HeldWorkers("c")
    world.start({"live": world.workers, "catch-up": own})
    world.visit(9)  # expected: the live workers are kept free for it
    world.run()
    world.image(1, message="mode catch-up")
    # caught up on the first link, sent on by the usual way
    world.image(2, message="mode catch-up", hop="at_base")
    world.image(2)
    world.image(3, message="mode science")
    world.run()
    assert world.workers.images == [f"process/{OBS.format(3)}/0"]
    assert own.images == [f"missed/{OBS.format(1)}/0"]
    own.go_on()
    world.run()
    assert own.images == [f"missed/{OBS.format(2)}/0"]
    own.go_on()
    world.run()
    assert sorted(world.outcomes()) == [
        ("01", 0, "CaughtUp"), ("01", 0, "ok"), ("02", 0, "CaughtUp"), ("02", 0, "ok"),
    ]  # fmt: skip


def test_by_daytime_only_in_the_mode_for_it(make):
    world = make(overload={"drop_above": 1}, missed={"when": "daytime"})
    world.start()
    world.image(1, range(4))
    world.run()
    for _ in range(3):
        world.workers.go_on()
        world.run()
    assert (len(world.waiting()), world.workers.images) == (1, [])
    fields = {"processing": "enabled", "settings": '{"trigger": "none", "missed": true}', "epoch": 1}
    world.bus.publish("AlertProductionCluster.detailedState", fields)
    world.service._leader._next = 0.0
    world.service.manager._look_at = 0.0
    world.run()
    assert [name.split("/")[0] for name in world.workers.images] == ["missed"]


def test_by_daytime_new_objects_are_measured_on_earlier_images(make, database):
    world = make()
    Level1(database, world.clock)
    LedgerService(site=world.site, bus=world.bus, db=world.db, clock=world.clock).close()
    database.execute(
        "INSERT INTO level1.precovery (dia_object_id, ra, dec, visit, detector, first_mjd_tai, queued_tai)"
        " VALUES (7, 10, -30, 1, 0, 61364, %s)",
        (NIGHT,),
    )
    service = world.start()
    world.run()
    assert world.workers.images == []  # by night
    fields = {"processing": "enabled", "settings": '{"trigger": "none", "missed": true}', "epoch": 1}
    world.bus.publish("AlertProductionCluster.detailedState", fields)
    service._leader._next = 0.0
    world.run()
    service.manager._look_at = 0.0
    world.run()
    (job,) = world.workers.images
    assert job.startswith("precovery/")
    world.run()
    assert world.workers.images == [job]  # one at a time
    world.workers.go_on()
    world.run()
    assert database.execute("SELECT n_images, done_tai IS NULL FROM level1.precovery") == [(0, False)]
    service._next_precovery = 0.0
    world.run()
    assert world.workers.images == []  # nothing waits any more


def test_the_ledger_and_the_night_report_know(make):
    from cumbre.site.report import missed, outcomes

    world = make(overload={"drop_above": 2}, missed={"when": "command"})
    ledger = LedgerService(site=world.site, bus=world.bus, db=world.db, clock=world.clock)
    world.start()
    for number in range(1, 6):
        world.image(number)
    world.run()
    for _ in range(3):
        world.workers.go_on()
        world.run()
    for _ in range(3):
        ledger.step(0.0)
    assert outcomes(world.db) == {"Dropped": 1, "ok": 4}
    assert missed(world.db) == {"Dropped": {"queued": 1}}
    ledger.close()


def test_a_site_that_never_missed_anything_has_nothing_to_report(database):
    assert summary(database) == {}


def test_an_image_type_that_is_not_of_the_sky_is_reduced_where_the_mode_says_so(make):
    world = make()
    world.start()
    settings = {"trigger": "Camera.startIntegration", "processing": "isr", "corrections": [], "psf": False}
    fields = {
        "processing": "enabled", "settings": json.dumps(settings), "epoch": 1,
        "configurationName": "raw_calibration",
    }  # fmt: skip
    world.bus.publish("AlertProductionCluster.detailedState", fields)
    world.service._leader._next = 0.0
    world.visit(1)
    world.run()
    assert world.workers.held == {}, "no visits, so nothing is prepared"
    world.image(1)
    world.image(2)
    world.run()
    asked = [(function, payload["work"]) for function, payload, _ in world.workers.held.values()]
    assert [function for function, _ in asked] == ["support.prompt_jobs:correct"] * 2
    assert asked[0][1] == {
        "kind": "isr", "corrections": [], "psf": False, "wavefront": True, "mode": "raw_calibration",
    }  # fmt: skip
    world.workers.go_on()
    world.run()
    assert world.outcomes() == [("01", 0, "ok"), ("02", 0, "ok")]


def test_inline_one_worker_does_all(make):
    world = make()
    world.start({"live": InlineEngine()})
    world.visit(1)
    world.image(1, range(4))
    world.run(20)
    assert len(world.outcomes()) == 4
