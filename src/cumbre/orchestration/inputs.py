"""What a prompt worker holds ready: calibrations, templates, reference stars, the history of the objects.

Calibrations and templates stay in the process (least recently used ones leave when the budget is full);
reference stars and object history are loaded per visit and detector. Files are read again when they changed.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from dataclasses import field as value_of
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cumbre.core import geometry
from cumbre.core.configuration import Observatory, Site
from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.core.instrument import Detector, Instrument
from cumbre.orchestration import provenance
from cumbre.orchestration.provenance import Pins

CACHE_BYTES = 600_000_000
PADDING_DEG = 50.0 / 3600.0
"""Around the predicted detector: the pointing is not perfect."""
MATCH_CENTRE_PART = 0.5
"""A template belongs to a field when its centre is within this part of the detector's size of the pointing."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Field:
    """Where a detector looks: pointing, and the circle that holds the detector (ICRS degrees)."""

    ra: float
    dec: float
    rotation: float
    centre_ra: float
    centre_dec: float
    radius_deg: float

    @classmethod
    def predict(
        cls, instrument: Instrument, detector: Detector, ra: float, dec: float, *, rotation: float
    ) -> Field:
        """From the geometry of the camera, with :data:`PADDING_DEG`."""
        middle = geometry.sky_from_pixel(
            instrument, detector, ra, dec, rotation, (detector.nx - 1) / 2, (detector.ny - 1) / 2
        )
        centre = float(middle[0]), float(middle[1])
        corners = geometry.detector_corners(instrument, detector, ra, dec, rotation)
        radius = float(np.max(geometry.separation_deg(*centre, *corners)))
        return cls(ra, dec, rotation, *centre, radius + PADDING_DEG)

    def is_near(self, ra: float, dec: float, rotation: float) -> bool:
        """Whether another pointing looks at the same sky: within the padding, the angle within 1°."""
        turned = abs((self.rotation - rotation + 180.0) % 360.0 - 180.0)
        return float(geometry.separation_deg(self.ra, self.dec, ra, dec)) < PADDING_DEG and turned < 1.0


@dataclass(slots=True)
class Inputs:
    """Everything but the image.

    Attributes
    ----------
    calibrations
        ``cumbre.payloads.calibration.Calibrations``.
    template
        ``cumbre.payloads.exposure.Exposure`` or None.
    reference
        ``cumbre.payloads.refcat.RefCat`` or None.
    wall_s
        Seconds that loading took, by part.
    files
        Names of the kept files that calibrations, template and reference stars came from.
    """

    field: Field
    band: str
    calibrations: Any
    template: Any
    template_tile: str
    reference: Any
    wall_s: dict[str, float]
    files: dict[str, str] = value_of(default_factory=dict)

    def describe(self) -> str:
        """One line for the ledger."""
        template = f"template {self.template_tile}" if self.template is not None else "no template"
        stars = 0 if self.reference is None else len(self.reference)
        return f"{template}, {stars} reference stars, {sum(self.wall_s.values()):.2f} s"


class Cache:
    """Objects read from files, held within a budget of bytes."""

    def __init__(self, budget: int = CACHE_BYTES) -> None:
        self._budget = budget
        self._held: OrderedDict[str, tuple[int, int, Any]] = OrderedDict()

    def get(self, path: Path, load: Callable[[Path], Any]) -> Any:
        """Give what ``load`` makes of a file; loaded again when the file changed."""
        key = f"{load.__module__}.{load.__qualname__}:{path}"
        stamp = path.stat().st_mtime_ns if path.exists() else -1
        known = self._held.get(key)
        if known is not None and known[0] == stamp:
            self._held.move_to_end(key)
            return known[2]
        made = load(path)
        self._held[key] = stamp, size_of(made), made
        while len(self._held) > 1 and sum(item[1] for item in self._held.values()) > self._budget:
            self._held.popitem(last=False)
        return made

    def __len__(self) -> int:
        return len(self._held)


def size_of(value: Any) -> int:
    """Bytes of the arrays in a value (dataclasses, mappings and sequences are looked into)."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if is_dataclass(value) and not isinstance(value, type):
        return sum(size_of(getattr(value, item.name)) for item in fields(value))
    if isinstance(value, dict):
        return sum(size_of(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(size_of(item) for item in value)
    return 0


def read_index(path: Path) -> list[dict[str, Any]]:
    """Entries of the templates' ``index.json``.

    Raises
    ------
    BadFileError
        Not a list of ``{tile, ra, dec, band, detector, path}``.
    """
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadFileError(f"{path}: not a template index: {error}") from error
    needed = {"tile", "ra", "dec", "band", "detector", "path"}
    if not isinstance(rows, list) or any(not isinstance(r, dict) or needed - set(r) for r in rows):
        raise BadFileError(
            f"{path}: not a template index: expected a list of {{{', '.join(sorted(needed))}}}"
        )
    return rows


def choose_template(
    rows: list[dict[str, Any]],
    *,
    ra: float,
    dec: float,
    band: str,
    detector: str,
    reach_deg: float,
    airmass: float = math.nan,
    obs_id: str = "",
) -> dict[str, Any] | None:
    """Entry of this band and detector for a pointing; None for none.

    Of the nearest field within reach: the newest one whose range of airmass holds the visit's, else one that is for no
    particular airmass, else the nearest range. A template that the visit itself (``obs_id``) is part of is none for it.
    """
    fitting = [
        row
        for row in rows
        if row["band"] == band and row["detector"] == detector and obs_id not in row.get("visits", ())
    ]
    if not fitting:
        return None
    distance = geometry.separation_deg(ra, dec, [r["ra"] for r in fitting], [r["dec"] for r in fitting])
    nearest = int(np.argmin(distance))
    if distance[nearest] > reach_deg:
        return None
    there = [row for row in fitting if row["tile"] == fitting[nearest]["tile"]]
    return min(there, key=lambda row: (_airmass_off(row, airmass), -float(row.get("made_tai", 0.0))))


def _airmass_off(row: dict[str, Any], airmass: float) -> float:
    """How far a visit's airmass lies off that of a template."""
    if "airmass" not in row:
        return 1e-6  # good for all, better for none
    if not math.isfinite(airmass):
        return 0.0
    low, high = row["airmass"]
    return max(float(low) - airmass, airmass - float(high), 0.0)


def one_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the entries of a field, band and detector the one for the lowest airmass, the newest of it."""
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["tile"], row["band"], row["detector"]
        order = _airmass_off(row, 1.0), -float(row.get("made_tai", 0.0))
        if key not in best or order < (_airmass_off(best[key], 1.0), -float(best[key].get("made_tai", 0.0))):
            best[key] = row
    return list(best.values())


@lru_cache(maxsize=4)
def _observatory(site: Path) -> Observatory | None:
    try:
        return Site.load(site).config.observatory
    except NotFoundError:
        return None


def airmass_at(site: Path, tai_s: float, ra: float, dec: float) -> float:
    """Airmass of a place at a time, for a site's observatory; NaN where there is no site."""
    place = _observatory(site)
    if place is None:
        return math.nan
    where = place.latitude_deg, place.longitude_deg
    altitude, _, _ = geometry.horizontal_from_sky(tai_s, *where, ra, dec)
    return float(geometry.airmass(altitude))


class InputLoader:
    """Loads :class:`Inputs` of a site in one worker process."""

    def __init__(self, site: Path) -> None:
        self.site = site
        self.cache = Cache()
        self._pins = Pins(site / provenance.FOLDER / provenance.INPUTS)
        self._files: dict[str, str] = {}

    def _kept(self, role: str, path: Path) -> Path:
        kept = self._pins.pin(path)
        self._files[role] = kept.name
        return kept

    def load(
        self,
        instrument: Instrument,
        detector: Detector,
        field: Field,
        band: str,
        *,
        airmass: float = math.nan,
        obs_id: str = "",
    ) -> Inputs:
        """Read all inputs of one detector at one pointing.

        Parameters
        ----------
        airmass
            Of the visit, as far as it is known.
        obs_id
            The visit itself, when it was taken: a template that it is part of will not do.

        Raises
        ------
        NotFoundError
            No calibrations for this detector and band, or no reference catalogue.
        BadFileError
            A file is not what it should be.
        """
        took: dict[str, float] = {}
        self._files = {}

        def timed(name: str, make: Callable[[], Any]) -> Any:
            begun = time.monotonic()
            made = make()
            took[name] = round(time.monotonic() - begun, 4)
            return made

        calibrations = timed("calibrations", lambda: self.calibrations(instrument, detector, band))
        tile, template = timed(
            "template", lambda: self.template(instrument, detector, field, band, airmass, obs_id)
        )
        reference = timed("reference", lambda: self.reference(field))
        return Inputs(field, band, calibrations, template, tile, reference, took, dict(self._files))

    def load_for_template(
        self, instrument: Instrument, detector: Detector, field: Field, band: str
    ) -> Inputs:
        """Calibrations and reference stars only."""
        self._files = {}
        calibrations = self.calibrations(instrument, detector, band)
        reference = self.reference(field)
        return Inputs(field, band, calibrations, None, "", reference, {}, dict(self._files))

    def calibrations(self, instrument: Instrument, detector: Detector, band: str) -> Any:
        """Calibrations of a detector in a band."""
        from cumbre.payloads.calibration import Calibrations

        folder = self.site / "archive" / "calibs" / instrument.name
        path = folder / f"{band}_{detector.name}.fits"
        return self.cache.get(self._kept("calibrations", path), Calibrations.load)

    def template(
        self,
        instrument: Instrument,
        detector: Detector,
        field: Field,
        band: str,
        airmass: float = math.nan,
        obs_id: str = "",
    ) -> tuple[str, Any]:
        """(Tile name, template) of a pointing, with its version if it has one; ("", None) when there is none."""
        from cumbre.payloads.exposure_file import load_exposure

        index = self.site / "archive" / "templates" / "index.json"
        if not index.exists():
            return "", None
        size = instrument.pixel_scale(detector) / 3600.0 * min(detector.nx, detector.ny)
        row = choose_template(
            self.cache.get(index, read_index),
            ra=field.ra,
            dec=field.dec,
            band=band,
            detector=detector.name,
            reach_deg=MATCH_CENTRE_PART * size,
            airmass=airmass,
            obs_id=obs_id,
        )
        if row is None:
            return "", None
        path = index.parent / row["path"]
        if not path.is_file():
            raise NotFoundError(f"template {path}: listed in {index}, but there is no such file")
        name = f"{row['tile']} {row['version']}" if "version" in row else row["tile"]
        return name, self.cache.get(self._kept("template", path), load_exposure)

    def reference(self, field: Field) -> Any:
        """Reference stars of the field."""
        from cumbre.payloads.refcat import RefCat

        path = self._kept("reference", self.site / "refcat" / "refcat.parquet")
        return RefCat.load(path, (field.centre_ra, field.centre_dec), field.radius_deg)
