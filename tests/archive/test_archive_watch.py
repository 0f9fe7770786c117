"""The watch: each kind of trouble begins an alarm and its end ends it."""

from __future__ import annotations

import time

import pytest

from cumbre.archive import watch as watches
from cumbre.archive.alarms import active_alarms
from cumbre.archive.watch import Watch
from cumbre.bus import open_bus
from cumbre.core.configuration import Site
from cumbre.core.errors import TransientError
from cumbre.core.time import Clock
from cumbre.site.profiles import create_site


class World:
    """A site's bus, a database that fails when told, a machine whose clock can be set."""

    def __init__(self, site, monkeypatch):
        self.site, self.clock = site, Clock.real()
        self.url = f"sqlite:///{site.root}/bus/bus.db"
        self.bus = open_bus(self.url, identity="test", clock=self.clock)
        self.server, self.wall_s = "first", 0.0
        for name, value in (("LOOK_S", 0.05), ("SILENT_S", 0.5), ("DATABASE_S", 0.5), ("CALM_S", 0.3)):
            monkeypatch.setattr(watches, name, value)
        self.watch = self.begin()

    def begin(self):
        bus = open_bus(self.url, identity="watch", clock=self.clock)
        wall = lambda: time.time() + self.wall_s  # noqa: E731
        return Watch(site=self.site, bus=bus, clock=self.clock, db=self, wall=wall)

    # what the watch needs of a database

    def execute(self, statement):
        del statement
        if self.server == "hangs":
            time.sleep(3.0)
        if self.server == "gone":
            raise TransientError("no server")
        return [(self.server,)]

    def close(self):
        """Nothing is held."""

    def beat(self, name, clock=None):
        with open_bus(self.url, identity=name, clock=clock or self.clock) as bus:
            bus.publish("Service.heartbeat", {"name": name, "pid": 1})

    def pool(self, name, pool, reason=""):
        pair = int(name[-1])
        self.bus.publish(
            "Replicator.registration",
            {
                "name": name,
                "link": "summit-base",
                "pair": pair,
                "pool": pool,
                "reason": reason,
                "address": "",
            },
        )

    def alarms(self):
        return {alarm["component"]: alarm for alarm in active_alarms(self.bus)}

    def until(self, condition, meanwhile=lambda: None):
        deadline = time.monotonic() + 20.0
        while not condition():
            assert time.monotonic() < deadline, self.alarms()
            meanwhile()
            self.watch.step(0.02)


@pytest.fixture
def world(tmp_path, monkeypatch):
    create_site(tmp_path / "site")
    (tmp_path / "site" / "bus").mkdir(exist_ok=True)
    world = World(Site.load(tmp_path / "site"), monkeypatch)
    yield world
    world.watch.close()
    world.bus.close()


def test_a_link_whose_pairs_do_not_send(world):
    world.pool("replicator-1", "local-only", "slow")
    world.pool("replicator-2", "fully-operational")
    world.until(lambda: "network-summit-base" in world.alarms())
    alarm = world.alarms()["network-summit-base"]
    assert alarm["severity"] == 2
    assert "1 of 2 pairs" in alarm["text"]
    assert "slow" in alarm["text"]
    world.pool("replicator-2", "local-only", "connection lost")
    world.until(lambda: world.alarms()["network-summit-base"]["severity"] == 3)
    for name in ("replicator-1", "replicator-2"):
        world.pool(name, "fully-operational")
    world.until(lambda: not world.alarms())


def test_an_alarm_of_a_watch_that_died_is_ended_by_the_next(world):
    for name in ("replicator-1", "replicator-2"):
        world.pool(name, "local-only")
    world.until(world.alarms)
    world.watch.close()
    world.watch = world.begin()
    for name in ("replicator-1", "replicator-2"):
        world.pool(name, "fully-operational")
    world.until(lambda: not world.alarms())


@pytest.mark.parametrize("server", ["gone", "hangs", "second"])
def test_a_database_that_is_away_hangs_or_was_started_again(world, server):
    world.until(lambda: world.watch._asking._began)
    world.server = server
    world.until(lambda: "database" in world.alarms() or told(world, "database"))
    if server != "second":
        assert world.alarms()["database"]["severity"] == 3
        world.server = "first"
    world.until(lambda: "database" not in world.alarms())


def told(world, name):
    """Whether an alarm was ever told."""
    return any(message.fields["name"] == name for message in world.bus.replay(["Storage.alarm"]))


def test_a_service_that_falls_silent(world):
    world.beat("base-1")
    world.until(lambda: "service-base-1" in world.alarms(), lambda: world.beat("web"))
    world.until(lambda: not world.alarms(), lambda: (world.beat("base-1"), world.beat("web")))
    time.sleep(0.6)  # all are silent, this process too: the bus, or nothing, was wrong
    for _ in range(5):
        world.watch.step(0.05)
    assert not world.alarms()


def test_a_service_that_lives_in_another_time(world):
    ahead = Clock(world.clock.tai0_s + 60.0, world.clock.mono0_s, 1.0)

    def beats(clock):
        for name in ("ledger", "web", "scrub"):
            world.beat(name)
        world.beat("writer-1", clock)

    world.until(lambda: "clock-writer-1" in world.alarms(), lambda: beats(ahead))
    assert list(world.alarms()) == ["clock-writer-1"]
    assert "+60" in world.alarms()["clock-writer-1"]["text"]
    world.until(lambda: not world.alarms(), lambda: beats(None))


def test_a_step_of_the_machines_clock(world):
    world.wall_s = -30.0
    world.until(lambda: "clock-machine" in world.alarms())
    assert "-30.0 s" in world.alarms()["clock-machine"]["text"]
    world.until(lambda: not world.alarms())


def test_a_component_in_fault(world):
    fields = {"errorCode": 2, "errorReport": "no disk", "traceback": ""}
    world.bus.publish("Archiver.errorCode", fields)
    world.until(lambda: "component-Archiver" in world.alarms())
    assert "no disk" in world.alarms()["component-Archiver"]["text"]
    world.bus.publish("Archiver.errorCode", fields | {"errorCode": 0, "errorReport": ""})
    world.until(lambda: not world.alarms())
