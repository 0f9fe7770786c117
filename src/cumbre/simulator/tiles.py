"""Where a simulated survey looks."""

from __future__ import annotations

import numpy as np

from cumbre.core.configuration import Observatory
from cumbre.core.geometry import airmass, horizontal_from_sky, separation_deg
from cumbre.simulator.catalogue import galactic_latitude_deg
from cumbre.simulator.ephemeris import moon_position, sun_position

HOURS_AHEAD = (0.0, 1.0, 2.0, 3.0)
SPACING_DEG = 4.0


def _ecliptic_latitude_deg(ra: float, dec: float) -> float:
    tilt = np.deg2rad(23.4392911)
    a, d = np.deg2rad(ra), np.deg2rad(dec)
    return float(np.rad2deg(np.arcsin(np.sin(d) * np.cos(tilt) - np.cos(d) * np.sin(tilt) * np.sin(a))))


def choose_tiles(observatory: Observatory, start_tai: float, n: int) -> list[tuple[str, float, float]]:
    """Fields that stand high from the start for three hours, far from moon and galactic plane.

    Parameters
    ----------
    start_tai
        Start of the first night, TAI seconds.

    Returns
    -------
    list of (name, ra, dec)
        ``n`` of them, degrees ICRS, at least ``SPACING_DEG`` apart, best first.
    """
    rows = np.arange(-85.0, 86.0, SPACING_DEG)
    places = [
        (float((ra + 0.37 * row) % 360), float(row))
        for row in rows
        for ra in np.arange(0, 360, SPACING_DEG / max(np.cos(np.deg2rad(row)), 0.05))
    ]
    ra, dec = np.array(places).T
    worst = np.zeros(ra.size)
    moon = np.full(ra.size, 180.0)
    for hours in HOURS_AHEAD:
        tai_s = start_tai + 3600 * hours
        altitude, _, _ = horizontal_from_sky(
            tai_s, observatory.latitude_deg, observatory.longitude_deg, ra, dec
        )
        worst = np.maximum(worst, np.minimum(airmass(altitude), 40.0))
        moon = np.minimum(moon, separation_deg(ra, dec, *moon_position(tai_s)))
        moon = np.minimum(moon, separation_deg(ra, dec, *sun_position(tai_s)))
    galactic = np.abs([galactic_latitude_deg(*place) for place in places])
    ecliptic = np.abs([_ecliptic_latitude_deg(*place) for place in places])
    cost = (
        worst
        + np.maximum(75.0 - moon, 0.0) / 25.0
        + np.maximum(35.0 - galactic, 0.0) / 15.0
        + np.maximum(ecliptic - 12.0, 0.0) / 30.0
    )
    chosen: list[tuple[str, float, float]] = []
    for k in np.argsort(cost, kind="stable"):
        if all(separation_deg(ra[k], dec[k], other[1], other[2]) > SPACING_DEG * 0.9 for other in chosen):
            chosen.append((f"T{len(chosen) + 1:03d}", round(float(ra[k]), 4), round(float(dec[k]), 4)))
        if len(chosen) == n:
            break
    return chosen
