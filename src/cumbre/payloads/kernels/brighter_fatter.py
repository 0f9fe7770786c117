"""The brighter-fatter effect: charge already collected pushes later charge over pixel borders.

With the kernel K of Coulton et al. (2018) the collected charge is ``F = Q − ½ ∇·(Q ∇(K ⊗ Q))`` of the light's charge Q.
Here every border between two pixels carries ``½ · mean(Q) · step of (K ⊗ Q)``: what leaves one pixel arrives in its
neighbour, so charge is conserved to rounding. K follows from the covariances of flat-field pixels, which at low level μ
differ from Poisson noise by ``−μ² ∇²K``.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

FloatImage = NDArray[np.float32]
Floats = NDArray[np.float64]
NEGLECTED = 0.001
"""Charge that crosses a border and may be left out, in units of the local noise."""
TOLERANCE_E = 0.05
"""Electrons by which the last iteration may change a pixel."""
MOST_ITERATIONS = 12
CANVAS = 256
TAIL_FROM, TAIL_FIT, TAIL_POWER = 2.9, (1.9, 5.0), 4.0
"""Pixels beyond which single lags are not taken as measured; those that a tail is fitted to; how steeply it falls (a
charge with its mirror image in the electrodes: between the cubes near by and the fifth power far away)."""


@njit(cache=True, fastmath={"contract", "nsz"})
def _spread(change, least, kernel, potential, rows):  # type: ignore[no-untyped-def]
    """Add K ⊗ change to the potential, from the pixels whose charge exceeds ``least`` only; notes the rows reached."""
    ny, nx = change.shape
    half = kernel.shape[0] // 2
    touched = 0
    for j in range(ny):
        for i in range(nx):
            q = change[j, i]
            if not abs(q) > least:
                continue
            touched += 1
            x0, x1 = max(i - half, 0), min(i + half + 1, nx)
            for b in range(max(j - half, 0), min(j + half + 1, ny)):
                rows[b] = True
                k = b - j + half
                for a in range(x0, x1):
                    potential[b, a] += kernel[k, a - i + half] * q
    return touched


@njit(cache=True)
def _moved(charge, observed, held, potential, rows, change):  # type: ignore[no-untyped-def]
    """``observed`` + what crosses the borders of ``charge``, as a change of it; returns the largest change.

    Rows that no charge reached keep their value. ``held`` pixels exchange nothing.
    """
    ny, nx = charge.shape
    largest = 0.0
    for j in range(ny):
        near = rows[j] or (j > 0 and rows[j - 1]) or (j + 1 < ny and rows[j + 1])
        if not near:
            for i in range(nx):
                change[j, i] = 0.0
            continue
        for i in range(nx):
            gain = 0.0
            if not held[j, i]:
                q, p = charge[j, i], potential[j, i]
                if i + 1 < nx and not held[j, i + 1]:
                    gain += (q + charge[j, i + 1]) * (potential[j, i + 1] - p)
                if i > 0 and not held[j, i - 1]:
                    gain += (q + charge[j, i - 1]) * (potential[j, i - 1] - p)
                if j + 1 < ny and not held[j + 1, i]:
                    gain += (q + charge[j + 1, i]) * (potential[j + 1, i] - p)
                if j > 0 and not held[j - 1, i]:
                    gain += (q + charge[j - 1, i]) * (potential[j - 1, i] - p)
            delta = observed[j, i] + 0.25 * gain - charge[j, i]
            change[j, i] = delta
            largest = max(largest, abs(delta))
    return largest


@njit(cache=True)
def _add(charge, change, rows):  # type: ignore[no-untyped-def]
    ny, nx = charge.shape
    for j in range(ny):
        if rows[j] or (j > 0 and rows[j - 1]) or (j + 1 < ny and rows[j + 1]):
            for i in range(nx):
                charge[j, i] += change[j, i]


def correct(
    image: FloatImage, kernel: NDArray[np.floating], held: NDArray[np.bool_] | None = None
) -> dict[str, float]:
    """Give the charge back to the pixels whose light made it, in place.

    Parameters
    ----------
    image
        float32 (ny, nx): electrons as collected, finite; sky included, before the flat.
    kernel
        (n, n), n odd, per electron.
    held
        bool (ny, nx): pixels whose charge is not what was collected (saturated); nothing crosses their borders.

    Returns
    -------
    Numbers: iterations, last_change (electrons), touched (part of the pixels whose charge pushed), moved (electrons,
    sum of what pixels gained). ``last_change`` above ``TOLERANCE_E`` means that it did not converge.
    """
    ny, nx = image.shape
    weights = np.ascontiguousarray(kernel, np.float64)
    closed = np.zeros((ny, nx), bool) if held is None else np.ascontiguousarray(held, bool)
    level = float(np.median(image[::7, ::7]))
    # A sky pushes nothing but at the ends of the detector, where every pixel has the same neighbours but the last.
    steepest = max(float(np.abs(np.diff(weights, axis=axis)).max()) for axis in (0, 1))
    noise = np.sqrt(max(level, 1.0))
    least = NEGLECTED * noise / max(0.5 * max(level, noise) * steepest, 1e-30)
    observed = image
    charge = image.copy()
    potential, rows = np.zeros((ny, nx), np.float32), np.zeros(ny, bool)
    change = charge - np.float32(level)
    touched = _spread(change, least, weights, potential, rows) / max(image.size, 1)
    last, count = 0.0, 0
    for _ in range(MOST_ITERATIONS):
        count += 1
        last = float(_moved(charge, observed, closed, potential, rows, change))
        _add(charge, change, rows)
        if last < TOLERANCE_E:
            break
        _spread(change, TOLERANCE_E, weights, potential, rows)
    moved = charge - observed
    image[:] = charge
    return {
        "iterations": float(count),
        "last_change": last,
        "touched": float(touched),
        "moved": float(np.maximum(moved, 0).sum(dtype=np.float64)),
    }


@njit(cache=True, fastmath={"contract", "nsz"})
def _pair_sums(first, second, good, ratio, mean, clip, reach):  # type: ignore[no-untyped-def]
    """Sums and counts of products of the difference with itself moved by (dy, dx), dy 0…reach, dx −reach…reach."""
    ny, nx = first.shape
    sums = np.zeros((reach + 1, 2 * reach + 1))
    counts = np.zeros((reach + 1, 2 * reach + 1))
    for j in range(ny):
        for i in range(nx):
            if not good[j, i]:
                continue
            d = first[j, i] - ratio * second[j, i] - mean
            if abs(d) > clip:
                continue
            for b in range(min(reach + 1, ny - j)):
                for a in range(max(-reach, -i), min(reach + 1, nx - i)):
                    if b == 0 and a < 0:
                        continue
                    if not good[j + b, i + a]:
                        continue
                    e = first[j + b, i + a] - ratio * second[j + b, i + a] - mean
                    if abs(e) > clip:
                        continue
                    sums[b, a + reach] += d * e
                    counts[b, a + reach] += 1
    return sums, counts


def pair_covariances(
    first: FloatImage, second: FloatImage, good: NDArray[np.bool_], *, reach: int = 8, clip_sigma: float = 5.0
) -> tuple[float, Floats, float]:
    """Covariances of the pixels of one flat frame, from two of the same light.

    Parameters
    ----------
    first, second
        Electrons above the bias, (ny, nx).
    good
        bool (ny, nx): pixels that count.

    Returns
    -------
    level, covariance, pairs
        Mean electrons; (reach + 1, reach + 1) covariance by |dy|, |dx|, electrons², both signs averaged; number of
        pixel pairs behind the first neighbour's.
    """
    one, two = (float(np.mean(plane[good], dtype=np.float64)) for plane in (first, second))
    ratio = one / two
    rest = (first - np.float32(ratio) * second)[good]
    mean = float(np.median(rest))
    clip = clip_sigma * 1.4826 * float(np.median(np.abs(rest - mean)))
    sums, counts = _pair_sums(first, second, good, ratio, mean, clip, reach)
    right, left = np.s_[:, reach:], np.s_[:, reach::-1]
    total, number = sums[right].copy(), counts[right].copy()
    total[1:, 1:] += sums[left][1:, 1:]
    number[1:, 1:] += counts[left][1:, 1:]
    return one, total / np.maximum(number, 1) / 2, float(number[0, 1])


def smooth_tail(levels: Floats, covariances: Floats) -> Floats:
    """Covariances whose lags beyond ``TAIL_FROM`` are those of a power law fitted to near ones.

    Far lags are small, but there are hundreds: their noise would decide what is missing at the centre.

    Parameters
    ----------
    levels, covariances
        As for :func:`kernel_of_covariances`.
    """
    m = covariances.shape[1] - 1
    slope = covariances.sum(axis=0) / float(np.sum(levels**2))
    yy, xx = np.mgrid[: m + 1, : m + 1]
    radius = np.maximum(np.hypot(yy, xx), 0.5)
    # lags on an axis stand for two pixels of the full plane, the others for four
    times = np.where((yy == 0) | (xx == 0), 2.0, 4.0) * ((radius > TAIL_FIT[0]) & (radius < TAIL_FIT[1]))
    law = radius**-TAIL_POWER
    amplitude = max(float((times * slope * law).sum() / (times * law**2).sum()), 0.0)
    far = radius > TAIL_FROM
    out = covariances.copy()
    out[:, far] = levels[:, None] ** 2 * amplitude * law[far]
    return out


def kernel_of_covariances(levels: Floats, covariances: Floats) -> Floats:
    """Kernel from covariances at several levels.

    In a flat each Fourier mode of the charge feeds back on itself at a rate s, so that its power at level μ is
    ``μ · (exp(2sμ) − 1) / (2sμ)``; that is solved for s, without the error of taking covariances as −μ² ∇²K.

    Parameters
    ----------
    levels
        (n,) electrons.
    covariances
        (n, m + 1, m + 1) by |dy|, |dx|.

    Returns
    -------
    (2·m + 1, 2·m + 1), per electron, zero in the mean of its rim. A pixel's own variance is not used: it lacks what its
    neighbours have, so that charge is conserved.
    """
    m = covariances.shape[1] - 1
    around = np.abs(np.arange(-m, m + 1))
    rate, weights = np.zeros((CANVAS, CANVAS)), 0.0
    for level, covariance in zip(levels.tolist(), covariances, strict=True):
        full = covariance[np.ix_(around, around)].copy()
        full[m, m] = 0.0
        full[m, m] = -full.sum()
        wide = np.zeros((CANVAS, CANVAS))
        wide[: 2 * m + 1, : 2 * m + 1] = full
        power = 1 + np.real(np.fft.fft2(np.roll(wide, (-m, -m), axis=(0, 1)))) / level
        # noise of the power is the same at each level, so that of the rate goes as 1/level
        rate += level**2 * _growth(power) / level
        weights += level**2
    f = 2 * np.cos(2 * np.pi * np.fft.fftfreq(CANVAS))
    laplace = f[:, None] + f[None, :] - 4
    laplace[0, 0] = 1.0
    spectrum = -rate / weights / laplace
    spectrum[0, 0] = 0.0
    potential = np.real(np.fft.ifft2(spectrum))
    window = np.arange(-m, m + 1)
    kernel = potential[np.ix_(window, window)]
    rim = np.concatenate([kernel[0], kernel[-1], kernel[:, 0], kernel[:, -1]])
    return np.asarray(kernel - rim.mean())


def _growth(power: Floats) -> Floats:
    """X of ``power = (exp(2x) − 1) / (2x)``, by Newton's method."""
    power = np.clip(power, 0.05, 20.0)
    x = np.log(power)
    for _ in range(40):
        small = np.abs(x) < 1e-4
        safe = np.where(small, 1.0, x)
        value = np.where(small, 1 + x + 2 * x * x / 3, np.expm1(2 * safe) / (2 * safe))
        slope = np.where(small, 1 + 4 * x / 3, (np.exp(2 * safe) - value) / safe)
        x = x - (value - power) / slope
    return np.asarray(x)
