"""``kill -9`` of every kind of process while images are taken; hung processes."""

from __future__ import annotations

import threading
import time

import pytest

from cumbre.archive.alarms import active_alarms
from cumbre.site.chaos import site_pids
from cumbre.site.roles import roles_of
from cumbre.site.supervisor import start_detached

ROLES = (
    "ledger", "headers", "writer-1", "writer-2", "replicator-1", "wan-summit-base", "base-1", "tape-base",
    "forwarder-1", "wan-base-archive", "archive-1", "tape-archive", "catch-up", "scrub", "control-base",
    "control-base-spare", "control-archive",
)  # fmt: skip


def present(running, name):
    if name not in roles_of(running.site):
        pytest.skip(f"this site has no role {name}")


@pytest.mark.parametrize("name", ROLES)
def test_a_killed_service_loses_nothing(running, name):
    present(running, name)
    taken = running.take(1)
    running.kill(name)  # in the middle of what it does with that image, most times
    taken += running.take(1)
    running.nothing_is_lost(taken)


def test_a_killed_camera_keeps_what_it_read_out(running):
    taken = running.take(1)
    running.kill("camera")
    running.nothing_is_lost(taken + running.take(1))


def alarms(running):
    """Names of the alarms that hold."""
    return {alarm["component"] for alarm in active_alarms(running.bus)}


def test_every_process_is_heard_and_none_is_told_to_be_wrong(running):
    names = set()
    with running.bus.subscribe(["Service.heartbeat"], start="now") as beats:
        running.until(
            lambda: (
                names.update(m.fields["name"] for m in beats.poll(1.0))
                or names >= set(roles_of(running.site))
            )
        )
    running.until(lambda: not alarms(running), what="alarms do not end")


def test_a_killed_database_comes_back_and_the_images_did_not_wait_for_it(running):
    """In the middle of a series of images, twice; that it happened is told."""
    before = running.bus.publish("Service.logMessage", {"name": "test", "message": "now"})
    taken = []
    for _ in range(2):
        series = threading.Thread(target=lambda: taken.extend(running.take(3)))
        series.start()
        running.kill("postgres")
        series.join()
    running.nothing_is_lost(taken)
    assert len(taken) == 6

    def told():
        told = [m.fields for m in running.bus.replay(["Storage.alarm"], start_offset=before)]
        return [fields["active"] for fields in told if fields["name"] == "database"]

    running.until(lambda: True in told() and "database" not in alarms(running), what=f"{told()}")


def test_a_killed_supervisor_is_replaced_and_finds_everything(running):
    taken = running.take(2)
    pids = site_pids(running.site)
    running.kill_only("supervisor")
    start_detached(running.site)
    assert (
        site_pids(running.site)["postgres"] == pids["postgres"]
    )  # the database was taken over, not restarted
    running.nothing_is_lost(taken + running.take(1))


@pytest.mark.parametrize("name", ["writer-1", "replicator-1", "base-1", "archive-1", "ledger", "postgres"])
def test_a_hung_process_delays_and_loses_nothing(running, name):
    present(running, name) if name != "postgres" else None
    kind = "hang_database" if name == "postgres" else "hang_service"
    with running.fault(kind, name):
        taken = running.take(2)
        time.sleep(2.0)
    running.nothing_is_lost(taken)


def test_a_locked_bus_delays_and_loses_nothing(running):
    taken = running.take(1)
    with running.fault("bus_locked", "bus"):
        time.sleep(3.0)
    running.nothing_is_lost(taken + running.take(1))
