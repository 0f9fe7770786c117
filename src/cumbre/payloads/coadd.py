"""Templates: calibrated images resampled to one sky grid and averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
                # nothing good: say why (saturated in all), and keep the mean where there is light at all
                total, count = 0.0, 0
                for k in range(n):
                    if not masks[k, j, i] & 256:
                        total += images[k, j, i]
                        count += 1
                image[j, i] = total / count if count else 0.0
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

    Raises
    ------
    NoWorkFoundError
        No image, or none overlaps the grid.
    UnprocessableDataError
        An image is not calibrated.
    """
    if not exposures:
        raise NoWorkFoundError("template: no calibrated images were given")
    planes: list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint16]]] = []
    used: list[Exposure] = []
    shares: list[float] = []
    for exposure in exposures:
        name = exposure.metadata.get("obs_id", "?")
        if (
            exposure.wcs is None
            or not np.isfinite(exposure.zero_point)
            or not exposure.is_background_subtracted
        ):
            raise UnprocessableDataError(
                f"template: {name} has no WCS, zero point or background; calibrate it first"
            )
        image, variance, mask = warp_between(
            exposure.image, exposure.variance, exposure.mask, exposure.wcs, wcs, shape
        )
        if not np.any((mask & MaskPlane.NO_DATA) == 0):
            continue
        scale = np.float32(10 ** (-0.4 * (exposure.zero_point - TEMPLATE_ZERO_POINT)))
        image *= scale
        data = (mask & MaskPlane.unusable()) == 0
        sky = np.float32(np.median(variance[data][::17])) if data.any() else np.float32(1)
        variance = np.where(variance < NO_VARIANCE * 1e-4, np.maximum(variance, sky) * scale**2, NO_VARIANCE)
        planes.append((image, variance, mask))
        shares.append(1.0 / (_sky_variance(exposure) * float(scale) ** 2))
        used.append(exposure)
    if not planes:
        raise NoWorkFoundError(f"template: none of {len(exposures)} images overlaps the grid")
    result = Exposure(
        np.zeros(shape, np.float32), np.full(shape, NO_VARIANCE, np.float32),
        np.full(shape, MaskPlane.NO_DATA, np.uint16), wcs=wcs, zero_point=TEMPLATE_ZERO_POINT,
        zero_point_err=float(np.median([e.zero_point_err for e in used])), is_background_subtracted=True,
    )  # fmt: skip
    depth = np.zeros(shape, np.uint8)
    bad = np.uint16(MaskPlane.unusable() | MaskPlane.CR | MaskPlane.STREAK)
    keep = np.uint16(MaskPlane.INTRP | MaskPlane.SUSPECT | MaskPlane.VIGNETTED | MaskPlane.INJECTED)
    stacks = [np.stack([plane[k] for plane in planes]) for k in range(3)]
    left_out = np.zeros(stacks[0].shape, np.uint8)
    _combine(
        stacks[0], _smooth(stacks[0]), *stacks[1:], np.array(shares, np.float32), bad, clip,
        _light_near(stacks[0], used), result.image, result.variance, result.mask, depth, keep,
        np.uint16(MaskPlane.SUSPECT), left_out,
    )  # fmt: skip
    widths = [e.psf.fwhm_px if e.psf is not None else float("nan") for e in used]
    n_matched = match_inputs(result, stacks[0], stacks[1], left_out, shares, widths) if match_psf else 0
    first = used[0].metadata
    result.metadata = {key: first[key] for key in ("instrument", "band", "physical_filter") if key in first}
    result.metadata |= {"inputs": [e.metadata.get("obs_id", "") for e in used], "depth": depth}
    result.metrics = {
        "coverage": float(np.mean(depth > 0)), "mean_depth": float(depth.mean()), "n_inputs": float(len(used)),
        "n_matched": float(n_matched),
    }  # fmt: skip
    result.psf = _template_psf(result, used)
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


def _light_near(images: NDArray[Any], used: Sequence[Exposure]) -> NDArray[np.float32]:
    """How far the images may differ where there are stars: the median of their brightest values nearby.

    A part of the pixel's own light would not do: in the wings of a star two images of different seeing differ by
    factors, and where noise allows nothing, in the wings of bright stars only, the widest would be left out.
    """
    import cv2

    width = max((e.psf.fwhm_px for e in used if e.psf is not None), default=3.0)
    side = 2 * max(1, round(0.6 * width)) + 1
    window = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    near = np.stack([cv2.dilate(image, window) for image in images])
    return np.asarray(_median(near))


def _template_psf(template: Exposure, used: Sequence[Exposure]) -> PsfModel:
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
        widths = [e.psf.fwhm_px for e in used if e.psf is not None]
        return gaussian_psf(float(np.median(widths)) if widths else 3.0, template.shape)
