"""Difference of two exposures on one pixel grid: stars, PSFs, kernel, subtraction, noise calibration."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import cv2
import numpy as np
import sep
from numpy.typing import NDArray

from cumbre.core.errors import NoWorkFoundError, UnprocessableDataError
from cumbre.payloads.exposure import Exposure, FloatImage, MaskPlane
from cumbre.payloads.kernels.detect import GridPsf, robust_rms
from cumbre.payloads.kernels.difference import Subtraction, subtract
from cumbre.payloads.kernels.kernel_match import KernelSolution, fit_kernel, gaussian_basis, select_stamps
from cumbre.payloads.kernels.psf import PsfModel, fit_psf, gaussian_psf, select_psf_stars

logger = logging.getLogger(__name__)

UNUSABLE = int(MaskPlane.unusable() | MaskPlane.SAT_TEMPLATE)
"""Mask bits of difference pixels that are not measured."""
SHARPER = 0.88
"""Ratio of widths below which the science image is convolved: its noise spoils the kernel, the template's hardly."""


@dataclass(frozen=True, slots=True)
class DifferenceConfig:
    """Choices of difference imaging; the defaults suit most cameras.

    Attributes
    ----------
    threshold
        Detection threshold, sigma.
    kernel_order, background_order
        Degrees of the polynomials over the field.
    decorrelate
        Whiten the noise after subtraction.
    reliable
        Reliability from which a source counts as real in summaries.
    max_sources
        Peaks measured at most, most significant first.
    """

    threshold: float = 5.0
    kernel_order: int = 2
    background_order: int = 1
    decorrelate: bool = True
    reliable: float = 0.5
    max_sources: int = 5000


@dataclass(frozen=True, slots=True)
class Stars:
    """Detections on one image, brightest first; every array has shape (n,)."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]
    snr: NDArray[np.float64]
    half_light: NDArray[np.float64]
    elongation: NDArray[np.float64]
    is_clean: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.x)


@dataclass(slots=True)
class Difference:
    """A subtraction and what is needed to measure on it.

    Attributes
    ----------
    exposure
        The difference in science units, with calibrated variance and mask.
    psf
        PSF of the difference.
    template
        The registered template as given.
    matched
        (ny, nx): the convolved image.
    snr_scale
        Measured rms of the matched-filter significance before it was set to 1 (correlated noise).
    match_error
        Fraction of a star's flux that the matching leaves (robust scatter over the stars).
    is_science_convolved
        True when the science image was the sharper one.
    """

    exposure: Exposure
    psf: GridPsf
    science: Exposure
    template: Exposure
    science_psf: PsfModel
    template_psf: PsfModel
    matched: FloatImage
    solution: KernelSolution
    match_error: float
    is_science_convolved: bool
    metrics: dict[str, float] = field(default_factory=dict)


def find_stars(exposure: Exposure, *, threshold: float = 6.0) -> Stars:
    """Detect stars and galaxies on a background-subtracted exposure, brightest first."""
    bad = (exposure.mask & MaskPlane.unusable()) > 0
    image = np.ascontiguousarray(np.where(bad, 0, exposure.image), dtype=np.float32)
    good = ~bad & (exposure.variance > 0) & (exposure.variance < 1e19)
    if not good.any():
        raise UnprocessableDataError("no usable pixel in the image: every pixel is masked or not finite")
    noise = float(np.sqrt(np.percentile(exposure.variance[good][::13], 20)))
    sep.set_extract_pixstack(max(1_000_000, image.size // 2))
    try:
        found = sep.extract(image, threshold * noise, minarea=5, mask=bad, deblend_cont=0.01)
    except Exception as error:  # sep raises bare Exception when its buffers overflow
        raise UnprocessableDataError(f"star detection: {error}") from error
    x, y = found["x"].astype(float), found["y"].astype(float)
    if len(found) == 0:
        none = np.zeros(0)
        return Stars(none, none, none, none, none, none, np.zeros(0, bool))
    radius = 1.5 * float(np.clip(np.median(2.355 * np.sqrt(found["a"] * found["b"])), 2.0, 12.0))
    flux, flux_err, _ = sep.sum_circle(image, x, y, radius, err=noise)
    half, _ = sep.flux_radius(image, x, y, np.full(len(x), 3 * radius), 0.5)
    xi = np.clip(np.round(x).astype(int), 0, image.shape[1] - 1)
    yi = np.clip(np.round(y).astype(int), 0, image.shape[0] - 1)
    near_bad = cv2.dilate(bad.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    clean = ((found["flag"] & ~1) == 0) & ~near_bad[yi, xi] & (flux > 0)
    order = np.argsort(-flux, kind="stable")
    return Stars(
        x=x[order],
        y=y[order],
        flux=np.asarray(flux, float)[order],
        snr=np.asarray(flux / np.maximum(flux_err, 1e-9), float)[order],
        half_light=np.asarray(half, float)[order],
        elongation=np.asarray(found["a"] / np.maximum(found["b"], 0.1), float)[order],
        is_clean=clean[order],
    )


def measure_psf(exposure: Exposure, stars: Stars, known: Exposure | None = None) -> PsfModel:
    """The exposure's own PSF, or one fitted to its stars, or a Gaussian when there are too few.

    Parameters
    ----------
    known
        Another exposure on the same pixels; where its calibration says which sources are stars only those are
        used. In a deep image galaxies of one size can outnumber the stars.
    """
    if isinstance(exposure.psf, PsfModel):
        return exposure.psf
    if known is not None:
        stars = _only_known(stars, known)
    chosen = select_psf_stars(
        stars.x, stars.y, stars.flux, stars.snr, stars.half_light, stars.elongation,
        usable=stars.is_clean, shape=exposure.shape,
    )  # fmt: skip
    guess = 2.0 * float(np.median(stars.half_light[chosen])) if len(chosen) else 3.0
    guess = float(np.clip(guess, 1.5, 15.0)) if np.isfinite(guess) else 3.0
    noise = float(np.sqrt(np.median(exposure.variance[::7, ::7])))
    try:
        return fit_psf(
            exposure.image, exposure.mask, stars.x[chosen], stars.y[chosen],
            bad_bits=MaskPlane.unusable(), fwhm_px=guess, noise=noise,
        )  # fmt: skip
    except UnprocessableDataError as error:
        logger.warning("PSF from a Gaussian of %.1f pixels: %s", guess, error)
        return gaussian_psf(guess, exposure.shape)


def _only_known(stars: Stars, known: Exposure, *, reach: float = 1.5, least: int = 8) -> Stars:
    """The stars that ``known`` measured its PSF on; all of them when those are too few."""
    from scipy.spatial import cKDTree

    listed = known.metadata.get("stars")
    if (
        not isinstance(listed, np.ndarray)
        or "is_psf_star" not in (listed.dtype.names or ())
        or len(stars) == 0
    ):
        return stars
    listed = listed[listed["is_psf_star"]]
    if len(listed) < least:
        return stars
    tree = cKDTree(np.stack([listed["x"], listed["y"]], 1))
    near = tree.query(np.stack([stars.x, stars.y], 1))[0] < reach
    if int((near & stars.is_clean).sum()) < least:
        return stars
    return Stars(*(getattr(stars, name)[near] for name in Stars.__slots__))


def common_stars(science: Stars, template: Stars, *, reach: float = 2.0) -> NDArray[np.intp]:
    """Indices of clean science stars that the template has at the same place with a usual flux ratio."""
    from scipy.spatial import cKDTree

    if len(science) == 0 or len(template) == 0:
        return np.zeros(0, np.intp)
    distance, index = cKDTree(np.stack([template.x, template.y], 1)).query(
        np.stack([science.x, science.y], 1)
    )
    good = (distance < reach) & science.is_clean & template.is_clean[np.minimum(index, len(template) - 1)]
    index = np.where(good, index, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.log(science.flux / template.flux[index])
    good &= np.isfinite(ratio)
    if good.any():
        centre = (
            np.median(ratio[good & (science.snr > 20)])
            if (good & (science.snr > 20)).any()
            else np.median(ratio[good])
        )
        good &= np.abs(ratio - centre) < 0.35
    return np.flatnonzero(good)


def difference(science: Exposure, template: Exposure, config: DifferenceConfig | None = None) -> Difference:
    """Match PSFs and subtract.

    Parameters
    ----------
    science, template
        Background-subtracted exposures of one shape on one pixel grid, to a fraction of a pixel.

    Raises
    ------
    NoWorkFoundError
        Too few common stars, or no overlap.
    UnprocessableDataError
        Shapes differ or nothing is usable.
    """
    config = config or DifferenceConfig()
    if science.shape != template.shape:
        raise UnprocessableDataError(
            f"difference: science is {science.shape}, template {template.shape}; register the template first"
        )
    science_bad, template_bad = _bad(science), _bad(template)
    coverage = float(1 - ((template.mask & (MaskPlane.NO_DATA | MaskPlane.EDGE)) > 0).mean())
    if coverage < 0.02:
        raise NoWorkFoundError("the template does not cover the science image")
    science_stars, template_stars = find_stars(science), find_stars(template)
    science_psf, template_psf = (
        measure_psf(science, science_stars),
        measure_psf(template, template_stars, science),
    )
    is_science_convolved = science_psf.fwhm_px < SHARPER * template_psf.fwhm_px
    common = common_stars(science_stars, template_stars)
    fixed, moved = (template, science) if is_science_convolved else (science, template)
    fixed_psf, moved_psf = (
        (template_psf, science_psf) if is_science_convolved else (science_psf, template_psf)
    )
    planes = {
        "fixed": _filled(fixed.image, _bad(fixed)),
        "moved": _filled(moved.image, _bad(moved)),
        "fixed_variance": _finite_variance(fixed.variance),
        "moved_variance": _finite_variance(moved.variance),
    }
    solution = _kernel(
        planes,
        science_bad | template_bad,
        science_stars,
        common,
        (fixed_psf.fwhm_px, moved_psf.fwhm_px),
        config,
    )
    result = subtract(
        planes["fixed"], planes["fixed_variance"], planes["moved"], planes["moved_variance"],
        science_bad if is_science_convolved else template_bad, solution,
        is_science_convolved=is_science_convolved, decorrelate=config.decorrelate,
    )  # fmt: skip
    mask = _mask(science, template, result, is_science_convolved)
    usable = (mask & UNUSABLE) == 0
    if not usable.any():
        raise UnprocessableDataError("difference: science and template have no common usable pixel")
    image = result.image - _residual_background(result.image, ~usable)
    variance, scale = _calibrated_variance(image, result.variance, usable)
    exposure = Exposure(
        image=image, variance=variance, mask=mask, wcs=science.wcs, zero_point=science.zero_point,
        zero_point_err=science.zero_point_err, is_background_subtracted=True, metadata=dict(science.metadata),
    )  # fmt: skip
    half = int(np.clip(np.ceil(2.5 * fixed_psf.fwhm_px), 7, 20))
    psf = GridPsf(fixed_psf.centred, result.phi, half=half)
    error = _match_error(image, mask, science, science_stars, common)
    metrics = {f"kernel_{k}": v for k, v in solution.metrics.items()}
    metrics |= {
        "science_fwhm_px": science_psf.fwhm_px,
        "template_fwhm_px": template_psf.fwhm_px,
        "is_science_convolved": float(is_science_convolved),
        "n_science_stars": float(len(science_stars)),
        "n_template_stars": float(len(template_stars)),
        "n_common_stars": float(len(common)),
        "template_coverage": coverage,
        "noise": robust_rms(image[usable]),
        "noise_scale": scale,
        "match_error": error,
    }
    return Difference(
        exposure, psf, science, template, science_psf, template_psf, result.matched, solution, error,
        is_science_convolved, metrics,
    )  # fmt: skip


def _bad(exposure: Exposure) -> NDArray[np.bool_]:
    return np.asarray(((exposure.mask & MaskPlane.unusable()) > 0) | ~np.isfinite(exposure.image))


def _filled(image: FloatImage, bad: NDArray[np.bool_]) -> FloatImage:
    """Saturated cores keep their values (wings convolve better); what is not finite becomes sky."""
    return np.where(np.isfinite(image) & ~(bad & (np.abs(image) > 1e29)), image, 0).astype(np.float32)


def _finite_variance(variance: FloatImage) -> FloatImage:
    good = np.isfinite(variance) & (variance > 0) & (variance < 1e19)
    typical = float(np.median(variance[good][::7])) if good.any() else 1.0
    return np.where(good, variance, typical).astype(np.float32)


def _kernel(
    planes: dict[str, FloatImage],
    bad: NDArray[np.bool_],
    stars: Stars,
    common: NDArray[np.intp],
    fwhm: tuple[float, float],
    config: DifferenceConfig,
) -> KernelSolution:
    """Choose stamps and widths from the data, and fit."""
    fixed_fwhm, moved_fwhm = fwhm
    shape = planes["fixed"].shape
    needed = np.sqrt(max(fixed_fwhm**2 - moved_fwhm**2, 0.0)) / 2.355
    scale = float(np.clip(max(fixed_fwhm / 4.0, needed / 1.5), 0.6, 3.5))
    sigmas = (0.7 * scale, 1.5 * scale, 3.0 * scale)
    half = int(np.clip(round(10 * scale), 6, 30))
    if min(shape) < 400:
        half = min(half, max(6, round(2.4 * sigmas[2])))
    fit_half = int(np.clip(round((2.4 if min(shape) >= 400 else 1.8) * fixed_fwhm), 7, 25))
    margin = half + fit_half
    inside = (
        (stars.x[common] > margin) & (stars.y[common] > margin)
        & (stars.x[common] < shape[1] - 1 - margin) & (stars.y[common] < shape[0] - 1 - margin)
    )  # fmt: skip
    candidates = common[inside & (stars.snr[common] > 15)]
    cells = int(np.clip(min(shape) // 200, 2, 10))
    chosen = np.zeros(0, np.intp)
    for isolation in (4.0, 2.0, 0.0):
        chosen = select_stamps(
            stars.x[candidates], stars.y[candidates], stars.snr[candidates], (shape[0], shape[1]),
            cells=cells, per_cell=6, isolation=isolation * fixed_fwhm,
        )  # fmt: skip
        if len(chosen) >= 12:
            break
    chosen = candidates[chosen]
    degrees = (6, 4, 2) if len(chosen) >= 30 else (4, 2, 1) if len(chosen) >= 10 else (2, 1, 0)
    return fit_kernel(
        planes["moved"], planes["fixed"], planes["fixed_variance"] + planes["moved_variance"], bad,
        np.stack([stars.x[chosen], stars.y[chosen]], axis=1), basis=gaussian_basis(half, sigmas, degrees),
        order=config.kernel_order, background_order=config.background_order, fit_half=fit_half,
    )  # fmt: skip


def _mask(
    science: Exposure, template: Exposure, result: Subtraction, is_science_convolved: bool
) -> NDArray[np.uint16]:
    """Science bits, template saturation and gaps, both grown by the kernel where it moved them."""
    mask = science.mask.copy()
    mask &= np.uint16(~int(MaskPlane.DETECTED | MaskPlane.DETECTED_NEGATIVE) & 0xFFFF)
    gap = (template.mask & (MaskPlane.BAD | MaskPlane.NO_DATA | MaskPlane.EDGE)) > 0
    saturated = (template.mask & MaskPlane.SAT) > 0
    mask[gap] |= np.uint16(MaskPlane.NO_DATA)
    mask[saturated] |= np.uint16(MaskPlane.SAT_TEMPLATE)
    moved = science if is_science_convolved else template
    bit = MaskPlane.SAT if is_science_convolved else MaskPlane.SAT_TEMPLATE
    reached = result.touched & ((mask & UNUSABLE) == 0)
    if reached.any():
        # What the kernel spread was a gap or a saturated star: the nearer of the two names the pixel.
        window = np.ones((2 * result.reach + 1, 2 * result.reach + 1), np.uint8)
        near_star = cv2.dilate(((moved.mask & MaskPlane.SAT) > 0).astype(np.uint8), window) > 0
        mask[reached & near_star] |= np.uint16(bit)
        mask[reached & ~near_star] |= np.uint16(MaskPlane.NO_DATA)
    mask[~np.isfinite(science.image)] |= np.uint16(MaskPlane.NO_DATA)
    return np.asarray(mask)


def _residual_background(image: FloatImage, bad: NDArray[np.bool_]) -> FloatImage | float:
    """Large-scale difference of the two skies that the kernel's polynomial did not take."""
    ny, nx = image.shape
    sky = image[~bad]
    if min(ny, nx) < 192:
        return float(np.median(sky))
    rms = robust_rms(sky)
    masked = bad | (np.abs(image - np.median(sky)) > 4 * rms)
    box = int(np.clip(min(ny, nx) // 12, 48, 128))
    fitted = sep.Background(np.ascontiguousarray(image), mask=masked, bw=box, bh=box, fw=3, fh=3)
    back = np.asarray(fitted.back(), dtype=np.float32)
    # The mesh gives the mode; where the noise is skewed (medians of few frames) fluxes need the mean.
    return back + np.float32(np.mean((image - back)[~masked]))


def _calibrated_variance(
    image: FloatImage, variance: FloatImage, usable: NDArray[np.bool_]
) -> tuple[FloatImage, float]:
    """Scale the variance so that the difference's core has unit scatter; returns the factor on sigma."""
    scatter = robust_rms((image / np.sqrt(np.maximum(variance, 1e-30)))[usable])
    scale = scatter if np.isfinite(scatter) and scatter > 0 else 1.0
    return (variance * np.float32(scale**2)).astype(np.float32), float(scale)


def _match_error(
    image: FloatImage, mask: NDArray[np.uint16], science: Exposure, stars: Stars, common: NDArray[np.intp]
) -> float:
    """Robust |difference| / flux of bright common stars: what matching leaves of a star."""
    bright = common[stars.snr[common] > 50]
    if len(bright) < 5:
        return 0.05
    radius = 3.0
    left, _, _ = sep.sum_circle(np.ascontiguousarray(image), stars.x[bright], stars.y[bright], radius)
    whole, _, _ = sep.sum_circle(
        np.ascontiguousarray(science.image), stars.x[bright], stars.y[bright], radius
    )
    xi, yi = np.round(stars.x[bright]).astype(int), np.round(stars.y[bright]).astype(int)
    good = ((mask[yi, xi] & UNUSABLE) == 0) & (whole > 0)
    if good.sum() < 5:
        return 0.05
    # A few stars were all used in the fit: what they leave is less than what others will.
    least = 0.01 if good.sum() >= 20 else 0.04
    return float(np.clip(1.4826 * np.median(np.abs(left[good] / whole[good])), least, 0.1))
