"""Point spread function in a pixel basis: each pixel of the stamp is a polynomial of the position.

Stars are shifted to a pixel centre with quintic splines, divided by their flux and fitted pixel by pixel; stars that
differ from the model (galaxies, blends, cosmic rays) are left out and the fit repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from cumbre.core.errors import UnprocessableDataError
from cumbre.payloads.kernels.shift import move, spline_coefficients

FloatImage = NDArray[np.float32]
Floats = NDArray[np.float64]

STARS_FOR_ORDER = (1, 12, 40)
"""Least number of stars for a PSF that is constant, linear, quadratic in position."""


@njit(cache=True)
def psf_at(spline, sums, u, v, dx, dy, moved, rows, out):  # type: ignore[no-untyped-def]
    """Write the polynomial PSF at normalised (u, v), moved by (dx, dy), to ``out``; its sum before moving is one.

    ``spline`` holds the terms' spline coefficients, ``sums`` the terms' sums; ``moved`` and ``rows`` are scratch.
    """
    terms, n = spline.shape[0], spline.shape[1]
    factor = np.array([1.0, u, v, u * u, u * v, v * v])
    total = 0.0
    for k in range(terms):
        total += factor[k] * sums[k]
    for j in range(n):
        for i in range(n):
            value = 0.0
            for k in range(terms):
                value += factor[k] * spline[k, j, i]
            moved[j, i] = value / total
    move(moved, dx, dy, rows, out)


def fwhm_of(stamp: NDArray[np.floating]) -> float:
    """Full width at half maximum in pixels, from the area above half of the peak.

    The peak is that of a parabola through the centre, so that an undersampled PSF is not too wide.
    """
    n = stamp.shape[0]
    c = n // 2
    row, column = stamp[c, c - 1 : c + 2].astype(float), stamp[c - 1 : c + 2, c].astype(float)
    peak = float(stamp[c, c])
    for a, b, d in (row, column):
        curve = a - 2 * b + d
        if curve < 0:
            peak += min((a - d) ** 2 / (-8 * curve), 0.2 * b)
    # sample finely: the area above half, counted in whole pixels, would be too coarse
    from scipy.ndimage import zoom

    fine = 8
    size = min(c, 20)
    core = stamp[c - size : c + size + 1, c - size : c + size + 1].astype(float)
    big = zoom(core, fine, order=3, grid_mode=True, mode="nearest")
    area = np.count_nonzero(big > max(peak, float(big.max())) / 2) / fine**2
    return float(2 * np.sqrt(area / np.pi))


@dataclass(frozen=True, slots=True)
class PsfModel:
    """A PSF that varies over the detector.

    Attributes
    ----------
    coefficients
        float32 of shape (terms, n, n); terms 1, 3 or 6: 1, u, v, u², uv, v² with u, v in −1…1.
    shape
        (ny, nx) of the image that it describes; gives u and v their scale.
    fwhm_px
        Full width at half maximum at the image's centre.
    n_stars
        Stars used.
    residual
        rms of (star − model) over the core in units of the peak, the noise of the pixels included.
    total
        Light of a star in its stamp: less than one where the stamp leaves wings out that count for its flux.
    spline, sums
        Spline coefficients and sums of the terms, divided by ``total``; made here.
    """

    coefficients: FloatImage
    shape: tuple[int, int]
    fwhm_px: float
    n_stars: int = 0
    residual: float = 0.0
    total: float = 1.0
    spline: Floats = field(init=False, repr=False, compare=False)
    sums: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spline", spline_coefficients(self.coefficients))
        sums = self.coefficients.sum(axis=(1, 2), dtype=np.float64) / self.total
        object.__setattr__(self, "sums", sums)

    @property
    def size(self) -> int:
        """Side of the stamps in pixels (odd)."""
        return int(self.coefficients.shape[1])

    @property
    def order(self) -> int:
        """Degree of the variation with position."""
        return {1: 0, 3: 1, 6: 2}[self.coefficients.shape[0]]

    def _uv(self, x: float, y: float) -> tuple[float, float]:
        ny, nx = self.shape
        u, v = 2 * x / max(nx - 1, 1) - 1, 2 * y / max(ny - 1, 1) - 1
        return min(max(u, -1.1), 1.1), min(max(v, -1.1), 1.1)

    def stamp(self, x: float, y: float) -> FloatImage:
        """PSF of a star at (x, y): float32 (n, n), sum ``total``.

        The middle pixel of the stamp is the pixel (round(x), round(y)); the star's centre lies off it by the
        fraction, as it does in the image.
        """
        return self._moved(x, y, float(x - math.floor(x + 0.5)), float(y - math.floor(y + 0.5)))

    def centred(self, x: float, y: float) -> FloatImage:
        """PSF near (x, y), centred on the middle pixel: float32 (n, n), sum ``total``."""
        return self._moved(x, y, 0.0, 0.0)

    def _moved(self, x: float, y: float, dx: float, dy: float) -> FloatImage:
        u, v = self._uv(x, y)
        filtered, rows, out = np.empty((3, self.size, self.size))
        psf_at(self.spline, self.sums, u, v, dx, dy, filtered, rows, out)
        return out.astype(np.float32)

    def effective_area(self, x: float, y: float) -> float:
        """Pixels of noise in a PSF flux: 1 / Σ P²."""
        return float(1 / np.sum(self.centred(x, y).astype(float) ** 2))


def normalised(x: ArrayLike, y: ArrayLike, shape: tuple[int, int]) -> tuple[Floats, Floats]:
    """Positions in −1…1 over an image of ``shape`` (ny, nx)."""
    ny, nx = shape
    u = 2 * np.asarray(x, np.float64) / max(nx - 1, 1) - 1
    v = 2 * np.asarray(y, np.float64) / max(ny - 1, 1) - 1
    return u, v


def gaussian_psf(fwhm_px: float, shape: tuple[int, int], size: int | None = None) -> PsfModel:
    """A constant Gaussian PSF, for images without stars to measure one."""
    n = size or stamp_size(fwhm_px)
    r = np.arange(n) - n // 2
    g = np.exp(-0.5 * (r / (fwhm_px / 2.3548)) ** 2)
    stamp = np.outer(g, g)
    return PsfModel((stamp / stamp.sum())[None].astype(np.float32), shape, fwhm_px)


def stamp_size(fwhm_px: float) -> int:
    """Odd side of a stamp that holds the PSF: six FWHM, 15 to 41 pixels."""
    return int(np.clip(2 * int(np.ceil(3 * fwhm_px)) + 1, 15, 41))


def select_psf_stars(
    x: ArrayLike,
    y: ArrayLike,
    flux: ArrayLike,
    snr: ArrayLike,
    half_light_px: ArrayLike,
    elongation: ArrayLike,
    *,
    usable: ArrayLike | None = None,
    shape: tuple[int, int],
    min_snr: float = 30.0,
    max_stars: int = 250,
) -> NDArray[np.int64]:
    """Choose isolated point sources of one size.

    Parameters
    ----------
    x, y, flux, snr, half_light_px, elongation
        Detections, shape (n,); ``elongation`` is a/b, ``half_light_px`` the radius of half the light.
    usable
        bool: False for blended, saturated, masked detections.
    shape
        (ny, nx) of the image.

    Returns
    -------
    int64
        Indices, brightest first; empty when nothing qualifies.
    """
    xs, ys, f = np.asarray(x, float), np.asarray(y, float), np.asarray(flux, float)
    sn, size, long = np.asarray(snr, float), np.asarray(half_light_px, float), np.asarray(elongation, float)
    good = np.isfinite(size) & (size > 0.4) & (sn > min_snr) & (long < 2.5) & (f > 0)
    if usable is not None:
        good &= np.asarray(usable, bool)
    if good.sum() < 3:
        good = np.isfinite(size) & (size > 0.4) & (sn > 10) & (f > 0)
        if usable is not None:
            good &= np.asarray(usable, bool)
    if not good.any():
        return np.zeros(0, np.int64)
    # the stellar locus is the smallest common size: the densest point among the smaller ones
    sizes = np.sort(size[good])
    width = min(max(2, sizes.size // 3), sizes.size)
    spread = sizes[width - 1 :] - sizes[: sizes.size - width + 1]
    start = int(np.argmin(spread / np.maximum(sizes[: spread.size], 0.5)))
    locus = float(np.median(sizes[start : start + width]))
    good &= np.abs(size - locus) < max(0.15 * locus, 0.12)
    good &= long < 1.25 * float(np.median(long[good])) if good.any() else good
    reach = 6 * locus
    edge = reach / 1.5
    good &= (xs > edge) & (ys > edge) & (xs < shape[1] - 1 - edge) & (ys < shape[0] - 1 - edge)
    chosen = np.flatnonzero(good)
    chosen = chosen[np.argsort(-f[chosen], kind="stable")]
    if chosen.size == 0:
        return chosen.astype(np.int64)
    lonely = _isolated(xs, ys, f, chosen, reach)
    picked = chosen[lonely] if lonely.sum() >= 3 else chosen
    return picked[:max_stars].astype(np.int64)


def _isolated(
    xs: Floats, ys: Floats, flux: Floats, chosen: NDArray[np.intp], reach: float
) -> NDArray[np.bool_]:
    from scipy.spatial import cKDTree

    tree = cKDTree(np.stack([xs, ys], axis=1))
    lonely = np.ones(chosen.size, bool)
    for k, near in enumerate(tree.query_ball_point(np.stack([xs[chosen], ys[chosen]], axis=1), reach)):
        me = chosen[k]
        for other in near:
            if other != me and flux[other] > 0.03 * flux[me]:
                lonely[k] = False
                break
    return lonely


@njit(cache=True)
def _cut(image, mask, bad_bits, x, y, n):  # type: ignore[no-untyped-def]
    """Stamps of n + 6 pixels around the pixels of (x, y) without the level around the star; and whether they are good."""
    count, half = x.size, n // 2
    big = n + 6
    reach = big // 2
    stamps = np.zeros((count, big, big))
    good = np.zeros(count, np.bool_)
    for k in range(count):
        ix, iy = int(np.floor(x[k] + 0.5)), int(np.floor(y[k] + 0.5))
        if ix < reach or iy < reach or ix >= image.shape[1] - reach or iy >= image.shape[0] - reach:
            continue
        good[k] = True
        for j in range(-half, half + 1):
            for i in range(-half, half + 1):
                if mask[iy + j, ix + i] & bad_bits:
                    good[k] = False
        if not good[k]:
            continue
        box = image[iy - reach : iy + reach + 1, ix - reach : ix + reach + 1]
        # ring outside the star: what the background model left
        ring = np.empty(4 * n, np.float32)
        m = 0
        for i in range(n):
            ring[m], ring[m + 1] = box[3, 3 + i], box[big - 4, 3 + i]
            ring[m + 2], ring[m + 3] = box[3 + i, 3], box[3 + i, big - 4]
            m += 4
        stamps[k] = box - np.median(ring)
    return stamps, good


@njit(cache=True)
def _centre(spline, x, y):  # type: ignore[no-untyped-def]
    """Stamps moved so that (x, y) lies in the middle of their middle pixel, without their outer three pixels, sum one.

    Returns
    -------
    The stamps and their sums; a sum that is not positive marks a stamp that is no star's.
    """
    count, big = spline.shape[0], spline.shape[1]
    out, flux = np.zeros((count, big - 6, big - 6), np.float32), np.zeros(count)
    rows, moved = np.empty((big, big)), np.empty((big, big))
    for k in range(count):
        move(spline[k], np.floor(x[k] + 0.5) - x[k], np.floor(y[k] + 0.5) - y[k], rows, moved)
        total = moved[3:-3, 3:-3].sum()
        if total > 0 and np.isfinite(total):
            flux[k] = total
            out[k] = moved[3:-3, 3:-3] / total
    return out, flux


@njit(cache=True)
def windowed_centroid(image, x, y, sigma, rounds):  # type: ignore[no-untyped-def]
    """Centroids with a Gaussian window, iterated (as SExtractor's XWIN); unchanged where they diverge."""
    out_x, out_y = x.copy(), y.copy()
    radius = int(np.ceil(4 * sigma))
    wx, wy = np.empty(2 * radius + 1), np.empty(2 * radius + 1)
    for k in range(x.size):
        cx, cy = x[k], y[k]
        fine = True
        for _ in range(rounds):
            ix, iy = int(np.floor(cx + 0.5)), int(np.floor(cy + 0.5))
            if ix < radius or iy < radius or ix >= image.shape[1] - radius or iy >= image.shape[0] - radius:
                fine = False
                break
            total, sx, sy = 0.0, 0.0, 0.0
            for i in range(2 * radius + 1):
                dx, dy = ix + i - radius - cx, iy + i - radius - cy
                wx[i], wy[i] = np.exp(-dx * dx / (2 * sigma * sigma)), np.exp(-dy * dy / (2 * sigma * sigma))
            for j in range(2 * radius + 1):
                row, row_x = 0.0, 0.0
                for i in range(2 * radius + 1):
                    w = wx[i] * image[iy + j - radius, ix + i - radius]
                    row += w
                    row_x += w * (ix + i - radius - cx)
                total += wy[j] * row
                sx += wy[j] * row_x
                sy += wy[j] * row * (iy + j - radius - cy)
            if total <= 0:
                fine = False
                break
            mx, my = 2 * sx / total, 2 * sy / total
            cx += mx
            cy += my
            if abs(cx - x[k]) > 2 or abs(cy - y[k]) > 2:
                fine = False
                break
            if mx * mx + my * my < 1e-8:
                break
        if fine:
            out_x[k], out_y[k] = cx, cy
    return out_x, out_y


def _basis(u: Floats, v: Floats, order: int) -> Floats:
    columns = [np.ones_like(u)]
    if order >= 1:
        columns += [u, v]
    if order >= 2:
        columns += [u * u, u * v, v * v]
    return np.stack(columns, axis=1)


def fit_psf(
    image: FloatImage,
    mask: NDArray[np.uint16],
    x: ArrayLike,
    y: ArrayLike,
    *,
    bad_bits: int,
    fwhm_px: float = 3.0,
    size: int | None = None,
    max_order: int = 2,
    noise: float = 0.0,
) -> PsfModel:
    """Fit a PSF to stars.

    Parameters
    ----------
    image
        Background-subtracted, float32 (ny, nx).
    mask
        uint16 (ny, nx); a star with a ``bad_bits`` pixel in its stamp is not used.
    x, y
        Positions of the stars, shape (n,); refined here.
    fwhm_px
        First guess; gives the stamp's size.
    noise
        Background noise per pixel (the image's unit), for the weights.

    Raises
    ------
    UnprocessableDataError
        No star could be used.
    """
    n = size or stamp_size(fwhm_px)
    xs, ys = np.ascontiguousarray(x, np.float64), np.ascontiguousarray(y, np.float64)
    pixels = np.ascontiguousarray(image, np.float32)
    xs, ys = windowed_centroid(pixels, xs, ys, max(fwhm_px, 1.5) / 2.3548, 8)
    boxes, good = _cut(pixels, mask, np.uint16(bad_bits), xs, ys, n)
    xs, ys = xs[good], ys[good]
    stamps, flux = _centre(spline_coefficients(boxes[good]), xs, ys)
    good = flux > 0
    if not good.any():
        raise UnprocessableDataError(f"PSF: none of {np.size(x)} stars has a clean stamp of {n} x {n} pixels")
    stamps, flux = stamps[good], flux[good]
    u, v = normalised(xs[good], ys[good], (image.shape[0], image.shape[1]))
    # relative error of a normalised pixel: sky noise plus 1 % of model error keeps bright stars from ruling
    weight = 1.0 / ((noise / flux) ** 2 * n * n + 1e-2**2)
    used = _same_shape(stamps, np.ones(flux.size, bool))
    order = 0
    coefficients = stamps[used].mean(axis=0, keepdims=True)
    rms = np.zeros(flux.size)
    for _ in range(4):
        order = _best_order(stamps[used], u[used], v[used], weight[used], max_order)
        basis = _basis(u, v, order)
        coefficients, _ = _fit_terms(stamps[used], basis[used], weight[used])
        model = np.tensordot(basis, coefficients, axes=1)
        core = slice(n // 2 - min(6, n // 2), n // 2 + min(6, n // 2) + 1)
        rms = np.sqrt(np.mean((stamps - model)[:, core, core] ** 2, axis=(1, 2))) / model.max(axis=(1, 2))
        expected = np.sqrt((noise / flux / model.max(axis=(1, 2))) ** 2 + 0.003**2)
        ratio = rms / expected
        limit = np.median(ratio[used]) + 4 * 1.4826 * np.median(np.abs(ratio[used] - np.median(ratio[used])))
        keep = ratio <= max(limit, 1.3 * float(np.median(ratio[used])))
        if keep.sum() < 1 or np.array_equal(keep, used):
            break
        used = keep
    result = np.ascontiguousarray(_tapered(coefficients), np.float32)
    shape = (image.shape[0], image.shape[1])
    model_psf = PsfModel(result, shape, 0.0)
    middle = model_psf.centred((shape[1] - 1) / 2, (shape[0] - 1) / 2)
    return PsfModel(result, shape, fwhm_of(middle), int(used.sum()), float(np.median(rms[used])))


def _fit_terms(stamps: FloatImage, basis: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """Weighted least squares of every pixel; the terms (m, n, n), and how much each star determines its own fit."""
    root = np.sqrt(weight)[:, None]
    inverse = np.linalg.pinv(basis * root)
    n = stamps.shape[1]
    terms = inverse @ (stamps.reshape(len(stamps), -1) * root)
    own = np.einsum("ij,ji->i", basis * root, inverse)
    return terms.reshape(-1, n, n), own


def _best_order(stamps: FloatImage, u: Floats, v: Floats, weight: Floats, max_order: int) -> int:
    """The degree that predicts each star best from the others: a few stars do not tell how a PSF varies."""
    c, best, least = stamps.shape[1] // 2, 0, np.inf
    core = stamps[:, c - min(c, 5) : c + min(c, 5) + 1, c - min(c, 5) : c + min(c, 5) + 1]
    for order in range(max_order + 1):
        if len(stamps) < STARS_FOR_ORDER[order]:
            break
        basis = _basis(u, v, order)
        terms, own = _fit_terms(core, basis, weight)
        miss = np.sum((core - np.tensordot(basis, terms, axes=1)) ** 2, axis=(1, 2))
        loss = float(np.sum(weight * miss / np.maximum(1 - own, 0.05) ** 2))
        if loss < 0.98 * least:
            best, least = order, loss
    return best


def _same_shape(stamps: FloatImage, used: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """First rejection, against the median stamp: blends and galaxies differ in the core."""
    if stamps.shape[0] < 4:
        return used
    c = stamps.shape[1] // 2
    core = stamps[:, c - 4 : c + 5, c - 4 : c + 5]
    middle = np.median(core, axis=0)
    distance = np.sqrt(np.mean((core - middle) ** 2, axis=(1, 2)))
    return used & (distance < 3 * max(float(np.median(distance)), 1e-6))


def _tapered(coefficients: Floats) -> Floats:
    """Fade the outermost pixels to zero, so that a shifted stamp has no step at its edge."""
    n = coefficients.shape[1]
    r = np.hypot(*np.meshgrid(np.arange(n) - n // 2, np.arange(n) - n // 2))
    fade = np.clip((n / 2 + 0.5 - r) / 3.0, 0, 1)
    return np.asarray(coefficients * fade, np.float64)
