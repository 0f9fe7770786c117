"""Brightness against time of what varies; pure functions of time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.core.time import SECONDS_PER_DAY

FloatArray = NDArray[np.float64]
CONSTANT, SINUSOID, RR_LYRAE = 0, 1, 2
AMPLITUDE_OF_BAND = {"u": 1.3, "g": 1.25, "r": 1.0, "i": 0.8, "z": 0.75, "y": 0.7}
"""Pulsation and spots are stronger in the blue; relative to r."""
SUPERNOVA_RISE_DAYS = 18.0


def variable_offset_mag(
    kind: ArrayLike, period_days: ArrayLike, amplitude: ArrayLike, phase: ArrayLike, tai_s: float
) -> FloatArray:
    """Magnitude minus mean magnitude at a time; ``amplitude`` is from peak to peak."""
    kind, amplitude = np.asarray(kind), np.asarray(amplitude, float)
    period = np.where(np.asarray(period_days, float) > 0, period_days, 1.0)
    turn = np.mod(tai_s / SECONDS_PER_DAY / period + np.asarray(phase, float), 1.0)
    sinusoid = 0.5 * np.sin(2 * np.pi * turn)
    # RR Lyrae: a fast rise in the last seventh of the period, a slow fall before it; mean 0.
    rise = 1.0 / 7.0
    fall = turn / (1 - rise)
    saw = np.where(turn < 1 - rise, fall**0.7, np.clip((1 - turn) / rise, 0, 1)) - 0.576
    shape = np.where(kind == SINUSOID, sinusoid, np.where(kind == RR_LYRAE, saw, 0.0))
    return np.asarray(amplitude * shape)


def supernova_flux(days: ArrayLike, stretch: ArrayLike) -> FloatArray:
    """Flux in units of the peak, ``days`` after the explosion: quadratic rise, exponential fall, slow tail."""
    tau = np.asarray(days, float) / (SUPERNOVA_RISE_DAYS * np.asarray(stretch, float))
    t = np.maximum(tau, 0.0)
    burst = t**2 * np.exp(2 * (1 - t))
    tail = np.where(t > 1, 0.12 * np.exp(-(t - 1) / 2.5) * (1 - np.exp(-((t - 1) ** 2))), 0.0)
    return np.asarray(np.where(tau > 0, burst + tail, 0.0))


def supernova_colour(days: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Colours g−r and r−i, ``days`` after the explosion: blue first, reddening for two months."""
    t = np.asarray(days, float)
    return np.clip(-0.15 + 0.025 * (t - 12), -0.25, 1.1), np.clip(-0.20 + 0.014 * (t - 12), -0.25, 0.5)
