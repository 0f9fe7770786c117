"""Links that are down, slow, flapping, or flip bits: images are delayed and never lost."""

from __future__ import annotations

import time

import pytest

LINKS = {"summit-base": "at_base", "base-archive": "at_archive"}


def test_the_summit_goes_on_while_the_base_cannot_be_reached(running):
    with running.fault("link_down", "summit-base"):
        taken = running.take(2)
        running.until(lambda: running.has("written", taken))
        running.until(lambda: running.has("buffered", taken))
        assert not running.hops(taken[0], "at_base")
    running.nothing_is_lost(taken)


def test_the_base_keeps_tape_and_buffer_while_the_archive_cannot_be_reached(running):
    with running.fault("link_down", "base-archive"):
        taken = running.take(2)
        running.until(lambda: running.has("base_tape", taken))
        assert not running.hops(taken[0], "at_archive")
        kept = [p for p in running.site.path("base/buffer").rglob("*.fits") if taken[1] in p.name]
        assert len(kept) == len(running.instrument.detectors)
    running.nothing_is_lost(taken)


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
