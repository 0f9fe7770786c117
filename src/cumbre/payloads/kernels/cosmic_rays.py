"""Cosmic rays by Laplacian edge detection (van Dokkum 2001), with the medians only where they are needed.

On the twice subsampled image the Laplacian of a pixel is the mean of its four quarter pixels, each of which
sees only two foreign neighbours; that closed form replaces the subsampling. Medians, the expensive part,
are taken only at pixels whose Laplacian already stands out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cumbre.payloads.kernels.psf import PsfModel

FloatImage = NDArray[np.float32]


@njit(cache=True)
def _excess(image, j, i):  # type: ignore[no-untyped-def]
    """Laplacian times four: of the four quarters of a pixel, what is positive."""
    c = 2 * image[j, i]
    left, right = c - image[j, i - 1], c - image[j, i + 1]
    up, down = image[j + 1, i], image[j - 1, i]
    total = max(left - up, np.float32(0)) + max(left - down, np.float32(0))
    return total + max(right - up, np.float32(0)) + max(right - down, np.float32(0))


@njit(cache=True)
def _significance(image, variance, j, i):  # type: ignore[no-untyped-def]
    """Laplacian over twice the noise (the paper's S); zero in the outermost pixels."""
    if j < 1 or i < 1 or j >= image.shape[0] - 1 or i >= image.shape[1] - 1:
        return np.float32(0)
    return _excess(image, j, i) / (8 * np.sqrt(max(variance[j, i], np.float32(1e-6))))


@njit(cache=True)
def _middle(values, n):  # type: ignore[no-untyped-def]
    """Median of the first n values, which are put into another order."""
    low, high, k = 0, n - 1, n // 2
    while low < high:
        pivot = values[(low + high) // 2]
        a, b = low, high
        while a <= b:
            while values[a] < pivot:
                a += 1
            while values[b] > pivot:
                b -= 1
            if a <= b:
                values[a], values[b] = values[b], values[a]
                a += 1
                b -= 1
        if k <= b:
            high = b
        elif k >= a:
            low = a
        else:
            break
    if n % 2:
        return values[k]
    below = values[0]
    for m in range(1, k):
        below = max(below, values[m])
    return np.float32(0.5) * (below + values[k])


@njit(cache=True)
def _median_box(plane, y, x, half, buffer):  # type: ignore[no-untyped-def]
    n = 0
    for j in range(max(y - half, 0), min(y + half + 1, plane.shape[0])):
        for i in range(max(x - half, 0), min(x + half + 1, plane.shape[1])):
            buffer[n] = plane[j, i]
            n += 1
    return _middle(buffer, n)


@njit(cache=True)
def _fine_structure(image, y, x, buffer, small):  # type: ignore[no-untyped-def]
    """Median3 minus median7 of median3: what a star has and a cosmic ray has not."""
    n = 0
    for j in range(max(y - 3, 0), min(y + 4, image.shape[0])):
        for i in range(max(x - 3, 0), min(x + 4, image.shape[1])):
            buffer[n] = _median_box(image, j, i, 1, small)
            n += 1
    return _median_box(image, y, x, 1, small) - _middle(buffer, n)


@njit(cache=True)
def _is_hit(image, variance, j, i, s, limit, ratio, buffer, small):  # type: ignore[no-untyped-def]
    """Whether a pixel whose Laplacian reaches the limit stands out of its neighbours' and is no star."""
    n = 0
    for b in range(j - 2, j + 3):
        for a in range(i - 2, i + 3):
            small[n] = _significance(image, variance, b, a)
            n += 1
    if s - _middle(small, n) < limit:
        return False
    noise = np.sqrt(max(variance[j, i], np.float32(1e-6)))
    fine = max(_fine_structure(image, j, i, buffer, small), 0.01 * noise)
    return s * 2 * noise >= ratio * fine


@njit(cache=True)
def _find_first(image, variance, excluded, found, threshold, contrast):  # type: ignore[no-untyped-def]
    """Flag hits of the whole image; the number of them."""
    ny, nx = image.shape
    buffer, small = np.empty(49, np.float32), np.empty(25, np.float32)
    least = np.float32((8 * threshold) ** 2)
    added = 0
    for j in range(2, ny - 2):
        for i in range(2, nx - 2):
            # squares save the root of nearly every pixel
            excess = _excess(image, j, i)
            if excess * excess < least * max(variance[j, i], np.float32(1e-6)) or excluded[j, i]:
                continue
            s = _significance(image, variance, j, i)
            if s >= threshold and _is_hit(image, variance, j, i, s, threshold, contrast, buffer, small):
                found[j, i] = 1
                added += 1
    return added


@njit(cache=True)
def _find_again(image, variance, excluded, found, threshold, neighbour, contrast):  # type: ignore[no-untyped-def]
    """Flag more hits around those found, where cleaning changed the image; the number of them."""
    ny, nx = image.shape
    buffer, small = np.empty(49, np.float32), np.empty(25, np.float32)
    hits = np.argwhere(found > 0)
    seen = np.zeros(image.shape, np.bool_)
    added = 0
    for k in range(hits.shape[0]):
        for j in range(max(hits[k, 0] - 4, 2), min(hits[k, 0] + 5, ny - 2)):
            for i in range(max(hits[k, 1] - 4, 2), min(hits[k, 1] + 5, nx - 2)):
                if seen[j, i]:
                    continue
                seen[j, i] = True
                if found[j, i] or excluded[j, i]:
                    continue
                near = False
                for b in range(j - 1, j + 2):
                    for a in range(i - 1, i + 2):
                        near = near or found[b, a] > 0
                limit = neighbour if near else threshold
                s = _significance(image, variance, j, i)
                # beside a found pixel less is asked, but a star that was hit must not be eaten up
                ratio = 0.6 * contrast if near else contrast
                if s >= limit and _is_hit(image, variance, j, i, s, limit, ratio, buffer, small):
                    found[j, i] = 2
                    added += 1
    for k in range(hits.shape[0]):
        for j in range(max(hits[k, 0] - 4, 0), min(hits[k, 0] + 5, ny)):
            for i in range(max(hits[k, 1] - 4, 0), min(hits[k, 1] + 5, nx)):
                if found[j, i] == 2:
                    found[j, i] = 1
    return added


@njit(cache=True)
def _clean(image, found, excluded):  # type: ignore[no-untyped-def]
    buffer = np.empty(49, np.float32)
    hits = np.argwhere(found > 0)
    values = np.empty(hits.shape[0], np.float32)
    for k in range(hits.shape[0]):
        y, x = hits[k, 0], hits[k, 1]
        n = 0
        for half in (2, 3):
            n = 0
            for j in range(max(y - half, 0), min(y + half + 1, image.shape[0])):
                for i in range(max(x - half, 0), min(x + half + 1, image.shape[1])):
                    if not found[j, i] and not excluded[j, i]:
                        buffer[n] = image[j, i]
                        n += 1
            if n >= 5:
                break
        values[k] = _middle(buffer, n) if n else np.float32(0)
    for k in range(hits.shape[0]):
        image[hits[k, 0], hits[k, 1]] = values[k]


def star_contrast(fwhm_px: float) -> float:
    """Largest ratio of Laplacian to fine structure that a star of this width reaches, with 20 % to spare.

    It is computed on Gaussian stars centred at different places of the pixel; never below 4. Undersampled stars
    reach high values, so that only the sharpest cosmic rays can be told from them.
    """
    sigma = max(fwhm_px, 1.0) / 2.3548
    r = np.arange(-8, 9)
    noise = np.ones((17, 17), np.float32)
    buffer, small = np.empty(49, np.float32), np.empty(25, np.float32)
    worst = 0.0
    for dx in (0.0, 0.25, 0.5):
        for dy in (0.0, 0.25, 0.5):
            gx, gy = (np.exp(-0.5 * ((r - d) / sigma) ** 2) for d in (dx, dy))
            star = (1e4 * np.outer(gy, gx)).astype(np.float32)
            for y, x in ((8, 8), (8, 9), (9, 8), (9, 9)):
                fine = _fine_structure(star, y, x, buffer, small)
                if star[y, x] > 0.3 * star.max():
                    s = _significance(star, noise, y, x)
                    worst = max(worst, 2 * float(s) / max(float(fine), 1e-3))
    return float(max(4.0, 1.2 * worst))


def find_cosmic_rays(
    image: FloatImage,
    variance: FloatImage,
    excluded: NDArray[np.bool_] | None = None,
    *,
    threshold: float = 5.0,
    neighbour_threshold: float = 2.5,
    contrast: float = 4.0,
    rounds: int = 3,
) -> tuple[NDArray[np.bool_], FloatImage]:
    """Find and replace cosmic-ray pixels.

    Parameters
    ----------
    image, variance
        Background-subtracted, float32 (ny, nx).
    excluded
        Pixels that are not searched (saturated stars, defects).
    threshold
        Laplacian significance.
    neighbour_threshold
        Significance for pixels beside a found one.
    contrast
        Least ratio of Laplacian to fine structure; raise it for undersampled images.

    Returns
    -------
    found, cleaned
        bool (ny, nx), and a copy of the image with found pixels replaced by the median of good neighbours.
    """
    cleaned = np.array(image, np.float32, order="C")
    noise = np.ascontiguousarray(variance, np.float32)
    skip = np.zeros(image.shape, bool) if excluded is None else np.ascontiguousarray(excluded, bool)
    found = np.zeros(image.shape, np.uint8)
    _find_first(cleaned, noise, skip, found, threshold, contrast)
    for _ in range(rounds - 1):
        _clean(cleaned, found, skip)
        if _find_again(cleaned, noise, skip, found, threshold, neighbour_threshold, contrast) == 0:
            break
    _clean(cleaned, found, skip)
    return found > 0, cleaned


_SHIFTS = np.linspace(-0.6, 0.6, 7)
_PSF_CELL = 1024
"""Pixels over which the PSF changes by less than the fit tolerates."""


@njit(cache=True)
def _best_fit(image, variance, excluded, y, x, profiles, half, radius2, tolerance):  # type: ignore[no-untyped-def]
    """Least χ² of a PSF on a constant at one place, over the given profiles; its flux; the number of pixels."""
    ny, nx = image.shape
    best, best_flux, most = 1e30, 0.0, 0
    for k in range(profiles.shape[0]):
        s0, s1, s2, t0, t1 = 0.0, 0.0, 0.0, 0.0, 0.0
        n = 0
        for j in range(-half, half + 1):
            for i in range(-half, half + 1):
                yy, xx = y + j, x + i
                if j * j + i * i > radius2 or yy < 0 or xx < 0 or yy >= ny or xx >= nx or excluded[yy, xx]:
                    continue
                p, d = profiles[k, j + half, i + half], image[yy, xx]
                w = 1.0 / (variance[yy, xx] + (tolerance * d) ** 2)
                s0 += w
                s1 += w * p
                s2 += w * p * p
                t0 += w * d
                t1 += w * p * d
                n += 1
        det = s0 * s2 - s1 * s1
        if n < 6 or det <= 0:
            continue
        flux = (s0 * t1 - s1 * t0) / det
        level = (s2 * t0 - s1 * t1) / det
        total = 0.0
        for j in range(-half, half + 1):
            for i in range(-half, half + 1):
                yy, xx = y + j, x + i
                if j * j + i * i > radius2 or yy < 0 or xx < 0 or yy >= ny or xx >= nx or excluded[yy, xx]:
                    continue
                d = image[yy, xx]
                r = d - flux * profiles[k, j + half, i + half] - level
                total += r * r / (variance[yy, xx] + (tolerance * d) ** 2)
        if total < best:
            best, best_flux, most = total, flux, n
    return best, best_flux, most


@njit(cache=True)
def _hit_fit(image, variance, excluded, label, number, y, x, half, radius2, tolerance):  # type: ignore[no-untyped-def]
    """Least χ² of a constant outside the pixels of one group, which may have any values; their number."""
    ny, nx = image.shape
    chi2, level, inside = 0.0, 0.0, 0
    for again in range(2):
        weight, total = 0.0, 0.0
        inside, chi2 = 0, 0.0
        for j in range(-half, half + 1):
            for i in range(-half, half + 1):
                yy, xx = y + j, x + i
                if j * j + i * i > radius2 or yy < 0 or xx < 0 or yy >= ny or xx >= nx or excluded[yy, xx]:
                    continue
                if label[yy, xx] == number:
                    inside += 1
                    continue
                d = image[yy, xx]
                w = 1.0 / (variance[yy, xx] + (tolerance * d) ** 2)
                weight += w
                total += w * d
                if again == 1:
                    chi2 += w * (d - level) ** 2
        level = total / weight if weight > 0 else 0.0
    return chi2, inside


def point_sources_among(
    found: NDArray[np.bool_],
    image: FloatImage,
    variance: FloatImage,
    psf: PsfModel,
    excluded: NDArray[np.bool_] | None = None,
    *,
    largest: int = 9,
    tolerance: float = 0.06,
    limit: float = 2.0,
) -> NDArray[np.bool_]:
    """Pixels taken for cosmic rays that belong to point sources after all.

    The Laplacian knows no PSF: of a sharp image it takes stars in their brightest pixel. Each group of found pixels is
    fitted with the PSF (any place within the pixel, on a constant). It is a source where that fits, and better than
    a hit: free values in the found pixels and a constant around them.

    Parameters
    ----------
    found
        Result of :func:`find_cosmic_rays`.
    image, variance
        The image as it was before cleaning, background-subtracted; float32 (ny, nx).
    psf
        The image's PSF, measured without the found pixels.
    excluded
        Pixels to leave out of the fit.
    largest
        Groups of more pixels are no point sources; for a PSF of two pixels FWHM, more for wider ones.
    tolerance
        Fraction by which a star's pixels may differ from the model.
    limit
        Reduced χ² up to which it is a point source.

    Returns
    -------
    bool (ny, nx): the part of ``found`` to take back.
    """
    import cv2

    out = np.zeros(found.shape, bool)
    count, label, stats, _ = cv2.connectedComponentsWithStats(found.astype(np.uint8), connectivity=8)
    most = largest * max(1.0, psf.fwhm_px / 2.2) ** 2
    skip = np.zeros(found.shape, bool) if excluded is None else np.ascontiguousarray(excluded, bool)
    pixels = np.ascontiguousarray(image, np.float32)
    noise = np.ascontiguousarray(variance, np.float32)
    radius2 = int(np.ceil(1.3 * psf.fwhm_px + 0.5)) ** 2
    half = min(int(np.ceil(1.3 * psf.fwhm_px + 0.5)), psf.size // 2)
    cells: dict[tuple[int, int], NDArray[np.float64]] = {}
    for k in range(1, count):
        x0, y0, width, height, area = (int(v) for v in stats[k])
        if area > most:
            continue
        box = np.s_[y0 : y0 + height, x0 : x0 + width]
        values = np.where(label[box] == k, pixels[box], -np.inf)
        dy, dx = np.unravel_index(int(np.argmax(values)), values.shape)
        y, x = y0 + int(dy), x0 + int(dx)
        cell = x // _PSF_CELL, y // _PSF_CELL
        if cell not in cells:
            cx, cy = (
                (c * _PSF_CELL + min((c + 1) * _PSF_CELL, n)) / 2
                for c, n in zip(cell, found.shape[::-1], strict=True)
            )
            cells[cell] = _profiles(psf, cx, cy, half)
        chi2, flux, n = _best_fit(pixels, noise, skip, y, x, cells[cell], half, radius2, tolerance)
        if flux <= 0 or chi2 > limit * (n - 4):
            continue
        hit, inside = _hit_fit(pixels, noise, skip, label, k, y, x, half, radius2, tolerance)
        # Two per free parameter, and something against chance.
        if chi2 + 2 * 3 + 4 < hit + 2 * inside:
            out[box] |= label[box] == k
    return out


def _profiles(psf: PsfModel, x: float, y: float, half: int) -> NDArray[np.float64]:
    """The PSF of a place at a grid of positions within the pixel, (n, 2·half + 1, 2·half + 1)."""
    x, y = np.floor(x), np.floor(y)
    middle = psf.size // 2
    cut = np.s_[middle - half : middle + half + 1, middle - half : middle + half + 1]
    # The stamp of a star at (x + d) is centred on its nearest pixel: shifts beyond half a pixel are moved back.
    out = []
    for dy in _SHIFTS:
        for dx in _SHIFTS:
            stamp = psf.stamp(x + dx, y + dy)
            moved = (int(np.floor(dy + 0.5)), int(np.floor(dx + 0.5)))
            out.append(np.roll(stamp, moved, axis=(0, 1))[cut])
    return np.ascontiguousarray(out, np.float64)
