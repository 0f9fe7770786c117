"""Media shipping: when an outage is longer than the buffers, images and telemetry travel on a disk.

Export and import may be stopped at any moment and run again: what is there already is not copied, told or
counted twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.journal import group_of, raw_files
from cumbre.archive.protocol import Parcel
from cumbre.archive.shipment import (
    IMAGES,
    MANIFEST,
    TELEMETRY,
    Item,
    Manifest,
    Progress,
    Recording,
    checked_path,
    read_manifest,
    write_manifest,
)
from cumbre.archive.tape import read_entry, view_tape
from cumbre.archive.tape_index import Sky, TapeIndex, sky_of
from cumbre.archive.tape_shelf import Shelf
from cumbre.capture.hops import Piece, detector_ids, hop_fields, piece_of, publish_hops
from cumbre.capture.keys import RawKey
from cumbre.capture.quarantine import quarantine
from cumbre.core.errors import BadFileError, ConflictError, CumbreError, NotFoundError
from cumbre.core.instrument import load_instrument
from cumbre.stores.files import HashingWriter, copy_verified, normal_checksum, sha256_of, write_atomic

if TYPE_CHECKING:
    from cumbre.bus import Bus, Message
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock
    from cumbre.ledger import Ledger

log = logging.getLogger(__name__)

PROGRESS_FILE = "progress.jsonl"
TELEMETRY_MARGIN_S = 300.0
HOPS_AT_ONCE = 100


@dataclass(slots=True)
class Report:
    """What an export or import did; ``refused`` has a file, an outcome and a message each."""

    shipment: str = ""
    copied: int = 0
    present: int = 0
    bytes: int = 0
    telemetry_files: int = 0
    telemetry_messages: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which images an export takes: every condition that is given must hold."""

    since_tai: float | None = None
    until_tai: float | None = None
    missing_at: str | None = None


class Export:
    """Fills a disk.

    Parameters
    ----------
    source
        Place whose copies are looked at first; then those of the other places of this site.
    ledger
        For ``missing_at`` and for checksums; without it the files' own bytes are believed.
    """

    def __init__(
        self, *, site: Site, bus: Bus, clock: Clock, disk: Path, source: str, ledger: Ledger | None
    ) -> None:
        self._site, self._bus, self._clock, self._disk, self._ledger = site, bus, clock, disk, ledger
        self._places = [source, *(name for name in site.config.places if name != source)]
        self._instruments = {i.name: i for i in map(load_instrument, site.config.instruments)}
        self._source = source
        self._tapes: dict[str, tuple[TapeIndex, Shelf]] = {}
        self._report = Report()

    def run(self, selection: Selection, progress: Progress = lambda _: None) -> Report:
        """Copy what is selected and is not on the disk yet, record the telemetry, write the manifest.

        Raises
        ------
        NotFoundError
            ``missing_at`` without a ledger.
        BadFileError
            The disk has a manifest that is not what it should be.
        OSError
            The disk is full or gone; what was copied stays and is not copied again.
        """
        manifest = self._begun()
        self._report = Report(shipment=manifest.shipment)
        for key, paths in self.selected(selection):
            self._take(manifest, key, paths, progress)
        since, until = self._range(manifest, selection)
        if until > since:
            recording = self._record(since, until)
            manifest.recordings[recording.file] = recording
            self._report.telemetry_files += 1
            self._report.telemetry_messages += recording.messages
        write_manifest(self._disk, manifest)
        (self._disk / PROGRESS_FILE).unlink(missing_ok=True)
        return self._report

    def selected(self, selection: Selection) -> list[tuple[RawKey, list[Path | str]]]:
        """Keys in the order of time with where their copies are: paths, and names of places whose tape has it."""
        missing = self._missing(selection.missing_at)
        found: dict[str, list[Path | str]] = {}
        for name in self._places:
            for key, copy in self._copies(name):
                found.setdefault(str(key), []).append(copy)
        chosen: dict[str, list[Path | str]] = {}
        images: set[str] = set()
        for text, copies in found.items():
            key = RawKey.parse(text)
            if not key.is_detector or (missing is not None and (str(key.obs_id), key.part) not in missing):
                continue
            if selection.since_tai is not None or selection.until_tai is not None:
                begin = self._sky(key, copies).begin_tai
                if begin is None or not (
                    (selection.since_tai or 0.0) <= begin < (selection.until_tai or math.inf)
                ):
                    continue
            chosen[text] = copies
            images.add(str(key.obs_id))
        for text, copies in found.items():
            key = RawKey.parse(text)
            if not key.is_detector and str(key.obs_id) in images:
                chosen[text] = copies
        return sorted(
            ((RawKey.parse(text), copies) for text, copies in chosen.items()), key=lambda item: item[0].order
        )

    def _missing(self, place: str | None) -> set[tuple[str, str]] | None:
        if place is None:
            return None
        if self._ledger is None:
            raise NotFoundError("--missing-at needs the ledger; start the site, or choose by --from and --to")
        return {(row["obs_id"], row["detector_name"]) for row in self._ledger.missing(place)}

    def _copies(self, name: str) -> Iterator[tuple[RawKey, Path | str]]:
        place = self._site.config.places[name]
        if "://" not in place.raw:
            root = self._site.path(place.raw)
            yield from ((key, root / str(key)) for key in raw_files(root))
        for store in place.buffers:
            for folder in sorted(self._site.path(store).glob("pair-*/data")):
                yield from ((key, folder / str(key)) for key in raw_files(folder))
        if place.tape is not None:
            try:
                index, _ = self._tape(name)
            except (CumbreError, OSError) as error:
                log.warning("tape of %s: %s", name, error)
                return
            yield from ((RawKey.parse(key), name) for key in index.entries)

    def _tape(self, name: str) -> tuple[TapeIndex, Shelf]:
        if name not in self._tapes:
            self._tapes[name] = view_tape(self._site, name)
        return self._tapes[name]

    def _sky(self, key: RawKey, copies: list[Path | str]) -> Sky:
        for copy in copies:
            if isinstance(copy, Path):
                return sky_of(copy, key, self._instruments.get(key.instrument))
            return self._tape(copy)[0].entry(str(key)).sky
        return Sky()

    def _begun(self) -> Manifest:
        """What an earlier run left: a finished manifest, lines of progress, or nothing."""
        self._disk.mkdir(parents=True, exist_ok=True)
        try:
            manifest = read_manifest(self._disk)
        except NotFoundError:
            manifest = Manifest(uuid.uuid4().hex[:12], self._source, self._clock.now_tai_s())
        manifest.made_tai = self._clock.now_tai_s()
        try:
            lines = (self._disk / PROGRESS_FILE).read_bytes().splitlines()
        except FileNotFoundError:
            return manifest
        for line in lines:
            try:
                said = json.loads(line)
                sky = Sky(*(said.get(name) for name in ("begin_tai", "ra", "dec", "radius_deg")))
                item = Item(Parcel.checked(said), sky)
            except (ValueError, TypeError, AttributeError, CumbreError):
                continue  # torn by a crash: its file is copied again
            manifest.items[item.parcel.key] = item
        return manifest

    def _take(self, manifest: Manifest, key: RawKey, copies: list[Path | str], progress: Progress) -> None:
        text = str(key)
        target = self._disk / IMAGES / text
        known = manifest.items.get(text)
        if known is not None and target.is_file() and target.stat().st_size == known.parcel.size:
            self._report.present += 1
            progress(known.parcel.size)
            return
        wanted = self._checksum(key)
        for copy in copies:
            try:
                if isinstance(copy, Path):
                    written = copy_verified(copy, target, wanted)
                    group_id = group_of(copy)
                else:
                    index, shelf = self._tape(copy)
                    entry = index.entry(text)
                    if wanted not in (None, entry.sha256):
                        raise BadFileError(f"tape of {copy}: {text} with {entry.sha256}, expected {wanted}")
                    written, group_id = write_atomic(target, read_entry(shelf, entry)), ""
            except CumbreError as error:
                log.error("%s: %s; another copy is looked for", text, error)
                continue
            item = Item(Parcel(text, written.size, written.sha256, group_id), self._sky(key, copies))
            manifest.items[text] = item
            with (self._disk / PROGRESS_FILE).open("ab") as stream:
                stream.write(json.dumps(item.body()).encode() + b"\n")
            self._report.copied += 1
            self._report.bytes += written.size
            progress(written.size)
            return
        self._report.refused.append({"file": text, "outcome": "BadFile", "message": "no good copy here"})

    def _checksum(self, key: RawKey) -> str | None:
        if self._ledger is None or not key.is_detector:
            return None
        rows = [row for row in self._ledger.where(str(key.obs_id)) if row["detector_name"] == key.part]
        good = {
            normal_checksum(row["checksum"]) for row in rows if row["outcome"] == "ok" and row["checksum"]
        }
        return good.pop() if len(good) == 1 else None

    def _range(self, manifest: Manifest, selection: Selection) -> tuple[float, float]:
        """Range of telemetry: as asked for, else around the images."""
        begins = [item.sky.begin_tai for item in manifest.items.values() if item.sky.begin_tai is not None]
        since, until = selection.since_tai, selection.until_tai
        if since is None:
            since = min(begins) - TELEMETRY_MARGIN_S if begins else 0.0
        if until is None:
            until = max(begins) + TELEMETRY_MARGIN_S if begins else 0.0
        return since, until

    def _record(self, since: float, until: float) -> Recording:
        name = f"{since:.0f}-{until:.0f}.jsonl"
        count = 0

        def lines(writer: HashingWriter) -> None:
            nonlocal count
            for message in self._bus.replay(None, since_tai=since, until_tai=until):
                writer.write(json.dumps(_plain(message), separators=(",", ":")).encode() + b"\n")
                count += 1

        written = write_atomic(self._disk / TELEMETRY / name, lines)
        return Recording(name, written.size, written.sha256, since, until, count)


def _plain(message: Message) -> dict[str, Any]:
    """A message as JSON can say it."""
    said = {
        "topic": message.topic, "kind": message.kind, "index": message.index, "snd_tai": message.snd_tai,
        "seq_num": message.seq_num, "identity": message.identity, "origin": message.origin,
        "fields": _json_value(message.fields),
    }  # fmt: skip
    if message.payload:
        said["payload"] = base64.b64encode(message.payload).decode()
    return said


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    return value


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
