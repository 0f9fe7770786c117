"""Light curves of every star in a series of frames of one field, and a fit of a transit-like dip.

The frames may drift by hundreds of pixels and need neither WCS nor bias, dark and flat: each is registered on
a reference frame by its stars, stars that enter the field later are added, and each star is one object through the
night. Brightness is relative to the ensemble of all constant stars in the frame. Positions on the sky come from the
pointing and scale in the header only, so they are good to that pointing (see ``pointing_error_deg`` of the
instrument): identify stars by their place relative to one another, not by absolute coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.core.errors import NoWorkFoundError, UnprocessableDataError
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels.match import Affine, match_images, nearest_pairs
from cumbre.payloads.kernels.photometry import aperture_photometry
from cumbre.payloads.kernels.psf import windowed_centroid
from cumbre.payloads.stars import Detections, background_and_sources

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LightCurves:
    """Brightness of n stars in m frames.

    Attributes
    ----------
    mjd_tai
        (m,) middle of the exposures, TAI.
    x, y
        (n,) positions in the reference frame (may lie outside it).
    flux, flux_err
        (n, m) aperture sums; NaN where the star was outside, saturated or masked.
    relative, relative_err
        (n, m) flux over the star's own median after removal of what all stars have in common.
    n_stars_frame
        (m,) ensemble stars in each frame.
    transforms
        From each frame's pixels to the reference frame's.
    reference
        Index of the reference frame.
    """

    mjd_tai: Floats
    x: Floats
    y: Floats
    flux: Floats
    flux_err: Floats
    relative: Floats
    relative_err: Floats
    n_stars_frame: NDArray[np.int64]
    transforms: tuple[Affine, ...]
    reference: int

    def nearest(self, x: float, y: float, frame: int | None = None) -> int:
        """Index of the star nearest to a pixel of a frame (the reference frame by default)."""
        if frame is not None:
            x, y = (float(v) for v in self.transforms[frame](x, y))
        return int(np.argmin(np.hypot(self.x - x, self.y - y)))

    def table(self) -> NDArray[np.void]:
        """One row per measurement: object, frame, mjd_tai, x, y (reference frame), flux…; finite ones only."""
        star, frame = np.nonzero(np.isfinite(self.relative))
        rows = np.zeros(
            star.size,
            [("object", "i8"), ("frame", "i8"), ("mjd_tai", "f8"), ("x", "f8"), ("y", "f8"), ("flux", "f8"),
             ("flux_err", "f8"), ("relative", "f8"), ("relative_err", "f8")],
        )  # fmt: skip
        rows["object"], rows["frame"], rows["mjd_tai"] = star, frame, self.mjd_tai[frame]
        rows["x"], rows["y"] = self.x[star], self.y[star]
        for name in ("flux", "flux_err", "relative", "relative_err"):
            rows[name] = getattr(self, name)[star, frame]
        return rows


def _prepare(frame: Exposure, threshold: float) -> tuple[NDArray[np.float32], Detections]:
    bad = (frame.mask & (MaskPlane.BAD | MaskPlane.NO_DATA)) > 0
    _, image, found = background_and_sources(frame.image, bad, threshold=threshold)
    return np.ascontiguousarray(image, np.float32), found


def _register(found: Sequence[Detections], reference: int) -> tuple[list[Affine | None], Floats, Floats]:
    """Transforms to the reference frame and the union of all stars, growing outwards in time."""
    x, y = found[reference].x.copy(), found[reference].y.copy()
    seen = np.ones(x.size)
    transforms: list[Affine | None] = [None] * len(found)
    transforms[reference] = Affine.identity()
    order = sorted(range(len(found)), key=lambda k: abs(k - reference))
    for k in order:
        if k == reference:
            continue
        known = np.argsort(-seen, kind="stable")
        match = match_images(found[k].x, found[k].y, x[known], y[known])
        if match is None:
            continue
        transforms[k] = match.transform
        px, py = match.transform(found[k].x, found[k].y)
        first, second = nearest_pairs(px, py, x, y, 3.0)
        seen[second] += 1
        new = np.ones(px.size, bool)
        new[first] = False
        # not beside a known star: that is the same one, blended in this frame
        beside = np.min(np.hypot(px[:, None] - x, py[:, None] - y), axis=1) < 6.0
        new &= ~beside
        x, y, seen = np.append(x, px[new]), np.append(y, py[new]), np.append(seen, np.ones(int(new.sum())))
    keep = seen >= max(3.0, 0.25 * len(found))
    return transforms, x[keep], y[keep]


def ensemble_light_curves(
    frames: Sequence[Exposure], *, aperture_px: float | None = None, threshold: float = 50.0
) -> LightCurves:
    """Measure all stars of a series of frames.

    Parameters
    ----------
    frames
        After ``assemble_and_correct``, of one field and filter, in any order; ``metadata["mjd_mid_tai"]`` is
        the time.
    aperture_px
        Radius; by default 1.6 times the median FWHM of the sources.
    threshold
        Detection threshold in sigma; stars fainter than some tens of sigma add noise to the ensemble.

    Raises
    ------
    NoWorkFoundError
        Fewer than 3 frames.
    UnprocessableDataError
        Fewer than half of the frames could be registered.
    """
    if len(frames) < 3:
        raise NoWorkFoundError(f"light curves: {len(frames)} frames; at least 3 are needed")
    frames = sorted(frames, key=lambda frame: float(frame.metadata["mjd_mid_tai"]))
    prepared = [_prepare(frame, threshold) for frame in frames]
    found = [item[1] for item in prepared]
    reference = len(frames) // 2
    transforms, x, y = _register(found, reference)
    placed = [k for k, transform in enumerate(transforms) if transform is not None]
    if len(placed) < max(3, len(frames) / 2):
        raise UnprocessableDataError(
            f"light curves: only {len(placed)} of {len(frames)} frames could be registered on each other"
        )
    width = float(np.median(np.concatenate([item.fwhm_px[item.isolated] for item in found])))
    radius = aperture_px or 1.6 * width
    flux, error = np.full((x.size, len(placed)), np.nan), np.full((x.size, len(placed)), np.nan)
    chosen: list[Affine] = []
    for column, k in enumerate(placed):
        transform = transforms[k]
        assert transform is not None
        chosen.append(transform)
        flux[:, column], error[:, column] = _measure(
            prepared[k][0], frames[k], transform, x, y, radius, width
        )
    relative, relative_err, count = _ensemble(flux, error)
    times = np.array([float(frames[k].metadata["mjd_mid_tai"]) for k in placed])
    return LightCurves(
        times, x, y, flux, error, relative, relative_err, count, tuple(chosen), placed.index(reference)
    )


def _measure(
    image: NDArray[np.float32],
    frame: Exposure,
    transform: Affine,
    x: Floats,
    y: Floats,
    radius: float,
    width: float,
) -> tuple[Floats, Floats]:
    """Aperture fluxes of the stars of the union in one frame; NaN where they can not be measured."""
    ny, nx = image.shape
    px, py = transform.inverse()(x, y)
    edge = 3.0 * radius
    inside = (px > edge) & (py > edge) & (px < nx - 1 - edge) & (py < ny - 1 - edge)
    flux, error = np.full(x.size, np.nan), np.full(x.size, np.nan)
    if not inside.any():
        return flux, error
    cx, cy = windowed_centroid(
        image, np.ascontiguousarray(px[inside]), np.ascontiguousarray(py[inside]), width / 2.3548, 6
    )
    # each star keeps the place that all stars give it, unless its own centroid is near
    close = np.hypot(cx - px[inside], cy - py[inside]) < 1.0
    cx, cy = np.where(close, cx, px[inside]), np.where(close, cy, py[inside])
    bad = (frame.mask & MaskPlane.unusable()) > 0
    value, sigma, _ = aperture_photometry(
        image, frame.variance, None, cx, cy, radius, annulus=(2.0 * radius, 3.0 * radius)
    )
    touched, _, _ = aperture_photometry(bad.astype(np.float32), np.ones_like(image), None, cx, cy, radius)
    value = np.where((touched > 0.01) | ~(value > 0), np.nan, value)
    flux[inside], error[inside] = value, sigma
    return flux, error


def _ensemble(flux: Floats, error: Floats, rounds: int = 12) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Remove what all stars have in common; variable and noisy stars get little weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        magnitude = -2.5 * np.log10(flux)
        noise = 1.0857 * error / flux
    n_frames = flux.shape[1]
    seen = np.isfinite(magnitude)
    usable = seen.sum(axis=1) >= max(3, 0.6 * n_frames)
    if usable.sum() < 2:
        raise UnprocessableDataError(
            f"light curves: only {int(usable.sum())} stars are in most of the frames"
        )
    data = np.where(seen, magnitude, 0.0)
    offsets = np.zeros(n_frames)
    scatter = np.full(flux.shape[0], 0.02)
    level = np.zeros(flux.shape[0])
    weight = np.zeros_like(data)
    for _ in range(rounds):
        sigma2 = np.where(seen, noise, 1.0) ** 2 + np.maximum(scatter, 0.002)[:, None] ** 2
        weight = np.where(seen & usable[:, None], 1 / sigma2, 0.0)
        # no single star may rule the ensemble
        cap = 0.2 * weight.sum(axis=0, keepdims=True)
        weight = np.minimum(weight, cap)
        level = np.array(
            [np.median((data[i] - offsets)[seen[i]]) if seen[i].any() else 0.0 for i in range(data.shape[0])]
        )
        residual = data - level[:, None] - offsets[None, :]
        outlier = np.abs(residual) > 4 * np.sqrt(sigma2)
        weight[outlier] = 0
        total = weight.sum(axis=0)
        offsets = np.where(
            total > 0, (weight * (data - level[:, None])).sum(axis=0) / np.maximum(total, 1e-12), offsets
        )
        offsets -= np.median(offsets)
        residual = data - level[:, None] - offsets[None, :]
        for i in range(data.shape[0]):
            values = residual[i][seen[i]]
            if values.size:
                scatter[i] = 1.4826 * float(np.median(np.abs(values - np.median(values))))
    relative = np.where(seen, 10 ** (-0.4 * (data - level[:, None] - offsets[None, :])), np.nan)
    return relative, relative * noise / 1.0857, (weight > 0).sum(axis=0).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Dip:
    """A trapezoidal dip in a light curve.

    Attributes
    ----------
    mid, mid_err
        Middle, in the unit of the times.
    depth, depth_err
        Fraction of the light missing at the bottom.
    duration
        First to last contact, in the unit of the times.
    ingress
        Duration of ingress, in the unit of the times.
    scatter
        rms of the residuals.
    delta_chi2
        χ² without the dip minus χ² with it, errors scaled to the residuals.
    model
        The fitted curve at the given times, shape (n,).
    """

    mid: float
    mid_err: float
    depth: float
    depth_err: float
    duration: float
    ingress: float
    scatter: float
    delta_chi2: float
    model: Floats


def trapezoid(time: Floats, mid: float, duration: float, ingress: float) -> Floats:
    """1 at the bottom, 0 outside, straight flanks of length ``ingress``."""
    distance = np.abs(time - mid)
    return np.clip((duration / 2 - distance) / max(ingress, 1e-9), 0, 1)


def fit_dip(
    time: ArrayLike,
    flux: ArrayLike,
    *,
    airmass: ArrayLike | None = None,
    duration: tuple[float, float] = (0.06, 0.22),
    ingress_fraction: float = 0.15,
) -> Dip:
    """Fit a trapezoid times a smooth trend.

    Middle and duration are searched on a grid and refined; depth and trend (linear in time, and in the air mass
    where it is given) are solved for at each point; outliers are clipped.

    Parameters
    ----------
    time, flux
        Shape (n,), time in days, flux relative to 1; NaN are left out.
    airmass
        Shape (n,).
    duration
        Range of the duration, days.
    ingress_fraction
        Length of ingress as part of the duration.

    Raises
    ------
    NoWorkFoundError
        Fewer than 8 points.
    """
    t_all, f_all = np.asarray(time, np.float64), np.asarray(flux, np.float64)
    trend = [
        np.ones_like(t_all),
        (t_all - np.nanmean(t_all)) / max(float(np.nanmax(t_all) - np.nanmin(t_all)), 1e-9),
    ]
    if airmass is not None:
        trend.append(np.asarray(airmass, np.float64) - 1)
    columns = np.stack(trend, axis=1)
    good = np.isfinite(t_all) & np.isfinite(f_all) & np.isfinite(columns).all(axis=1)
    if good.sum() < 8:
        raise NoWorkFoundError(f"dip: {int(good.sum())} finite points; at least 8 are needed")
    best = (0.0, 0.0)
    for _ in range(3):
        t, f, base = t_all[good], f_all[good], columns[good]
        mids = np.linspace(t.min(), t.max(), 200)
        lengths = np.linspace(*duration, 25)
        chi2, best = _grid(t, f, base, mids, lengths, ingress_fraction)
        step_mid, step_length = mids[1] - mids[0], lengths[1] - lengths[0]
        for _ in range(3):
            mids_fine = best[0] + np.linspace(-1.5, 1.5, 21) * step_mid
            lengths_fine = np.clip(best[1] + np.linspace(-1.5, 1.5, 11) * step_length, *duration)
            chi2, best = _grid(t, f, base, mids_fine, lengths_fine, ingress_fraction)
            step_mid, step_length = step_mid / 6, step_length / 4
        shape = trapezoid(t_all, best[0], best[1], ingress_fraction * best[1])
        solution, *_ = np.linalg.lstsq(np.column_stack([base, -shape[good]]), f, rcond=None)
        residual = f_all - np.column_stack([columns, -shape]) @ solution
        sigma = 1.4826 * float(np.median(np.abs(residual[good])))
        keep = np.isfinite(residual) & (np.abs(residual) < 4 * max(sigma, 1e-9))
        if np.array_equal(keep, good) or keep.sum() < 8:
            break
        good = keep
    return _dip(t_all, f_all, columns, good, best, chi2, ingress_fraction)


def _dip(
    t_all: Floats,
    f_all: Floats,
    columns: Floats,
    good: NDArray[np.bool_],
    best: tuple[float, float],
    chi2: float,
    part: float,
) -> Dip:
    """Errors and the final model: the depth's from the normal equations, the middle's from the curvature of χ²."""
    t, f, base = t_all[good], f_all[good], columns[good]
    design = np.column_stack([base, -trapezoid(t, best[0], best[1], part * best[1])])
    solution, *_ = np.linalg.lstsq(design, f, rcond=None)
    freedom = max(t.size - design.shape[1] - 2, 1)
    variance = chi2 / freedom
    covariance = np.linalg.pinv(design.T @ design) * variance
    flat = float(np.sum((f - base @ np.linalg.lstsq(base, f, rcond=None)[0]) ** 2))
    mid_err = float("nan")
    mids = best[0] + np.linspace(-0.06, 0.06, 241)
    curve = np.array([_grid(t, f, base, np.array([m]), np.array([best[1]]), part)[0] for m in mids])
    inside = mids[curve < chi2 + variance]
    if inside.size:
        mid_err = max(float(np.ptp(inside)) / 2, 0.06 / 240)
    scale = float(np.median(base @ solution[:-1]))
    shape = trapezoid(t_all, best[0], best[1], part * best[1])
    model = np.column_stack([columns, -shape]) @ solution
    return Dip(
        best[0], mid_err, float(solution[-1]) / scale, float(np.sqrt(covariance[-1, -1])) / scale, best[1],
        part * best[1], float(np.sqrt(variance)), (flat - chi2) / max(variance, 1e-30), model,
    )  # fmt: skip


def _grid(
    t: Floats, f: Floats, base: Floats, mids: Floats, lengths: Floats, part: float
) -> tuple[float, tuple[float, float]]:
    """Least χ² over middles and durations; the trend is projected out once."""
    q, _ = np.linalg.qr(base)
    rest = f - q @ (q.T @ f)
    total = float(rest @ rest)
    best_gain, best = -1.0, (float(mids[0]), float(lengths[0]))
    for length in lengths:
        shapes = np.clip((length / 2 - np.abs(t[None, :] - mids[:, None])) / max(part * length, 1e-9), 0, 1)
        shapes = shapes - (shapes @ q) @ q.T
        norm = np.einsum("ij,ij->i", shapes, shapes)
        drop = -(shapes @ rest)
        # only dips, and only where enough of the shape is left after the trend
        gain = np.where((drop > 0) & (norm > 0.05), drop**2 / np.maximum(norm, 1e-12), 0)
        k = int(np.argmax(gain))
        if gain[k] > best_gain:
            best_gain, best = float(gain[k]), (float(mids[k]), float(length))
    return total - max(best_gain, 0.0), best
