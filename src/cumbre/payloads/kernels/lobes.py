"""Fits of two lobes (dipole) and of a bar of light (trail) to stamps of a difference image; compiled.

Both models are made of the local PSF, moved by quintic splines. Every pixel counts alike, as in the photometry of point
sources; errors are propagated from the variance of the pixels. Positions are 0-based pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cumbre.payloads.kernels.lobe_fit import MOST_STEPS, N_DIPOLE, N_TRAIL, STEP_PX, add, fit, spot
from cumbre.payloads.kernels.shift import spline_coefficients

if TYPE_CHECKING:
    from cumbre.payloads.kernels.detect import GridPsf


@dataclass(frozen=True, slots=True)
class Lobes:
    """Dipoles; arrays of shape (n,), of errors (n, 6, 6).

    Attributes
    ----------
    flux_up, flux_down
        Of the positive lobe, and of the negative one with its sign turned.
    x_up, y_up, x_down, y_down
        Places of the lobes.
    covariance
        Of (flux_up, x_up, y_up, flux_down, x_down, y_down).
    chi2, n_pixels
        Of the fit.
    is_good
        False where the fit did not end.
    """

    flux_up: NDArray[np.float64]
    x_up: NDArray[np.float64]
    y_up: NDArray[np.float64]
    flux_down: NDArray[np.float64]
    x_down: NDArray[np.float64]
    y_down: NDArray[np.float64]
    covariance: NDArray[np.float64]
    chi2: NDArray[np.float64]
    n_pixels: NDArray[np.int64]
    is_good: NDArray[np.bool_]

    def mean_flux(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean of the lobes' fluxes, and its error."""
        return (self.flux_up + self.flux_down) / 2, self._error(0.5, 0.5)

    def flux_difference(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Positive minus negative lobe, and its error."""
        return self.flux_up - self.flux_down, self._error(1.0, -1.0)

    def _error(self, up: float, down: float) -> NDArray[np.float64]:
        c = self.covariance
        square = up * up * c[:, 0, 0] + down * down * c[:, 3, 3] + 2 * up * down * c[:, 0, 3]
        return np.sqrt(np.maximum(square, 0.0))


@dataclass(frozen=True, slots=True)
class Trails:
    """Bars of light; arrays of shape (n,).

    ``angle`` is in radians from +x to +y; ``covariance`` (n, 5, 5) of (flux, x, y, length, angle); ``chi2_point`` that of
    a point source on the same pixels; ``is_cut`` where an end lies off the image or on unusable pixels, or the bar is longer
    than what is fitted.
    """

    flux: NDArray[np.float64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    length: NDArray[np.float64]
    angle: NDArray[np.float64]
    covariance: NDArray[np.float64]
    chi2: NDArray[np.float64]
    chi2_point: NDArray[np.float64]
    n_pixels: NDArray[np.int64]
    is_good: NDArray[np.bool_]
    is_cut: NDArray[np.bool_]


@njit(cache=True)
def _window(image, variance, scale, mask, unusable, x0, y0, data, var, usable):  # type: ignore[no-untyped-def]
    ny, nx = image.shape
    n = data.shape[0]
    for j in range(n):
        for i in range(n):
            y, x = y0 + j - n // 2, x0 + i - n // 2
            usable[j, i] = False
            data[j, i], var[j, i] = 0.0, 0.0
            if 0 <= y < ny and 0 <= x < nx and (mask[y, x] & unusable) == 0 and variance[y, x] > 0:
                usable[j, i] = True
                data[j, i], var[j, i] = image[y, x], variance[y, x] * scale


@njit(cache=True)
def _away(j, i, n, x, y, ux, uy, half):  # type: ignore[no-untyped-def]
    """Distance of a pixel of the window from a bar of half length ``half`` about (x, y)."""
    dx, dy = i - n // 2 - x, j - n // 2 - y
    along = min(max(dx * ux + dy * uy, -half), half)
    return np.hypot(dx - along * ux, dy - along * uy)


@njit(cache=True)
def _chi2(data, var, used, model):  # type: ignore[no-untyped-def]
    total, count = 0.0, 0
    n = data.shape[0]
    for j in range(n):
        for i in range(n):
            if used[j, i]:
                total += (data[j, i] - model[j, i]) ** 2 / var[j, i]
                count += 1
    return total, count


@njit(cache=True)
def _fit_dipoles(  # type: ignore[no-untyped-def]
    image, variance, scale, mask, snr, unusable, stamps, coefficients, which, xs, ys, priors, prior_errors,
    radius, out, covariances,
):  # fmt: skip
    ny, nx = image.shape
    side = stamps.shape[1]
    n = side + 2 * int(np.ceil(radius))
    data, var = np.empty((n, n)), np.empty((n, n))
    usable, used = np.empty((n, n), np.bool_), np.empty((n, n), np.bool_)
    work = (
        np.empty((side, side)),
        np.empty((side, side)),
        np.empty((2, n, n)),
        np.empty((n, n)),
        np.empty((6, n, n)),
    )
    values, reach = np.empty(N_DIPOLE), int(np.ceil(radius))
    for s in range(xs.size):
        x0, y0 = xs[s], ys[s]
        sign = 1.0 if snr[y0, x0] > 0 else -1.0
        px, py, least = x0, y0, 0.0
        for j in range(max(y0 - reach, 0), min(y0 + reach + 1, ny)):
            for i in range(max(x0 - reach, 0), min(x0 + reach + 1, nx)):
                if sign * snr[j, i] < least:
                    least, px, py = sign * snr[j, i], i, j
        _window(image, variance, scale, mask, unusable, x0, y0, data, var, usable)
        top = stamps[which[s]].max()
        first, second = (0, 3) if sign > 0 else (3, 0)
        values[first], values[first + 1], values[first + 2] = abs(image[y0, x0]) / top, 0.0, 0.0
        values[second] = abs(image[py, px]) / top
        values[second + 1], values[second + 2] = px - x0, py - y0
        ax, ay = (values[1] + values[4]) / 2, (values[2] + values[5]) / 2
        dx, dy = values[1] - values[4], values[2] - values[5]
        apart = max(np.hypot(dx, dy), 1e-9)
        for j in range(n):
            for i in range(n):
                near = _away(j, i, n, ax, ay, dx / apart, dy / apart, apart / 2) <= radius
                used[j, i] = usable[j, i] and near
        is_good, covariance = fit(
            values, data, var, used, priors[s], prior_errors[s], coefficients[which[s]], radius, work
        )
        chi2, count = _chi2(data, var, used, work[3])
        out[s, :6] = values
        for k in (1, 4):
            out[s, k] += x0
            out[s, k + 1] += y0
        out[s, 6], out[s, 7], out[s, 8] = chi2, count, 1.0 if is_good else 0.0
        covariances[s] = covariance


@njit(cache=True)
def _extent(snr, x0, y0, ux, uy, sign, least, most):  # type: ignore[no-untyped-def]
    """How far from a place the light goes on along a direction, in pixels."""
    ny, nx = snr.shape
    reach = 0.0
    for k in range(1, int(most) + 1):
        x, y = int(np.floor(x0 + k * ux + 0.5)), int(np.floor(y0 + k * uy + 0.5))
        if not (0 <= x < nx and 0 <= y < ny) or sign * snr[y, x] < least:
            break
        reach = float(k)
    return reach


@njit(cache=True)
def _fit_trails(  # type: ignore[no-untyped-def]
    image,
    variance,
    scale,
    mask,
    snr,
    unusable,
    stamps,
    coefficients,
    which,
    xs,
    ys,
    angles,
    radius,
    out,
    covariances,
):
    ny, nx = image.shape
    side = stamps.shape[1]
    longest = STEP_PX * MOST_STEPS
    n = side + 2 * int(np.ceil(longest / 2))
    data, var = np.empty((n, n)), np.empty((n, n))
    usable, used = np.empty((n, n), np.bool_), np.empty((n, n), np.bool_)
    work = (
        np.empty((side, side)),
        np.empty((side, side)),
        np.empty((3, n, n)),
        np.empty((n, n)),
        np.empty((5, n, n)),
    )
    values = np.empty(N_TRAIL)
    for s in range(xs.size):
        sign = 1.0 if snr[ys[s], xs[s]] > 0 else -1.0
        ux, uy = np.cos(angles[s]), np.sin(angles[s])
        least = max(3.0, 0.35 * abs(snr[ys[s], xs[s]]))
        ahead = _extent(snr, xs[s], ys[s], ux, uy, sign, least, longest)
        behind = _extent(snr, xs[s], ys[s], -ux, -uy, sign, least, longest)
        middle = (ahead - behind) / 2
        x0, y0 = int(np.floor(xs[s] + middle * ux + 0.5)), int(np.floor(ys[s] + middle * uy + 0.5))
        x0, y0 = min(max(x0, 0), nx - 1), min(max(y0, 0), ny - 1)
        _window(image, variance, scale, mask, unusable, x0, y0, data, var, usable)
        coefficient = coefficients[which[s]]
        values[1], values[2], values[4] = 0.0, 0.0, angles[s]
        values[3] = min(max(ahead + behind - radius / 3, radius / 4), longest)
        is_good, covariance, chi2, chi2_point, count = False, np.full((5, 5), np.nan), np.nan, np.nan, 0
        # the pixels follow the bar: once about the first guess, once about what came out
        for is_first in (True, False):
            ux, uy = np.cos(values[4]), np.sin(values[4])
            total = 0.0
            for j in range(n):
                for i in range(n):
                    near = _away(j, i, n, values[1], values[2], ux, uy, values[3] / 2) <= radius
                    used[j, i] = usable[j, i] and near
                    if used[j, i]:
                        total += data[j, i]
            values[0] = total
            if not is_first and not is_good:
                break
            is_good, covariance = fit(values, data, var, used, 0.0, 0.0, coefficient, radius, work)
            chi2, count = _chi2(data, var, used, work[3])
        # the best point source on the same pixels
        work[2][0, :, :] = 0.0
        ix, iy = spot(coefficient, values[1], values[2], work[0], work[1])
        add(work[1], ix, iy, 1.0, work[2][0])
        up, down = 0.0, 0.0
        for j in range(n):
            for i in range(n):
                if used[j, i]:
                    up += work[2][0, j, i] * data[j, i]
                    down += work[2][0, j, i] ** 2
        work[3][:, :] = work[2][0] * (up / max(down, 1e-300))
        chi2_point, _ = _chi2(data, var, used, work[3])
        is_cut = values[3] > 0.98 * longest
        for way in (-0.5, 0.5):
            x = int(np.floor(x0 + values[1] + way * values[3] * np.cos(values[4]) + 0.5))
            y = int(np.floor(y0 + values[2] + way * values[3] * np.sin(values[4]) + 0.5))
            is_cut |= not (0 <= x < nx and 0 <= y < ny) or (mask[y, x] & unusable) != 0
        out[s, :5] = values
        out[s, 1] += x0
        out[s, 2] += y0
        out[s, 5], out[s, 6], out[s, 7] = chi2, chi2_point, count
        out[s, 8], out[s, 9] = 1.0 if is_good else 0.0, 1.0 if is_cut else 0.0
        covariances[s] = covariance


def _whole(values: Any, kind: type[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(values, kind)


def fit_dipoles(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    mask: NDArray[np.uint16],
    snr: NDArray[np.float32],
    psf: GridPsf,
    x: NDArray[np.intp],
    y: NDArray[np.intp],
    *,
    unusable: int,
    radius: float,
    variance_scale: float = 1.0,
    prior: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> Lobes:
    """Fit a positive and a negative point source at once.

    Parameters
    ----------
    image, variance, mask, snr
        (ny, nx) planes of the difference; ``snr`` shows where the second lobe is.
    x, y
        Pixels of one lobe's peak, shape (n,).
    radius
        Pixels about the line between the lobes that take part.
    prior
        (mean flux of the lobes, its error), both (n,): what is known of the star from the images themselves. Lobes
        closer than a third of the PSF's width give only the product of flux and distance.
    """
    n = len(x)
    out, covariances = np.zeros((n, 9)), np.full((n, 6, 6), np.nan)
    if n:
        stamps, which = psf.stack(x, y)
        priors, errors = prior if prior is not None else (np.zeros(n), np.zeros(n))
        _fit_dipoles(
            image, variance, float(variance_scale), mask, snr, np.uint16(unusable), stamps,
            spline_coefficients(stamps), which, _whole(x, np.int64), _whole(y, np.int64), _whole(priors, np.float64),
            _whole(errors, np.float64), float(radius), out, covariances,
        )  # fmt: skip
    a, b, c, d, e, f, chi2, n_pixels, good = out.T
    return Lobes(a, b, c, d, e, f, covariances, chi2, n_pixels.astype(np.int64), good > 0)


def fit_trails(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    mask: NDArray[np.uint16],
    snr: NDArray[np.float32],
    psf: GridPsf,
    x: NDArray[np.intp],
    y: NDArray[np.intp],
    angle: NDArray[np.float64],
    *,
    unusable: int,
    radius: float,
    variance_scale: float = 1.0,
) -> Trails:
    """Fit the PSF drawn out along a straight line at constant speed; at most 28 pixels long.

    Parameters
    ----------
    angle
        First guess of the direction in radians from +x to +y, shape (n,).
    radius
        Pixels about the line that take part.
    """
    n = len(x)
    out, covariances = np.zeros((n, 10)), np.full((n, 5, 5), np.nan)
    if n:
        stamps, which = psf.stack(x, y)
        _fit_trails(
            image, variance, float(variance_scale), mask, snr, np.uint16(unusable), stamps,
            spline_coefficients(stamps), which, _whole(x, np.int64), _whole(y, np.int64), _whole(angle, np.float64),
            float(radius), out, covariances,
        )  # fmt: skip
    flux, x_out, y_out, length, turned, chi2, point, n_pixels, good, cut = out.T
    return Trails(
        flux,
        x_out,
        y_out,
        length,
        turned,
        covariances,
        chi2,
        point,
        n_pixels.astype(np.int64),
        good > 0,
        cut > 0,
    )
