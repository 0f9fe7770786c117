"""Which keywords a header has and how they are made: data from ``header_map.yaml``, no input or output."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cumbre.bus.messages import Message
from cumbre.core.configuration import Observatory
from cumbre.core.errors import ConfigurationError, CumbreError
from cumbre.core.ids import ObsId
from cumbre.core.instrument import explain_validation, load_instrument
from cumbre.core.time import isot, mjd_from_seconds

Scalar = str | int | float | bool
Stage = Literal["startIntegration", "startReadout", "endOfImageTelemetry"]
MAP_FILE = Path(__file__).with_name("header_map.yaml")
_SOURCE = re.compile(
    r"(?P<topic>[A-Za-z]\w*\.[A-Za-z]\w*)\.(?P<additional>additional\.)?(?P<field>\w+)(?:\[(?P<item>\d+)\])?"
)
_MAX_TEXT = 68


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


@dataclass(frozen=True, slots=True)
class Source:
    """One place where a value may be found."""

    topic: str
    field: str
    item: int | None
    additional: bool

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read ``Component.topic.field``, with ``[n]`` or ``.additional.`` where needed."""
        match = _SOURCE.fullmatch(text)
        if match is None:
            raise ValueError(f"source {text!r}: expected Component.topic.field, field[n] or additional.NAME")
        item = int(match["item"]) if match["item"] else None
        return cls(match["topic"], match["field"], item, match["additional"] is not None)

    def value(self, fields: Mapping[str, Any]) -> Any:
        """What a message says, None when it says nothing."""
        if self.additional:
            pairs = zip(
                _list(fields.get("additionalKeys")), _list(fields.get("additionalValues")), strict=False
            )
            found: Any = {key.strip().lower(): value for key, value in pairs}.get(self.field.lower())
        else:
            found = fields.get(self.field)
        if self.item is not None:
            found = found[self.item] if isinstance(found, list) and len(found) > self.item else None
        return None if found == "" else found


def _list(value: Any) -> list[str]:
    """A list of words, also from SAL's form with colons (``\\:`` is a colon inside a word)."""
    if isinstance(value, str):
        return [part.replace("\\:", ":") for part in re.split(r"(?<!\\):", value)]
    return [str(part) for part in value or []]


class Entry(_Model):
    """One keyword of the map; the file's head says what each key means."""

    sources: Annotated[tuple[str, ...], Field(alias="from")] = ()
    constant: Scalar | None = None
    site: Literal["name", "latitude_deg", "longitude_deg", "elevation_m", ""] = ""
    derive: str = ""
    collect: Stage = "startIntegration"
    type: Literal["string", "int", "float"] = "string"
    comment: Annotated[str, Field(max_length=60)] = ""
    max_age_s: Annotated[float | None, Field(gt=0)] = None
    only: tuple[str, ...] = ()
    optional: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> Entry:
        ways = [bool(self.sources), self.constant is not None, bool(self.site), bool(self.derive)]
        if sum(ways) != 1:
            raise ValueError("expected exactly one of from, constant, site, derive")
        if self.derive and self.derive not in FORMULAE:
            raise ValueError(f"derive = {self.derive!r}: expected one of {', '.join(FORMULAE)}")
        self.parsed()
        return self

    def parsed(self) -> list[Source]:
        """Sources in the order of preference."""
        return [Source.parse(text) for text in self.sources]

    def convert(self, value: Any) -> Scalar | None:
        """A value fit for a FITS card of this entry's type, None for what cannot be one (NaN, wrong type)."""
        try:
            if self.type == "int":
                return int(value)
            if self.type == "float":
                number = float(value)
                return number if math.isfinite(number) else None
        except (TypeError, ValueError, OverflowError):
            return None
        text = "".join(c if " " <= c <= "~" else "?" for c in str(value))
        return text[:_MAX_TEXT]


class HeaderMap(_Model):
    """The whole map."""

    version: int
    deadline_s: Annotated[float, Field(gt=0)]
    quantities: dict[str, Entry] = {}
    keywords: dict[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_-]{0,7}$")], Entry]

    @property
    def topics(self) -> set[str]:
        """Every topic that some keyword is read from."""
        entries = [*self.quantities.values(), *self.keywords.values()]
        return {source.topic for entry in entries for source in entry.parsed()}


@lru_cache(maxsize=8)
def load_header_map(path: Path = MAP_FILE) -> HeaderMap:
    """Read and validate a map.

    Raises
    ------
    ConfigurationError
        Names file, keyword and what was expected.
    """
    try:
        return HeaderMap.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: not YAML: {error}") from error
    except ValidationError as error:
        raise explain_validation(str(path), error) from error


Values = dict[str, Scalar]


def _sky(values: Values, observatory: Observatory) -> tuple[float, float, float]:
    """Elevation, azimuth, hour angle (deg, deg, h) at the begin of the exposure."""
    from cumbre.observatory.ephemeris import Location, altitude_azimuth, precess_to_date, sidereal_time

    begin = float(values["begin_tai"])
    location = Location(observatory.latitude_deg, observatory.longitude_deg)
    ra, dec = precess_to_date(float(values["RA"]), float(values["DEC"]), begin)
    elevation, azimuth = altitude_azimuth(location, begin, ra, dec)
    hour_angle = (float(sidereal_time(begin, location.longitude_deg) - ra) + 180.0) % 360.0 - 180.0
    return float(elevation), float(azimuth), hour_angle / 15.0


def _airmass(values: Values, observatory: Observatory) -> Scalar:
    from cumbre.observatory.ephemeris import airmass

    return round(float(airmass(_sky(values, observatory)[0])), 5)


def _band(values: Values, _: Observatory) -> Scalar:
    return load_instrument(values["_instrument_file"]).filter(str(values["FILTER"])).band  # type: ignore[arg-type]


FORMULAE: dict[str, Callable[[Values, Observatory], Scalar]] = {
    "exposure_id": lambda v, _: ObsId.parse(str(v["OBSID"])).exposure_id,
    "band": _band,
    "date_begin": lambda v, _: isot(float(v["begin_tai"])),
    "date_end": lambda v, _: isot(float(v["end_tai"])),
    "mjd_begin": lambda v, _: round(mjd_from_seconds(float(v["begin_tai"])), 9),
    "mjd_end": lambda v, _: round(mjd_from_seconds(float(v["end_tai"])), 9),
    "airmass": _airmass,
    "elevation": lambda v, o: round(_sky(v, o)[0], 5),
    "azimuth": lambda v, o: round(_sky(v, o)[1], 5),
    "hour_angle": lambda v, o: round(_sky(v, o)[2], 6),
}
"""Formulae by name; a KeyError means that something they need is missing."""


@dataclass(slots=True)
class Collected:
    """What is known of one image's header so far."""

    values: Values = field(default_factory=dict)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def collect(
        self, entries: Mapping[str, Entry], look_up: Callable[[str], Message | None], at_tai: float
    ) -> None:
        """Take the values of ``entries`` that are not known yet from the last messages seen."""
        for name, entry in entries.items():
            if name in self.values or not entry.sources:
                continue
            for source in entry.parsed():
                message = look_up(source.topic)
                if message is None:
                    continue
                age = max(at_tai - message.snd_tai, 0.0)
                if entry.max_age_s is not None and age > entry.max_age_s:
                    self.reasons[name] = f"{source.topic} is {age:.0f} s old, limit {entry.max_age_s:g} s"
                    continue
                value = entry.convert(found) if (found := source.value(message.fields)) is not None else None
                if value is None:
                    continue
                self.values[name] = value
                self.provenance[name] = {
                    "topic": source.topic, "snd_tai": message.snd_tai, "age_s": round(age, 3)
                }  # fmt: skip
                self.reasons.pop(name, None)
                break

    def finish(self, header_map: HeaderMap, observatory: Observatory, at_tai: float) -> None:
        """Add constants, values of the site, and derived keywords."""
        for name, entry in header_map.keywords.items():
            if entry.constant is not None:
                self.values[name] = entry.constant
                self.provenance[name] = {"topic": "constant", "snd_tai": at_tai, "age_s": 0.0}
            elif entry.site:
                self.values[name] = getattr(observatory, entry.site)
                self.provenance[name] = {"topic": "site", "snd_tai": at_tai, "age_s": 0.0}
        for name, entry in header_map.keywords.items():
            if not entry.derive or not self.applies(entry):
                continue
            try:
                value = FORMULAE[entry.derive](self.values, observatory)
            except KeyError as error:
                self.reasons[name] = f"needs {error.args[0]}"
                continue
            except CumbreError as error:
                self.reasons[name] = str(error)
                continue
            if isinstance(value, float) and not math.isfinite(value):
                self.reasons[name] = "below the horizon or not a number"
                continue
            self.values[name] = value
            self.provenance[name] = {"topic": f"derived:{entry.derive}", "snd_tai": at_tai, "age_s": 0.0}

    def applies(self, entry: Entry) -> bool:
        """Whether images of this type have the keyword."""
        return not entry.only or str(self.values.get("IMGTYPE", entry.only[0])) in entry.only
