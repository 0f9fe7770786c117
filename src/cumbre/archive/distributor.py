"""Distributor: receives files over the link into the raw cache of a place and tells the ledger.

The sender is answered after the file is on disk; the hop follows, and the tape of the place follows the hop
(:mod:`cumbre.archive.tape_writer`). Whatever a crash leaves undone is found by a scan of the raw cache at the
start and again from time to time.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.addresses import parse_address, write_address
from cumbre.archive.certificates import Security
from cumbre.archive.guard import Refusal
from cumbre.archive.journal import Journal, RawRounds, group_of, is_settled
from cumbre.archive.pairs import distributor_name
from cumbre.archive.protocol import Parcel
from cumbre.archive.receiver import Receiver
from cumbre.archive.server import ImageServer
from cumbre.capture.fits_checksum import claims_and_fails
from cumbre.capture.hops import Piece, detector_ids, hop_fields, piece_of, publish_hop, publish_hops
from cumbre.capture.keys import RawKey
from cumbre.capture.quarantine import quarantine
from cumbre.core.errors import BadFileError, ConfigurationError, CumbreError
from cumbre.core.instrument import load_instrument
from cumbre.stores.files import PREFIX, sha256_of

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

ANNOUNCED = "announced"
REPORT_EVERY_S = 5.0


class Distributor:
    """One place's receiving end.

    Parameters
    ----------
    place
        Name of the place; also the service's name and that of its hops ``at_<place>``.
    scan_every_s
        Real seconds between scans of the raw cache.
    """

    def __init__(
        self, *, site: Site, bus: Bus, clock: Clock, place: str, pair: int = 1, scan_every_s: float = 60.0
    ) -> None:
        self.name, self._place, self._pair = distributor_name(place, pair), place, pair
        self._site, self._bus, self._clock = site, bus, clock
        settings = site.config.places[place]
        if "://" in settings.raw:
            raise ConfigurationError(
                f"{site.root}: places.{place}.raw = {settings.raw!r}: a distributor needs a folder"
            )
        self._raw = site.path(settings.raw)
        self._ids = detector_ids(site.config)
        described = [load_instrument(name) for name in site.config.instruments]
        self._instruments = {instrument.name: instrument for instrument in described}
        self._journal = Journal(site.path(f"{place}/received"))
        self._rounds = RawRounds(self._raw, lambda key: self._journal.has(key, ANNOUNCED))
        self._arrivals: queue.SimpleQueue[tuple[Parcel, Path] | None] = queue.SimpleQueue()
        self._scan_every_s, self._next_scan = scan_every_s, 0.0
        self._scanned = False
        self._next_report = 0.0
        self._images = ImageServer(self._raw, self._checksum_of)
        host, port = parse_address(settings.listen or "127.0.0.1:0")
        self._receiver = Receiver(
            root=self._raw,
            quarantine_folder=site.path(f"{place}/quarantine"),
            clock=clock,
            arrived=self._arrived,
            refused=self._refused,
            host=host,
            port=port + pair - 1 if port else 0,
            name=self.name,
            security=Security.of(site, place),
            sources=[link.source for link in site.config.links if link.target == place],
            turned_away=self._turned_away,
            expected=self._expected,
            images=self._images,
        )
        write_address(site, self.name, self._receiver.address)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self._receiver.address

    def step(self, timeout_s: float) -> int:
        """Announce what arrived; gives the number of files."""
        if time.monotonic() >= self._next_scan:
            self._scan()
            self._next_scan = time.monotonic() + self._scan_every_s
        if time.monotonic() >= self._next_report:
            self._report()
            self._next_report = time.monotonic() + REPORT_EVERY_S
        return self._announce(self._drain(timeout_s))

    def close(self) -> None:
        """Stop listening."""
        self._receiver.close()

    def _drain(self, timeout_s: float) -> list[tuple[Parcel, Path]]:
        found: list[tuple[Parcel, Path]] = []
        while True:
            try:
                item = self._arrivals.get(timeout=timeout_s) if not found else self._arrivals.get_nowait()
            except queue.Empty:
                return found
            if item is not None:
                found.append(item)

    def _announce(self, arrived: list[tuple[Parcel, Path]]) -> int:
        """Publish hops of files that are new here, then remember that they were published."""
        hops, keys = [], dict[str, None]()
        for parcel, path in arrived:
            if parcel.key in keys or self._journal.has(parcel.key, ANNOUNCED):
                continue
            keys[parcel.key] = None
            key = RawKey.parse(parcel.key)
            if not key.is_detector:
                continue
            if (key.instrument, key.part) not in self._ids and key.instrument in self._instruments:
                hops += self._split(parcel, key, path)
                continue
            try:
                hops.append(self._hop(parcel, f"at_{self._place}", path))
            except CumbreError as error:
                log.error("%s: %s", parcel.key, error)
        publish_hops(self._bus, hops)
        for text in keys:
            self._journal.note(text, ANNOUNCED)
        return len(keys)

    def _split(self, parcel: Parcel, key: RawKey, path: Path) -> list[dict[str, Any]]:
        """Make files of single detectors of one that has several; they arrive here like those of a link."""
        from cumbre.archive.split import split

        instrument = self._instruments[key.instrument]
        try:
            with self._receiver.intake.workplace() as folder:
                for detector, made in split(
                    path, instrument, Path(folder), f"{key.obs_id}_{{detector}}.fits"
                ):
                    own = f"{Path(parcel.key).parent}/{key.obs_id}_{detector.name}.fits"
                    answer = self._receiver.intake.store(
                        Parcel(own, made.size, made.sha256, parcel.group_id, parcel.mode), made.path
                    )
                    log.info("%s of %s: %s", detector.name, parcel.key, answer["answer"])
        except CumbreError as error:
            self._receiver.guard.refuse("bad-content", "", f"{parcel.key}: {error}")
            piece = Piece(str(key.obs_id), key.instrument, parcel.group_id)
            return [
                hop_fields(
                    self._clock,
                    piece,
                    "quarantined",
                    place=self._place,
                    outcome=error.outcome,
                    path=path,
                    message=str(error),
                )
            ]
        return []

    def _hop(self, parcel: Parcel, hop: str, path: Path | str, **details: Any) -> dict[str, Any]:
        key = RawKey.parse(parcel.key)
        known = piece_of(key.instrument, key.obs_id, key.part, self._ids)
        piece = Piece(known.obs_id, known.instrument, parcel.group_id, known.detector, known.detector_name)
        if parcel.mode:
            details = {"message": f"mode {parcel.mode}"} | details
        return hop_fields(
            self._clock,
            piece,
            hop,
            place=self._place,
            path=path,
            byte_size=parcel.size,
            checksum=parcel.sha256,
            **details,
        )

    # what receiver threads tell

    def _arrived(self, parcel: Parcel, path: Path) -> None:
        """Remember the checksum with which it came, for those who ask for it later."""
        self._journal.note(parcel.key, parcel.sha256)
        self._arrivals.put((parcel, path))

    def _checksum_of(self, key: str) -> str | None:
        return next((mark for mark in self._journal.marks(key) if mark.startswith(PREFIX)), None)

    def _expected(self, said: dict[str, Any]) -> None:
        host, port = self._receiver.address
        with contextlib.suppress(CumbreError):
            names = said.get("detectors")
            self._bus.publish(
                "Replicator.expected",
                {
                    "name": self.name,
                    "place": self._place,
                    "address": f"{host}:{port}",
                    "obsId": str(said.get("obs_id", ""))[:40],
                    "part": str(said.get("part", ""))[:48],
                    "detectors": [str(name)[:32] for name in names[:512]] if isinstance(names, list) else [],
                    "mode": str(said.get("mode", ""))[:256],
                },
            )

    def _turned_away(self, refusal: Refusal) -> None:
        self._bus.publish("Replicator.refusal", {"name": self.name, "place": self._place} | asdict(refusal))

    def _report(self) -> None:
        receiver = self._receiver
        refused = dict(receiver.guard.counts)
        self._bus.publish(
            "Replicator.distributor",
            {
                "name": self.name,
                "place": self._place,
                "pair": self._pair,
                "connections": receiver.connections,
                "receivedBytes": receiver.received_bytes,
                "resumedBytes": receiver.intake.resumed_bytes,
                "served": self._images.served,
                "refused": sum(refused.values()),
                "refusedReasons": list(refused),
                "refusedCounts": list(refused.values()),
            },
        )

    # recovery and refusals

    def _scan(self) -> None:
        """Find files in the raw cache whose hop is missing."""
        for key in self._rounds.left():
            text = str(key)
            path = self._raw / text
            if self._scanned and not is_settled(path):
                continue  # arriving just now; its own arrival knows more of it
            try:
                if claims_and_fails(path):
                    self._set_aside(key, path)
                    continue
                parcel = Parcel(text, path.stat().st_size, sha256_of(path), group_of(path))
            except (CumbreError, OSError) as error:
                log.warning("%s: %s", path, error)
                continue
            self._arrivals.put((parcel, path))
        self._scanned = True
        self._arrivals.put(None)

    def _set_aside(self, key: RawKey, path: Path) -> None:
        """Take a file away that rotted before its arrival was told: the ledger misses it, so it is sent again."""
        error = BadFileError(f"{path}: does not fit its own checksums; set aside, it will be sent again")
        log.error("%s", error)
        kept = quarantine(
            self._site.path(f"{self._place}/quarantine"),
            str(key),
            path,
            error,
            at_tai=self._clock.now_tai_s(),
        )
        path.unlink()
        piece = piece_of(key.instrument, key.obs_id, key.part, self._ids)
        publish_hop(
            self._bus, self._clock, piece, "quarantined", place=self._place, outcome=error.outcome, path=kept,
            message=str(error),
        )  # fmt: skip

    def _refused(self, said: dict[str, Any], outcome: str, message: str, kept: Path | None) -> None:
        """Tell the ledger of a refused file when it says which image it is of (called by receiver threads)."""
        log.error("refused: %s", message)
        try:
            key = RawKey.parse(str(said.get("key")))
            piece = piece_of(key.instrument, key.obs_id, key.part, self._ids)
        except CumbreError:
            return
        publish_hop(
            self._bus,
            self._clock,
            piece,
            "quarantined",
            place=self._place,
            outcome=outcome,
            path=kept or "",
            message=message,
        )
