"""Which visits make a template: a pure choice, with the reason why each other one was left out.

Limits that depend on the weather are relative to the good visits of the same range of airmass; seeing and depth of
different airmasses do not compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cumbre.core.configuration import Templates

QUARTER = 25.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of one visit at one place of the sky; NaN where nothing is.

    Attributes
    ----------
    obs_id
        Of the visit's first exposure.
    seeing_arcsec, zero_point, sky_rate, depth_mag
        FWHM; magnitude of one electron a second; electrons of sky a second; magnitude at five sigma.
    masked, ellipticity, astrometry_arcsec
        Part of unusable pixels; of the PSF; scatter about the WCS.
    problem
        Why it could not be measured; "" when it was.
    """

    obs_id: str
    airmass: float
    seeing_arcsec: float = math.nan
    zero_point: float = math.nan
    sky_rate: float = math.nan
    depth_mag: float = math.nan
    masked: float = 0.0
    ellipticity: float = 0.0
    astrometry_arcsec: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """A visit that is left out."""

    obs_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The visits of one range of airmass ``low <= airmass < high``.

    ``chosen`` is in the order of time and empty where they are too few; ``refused`` has everybody else.
    """

    low: float
    high: float
    chosen: tuple[Candidate, ...]
    refused: tuple[Refused, ...]


def choose(candidates: Iterable[Candidate], rules: Templates) -> tuple[list[Choice], list[Refused]]:
    """Choose the visits of every range of airmass that has any.

    Returns
    -------
    The choices by rising airmass, and those that belong to no range. The order of the candidates does not matter.
    """
    edges = rules.airmass_edges
    ranges: dict[int, list[Candidate]] = {}
    outside = []
    for one in sorted(candidates, key=lambda c: c.obs_id):
        at = int(np.searchsorted(edges, one.airmass, side="right")) - 1 if math.isfinite(one.airmass) else -1
        if not 0 <= at < len(edges) - 1:
            known = f"airmass {one.airmass:.2f}" if math.isfinite(one.airmass) else "airmass not known"
            outside.append(
                Refused(one.obs_id, f"{known}: templates are made from {edges[0]:g} to {edges[-1]:g}")
            )
            continue
        ranges.setdefault(at, []).append(one)
    return [_choose(edges[at], edges[at + 1], ranges[at], rules) for at in sorted(ranges)], outside


def _choose(low: float, high: float, candidates: Sequence[Candidate], rules: Templates) -> Choice:
    refused: dict[str, str] = {}
    good = []
    for one in candidates:
        reason = _fault(one, rules)
        if reason:
            refused[one.obs_id] = reason
        else:
            good.append(one)
    # clouds first: what is left of a cloudy night can have the best seeing and the darkest sky
    for test in (_clouds, _seeing, _background, _depth):
        told = test(good, rules)
        good = [one for one in good if one.obs_id not in told]
        refused |= told
    good.sort(key=lambda c: (-_worth(c), c.obs_id))
    for one in good[rules.most_visits :]:
        refused[one.obs_id] = f"{rules.most_visits} better ones are enough"
    good = good[: rules.most_visits]
    if len(good) < rules.fewest_visits:
        for one in good:
            refused[one.obs_id] = f"good, one of {len(good)}: at least {rules.fewest_visits} make a template"
        good = []
    return Choice(
        low, high, tuple(sorted(good, key=lambda c: c.obs_id)),
        tuple(Refused(obs_id, refused[obs_id]) for obs_id in sorted(refused)),
    )  # fmt: skip


def _worth(one: Candidate) -> float:
    """Depth for point sources after everything was brought to one PSF."""
    return one.depth_mag - 2.5 * math.log10(one.seeing_arcsec)


def _fault(one: Candidate, rules: Templates) -> str:
    """What is wrong with a visit by itself."""
    if one.problem:
        return one.problem
    numbers = {
        "seeing": one.seeing_arcsec, "zero point": one.zero_point, "limiting magnitude": one.depth_mag,
        "background": one.sky_rate,
    }  # fmt: skip
    unknown = [name for name, value in numbers.items() if not math.isfinite(value)]
    if unknown or one.seeing_arcsec <= 0:
        return f"not measured: {', '.join(unknown or ['seeing'])}"
    if one.masked > rules.most_masked:
        return f"{one.masked:.0%} of its pixels are unusable: at most {rules.most_masked:.0%}"
    if one.ellipticity > rules.most_elliptical:
        return f"ellipticity {one.ellipticity:.2f}: at most {rules.most_elliptical:g}"
    if one.astrometry_arcsec > rules.astrometry_arcsec:
        return f"stars scatter by {one.astrometry_arcsec:.3f} arcsec about the WCS: at most {rules.astrometry_arcsec:g}"
    return ""


def _told(good: list[Candidate], reason: Callable[[Candidate], str]) -> dict[str, str]:
    return {one.obs_id: text for one in good if (text := reason(one))}


def _clouds(good: list[Candidate], rules: Templates) -> dict[str, str]:
    if not good:
        return {}
    clear = float(np.percentile([c.zero_point for c in good], 100 - QUARTER))
    return _told(
        good,
        lambda c: (
            f"clouds: zero point {clear - c.zero_point:.2f} mag below the clear ones'"
            if c.zero_point < clear - rules.cloud_mag
            else ""
        ),
    )


def _seeing(good: list[Candidate], rules: Templates) -> dict[str, str]:
    if not good:
        return {}
    most = rules.seeing_ratio * float(np.percentile([c.seeing_arcsec for c in good], QUARTER))
    return _told(
        good,
        lambda c: (
            f"seeing {c.seeing_arcsec:.2f} arcsec: at most {most:.2f}" if c.seeing_arcsec > most else ""
        ),
    )


def _background(good: list[Candidate], rules: Templates) -> dict[str, str]:
    if not good:
        return {}
    most = rules.background_ratio * float(np.percentile([c.sky_rate for c in good], QUARTER))
    return _told(
        good,
        lambda c: f"background {c.sky_rate:.3g} electrons/s: at most {most:.3g}" if c.sky_rate > most else "",
    )


def _depth(good: list[Candidate], rules: Templates) -> dict[str, str]:
    if not good:
        return {}
    least = float(np.percentile([c.depth_mag for c in good], 100 - QUARTER)) - rules.depth_mag
    return _told(
        good,
        lambda c: (
            f"limiting magnitude {c.depth_mag:.2f}: at least {least:.2f}" if c.depth_mag < least else ""
        ),
    )
