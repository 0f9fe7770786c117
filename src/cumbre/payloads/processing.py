"""Difference sources: detect, measure, classify. What ``cumbre process`` and the prompt pipeline share.

Positions are 0-based pixels of the science image. Fluxes are in the science image's unit (electrons after
calibration, ADU otherwise). ``psfFlux`` is the PSF fit on the difference; ``flux`` is the flux in an aperture of
1.75 FWHM divided by the part of the PSF's light that falls in it, which does not depend on the PSF's exact shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.payloads import lobes, realbogus
from cumbre.payloads.difference import INEXACT_MATCH, UNUSABLE, Difference, DifferenceConfig, difference
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels import classify
from cumbre.payloads.kernels.detect import (
    SaturationReach,
    find_peaks,
    light_near,
    noise_peaks,
    significance,
    streak_mask,
)
from cumbre.payloads.kernels.glints import glint_rows
from cumbre.payloads.kernels.measure import Measurement, compactness, measure_sources
from cumbre.payloads.kernels.photometry import aperture_photometry, forced_psf_photometry
from cumbre.payloads.kernels.planes import flag_bad, flag_detected, robust_rms, sampled
from cumbre.payloads.kernels.psf import windowed_centroid

_FLOATS = (
    "ra", "dec", "raErr", "decErr", "x", "y", "xErr", "yErr", "snr", "flux", "fluxErr", "psfFlux", "psfFluxErr",
    "psfChi2", "apFlux", "apFluxErr", "scienceFlux", "scienceFluxErr", "templateFlux", "templateFluxErr",
    "reliability", "correlation", "elongation", "barAngle", *lobes.FLOATS,
)  # fmt: skip
FLAGS = {
    "flagBad": int(MaskPlane.BAD),
    "flagSaturated": int(MaskPlane.SAT),
    "flagInterpolated": int(MaskPlane.INTRP),
    "flagCosmicRay": int(MaskPlane.CR),
    "flagEdge": int(MaskPlane.EDGE),
    "flagNoData": int(MaskPlane.NO_DATA),
    "flagStreak": int(MaskPlane.STREAK),
    "flagSaturatedTemplate": int(MaskPlane.SAT_TEMPLATE),
    "flagInjected": int(MaskPlane.INJECTED),
}
EDGE_PX = 3
_REJECT = int(MaskPlane.CR | MaskPlane.SAT | MaskPlane.SAT_TEMPLATE | MaskPlane.BAD)
_DETECTED = np.uint16(MaskPlane.DETECTED), np.uint16(MaskPlane.DETECTED_NEGATIVE)
SOURCE_DTYPE = np.dtype(
    [("id", np.int64), *((name, np.float64) for name in _FLOATS), ("isNegative", bool), ("isDipole", bool)]
    + [
        ("nPix", np.int32),
        *((name, np.int32) for name in lobes.COUNTS),
        ("pixelFlags", np.uint16),
        ("pixelFlagsCentre", np.uint16),
        ("flagCentroid", bool),
        ("flagGlintTrail", bool),
    ]
    + [(name, bool) for name in (*lobes.FLAGS, *FLAGS)]
)


@dataclass(slots=True)
class DifferenceResult:
    """Everything one pair gives.

    Attributes
    ----------
    exposure
        The difference: image, variance (calibrated), mask with DETECTED, DETECTED_NEGATIVE and STREAK, WCS.
    sources
        Structured array of ``SOURCE_DTYPE``, most significant first.
    significance
        (ny, nx) matched-filter signal-to-noise.
    metrics
        Kernel sum, condition, residual; noise; PSF widths; counts.
    features
        (n_sources, n_features) features of the logistic model, and in the last column 1 where a hard rule rejects.
    inputs
        (n_sources, realbogus.N_INPUTS) inputs of the network.
    reliability_version
        Of the model that gave ``reliability``.
    """

    exposure: Exposure
    sources: NDArray[Any]
    significance: NDArray[np.float32]
    difference: Difference
    metrics: dict[str, float]
    features: NDArray[np.float64]
    inputs: NDArray[np.float32]
    reliability_version: str

    def stamps(self, x: float, y: float, half: int = 15) -> dict[str, NDArray[np.float32]]:
        """``difference``, ``science``, ``template`` cutouts of (2·half + 1)², NaN outside the image."""
        planes = {
            "difference": self.exposure.image,
            "science": self.difference.science.image,
            "template": self.difference.template.image,
        }
        return {name: cutout(plane, x, y, half) for name, plane in planes.items()}


def cutout(image: NDArray[np.float32], x: float, y: float, half: int) -> NDArray[np.float32]:
    """Square of (2·half + 1)² pixels about the pixel nearest to (x, y); NaN where the image ends."""
    out = np.full((2 * half + 1, 2 * half + 1), np.nan, dtype=np.float32)
    xi, yi = round(float(x)), round(float(y))
    ny, nx = image.shape
    y0, y1, x0, x1 = max(yi - half, 0), min(yi + half + 1, ny), max(xi - half, 0), min(xi + half + 1, nx)
    if y1 > y0 and x1 > x0:
        out[y0 - yi + half : y1 - yi + half, x0 - xi + half : x1 - xi + half] = image[y0:y1, x0:x1]
    return out


def sky_of(wcs: Any, x: Any, y: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(ra, dec) in ICRS degrees of 0-based pixels, by our PlaneWcs or astropy's WCS; NaN without one."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if wcs is None:
        return np.full(xs.shape, np.nan), np.full(xs.shape, np.nan)
    if hasattr(wcs, "pix2sky"):
        ra, dec = wcs.pix2sky(xs, ys)
    else:
        ra, dec = wcs.all_pix2world(xs, ys, 0)
    return np.asarray(ra, float) % 360.0, np.asarray(dec, float)


def process_pair(
    science: Exposure, template: Exposure, config: DifferenceConfig | None = None
) -> DifferenceResult:
    """Subtract the template from the science image, find what changed, and say how far to trust it.

    Parameters
    ----------
    science, template
        Background-subtracted exposures on one pixel grid.

    Raises
    ------
    NoWorkFoundError, UnprocessableDataError
        As :func:`cumbre.payloads.difference.difference`.
    """
    config = config or DifferenceConfig()
    made = difference(science, template, config)
    exposure, half = made.exposure, made.psf.half
    bad = flag_bad(exposure.image, exposure.mask, np.uint16(UNUSABLE))
    snr = significance(exposure.image, exposure.variance, bad, made.psf, half, made.score_noise)
    # Resampled or stacked pixels are correlated: the filtered noise is measured, not assumed.
    scale = robust_rms(sampled(snr, bad))
    scale = scale if np.isfinite(scale) and scale > 0 else 1.0
    snr /= np.float32(scale)
    fwhm = max(made.science_psf.fwhm_px, made.template_psf.fwhm_px)
    streak = streak_mask(snr, width=3.0 * fwhm)
    if streak is not None:
        exposure.mask[streak] |= np.uint16(MaskPlane.STREAK)
        bad |= streak
    flag_detected(exposure.mask, snr, np.float32(config.threshold), *_DETECTED)
    x, y, _ = find_peaks(snr, config.threshold, radius=max(2, round(0.8 * fwhm)))
    keep = _independent(x, y, np.abs(snr[y, x]), fwhm)
    x, y = x[keep][: config.max_sources], y[keep][: config.max_sources]
    measurer = _Measurer(made, snr, bad, scale, fwhm, has_streak=streak is not None)
    del bad
    sources = measurer.table(x, y)
    features = np.array([measurer.features[i] for i in sources["id"]]).reshape(
        len(sources), len(classify.WEIGHTS) + 1
    )
    sources["id"] = np.arange(1, len(sources) + 1)
    described = realbogus.describe(made, sources, features, scale)
    # A star that varied is no dipole, even where its light was subtracted a little off its place.
    sources["isDipole"] &= ~realbogus.is_change_of_flux(described.change, made.match_error)
    features[:, -1] = np.maximum(features[:, -1], sources["isDipole"])
    version = classify.VERSION
    if config.classifier == "network":
        model = realbogus.load_model()
        measured = [psf.residual for psf in (made.science_psf, made.template_psf) if psf.n_stars]
        inexact = min(measured, default=np.inf)
        if model.covers(fwhm_px=fwhm, noise_correlation=scale, psf_residual=inexact):
            version = model.version
            sources["reliability"] = model.scores(described.inputs)
    sources["reliability"][features[:, -1] > 0] = 0.0
    # The models know the noise of the pixels; what is told is the whole error.
    _whole_direct_errors(sources, made)
    # Flashes are points of light that were there: they are flagged, and keep their reliability.
    points = np.flatnonzero(~sources["isNegative"] & ~sources["isDipole"] & (features[:, -1] == 0))
    rows = glint_rows(sources["x"][points], sources["y"][points], exposure.shape, fwhm)
    sources["flagGlintTrail"][points[rows]] = True
    measurer.fit_lobes(sources)
    metrics = dict(made.metrics)
    metrics |= {
        "snr_scale": scale,
        "n_peaks": float(keep.sum()),
        "n_sources": float(len(sources)),
        "n_reliable": float((sources["reliability"] >= config.reliable).sum()),
        "n_negative": float(sources["isNegative"].sum()),
        "n_glints": float(sources["flagGlintTrail"].sum()),
        "n_dipoles": float(sources["isDipole"].sum()),
        "n_trails": float((sources["trailNPix"] > 0).sum()),
        "noise_peaks_positive": measurer.tails[0][0],
        "noise_slope_positive": measurer.tails[0][1],
        "noise_peaks_negative": measurer.tails[1][0],
        "noise_slope_negative": measurer.tails[1][1],
        "streak_fraction": 0.0 if streak is None else float(streak.mean()),
    }
    return DifferenceResult(exposure, sources, snr, made, metrics, features, described.inputs, version)


def whole_error(
    metrics: Mapping[str, float], noise: Any, flux: Any, template_light: Any, *, is_inexact: Any
) -> Any:
    """Error of PSF fluxes on a difference: of numbers, or of arrays of shape (n,).

    Parameters
    ----------
    metrics
        Of the difference.
    noise
        That of the pixels in the flux.
    template_light
        The template's flux at the place, in science units.
    is_inexact
        Where the template's PSF is not the one that was matched (SUSPECT).
    """
    left = np.where(
        is_inexact, max(metrics["match_residual"], 0.5 * INEXACT_MATCH), metrics["match_residual"]
    )
    # the noise; the PSF model and the zero point; what matching leaves of a star at the place
    return np.sqrt(noise**2 + (metrics["flux_error"] * flux) ** 2 + (left * template_light) ** 2)


def science_flux_error(metrics: Mapping[str, float], noise: Any, flux: Any) -> Any:
    """Error of PSF fluxes on the science image: numbers or arrays (n,), parameters as for :func:`whole_error`.

    What empty places scatter by beyond their noise, of sources too faint to be seen, comes to every flux; the noise of
    a star's own light is what its pixels say.
    """
    faint = (metrics["science_noise_scale"] ** 2 - 1) * np.minimum(noise, metrics["science_empty_err"]) ** 2
    return np.sqrt(noise**2 + faint + (metrics["flux_error"] * flux) ** 2)


def _whole_direct_errors(sources: NDArray[Any], made: Difference) -> None:
    """Errors of fluxes on science image and template, in place: noise as it is, PSF model, zero point."""
    sources["scienceFluxErr"] = science_flux_error(
        made.metrics, sources["scienceFluxErr"], sources["scienceFlux"]
    )
    # Resampling correlates all the noise, also that of the star's own light.
    noise = made.metrics["template_noise_scale"] * sources["templateFluxErr"]
    sources["templateFluxErr"] = np.hypot(noise, made.metrics["flux_error"] * sources["templateFlux"])


def template_factor(made: Difference) -> float:
    """Science units in one unit of the template."""
    kernel_sum = made.solution.metrics["sum"]
    return 1.0 / kernel_sum if made.is_science_convolved else kernel_sum


def _independent(
    x: NDArray[np.intp], y: NDArray[np.intp], strength: NDArray[np.float32], fwhm: float
) -> NDArray[np.bool_]:
    """False for the ripples around a peak many times stronger (peaks come strongest first)."""
    from scipy.spatial import cKDTree

    keep = np.ones(len(x), dtype=bool)
    if len(x) < 2:
        return keep
    tree = cKDTree(np.stack([x, y], axis=1))
    for index in range(len(x)):
        if not keep[index]:
            continue
        for other in tree.query_ball_point((x[index], y[index]), 2.5 * fwhm):
            if other > index and strength[other] < 0.12 * strength[index]:
                keep[other] = False
    return keep


class _Measurer:
    """Measures peaks of one difference."""

    def __init__(
        self,
        made: Difference,
        snr: NDArray[np.float32],
        bad: NDArray[np.bool_],
        scale: float,
        fwhm: float,
        *,
        has_streak: bool,
    ) -> None:
        self._made, self._snr, self._scale, self._fwhm = made, snr, scale, fwhm
        exposure = made.exposure
        self._mask = exposure.mask
        self._aperture = 1.5 * fwhm
        self._wide = 1.75 * fwhm
        # The wider the PSF, the more a cosmic ray differs from it: there the PSF may be known less well.
        self._core_tolerance = float(np.clip(0.03 * (fwhm / 2.2) ** 2, 0.03, 0.15))
        self._tolerance = float(np.clip(4 * made.science_psf.residual, 0.15, 0.25))
        radius = max(2, round(0.8 * fwhm))
        self.tails = noise_peaks(snr, bad, radius), noise_peaks(snr, bad, radius, sign=-1)
        on_streak = np.zeros(0)
        if has_streak:
            on_streak = np.abs(snr[(exposure.mask & np.uint16(MaskPlane.STREAK)) > 0])
        self._streak_level = float(np.median(on_streak[on_streak > 3])) if (on_streak > 3).any() else 0.0
        self._psf_shape: dict[int, tuple[float, float, float]] = {}
        self.features: list[tuple[float, ...]] = []

    def table(self, x: NDArray[np.intp], y: NDArray[np.intp]) -> NDArray[Any]:
        rows = np.zeros(len(x), dtype=SOURCE_DTYPE)
        exposure = self._made.exposure
        measured = measure_sources(
            exposure.image, exposure.variance, self._mask, self._snr, self._made.psf, x, y, unusable=UNUSABLE,
            aperture_radius=self._aperture, variance_scale=self._scale**2, profile_tolerance=self._tolerance,
            core_tolerance=self._core_tolerance, hit_bits=int(MaskPlane.CR),
        )  # fmt: skip
        here, near = light_near(self._made.template.image, x, y, self._fwhm)
        factor = template_factor(self._made)
        halo = SaturationReach(self._mask, int(MaskPlane.SAT | MaskPlane.SAT_TEMPLATE), self._fwhm)(x, y)
        for index, (source, px, py) in enumerate(zip(measured, x.tolist(), y.tolist(), strict=True)):
            rows[index]["id"] = index
            light = float(here[index]) * factor, float(near[index]) * factor
            self._fill(rows[index], source, px, py, template=light, halo=float(halo[index]))
        self._wide_fluxes(rows)
        rows = _without_doubles(rows, self._fwhm)
        self._direct_fluxes(rows)
        wcs = self._made.exposure.wcs
        rows["ra"], rows["dec"] = sky_of(wcs, rows["x"], rows["y"])
        if wcs is not None and len(rows):
            _, north = sky_of(wcs, rows["x"], rows["y"] + 1.0)
            east, _ = sky_of(wcs, rows["x"], rows["y"] + 1.0)
            turn = (east - rows["ra"] + 180) % 360 - 180
            scale = np.hypot(turn * np.cos(np.radians(rows["dec"])), north - rows["dec"])
            position = np.hypot(rows["xErr"], rows["yErr"]) / np.sqrt(2)
            rows["raErr"] = rows["decErr"] = position * scale
        else:
            rows["raErr"] = rows["decErr"] = np.nan
        return rows

    def _shape_of_psf(self, x: int, y: int) -> tuple[float, float, float]:
        """(axis ratio, compactness, light in the aperture) of the PSF there."""
        stamp = self._made.psf(x, y)
        key = id(stamp)
        if key not in self._psf_shape:
            half = self._made.psf.half
            grid = np.arange(-half, half + 1)
            radius = np.hypot(grid[None, :], grid[:, None])
            weight = np.where(radius <= 1.5 * self._aperture, np.maximum(stamp, 0), 0)
            weight = np.where(weight > 0.03 * stamp.max(), weight, 0)
            xx, yy = (weight * grid[None, :] ** 2).sum(), (weight * grid[:, None] ** 2).sum()
            xy = (weight * np.outer(grid, grid)).sum()
            spread = np.hypot((xx - yy) / 2, xy)
            ratio = float(np.sqrt(((xx + yy) / 2 + spread) / max((xx + yy) / 2 - spread, 1e-9)))
            inside = float((np.clip(self._wide + 0.5 - radius, 0, 1) * stamp).sum())
            self._psf_shape[key] = ratio, compactness(stamp, radius, self._aperture), inside
        return self._psf_shape[key]

    def _fill(
        self, row: Any, source: Measurement, px: int, py: int, *, template: tuple[float, float], halo: float
    ) -> None:
        """One row; ``template`` is its light here and near, ``halo`` the closeness to a saturated star."""
        peak_snr = float(self._snr[py, px])
        ratio, psf_compactness, inside = self._shape_of_psf(px, py)
        row["x"], row["y"], row["xErr"], row["yErr"] = source.x, source.y, source.x_err, source.y_err
        row["snr"] = abs(peak_snr)
        row["psfFlux"], row["psfChi2"] = source.flux, source.chi2
        inexact = INEXACT_MATCH if source.mask_bits & MaskPlane.SUSPECT else 0.0
        row["psfFluxErr"] = whole_error(
            self._made.metrics, source.flux_err, source.flux, template[0], is_inexact=inexact > 0
        )
        row["apFlux"], row["apFluxErr"] = source.aperture_flux, source.aperture_err
        row["flux"] = inside
        row["isNegative"] = peak_snr < 0
        row["correlation"], row["elongation"] = source.correlation, source.elongation
        row["barAngle"] = source.angle
        row["nPix"], row["flagCentroid"] = source.n_pixels, source.is_centroid_bad
        row["pixelFlags"], row["pixelFlagsCentre"] = source.mask_bits, source.mask_bits_centre
        for name, plane in FLAGS.items():
            row[name] = bool(source.mask_bits & plane)
        features = classify.features_of(
            source,
            snr=abs(peak_snr),
            template_flux=template[1],
            template_here=template[0],
            masked_light=max(self._masked_light(px, py), halo),
            psf_elongation=ratio,
            psf_compactness=psf_compactness,
            noise_above=self._noise_above(peak_snr),
            match_error=2.5 * max(self._made.match_error, inexact),
        )
        partner = source.partner * abs(peak_snr)
        row["isDipole"] = partner >= 4.5 and source.partner >= 0.25
        rejected = bool(source.mask_bits_centre & _REJECT)
        # Within three pixels of the edge half of a PSF is missing: a hit there looks like anything.
        ny, nx = self._snr.shape
        rejected |= bool(min(px, py, nx - 1 - px, ny - 1 - py) < EDGE_PX)
        on_streak = bool(source.mask_bits_centre & FLAGS["flagStreak"])
        rejected |= on_streak and abs(peak_snr) < 5.0 * self._streak_level
        # A difference that fits no PSF at its own peak (sign or place) is not a source.
        rejected |= bool(source.flux * peak_snr <= 0)
        row["reliability"] = classify.reliability(features, is_rejected=rejected)
        self.features.append((*features.values(), float(rejected)))

    def _wide_fluxes(self, rows: NDArray[Any]) -> None:
        """Position by light where the PSF does not describe the source, then the flux in the wide aperture."""
        image = self._made.exposure.image
        sign = np.where(rows["isNegative"], -1.0, 1.0)
        for way in (1.0, -1.0):
            poor = np.flatnonzero((sign == way) & (rows["psfChi2"] > 2.0) & (rows["snr"] > 15.0))
            if len(poor):
                x, y = windowed_centroid(
                    image if way > 0 else -image, rows["x"][poor], rows["y"][poor], self._fwhm * 0.6, 20
                )
                near = np.hypot(x - rows["x"][poor], y - rows["y"][poor]) < self._fwhm
                rows["x"][poor[near]], rows["y"][poor[near]] = x[near], y[near]
        bad = flag_bad(image, self._mask, np.uint16(UNUSABLE))
        fraction = np.maximum(rows["flux"], 0.1)
        flux, flux_err, _ = aperture_photometry(
            image, self._made.exposure.variance, bad, rows["x"], rows["y"], self._wide
        )
        rows["flux"], rows["fluxErr"] = flux / fraction, flux_err * self._scale / fraction

    def _noise_above(self, peak_snr: float) -> float:
        count, slope = self.tails[0] if peak_snr > 0 else self.tails[1]
        return float(count * np.exp(-(abs(peak_snr) - 4.5) / slope))

    def _masked_light(self, x: int, y: int) -> float:
        """Part of the PSF on unusable pixels."""
        half = self._made.psf.half
        ny, nx = self._mask.shape
        y0, y1, x0, x1 = max(y - half, 0), min(y + half + 1, ny), max(x - half, 0), min(x + half + 1, nx)
        stamp = self._made.psf(x, y)[y0 - y + half : y1 - y + half, x0 - x + half : x1 - x + half]
        light = float(stamp[(self._mask[y0:y1, x0:x1] & UNUSABLE) == 0].sum())
        return float(np.clip(1.0 - light - 0.02, 0, 1))

    def fit_lobes(self, rows: NDArray[Any]) -> None:
        """Dipoles and trails, of the sources as they are in the end."""
        shapes = [
            self._shape_of_psf(round(float(x)), round(float(y)))[0]
            for x, y in zip(rows["x"], rows["y"], strict=True)
        ]
        lobes.fill(
            rows, self._made, self._snr, fwhm_px=self._fwhm, psf_elongation=np.array(shapes),
            variance_scale=self._scale**2, factor=template_factor(self._made),
            to_sky=lambda x, y: sky_of(self._made.exposure.wcs, x, y),
        )  # fmt: skip

    def _direct_fluxes(self, rows: NDArray[Any]) -> None:
        for name, exposure, psf in (
            ("scienceFlux", self._made.science, self._made.science_psf),
            ("templateFlux", self._made.template, self._made.template_psf),
        ):
            fluxes = forced_psf_photometry(
                exposure.image, exposure.variance, exposure.mask, psf, rows["x"], rows["y"],
                bad_bits=int(MaskPlane.BAD | MaskPlane.NO_DATA),
            )  # fmt: skip
            factor = template_factor(self._made) if name == "templateFlux" else 1.0
            rows[name], rows[name + "Err"] = fluxes.flux * factor, fluxes.flux_err * factor


def _without_doubles(rows: NDArray[Any], fwhm: float) -> NDArray[Any]:
    """Of two peaks of one sign that are one source the more significant stays.

    One source: their fits met within half a FWHM, or neither looks like the PSF within 1.6 FWHM (a source whose
    PSF is wider or more structured than the model breaks into lobes).
    """
    from scipy.spatial import cKDTree

    if len(rows) < 2:
        return rows
    order = np.argsort(-rows["snr"], kind="stable")
    rows = rows[order]
    keep = np.ones(len(rows), dtype=bool)
    pairs = cKDTree(np.stack([rows["x"], rows["y"]], axis=1)).query_pairs(1.6 * fwhm)
    for first, second in sorted(pairs):
        apart = np.hypot(rows["x"][first] - rows["x"][second], rows["y"][first] - rows["y"][second])
        lobes = min(rows["psfChi2"][first], rows["psfChi2"][second]) > 3.0
        same_sign = rows["isNegative"][first] == rows["isNegative"][second]
        if keep[first] and same_sign and (apart < 0.5 * fwhm or lobes):
            keep[second] = False
    return rows[keep]
