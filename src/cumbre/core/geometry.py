"""Where a pixel looks on the sky, and where the sky stands above the horizon.

The convention of the whole house. Boresight (ra, dec) in degrees ICRS; ``rotpa`` is the position angle of the
focal plane's +y axis in degrees east of north. Pixel (0, 0) is the centre of the first pixel. A pixel is
turned by the detector's angle and shifted to the focal plane (mm); ``plate_scale`` makes degrees of it; the
distortion polynomial gives the true radius; a gnomonic (TAN) projection about the boresight gives the sky.
At rotpa 0 and parity 1, +y is north and +x is west. Everything broadcasts; scalars in, 0-d arrays out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cumbre.core.instrument import Detector, Instrument
from cumbre.core.time import MJD_UNIX_EPOCH, SECONDS_PER_DAY, mjd_from_seconds, utc_from_tai

FloatArray = NDArray[np.float64]
_INVERSION_STEPS = 12
MJD_J2000 = 51544.5


def focal_plane_from_pixel(detector: Detector, x: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Focal-plane position (mm) of pixels of the assembled detector."""
    dx = (np.asarray(x, float) - 0.5 * (detector.nx - 1)) * detector.pixel_mm
    dy = (np.asarray(y, float) - 0.5 * (detector.ny - 1)) * detector.pixel_mm
    angle = np.deg2rad(detector.angle_deg)
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * dx - sin * dy + detector.x_offset_mm, sin * dx + cos * dy + detector.y_offset_mm


def pixel_from_focal_plane(
    detector: Detector, x_mm: ArrayLike, y_mm: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Pixel of a focal-plane position (mm); may lie outside the detector."""
    dx = np.asarray(x_mm, float) - detector.x_offset_mm
    dy = np.asarray(y_mm, float) - detector.y_offset_mm
    angle = np.deg2rad(detector.angle_deg)
    cos, sin = np.cos(angle), np.sin(angle)
    x = (cos * dx + sin * dy) / detector.pixel_mm + 0.5 * (detector.nx - 1)
    y = (cos * dy - sin * dx) / detector.pixel_mm + 0.5 * (detector.ny - 1)
    return x, y


def _stretch(distortion: tuple[float, ...], r2: FloatArray) -> FloatArray:
    """Return true over undistorted radius, at squared undistorted radius ``r2`` (deg²)."""
    factor = np.zeros_like(r2)
    for coefficient in reversed(distortion):
        factor = (factor + coefficient) * r2
    return 1.0 + factor


def distort(instrument: Instrument, x_deg: ArrayLike, y_deg: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return true tangent-plane degrees of undistorted focal-plane degrees."""
    x, y = np.asarray(x_deg, float), np.asarray(y_deg, float)
    factor = _stretch(instrument.distortion, x * x + y * y)
    return x * factor, y * factor


def undistort(instrument: Instrument, x_deg: ArrayLike, y_deg: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Inverse of :func:`distort`, by fixed-point iteration (converges for distortions of a few per cent)."""
    x, y = np.asarray(x_deg, float), np.asarray(y_deg, float)
    if not instrument.distortion:
        return x, y
    factor = np.ones_like(x * y)
    for _ in range(_INVERSION_STEPS):
        factor = _stretch(instrument.distortion, (x * x + y * y) / (factor * factor))
    return x / factor, y / factor


def sky_from_tangent(
    ra: float, dec: float, xi_deg: ArrayLike, eta_deg: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Sky of gnomonic tangent-plane degrees (xi east, eta north) about (ra, dec).

    Returns
    -------
    ra, dec
        Degrees, ra in [0, 360).
    """
    xi, eta = np.deg2rad(np.asarray(xi_deg, float)), np.deg2rad(np.asarray(eta_deg, float))
    sin0, cos0 = np.sin(np.deg2rad(dec)), np.cos(np.deg2rad(dec))
    denominator = cos0 - eta * sin0
    delta = np.arctan2(xi, denominator)
    out_dec = np.arctan2(sin0 + eta * cos0, np.hypot(xi, denominator))
    return np.mod(ra + np.rad2deg(delta), 360.0), np.rad2deg(out_dec)


def tangent_from_sky(ra0: float, dec0: float, ra: ArrayLike, dec: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Gnomonic tangent-plane degrees (xi east, eta north) about (ra0, dec0).

    Positions a right angle or more from the tangent point have no image: NaN.
    """
    alpha = np.deg2rad(np.asarray(ra, float) - ra0)
    delta = np.deg2rad(np.asarray(dec, float))
    sin0, cos0 = np.sin(np.deg2rad(dec0)), np.cos(np.deg2rad(dec0))
    sin, cos = np.sin(delta), np.cos(delta)
    depth = sin * sin0 + cos * cos0 * np.cos(alpha)
    depth = np.where(depth > 1e-9, depth, np.nan)
    xi = cos * np.sin(alpha) / depth
    eta = (sin * cos0 - cos * sin0 * np.cos(alpha)) / depth
    return np.rad2deg(xi), np.rad2deg(eta)


def sky_from_focal_plane(
    instrument: Instrument, ra: float, dec: float, rotpa: float, x_mm: ArrayLike, y_mm: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Sky (ra, dec in degrees) of focal-plane positions in mm, boresight at (ra, dec)."""
    scale = instrument.plate_scale / 3600.0
    x, y = distort(instrument, np.asarray(x_mm, float) * scale, np.asarray(y_mm, float) * scale)
    x = x * instrument.parity
    cos, sin = np.cos(np.deg2rad(rotpa)), np.sin(np.deg2rad(rotpa))
    return sky_from_tangent(ra, dec, y * sin - x * cos, y * cos + x * sin)


def focal_plane_from_sky(
    instrument: Instrument,
    boresight_ra: float,
    boresight_dec: float,
    rotpa: float,
    ra: ArrayLike,
    dec: ArrayLike,
) -> tuple[FloatArray, FloatArray]:
    """Focal-plane position in mm of sky positions; NaN behind the tangent point."""
    xi, eta = tangent_from_sky(boresight_ra, boresight_dec, ra, dec)
    cos, sin = np.cos(np.deg2rad(rotpa)), np.sin(np.deg2rad(rotpa))
    x, y = (eta * sin - xi * cos) * instrument.parity, eta * cos + xi * sin
    x, y = undistort(instrument, x, y)
    scale = instrument.plate_scale / 3600.0
    return x / scale, y / scale


def sky_from_pixel(
    instrument: Instrument,
    detector: Detector,
    boresight_ra: float,
    boresight_dec: float,
    rotpa: float,
    x: ArrayLike,
    y: ArrayLike,
) -> tuple[FloatArray, FloatArray]:
    """Sky (ra, dec in degrees) of pixels of one detector."""
    x_mm, y_mm = focal_plane_from_pixel(detector, x, y)
    return sky_from_focal_plane(instrument, boresight_ra, boresight_dec, rotpa, x_mm, y_mm)


def pixel_from_sky(
    instrument: Instrument,
    detector: Detector,
    boresight_ra: float,
    boresight_dec: float,
    rotpa: float,
    ra: ArrayLike,
    dec: ArrayLike,
) -> tuple[FloatArray, FloatArray]:
    """Pixels of sky positions on one detector; may lie outside it, NaN behind the tangent point."""
    x_mm, y_mm = focal_plane_from_sky(instrument, boresight_ra, boresight_dec, rotpa, ra, dec)
    return pixel_from_focal_plane(detector, x_mm, y_mm)


def detector_corners(
    instrument: Instrument, detector: Detector, ra: float, dec: float, rotpa: float
) -> tuple[FloatArray, FloatArray]:
    """Sky of the outer corners, shape (4,): pixels (−½, −½), (nx−½, −½), (nx−½, ny−½), (−½, ny−½)."""
    right, top = detector.nx - 0.5, detector.ny - 0.5
    x, y = np.array([-0.5, right, right, -0.5]), np.array([-0.5, -0.5, top, top])
    return sky_from_pixel(instrument, detector, ra, dec, rotpa, x, y)


def field_radius_deg(instrument: Instrument) -> float:
    """Radius of the circle about the boresight that holds every detector."""
    radii = [0.0]
    for detector in instrument.detectors:
        ra, dec = detector_corners(instrument, detector, 0.0, 0.0, 0.0)
        radii.append(float(separation_deg(0.0, 0.0, ra, dec).max()))
    return max(radii)


def approximate_wcs(
    instrument: Instrument, detector: Detector, ra: float, dec: float, rotpa: float
) -> dict[str, Any]:
    """FITS header of the linear TAN WCS that fits one detector best, its tangent point at the centre.

    Returns
    -------
    dict
        CTYPE, CUNIT, CRVAL, CRPIX (1-based), CD, RADESYS, EQUINOX. What it leaves out is the distortion's
        change across the detector.
    """
    cx, cy = 0.5 * (detector.nx - 1), 0.5 * (detector.ny - 1)
    centre_ra, centre_dec = (float(v) for v in sky_from_pixel(instrument, detector, ra, dec, rotpa, cx, cy))
    grid_x, grid_y = np.meshgrid(np.linspace(-cx, cx, 7), np.linspace(-cy, cy, 7))
    dx, dy = grid_x.ravel(), grid_y.ravel()
    sky_ra, sky_dec = sky_from_pixel(instrument, detector, ra, dec, rotpa, cx + dx, cy + dy)
    xi, eta = tangent_from_sky(centre_ra, centre_dec, sky_ra, sky_dec)
    cd = np.linalg.lstsq(np.column_stack([dx, dy]), np.column_stack([xi, eta]), rcond=None)[0].T
    return {
        "CTYPE1": "RA---TAN",
        "CTYPE2": "DEC--TAN",
        "CUNIT1": "deg",
        "CUNIT2": "deg",
        "CRVAL1": centre_ra,
        "CRVAL2": centre_dec,
        "CRPIX1": cx + 1.0,
        "CRPIX2": cy + 1.0,
        "CD1_1": float(cd[0, 0]),
        "CD1_2": float(cd[0, 1]),
        "CD2_1": float(cd[1, 0]),
        "CD2_2": float(cd[1, 1]),
        "RADESYS": "ICRS",
        "EQUINOX": 2000.0,
    }


def separation_deg(ra1: ArrayLike, dec1: ArrayLike, ra2: ArrayLike, dec2: ArrayLike) -> FloatArray:
    """Great-circle distance in degrees, exact at small and large angles (Vincenty)."""
    a1, d1, a2, d2 = (np.deg2rad(np.asarray(v, float)) for v in (ra1, dec1, ra2, dec2))
    da = a2 - a1
    y = np.hypot(np.cos(d2) * np.sin(da), np.cos(d1) * np.sin(d2) - np.sin(d1) * np.cos(d2) * np.cos(da))
    x = np.sin(d1) * np.sin(d2) + np.cos(d1) * np.cos(d2) * np.cos(da)
    return np.asarray(np.rad2deg(np.arctan2(y, x)))


def sidereal_deg(tai_s: ArrayLike, longitude_deg: float) -> FloatArray:
    """Local mean sidereal time in degrees (Meeus 12.4, with UT1 = UTC: right to 0.004 degrees)."""
    times = np.asarray(tai_s, dtype=np.float64)
    # The leap-second offset is constant over any one call of ours (a night): one look-up serves all.
    first = float(times.flat[0]) if times.size else 0.0
    utc = times + (utc_from_tai(first) - first)
    days = utc / SECONDS_PER_DAY + MJD_UNIX_EPOCH - MJD_J2000
    centuries = days / 36525.0
    greenwich = 280.46061837 + 360.98564736629 * days + 0.000387933 * centuries**2
    return np.asarray((greenwich + longitude_deg) % 360.0)


def precess_from_j2000(tai_s: float, ra: ArrayLike, dec: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Mean equator of date from J2000/ICRS (IAU 1976 angles, Meeus 21.3); degrees."""
    t = (mjd_from_seconds(tai_s) - MJD_J2000) / 36525.0
    zeta = np.deg2rad((2306.2181 * t + 0.30188 * t**2) / 3600.0)
    z = np.deg2rad((2306.2181 * t + 1.09468 * t**2) / 3600.0)
    theta = np.deg2rad((2004.3109 * t - 0.42665 * t**2) / 3600.0)
    alpha, delta = np.deg2rad(np.asarray(ra, float)) + zeta, np.deg2rad(np.asarray(dec, float))
    a = np.cos(delta) * np.sin(alpha)
    b = np.cos(theta) * np.cos(delta) * np.cos(alpha) - np.sin(theta) * np.sin(delta)
    c = np.sin(theta) * np.cos(delta) * np.cos(alpha) + np.cos(theta) * np.sin(delta)
    return np.mod(np.rad2deg(np.arctan2(a, b) + z), 360.0), np.rad2deg(np.arctan2(c, np.hypot(a, b)))


def horizontal_from_sky(
    tai_s: float, latitude_deg: float, longitude_deg: float, ra: ArrayLike, dec: ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Altitude, azimuth (east of north) and hour angle in degrees of ICRS positions.

    Precession is applied; nutation, aberration and refraction are not: right to about 0.01 degrees.
    """
    return horizontal_of_date(tai_s, latitude_deg, longitude_deg, *precess_from_j2000(tai_s, ra, dec))


def horizontal_of_date(
    tai_s: ArrayLike, latitude_deg: float, longitude_deg: float, ra: ArrayLike, dec: ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Altitude, azimuth (east of north) and hour angle in degrees of positions of date; arguments broadcast."""
    hour = np.mod(sidereal_deg(tai_s, longitude_deg) - np.asarray(ra, float) + 180.0, 360.0) - 180.0
    h, d, p = np.deg2rad(hour), np.deg2rad(np.asarray(dec, float)), np.deg2rad(latitude_deg)
    east = -np.cos(d) * np.sin(h)
    north = np.sin(d) * np.cos(p) - np.cos(d) * np.sin(p) * np.cos(h)
    up = np.sin(d) * np.sin(p) + np.cos(d) * np.cos(p) * np.cos(h)
    altitude = np.rad2deg(np.arctan2(up, np.hypot(east, north)))
    return altitude, np.mod(np.rad2deg(np.arctan2(east, north)), 360.0), hour


def airmass(altitude_deg: ArrayLike) -> FloatArray:
    """Relative air mass (Kasten and Young 1989) of altitudes from the horizon up; infinite below it."""
    h = np.asarray(altitude_deg, float)
    safe = np.maximum(h, 0.0)
    value = 1.0 / (np.sin(np.deg2rad(safe)) + 0.50572 * (safe + 6.07995) ** -1.6364)
    return np.asarray(np.where(h < 0, np.inf, value))
