"""Passes over whole planes that make one plane at most, where plain numpy would make several."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

FloatImage = NDArray[np.float32]
Mask = NDArray[np.uint16]
_SAMPLE = 700_000


@njit(cache=True)
def flag_bad(image, mask, bits):  # type: ignore[no-untyped-def]
    """Bool (ny, nx): pixels with one of the bits or a value that is not finite."""
    out = np.empty(image.shape, np.bool_)
    for j in range(image.shape[0]):
        for i in range(image.shape[1]):
            d = image[j, i]
            out[j, i] = (mask[j, i] & bits) != 0 or not np.isfinite(d)
    return out


@njit(cache=True)
def _count_wild(image, limit):  # type: ignore[no-untyped-def]
    n = 0
    for j in range(image.shape[0]):
        for i in range(image.shape[1]):
            if not abs(image[j, i]) <= limit:
                n += 1
    return n


@njit(cache=True)
def _zero_wild(image, limit, out):  # type: ignore[no-untyped-def]
    for j in range(image.shape[0]):
        for i in range(image.shape[1]):
            d = image[j, i]
            out[j, i] = d if abs(d) <= limit else np.float32(0)


def finite_image(image: FloatImage, limit: float = 1e29) -> FloatImage:
    """The image with zero for what is not finite or beyond ``limit``; the same array when there is nothing such."""
    if image.dtype == np.float32 and image.flags.c_contiguous and _count_wild(image, np.float32(limit)) == 0:
        return image
    out = np.empty(image.shape, np.float32)
    _zero_wild(image, np.float32(limit), out)
    return out


@njit(cache=True)
def _count_odd(variance, limit):  # type: ignore[no-untyped-def]
    n = 0
    for j in range(variance.shape[0]):
        for i in range(variance.shape[1]):
            v = variance[j, i]
            if not (v > 0 and v < limit):
                n += 1
    return n


@njit(cache=True)
def has_no_variance(variance):  # type: ignore[no-untyped-def]
    """Whether a variance is not positive, or not a number."""
    for j in range(variance.shape[0]):
        for i in range(variance.shape[1]):
            if not variance[j, i] > 0:
                return True
    return False


@njit(cache=True)
def _replace_odd(variance, limit, value, out):  # type: ignore[no-untyped-def]
    for j in range(variance.shape[0]):
        for i in range(variance.shape[1]):
            v = variance[j, i]
            out[j, i] = v if (v > 0 and v < limit) else value


def finite_variance(variance: FloatImage, limit: float = 1e19) -> FloatImage:
    """The variance with its typical value where it is not positive or says "no data"; the same array if nowhere."""
    if (
        variance.dtype == np.float32
        and variance.flags.c_contiguous
        and _count_odd(variance, np.float32(limit)) == 0
    ):
        return variance
    sample = variance[::3, ::3]
    good = sample[(sample > 0) & (sample < limit)]
    out = np.empty(variance.shape, np.float32)
    typical = np.float32(np.median(good)) if good.size else np.float32(1)
    _replace_odd(variance, np.float32(limit), typical, out)
    return out


def sample_step(size: int) -> int:
    """Odd step that leaves about 700,000 pixels; odd, so that patterns of two or four columns do not beat with it."""
    step = max(1, int((size / _SAMPLE) ** 0.5))
    return step if step % 2 else step + 1


def robust_rms(values: NDArray[np.floating[Any]]) -> float:
    """Scatter of the core of a distribution (1.4826 × median absolute deviation)."""
    if values.size == 0:
        return float("nan")
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def sampled(plane: NDArray[Any], bad: NDArray[np.bool_] | None = None) -> NDArray[Any]:
    """Good pixels of a regular sample of a plane, 1-d; of all pixels where the plane is small or few are good."""
    step = sample_step(plane.size)
    picked = plane[::step, ::step]
    if bad is None:
        return np.asarray(picked.ravel())
    picked = picked[~bad[::step, ::step]]
    if step > 1 and picked.size < 20_000:
        picked = plane[~bad]
    return np.asarray(picked)


@njit(cache=True)
def flag_bright(image, bad, centre, limit):  # type: ignore[no-untyped-def]
    """Bool (ny, nx): bad pixels and those farther than ``limit`` from ``centre``."""
    out = np.empty(image.shape, np.bool_)
    for j in range(image.shape[0]):
        for i in range(image.shape[1]):
            out[j, i] = bad[j, i] or not abs(image[j, i] - centre) <= limit
    return out


@njit(cache=True)
def subtract_level(image, level, left_out):  # type: ignore[no-untyped-def]
    """Subtract ``level`` from ``image`` in place; give the mean of the pixels not left out."""
    total, n = 0.0, 0
    for j in range(image.shape[0]):
        row, count = 0.0, 0
        for i in range(image.shape[1]):
            d = image[j, i] - level[j, i]
            image[j, i] = d
            if not left_out[j, i]:
                row += d
                count += 1
        total += row
        n += count
    return total / max(n, 1)


@njit(cache=True)
def pulls(image, variance, bad, step):  # type: ignore[no-untyped-def]
    """Image over sigma of a regular sample of good pixels, 1-d float32."""
    ny, nx = image.shape
    out = np.empty(((ny - 1) // step + 1) * ((nx - 1) // step + 1), np.float32)
    n = 0
    for j in range(0, ny, step):
        for i in range(0, nx, step):
            if not bad[j, i]:
                out[n] = image[j, i] / np.sqrt(max(variance[j, i], np.float32(1e-30)))
                n += 1
    return out[:n]


@njit(cache=True)
def join_masks(  # type: ignore[no-untyped-def]
    science, image, template, touched, drop, gap_bits, sat_bit, kept_bit, no_data, sat_template, unusable
):
    """Mask of a difference; bit 1 of ``touched`` marks what the kernel reached.

    Science bits without ``drop``; the template's ``kept_bit``; ``no_data`` where the template has one of ``gap_bits``
    or the image is not finite; ``sat_template`` where the template is saturated. Gives the mask and how many reached
    pixels remain unexplained.
    """
    out = np.empty(science.shape, np.uint16)
    open_ends = 0
    for j in range(science.shape[0]):
        for i in range(science.shape[1]):
            bits = science[j, i] & ~drop
            other = template[j, i]
            bits |= other & kept_bit
            if other & gap_bits:
                bits |= no_data
            if other & sat_bit:
                bits |= sat_template
            if touched[j, i] and not bits & unusable:
                open_ends += 1
            if not np.isfinite(image[j, i]):
                bits |= no_data
            out[j, i] = bits
    return out, open_ends


@njit(cache=True)
def flag_detected(mask, snr, threshold, positive, negative):  # type: ignore[no-untyped-def]
    """Set a bit in place where the significance is above the threshold, and another where it is below minus that."""
    for j in range(mask.shape[0]):
        for i in range(mask.shape[1]):
            if snr[j, i] >= threshold:
                mask[j, i] |= positive
            elif snr[j, i] <= -threshold:
                mask[j, i] |= negative


@njit(cache=True)
def name_reached(mask, touched, moved, saturated, near_bit, far_bit, unusable, reach):  # type: ignore[no-untyped-def]
    """Flag, in place, touched pixels without an unusable bit: near a saturated pixel of the moved image, or not."""
    ny, nx = mask.shape
    for j in range(ny):
        for i in range(nx):
            if not touched[j, i] or mask[j, i] & unusable:
                continue
            bit = far_bit
            for b in range(max(j - reach, 0), min(j + reach + 1, ny)):
                for a in range(max(i - reach, 0), min(i + reach + 1, nx)):
                    if moved[b, a] & saturated:
                        bit = near_bit
                        break
                if bit == near_bit:
                    break
            mask[j, i] |= bit
