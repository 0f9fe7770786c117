"""Image to image registration from star lists alone: no WCS is needed, so a wrong one does no harm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.core.errors import NoWorkFoundError
from cumbre.payloads.kernels.match import Affine, match_blind, match_images, nearest_pairs
from cumbre.payloads.kernels.warp import position_grid, warp

Float64 = NDArray[np.float64]
_SCALES = (1.0, 2.0, 0.5, 1.5, 1 / 1.5, 3.0, 1 / 3.0)


@dataclass(frozen=True, slots=True)
class Registration:
    """Where the pixels of one image lie in another.

    Attributes
    ----------
    coefficients
        (n_terms, 2): polynomial in scaled x, y that gives the other image's x and y.
    scale
        Pixels by which positions are divided before the polynomial.
    order
        Its degree (1 to 3).
    n_stars, rms
        Stars used and their root mean square distance afterwards, pixels of the other image.
    affine
        The linear part, as the star matching found it.
    """

    coefficients: Float64
    scale: float
    order: int
    n_stars: int
    rms: float
    affine: Affine

    def __call__(self, x: ArrayLike, y: ArrayLike) -> tuple[Float64, Float64]:
        """Positions in the other image."""
        u, v = np.asarray(x, float) / self.scale, np.asarray(y, float) / self.scale
        terms = _terms(u.ravel(), v.ravel(), self.order)
        out = terms @ self.coefficients
        return out[:, 0].reshape(u.shape), out[:, 1].reshape(u.shape)

    def largest_move(self, shape: tuple[int, int]) -> float:
        """Greatest distance, over a grid on an image of ``shape``, between a pixel and where it comes from."""
        x, y = np.meshgrid(np.linspace(0, shape[1] - 1, 9), np.linspace(0, shape[0] - 1, 9))
        px, py = self(x, y)
        return float(np.hypot(px - x, py - y).max())


def _terms(u: Float64, v: Float64, order: int) -> Float64:
    return np.stack([u ** (d - q) * v**q for d in range(order + 1) for q in range(d + 1)], axis=-1)


def register(
    x: ArrayLike,
    y: ArrayLike,
    x_other: ArrayLike,
    y_other: ArrayLike,
    *,
    tolerance: float = 3.0,
    name: str = "image",
) -> Registration:
    """Find the transform from one image's pixels to another's.

    Parameters
    ----------
    x, y
        Stars of the image whose grid is kept, brightest first.
    x_other, y_other
        Stars of the image to bring onto it, brightest first.
    tolerance
        Pixels within which stars agree before distortion is fitted.

    Raises
    ------
    NoWorkFoundError
        No common pattern of stars.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    xo, yo = np.asarray(x_other, float), np.asarray(y_other, float)
    # Among unrelated lists some transform always brings a few stars together.
    needed = max(4, round(3 + 0.12 * min(len(xs), len(xo), 200)))
    match = match_images(xs, ys, xo, yo, tolerance=tolerance)
    best = _accepted(xs, ys, xo, yo, match.transform if match else None, tolerance, needed)
    for scale in _SCALES:
        if best is not None:
            return best
        # Other cameras: pixels of another size. The first list is brought to about the other's scale.
        found = match_blind(
            xs * scale, ys * scale, xo, yo, tolerance=tolerance, scale_tolerance=0.25, n_bright_ref=80
        )
        if found is not None:
            linear = Affine(found.transform.matrix * scale, found.transform.offset)
            best = _accepted(xs, ys, xo, yo, linear, tolerance, needed)
    if best is not None:
        return best
    raise NoWorkFoundError(
        f"{name}: its {len(xo)} stars show no pattern in common with the {len(xs)} of the image to align to; "
        "do the two show the same field?"
    )


def _accepted(
    xs: Float64, ys: Float64, xo: Float64, yo: Float64, affine: Affine | None, tolerance: float, needed: int
) -> Registration | None:
    """The polished registration, or None when it unites too few stars."""
    if affine is None:
        return None
    try:
        result = _polish(xs, ys, xo, yo, affine, tolerance)
    except NoWorkFoundError:
        return None
    return result if result.n_stars >= needed else None


def _polish(
    xs: Float64, ys: Float64, xo: Float64, yo: Float64, affine: Affine, tolerance: float
) -> Registration:
    """Polynomial fit with clipping, its degree growing with the number of stars."""
    scale = float(max(np.abs(xs).max(), np.abs(ys).max(), 1.0))
    px, py = affine(xs, ys)
    radius = tolerance
    result = None
    for _ in range(4):
        first, second = nearest_pairs(px, py, xo, yo, radius)
        order = 3 if len(first) >= 80 else 2 if len(first) >= 25 else 1
        if len(first) < 3:
            break
        terms = _terms(xs[first] / scale, ys[first] / scale, order)
        target = np.stack([xo[second], yo[second]], axis=1)
        keep = np.ones(len(first), dtype=bool)
        coefficients = np.zeros((terms.shape[1], 2))
        distance = np.zeros(len(first))
        for _ in range(5):
            coefficients, *_ = np.linalg.lstsq(terms[keep], target[keep], rcond=None)
            distance = np.hypot(*(terms @ coefficients - target).T)
            better = distance < max(3.5 * float(np.median(distance[keep])), 0.02)
            if better.sum() < 2 * terms.shape[1] or (better == keep).all():
                break
            keep = better
        rms = float(np.sqrt(np.mean(distance[keep] ** 2)))
        result = Registration(coefficients, scale, order, int(keep.sum()), rms, affine)
        px, py = result(xs, ys)
        radius = float(np.clip(6 * rms, 0.7, tolerance))
    if result is None:
        raise NoWorkFoundError("registration lost its stars: fewer than three remain")
    return result


def resample(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    mask: NDArray[np.uint16],
    registration: Registration,
    shape: tuple[int, int],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint16]]:
    """Bring an image onto the grid of the image it was registered to; see :func:`warp.warp`."""
    return warp(image, variance, mask, position_grid(registration, shape), shape)
