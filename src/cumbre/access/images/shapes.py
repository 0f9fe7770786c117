"""Regions of DALI and SODA: CIRCLE, POLYGON, RANGE, alone or in POS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import UserError

Floats = NDArray[np.float64]
_EDGE_POINTS = 64
_THIN_DEG = 1e-6


class ShapeError(UserError):
    """A region that cannot be understood; the message says what was expected."""

    outcome = "UsageError"


@dataclass(frozen=True, slots=True)
class Circle:
    """All within ``radius`` of a position; degrees."""

    ra: float
    dec: float
    radius: float

    def edge(self) -> tuple[Floats, Floats]:
        """Positions along the border."""
        angle = np.linspace(0, 2 * np.pi, 4 * _EDGE_POINTS, endpoint=False)
        dec0, r = math.radians(self.dec), math.radians(self.radius)
        sin_dec = math.sin(dec0) * math.cos(r) + math.cos(dec0) * math.sin(r) * np.cos(angle)
        dec = np.arcsin(np.clip(sin_dec, -1, 1))
        y = np.sin(angle) * math.sin(r) * math.cos(dec0)
        ra = math.radians(self.ra) + np.arctan2(y, math.cos(r) - math.sin(dec0) * sin_dec)
        return np.degrees(ra) % 360.0, np.degrees(dec)

    def contains(self, ra: Floats, dec: Floats) -> NDArray[np.bool_]:
        """Which positions are inside."""
        here, there = _vector(np.array([self.ra]), np.array([self.dec])), _vector(ra, dec)
        chord = np.linalg.norm(there - here, axis=-1)
        return np.asarray(chord <= 2 * math.sin(math.radians(min(self.radius, 180.0)) / 2) * (1 + 1e-12))

    def centre(self) -> tuple[float, float]:
        """Its middle."""
        return self.ra, self.dec

    def adql(self) -> str:
        """As ADQL."""
        return f"CIRCLE({self.ra!r}, {self.dec!r}, {self.radius!r})"


@dataclass(frozen=True, slots=True)
class Polygon:
    """What great circles between corners enclose, less than half the sky; degrees."""

    ra: tuple[float, ...]
    dec: tuple[float, ...]

    def edge(self) -> tuple[Floats, Floats]:
        """Positions along the border."""
        corners = _vector(np.array(self.ra), np.array(self.dec))
        t = np.linspace(0, 1, _EDGE_POINTS, endpoint=False)[:, None]
        points = np.concatenate(
            [(1 - t) * a + t * b for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True)]
        )
        points /= np.linalg.norm(points, axis=1)[:, None]
        return np.degrees(np.arctan2(points[:, 1], points[:, 0])) % 360, np.degrees(np.arcsin(points[:, 2]))

    def contains(self, ra: Floats, dec: Floats) -> NDArray[np.bool_]:
        """Which positions are inside, in the gnomonic plane about the middle (great circles are lines there)."""
        from cumbre.core.geometry import tangent_from_sky

        centre = self.centre()
        px, py = tangent_from_sky(*centre, np.array(self.ra), np.array(self.dec))
        x, y = tangent_from_sky(*centre, ra, dec)
        inside = np.zeros(np.shape(x), dtype=bool)
        with np.errstate(invalid="ignore", divide="ignore"):
            for i in range(len(px)):
                j = (i + 1) % len(px)
                crosses = (py[i] > y) != (py[j] > y)
                inside ^= crosses & (x < (px[j] - px[i]) * (y - py[i]) / (py[j] - py[i]) + px[i])
        return inside & np.isfinite(x)

    def centre(self) -> tuple[float, float]:
        """Its middle."""
        mean = _vector(np.array(self.ra), np.array(self.dec)).mean(axis=0)
        return math.degrees(math.atan2(mean[1], mean[0])) % 360, math.degrees(
            math.atan2(mean[2], math.hypot(mean[0], mean[1]))
        )

    def adql(self) -> str:
        """As ADQL."""
        return "POLYGON(" + ", ".join(f"{a!r}, {b!r}" for a, b in zip(self.ra, self.dec, strict=True)) + ")"


@dataclass(frozen=True, slots=True)
class Range:
    """A range of longitude and latitude; degrees, ±infinity where it is open."""

    ra0: float
    ra1: float
    dec0: float
    dec1: float

    def _bounds(self) -> tuple[float, float, float, float]:
        ra0, ra1 = (0.0, 360.0) if math.isinf(self.ra0) or math.isinf(self.ra1) else (self.ra0, self.ra1)
        return ra0, ra1, max(self.dec0, -90.0), min(self.dec1, 90.0)

    def edge(self) -> tuple[Floats, Floats]:
        """Positions along the border."""
        ra0, ra1, dec0, dec1 = self._bounds()
        t = np.linspace(0, 1, 4 * _EDGE_POINTS)
        ra, dec = ra0 + t * (ra1 - ra0), dec0 + t * (dec1 - dec0)
        flat = np.ones_like(t)
        return (
            np.concatenate([ra, flat * ra1, ra[::-1], flat * ra0]) % 360,
            np.concatenate([flat * dec0, dec, flat * dec1, dec[::-1]]),
        )

    def contains(self, ra: Floats, dec: Floats) -> NDArray[np.bool_]:
        """Which positions are inside."""
        ra0, ra1, dec0, dec1 = self._bounds()
        return np.asarray(((ra - ra0) % 360.0 <= ra1 - ra0) & (dec >= dec0) & (dec <= dec1))

    def centre(self) -> tuple[float, float]:
        """Its middle."""
        ra0, ra1, dec0, dec1 = self._bounds()
        return (ra0 + ra1) / 2 % 360, (dec0 + dec1) / 2

    def is_everything(self) -> bool:
        """Whether it is the whole sky."""
        ra0, ra1, dec0, dec1 = self._bounds()
        return ra1 - ra0 >= 360 and dec0 <= -90 and dec1 >= 90

    def pieces(self) -> list[Range]:
        """The same range in parts that a polygon can be."""
        ra0, ra1, dec0, dec1 = self._bounds()
        columns, rows = max(math.ceil((ra1 - ra0) / 60), 1), max(math.ceil((dec1 - dec0) / 60), 1)
        across = [ra0 + (ra1 - ra0) * i / columns for i in range(columns + 1)]
        up = [dec0 + (dec1 - dec0) * i / rows for i in range(rows + 1)]
        return [Range(a, b, low, high) for a, b in pairwise(across) for low, high in pairwise(up)]

    def adql(self) -> str:
        """As a polygon, for regions that overlap it; see :meth:`pieces` for ranges wider than 60 degrees."""
        ra0, ra1, dec0, dec1 = self._bounds()
        # a line or a point becomes as wide as a polygon must be
        if ra1 - ra0 < _THIN_DEG:
            ra0, ra1 = ra0 - _THIN_DEG, ra1 + _THIN_DEG
        if dec1 - dec0 < _THIN_DEG:
            dec0, dec1 = dec0 - _THIN_DEG, dec1 + _THIN_DEG
        # parallels are no great circles: steps of a degree follow them
        steps = max(math.ceil(ra1 - ra0), 1)
        ra = [ra0 + (ra1 - ra0) * i / steps for i in range(steps + 1)]
        corners = [(a, dec0) for a in ra] + [(a, dec1) for a in ra[::-1]]
        return (
            "POLYGON(" + ", ".join(f"{a % 360!r}, {min(max(d, -89.999), 89.999)!r}" for a, d in corners) + ")"
        )


Shape = Circle | Polygon | Range


def _vector(ra: Floats, dec: Floats) -> Floats:
    a, d = np.radians(ra), np.radians(dec)
    return np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)], axis=-1)


def _numbers(name: str, text: str, *, infinite: bool = False) -> list[float]:
    out = []
    for word in text.split():
        try:
            number = float(word)
        except ValueError:
            raise ShapeError(f"{name}: {word[:40]!r} is not a number") from None
        if math.isnan(number) or (math.isinf(number) and not infinite):
            raise ShapeError(f"{name}: {word[:40]!r}: expected a finite number")
        out.append(number)
    return out


def _position(name: str, ra: float, dec: float) -> None:
    if not 0 <= ra <= 360 or not -90 <= dec <= 90:
        raise ShapeError(f"{name}: position {ra:g} {dec:g}: expected 0 to 360 and −90 to 90 degrees (ICRS)")


def circle(text: str, name: str = "CIRCLE") -> Circle:
    """``ra dec radius``.

    Raises
    ------
    ShapeError
        Another form.
    """
    numbers = _numbers(name, text)
    if len(numbers) != 3:
        raise ShapeError(f"{name} = {text[:60]!r}: expected: longitude latitude radius, in degrees")
    ra, dec, radius = numbers
    _position(name, ra, dec)
    if not 0 <= radius <= 180:
        raise ShapeError(f"{name}: radius {radius:g}: expected 0 to 180 degrees")
    return Circle(ra, dec, radius)


def polygon(text: str, name: str = "POLYGON") -> Polygon:
    """``ra dec ra dec ra dec…``.

    Raises
    ------
    ShapeError
        Another form, or half the sky and more.
    """
    numbers = _numbers(name, text)
    if len(numbers) < 6 or len(numbers) % 2 or len(numbers) > 2000:
        raise ShapeError(f"{name} = {text[:60]!r}: expected three or more pairs of longitude and latitude")
    ra, dec = tuple(numbers[::2]), tuple(numbers[1::2])
    for pair in zip(ra, dec, strict=True):
        _position(name, *pair)
    made = Polygon(ra, dec)
    vectors = _vector(np.array(ra), np.array(dec))
    mean = vectors.mean(axis=0)
    length = float(np.linalg.norm(mean))
    if length < 1e-9 or float((vectors @ mean).min()) <= 0.01 * length:
        raise ShapeError(f"{name}: a polygon must be smaller than half the sky")
    return made


def sky_range(text: str, name: str = "RANGE") -> Range:
    """``ra0 ra1 dec0 dec1``, ``-Inf`` and ``+Inf`` where open.

    Raises
    ------
    ShapeError
        Another form, or an empty range.
    """
    numbers = _numbers(name, text, infinite=True)
    if len(numbers) != 4 or numbers[0] > numbers[1] or numbers[2] > numbers[3]:
        raise ShapeError(
            f"{name} = {text[:60]!r}: expected: longitude1 longitude2 latitude1 latitude2, the smaller first"
        )
    for value, low, high in (
        (numbers[0], 0, 360),
        (numbers[1], 0, 360),
        (numbers[2], -90, 90),
        (numbers[3], -90, 90),
    ):
        if math.isfinite(value) and not low <= value <= high:
            raise ShapeError(f"{name}: {value:g}: expected {low} to {high} degrees")
    return Range(*numbers)


_KINDS: dict[str, Any] = {"CIRCLE": circle, "POLYGON": polygon, "RANGE": sky_range}


def pos(text: str) -> Shape:
    """POS: a word, then its numbers.

    Raises
    ------
    ShapeError
        Another form.
    """
    word, _, rest = text.strip().partition(" ")
    if word.upper() not in _KINDS:
        raise ShapeError(f"POS = {text[:60]!r}: expected CIRCLE, RANGE or POLYGON and numbers")
    made: Shape = _KINDS[word.upper()](rest, f"POS {word.upper()}")
    return made
