"""Bring several exposures onto one grid by their stars and average them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import CumbreError, NoWorkFoundError, UnprocessableDataError
from cumbre.payloads.difference import Stars, common_stars, find_stars
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels.align import Registration, register, resample
from cumbre.payloads.kernels.match import Affine
from cumbre.payloads.kernels.wcs import PlaneWcs, fit_wcs
from cumbre.payloads.processing import sky_of

logger = logging.getLogger(__name__)
STILL = 0.35
"""Pixels of misalignment that are left to the matching kernel instead of resampling."""


def align_to(
    fixed: Exposure, moving: Exposure, *, stars: Stars | None = None, name: str = "reference"
) -> Exposure:
    """An exposure resampled onto another's grid.

    Parameters
    ----------
    fixed
        Its pixel grid is kept.
    moving
        Any size, shift, rotation, roughly known scale; its WCS is used only when the stars do not suffice.

    Returns
    -------
    Exposure
        Of ``fixed.shape``; ``metrics`` has register_rms_px, register_stars, register_move_px,
        register_rotation_deg, register_scale. Without resampling when the stars are within 0.35 pixel already.

    Raises
    ------
    NoWorkFoundError
        No common stars and no WCS that overlap.
    """
    stars = stars or find_stars(fixed)
    other = find_stars(moving)
    numbers: dict[str, float] = {"register_move_px": 0.0, "register_rotation_deg": 0.0, "register_scale": 1.0}
    registration: Registration | None = None
    if fixed.shape == moving.shape and _is_still(stars, other):
        image, variance, mask = moving.image, moving.variance, moving.mask
    else:
        registration = _registration(fixed, moving, stars, other, name)
        numbers = {
            "register_rms_px": registration.rms,
            "register_stars": float(registration.n_stars),
            "register_move_px": registration.largest_move(fixed.shape),
            "register_rotation_deg": registration.affine.rotation_deg,
            "register_scale": registration.affine.scale,
        }
        image, variance, mask = resample(
            moving.image, moving.variance, moving.mask, registration, fixed.shape
        )
    if (mask & MaskPlane.NO_DATA == 0).mean() < 0.02:
        raise NoWorkFoundError(f"{name} does not overlap the image it was aligned to")
    result = Exposure(
        image=image, variance=variance, mask=mask, is_background_subtracted=True, zero_point=moving.zero_point,
        metadata=dict(moving.metadata), metrics={**moving.metrics, **numbers},
    )  # fmt: skip
    if fixed.wcs is not None:
        result.wcs = fixed.wcs
    else:
        result.wcs = moving.wcs if registration is None else _carried_wcs(fixed, moving, registration)
    return result


def _registration(fixed: Exposure, moving: Exposure, stars: Stars, other: Stars, name: str) -> Registration:
    """By the stars, or, when they do not suffice, by the WCS of both headers."""
    try:
        return register(stars.x, stars.y, other.x, other.y, name=name)
    except NoWorkFoundError as error:
        found = _by_wcs(fixed, moving)
        if found is None:
            raise
        logger.warning("%s; aligned by the WCS of the headers instead", error)
        return found


def _is_still(stars: Stars, other: Stars) -> bool:
    """Whether the stars lie at the same pixels already; few stars extrapolate badly to the corners."""
    from scipy.spatial import cKDTree

    if len(stars) < 3 or len(other) < 3:
        return False
    tree = cKDTree(np.stack([other.x, other.y], 1))
    distance, _ = tree.query(np.stack([stars.x, stars.y], 1), distance_upper_bound=3.0)
    near = distance[np.isfinite(distance)]
    if len(near) < max(3, 0.3 * min(len(stars), len(other))):
        return False
    return bool(np.median(near) < STILL and np.percentile(near, 80) < 2.5 * STILL)


def _by_wcs(fixed: Exposure, moving: Exposure) -> Registration | None:
    """A registration from both headers, or None when one is missing or they do not overlap."""
    if fixed.wcs is None or moving.wcs is None:
        return None
    x, y = (
        v.ravel()
        for v in np.meshgrid(np.linspace(0, fixed.shape[1] - 1, 8), np.linspace(0, fixed.shape[0] - 1, 8))
    )
    ra, dec = sky_of(fixed.wcs, x, y)
    try:
        if hasattr(moving.wcs, "sky2pix"):
            px, py = moving.wcs.sky2pix(ra, dec)
        else:
            px, py = moving.wcs.all_world2pix(ra, dec, 0, quiet=True)
    except ValueError:
        return None
    inside = (px > 0) & (py > 0) & (px < moving.shape[1]) & (py < moving.shape[0])
    if not np.isfinite(px + py).all() or inside.mean() < 0.1:
        return None
    scale = float(max(fixed.shape))
    u, v = x / scale, y / scale
    terms = np.stack([u ** (d - q) * v**q for d in range(3) for q in range(d + 1)], axis=-1)
    coefficients, *_ = np.linalg.lstsq(terms, np.stack([px, py], axis=1), rcond=None)
    matrix = (coefficients[1:3] / scale).T
    return Registration(coefficients, scale, 2, 0, float("nan"), Affine(matrix, coefficients[0]))


def _carried_wcs(fixed: Exposure, moving: Exposure, registration: Registration) -> PlaneWcs | None:
    """The moving image's WCS expressed in the fixed image's pixels."""
    if moving.wcs is None:
        return None
    ny, nx = fixed.shape
    x, y = (v.ravel() for v in np.meshgrid(np.linspace(0, nx - 1, 15), np.linspace(0, ny - 1, 15)))
    ra, dec = sky_of(moving.wcs, *registration(x, y))
    if not np.isfinite(ra + dec).all():
        return None
    try:
        return fit_wcs(x, y, ra, dec, crpix=((nx - 1) / 2, (ny - 1) / 2), order=3).wcs
    except CumbreError as error:
        logger.warning("the reference's WCS could not be carried over: %s", error)
        return None


def stack(exposures: Sequence[Exposure], names: Sequence[str], *, clip: float = 4.0) -> Exposure:
    """Register exposures on the first one, scale them to its flux, and average with clipping.

    An exposure that cannot be registered is left out with a warning.

    Parameters
    ----------
    exposures
        Background-subtracted, any pixel grids.
    clip
        Sigma from the median beyond which a pixel is left out (from three exposures on).

    Raises
    ------
    UnprocessableDataError
        No exposure given.
    """
    if not exposures:
        raise UnprocessableDataError("stack: no exposure")
    first = exposures[0]
    if len(exposures) == 1:
        return first
    stars = find_stars(first)
    aligned = [first]
    for exposure, name in zip(exposures[1:], names[1:], strict=True):
        try:
            moved = align_to(first, exposure, stars=stars, name=name)
        except NoWorkFoundError as error:
            logger.warning("left out of the stack: %s", error)
            continue
        factor = _flux_ratio(stars, moved)
        moved.image = (moved.image * np.float32(factor)).astype(np.float32)
        moved.variance = (moved.variance * np.float32(factor**2)).astype(np.float32)
        aligned.append(moved)
    image, variance, mask = _mean(aligned, clip)
    result = Exposure(
        image=image, variance=variance, mask=mask, wcs=first.wcs, is_background_subtracted=True,
        metadata={**first.metadata, "n_stacked": len(aligned)}, metrics=dict(first.metrics),
    )  # fmt: skip
    result.metrics["n_stacked"] = float(len(aligned))
    return result


def _flux_ratio(stars: Stars, moved: Exposure) -> float:
    """Factor that brings the moved exposure's fluxes to those of the first."""
    from scipy.spatial import cKDTree

    other = find_stars(moved)
    index = common_stars(stars, other)
    if len(index) < 3:
        return 1.0
    _, partner = cKDTree(np.stack([other.x, other.y], 1)).query(np.stack([stars.x[index], stars.y[index]], 1))
    ratio = float(np.median(stars.flux[index] / other.flux[partner]))
    return ratio if np.isfinite(ratio) and 0.01 < ratio < 100 else 1.0


def _mean(
    exposures: list[Exposure], clip: float
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint16]]:
    """Inverse-variance mean with one weight an exposure, so that the PSF is the same for faint and bright."""
    images = np.stack([e.image for e in exposures])
    bad = np.stack([(e.mask & (MaskPlane.BAD | MaskPlane.NO_DATA | MaskPlane.EDGE)) > 0 for e in exposures])
    saturated = np.stack([(e.mask & MaskPlane.SAT) > 0 for e in exposures]).any(axis=0)
    level = np.array([np.median(e.variance[e.variance < 1e19][::7]) for e in exposures], dtype=np.float32)
    if len(exposures) >= 3:
        middle = (
            np.median(np.where(bad, np.nan, images), axis=0) if not bad.any() else _nanmedian(images, bad)
        )
        # Stars differ between exposures by seeing: only what exceeds a part of the signal too is an outlier.
        tolerance = clip * np.sqrt(level)[:, None, None] + 0.3 * np.abs(middle)
        bad |= np.abs(images - middle) > tolerance
    weight = np.where(bad, 0, 1 / level[:, None, None]).astype(np.float32)
    total = weight.sum(axis=0)
    empty = total <= 0
    image = np.where(empty, 0, (weight * images).sum(axis=0) / np.where(empty, 1, total))
    variances = np.stack([np.minimum(e.variance, 1e20) for e in exposures])
    variance = np.where(empty, 1e20, (weight**2 * variances).sum(axis=0) / np.where(empty, 1, total) ** 2)
    mask = np.zeros(image.shape, dtype=np.uint16)
    mask[empty] |= np.uint16(MaskPlane.NO_DATA)
    mask[saturated] |= np.uint16(MaskPlane.SAT)
    return image.astype(np.float32), variance.astype(np.float32), mask


def _nanmedian(images: NDArray[np.float32], bad: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Median over the good exposures of a pixel; 0 where there is none."""
    values = np.sort(np.where(bad, np.inf, images), axis=0)
    count = (~bad).sum(axis=0)
    low = np.take_along_axis(values, np.maximum((count - 1) // 2, 0)[None], axis=0)[0]
    high = np.take_along_axis(values, np.maximum(count // 2, 0).clip(max=len(images) - 1)[None], axis=0)[0]
    return np.where(count > 0, (np.where(count > 0, low, 0) + np.where(count > 0, high, 0)) / 2, 0).astype(
        np.float32
    )
