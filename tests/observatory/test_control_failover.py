"""The warm spare with real processes: kill -9 and SIGSTOP of the acting one at any moment, nothing lost or twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter

import psutil
import pytest
import yaml

from cumbre.bus import AckCode, open_bus
from cumbre.core.configuration import Site
from cumbre.observatory.component.client import RemoteComponent
from support.control import World

LIMIT_S = 10.0
"""What the site promises for a takeover."""


class Processes:
    """A site with control processes that are started and killed, on the world's bus and database."""

    def __init__(self, root, database):
        self.world = World(root, database)
        config = self.world.site.config.model_copy(deep=True)
        data = config.model_dump(mode="json") | {
            "database": database.dsn,
            "bus": "embedded",
            "archive": {"control": True},
            "control": {"start": {"Archiver": "science"}, "lease_s": 1.5},
        }
        (root / "site.yaml").write_text(yaml.safe_dump(data))
        self.site = Site.load(root)
        self.clock = self.world.clock
        self.clock.save(self.site.clock_path)
        self.url = f"sqlite:///{root}/bus/bus.db"
        self.bus = self.world.bus = open_bus(self.url, identity="observer@console", clock=self.clock)
        self.world.url = self.url
        self.world._beaten = 0.0
        self.running = {}
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat)
        self.world.register(1, 2, 3)
        self._beats.start()

    def _beat(self):
        bus = open_bus(self.url, identity="replicators", clock=self.clock)
        while not self._stop.wait(0.5):
            bus.publish_many([("Replicator.heartbeat", fields) for fields in self.world.pairs.values()])

    def start(self, role):
        log = (self.site.root / f"{role}.log").open("a")
        self.running[role] = subprocess.Popen(
            [sys.executable, "-m", "cumbre.site.runner", str(self.site.root), role], stdout=log, stderr=log
        )
        log.close()

    def until(self, so, limit_s=60.0):
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if found := so():
                return found
            if any((process.poll() or 0) > 0 for process in self.running.values()):
                break  # one has failed; that it was killed is a negative number
            time.sleep(0.02)
        logs = "\n".join(path.read_text()[-3000:] for path in self.site.root.glob("*.log"))
        raise AssertionError(f"not within {limit_s} s: {so}\n{logs}")

    def acting(self):
        """Role and epoch of who acts."""
        last = self.bus.latest("Control.system", key="control-base")
        if last is None or last.fields["state"] != "ready":
            return None
        return last.fields["holder"].split()[0], last.fields["epoch"]

    def pid(self, role):
        return self.running[role].pid

    def pause(self, role):
        """Stop a process anywhere but within a write to the embedded bus, whose lock all would wait for."""
        while True:
            os.kill(self.pid(role), signal.SIGSTOP)
            try:
                with sqlite3.connect(self.site.root / "bus" / "bus.db", timeout=0.5) as probe:
                    probe.execute("BEGIN IMMEDIATE")
                    probe.rollback()
            except sqlite3.OperationalError:
                os.kill(self.pid(role), signal.SIGCONT)
                time.sleep(0.05)
                continue
            finally:
                probe.close()
            return

    def close(self):
        self._stop.set()
        self._beats.join()
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.running.values():
            process.wait(10)
        self.world.close()

    def orders(self):
        return [m.fields for m in self.bus.replay(["Control.job"])]

    def expose_for(self, seconds, every=0.05):
        """Images begin at a steady rate; gives their names."""
        images, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            images.append(self.world.expose())
            time.sleep(every)
        return images

    def ordered(self, images):
        """Wait until each image has its job in the database and its order on the bus."""
        wanted = {f"replicate/{obs_id}/R22" for obs_id in images}
        self.until(lambda: wanted <= {order["jobId"] for order in self.orders()})
        rows = Counter(row["job_id"] for row in self.world.jobs())
        assert all(rows[job_id] == 1 for job_id in wanted)


@pytest.fixture
def site(tmp_path, database):
    processes = Processes(tmp_path, database)
    yield processes
    processes.close()


def begin(site):
    site.start("control-base")
    site.until(lambda: site.acting() == ("control-base", 1))
    site.start("control-base-spare")
    # the site starts its archiver itself
    site.until(lambda: (site.world.state() or {}).get("processing") == "enabled")


def test_kill_9_of_the_acting_one_loses_no_image_and_no_command(site):
    begin(site)
    site.until(lambda: psutil.Process(site.pid("control-base-spare")).cpu_times().user > 0.2)
    images = site.expose_for(0.5)
    killed = time.monotonic()
    site.running["control-base"].kill()
    client, answer = RemoteComponent(site.bus, "EfdReplicator"), []
    commanding = threading.Thread(target=lambda: answer.append(client.command_now("init", timeout_s=20)))
    commanding.start()
    images += site.expose_for(1.0)
    site.until(lambda: site.acting() == ("control-base-spare", 2))
    took = time.monotonic() - killed
    images += site.expose_for(0.3)
    site.ordered(images)
    commanding.join()
    assert answer[0].ok, "a command sent meanwhile is done by the spare"
    assert took < LIMIT_S
    told = site.bus.latest("Control.system", key="control-base").fields
    assert told["takeover"]
    assert told["takeoverS"] < LIMIT_S
    assert site.world.state()["processing"] == "enabled", "it goes on where the other was"
    # jobs in flight are known to the one that took over: it brings them to their end
    first = images[0]
    site.world.arrive(first, [f"R22_S{x}{y}" for x in range(3) for y in range(3)])
    site.until(lambda: site.world.jobs(f"obs_id = '{first}' AND state = 'done'"))
    # and the first, started again, is the spare of the spare
    site.start("control-base")
    site.until(lambda: psutil.Process(site.pid("control-base")).cpu_times().user > 0.2)
    time.sleep(0.5)
    site.running["control-base-spare"].kill()
    site.until(lambda: site.acting() == ("control-base", 3))
    site.ordered(site.expose_for(0.3))


def test_one_that_was_paused_does_not_act_after_the_takeover(site):
    begin(site)
    before = site.expose_for(0.5)
    site.pause("control-base")
    meanwhile = site.expose_for(0.5)
    site.until(lambda: site.acting() == ("control-base-spare", 2))
    disabled = RemoteComponent(site.bus, "Archiver").command_now("disable")
    assert disabled.code is AckCode.COMPLETE
    site.ordered(before + meanwhile)
    taken_over = len(site.orders())
    os.kill(site.pid("control-base"), signal.SIGCONT)
    site.expose_for(1.0)  # it was enabled when it was stopped: it would make jobs of these
    site.until(lambda: "another process acts" in (site.site.root / "control-base.log").read_text())
    assert [order["epoch"] for order in site.orders()[taken_over:]] == []
    assert site.world.state()["processing"] == "draining"
    assert site.world.state()["epoch"] == 2
    assert site.acting() == ("control-base-spare", 2)
    epochs = site.world.db.execute("SELECT epoch FROM control.entity WHERE name = 'Archiver'")
    assert epochs == [(2,)]
    # it is a spare now, and a good one
    site.running["control-base-spare"].kill()
    site.until(lambda: site.acting() == ("control-base", 3))
    assert site.world.state()["processing"] == "draining"


def test_a_stop_of_the_site_is_a_cold_boot_and_it_starts_its_entities_again(site):
    begin(site)
    for role in ("control-base-spare", "control-base"):
        site.running[role].terminate()
        site.running[role].wait(10)
    assert RemoteComponent(site.bus, "Archiver").detailed_state["processing"] == "enabled"
    seen = site.bus.subscribe(["Archiver.detailedState"], start="now")
    site.start("control-base")
    site.until(lambda: site.acting() == ("control-base", 2))
    site.until(
        lambda: (site.world.state() or {}).get("epoch") == 2 and site.world.state()["processing"] == "enabled"
    )
    states = [(m.fields["protocolState"], m.fields["processing"]) for m in seen.poll(0.0)]
    assert states == [
        ("OFFLINE", "disabled"),
        ("IDLE", "disabled"),
        ("BUSY", "disabled"),
        ("IDLE", "disabled"),
        ("IDLE", "enabled"),
    ]
