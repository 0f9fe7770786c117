"""Several writer nodes: they share each image; one dies in the middle and the others finish it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import camera_double as camera
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumbre.bus import Bus
from cumbre.bus.messages import AckCode
from cumbre.capture.fits_checksum import encoded, is_sound, ones_complement_sum
from cumbre.capture.nodes import at_work, owner, write_once
from cumbre.capture.primary import primary_cards
from cumbre.capture.raw_fits import raw_fits_bytes
from cumbre.capture.writer import ImageWriter
from cumbre.core.configuration import Site
from cumbre.core.time import Clock
from cumbre.site.proof import raw_pixels
from cumbre.stores.files import sha256_of

OBS = "XC_O_20261120_000001"
HEADER = {
    "obs_id": OBS, "instrument": "DemoCam", "group_id": "g", "version": 1, "complete": True, "missing": [],
    "reasons": {}, "provenance": {}, "keywords": {"OBSID": [OBS, "Image name"], "RA": [53.1, "deg"]},
}  # fmt: skip
NODE = """
import os, sys, time
from pathlib import Path
import cumbre.capture.pixels as pixels
from cumbre.bus import open_bus
from cumbre.capture.writer import ImageWriter
from cumbre.core.configuration import Site
from cumbre.core.time import Clock
root, number, slow_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
site = Site.load(root); clock = Clock.load(site.clock_path)
bus = open_bus(f"sqlite:///{site.root}/bus/bus.db", identity=f"writer-{number}", clock=clock)
write = pixels.write_once
def slow(path, content):
    (root / f"writing-{number}").touch()
    time.sleep(slow_s)
    return write(path, content)
if slow_s:
    pixels.write_once = slow
writer = ImageWriter(site=site, bus=bus, clock=clock, node=number)
(root / f"up-{number}").touch()
while True:
    writer.step(0.1)
"""


def raw(site: Site, name: str, obs_id: str = OBS) -> Path:
    return site.path(f"summit/raw/DemoCam/20261120/{obs_id}/{obs_id}_{name}.fits")


def give_header(site: Site, obs_id: str = OBS) -> None:
    path = site.path(f"summit/headers/{obs_id}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(HEADER))


def nodes_of(site: Site, writers: int, spares: int = 0) -> Site:
    path = site.path("site.yaml")
    text = path.read_text().replace(
        "capture: {writers: 1}", f"capture: {{writers: {writers}, spares: {spares}, silence_s: 1.0}}"
    )
    path.write_text(text)
    return Site.load(site.root)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def start(site: Site, clock: Clock) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start nodes as processes; all are ended after the test."""
    clock.save(site.clock_path)
    running = []

    def one(number: int, slow_s: float = 0.0) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", NODE, str(site.root), str(number), str(slow_s)])
        running.append(process)
        return process

    yield one
    for process in running:
        process.kill()
        process.wait()


def record(site: Site, obs_id: str = OBS) -> dict[str, dict[str, str]]:
    path = site.path(f"summit/capture/20261120/{obs_id}.json")
    return json.loads(path.read_text())["detectors"] if path.is_file() else {}


def assert_whole(site: Site, bus: Bus, pixels: dict[str, object], obs_id: str = OBS) -> None:
    """Every detector is there once, sound, with the camera's pixels, and its hops agree with the bytes."""
    for detector in camera.INSTRUMENT.detectors:
        path = raw(site, detector.name, obs_id)
        assert (raw_pixels(path, detector) == pixels[detector.name]).all()
        assert is_sound(path.read_bytes())
        told = {
            hop["checksum"]
            for hop in camera.hops(bus, "written")
            if (hop["obsId"], hop["detector"]) == (obs_id, detector.id)
        }
        assert told == {sha256_of(path)}
    assert not list(raw(site, "x", obs_id).parent.glob(".*"))


def test_two_nodes_share_an_image_and_a_killed_one_is_replaced_in_the_middle(site, bus, clock, start):
    site = nodes_of(site, 2)
    pixels = camera.store_image(site, OBS)
    share = Counter(owner(["writer-1", "writer-2"], OBS, name) for name in pixels)
    victim = max(share, key=lambda name: share[name])
    other = "writer-2" if victim == "writer-1" else "writer-1"
    assert share[victim] >= 2  # or there would be no middle
    dying, living = start(int(victim[-1]), slow_s=0.7), start(int(other[-1]))
    until(lambda: site.path("up-1").exists() and site.path("up-2").exists())
    give_header(site)
    camera.read_out(bus, OBS)
    until(lambda: site.path(f"writing-{victim[-1]}").exists())
    dying.kill()
    until(lambda: len(record(site)) == 4)
    assert living.poll() is None
    assert_whole_after_kill(site, bus, pixels)
    (told,) = [m.fields for m in bus.replay(["Writer.imageWritten"])]
    assert (told["expected"], told["written"], told["missing"]) == (4, 4, [])
    assert other in told["nodes"]


def assert_whole_after_kill(site, bus, pixels):
    for leftover in raw(site, "x").parent.glob(".*.tmp"):
        leftover.unlink()  # what the killed process was writing has no name yet
    assert_whole(site, bus, pixels)


def test_a_node_that_hung_and_comes_back_changes_nothing(site, bus, clock, start):
    site = nodes_of(site, 2)
    pixels = camera.store_image(site, OBS)
    victim = next(name for name in ("writer-1", "writer-2")
                  if any(owner(["writer-1", "writer-2"], OBS, d) == name for d in pixels))  # fmt: skip
    other = "writer-2" if victim == "writer-1" else "writer-1"
    hung = start(int(victim[-1]), slow_s=0.3)
    start(int(other[-1]))
    until(lambda: site.path("up-1").exists() and site.path("up-2").exists())
    give_header(site)
    camera.read_out(bus, OBS)
    until(lambda: site.path(f"writing-{victim[-1]}").exists())
    os.kill(hung.pid, signal.SIGSTOP)
    until(lambda: len(record(site)) == 4)
    before = {name: (raw(site, name).stat().st_ino, sha256_of(raw(site, name))) for name in pixels}
    os.kill(hung.pid, signal.SIGCONT)
    camera.store_image(site, "XC_O_20261120_000002", seed=2)
    give_header(site, "XC_O_20261120_000002")
    camera.read_out(bus, "XC_O_20261120_000002")
    until(lambda: len(record(site, "XC_O_20261120_000002")) == 4)
    assert before == {name: (raw(site, name).stat().st_ino, sha256_of(raw(site, name))) for name in pixels}
    assert_whole(site, bus, pixels)


def step_until(nodes: list[ImageWriter], condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        for node in nodes:
            node.step(0.01)


def test_a_spare_works_only_in_the_place_of_a_silent_node(site, bus, clock):
    site = nodes_of(site, 1, spares=1)
    camera.store_image(site, OBS)
    give_header(site)
    camera.read_out(bus, OBS)
    spare = ImageWriter(site=site, bus=bus, clock=clock, node=2)
    regular = ImageWriter(site=site, bus=bus, clock=clock, node=1)
    step_until([spare, regular], lambda: record(site))
    assert {entry["node"] for entry in record(site).values()} == {"writer-1"}
    regular.close()
    second = "XC_O_20261120_000002"
    camera.store_image(site, second, seed=2)
    give_header(site, second)
    camera.read_out(bus, second)
    step_until([spare], lambda: record(site, second))
    assert {entry["node"] for entry in record(site, second).values()} == {"writer-2"}
    spare.close()


def command(bus: Bus, nodes: list[ImageWriter], topic: str, **fields: object) -> tuple[int, str]:
    """Send a command and let the nodes work until its final answer."""
    offset = bus.publish(topic, fields)
    answers: list[dict[str, object]] = []

    def answered() -> bool:
        answers[:] = [m.fields for m in bus.replay(["Writer.ackcmd"], start_offset=offset)]
        return any(AckCode(a["ack"]).is_final for a in answers)

    step_until(nodes, answered)
    final = [a for a in answers if AckCode(a["ack"]).is_final]
    assert len(final) == 1
    return final[0]["ack"], final[0]["result"]


def test_a_commanded_image_is_written_and_a_damaged_file_is_made_again(site, bus, clock):
    site = nodes_of(site, 2)
    nodes = [ImageWriter(site=site, bus=bus, clock=clock, node=n, scan_every_s=1e6) for n in (1, 2)]
    pixels = camera.store_image(site, OBS)
    give_header(site)
    code, said = command(bus, nodes, "Writer.writeImage", obsId=OBS, detectors=["R00_S01"])
    assert (code, said) == (AckCode.COMPLETE, "1 detectors")
    assert raw(site, "R00_S01").exists()
    assert not raw(site, "R00_S00").exists()
    assert command(bus, nodes, "Writer.writeImage", obsId=OBS)[0] == AckCode.COMPLETE
    assert_whole(site, bus, pixels)
    sums = {name: sha256_of(raw(site, name)) for name in pixels}
    damaged = bytearray(raw(site, "R00_S10").read_bytes())
    damaged[20000] ^= 4
    raw(site, "R00_S10").write_bytes(bytes(damaged))
    raw(site, "R00_S11").unlink()
    kept = raw(site, "R00_S00").stat().st_ino
    assert command(bus, nodes, "Writer.recapture", obsId=OBS)[0] == AckCode.COMPLETE
    assert {name: sha256_of(raw(site, name)) for name in pixels} == sums
    assert raw(site, "R00_S00").stat().st_ino == kept
    (evidence,) = site.path("summit/quarantine").glob("*.fits")
    assert evidence.read_bytes() == bytes(damaged)
    for node in nodes:
        node.close()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"obsId": "XC_O_20261120_000077"}, "no such image"),
        ({"obsId": OBS, "detectors": ["R99_S00"]}, "['R99_S00']: the camera read"),
        ({"obsId": "../../etc"}, "expected XX_O_"),
    ],
)
def test_a_command_that_cannot_be_done_is_answered(site, bus, clock, fields, words):
    camera.store_image(site, OBS)
    node = ImageWriter(site=site, bus=bus, clock=clock)
    code, said = command(bus, [node], "Writer.writeImage", **fields)
    assert code == AckCode.FAILED
    assert words in said


NAMES = st.lists(st.sampled_from([f"writer-{n}" for n in range(1, 9)]), min_size=2, max_size=8, unique=True)


@given(NAMES, st.lists(st.text(max_size=12), min_size=1, max_size=30, unique=True))
def test_when_a_node_goes_only_its_detectors_move(nodes, detectors):
    gone, left = nodes[0], nodes[1:]
    for detector in detectors:
        before = owner(nodes, OBS, detector)
        after = owner(reversed(left), OBS, detector)
        assert before in (after, gone)


def test_each_of_four_nodes_has_its_share_of_a_focal_plane():
    nodes = [f"writer-{n}" for n in range(1, 5)]
    share = Counter(owner(nodes, OBS, f"R{raft:02d}_S{slot}") for raft in range(21) for slot in range(9))
    # 189 detectors at random over 4 nodes: 47 ± 6
    assert min(share.values()) > 47 - 4 * 6
    assert max(share.values()) < 47 + 4 * 6


def test_spares_fill_the_places_of_the_silent():
    regular, spares = ["writer-1", "writer-2"], ["writer-3", "writer-4"]
    assert at_work({"writer-1", "writer-2", "writer-3"}, regular, spares) == regular
    assert at_work({"writer-2", "writer-3", "writer-4"}, regular, spares) == ["writer-2", "writer-3"]
    assert at_work({"writer-4"}, regular, spares) == ["writer-4"]
    assert at_work(set(), regular, spares) == []


def test_a_name_is_given_once(tmp_path):
    path = tmp_path / "a" / "file"
    assert write_once(path, b"first") is not None
    assert write_once(path, b"second") is None
    assert path.read_bytes() == b"first"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def fits_file() -> bytes:
    detector = camera.INSTRUMENT.detectors[0]
    header = {"complete": True, "keywords": {"OBSID": [OBS, ""], "OBJECT": ["it's / a slash", "words"]}}
    cards = primary_cards(header, detector, "sha256:" + "0" * 64)
    return raw_fits_bytes(detector, camera.arrays(1)[detector.name], cards)


def test_checksums_agree_with_another_program_and_do_not_depend_on_the_time(tmp_path, monkeypatch):
    from astropy.io import fits

    content = fits_file()
    path = tmp_path / "raw.fits"
    path.write_bytes(content)
    with fits.open(path, checksum=True, disable_image_compression=True) as hdus:  # warnings are errors here
        assert [hdu.verify_checksum() for hdu in hdus] == [1] * 9
        assert [hdu.verify_datasum() for hdu in hdus] == [1] * 9
    deadline = time.time()
    until(lambda: int(time.time()) > int(deadline))  # the library would write another second
    assert fits_file() == content


@given(st.data())
def test_any_flipped_bit_is_seen(data):
    content = FITS
    at = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    assert is_sound(content)
    assert not is_sound(bytes(damaged))


@pytest.mark.parametrize("content", [b"", b"x" * 2880, b"SIMPLE  =" + b" " * 5000])
def test_what_is_no_fits_is_not_sound(content):
    assert not is_sound(content)


def test_truncated_is_not_sound():
    assert not is_sound(FITS[:-2880])


@given(st.integers(0, 2**32 - 1))
def test_the_encoded_sum_makes_all_ones(total):
    text = encoded(total)
    assert text.isalnum()
    # the 16 letters stand one byte after a word's beginning
    words = text[1:] + text[:1]
    # the sum was made with sixteen zeros in their place, which are taken off again
    assert ones_complement_sum(words + bytes([0xFF - ord("0")] * 16), total) == 0xFFFFFFFF


FITS = fits_file()
