"""Jobs: which pair gets which, what happens when a pair, a deadline or a detector is lost."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumbre.core.errors import ConfigurationError, NotFoundError
from cumbre.core.instrument import load_instrument
from cumbre.observatory.control import pairs as pairs_module
from cumbre.observatory.control.allocation import allocate, process_parts, replicate_parts
from cumbre.observatory.control.modes import ENTITIES, Modes
from support.control import World

RAFT = [f"R22_S{x}{y}" for x in range(3) for y in range(3)]


def test_lsstcam_has_21_rafts_and_the_wavefront_job_and_193_worker_jobs():
    instrument = load_instrument("lsstcam")
    parts = replicate_parts(instrument)
    assert len(parts) == 22
    assert all(len(names) == 9 for part, names in parts.items() if part != "wavefront")
    assert sorted(n for names in parts.values() for n in names) == sorted(
        d.name for d in instrument.detectors
    )
    assert len(process_parts(instrument, wavefront=True)) == 189 + 4
    assert len(process_parts(instrument, wavefront=False)) == 189


def test_fully_operational_pairs_first_two_jobs_each_then_local_only():
    chosen = allocate(22, full=list(range(1, 26)), local=[], load={})
    assert max(Counter(chosen).values()) == 1, "25 pairs: one job each"
    counts = Counter(allocate(22, full=list(range(1, 9)), local=[20, 21, 22], load={}))
    assert all(counts[pair] == 2 for pair in range(1, 9))
    assert all(counts[pair] == 2 for pair in (20, 21, 22))
    counts = Counter(allocate(22, full=[1, 2], local=[], load={}))
    assert counts == {1: 11, 2: 11}
    assert Counter(allocate(4, full=[], local=[7, 8], load={})) == {7: 2, 8: 2}
    assert allocate(3, full=[], local=[], load={}) == [None] * 3


def test_small_cameras_use_all_pairs_in_turn():
    assert {allocate(1, full=[1, 2, 3], local=[], load={}, turn=turn)[0] for turn in range(3)} == {1, 2, 3}


@given(
    st.integers(0, 40), st.sets(st.integers(1, 30), max_size=8), st.sets(st.integers(31, 60), max_size=8),
    st.dictionaries(st.integers(1, 60), st.integers(0, 4)), st.integers(0, 1000),
)  # fmt: skip
def test_local_only_pairs_work_only_beyond_two_jobs_a_full_one(count, full, local, load, turn):
    chosen = allocate(count, full=sorted(full), local=sorted(local), load=load, turn=turn)
    assert len(chosen) == count
    if not full and not local:
        assert chosen == [None] * count
        return
    assert set(chosen) <= full | local
    new = Counter(chosen)
    if any(new[pair] for pair in local) and full:
        assert all(load.get(pair, 0) + new[pair] >= 2 for pair in full)


@pytest.fixture
def world(tmp_path, database, monkeypatch):
    monkeypatch.setattr(pairs_module, "SILENT_S", 0.6)
    world = World(tmp_path, database)
    world.base = world.control()
    world.run(lambda: world.base.is_active)
    world.register(1, 2)
    world.ready("Archiver")
    yield world
    world.close()


def ordered(world, obs_id):
    return [(o["attempt"], o["pair"]) for o in world.orders() if o["obsId"] == obs_id]


def test_the_jobs_of_a_pair_that_falls_silent_go_to_another(world):
    obs_id = world.expose()
    world.run(lambda: ordered(world, obs_id))
    ((_, first),) = ordered(world, obs_id)
    world.silence(first)
    world.run(lambda: len(ordered(world, obs_id)) > 1)
    assert ordered(world, obs_id) == [(1, first), (2, 3 - first)]
    world.arrive(obs_id, RAFT)
    (job,) = world.run(lambda: world.jobs("state = 'done'"))
    assert (job["attempt"], job["pair"]) == (2, 3 - first)


def test_a_pair_that_has_lost_its_link_gives_its_jobs_to_one_that_has_it(world):
    obs_id = world.expose()
    world.run(lambda: ordered(world, obs_id))
    ((_, first),) = ordered(world, obs_id)
    world.register(first, pool="local-only")
    world.run(lambda: len(ordered(world, obs_id)) > 1)
    assert ordered(world, obs_id)[-1] == (2, 3 - first)
    world.register(3 - first, pool="local-only")
    world.run(lambda: world.base.pairs.pool("summit-base", "local-only") == [1, 2])
    time.sleep(0.7)
    world.run(lambda: True)
    assert len(ordered(world, obs_id)) == 2, "with no link anywhere nothing is gained by moving it"


def test_a_pair_that_unregisters_and_nobody_is_left(world):
    world.register(1, 2, pool="")
    world.run(lambda: not world.base.pairs.pool("summit-base", "fully-operational"))
    obs_id = world.expose()
    world.run(lambda: ordered(world, obs_id))
    assert ordered(world, obs_id) == [(1, -1)]
    world.register(2)
    world.run(lambda: len(ordered(world, obs_id)) > 1)
    assert ordered(world, obs_id)[-1] == (2, 2)


def test_a_late_job_goes_round_and_is_then_left_to_the_catch_up_archiver(tmp_path, database):
    world = World(tmp_path, database)
    folder = tmp_path / "modes"
    folder.mkdir()
    (folder / "short.yaml").write_text(
        "mode: short\ndescription: little time\nentities:\n  Archiver: {deadline_s: 0.3, attempts: 3}\n"
    )
    system = world.control()
    world.run(lambda: system.is_active)
    world.register(1, 2)
    world.ready("Archiver", mode="short")
    obs_id = world.expose(exposure_s=0.0)
    (job,) = world.run(lambda: world.jobs("ended_tai IS NOT NULL"))
    assert [attempt for attempt, _ in ordered(world, obs_id)] == [1, 2, 3]
    pairs = [pair for _, pair in ordered(world, obs_id)]
    assert pairs[0] != pairs[1] != pairs[2]
    assert (job["state"], job["outcome"]) == ("failed", "Deadline")
    assert "Catch-Up" in job["message"]
    world.close()


def test_a_failure_moves_the_job_but_not_that_of_an_earlier_attempt(world):
    obs_id = world.expose()
    world.run(lambda: ordered(world, obs_id))
    ((_, first),) = ordered(world, obs_id)
    failed = {"jobId": f"replicate/{obs_id}/R22", "outcome": "Transient", "message": "broken", "pair": first}
    world.bus.publish("Control.jobResult", failed)
    world.run(lambda: len(ordered(world, obs_id)) > 1)
    world.bus.publish("Control.jobResult", failed)  # told again, late
    world.bus.publish("Control.jobResult", {**failed, "outcome": "started", "pair": 3 - first})
    world.run(lambda: world.jobs("state = 'running'"))
    assert len(ordered(world, obs_id)) == 2
    world.bus.publish(
        "Control.jobResult", {**failed, "outcome": "ok", "pair": 3 - first, "bytes": 9, "durationS": 2.5}
    )
    (job,) = world.run(lambda: world.jobs("state = 'done'"))
    assert (job["bytes"], job["duration_s"], job["outcome"]) == (9, 2.5, "ok")


def test_detectors_that_were_not_read_or_set_aside_are_not_waited_for(world):
    one, two, three = (world.expose() for _ in range(3))
    world.run(lambda: len(world.orders()) == 3)

    def read_out(obs_id, detectors):
        world.bus.publish(
            "Camera.endReadout",
            {"instrument": "LSSTComCam", "imageName": obs_id, "detectors": detectors, "daqPath": ""},
        )

    read_out(one, RAFT[:4])
    world.arrive(one, RAFT[:3])
    world.arrive(one, RAFT[3:4], hop="quarantined", place="summit", outcome="BadFile", message="garbage")
    read_out(two, ["R43_S11"])
    read_out(three, RAFT)
    world.arrive(three, RAFT)
    world.run(lambda: len(world.jobs("ended_tai > 0")) == 3)
    jobs = {job["obs_id"]: job for job in world.jobs()}
    assert jobs[one]["outcome"] == "BadFile"
    assert jobs[two]["outcome"] == "NoWorkFound"
    assert jobs[three]["outcome"] == "ok"


def visit(world, group, **more):
    fields = {
        "groupId": group, "instrument": "LSSTComCam", "position": [10.0, -30.0], "coordinateSystem": 2,
        "startTime": world.clock.now_tai_s() + 1.0, "duration": 30.0, "nimages": 1, **more,
    }  # fmt: skip
    world.bus.publish("ScriptQueue.nextVisit", fields)


def test_the_cluster_has_one_job_a_detector_of_an_announced_visit(world):
    world.bus.publish("AlertProductionCluster.pool", {"workers": 2})
    world.ready("AlertProductionCluster")
    visit(world, "g1")
    visit(world, "g2")
    world.run(lambda: len(world.jobs("kind = 'process'")) == 18)
    assert world.jobs("kind = 'process'")[0]["job_id"] == "process/g1/R22_S00"
    for detector in range(9):
        world.bus.publish(
            "Prompt.detectorProcessed",
            {"obsId": "CC_O_20261120_000001", "groupId": "g1", "detector": detector, "latencyS": 41.0,
             "outcome": "ok" if detector else "NoWorkFound"},
        )  # fmt: skip
    world.bus.publish("ScriptQueue.nextVisitCanceled", {"groupId": "g2"})
    world.run(lambda: world.base.jobs.count("AlertProductionCluster") == 0)
    outcomes = Counter((job["group_id"], job["outcome"]) for job in world.jobs("kind = 'process'"))
    assert outcomes == {("g1", "ok"): 8, ("g1", "NoWorkFound"): 1, ("g2", "Canceled"): 9}
    assert {job["obs_id"] for job in world.jobs("group_id = 'g1'")} == {"CC_O_20261120_000001"}


def test_by_day_nothing_makes_process_jobs(world):
    world.bus.publish("AlertProductionCluster.pool", {"workers": 2})
    world.ready("AlertProductionCluster", mode="daytime")
    assert not world.base.entities["AlertProductionCluster"].is_subscribed
    visit(world, "g1")
    obs_id = world.expose(image_type="BIAS")
    world.run(lambda: ordered(world, obs_id))
    assert world.jobs("kind = 'process'") == []


@pytest.mark.parametrize("mode", ["raw_calibration", "engineering"])
def test_without_visits_each_exposure_makes_the_jobs(world, mode):
    world.bus.publish("AlertProductionCluster.pool", {"workers": 2})
    world.ready("AlertProductionCluster", mode=mode)
    visit(world, "g1")
    # a sequence of biases is one group; each image has jobs of its own
    one, two = (world.expose(image_type="BIAS", group="sequence") for _ in range(2))
    world.run(lambda: len(world.jobs("kind = 'process'")) == 18)
    assert {job["obs_id"] for job in world.jobs("kind = 'process'")} == {one, two}

    def processed(obs_id):
        for detector in range(9):
            done = {"obsId": obs_id, "groupId": "sequence", "detector": detector, "outcome": "ok"}
            world.bus.publish("Prompt.detectorProcessed", done)

    processed(two)
    world.run(lambda: len(world.jobs("kind = 'process' AND state = 'done'")) == 9)
    assert {job["obs_id"] for job in world.jobs("state = 'done'")} == {two}
    world.base.jobs.recover()  # as one that takes over does
    processed(one)
    world.run(lambda: world.base.jobs.count("AlertProductionCluster") == 0)


def test_lsstcam_in_science_mode_has_22_replicate_and_193_process_jobs(tmp_path, database):
    world = World(tmp_path, database, instrument="lsstcam")
    world.base = world.control()
    world.run(lambda: world.base.is_active)
    world.register(1, 2)
    world.bus.publish("AlertProductionCluster.pool", {"workers": 2})
    world.ready("Archiver", "AlertProductionCluster")
    visit(world, "g1", instrument="LSSTCam")
    world.expose("LSSTCam", group="g1")
    world.run(lambda: len(world.jobs()) >= 22 + 193)
    assert Counter(job["kind"] for job in world.jobs()) == {"replicate": 22, "process": 193}
    # a wavefront sensor is done when both of its halves are
    numbers = {d.name: d.id for d in load_instrument("lsstcam").detectors}
    for half, ended in (("R00_SW0", 0), ("R00_SW1", 1)):
        done = {"obsId": "MC_O_20261120_000001", "groupId": "g1", "detector": numbers[half], "outcome": "ok"}
        world.bus.publish("Prompt.detectorProcessed", done)
        world.run(
            lambda: (
                world.base._tracker is not None
                and not world.base._subscriptions["results"].poll(0.0, limit=1)
            )
        )
        assert len(world.jobs("kind = 'process' AND state = 'done'")) == ended
    world.close()


def test_what_no_camera_of_the_site_explains_is_told_and_does_no_harm(world):
    world.expose(instrument="HyperCam")
    obs_id = world.expose()
    world.run(lambda: ordered(world, obs_id))
    said = [m.fields["message"] for m in world.bus.replay(["Archiver.logMessage"])]
    assert any("HyperCam" in text for text in said)


@pytest.mark.parametrize("ended", [False, True])
def test_an_order_given_twice_is_one_job(world, ended):
    obs_id = world.expose()
    world.run(lambda: ordered(world, obs_id))
    if ended:
        world.arrive(obs_id, RAFT)
        world.run(lambda: world.jobs("state = 'done'"))
    for message in world.bus.replay(["Camera.startIntegration"]):
        world.bus.publish("Camera.startIntegration", message.fields)
    later = world.expose()
    world.run(lambda: ordered(world, later))
    assert len(ordered(world, obs_id)) == 1
    assert len(world.jobs()) == 2


def test_all_shipped_modes_are_legal_for_all_entities(tmp_path):
    modes = Modes(tmp_path)
    names = modes.names()
    assert names == ["daytime", "deep_drilling", "engineering", "raw_calibration", "science"]
    hashes = {modes.configuration(name, entity).hash for name in names for entity in ENTITIES}
    assert len(hashes) == len(names) * len(ENTITIES)


def test_a_wrong_mode_file_is_explained(tmp_path):
    modes = Modes(tmp_path)
    (tmp_path / "mine.yaml").write_text("mode: mine\ndescription: x\nentities: {Archiver: {min_pairs: -1}}\n")
    with pytest.raises(ConfigurationError, match=r"mine.yaml: entities.Archiver.min_pairs"):
        modes.load("mine")
    (tmp_path / "mine.yaml").write_text("mode: yours\ndescription: x\nentities: {}\n")
    with pytest.raises(ConfigurationError, match="expected 'mine'"):
        modes.load("mine")
    (tmp_path / "mine.yaml").write_text("{")
    with pytest.raises(ConfigurationError, match="not YAML"):
        modes.load("mine")
    with pytest.raises(NotFoundError, match="not one of daytime"):
        modes.load("../science")
