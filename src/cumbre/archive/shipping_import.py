"""Media shipping, the receiving end: a disk is taken into a place, and nothing of it is believed.

An import may be stopped at any moment and run again: what is there already is not copied, told or counted twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.protocol import Parcel
from cumbre.archive.shipment import (
    IMAGES,
    MANIFEST,
    TELEMETRY,
    Item,
    Progress,
    Recording,
    Report,
    checked_path,
    read_manifest,
)
from cumbre.capture.hops import Piece, detector_ids, hop_fields, piece_of, publish_hops
from cumbre.capture.keys import RawKey
from cumbre.capture.quarantine import quarantine
from cumbre.core.errors import BadFileError, ConflictError, CumbreError
from cumbre.stores.files import copy_verified, normal_checksum, sha256_of, write_atomic

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock
    from cumbre.ledger import Ledger

log = logging.getLogger(__name__)

HOPS_AT_ONCE = 100


class Import:
    """Takes a disk into a place.

    Parameters
    ----------
    place
        Place whose raw cache gets the images; each becomes a hop ``at_<place>``.
    ledger
        What it knows of an image's checksum must hold for the disk's copy; None to believe the manifest.
    """

    def __init__(
        self, *, site: Site, bus: Bus, clock: Clock, disk: Path, place: str, ledger: Ledger | None
    ) -> None:
        self._site, self._bus, self._clock, self._disk = site, bus, clock, disk
        self._place, self._ledger = place, ledger
        raw = site.config.places[place].raw
        self._raw = site.path(raw)
        self._quarantine = site.path(f"{place}/quarantine")
        self._ids = detector_ids(site.config)
        self._report = Report()
        self._hops: list[dict[str, Any]] = []

    def run(self, progress: Progress = lambda _: None) -> Report:
        """Take every good file of the disk; what is not as the manifest says is refused and quarantined.

        Raises
        ------
        NotFoundError
            No finished shipment.
        BadFileError
            The manifest itself cannot be believed: nothing is taken, it is kept in quarantine.
        OSError
            The place's disk is full or gone; run it again.
        """
        try:
            manifest = read_manifest(self._disk)
        except BadFileError as error:
            self._keep(MANIFEST, self._disk / MANIFEST, error)
            raise
        self._report = Report(shipment=manifest.shipment)
        for item in sorted(manifest.items.values(), key=lambda item: RawKey.parse(item.parcel.key).order):
            try:
                self._take(item, manifest.shipment)
            except CumbreError as error:
                self._refuse(item, error)
            progress(item.parcel.size)
            if len(self._hops) >= HOPS_AT_ONCE:
                self._publish()
        self._publish()
        for recording in manifest.recordings.values():
            try:
                self._take_recording(manifest.shipment, recording)
            except CumbreError as error:
                self._report.refused.append(
                    {"file": recording.file, "outcome": error.outcome, "message": str(error)}
                )
            progress(recording.size)
        return self._report

    def _take(self, item: Item, shipment: str) -> None:
        parcel = item.parcel
        key = RawKey.parse(parcel.key)
        source = checked_path(self._disk, f"{IMAGES}/{parcel.key}", parcel.size)
        piece: Piece | None = None
        if key.is_detector:
            known = piece_of(key.instrument, key.obs_id, key.part, self._ids)
            piece = Piece(
                known.obs_id, known.instrument, parcel.group_id, known.detector, known.detector_name
            )
            self._agrees(piece, parcel)
        target = self._raw / parcel.key
        if target.exists():
            found = sha256_of(target)
            if found != parcel.sha256:
                raise ConflictError(
                    f"{parcel.key}: here with {found}, came on a disk with {parcel.sha256}; the first one is kept"
                )
            self._report.present += 1
            if piece is None or self._ledger is None or self._is_told(piece):
                return  # without a ledger the distributor's scan tells what nobody told yet
        else:
            copy_verified(source, target, parcel.sha256)
            self._report.copied += 1
            self._report.bytes += parcel.size
        if piece is not None:
            self._hops.append(
                hop_fields(
                    self._clock,
                    piece,
                    f"at_{self._place}",
                    place=self._place,
                    path=target,
                    byte_size=parcel.size,
                    checksum=parcel.sha256,
                    message=f"shipped on disk {shipment}",
                )
            )

    def _agrees(self, piece: Piece, parcel: Parcel) -> None:
        """Compare with every checksum that the ledger has of this detector image."""
        if self._ledger is None:
            return
        for row in self._ledger.where(piece.obs_id, piece.detector):
            if (
                row["outcome"] == "ok"
                and row["checksum"]
                and normal_checksum(row["checksum"]) != parcel.sha256
            ):
                raise ConflictError(
                    f"{parcel.key}: the manifest says {parcel.sha256}, the ledger {row['checksum']} ({row['hop']})"
                )

    def _is_told(self, piece: Piece) -> bool:
        assert self._ledger is not None
        rows = self._ledger.where(piece.obs_id, piece.detector)
        return any(row["hop"] == f"at_{self._place}" and row["outcome"] == "ok" for row in rows)

    def _refuse(self, item: Item, error: CumbreError) -> None:
        log.error("refused: %s", error)
        parcel = item.parcel
        kept = self._keep(parcel.key, self._disk / IMAGES / parcel.key, error)
        self._report.refused.append({"file": parcel.key, "outcome": error.outcome, "message": str(error)})
        try:
            key = RawKey.parse(parcel.key)
            piece = piece_of(key.instrument, key.obs_id, key.part, self._ids)
        except CumbreError:
            return
        if not key.is_detector or isinstance(error, ConflictError):
            # The copy that is here stays a good one: a foreign disk must not take its proof away.
            return
        self._hops.append(
            hop_fields(
                self._clock,
                piece,
                "quarantined",
                place="shipment",
                outcome=error.outcome,
                path=kept or "",
                message=str(error),
            )
        )

    def _keep(self, name: str, path: Path, error: CumbreError) -> Path | None:
        """Keep a refused file as evidence, if it is a plain file of the disk."""
        try:
            size = path.lstat().st_size
            relative = path.relative_to(self._disk).as_posix()
            source = checked_path(self._disk, relative, size)
        except (OSError, CumbreError):
            reason = json.dumps({"name": name, "reason": str(error)}).encode()
            digest = hashlib.sha256(reason).hexdigest()[:12]
            write_atomic(self._quarantine / f"{digest}_{name.replace('/', '_')[-150:]}.reason.json", reason)
            return None
        now = self._clock.now_tai_s()
        return quarantine(self._quarantine, name, source, error, at_tai=now, origin=f"disk {self._disk}")

    def _take_recording(self, shipment: str, recording: Recording) -> None:
        source = checked_path(self._disk, f"{TELEMETRY}/{recording.file}", recording.size)
        target = self._site.path(f"{self._place}/telemetry/{shipment}/{recording.file}")
        if not target.is_file() or sha256_of(target) != recording.sha256:
            copy_verified(source, target, recording.sha256)
        self._report.telemetry_files += 1
        self._report.telemetry_messages += recording.messages

    def _publish(self) -> None:
        publish_hops(self._bus, self._hops)
        self._hops.clear()
