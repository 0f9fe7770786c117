"""Both sides of a proper subtraction: flux ratio, shift and noise from the images, then the filters of each cell.

What errors of the PSF models leave of stars is taken out afterwards by a matching kernel close to a point
(:mod:`cumbre.payloads.difference`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import NoWorkFoundError
from cumbre.payloads.kernels import zogy
from cumbre.payloads.kernels.convolve import convolve_field
from cumbre.payloads.kernels.detect import GridPsf
from cumbre.payloads.kernels.difference import reached
from cumbre.payloads.kernels.psf import PsfModel

FloatImage = NDArray[np.float32]
Floats = NDArray[np.float64]
MOST_FITTED, MIN_FITTED = 250, 3
LEAST_SNR = 15.0
PLANE_STARS, CURVED_STARS = 20, 60
"""Stars from which shift and flux ratio vary as planes, and the shift as a second-degree polynomial."""


@dataclass(frozen=True, slots=True)
class Relation:
    """How the template's stars lie to the science's.

    Attributes
    ----------
    ratio, dx, dy
        Polynomial coefficients of F and of the shift (pixels) in u, v over −1…1: 1, u, v, u², uv, v².
    sigma_px
        Scatter of the shift (x, y) beyond the noise of the stars' places.
    n
        Stars used.
    """

    ratio: Floats
    dx: Floats
    dy: Floats
    sigma_px: tuple[float, float]
    n: int
    shape: tuple[int, int]

    def at(self, x: float, y: float) -> tuple[float, tuple[float, float]]:
        """F and (dx, dy) at a place."""
        terms = _terms(np.array([x]), np.array([y]), self.shape)[0]
        ratio, dx, dy = (float(terms[: c.size] @ c) for c in (self.ratio, self.dx, self.dy))
        return ratio, (dx, dy)


@dataclass(slots=True)
class Filtered:
    """Both sides of the proper difference, which have one PSF and whose difference has white noise.

    Attributes
    ----------
    science, template
        ``k_n ⊗ N`` and ``k_r ⊗ R``, science units.
    science_variance, template_variance
        Their variances.
    science_bad, template_bad
        What bad pixels reach, and how far: (bool (ny, nx), pixels).
    """

    science: FloatImage
    template: FloatImage
    science_variance: FloatImage
    template_variance: FloatImage
    science_bad: tuple[NDArray[np.bool_], int]
    template_bad: tuple[NDArray[np.bool_], int]
    relation: Relation
    filters: zogy.FilterField

    def metrics(self) -> dict[str, float]:
        """Flux ratio and shift at the middle, half size of the filters, errors of the registration."""
        ny, nx = self.relation.shape
        ratio, shift = self.relation.at(nx / 2, ny / 2)
        return {
            "zogy_ratio": ratio, "zogy_stars": float(self.relation.n), "zogy_half_px": float(self.filters.half),
            "zogy_shift_x_px": shift[0], "zogy_shift_y_px": shift[1],
            "astrometric_noise_x_px": self.relation.sigma_px[0], "astrometric_noise_y_px": self.relation.sigma_px[1],
        }  # fmt: skip

    def score_noise(self, psf: GridPsf, part: float) -> FloatImage:
        """Variance of the score by what does not match, (ny, nx), for :func:`kernels.detect.significance`.

        Parameters
        ----------
        part
            Of a star's flux, that the subtraction leaves.
        """
        return zogy.mismatch_noise(self.template, psf, psf.half, self.relation.sigma_px, part)


def _terms(x: Floats, y: Floats, shape: tuple[int, int]) -> Floats:
    u, v = 2 * x / max(shape[1] - 1, 1) - 1, 2 * y / max(shape[0] - 1, 1) - 1
    return np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=1)


def _fit_star(
    image: FloatImage, bad: NDArray[np.bool_], variance: FloatImage, psf: PsfModel, x: float, y: float
) -> tuple[float, float, float, float] | None:
    """PSF fit of one star with flux, place and level: (flux, x, y, error of the place); None where it cannot be."""
    half = int(np.clip(np.ceil(1.3 * psf.fwhm_px), 3, psf.size // 2 - 1))
    ny, nx = image.shape
    start = x, y
    for _ in range(4):
        ix, iy = int(np.floor(x + 0.5)), int(np.floor(y + 0.5))
        if not (half + 1 <= ix < nx - half - 1 and half + 1 <= iy < ny - half - 1):
            return None
        box = np.s_[iy - half : iy + half + 1, ix - half : ix + half + 1]
        if bad[box].any():
            return None
        stamp = psf.stamp(x, y).astype(np.float64)
        slope_y, slope_x = (np.asarray(slope) for slope in np.gradient(stamp))
        middle = psf.size // 2
        cut = np.s_[middle - half : middle + half + 1, middle - half : middle + half + 1]
        design = np.stack(
            [stamp[cut].ravel(), -slope_x[cut].ravel(), -slope_y[cut].ravel(), np.ones((2 * half + 1) ** 2)], axis=1
        )  # fmt: skip
        found, *_ = np.linalg.lstsq(design, image[box].ravel().astype(np.float64), rcond=None)
        if not found[0] > 0:
            return None
        move = np.clip(found[1:3] / found[0], -1.0, 1.0)
        x, y = x + float(move[0]), y + float(move[1])
        if np.hypot(x - start[0], y - start[1]) > 3.0:
            return None
        if np.abs(move).max() < 0.002:
            break
    inverse = np.linalg.inv(design.T @ design)
    weighted = design * variance[box].ravel().astype(np.float64)[:, None]
    spread = inverse @ (design.T @ weighted) @ inverse
    return float(found[0]), x, y, float(np.sqrt(max(spread[1, 1] + spread[2, 2], 0) / 2) / found[0])


def relate(
    images: tuple[FloatImage, FloatImage],
    variances: tuple[FloatImage, FloatImage],
    bad: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    psfs: tuple[PsfModel, PsfModel],
    x: Floats,
    y: Floats,
) -> Relation:
    """Flux ratio and shift of the template against the science image, of stars that both have, brightest first.

    Raises
    ------
    NoWorkFoundError
        Fewer than ``MIN_FITTED`` stars could be fitted.
    """
    rows = []
    for px, py in zip(x[: 2 * MOST_FITTED].tolist(), y[: 2 * MOST_FITTED].tolist(), strict=True):
        fits = [
            _fit_star(image, hidden, variance, psf, px, py)
            for image, variance, hidden, psf in zip(images, variances, bad, psfs, strict=True)
        ]
        if fits[0] is None or fits[1] is None:
            continue
        one, two = fits[0], fits[1]
        # the filters know stamps of sum one
        ratio = two[0] * psfs[1].total / (one[0] * psfs[0].total)
        rows.append((one[1], one[2], ratio, two[1] - one[1], two[2] - one[2], np.hypot(one[3], two[3])))
        if len(rows) == MOST_FITTED:
            break
    if len(rows) < MIN_FITTED:
        raise NoWorkFoundError(
            f"zogy: {len(rows)} stars could be fitted in both images; at least {MIN_FITTED} are needed"
        )
    table = np.array(rows)
    shape = (images[0].shape[0], images[0].shape[1])
    terms, noise = _terms(table[:, 0], table[:, 1], shape), table[:, 5]
    n = len(rows)
    degree = 1 if n < PLANE_STARS else 3 if n < CURVED_STARS else 6
    flux, _ = _robust(terms[:, : min(degree, 3)], table[:, 2], noise)
    dx, left_x = _robust(terms[:, :degree], table[:, 3], noise)
    dy, left_y = _robust(terms[:, :degree], table[:, 4], noise)
    sigma = tuple(_beyond(left, noise) for left in (left_x, left_y))
    return Relation(flux, dx, dy, (sigma[0], sigma[1]), n, shape)


def _robust(terms: Floats, values: Floats, noise: Floats) -> tuple[Floats, Floats]:
    """Least squares with Huber weights: coefficients and residuals. Bright stars count most, but not alone."""
    floor = float(np.median(noise))
    base = 1 / np.sqrt(noise**2 + floor**2)
    left = values - np.median(values)
    solution = np.zeros(terms.shape[1])
    for _ in range(15):
        sigma = max(1.4826 * float(np.median(np.abs(left))), 1e-6)
        weight = base * np.sqrt(np.minimum(1, 1.5 * sigma / np.maximum(np.abs(left), 1e-12)))
        weight = np.where(np.abs(left) > 6 * sigma, 0, weight)
        solution, *_ = np.linalg.lstsq(terms * weight[:, None], values * weight, rcond=None)
        left = values - terms @ solution
    return np.asarray(solution), np.asarray(left)


def _beyond(left: Floats, noise: Floats) -> float:
    """Robust scatter of residuals beyond their noise, of the better measured half."""
    better = noise <= np.median(noise)
    square = (1.4826 * float(np.median(np.abs(left[better])))) ** 2 - float(np.median(noise[better] ** 2))
    return float(np.sqrt(max(square, 0.0)))


class _Cells:
    """:class:`kernels.zogy.Cell` of a place: PSFs, relation, and the median variance around it."""

    def __init__(
        self,
        variances: tuple[FloatImage, FloatImage],
        bad: tuple[NDArray[np.bool_], NDArray[np.bool_]],
        psfs: tuple[PsfModel, PsfModel],
        relation: Relation,
    ) -> None:
        self._variances, self._bad, self._psfs, self._relation = variances, bad, psfs, relation
        self._usual = [_typical(v[::5, ::5], b[::5, ::5], 1.0) for v, b in zip(variances, bad, strict=True)]

    def __call__(self, x: float, y: float) -> zogy.Cell:
        half = zogy.CELL // 2
        box = np.s_[
            max(int(y) - half, 0) : int(y) + half + 1 : 3, max(int(x) - half, 0) : int(x) + half + 1 : 3
        ]
        noise = [
            _typical(v[box], b[box], usual)
            for v, b, usual in zip(self._variances, self._bad, self._usual, strict=True)
        ]
        ratio, shift = self._relation.at(x, y)
        science, template = (psf.centred(x, y) for psf in self._psfs)
        return zogy.Cell(science, template, noise[0], noise[1], ratio, shift)


def _typical(variance: FloatImage, bad: NDArray[np.bool_], usual: float) -> float:
    good = variance[~bad]
    return float(np.median(good)) if good.size >= 50 else usual


def filter_both(
    images: tuple[FloatImage, FloatImage],
    variances: tuple[FloatImage, FloatImage],
    bad: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    psfs: tuple[PsfModel, PsfModel],
    x: Floats,
    y: Floats,
) -> Filtered:
    """Filter (science, template), finite everywhere, for their proper difference.

    Parameters
    ----------
    x, y
        Stars that both images have, brightest first.

    Raises
    ------
    NoWorkFoundError
        Too few stars.
    """
    relation = relate(images, variances, bad, psfs, x, y)
    filters = zogy.FilterField(_Cells(variances, bad, psfs, relation), relation.shape)
    middle = filters(relation.shape[1] / 2, relation.shape[0] / 2)
    fields = filters.science, filters.template
    science, template = (convolve_field(images[k], fields[k], filters.half) for k in (0, 1))
    noise_n, noise_r = (zogy.filtered_variance(variances[k], middle[k]) for k in (0, 1))
    reach_n, reach_r = (reached(bad[k], middle[k]) for k in (0, 1))
    return Filtered(science, template, noise_n, noise_r, reach_n, reach_r, relation, filters)
