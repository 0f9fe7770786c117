"""``cumbre process`` without its command line: files in, alerts, tables, difference image and report out."""

from __future__ import annotations

import json
import logging
import math
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cumbre.core.errors import UserError
from cumbre.core.instrument import load_instrument
from cumbre.core.time import Clock, mjd_from_seconds, parse_isot, tai_minus_utc
from cumbre.payloads.alert_records import SourceContext, alert, dia_source, stamps_of
from cumbre.payloads.difference import DifferenceConfig
from cumbre.payloads.exposure import Exposure
from cumbre.payloads.image_input import load_exposure
from cumbre.payloads.image_stack import align_to, stack
from cumbre.payloads.process_report import build_page
from cumbre.payloads.processing import DifferenceResult, process_pair
from cumbre.stores.files import write_atomic

logger = logging.getLogger(__name__)


def run(
    science: Sequence[Path],
    reference: Sequence[Path],
    out: Path,
    *,
    instrument: str | None = None,
    config: DifferenceConfig | None = None,
) -> dict[str, Any]:
    """Register, stack, subtract, detect, classify, and write everything to a folder.

    Parameters
    ----------
    science, reference
        FITS files; several are registered on the first and averaged. The result is on the first science image's
        pixels.
    out
        Folder for alerts.avro, sources.parquet, sources.csv, difference.fits, report.html, report.json.
    instrument
        Name or file of an instrument description: gain and saturation where the headers lack them.

    Returns
    -------
    Summary: counts, numbers of the run, paths of the files.

    Raises
    ------
    UserError, NotFoundError, BadFileError, NoWorkFoundError, UnprocessableDataError
        Bad input; images that cannot be matched.
    """
    started = time.monotonic()
    config = config or DifferenceConfig()
    if not science or not reference:
        raise UserError("process needs at least one science and one reference image")
    defaults = _instrument_defaults(instrument)
    science_exposure = stack([load_exposure(p, **defaults) for p in science], [p.name for p in science])
    reference_exposure = stack([load_exposure(p, **defaults) for p in reference], [p.name for p in reference])
    template = align_to(science_exposure, reference_exposure, name=reference[0].name)
    if science_exposure.wcs is None:
        science_exposure.wcs = template.wcs
    result = process_pair(science_exposure, template, config)
    summary: dict[str, Any] = {
        "outcome": "ok",
        "science_name": ", ".join(p.name for p in science),
        "reference_name": ", ".join(p.name for p in reference),
        "instrument": instrument,
        "n_sources": len(result.sources),
        "n_reliable": int(result.metrics["n_reliable"]),
        "reliable_from": config.reliable,
        "flux_unit": "unit of the first science image (no photometric calibration is applied)",
        "has_wcs": science_exposure.wcs is not None,
        "metrics": _finite(result.metrics),
        "registration": _finite({k: v for k, v in template.metrics.items() if k.startswith("register")}),
        "science": _finite(science_exposure.metrics),
        "reference": _finite(reference_exposure.metrics),
    }
    write_outputs(result, science_exposure, out, summary, config)
    summary["seconds"] = round(time.monotonic() - started, 2)
    write_atomic(out / "report.json", json.dumps(summary, indent=2).encode())
    return summary


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    return {k: float(v) if math.isfinite(v) else None for k, v in numbers.items()}


def _instrument_defaults(name: str | None) -> dict[str, float]:
    """Gain and saturation of the first amplifier; headers may know better, so only gaps are filled from it."""
    if not name:
        return {}
    amplifier = load_instrument(name).detectors[0].amplifiers[0]
    return {"default_gain": amplifier.gain, "default_saturation": amplifier.saturation}


def source_context(exposure: Exposure) -> SourceContext:
    """Time, band and an id of a standalone image from its header; unknown times are the moment of processing."""
    header = exposure.metadata.get("header", {})
    exposure_s = _header_number(header, ("EXPTIME", "EXPOSURE", "EXPOSED"))
    now = mjd_from_seconds(Clock.real().now_tai_s())
    begin = _begin_mjd_tai(header)
    middle = (
        begin + (exposure_s if math.isfinite(exposure_s) else 0.0) / 2 / 86400 if begin is not None else now
    )
    name = str(exposure.metadata.get("path", "")) + str(header.get("DATE-OBS", ""))
    return SourceContext(
        visit=zlib.crc32(Path(name).name.encode()),
        detector=0,
        band=str(header.get("BAND") or header.get("FILTER") or "").split(" ")[0],
        midpoint_mjd_tai=float(middle),
        exposure_s=exposure_s,
        processed_mjd_tai=now,
    )


def _begin_mjd_tai(header: dict[str, Any]) -> float | None:
    shift = 0.0 if str(header.get("TIMESYS", "UTC")).upper() == "TAI" else 1.0
    mjd = _header_number(header, ("MJD-BEG", "MJD-OBS", "MJD"))
    seconds: float | None = (mjd - 40587.0) * 86400.0 if math.isfinite(mjd) and mjd > 10000 else None
    if seconds is None:
        text = str(header.get("DATE-BEG") or header.get("DATE-OBS") or "")
        if "T" not in text:
            return None
        try:
            seconds = parse_isot(text)
        except (ValueError, UserError):
            return None
    return mjd_from_seconds(seconds + shift * tai_minus_utc(seconds))


def _header_number(header: dict[str, Any], names: tuple[str, ...]) -> float:
    for name in names:
        try:
            return float(header[name])
        except (KeyError, TypeError, ValueError):
            continue
    return float("nan")


def write_outputs(
    result: DifferenceResult, science: Exposure, out: Path, summary: dict[str, Any], config: DifferenceConfig
) -> None:
    """Write every product, the alerts first: nobody waits for an image. ``summary["files"]`` gets their names."""
    out.mkdir(parents=True, exist_ok=True)
    summary["n_alerts"] = _write_alerts(result, science, out / "alerts.avro")
    _write_tables(result, out)
    _write_difference(result, out / "difference.fits")
    summary["files"] = {
        name: str(out / name)
        for name in (
            "alerts.avro",
            "sources.parquet",
            "sources.csv",
            "difference.fits",
            "report.html",
            "report.json",
        )
    }
    write_atomic(out / "report.html", build_page(result, summary, threshold=config.reliable))


def _write_tables(result: DifferenceResult, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    columns = {name: np.ascontiguousarray(result.sources[name]) for name in result.sources.dtype.names or ()}
    table = pa.table(columns)
    units = {
        "ra": "deg",
        "dec": "deg",
        "raErr": "deg",
        "decErr": "deg",
        "x": "pixel (0-based)",
        "y": "pixel (0-based)",
    }
    fields = [
        field.with_metadata(
            {"unit": units.get(field.name, "science image unit" if "lux" in field.name else "")}
        )
        for field in table.schema
    ]
    table = table.cast(pa.schema(fields))
    for name, writer in (
        ("sources.parquet", pyarrow.parquet.write_table),
        ("sources.csv", pyarrow.csv.write_csv),
    ):
        sink = pa.BufferOutputStream()
        writer(table, sink)
        write_atomic(out / name, sink.getvalue().to_pybytes())


def _write_difference(result: DifferenceResult, path: Path) -> None:
    import io

    from astropy.io import fits

    exposure = result.exposure
    header = fits.Header()
    if exposure.wcs is not None:
        cards = (
            exposure.wcs.to_header(exposure.shape)
            if hasattr(exposure.wcs, "pix2sky")
            else exposure.wcs.to_header(relax=True)
        )
        header.update(cards)
    header["BUNIT"] = ("adu", "unit of the science image")
    header["KERNSUM"] = (result.metrics["kernel_sum"], "sum of the matching kernel")
    planes = [("IMAGE", exposure.image), ("VARIANCE", exposure.variance), ("MASK", exposure.mask)]
    hdus = fits.HDUList([fits.PrimaryHDU()])
    for name, plane in planes:
        hdu = fits.ImageHDU(plane, header=header.copy(), name=name)
        if name == "MASK":
            from cumbre.payloads.exposure import MaskPlane

            for plane_bit in MaskPlane:
                hdu.header[f"HIERARCH MP_{plane_bit.name}"] = int(plane_bit)
        hdus.append(hdu)
    stream = io.BytesIO()
    hdus.writeto(stream, checksum=True)
    write_atomic(path, stream.getvalue())


def _write_alerts(result: DifferenceResult, science: Exposure, path: Path) -> int:
    from cumbre.alerts.packet import write_container

    context = replace(source_context(science), reliability_version=result.reliability_version)
    records = []
    for counter, row in enumerate(result.sources, start=1):
        source = dia_source(row, context, counter)
        records.append(alert(source, stamps=stamps_of(result, row["x"], row["y"], unit="adu")))
    write_container(path, records)
    return len(records)
