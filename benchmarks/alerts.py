"""One 4k x 4k detector from its raw file to alerts on one core: ``python benchmarks/alerts.py [--json]``.

A simulated sensor of 4096 x 4096 pixels and 16 amplifiers; bias, flats and a template of three earlier epochs
are made by the code that prepares a demonstration site. Then two visits of one field are processed: the first
compiles and gives the history, the second is measured, raw file to Avro packets. Preparation runs in another
process, so the memory told is that of processing alone. All libraries have one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from cumbre.core.instrument import Instrument, instrument_from_mapping
from cumbre.core.time import SECONDS_PER_DAY, isot
from cumbre.simulator.exposure import ExposureRequest

LIMIT_S = 120
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
DETECTOR = "R00_S00"
NESTED = {"kernel match", "subtract", "detect, measure, classify"}
"""Rows that are parts of the row before them."""


def large() -> Instrument:
    """One sensor of 4096 x 4096 pixels and 16 amplifiers behind the demonstration telescope."""
    grid = {"columns": 8, "rows": 2, "prescan": 10, "overscan": 48, "gain": 1.5, "read_noise": 6,
            "saturation": 56000, "bias_level": 1000, "linearity": [-1.5e-7], "crosstalk": 1e-4}  # fmt: skip
    return instrument_from_mapping(
        {
            "name": "Large", "prefix": "XL", "plate_scale": 40.0, "aperture_m": 1.2,
            "filters": [{"name": "r", "band": "r", "zero_point": 26.0}],
            "detector_types": {"ccd4k": {"nx": 4096, "ny": 4096, "pixel_mm": 0.015, "grid": grid}},
            "detectors": [{"type": "ccd4k", "id": 0, "name": DETECTOR}],
        },
        "benchmark",
    )  # fmt: skip


def prepare(root: str) -> list[str]:
    """Sky, calibrations, template and two raw science files in a folder; gives the science files."""
    import cv2

    from cumbre.core.time import parse_isot, tai_from_utc
    from cumbre.simulator.catalogue import Tile, make_catalogue, write_catalogue
    from cumbre.simulator.preparation import calibration_requests, template_requests
    from cumbre.simulator.refcat import write_reference_catalogue
    from cumbre.simulator.sky import Sky
    from cumbre.site import preparation
    from cumbre.site.profiles import create_site

    cv2.setNumThreads(1)
    site, instrument = create_site(Path(root)), large()
    config = site.config.simulator
    assert config is not None
    start = tai_from_utc(parse_isot(config.start))
    tile = Tile("T", 10.0, -25.0)
    where = preparation.paths(site)
    tables = make_catalogue(
        config=config,
        observatory=site.config.observatory,
        instrument=instrument,
        tiles=[tile],
        start_tai=start,
    )
    write_reference_catalogue(where["refcat"], tables["stars"], config.seed)
    write_catalogue(
        where["sky"],
        tables,
        seed=config.seed,
        observatory=site.config.observatory,
        tiles=[tile],
        start_tai=start,
    )
    sky = Sky.load(where["sky"])
    calibrations, template = site.root / "calibrations.fits", site.root / "template.fits"
    common = (str(site.root), instrument.name, DETECTOR)
    frames = tuple(calibration_requests(instrument, start, biases=3, flats=3))
    preparation._make_calibrations(
        site, instrument, preparation.Task("calibration", *common, str(calibrations), frames), calibrations
    )
    visits = tuple(template_requests(instrument, sky, epochs=3, exposure_s=30.0))
    task = preparation.Task(
        "template", *common, str(template), visits, str(calibrations), (tile.ra, tile.dec)
    )
    preparation._make_template(site, instrument, task, template)
    files = []
    for number in (1, 2):
        request = ExposureRequest(
            f"XL_O_20261120_{number:06d}", "OBJECT", 30.0, "r", tile.ra + 0.002, tile.dec - 0.001, 0.0,
            start + number * SECONDS_PER_DAY / 24, isot(start + number),
        )  # fmt: skip
        files.append(preparation._raw(site, instrument, DETECTOR, request, sky).path)
    return [str(path) for path in files]


class Steps:
    """CPU and real seconds by step."""

    def __init__(self) -> None:
        self.cpu_s: dict[str, float] = {}
        self.wall_s: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu_s[name] = self.cpu_s.get(name, 0.0) + time.process_time() - cpu
        self.wall_s[name] = self.wall_s.get(name, 0.0) + time.perf_counter() - wall

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return timed


def process(path: str, inputs: dict[str, Any], history: dict[str, Any]) -> tuple[Any, int, Steps]:
    """(Result, bytes of its packets, times) of one raw file."""
    from cumbre.alerts.packet import packet_bytes
    from cumbre.payloads import alert_production, calibrate, difference, isr, processing, raw
    from cumbre.payloads.difference import DifferenceConfig

    steps, config = Steps(), DifferenceConfig()
    places = (
        (isr, "assemble_and_correct", "ISR"),
        (calibrate, "calibrate", "calibrate (PSF, WCS, zero point)"),
        (alert_production, "warp_template", "warp template"),
        (alert_production, "process_pair", "difference, sources"),
        (difference, "fit_kernel", "kernel match"),
        (difference, "subtract", "subtract"),
        (alert_production, "_associate", "associate, forced photometry"),
        (alert_production, "_force", "associate, forced photometry"),
        (alert_production, "_summaries", "associate, forced photometry"),
        (alert_production, "_alerts", "packets"),
    )
    with steps("all"):
        with steps("read raw"):
            read = raw.read_raw(path, inputs["instrument"])
        patches = [
            mock.patch.object(module, name, steps.around(step, getattr(module, name)))
            for module, name, step in places
        ]
        whole = steps.around("difference alone", processing.difference)
        with mock.patch.object(processing, "difference", whole):
            for patch in patches:
                patch.start()
            try:
                made = alert_production.produce(
                    read,
                    inputs["calibrations"],
                    inputs["template"],
                    inputs["reference"],
                    instrument=inputs["instrument"],
                    history=history,
                    config=config,
                )
            finally:
                for patch in patches:
                    patch.stop()
        with steps("packets"):
            size = sum(len(packet_bytes(alert)) for alert in made.alerts)
    for times in (steps.cpu_s, steps.wall_s):
        alone = times.pop("difference alone")
        times["detect, measure, classify"] = times["difference, sources"] - alone
    return made, size, steps


def measure(root: Path, files: list[str]) -> dict[str, Any]:
    """Process both visits; the figures of the second."""
    import cv2

    from cumbre.payloads.calibration import Calibrations
    from cumbre.payloads.exposure_file import load_exposure
    from cumbre.payloads.refcat import RefCat

    cv2.setNumThreads(1)
    inputs = {
        "instrument": large(),
        "calibrations": Calibrations.load(root / "calibrations.fits"),
        "template": load_exposure(root / "template.fits"),
        "reference": RefCat.load(root / "refcat" / "refcat.parquet"),
    }
    first, _, _ = process(files[0], inputs, {})
    history = {
        "DiaObject": first.dia_objects,
        "DiaSource": first.dia_sources,
        "DiaForcedSource": first.forced,
    }
    del first
    made, size, steps = process(files[1], inputs, history)
    return {
        "pixels": 4096 * 4096,
        "raw_bytes": Path(files[1]).stat().st_size,
        "cpu_s": {name: round(value, 3) for name, value in steps.cpu_s.items()},
        "wall_s": {name: round(value, 3) for name, value in steps.wall_s.items()},
        "stars": int(made.quality.get("nStars") or 0),
        "sources": len(made.dia_sources),
        "history_objects": len(history["DiaObject"]),
        "forced": len(made.forced),
        "alerts": len(made.alerts),
        "packet_bytes_mean": round(size / max(len(made.alerts), 1)),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def processor() -> str:
    """Name of the processor as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    os.environ |= dict.fromkeys(THREADS, "1")  # before anything imports a numerical library
    signal.alarm(LIMIT_S)  # the end of this process if something hangs
    with tempfile.TemporaryDirectory(prefix="cumbre-bench-") as folder:
        root = Path(folder) / "site"
        begun = time.monotonic()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            files = pool.submit(prepare, str(root)).result()
        prepared = time.monotonic() - begun
        figures = measure(root, files)
    figures |= {"prepared_s": round(prepared, 1), "machine": f"{processor()}, {os.cpu_count()} cores"}
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"{figures['machine']}; one thread; prepared in {prepared:.0f} s")
    total = figures["cpu_s"].pop("all")
    order = ["read raw", "ISR", "calibrate (PSF, WCS, zero point)", "warp template", "difference, sources",
             "kernel match", "subtract", "detect, measure, classify", "associate, forced photometry", "packets"]  # fmt: skip
    for name in order:
        label = f"  of it: {name}" if name in NESTED else name
        print(f"{label:38s}{figures['cpu_s'].get(name, 0.0):8.3f} s CPU")
    print(f"{'all':38s}{total:8.3f} s CPU, {figures['wall_s']['all']:.3f} s real; wanted < 10 s")
    for name in ("stars", "sources", "forced", "alerts", "packet_bytes_mean", "raw_bytes", "peak_rss_mb"):
        print(f"{name:38s}{figures[name]:8d}")


if __name__ == "__main__":
    sys.exit(main())
