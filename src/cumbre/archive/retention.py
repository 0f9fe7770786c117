"""Retention: caches are cleaned when they are old, and only of what the ledger proves to be elsewhere."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cumbre.archive.journal import raw_files
from cumbre.capture.daq import DaqImage, images
from cumbre.capture.hops import Piece, detector_ids, hop_fields, piece_of, publish_hops
from cumbre.capture.writer import DAQ_FOLDER
from cumbre.core.errors import CumbreError
from cumbre.core.ids import ObsId
from cumbre.core.time import SECONDS_PER_DAY, day_obs_start_tai

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock
    from cumbre.ledger import Ledger

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """Files of one cache go after ``days`` when every place (or copy hop) of ``needs`` has a verified copy."""

    place: str
    days: float
    needs: tuple[str, ...]


class RetentionService:
    """Cleans the camera's store and the raw caches.

    Parameters
    ----------
    every_s
        Real seconds between rounds.
    """

    name = "retention"

    def __init__(self, *, site: Site, bus: Bus, clock: Clock, ledger: Ledger, every_s: float = 60.0) -> None:
        self._site, self._bus, self._clock, self._ledger = site, bus, clock, ledger
        self._every_s, self._next = every_s, 0.0
        self._ids = detector_ids(site.config)
        places, keep = site.config.places, site.config.retention
        tapes = tuple(f"{name}_tape" for name, place in places.items() if place.tape)
        copies = tapes or tuple(name for name in ("base", "archive") if name in places)
        self._daq = Policy("camera", keep.daq_days, copies)
        self._caches = [
            # A cache that is the only one of its place leaves nothing but tapes: both must have it.
            Policy(name, keep.summit_days if name == "summit" else keep.raw_cache_days, copies)
            for name, place in places.items()
            if "://" not in place.raw
        ]

    def step(self, timeout_s: float) -> int:
        """Clean when it is time; gives the number of files deleted."""
        wait = self._next - time.monotonic()
        if wait > 0:
            time.sleep(min(wait, timeout_s))
            return 0
        self._next = time.monotonic() + self._every_s
        return self.clean()

    def close(self) -> None:
        """Nothing is held."""

    def clean(self) -> int:
        """One round over everything; gives the number of files deleted."""
        return self._clean_daq() + sum(self._clean_cache(policy) for policy in self._caches)

    def _old(self, obs_id: ObsId, days: float) -> bool:
        """Whether a whole observing day is older than so many days."""
        age_s = self._clock.now_tai_s() - day_obs_start_tai(obs_id.day_obs)
        return age_s > (days + 1.0) * SECONDS_PER_DAY

    def _proven(self, piece: Piece, policy: Policy) -> bool:
        return bool(policy.needs) and self._ledger.may_delete(
            piece.obs_id, piece.detector, list(policy.needs)
        )

    def _kept_long(self, piece: Piece, policy: Policy) -> bool:
        """Whether the copy came to its place more than so many days ago.

        Frames of years ago that were taken in today are new here: the observing day alone would let them go
        before anybody has used them.
        """
        rows = self._ledger.where(piece.obs_id, piece.detector)
        came = [row["hop_tai"] for row in rows if row["place"] == policy.place]
        return bool(came) and self._clock.now_tai_s() - min(came) > policy.days * SECONDS_PER_DAY

    def _clean_daq(self) -> int:
        count = 0
        for folder in images(self._site.path(DAQ_FOLDER)):
            obs_id = ObsId.parse(folder.name)
            if not self._old(obs_id, self._daq.days):
                continue
            try:
                image = DaqImage.open(folder)
                pieces = [piece_of(image.instrument, obs_id, name, self._ids) for name in image.detectors]
            except CumbreError as error:
                log.warning("%s is kept: %s", folder, error)
                continue
            if all(self._proven(piece, self._daq) for piece in pieces):
                # Renamed first: an image is in the store whole or not at all, whenever this process dies.
                gone = folder.with_name(f".{folder.name}.deleted")
                folder.rename(gone)
                shutil.rmtree(gone)
                count += len(pieces)
                log.info("%s: %d detectors deleted from the camera's store", obs_id, len(pieces))
        return count

    def _clean_cache(self, policy: Policy) -> int:
        root = self._site.path(self._site.config.places[policy.place].raw)
        hops, count = [], 0
        for key in raw_files(root):
            if not key.is_detector or not self._old(key.obs_id, policy.days):
                continue
            path = root / str(key)
            try:
                piece = piece_of(key.instrument, key.obs_id, key.part, self._ids)
            except CumbreError as error:
                log.warning("%s is kept: %s", path, error)
                continue
            if self._proven(piece, policy) and self._kept_long(piece, policy):
                path.unlink()
                hops.append(hop_fields(self._clock, piece, "deleted", place=policy.place, path=path))
                count += 1
                self._sweep(path.parent)
        publish_hops(self._bus, hops)
        return count

    @staticmethod
    def _sweep(folder: Path) -> None:
        """Remove the sidecars and the folder of an image that has no pixels left."""
        if any(".fits" in path.name for path in folder.iterdir()):
            return
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
