"""Images of a template brought to one PSF, that of the widest, before they are averaged.

In a plain mean every image gives a star the light that it had then, spread by the seeing of then. A star that varies so
has another PSF in the mean than its constant neighbours, on which the kernel of a difference is fitted: with seeing
between 3.6 and 4.8 pixels six hundredths of a change of flux stay behind. Images of one PSF are linear in the flux.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import NoWorkFoundError
from cumbre.payloads.difference import (
    DifferenceConfig,
    Stars,
    common_stars,
    find_stars,
    matching_kernel,
    stars_at,
)
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels import planes
from cumbre.payloads.kernels.convolve import convolve_field

log = logging.getLogger(__name__)

Images = NDArray[np.float32]
WELL_SAMPLED_PX = 2.6
"""Narrowest PSF of images that are convolved. Below, what a pixel holds depends on where in it the star stands: at 2 pixels
the matching leaves 1 to 2 % of every star, at 3.4 less than 0.3 %."""
SPOILT = 0.3
"""Part of a kernel's light that may come from pixels that were filled in, before an image is left out at a place."""


def match_inputs(
    template: Exposure,
    images: Sequence[NDArray[Any]],
    variances: Sequence[NDArray[Any]],
    left_out: NDArray[np.uint8],
    shares: Sequence[float],
    widths: Sequence[float],
) -> int:
    """Average again with matched images, in place; variance, mask and depth stay as they are.

    Parameters
    ----------
    template
        The plain mean; its pixels stand for those that an image lacks while that is convolved.
    images, variances
        n of (ny, nx) on the template's grid and photometric scale; each is asked for once.
    left_out
        (n, ny, nx): 1 where a pixel has no part in the mean.
    shares
        Weight of each image.
    widths
        FWHM of each image's PSF, pixels; NaN where it is not known.

    Returns
    -------
    Number of images of one PSF: n, or 0 when they can not be matched (fewer than two, unknown PSFs or one that the pixels
    do not sample, too few common stars) and the plain mean stays.
    """
    known = np.asarray(widths, float)
    if len(known) < 2 or not np.isfinite(known).all() or known.min() < WELL_SAMPLED_PX:
        return 0
    order = int(np.argmax(known))
    fixed = _Plane(template, images[order], variances[order], left_out[order], float(known[order]))
    stars = find_stars(fixed.exposure())
    total = np.zeros(template.shape, np.float32)
    weight = np.zeros(template.shape, np.float32)
    for k in range(len(known)):
        image, missing = fixed.image, left_out[k].astype(np.float32)
        if k != order:
            plane = _Plane(template, images[k], variances[k], left_out[k], float(known[k]))
            try:
                image, missing = _matched(plane, fixed, stars, missing)
            except NoWorkFoundError as error:
                log.warning("template: its images keep their PSFs: %s", error)
                return 0
        part = np.where(missing < SPOILT, np.float32(shares[k]) * (1 - missing), np.float32(0))
        total += part * image
        weight += part
    some = weight > 0
    template.image[some] = total[some] / weight[some]
    return len(known)


class _Plane:
    """One image with its gaps filled."""

    def __init__(
        self, template: Exposure, image: Images, variance: Images, left_out: NDArray[np.uint8], fwhm_px: float
    ) -> None:
        self.bad = left_out > 0
        self.image = planes.finite_image(np.where(self.bad, template.image, image))
        self.variance = planes.finite_variance(variance)
        self.fwhm_px = fwhm_px

    def exposure(self) -> Exposure:
        """For the measurement of stars."""
        mask = np.where(self.bad, np.uint16(MaskPlane.BAD), np.uint16(0))
        return Exposure(self.image, self.variance, mask, is_background_subtracted=True)


def _matched(plane: _Plane, fixed: _Plane, stars: Stars, missing: Images) -> tuple[Images, Images]:
    """The image with the PSF of ``fixed`` and its own photometric scale, and what of it was filled in."""
    here = stars_at(plane.exposure(), stars.x, stars.y, plane.fwhm_px)
    pixels = {
        "fixed": fixed.image, "moved": plane.image,
        "fixed_variance": fixed.variance, "moved_variance": plane.variance,
    }  # fmt: skip
    solution = matching_kernel(
        pixels, (fixed.bad, plane.bad), stars, common_stars(stars, here), (fixed.fwhm_px, plane.fwhm_px),
        DifferenceConfig(),
    )  # fmt: skip
    scale = 1.0 / solution.metrics["sum"]
    image = convolve_field(plane.image, lambda x, y: scale * solution.kernel(x, y), solution.basis.half)
    sigma = np.sqrt(max(fixed.fwhm_px**2 - plane.fwhm_px**2, 0.5)) / 2.3548
    return image, np.maximum(missing, cv2.GaussianBlur(missing, (0, 0), sigma))
