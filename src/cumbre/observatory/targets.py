"""Which tile next: one pure decision from the state, the time, the limits and the tiles.

Hard limits (never crossed): airmass and Moon distance at both ends of the exposure, the Sun's altitude.
Among what remains the best merit wins: long since the last visit, low airmass, short slew, preferred band.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cumbre.core.configuration import SiteConfig
from cumbre.core.instrument import Instrument
from cumbre.observatory import ephemeris
from cumbre.observatory.ephemeris import Location
from cumbre.observatory.visits import Target, Tile

WEIGHT_AIRMASS = 1.0
WEIGHT_SLEW_PER_MINUTE = 1.0
WEIGHT_REVISIT = 2.0
WEIGHT_BAND = 0.05
WEIGHT_MOON = 0.3


@dataclass(frozen=True, slots=True)
class Limits:
    """What the survey asks for and the telescope can do.

    Attributes
    ----------
    filters
        (physical filter, band) in order of preference.
    sun_limit_deg
        Exposures only while the Sun is lower than this.
    allow_daylight
        True lifts the Sun's limit (tests of the dome by day).
    revisit_s
        A tile seen less than this ago is taken only when no other can be.
    exposure_s, snaps, readout_s
        A visit: time of each exposure, their number, and the read-out between them.
    """

    location: Location
    filters: tuple[tuple[str, str], ...]
    exposure_s: float = 30.0
    snaps: int = 1
    readout_s: float = 0.0
    max_airmass: float = 1.8
    moon_avoidance_deg: float = 30.0
    revisit_s: float = 300.0
    sun_limit_deg: float = -12.0
    allow_daylight: bool = False
    slew_rate_deg_s: float = 3.0
    settle_s: float = 3.0
    filter_change_s: float = 30.0

    @classmethod
    def of_site(cls, config: SiteConfig, instrument: Instrument) -> Limits:
        """Limits of a site's configuration with its camera.

        Raises
        ------
        NotFoundError
            The configuration asks for a band that the camera has not.
        """
        chosen = [instrument.filter(name) for name in config.scheduler.filters]
        return cls(
            location=Location(config.observatory.latitude_deg, config.observatory.longitude_deg),
            filters=tuple((item.name, item.band) for item in chosen),
            exposure_s=config.scheduler.exposure_s,
            snaps=config.scheduler.snaps,
            readout_s=instrument.readout_s,
            max_airmass=config.scheduler.max_airmass,
            moon_avoidance_deg=config.scheduler.moon_avoidance_deg,
            slew_rate_deg_s=instrument.slew_rate_deg_s,
            settle_s=instrument.settle_s,
            filter_change_s=instrument.filter_change_s,
        )

    @property
    def visit_s(self) -> float:
        """Seconds from the opening of the shutter to its last closing."""
        return self.snaps * self.exposure_s + (self.snaps - 1) * self.readout_s


@dataclass(frozen=True, slots=True)
class TelescopeState:
    """Where the telescope will be when it is free, and what was seen when.

    Attributes
    ----------
    ra, dec
        ICRS degrees of the visit under way; None when parked (no slew is counted).
    free_tai
        When the shutter of the visit under way closes, TAI seconds.
    last_visit_tai
        Tile name → start of its last visit.
    """

    ra: float | None = None
    dec: float | None = None
    filter: str = ""
    free_tai: float = 0.0
    last_visit_tai: Mapping[str, float] = field(default_factory=dict)

    def after(self, target: Target) -> TelescopeState:
        """Give the state when a target is done."""
        return TelescopeState(
            target.ra,
            target.dec,
            target.filter,
            target.start_tai + target.duration_s,
            {**self.last_visit_tai, target.tile: target.start_tai},
        )


@dataclass(frozen=True, slots=True)
class Sky:
    """Everything the decision needs of each tile; arrays of shape (n_tiles,)."""

    airmass: NDArray[np.float64]
    moon_deg: NDArray[np.float64]
    slew_s: NDArray[np.float64]
    sun_altitude_deg: float


def look_at(state: TelescopeState, start_tai: float, limits: Limits, tiles: Sequence[Tile]) -> Sky:
    """Airmass and Moon distance (worst of both ends of the visit) and slew time of every tile."""
    ra = np.array([tile.ra for tile in tiles])
    dec = np.array([tile.dec for tile in tiles])
    slew = np.zeros(len(tiles))
    if state.ra is not None and state.dec is not None:
        distance = ephemeris.separation(ra, dec, state.ra, state.dec)
        slew = np.where(distance > 1e-6, distance / limits.slew_rate_deg_s + limits.settle_s, 0.0)
    ends = (start_tai, start_tai + float(slew.max(initial=0.0)) + limits.visit_s)
    place = limits.location
    masses = [ephemeris.airmass(ephemeris.target_altitude(place, t, ra, dec)[0]) for t in ends]
    moons = [ephemeris.moon_separation(place, t, ra, dec) for t in ends]
    sun = max(float(ephemeris.sun_altitude(place, t)) for t in ends)
    return Sky(np.maximum(*masses), np.minimum(*moons), slew, sun)


def next_target(
    state: TelescopeState, now_tai: float, config: Limits, tiles: Sequence[Tile]
) -> Target | None:
    """Choose the best target that may start at ``now_tai`` or, after its slew, later.

    Parameters
    ----------
    state
        Where the telescope will be and what was seen when.
    now_tai
        Earliest start of the exposure, TAI seconds.
    config
        Limits of the survey, the site and the telescope.
    tiles
        The survey's fields.

    Returns
    -------
    Target or None
        None when nothing may be observed then: :func:`why_nothing` says why.
    """
    if not tiles or not config.filters:
        return None
    sky = look_at(state, now_tai, config, tiles)
    if sky.sun_altitude_deg > config.sun_limit_deg and not config.allow_daylight:
        return None
    allowed = (sky.airmass <= config.max_airmass) & (sky.moon_deg >= config.moon_avoidance_deg)
    if not allowed.any():
        return None
    last = np.array([state.last_visit_tai.get(tile.name, -np.inf) for tile in tiles])
    rested = now_tai - last >= config.revisit_s
    if (allowed & rested).any():
        allowed &= rested
    best: tuple[float, Target] | None = None
    for rank, (name, band) in enumerate(config.filters):
        change = config.filter_change_s if state.filter and state.filter != name else 0.0
        slew = np.maximum(sky.slew_s, change)
        merit = np.where(allowed, _merit(sky, slew, now_tai - last, config) - WEIGHT_BAND * rank, -np.inf)
        i = int(np.argmax(merit))
        if best is None or merit[i] > best[0]:
            best = (
                float(merit[i]),
                Target(
                    tile=tiles[i].name,
                    ra=tiles[i].ra,
                    dec=tiles[i].dec,
                    filter=name,
                    band=band,
                    exposure_s=config.exposure_s,
                    start_tai=max(now_tai, state.free_tai + float(slew[i])),
                    airmass=float(sky.airmass[i]),
                    moon_deg=float(sky.moon_deg[i]),
                    slew_s=float(slew[i]),
                    snaps=config.snaps,
                    between_s=config.readout_s,
                ),
            )
    # A filter change may push the start beyond what was looked at: look again at the true start.
    return _still_allowed(best[1], config, tiles) if best else None


def _still_allowed(target: Target, config: Limits, tiles: Sequence[Tile]) -> Target | None:
    tile = next(tile for tile in tiles if tile.name == target.tile)
    sky = look_at(TelescopeState(), target.start_tai, config, [tile])
    good = sky.airmass[0] <= config.max_airmass and sky.moon_deg[0] >= config.moon_avoidance_deg
    dark = sky.sun_altitude_deg <= config.sun_limit_deg or config.allow_daylight
    if not (good and dark):
        return None
    return replace(target, airmass=float(sky.airmass[0]), moon_deg=float(sky.moon_deg[0]))


def _merit(
    sky: Sky, slew_s: NDArray[np.float64], since_s: NDArray[np.float64], config: Limits
) -> NDArray[np.float64]:
    """Larger is better; shape (n_tiles,)."""
    waited = 1.0 - np.exp(-np.maximum(since_s, 0.0) / config.revisit_s)
    moon = np.exp(-(sky.moon_deg - config.moon_avoidance_deg) / 20.0)
    return np.asarray(
        WEIGHT_REVISIT * waited
        - WEIGHT_AIRMASS * np.minimum(sky.airmass, 40.0)
        - WEIGHT_SLEW_PER_MINUTE * slew_s / 60.0
        - WEIGHT_MOON * moon
    )


def why_nothing(state: TelescopeState, now_tai: float, config: Limits, tiles: Sequence[Tile]) -> str:
    """One sentence: why :func:`next_target` gives None."""
    if not tiles:
        return "the survey has no tiles"
    sky = look_at(state, now_tai, config, tiles)
    if sky.sun_altitude_deg > config.sun_limit_deg and not config.allow_daylight:
        return f"the Sun is at {sky.sun_altitude_deg:.1f}° (limit {config.sun_limit_deg:.0f}°)"
    high = int(np.sum(sky.airmass > config.max_airmass))
    moon = int(np.sum(sky.moon_deg < config.moon_avoidance_deg))
    return (
        f"of {len(tiles)} tiles {high} are beyond airmass {config.max_airmass} and {moon} nearer than "
        f"{config.moon_avoidance_deg:.0f}° to the Moon"
    )


def predict(
    state: TelescopeState,
    now_tai: float,
    config: Limits,
    tiles: Sequence[Tile],
    *,
    until_tai: float,
    cadence_s: float,
) -> list[Target]:
    """Predict the schedule from now on if every visit goes well; gaps where nothing may be observed."""
    schedule: list[Target] = []
    moment = now_tai
    while moment < until_tai:
        target = next_target(state, moment, config, tiles)
        if target is None:
            moment += max(cadence_s, 300.0)
            continue
        schedule.append(target)
        state = state.after(target)
        moment = target.start_tai + cadence_s
    return schedule


def first_possible(
    state: TelescopeState, now_tai: float, config: Limits, tiles: Sequence[Tile], *, within_s: float = 86400.0
) -> float | None:
    """Find the first TAI, in steps of ten minutes, at which something may be observed; None for never."""
    for moment in np.arange(now_tai, now_tai + within_s, 600.0):
        if next_target(state, float(moment), config, tiles) is not None:
            return float(moment)
    return None
