"""Two or more exposures of one visit: cosmic rays by comparison, then their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import UnprocessableDataError
from cumbre.payloads.exposure import Exposure, MaskPlane

if TYPE_CHECKING:
    from cumbre.core.instrument import Instrument
    from cumbre.payloads.calibrate import CalibrateConfig
    from cumbre.payloads.refcat import RefCat

SIGMAS = 6.0
"""A pixel of one snap that is so far above the other was struck."""
SLACK = 0.35
"""Part of a star's light by which its core may differ between snaps: seeing and transparency change."""
MESH_PX = 64
NO_WITNESS = np.float32(1e30)
"""Light of an unusable pixel: nothing is above it."""
MOST_DIFFERENT = 0.01
"""Above this part of struck pixels the snaps do not show the same sky, and are not combined."""


def calibrate_snaps(
    snaps: Sequence[Exposure],
    reference: RefCat | None,
    *,
    instrument: Instrument,
    config: CalibrateConfig | None = None,
) -> Exposure:
    """Calibrate the image of a visit: of one snap as it is, of several their sum.

    Cosmic rays of a single snap are found by their sharpness (Laplacian), those of several by comparison. The search
    for sharp pixels follows there too: what every snap has in the same place, a hot pixel that no map of defects
    knows, comparison does not find, and many of them would be taken for stars.

    Parameters
    ----------
    snaps
        After instrument signature removal, in any order.

    Raises
    ------
    NoWorkFoundError, UnprocessableDataError
        As :func:`cumbre.payloads.calibrate.calibrate` and :func:`combine_snaps`.
    """
    from cumbre.payloads.calibrate import calibrate

    return calibrate(combine_snaps(snaps), reference, instrument=instrument, config=config)


def combine_snaps(snaps: Sequence[Exposure]) -> Exposure:
    """Sum of the snaps of one detector in one visit, without what only one of them has.

    A pixel that was struck or is unusable in one snap is taken from the others, scaled to the whole time: its
    variance says so, and it is flagged SUSPECT. Snaps that do not show the same sky (tracking, clouds) are not
    summed: the first is given, and its ``problems`` say so.

    Returns
    -------
    Exposure
        With the first snap's identity, the summed time and the middle of the visit; ``n_snaps`` in the metadata,
        ``snap_cosmic_ray_pixels`` in the metrics.

    Raises
    ------
    UnprocessableDataError
        None, or of different detectors or shapes.
    """
    if not snaps:
        raise UnprocessableDataError("a visit without an exposure: nothing to combine")
    ordered = sorted(snaps, key=lambda snap: snap.metadata.get("exposure_id", 0))
    first = ordered[0]
    if len(ordered) == 1:
        return first
    kinds = {(s.metadata.get("instrument"), s.metadata.get("detector"), s.shape) for s in ordered}
    if len(kinds) > 1:
        raise UnprocessableDataError(f"snaps of different detectors: {sorted(map(str, kinds))}")
    parts = [float(snap.metadata.get("exposure_s") or 1.0) for snap in ordered]
    struck = _struck(ordered, np.array(parts) / parts[0])
    share = max(float(hit.mean()) for hit in struck)
    if share > MOST_DIFFERENT:
        told = f"snaps differ in {share:.1%} of the pixels: only the first is used"
        counts = {"n_snaps": 1, "n_snaps_given": len(ordered)}
        problems = [*first.metadata.get("problems", []), told]
        return replace(first, metadata=first.metadata | {"problems": problems} | counts)
    return _sum(ordered, parts, struck)


def _local_level(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Smooth background from the medians of a mesh."""
    ny, nx = image.shape
    rows, columns = max(ny // MESH_PX, 1), max(nx // MESH_PX, 1)
    cut = image[: ny // rows * rows, : nx // columns * columns]
    blocks = cut.reshape(rows, ny // rows, columns, nx // columns)[:, ::3, :, ::3]
    coarse = np.median(blocks, axis=(1, 3)).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (nx, ny), interpolation=cv2.INTER_LINEAR))


def _struck(snaps: Sequence[Exposure], scale: NDArray[np.float64]) -> list[NDArray[np.bool_]]:
    """Pixels of each snap that stand above the faintest of the others."""
    bad = np.uint16(MaskPlane.unusable())
    lights = []
    for snap, factor in zip(snaps, scale, strict=True):
        light = (snap.image - _local_level(snap.image)) / np.float32(factor)
        light[(snap.mask & bad) > 0] = NO_WITNESS
        lights.append(light)
    kernel = np.ones((3, 3), np.uint8)
    hits = []
    for k, snap in enumerate(snaps):
        others = [m for m in range(len(snaps)) if m != k]
        fainter, variance = lights[others[0]], snaps[others[0]].variance / np.float32(scale[others[0]] ** 2)
        for m in others[1:]:
            is_less = lights[m] < fainter
            fainter = np.where(is_less, lights[m], fainter)
            variance = np.where(is_less, snaps[m].variance / np.float32(scale[m] ** 2), variance)
        # The brightest neighbour allows for a shift of half a pixel between the snaps.
        allowed = SLACK * np.maximum(cv2.dilate(np.where(fainter < NO_WITNESS, fainter, 0), kernel), 0)
        # Of the noise in this snap what its sky and the witness's light explain: a ray's own photons do not.
        sigma = np.sqrt(np.minimum(snap.variance / np.float32(scale[k] ** 2), variance) + variance)
        excess = lights[k] - fainter
        core = (excess > SIGMAS * sigma + allowed) & ((snap.mask & bad) == 0)
        near = cv2.dilate(core.astype(np.uint8), kernel) > 0
        hits.append(near & (excess > 0.4 * SIGMAS * sigma + allowed) & ((snap.mask & bad) == 0))
    return hits


def _sum(snaps: Sequence[Exposure], parts: Sequence[float], struck: Sequence[NDArray[np.bool_]]) -> Exposure:
    bad = np.uint16(MaskPlane.unusable())
    first, whole = snaps[0], sum(parts)
    image, variance = np.zeros(first.shape, np.float32), np.zeros(first.shape, np.float32)
    good_s = np.zeros(first.shape, np.float32)
    every = np.full(first.shape, 0xFFFF, np.uint16)
    either = np.zeros(first.shape, np.uint16)
    for snap, part, hit in zip(snaps, parts, struck, strict=True):
        use = ~hit & ((snap.mask & bad) == 0)
        image += np.where(use, snap.image, 0)
        variance += np.where(use, snap.variance, 0)
        good_s += np.where(use, np.float32(part), 0)
        every &= np.where(hit, snap.mask | np.uint16(MaskPlane.CR), snap.mask)
        either |= snap.mask
    lost = good_s <= 0
    factor = np.float32(whole) / np.where(lost, np.float32(whole), good_s)
    image *= factor
    variance *= factor * factor
    # Flags of unusable pixels hold where no snap has a usable one; all other flags hold if any snap has them.
    mask = (either & ~bad) | np.where(lost, either, 0).astype(np.uint16)
    mask |= every & np.uint16(MaskPlane.CR)
    mask[~lost & (good_s < np.float32(whole) * np.float32(0.999))] |= np.uint16(MaskPlane.SUSPECT)
    for snap, part in zip(snaps, parts, strict=True):
        image[lost] += snap.image[lost] * np.float32(part / whole)
    variance[lost] = np.maximum.reduce([snap.variance[lost] for snap in snaps])
    return replace(
        first, image=image, variance=variance, mask=mask, metadata=_metadata(snaps),
        metrics=first.metrics
        | {"snap_cosmic_ray_pixels": float(sum(np.count_nonzero(hit) for hit in struck))}
        | {"sky_adu": float(sum(snap.metrics.get("sky_adu", 0.0) for snap in snaps))},
    )  # fmt: skip


def _metadata(snaps: Sequence[Exposure]) -> dict[str, Any]:
    """Of the whole visit: first identity, summed time, middle of the span."""
    out = snaps[0].metadata | {"n_snaps": len(snaps)}
    if all(isinstance(snap.metadata.get("exposure_s"), int | float) for snap in snaps):
        out["exposure_s"] = float(sum(snap.metadata["exposure_s"] for snap in snaps))
    begins = [snap.metadata["begin_tai"] for snap in snaps if "begin_tai" in snap.metadata]
    ends = [snap.metadata["end_tai"] for snap in snaps if "end_tai" in snap.metadata]
    if len(begins) == len(ends) == len(snaps):
        from cumbre.core.time import mjd_from_seconds

        out |= {"begin_tai": min(begins), "end_tai": max(ends)}
        out["mjd_mid_tai"] = mjd_from_seconds((min(begins) + max(ends)) / 2)
    out["problems"] = sorted({problem for snap in snaps for problem in snap.metadata.get("problems", [])})
    return out
