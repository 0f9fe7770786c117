"""Full disks, rotten bytes, a tape that is away."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cumbre.simulator.faults import STORES, WHOLE_SITE, flip_bit
from cumbre.site.chaos import site_pids
from cumbre.stores.files import sha256_of


@pytest.mark.parametrize("store", STORES)
def test_a_full_disk_delays_and_loses_nothing(running, store):
    if not running.site.path(store).is_mount():
        pytest.skip("disks of their own need root")
    before = running.take(1)
    with running.fault("disk_full", store):
        running.bus.publish("Camera.takeImages", running.order())
        time.sleep(3.0)
    running.nothing_is_lost(before + running.take(1))


def test_a_full_disk_of_the_whole_site_takes_no_service_down_for_good(running):
    """Bus, database, logs and state lie on it; the supervisor itself must go on."""
    if not running.site.root.is_mount():
        pytest.skip("disks of their own need root")
    before, supervisor = running.take(1), site_pids(running.site)["supervisor"]
    with running.fault("disk_full", WHOLE_SITE):
        running.kill_only("scrub")  # its restart cannot even be written down
        time.sleep(3.0)
    running.until(lambda: "scrub" in site_pids(running.site))
    assert site_pids(running.site)["supervisor"] == supervisor
    running.nothing_is_lost(before + running.take(1))


def files(running, place, obs_id):
    return sorted(p for p in running.site.path(f"{place}/raw").rglob(f"{obs_id}_*.fits"))


@pytest.mark.parametrize("place", ["summit", "base", "archive"])
def test_rotten_bytes_in_a_cache_are_found_and_replaced(running, place):
    taken = running.take(1)
    running.nothing_is_lost(taken)
    path = random.Random(3).choice(files(running, place, taken[0]))
    good = sha256_of(path)
    flip_bit(path, random.Random(4))
    assert sha256_of(path) != good
    running.until(lambda: path.exists() and sha256_of(path) == good)
    kept = list(running.site.path(f"{place}/quarantine").glob(f"*{path.name}"))
    assert kept
    running.nothing_is_lost(taken)


@pytest.mark.parametrize("place", ["base", "archive"])
def test_a_vanished_file_that_is_not_on_tape_is_sent_again(running, place):
    """Taken while the tape was away, it is nowhere else at its place: the link must bring it again."""
    with running.fault("tape_away", f"{place}/tape"):
        taken = running.take(1)
        running.until(lambda: running.has("at_archive", taken))
        path = files(running, place, taken[0])[0]
        good = sha256_of(path)
        path.unlink()
        running.until(lambda: path.exists() and sha256_of(path) == good)
    running.nothing_is_lost(taken)


def test_rotten_bytes_in_the_outage_buffer_are_not_sent(running):
    with running.fault("link_down", "summit-base"):
        taken = running.take(1)
        running.until(lambda: running.has("buffered", taken))
        kept = sorted(p for p in running.site.path("summit/buffer").rglob(f"{taken[0]}_*.fits"))
        flip_bit(kept[0], random.Random(5))
    running.nothing_is_lost(taken)


def test_bytes_that_rot_in_the_buffer_and_at_their_source_come_from_the_camera(running):
    with running.fault("link_down", "summit-base"):
        taken = running.take(1)
        running.until(lambda: running.has("buffered", taken))
        for store in ("raw", "buffer"):
            for path in running.site.path(f"summit/{store}").rglob(f"{taken[0]}_R00_S00.fits"):
                flip_bit(path, random.Random(6))
    running.nothing_is_lost(taken)


def test_a_file_that_rots_before_it_is_on_tape_goes_there_when_it_is_whole_again(running):
    with running.fault("tape_away", "base/tape"):
        taken = running.take(1)
        running.until(lambda: running.has("at_archive", taken))
        flip_bit(files(running, "base", taken[0])[1], random.Random(7))
    running.nothing_is_lost(taken)


@pytest.mark.parametrize("place", ["base", "archive"])
def test_a_tape_that_is_away_is_written_when_it_is_back(running, place):
    with running.fault("tape_away", f"{place}/tape"):
        taken = running.take(2)
        running.until(lambda: running.has("at_archive", taken))  # the tape holds up nothing else
        assert not running.has(f"{place}_tape", taken)
    running.nothing_is_lost(taken)


def verify_tape(running, place, *words):
    done = subprocess.run(
        [Path(sys.executable).parent / "cumbre", "tape", "verify", "--site", running.site.root, "--place", place,
         "--json", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("place", ["base", "archive"])
def test_rotten_bytes_on_tape_are_found_by_verify_and_written_again(running, place):
    taken = running.take(1)
    running.nothing_is_lost(taken)
    with running.fault("rotten_tape", f"{place}/tape"):
        code, report = verify_tape(running, place)
        assert code == 1
        assert "damaged" in {finding["problem"] for finding in report["findings"]}
    code, report = verify_tape(running, place, "--repair")
    assert code == 0, report
    assert any(finding["repaired_from"] for finding in report["findings"])
    assert verify_tape(running, place)[0] == 0
    running.nothing_is_lost(taken)


@pytest.mark.parametrize("lost", [0.0, 1.0])
@pytest.mark.parametrize("store", ["summit/buffer", "base/buffer-2"])
def test_a_broken_store_of_the_outage_buffer_is_done_without(running, store, lost):
    """The link is down, one store goes, its process dies: the other store has everything and is told so."""
    link, pair = ("summit-base", "replicator-1") if "summit" in store else ("base-archive", "forwarder-1")
    place, _, folder = store.partition("/")
    other = f"{place}/{'buffer-2' if folder == 'buffer' else 'buffer'}"
    alarm = f"buffer-{place}-1-store-{1 if folder == 'buffer' else 2}"

    def is_told():
        last = running.bus.latest("Storage.alarm", key=alarm)
        return bool(last and last.fields["active"])

    with running.fault("link_down", link):
        taken = running.take(1)
        running.until(lambda: kept(running, other, taken[0]) and kept(running, store, taken[0]))
        with running.fault("buffer_store_away", store, lost=lost):
            running.kill(pair)
            taken += running.take(1)
            running.until(lambda: kept(running, other, taken[1]))
            running.until(is_told)
    running.nothing_is_lost(taken)
    running.until(lambda: not is_told(), what=f"{alarm} does not end")


def kept(running, store, obs_id):
    """Whether a store has every detector of an image, of all pairs together."""
    found = {path.name for path in running.site.path(store).glob(f"pair-*/data/**/{obs_id}_*.fits")}
    return len(found) == len(running.instrument.detectors)
