"""Links that are down, slow, flapping, or flip bits: images are delayed and never lost."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

LINKS = {"summit-base": "at_base", "base-archive": "at_archive"}
PAIRS = {"summit-base": ("replicator-1", "replicator-2"), "base-archive": ("forwarder-1", "forwarder-2")}


def pools(running, link):
    """Where the pairs of a link are registered."""
    told = [running.bus.latest("Replicator.registration", key=name) for name in PAIRS[link]]
    return {message.fields["pool"] if message else None for message in told}


def test_the_summit_goes_on_while_the_base_cannot_be_reached(running):
    with running.fault("link_down", "summit-base"):
        taken = running.take(2)
        running.until(lambda: running.has("written", taken))
        running.until(lambda: running.has("buffered", taken))
        assert not running.hops(taken[0], "at_base")
        running.until(lambda: pools(running, "summit-base") == {"local-only"})
    running.nothing_is_lost(taken)
    running.until(lambda: pools(running, "summit-base") == {"fully-operational"})


def test_the_base_keeps_tape_and_buffer_while_the_archive_cannot_be_reached(running):
    with running.fault("link_down", "base-archive"):
        taken = running.take(2)
        running.until(lambda: running.has("base_tape", taken))
        assert not running.hops(taken[0], "at_archive")
        kept = [p for p in running.site.path("base/buffer").rglob("*.fits") if taken[1] in p.name]
        assert len(kept) == len(running.instrument.detectors)
        running.until(lambda: pools(running, "base-archive") == {"local-only"})
    running.nothing_is_lost(taken)
    running.until(lambda: pools(running, "base-archive") == {"fully-operational"})


def test_an_outage_longer_than_the_buffers_is_overcome_by_a_disk(running, tmp_path):
    """The disk travels while the link is down; when it is up again nothing comes twice."""
    root, disk = running.site.root, tmp_path / "disk"
    with running.fault("link_down", "summit-base"):
        taken = running.take(2)
        running.until(lambda: running.has("written", taken))
        cumbre("ship", "export", "--site", root, "--to", disk, "--missing-at", "base", "--json")
        cumbre("ship", "verify", disk)
        for _ in range(2):  # a disk that is read twice brings nothing twice
            cumbre("ship", "import", "--site", root, "--from-disk", disk, "--place", "base", "--json")
        running.until(lambda: running.has("at_base", taken) and running.has("base_tape", taken))
        running.until(lambda: running.has("at_archive", taken))  # from there the way is open
    running.nothing_is_lost(taken)


def cumbre(*words):
    done = subprocess.run(
        [Path(sys.executable).parent / "cumbre", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("link", LINKS)
def test_a_slow_link_delays_and_loses_nothing(running, link):
    with running.fault("link_slow", link, bandwidth_mbit_s=0.01, latency_ms=2000):
        taken = running.take(2)
        running.until(lambda: running.has("written", taken))
        time.sleep(2.0)
    running.nothing_is_lost(taken)


@pytest.mark.parametrize("link", LINKS)
def test_a_flapping_link(running, link):
    with running.fault("link_flapping", link, period_s=0.4) as fault:
        taken, begun = running.take(2), time.monotonic()
        while (age_s := time.monotonic() - begun) < 4.0:
            running.injector.tick(fault, age_s)
            time.sleep(0.05)
    running.nothing_is_lost(taken)


@pytest.mark.parametrize("link", LINKS)
def test_bits_that_flip_on_the_wire_are_seen_and_sent_again(running, link):
    with running.fault("link_corrupt", link, part=0.3):
        taken = running.take(3)
        running.until(lambda: running.has("written", taken))
        time.sleep(2.0)
    running.nothing_is_lost(taken)
    for obs_id in taken:
        hops = running.hops(obs_id, LINKS[link])
        assert {hop["checksum"] for hop in hops} == {
            hop["checksum"] for hop in running.hops(obs_id, "written")
        }
