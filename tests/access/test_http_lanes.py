"""Many queries at once: those that are long give way, and who has to go is told to come again."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from cumbre.access.http import stream
from cumbre.access.http.stream import Lanes

ACCESS = {"sync_s": 10.0}
LONG = (
    "SELECT COUNT(*) AS n FROM level1.DiaObject AS a, level1.DiaObject AS b, level1.DiaObject AS c,"
    " level1.DiaObject AS d WHERE a.ra + b.ra + c.ra + d.ra < 0"
)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(stream, "QUICK_S", 0.1)
    monkeypatch.setattr(stream, "PATIENCE_S", 0.5)


class Query(threading.Thread):
    """Holds a place until it is told to stop."""

    def __init__(self, lanes: Lanes) -> None:
        super().__init__(daemon=True)
        self.lanes, self.inside, self.stop = lanes, threading.Event(), threading.Event()
        self.was_pushed_out = False
        self.start()

    def run(self) -> None:
        with self.lanes.place(self.stop.set) as place:
            self.place = place
            self.inside.set()
            self.stop.wait(60)
            self.was_pushed_out = place.pushed_out.is_set()


def test_a_long_query_goes_only_for_those_who_wait():
    lanes = Lanes(1, 1)
    first = Query(lanes)
    second = Query(lanes)
    assert second.inside.wait(20)  # the first one went to the slow lane
    third = Query(lanes)
    assert second.stop.wait(20)  # no place in the slow lane, and somebody waits
    assert third.inside.wait(20)
    second.join(20)
    assert second.was_pushed_out
    assert not first.stop.is_set()
    for query in (first, third):
        query.stop.set()
        query.join(20)
        assert not query.was_pushed_out
    fourth, fifth = Query(lanes), Query(lanes)  # every place is free again
    assert fourth.inside.wait(20)
    assert fifth.inside.wait(20)
    for query in (fourth, fifth):
        query.stop.set()
        query.join(20)


def test_long_queries_stand_back_while_short_ones_run(monkeypatch):
    monkeypatch.setattr(stream, "GIVEN_S", 60.0)
    lanes = Lanes(2, 2)
    long = Query(lanes)
    assert long.inside.wait(20)
    deadline = time.monotonic() + 20
    while not long.place.is_slow:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setattr(stream, "QUICK_S", 60.0)
    # alone it works on at once, however long it worked
    begin = time.monotonic()
    long.place.give_way()
    assert time.monotonic() - begin < 20
    short = Query(lanes)
    assert short.inside.wait(20)
    short.place.give_way()  # a short one never waits
    long.place._since -= 100.0
    went_on = threading.Event()
    waiting = threading.Thread(target=lambda: (long.place.give_way(), went_on.set()), daemon=True)
    waiting.start()
    assert not went_on.wait(0.3)
    short.stop.set()
    assert went_on.wait(20)  # when the short one has ended, not after a minute
    long.stop.set()
    for thread in (short, long, waiting):
        thread.join(20)


def test_who_has_to_go_is_told_to_come_again(world):
    object.__setattr__(world.access.service.tap, "lanes", Lanes(1, 1))

    def ask(query: str) -> httpx.Response:
        return httpx.post(f"{world.url}/tap/sync", data={"QUERY": query}, timeout=120)

    def running() -> int:
        return int(
            world.database.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'COPY%%'"
                " AND datname = current_database()"
            )[0][0]
        )

    with ThreadPoolExecutor(2) as pool:
        long = [pool.submit(ask, LONG) for _ in range(2)]
        end = time.monotonic() + 15
        while running() < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert ask("SELECT TOP 1 ra FROM level1.DiaObject").status_code == 200
        answers = [future.result(100) for future in long]
    (gone,) = (answer for answer in answers if answer.status_code == 503)
    assert "asynchronous job" in gone.text
    assert int(gone.headers["retry-after"]) >= 1
    (other,) = (answer for answer in answers if answer is not gone)
    assert "10 s" in other.text  # it ran to its limit of time
