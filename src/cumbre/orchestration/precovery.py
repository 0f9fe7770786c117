"""Precovery: new objects are looked for in the images of the weeks before, where nobody knew of them.

Each past image that a new object may be on is processed again as its record says, and measured at the object's place.
The queue is in the database (``level1.precovery``); a run that was killed goes on, and what it had stored stays once.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.core.errors import CumbreError, TransientError
from cumbre.core.geometry import separation_deg
from cumbre.core.ids import ObsId
from cumbre.core.time import Clock, mjd_from_seconds, seconds_from_mjd
from cumbre.orchestration.provenance import FOLDER, read_record, snaps_of

if TYPE_CHECKING:
    from cumbre.catalogs.level1 import Level1
    from cumbre.payloads.alert_production import DetectorResult
    from cumbre.stores.postgres import Database

BATCH = 200
MAX_ATTEMPTS = 5
log = logging.getLogger(__name__)


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
        (root, record, raw files) → result; :func:`cumbre.orchestration.provenance.reproduce` by default.
    """

    def __init__(
        self,
        root: Path,
        db: Database,
        clock: Clock,
        *,
        days: float = 30.0,
        remake: Callable[..., DetectorResult] | None = None,
    ) -> None:
        from cumbre.catalogs.level1 import Level1
        from cumbre.orchestration.provenance import reproduce

        self._root, self._db, self._clock, self._days = root, db, clock, days
        self._level1: Level1 = Level1(db, clock)
        self._remake = remake or reproduce

    def run(self, limit: int = BATCH, budget_s: float = math.inf) -> dict[str, int]:
        """Take the oldest objects of the queue, at most ``limit``; counts of what was done.

        Objects with an image that could not be processed stay in the queue until the fifth try. After ``budget_s``
        real seconds no further image is begun; what was found is kept, and the next run goes on there.
        """
        end = time.monotonic() + budget_s
        queue = {int(item["diaObjectId"]): item for item in self._level1.precovery_queue(limit)}
        wanted: dict[Path, list[int]] = defaultdict(list)
        for identifier, item in queue.items():
            for record in self._records(item):
                wanted[record].append(identifier)
        n_images = Counter(identifier for listed in wanted.values() for identifier in listed)
        failures: dict[int, set[str]] = defaultdict(set)
        unfinished: set[int] = set()
        images = forced = 0
        for path, identifiers in sorted(wanted.items()):
            if time.monotonic() >= end:
                unfinished.update(identifiers)
                continue
            images += 1
            try:
                forced += self._image(path, [queue[identifier] for identifier in identifiers])
            except TransientError:
                raise
            except CumbreError as error:
                log.warning("%s %s: %s", path.parent.name, path.stem, error)
                for identifier in identifiers:
                    failures[identifier].add(str(error))
        done = {
            identifier
            for identifier, item in queue.items()
            if identifier not in unfinished
            and (identifier not in failures or int(item["attempts"]) + 1 >= MAX_ATTEMPTS)
        }
        again = set(queue) - done - unfinished
        for listed, is_done in ((done, True), (again, False)):
            told = {i: (n_images[i], "; ".join(sorted(failures.get(i, ())))) for i in listed}
            self._level1.precovered(told, is_done=is_done)
        return {
            "objects": len(done), "again": len(again), "unfinished": len(unfinished - again), "images": images,
            "forced": forced,
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

    def _image(self, path: Path, objects: list[dict[str, Any]]) -> int:
        """Process an image again and measure the objects that were not looked for on it; rows stored."""
        from cumbre.payloads.alert_production import force_at

        record = read_record(path)
        visit, detector = int(record["visit"]), int(record["detector"])
        known = self._level1.precovered_on(visit, detector, [int(item["diaObjectId"]) for item in objects])
        left = [item for item in objects if int(item["diaObjectId"]) not in known]
        if not left:
            return 0
        last = self._db.execute(
            "SELECT count(*) FROM level1.diaforcedsource WHERE visit = %s AND detector = %s",
            (visit, detector),
        )
        exposures = [record["obs_id"], *snaps_of(record)]
        made = self._remake(self._root, record, *(self._raw(record, obs_id) for obs_id in exposures))
        now = mjd_from_seconds(self._clock.now_tai_s())
        rows = force_at(made, left, processed_mjd_tai=now, first=int(last[0][0]) + 1)
        self._level1.precover_image(visit, detector, [int(item["diaObjectId"]) for item in left], rows)
        return len(rows)

    def _raw(self, record: dict[str, Any], obs_id: str) -> Path:
        """The raw file in the archive's cache."""
        from cumbre.core.errors import NotFoundError

        rows = self._db.execute(
            "SELECT path FROM ledger.hop WHERE obs_id = %s AND detector = %s AND hop = 'at_archive'"
            " AND outcome = 'ok'",
            (obs_id, record["detector"]),
        )
        for (path,) in rows:
            if Path(path).is_file():
                return Path(path)
        raise NotFoundError(
            f"{obs_id} {record['detector_name']}: its raw file is not in the archive's cache any more"
        )


def is_waiting(db: Database) -> bool:
    """Whether an object waits in the queue."""
    if not db.execute("SELECT to_regclass('level1.precovery')")[0][0]:
        return False
    return bool(db.execute("SELECT 1 FROM level1.precovery WHERE done_tai IS NULL LIMIT 1"))


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """What a worker of prompt processing does by day: some images of the queue.

    Parameters
    ----------
    payload
        ``site``, ``dsn``, ``days``, ``budget_s``.
    """
    from cumbre.stores.postgres import Database

    root = Path(payload["site"])
    precovery = Precovery(
        root,
        Database(payload["dsn"], application="cumbre precovery"),
        Clock.load(root / "clock.json"),
        days=float(payload["days"]),
    )
    return dict(precovery.run(budget_s=float(payload["budget_s"])))
