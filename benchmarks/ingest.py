"""Time of the ingest service per file, from the hop on the bus to the committed registry.

    python benchmarks/ingest.py [--images 50] [--instrument democam] [--place summit] [--json FILE]

Files have real headers and tiny pixels: the ingest never reads pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from astropy.io import fits

from cumbre.bus import open_bus
from cumbre.core.configuration import Site, parse_site
from cumbre.core.ids import ObsId, image_key
from cumbre.core.instrument import Instrument, load_instrument
from cumbre.core.time import Clock, isot
from cumbre.repository.ingest import IngestService

T0 = 1795223000.0


def make_image(site: Site, camera: Instrument, seq_num: int, place: str) -> list[dict[str, object]]:
    obs = ObsId(20261120, seq_num, camera.prefix)
    hops = []
    for detector in camera.detectors:
        path = site.path(f"{place}/raw") / image_key(camera.name, obs, detector.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = fits.Header()
        header.update({
            "OBSID": str(obs), "DAYOBS": obs.day_obs, "SEQNUM": seq_num, "GROUPID": str(obs), "IMGTYPE": "OBJECT",
            "FILTER": camera.filters[0].name, "EXPTIME": 30.0, "DARKTIME": 30.5,
            "DATE-BEG": isot(T0 + 37 * seq_num), "DATE-END": isot(T0 + 37 * seq_num + 30), "TIMESYS": "TAI",
            "RA": 150.0 + seq_num * 0.01, "DEC": -20.0, "ROTPA": 0.0, "CHIPID": detector.name, "AIRMASS": 1.1,
            "RAFTBAY": detector.name.partition("_")[0], "CCDSLOT": detector.name.partition("_")[2],
        })  # fmt: skip
        pixels = fits.ImageHDU(np.zeros((4, 4), np.uint16), name="Segment00")
        fits.HDUList([fits.PrimaryHDU(header=header), pixels]).writeto(path)
        hops.append(
            {
                "obsId": str(obs), "instrument": camera.name, "exposureId": obs.exposure_id, "groupId": str(obs),
                "detector": detector.id, "detectorName": detector.name,
                "hop": {"summit": "written", "archive": "at_archive"}[place], "outcome": "ok", "place": place,
                "path": str(path), "hopTai": T0,
            }
        )  # fmt: skip
    return hops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--instrument", default="democam")
    parser.add_argument("--place", choices=["summit", "archive"], default="summit")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    camera = load_instrument(arguments.instrument)
    with tempfile.TemporaryDirectory() as folder:
        text = (
            f"observatory: {{latitude_deg: -30, longitude_deg: -70}}\ninstruments: [{arguments.instrument}]\n"
            "places:\n  summit: {raw: summit/raw, repository: summit/repository}\n"
            "  archive: {raw: archive/raw, repository: archive/repository}\n"
        )
        site = Site(Path(folder), parse_site(text, "benchmark"))
        clock = Clock.real()
        with open_bus(f"sqlite:///{folder}/bus.db", identity="benchmark", clock=clock) as bus:
            began = time.perf_counter()
            service = IngestService(site=site, bus=bus, clock=clock, place=arguments.place)
            start_s = time.perf_counter() - began
            images = [make_image(site, camera, n, arguments.place) for n in range(1, arguments.images + 1)]
            single = []
            for hops in images[: len(images) // 2]:
                bus.publish_many([("Image.hop", hop) for hop in hops])
                began = time.perf_counter()
                while service.step(0.0):
                    pass
                single.append(time.perf_counter() - began)
            bulk = [hop for hops in images[len(images) // 2 :] for hop in hops]
            bus.publish_many([("Image.hop", hop) for hop in bulk])
            began = time.perf_counter()
            while service.step(0.0):
                pass
            bulk_s = time.perf_counter() - began
            service.close()
    detectors = len(camera.detectors)
    single.sort()
    result = {
        "instrument": camera.name,
        "detectors": detectors,
        "images": arguments.images,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "start_s": round(start_s, 2),
        "one_image_median_s": round(statistics.median(single), 4),
        "one_image_p95_s": round(single[-(-95 * len(single) // 100) - 1], 4),
        "one_image_per_file_s": round(statistics.median(single) / detectors, 4),
        "backlog_per_file_s": round(bulk_s / len(bulk), 4),
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
