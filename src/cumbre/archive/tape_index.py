"""What is on a tape: its index and its list of closed volumes, and how to ask them by sky and by time."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cumbre.capture.keys import SIDECAR_PART, RawKey
from cumbre.core.errors import BadFileError, CumbreError, FatalError, NotFoundError
from cumbre.core.geometry import detector_corners, field_radius_deg, separation_deg, sky_from_focal_plane
from cumbre.core.instrument import Instrument
from cumbre.core.time import parse_isot

log = logging.getLogger(__name__)

BLOCK = 512
INDEX_FILE = "index.jsonl"
VOLUMES_FILE = "volumes.jsonl"


@dataclass(frozen=True, slots=True)
class Sky:
    """When and where an image was taken: fields of a :class:`TapeEntry`."""

    begin_tai: float | None = None
    ra: float | None = None
    dec: float | None = None
    radius_deg: float | None = None


@dataclass(frozen=True, slots=True)
class TapeEntry:
    """One file on tape.

    Attributes
    ----------
    offset
        Where its bytes begin in the volume.
    tai
        When it was written.
    begin_tai
        Start of its exposure; None when unknown.
    ra, dec, radius_deg
        Circle on the sky (ICRS) that holds it; None for images without a pointing.
    replaces
        ``volume@offset`` of a damaged copy that this one stands for.
    """

    volume: str
    key: str
    offset: int
    size: int
    sha256: str
    tai: float
    begin_tai: float | None = None
    ra: float | None = None
    dec: float | None = None
    radius_deg: float | None = None
    replaces: str = ""

    @property
    def end(self) -> int:
        """Where the next member's header begins."""
        return self.offset + -(-self.size // BLOCK) * BLOCK

    @property
    def place(self) -> str:
        """``volume@offset``, the path that the ledger keeps."""
        return f"{self.volume}@{self.offset}"

    @property
    def sky(self) -> Sky:
        """When and where it was taken."""
        return Sky(self.begin_tai, self.ra, self.dec, self.radius_deg)

    def line(self) -> bytes:
        """Its line of the index."""
        known = {name: value for name, value in asdict(self).items() if value not in (None, "")}
        return json.dumps(known).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Volume:
    """One closed volume with the checksum of all its bytes."""

    volume: str
    size: int
    sha256: str
    files: int
    closed_tai: float


@dataclass(slots=True)
class TapeIndex:
    """What the lines of an index say, the newest of each key first in force.

    Attributes
    ----------
    entries
        The copy of each key that holds.
    superseded
        Copies that were found damaged and written again.
    volumes
        Closed volumes.
    """

    entries: dict[str, TapeEntry] = field(default_factory=dict)
    superseded: list[TapeEntry] = field(default_factory=list)
    volumes: dict[str, Volume] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> TapeIndex:
        """Read a tape's index; a last line without its end is not there yet.

        Raises
        ------
        FatalError
            A line in the middle is damaged.
        """
        index = cls()
        for entry in read_lines(folder / INDEX_FILE, TapeEntry):
            index.add(entry)
        index.volumes = {item.volume: item for item in read_lines(folder / VOLUMES_FILE, Volume)}
        return index

    def add(self, entry: TapeEntry) -> None:
        """Take in one line."""
        old = self.entries.get(entry.key)
        if old is not None:
            self.superseded.append(old)
        self.entries[entry.key] = entry

    def entry(self, key: str) -> TapeEntry:
        """Where a file is.

        Raises
        ------
        NotFoundError
            Not on this tape.
        """
        try:
            return self.entries[key]
        except KeyError:
            raise NotFoundError(f"{key!r} is on none of these volumes") from None

    def by_volume(self) -> dict[str, list[TapeEntry]]:
        """All copies in the order in which a volume has them."""
        found: dict[str, list[TapeEntry]] = {}
        for entry in (*self.superseded, *self.entries.values()):
            found.setdefault(entry.volume, []).append(entry)
        return {volume: sorted(found[volume], key=lambda entry: entry.offset) for volume in sorted(found)}

    def select(
        self,
        *,
        cone: tuple[float, float, float] | None = None,
        since_tai: float | None = None,
        until_tai: float | None = None,
        obs_ids: Iterable[str] = (),
    ) -> list[TapeEntry]:
        """Detectors that fulfil every condition and the sidecars of their images, in the order of the tape.

        Parameters
        ----------
        cone
            ra, dec and radius in degrees (ICRS); what may overlap it is chosen, images without pointing never.
        since_tai, until_tai
            Start of the exposure, the second excluded.
        obs_ids
            Only these images.
        """
        wanted = set(obs_ids)
        chosen = []
        for entry in self.entries.values():
            key = RawKey.parse(entry.key)
            if not key.is_detector or (wanted and str(key.obs_id) not in wanted):
                continue
            begin = entry.begin_tai
            if since_tai is not None and (begin is None or begin < since_tai):
                continue
            if until_tai is not None and (begin is None or begin >= until_tai):
                continue
            chosen.append(entry)
        if cone is not None:
            chosen = _in_cone(chosen, cone)
        images = {RawKey.parse(entry.key).obs_id for entry in chosen}
        keys = {entry.key for entry in chosen}
        for entry in self.entries.values():
            key = RawKey.parse(entry.key)
            if not key.is_detector and key.obs_id in images:
                keys.add(entry.key)
        return sorted((self.entries[key] for key in keys), key=lambda entry: (entry.volume, entry.offset))


def _in_cone(entries: list[TapeEntry], cone: tuple[float, float, float]) -> list[TapeEntry]:
    known = [entry for entry in entries if entry.ra is not None and entry.dec is not None]
    if not known:
        return []
    circles = np.array([(e.ra, e.dec, e.radius_deg or 0.0) for e in known], float).T
    near = separation_deg(circles[0], circles[1], cone[0], cone[1]) <= cone[2] + circles[2]
    return [entry for entry, chosen in zip(known, near, strict=True) if chosen]


def read_lines[T](path: Path, kind: type[T]) -> list[T]:
    """Read one object a line; a torn last line is left out, no file is no line.

    Raises
    ------
    FatalError
        Another line is damaged.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            item = kind(**json.loads(line))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise FatalError(
                    f"{path}: line {number} is damaged ({error}); mend it from the volumes (tar -tvf) "
                    "before anything more is written"
                ) from error
            break
        if not line.endswith(b"\n"):
            break
        found.append(item)
    return found


def sky_of(path: Path, key: RawKey, instrument: Instrument | None) -> Sky:
    """When and where a raw file was taken, from the header beside it or the file's own primary header."""
    keywords = _sidecar(path) or _primary(path)
    begin = None
    try:
        begin = parse_isot(str(keywords["DATE-BEG"]))
    except (KeyError, ValueError):
        log.debug("%s: no usable DATE-BEG", path)
    try:
        ra, dec = float(keywords["RA"]), float(keywords["DEC"])
    except (KeyError, TypeError, ValueError):
        return Sky(begin)
    if not (np.isfinite([ra, dec]).all() and -90 <= dec <= 90):
        return Sky(begin)
    if instrument is None:
        return Sky(begin, ra % 360.0, dec, 0.0)
    try:
        rotation = float(keywords["ROTPA"])
        detector = instrument.detector(key.part)
        corners = detector_corners(instrument, detector, ra, dec, rotation)
        centre = sky_from_focal_plane(
            instrument, ra, dec, rotation, detector.x_offset_mm, detector.y_offset_mm
        )
        radius = float(np.max(separation_deg(*centre, *corners)))
        return Sky(begin, round(float(centre[0]), 6), round(float(centre[1]), 6), round(radius, 6))
    except (KeyError, TypeError, ValueError, CumbreError):
        return Sky(begin, ra % 360.0, dec, round(field_radius_deg(instrument), 6))


def _sidecar(path: Path) -> dict[str, Any]:
    for sidecar in path.parent.glob(f"*_{SIDECAR_PART}.json"):
        try:
            keywords = json.loads(sidecar.read_bytes())["keywords"]
            return {name: value[0] for name, value in keywords.items()}
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue
    return {}


def _primary(path: Path) -> dict[str, Any]:
    """Cards of a FITS primary header, as many as are needed here."""
    found: dict[str, Any] = {}
    if path.suffix != ".fits":
        return found
    with path.open("rb") as stream:
        for _ in range(100):
            block = stream.read(2880)
            for start in range(0, len(block), 80):
                card = block[start : start + 80].decode("ascii", "replace")
                name, mark, rest = card[:8].strip(), card[8:10], card[10:]
                if name == "END" or (not found and name != "SIMPLE" and start == 0):
                    return found
                if mark == "= ":
                    text = rest.strip()
                    value = text[1:].split("'")[0] if text.startswith("'") else text.split("/")[0]
                    found[name] = value.strip()
            if len(block) < 2880:
                return found
    return found


def parse_place(text: str) -> tuple[str, int]:
    """Volume and offset of ``volume@offset``.

    Raises
    ------
    BadFileError
        Another form.
    """
    volume, _, offset = text.rpartition("@")
    if not volume or not offset.isdigit():
        raise BadFileError(f"{text!r}: expected volume@offset")
    return volume, int(offset)
