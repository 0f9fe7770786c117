"""Times as people type them."""

from __future__ import annotations

import click

from cumbre.core.time import day_obs_start_tai, parse_isot, tai_from_utc


def tai_of(text: str) -> float:
    """TAI seconds of UTC in ISO 8601, or of the begin of an observing day YYYYMMDD; a type for options."""
    try:
        if len(text) == 8 and text.isdigit():
            return day_obs_start_tai(int(text))
        return tai_from_utc(parse_isot(text))
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: expected UTC such as 2026-11-21T03:00:00, or a day_obs such as 20261120"
        ) from None
