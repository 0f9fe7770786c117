"""Two detectors that overlap never associate at the same time, whatever becomes of the one before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cumbre.catalogs.columns import circle_pixels
from cumbre.catalogs.level1 import Level1
from cumbre.core.errors import TransientError
from cumbre.stores.postgres import Database


@pytest.fixture
def level1(database):
    return Level1(database)


def one_visit(level1, visit, log):
    """What a worker does: read, decide, store."""
    with level1.exclusive(10.0, -30.0, 0.1):
        log.append(("in", visit))
        seen = level1.load_region(10.0, -30.0, 0.1)["DiaObject"].num_rows
        time.sleep(0.2)
        if not seen:
            level1.store(
                visit, 0, dia_objects=[{"diaObjectId": visit, "ra": 10.0, "dec": -30.0, "nDiaSources": 1}]
            )
        log.append(("out", visit))


def test_the_second_sees_what_the_first_stored(level1, database, postgres_dsn):
    log: list[tuple[str, int]] = []
    others = [Level1(Database(database.dsn)) for _ in range(3)]
    threads = [
        threading.Thread(target=one_visit, args=(one, k + 1, log)) for k, one in enumerate([level1, *others])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert level1.load_region(10.0, -30.0, 0.1)["DiaObject"].num_rows == 1
    assert [word for word, _ in log] == ["in", "out"] * 4


def test_far_regions_do_not_wait(level1, database):
    other = Level1(Database(database.dsn))
    with level1.exclusive(10.0, -30.0, 0.1), other.exclusive(12.0, -30.0, 0.1):
        pass


def test_waiting_has_an_end(level1, database, monkeypatch):
    monkeypatch.setattr("cumbre.catalogs.level1.LOCK_WAIT_S", 1)
    other = Level1(Database(database.dsn))
    with (
        level1.exclusive(10.0, -30.0, 0.1),
        pytest.raises(TransientError),
        other.exclusive(10.05, -30.0, 0.1),
    ):
        pass


def test_a_killed_holder_lets_go(level1, database):
    code = (
        "import sys, time\nfrom cumbre.catalogs.level1 import Level1\nfrom cumbre.stores.postgres import Database\n"
        "with Level1(Database(sys.argv[1])).exclusive(10.0, -30.0, 0.1):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, database.dsn], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        os.kill(holder.pid, signal.SIGKILL)
        begun = time.monotonic()
        with level1.exclusive(10.0, -30.0, 0.1):
            assert time.monotonic() - begun < 20


def test_neighbours_share_a_pixel_when_their_circles_touch():
    here = set(circle_pixels(10.0, -30.0, 0.1, 9))
    assert here & set(circle_pixels(10.2, -30.0, 0.1, 9))
    assert not here & set(circle_pixels(11.0, -30.0, 0.1, 9))
    assert circle_pixels(359.99, 10.0, 0.1, 9) == circle_pixels(-0.01, 10.0, 0.1, 9)
