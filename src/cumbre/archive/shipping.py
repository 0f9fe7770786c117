"""Media shipping, the sending end: when an outage is longer than the buffers, images and telemetry travel on a disk.

An export may be stopped at any moment and run again: what is there already is not copied twice. The receiving
end is :mod:`cumbre.archive.shipping_import`.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.journal import group_of, raw_files
from cumbre.archive.protocol import Parcel
from cumbre.archive.shipment import (
    IMAGES,
    TELEMETRY,
    Item,
    Manifest,
    Progress,
    Recording,
    Report,
    read_manifest,
    write_manifest,
)
from cumbre.archive.tape import read_entry, view_tape
from cumbre.archive.tape_index import Sky, TapeIndex, sky_of
from cumbre.archive.tape_shelf import Shelf
from cumbre.capture.keys import RawKey
from cumbre.core.errors import BadFileError, CumbreError, NotFoundError
from cumbre.core.instrument import load_instrument
from cumbre.stores.files import HashingWriter, copy_verified, normal_checksum, write_atomic

if TYPE_CHECKING:
    from cumbre.bus import Bus, Message
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock
    from cumbre.ledger import Ledger

log = logging.getLogger(__name__)

PROGRESS_FILE = "progress.jsonl"
TELEMETRY_MARGIN_S = 300.0


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
