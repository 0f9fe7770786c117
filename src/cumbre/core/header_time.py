"""Times of headers as TAI nanoseconds: ISO texts, MJD and JD numbers, local time.

Nanoseconds since 1970-01-01 TAI are integers, because an MJD read as a float has more digits than float
seconds keep.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

from cumbre.core.time import DAY_OBS_ROLL_S, MJD_UNIX_EPOCH, tai_minus_utc

NS = 1_000_000_000
_DAY_NS = 86400 * NS
_JD_OF_MJD = 2400000.5
_ISO = re.compile(
    r"(?P<date>\d{4}-\d{2}-\d{2})(?:[T ](?P<time>\d{2}:\d{2}(?::\d{2})?)(?P<fraction>\.\d*)?)?"
    r"(?P<zone>Z|[+-]\d{2}:?\d{2})?"
)


def tai_ns_from_utc_ns(utc_ns: int) -> int:
    """TAI nanoseconds of UTC nanoseconds."""
    return utc_ns + round(tai_minus_utc(utc_ns / NS)) * NS


def utc_ns_from_tai_ns(tai_ns: int) -> int:
    """UTC nanoseconds of TAI nanoseconds."""
    first = tai_ns - round(tai_minus_utc(tai_ns / NS)) * NS
    return tai_ns - round(tai_minus_utc(first / NS)) * NS


def day_obs_from_ns(tai_ns: int) -> int:
    """Observing day (rolls at 12:00 UTC) as YYYYMMDD."""
    date = datetime.fromtimestamp(utc_ns_from_tai_ns(tai_ns) / NS - DAY_OBS_ROLL_S, tz=UTC)
    return date.year * 10000 + date.month * 100 + date.day


def _from_iso(text: str) -> tuple[int, bool]:
    """Nanoseconds since 1970 in the text's scale, or in UTC when it has a zone; and whether it has one."""
    match = _ISO.fullmatch(text.strip())
    if match is None:
        raise ValueError("expected YYYY-MM-DDThh:mm:ss[.fff][±hhmm]")
    time = match["time"] or "00:00:00"
    time = time if time.count(":") == 2 else f"{time}:00"
    hours, minutes, seconds = (int(part) for part in time.split(":"))
    # Built by hand because 23:59:60 is a valid second that datetime refuses.
    whole = datetime.fromisoformat(match["date"]).replace(tzinfo=UTC) + timedelta(
        hours=hours, minutes=minutes, seconds=seconds
    )
    ns = int(whole.timestamp()) * NS + int((match["fraction"] or ".0")[1:10].ljust(9, "0"))
    zone = match["zone"]
    if zone and zone != "Z":
        sign = -1 if zone[0] == "-" else 1
        digits = zone[1:].replace(":", "")
        ns -= sign * (int(digits[:2]) * 3600 + int(digits[2:]) * 60) * NS
    return ns, zone is not None


def _from_mjd(mjd: float) -> int:
    """Nanoseconds since 1970 in the scale of the MJD; days and their fraction apart keep all digits."""
    whole = int(mjd // 1)
    return (whole - int(MJD_UNIX_EPOCH)) * _DAY_NS + round((mjd - whole) * _DAY_NS)


def moment_ns(value: Any, scale: str, utc_offset_h: float) -> int:
    """TAI nanoseconds of a header's time.

    Parameters
    ----------
    value
        ISO 8601 text, or a number for ``mjd_*``, ``jd_utc`` and ``unix``.
    scale
        A ``time_scale`` of :class:`~cumbre.core.instrument.HeaderField`, ``timesys`` resolved.
    utc_offset_h
        Local minus UTC in hours, for ``local`` texts without a zone.

    Raises
    ------
    ValueError
        The value is not a time of that kind.
    """
    if scale in ("mjd_utc", "mjd_tai"):
        ns = _from_mjd(float(value))
        return ns if scale == "mjd_tai" else tai_ns_from_utc_ns(ns)
    if scale == "jd_utc":
        return tai_ns_from_utc_ns(_from_mjd(float(value) - _JD_OF_MJD))
    if scale == "unix":
        return tai_ns_from_utc_ns(round(float(value) * NS))
    ns, zoned = _from_iso(str(value))
    if scale == "tai" and not zoned:
        return ns
    if scale == "local" and not zoned:
        ns -= round(utc_offset_h * 3600 * NS)
    return tai_ns_from_utc_ns(ns)
