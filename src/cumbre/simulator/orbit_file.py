"""What the Minor Planet Center would know of the simulated sky: a part of its asteroids, as MPCORB.DAT."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cumbre.core.sun_moon import TT_MINUS_TAI_S
from cumbre.core.time import SECONDS_PER_DAY, mjd_from_seconds
from cumbre.payloads.solar_system.kepler import GAUSS_K
from cumbre.simulator.catalogue import Table
from cumbre.simulator.randomness import generator
from cumbre.stores.files import write_atomic

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_LETTERS = "ABCDEFGHJKLMNOPQRSTUVWXYZ"
"""Of half months, and of objects within them: no I."""
_HALF_MONTHS = _LETTERS[:24]
_PER_HALF_MONTH = 620 * len(_LETTERS)


def designations(number: int) -> tuple[str, str]:
    """Packed and readable provisional designation of the n-th object of 2026 and the years after."""
    halves, within = divmod(number, _PER_HALF_MONTH)
    years, half = divmod(halves, len(_HALF_MONTHS))
    cycle, letter = divmod(within, len(_LETTERS))
    first, second = _HALF_MONTHS[half], _LETTERS[letter]
    packed = f"K{26 + years:02d}{first}{_DIGITS[cycle // 10]}{cycle % 10}{second}"
    return packed, f"{2026 + years} {first}{second}{cycle or ''}"


def known_rows(n: int, part: float, seed: int) -> np.ndarray:
    """Which of n asteroids are in the catalogue: depends on the seed and each one's number only."""
    return np.flatnonzero(generator(seed, "known asteroids").uniform(size=n) < part)


def write_orbit_file(path: Path, asteroids: Table, *, part: float, seed: int) -> int:
    """Write the known asteroids in the Center's columns; an orbit's epoch is midnight TT before the sky's start.

    Parameters
    ----------
    asteroids
        The sky's table: elements at one epoch, degrees.
    part
        Of them that are known, 0 to 1.

    Returns
    -------
    int
        Number of orbits in the file.
    """
    chosen = known_rows(len(asteroids["id"]), part, seed)
    lines = ["Part of the simulated asteroids, as a survey would know them.", "-" * 160]
    for row in chosen.tolist():
        a, epoch_tai = float(asteroids["a_au"][row]), float(asteroids["epoch_tai"][row])
        epoch = mjd_from_seconds(epoch_tai) + TT_MINUS_TAI_S / SECONDS_PER_DAY
        midnight = np.floor(epoch)
        motion = np.degrees(GAUSS_K) * a**-1.5
        anomaly = (float(asteroids["mean_anomaly_deg"][row]) + motion * (midnight - epoch)) % 360
        packed, name = designations(row)
        angles = [float(asteroids[f"{key}_deg"][row]) for key in ("perihelion", "node", "inclination")]
        lines.append(
            f"{packed:<7} {float(asteroids['h_mag'][row]):5.2f} {0.15:5.2f} {_packed_date(midnight)} {anomaly:9.5f}  "
            f"{angles[0]:9.5f}  {angles[1]:9.5f}  {angles[2]:9.5f}  {float(asteroids['e'][row]):9.7f} {motion:11.8f} "
            f"{a:11.7f}".ljust(166)
            + f"{name:<28}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return len(chosen)


def _packed_date(mjd: float) -> str:
    date = (np.datetime64("1858-11-17") + np.timedelta64(int(mjd), "D")).item()
    return f"{_DIGITS[date.year // 100]}{date.year % 100:02d}{_DIGITS[date.month]}{_DIGITS[date.day]}"
