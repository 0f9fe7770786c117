"""Jobs: priorities, outcomes, retries, restart; with a real cluster whose worker is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cumbre.core.errors import TransientError
from cumbre.core.time import Clock
from cumbre.orchestration.engine import DaskEngine, InlineEngine
from cumbre.orchestration.jobs import JobStore
from cumbre.orchestration.manager import JobManager
from cumbre.orchestration.models import Job, JobState, Priority

WHERE = "support.jobs"


@pytest.fixture(scope="module")
def engine():
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    opened = DaskEngine(n_workers=1)
    yield opened
    opened.close()


def _manager(database, engine, owner="test"):
    return JobManager(JobStore(database), engine, Clock.real(), owner=owner)


def _all(manager, n=1, limit_s=120.0):
    finished, end = [], time.monotonic() + limit_s
    while len(finished) < n:
        assert time.monotonic() < end, f"only {finished}"
        finished += manager.poll(0.2)
    return finished


def _job(name, function, payload=None, **more):
    return Job(name, "test", f"{WHERE}:{function}", payload or {}, **more)


@pytest.fixture
def inline(database):
    return _manager(database, InlineEngine())


def test_outcomes_are_recorded_in_words(database, inline, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    inline.submit(_job("good", "add", {"a": 1, "b": 2}, priority=Priority.PROMPT))
    inline.submit(_job("none", "no_work"))
    inline.submit(_job("bad", "breaks"))
    inline.submit(_job("lost", "no_such_function"))
    by_id = {}
    for _ in range(4):
        by_id |= {item.job.id: item for item in inline.poll(0)}
    assert by_id["good"].result.value["sum"] == 3
    assert by_id["good"].state is JobState.DONE
    assert (by_id["none"].result.outcome, by_id["none"].result.message) == ("NoWorkFound", "no template")
    assert by_id["none"].state is JobState.DONE
    assert by_id["bad"].state is JobState.FAILED
    assert "ZeroDivisionError" in by_id["bad"].result.message
    row = inline.store.get("bad")
    assert "one over nothing" in row["log_tail"]
    assert row["attempts"] == 1
    assert by_id["lost"].result.outcome == "UserError"


def test_transient_faults_are_tried_again_and_each_try_is_kept(inline, tmp_path):
    inline.submit(_job("flaky", "flaky", {"count": str(tmp_path / "n"), "good_at": 3}, max_attempts=3))
    (done,) = _all(inline)
    assert done.result.is_success
    assert done.attempts == 3
    assert [row["outcome"] for row in inline.store.attempts("flaky")] == ["Transient", "Transient", "Success"]


@pytest.mark.parametrize("job", ["flaky", "add"])
def test_what_ends_while_the_database_is_away_is_recorded_when_it_is_back(inline, tmp_path, monkeypatch, job):
    """The engine tells an end once; it must not be lost between engine and table."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    payload = {"count": str(tmp_path / "n"), "good_at": 2} if job == "flaky" else {"a": 1, "b": 1}
    inline.submit(_job("first", "add", {"a": 2, "b": 2}))
    inline.submit(_job("second", job, payload, max_attempts=3))
    real, calls = inline.store.record, []

    def away(*args, **more):
        calls.append(args[0])
        if args[0] == "second" and calls.count("second") <= 2:
            raise TransientError("the database is away")
        return real(*args, **more)

    monkeypatch.setattr(inline.store, "record", away)
    finished, faults, end = [], 0, time.monotonic() + 20
    while len(finished) < 2:
        assert time.monotonic() < end, finished
        try:
            finished += inline.poll(0.05)
        except TransientError:
            faults += 1
    assert faults >= 1
    assert {item.job.id: item.result.is_success for item in finished} == {"first": True, "second": True}
    assert inline.running == 0
    assert {inline.store.get(name)["state"] for name in ("first", "second")} == {"done"}


def test_tries_end(inline, tmp_path):
    inline.submit(_job("never", "flaky", {"count": str(tmp_path / "n"), "good_at": 99}, max_attempts=2))
    (done,) = _all(inline)
    assert (done.attempts, done.result.outcome) == (2, "Transient")


def test_same_id_is_the_same_job(inline):
    job = _job("one", "no_work")
    assert inline.submit(job)
    assert not inline.submit(job)
    _all(inline)
    assert not inline.submit(job)


def test_priority_classes_go_in_order(database, tmp_path):
    manager = _manager(database, InlineEngine())
    path = tmp_path / "order"
    jobs = [
        _job(p.name, "order", {"file": str(path), "name": str(int(p))}, priority=p)
        for p in reversed(Priority)
    ]
    manager.submit_all(jobs)
    _all(manager, len(jobs))
    assert path.read_text() == "123456"


def test_jobs_of_a_killed_owner_go_on(database, tmp_path):
    first = _manager(database, InlineEngine(), "prompt")
    first.submit(_job("a", "no_work"))
    other = _manager(database, InlineEngine(), "other")
    assert other.running == 0  # the lease holds
    again = _manager(database, InlineEngine(), "prompt")
    (done,) = _all(again)
    assert (done.job.id, done.attempts) == ("a", 2)


def test_result_not_told_is_found_again(inline):
    inline.submit(_job("a", "no_work"))
    _all(inline)
    (item,) = inline.store.unreported("test")
    assert item.result.outcome == "NoWorkFound"
    inline.store.mark_reported(["a"])
    assert inline.store.unreported("test") == []


def test_cancelled_job_does_not_run(inline, tmp_path):
    inline.submit(_job("a", "order", {"file": str(tmp_path / "f"), "name": "x"}))
    assert inline.cancel("a")
    assert inline.poll(0) == []
    assert inline.store.get("a")["state"] == "cancelled"
    assert not (tmp_path / "f").exists()


# -- the real cluster --


def test_dask_runs_a_job_in_one_thread_of_another_process(database, engine):
    manager = _manager(database, engine)
    manager.submit(_job("d", "add", {"a": 2, "b": 3}, affinity=0))
    (done,) = _all(manager)
    assert done.result.value == {"sum": 5, "pid": done.result.value["pid"], "threads": "1"}
    assert done.result.value["pid"] != os.getpid()


def test_dask_outcomes(database, engine):
    manager = _manager(database, engine)
    manager.submit_all([_job("n", "no_work"), _job("b", "breaks")])
    outcomes = {item.job.id: item.result.outcome for item in _all(manager, 2)}
    assert outcomes == {"n": "NoWorkFound", "b": "Failed"}


def test_killed_worker_costs_a_retry(database, engine, tmp_path):
    manager = _manager(database, engine)
    count = tmp_path / "pids"
    manager.submit(_job("k", "waits_once", {"count": str(count)}))
    end = time.monotonic() + 60
    while not (count.exists() and count.read_text().strip()):
        assert time.monotonic() < end
        manager.poll(0.05)
    victim = int(count.read_text().split()[0])
    os.kill(victim, signal.SIGKILL)
    (done,) = _all(manager)
    assert done.result.is_success
    assert done.attempts == 2
    assert done.result.value["pid"] != victim
    assert [row["outcome"] for row in manager.store.attempts("k")] == ["WorkerLost", "Success"]


def test_workers_that_end_for_good_are_replaced(database, engine):
    """As those do that are cut off from their scheduler for long: their nannies do not start them again."""
    cluster = engine._cluster
    before = set(engine.pids().values())

    async def end():
        for nanny in list(cluster.workers.values()):
            await nanny.close()

    cluster.sync(end)
    manager = _manager(database, engine)
    manager.submit(_job("after", "add", {"a": 2, "b": 3}))
    (done,) = _all(manager)
    assert done.result.is_success
    end_of_wait = time.monotonic() + 60
    while len(engine.workers()) < len(before):
        assert time.monotonic() < end_of_wait
        time.sleep(0.1)
    assert not before & set(engine.pids().values())


def test_workers_end_with_a_killed_owner(tmp_path):
    script = tmp_path / "owner.py"
    script.write_text(
        "import time\n"
        "from cumbre.orchestration.engine import DaskEngine\n"
        "if __name__ == '__main__':\n"
        "    engine = DaskEngine(n_workers=1)\n"
        "    print(*engine.pids().values(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as owner:
        worker = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    gone, _ = psutil.wait_procs([worker], timeout=10)
    assert gone
