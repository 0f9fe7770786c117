"""Jobs of the control system: what a pair sends, whatever the order in which jobs and files come."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_double import DETECTORS, hops, obs_id, running, until, write_image

from cumbre.archive.distributor import Distributor
from cumbre.archive.jobs import REMEMBER_S, JobBook
from cumbre.archive.pool import FULL, LOCAL
from cumbre.archive.replicator import Replicator
from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.time import Clock
from cumbre.simulator.network import LinkProxy, control_link

LINK = "summit-base"


def job(number: int = 1, *, pair: int = 1, **changed: Any) -> dict[str, Any]:
    return {
        "jobId": f"replicate/{obs_id(number)}/R00", "entity": "Archiver", "kind": "replicate", "obsId": obs_id(number),
        "groupId": f"group {number}", "instrument": "DemoCam", "part": "R00", "detectors": list(DETECTORS),
        "link": LINK, "pair": pair, "mode": "science", "attempt": 1, "epoch": 1, "deadlineTai": 1e10,
    } | changed  # fmt: skip


def written(detector: str, number: int = 1) -> dict[str, Any]:
    return {"obsId": obs_id(number), "detectorName": detector}


def test_files_and_their_job_in_any_order() -> None:
    for order in itertools.permutations(["job", *DETECTORS[:3]]):
        book = JobBook(LINK, 1)
        got = set()
        for item in order:
            if item == "job":
                taken, files = book.order(job(detectors=list(DETECTORS[:3])), 0.0)
                assert taken is not None
                got |= {fields["detectorName"] for fields in files}
            elif book.written(written(item), 0.0) is not None:
                got.add(item)
        assert got == set(DETECTORS[:3])
        ends = [book.sent(obs_id(1), name, 10) for name in DETECTORS[:3]]
        assert ends[:2] == [None, None]
        assert ends[2] is not None
        assert ends[2].moved_bytes == 30


@pytest.mark.parametrize(
    "other", [{"pair": 2}, {"pair": -1}, {"link": "base-archive"}, {"kind": "process"}, {"detectors": []}]
)
def test_what_is_not_its_own_is_left(other: dict[str, Any]) -> None:
    book = JobBook(LINK, 1)
    book.order(job(**other), 0.0)
    assert book.written(written("R00_S00"), 0.0) is None
    assert book.sent(obs_id(1), "R00_S00", 1) is None


def test_a_lower_epoch_is_ignored_and_a_higher_one_replaces() -> None:
    book = JobBook(LINK, 1)
    book.order(job(2, epoch=7), 0.0)
    assert book.order(job(1, epoch=6), 0.0) == (None, [])
    assert book.written(written("R00_S00"), 0.0) is None
    assert book.order(job(1, epoch=7), 0.0)[0] is not None
    assert book.order(job(1, epoch=7, attempt=1, pair=2), 0.0) == (None, [])
    assert book.written(written("R00_S00"), 0.0) is not None
    # The successor of a dead control system counts attempts anew.
    moved, _ = book.order(job(1, epoch=8, attempt=1, pair=2), 0.0)
    assert moved is not None
    assert moved.pair == 2
    assert book.is_elsewhere(obs_id(1), "R00_S00")


def test_a_job_that_is_moved_away_and_back_claims_its_files_again() -> None:
    book = JobBook(LINK, 1)
    book.order(job(), 0.0)
    book.written(written("R00_S00"), 0.0)
    book.order(job(pair=2, attempt=2), 1.0)
    assert book.written(written("R00_S01"), 1.0) is None
    taken, files = book.order(job(pair=1, attempt=3), 2.0)
    assert taken is not None
    assert [fields["detectorName"] for fields in files] == ["R00_S00", "R00_S01"]


def test_old_jobs_and_files_are_forgotten() -> None:
    book = JobBook(LINK, 1)
    book.order(job(), 0.0)
    book.written(written("R00_S00"), 0.0)
    book.forget(REMEMBER_S + 1)
    assert book.job_of(obs_id(1), "R00_S00") is None
    assert book.claimed() == []


actions = st.lists(
    st.one_of(
        st.tuples(st.just("job"), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
        st.tuples(st.just("file"), st.integers(1, 3), st.sampled_from(DETECTORS)),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(actions)
def test_two_books_never_claim_the_same_file(history: list[tuple[Any, ...]]) -> None:
    """The same messages, in the same order, to three pairs: at any time a file is the work of one at most."""
    books = [JobBook(LINK, pair) for pair in (1, 2, 3)]
    for kind, number, *rest in history:
        for book in books:
            if kind == "job":
                pair, attempt, epoch = rest
                book.order(job(number, pair=pair, attempt=attempt, epoch=epoch), 0.0)
            else:
                book.written(written(rest[0], number), 0.0)
        for image, name in itertools.product((1, 2, 3), DETECTORS):
            assert sum(book.job_of(obs_id(image), name) is not None for book in books) <= 1


# over a real bus and real connections


@pytest.fixture
def led(site: Site) -> Site:
    site.config.archive.control = True
    for link in site.config.links:
        link.pairs = 2
    return site


@pytest.fixture
def chain(led: Site, bus: Bus, clock: Clock) -> Iterator[list[Replicator]]:
    bases = [Distributor(site=led, bus=bus, clock=clock, place="base", pair=pair) for pair in (1, 2)]
    proxy = LinkProxy(site=led, bus=bus, clock=clock, source="summit", target="base")
    replicators = [Replicator(site=led, bus=bus, clock=clock, pair=pair) for pair in (1, 2)]
    with running(*bases, proxy, *replicators):
        until(lambda: [replicator.watch.pool for replicator in replicators] == [FULL, FULL])
        yield replicators


def results(bus: Bus) -> list[tuple[str, str, int]]:
    return [
        (m.fields["jobId"].split("/")[1], m.fields["outcome"], m.fields["pair"])
        for m in bus.replay(["Control.jobResult"])
    ]


def pools_of(bus: Bus, name: str) -> list[str]:
    return [m.fields["pool"] for m in bus.replay(["Replicator.registration"]) if m.fields["name"] == name]


def test_each_pair_sends_its_jobs_and_nothing_else(led: Site, bus: Bus, chain: list[Replicator]) -> None:
    for number, pair in ((1, 1), (2, 2)):
        bus.publish("Control.job", job(number, pair=pair))
    for number in (1, 2, 3):
        write_image(led, bus, number)
    until(lambda: len(hops(bus, "at_base")) == 8)
    until(lambda: len([r for r in results(bus) if r[1] == "ok"]) == 2)
    assert sorted(results(bus)) == [
        (obs_id(1), "ok", 1), (obs_id(1), "started", 1), (obs_id(2), "ok", 2), (obs_id(2), "started", 2)
    ]  # fmt: skip
    done = next(m.fields for m in bus.replay(["Control.jobResult"]) if m.fields["outcome"] == "ok")
    assert done["bytes"] == sum(30_000 + n for n in range(4))
    assert {hop["message"] for hop in hops(bus, "at_base")} == {"mode science"}
    announced = [m.fields for m in bus.replay(["Replicator.expected"])]
    assert {(fields["name"], fields["obsId"]) for fields in announced} == {
        ("base-1", obs_id(1)), ("base-2", obs_id(2))
    }  # fmt: skip
    assert not any(obs_id(3) in str(path) for path in led.path("summit/buffer").rglob("*"))
    # The job of the third image comes late: its files are still known.
    bus.publish("Control.job", job(3, pair=2))
    until(lambda: len(hops(bus, "at_base")) == 12)


def test_a_job_of_a_lost_pair_is_sent_by_another_once(
    led: Site, bus: Bus, clock: Clock, chain: list[Replicator]
) -> None:
    control_link(led, "summit", "base", down=True)
    until(lambda: [replicator.watch.pool for replicator in chain] == [LOCAL, LOCAL])
    bus.publish("Control.job", job(1, pair=1))
    write_image(led, bus, 1)
    until(lambda: len(hops(bus, "buffered")) == 4)
    bus.publish("Control.job", job(1, pair=2, attempt=2))
    until(lambda: len(hops(bus, "buffered")) == 8)
    control_link(led, "summit", "base", down=False)
    until(lambda: ("ok", 2) in [(r[1], r[2]) for r in results(bus)])
    assert ("ok", 1) not in [(r[1], r[2]) for r in results(bus)]
    assert len(hops(bus, "at_base")) == 4
    until(lambda: taken(bus, "base-2") > 120_000)
    assert taken(bus, "base-1") < 1000  # the manifest at most
    until(lambda: pools_of(bus, "replicator-1") == [FULL, LOCAL, FULL])


def taken(bus: Bus, name: str) -> int:
    """Bytes that a distributor says it has received."""
    said = [m.fields for m in bus.replay(["Replicator.distributor"]) if m.fields["name"] == name]
    return int(said[-1]["receivedBytes"]) if said else 0


def test_a_slow_pair_keeps_its_files_and_another_sends_them(
    led: Site, bus: Bus, chain: list[Replicator]
) -> None:
    for replicator in chain[:1]:
        replicator.watch._expected_s = 0.2
    control_link(led, "summit", "base", bandwidth_mbit_s=0.03)  # a file takes longer than a beat
    bus.publish("Control.job", job(1))
    write_image(led, bus, 1, size=60_000)
    until(lambda: chain[0].watch.pool == LOCAL)
    control_link(led, "summit", "base")
    time.sleep(1.5)
    # Two may have been under way when it became slow, not more.
    assert len(chain[0].buffer) >= 2
    slow = [m.fields["reason"] for m in bus.replay(["Replicator.registration"]) if m.fields["pool"] == LOCAL]
    assert slow[0].startswith("slow: ")
    bus.publish("Control.job", job(1, pair=2, attempt=2))
    until(lambda: len(hops(bus, "at_base")) == 4)
    assert chain[0].watch.pool == LOCAL


def test_after_a_restart_a_pair_goes_on_with_its_jobs(led: Site, bus: Bus, clock: Clock) -> None:
    first = Replicator(site=led, bus=bus, clock=clock, pair=1)
    bus.publish("Control.job", job(1))
    write_image(led, bus, 1)
    until(lambda: first.step(0.05) > 0 and len(hops(bus, "buffered")) == 4)
    first.close()
    bus.publish("Control.job", job(2))
    write_image(led, bus, 2)
    base = Distributor(site=led, bus=bus, clock=clock, place="base")
    proxy = LinkProxy(site=led, bus=bus, clock=clock, source="summit", target="base")
    again = Replicator(site=led, bus=bus, clock=clock, pair=1)
    with running(base, proxy, again):
        until(lambda: sorted(r[0] for r in results(bus) if r[1] == "ok") == [obs_id(1), obs_id(2)])
    assert len(hops(bus, "at_base")) == 8


def test_a_file_that_is_refused_again_and_again_goes_back_to_control(
    led: Site, bus: Bus, clock: Clock, chain: list[Replicator], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cumbre.archive.intake import Intake

    led.config.links[0].retries = 2
    monkeypatch.setattr(Intake, "put", _disk_full)
    bus.publish("Control.job", job(1))
    write_image(led, bus, 1)
    until(lambda: ("Transient", 1) in [(r[1], r[2]) for r in results(bus)])
    assert len(chain[0].buffer) >= 4  # for the Catch-Up Archiver, or until another pair has sent it
    monkeypatch.undo()
    bus.publish("Control.job", job(1, pair=2, attempt=2))
    until(lambda: ("ok", 2) in [(r[1], r[2]) for r in results(bus)])


def _disk_full(
    intake: Any, stream: Any, parcel: Any, *, offset: int = 0, encoding: str = ""
) -> dict[str, Any]:
    from cumbre.archive.wire import receiver_of

    receiver_of(encoding)(stream, parcel.size - offset, lambda _: None)
    return {"answer": "later", "error": "No space left on device"}


def _spoiled(store: Path) -> bool:
    """Put a file where a folder was; False where the replicator has made the folder again meanwhile."""
    if store.is_dir():
        store.rename(store.with_name(f"away-{time.monotonic_ns()}"))
    try:
        store.write_bytes(b"not a folder")
    except IsADirectoryError:
        return False
    return True


def test_one_broken_store_of_the_buffer_keeps_no_pair_out(site: Site, bus: Bus, clock: Clock) -> None:
    site.config.places["summit"].buffer = ["summit/buffer", "summit/buffer2"]
    replicator = Replicator(site=site, bus=bus, clock=clock)
    for folder, failures in (("summit/buffer", []), ("summit/buffer2", ["outage buffer"])):
        store = site.path(f"{folder}/pair-1")
        until(functools.partial(_spoiled, store))
        assert list(replicator._test_stores()) == failures
    until(lambda: replicator.watch.pool != FULL)
    replicator.close()
