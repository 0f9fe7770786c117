"""From one raw file to alerts on a topic, timed by step: what ``cumbre benchmark alerts`` measures.

A detector of 4096 × 4096 pixels and 16 amplifiers with realistic defects is rendered once and kept in a folder. Two
visits of its field are processed by one fresh process with one thread: the first compiles and gives the history,
the second is measured. Seconds are those of the processor, not of the clock, so other work on the machine adds
little; it still takes caches and memory bandwidth away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from cumbre.core.memory import ENVIRONMENT
from cumbre.core.time import Clock, mjd_from_seconds

if TYPE_CHECKING:
    from cumbre.core.instrument import Instrument
    from cumbre.payloads.alert_production import DetectorResult
    from cumbre.payloads.calibration import Calibrations
    from cumbre.payloads.exposure import Exposure
    from cumbre.payloads.refcat import RefCat

SEED = 1
SIDE = 4096
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
FIELDS = {
    "ordinary": "  star_density: 16\n  transients_per_detector: 100\n  variables_fraction: 0.02\n",
    "crowded": "  star_density: 140\n  transients_per_detector: 100\n  variables_fraction: 0.02\n",
}
"""About 9,000 and 80,000 stars on the detector."""
HISTORY = 60, 120
"""Sources and forced measurements of one object in a year."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step and the least that it must do.

    Attributes
    ----------
    places
        (module, function) whose calls are its time.
    bytes_px
        Bytes that have to be read and written for every pixel.
    operations_px
        Floating-point operations for every pixel.
    """

    name: str
    places: tuple[tuple[str, str], ...]
    bytes_px: float
    operations_px: float


# 38 operations a pixel and transform (2.5 · log2 of a tile's pixels), 1.5 times for the overlap of tiles.
STEPS = (
    Step("read raw", (("cumbre.payloads.raw", "read_raw"),), 3.2, 10),
    Step("ISR", (("cumbre.payloads.isr", "assemble_and_correct"),), 21, 50),
    Step("calibrate", (("cumbre.payloads.calibrate", "calibrate"),), 60, 90),
    Step("warp template", (("cumbre.payloads.alert_production", "warp_template"),), 20, 92),
    Step("difference", (("cumbre.payloads.processing", "difference"),), 60, 3 * 38 * 1.5 + 100),
    Step("find and measure", (("cumbre.payloads.alert_production", "process_pair"),), 30, 2 * 38 * 1.5 + 50),
    Step("dipoles and trails", (("cumbre.payloads.lobes", "fill"),), 0, 0),
    Step(
        "associate, forced photometry",
        tuple(("cumbre.payloads.alert_production", name) for name in ("_associate", "force", "_summaries")),
        0,
        0,
    ),
    Step("alert records", (("cumbre.payloads.alert_production", "_alerts"),), 0, 0),
)
PARTS = {"find and measure": ("difference", "dipoles and trails")}
"""Steps whose functions call those of other steps: their time is taken off."""


class Times:
    """Processor seconds by step."""

    def __init__(self) -> None:
        self.cpu_s: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what the block takes."""
        begun = time.process_time()
        try:
            yield
        finally:
            self.cpu_s[name] = self.cpu_s.get(name, 0.0) + time.process_time() - begun

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return timed


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a worker holds ready, and the raw files."""

    raws: list[str]
    instrument: Instrument
    calibrations: Calibrations
    template: Exposure
    reference: RefCat


def prepare(folder: Path, field: str) -> Path:
    """Render what is missing of a field; the file that names its parts.

    Parameters
    ----------
    folder
        Cache: some 0.7 GB a field.
    field
        A key of :data:`FIELDS`.
    """
    from cumbre.core.configuration import SITE_FILE, Site
    from cumbre.site import preparation
    from cumbre.site.profiles import create_site
    from cumbre.site.quality_images import INSTRUMENTS, make_cases

    root = folder / field / f"4k-seed{SEED}"
    listed = root / "benchmark.json"
    if not (root / SITE_FILE).exists():
        create_site(root, seed=SEED, instrument=INSTRUMENTS["4k"])
        text = (root / SITE_FILE).read_text().replace("tiles: 3", "tiles: 1")
        (root / SITE_FILE).write_text(text + FIELDS[field])
    raws = [case.raw.path for case in make_cases(folder / field, SEED, detectors=1, visits=2, size="4k")]
    site = Site.load(root)
    where, name = preparation.paths(site), site.config.instruments[0]
    parts = {
        "raws": raws,
        "instrument": name,
        "calibrations": str(next((where["calibs"]).rglob("*.fits"))),
        "template": str(next(where["templates"].rglob("*.fits"))),
        "reference": str(where["refcat"]),
    }
    listed.write_text(json.dumps(parts))
    return listed


def load(listed: Path) -> Inputs:
    """The parts that a file of :func:`prepare` names."""
    from cumbre.core.instrument import load_instrument
    from cumbre.payloads.calibration import Calibrations
    from cumbre.payloads.exposure_file import load_exposure
    from cumbre.payloads.refcat import RefCat

    parts = json.loads(listed.read_text())
    return Inputs(
        parts["raws"], load_instrument(parts["instrument"]), Calibrations.load(parts["calibrations"]),
        load_exposure(parts["template"]), RefCat.load(parts["reference"]),
    )  # fmt: skip


def process(
    path: str, inputs: Inputs, history: dict[str, Any] | None, times: Times
) -> tuple[DetectorResult, list[bytes]]:
    """One raw file to encoded packets, timed."""
    import importlib

    from cumbre.alerts.packet import packet_bytes
    from cumbre.payloads import alert_production

    produce = alert_production.produce
    with ExitStack() as stack:
        for step in STEPS:
            for module_name, function in step.places:
                module = importlib.import_module(module_name)
                timed = times.around(step.name, getattr(module, function))
                stack.enter_context(mock.patch.object(module, function, timed))
        with times("all"):
            made = produce(
                path, inputs.calibrations, inputs.template, inputs.reference, instrument=inputs.instrument,
                history=history, processed_mjd_tai=mjd_from_seconds(Clock.real().now_tai_s()),
            )  # fmt: skip
            with times("encode packets"):
                packets = [packet_bytes(record) for record in made.alerts]
    for name, parts in PARTS.items():
        times.cpu_s[name] = times.cpu_s.get(name, 0.0) - sum(times.cpu_s.get(part, 0.0) for part in parts)
    return made, packets


def history_of(made: DetectorResult) -> dict[str, Any]:
    """What a database would give for the next visit."""
    return {"DiaObject": made.dia_objects, "DiaSource": made.dia_sources, "DiaForcedSource": made.forced}


def packets_per_s(made: DetectorResult, objects: int = 400) -> tuple[float, int]:
    """(Packets a second with a year of history and three stamps, bytes of one).

    As a worker does it: the history of a detector's objects comes as Arrow tables, is encoded once, and goes into the
    packets; stamps are cut and encoded for each.
    """
    import pyarrow as pa

    from cumbre.alerts.encode import by_object
    from cumbre.alerts.packet import packet_bytes
    from cumbre.payloads.alert_records import alert, stamps_of

    source, dia_object = made.dia_sources[0], made.dia_objects[0]
    rows = {"diaSource": source, "diaForcedSource": made.forced[0]}
    tables = {}
    for (record, row), count in zip(rows.items(), HISTORY, strict=True):
        table = pa.Table.from_pylist([row]).take([0] * (count * objects))
        index = table.column_names.index("diaObjectId")
        identifiers = pa.array(np.repeat(np.arange(objects), count))
        tables[record] = table.set_column(index, "diaObjectId", identifiers)
    for warm in (True, False):
        begun, size, used = time.process_time(), 0, 1 if warm else objects
        previous = {record: by_object(record, table) for record, table in tables.items()}
        for k in range(used):
            packet = alert(
                source, dia_object=dia_object, previous=previous["diaSource"][k],
                forced=previous["diaForcedSource"][k], stamps=stamps_of(made.result, source["x"], source["y"]),
            )  # fmt: skip
            size = len(packet_bytes(packet))
    return objects / (time.process_time() - begun), size


def publish_s(packets: list[bytes], folder: Path) -> float:
    """Processor seconds to put the packets on a topic of an embedded bus."""
    from cumbre.bus import open_bus

    path = folder / "benchmark-bus.db"
    for old in folder.glob("benchmark-bus.db*"):
        old.unlink()
    bus = open_bus(f"sqlite:///{path.resolve()}", identity="benchmark", clock=Clock.real())
    begun = time.process_time()
    for number, packet in enumerate(packets):
        bus.publish_bytes("Alerts.packet", packet, key=str(number))
    spent = time.process_time() - begun
    bus.close()
    return spent


def machine_limits() -> dict[str, float]:
    """Bytes and single-precision operations a second of one core, measured."""
    plane, other = np.ones((SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), np.float32)
    copies = []
    for _ in range(5):
        begun = time.process_time()
        np.copyto(other, plane)
        copies.append(time.process_time() - begun)
    # A product of matrices is the densest arithmetic there is; half of it is what streaming code can reach.
    a = np.random.default_rng(1).random((512, 512), dtype=np.float32)
    a @ a
    begun = time.process_time()
    for _ in range(10):
        a @ a
    spent = (time.process_time() - begun) / 10
    return {"bytes_per_s": 2 * plane.nbytes / min(copies), "operations_per_s": 0.5 * 2 * 512**3 / spent}


def floors(limits: dict[str, float]) -> dict[str, float]:
    """Seconds below which each step cannot go: its bytes at memory speed plus its operations."""
    pixels = SIDE * SIDE
    return {
        step.name: pixels
        * (step.bytes_px / limits["bytes_per_s"] + step.operations_px / limits["operations_per_s"])
        for step in STEPS
    }


def measure(folder: Path, field: str, scratch: Path | None = None) -> dict[str, Any]:
    """Process both visits in this process; the figures of the second.

    Parameters
    ----------
    scratch
        Where to leave the planes for the peers; None for none.
    """
    import resource

    import cv2

    cv2.setNumThreads(1)
    inputs = load(prepare(folder, field))
    history = history_of(process(inputs.raws[0], inputs, None, Times())[0])
    times = Times()
    made, packets = process(inputs.raws[1], inputs, history, times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    steps = {step.name: round(times.cpu_s.get(step.name, 0.0), 3) for step in STEPS}
    steps["encode packets"] = round(times.cpu_s["encode packets"], 3)
    rate, size = packets_per_s(made)
    limits = machine_limits()
    figures = {
        "field": field,
        "cpu_s": round(times.cpu_s["all"], 3),
        "rss_mb": round(peak),
        "steps": steps,
        "floors": {name: round(value, 4) for name, value in floors(limits).items()},
        "publish_s": round(publish_s(packets, folder), 4),
        "alerts_per_s": round(rate),
        "packet_bytes": size,
        "pixels": SIDE * SIDE,
        "raw_bytes": Path(inputs.raws[1]).stat().st_size,
        "detections": int(made.exposure.metrics["n_detections"]),
        "sources": len(made.dia_sources),
        "alerts": len(made.alerts),
        "forced": len(made.forced),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        **{name: round(value) for name, value in limits.items()},
    }
    if scratch is not None:
        _leave_planes(made, scratch)
    return figures


def _leave_planes(made: DetectorResult, scratch: Path) -> None:
    """What the peers work on: the calibrated image, its mask, the registered template, and their WCS."""
    from astropy.io import fits

    science, template = made.result.difference.science, made.result.difference.template
    header = fits.Header(science.wcs.to_header(science.shape) if science.wcs is not None else {})  # type: ignore[call-arg]
    fits.writeto(scratch / "science.fits", science.image, header, overwrite=True)
    fits.writeto(scratch / "template.fits", template.image, header, overwrite=True)
    np.save(scratch / "mask.npy", (science.mask & 259) > 0)
    about = {
        "noise": float(np.sqrt(np.median(science.variance[::7, ::7]))),
        "fwhm_px": float(made.result.difference.science_psf.fwhm_px),
        "level": float(science.metrics.get("sky_electrons", 0.0)),
    }
    (scratch / "about.json").write_text(json.dumps(about))


def processor() -> str:
    """Name of the processor as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def environment() -> dict[str, str]:
    """Environment of a worker: one thread, memory kept."""
    return dict(os.environ) | dict.fromkeys(THREADS, "1") | ENVIRONMENT


def run(folder: Path, field: str, *, scratch: Path | None, workers: int = 1) -> list[dict[str, Any]]:
    """Measure in fresh processes, as many at once as asked; the figures of each."""
    # Rendering happens before, in a process of its own: its memory is not that of processing.
    code = (
        "import sys, json; from pathlib import Path; from cumbre.site import alert_benchmark as b\n"
        "folder, field, scratch = sys.argv[1:4]\n"
        "made = b.prepare(Path(folder), field) and {} if scratch == 'prepare' else "
        "b.measure(Path(folder), field, Path(scratch) if scratch else None)\n"
        "print('\\n' + json.dumps(made))"
    )
    command = [sys.executable, "-c", code, str(folder), field]
    subprocess.run([*command, "prepare"], env=environment(), check=True, stdout=subprocess.DEVNULL)
    started = []
    for k in range(workers):
        leave = str(scratch) if scratch is not None and k == 0 else ""
        started.append(
            subprocess.Popen([*command, leave], env=environment(), stdout=subprocess.PIPE, text=True)
        )
    answers = []
    for process_ in started:
        output, _ = process_.communicate()
        if process_.returncode:
            raise RuntimeError(f"the measuring process ended with {process_.returncode}")
        answers.append(json.loads(output.strip().splitlines()[-1]))
    return answers
