"""The base control system: commands to their effects, jobs to their ends, with a real bus and database."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from cumbre.bus import AckCode, open_bus
from cumbre.observatory.component.client import RemoteComponent
from cumbre.observatory.component.machine import SummaryState
from support.control import World

RAFT = [f"R22_S{x}{y}" for x in range(3) for y in range(3)]


@pytest.fixture
def world(tmp_path, database):
    world = World(tmp_path, database)
    yield world
    world.close()


@pytest.fixture
def base(world):
    system = world.control()
    world.run(lambda: system.is_active)
    return system


def test_a_cold_boot_tests_itself_and_publishes_offline(world, base):
    told = world.bus.latest("Control.system").fields
    assert (told["identity"], told["state"], told["epoch"]) == ("control-base", "ready", 1)
    for entity in ("Archiver", "CatchUpArchiver", "EfdReplicator", "AlertProductionCluster"):
        assert RemoteComponent(world.bus, entity).summary_state is SummaryState.OFFLINE
        assert world.state(entity)["protocolState"] == "OFFLINE"
        assert "science" in world.bus.latest(f"{entity}.configurationsAvailable").fields["overrides"]
    assert world.db.execute("SELECT count(*) FROM control.installation") == [(1,)]


def test_init_configure_enable_and_an_image_becomes_one_job_a_raft(world, base):
    world.register(1, 2)
    world.ready("Archiver")
    state = world.state()
    assert (state["protocolState"], state["configurationName"], state["processing"]) == (
        "IDLE", "science", "enabled",
    )  # fmt: skip
    applied = world.bus.latest("Archiver.configurationApplied").fields
    assert applied["configurations"] == "science"
    assert applied["hash"] == state["configurationHash"]
    obs_id = world.expose()
    world.run(world.orders)
    (order,) = world.orders()
    assert order["jobId"] == f"replicate/{obs_id}/R22"
    assert (order["kind"], order["entity"], order["mode"], order["attempt"]) == (
        "replicate", "Archiver", "science", 1,
    )  # fmt: skip
    assert order["detectors"] == RAFT
    assert order["link"] == "summit-base"
    assert order["pair"] in (1, 2)
    assert order["epoch"] == 1
    world.arrive(obs_id, RAFT[:-1])
    world.run(lambda: world.jobs("state = 'running'"))
    world.arrive(obs_id, RAFT[-1:])
    (job,) = world.run(lambda: world.jobs("state = 'done'"))
    assert job["outcome"] == "ok"
    assert job["submitted_tai"] <= job["started_tai"] <= job["ended_tai"]


def test_nothing_is_ordered_unless_enabled_and_not_for_what_began_before(world, base):
    world.register(1)
    world.expose()
    world.command("Archiver", "init")
    world.command("Archiver", "configure", configuration="science")
    assert not base.entities["Archiver"].is_subscribed
    world.expose()
    world.command("Archiver", "enable")
    assert base.entities["Archiver"].is_subscribed
    mine = world.expose()
    world.run(world.orders)
    world.command("Archiver", "disable")
    assert not base.entities["Archiver"].is_subscribed
    world.expose()
    world.command("Archiver", "enable")
    later = world.expose()
    world.run(lambda: len(world.orders()) > 1)
    assert [order["obsId"] for order in world.orders()] == [mine, later]


def test_an_image_that_began_before_the_disable_was_sent_has_its_job(world, base):
    world.register(1)
    world.ready("Archiver")
    obs_id = world.expose()
    world.bus.publish("Archiver.disable")  # both are there before control looks
    world.run(lambda: world.state()["processing"] != "enabled")
    assert [order["obsId"] for order in world.orders()] == [obs_id]


def test_disable_kills_no_job_and_is_over_when_the_last_has_ended(world, base):
    world.register(1)
    world.ready("Archiver")
    obs_id = world.expose()
    world.run(world.jobs)
    ack = world.command("Archiver", "disable")
    assert ack.ok
    assert "1 jobs go on" in ack.result
    assert (world.state()["processing"], world.state()["jobsInFlight"]) == ("draining", 1)
    assert world.jobs()[0]["ended_tai"] is None
    world.arrive(obs_id, RAFT)
    world.run(lambda: world.state()["processing"] == "disabled")
    assert world.jobs()[0]["outcome"] == "ok"


def test_abort_leaves_it_enabled_and_taking_data_and_disable_works_in_error(world, base):
    world.register(1)
    world.ready("Archiver")
    assert world.command("Archiver", "abort").ok
    assert (world.state()["protocolState"], world.state()["processing"]) == ("ERROR", "enabled")
    assert RemoteComponent(world.bus, "Archiver").summary_state is SummaryState.FAULT
    assert world.bus.latest("Archiver.errorCode").fields["errorCode"] == 1
    world.expose()
    world.run(world.jobs)
    assert world.command("Archiver", "disable").ok
    assert (world.state()["protocolState"], world.state()["processing"]) == ("ERROR", "draining")
    assert world.command("Archiver", "enable").code is AckCode.FAILED
    assert world.command("Archiver", "reset").ok
    assert (world.state()["protocolState"], world.state()["configurationName"]) == ("IDLE", "")
    assert world.bus.latest("Archiver.errorCode").fields["errorCode"] == 0


def test_an_invalid_configuration_leaves_the_old_one_running(world, base):
    world.register(1)
    world.ready("Archiver")
    ack = world.command("Archiver", "configure", configuration="scienec")
    assert ack.code is AckCode.FAILED
    assert "science" in ack.result
    assert (world.state()["configurationName"], world.state()["processing"]) == ("science", "enabled")
    assert base.entities["Archiver"].is_subscribed
    folder = world.site.path("modes")
    folder.mkdir(parents=True)
    (folder / "many.yaml").write_text(
        "mode: many\ndescription: x\nwait_s: 0\nentities: {Archiver: {min_pairs: 22}}\n"
    )
    ack = world.command("Archiver", "configure", configuration="many")
    assert ack.code is AckCode.FAILED
    assert "1 fully-operational" in ack.result
    assert "expected 22" in ack.result
    assert world.state()["processing"] == "enabled"
    assert world.command("Archiver", "configure", configuration="engineering").ok
    assert (world.state()["configurationName"], world.state()["processing"]) == ("engineering", "disabled")


def configuring(world, entity="Archiver"):
    """Send a configure that waits for pairs; gives the list its answer comes to."""
    answer = []
    client = RemoteComponent(open_bus(world.url, identity="observer@desk", clock=world.clock), entity)
    thread = threading.Thread(
        target=lambda: answer.append(client.command_now("configure", timeout_s=1.0, configuration="science"))
    )
    thread.start()
    world.run(lambda: (world.state(entity) or {}).get("commandInProgress") == "configure science")
    return answer, thread


@pytest.mark.parametrize(
    ("verb", "protocol"), [("stop", "IDLE"), ("abort", "ERROR"), ("reset", "IDLE"), ("release", "OFFLINE")]
)
def test_what_ends_a_configure_that_runs(world, base, verb, protocol):
    world.command("Archiver", "init")
    answer, thread = configuring(world)
    assert world.state()["protocolState"] == "BUSY"
    busy = world.command("Archiver", "configure", configuration="engineering")
    assert busy.code is AckCode.FAILED
    assert world.command("Archiver", verb).ok
    world.run(lambda: answer)
    thread.join()
    assert answer[0].code is AckCode.ABORTED
    assert (world.state()["protocolState"], world.state()["configurationName"]) == (protocol, "")
    world.register(1)
    world.run(lambda: base.pairs.count("fully-operational") == 1)
    for _ in range(5):
        base.step(0.0)
    assert world.state()["configurationName"] == ""


def test_a_configure_waits_for_pairs_and_tells_that_it_takes_time(world, base):
    world.command("Archiver", "init")
    answer, thread = configuring(world)
    time.sleep(1.2)  # longer than the commander's own limit: "in progress" has extended it
    world.register(1)
    world.run(lambda: answer)
    thread.join()
    assert answer[0].ok
    codes = [message.fields["ack"] for message in world.bus.replay(["Archiver.ackcmd"])]
    assert codes == [303, 301, 303]


def test_the_csc_face(world, base):
    world.register(1)
    seen = []

    def go(verb, **fields):
        ack = world.command("Archiver", verb, **fields)
        seen.append((verb, ack.ok, RemoteComponent(world.bus, "Archiver").summary_state.name))

    go("start", configurationOverride="science")
    go("enterControl")
    go("enterControl")
    go("start", configurationOverride="science")
    go("start", configurationOverride="engineering")
    go("enable")
    go("standby")
    go("disable")
    go("standby")
    go("exitControl")
    assert seen == [
        ("start", False, "OFFLINE"), ("enterControl", True, "STANDBY"), ("enterControl", False, "STANDBY"),
        ("start", True, "DISABLED"), ("start", False, "DISABLED"), ("enable", True, "ENABLED"),
        ("standby", False, "ENABLED"), ("disable", True, "DISABLED"), ("standby", True, "STANDBY"),
        ("exitControl", True, "OFFLINE"),
    ]  # fmt: skip


def test_an_internal_fault_disables_and_says_why(world, base):
    world.register(1)
    world.ready("Archiver")
    base.entities["Archiver"].fault("disk on fire", "Traceback: …")
    assert RemoteComponent(world.bus, "Archiver").summary_state is SummaryState.FAULT
    assert world.state()["processing"] == "disabled"
    error = world.bus.latest("Archiver.errorCode").fields
    assert (error["errorCode"], error["errorReport"]) == (2, "disk on fire")
    assert world.command("Archiver", "standby").ok
    assert world.bus.latest("Archiver.errorCode").fields["errorCode"] == 0


def test_engineering_locks_control_out(world, base):
    locked = world.command("Control", "lockOut", reason="new software")
    assert locked.ok
    ack = world.command("Archiver", "init")
    assert ack.code is AckCode.FAILED
    assert "new software" in ack.result
    assert world.command("Archiver", "enterControl").code is AckCode.FAILED
    assert world.command("Archiver", "abort").code is AckCode.FAILED
    assert world.command("Control", "allow").ok
    assert world.command("Archiver", "init").ok


def test_who_may_not_is_refused_and_both_are_audited(world, base):
    ack = world.command("Archiver", "init", person="intruder")
    assert ack.code is AckCode.NO_PERMISSION
    assert world.state()["protocolState"] == "OFFLINE"
    assert world.command("Archiver", "init").ok
    trail = world.db.query("SELECT commander, ack FROM control.command ORDER BY accepted_tai")
    assert trail == [{"commander": "intruder", "ack": -300}, {"commander": "observer@console", "ack": 303}]
    events = [m.fields for m in world.bus.replay(["Archiver.commandRecorded"])]
    assert [(e["commander"], e["command"], e["ack"]) for e in events] == [
        ("intruder", "init", -300), ("observer@console", "init", 303),
    ]  # fmt: skip
    assert world.command("Control", "lockOut", person="intruder").code is AckCode.NO_PERMISSION


def test_the_most_special_allow_list_counts(tmp_path, database):
    commanders = {"*": ["*@*"], "Archiver": ["chief@*"], "Archiver.disable": ["*"]}
    world = World(tmp_path, database, control={"commanders": commanders})
    system = world.control()
    world.run(lambda: system.is_active)
    assert world.command("Archiver", "init").code is AckCode.NO_PERMISSION
    assert world.command("Archiver", "init", person="chief@console").ok
    assert world.command("Archiver", "disable", person="anybody").ok
    assert world.command("EfdReplicator", "init").ok
    world.close()


def test_a_command_given_again_is_done_once_and_answered_the_same(world, base):
    world.register(1)
    world.ready("Archiver")
    commands = list(world.bus.replay(["Archiver.disable", "Archiver.enable", "Archiver.configure"]))
    world.command("Archiver", "disable")
    for message in commands:  # the bus gives old commands again, or somebody replays them
        base.entities["Archiver"].handle(message)
    assert world.state()["processing"] == "disabled"
    (enable,) = (m for m in commands if m.topic == "Archiver.enable")
    answers = [m for m in world.bus.replay(["Archiver.ackcmd"]) if m.seq_num == enable.seq_num]
    assert [m.fields["ack"] for m in answers] == [303, 303]
    assert world.db.execute("SELECT count(*) FROM control.command") == [(4,)]


def test_a_command_from_long_ago_is_refused(world, base):
    world.clock_before = world.clock.now_tai_s() - 100.0
    from cumbre.core.time import Clock

    old = open_bus(
        world.url, identity="observer@console", clock=Clock.starting_at(world.clock_before, rate=1)
    )
    old.publish("Archiver.init")
    world.run(lambda: world.db.execute("SELECT 1 FROM control.command"))
    ((ack, result),) = world.db.execute("SELECT ack, result FROM control.command")
    assert ack == -302
    assert "sent 100 s ago" in result
    assert world.state()["protocolState"] == "OFFLINE"


def test_a_notebook_awaits_a_command(world, base):
    async def notebook():
        client = RemoteComponent(world.bus, "EfdReplicator")
        return await asyncio.gather(
            client.command("init"), client.command("setLogLevel", level=10), asyncio.to_thread(serve)
        )

    def serve():
        world.run(lambda: len(list(world.bus.replay(["EfdReplicator.ackcmd"]))) == 2)

    first, second, _ = asyncio.run(notebook())
    assert first.ok
    assert second.ok
    assert world.bus.latest("EfdReplicator.logLevel").fields["level"] == 10


def test_prerequisites_of_each_entity(world, base):
    folder = world.site.path("modes")
    folder.mkdir(parents=True)
    (folder / "now.yaml").write_text(
        "mode: now\ndescription: as science, without waiting\nwait_s: 0\nentities:\n"
        "  CatchUpArchiver: {}\n  EfdReplicator: {}\n  AlertProductionCluster: {min_workers: 3}\n"
    )
    for entity in ("CatchUpArchiver", "EfdReplicator", "AlertProductionCluster"):
        world.command(entity, "init")

    def tried(entity):
        ack = world.command(entity, "configure", configuration="now")
        return "ok" if ack.ok else ack.result

    assert "0 catch-up pairs, expected 1" in tried("CatchUpArchiver")
    world.register(1, pool="catch-up")
    world.run(lambda: base.pairs.count("catch-up"))
    assert tried("CatchUpArchiver") == "ok"
    assert "does not answer" in tried("EfdReplicator")
    world.bus.publish("EfdReplicator.replica", {"reachable": False, "message": "read-only file system"})
    assert "read-only file system" in tried("EfdReplicator")
    world.bus.publish("EfdReplicator.replica", {"reachable": True})
    assert tried("EfdReplicator") == "ok"
    assert "does not answer" in tried("AlertProductionCluster")
    world.bus.publish("AlertProductionCluster.pool", {"workers": 2})
    assert "2 workers, expected 3" in tried("AlertProductionCluster")
    world.bus.publish("AlertProductionCluster.pool", {"workers": 3})
    assert tried("AlertProductionCluster") == "ok"
    world.command("Archiver", "init")
    assert "no part for Archiver" in world.command("Archiver", "configure", configuration="now").result


def test_software_that_is_not_the_accepted_one(world, base):
    world.command("EfdReplicator", "init")
    world.bus.publish("EfdReplicator.replica", {"reachable": True})
    world.db.execute("INSERT INTO control.installation VALUES ('distributor-7', '0.0.9', 'sha256:old', 0)")
    ack = world.command("EfdReplicator", "configure", configuration="science")
    assert ack.code is AckCode.FAILED
    assert "distributor-7 has 0.0.9" in ack.result
    world.db.execute("DELETE FROM control.installation WHERE machine = 'distributor-7'")
    assert world.command("EfdReplicator", "configure", configuration="science").ok


def test_only_accepted_software_may_take_control(tmp_path, database):
    from cumbre.observatory.control.software import accept_installed

    world = World(tmp_path, database, control={"software": "accepted"})
    system = world.control()
    world.run(lambda: system.is_active)
    assert world.bus.latest("Control.system").fields["state"] == "refused"
    ack = world.command("Archiver", "init")
    assert ack.code is AckCode.FAILED
    assert "not accepted" in ack.result
    accept_installed(database, by="engineer", now_tai=0.0)
    system._next["test"] = 0.0
    world.run(lambda: world.bus.latest("Control.system").fields["state"] == "ready")
    assert world.command("Archiver", "init").ok
    world.close()
