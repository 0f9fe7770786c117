"""A camera that writes its own files: they enter the same flow as if the image writer had made them.

Each file is kept byte for byte, under our key; its header is read by the instrument's rules. What is not
readable, of an unknown detector, or another image under a known name goes to quarantine with the reason.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.capture.hops import Piece, hop_fields, publish_hops
from cumbre.capture.keys import RawKey
from cumbre.capture.quarantine import quarantine
from cumbre.capture.writer import QUARANTINE_FOLDER
from cumbre.core.errors import BadFileError, ConflictError, CumbreError, NotFoundError
from cumbre.core.ids import ObsId, manifest_key
from cumbre.core.instrument import Detector, Instrument
from cumbre.stores.files import copy_verified, sha256_of, write_atomic

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

Described = Mapping[str, Any]
Describe = Callable[[Path], Any]
_COMPRESSED = {".gz": ".gz", ".bz2": ".bz2", ".fz": ".fz"}


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of one file: outcome ``ok`` with the path of our copy, or why not and where it is kept."""

    source: Path
    outcome: str
    obs_id: str = ""
    detector: int = -1
    path: Path | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class _Good:
    source: Path
    about: Described
    obs_id: ObsId
    detector: Detector


class DirectoryCamera:
    """Takes files of one instrument.

    Parameters
    ----------
    describe
        Metadata of a file, as a mapping or dataclass with the names of
        :class:`cumbre.core.header.ObservationMetadata`; by default the instrument's header rules are applied.
    """

    def __init__(
        self, *, site: Site, bus: Bus, clock: Clock, instrument: Instrument, describe: Describe | None = None
    ) -> None:
        self._bus, self._clock, self._instrument = bus, clock, instrument
        self._describe = describe or self._by_header
        self._raw = site.path(site.config.places["summit"].raw)
        self._quarantine = site.path(QUARANTINE_FOLDER)

    def ingest(self, paths: Iterable[Path]) -> list[Taken]:
        """Take files in, all files of an image together; one bad file never stops the next.

        Returns
        -------
        list of Taken
            One for each file, in the order given.
        """
        order = list(paths)
        outcomes: dict[Path, Taken] = {}
        by_image: dict[ObsId, list[_Good]] = {}
        for path in order:
            try:
                good = self._look(path)
            except CumbreError as error:
                outcomes[path] = self._refuse(path, error)
                continue
            except Exception as error:
                # Any file may be given; whatever a reader does with it, the next one is looked at.
                log.exception("%s could not be read", path)
                outcomes[path] = self._refuse(path, BadFileError(f"{path}: {type(error).__name__}: {error}"))
                continue
            by_image.setdefault(good.obs_id, []).append(good)
        for obs_id in sorted(by_image):
            for taken in self._image(obs_id, by_image[obs_id]):
                outcomes[taken.source] = taken
        return [outcomes[path] for path in order]

    def _by_header(self, path: Path) -> Any:
        from cumbre.core.header_files import read_metadata

        check_whole(path)
        return read_metadata(self._instrument, path)

    def _look(self, path: Path) -> _Good:
        if path.is_file() and path.stat().st_size == 0:
            raise BadFileError(f"{path}: empty file")
        told = self._describe(path)
        about: Described = asdict(told) if is_dataclass(told) and not isinstance(told, type) else told
        try:
            obs_id = ObsId.parse(str(about["obs_id"]))
            detector = self._instrument.detector(about.get("detector_id", about.get("detector_name", "")))
        except KeyError as error:
            raise BadFileError(f"{path}: its description has no {error.args[0]!r}") from error
        return _Good(path, about, obs_id, detector)

    def _image(self, obs_id: ObsId, files: list[_Good]) -> list[Taken]:
        """All files of one image: camera events, copies, manifest, hops."""
        about = files[0].about
        self._events(obs_id, about, sorted({good.detector.name for good in files}))
        taken, hops, names = [], [], dict[str, str]()
        for good in files:
            piece = Piece(
                str(obs_id),
                self._instrument.name,
                _text(about, "group_id"),
                good.detector.id,
                good.detector.name,
            )
            try:
                path, size, checksum = self._copy(good)
            except CumbreError as error:
                taken.append(self._refuse(good.source, error, piece))
                continue
            names[good.detector.name] = good.detector.purpose
            hops.append(
                hop_fields(
                    self._clock,
                    piece,
                    "written",
                    place="summit",
                    path=path,
                    byte_size=size,
                    checksum=checksum,
                    message=f"from {good.source.name}",
                )
            )
            taken.append(Taken(good.source, "ok", str(obs_id), good.detector.id, path))
        self._manifest(obs_id, names)
        publish_hops(self._bus, hops)
        return taken

    def _copy(self, good: _Good) -> tuple[Path, int, str]:
        suffix = f"fits{_COMPRESSED.get(good.source.suffix, '')}"
        key = RawKey(self._instrument.name, good.obs_id, good.detector.name, suffix)
        RawKey.parse(str(key))
        path, checksum = self._raw / str(key), sha256_of(good.source)
        for present in path.parent.glob(f"{good.obs_id}_{good.detector.name}.fits*"):
            if sha256_of(present) == checksum:
                return present, present.stat().st_size, checksum
            raise ConflictError(
                f"{good.source}: {present} is the same image and detector with other content; "
                "the first one is kept"
            )
        copied = copy_verified(good.source, path, checksum)
        return path, copied.size, copied.sha256

    def _manifest(self, obs_id: ObsId, names: dict[str, str]) -> None:
        """Write which detectors the image has."""
        path = self._raw / manifest_key(self._instrument.name, obs_id)
        if not names or path.exists():
            return  # a manifest may be on its way already: like every raw file it never changes
        manifest = {
            "obsId": str(obs_id),
            "version": 1,
            "fileName": path.name,
            "fileType": "expectedSensors",
            "expectedSensors": names,
        }
        write_atomic(path, json.dumps(manifest, indent=1).encode())

    def _events(self, obs_id: ObsId, about: Described, detectors: list[str]) -> None:
        """Say what a camera would have said; the ledger learns of the image from these."""
        begin, end = _seconds(about, "begin"), _seconds(about, "end")
        image_type = _text(about, "image_type").upper()
        extra = {
            "filter": _text(about, "filter"),
            "ra": _finite(about.get("ra_deg")),
            "dec": _finite(about.get("dec_deg")),
            "rotation": _finite(about.get("rotpa_deg")),
            "program": _text(about, "program"),
        }
        told = {key: str(value) for key, value in extra.items() if value not in ("", None)}
        common = {
            "instrument": self._instrument.name,
            "imagesInSequence": 1,
            "imageName": str(obs_id),
            "imageIndex": 1,
            "imageSource": obs_id.prefix,
            "imageController": obs_id.controller,
            "imageDate": str(obs_id.day_obs),
            "imageNumber": obs_id.seq_num,
            "timestampAcquisitionStart": begin,
            "groupId": _text(about, "group_id"),
            "additionalKeys": list(told),
            "additionalValues": list(told.values()),
        }
        exposure_s = _finite(about.get("exposure_s")) or 0.0
        image_type = "OBJECT" if image_type == "SCIENCE" else image_type
        self._bus.publish_many(
            [
                (
                    "Camera.startIntegration",
                    common | {"exposureTime": exposure_s, "imageType": image_type, "timeout": 0.0},
                ),
                ("Camera.startReadout", common),
                (
                    "Camera.endReadout",
                    common
                    | {
                        "requestedExposureTime": exposure_s,
                        "timestampEndOfReadout": self._clock.now_tai_s(),
                        "daqPath": "",
                        "detectors": detectors,
                    },
                ),
                (
                    "Camera.endOfImageTelemetry",
                    common
                    | {
                        "timestampDateObs": begin,
                        "timestampDateEnd": end,
                        "measuredShutterOpenTime": exposure_s,
                        "darkTime": _finite(about.get("dark_s")) or exposure_s,
                        "emulatedImage": str(obs_id),
                    },
                ),
            ]
        )

    def _refuse(self, path: Path, error: CumbreError, piece: Piece | None = None) -> Taken:
        """Put a file into quarantine and say so."""
        log.error("%s: %s", path, error)
        kept = None
        if path.is_file():
            kept = quarantine(self._quarantine, path.name, path, error, at_tai=self._clock.now_tai_s())
        if piece is not None:
            hop = hop_fields(
                self._clock,
                piece,
                "quarantined",
                place="summit",
                outcome=error.outcome,
                path=kept or "",
                message=str(error),
            )
            publish_hops(self._bus, [hop])
        obs_id, detector = (piece.obs_id, piece.detector) if piece else ("", -1)
        return Taken(path, error.outcome, obs_id, detector, kept, str(error))


def check_whole(path: Path) -> None:
    """Refuse a file that ends before the data that its last header announces.

    Raises
    ------
    NotFoundError
        There is no such file.
    BadFileError
        Not FITS, or truncated (compressed files too).
    """
    from astropy.io import fits

    if not path.is_file():
        raise NotFoundError(f"{path}: there is no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # non-standard cards; the instrument's rules judge those
        try:
            with fits.open(path, memmap=False, lazy_load_hdus=False, disable_image_compression=True) as hdus:
                about = hdus[-1].fileinfo()
                stream = about["file"]
                stream.seek(0, 2)
                size, expected = stream.tell(), about["datLoc"] + about["datSpan"]
        except (OSError, ValueError, TypeError, EOFError, fits.VerifyError, zlib.error) as error:
            raise BadFileError(f"{path}: not a readable FITS file: {error}") from error
    if size < expected:
        raise BadFileError(f"{path}: truncated: {size} bytes, its headers announce {expected}")


def _text(about: Described, name: str) -> str:
    value = about.get(name)
    return "" if value is None else str(value)


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _seconds(about: Described, which: str) -> float:
    """TAI seconds of ``begin`` or ``end``, given as nanoseconds or seconds; 0 when absent."""
    if about.get(f"{which}_ns") is not None:
        return float(about[f"{which}_ns"]) / 1e9
    return _finite(about.get(f"{which}_tai")) or 0.0
