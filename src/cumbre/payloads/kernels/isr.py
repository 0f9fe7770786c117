"""Detector signature removal: everything that happens to a pixel, in one pass over the raw amplifiers."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

FloatImage = NDArray[np.float32]
Mask = NDArray[np.uint16]

BAD, SAT, INTRP, NO_DATA, VIGNETTED = 1, 2, 4, 256, 1024
"""Bits of ``MaskPlane`` that are set here."""


@njit(cache=True)
def row_medians(columns):  # type: ignore[no-untyped-def]
    """Median of each row of a small 2-d array: float32 of shape (ny,)."""
    out = np.empty(columns.shape[0], np.float32)
    for j in range(columns.shape[0]):
        out[j] = np.median(columns[j])
    return out


def overscan_level(
    overscan: NDArray[np.generic], method: Literal["rows", "spline"] = "spline", knot_rows: int = 128
) -> FloatImage:
    """Bias level of each row from its overscan pixels.

    Parameters
    ----------
    overscan
        (ny, n_columns); the first columns should be left out by the caller if charge trails into them.
    method
        ``rows``: the median of each row (follows jumps, adds row noise); ``spline``: a cubic spline through the
        row medians with a knot every ``knot_rows`` rows, after rejecting outlying rows.

    Returns
    -------
    float32 of shape (ny,).
    """
    level: FloatImage = row_medians(np.ascontiguousarray(overscan, np.float32))
    if method == "rows" or level.size < 16:
        return level
    from scipy.interpolate import make_lsq_spline

    rows = np.arange(level.size, dtype=np.float64)
    inner = np.linspace(0, level.size - 1, max(2, level.size // knot_rows + 1))[1:-1]
    knots = np.concatenate([np.zeros(4), inner, np.full(4, level.size - 1.0)])
    good = np.ones(level.size, bool)
    smooth = level
    for _ in range(3):
        # rejected rows get no weight instead of being dropped: every knot interval keeps its rows
        spline = make_lsq_spline(rows, np.asarray(level, np.float64), knots, k=3, w=np.where(good, 1.0, 1e-6))
        smooth = np.asarray(spline(rows), np.float32)
        residual = level - smooth
        sigma = 1.4826 * float(np.median(np.abs(residual[good]))) + 1e-6
        good = np.abs(residual) < 4 * sigma
        if good.all() or good.sum() < 0.5 * level.size:
            break
    return smooth


@njit(cache=True, fastmath={"contract", "arcp", "reassoc", "nsz"}, error_model="numpy")
def _correct(  # type: ignore[no-untyped-def]
    signal,
    saturated,
    boxes,
    flips,
    gain,
    noise,
    linearity,
    crosstalk,
    has_crosstalk,
    bias,
    has_bias,
    dark,
    has_dark,
    flat,
    has_flat,
    defects,
    has_defects,
    image,
    variance,
    mask,
):
    n_amp, ny, nx = signal.shape
    row = np.empty((n_amp, nx), np.float32)
    for j in range(ny):
        for k in range(n_amp):
            x0, x1, y0, y1 = boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3]
            width, height = x1 - x0, y1 - y0
            if j >= height:
                row[k, :] = 0
                continue
            y = y1 - 1 - j if flips[k, 1] else y0 + j
            c2, c3 = linearity[k, 0], linearity[k, 1]
            for i in range(width):
                s = signal[k, j, i]
                if has_bias:
                    s -= bias[y, x1 - 1 - i if flips[k, 0] else x0 + i]
                row[k, i] = s * (np.float32(1) + s * (c2 + s * c3))
            row[k, width:] = 0
        for k in range(n_amp):
            x0, x1, y0, y1 = boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3]
            if j >= y1 - y0:
                continue
            y = y1 - 1 - j if flips[k, 1] else y0 + j
            own_noise = noise[k] * noise[k]
            for i in range(x1 - x0):
                x = x1 - 1 - i if flips[k, 0] else x0 + i
                s = row[k, i]
                if has_crosstalk:
                    for m in range(n_amp):
                        s -= crosstalk[k, m] * row[m, i]
                s *= gain[k]
                var = max(s, np.float32(0)) + own_noise
                bits = 0
                if has_dark:
                    s -= dark[y, x]
                if saturated[k, j, i]:
                    bits |= SAT
                if has_defects and defects[y, x]:
                    bits |= BAD
                if has_flat:
                    f = flat[y, x]
                    if f < 0.5:
                        bits |= VIGNETTED
                    if f < 0.1 or not f < 1e6:
                        bits |= BAD | NO_DATA
                        s, var = np.float32(0), np.float32(1e20)
                    else:
                        s /= f
                        var /= f * f
                image[y, x] = s
                variance[y, x] = var
                mask[y, x] = bits


def correct(
    signal: FloatImage,
    saturated: NDArray[np.bool_],
    boxes: NDArray[np.int64],
    flips: NDArray[np.bool_],
    gain: FloatImage,
    read_noise: FloatImage,
    *,
    shape: tuple[int, int],
    linearity: FloatImage | None = None,
    crosstalk: FloatImage | None = None,
    bias: FloatImage | None = None,
    dark: FloatImage | None = None,
    flat: FloatImage | None = None,
    defects: NDArray[np.bool_] | None = None,
) -> tuple[FloatImage, FloatImage, Mask]:
    """Correct and assemble one detector.

    In order: bias frame, linearity, crosstalk, gain, variance, dark, flat.

    Parameters
    ----------
    signal
        ADU above the overscan, (n_amp, ny, nx), the light-sensitive pixels in read-out order; smaller
        amplifiers are padded at the end.
    saturated
        bool, like ``signal``.
    boxes
        (n_amp, 4): x0, x1, y0, y1 of each amplifier in the detector, half-open.
    flips
        bool (n_amp, 2): whether x, y run backwards.
    gain, read_noise
        (n_amp,): electrons per ADU; electrons.
    linearity
        (n_amp, 2): c2, c3 of true = m + c2 m² + c3 m³.
    crosstalk
        (n_amp, n_amp): ``[victim, source]``.
    bias, dark, flat, defects
        (ny, nx) of the detector: ADU above the overscan; electrons; relative response; bad pixels.

    Returns
    -------
    image, variance, mask
        Electrons, electrons², bits.
    """
    n = signal.shape[0]
    image, variance = np.zeros(shape, np.float32), np.full(shape, 1e20, np.float32)
    mask = np.full(shape, NO_DATA, np.uint16)
    none, no_defects = np.zeros((1, 1), np.float32), np.zeros((1, 1), bool)

    def plane(value: FloatImage | None) -> FloatImage:
        return none if value is None else np.ascontiguousarray(value, np.float32)

    _correct(
        np.ascontiguousarray(signal, np.float32), saturated, boxes, flips, plane(gain), plane(read_noise),
        np.zeros((n, 2), np.float32) if linearity is None else plane(linearity),
        plane(crosstalk), crosstalk is not None, plane(bias), bias is not None, plane(dark), dark is not None,
        plane(flat), flat is not None,
        no_defects if defects is None else np.ascontiguousarray(defects, bool), defects is not None,
        image, variance, mask,
    )  # fmt: skip
    return image, variance, mask


@njit(cache=True)
def divide_by_flat(image, variance, mask, flat):  # type: ignore[no-untyped-def]
    """Divide by the flat in place, with the flags that :func:`correct` sets, where something comes before it."""
    for j in range(image.shape[0]):
        for i in range(image.shape[1]):
            f = flat[j, i]
            if f < 0.5:
                mask[j, i] |= VIGNETTED
            if f < 0.1 or not f < 1e6:
                mask[j, i] |= BAD | NO_DATA
                image[j, i], variance[j, i] = np.float32(0), np.float32(1e20)
            else:
                image[j, i] /= f
                variance[j, i] /= f * f


@njit(cache=True)
def _fill(image, variance, mask, bits, reach):  # type: ignore[no-untyped-def]
    ny, nx = image.shape
    for j in range(ny):
        i = 0
        while i < nx:
            if not (mask[j, i] & bits or not np.isfinite(image[j, i])):
                i += 1
                continue
            end = i
            while end < nx and (mask[j, end] & bits or not np.isfinite(image[j, end])):
                end += 1
            left, right = i - 1, end
            for k in range(i, end):
                # along the row when the gap is narrow, else from the rows above and below
                total, weight, var = 0.0, 0.0, 0.0
                if left >= 0:
                    w = 1.0 / (k - left)
                    total += w * image[j, left]
                    var += w * variance[j, left]
                    weight += w
                if right < nx:
                    w = 1.0 / (right - k)
                    total += w * image[j, right]
                    var += w * variance[j, right]
                    weight += w
                for direction in (-1, 1):
                    for step in range(1, reach + 1):
                        jj = j + direction * step
                        if jj < 0 or jj >= ny:
                            break
                        if not mask[jj, k] & bits and np.isfinite(image[jj, k]):
                            w = 1.0 / step
                            total += w * image[jj, k]
                            var += w * variance[jj, k]
                            weight += w
                            break
                if weight > 0:
                    image[j, k] = total / weight
                    variance[j, k] = var / weight
                else:
                    image[j, k] = 0
                mask[j, k] |= INTRP
            i = end


def fill_bad_pixels(image: FloatImage, variance: FloatImage, mask: Mask, bits: int, reach: int = 5) -> None:
    """Replace flagged and non-finite pixels in place by their nearest good neighbours, and flag INTRP.

    The result is for display and resampling; the flags that made the pixel bad stay.
    """
    _fill(image, variance, mask, np.uint16(bits), reach)


@njit(cache=True)
def grow(mask, bit, radius):  # type: ignore[no-untyped-def]
    """Spread one bit in place to the pixels within ``radius`` (a square)."""
    ny, nx = mask.shape
    found = np.argwhere((mask & bit) != 0)
    for n in range(found.shape[0]):
        y, x = found[n, 0], found[n, 1]
        for j in range(max(y - radius, 0), min(y + radius + 1, ny)):
            for i in range(max(x - radius, 0), min(x + radius + 1, nx)):
                mask[j, i] |= bit
