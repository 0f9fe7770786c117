"""Time series of a site: what was ingested becomes light curves, and DiaObjects of Level 1."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.core.errors import ConflictError, DeadlineError, NotFoundError
from cumbre.site.roles import open_site_clock, site_database

if TYPE_CHECKING:
    from cumbre.core.configuration import Site
    from cumbre.core.instrument import Instrument
    from cumbre.payloads.lightcurve_run import Series


def wait_archived(
    site: Site,
    camera: Instrument,
    obs_ids: Sequence[str],
    *,
    patience_s: float,
    progress: Callable[[int], None],
) -> list[Path]:
    """Wait until the archive holds all files of some images, and give their paths there.

    Parameters
    ----------
    patience_s
        Real seconds without any progress after which we give up.
    progress
        Called with the number of images there.

    Raises
    ------
    DeadlineError
        The archive takes nothing more; nothing is lost, the services go on with it.
    """
    seen, since = -1, time.monotonic()
    while True:
        try:
            paths = archived(site, camera, obs_ids)
        except NotFoundError:
            paths = []
        if len(paths) > seen:
            seen, since = len(paths), time.monotonic()
            progress(seen)
        if seen >= len(obs_ids):
            return paths
        if time.monotonic() - since > patience_s:
            raise DeadlineError(
                f"{site.root}: {seen} of {len(obs_ids)} files reached the archive and no more came for {patience_s:g} s; is "
                f"the site up? see: cumbre status --site {site.root}. When they are there: cumbre lightcurve --site {site.root}"
            )
        time.sleep(0.2)


def archived(site: Site, camera: Instrument, obs_ids: Sequence[str] | None = None) -> list[Path]:
    """Raw files of an instrument that the site's archive holds, in order of time.

    Parameters
    ----------
    obs_ids
        Only these images; all by default.

    Raises
    ------
    NotFoundError
        None is there.
    """
    rows = site_database(site).execute(
        "SELECT h.path FROM ledger.hop h JOIN ledger.image i USING (obs_id) WHERE h.hop = 'at_archive'"
        " AND h.outcome = 'ok' AND i.instrument = %s AND h.detector >= 0"
        " AND (%s::text[] IS NULL OR obs_id = ANY(%s)) ORDER BY i.begin_tai, h.detector",
        (camera.name, *2 * [None if obs_ids is None else list(obs_ids)]),
    )
    paths = [Path(row[0]) for row in rows]
    if not paths:
        raise NotFoundError(
            f"{site.root}: no file of {camera.name} is in its archive; bring them with: cumbre ingest --site "
            f"{site.root} --instrument {camera.name.lower()} FILES"
        )
    return paths


def store(site: Site, series: Series, target: int) -> dict[str, Any]:
    """One DiaObject a star and one DiaForcedSource a measurement, in Level 1.

    A run that was cut short is completed by the next one of the same frames.

    Raises
    ------
    ConflictError
        Some of these frames are stored already, as part of another series.
    """
    from cumbre.catalogs.level1 import Level1
    from cumbre.payloads.lightcurve_rows import object_ids, object_rows, rows_of_frame

    database = site_database(site)
    level1 = Level1(database, open_site_clock(site))
    identifiers = object_ids(series)
    visits = [(int(frame["exposure_id"]), int(frame["detector"])) for frame in series.frames]
    done = [level1.is_stored(*visit) for visit in visits]
    if any(done):
        found = database.execute(
            "SELECT count(*) FROM level1.diaobject WHERE diaobjectid = ANY(%s)", (identifiers.tolist(),)
        )[0][0]
        if found != identifiers.size:
            raise ConflictError(
                f"{sum(done)} of {len(done)} frames are in Level 1 already, with other objects; a series is stored "
                "once: give only new frames, or leave --site out"
            )
    rows = forced = 0
    for column, visit in enumerate(visits):
        if done[column]:
            continue
        measured = rows_of_frame(series, column, identifiers)
        level1.store(
            *visit, dia_objects=object_rows(series, identifiers) if column == 0 else (), forced=measured
        )
        rows, forced = rows + 1, forced + len(measured["ra"])
    return {
        "diaObjectId": int(identifiers[target]),
        "objects": int(identifiers.size),
        "visits_stored": rows,
        "visits_already": int(sum(done)),
        "forced_sources": forced,
    }
