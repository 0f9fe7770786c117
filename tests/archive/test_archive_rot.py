"""A file that rots between its arrival and the telling of it is never announced as good."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from transfer_double import hops, key_of, running, until, write_image

from cumbre.archive.distributor import Distributor
from cumbre.archive.replicator import Replicator
from cumbre.capture.fits_checksum import claims_and_fails
from cumbre.capture.raw_fits import raw_fits_bytes
from cumbre.core.instrument import load_instrument
from cumbre.simulator.network import LinkProxy


def raw_file(name: str) -> bytes:
    detector = load_instrument("democam").detector(name)
    shape = (len(detector.amplifiers), *detector.amplifiers[0].raw_shape)
    array = np.random.default_rng(1).integers(900, 1100, shape).astype(np.uint16)
    cards = [{"name": "DAQSUM", "value": "ab" * 32, "comment": ""}]
    return raw_fits_bytes(detector, array, cards)


@pytest.fixture
def names(site):
    return [detector.name for detector in load_instrument("democam").detectors[:3]]


def test_rotten_files_are_set_aside_and_the_others_told(site, bus, clock, names):
    root = site.path("base/raw")
    rotten, good, foreign = (root / key_of(1, name) for name in names)
    for path, name in ((rotten, names[0]), (good, names[1])):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw_file(name))
    content = bytearray(rotten.read_bytes())
    content[len(content) // 2] ^= 4
    rotten.write_bytes(content)
    foreign.write_bytes(b"SIMPLE  =                    T" + b" " * 2850)
    distributor = Distributor(site=site, bus=bus, clock=clock, place="base")
    with contextlib.closing(distributor):
        distributor.step(0.0)
        distributor.step(0.0)
    hops = [m.fields for m in bus.replay(["Image.hop"])]
    told = {(f["hop"], f["detectorName"], f["outcome"]) for f in hops}
    assert told == {
        ("quarantined", names[0], "BadFile"),
        ("at_base", names[1], "ok"),
        ("at_base", names[2], "ok"),
    }
    assert not rotten.exists()
    kept = [p for p in site.path("base/quarantine").iterdir() if p.suffix != ".json"]
    assert [p.read_bytes() for p in kept] == [bytes(content)]


def test_what_promises_nothing_is_not_judged(tmp_path):
    path = tmp_path / "x.fits"
    for content in (b"", b"not FITS", b"SIMPLE  =  T"):
        path.write_bytes(content)
        assert not claims_and_fails(path)
    whole = raw_file("R00_S00")
    path.write_bytes(whole)
    assert not claims_and_fails(path)
    path.write_bytes(whole[:-2880])
    assert claims_and_fails(path)


def test_a_file_that_rots_before_it_is_sent_is_not_sent_as_if_it_had_always_been_so(
    site, bus, clock, caplog, monkeypatch
):
    """Its event failed on the rot; the scan of the raw files must not take the rot for the file."""
    good = {path.name: path.read_bytes() for path in write_image(site, bus, 1)}
    rotten = site.path(f"summit/raw/{key_of(1)}")
    content = bytearray(rotten.read_bytes())
    content[1000] ^= 1
    rotten.write_bytes(content)
    for path in rotten.parent.iterdir():
        os.utime(path, (0, 0))  # settled long ago
    link = os.link

    def link_on_one_disk(source, target):
        if "buffer" in Path(target).relative_to(site.root).parts:
            raise OSError(errno.EXDEV, "the buffer is on a disk of its own")
        link(source, target)

    monkeypatch.setattr(os, "link", link_on_one_disk)
    base = site.path(f"base/raw/{key_of(1)}")
    distributor = Distributor(site=site, bus=bus, clock=clock, place="base")
    proxy = LinkProxy(site=site, bus=bus, clock=clock, source="summit", target="base")
    with running(distributor, proxy, Replicator(site=site, bus=bus, clock=clock, scan_every_s=0.1)):
        until(lambda: caplog.text.count("left until it is mended") > 1 and len(hops(bus, "at_base")) == 3)
        assert not base.exists()
        rotten.write_bytes(good[rotten.name])  # what scrub does
        os.utime(rotten, (0, 0))
        until(lambda: len(hops(bus, "at_base")) == 4)
    for path in base.parent.glob("*.fits"):
        assert path.read_bytes() == good[path.name]
