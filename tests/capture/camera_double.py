"""What a camera leaves behind: arrays in the store and events on the bus."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from cumbre.bus import Bus, open_bus
from cumbre.core.configuration import Site
from cumbre.core.ids import ObsId
from cumbre.core.instrument import load_instrument
from cumbre.core.time import Clock

BEGIN_TAI = 1795222837.0
INSTRUMENT = load_instrument("democam")


def site_bus(site: Site, identity: str, clock: Clock) -> Bus:
    return open_bus(f"sqlite:///{site.root}/bus/bus.db", identity=identity, clock=clock)


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = {}
    for detector in INSTRUMENT.detectors:
        shape = (len(detector.amplifiers), *detector.amplifiers[0].raw_shape)
        out[detector.name] = rng.normal(1100, 12, shape).astype(np.uint16)
    return out


def store_image(site: Site, obs_id: str, seed: int = 1) -> dict[str, np.ndarray]:
    folder = site.path(f"summit/daq/{obs_id}")
    folder.mkdir(parents=True, exist_ok=True)
    pixels = arrays(seed)
    sums = {}
    for name, array in pixels.items():
        path = folder / f"{name}.npy"
        np.save(path, array)
        sums[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    info = {
        "obs_id": obs_id, "instrument": "DemoCam", "detectors": list(pixels), "sha256": sums,
        "group_id": "2026-11-20T01:02:03.456", "image_type": "OBJECT", "exposure_s": 30.0, "filter": "r_demo",
        "ra": 53.1, "dec": -27.8, "rotation": 12.5, "begin_tai": BEGIN_TAI, "end_tai": BEGIN_TAI + 30.0,
    }  # fmt: skip
    (folder / "exposure.json").write_text(json.dumps(info))
    return pixels


def block(obs_id: str) -> dict[str, object]:
    parsed = ObsId.parse(obs_id)
    pairs = {
        "filter": "r_demo",
        "ra": "53.1",
        "dec": "-27.8",
        "rotation": "12.5",
        "program": "survey",
        "note": "n",
    }
    return {
        "instrument": "DemoCam", "imagesInSequence": 1, "imageName": obs_id, "imageIndex": 1,
        "imageSource": "XC", "imageController": "O", "imageDate": str(parsed.day_obs),
        "imageNumber": parsed.seq_num, "timestampAcquisitionStart": BEGIN_TAI,
        "groupId": "2026-11-20T01:02:03.456", "additionalKeys": list(pairs),
        "additionalValues": list(pairs.values()),
    }  # fmt: skip


def start(bus: Bus, obs_id: str, **changed: object) -> None:
    fields = block(obs_id) | {"exposureTime": 30.0, "imageType": "OBJECT", "timeout": 20.0} | changed
    bus.publish("Camera.startIntegration", fields)


def end(bus: Bus, obs_id: str) -> None:
    bus.publish(
        "Camera.endOfImageTelemetry",
        block(obs_id)
        | {
            "timestampDateObs": BEGIN_TAI, "timestampDateEnd": BEGIN_TAI + 30.0,
            "measuredShutterOpenTime": 30.01, "darkTime": 30.5, "emulatedImage": "",
        },
    )  # fmt: skip


def read_out(bus: Bus, obs_id: str, folder: Path | None = None) -> None:
    bus.publish(
        "Camera.endReadout",
        block(obs_id)
        | {
            "requestedExposureTime": 30.0, "timestampEndOfReadout": bus.clock.now_tai_s(),
            "daqPath": str(folder or f"summit/daq/{obs_id}"),
            "detectors": [d.name for d in INSTRUMENT.detectors],
        },
    )  # fmt: skip


def hops(bus: Bus, hop: str | None = None) -> list[dict[str, object]]:
    return [m.fields for m in bus.replay(["Image.hop"]) if hop in (None, m.fields["hop"])]
