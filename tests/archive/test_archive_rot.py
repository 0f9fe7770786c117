"""A file that rots between its arrival and the telling of it is never announced as good."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from transfer_double import key_of

from cumbre.archive.distributor import Distributor
from cumbre.capture.fits_checksum import claims_and_fails
from cumbre.capture.raw_fits import raw_fits_bytes
from cumbre.core.instrument import load_instrument


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
