"""Calibration of one image: background, cosmic rays, stars, PSF, astrometry, zero point.

The order matters: the PSF needs stars, the astrometry their positions, the zero point PSF fluxes of stars with
a reference magnitude. What is measured on the way goes into ``exposure.metrics``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import NoWorkFoundError, UnprocessableDataError
from cumbre.core.geometry import approximate_wcs
from cumbre.core.instrument import Instrument
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels import isr
from cumbre.payloads.kernels.cosmic_rays import find_cosmic_rays, point_sources_among, star_contrast
from cumbre.payloads.kernels.match import Affine, Match, match_blind, nearest_pairs, refine, vote_shift
from cumbre.payloads.kernels.photometry import aperture_photometry, forced_psf_photometry
from cumbre.payloads.kernels.psf import PsfModel, fit_psf, select_psf_stars, windowed_centroid
from cumbre.payloads.kernels.wcs import PlaneWcs, WcsFit, fit_wcs
from cumbre.payloads.refcat import RefCat
from cumbre.payloads.stars import Detections, background_and_sources
from cumbre.payloads.zero_point import colour_of, measure_zero_point

__all__ = ["CalibrateConfig", "RefCat", "calibrate", "solve_astrometry"]

STAR_TYPE = np.dtype(
    [
        ("x", "f8"), ("y", "f8"), ("ra", "f8"), ("dec", "f8"), ("flux", "f8"), ("flux_err", "f8"), ("snr", "f8"),
        ("half_light_px", "f8"), ("bits", "u2"), ("isolated", "?"), ("is_psf_star", "?"), ("ref_index", "i8"),
    ]
)  # fmt: skip


MIN_FLUX_ERROR_STARS = 8
LEAST_FLUX_ERROR, USUAL_FLUX_ERROR = 0.001, 0.01
"""Relative error of PSF fluxes by the model: never less; where too few stars tell."""


@dataclass(frozen=True, slots=True)
class CalibrateConfig:
    """Choices of :func:`calibrate`.

    Attributes
    ----------
    threshold
        Detection threshold in sky sigma.
    mesh_px
        Background mesh.
    wcs_order
        Highest degree of the distortion polynomial.
    cosmic_rays
        Whether to look for them.
    min_matches
        Least number of matched reference stars.
    colour_term
        ``description``: that of the filter, if it has one; ``fit``: of the image's stars, beside the filter's; ``off``.
    """

    threshold: float = 6.0
    mesh_px: int = 64
    wcs_order: int = 3
    cosmic_rays: bool = True
    min_matches: int = 6
    colour_term: str = "description"


def _psf(
    exposure: Exposure, found: Detections, noise: float, bits: int
) -> tuple[PsfModel, NDArray[np.int64]]:
    x, y = np.clip(found.x.round().astype(int), 0, None), np.clip(found.y.round().astype(int), 0, None)
    clean = (exposure.mask[y, x] & bits) == 0
    chosen = select_psf_stars(
        found.x, found.y, found.flux, found.snr, found.half_light_px, found.elongation,
        usable=found.isolated & clean, shape=exposure.shape,
    )  # fmt: skip
    if chosen.size == 0:
        raise NoWorkFoundError(f"none of {len(found)} sources is a clean star; no PSF can be measured")
    guess = float(np.median(found.fwhm_px[chosen]))
    psf = fit_psf(
        exposure.image,
        exposure.mask,
        found.x[chosen],
        found.y[chosen],
        bad_bits=bits,
        fwhm_px=guess,
        noise=noise,
    )
    return psf, chosen


def _credible(
    matched: NDArray[np.int64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    x_ref: NDArray[np.float64],
    y_ref: NDArray[np.float64],
    radius: float,
    share: float = 0.2,
) -> bool:
    """Whether so many of the brightest stars are matched that it can not be chance.

    Parameters
    ----------
    matched
        Indices of the matched stars, in the order of brightness.
    x, y
        The stars, in pixels.
    x_ref, y_ref
        All reference stars that could have been matched, in pixels.
    radius
        Within which stars were matched, pixels.
    share
        Least part matched: of the brightest stars, or of the reference stars among them where those are fewer.
    """
    k = min(x.size, 60)
    count = int(np.count_nonzero(matched < k))
    density = x_ref.size / (max(float(np.ptp(x_ref) * np.ptp(y_ref)), 1.0) * np.pi / 4)
    p = 1 - float(np.exp(-density * np.pi * radius**2))
    least = share * min(k, density * float(np.ptp(x) * np.ptp(y)))
    return count >= max(least, k * p + 5 * float(np.sqrt(k * p * (1 - p))) + 3)


WIDE_POINTING_DEG = 0.75
"""How far the pointing is searched when the stars are not where the instrument's usual error allows."""
_VOTERS = 150
MOST_GROWTH, WIDEST_GROWTH, MIN_GROWTH = 8, 15.0, 6
"""Rounds, pixels and least stars in which those far from the middle are looked for."""


def _match(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    xr: NDArray[np.float64],
    yr: NDArray[np.float64],
    reach_px: float,
) -> Match | None:
    """Match pixels with predicted pixels: first as a shift, then blind."""
    # as many reference stars as put twice the voters on the detector
    share = np.ptp(x) * np.ptp(y) / max(float(np.ptp(xr) * np.ptp(yr)), 1.0)
    m = int(np.clip(2 * _VOTERS / max(share, 1e-6), 300, 8000))
    skip = 0
    while skip == 0 or skip + 30 < xr.size:
        match = _voted(x, y, xr, yr, slice(skip, skip + m), reach_px)
        if match is not None:
            return match
        # The brightest reference stars may all be saturated here: the image's brightest follow farther down.
        skip = 2 * skip if skip else m // 2
    match = match_blind(
        x, y, xr, yr, tolerance=5.0, parity=1, max_shift=reach_px * 1.5,
        n_bright_ref=int(np.clip(25 / max(share, 1e-6), 100, 1500)),
    )  # fmt: skip
    if match is not None and _credible(match.first, x, y, xr, yr, 2.5 * match.rms):
        return match
    return None


def _voted(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    xr: NDArray[np.float64],
    yr: NDArray[np.float64],
    part: slice,
    reach_px: float,
) -> Match | None:
    """The match by the shift that the brightest stars and a part of the reference agree on."""
    xs, ys = x[:_VOTERS], y[:_VOTERS]
    dx, dy, cell = 0.0, 0.0, max(2.5, reach_px / 300)
    reach = reach_px
    while True:
        more_x, more_y, votes, chance = vote_shift(
            xs + dx, ys + dy, xr[part], yr[part], max_shift=reach, cell=cell
        )
        if votes < max(5.0, chance + 6 * np.sqrt(chance) + 3):
            return None
        dx, dy = dx + more_x, dy + more_y
        if cell <= 3.0:
            break
        # again with finer cells, around what the coarse ones found
        reach, cell = 2 * cell, max(2.5, cell / 8)
    shift = Affine(np.eye(2), np.array([dx, dy]))
    match = refine(x, y, xr, yr, shift, 5.0, rounds=5)
    # where distortion is strong an affine transform reaches a part of the detector only
    if match is not None and _credible(match.first, x, y, xr, yr, 2.5 * match.rms, 0.1):
        return match
    return None


def solve_astrometry(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    reference: RefCat,
    prediction: PlaneWcs,
    *,
    band: str,
    shape: tuple[int, int],
    pointing_error_deg: float,
    order: int = 3,
    min_matches: int = 6,
) -> tuple[WcsFit, NDArray[np.int64], NDArray[np.int64]]:
    """Match stars with the reference and fit the WCS.

    Parameters
    ----------
    x, y
        0-based positions, brightest first, shape (n,).
    prediction
        Where the header says the detector looks; may be off by ``pointing_error_deg``, turned or mirrored. What does
        not match within that is tried once more within ``WIDE_POINTING_DEG``.

    Returns
    -------
    fit, star, ref
        The WCS; indices of the matched stars and reference stars (before the fit's clipping).

    Raises
    ------
    UnprocessableDataError
        No match, or fewer than ``min_matches``.
    """
    ny, nx = shape
    scale = prediction.pixel_scale_arcsec
    centre = prediction.pix2sky((nx - 1) / 2, (ny - 1) / 2)
    half_deg = 0.5 * np.hypot(nx, ny) * scale / 3600
    match = None
    for reach_deg in (pointing_error_deg, WIDE_POINTING_DEG):
        nearby = reference.cone_index(float(centre[0]), float(centre[1]), half_deg * 1.1 + reach_deg)
        near = reference.take(nearby)
        if len(near) < min_matches:
            continue
        brightness = near.brightness(band)
        rank = np.argsort(np.where(np.isfinite(brightness), brightness, np.inf), kind="stable")
        xr, yr = prediction.sky2pix(near.ra[rank], near.dec[rank])
        match = _match(x, y, xr, yr, reach_deg * 3600 / scale)
        if (match is not None and match.n >= min_matches) or pointing_error_deg >= WIDE_POINTING_DEG:
            break
    if len(near) < min_matches:
        raise NoWorkFoundError(
            f"astrometry: {len(near)} reference stars within {half_deg + reach_deg:.2f} deg of "
            f"({float(centre[0]):.4f}, {float(centre[1]):.4f}); at least {min_matches} are needed"
        )
    if match is None or match.n < min_matches:
        raise UnprocessableDataError(
            f"astrometry: {x.size} stars do not match {len(near)} reference stars around "
            f"({float(centre[0]):.4f}, {float(centre[1]):.4f}) within {reach_deg} deg; "
            "check the pointing in the header, or clouds"
        )
    first, second = match.first, rank[match.second]
    centre_px = ((nx - 1) / 2, (ny - 1) / 2)
    fit, first, second = _grown(x, y, near, first, second, centre_px, min(order, 2))
    for degree in (order, order):
        px, py = fit.wcs.sky2pix(near.ra, near.dec)
        rms_px = np.hypot(fit.rms_x_arcsec, fit.rms_y_arcsec) / scale
        radius = float(np.clip(5 * rms_px, 0.7, 3.0))
        first, second = nearest_pairs(x, y, px, py, radius)
        near_px = np.isfinite(px) & np.isfinite(py)
        if first.size < min_matches or not _credible(first, x, y, px[near_px], py[near_px], radius, 0.1):
            raise UnprocessableDataError(
                f"astrometry: only {first.size} of {x.size} stars agree with the fitted WCS; "
                "the stars do not match the reference"
            )
        fit = fit_wcs(x[first], y[first], near.ra[second], near.dec[second], crpix=centre_px, order=degree)
    return fit, first, nearby[second]


def _grown(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    near: RefCat,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    centre_px: tuple[float, float],
    order: int,
) -> tuple[WcsFit, NDArray[np.int64], NDArray[np.int64]]:
    """Fit, match again, first as far as chance would add a twentieth, then within what the fit leaves.

    An affine match reaches only as far as the distortion is small; the polynomial of the stars in the middle brings the
    others near enough to be taken in.
    """
    fit = fit_wcs(x[first], y[first], near.ra[second], near.dec[second], crpix=centre_px, order=order)
    radius = 0.0
    for _ in range(MOST_GROWTH):
        px, py = fit.wcs.sky2pix(near.ra, near.dec)
        if radius == 0.0:
            inside = (px > x.min()) & (px < x.max()) & (py > y.min()) & (py < y.max())
            density = np.count_nonzero(inside) / max(float(np.ptp(x) * np.ptp(y)), 1.0)
            widest = np.sqrt(0.05 * first.size / max(x.size * density * np.pi, 1e-12))
            widest = radius = float(np.clip(widest, 3.0, WIDEST_GROWTH))
        else:
            rms_px = np.hypot(fit.rms_x_arcsec, fit.rms_y_arcsec) / fit.wcs.pixel_scale_arcsec
            radius = float(np.clip(5 * rms_px, 0.7, widest))
        before = first, second
        first, second = nearest_pairs(x, y, px, py, radius)
        if first.size < MIN_GROWTH:
            return fit, *before
        fit = fit_wcs(x[first], y[first], near.ra[second], near.dec[second], crpix=centre_px, order=order)
        if np.array_equal(first, before[0]) and np.array_equal(second, before[1]):
            break
    return fit, first, second


def calibrate(
    exposure: Exposure,
    reference: RefCat | None,
    *,
    instrument: Instrument,
    config: CalibrateConfig | None = None,
) -> Exposure:
    """Calibrate an image after ISR.

    Parameters
    ----------
    exposure
        Result of ``assemble_and_correct``; its metadata has ra_deg, dec_deg, rotpa_deg, detector and band. It is not
        changed.
    reference
        Reference stars around the pointing; None leaves the predicted WCS and no zero point.
    instrument
        Geometry and how far the pointing may be off.

    Returns
    -------
    Exposure
        Background-subtracted with PSF, WCS (:class:`PlaneWcs`), zero point for PSF fluxes, metrics, and
        ``metadata["stars"]``: a structured array of the detected sources.

    Raises
    ------
    NoWorkFoundError
        No source, no star, or no reference stars there.
    UnprocessableDataError
        The stars do not match the reference.
    """
    config = config or CalibrateConfig()
    where = f"{exposure.metadata.get('obs_id', '?')} detector {exposure.metadata.get('detector', '?')}"
    try:
        return _calibrate(exposure, reference, instrument, config)
    except UnprocessableDataError as error:
        raise type(error)(f"{where}: {error}") from error


def _calibrate(
    exposure: Exposure, reference: RefCat | None, instrument: Instrument, config: CalibrateConfig
) -> Exposure:
    bits = MaskPlane.unusable()
    mask = exposure.mask.copy()
    bad = ((mask & bits) > 0) | ~np.isfinite(exposure.image)
    background, image, found = background_and_sources(
        exposure.image, bad, mesh=config.mesh_px, threshold=config.threshold
    )
    result = replace(
        exposure, image=image, variance=exposure.variance.copy(), mask=mask, background=background.level,
        is_background_subtracted=True, metadata=dict(exposure.metadata), metrics=dict(exposure.metrics),
    )  # fmt: skip
    found_cr = np.zeros(image.shape, bool)
    if config.cosmic_rays:
        # where structure adds to the noise (fixed patterns, few bias frames) the variance is too small
        excess = background.global_rms**2 / max(float(np.median(result.variance[::5, ::5])), 1e-6)
        # cosmic rays are the smallest detections; a width that many sources have is that of stars
        width = float(np.median(found.fwhm_px[found.isolated])) if found.isolated.any() else 2.5
        found_cr, result.image = find_cosmic_rays(
            image, result.variance * np.float32(max(1.0, excess)), bad, contrast=star_contrast(0.9 * width)
        )
        mask[found_cr] |= np.uint16(MaskPlane.CR | MaskPlane.INTRP)
        result.metrics["cosmic_ray_pixels"] = float(np.count_nonzero(found_cr))
        x, y = found.x.round().astype(int), found.y.round().astype(int)
        struck = (mask[np.clip(y, 0, mask.shape[0] - 1), np.clip(x, 0, mask.shape[1] - 1)] & MaskPlane.CR) > 0
        found = _take(found, ~struck) if (~struck).any() else found
    isr.fill_bad_pixels(result.image, result.variance, mask, int(MaskPlane.BAD | MaskPlane.NO_DATA))
    noise = background.global_rms
    result.psf, psf_stars = _psf(result, found, noise, bits | int(MaskPlane.CR))
    if found_cr.any():
        _take_back(result, found_cr, image, bad)
    x, y = windowed_centroid(
        np.ascontiguousarray(result.image), found.x, found.y, max(result.psf.fwhm_px, 1.5) / 2.3548, 8
    )
    fluxes = forced_psf_photometry(result.image, result.variance, mask, result.psf, x, y, bad_bits=bits)
    stars = np.zeros(len(found), STAR_TYPE)
    stars["x"], stars["y"], stars["snr"], stars["half_light_px"] = x, y, found.snr, found.half_light_px
    stars["flux"], stars["flux_err"], stars["bits"] = fluxes.flux, fluxes.flux_err, fluxes.bits
    stars["isolated"], stars["ref_index"] = found.isolated, -1
    stars["is_psf_star"][psf_stars] = True
    result.metadata["stars"] = stars
    _sky_metrics(result, background.global_level, noise)
    _astrometry(result, stars, reference, instrument, config)
    scale = result.wcs.pixel_scale_arcsec if result.wcs is not None else float("nan")
    result.metrics["pixel_scale_arcsec"] = scale
    result.metrics["seeing_arcsec"] = result.psf.fwhm_px * scale
    if np.isfinite(result.zero_point):
        area = result.psf.effective_area((mask.shape[1] - 1) / 2, (mask.shape[0] - 1) / 2)
        result.metrics["m5"] = result.zero_point - 2.5 * float(np.log10(5 * noise * np.sqrt(area)))
        level = background.global_level / scale**2
        if level > 0:
            result.metrics["sky_mag_arcsec2"] = result.zero_point - 2.5 * float(np.log10(level))
    return result


def _take_back(
    result: Exposure, found: NDArray[np.bool_], image: NDArray[np.float32], bad: NDArray[np.bool_]
) -> None:
    """Give point sources that were taken for cosmic rays their pixels back, now that the PSF is known."""
    back = point_sources_among(found, image, result.variance, result.psf, bad)
    result.image[back] = image[back]
    result.mask[back] &= np.uint16(~int(MaskPlane.CR | MaskPlane.INTRP) & 0xFFFF)
    result.metrics["cosmic_ray_pixels"] -= float(np.count_nonzero(back))


def _take(found: Detections, keep: NDArray[np.bool_]) -> Detections:
    return Detections(*(getattr(found, name)[keep] for name in found.__slots__))


def _sky_metrics(result: Exposure, level: float, noise: float) -> None:
    stars, psf = result.metadata["stars"], result.psf
    big = 3.0 * psf.fwhm_px
    picked = stars["is_psf_star"] & (stars["flux"] > 50 * stars["flux_err"])
    correction = float("nan")
    bad = (result.mask & MaskPlane.unusable()) > 0
    if picked.any():
        total, _, flags = aperture_photometry(
            result.image, result.variance, bad, stars["x"][picked], stars["y"][picked], big,
            annulus=(big * 1.2, big * 1.7),
        )  # fmt: skip
        ratio = (total / stars["flux"][picked])[flags == 0]
        correction = float(np.median(ratio)) if ratio.size else correction
    result.metrics.update(
        {
            "sky_electrons": level, "sky_noise_electrons": noise, "sky_adu": level / result.metadata.get("gain", 1.0),
            "psf_fwhm_px": psf.fwhm_px, "n_stars": float(psf.n_stars), "n_detections": float(len(stars)),
            "aperture_correction": correction, "psf_flux_error": _psf_flux_error(result, stars[picked], bad),
        }
    )  # fmt: skip


def _psf_flux_error(result: Exposure, stars: NDArray[np.void], bad: NDArray[np.bool_]) -> float:
    """Relative error of PSF fluxes that the model causes: their scatter against apertures beyond the noise."""
    if len(stars) < MIN_FLUX_ERROR_STARS:
        return USUAL_FLUX_ERROR
    flux, error, flags = aperture_photometry(
        result.image, result.variance, bad, stars["x"], stars["y"], 1.5 * result.psf.fwhm_px
    )
    good = (flags == 0) & (flux > 0)
    if good.sum() < MIN_FLUX_ERROR_STARS:
        return USUAL_FLUX_ERROR
    flux, error, stars = flux[good], error[good], stars[good]
    ratio = stars["flux"] / flux
    scatter = float(0.7413 * np.subtract(*np.percentile(ratio / np.median(ratio), [75, 25])))
    # both fluxes have the core's noise in common
    noise = float(np.median((error**2 - np.minimum(stars["flux_err"], error) ** 2) / flux**2))
    return float(np.sqrt(np.clip(scatter**2 - noise, LEAST_FLUX_ERROR**2, 0.05**2)))


def _astrometry(
    result: Exposure,
    stars: NDArray[np.void],
    reference: RefCat | None,
    instrument: Instrument,
    config: CalibrateConfig,
) -> None:
    """Fit WCS and zero point in place."""
    meta = result.metadata
    pointing = [float(meta.get(key, float("nan"))) for key in ("ra_deg", "dec_deg", "rotpa_deg")]
    pointing[2] = pointing[2] if np.isfinite(pointing[2]) else 0.0
    if not np.isfinite(pointing).all():
        if reference is None:
            return
        raise UnprocessableDataError("astrometry: the header has no pointing (ra, dec)")
    detector = instrument.detector(int(meta["detector"]))
    prediction = PlaneWcs.from_header(approximate_wcs(instrument, detector, *pointing))
    if reference is None:
        result.wcs = prediction
        return
    band = str(meta.get("band", ""))
    order = np.argsort(np.where(stars["flux"] > 0, -stars["flux"], np.inf), kind="stable")
    order = order[np.isfinite(stars["flux"][order])]
    fit, first, second = solve_astrometry(
        stars["x"][order], stars["y"][order], reference, prediction, band=band, shape=result.shape,
        pointing_error_deg=instrument.pointing_error_deg, order=config.wcs_order, min_matches=config.min_matches,
    )  # fmt: skip
    matched = order[first]
    result.wcs = fit.wcs
    stars["ref_index"][matched] = second
    stars["ra"], stars["dec"] = fit.wcs.pix2sky(stars["x"], stars["y"])
    clean = ((stars["bits"][matched] & (MaskPlane.SAT | MaskPlane.CR)) == 0) & fit.used
    isolated = clean & stars["isolated"][matched]
    use = isolated if isolated.sum() >= 10 else clean
    chosen = second[use]
    coloured = colour_of(
        reference, instrument, str(meta.get("physical_filter", "")), band, config.colour_term
    )
    zero = measure_zero_point(
        stars["flux"][matched][use], stars["flux_err"][matched][use], reference.magnitude(band)[chosen],
        colour=None if coloured is None else coloured[1][chosen],
        term=None if coloured is None else coloured[0], fit=config.colour_term == "fit",
    )  # fmt: skip
    result.zero_point, result.zero_point_err = zero.value, zero.error
    nx, ny = result.shape[1], result.shape[0]
    there = fit.wcs.pix2sky((nx - 1) / 2, (ny - 1) / 2)
    px, py = prediction.sky2pix(*there)
    offset = np.hypot(px - (nx - 1) / 2, py - (ny - 1) / 2) * prediction.pixel_scale_arcsec
    result.metrics.update(
        {
            "n_matched": float(matched.size),
            "astrometric_rms_arcsec": float(np.hypot(fit.rms_x_arcsec, fit.rms_y_arcsec) / np.sqrt(2)),
            "astrometric_rms_ra_arcsec": fit.rms_x_arcsec, "astrometric_rms_dec_arcsec": fit.rms_y_arcsec,
            "pointing_offset_arcsec": float(offset),
        }
        | zero.metrics()
    )  # fmt: skip
