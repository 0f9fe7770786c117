"""Regions of the sky as ranges of HEALPix pixels (nested, order 29), few and never too small."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ORDER = 29
MAX_RANGES = 32
SIZES = 19
"""Classes of regions by size: radius up to 2^(class - 12) degrees, from one arc second to 64 degrees."""
_KEY_SHIFT, _KEY_ORDERS = 56, 6
_MARGIN_DEG = 1e-7
"""Regions are covered a little larger: rounding must never lose a row."""

type Ranges = list[tuple[int, int]]


def circle_pixels(ra: float, dec: float, radius_deg: float) -> Ranges | None:
    """Half-open ranges that cover a circle, None for most of the sky."""
    import hpgeom

    if radius_deg >= 60:
        return None
    radius = max(radius_deg, 0.0) + _MARGIN_DEG
    order = _order_for(radius)
    found = hpgeom.query_circle(
        1 << order, ra % 360.0, dec, radius, inclusive=True, fact=_fact(order), return_pixel_ranges=True
    )
    return _widen(found, order)


def region_key_ranges(ra: float, dec: float, radius_deg: float) -> Ranges:
    """Half-open ranges of the keys of all regions that may touch a circle.

    A region's key is its size class (:data:`SIZES`, the largest for everything beyond) times 2^56, plus the order-26
    pixel of its middle. A region of a class touches the circle only if its middle is nearer than both radii together.
    """
    out: Ranges = []
    radius, before = max(radius_deg, 0.0), -1.0
    near: Ranges | None = []
    for size in range(SIZES):
        # classes much smaller than the circle share their pixels
        reach = max(radius + 2.0 ** (size - 12), 1.125 * radius)
        if reach != before:
            near, before = circle_pixels(ra, dec, reach), reach
        first = size << _KEY_SHIFT
        if near is None:  # as it is for every larger class
            return [*out, (first, (SIZES + 1) << _KEY_SHIFT)]
        out += [(first + (low >> _KEY_ORDERS), first + -(-high >> _KEY_ORDERS)) for low, high in near]
    return [*out, (SIZES << _KEY_SHIFT, (SIZES + 1) << _KEY_SHIFT)]


def polygon_pixels(ra: Sequence[float], dec: Sequence[float], *, convex: bool) -> Ranges | None:
    """Half-open ranges that cover a polygon smaller than half the sky."""
    import hpgeom

    vectors = unit_vectors(np.asarray(ra), np.asarray(dec))
    centre = vectors.sum(axis=0)
    centre /= np.linalg.norm(centre)
    radius = math.degrees(math.acos(max(-1.0, float((vectors @ centre).min()))))
    lon, lat = math.degrees(math.atan2(centre[1], centre[0])), math.degrees(math.asin(centre[2]))
    if not convex or radius < 1e-3 or radius > 30:
        return circle_pixels(lon, lat, radius)
    order = _order_for(radius)
    try:
        found = hpgeom.query_polygon(
            1 << order, np.mod(ra, 360.0), np.asarray(dec), inclusive=True, fact=_fact(order),
            return_pixel_ranges=True,
        )  # fmt: skip
    except (ValueError, RuntimeError):  # corners that it takes for the same
        return circle_pixels(lon, lat, radius)
    # its corners lie on pixels that rounding may miss by one
    corners = hpgeom.angle_to_pixel(1 << order, np.mod(ra, 360.0), np.asarray(dec))
    return _widen(np.vstack([found, np.stack([corners, corners + 1], axis=1)]), order)


def unit_vectors(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit vectors, shape ``(n, 3)``, of degrees."""
    lon, lat = np.radians(ra), np.radians(dec)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def match_order(radius_deg: float) -> int | None:
    """Order whose pixels are at least four radii wide, so that a pixel and its neighbours hold the circle.

    None when the circle is too large for that.
    """
    order = math.floor(math.log2(58.6 / (4 * max(radius_deg, 1e-7))))
    return min(order, 24) if order >= 0 else None


def neighbourhood(ra: NDArray[np.float64], dec: NDArray[np.float64], order: int) -> NDArray[np.int64]:
    """Pixels of an order around positions, shape ``(n, 9)``; −1 where a pixel has only seven neighbours.

    Positions that are not finite have only −1.
    """
    import hpgeom

    good = np.isfinite(ra) & np.isfinite(dec) & (np.abs(dec) <= 90)
    out = np.full((len(ra), 9), -1, dtype=np.int64)
    if good.any():
        nside = 1 << order
        pixel = np.atleast_1d(hpgeom.angle_to_pixel(nside, np.mod(ra[good], 360.0), dec[good]))
        around = np.asarray(hpgeom.neighbors(nside, pixel), dtype=np.int64).reshape(len(pixel), -1)
        block = np.concatenate([pixel[:, None].astype(np.int64), around], axis=1)
        block.sort(axis=1)
        block[:, 1:][block[:, 1:] == block[:, :-1]] = -1  # at order 0 some neighbours are the same
        out[good] = block
    return out


def _order_for(radius_deg: float) -> int:
    return int(np.clip(math.ceil(math.log2(58.6 / (radius_deg / 4))), 0, ORDER - 3))


def _fact(order: int) -> int:
    return min(4, 1 << (ORDER - order))


def _widen(found: NDArray[np.int64], order: int) -> Ranges:
    """To order 29, sorted and merged, at most MAX_RANGES."""
    shift = 2 * (ORDER - order)
    ranges: list[list[int]] = []
    for low, high in sorted((int(a), int(b)) for a, b in found):
        if ranges and low <= ranges[-1][1]:
            ranges[-1][1] = max(high, ranges[-1][1])
        else:
            ranges.append([low, high])
    few = fewer([(low, high) for low, high in ranges], MAX_RANGES)
    return [(low << shift, high << shift) for low, high in few]


def fewer(ranges: Ranges, most: int) -> Ranges:
    """The same pixels and some more in at most so many ranges: the smallest gaps are closed."""
    if len(ranges) <= most:
        return ranges
    gaps = sorted(range(1, len(ranges)), key=lambda i: ranges[i][0] - ranges[i - 1][1])
    closed = set(gaps[: len(ranges) - most])
    merged: Ranges = []
    for i, (low, high) in enumerate(ranges):
        if i in closed:
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    return merged
