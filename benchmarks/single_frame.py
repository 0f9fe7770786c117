"""CPU seconds of each step from raw file to calibrated image: ``python benchmarks/single_frame.py [size]``.

A simulated detector of size × size pixels (1024 or 4096, 16 amplifiers at 4096) with stars on a known sky. The
first round compiles; the second is printed.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cumbre.capture.raw_fits import raw_fits_bytes
from cumbre.core.geometry import pixel_from_sky
from cumbre.core.instrument import instrument_from_mapping
from cumbre.payloads.calibrate import calibrate
from cumbre.payloads.calibration import Calibrations
from cumbre.payloads.coadd import make_template
from cumbre.payloads.exposure import MaskPlane
from cumbre.payloads.isr import assemble_and_correct
from cumbre.payloads.kernels.background import measure_background
from cumbre.payloads.kernels.cosmic_rays import find_cosmic_rays
from cumbre.payloads.kernels.photometry import forced_psf_photometry
from cumbre.payloads.kernels.warp import warp_between
from cumbre.payloads.raw import read_raw
from cumbre.payloads.refcat import RefCat


def camera(size):
    return instrument_from_mapping(
        {
            "name": "Bench", "prefix": "XB", "plate_scale": 20.0, "distortion": [0.004], "pointing_error_deg": 0.03,
            "filters": [{"name": "r", "band": "r"}],
            "detectors": [
                {
                    "id": 0, "name": "R00_S00", "nx": size, "ny": size, "pixel_mm": 0.015,
                    "grid": {
                        "columns": 8 if size > 2000 else 4, "rows": 2, "prescan": 4, "overscan": 32, "gain": 1.5,
                        "read_noise": 6, "saturation": 60000, "bias_level": 1000, "linearity": [-1e-7], "crosstalk": 1e-4,
                    },
                }
            ],
        },
        "benchmark",
    )  # fmt: skip


def simulate(instrument, size, rng):
    """Raw file bytes and the reference stars in it."""
    scale = 0.3 / 3600
    n = int(9000 * (size / 4096) ** 2 * 2)
    half = size * scale * 0.75
    ra, dec = 60 + rng.uniform(-half, half, n) / np.cos(np.radians(30)), -30 + rng.uniform(-half, half, n)
    mag = np.clip(23 - rng.exponential(1.3, n), 17, 24)
    detector = instrument.detectors[0]
    x, y = pixel_from_sky(instrument, detector, 60.004, -30.003, 10.0, ra, dec)
    image = np.full((size, size), 800.0, np.float32)
    s = 4 / 2.3548
    for px, py, m in zip(x, y, mag, strict=True):
        if 14 < px < size - 15 and 14 < py < size - 15:
            i, j = int(px) - 14, int(py) - 14
            gx, gy = (np.exp(-0.5 * ((np.arange(29) - c) / s) ** 2) for c in (px - i, py - j))
            image[j : j + 29, i : i + 29] += (
                10 ** (-0.4 * (m - 30.5)) / (2 * np.pi * s * s) * np.outer(gy, gx)
            )
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.sqrt(image)
    hits = rng.integers(0, size, (2, int(1500 * (size / 4096) ** 2)))
    image[hits[1], hits[0]] += 2000
    arrays = []
    for a in detector.amplifiers:
        h = a.raw_box.shape[0]
        raw = np.full((h, a.overscan_box.x1), 1000.0, np.float32) + rng.normal(0, 4, (h, a.overscan_box.x1))
        raw[a.raw_box.slices] += image[a.detector_box.slices][:: -1 if a.flip_y else 1] / 1.5
        arrays.append(np.clip(raw, 0, 65535).astype(np.uint16))
    cards = {
        "OBSID": "XB_O_20261120_000012", "IMGTYPE": "OBJECT", "FILTER": "r", "EXPTIME": 30.0, "DARKTIME": 30.0,
        "DATE-BEG": "2026-11-21T03:00:00", "RA": 60.0, "DEC": -30.0, "ROTPA": 10.0, "CHIPID": "R00_S00",
    }  # fmt: skip
    content = raw_fits_bytes(detector, np.stack(arrays), [{"name": k, "value": v} for k, v in cards.items()])
    return content, RefCat(ra, dec, {"r": mag})


def main():
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    rng = np.random.default_rng(1)
    instrument = camera(size)
    content, reference = simulate(instrument, size, rng)
    calibrations = Calibrations(np.zeros((size, size), np.float32), None, np.ones((size, size), np.float32))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "raw.fits"
        path.write_bytes(content)
        for round_number in range(2):
            results = {}

            def timed(name, function, results=results):
                start = time.process_time()
                value = function()
                results[name] = time.process_time() - start
                return value

            raw = timed("read raw", lambda: read_raw(path, instrument))
            exposure = timed("ISR", lambda raw=raw: assemble_and_correct(raw, calibrations))
            done = timed("calibrate, all", lambda e=exposure: calibrate(e, reference, instrument=instrument))
            timed("  background", lambda e=exposure: measure_background(e.image))
            timed("  cosmic rays", lambda d=done: find_cosmic_rays(d.image, d.variance))
            stars = done.metadata["stars"]
            timed(
                "  forced PSF photometry",
                lambda d=done, s=stars: forced_psf_photometry(
                    d.image, d.variance, d.mask, d.psf, s["x"], s["y"], bad_bits=MaskPlane.unusable()
                ),
            )
            timed("warp", lambda d=done: warp_between(d.image, d.variance, d.mask, d.wcs, d.wcs, d.shape))
            timed("template of 3", lambda d=done: make_template([d] * 3, d.wcs, d.shape))
            if round_number:
                for name, seconds in results.items():
                    print(f"{name:26s}{seconds:8.3f} s")
    print({key: round(value, 4) for key, value in done.metrics.items()})


if __name__ == "__main__":
    main()
