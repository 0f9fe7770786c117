"""Is a header's WCS to be believed? A look at its linear part, without reading any pixel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cumbre.core.instrument import Detector, Instrument

SCALE_TOLERANCE = 0.2
"""A pixel scale farther off than this part of the described one belongs to another image."""


@dataclass(frozen=True, slots=True)
class LinearWcs:
    """Reference value (degrees), reference pixel (1-based) and CD matrix (degrees per pixel)."""

    crval: tuple[float, float]
    crpix: tuple[float, float]
    cd: tuple[float, float, float, float]

    @property
    def scale_arcsec(self) -> float:
        """Geometric mean pixel size."""
        a, b, c, d = self.cd
        return math.sqrt(abs(a * d - b * c)) * 3600.0

    def sky(self, x: float, y: float) -> tuple[float, float]:
        """(ra, dec) in degrees of a 0-based pixel, gnomonic, without distortion."""
        dx, dy = x + 1 - self.crpix[0], y + 1 - self.crpix[1]
        a, b, c, d = (math.radians(value) for value in self.cd)
        xi, eta = a * dx + b * dy, c * dx + d * dy
        ra0, dec0 = (math.radians(value) for value in self.crval)
        below = math.cos(dec0) - eta * math.sin(dec0)
        ra = ra0 + math.atan2(xi, below)
        dec = math.atan2(math.sin(dec0) + eta * math.cos(dec0), math.hypot(xi, below))
        return math.degrees(ra) % 360.0, math.degrees(dec)


def linear_wcs(lookup: Callable[[str], Any]) -> LinearWcs | None:
    """Linear part of a celestial WCS, or None when the header has none."""
    if not (str(lookup("CTYPE1") or "").startswith("RA") and str(lookup("CTYPE2") or "").startswith("DEC")):
        return None
    try:
        crval = float(lookup("CRVAL1")), float(lookup("CRVAL2"))
        crpix = float(lookup("CRPIX1")), float(lookup("CRPIX2"))
        if lookup("CD1_1") is not None:
            cd = tuple(float(lookup(key) or 0.0) for key in ("CD1_1", "CD1_2", "CD2_1", "CD2_2"))
        else:
            step = float(lookup("CDELT1")), float(lookup("CDELT2"))
            pc = [lookup(key) for key in ("PC1_1", "PC1_2", "PC2_1", "PC2_2")]
            unit = [
                default if value is None else float(value)
                for value, default in zip(pc, (1, 0, 0, 1), strict=True)
            ]
            cd = (unit[0] * step[0], unit[1] * step[0], unit[2] * step[1], unit[3] * step[1])
    except TypeError:
        return None
    return LinearWcs(crval, crpix, (cd[0], cd[1], cd[2], cd[3]))


def wcs_problem(wcs: LinearWcs, instrument: Instrument, detector: Detector, ra: float, dec: float) -> str:
    """Why the WCS cannot be right; "" when nothing speaks against it.

    The pixel scale must be the described one, and the detector's centre must lie within
    ``pointing_error_deg`` of the pointing (ra, dec in degrees; NaN: not tested).
    """
    expected = instrument.pixel_scale(detector)
    if not abs(wcs.scale_arcsec / expected - 1.0) < SCALE_TOLERANCE:
        return f"its pixel scale is {wcs.scale_arcsec:.4g} arcsec, the camera's {expected:.4g}: stale"
    if math.isnan(ra):
        return ""
    at_ra, at_dec = wcs.sky(0.5 * (detector.nx - 1), 0.5 * (detector.ny - 1))
    half_ra, half_dec = math.radians(ra - at_ra) / 2, math.radians(dec - at_dec) / 2
    near = math.cos(math.radians(dec)) * math.cos(math.radians(at_dec))
    away = math.degrees(2 * math.asin(math.sqrt(math.sin(half_dec) ** 2 + near * math.sin(half_ra) ** 2)))
    reach = math.hypot(detector.x_offset_mm, detector.y_offset_mm) * instrument.plate_scale / 3600.0
    if away > instrument.pointing_error_deg + reach:
        return f"its centre lies {away:.2f} deg from the pointing: stale"
    return ""
