"""Time: TAI seconds inside, UTC and MJD beside them for people, and a clock that may run fast.

``tai_s`` everywhere is seconds since 1970-01-01T00:00:00 TAI (the SAL convention for ``private_sndStamp``).
Leap seconds come from ERFA's table, read once.
"""

from __future__ import annotations

import json
import os
import time as _time
from bisect import bisect_right
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

MJD_UNIX_EPOCH = 40587.0
SECONDS_PER_DAY = 86400.0
DAY_OBS_ROLL_S = 43200.0
"""day_obs rolls at 12:00 UTC."""


@lru_cache(maxsize=1)
def _leap_table() -> tuple[list[float], list[float]]:
    """UTC unix seconds from which each TAI−UTC offset holds, and the offsets in seconds."""
    import erfa

    table = erfa.leap_seconds.get()
    starts = [datetime(int(row["year"]), int(row["month"]), 1, tzinfo=UTC).timestamp() for row in table]
    return starts, [float(row["tai_utc"]) for row in table]


def leap_seconds() -> list[tuple[float, float]]:
    """Pairs of TAI seconds and the TAI−UTC that holds from then on, the oldest first."""
    return [(start + offset, offset) for start, offset in zip(*_leap_table(), strict=True)]


def tai_minus_utc(utc_s: float) -> float:
    """TAI−UTC in seconds at a UTC unix time (37 since 2017)."""
    starts, offsets = _leap_table()
    return offsets[max(bisect_right(starts, utc_s) - 1, 0)]


def tai_from_utc(utc_s: float) -> float:
    """TAI seconds of a UTC unix time."""
    return utc_s + tai_minus_utc(utc_s)


def utc_from_tai(tai_s: float) -> float:
    """UTC unix time of TAI seconds."""
    utc_s = tai_s - tai_minus_utc(tai_s)
    return tai_s - tai_minus_utc(utc_s)


def mjd_from_seconds(seconds: float) -> float:
    """MJD, in the scale of the argument."""
    return seconds / SECONDS_PER_DAY + MJD_UNIX_EPOCH


def seconds_from_mjd(mjd: float) -> float:
    """Seconds since 1970-01-01 in the scale of the MJD."""
    return (mjd - MJD_UNIX_EPOCH) * SECONDS_PER_DAY


def day_obs_from_tai(tai_s: float) -> int:
    """Observing day as YYYYMMDD; it rolls at 12:00 UTC."""
    local = datetime.fromtimestamp(utc_from_tai(tai_s) - DAY_OBS_ROLL_S, tz=UTC)
    return local.year * 10000 + local.month * 100 + local.day


def day_obs_start_tai(day_obs: int) -> float:
    """TAI seconds at which an observing day begins (12:00 UTC)."""
    date = datetime(day_obs // 10000, day_obs // 100 % 100, day_obs % 100, tzinfo=UTC)
    return tai_from_utc((date + timedelta(seconds=DAY_OBS_ROLL_S)).timestamp())


def isot(seconds: float, digits: int = 3) -> str:
    """ISO 8601 without zone, in the scale of the argument; ``digits`` of a second."""
    whole = datetime.fromtimestamp(round(seconds, digits), tz=UTC)
    return whole.isoformat(timespec="microseconds")[: 20 + digits].removesuffix("+00:00").rstrip(".")


def parse_isot(text: str) -> float:
    """Seconds since 1970-01-01 of an ISO 8601 text; a zone is honoured, none means the scale is the caller's.

    Raises
    ------
    ValueError
        The text is not ISO 8601.
    """
    parsed = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=UTC)
    return parsed.timestamp()


@dataclass(frozen=True, slots=True)
class Clock:
    """Night time as a linear function of this machine's monotonic clock.

    ``now = tai0_s + (monotonic − mono0_s) · rate``. With rate 1 it is real time; with rate 8 a night passes
    eight times faster and no component can tell, because every wait goes through :meth:`sleep`. Processes of
    one machine share it by file (:meth:`save`, :meth:`load`): CLOCK_MONOTONIC is one for the whole boot.
    """

    tai0_s: float
    mono0_s: float
    rate: float = 1.0

    @classmethod
    def real(cls) -> Clock:
        """Real time from now on."""
        return cls(tai_from_utc(_time.time()), _time.monotonic(), 1.0)

    @classmethod
    def starting_at(cls, tai_s: float, *, rate: float) -> Clock:
        """Night time ``tai_s`` now, running ``rate`` times faster than real time."""
        return cls(tai_s, _time.monotonic(), rate)

    @classmethod
    def load(cls, path: Path) -> Clock:
        """Read a shared clock; real time where there is no file."""
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return cls.real()

    def save(self, path: Path) -> None:
        """Write atomically for the other processes."""
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"tai0_s": self.tai0_s, "mono0_s": self.mono0_s, "rate": self.rate}))
        temporary.replace(path)

    def now_tai_s(self) -> float:
        """Night time now, TAI seconds."""
        return self.tai0_s + (_time.monotonic() - self.mono0_s) * self.rate

    def sleep(self, night_s: float) -> None:
        """Wait ``night_s`` seconds of night time (none when negative)."""
        if night_s > 0:
            _time.sleep(night_s / self.rate)

    def sleep_until(self, tai_s: float) -> None:
        """Wait until night time ``tai_s``."""
        self.sleep(tai_s - self.now_tai_s())

    def wall_s(self, night_s: float) -> float:
        """Seconds of this machine's time that ``night_s`` of night time take."""
        return night_s / self.rate
