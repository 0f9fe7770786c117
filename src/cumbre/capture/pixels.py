"""One detector of one image: from the camera's array to its raw file, once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.capture.daq import DaqImage, RawArray
from cumbre.capture.fits_checksum import is_sound
from cumbre.capture.hops import Piece, hop_fields
from cumbre.capture.nodes import described, write_once
from cumbre.capture.primary import Header, primary_cards
from cumbre.capture.quarantine import quarantine
from cumbre.core.errors import BadFileError, ConflictError, CumbreError
from cumbre.core.ids import image_key
from cumbre.core.instrument import Detector, Instrument
from cumbre.stores.files import Checksummed, sha256_of, write_atomic

if TYPE_CHECKING:
    from cumbre.core.time import Clock


class PixelWriter:
    """Writes raw files below one folder; what cannot be written goes to quarantine."""

    def __init__(self, *, raw: Path, quarantine_folder: Path, clock: Clock) -> None:
        self._raw, self._quarantine, self._clock = raw, quarantine_folder, clock

    def write(
        self, image: DaqImage, instrument: Instrument, name: str, header: Header
    ) -> tuple[list[dict[str, Any]], CumbreError | None]:
        """Write a detector's file, or find it written.

        Returns
        -------
        tuple
            Hops to publish, the one of the file first, and the error that kept it from being written.
        """
        piece = Piece(str(image.obs_id), instrument.name, image.group_id, -1, name)
        try:
            detector = instrument.detector(name)
            piece = Piece(str(image.obs_id), instrument.name, image.group_id, detector.id, name)
            array, source = image.load(detector)
            written = self._file(image, instrument, detector, header, array=array, source=source)
        except CumbreError as error:
            return self._refused(image, piece, error), error
        missing = ", ".join(header["missing"][:20]) if not header["complete"] else ""
        hop = hop_fields(
            self._clock,
            piece,
            "written",
            place="summit",
            path=written.path,
            byte_size=written.size,
            checksum=written.sha256,
            message=f"partial header: {missing or 'none came in time'}" if not header["complete"] else "",
        )
        return [hop], None

    def _file(
        self,
        image: DaqImage,
        instrument: Instrument,
        detector: Detector,
        header: Header,
        *,
        array: RawArray,
        source: str,
    ) -> Checksummed:
        """Write the file, or judge the one that is there: sound and of these pixels it stays for ever."""
        from cumbre.capture.raw_fits import raw_fits_bytes, read_source_checksum

        path = self._raw / image_key(instrument.name, image.obs_id, detector.name)
        content = None
        if not path.exists():
            content = raw_fits_bytes(detector, array, primary_cards(header, detector, source))
            written = write_once(path, content)
            if written is not None:
                return written
        # Another node was first, or this is the second time: it wrote the same bytes or something is wrong.
        if is_sound(path.read_bytes()):
            if read_source_checksum(path) == source:
                return described(path)
            raise ConflictError(
                f"{path}: this image was written before with other pixels; the first one is kept, "
                f"the new one ({source}) is in quarantine"
            )
        damaged = BadFileError(f"{path}: {sha256_of(path)} does not fit its own checksums; written anew")
        quarantine(self._quarantine, path.name, path, damaged, at_tai=self._clock.now_tai_s())
        content = content or raw_fits_bytes(detector, array, primary_cards(header, detector, source))
        return write_atomic(path, content)

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
