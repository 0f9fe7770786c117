"""Scrub: raw caches are read again and again, and what has rotted is replaced by a good copy.

A file is right when its checksum is the one that the image writer told the ledger. A wrong or vanished one goes
to quarantine and is taken from the place's own tape; where that has none, the ledger is told that the place
lost it, and the Catch-Up Archiver sends it again. At the summit the image writer makes it anew from the
camera's store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.journal import is_settled
from cumbre.archive.tape import read_entry, view_tape
from cumbre.capture.hops import Piece, publish_hop
from cumbre.capture.keys import RawKey
from cumbre.capture.quarantine import quarantine
from cumbre.core.errors import BadFileError, CumbreError, NotFoundError
from cumbre.stores.files import normal_checksum, sha256_of, write_atomic

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock
    from cumbre.stores.postgres import Database

log = logging.getLogger(__name__)

RECAPTURE = "Writer.recapture"
ROWS = 500
_COPIES = """
    SELECT h.obs_id, h.detector, h.detector_name, h.outcome, h.path, h.byte_size, i.instrument, i.group_id,
           coalesce(nullif(w.checksum, ''), h.checksum) AS checksum
    FROM ledger.hop h JOIN ledger.image i USING (obs_id)
    LEFT JOIN ledger.hop w ON w.obs_id = h.obs_id AND w.detector = h.detector AND w.hop = 'written'
         AND w.outcome = 'ok'
    WHERE h.hop = %(hop)s AND h.place = %(place)s AND h.detector >= 0 AND h.path <> ''
      AND (h.outcome = 'ok' OR h.message LIKE %(mark)s)
      AND (h.obs_id, h.detector) > (%(obs_id)s, %(detector)s)
      AND NOT EXISTS (SELECT 1 FROM ledger.hop d WHERE d.obs_id = h.obs_id AND d.detector = h.detector
                      AND d.hop = 'deleted' AND d.place = h.place AND d.hop_tai >= h.hop_tai)
    ORDER BY h.obs_id, h.detector LIMIT %(rows)s
"""
MARK = "scrub: "


class Scrub:
    """Reads the raw caches of all places of this machine, round after round.

    Parameters
    ----------
    db
        Database of the ledger.
    """

    name = "scrub"

    def __init__(self, *, site: Site, bus: Bus, clock: Clock, db: Database) -> None:
        self._site, self._bus, self._clock, self._db = site, bus, clock, db
        settings = site.config.retention
        self._bytes_per_s, self._every_s = settings.scrub_mb_s * 1e6, settings.scrub_every_s
        self._places = [name for name, place in site.config.places.items() if "://" not in place.raw]
        self._round: Iterator[tuple[str, dict[str, Any]]] | None = None
        self._next = 0.0
        self.read_bytes = 0
        self.repaired = 0

    def step(self, timeout_s: float) -> int:
        """Read for a while; gives the number of files that were wrong."""
        end = time.monotonic() + timeout_s
        count = 0
        while (now := time.monotonic()) < end:
            if self._round is None:
                if now < self._next:
                    time.sleep(min(self._next, end) - now)
                    continue
                self._next = now + self._every_s
                self._round = self._copies()
            item = next(self._round, None)
            if item is None:
                self._round = None
                continue
            size = self._look(*item)
            if size is None:
                count += 1
            elif size:
                self.read_bytes += size
                time.sleep(max(size / self._bytes_per_s - (time.monotonic() - now), 0.0))
        return count

    def close(self) -> None:
        """Let go of the database."""
        self._db.close()

    def _copies(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every copy that the ledger knows of at the places here."""
        for place in self._places:
            if not self._site.path(self._site.config.places[place].raw).is_dir():
                continue  # another machine's
            at: dict[str, Any] = {
                "hop": "written" if place == "summit" else f"at_{place}", "place": place, "obs_id": "",
                "detector": -1, "rows": ROWS, "mark": f"{MARK}%",
            }  # fmt: skip
            while rows := self._db.query(_COPIES, at):
                for row in rows:
                    yield place, row
                at |= {"obs_id": rows[-1]["obs_id"], "detector": rows[-1]["detector"]}

    def _look(self, place: str, row: dict[str, Any]) -> int | None:
        """Bytes read of a right copy, 0 for one that cannot be judged now, None for a wrong one."""
        path, wanted = Path(row["path"]), normal_checksum(row["checksum"])
        root = self._site.path(self._site.config.places[place].raw)
        if not path.is_relative_to(root) or (path.exists() and not is_settled(path)):
            return 0
        try:
            found = sha256_of(path)
        except NotFoundError:
            found = ""
        except OSError as error:
            log.error("%s: cannot be read: %s", path, error)
            found = ""
        piece = Piece(
            row["obs_id"], row["instrument"], row["group_id"], row["detector"], row["detector_name"]
        )
        if found == wanted:
            if row["outcome"] != "ok":
                self._tell(place, piece, path, wanted, message=f"{MARK}there again")
            return path.stat().st_size
        told = f"has {found}" if found else "is gone or unreadable"
        wrong = BadFileError(f"{MARK}{path} {told}, the ledger says {wanted}")
        if row["outcome"] == "ok" or found:
            log.error("%s", wrong)
        if found:
            self._set_aside(place, piece, path, wrong)
        self._repair(place, piece, path, wanted, wrong, known=row["outcome"] != "ok")
        return None

    def _set_aside(self, place: str, piece: Piece, path: Path, error: BadFileError) -> None:
        """Keep the wrong file as evidence."""
        kept = quarantine(
            self._site.path(f"{place}/quarantine"), path.name, path, error, at_tai=self._clock.now_tai_s()
        )
        publish_hop(
            self._bus, self._clock, piece, "quarantined", place=place, outcome=error.outcome, path=kept,
            message=str(error),
        )  # fmt: skip

    def _repair(
        self, place: str, piece: Piece, path: Path, wanted: str, error: BadFileError, *, known: bool
    ) -> None:
        """Put a good copy in its place, or say that the place has none."""
        if place == "summit":
            # The writer judges its own files by their own checksums and by the camera's store.
            self._bus.publish(RECAPTURE, {"obsId": piece.obs_id, "detectors": [piece.detector_name]})
            return
        content = self._from_tape(place, path, wanted)
        if content is not None:
            write_atomic(path, content)
            self.repaired += 1
            log.info("%s: taken from the tape of %s", path, place)
            if known:
                self._tell(place, piece, path, wanted, message=f"{MARK}taken from tape")
            return
        path.unlink(missing_ok=True)
        if not known:
            self._tell(place, piece, path, wanted, outcome=error.outcome, message=str(error))

    def _tell(self, place: str, piece: Piece, path: Path, checksum: str, **details: Any) -> None:
        size = path.stat().st_size if path.exists() else 0
        publish_hop(
            self._bus, self._clock, piece, f"at_{place}", place=place, path=path, byte_size=size,
            checksum=checksum, **details,
        )  # fmt: skip

    def _from_tape(self, place: str, path: Path, wanted: str) -> bytes | None:
        if self._site.config.places[place].tape is None:
            return None
        try:
            root = self._site.path(self._site.config.places[place].raw)
            key = RawKey.parse(str(path.relative_to(root)))
            index, shelf = view_tape(self._site, place)
            entry = index.entries.get(str(key))
            return read_entry(shelf, entry) if entry is not None and entry.sha256 == wanted else None
        except (CumbreError, OSError) as error:
            log.warning("%s: tape of %s: %s", path, place, error)
            return None
