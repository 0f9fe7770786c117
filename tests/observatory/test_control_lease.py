"""Of several processes at most one acts: whatever is paused, cut off or late, the database refuses it."""

from __future__ import annotations

import time

import pytest

from cumbre.core.errors import CumbreError, TransientError
from cumbre.observatory.control.lease import Lease, LeaseLostError
from cumbre.observatory.control.schema import prepare
from cumbre.stores.postgres import Database

LEASE_S = 0.4


@pytest.fixture
def claim(database):
    prepare(database)
    database.execute("CREATE TABLE written (by_whom text)")

    def make(holder, **more):
        own = Database(database.dsn)
        return Lease(own, identity="control-base", holder=holder, lease_s=LEASE_S, **more)

    return make


def wait_for(lease, limit_s=60.0):
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            if got := lease.acquire():
                return got
        except TransientError:
            pass
        time.sleep(0.02)
    raise AssertionError("the lease was not got")


def write(lease, pause=lambda: None):
    with lease.transaction() as link:
        link.execute("INSERT INTO written VALUES (%s)", (lease.holder,))
        pause()


def written(database):
    return [row[0] for row in database.execute("SELECT by_whom FROM written")]


def test_one_holds_it_and_the_other_waits_until_it_is_silent(claim):
    one, two = claim("one"), claim("two")
    first = one.acquire()
    assert first is not None
    assert (first.warm, one.epoch) == (False, 1)
    end = time.monotonic() + 3 * LEASE_S
    while time.monotonic() < end:
        one.renew()
        assert two.acquire() is None
        time.sleep(0.05)
    silent = time.monotonic()
    got = wait_for(two)
    assert got.warm
    assert two.epoch == 2
    assert time.monotonic() - silent > LEASE_S * 0.8


def test_the_former_holder_can_neither_write_nor_renew(claim, database):
    one, two = claim("one"), claim("two")
    one.acquire()
    write(one)
    wait_for(two)
    assert not one.is_sure, "it knows by its own clock that it may have lost the lease"
    with pytest.raises(LeaseLostError, match="another process acts"):
        write(one)
    one.epoch = 1  # as if it had not noticed
    with pytest.raises(LeaseLostError):
        one.renew()
    write(two)
    assert written(database) == ["one", "two"]


def test_one_that_stops_within_a_transaction_does_not_block_and_does_not_commit(claim, database):
    one, two = claim("one"), claim("two")
    one.acquire()
    taken = []

    def paused():
        began = time.monotonic()
        taken.append(wait_for(two))  # while the transaction of the paused one is open
        taken.append(time.monotonic() - began)

    with pytest.raises(CumbreError):
        write(one, paused)
    assert two.epoch == 2
    assert taken[1] < 6.0, "the server has ended the transaction of the paused one"
    assert written(database) == []


def test_a_released_lease_is_cold_unless_the_site_still_runs(claim):
    one = claim("one", boot="4711")
    one.acquire()
    one.release()
    again = claim("one again", boot="4711").acquire()
    assert again is not None
    assert again.warm, "only the process was restarted"
    for boot in ("4712", ""):
        lease = claim("next day", boot="4711")
        wait_for(lease)
        lease.release()
        cold = claim("another run of the site", boot=boot).acquire()
        assert cold is not None
        assert not cold.warm


def test_a_spare_leaves_a_free_lease_to_the_first(claim):
    spare, first = claim("spare", patience_s=LEASE_S), claim("first")
    assert spare.acquire() is None
    assert first.acquire() is not None
    assert spare.acquire() is None
    alone = claim("spare of an absent one", patience_s=0.2)
    first.release()
    assert wait_for(alone).silent_s >= 0.2
