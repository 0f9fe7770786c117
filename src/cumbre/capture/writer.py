"""Image writer: the camera's arrays and the header become raw FITS files, once and completely.

An image waits for its header until a deadline of night time; then it is written with what is known. A bad
array gives that detector an outcome and the others go on. The place in the log is committed only up to the
oldest unfinished image, and finished images have a record, so a writer killed at any line goes on where it
stopped; a scan of the camera's store finds images whose event never came.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.capture.daq import DaqImage, RawArray, images
from cumbre.capture.hops import Piece, hop_fields, publish_hop, publish_hops
from cumbre.capture.keys import sidecar_key
from cumbre.capture.primary import Header, completed_header, primary_cards
from cumbre.capture.quarantine import quarantine
from cumbre.core.errors import ConflictError, CumbreError, NotFoundError, UnprocessableDataError
from cumbre.core.ids import ObsId, image_key, manifest_key
from cumbre.core.instrument import Detector, Instrument, load_instrument
from cumbre.stores.files import sha256_of, write_atomic

if TYPE_CHECKING:
    from cumbre.bus import Bus, Message
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

END_READOUT = "Camera.endReadout"
HEADER_TOPIC = "HeaderService.largeFileObjectAvailable"
DAQ_FOLDER = "summit/daq"
HEADERS_FOLDER = "summit/headers"
RECORDS_FOLDER = "summit/capture"
QUARANTINE_FOLDER = "summit/quarantine"
SCAN_GRACE_S = 20.0
"""Night time that the events of a newly seen image get before the scan takes it."""


@dataclass(slots=True)
class _Pending:
    obs_id: str
    folder: Path
    before: Message | None
    deadline_tai: float
    header: Path
    instrument: str
    group_id: str


class ImageWriter:
    """Writes raw files at the summit.

    Parameters
    ----------
    header_wait_s
        Night time that an image waits for its header after the end of readout.
    scan_every_s
        Real seconds between scans of the camera's store.
    """

    name = "writer"

    def __init__(
        self,
        *,
        site: Site,
        bus: Bus,
        clock: Clock,
        header_wait_s: float = 30.0,
        scan_every_s: float = 10.0,
    ) -> None:
        self._site, self._bus, self._clock = site, bus, clock
        self._header_wait_s, self._scan_every_s = header_wait_s, scan_every_s
        self._raw = site.path(site.config.places["summit"].raw)
        self._daq = site.path(DAQ_FOLDER)
        self._quarantine = site.path(QUARANTINE_FOLDER)
        self._instruments = {i.name: i for i in map(load_instrument, site.config.instruments)}
        self._subscription = bus.subscribe(
            [END_READOUT, HEADER_TOPIC], start="earliest", consumer="image-writer"
        )
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._seen: dict[str, float] = {}
        self._done: set[str] = set()
        self._previous: Message | None = None
        self._committed: Message | None = None
        self._next_scan = 0.0

    def step(self, timeout_s: float) -> int:
        """Take in events, write images whose header is there or late; gives the number of images."""
        messages = self._subscription.poll(timeout_s)
        for message in messages:
            try:
                if message.topic == END_READOUT:
                    self._read_out(message)
                elif message.fields["id"] in self._pending:
                    self._pending[message.fields["id"]].header = Path(message.fields["url"])
            except CumbreError as error:
                log.error("%s at offset %d: %s", message.topic, message.offset, error)
            self._previous = message
        if time.monotonic() >= self._next_scan:
            self._scan()
            self._next_scan = time.monotonic() + self._scan_every_s
        now, done = self._clock.now_tai_s(), 0
        for item in list(self._pending.values()):
            late = now > item.deadline_tai
            if (item.header.is_file() or late) and self._take(item, late=late):
                del self._pending[item.obs_id]
                done += 1
        oldest = next((p for p in self._pending.values()), None)
        place = self._previous if oldest is None else oldest.before
        if place is not None and place is not self._committed:
            self._subscription.commit(place)
            self._committed = place
        return done

    def close(self) -> None:
        """Let go of the subscription; unfinished images come again."""
        self._subscription.close()

    def _read_out(self, message: Message) -> None:
        fields = message.fields
        obs_id = str(ObsId.parse(fields["imageName"]))
        folder = self._site.path(fields["daqPath"]) if fields["daqPath"] else self._daq / obs_id
        if not fields["daqPath"] and not folder.is_dir():
            return  # a camera that writes its own files: see capture.directory
        self._add(obs_id, folder, fields["timestampEndOfReadout"] or message.snd_tai, fields)

    def _add(self, obs_id: str, folder: Path, read_out_tai: float, fields: dict[str, Any]) -> None:
        self._pending[obs_id] = _Pending(
            obs_id,
            folder,
            self._previous,
            read_out_tai + self._header_wait_s,
            self._site.path(HEADERS_FOLDER) / f"{obs_id}.json",
            fields.get("instrument", ""),
            fields.get("groupId", ""),
        )

    def _scan(self) -> None:
        """Find images in the camera's store that were never written."""
        now = self._clock.now_tai_s()
        present = set()
        for folder in images(self._daq):
            obs_id = folder.name
            present.add(obs_id)
            if obs_id in self._done or obs_id in self._pending:
                continue
            if self._record_path(ObsId.parse(obs_id)).is_file():
                self._done.add(obs_id)
            elif now - self._seen.setdefault(obs_id, now) > SCAN_GRACE_S:
                log.info("%s: in the camera's store but not written; taking it now", obs_id)
                self._add(obs_id, folder, now - self._header_wait_s, {})
        self._done &= present
        self._seen = {key: value for key, value in self._seen.items() if key in present - self._done}

    def _take(self, item: _Pending, *, late: bool) -> bool:
        """Write one image; whatever it brings, the next one is written too. False: not ready yet."""
        piece = Piece(item.obs_id, item.instrument, item.group_id)
        try:
            self.write_image(DaqImage.open(item.folder), _read_header(item.header))
        except NotFoundError as error:
            if not late:
                return False
            self._fail(piece, error)
        except CumbreError as error:
            self._fail(piece, error)
        except OSError as error:
            # A full or broken disk is not the image's fault: it stays pending and is tried again.
            log.error("%s: cannot write now: %s", item.obs_id, error)
            return False
        except Exception as error:
            # The loop of a component: one image must never stop the next.
            log.exception("%s could not be written", item.obs_id)
            self._fail(piece, UnprocessableDataError(f"{type(error).__name__}: {error}"))
        self._done.add(item.obs_id)
        return True

    def _fail(self, piece: Piece, error: CumbreError) -> None:
        log.error("%s: %s", piece.obs_id, error)
        publish_hop(
            self._bus,
            self._clock,
            piece,
            "written",
            place="summit",
            outcome=error.outcome,
            message=str(error),
        )

    def write_image(self, image: DaqImage, header: Header | None) -> dict[str, str]:
        """Write all files of one image; files that are there already with the same content are kept.

        Returns
        -------
        dict
            Detector name → outcome word, ``ok`` for a written or kept file.

        Raises
        ------
        UnprocessableDataError
            The site does not have the image's instrument.
        """
        instrument = self._instruments.get(image.instrument)
        if instrument is None:
            raise UnprocessableDataError(
                f"{image.obs_id}: instrument {image.instrument!r}; this site has {', '.join(self._instruments)}"
            )
        header = completed_header(header, image)
        self._sidecars(image, instrument, header)
        record: dict[str, Any] = {"obs_id": str(image.obs_id), "detectors": {}}
        for name in image.detectors:
            hops, entry = self._detector(image, instrument, name, header)
            publish_hops(self._bus, hops)
            record["detectors"][name] = entry
        write_atomic(self._record_path(image.obs_id), json.dumps(record).encode())
        return {name: entry["outcome"] for name, entry in record["detectors"].items()}

    def _record_path(self, obs_id: ObsId) -> Path:
        return self._site.path(RECORDS_FOLDER) / str(obs_id.day_obs) / f"{obs_id}.json"

    def _sidecars(self, image: DaqImage, instrument: Instrument, header: Header) -> None:
        """Manifest and header beside the pixels, before them: who sees pixels can know what else must come."""
        purposes = {detector.name: detector.purpose for detector in instrument.detectors}
        key = manifest_key(instrument.name, image.obs_id)
        manifest = {
            "obsId": str(image.obs_id),
            "version": 1,
            "fileName": Path(key).name,
            "fileType": "expectedSensors",
            "expectedSensors": {name: purposes.get(name, "UNKNOWN") for name in image.detectors},
        }
        for relative, content in (
            (key, manifest),
            (sidecar_key(instrument.name, image.obs_id), header),
        ):
            path = self._raw / relative
            if not path.exists():
                write_atomic(path, json.dumps(content, indent=1).encode())

    def _detector(
        self, image: DaqImage, instrument: Instrument, name: str, header: Header
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Write one detector; gives its hops and its entry of the record."""
        piece = Piece(str(image.obs_id), instrument.name, image.group_id, -1, name)
        try:
            detector = instrument.detector(name)
            piece = Piece(str(image.obs_id), instrument.name, image.group_id, detector.id, name)
            array, source = image.load(detector)
            path, size, checksum = self._file(image, instrument, detector, header, array=array, source=source)
        except CumbreError as error:
            log.error("%s %s: %s", image.obs_id, name, error)
            return self._refused(image, piece, error), {"outcome": error.outcome, "message": str(error)}
        missing = ", ".join(header["missing"][:20]) if not header["complete"] else ""
        hop = hop_fields(
            self._clock,
            piece,
            "written",
            place="summit",
            path=path,
            byte_size=size,
            checksum=checksum,
            message=f"partial header: {missing or 'none came in time'}" if not header["complete"] else "",
        )
        return [hop], {"outcome": "ok", "sha256": checksum, "size": size, "source": source}

    def _file(
        self,
        image: DaqImage,
        instrument: Instrument,
        detector: Detector,
        header: Header,
        *,
        array: RawArray,
        source: str,
    ) -> tuple[Path, int, str]:
        from cumbre.capture.raw_fits import raw_fits_bytes, read_source_checksum

        key = image_key(instrument.name, image.obs_id, detector.name)
        path = self._raw / key
        if path.exists():
            if read_source_checksum(path) == source:
                return path, path.stat().st_size, sha256_of(path)
            raise ConflictError(
                f"{path}: this image was written before with other pixels; the first one is kept, "
                f"the new one ({source}) is in quarantine"
            )
        written = write_atomic(path, raw_fits_bytes(detector, array, primary_cards(header, detector, source)))
        return path, written.size, written.sha256

    def _refused(self, image: DaqImage, piece: Piece, error: CumbreError) -> list[dict[str, Any]]:
        """Hops of a detector that could not be written; its array goes to quarantine."""
        hops = []
        if not isinstance(error, ConflictError):
            # After a conflict the first file is still the good one: its hop must stay as it is.
            hops.append(
                hop_fields(
                    self._clock, piece, "written", place="summit", outcome=error.outcome, message=str(error)
                )
            )
        source = image.folder / f"{piece.detector_name}.npy"
        if source.is_file():
            kept = quarantine(
                self._quarantine,
                f"{piece.obs_id}_{piece.detector_name}.npy",
                source,
                error,
                at_tai=self._clock.now_tai_s(),
            )
            hops.append(
                hop_fields(
                    self._clock,
                    piece,
                    "quarantined",
                    place="summit",
                    outcome=error.outcome,
                    path=kept,
                    byte_size=kept.stat().st_size,
                    message=str(error),
                )
            )
        return hops


def _read_header(path: Path) -> Header | None:
    """Read a header file; None when there is none or it is unreadable (the image is written all the same)."""
    try:
        header = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.error("%s: not JSON (%s); writing with the camera's record only", path, error)
        return None
    required = {"keywords", "provenance", "missing", "complete"}
    if not isinstance(header, dict) or not required <= header.keys():
        log.error("%s: not a header (expected %s)", path, ", ".join(sorted(required)))
        return None
    return header
