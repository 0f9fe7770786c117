"""Difference of two exposures on one pixel grid: stars, PSFs, kernel or filters, subtraction, noise calibration."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import sep
from numpy.typing import NDArray

from cumbre.core.errors import ConfigurationError, NoWorkFoundError, UnprocessableDataError
from cumbre.payloads.exposure import Exposure, FloatImage, MaskPlane
from cumbre.payloads.kernels import planes
from cumbre.payloads.kernels.detect import GridPsf
from cumbre.payloads.kernels.difference import Subtraction, subtract
from cumbre.payloads.kernels.extract import extract
from cumbre.payloads.kernels.kernel_match import KernelSolution, fit_kernel, gaussian_basis, select_stamps
from cumbre.payloads.kernels.photometry import forced_psf_photometry
from cumbre.payloads.kernels.planes import robust_rms
from cumbre.payloads.kernels.psf import PsfModel, fit_psf, gaussian_psf, select_psf_stars, windowed_centroid
from cumbre.payloads.zogy import LEAST_SNR, filter_both

logger = logging.getLogger(__name__)

UNUSABLE = int(MaskPlane.unusable() | MaskPlane.SAT_TEMPLATE)
"""Mask bits of difference pixels that are not measured."""
MOST_STARS = 4000
"""Brightest stars that take part in the matching of two images."""
INEXACT_MATCH = 0.1
"""Part of a star's flux that may be left where the template is SUSPECT: its PSF is not the one that was matched."""
MIN_RESIDUAL_STARS = 8
USUAL_RESIDUAL = 0.02
"""Part of a star's flux that matching leaves, where too few stars tell."""
METHODS = ("alard_lupton", "zogy")
POINT_SIGMA, NEAR_POINT = 0.2, 20.0
"""Width of a Gaussian that is one pixel; how strongly a kernel is held to one between images of equal PSF."""
LATTICE, MIN_EMPTY = 36, 100
"""Places along each axis where the noise of fluxes is measured; least number of usable ones."""
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
    classifier
        ``network`` (the shipped model, for images like those it was trained on) or ``logistic``.
    method
        ``alard_lupton`` (a kernel is fitted and the sharper image convolved) or ``zogy`` (both images are filtered by
        their PSFs and noise).
    """

    threshold: float = 5.0
    kernel_order: int = 2
    background_order: int = 1
    decorrelate: bool = True
    reliable: float = 0.5
    max_sources: int = 5000
    classifier: str = "network"
    method: str = "alard_lupton"


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
    snr_scale
        Measured rms of the matched-filter significance before it was set to 1 (correlated noise).
    match_error
        Fraction of a star's flux that the matching leaves (robust scatter over the stars).
    is_science_convolved
        True when the science image was the sharper one.
    score_noise
        Variance of the matched filter's sum by errors of registration and matching, (ny, nx); None when not known.
    """

    exposure: Exposure
    psf: GridPsf
    science: Exposure
    template: Exposure
    science_psf: PsfModel
    template_psf: PsfModel
    solution: KernelSolution
    match_error: float
    is_science_convolved: bool
    metrics: dict[str, float] = field(default_factory=dict)
    score_noise: FloatImage | None = None


def find_stars(exposure: Exposure, *, threshold: float = 6.0) -> Stars:
    """Detect stars and galaxies on a background-subtracted exposure, brightest first."""
    bad = planes.flag_bad(exposure.image, exposure.mask, np.uint16(MaskPlane.unusable()))
    image = planes.finite_image(exposure.image)
    step = planes.sample_step(bad.size)
    sample = exposure.variance[::step, ::step][~bad[::step, ::step]]
    sample = sample[(sample > 0) & (sample < 1e19)]
    if sample.size == 0:
        sample = exposure.variance[~bad & (exposure.variance > 0) & (exposure.variance < 1e19)]
    if sample.size == 0:
        raise UnprocessableDataError("no usable pixel in the image: every pixel is masked or not finite")
    noise = float(np.sqrt(np.percentile(sample, 20)))
    found = extract(image, threshold * noise, minarea=5, mask=bad, deblend_cont=0.01)
    x, y = found["x"].astype(float), found["y"].astype(float)
    if len(found) == 0:
        none = np.zeros(0)
        return Stars(none, none, none, none, none, none, np.zeros(0, bool))
    radius = 1.5 * float(np.clip(np.median(2.355 * np.sqrt(found["a"] * found["b"])), 2.0, 12.0))
    flux, flux_err, _ = sep.sum_circle(image, x, y, radius, err=noise)
    half, _ = sep.flux_radius(image, x, y, np.full(len(x), 3 * radius), 0.5)
    xi = np.clip(np.round(x).astype(int), 0, image.shape[1] - 1)
    yi = np.clip(np.round(y).astype(int), 0, image.shape[0] - 1)
    clean = ((found["flag"] & ~1) == 0) & ~_near_bad(bad, xi, yi) & (flux > 0)
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


def _near_bad(bad: NDArray[np.bool_], x: NDArray[np.intp], y: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether a bad pixel lies within two pixels of each place."""
    out = np.zeros(len(x), bool)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            out |= bad[np.clip(y + dy, 0, bad.shape[0] - 1), np.clip(x + dx, 0, bad.shape[1] - 1)]
    return out


def stars_at(
    exposure: Exposure,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    fwhm_px: float,
    sized: NDArray[np.bool_] | None = None,
) -> Stars:
    """Measure an exposure at the places of another one's stars, in their order.

    Half-light radii are measured of the ``sized`` stars only, and NaN else: they cost more than all the rest.
    Places are refined by centroids; one that walks away by more than two pixels stays. Far cheaper than a detection,
    and what is no star in the other image is of no use here.
    """
    bad = planes.flag_bad(exposure.image, exposure.mask, np.uint16(MaskPlane.unusable()))
    image = planes.finite_image(exposure.image)
    sigma = max(fwhm_px, 1.5) / 2.3548
    cx, cy = windowed_centroid(image, np.ascontiguousarray(x), np.ascontiguousarray(y), sigma, 8)
    radius = 1.5 * float(np.clip(fwhm_px, 2.0, 12.0))
    step = planes.sample_step(bad.size)
    typical = float(np.median(planes.finite_variance(exposure.variance[::step, ::step])))
    noise = max(typical, 1e-30) ** 0.5
    flux, flux_err, flags = sep.sum_circle(image, cx, cy, radius, err=noise)
    half = np.full(len(cx), np.nan)
    if sized is not None and sized.any():
        half[sized], _ = sep.flux_radius(
            image, cx[sized], cy[sized], np.full(int(sized.sum()), 3 * radius), 0.5
        )
    xi = np.clip(np.round(cx).astype(int), 0, image.shape[1] - 1)
    yi = np.clip(np.round(cy).astype(int), 0, image.shape[0] - 1)
    return Stars(
        x=cx, y=cy, flux=np.asarray(flux, float), snr=np.asarray(flux / np.maximum(flux_err, 1e-9), float),
        half_light=np.asarray(half, float), elongation=np.ones(len(cx)),
        is_clean=(flags == 0) & ~_near_bad(bad, xi, yi) & (flux > 0),
    )  # fmt: skip


def _listed_stars(exposure: Exposure) -> Stars | None:
    """The sources that calibration found, when it found enough of them and measured their PSF."""
    listed = exposure.metadata.get("stars")
    if not isinstance(listed, np.ndarray) or "is_psf_star" not in (listed.dtype.names or ()):
        return None
    if len(listed) < 3 or not isinstance(exposure.psf, PsfModel):
        return None
    ny, nx = exposure.shape
    inside = (listed["x"] > -0.5) & (listed["y"] > -0.5) & (listed["x"] < nx - 0.5) & (listed["y"] < ny - 0.5)
    listed = listed[inside & (listed["flux"] > 0)]
    listed = listed[np.argsort(-listed["flux"], kind="stable")][:MOST_STARS]
    return stars_at(exposure, listed["x"], listed["y"], exposure.psf.fwhm_px) if len(listed) >= 3 else None


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
    ConfigurationError
        An unknown method.
    """
    config = config or DifferenceConfig()
    if config.method not in METHODS:
        raise ConfigurationError(f"method = {config.method!r}: expected one of {', '.join(METHODS)}")
    if science.shape != template.shape:
        raise UnprocessableDataError(
            f"difference: science is {science.shape}, template {template.shape}; register the template first"
        )
    unusable = np.uint16(MaskPlane.unusable())
    science_bad = planes.flag_bad(science.image, science.mask, unusable)
    template_bad = planes.flag_bad(template.image, template.mask, unusable)
    coverage = float(
        1 - np.count_nonzero(template.mask & (MaskPlane.NO_DATA | MaskPlane.EDGE)) / template.mask.size
    )
    if coverage < 0.02:
        raise NoWorkFoundError("the template does not cover the science image")
    science_stars, template_stars = _both_stars(science, template)
    science_psf, template_psf = (
        measure_psf(science, science_stars),
        measure_psf(template, template_stars, science),
    )
    is_proper = config.method == "zogy"
    is_science_convolved = not is_proper and science_psf.fwhm_px < SHARPER * template_psf.fwhm_px
    common = common_stars(science_stars, template_stars)
    fixed, moved = (template, science) if is_science_convolved else (science, template)
    fixed_psf, moved_psf = (
        (template_psf, science_psf) if is_science_convolved else (science_psf, template_psf)
    )
    pixels = {
        "fixed": planes.finite_image(fixed.image),
        "moved": planes.finite_image(moved.image),
        "fixed_variance": planes.finite_variance(fixed.variance),
        "moved_variance": planes.finite_variance(moved.variance),
    }
    bad_planes, fwhm = (science_bad, template_bad), (fixed_psf.fwhm_px, moved_psf.fwhm_px)
    sides = None
    if is_proper:
        use = common[science_stars.snr[common] > LEAST_SNR]
        sides = filter_both(
            (pixels["fixed"], pixels["moved"]), (pixels["fixed_variance"], pixels["moved_variance"]), bad_planes,
            (science_psf, template_psf), science_stars.x[use], science_stars.y[use],
        )  # fmt: skip
        pixels = {
            "fixed": sides.science, "moved": sides.template, "fixed_variance": sides.science_variance,
            "moved_variance": sides.template_variance,
        }  # fmt: skip
        bad_planes, fwhm = (sides.science_bad[0], sides.template_bad[0]), (max(fwhm), max(fwhm))
    solution = matching_kernel(pixels, bad_planes, science_stars, common, fwhm, config, near_point=is_proper)
    result = subtract(
        pixels["fixed"], pixels["fixed_variance"], pixels["moved"], pixels["moved_variance"],
        bad_planes[0] if is_science_convolved else bad_planes[1], solution,
        is_science_convolved=is_science_convolved, decorrelate=config.decorrelate and not is_proper,
        interpolated=None if is_proper else _interpolated(moved.mask),
    )  # fmt: skip
    if sides is not None:
        result.reach += sides.template_bad[1]
    mask = _mask(science, template, result, is_science_convolved)
    if sides is not None:
        _name_science_reach(mask, science, *sides.science_bad)
        # the factor between the units of the images, by the PSF fluxes of stars, as without filters
        solution.metrics["sum"] = 1.0 / sides.relation.at(science.shape[1] / 2, science.shape[0] / 2)[0]
    del pixels, science_bad, template_bad, bad_planes
    image = result.image
    bad = planes.flag_bad(image, mask, np.uint16(UNUSABLE))
    if bad.all():
        raise UnprocessableDataError("difference: science and template have no common usable pixel")
    _subtract_residual_background(image, bad)
    scale = robust_rms(planes.pulls(image, result.variance, bad, planes.sample_step(bad.size)))
    scale = scale if np.isfinite(scale) and scale > 0 else 1.0
    variance = np.multiply(result.variance, np.float32(scale**2), out=result.variance)
    exposure = Exposure(
        image=image, variance=variance, mask=mask, wcs=science.wcs, zero_point=science.zero_point,
        zero_point_err=science.zero_point_err, is_background_subtracted=True, metadata=dict(science.metadata),
    )  # fmt: skip
    half = int(np.clip(np.ceil(2.5 * fwhm[0]), 7, 20))
    phi = result.phi if sides is None else sides.filters.science
    psf = GridPsf(fixed_psf.centred, phi, half=half)
    error = _match_error(image, mask, science, science_stars, common)
    residual = _match_residual(exposure, science, fixed_psf, science_stars, common)
    zero_point_err = science.zero_point_err if np.isfinite(science.zero_point_err) else 0.0
    science_noise = _noise_scale(science, science_psf)
    metrics = {f"kernel_{k}": v for k, v in solution.metrics.items()}
    metrics |= {
        "science_fwhm_px": science_psf.fwhm_px,
        "template_fwhm_px": template_psf.fwhm_px,
        "is_science_convolved": float(is_science_convolved),
        "n_science_stars": float(len(science_stars)),
        "n_template_stars": float(len(template_stars)),
        "n_common_stars": float(len(common)),
        "template_coverage": coverage,
        "noise": robust_rms(planes.sampled(image, bad)),
        "noise_scale": scale,
        "match_error": error,
        "match_residual": residual,
        "science_noise_scale": science_noise[0],
        "science_empty_err": science_noise[1],
        "template_noise_scale": _noise_scale(template, template_psf)[0],
        "flux_error": float(np.hypot(science.metrics.get("psf_flux_error", 0.01), 0.921 * zero_point_err)),
    }
    made = Difference(
        exposure, psf, science, template, science_psf, template_psf, solution, error,
        is_science_convolved, metrics,
    )  # fmt: skip
    if sides is not None:
        metrics |= sides.metrics()
        made.score_noise = sides.score_noise(psf, residual)
    return made


def _name_science_reach(
    mask: NDArray[np.uint16], science: Exposure, touched: NDArray[np.bool_], reach: int
) -> None:
    """Flag, in place, what unusable science pixels reach where that image was filtered too."""
    planes.name_reached(
        mask, touched, science.mask, np.uint16(MaskPlane.SAT), np.uint16(MaskPlane.SAT), np.uint16(MaskPlane.NO_DATA),
        np.uint16(UNUSABLE), reach,
    )  # fmt: skip


def _both_stars(science: Exposure, template: Exposure) -> tuple[Stars, Stars]:
    """Stars of both images; the template's at the places of the science's, where calibration listed those."""
    listed = _listed_stars(science)
    if listed is None:
        return find_stars(science), find_stars(template)
    sized = np.zeros(len(listed), bool)
    if not isinstance(template.psf, PsfModel):
        known = _only_known(listed, science)
        sized = np.isin(listed.x, known.x) if len(known) < len(listed) else listed.snr > 30
    measured = stars_at(template, listed.x, listed.y, science.psf.fwhm_px, sized)
    # A template too shallow or too shifted for that is searched like any other image.
    near = np.hypot(measured.x - listed.x, measured.y - listed.y) < 1.0
    bright = listed.is_clean & (listed.snr > 20)
    if bright.sum() < 10 or (near & measured.is_clean)[bright].mean() < 0.5:
        return listed, find_stars(template)
    return listed, measured


def matching_kernel(
    pixels: dict[str, FloatImage],
    bad: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    stars: Stars,
    common: NDArray[np.intp],
    fwhm: tuple[float, float],
    config: DifferenceConfig,
    *,
    near_point: bool = False,
) -> KernelSolution:
    """Choose stamps and widths from the data, and fit.

    Parameters
    ----------
    pixels
        ``fixed``, ``moved`` (the one to convolve), ``fixed_variance``, ``moved_variance``: (ny, nx), finite.
    bad
        Pixels that one image or the other forbids.
    stars, common
        Stars of either image, and which of them both have.
    fwhm
        Of fixed and moved, pixels.
    near_point
        Both images have one PSF already, up to errors; a kernel that is a point and little beside it leaves the noise as
        it is.

    Raises
    ------
    NoWorkFoundError
        Fewer than three usable stars.
    """
    fixed_fwhm, moved_fwhm = fwhm
    shape = pixels["fixed"].shape
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
    degrees: tuple[int, ...]
    degrees = (6, 4, 2) if len(chosen) >= 30 else (4, 2, 1) if len(chosen) >= 10 else (2, 1, 0)
    if near_point:
        sigmas, degrees = (POINT_SIGMA, *sigmas[1:]), (0, *degrees[1:])
    return fit_kernel(
        pixels["moved"], pixels["fixed"], (pixels["fixed_variance"], pixels["moved_variance"]), bad,
        np.stack([stars.x[chosen], stars.y[chosen]], axis=1), basis=gaussian_basis(half, sigmas, degrees),
        order=config.kernel_order, background_order=config.background_order, fit_half=fit_half,
        towards_first=NEAR_POINT if near_point else 0.0, reference_variance=pixels["moved_variance"],
    )  # fmt: skip


def _interpolated(mask: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Defects that hold a value from their neighbours, also those without light; a saturated pixel holds none."""
    bits = np.uint16(MaskPlane.INTRP | MaskPlane.SAT)
    return np.asarray((mask & bits) == np.uint16(MaskPlane.INTRP))


def _mask(
    science: Exposure, template: Exposure, result: Subtraction, is_science_convolved: bool
) -> NDArray[np.uint16]:
    """Science bits, template saturation and gaps, both grown by the kernel where it moved them."""
    mask, open_ends = planes.join_masks(
        science.mask, science.image, template.mask, result.touched,
        np.uint16(MaskPlane.DETECTED | MaskPlane.DETECTED_NEGATIVE),
        np.uint16(MaskPlane.BAD | MaskPlane.NO_DATA | MaskPlane.EDGE), np.uint16(MaskPlane.SAT),
        np.uint16(MaskPlane.SUSPECT), np.uint16(MaskPlane.NO_DATA), np.uint16(MaskPlane.SAT_TEMPLATE),
        np.uint16(UNUSABLE),
    )  # fmt: skip
    if open_ends:
        # What the kernel spread was a gap or a saturated star: the nearer of the two names the pixel.
        moved = science if is_science_convolved else template
        bit = MaskPlane.SAT if is_science_convolved else MaskPlane.SAT_TEMPLATE
        planes.name_reached(
            mask, result.touched, moved.mask, np.uint16(MaskPlane.SAT), np.uint16(bit), np.uint16(MaskPlane.NO_DATA),
            np.uint16(UNUSABLE), result.reach,
        )  # fmt: skip
    return np.asarray(mask)


def _subtract_residual_background(image: FloatImage, bad: NDArray[np.bool_]) -> None:
    """Take out, in place, the large-scale difference of the two skies that the kernel's polynomial did not take."""
    ny, nx = image.shape
    sky = planes.sampled(image, bad)
    centre = float(np.median(sky))
    if min(ny, nx) < 192:
        image -= np.float32(centre)
        return
    left_out = planes.flag_bright(image, bad, np.float32(centre), np.float32(4 * robust_rms(sky)))
    box = int(np.clip(min(ny, nx) // 12, 48, 128))
    fitted = sep.Background(image, mask=left_out, bw=box, bh=box, fw=3, fh=3)
    # The mesh gives the mode; where the noise is skewed (medians of few frames) fluxes need the mean.
    mean = planes.subtract_level(image, np.asarray(fitted.back(), dtype=np.float32), left_out)
    image -= np.float32(mean)


def _noise_scale(exposure: Exposure, psf: PsfModel) -> tuple[float, float]:
    """Scatter of PSF fluxes over a lattice of places in units of their errors by the variance plane, and such an error.

    More than one where the noise is correlated (resampled pixels) or sources too faint to be seen add to it. It is
    taken below the median, where stars at some of the places do not count.
    """
    ny, nx = exposure.shape
    x, y = np.meshgrid(np.linspace(0, nx - 1, LATTICE + 2)[1:-1], np.linspace(0, ny - 1, LATTICE + 2)[1:-1])
    found = forced_psf_photometry(
        exposure.image, exposure.variance, exposure.mask, psf, x, y, bad_bits=UNUSABLE
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        pulls = found.flux / found.flux_err
    good = np.isfinite(pulls)
    if good.sum() < MIN_EMPTY:
        return 1.0, 0.0
    low, middle = np.percentile(pulls[good], [15.87, 50.0])
    return float(np.clip(middle - low, 1.0, 3.0)), float(np.median(found.flux_err[good]))


def _match_error(
    image: FloatImage, mask: NDArray[np.uint16], science: Exposure, stars: Stars, common: NDArray[np.intp]
) -> float:
    """Robust |difference| / flux of bright common stars: what to expect of any bright star, all noise included."""
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


def _match_residual(
    made: Exposure, science: Exposure, psf: PsfModel, stars: Stars, common: NDArray[np.intp]
) -> float:
    """Part of a star's PSF flux that matching leaves, beyond the noise: it adds to the error of a flux on a star."""
    bright = common[stars.snr[common] > 50][:300]
    if len(bright) < MIN_RESIDUAL_STARS:
        return USUAL_RESIDUAL
    left, whole = (
        forced_psf_photometry(
            plane.image, plane.variance, plane.mask, psf, stars.x[bright], stars.y[bright], bad_bits=UNUSABLE
        )
        for plane in (made, science)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        part, noise = left.flux / whole.flux, left.flux_err / whole.flux
    good = np.isfinite(part) & (whole.flux > 0) & (np.abs(part) < 0.3)
    if good.sum() < MIN_RESIDUAL_STARS:
        return USUAL_RESIDUAL
    square = (1.4826 * float(np.median(np.abs(part[good])))) ** 2 - float(np.median(noise[good])) ** 2
    return float(np.sqrt(np.clip(square, 0.003**2, 0.1**2)))
