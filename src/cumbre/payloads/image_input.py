"""Any FITS image as an exposure: finds the image, the sky, the noise, the gain and the saturation by itself."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import sep
from numpy.typing import NDArray

from cumbre.core.errors import BadFileError, NotFoundError, UnprocessableDataError
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels.planes import robust_rms

logger = logging.getLogger(__name__)
MIN_SIDE = 64


def read_image(path: Path) -> tuple[NDArray[np.float32], dict[str, Any], Any]:
    """The largest 2-D image of a FITS file (plain, tile-compressed, .gz, .bz2, .fz).

    Returns
    -------
    image
        float32 (ny, nx), as stored (NaN kept).
    header
        Keyword → value of the primary HDU overlaid with the image's.
    wcs
        astropy WCS of the header, or None when it has no usable celestial one.

    Raises
    ------
    NotFoundError
        No such file.
    BadFileError
        Not FITS, truncated, or without a 2-D image.
    """
    from astropy.io import fits

    if not path.is_file():
        raise NotFoundError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fits.open(path, memmap=False) as hdus:
                images = [
                    h for h in hdus if h.is_image and len(h.shape) >= 2 and math.prod(h.shape[:-2]) == 1
                ]
                if not images:
                    raise BadFileError(
                        f"{path}: no HDU holds a 2-D image; give a file with an image of the sky"
                    )
                best = max(images, key=lambda h: h.shape[-1] * h.shape[-2])
                data = np.squeeze(best.data)
                if data is None or data.ndim != 2:
                    raise BadFileError(f"{path}: the image has shape {best.shape}; expected two axes")
                header = {**_plain(hdus[0].header), **_plain(best.header)}
                wcs = _wcs(best.header, hdus[0].header)
                image = np.ascontiguousarray(data, dtype=np.float32)
    except BadFileError:
        raise
    except Exception as error:  # astropy raises OSError, ValueError, TypeError, zlib.error… for damaged files
        raise BadFileError(
            f"{path}: not readable as FITS ({type(error).__name__}: {error}); copy it again"
        ) from error
    if min(image.shape) < MIN_SIDE:
        raise UnprocessableDataError(
            f"{path}: image of {image.shape[1]} x {image.shape[0]} pixels; at least {MIN_SIDE}"
        )
    return image, header, wcs


def _plain(header: Any) -> dict[str, Any]:
    return {k: v for k, v in header.items() if k and k not in ("COMMENT", "HISTORY")}


def _wcs(header: Any, primary: Any) -> Any:
    from astropy.wcs import WCS

    for candidate in (header, primary):
        if "CTYPE1" not in candidate:
            continue
        try:
            wcs = WCS(candidate).celestial
            if wcs.has_celestial and np.isfinite(wcs.all_pix2world([[1.0, 1.0]], 0)).all():
                return wcs
        except (
            Exception
        ):  # astropy's WCS raises many kinds for broken keywords; a missing WCS is no error here
            logger.info("WCS of the header is not usable", exc_info=True)
    return None


def load_exposure(
    path: Path,
    *,
    default_gain: float | None = None,
    default_saturation: float | None = None,
) -> Exposure:
    """Read an image and estimate what its header does not say.

    Sky: 128-pixel mesh. Noise: robust scatter of the sky. Gain (e-/ADU): GAIN/EGAIN keyword, argument, or
    sky / noise² when the sky is in the image (photon-limited), else no photon noise. Saturation: the
    lowest of SATURATE-like keyword (else the argument) and the level at which the image's peaks pile up.
    """
    image, header, wcs = read_image(path)
    exposure = prepare(
        image, header, default_gain=default_gain, default_saturation=default_saturation, name=path.name
    )
    exposure.wcs = wcs
    exposure.metadata |= {"path": str(path), "header": header}
    return exposure


def prepare(
    image: NDArray[np.float32],
    header: dict[str, Any],
    *,
    default_gain: float | None = None,
    default_saturation: float | None = None,
    name: str = "image",
) -> Exposure:
    """Build a background-subtracted exposure from bare pixels; see :func:`load_exposure`."""
    mask = np.zeros(image.shape, dtype=np.uint16)
    missing = ~np.isfinite(image)
    if missing.mean() > 0.9:
        raise UnprocessableDataError(f"{name}: {missing.mean():.0%} of the pixels are not finite")
    # A flat border or block (exact repeats of one value) is padding of a resampled image, not sky.
    value, share = _commonest(image[~missing])
    if share > 0.02:
        missing |= _grown(image == np.float32(value), 0)
    if missing.all() or np.ptp(image[~missing]) == 0:
        raise UnprocessableDataError(f"{name}: the image is constant; nothing to measure")
    mask[missing] |= np.uint16(MaskPlane.NO_DATA)
    filled = np.where(missing, np.median(image[~missing]), image).astype(np.float32)
    limit = _keyword(header, ("SATURATE", "SATLEVEL", "MAXLIN", "SATURATA")) or default_saturation
    observed = _pile_up(filled, missing)
    limit = min(v for v in (limit, observed, math.inf) if v is not None and v > 0)
    saturated = (filled >= limit) & ~missing
    if saturated.any():
        mask[_grown(saturated, 3)] |= np.uint16(MaskPlane.SAT)
    side = min(image.shape)
    box = int(np.clip(side // 8, 32, 128))
    try:
        background = sep.Background(filled, mask=mask > 0, bw=box, bh=box, fw=3, fh=3)
    except Exception as error:  # sep raises bare Exception
        raise UnprocessableDataError(f"{name}: background estimation failed: {error}") from error
    level = np.asarray(background.back(), dtype=np.float32)
    sky_subtracted = filled - level
    good = mask == 0
    noise = _noise(sky_subtracted, good)
    sky = float(np.median(level))
    found = _keyword(header, ("GAIN", "EGAIN", "GAINA", "ARAWGAIN")) or default_gain
    if not found or not 0.01 < found < 1000:
        found = sky / noise**2 if sky > 5 * noise else math.inf
    photon = np.maximum(sky_subtracted, 0) / np.float32(found) if math.isfinite(found) else np.float32(0)
    variance = np.where(missing, 1e20, noise**2 + photon).astype(np.float32)
    sky_subtracted[missing] = 0
    exposure = Exposure(
        image=sky_subtracted, variance=variance, mask=mask, background=level, is_background_subtracted=True
    )
    exposure.metrics = {"sky": sky, "noise": noise, "gain": float(found), "saturation": float(limit)}
    return exposure


def _commonest(values: NDArray[np.float32]) -> tuple[float, float]:
    """The most frequent exact value of a sample and its share."""
    sample = values[:: max(1, values.size // 200_000)]
    if sample.size == 0:
        return float("nan"), 1.0
    if np.array_equal(sample, np.round(sample)):  # integers repeat by themselves; only zero is padding
        return 0.0, float((sample == 0).mean())
    unique, counts = np.unique(sample, return_counts=True)
    best = int(counts.argmax())
    return float(unique[best]), float(counts[best] / sample.size)


def _keyword(header: dict[str, Any], names: tuple[str, ...]) -> float | None:
    for name in names:
        try:
            value = float(header[name])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(value) and value > 0:
            return value
    return None


def _noise(image: NDArray[np.float32], good: NDArray[np.bool_]) -> float:
    """Pixel noise of the sky from the lower half of its values, which stars do not reach."""
    values = image[good][::5]
    if values.size < 100:
        raise UnprocessableDataError("fewer than 500 usable pixels")
    middle = float(np.median(values))
    low = values[values <= middle]
    noise = float(1.4826 * np.median(middle - low))
    noise = noise if noise > 0 else robust_rms(values)
    if not noise > 0:
        raise UnprocessableDataError("the sky has no noise: is this an image of the sky?")
    return noise


def _pile_up(image: NDArray[np.float32], missing: NDArray[np.bool_]) -> float | None:
    """Level above which star peaks crowd together, as they do at saturation; None when they do not.

    Peaks of an unsaturated image get rarer with brightness; at saturation many share the highest tenth of the
    range. The limit is set to 60 % of that level: resampling and stacking spread saturated cores.
    """
    smooth = np.where(missing, 0, image).astype(np.float32)
    top = cv2.dilate(smooth, np.ones((15, 15), np.uint8))
    peaks = smooth[(smooth >= top) & ~missing]
    sky = float(np.median(smooth))
    height = float(np.sort(peaks)[-1]) - sky if peaks.size else 0.0
    if peaks.size < 10 or height <= 0:
        return None
    height_of = peaks - sky
    upper = height_of > 0.8 * height
    middle = (height_of > 0.5 * height) & (height_of <= 0.8 * height)
    fainter = (height_of > 0.05 * height) & (height_of <= 0.5 * height)
    if upper.sum() < 4 or upper.sum() <= middle.sum() or fainter.sum() < 5:
        return None
    # Equal peaks alone may be equal stars: saturated ones are flat, with less of their light in the peak.
    light = cv2.boxFilter(smooth - np.float32(sky), cv2.CV_32F, (11, 11), normalize=False)
    sharpness = height_of / np.maximum(light[(smooth >= top) & ~missing], 1e-6)
    is_flat = np.median(sharpness[upper]) < 0.85 * np.median(sharpness[fainter])
    return sky + 0.6 * height if is_flat else None


def _grown(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    if radius == 0:
        return mask
    shape = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return np.asarray(cv2.dilate(mask.astype(np.uint8), shape) > 0)
