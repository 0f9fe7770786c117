"""Time to render raw detectors: ``python benchmarks/simulator.py [repeats]``. Prints milliseconds, warm."""

from __future__ import annotations

import sys
import time

from cumbre.core.configuration import Observatory, Simulator
from cumbre.core.instrument import instrument_from_mapping, load_instrument
from cumbre.core.time import parse_isot, tai_from_utc
from cumbre.simulator.catalogue import Tile, make_catalogue
from cumbre.simulator.exposure import ExposureRequest
from cumbre.simulator.render import render
from cumbre.simulator.sky import Sky
from cumbre.simulator.truth import detector_truth

OBSERVATORY = Observatory(latitude_deg=-30.24, longitude_deg=-70.74, elevation_m=2650)
START = tai_from_utc(parse_isot("2026-11-10T02:00:00"))


def large():
    """One sensor of 4096 x 4096 pixels and 16 amplifiers behind the demonstration telescope."""
    grid = {"columns": 8, "rows": 2, "prescan": 10, "overscan": 48, "gain": 1.5, "read_noise": 6,
            "saturation": 56000, "bias_level": 1000, "linearity": [-1.5e-7], "crosstalk": 1e-4}  # fmt: skip
    return instrument_from_mapping(
        {
            "name": "Large", "prefix": "XL", "plate_scale": 40.0,
            "filters": [{"name": "r", "band": "r", "zero_point": 26.0}],
            "detector_types": {"ccd4k": {"nx": 4096, "ny": 4096, "pixel_mm": 0.015, "grid": grid}},
            "detectors": [{"type": "ccd4k", "id": 0, "name": "R00_S00"}],
        },
        "benchmark",
    )  # fmt: skip


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for name, instrument in (("1k x 1k", load_instrument("democam")), ("4k x 4k", large())):
        tile = Tile("T", 10.0, -25.0)
        before = time.perf_counter()
        tables = make_catalogue(
            config=Simulator(), observatory=OBSERVATORY, instrument=instrument, tiles=[tile], start_tai=START
        )
        print(f"{name}: truth catalogue {1e3 * (time.perf_counter() - before):7.1f} ms")
        sky = Sky(tables, observatory=OBSERVATORY, seed=1, tiles=[tile], start_tai=START)
        detector = instrument.detectors[0]
        filter_name = instrument.filter("r").name
        for image_type in ("OBJECT", "FLAT", "DARK", "BIAS"):
            times = []
            for k in range(repeats + 1):
                request = ExposureRequest(
                    f"XX_O_20261109_{k + 1:06d}", image_type, 4.0 if image_type == "FLAT" else 30.0,
                    filter_name, tile.ra, tile.dec, 0.0, START,
                )  # fmt: skip
                before = time.perf_counter()
                render(instrument, detector, request, sky, 1)
                times.append(time.perf_counter() - before)
            print(f"{name}: {image_type:6} {1e3 * min(times[1:]):7.1f} ms  (first {1e3 * times[0]:.0f})")
        before = time.perf_counter()
        detector_truth(instrument, detector, request, sky, 1)
        print(f"{name}: truth  {1e3 * (time.perf_counter() - before):7.1f} ms")


if __name__ == "__main__":
    main()
