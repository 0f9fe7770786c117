"""A planet before its star: the dip of a limb-darkened disc, and the fit that gives the ratio of the areas.

A trapezoid tells how much light is missing at the bottom. The bright middle of a star counts more than its rim, so
that is more than the part of the disc which the planet hides: by 15 to 20 % in white light. The area ratio needs this
model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.payloads.light_curve import fit_dip

Floats = NDArray[np.float64]

SOLAR_TYPE = (0.40, 0.20)
"""Quadratic limb darkening of F and G stars in unfiltered CCD light, about ±0.1 each."""


def hidden_light(separation: ArrayLike, ratio: float, limb: tuple[float, float] = SOLAR_TYPE) -> Floats:
    """Part of a star's light that a dark disc hides.

    Parameters
    ----------
    separation
        Distances of the centres in radii of the star, any shape.
    ratio
        Radius of the disc in radii of the star, below 1.
    limb
        u1, u2 of I = 1 - u1 (1 - m) - u2 (1 - m)², m the cosine of the angle to the surface.
    """
    z = np.abs(np.asarray(separation, np.float64))
    edges = np.linspace(0, 1, 801)
    r = 0.5 * (edges[1:] + edges[:-1])
    m = np.sqrt(1 - r**2)
    light = (1 - limb[0] * (1 - m) - limb[1] * (1 - m) ** 2) * 2 * np.pi * r
    # part of each ring around the star's centre that the disc covers
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (z[..., None] ** 2 + r**2 - ratio**2) / (2 * z[..., None] * r)
    cosine = np.where(np.isnan(cosine), np.where(r < ratio, -1.0, 1.0), cosine)
    covered = np.arccos(np.clip(cosine, -1, 1)) / np.pi
    return np.asarray((covered * light).sum(axis=-1) / light.sum(), np.float64)


@dataclass(frozen=True, slots=True)
class Transit:
    """A fitted transit.

    Attributes
    ----------
    mid, mid_err
        Middle, in the unit of the times.
    area_ratio, area_ratio_err
        (radius of the planet / radius of the star)², what catalogues of planets call the depth.
    duration
        First to last contact, in the unit of the times.
    scatter
        rms of the residuals.
    n_used
        Points that were not clipped.
    model
        The fitted curve at the given times, shape (n,).
    """

    mid: float
    mid_err: float
    area_ratio: float
    area_ratio_err: float
    duration: float
    scatter: float
    n_used: int
    model: Floats


def _solve(
    time: Floats,
    flux: Floats,
    base: Floats,
    mid: float,
    duration: float,
    ratio: float,
    limb: tuple[float, float],
) -> tuple[float, Floats, Floats]:
    """χ², coefficients (trend, amplitude of the dip) and model of one middle and duration; a central passage."""
    separation = np.abs(time - mid) / (duration / 2) * (1 + ratio)
    shape = hidden_light(separation, ratio, limb)
    design = np.column_stack([base, -shape])
    solution, *_ = np.linalg.lstsq(design, flux, rcond=None)
    model = design @ solution
    return float(np.sum((flux - model) ** 2)), solution, model


def fit_transit(
    time: ArrayLike,
    flux: ArrayLike,
    *,
    limb: tuple[float, float] = SOLAR_TYPE,
    duration: tuple[float, float] = (0.06, 0.22),
) -> Transit:
    """Fit a central transit of a limb-darkened star, times a trend linear in time.

    The passage is taken as central: data that can not tell the impact parameter give the same area ratio within their
    errors for impact parameters up to about 0.5.

    Parameters
    ----------
    time, flux
        Shape (n,), days and light relative to 1; NaN are left out.
    limb
        Quadratic limb darkening.
    duration
        Range of the duration, days.

    Raises
    ------
    NoWorkFoundError
        Fewer than 8 points.
    """
    from scipy.optimize import minimize

    t_all, f_all = np.asarray(time, np.float64), np.asarray(flux, np.float64)
    start = fit_dip(t_all, f_all, duration=duration)
    with np.errstate(invalid="ignore"):
        good = np.isfinite(f_all) & (np.abs(f_all - start.model) < 4 * start.scatter)
    t, f = t_all[good], f_all[good]
    span = max(float(np.ptp(t)), 1e-9)
    base = np.column_stack([np.ones_like(t), (t - t.mean()) / span])
    ratio = float(np.sqrt(max(start.depth, 1e-4) / 1.17))
    mid, length = start.mid, start.duration
    for _ in range(4):
        simplex = [[mid, length], [mid + 0.01, length], [mid, length * 1.1]]
        found = minimize(
            lambda p, k=ratio: _solve(t, f, base, p[0], float(np.clip(p[1], *duration)), k, limb)[0],
            [mid, length],
            method="Nelder-Mead",
            options={"initial_simplex": simplex},
        )
        mid, length = float(found.x[0]), float(np.clip(found.x[1], *duration))
        _, solution, _ = _solve(t, f, base, mid, length, ratio, limb)
        amplitude = float(solution[-1]) / float(np.median(base @ solution[:-1]))
        ratio = float(np.clip(ratio * np.sqrt(max(amplitude, 0.01)), 0.005, 0.5))
    chi2, solution, _ = _solve(t, f, base, mid, length, ratio, limb)
    variance = chi2 / max(t.size - 5, 1)
    # errors of all parameters together, from the slopes of the model
    step = 1e-4
    slopes = []
    for d_mid, d_length in ((step, 0.0), (0.0, step)):
        later = _curve(t, base, solution, mid + d_mid, length + d_length, ratio, limb)
        sooner = _curve(t, base, solution, mid - d_mid, length - d_length, ratio, limb)
        slopes.append((later - sooner) / (2 * step))
    shape = hidden_light(np.abs(t - mid) / (length / 2) * (1 + ratio), ratio, limb)
    design = np.column_stack([base, -shape, *slopes])
    errors = np.sqrt(np.diag(np.linalg.pinv(design.T @ design)) * variance)
    scale = float(np.median(base @ solution[:-1]))
    area = ratio**2
    base_all = np.column_stack([np.ones_like(t_all), (t_all - t.mean()) / span])
    model = _curve(t_all, base_all, solution, mid, length, ratio, limb)
    return Transit(
        mid, float(errors[3]), area, area * float(errors[2]) / scale, length, float(np.sqrt(variance)), int(t.size), model
    )  # fmt: skip


def _curve(
    time: Floats,
    base: Floats,
    solution: Floats,
    mid: float,
    duration: float,
    ratio: float,
    limb: tuple[float, float],
) -> Floats:
    """The curve of given coefficients."""
    shape = hidden_light(np.abs(time - mid) / (duration / 2) * (1 + ratio), ratio, limb)
    return np.asarray(np.column_stack([base, -shape]) @ solution, np.float64)
