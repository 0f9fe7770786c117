"""Detection of sources on a difference image.

Matched filter with the local PSF, and peaks of both signs. Positions are 0-based pixels, centre of the first pixel at
(0, 0).
"""

from __future__ import annotations

from typing import Any, Protocol

import cv2
import numpy as np
from numba import njit
from numpy.typing import NDArray

from cumbre.payloads.kernels.convolve import backward, forward, tile_side, tiles, transform_kernel, trimmed

BLOCK = 128
"""Side of the cells that share a PSF stamp."""


class PsfField(Protocol):
    """A PSF model: odd square stamps centred on their middle pixel, sum 1."""

    def __call__(self, x: float, y: float, /) -> NDArray[np.floating[Any]]:
        """Stamp of the place."""


class GridPsf:
    """PSF stamps sampled on a grid of cells, filtered by the difference's decorrelation kernel.

    Parameters
    ----------
    base
        ``base(x, y)`` → odd square stamp centred on its middle pixel.
    phi
        ``phi(x, y)`` → odd square kernel with sum 1.
    half
        Half size of the stamps returned.
    """

    def __init__(self, base: PsfField, phi: PsfField, *, half: int, cell: int = BLOCK) -> None:
        self._base, self._phi, self.half, self._cell = base, phi, half, cell
        self._cache: dict[tuple[int, int], NDArray[np.float64]] = {}

    def __call__(self, x: float, y: float) -> NDArray[np.float64]:
        """(2·half + 1)² stamp of the cell that holds (x, y)."""
        cell = int(x // self._cell), int(y // self._cell)
        if cell not in self._cache:
            cx, cy = (cell[0] + 0.5) * self._cell, (cell[1] + 0.5) * self._cell
            stamp, phi = np.asarray(self._base(cx, cy), float), self._phi(cx, cy)
            pad = phi.shape[0] // 2 + max(0, self.half - stamp.shape[0] // 2)
            wide = np.pad(stamp, pad)
            if phi.shape[0] > 1:
                flipped = np.ascontiguousarray(phi[::-1, ::-1])
                wide = cv2.filter2D(wide, cv2.CV_64F, flipped, borderType=cv2.BORDER_CONSTANT)
            middle = wide.shape[0] // 2
            cut = wide[
                middle - self.half : middle + self.half + 1, middle - self.half : middle + self.half + 1
            ]
            # The light that the cut leaves out stays missing: fluxes are of the whole PSF, as those of the stars.
            self._cache[cell] = cut / wide.sum()
        return self._cache[cell]

    def stack(
        self, x: NDArray[np.intp], y: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The different stamps of many places, (m, n, n), and which of them each place has."""
        columns, rows = np.asarray(x) // self._cell, np.asarray(y) // self._cell
        width = int(columns.max(initial=0)) + 1
        cells, first, which = np.unique(rows * width + columns, return_index=True, return_inverse=True)
        side = 2 * self.half + 1
        stamps = np.empty((len(cells), side, side))
        for k, index in enumerate(first):
            stamps[k] = self(float(x[index]), float(y[index]))
        return stamps, which.astype(np.int64)


@njit(cache=True)
def _cut_good(image, bad, top, left, buffer):  # type: ignore[no-untyped-def]
    """Fill the buffer with good pixels from (top, left) on; zero elsewhere."""
    ny, nx = image.shape
    for j in range(buffer.shape[0]):
        y = top + j
        for i in range(buffer.shape[1]):
            x = left + i
            if 0 <= y < ny and 0 <= x < nx and not bad[y, x]:
                buffer[j, i] = image[y, x]
            else:
                buffer[j, i] = 0


@njit(cache=True)
def _ratio(signal, noise, least, out):  # type: ignore[no-untyped-def]
    for j in range(out.shape[0]):
        for i in range(out.shape[1]):
            v = noise[j, i]
            out[j, i] = signal[j, i] / np.sqrt(v) if v > least else np.float32(0)


def significance(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    bad: NDArray[np.bool_],
    psf: PsfField,
    half: int,
    extra: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Signal-to-noise of a point source at every pixel.

    ``Σ P·D / sqrt(Σ P²·V)`` with bad pixels left out of both sums; zero where less than 30 % of the sum is left. The
    noise uses the product of P²'s sums along the axes.

    Parameters
    ----------
    image, variance
        (ny, nx) difference and its variance.
    bad
        True where a pixel must not count.
    psf, half
        Local PSF and the half size of its stamps.
    extra
        Variance of the sum ``Σ P·D`` beside that of the pixels, (ny, nx).
    """
    shape = (image.shape[0], image.shape[1])
    side = tile_side(shape, half)
    out = np.empty(shape, dtype=np.float32)
    buffer = np.zeros((side, side), np.float32)
    for y0, y1, x0, x1 in tiles(shape, side - 2 * half):
        stamp = np.asarray(psf((x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2), np.float64)
        inner = np.s_[half : half + y1 - y0, half : half + x1 - x0]
        _cut_good(image, bad, y0 - half, x0 - half, buffer)
        spectrum = forward(buffer)
        spectrum *= transform_kernel(stamp[::-1, ::-1], side)
        signal = backward(spectrum, side)[inner]
        square = stamp**2
        total = float(square.sum())
        _cut_good(variance, bad, y0 - half, x0 - half, buffer)
        across, up = trimmed(square.sum(axis=0) / total), trimmed(square.sum(axis=1))
        noise = cv2.sepFilter2D(buffer, cv2.CV_32F, across, up, borderType=cv2.BORDER_CONSTANT)[inner]
        full = total * float(np.median(variance[y0:y1:9, x0:x1:9]))
        if extra is not None:
            # where nothing is left of the sum there is no score, whatever the template has there
            noise = np.where(noise > 0.3 * full, noise + extra[y0:y1, x0:x1], noise)
        _ratio(signal, noise, np.float32(max(0.3 * full, 1e-30)), out[y0:y1, x0:x1])
    return out


@njit(cache=True)
def _maxima(snr, sign, least, radius):  # type: ignore[no-untyped-def]
    """Pixels of at least ``least`` that none exceeds within ``radius``: x, y, values; ``sign`` −1 looks for minima."""
    ny, nx = snr.shape
    size = 1024
    xs, ys, values = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32)
    n = 0
    for j in range(ny):
        for i in range(nx):
            value = sign * snr[j, i]
            if not value >= least:
                continue
            highest = True
            for b in range(max(j - radius, 0), min(j + radius + 1, ny)):
                for a in range(max(i - radius, 0), min(i + radius + 1, nx)):
                    if sign * snr[b, a] > value:
                        highest = False
                        break
                if not highest:
                    break
            if not highest:
                continue
            if n == size:
                size *= 2
                more_x, more_y, more = (
                    np.empty(size, np.int64),
                    np.empty(size, np.int64),
                    np.empty(size, np.float32),
                )
                more_x[:n], more_y[:n], more[:n] = xs, ys, values
                xs, ys, values = more_x, more_y, more
            xs[n], ys[n], values[n] = i, j, value
            n += 1
    return xs[:n], ys[:n], values[:n]


def find_peaks(
    snr: NDArray[np.float32], threshold: float, *, radius: int = 3
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
    """Local maxima of \\|snr\\| of at least ``threshold``, each sign by itself.

    Returns
    -------
    x, y, is_negative, ordered from the most significant down.
    """
    parts = [_maxima(snr, np.float32(sign), np.float32(threshold), radius) for sign in (1, -1)]
    x, y, values = (np.concatenate([part[k] for part in parts]) for k in range(3))
    is_negative = np.arange(len(x)) >= len(parts[0][0])
    order = np.argsort(-values, kind="stable")
    return x[order], y[order], is_negative[order]


def noise_peaks(
    snr: NDArray[np.float32], bad: NDArray[np.bool_], radius: int, *, sign: int = 1
) -> tuple[float, float]:
    """Tail of the noise, from the peaks too faint to be detections.

    Noise peaks of a stack or a resampled image are more frequent than Gaussian statistics say. Their number
    above s is described by ``count · exp(−(s − 4.5) / slope)``, measured between 3.5 and 4.5.

    Parameters
    ----------
    snr
        Significance image.
    bad
        Pixels not to look at.
    radius
        Half size of the window in which a pixel must be the highest to be a peak.
    sign
        −1 for the negative tail.

    Returns
    -------
    count
        Expected noise peaks above 4.5 in the whole image.
    slope
        Scale of the exponential, sigma.
    """
    x, y, values = _maxima(snr, np.float32(sign), np.float32(3.5), radius)
    peaks = values[~bad[y, x]]
    near, far = int((peaks < 4.0).sum()), int(((peaks >= 4.0) & (peaks < 4.5)).sum())
    if far < 3 or near <= far:
        return 0.2 * far, 0.25
    ratio = near / far
    return far / (ratio - 1.0), float(np.clip(0.5 / np.log(ratio), 0.1, 1.0))


@njit(cache=True)
def _pixels_above(plane, threshold):  # type: ignore[no-untyped-def]
    """x, y of the pixels above a threshold, in raster order."""
    n = 0
    for j in range(plane.shape[0]):
        for i in range(plane.shape[1]):
            n += plane[j, i] > threshold
    xs, ys = np.empty(n, np.int64), np.empty(n, np.int64)
    n = 0
    for j in range(plane.shape[0]):
        for i in range(plane.shape[1]):
            if plane[j, i] > threshold:
                xs[n], ys[n] = i, j
                n += 1
    return xs, ys


@njit(cache=True)
def _root(parent, k):  # type: ignore[no-untyped-def]
    while parent[k] != k:
        parent[k] = parent[parent[k]]
        k = parent[k]
    return k


@njit(cache=True)
def connected(xs, ys):  # type: ignore[no-untyped-def]
    """Number of the 8-connected group of each pixel; pixels in raster order.

    Returns
    -------
    label
        int64 (n,), from 0 up.
    count
        Number of groups.
    """
    n = xs.size
    parent = np.arange(n)
    above = 0
    for k in range(n):
        if k and ys[k - 1] == ys[k] and xs[k - 1] == xs[k] - 1:
            parent[_root(parent, k)] = _root(parent, k - 1)
        while above < k and (ys[above] < ys[k] - 1 or (ys[above] == ys[k] - 1 and xs[above] < xs[k] - 1)):
            above += 1
        m = above
        while m < k and ys[m] == ys[k] - 1 and xs[m] <= xs[k] + 1:
            parent[_root(parent, m)] = _root(parent, k)
            m += 1
    label = np.empty(n, np.int64)
    number = np.full(n, -1, np.int64)
    count = 0
    for k in range(n):
        r = _root(parent, k)
        if number[r] < 0:
            number[r] = count
            count += 1
        label[k] = number[r]
    return label, count


@njit(cache=True)
def _extents(xs, ys, label, count):  # type: ignore[no-untyped-def]
    """Diagonal of the bounding box, and number of pixels, of each group."""
    low_x, high_x = np.full(count, 1 << 60), np.full(count, -1)
    low_y, high_y = np.full(count, 1 << 60), np.full(count, -1)
    area = np.zeros(count, np.int64)
    for k in range(xs.size):
        g = label[k]
        low_x[g], high_x[g] = min(low_x[g], xs[k]), max(high_x[g], xs[k])
        low_y[g], high_y[g] = min(low_y[g], ys[k]), max(high_y[g], ys[k])
        area[g] += 1
    return np.hypot((high_x - low_x + 1) * 1.0, (high_y - low_y + 1) * 1.0), area


def streak_mask(
    snr: NDArray[np.float32], *, width: float, threshold: float = 3.0, min_length: int = 80
) -> NDArray[np.bool_] | None:
    """Pixels on long straight lines (satellites, aeroplanes), found by Hough transform; None without a line.

    Parameters
    ----------
    snr
        Significance image of the difference.
    width
        Pixels masked across a line.
    min_length
        Shortest line, pixels.
    """
    x, y = _pixels_above(snr, np.float32(threshold))
    label, count = connected(x, y)
    diagonal, area = _extents(x, y, label, count)
    # Compact blobs (stars, galaxies) are no lines: only long thin components vote.
    keep = ((diagonal > max(10.0, width)) & (area < 0.3 * diagonal**2))[label]
    if np.count_nonzero(keep) < min_length:
        return None
    candidates = np.zeros(snr.shape, np.uint8)
    candidates[y[keep], x[keep]] = 255
    lines = cv2.HoughLinesP(
        candidates,
        1,
        np.pi / 360,
        threshold=min_length // 2,
        minLineLength=min_length,
        maxLineGap=max(8, min_length // 5),
    )
    if lines is None:
        return None
    candidates[:] = 0
    for line in np.asarray(lines).reshape(-1, 4):
        x0, y0, x1, y1 = (int(v) for v in line)
        cv2.line(candidates, (x0, y0), (x1, y1), 1, max(1, round(width)))
    return np.asarray(candidates > 0)


class SaturationReach:
    """Closeness to a saturated star, whose halo reaches farther the larger its core is.

    Parameters
    ----------
    mask, bits
        (ny, nx) mask and its bits of saturated pixels.
    fwhm
        Pixels; a star's halo reaches 2.5 of them beyond the radius of its core.
    """

    def __init__(self, mask: NDArray[np.uint16], bits: int, fwhm: float) -> None:
        from scipy.spatial import cKDTree

        x, y = _pixels_above(mask & np.uint16(bits), np.uint16(0))
        label, count = connected(x, y)
        area = np.bincount(label, minlength=count).astype(float)
        reach = np.where(area >= 4, np.sqrt(area / np.pi) + 2.5 * fwhm, 1e-3)[label]
        large = reach > 1e-3
        self._reach = reach
        self._tree = cKDTree(np.stack([x, y], axis=1)) if large.any() else None

    def __call__(self, x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
        """0…0.25 at each place: 0.25 on a saturated pixel, 0 beyond the reach of the nearest one."""
        if self._tree is None or len(x) == 0:
            return np.zeros(len(x))
        distance, nearest = self._tree.query(np.stack([x, y], axis=1))
        return np.asarray(0.25 * np.clip(1.0 - distance / self._reach[nearest], 0, 1))


@njit(cache=True)
def _light_near(image, xs, ys, disk, reach, here, near):  # type: ignore[no-untyped-def]
    ny, nx = image.shape
    radius = disk.shape[0] // 2
    for k in range(xs.size):
        best = -1e300
        for b in range(-reach, reach + 1):
            for a in range(-reach, reach + 1):
                y, x = ys[k] + b, xs[k] + a
                if y < 0 or x < 0 or y >= ny or x >= nx:
                    continue
                total = 0.0
                for j in range(-radius, radius + 1):
                    for i in range(-radius, radius + 1):
                        yy, xx = y + j, x + i
                        if not disk[j + radius, i + radius] or yy < 0 or xx < 0 or yy >= ny or xx >= nx:
                            continue
                        d = image[yy, xx]
                        if np.isfinite(d):
                            total += d
                best = max(best, total)
                if a == 0 and b == 0:
                    here[k] = total
        near[k] = best


def light_near(
    image: NDArray[np.float32], x: NDArray[np.intp], y: NDArray[np.intp], fwhm: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Flux in a disk of one FWHM at each pixel given, and the greatest such flux within 1.5 FWHM of it."""
    here, near = np.zeros(len(x)), np.zeros(len(x))
    radius = max(1, round(0.5 * fwhm))
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    _light_near(
        image, np.ascontiguousarray(x, np.int64), np.ascontiguousarray(y, np.int64), np.asarray(disk),
        max(1, round(1.5 * fwhm)), here, near,
    )  # fmt: skip
    return here, near
