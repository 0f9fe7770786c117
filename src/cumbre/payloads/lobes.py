"""Dipoles and trails among the sources of a difference: who is fitted, and what is told of the fit.

A dipole is fitted to every source that is one (lobes of both signs). Where the lobes overlap so much that only the
product of their flux and distance is known, the mean flux of the star on science image and template decides. A trail is
fitted to positive and negative sources that are longer than the PSF, and is told where it describes the source better
than a point does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumbre.payloads.difference import UNUSABLE, Difference
from cumbre.payloads.exposure import MaskPlane
from cumbre.payloads.kernels.lobes import Lobes, Trails, fit_dipoles, fit_trails
from cumbre.payloads.kernels.photometry import forced_psf_photometry

if TYPE_CHECKING:
    from collections.abc import Callable

FLOATS = (
    "dipoleMeanFlux", "dipoleMeanFluxErr", "dipoleFluxDiff", "dipoleFluxDiffErr", "dipoleLength", "dipoleAngle",
    "dipoleChi2", "trailFlux", "trailFluxErr", "trailX", "trailY", "trailRa", "trailRaErr", "trailDec", "trailDecErr",
    "trailLength", "trailLengthErr", "trailAngle", "trailAngleErr", "trailChi2",
)  # fmt: skip
"""Lengths in arc seconds, angles in degrees east of north, places of trails in pixels and degrees; NaN for none."""
COUNTS = ("dipoleNPix", "trailNPix")
FLAGS = ("flagDipoleFit", "flagTrailFit", "flagTrail", "flagTrailEdge")
"""A dipole, a trail was fitted; the trail's fit failed or says no more than a point; the trail is cut off."""
MOST_DIPOLES, MOST_TRAILS = 50, 12
"""Sources of one image that are fitted, the most significant ones: a bad subtraction has hundreds of lobes."""
LEAST_TRAIL_SNR = 8.0
LONGER = 1.3
"""Axis ratio, in units of the PSF's, from which a source may be a trail."""
OVERLAP = 0.05
"""Relative error of the lobes' mean flux above which science image and template are asked."""
DIRECT = 0.1
"""How well the star on the images themselves gives the lobes' flux: hosts and neighbours are in it too."""


def fill(
    sources: NDArray[Any],
    made: Difference,
    snr: NDArray[np.float32],
    *,
    fwhm_px: float,
    psf_elongation: NDArray[np.float64],
    variance_scale: float,
    factor: float,
    to_sky: Callable[[Any, Any], tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> None:
    """Fit what needs it and write the columns of :data:`FLOATS`, :data:`COUNTS` and :data:`FLAGS`, in place.

    Parameters
    ----------
    sources
        Array of ``processing.SOURCE_DTYPE``, the most significant first, with everything else filled in.
    psf_elongation
        Axis ratio of the PSF at each source, as the sources' own was measured.
    variance_scale
        Factor on the variance of the pixels.
    factor
        Science units in one unit of the template.
    to_sky
        (ra, dec) in degrees of pixels; NaN without a WCS.
    """
    for name in FLOATS:
        sources[name] = np.nan
    inside = (sources["pixelFlagsCentre"] & (MaskPlane.NO_DATA | MaskPlane.EDGE)) == 0
    double = np.flatnonzero(sources["isDipole"] & inside)[:MOST_DIPOLES]
    if len(double):
        _fill_dipoles(sources, double, made, snr, (fwhm_px, variance_scale, factor), to_sky)
    excess = sources["elongation"] / np.maximum(psf_elongation, 1.0)
    long = (excess > LONGER + 2.0 / np.maximum(sources["snr"], 1.0)) & (sources["snr"] > LEAST_TRAIL_SNR)
    struck = (sources["pixelFlagsCentre"] & (MaskPlane.CR | MaskPlane.SAT | MaskPlane.SAT_TEMPLATE)) > 0
    bars = np.flatnonzero(long & ~sources["isDipole"] & inside & ~struck)
    # what no rule rejected comes first: residuals of bright stars are long, too
    bars = bars[np.argsort(sources["reliability"][bars] == 0, kind="stable")][:MOST_TRAILS]
    if len(bars):
        _fill_trails(sources, bars, made, snr, (fwhm_px, variance_scale), to_sky)


def _peaks(sources: NDArray[Any], shape: tuple[int, ...]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    ny, nx = shape
    x = np.clip(np.round(sources["x"]), 0, nx - 1).astype(np.intp)
    y = np.clip(np.round(sources["y"]), 0, ny - 1).astype(np.intp)
    return x, y


def _fill_dipoles(
    sources: NDArray[Any],
    rows: NDArray[np.intp],
    made: Difference,
    snr: NDArray[np.float32],
    numbers: tuple[float, float, float],
    to_sky: Any,
) -> None:
    fwhm, scale, factor = numbers
    exposure = made.exposure

    def fit(px: Any, py: Any, prior: Any = None) -> Lobes:
        return fit_dipoles(
            exposure.image, exposure.variance, exposure.mask, snr, made.psf, px, py,
            unusable=UNUSABLE, radius=2.0 * fwhm, variance_scale=scale, prior=prior,
        )  # fmt: skip

    x, y = _peaks(sources[rows], exposure.shape)
    found = _with_star(made, fit(x, y), fit, (x, y), factor)
    mean, error = found.mean_flux()
    left, left_error = found.flux_difference()
    good = found.is_good & np.isfinite(error) & (found.flux_up > 0) & (found.flux_down > 0) & (error < mean)
    part = made.metrics["flux_error"]
    length, angle = _bar(to_sky, found.x_down, found.y_down, found.x_up, found.y_up)
    values = {
        "dipoleMeanFlux": mean, "dipoleMeanFluxErr": np.hypot(error, part * mean), "dipoleFluxDiff": left,
        "dipoleFluxDiffErr": np.hypot(left_error, part * left), "dipoleLength": length, "dipoleAngle": angle % 360.0,
        "dipoleChi2": found.chi2,
    }  # fmt: skip
    for name, value in values.items():
        sources[name][rows] = np.where(good, value, np.nan)
    sources["dipoleNPix"][rows] = np.where(good, found.n_pixels, 0)
    sources["flagDipoleFit"][rows] = True


def _with_star(
    made: Difference,
    free: Lobes,
    fit: Callable[[Any, Any, Any], Lobes],
    peaks: tuple[NDArray[np.intp], NDArray[np.intp]],
    factor: float,
) -> Lobes:
    """The lobes, fitted again with the star's flux on the images where they alone do not tell theirs."""
    mean, error = free.mean_flux()
    star, star_error = _star_flux(made, free, peaks, factor)
    unsure = ~free.is_good | ~(error < OVERLAP * np.abs(mean)) | (free.flux_down <= 0) | (free.flux_up <= 0)
    which = np.flatnonzero(unsure & (star > 3.0 * star_error))
    if not len(which):
        return free
    again = fit(peaks[0][which], peaks[1][which], (star[which], star_error[which]))
    arrays = []
    for name in Lobes.__slots__:
        values = getattr(free, name).copy()
        values[which] = getattr(again, name)
        arrays.append(values)
    return Lobes(*arrays)


def _star_flux(
    made: Difference, free: Lobes, peaks: tuple[NDArray[np.intp], NDArray[np.intp]], factor: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean flux of the star between the lobes on science image and template, and its error."""
    x = np.where(free.is_good, (free.x_up + free.x_down) / 2, peaks[0])
    y = np.where(free.is_good, (free.y_up + free.y_down) / 2, peaks[1])
    total, square = np.zeros(len(x)), np.zeros(len(x))
    for exposure, psf, unit in (
        (made.science, made.science_psf, 1.0),
        (made.template, made.template_psf, factor),
    ):
        fluxes = forced_psf_photometry(
            exposure.image, exposure.variance, exposure.mask, psf, x, y,
            bad_bits=int(MaskPlane.BAD | MaskPlane.NO_DATA),
        )  # fmt: skip
        total += 0.5 * unit * np.nan_to_num(fluxes.flux)
        square += (0.5 * unit * np.nan_to_num(fluxes.flux_err, posinf=0.0)) ** 2
    return total, np.sqrt(square + (DIRECT * total) ** 2)


def _fill_trails(
    sources: NDArray[Any],
    rows: NDArray[np.intp],
    made: Difference,
    snr: NDArray[np.float32],
    numbers: tuple[float, float],
    to_sky: Any,
) -> None:
    fwhm, scale = numbers
    exposure = made.exposure
    x, y = _peaks(sources[rows], exposure.shape)
    found = fit_trails(
        exposure.image, exposure.variance, exposure.mask, snr, made.psf, x, y, np.radians(sources["barAngle"][rows]),
        unusable=UNUSABLE, radius=2.0 * fwhm, variance_scale=scale,
    )  # fmt: skip
    errors = np.sqrt(np.maximum(np.diagonal(found.covariance, axis1=1, axis2=2), 0.0))
    good = _is_bar(found, errors)
    ux, uy = found.length / 2 * np.cos(found.angle), found.length / 2 * np.sin(found.angle)
    length, angle = _bar(to_sky, found.x - ux, found.y - uy, found.x + ux, found.y + uy)
    ra, dec = to_sky(found.x, found.y)
    with np.errstate(invalid="ignore", divide="ignore"):
        pixel_arcsec = length / found.length
    part = made.metrics["flux_error"]
    values = {
        "trailFlux": found.flux, "trailFluxErr": np.hypot(errors[:, 0], part * found.flux), "trailX": found.x,
        "trailY": found.y, "trailRa": ra, "trailDec": dec,
        "trailLength": length, "trailLengthErr": errors[:, 3] * pixel_arcsec, "trailAngle": angle % 180.0,
        "trailAngleErr": np.degrees(errors[:, 4]), "trailChi2": found.chi2,
    }  # fmt: skip
    east, north = _sky_errors(to_sky, found)
    values |= {"trailRaErr": east, "trailDecErr": north}
    for name, value in values.items():
        sources[name][rows] = np.where(good, value, np.nan)
    sources["trailNPix"][rows] = np.where(good, found.n_pixels, 0)
    sources["flagTrailFit"][rows] = True
    sources["flagTrail"][rows] = ~good
    sources["flagTrailEdge"][rows] = good & found.is_cut


def _is_bar(found: Trails, errors: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where a bar says more than a point: its length is certain, and it explains most of what a point leaves."""
    over, left = found.chi2_point - found.n_pixels, found.chi2 - found.n_pixels
    better = (found.chi2_point - found.chi2 > 25.0) & (
        (left < 0.5 * over) | (found.chi2 < 1.5 * found.n_pixels)
    )
    certain = (found.length > 3.0 * errors[:, 3]) & (np.abs(found.flux) > 5.0 * errors[:, 0])
    return found.is_good & np.isfinite(errors).all(axis=1) & better & certain


def _bar(
    to_sky: Any,
    x0: NDArray[np.float64],
    y0: NDArray[np.float64],
    x1: NDArray[np.float64],
    y1: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(length in arc seconds, position angle in degrees east of north) from one place to another."""
    ra0, dec0 = to_sky(x0, y0)
    ra1, dec1 = to_sky(x1, y1)
    east = ((ra1 - ra0 + 180) % 360 - 180) * np.cos(np.radians((dec0 + dec1) / 2))
    north = dec1 - dec0
    return 3600.0 * np.hypot(east, north), np.degrees(np.arctan2(east, north))


def _sky_errors(to_sky: Any, found: Trails) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Errors of the centre in degrees, eastward (times cos dec) and northward."""
    ra, dec = to_sky(found.x, found.y)
    rows = []
    for dx, dy in ((1.0, 0.0), (0.0, 1.0)):
        there_ra, there_dec = to_sky(found.x + dx, found.y + dy)
        rows.append((((there_ra - ra + 180) % 360 - 180) * np.cos(np.radians(dec)), there_dec - dec))
    xx, yy, xy = found.covariance[:, 1, 1], found.covariance[:, 2, 2], found.covariance[:, 1, 2]
    out = []
    for axis in (0, 1):
        a, b = rows[0][axis], rows[1][axis]
        out.append(np.sqrt(np.maximum(a * a * xx + b * b * yy + 2 * a * b * xy, 0.0)))
    return out[0], out[1]
