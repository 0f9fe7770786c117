"""Summit and base in network namespaces of their own, joined by a cable of the kernel that is pulled.

A pulled cable is another failure than a broken connection: nobody is told anything, packets just vanish.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from cumbre.capture.writer import ImageWriter
from cumbre.core.configuration import SITE_FILE, Site
from cumbre.core.instrument import load_instrument
from cumbre.core.time import Clock
from cumbre.simulator.chip import raw_shape
from cumbre.site.chaos import chaos_site
from cumbre.site.proof import raw_pixels
from cumbre.site.roles import open_site_bus

SUMMIT, BASE = f"cumbre-s{os.getpid()}", f"cumbre-b{os.getpid()}"
CABLE = (f"cs{os.getpid()}", f"cb{os.getpid()}")
PORT = 7411


def ip(*words: str, inside: str = "") -> None:
    space = ["ip", "netns", "exec", inside] if inside else []
    subprocess.run([*space, *words], check=True, capture_output=True, text=True)


@pytest.fixture
def cable() -> Iterator[None]:
    """Two namespaces with a cable between them; skipped where the kernel does not let us."""
    try:
        for space in (SUMMIT, BASE):
            ip("ip", "netns", "add", space)
        ip("ip", "link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
        for space, end, address in ((SUMMIT, CABLE[0], "10.77.0.1/24"), (BASE, CABLE[1], "10.77.0.2/24")):
            ip("ip", "link", "set", end, "netns", space)
            ip("ip", "address", "add", address, "dev", end, inside=space)
            ip("ip", "link", "set", end, "up", inside=space)
    except (OSError, subprocess.CalledProcessError) as error:
        remove()
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    yield
    remove()


def remove() -> None:
    for space in (SUMMIT, BASE):
        subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = chaos_site(tmp_path / "site", 1, 1, small_disks=False)
    path = site.path(SITE_FILE)
    data = yaml.safe_load(path.read_text())
    data["places"]["base"]["listen"] = f"10.77.0.2:{PORT}"
    data["links"][0] |= {"pairs": 1, "latency_ms": 0, "bandwidth_mbit_s": None, "timeout_s": 2.0}
    data["capture"] = {"writers": 1}
    data["archive"] = {"control": False}  # no control system here that would order the files
    path.write_text(yaml.safe_dump(data))
    (site.root / "wide.yaml").write_text(
        (site.root / "chaoscam.yaml").read_text().replace("nx: 128", "nx: 1024").replace("ny: 64", "ny: 512")
    )
    path.write_text(path.read_text().replace("chaoscam.yaml", "wide.yaml"))
    return Site.load(site.root)


@pytest.fixture
def ends(site: Site, cable: None) -> Iterator[None]:
    """The replicator at the summit, the distributor at the base."""
    processes = []
    for space, role in ((BASE, "base-1"), (SUMMIT, "replicator-1")):
        with (site.root / "logs" / f"{role}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", space, sys.executable, "-m", "cumbre.site.runner", str(site.root), role],
                    stdout=log, stderr=log,
                )
            )  # fmt: skip
    yield
    for process in processes:
        process.kill()
        process.wait()


def read_out(site: Site, number: int) -> dict[str, np.ndarray]:
    """One image in the camera's store and its event."""
    obs_id = f"XX_O_20261120_{number:06d}"
    folder = site.path(f"summit/daq/{obs_id}")
    folder.mkdir(parents=True)
    pixels, sums = {}, {}
    instrument = load_instrument(site.config.instruments[0])
    for detector in instrument.detectors:
        shape = raw_shape(detector)
        array = np.random.default_rng(number * 10 + detector.id).integers(0, 65536, shape, dtype=np.uint16)
        np.save(folder / f"{detector.name}.npy", array)
        pixels[detector.name] = array
        sums[detector.name] = hashlib.sha256((folder / f"{detector.name}.npy").read_bytes()).hexdigest()
    info = {
        "obs_id": obs_id, "instrument": instrument.name, "detectors": list(pixels), "sha256": sums,
        "image_type": "DARK", "exposure_s": 1.0, "filter": "r_chaos", "begin_tai": 1.8e9, "end_tai": 1.8e9 + 1,
    }  # fmt: skip
    (folder / "exposure.json").write_text(json.dumps(info))
    return pixels


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def write(site: Site, numbers: list[int]) -> dict[int, dict[str, np.ndarray]]:
    """Images from the camera's store to raw files and their hops, as the writer makes them."""
    clock = Clock.load(site.clock_path)
    out = {number: read_out(site, number) for number in numbers}
    with open_site_bus(site, "writer-1") as bus:
        late = Clock(clock.tai0_s, clock.mono0_s, 1e4)  # no header will come: write with what is known
        writer = ImageWriter(site=site, bus=bus, clock=late, scan_every_s=0.05)
        wanted = 5 * len(list(site.path("summit/daq").glob("*/exposure.json")))
        until(
            lambda: writer.step(0.02) or len(list(site.path("summit/raw").rglob("*.fits"))) == wanted,
            20,
            "not written",
        )
        writer.close()
    return out


def arrived(site: Site) -> list[Path]:
    return [p for p in site.path("base/raw").rglob("XX*.fits") if not p.name.startswith(".")]


def assert_equal(site: Site, images: dict[int, dict[str, np.ndarray]]) -> None:
    instrument = load_instrument(site.config.instruments[0])
    for number, pixels in images.items():
        for name, array in pixels.items():
            path = next(site.path("base/raw").rglob(f"XX_O_20261120_{number:06d}_{name}.fits"))
            assert (raw_pixels(path, instrument.detector(name)) == array).all()


def test_a_cable_that_is_pulled_in_the_middle_of_a_file(site: Site, ends: None) -> None:
    # slow enough that the cable is pulled while a file is on its way
    ip("tc", "qdisc", "add", "dev", CABLE[0], "root", "tbf", "rate", "40mbit", "burst", "32kb", "latency", "400ms",
       inside=SUMMIT)  # fmt: skip
    images = write(site, [1])
    until(lambda: arrived(site), 30, "nothing arrives")
    assert len(arrived(site)) < 5
    ip("ip", "link", "set", CABLE[0], "down", inside=SUMMIT)
    images |= write(site, [2])
    before = len(arrived(site))
    time.sleep(4.0)  # longer than a transfer may take: it was given up
    assert len(arrived(site)) == before < 10
    ip("ip", "link", "set", CABLE[0], "up", inside=SUMMIT)
    until(lambda: len(arrived(site)) == 10, 60, "not everything arrived after the cable was back")
    assert_equal(site, images)
