"""What a link owes: images that are not at its far end, and where a verified copy of each is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.journal import Journal, RawRounds, group_of
from cumbre.archive.protocol import Parcel
from cumbre.archive.tape import read_entry, view_tape
from cumbre.archive.tape_index import TapeIndex
from cumbre.archive.tape_shelf import Shelf
from cumbre.capture.daq import EXPOSURE_FILE, DaqImage, images
from cumbre.capture.hops import Piece, detector_ids, piece_of
from cumbre.capture.keys import RawKey
from cumbre.capture.writer import DAQ_FOLDER
from cumbre.core.errors import BadFileError, CumbreError
from cumbre.core.ids import ObsId, image_key
from cumbre.stores.files import normal_checksum, sha256_of, write_atomic

if TYPE_CHECKING:
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock
    from cumbre.ledger import Ledger
    from cumbre.stores.postgres import Database

log = logging.getLogger(__name__)

MODE = "catch-up"
THERE = "there"
SETTLED_S = 30.0
"""Real seconds after which a file that no event named is taken up."""
DAYS_BACK = 60.0
RECENT_DAYS = 2.0
HOPELESS = ("BadFile", "UnprocessableData", "Conflict")
"""Outcomes of the image writer that another try gives again: a sensor without data or with garbage."""
SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Owed:
    """One file that is not at the far end; ``path`` is a verified copy, ``origin`` where it was found."""

    key: RawKey
    piece: Piece
    parcel: Parcel
    path: Path
    origin: str


@dataclass(frozen=True, slots=True)
class InCamera:
    """Detectors of an image that only the camera's store has, or only damaged copies elsewhere."""

    obs_id: str
    detectors: tuple[str, ...]


class Finder:
    """Looks for what one link owes.

    Parameters
    ----------
    grace_s
        Night time that the usual way gets.
    """

    def __init__(
        self,
        *,
        site: Site,
        clock: Clock,
        db: Database,
        ledger: Ledger,
        source: str,
        target: str,
        grace_s: float,
    ) -> None:
        self._site, self._clock, self._db, self._ledger = site, clock, db, ledger
        self.source, self.target, self._grace_s = source, target, grace_s
        self._place = site.config.places[source]
        self._raw = site.path(self._place.raw)
        self._ids = detector_ids(site.config)
        self._journal = Journal(site.path(f"{source}/caught-up-{target}"))
        self._rounds = RawRounds(
            self._raw, lambda key: key.endswith(".json") or self._journal.has(key, THERE)
        )
        self._told: set[str] = set()
        self.lost: set[str] = set()
        """Keys of images that are owed and of which no good copy is left at the source."""
        self._lost_before: set[str] = set()
        self._tape: tuple[TapeIndex, Shelf] | None = None
        self._scratch = site.path(f"{source}/catch-up")

    @property
    def is_here(self) -> bool:
        """Whether this machine has the sending place's files."""
        daq = self._site.path(DAQ_FOLDER)
        return self._raw.is_dir() or (self.source == "summit" and daq.is_dir())

    def look(
        self, skip: Callable[[str], bool] = lambda _: False, *, days_back: float = DAYS_BACK
    ) -> Iterator[Owed | InCamera]:
        """Everything that is owed and not on its usual way, oldest image first.

        Parameters
        ----------
        skip
            Keys that nobody needs to look at now: their files are not even opened.
        days_back
            How far into the past, days of night time.
        """
        self._tape = None  # read anew: it has grown
        busy = self._live_jobs()
        in_camera: dict[str, list[str]] = {}
        sidecars: set[Path] = set()
        lost: set[str] = set()
        for row in self._rows(days_back):
            name = row["detector_name"]
            if (row["obs_id"], name) in busy:
                continue
            key = self._key(row)
            if key is None or skip(str(key)):
                continue
            found = self._copy(key, row)
            if found is None:
                if row["written"] in HOPELESS:
                    continue
                if self.source == "summit" and self._is_in_camera(row["obs_id"], name):
                    in_camera.setdefault(row["obs_id"], []).append(name)
                    continue
                lost.add(str(key))
                if self._is_first_time(str(key)):
                    log.error("%s %s: no good copy at %s", row["obs_id"], name, self.source)
                continue
            folder = (self._raw / str(found.key)).parent
            if folder not in sidecars:
                sidecars.add(folder)
                yield from self._sidecars(folder, found.piece)
            yield found
        yield from (InCamera(obs_id, tuple(names)) for obs_id, names in in_camera.items())
        # Twice in a row: a file may be on its way from one folder to the next at the moment of a look.
        self.lost, self._lost_before = lost & self._lost_before, lost

    def _is_in_camera(self, obs_id: str, name: str) -> bool:
        folder = self._site.path(DAQ_FOLDER) / obs_id
        return (folder / EXPOSURE_FILE).is_file() and (folder / f"{name}.npy").is_file()

    def _rows(self, days_back: float) -> Iterator[dict[str, Any]]:
        """What the ledger says to be owed, page by page: what can never be sent must not hide the rest."""
        now, after = self._clock.now_tai_s(), (0, 0, "", -1)
        while True:
            page = self._ledger.owed(
                self.source,
                self.target,
                before_tai=now - self._grace_s,
                since_tai=now - days_back * SECONDS_PER_DAY,
                after=after,
            )
            yield from page
            if not page:
                return
            last = page[-1]
            after = (last["day_obs"], last["seq_num"], last["obs_id"], last["detector"])

    def look_at_files(self) -> Iterator[Owed | InCamera]:
        """Files that the ledger does not know of, because their events were lost."""
        unknown: dict[str, list[RawKey]] = {}
        for key in self._rounds.left():
            unknown.setdefault(str(key.obs_id), []).append(key)
        held = self._ledger.held(self.target, list(unknown))
        told = self._told_of(list(unknown))
        busy = self._live_jobs()
        for obs_id, keys in unknown.items():
            for key in keys:
                if (obs_id, key.part) in held:
                    self._journal.note(str(key), THERE)
                    continue
                path = self._raw / str(key)
                try:
                    young = time.time() - path.stat().st_mtime < max(
                        SETTLED_S, self._clock.wall_s(self._grace_s)
                    )
                    if young or (obs_id, key.part) in busy or obs_id in told:
                        continue
                    piece = piece_of(key.instrument, key.obs_id, key.part, self._ids)
                    group_id = group_of(path)
                    parcel = Parcel(str(key), path.stat().st_size, sha256_of(path), group_id, MODE)
                except (CumbreError, OSError) as error:
                    log.warning("%s: %s", path, error)
                    continue
                piece = Piece(piece.obs_id, piece.instrument, group_id, piece.detector, piece.detector_name)
                yield from self._sidecars(path.parent, piece)
                yield Owed(key, piece, parcel, path, "raw files")
        if self.source == "summit":
            yield from self._camera_store()

    def _camera_store(self) -> Iterator[InCamera]:
        """Images of the camera's store of which the ledger never heard."""
        young_s = max(SETTLED_S, self._clock.wall_s(self._grace_s))
        folders = {
            folder.name: folder
            for folder in images(self._site.path(DAQ_FOLDER))
            if time.time() - folder.stat().st_mtime > young_s
        }
        if not folders:
            return
        known = self._told_of(list(folders))
        for obs_id, folder in folders.items():
            if obs_id not in known:
                try:
                    yield InCamera(obs_id, tuple(DaqImage.open(folder).detectors))
                except CumbreError as error:
                    log.warning("%s: %s", folder, error)

    def _told_of(self, obs_ids: list[str]) -> set[str]:
        """Images of which the ledger knows detectors."""
        rows = self._db.execute(
            "SELECT DISTINCT obs_id FROM ledger.hop WHERE obs_id = ANY(%s) AND detector >= 0", (obs_ids,)
        )
        return {row[0] for row in rows}

    def _live_jobs(self) -> set[tuple[str, str]]:
        """(obs_id, detector name) that a replicator has an order for that is not over."""
        if self._db.execute("SELECT to_regclass('control.job')")[0][0] is None:
            return set()
        rows = self._db.execute(
            "SELECT obs_id, unnest(detectors) FROM control.job WHERE ended_tai IS NULL AND kind = 'replicate'"
            " AND link = %s AND deadline_tai > %s",
            (f"{self.source}-{self.target}", self._clock.now_tai_s()),
        )
        return {(row[0], row[1]) for row in rows}

    # copies

    def _copy(self, key: RawKey, row: dict[str, object]) -> Owed | None:
        obs_id, name, instrument = str(row["obs_id"]), str(row["detector_name"]), str(row["instrument"])
        wanted = normal_checksum(str(row["checksum"])) if row["checksum"] else None
        try:
            known = piece_of(instrument, ObsId.parse(obs_id), name, self._ids)
        except CumbreError as error:
            log.warning("%s %s: %s", obs_id, name, error)
            return None
        group_id = str(row["group_id"])
        piece = Piece(obs_id, instrument, group_id, known.detector, name)
        for path, origin in self._places(key):
            try:
                found = sha256_of(path)
            except (CumbreError, OSError):
                continue
            if wanted is None or found == wanted:
                parcel = Parcel(str(key), path.stat().st_size, found, group_id, MODE)
                return Owed(key, piece, parcel, path, origin)
            log.error("%s: %s, the ledger has %s; another copy is looked for", path, found, wanted)
        return self._from_tape(key, piece, wanted)

    def _key(self, row: dict[str, object]) -> RawKey | None:
        """Key of an image by the path that the ledger has, else by its names."""
        path = Path(str(row["path"] or ""))
        try:
            if path.is_relative_to(self._raw):
                return RawKey.parse(str(path.relative_to(self._raw)))
            obs_id = ObsId.parse(str(row["obs_id"]))
            return RawKey.parse(image_key(str(row["instrument"]), obs_id, str(row["detector_name"])))
        except CumbreError as error:
            if self._is_first_time(f"{row['obs_id']} {row['detector_name']}"):
                log.warning("%s %s: %s", row["obs_id"], row["detector_name"], error)
            return None

    def _is_first_time(self, what: str) -> bool:
        new = what not in self._told
        self._told.add(what)
        return new

    def _places(self, key: RawKey) -> Iterator[tuple[Path, str]]:
        yield self._raw / str(key), "raw files"
        for store in self._place.buffers or [f"{self.source}/buffer"]:
            for folder in sorted(self._site.path(store).glob("pair-*")):
                yield folder / "data" / str(key), "outage buffer"

    def _from_tape(self, key: RawKey, piece: Piece, wanted: str | None) -> Owed | None:
        if self._place.tape is None:
            return None
        try:
            self._tape = self._tape or view_tape(self._site, self.source)
            index, shelf = self._tape
            entry = index.entries.get(str(key))
            if entry is None or wanted not in (None, entry.sha256):
                return None
            path = self._scratch / str(key)
            write_atomic(path, read_entry(shelf, entry))
        except (CumbreError, OSError) as error:
            log.warning("%s: tape of %s: %s", key, self.source, error)
            return None
        return Owed(
            key, piece, Parcel(str(key), entry.size, entry.sha256, piece.group_id, MODE), path, "tape"
        )

    def _sidecars(self, folder: Path, piece: Piece) -> Iterator[Owed]:
        for path in sorted(folder.glob("*.json")):
            try:
                key = RawKey.parse(str(path.relative_to(self._raw)))
                parcel = Parcel(str(key), path.stat().st_size, sha256_of(path), piece.group_id, MODE)
            except (BadFileError, CumbreError, OSError):
                continue
            yield Owed(key, Piece(piece.obs_id, piece.instrument, piece.group_id), parcel, path, "raw files")

    def release(self, owed: Owed) -> None:
        """Let go of a copy that was taken from tape."""
        if owed.path.is_relative_to(self._scratch):
            owed.path.unlink(missing_ok=True)
