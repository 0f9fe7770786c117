"""The image writer against what the camera stored: pixels bit for bit, and every bad input has its outcome."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import camera_double as camera
import numpy as np
import pytest
from astropy.io import fits

from cumbre.bus import Bus
from cumbre.capture.keys import RawKey
from cumbre.capture.writer import ImageWriter
from cumbre.core.configuration import Site
from cumbre.core.errors import BadFileError
from cumbre.core.time import Clock

OBS = "XC_O_20261120_000001"
HEADER = {
    "obs_id": OBS, "instrument": "DemoCam", "group_id": "g", "version": 1, "complete": True, "missing": [],
    "reasons": {}, "provenance": {},
    "keywords": {
        "OBSID": [OBS, "Image name"], "RA": [53.1, "deg"], "AIRMASS": [1.2, ""], "DATE-BEG": ["2026-11-20T01:02:03", ""],
    },
}  # fmt: skip


def give_header(site: Site, obs_id: str = OBS) -> None:
    path = site.path(f"summit/headers/{obs_id}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(HEADER))


def raw(site: Site, name: str, obs_id: str = OBS) -> Path:
    return site.path(f"summit/raw/DemoCam/20261120/{obs_id}/{obs_id}_{name}.fits")


def run(writer: ImageWriter, wanted: int = 1) -> None:
    deadline = time.monotonic() + 10
    done = 0
    while done < wanted and time.monotonic() < deadline:
        done += writer.step(0.02)
    assert done >= wanted


def test_files_hold_what_the_camera_read(site: Site, bus: Bus, clock: Clock) -> None:
    pixels = camera.store_image(site, OBS)
    give_header(site)
    camera.read_out(bus, OBS)
    writer = ImageWriter(site=site, bus=bus, clock=clock)
    run(writer)
    for detector in camera.INSTRUMENT.detectors:
        path = raw(site, detector.name)
        with fits.open(path, checksum=True) as opened:
            primary = opened[0].header
            assert (primary["CHIPID"], primary["DETECTOR"]) == (detector.name, detector.id)
            assert primary["AIRMASS"] == 1.2
            assert primary["FILTER"] == "r_demo"  # only the camera's record had it
            assert primary["HDRSTAT"] == "COMPLETE"
            for index, amplifier in enumerate(detector.amplifiers):
                hdu = opened[amplifier.hdu]
                assert np.array_equal(hdu.data, pixels[detector.name][index])
                assert hdu.header["GAIN"] == amplifier.gain
                assert hdu.header["DATASEC"] == "[5:260,1:512]"
    told = camera.hops(bus, "written")
    assert {hop["detector"] for hop in told} == {0, 1, 2, 3}
    for hop in told:
        content = Path(str(hop["path"])).read_bytes()
        assert hop["outcome"] == "ok"
        assert hop["checksum"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert hop["byteSize"] == len(content)
    manifest = json.loads(raw(site, "expectedSensors").with_suffix(".json").read_bytes())
    assert manifest["expectedSensors"] == dict.fromkeys(pixels, "SCIENCE")
    assert json.loads(raw(site, "header").with_suffix(".json").read_bytes())["keywords"]["RA"] == [
        53.1,
        "deg",
    ]


def test_again_is_harmless_and_other_pixels_are_a_conflict(site: Site, bus: Bus, clock: Clock) -> None:
    camera.store_image(site, OBS)
    give_header(site)
    writer = ImageWriter(site=site, bus=bus, clock=clock)
    camera.read_out(bus, OBS)
    run(writer)
    before = raw(site, "R00_S00").read_bytes()
    camera.read_out(bus, OBS)
    run(writer)
    assert raw(site, "R00_S00").read_bytes() == before
    assert {hop["outcome"] for hop in camera.hops(bus)} == {"ok"}
    camera.store_image(site, OBS, seed=2)
    camera.read_out(bus, OBS)
    run(writer)
    assert raw(site, "R00_S00").read_bytes() == before
    refused = camera.hops(bus, "quarantined")
    assert [hop["outcome"] for hop in refused] == ["Conflict"] * 4
    assert all(Path(str(hop["path"])).is_file() for hop in refused)


@pytest.mark.parametrize("damage", ["truncated", "missing", "type", "checksum", "huge", "empty", "pickle"])
def test_one_bad_detector_does_not_stop_the_others(site: Site, bus: Bus, clock: Clock, damage: str) -> None:
    camera.store_image(site, OBS)
    give_header(site)
    path = site.path(f"summit/daq/{OBS}/R00_S01.npy")
    info_path = path.with_name("exposure.json")
    info = json.loads(info_path.read_text())
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
            del info["sha256"]["R00_S01"]  # so that the reader itself must notice
        case "missing":
            path.unlink()
        case "type":
            np.save(path, np.zeros((8, 512, 292), np.float32)[:, :, :146])
            del info["sha256"]["R00_S01"]
        case "checksum":
            content = bytearray(path.read_bytes())
            content[5000] ^= 1
            path.write_bytes(bytes(content))
        case "huge":
            path.write_bytes(path.read_bytes() + bytes(1 << 20))
        case "empty":
            path.write_bytes(b"")
            del info["sha256"]["R00_S01"]
        case "pickle":
            np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
            del info["sha256"]["R00_S01"]
    info_path.write_text(json.dumps(info))
    camera.read_out(bus, OBS)
    run(ImageWriter(site=site, bus=bus, clock=clock))
    told = {hop["detectorName"]: hop["outcome"] for hop in camera.hops(bus, "written")}
    assert told == {"R00_S00": "ok", "R00_S01": "BadFile", "R00_S10": "ok", "R00_S11": "ok"}
    assert len(camera.hops(bus, "quarantined")) == (damage != "missing")


def test_without_header_it_is_written_late_and_flagged(site: Site, bus: Bus, clock: Clock) -> None:
    camera.store_image(site, OBS)
    camera.read_out(bus, OBS)
    writer = ImageWriter(site=site, bus=bus, clock=clock, header_wait_s=1.0)
    writer.step(0.0)
    assert not raw(site, "R00_S00").exists()
    run(writer)
    header = fits.getheader(raw(site, "R00_S00"))
    assert header["HDRSTAT"] == "PARTIAL"
    assert (header["RA"], header["EXPID"], header["MJD-BEG"]) == (
        53.1,
        2026112000001,
        pytest.approx(61365.042094907, abs=1e-8),
    )
    assert all("partial header" in str(hop["message"]) for hop in camera.hops(bus, "written"))


def test_strange_events_are_survived(site: Site, bus: Bus, clock: Clock) -> None:
    camera.read_out(bus, "XC_O_20261120_000009", Path("/nowhere/XC_O_20261120_000009"))
    bus.publish("Camera.endReadout", camera.block(OBS) | {"imageName": "../../etc"} | {"daqPath": "x"})
    camera.store_image(site, OBS)
    site.path(f"summit/daq/{OBS}/exposure.json").write_text("{]")
    camera.read_out(bus, OBS)
    camera.store_image(site, "XC_O_20261120_000002")
    give_header(site, "XC_O_20261120_000002")
    camera.read_out(bus, "XC_O_20261120_000002")
    writer = ImageWriter(site=site, bus=bus, clock=clock, header_wait_s=0.5)
    run(writer, 3)
    told = {(hop["obsId"], hop["detector"]): hop["outcome"] for hop in camera.hops(bus, "written")}
    assert told[OBS, -1] == "BadFile"
    assert told["XC_O_20261120_000009", -1] == "NotFound"
    assert told["XC_O_20261120_000002", 3] == "ok"


def test_scan_finds_images_without_event(site: Site, bus: Bus, clock: Clock) -> None:
    camera.store_image(site, OBS)
    late = Clock(clock.tai0_s, clock.mono0_s, 400.0)
    writer = ImageWriter(site=site, bus=bus, clock=late, scan_every_s=0.02)
    run(writer)
    assert raw(site, "R00_S11").exists()
    for _ in range(5):
        assert writer.step(0.01) == 0  # once


KILLED = """
import os, sys
from pathlib import Path
import cumbre.capture.pixels as module
from cumbre.capture.writer import ImageWriter
from cumbre.bus import open_bus
from cumbre.core.configuration import Site
from cumbre.core.time import Clock
site = Site.load(Path(sys.argv[1])); clock = Clock.load(site.clock_path)
bus = open_bus(f"sqlite:///{site.root}/bus/bus.db", identity="writer", clock=clock)
write, count = module.write_once, 0
def dying(path, content):
    global count
    if path.suffix == ".fits":
        count += 1
        if count == 3:
            path.parent.joinpath(f".{path.name}.tmp").write_bytes(content[:1000])
            os.kill(os.getpid(), 9)
    return write(path, content)
module.write_once = dying
writer = ImageWriter(site=site, bus=bus, clock=clock)
while True:
    writer.step(0.1)
"""


def test_killed_in_the_middle_it_goes_on(site: Site, bus: Bus, clock: Clock) -> None:
    pixels = camera.store_image(site, OBS)
    give_header(site)
    clock.save(site.clock_path)
    camera.read_out(bus, OBS)
    died = subprocess.run([sys.executable, "-c", KILLED, str(site.root)], timeout=30, check=False)
    assert died.returncode == -9
    assert raw(site, "R00_S01").exists()
    assert not raw(site, "R00_S10").exists()
    kept = raw(site, "R00_S00").read_bytes()
    run(ImageWriter(site=site, bus=bus, clock=clock))
    assert raw(site, "R00_S00").read_bytes() == kept
    assert {hop["detectorName"] for hop in camera.hops(bus, "written")} == set(pixels)
    assert {hop["outcome"] for hop in camera.hops(bus)} == {"ok"}


@pytest.mark.parametrize(
    "key",
    [
        "/etc/passwd", "../x", "DemoCam/20261120/../20261120/XC_O_20261120_000001_R00_S00.fits",
        "DemoCam/20261121/XC_O_20261120_000001/XC_O_20261120_000001_R00_S00.fits",
        "DemoCam/20261120/XC_O_20261120_000001/XC_O_20261120_000002_R00_S00.fits",
        "DemoCam/20261120/XC_O_20261120_000001/XC_O_20261120_000001_R00_S00.exe", "", "a" * 5000,
        "DemoCam/20261120/XC_O_20261120_000000/XC_O_20261120_000000_R00.fits",
        "DemoCam/20261120/XC_O_20261120_000001/XC_O_20261120_000001_R00_S00.fits\n",
    ],
)  # fmt: skip
def test_keys_of_another_form_are_refused(key: str) -> None:
    with pytest.raises(BadFileError, match="key"):
        RawKey.parse(key)


def test_key_round_trip() -> None:
    text = f"DemoCam/20261120/{OBS}/{OBS}_R00_S00.fits.gz"
    key = RawKey.parse(text)
    assert str(key) == text
    assert key.is_detector
