"""Tiles of the survey, targets picked from them, and visits announced for them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cumbre.core.errors import ConfigurationError, NotFoundError, UnprocessableDataError
from cumbre.core.time import isot, parse_isot

SURVEY_FILE = "survey.json"
ICRS = 2
"""coordinateSystem of nextVisit."""
ROTATION_SKY = 2
"""rotationSystem of nextVisit."""
DOME_OPEN = 2


@dataclass(frozen=True, slots=True)
class Tile:
    """One field of the survey: centre in ICRS degrees."""

    name: str
    ra: float
    dec: float


@dataclass(frozen=True, slots=True)
class Target:
    """What the scheduler chose.

    Attributes
    ----------
    ra, dec, rotation
        ICRS degrees; rotation is the angle of the focal plane's +y axis east of north.
    start_tai
        Earliest start of the first exposure, TAI seconds: the slew is over by then.
    airmass, moon_deg
        Worst airmass and distance of the Moon during the visit.
    slew_s
        Seconds of slew, settling and filter change from the previous target.
    exposure_s, snaps
        Time of one exposure, and how many the visit has.
    between_s
        Seconds from the end of one exposure to the start of the next: the read-out.
    """

    tile: str
    ra: float
    dec: float
    filter: str
    band: str
    exposure_s: float
    start_tai: float
    airmass: float
    moon_deg: float
    slew_s: float
    rotation: float = 0.0
    note: str = ""
    snaps: int = 1
    between_s: float = 0.0

    @property
    def duration_s(self) -> float:
        """Seconds from the opening of the shutter to its last closing."""
        return self.snaps * self.exposure_s + (self.snaps - 1) * self.between_s


@dataclass(frozen=True, slots=True)
class Visit:
    """A target with its group id: what ``nextVisit`` announces."""

    group_id: str
    target_id: int
    instrument: str
    target: Target

    def to_json(self) -> dict[str, Any]:
        """As plain data for the durable state."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Visit:
        """Inverse of :meth:`to_json`."""
        return cls(data["group_id"], data["target_id"], data["instrument"], Target(**data["target"]))

    def next_visit_fields(self) -> dict[str, Any]:
        """Fields of ScriptQueue.nextVisit."""
        target = self.target
        return {
            "groupId": self.group_id,
            "coordinateSystem": ICRS,
            "position": [target.ra, target.dec],
            "startTime": target.start_tai,
            "rotationSystem": ROTATION_SKY,
            "cameraAngle": target.rotation,
            "filters": target.filter,
            "dome": DOME_OPEN,
            "duration": target.duration_s,
            "nimages": target.snaps,
            "instrument": self.instrument,
            "survey": target.tile,
            "totalCheckpoints": 0,
            "scriptSalIndex": self.target_id,
        }

    def target_fields(self) -> dict[str, Any]:
        """Fields of Scheduler.target."""
        target = self.target
        return {
            "targetId": self.target_id,
            "ra": target.ra,
            "dec": target.dec,
            "filter": target.filter,
            "band": target.band,
            "exposureTime": target.exposure_s,
            "nimages": target.snaps,
            "airmass": target.airmass,
            "slewTime": target.slew_s,
            "startTai": target.start_tai,
            "note": target.note or target.tile,
        }

    def take_images_fields(self) -> dict[str, Any]:
        """Fields of the Camera.takeImages command; the camera gives the obs_id."""
        target = self.target
        return {
            "numImages": target.snaps,
            "expTime": target.exposure_s,
            "imageType": "OBJECT",
            "groupId": self.group_id,
            "instrument": self.instrument,
            "obsId": "",
            "filter": target.filter,
            "ra": target.ra,
            "dec": target.dec,
            "rotation": target.rotation,
            "program": "survey",
            "note": target.tile,
        }


@dataclass(frozen=True, slots=True)
class AnnouncedVisit:
    """A nextVisit message as its readers see it, checked.

    Attributes
    ----------
    ra, dec, rotation
        ICRS degrees.
    start_tai
        Announced start, TAI seconds; 0 when unknown.
    """

    group_id: str
    instrument: str
    ra: float
    dec: float
    rotation: float
    filter: str
    start_tai: float
    duration_s: float
    n_images: int
    survey: str

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> AnnouncedVisit:
        """Read a ScriptQueue.nextVisit.

        Raises
        ------
        UnprocessableDataError
            No instrument, no group id, or a position that is not on the ICRS sky.
        """
        group_id, instrument = str(fields.get("groupId", "")), str(fields.get("instrument", ""))
        position = list(fields.get("position") or [])
        if not group_id or not instrument:
            raise UnprocessableDataError(
                f"nextVisit {group_id!r}: instrument is {instrument!r}; expected a group id and an instrument"
            )
        on_sky = len(position) == 2 and 0 <= position[0] <= 360 and -90 <= position[1] <= 90
        if fields.get("coordinateSystem") != ICRS or not on_sky:
            raise UnprocessableDataError(
                f"nextVisit {group_id}: coordinateSystem {fields.get('coordinateSystem')}, "
                f"position {position}: expected ICRS (2) with right ascension and declination in degrees"
            )
        return cls(
            group_id,
            instrument,
            float(position[0]),
            float(position[1]),
            _finite(fields.get("cameraAngle")),
            str(fields.get("filters", "")),
            _finite(fields.get("startTime")),
            _finite(fields.get("duration")),
            int(fields.get("nimages", 0)),
            str(fields.get("survey", "")),
        )


def _finite(value: Any) -> float:
    """Turn a field into a number; what the sender left out (NaN on the bus) is 0."""
    number = float(value or 0.0)
    return number if math.isfinite(number) else 0.0


def new_group_id(now_tai_s: float, last: str) -> str:
    """Make a group id (TAI, milliseconds) that is later than ``last`` whatever the clock did.

    Group ids order as text; a clock set back, or two visits within a millisecond, still give a new one.
    """
    candidate = isot(now_tai_s)
    if candidate <= last:
        candidate = isot(parse_isot(last) + 0.001)
    return candidate


def parse_tiles(data: Any, where: str) -> list[Tile]:
    """Tiles of a survey file's content.

    Raises
    ------
    ConfigurationError
        Not a list of ``{name, ra, dec}``, a position off the sky, or a name twice.
    """
    if isinstance(data, Mapping):
        data = data.get("tiles")
    if not isinstance(data, list) or not data:
        raise ConfigurationError(f"{where}: expected a list of {{name, ra, dec}}, found {str(data)[:80]!r}")
    tiles: list[Tile] = []
    for i, item in enumerate(data):
        try:
            tile = Tile(str(item["name"]), float(item["ra"]), float(item["dec"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"{where}: entry {i} = {item!r}: expected {{name, ra, dec}}") from error
        if not (0 <= tile.ra < 360 and -90 <= tile.dec <= 90):
            raise ConfigurationError(
                f"{where}: entry {i} = {item!r}: ra must be in [0, 360), dec in [-90, 90]"
            )
        tiles.append(tile)
    _unique(tiles, where)
    return tiles


def _unique(tiles: Iterable[Tile], where: str) -> None:
    seen: set[str] = set()
    for tile in tiles:
        if tile.name in seen:
            raise ConfigurationError(f"{where}: the name {tile.name!r} is there twice; names must be unique")
        seen.add(tile.name)


def load_tiles(path: Path) -> list[Tile]:
    """Tiles of ``survey.json``.

    Raises
    ------
    NotFoundError
        There is no file.
    ConfigurationError
        The file is wrong.
    """
    if not path.is_file():
        raise NotFoundError(f"{path}: no survey; the preparation of the night writes it")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigurationError(f"{path}: not JSON: {error}") from error
    return parse_tiles(data, str(path))
