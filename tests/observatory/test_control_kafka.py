"""The control system on Kafka instead of the embedded bus: the same tests, commands and jobs to their ends."""

from __future__ import annotations

import uuid

import pytest
from test_control_system import (  # noqa: F401
    base,
    test_a_cold_boot_tests_itself_and_publishes_offline,
    test_a_command_given_again_is_done_once_and_answered_the_same,
    test_an_internal_fault_disables_and_says_why,
    test_disable_kills_no_job_and_is_over_when_the_last_has_ended,
    test_init_configure_enable_and_an_image_becomes_one_job_a_raft,
    test_the_csc_face,
    test_who_may_not_is_refused_and_both_are_audited,
)

from cumbre.bus import open_bus
from cumbre.observatory.control.system import ControlSystem
from support.control import World
from support.kafka import mock_url


@pytest.fixture
def world(tmp_path, database, mock_servers):
    world = World(tmp_path, database, url=mock_url(mock_servers, f"test.{uuid.uuid4().hex[:12]}"))
    yield world
    world.close()


def test_a_spare_takes_over_with_the_jobs_in_flight(world, base):  # noqa: F811
    world.register(1, 2)
    world.ready("Archiver")
    obs_id = world.expose()
    world.run(world.orders)
    first = world.systems.pop()  # it says nothing more, as one that was killed
    spare = world.control("control-base-spare")
    assert isinstance(spare, ControlSystem)
    world.run(lambda: spare.is_active)
    assert world.state()["processing"] == "enabled"
    world.arrive(obs_id, world.orders()[0]["detectors"])
    world.run(lambda: world.jobs("ended_tai IS NOT NULL"))
    (job,) = world.jobs()
    assert job["outcome"] == "ok"
    first.close()
    with open_bus(world.url, identity="late", clock=world.clock) as late:  # last values come from the log
        assert late.latest("Archiver.summaryState").fields["summaryState"] == 2
