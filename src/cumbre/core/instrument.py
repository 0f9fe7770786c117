"""Instruments as data: detectors, amplifiers, focal plane, filters, header mapping.

A description is one YAML file. :class:`Instrument` is its validated form; every room that needs a camera's
geometry reads it from here. Pixel boxes are 0-based, half-open, x first: ``[x0, x1, y0, y1]``.
Shapes of arrays are ``(ny, nx)``.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cumbre.core.errors import ConfigurationError, NotFoundError


class Box(NamedTuple):
    """A rectangle of pixels, 0-based and half-open."""

    x0: int
    x1: int
    y0: int
    y1: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """``array[box.slices]`` for arrays of shape (ny, nx)."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    @property
    def shape(self) -> tuple[int, int]:
        """(ny, nx)."""
        return self.y1 - self.y0, self.x1 - self.x0


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Amplifier(_Model):
    """One read-out channel. Raw boxes count in the HDU that holds the amplifier (``hdu``)."""

    name: Annotated[str, Field(max_length=16)]
    """Name of the amplifier (``C00``); with ``hdu_per_amplifier`` also the HDU's EXTNAME suffix."""
    detector_box: Box
    """Where its pixels lie in the assembled detector."""
    raw_box: Box
    """Its light-sensitive pixels in the raw array."""
    overscan_box: Box | None = None
    """Serial overscan columns beside the data in the raw array."""
    prescan_box: Box | None = None
    """Columns read before the data."""
    parallel_overscan_box: Box | None = None
    """Rows read after the data."""
    flip_x: bool = False
    flip_y: bool = False
    hdu: int | str = 0
    """HDU of the raw file (index or EXTNAME) where the amplifier's array is."""
    gain: Annotated[float, Field(gt=0)] = 1.0
    """Electrons per ADU."""
    read_noise: Annotated[float, Field(ge=0)] = 0.0
    """Electrons rms."""
    saturation: Annotated[float, Field(gt=0)] = 65535.0
    """ADU above which a raw pixel is not trusted."""
    bias_level: float = 0.0
    """Typical ADU of the overscan; only a starting value and the simulator's truth."""
    linearity: tuple[float, ...] = ()
    """c2, c3…: true = m + c2·m² + c3·m³… with m the bias-subtracted ADU."""

    @property
    def raw_shape(self) -> tuple[int, int]:
        """(ny, nx) of its raw array: everything that its boxes reach."""
        boxes = [
            box
            for box in (self.raw_box, self.overscan_box, self.prescan_box, self.parallel_overscan_box)
            if box is not None
        ]
        return max(box.y1 for box in boxes), max(box.x1 for box in boxes)

    @model_validator(mode="after")
    def _same_size(self) -> Self:
        if self.detector_box.shape != self.raw_box.shape:
            raise ValueError(
                f"amplifier {self.name}: raw_box {self.raw_box.shape} and "
                f"detector_box {self.detector_box.shape} must have the same (ny, nx)"
            )
        return self


class Detector(_Model):
    """One sensor: place on the focal plane and amplifiers."""

    id: Annotated[int, Field(ge=0, lt=256)]
    name: Annotated[str, Field(max_length=32, pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]
    purpose: Literal["SCIENCE", "WAVEFRONT", "GUIDER"] = "SCIENCE"
    nx: Annotated[int, Field(gt=0, le=65536)]
    ny: Annotated[int, Field(gt=0, le=65536)]
    x_offset_mm: float = 0.0
    """Focal-plane position of the detector's centre, along the camera's x."""
    y_offset_mm: float = 0.0
    angle_deg: float = 0.0
    """Rotation of the detector's x axis from the focal plane's x axis, counter-clockwise."""
    pixel_mm: Annotated[float, Field(gt=0)] = 0.010
    serial: str = ""
    amplifiers: tuple[Amplifier, ...]
    crosstalk: tuple[tuple[float, ...], ...] = ()
    """``crosstalk[victim][source]``: part of the source's signal that appears in the victim. Empty = none."""
    crosstalk_from: dict[str, tuple[tuple[float, ...], ...]] = Field(default_factory=dict)
    """Name of another detector → ``[victim][source]``: part of its amplifiers' signals that appears here."""

    @property
    def shape(self) -> tuple[int, int]:
        """(ny, nx) of the assembled detector."""
        return self.ny, self.nx

    @model_validator(mode="after")
    def _amplifiers_fit(self) -> Self:
        for amplifier in self.amplifiers:
            box = amplifier.detector_box
            if box.x0 < 0 or box.y0 < 0 or box.x1 > self.nx or box.y1 > self.ny:
                raise ValueError(
                    f"detector {self.name}: amplifier {amplifier.name} lies outside {self.nx} x {self.ny}"
                )
        n = len(self.amplifiers)
        if self.crosstalk and (len(self.crosstalk) != n or any(len(row) != n for row in self.crosstalk)):
            raise ValueError(f"detector {self.name}: crosstalk must be {n} x {n} or absent")
        for other, rows in self.crosstalk_from.items():
            if len(rows) != n or len({len(row) for row in rows}) != 1:
                raise ValueError(
                    f"detector {self.name}: crosstalk_from {other}: expected {n} rows, each of one number for each "
                    f"amplifier of {other}"
                )
        return self


class ColourTerm(_Model):
    """How a filter's band differs from the catalogue's: ``m = m_catalogue + term · (colour − pivot)``."""

    bands: tuple[str, str]
    """The colour: catalogue magnitude in the first band minus that in the second."""
    term: Annotated[float, Field(ge=-3, le=3)] | None = None
    """Magnitudes per magnitude of colour; absent: each image's stars are asked."""
    error: Annotated[float, Field(ge=0)] = 0.0
    """How well it is known; goes into the error of the zero point."""
    pivot: float = 0.0
    """Colour of the source that the zero point holds for; 0 is a flat spectrum in AB."""
    range: tuple[float, float] = (-1.0, 3.0)
    """Colours over which the relation is a straight line; other stars are left out."""


class Filter(_Model):
    """One physical filter."""

    name: str
    """Physical filter as in the header, e.g. ``r_demo``."""
    band: str
    """Band of catalogues: u g r i z y or a name of the observatory."""
    zero_point: float = 27.0
    """Approximate AB magnitude that gives one electron per second above the atmosphere."""
    wavelength_nm: tuple[float, float] = (300.0, 1100.0)
    colour: ColourTerm | None = None
    """Colour term of the photometric zero point; absent for none."""


class HeaderField(_Model):
    """Where one quantity comes from in a header, and how it is repaired (:mod:`cumbre.core.header`)."""

    keywords: tuple[str, ...] = ()
    """Tried in turn; the first present and not empty is taken. ``EXT/KEY`` looks into an extension."""
    join: str | None = None
    """When given, the values of all keywords are taken, mapped one by one and joined with this text."""
    pattern: str = ""
    """Regular expression; its first group is what is meant (``[0-9]+`` of a longer text)."""
    constant: Any = None
    """Used when no keyword is there."""
    absent: tuple[str, ...] = ()
    """Values that mean "not known" in this header, as text (``-1``, ``NotSet``)."""
    unit: str = ""
    """Unit of the value in the header (``deg``, ``hourangle``, ``rad``, ``s``, ``ms``, ``min``, ``day``…)."""
    scale: float = 1.0
    offset: float = 0.0
    time_scale: Literal["utc", "tai", "mjd_utc", "mjd_tai", "jd_utc", "unix", "local", "timesys", ""] = ""
    """For times: what the header's number or text means; ``timesys`` follows TIMESYS (absent = UTC)."""
    utc_offset_h: float = 0.0
    """For ``local`` times: local minus UTC in hours."""
    not_after: str = ""
    """For times: keyword (UTC) of a later step, e.g. the file's creation. A value after it was copied from
    another frame; the keyword's time is taken instead and the repair is listed."""
    mapping: dict[str, str] = Field(default_factory=dict)
    """Value in the header → our word (filters, image types). Case does not matter, ``*`` and ``?`` match."""
    lower: bool = False
    """Turn a text into lower case."""
    required: bool = False
    warning: str = ""
    """Listed among the problems whenever the value is used: why it must not be believed."""
    otherwise: HeaderField | None = None
    """Rule to use when this one finds nothing, e.g. another keyword with another time scale."""


class Instrument(_Model):
    """A camera and its telescope, as cumbre needs to know them."""

    name: Annotated[str, Field(max_length=32, pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
    prefix: Annotated[str, Field(pattern=r"^[A-Z]{2}$")]
    """First two letters of obs_id."""
    description: str = ""
    plate_scale: Annotated[float, Field(gt=0)]
    """Arc seconds on the sky per millimetre of the focal plane."""
    distortion: tuple[float, ...] = ()
    """k1, k2…: r_true = r·(1 + k1·r² + k2·r⁴) with r in degrees from the optical axis."""
    parity: Literal[1, -1] = 1
    """−1 when the image is mirrored (East to the right with North up is parity 1 here: x grows westward)."""
    raw_layout: Literal["hdu_per_amplifier", "one_hdu"] = "hdu_per_amplifier"
    filters: tuple[Filter, ...]
    detectors: tuple[Detector, ...]
    header: dict[str, HeaderField] = Field(default_factory=dict)
    """Our name of a quantity → where the camera's header has it."""
    file_pattern: str = ""
    """Regular expression with named groups (seq_num, detector…) for foreign file names."""
    trust_header_wcs: bool = True
    """False when the header's WCS is stale and only the pointing may be used as a first guess."""
    pointing_error_deg: float = 0.05
    """How far the header's position may be off."""
    time_series: bool = False
    """True when its frames are series of one field: ``cumbre ingest`` makes light curves of what it takes."""
    aperture_m: float = 1.0
    readout_s: float = 2.0
    filter_change_s: float = 30.0
    slew_rate_deg_s: float = 3.0
    settle_s: float = 3.0

    @field_validator("detectors")
    @classmethod
    def _unique(cls, detectors: tuple[Detector, ...]) -> tuple[Detector, ...]:
        for key in ("id", "name"):
            values = [getattr(d, key) for d in detectors]
            if len(set(values)) != len(values):
                raise ValueError(f"detector {key}s must be unique")
        return detectors

    def detector(self, key: int | str) -> Detector:
        """Detector by id or name.

        Raises
        ------
        NotFoundError
            There is none.
        """
        for detector in self.detectors:
            if key in (detector.id, detector.name):
                return detector
        raise NotFoundError(f"instrument {self.name} has no detector {key!r}")

    def filter(self, name: str) -> Filter:
        """Filter by physical name, else by band.

        Raises
        ------
        NotFoundError
            There is none.
        """
        for item in (*self.filters,):
            if item.name == name:
                return item
        for item in self.filters:
            if item.band == name:
                return item
        known = ", ".join(f.name for f in self.filters)
        raise NotFoundError(f"instrument {self.name} has no filter {name!r}; it has {known}")

    def pixel_scale(self, detector: Detector) -> float:
        """Arc seconds per pixel at the centre."""
        return self.plate_scale * detector.pixel_mm


def explain_validation(where: str, error: ValidationError) -> ConfigurationError:
    """One readable line for each wrong key: file, key, value, what was expected."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(whole file)"
        value = repr(item.get("input"))
        lines.append(f"{where}: {key} = {value[:80]}: {item['msg']}")
    return ConfigurationError("\n".join(lines))


def instrument_from_mapping(data: dict[str, Any], where: str) -> Instrument:
    """Validate a description, after expanding its compact forms (see :mod:`cumbre.core.mosaic`).

    Raises
    ------
    ConfigurationError
        Names each wrong key with its value and what was expected.
    """
    from cumbre.core.mosaic import expand

    try:
        return Instrument.model_validate(expand(data, where))
    except ValidationError as error:
        raise explain_validation(where, error) from error


def shipped_instruments() -> list[str]:
    """Names of the descriptions that come with cumbre."""
    folder = resources.files("cumbre.core") / "instruments"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


@lru_cache(maxsize=64)
def load_instrument(name_or_path: str | Path) -> Instrument:
    """Load a shipped description by name or any description by path.

    Raises
    ------
    NotFoundError
        Neither a shipped name nor a file.
    ConfigurationError
        The file is not a valid description.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise NotFoundError(f"instrument file {path}: there is no such file")
        text, where = path.read_text(), str(path)
    else:
        shipped = resources.files("cumbre.core") / "instruments" / f"{str(name_or_path).lower()}.yaml"
        if not shipped.is_file():
            raise NotFoundError(
                f"instrument {str(name_or_path)!r}: not one of {', '.join(shipped_instruments())}, "
                "and not the path of a .yaml file"
            )
        text, where = shipped.read_text(), f"{name_or_path} (shipped)"
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{where}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigurationError(f"{where}: expected a mapping of keys, found {type(data).__name__}")
    return instrument_from_mapping(data, where)
