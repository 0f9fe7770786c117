"""Records of calibrations: which there are, and in what time each held, as ``calibration.record``.

Prompt processing takes the file that lies in the archive's folder of calibrations. A record begins when its file is
first seen and ends when another takes its place; the first of a detector and band holds since ever.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from cumbre.core.errors import NotFoundError
from cumbre.core.instrument import Instrument
from cumbre.core.time import Clock
from cumbre.stores.files import sha256_of
from cumbre.stores.postgres import Database

log = logging.getLogger(__name__)

FOLDER = "archive/calibs"


class CalibrationKeeper:
    """Takes over what lies in the folder of calibrations.

    Parameters
    ----------
    folder
        ``INSTRUMENT/BAND_DETECTOR.fits``.
    instruments
        By name.
    """

    def __init__(
        self, db: Database, folder: Path, instruments: Mapping[str, Instrument], clock: Clock
    ) -> None:
        self._db, self._folder, self._instruments, self._clock = db, folder, instruments, clock
        self._seen: dict[Path, tuple[int, int]] = {}

    def step(self) -> int:
        """Record files that are new or changed; returns how many."""
        count = 0
        for name, instrument in self._instruments.items():
            for path in sorted((self._folder / name).glob("*.fits")):
                try:
                    about = path.stat()
                    mark = about.st_size, about.st_mtime_ns
                    if self._seen.get(path) != mark:
                        count += self._record(instrument, path)
                        self._seen[path] = mark
                except (OSError, ValueError, NotFoundError) as error:
                    log.warning("calibrations %s are not recorded: %s", path, error)
        return count

    def _record(self, instrument: Instrument, path: Path) -> int:
        import fitsio

        band, _, detector_name = path.stem.partition("_")
        detector = instrument.detector(detector_name)
        digest, size = sha256_of(path), path.stat().st_size
        with fitsio.FITS(str(path)) as file:
            kinds = [hdu.get_extname().lower() for hdu in file if hdu.get_extname()]
        now = self._clock.now_tai_s()
        made = 0
        with self._db.connection() as link:
            for kind in kinds:
                place = (instrument.name, detector.id, band, kind)
                link.execute("SELECT pg_advisory_xact_lock(hashtext('cumbre.access.calibration'))")
                held = link.execute(
                    "SELECT sha256 FROM access.calibration WHERE (instrument, detector, band, kind) = (%s, %s, %s, %s)"
                    " AND valid_end_tai = 'infinity'",
                    place,
                ).fetchall()
                if held and held[0][0] == digest:
                    continue
                link.execute(
                    "UPDATE access.calibration SET valid_end_tai = %s WHERE (instrument, detector, band, kind) ="
                    " (%s, %s, %s, %s) AND valid_end_tai = 'infinity'",
                    (now, *place),
                )
                link.execute(
                    "INSERT INTO access.calibration (instrument, detector, band, kind, detector_name, file, byte_size,"
                    " sha256, valid_begin_tai, recorded_tai) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
                    (*place, detector.name, path.name, size, digest, now if held else float("-inf"), now),
                )
                made += 1
        return made
