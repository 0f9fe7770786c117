"""From a camera's header to what the observatory knows of an observation, repairing what is wrong.

:func:`translate` applies the ``header`` rules of an instrument description (:class:`HeaderField`). Every
value that had to be repaired, invented or left out is named in ``problems``; a missing value without which
nothing can be done is a :class:`BadFileError` that says which keyword was looked for and what to add to the
description. Instruments without rules have cumbre's own keywords (see ``docs/reference``). Nothing here reads
files: headers are mappings; :func:`cumbre.core.header_files.read_headers` makes them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any, cast

from cumbre.core.errors import BadFileError, UserError
from cumbre.core.header_time import day_obs_from_ns, moment_ns, tai_ns_from_utc_ns
from cumbre.core.header_wcs import linear_wcs, wcs_problem
from cumbre.core.ids import MAX_SEQ_NUM, ObsId, visit_id
from cumbre.core.instrument import Detector, HeaderField, Instrument

Header = Mapping[str, Any]
NS = 1_000_000_000
CALIBRATION_TYPES = frozenset({"bias", "dark", "flat", "arc"})

OWN_RULES: dict[str, HeaderField] = {
    "obs_id": HeaderField(keywords=("OBSID",), required=True),
    "day_obs": HeaderField(keywords=("DAYOBS",)),
    "seq_num": HeaderField(keywords=("SEQNUM",)),
    "group_id": HeaderField(keywords=("GROUPID",)),
    "sequence_index": HeaderField(keywords=("CURINDEX",)),
    "sequence_length": HeaderField(keywords=("MAXINDEX",)),
    "telescope": HeaderField(keywords=("TELESCOP",)),
    "begin": HeaderField(keywords=("DATE-BEG",), time_scale="tai", required=True),
    "end": HeaderField(keywords=("DATE-END",), time_scale="tai"),
    "exposure_s": HeaderField(keywords=("EXPTIME",), required=True),
    "dark_s": HeaderField(keywords=("DARKTIME",)),
    "image_type": HeaderField(
        keywords=("IMGTYPE",),
        required=True,
        mapping={"OBJECT": "science", "BIAS": "bias", "DARK": "dark", "FLAT": "flat"},
        lower=True,
    ),
    "reason": HeaderField(keywords=("REASON", "IMGTYPE"), lower=True),
    "filter": HeaderField(keywords=("FILTER",)),
    "ra": HeaderField(keywords=("RA",)),
    "dec": HeaderField(keywords=("DEC",)),
    "rotpa": HeaderField(keywords=("ROTPA",)),
    "airmass": HeaderField(keywords=("AIRMASS",)),
    "altitude": HeaderField(keywords=("ELSTART",)),
    "azimuth": HeaderField(keywords=("AZSTART",)),
    "detector": HeaderField(keywords=("CHIPID", "DETECTOR")),
    "object": HeaderField(keywords=("OBJECT",)),
    "program": HeaderField(keywords=("PROGRAM",)),
}
"""The keywords of cumbre's own raw files."""

QUANTITIES = frozenset(OWN_RULES)
"""Names that the ``header`` part of a description may use."""

# Factors to our units (seconds, degrees) from the units a header may use.
_UNITS = {
    "": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0, "day": 86400.0, "d": 86400.0,
    "deg": 1.0, "rad": 180.0 / math.pi, "hourangle": 15.0, "arcmin": 1 / 60.0, "arcsec": 1 / 3600.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ObservationMetadata:
    """One detector's raw file, in our own words.

    Angles are degrees (ICRS), times TAI; NaN or "" where the header has nothing. ``begin_ns`` and ``end_ns``
    are nanoseconds since 1970-01-01 TAI, because float seconds cannot hold them.
    """

    obs_id: str
    instrument: str
    exposure_id: int
    day_obs: int
    seq_num: int
    group_id: str
    image_type: str
    """science, bias, dark, flat, arc… (the Butler's observation_type)."""
    filter: str
    """Physical filter, "" when there is none."""
    band: str
    exposure_s: float
    dark_s: float
    begin_ns: int
    end_ns: int
    ra_deg: float
    dec_deg: float
    rotpa_deg: float
    airmass: float
    altitude_deg: float
    azimuth_deg: float
    detector_id: int
    detector_name: str
    object: str
    program: str
    reason: str
    telescope: str
    wcs_usable: bool
    """Whether the header's own WCS may be believed; else only the pointing is a first guess."""
    problems: tuple[str, ...]
    sequence_index: int = 1
    """Which exposure of its visit it is, from 1."""
    sequence_length: int = 1
    """How many exposures its visit has."""

    @property
    def visit_id(self) -> int:
        """Number of its visit: that of the visit's first exposure."""
        return visit_id(self.exposure_id, self.sequence_index)

    @property
    def begin_tai(self) -> float:
        """Begin of the exposure, TAI seconds."""
        return self.begin_ns / NS

    @property
    def end_tai(self) -> float:
        """End of the exposure, TAI seconds."""
        return self.end_ns / NS

    @property
    def zenith_angle_deg(self) -> float:
        """90° − altitude; NaN when not known."""
        return 90.0 - self.altitude_deg


def _present(value: Any) -> bool:
    """Whether a header value says anything (not None, undefined, blank or NaN)."""
    if value is None or type(value).__name__ == "Undefined":
        return False
    if isinstance(value, str):
        return bool(value.strip())
    return not (isinstance(value, float) and math.isnan(value))


def is_own_raw(instrument: Instrument, primary: Header) -> bool:
    """Whether cumbre's image writer made the file: frames of a foreign camera come out of it in our own words."""
    return (
        str(primary.get("CAMERA", "")).strip() == instrument.name
        and "EXPID" in primary
        and "CHIPID" in primary
    )


class HeaderReader:
    """Looks values up by the rules of one instrument and remembers what was wrong."""

    def __init__(
        self, instrument: Instrument, headers: Sequence[Header] | Mapping[str, Header], filename: str
    ) -> None:
        self.instrument = instrument
        self.filename = filename
        self.problems: list[str] = []
        if isinstance(headers, Mapping):
            self._by_name: dict[str, Header] = {str(name): value for name, value in headers.items()}
            self._all: list[Header] = list(self._by_name.values())
        else:
            self._all = list(headers)
            self._by_name = {str(i): header for i, header in enumerate(self._all)}
            self._by_name |= {str(h["EXTNAME"]).strip(): h for h in self._all if "EXTNAME" in h}
        foreign = instrument.header and not is_own_raw(instrument, self._all[0] if self._all else {})
        self.rules = instrument.header if foreign else OWN_RULES

    def lookup(self, keyword: str, absent: Iterable[str] = ()) -> Any:
        """Value of ``KEY`` in the first header that has it, or of ``EXT/KEY``; None when not there."""
        extension, _, key = keyword.rpartition("/")
        candidates = self._all if not extension else [self._by_name.get(extension, {})]
        for header in candidates:
            try:
                value = header.get(key)
            except ValueError:
                # astropy parses a card when it is read; an unreadable one says nothing.
                self.problems.append(f"{keyword}: the card cannot be parsed")
                continue
            if _present(value) and str(value).strip() not in absent:
                return value.strip() if isinstance(value, str) else value
        return None

    def raw(self, name: str) -> tuple[Any, HeaderField | None]:
        """Value after ``pattern``, ``mapping`` and ``join``, and the rule that gave it."""
        rule = self.rules.get(name)
        while rule is not None:
            value = self._by_rule(name, rule)
            if value is not None:
                if rule.warning:
                    self.problems.append(f"{name}: {rule.warning}")
                return value, rule
            if rule.otherwise is None and rule.required:
                self.require(name, None)
            rule = rule.otherwise
        return None, None

    def _by_rule(self, name: str, rule: HeaderField) -> Any:
        values = [v for key in rule.keywords if (v := self.lookup(key, rule.absent)) is not None]
        if rule.join is not None and len(values) == len(rule.keywords):
            return rule.join.join(str(self._mapped(name, rule, value)) for value in values)
        if not values or rule.join is not None:
            if rule.constant is not None and rule.keywords:
                self.problems.append(f"{name}: no {' or '.join(rule.keywords)}; took {rule.constant!r}")
            return rule.constant
        return self._mapped(name, rule, values[0])

    def _mapped(self, name: str, rule: HeaderField, value: Any) -> Any:
        if rule.pattern:
            match = re.search(rule.pattern, str(value))
            if match is None:
                self.problems.append(f"{name}: {value!r} does not match pattern {rule.pattern!r}")
                return value
            value = match[1] if match.groups() else match[0]
        if rule.mapping:
            text = str(value).lower()
            for key, word in rule.mapping.items():
                if fnmatchcase(text, key.lower()):
                    return word
        if rule.lower:
            return str(value).lower()
        return value

    def require(self, name: str, value: Any) -> Any:
        """``value``, or the error that names the file, the keywords and what to add."""
        if value is not None:
            return value
        tried: list[str] = []
        rule = self.rules.get(name)
        while rule is not None:
            tried += rule.keywords
            rule = rule.otherwise
        looked = f"none of the keywords {', '.join(tried)}" if tried else "no keyword is described"
        raise BadFileError(
            f"{self.filename}: {name} is missing: {looked}. Add to the description of {self.instrument.name}, "
            f"under header: {{{name}: {{keywords: [THE KEYWORD THAT HAS IT]}}}}; "
            f"if it never changes, {{{name}: {{constant: VALUE}}}}"
        )

    def text(self, name: str) -> str:
        """Text of a quantity; "" when not there."""
        value, _ = self.raw(name)
        return "" if value is None else str(value).strip()

    def number(self, name: str, *, needed: bool = False) -> float:
        """Return a number in seconds or degrees; NaN when not there (an error when ``needed``)."""
        value, rule = self.raw(name)
        if value is None or rule is None:
            if needed:
                self.require(name, None)
            return math.nan
        number = self._to_number(name, value, rule)
        if math.isnan(number) and (needed or rule.required):
            raise BadFileError(f"{self.filename}: {name} = {value!r}: expected a number")
        return number

    def _to_number(self, name: str, value: Any, rule: HeaderField) -> float:
        if rule.unit not in _UNITS:
            raise UserError(
                f"instrument {self.instrument.name}: header.{name}.unit = {rule.unit!r}: expected one of "
                f"{', '.join(key for key in _UNITS if key)}"
            )
        try:
            number = sexagesimal(value) if isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            self.problems.append(f"{name}: {value!r} is not a number")
            return math.nan
        return (number * rule.scale + rule.offset) * _UNITS[rule.unit]

    def moment(self, name: str) -> int | None:
        """Time of a quantity in TAI nanoseconds; None when not there."""
        value, rule = self.raw(name)
        if value is None or rule is None:
            return None
        scale = rule.time_scale or "utc"
        if scale == "timesys":
            scale = "tai" if str(self.lookup("TIMESYS") or "UTC").upper() == "TAI" else "utc"
        try:
            found = moment_ns(value, scale, rule.utc_offset_h)
        except (ValueError, OverflowError) as error:
            if rule.required:
                raise BadFileError(f"{self.filename}: {name} = {value!r}: not a time ({error})") from error
            self.problems.append(f"{name}: {value!r} is not a time")
            return None
        if scale == "local":
            self.problems.append(f"{name}: local time, {rule.utc_offset_h:+g} h from UTC, was converted")
        later = self.lookup(rule.not_after) if rule.not_after else None
        if later is not None:
            limit = moment_ns(later, "utc", 0.0)
            if found > limit:
                self.problems.append(
                    f"{name}: {value} is later than {rule.not_after} = {later}, so it was copied from "
                    f"another frame; {rule.not_after} is taken (too late by the time until the file was written)"
                )
                return limit
        return found


def sexagesimal(text: str) -> float:
    """Return the number of ``12``, ``-12.5``, ``12:34:56.7`` or ``-12 34 56.7``; the unit of the first part.

    Raises
    ------
    ValueError
        The text has another form.
    """
    parts = re.split(r"[:\s]+", text.strip())
    if len(parts) > 3:
        raise ValueError(f"{text!r} has {len(parts)} parts")
    values = [float(part) for part in parts]
    total = sum(abs(value) / 60.0**i for i, value in enumerate(values))
    return -total if parts[0].startswith("-") else total


def translate(
    instrument: Instrument, headers: Sequence[Header] | Mapping[str, Header], filename: str
) -> ObservationMetadata:
    """Metadata of one raw file.

    Parameters
    ----------
    instrument
        Its ``header`` rules say where everything is; without rules cumbre's own keywords are taken.
    headers
        Headers of the file's HDUs in order, primary first, or by extension name.
    filename
        For messages, and matched with ``instrument.file_pattern`` for ``seq_num``, ``detector``, ``day_obs``.

    Raises
    ------
    BadFileError
        Something required is missing; the message says what to add to the description.
    """
    reader = HeaderReader(instrument, headers, filename)
    named = _file_groups(instrument, filename)
    begin_ns = reader.require("begin", reader.moment("begin"))
    exposure_s = reader.number("exposure_s", needed=True)
    if exposure_s < 0:
        raise BadFileError(f"{filename}: exposure_s = {exposure_s}: expected 0 s or more")
    dark_s = reader.number("dark_s")
    if not dark_s >= exposure_s:
        # A dark time of 0 on a 60 s exposure is a keyword that nobody filled.
        if not math.isnan(dark_s):
            reader.problems.append(
                f"dark_s: {dark_s:g} s is shorter than the exposure; took the exposure time"
            )
        dark_s = exposure_s
    obs_id = _identity(reader, named, begin_ns)
    image_type = str(reader.require("image_type", reader.text("image_type") or None))
    detector = _detector(reader, named)
    physical, band = _filter(reader, image_type)
    ra, dec = _position(reader, image_type)
    index, length = _sequence(reader, obs_id)
    return ObservationMetadata(
        obs_id=str(obs_id),
        instrument=instrument.name,
        exposure_id=obs_id.exposure_id,
        day_obs=obs_id.day_obs,
        seq_num=obs_id.seq_num,
        group_id=reader.text("group_id") or str(obs_id),
        image_type=image_type,
        filter=physical,
        band=band,
        exposure_s=exposure_s,
        dark_s=dark_s,
        begin_ns=begin_ns,
        end_ns=_end(reader, begin_ns, exposure_s),
        ra_deg=ra,
        dec_deg=dec,
        rotpa_deg=reader.number("rotpa"),
        airmass=reader.number("airmass"),
        altitude_deg=reader.number("altitude"),
        azimuth_deg=reader.number("azimuth"),
        detector_id=detector.id,
        detector_name=detector.name,
        object=reader.text("object"),
        program=reader.text("program"),
        reason=reader.text("reason") or image_type,
        telescope=reader.text("telescope"),
        wcs_usable=_wcs(reader, detector, ra, dec),
        problems=tuple(dict.fromkeys(reader.problems)),
        sequence_index=index,
        sequence_length=length,
    )


def _sequence(reader: HeaderReader, obs_id: ObsId) -> tuple[int, int]:
    """Place in the visit and its number of exposures; what has no group, or no sense, is alone."""
    index, length = reader.number("sequence_index"), reader.number("sequence_length")
    if not reader.text("group_id") or not (1 <= index <= length and index <= obs_id.seq_num):
        return 1, 1
    return int(index), int(length)


def _file_groups(instrument: Instrument, filename: str) -> dict[str, str]:
    if not instrument.file_pattern:
        return {}
    match = re.fullmatch(instrument.file_pattern, PurePath(filename).name)
    return {key: value for key, value in match.groupdict().items() if value} if match else {}


def _identity(reader: HeaderReader, named: dict[str, str], begin_ns: int) -> ObsId:
    """obs_id of the header, else one made from the night and a sequence number that stays the same."""
    text = reader.text("obs_id")
    if text:
        try:
            return ObsId.parse(text)
        except UserError as error:
            raise BadFileError(f"{reader.filename}: {error}") from error
    day_obs = named.get("day_obs") or reader.text("day_obs")
    day = int(day_obs) if day_obs.isdigit() else day_obs_from_ns(begin_ns)
    seq_text = reader.text("seq_num") or named.get("seq_num", "")
    try:
        seq_num = int(float(seq_text))
        if "letter" in named:
            seq_num = seq_num * 100 + ord(named["letter"].lower()) - ord("a") + 1
    except ValueError:
        seq_num = 0
    if not 1 <= seq_num <= MAX_SEQ_NUM:
        # Seconds since the noon before: unique while no two exposures begin in the same second.
        start = datetime(day // 10000, day // 100 % 100, day % 100, 12, tzinfo=UTC)
        seq_num = (begin_ns - tai_ns_from_utc_ns(int(start.timestamp()) * NS)) // NS + 1
        reader.problems.append("seq_num: not in header or file name; made from the time of the exposure")
        if not 1 <= seq_num <= MAX_SEQ_NUM:
            raise BadFileError(
                f"{reader.filename}: the exposure's time does not lie in its day_obs {day}; add a "
                f"seq_num rule or file_pattern to the description of {reader.instrument.name}"
            )
    return ObsId(day, seq_num, reader.instrument.prefix)


def _detector(reader: HeaderReader, named: dict[str, str]) -> Detector:
    key: Any = reader.text("detector") or named.get("detector", "")
    detectors = reader.instrument.detectors
    if not key and len(detectors) == 1:
        return detectors[0]
    for detector in detectors:
        if key in (detector.name, str(detector.id)):
            return detector
    if not key:
        reader.require("detector", None)
    raise BadFileError(
        f"{reader.filename}: detector {key!r} is not one of {reader.instrument.name}'s "
        f"({', '.join(d.name for d in detectors[:12])}{'…' if len(detectors) > 12 else ''}); add it to "
        "detectors or translate it with header: {detector: {mapping: {…}}}"
    )


def _filter(reader: HeaderReader, image_type: str) -> tuple[str, str]:
    name = reader.text("filter")
    if not name:
        if image_type not in CALIBRATION_TYPES - {"flat"}:
            reader.problems.append("filter: not in the header")
        return "", ""
    for item in reader.instrument.filters:
        if name.lower() in (item.name.lower(), item.band.lower()):
            return item.name, item.band
    known = ", ".join(item.name for item in reader.instrument.filters[:8])
    reader.problems.append(f"filter: {name!r} is not described (filters: {known}); its band is not known")
    return name, ""


def _position(reader: HeaderReader, image_type: str) -> tuple[float, float]:
    ra, dec = reader.number("ra"), reader.number("dec")
    if math.isnan(ra) or math.isnan(dec):
        if image_type not in CALIBRATION_TYPES:
            reader.problems.append("ra, dec: no position in the header")
        return math.nan, math.nan
    if not -90 <= dec <= 90:
        reader.problems.append(f"dec: {dec:g} is no declination")
        return math.nan, math.nan
    return ra % 360.0, dec


def _end(reader: HeaderReader, begin_ns: int, exposure_s: float) -> int:
    shortest = begin_ns + round(exposure_s * NS)
    end_ns = reader.moment("end")
    if end_ns is None:
        reader.problems.append("end: not in the header; begin + exposure time")
        return shortest
    if end_ns < begin_ns:
        reader.problems.append("end: lies before the begin; begin + exposure time")
        return shortest
    return end_ns


def _wcs(reader: HeaderReader, detector: Detector, ra: float, dec: float) -> bool:
    wcs = linear_wcs(cast("Any", reader.lookup))
    if wcs is None:
        return False
    if not reader.instrument.trust_header_wcs:
        reader.problems.append("wcs: not believed (trust_header_wcs is false)")
        return False
    problem = wcs_problem(wcs, reader.instrument, detector, ra, dec)
    if problem:
        reader.problems.append(f"wcs: {problem}")
    return not problem
