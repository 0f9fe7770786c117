"""A night's table: where every known object goes between two noons, and which of them are in one image.

Each object has its state and acceleration at both ends; a quintic between them is exact to metres, since the
integration has already taken the perturbations. Rows are in the order of the HEALPix pixel of the middle of the
night, with how far the object strays from there: an image looks at the pixels within reach of the slow ones, and at
all of the few fast ones. Light time and the observer's place are taken at the exposure itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cumbre.catalogs.columns import circle_ranges, hpx29, separation_deg
from cumbre.core.errors import NotFoundError
from cumbre.core.time import day_obs_start_tai, mjd_from_seconds
from cumbre.payloads.solar_system.bodies import Observer, tt_from_tai
from cumbre.payloads.solar_system.kepler import LIGHT_DAYS_PER_AU, hg_magnitude

if TYPE_CHECKING:
    from cumbre.payloads.solar_system.orbits import Orbits

FloatArray = NDArray[np.float64]
LEAD_DAYS = 0.1
"""The table begins that much before noon: light time of bodies out to 17 au; further ones hardly curve."""
SLOW_REACH_DEG = 0.6
"""Objects that stay within this of their middle place are found by pixel; the others are looked at one by one."""
_ROWS = np.dtype([("id", "<i8"), ("pixel", "<i8"), ("motion", "<f8", (18,)), ("h", "<f4"), ("g", "<f4")])


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Objects as an observer sees them at one moment; arrays of shape (n,) or (n, 3).

    Attributes
    ----------
    ids
        ``ssObjectId``.
    ra, dec
        Astrometric place (light time, no aberration: as stars of a catalogue), ICRS degrees.
    ra_rate, dec_rate
        Degrees a day; ``ra_rate`` times cos(dec).
    helio, topo
        Position (au) and velocity (au/day) from the Sun at the time the light left, and from the observer; (n, 6).
    phase_angle, elongation
        Degrees.
    v_mag
        Predicted V, NaN where H is not known.
    """

    ids: NDArray[np.int64]
    ra: FloatArray
    dec: FloatArray
    ra_rate: FloatArray
    dec_rate: FloatArray
    helio: FloatArray
    topo: FloatArray
    phase_angle: FloatArray
    elongation: FloatArray
    v_mag: FloatArray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Any) -> Places:
        """Some of them."""
        return Places(*(getattr(self, name)[rows] for name in self.__slots__))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _seen(
    motion: FloatArray, begin: float, length: float, at: float, observer: FloatArray, sun_velocity: FloatArray,
    helio: FloatArray, topo: FloatArray,
) -> None:  # fmt: skip
    """Quintic through states and accelerations of both ends at the time the light left."""
    for i in range(motion.shape[0]):
        m = motion[i]
        delay = 0.0
        for _ in range(4):
            s = (at - delay - begin) / length
            s2 = s * s
            s3 = s2 * s
            for n in range(3):
                p0, v0, a0 = m[n], m[3 + n] * length, m[6 + n] * length * length
                d = m[9 + n] - p0 - v0 - 0.5 * a0
                dv = m[12 + n] * length - v0 - a0
                da = m[15 + n] * length * length - a0
                c3 = 10 * d - 4 * dv + 0.5 * da
                c4 = -15 * d + 7 * dv - da
                c5 = 6 * d - 3 * dv + 0.5 * da
                helio[i, n] = p0 + v0 * s + 0.5 * a0 * s2 + s3 * (c3 + c4 * s + c5 * s2)
                helio[i, 3 + n] = (v0 + a0 * s + s2 * (3 * c3 + 4 * c4 * s + 5 * c5 * s2)) / length
                # The Sun itself moves about the barycentre while the light travels.
                topo[i, n] = helio[i, n] - sun_velocity[n] * delay - observer[n]
                topo[i, 3 + n] = helio[i, 3 + n] - observer[3 + n]
            distance = np.sqrt(topo[i, 0] ** 2 + topo[i, 1] ** 2 + topo[i, 2] ** 2)
            delay = distance * LIGHT_DAYS_PER_AU


def _angle_deg(one: FloatArray, two: FloatArray) -> FloatArray:
    cross = np.linalg.norm(np.cross(one, two), axis=-1)
    return np.asarray(np.degrees(np.arctan2(cross, np.sum(one * two, axis=-1))))


def _places(rows: NDArray[np.void], begin: float, length: float, mjd_tt: float, observer: Observer) -> Places:
    place, velocity, sun_velocity = observer.state(mjd_tt)
    helio, topo = np.empty((len(rows), 6)), np.empty((len(rows), 6))
    motion = np.ascontiguousarray(rows["motion"])
    _seen(motion, begin, length, mjd_tt, np.concatenate([place, velocity]), sun_velocity, helio, topo)
    line = topo[:, :3]
    distance, sun_distance = np.linalg.norm(line, axis=1), np.linalg.norm(helio[:, :3], axis=1)
    ra, dec = np.arctan2(line[:, 1], line[:, 0]), np.arctan2(line[:, 2], np.hypot(line[:, 0], line[:, 1]))
    east = np.stack([-np.sin(ra), np.cos(ra), np.zeros_like(ra)], axis=-1)
    north = np.stack([-np.sin(dec) * np.cos(ra), -np.sin(dec) * np.sin(ra), np.cos(dec)], axis=-1)
    # The light left later as the object comes nearer: its motion shows by that much slower or faster.
    radial = np.sum(topo[:, 3:] * line, axis=1) / distance
    shown = helio[:, 3:] * (1 - radial * LIGHT_DAYS_PER_AU)[:, None] - velocity
    phase = _angle_deg(-line, -helio[:, :3])
    return Places(
        rows["id"].astype(np.int64), np.degrees(ra) % 360, np.degrees(dec),
        np.degrees(np.sum(shown * east, axis=1) / distance), np.degrees(np.sum(shown * north, axis=1) / distance),
        helio, topo, phase, _angle_deg(np.broadcast_to(-place, line.shape), line),
        hg_magnitude(rows["h"].astype(float), rows["g"].astype(float), sun_distance, distance, np.radians(phase)),
    )  # fmt: skip


class NightTable:
    """The objects of one observing day at one site.

    Parameters
    ----------
    rows
        Slow objects in the order of their pixels, then the fast ones.
    begin, length
        Of the interval, MJD TT and days.
    n_slow
        How many of the rows are slow.
    """

    def __init__(
        self, rows: NDArray[np.void], begin: float, length: float, n_slow: int, observer: Observer
    ) -> None:
        self._rows, self._begin, self._length, self._n_slow = rows, begin, length, n_slow
        self._pixels = np.ascontiguousarray(rows["pixel"][:n_slow])
        self._observer = observer

    def __len__(self) -> int:
        return len(self._rows)

    @classmethod
    def build(cls, orbits: Orbits, day_obs: int, observer: Observer) -> NightTable:
        """Integrate every orbit to a night.

        Parameters
        ----------
        day_obs
            From 12:00 UTC to 12:00 UTC.
        """
        from cumbre.payloads.solar_system.motion import integrate

        begin = float(tt_from_tai(mjd_from_seconds(day_obs_start_tai(day_obs)))) - LEAD_DAYS
        length = 1.0 + LEAD_DAYS
        ends = integrate(orbits.states, orbits.epochs, np.array([begin, begin + length]))
        rows = np.zeros(len(orbits.ids), _ROWS)
        rows["id"], rows["h"], rows["g"] = orbits.ids, orbits.h, orbits.g
        rows["motion"] = ends.reshape(len(rows), 18)
        middle = _places(rows, begin, length, begin + LEAD_DAYS + 0.5, observer)
        reach = np.zeros(len(rows))
        for part in (0.0, 0.25, 0.75, 1.0):
            there = _places(rows, begin, length, begin + LEAD_DAYS + part, observer)
            reach = np.maximum(reach, separation_deg(middle.ra, middle.dec, there.ra, there.dec))  # type: ignore[arg-type]
        rows["pixel"] = hpx29(middle.ra, middle.dec)
        slow = reach <= SLOW_REACH_DEG / 1.2
        rows = rows[np.lexsort((rows["pixel"], ~slow))]
        return cls(rows, begin, length, int(slow.sum()), observer)

    def save(self, path: Path) -> None:
        """Write ``path`` (rows) and, last, ``path`` + ``.json`` (what they mean)."""
        from cumbre.stores.files import write_atomic

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, self._rows.tobytes())
        about = {"begin_mjd_tt": self._begin, "days": self._length, "slow": self._n_slow, "rows": len(self)}
        write_atomic(path.with_suffix(".json"), json.dumps(about).encode())

    @classmethod
    def open(cls, path: Path, observer: Observer) -> NightTable:
        """A saved table; rows are read from disk only where they are wanted.

        Raises
        ------
        NotFoundError
            There is none, or it was not finished.
        """
        try:
            about = json.loads(path.with_suffix(".json").read_text())
        except FileNotFoundError as error:
            raise NotFoundError(f"{path}: no table of that night") from error
        rows: NDArray[np.void] = (
            np.memmap(path, _ROWS, "r", shape=(about["rows"],)) if about["rows"] else np.zeros(0, _ROWS)
        )
        return cls(rows, about["begin_mjd_tt"], about["days"], about["slow"], observer)

    def near(self, ra: float, dec: float, radius_deg: float, mjd_tai: float) -> Places:
        """Objects within a circle at a moment.

        Parameters
        ----------
        ra, dec, radius_deg
            ICRS degrees.
        mjd_tai
            Middle of the exposure.
        """
        ranges = circle_ranges(ra, dec, radius_deg + SLOW_REACH_DEG)
        edges = np.searchsorted(self._pixels, np.array(ranges, np.int64).ravel()).reshape(-1, 2)
        parts = [self._rows[low:high] for low, high in edges.tolist() if high > low]
        rows = np.concatenate([*parts, self._rows[self._n_slow :]])
        places = _places(rows, self._begin, self._length, float(tt_from_tai(mjd_tai)), self._observer)
        return places.take(separation_deg(ra, dec, places.ra, places.dec) <= radius_deg)
