"""Precovery: new objects are looked for in the images of the weeks before, where nobody knew of them.

Each past image that a new object may be on is processed again as its record says, and measured at the object's place.
The queue is in the database (``level1.precovery``); a run that was killed goes on, and what it had stored stays once.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.core.errors import CumbreError, TransientError
from cumbre.core.geometry import separation_deg
from cumbre.core.ids import ObsId
from cumbre.core.time import Clock, mjd_from_seconds, seconds_from_mjd
from cumbre.orchestration.provenance import FOLDER, read_record

if TYPE_CHECKING:
    from cumbre.catalogs.level1 import Level1
    from cumbre.payloads.alert_production import DetectorResult
    from cumbre.stores.postgres import Database

BATCH = 200
MAX_ATTEMPTS = 5
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Past:
    """What is found of one object."""

    images: int = 0
    rows: int = 0
    failures: list[str] = field(default_factory=list)


class Precovery:
    """Works off the queue of a site.

    Parameters
    ----------
    root
        Folder of the site: records of processed images, raw files.
    db
        With the ledger and Level 1.
    days
        How far back from an object's first source.
    remake
        (root, record, raw file) → result; :func:`cumbre.orchestration.provenance.reproduce` by default.
    """

    def __init__(
        self,
        root: Path,
        db: Database,
        clock: Clock,
        *,
        days: float = 30.0,
        remake: Callable[[Path, dict[str, Any], Path], DetectorResult] | None = None,
    ) -> None:
        from cumbre.catalogs.level1 import Level1
        from cumbre.orchestration.provenance import reproduce

        self._root, self._db, self._clock, self._days = root, db, clock, days
        self._level1: Level1 = Level1(db, clock)
        self._remake = remake or reproduce

    def run(self, limit: int = BATCH) -> dict[str, int]:
        """Take the oldest objects of the queue, at most ``limit``; counts of what was done.

        Objects with an image that could not be processed stay in the queue until the fifth try.
        """
        queue = self._level1.precovery_queue(limit)
        past = {int(item["diaObjectId"]): _Past() for item in queue}
        wanted: dict[Path, list[dict[str, Any]]] = defaultdict(list)
        for item in queue:
            for record in self._records(item):
                wanted[record].append(item)
        images = 0
        for path, objects in sorted(wanted.items()):
            images += 1
            for identifier, rows, failure in self._image(path, objects):
                past[identifier].images += 1
                past[identifier].rows += rows
                past[identifier].failures += [failure] if failure else []
        attempts = {int(item["diaObjectId"]): int(item["attempts"]) + 1 for item in queue}
        done = {i for i, p in past.items() if not p.failures or attempts[i] >= MAX_ATTEMPTS}
        told = {i: (p.images, p.rows, "; ".join(sorted(set(p.failures)))) for i, p in past.items()}
        self._level1.precovered({i: told[i] for i in past if i in done}, is_done=True)
        self._level1.precovered({i: told[i] for i in past if i not in done}, is_done=False)
        return {
            "objects": len(done), "again": len(past) - len(done), "images": images,
            "forced": sum(p.rows for p in past.values()),
        }  # fmt: skip

    def _records(self, item: dict[str, Any]) -> Iterator[Path]:
        """Records of the images of the days before whose circle holds an object."""
        first_tai = seconds_from_mjd(float(item["first_mjd_tai"]))
        rows = self._db.execute(
            "SELECT obs_id FROM ledger.image WHERE begin_tai >= %s AND begin_tai < %s AND exposure_id <> %s"
            " ORDER BY begin_tai",
            (first_tai - 86400.0 * self._days, first_tai, item["visit"]),
        )
        for (obs_id,) in rows:
            for path in sorted((self._root / FOLDER / str(ObsId.parse(obs_id))).glob("*.json")):
                circle = read_record(path)["field"]
                away = separation_deg(circle["ra"], circle["dec"], item["ra"], item["dec"])
                if float(away) <= circle["radius"]:
                    yield path

    def _image(self, path: Path, objects: list[dict[str, Any]]) -> Iterator[tuple[int, int, str]]:
        """Process an image again and measure; (object, rows stored, why not)."""
        from cumbre.payloads.alert_production import force_at

        identifiers = [int(item["diaObjectId"]) for item in objects]
        try:
            record = read_record(path)
            visit, detector = int(record["visit"]), int(record["detector"])
            there = self._db.execute(
                "SELECT diaobjectid FROM level1.diaforcedsource WHERE visit = %s AND detector = %s"
                " AND diaobjectid = ANY(%s)",
                (visit, detector, identifiers),
            )
            known = {row[0] for row in there}
            left = [item for item in objects if int(item["diaObjectId"]) not in known]
            rows: list[dict[str, Any]] = []
            if left:
                last = self._db.execute(
                    "SELECT count(*) FROM level1.diaforcedsource WHERE visit = %s AND detector = %s",
                    (visit, detector),
                )
                made = self._remake(self._root, record, self._raw(record))
                now = mjd_from_seconds(self._clock.now_tai_s())
                rows = force_at(made, left, processed_mjd_tai=now, first=int(last[0][0]) + 1)
                self._level1.add_forced(rows)
        except TransientError:
            raise
        except CumbreError as error:
            log.warning("%s %s: %s", path.parent.name, path.stem, error)
            yield from ((identifier, 0, str(error)) for identifier in identifiers)
            return
        measured = {int(row["diaObjectId"]) for row in rows}
        yield from ((identifier, int(identifier in measured), "") for identifier in identifiers)

    def _raw(self, record: dict[str, Any]) -> Path:
        """The raw file in the archive's cache."""
        from cumbre.core.errors import NotFoundError

        rows = self._db.execute(
            "SELECT path FROM ledger.hop WHERE obs_id = %s AND detector = %s AND hop = 'at_archive'"
            " AND outcome = 'ok'",
            (record["obs_id"], record["detector"]),
        )
        for (path,) in rows:
            if Path(path).is_file():
                return Path(path)
        raise NotFoundError(
            f"{record['obs_id']} {record['detector_name']}: its raw file is not in the archive's cache any more"
        )
