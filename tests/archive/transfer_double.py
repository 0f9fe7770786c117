"""Raw files as the writer leaves them, and a thread that steps services like the runner does."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cumbre.bus import Bus, open_bus
from cumbre.core.configuration import Site
from cumbre.core.ids import ObsId, image_folder
from cumbre.core.time import Clock
from cumbre.stores.files import sha256_of

DETECTORS = ("R00_S00", "R00_S01", "R00_S10", "R00_S11")


def open_site_bus(site: Site, identity: str, clock: Clock) -> Bus:
    return open_bus(f"sqlite:///{site.root}/bus/bus.db", identity=identity, clock=clock)


def obs_id(number: int) -> str:
    return f"XC_O_20261120_{number:06d}"


def key_of(number: int, detector: str = "R00_S00") -> str:
    return f"{image_folder('DemoCam', ObsId.parse(obs_id(number)))}/{obs_id(number)}_{detector}.fits"


def write_image(
    site: Site, bus: Bus, number: int, *, size: int = 30_000, announce: bool = True
) -> list[Path]:
    """Files of one image under summit/raw, and the hops that the writer would publish."""
    rng = random.Random(number)
    paths = []
    manifest = site.path(f"summit/raw/{key_of(number)}").with_name(f"{obs_id(number)}_expectedSensors.json")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"obsId": obs_id(number)}))
    for index, name in enumerate(DETECTORS):
        path = site.path(f"summit/raw/{key_of(number, name)}")
        path.write_bytes(rng.randbytes(size + index))
        paths.append(path)
        if announce:
            say_written(bus, number, index, path)
    return paths


def say_written(bus: Bus, number: int, detector: int, file: Path, **changed: Any) -> None:
    fields = {
        "obsId": obs_id(number), "instrument": "DemoCam", "exposureId": 2026112000000 + number,
        "groupId": f"group {number}", "detector": detector, "detectorName": DETECTORS[detector], "hop": "written",
        "place": "summit", "path": str(file), "byteSize": file.stat().st_size, "checksum": sha256_of(file),
        "hopTai": bus.clock.now_tai_s(),
    }  # fmt: skip
    bus.publish("Image.hop", fields | changed)


def hops(bus: Bus, hop: str, *, outcome: str | None = "ok") -> list[dict[str, Any]]:
    return [
        m.fields
        for m in bus.replay(["Image.hop"])
        if m.fields["hop"] == hop and outcome in (None, m.fields["outcome"])
    ]


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


@contextlib.contextmanager
def running(*services: Any) -> Iterator[None]:
    """Step services in threads until the block ends, then close them."""
    stop = threading.Event()
    faults: list[BaseException] = []

    def loop(service: Any) -> None:
        while not stop.is_set():
            try:
                service.step(0.05)
            except Exception as error:
                faults.append(error)
                return

    threads = [threading.Thread(target=loop, args=(service,), daemon=True) for service in services]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(5.0)
        for service in services:
            service.close()
    assert not faults, faults
