"""Detection of the sources of one image, as calibration needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import NoWorkFoundError
from cumbre.payloads.kernels.background import Background, measure_background
from cumbre.payloads.kernels.extract import extract
from cumbre.payloads.kernels.planes import sampled

FloatImage = NDArray[np.float32]
SEP_BLENDED, SEP_TRUNCATED = 2 | 1, 8
MAX_RADII = 2500
MOST_COVERED = 0.03
"""Part of the pixels that detected sources cover at most."""
_KERNEL = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32)


@dataclass(frozen=True, slots=True)
class Detections:
    """Sources of one image, brightest first; arrays of shape (n,).

    Attributes
    ----------
    x, y
        0-based centroids.
    flux
        Isophotal, in the image's unit.
    snr, half_light_px, elongation
        Significance; radius of half the light (NaN beyond the ``MAX_RADII`` brightest); a / b.
    isolated
        Not blended and not cut by the edge.
    fwhm_px
        Gaussian FWHM from second moments.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]
    snr: NDArray[np.float64]
    half_light_px: NDArray[np.float64]
    elongation: NDArray[np.float64]
    fwhm_px: NDArray[np.float64]
    isolated: NDArray[np.bool_]

    def __len__(self) -> int:
        return int(self.x.size)


def detect(
    image: FloatImage,
    noise: float | FloatImage,
    bad: NDArray[np.bool_] | None = None,
    *,
    threshold: float = 6.0,
    min_area: int = 5,
) -> tuple[Detections, NDArray[np.int32]]:
    """Sources above ``threshold`` sigma in a background-subtracted image.

    Parameters
    ----------
    noise
        Sky noise per pixel.
    bad
        Pixels that are not searched.

    Returns
    -------
    detections, segments
        Brightest first; int32 (ny, nx), 0 where there is no source.

    Raises
    ------
    NoWorkFoundError
        No source.
    """
    import sep

    pixels = np.ascontiguousarray(image, np.float32)
    objects, segments = extract(
        pixels,
        threshold,
        err=noise,
        mask=bad,
        minarea=min_area,
        filter_kernel=_KERNEL,
        deblend_nthresh=16,
        deblend_cont=0.01,
        segmentation_map=True,
    )
    ok = (objects["flux"] > 0) & np.isfinite(objects["a"]) & (objects["b"] > 0)
    objects = objects[ok]
    if objects.size == 0:
        raise NoWorkFoundError(
            f"no source above {threshold:g} sigma in an image of {image.shape[1]} x {image.shape[0]} pixels"
        )
    objects = objects[np.argsort(-objects["flux"], kind="stable")]
    x, y = objects["x"].astype(np.float64), objects["y"].astype(np.float64)
    a, b = objects["a"], objects["b"]
    radius = np.full(x.size, np.nan)
    # Half-light radii cost more than the detection; those of the brightest tell stars from galaxies.
    some = slice(0, MAX_RADII)
    radius[some], _ = sep.flux_radius(
        pixels, x[some], y[some], np.clip(6 * a[some], 4, 30), 0.5, mask=bad, subpix=5
    )
    sky = np.asarray(noise)
    local = (
        sky[np.clip(y.astype(int), 0, None), np.clip(x.astype(int), 0, None)]
        if sky.ndim
        else np.full(x.size, float(sky))
    )
    snr = objects["flux"] / (local * np.sqrt(np.maximum(objects["npix"], 1)))
    return (
        Detections(
            x, y, objects["flux"].astype(float), snr, np.asarray(radius, float), (a / b).astype(float),
            2.3548 * np.sqrt((a**2 + b**2) / 2), (objects["flag"] & (SEP_BLENDED | SEP_TRUNCATED)) == 0,
        ),
        segments,
    )  # fmt: skip


def background_and_sources(
    image: FloatImage, bad: NDArray[np.bool_], *, mesh: int = 64, threshold: float = 6.0, **options: Any
) -> tuple[Background, FloatImage, Detections]:
    """Background measured twice: the second time without the sources that the first one showed.

    Sources are those above ``threshold`` sigma; in a field where they would cover more than ``MOST_COVERED`` of the
    pixels, the brightest that cover so much.

    Returns
    -------
    background, subtracted, detections
        The final background; the image without it; the sources.
    """
    import cv2

    first = measure_background(image, bad, mesh=mesh, step=2)
    above = image - first.level
    least = threshold * first.global_rms
    sample = sampled(above, bad)
    # Where stars cover the field the brightest tell all that is asked of them here, at a fraction of the time.
    limit = max(least, float(np.quantile(sample, 1 - MOST_COVERED))) if sample.size else least
    found, segments = detect(above, first.global_rms, bad, threshold=limit / first.global_rms, **options)
    # the wings of a star reach beyond its isophote
    light = (segments > 0).astype(np.uint8)
    if limit > least:
        light |= above > least
    covered = cv2.dilate(light, np.ones((7, 7), np.uint8)) > 0
    if np.mean(covered | bad) > 0.8:
        return first, image - first.level, found
    second = measure_background(image, bad | covered, mesh=mesh)
    return second, image - second.level, found
