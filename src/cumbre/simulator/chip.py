"""What belongs to one sensor for ever: flat field, bias structure, defects. A function of the seed only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import UserError
from cumbre.core.geometry import focal_plane_from_pixel
from cumbre.core.instrument import Detector, Instrument
from cumbre.simulator.randomness import generator

FloatImage = NDArray[np.float32]
VIGNETTING_AT_EDGE = 0.12
PIXEL_RESPONSE_RMS = 0.006
DARK_CURRENT_E_S = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class Chip:
    """The fixed properties of one sensor.

    Attributes
    ----------
    response
        float32 (ny, nx): vignetting × illumination × pixel response, dead columns and pixels included.
    dark_e_s
        float32 (ny, nx): dark current with hot pixels, electrons per second.
    bias
        float32 (n_amp, ny_raw, nx_raw): ADU, typical bias level included.
    defects
        bool (ny, nx): pixels that are not good (hot, dead).
    """

    response: FloatImage
    dark_e_s: FloatImage
    bias: FloatImage
    defects: NDArray[np.bool_]
    gain: FloatImage
    read_noise_adu: FloatImage
    data_box: NDArray[np.int64]
    data_shape: NDArray[np.int64]
    coupling: FloatImage
    linearity: NDArray[np.float64]
    full_well_e: FloatImage


def raw_shape(detector: Detector) -> tuple[int, int, int]:
    """(n_amp, ny_raw, nx_raw) of the camera's array; every amplifier has the same raw size.

    Raises
    ------
    UserError
        Amplifiers of different raw sizes.
    """
    shapes = {amplifier.raw_shape for amplifier in detector.amplifiers}
    if len(shapes) != 1:
        raise UserError(
            f"detector {detector.name}: the simulated camera needs amplifiers of one raw size, found "
            f"{sorted(shapes)}; describe each amplifier in an HDU of its own"
        )
    ny, nx = shapes.pop()
    return len(detector.amplifiers), ny, nx


def field_position(
    instrument: Instrument, detector: Detector, x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Position in the field: (u, v) along the focal plane's axes, 1 at the radius of the outermost corner."""
    radius = max(
        float(
            np.hypot(
                *focal_plane_from_pixel(
                    d, np.array([0, d.nx - 1, 0, d.nx - 1]), np.array([0, 0, d.ny - 1, d.ny - 1])
                )
            ).max()
        )
        for d in instrument.detectors
    )
    x_mm, y_mm = focal_plane_from_pixel(detector, x, y)
    return x_mm / radius, y_mm / radius


def _response(instrument: Instrument, detector: Detector, rng: np.random.Generator) -> FloatImage:
    """Vignetting, large-scale illumination, dust shadows and pixel response."""
    ny, nx = detector.shape
    row = np.arange(nx, dtype=np.float64)[None, :]
    column = np.arange(ny, dtype=np.float64)[:, None]
    u, v = field_position(instrument, detector, row, column)
    image = 1.0 - VIGNETTING_AT_EDGE * (u * u + v * v)
    c = rng.normal(0, 0.006, 5)
    p, q = 2 * row / nx - 1, 2 * column / ny - 1
    image *= 1 + c[0] * p + c[1] * q + c[2] * p * q + c[3] * np.sin(2.2 * p) + c[4] * np.cos(1.7 * q)
    for _ in range(int(rng.integers(2, 6))):
        x0, y0 = rng.uniform(0, nx), rng.uniform(0, ny)
        outer = rng.uniform(15, 45)
        # The telescope's pupil, out of focus: a ring with the secondary's shadow in the middle.
        distance = np.minimum(np.hypot(row - x0, column - y0), 900.0)
        ring = 1 / (1 + np.exp((distance - outer) / 1.5)) - 1 / (1 + np.exp((distance - 0.4 * outer) / 1.5))
        image *= 1 - rng.uniform(0.01, 0.04) * ring
    out = image.astype(np.float32)
    out *= 1 + np.float32(PIXEL_RESPONSE_RMS) * rng.standard_normal((ny, nx), dtype=np.float32)
    return out


def _bias(detector: Detector, rng: np.random.Generator) -> FloatImage:
    """Bias level and its two-dimensional structure, ADU."""
    n, ny, nx = raw_shape(detector)
    out = np.empty((n, ny, nx), np.float32)
    row, column = np.arange(ny)[:, None], np.arange(nx)[None, :]
    for index, amplifier in enumerate(detector.amplifiers):
        structure = rng.normal(0, 0.8, nx)[None, :] + rng.uniform(2, 6) * np.exp(-row / rng.uniform(10, 40))
        structure = structure + rng.uniform(1, 4) * np.exp(-column / rng.uniform(4, 12))
        structure = structure + rng.normal(0, 1.0) * np.sin(row / rng.uniform(40, 90))
        out[index] = amplifier.bias_level + structure
    return out


@lru_cache(maxsize=16)
def _chip(instrument_json: str, detector_id: int, seed: int) -> Chip:
    instrument = Instrument.model_validate_json(instrument_json)
    detector = instrument.detector(detector_id)
    rng = generator(seed, "chip", instrument.name, detector.name)
    ny, nx = detector.shape
    response = _response(instrument, detector, rng)
    defects = np.zeros((ny, nx), bool)
    dark = np.full((ny, nx), DARK_CURRENT_E_S, np.float32)
    million = nx * ny / 2**20
    hot = rng.integers(0, nx * ny, max(int(120 * million), 1))
    dark.reshape(-1)[hot] += (10 ** rng.uniform(0.3, 2.6, hot.size)).astype(np.float32)
    dead = rng.integers(0, nx * ny, max(int(60 * million), 1))
    response.reshape(-1)[dead] *= rng.uniform(0.0, 0.5, dead.size).astype(np.float32)
    defects.reshape(-1)[hot] = True
    defects.reshape(-1)[dead] = True
    for _ in range(max(3 * nx // 1024, 1)):
        column = int(rng.integers(0, nx))
        amplifier = detector.amplifiers[int(rng.integers(0, len(detector.amplifiers)))].detector_box
        y0 = int(rng.integers(amplifier.y0, amplifier.y1))
        # A trap blocks everything behind it as seen from the serial register at the outer edge.
        rows = slice(y0, amplifier.y1) if amplifier.y0 < ny // 2 else slice(amplifier.y0, y0)
        response[rows, column] *= np.float32(rng.uniform(0, 0.2))
        defects[rows, column] = True
    amplifiers = detector.amplifiers
    order = max(len(a.linearity) for a in amplifiers)
    linearity = np.zeros((len(amplifiers), order))
    full_well = np.empty(len(amplifiers), np.float32)
    for index, a in enumerate(amplifiers):
        linearity[index, : len(a.linearity)] = a.linearity
        # A little above the trusted limit, so that a full pixel is flagged by its raw value.
        measured = a.saturation - a.bias_level + 600.0
        true = measured + sum(c * measured ** (k + 2) for k, c in enumerate(a.linearity))
        full_well[index] = true * a.gain
    n = len(amplifiers)
    coupling = (
        np.array(detector.crosstalk, np.float32) if detector.crosstalk else np.zeros((n, n), np.float32)
    )
    return Chip(
        response=response,
        dark_e_s=dark,
        bias=_bias(detector, rng),
        defects=defects,
        gain=np.array([a.gain for a in amplifiers], np.float32),
        read_noise_adu=np.array([a.read_noise / a.gain for a in amplifiers], np.float32),
        data_box=np.array([[a.raw_box.x0, a.raw_box.y0] for a in amplifiers], np.int64),
        data_shape=np.array([[a.raw_box.shape[1], a.raw_box.shape[0]] for a in amplifiers], np.int64),
        coupling=coupling,
        linearity=linearity,
        full_well_e=full_well,
    )


def chip(instrument: Instrument, detector: Detector, seed: int) -> Chip:
    """Fixed properties of a sensor; kept in memory, made again in every process from the seed.

    Raises
    ------
    UserError
        Amplifiers of different raw sizes.
    """
    return _chip(instrument.model_dump_json(), detector.id, seed)
