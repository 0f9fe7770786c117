"""Templates: calibrated images resampled to one sky grid and averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cumbre.core.errors import NoWorkFoundError, UnprocessableDataError
from cumbre.payloads.coadd_psf import match_inputs
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels.psf import PsfModel, fit_psf, gaussian_psf, select_psf_stars
from cumbre.payloads.kernels.warp import NO_VARIANCE, SkyMap, warp_between
from cumbre.payloads.stars import detect

TEMPLATE_ZERO_POINT = 27.0
"""AB magnitude of one unit of a template."""
STRIP_ROWS = 512
"""Rows averaged at once: a dozen images of 4k do not fit into a small memory."""
VARIES = 3.0
"""A star may be brighter than its median by so many times its light, in an image where it looks like a star."""


@njit(cache=True)
def _combine(  # type: ignore[no-untyped-def]
    images,
    smooth,
    variances,
    masks,
    shares,
    unusable,
    clip,
    near,
    image,
    variance,
    mask,
    depth,
    any_bits,
    inexact,
    left_out,
):
    n, ny, nx = images.shape
    values, weights, noises = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    shaped, which = np.empty(n, np.float32), np.empty(n, np.int64)
    for j in range(ny):
        for i in range(nx):
            m = 0
            bits, common, there = 0, 65535, 0
            for k in range(n):
                bits_k = masks[k, j, i]
                common &= bits_k
                there += bits_k & 272 == 0
                # Where the sharpest images are saturated the others alone would make the star too faint.
                bits |= bits_k & 2
                left_out[k, j, i] = 1
                if bits_k & unusable:
                    continue
                which[m] = k
                values[m], weights[m], noises[m] = images[k, j, i], shares[k], variances[k, j, i]
                shaped[m] = smooth[k, j, i]
                bits |= bits_k & any_bits
                m += 1
            if m == 0:
                # nothing good: say why (saturated in all), and keep the mean where there is light at all, with a
                # variance: without one resampling would make a hole of it and of all around, and spread the hole
                total, noise, count = 0.0, 0.0, 0
                for k in range(n):
                    if not masks[k, j, i] & 256:
                        total += images[k, j, i]
                        noise += variances[k, j, i]
                        count += 1
                image[j, i] = total / count if count else 0.0
                if count:
                    variance[j, i] = noise / count
                mask[j, i] = common | 256 if count == 0 else common | 1
                continue
            if m >= 3:
                middle = np.median(values[:m])
                kept = 0
                for k in range(m):
                    # sigma of one value, and the light nearby: stars vary, and so does the seeing; a star that
                    # brightened a lot is as smooth as it was, what struck it is not
                    allowed = clip * np.sqrt(noises[k]) + near[j, i]
                    allowed += min(max(shaped[k], 0.0), VARIES * near[j, i])
                    if abs(values[k] - middle) <= allowed:
                        values[kept], weights[kept], noises[kept] = values[k], weights[k], noises[k]
                        which[kept] = which[k]
                        kept += 1
                m = kept
            elif m == 2:
                # of two that disagree badly the lower one is right: cosmic rays and trails are bright
                allowed = 2 * clip * np.sqrt(noises[0] + noises[1])
                low = 0 if values[0] < values[1] else 1
                if abs(values[0] - values[1]) > allowed + max(abs(values[low]), near[j, i]):
                    values[0], weights[0], noises[0] = values[low], weights[low], noises[low]
                    which[0] = which[low]
                    m = 1
            total, weight, noise = 0.0, 0.0, 0.0
            for k in range(m):
                total += weights[k] * values[k]
                weight += weights[k]
                noise += weights[k] ** 2 * noises[k]
                left_out[which[k], j, i] = 0
            if weight > 0:
                image[j, i] = total / weight
                variance[j, i] = noise / weight**2
                mask[j, i] = bits | inexact if there < n else bits
                depth[j, i] = m
            else:
                mask[j, i] = 256


@njit(cache=True)
def _median(stack):  # type: ignore[no-untyped-def]
    """Median along the first axis, never below zero."""
    n, ny, nx = stack.shape
    out, values = np.empty((ny, nx), np.float32), np.empty(n, np.float32)
    for j in range(ny):
        for i in range(nx):
            for k in range(n):
                values[k] = stack[k, j, i]
            out[j, i] = max(np.median(values), 0.0)
    return out


class Resampled(Protocol):
    """An image on the template's grid, at the template's zero point; in memory or in a file."""

    @property
    def shape(self) -> tuple[int, int]:
        """(ny, nx) of the grid."""

    @property
    def share(self) -> float:
        """Its weight: one over the variance of its sky before resampling."""

    @property
    def zero_point_err(self) -> float:
        """Of its zero point, magnitudes."""

    @property
    def fwhm_px(self) -> float:
        """Of its PSF, in its own pixels; 0 when it is not known."""

    @property
    def metadata(self) -> dict[str, Any]:
        """``obs_id``, ``instrument``, ``band``, ``physical_filter`` as far as they are known."""

    def rows(self, begin: int, end: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Image, variance and mask of some rows."""


@dataclass(frozen=True, slots=True)
class Warp:
    """A :class:`Resampled` image in memory."""

    image: NDArray[np.float32]
    variance: NDArray[np.float32]
    mask: NDArray[np.uint16]
    shape: tuple[int, int]
    share: float
    zero_point_err: float
    fwhm_px: float
    metadata: dict[str, Any]

    def rows(self, begin: int, end: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Image, variance and mask of some rows."""
        return self.image[begin:end], self.variance[begin:end], self.mask[begin:end]


def resample(exposure: Exposure, wcs: SkyMap, shape: tuple[int, int]) -> Warp | None:
    """Bring a calibrated image to a template's grid and zero point; None when it does not reach it.

    Raises
    ------
    UnprocessableDataError
        The image is not calibrated.
    """
    name = exposure.metadata.get("obs_id", "?")
    if exposure.wcs is None or not np.isfinite(exposure.zero_point) or not exposure.is_background_subtracted:
        raise UnprocessableDataError(
            f"template: {name} has no WCS, zero point or background; calibrate it first"
        )
    image, variance, mask = warp_between(
        exposure.image, exposure.variance, exposure.mask, exposure.wcs, wcs, shape
    )
    if not np.any((mask & MaskPlane.NO_DATA) == 0):
        return None
    scale = np.float32(10 ** (-0.4 * (exposure.zero_point - TEMPLATE_ZERO_POINT)))
    image *= scale
    data = (mask & MaskPlane.unusable()) == 0
    sky = np.float32(np.median(variance[data][::17])) if data.any() else np.float32(1)
    variance = np.where(variance < NO_VARIANCE * 1e-4, np.maximum(variance, sky) * scale**2, NO_VARIANCE)
    known = ("obs_id", "instrument", "band", "physical_filter")
    return Warp(
        image, variance, mask, shape, 1.0 / (_sky_variance(exposure) * float(scale) ** 2),
        float(exposure.zero_point_err), exposure.psf.fwhm_px if exposure.psf is not None else 0.0,
        {key: exposure.metadata[key] for key in known if key in exposure.metadata},
    )  # fmt: skip


def make_template(
    exposures: Sequence[Exposure],
    wcs: SkyMap,
    shape: tuple[int, int],
    *,
    clip: float = 5.0,
    match_psf: bool = True,
) -> Exposure:
    """Average calibrated images on one grid.

    Parameters
    ----------
    exposures
        Background-subtracted, with WCS and zero point.
    wcs, shape
        Of the template; shape is (ny, nx).
    clip, match_psf
        As in :func:`combine`, whose result this is.

    Raises
    ------
    NoWorkFoundError
        No image, or none overlaps the grid.
    UnprocessableDataError
        An image is not calibrated.
    """
    if not exposures:
        raise NoWorkFoundError("template: no calibrated images were given")
    warps = [warp for e in exposures if (warp := resample(e, wcs, shape)) is not None]
    if not warps:
        raise NoWorkFoundError(f"template: none of {len(exposures)} images overlaps the grid")
    return combine(warps, wcs, clip=clip, match_psf=match_psf)


class _Whole(Sequence[NDArray[Any]]):
    """One plane of each image, read when it is asked for."""

    def __init__(self, warps: Sequence[Resampled], which: int) -> None:
        self._warps, self._which = warps, which

    def __len__(self) -> int:
        return len(self._warps)

    def __getitem__(self, index: Any) -> Any:
        warp = self._warps[index]
        return warp.rows(0, warp.shape[0])[self._which]


def combine(
    warps: Sequence[Resampled], wcs: SkyMap, *, clip: float = 5.0, match_psf: bool = True
) -> Exposure:
    """Average images that are on one grid already.

    An image more is as if all had been averaged at once: nothing is kept of an earlier mean.

    Parameters
    ----------
    warps
        At least one; all of one shape.
    clip
        Values further than ``clip`` sigma, and the light nearby, which seeing moves, from the median are left out.
    match_psf
        Bring the images to the PSF of the widest before they are averaged. Without it a star that varies between images
        of different seeing has a PSF of its own in the mean, and leaves a residual in every difference.

    Returns
    -------
    Exposure
        Mean scaled to the zero point 27, with PSF; NO_DATA where no image reaches, SUSPECT where not all of them do: its
        PSF is another one there. Every image has one weight, that of its sky noise, for stars of any brightness: weights
        by the noise of the pixel would give bright stars another PSF than faint ones. ``metrics`` has coverage (fraction
        of pixels with data), mean_depth, n_inputs and n_matched (images of one PSF); ``metadata["depth"]`` is the number
        of images used at each pixel (uint8).
    """
    shape = warps[0].shape
    if any(warp.shape != shape for warp in warps):
        raise UnprocessableDataError(f"template: images of {sorted({w.shape for w in warps})} on one grid")
    result = Exposure(
        np.zeros(shape, np.float32), np.full(shape, NO_VARIANCE, np.float32),
        np.full(shape, MaskPlane.NO_DATA, np.uint16), wcs=wcs, zero_point=TEMPLATE_ZERO_POINT,
        zero_point_err=float(np.median([w.zero_point_err for w in warps])), is_background_subtracted=True,
    )  # fmt: skip
    depth = np.zeros(shape, np.uint8)
    bad = np.uint16(MaskPlane.unusable() | MaskPlane.CR | MaskPlane.STREAK)
    keep = np.uint16(MaskPlane.INTRP | MaskPlane.SUSPECT | MaskPlane.VIGNETTED | MaskPlane.INJECTED)
    shares = np.array([warp.share for warp in warps], np.float32)
    widths = [warp.fwhm_px if warp.fwhm_px > 0 else float("nan") for warp in warps]
    known = [width for width in widths if width > 0]
    left_out = np.zeros((len(warps), *shape), np.uint8)
    side = 2 * max(1, round(0.6 * max(known, default=3.0))) + 1
    for begin in range(0, shape[0], STRIP_ROWS):
        end = min(begin + STRIP_ROWS, shape[0])
        # a few rows more, which the filters of the neighbourhood look at
        low, high = max(begin - side, 0), min(end + side, shape[0])
        given = [warp.rows(low, high) for warp in warps]
        stacks = [np.stack([plane[k] for plane in given]) for k in range(3)]
        inner = slice(begin - low, end - low)
        smooth, near = _smooth(stacks[0])[:, inner], _light_near(stacks[0], side)[inner]
        lost = np.zeros((len(warps), end - begin, shape[1]), np.uint8)
        planes = (result.image[begin:end], result.variance[begin:end], result.mask[begin:end])
        _combine(
            np.ascontiguousarray(stacks[0][:, inner]), np.ascontiguousarray(smooth),
            np.ascontiguousarray(stacks[1][:, inner]), np.ascontiguousarray(stacks[2][:, inner]), shares, bad, clip,
            np.ascontiguousarray(near), *planes, depth[begin:end], keep, np.uint16(MaskPlane.SUSPECT),
            lost,
        )  # fmt: skip
        left_out[:, begin:end] = lost
    n_matched = 0
    if match_psf:
        shares_of = [warp.share for warp in warps]
        n_matched = match_inputs(result, _Whole(warps, 0), _Whole(warps, 1), left_out, shares_of, widths)
    first = warps[0].metadata
    result.metadata = {key: first[key] for key in ("instrument", "band", "physical_filter") if key in first}
    result.metadata |= {"inputs": [w.metadata.get("obs_id", "") for w in warps], "depth": depth}
    result.metrics = {
        "coverage": float(np.mean(depth > 0)), "mean_depth": float(depth.mean()), "n_inputs": float(len(warps)),
        "n_matched": float(n_matched),
    }  # fmt: skip
    result.psf = _template_psf(result, known)
    result.metrics["psf_fwhm_px"] = result.psf.fwhm_px
    return result


def _sky_variance(exposure: Exposure) -> float:
    """Median of the variance before resampling: that of resampled pixels depends on where between pixels they fell."""
    good = (exposure.mask & MaskPlane.unusable()) == 0
    sample = exposure.variance[good][::17]
    sample = sample[(sample > 0) & (sample < NO_VARIANCE * 1e-4)]
    return float(np.median(sample)) if sample.size else 1.0


def _smooth(images: NDArray[Any]) -> NDArray[np.float32]:
    """Medians of 3 × 3 pixels: stars are there, single pixels and lines are not."""
    import cv2

    return np.stack([cv2.medianBlur(np.ascontiguousarray(image), 3) for image in images])


def _light_near(images: NDArray[Any], side: int) -> NDArray[np.float32]:
    """How far the images may differ where there are stars: the median of their brightest values nearby.

    A part of the pixel's own light would not do: in the wings of a star two images of different seeing differ by
    factors, and where noise allows nothing, in the wings of bright stars only, the widest would be left out.
    """
    import cv2

    window = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    near = np.stack([cv2.dilate(image, window) for image in images])
    return np.asarray(_median(near))


def _template_psf(template: Exposure, widths: Sequence[float]) -> PsfModel:
    """PSF of the template's own stars; a Gaussian of the inputs' width where there are none."""
    data = template.mask & np.uint16(MaskPlane.unusable())
    good = data == 0
    try:
        sample = template.image[good][::7]
        noise = 1.4826 * float(np.median(np.abs(sample - np.median(sample))))
        found, _ = detect(template.image, noise, ~good, threshold=15)
        chosen = select_psf_stars(
            found.x, found.y, found.flux, found.snr, found.half_light_px, found.elongation,
            usable=found.isolated, shape=template.shape,
        )  # fmt: skip
        width = float(np.median(found.fwhm_px[chosen])) if chosen.size else 3.0
        return fit_psf(
            template.image, template.mask, found.x[chosen], found.y[chosen], bad_bits=MaskPlane.unusable(),
            fwhm_px=width, noise=noise,
        )  # fmt: skip
    except UnprocessableDataError:
        return gaussian_psf(float(np.median(widths)) if widths else 3.0, template.shape)
