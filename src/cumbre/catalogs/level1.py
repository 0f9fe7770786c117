"""The Level 1 database: what prompt processing stores and what it reads back for the next visit."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.catalogs.columns import Rows, circle_pixels, circle_ranges, conform, separation_deg
from cumbre.catalogs.partitions import LEDGER, Partitions, cut_older
from cumbre.catalogs.schema import Table, level1_ddl, stored_tables
from cumbre.core.errors import ConflictError
from cumbre.core.time import Clock, mjd_from_seconds
from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Connection, Database

if TYPE_CHECKING:
    import pyarrow as pa

HISTORY_DAYS = 365.25
LOCK_ORDER = 9
"""HEALPix order of the pixels that are locked: 7 arc minutes, about a detector."""
LOCK_WAIT_S = 60
_LOCK_SPACE = 0x6C31  # "l1"
_OUTBOX = """
CREATE SCHEMA IF NOT EXISTS level1;
CREATE TABLE level1.felis (sha256 text PRIMARY KEY, applied timestamptz NOT NULL DEFAULT now());
CREATE TABLE level1.visit_detector (
    visit bigint NOT NULL, detector int NOT NULL, n_sources int NOT NULL, n_objects int NOT NULL,
    n_forced int NOT NULL, n_alerts int NOT NULL, stored_tai float8 NOT NULL, alerted_tai float8,
    PRIMARY KEY (visit, detector));
CREATE INDEX visit_detector_unreported ON level1.visit_detector (stored_tai) WHERE alerted_tai IS NULL;
CREATE TABLE level1.alert_outbox (
    alert_id bigint PRIMARY KEY, sequence bigint GENERATED ALWAYS AS IDENTITY, visit bigint NOT NULL,
    detector int NOT NULL, packet bytea NOT NULL, sent_tai float8);
ALTER TABLE level1.alert_outbox ALTER COLUMN packet SET STORAGE EXTERNAL;
CREATE INDEX alert_outbox_unsent ON level1.alert_outbox (sequence) WHERE sent_tai IS NULL;
CREATE INDEX alert_outbox_visit ON level1.alert_outbox (visit, detector);
"""
_ORBITS = """
CREATE TABLE level1.orbit_load (
    version int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, source text NOT NULL, rows int NOT NULL,
    loaded_tai float8 NOT NULL);
"""
_PRECOVERY = """
CREATE TABLE level1.precovery (
    dia_object_id bigint PRIMARY KEY, ra float8 NOT NULL, "dec" float8 NOT NULL, visit bigint NOT NULL,
    detector int NOT NULL, first_mjd_tai float8 NOT NULL, queued_tai float8 NOT NULL, attempts int NOT NULL DEFAULT 0,
    done_tai float8, n_images int, n_forced int, message text NOT NULL DEFAULT '');
CREATE INDEX precovery_open ON level1.precovery (queued_tai) WHERE done_tai IS NULL;
"""
_PRECOVERED = """
CREATE TABLE level1.precovery_image (
    dia_object_id bigint NOT NULL REFERENCES level1.precovery ON DELETE CASCADE, visit bigint NOT NULL,
    detector int NOT NULL, n_forced int NOT NULL, PRIMARY KEY (dia_object_id, visit, detector));
"""
_REJECTED = "ALTER TABLE level1.visit_detector ADD COLUMN rejected jsonb NOT NULL DEFAULT '{}'"


class Level1:
    """Sources, objects and forced photometry by position, and the alerts that wait to be sent.

    Parameters
    ----------
    db
        The site's database; tables are made when absent.
    clock
        For the times of processing; real time when not given.
    """

    def __init__(self, db: Database, clock: Clock | None = None) -> None:
        self._db = db
        self._clock = clock or Clock.real()
        self._tables = {table.name: table for table in stored_tables()}
        prepare(db)
        self._partitions = Partitions(db)

    def load_region(
        self, ra: float, dec: float, radius_deg: float, *, until_mjd: float | None = None
    ) -> dict[str, pa.Table]:
        """Everything known in a circle.

        Parameters
        ----------
        ra, dec, radius_deg
            Circle, ICRS degrees.
        until_mjd
            End of the history, MJD TAI; now when not given.

        Returns
        -------
        dict
            ``DiaObject`` in the circle; ``DiaSource`` and ``DiaForcedSource`` of these objects, and sources
            in the circle that belong to no object, of the 12 months before; in order of time.
        """
        until = mjd_from_seconds(self._clock.now_tai_s()) if until_mjd is None else until_mjd
        times = (until - HISTORY_DAYS, until + 1.0)
        with self._db.connection() as link:
            objects = self._in_circle(link, "DiaObject", ra, dec, radius_deg)
            identifiers = objects.column("diaObjectId").to_pylist()
            where = "t.diaobjectid = ANY(%s) AND t.midpointmjdtai BETWEEN %s AND %s ORDER BY t.midpointmjdtai"
            forced = self._read(link, "DiaForcedSource", where, (identifiers, *times))
            sources = self._read(link, "DiaSource", where, (identifiers, *times))
            lone = "t.diaobjectid IS NULL AND t.midpointmjdtai BETWEEN %s AND %s"
            orphans = self._in_circle(link, "DiaSource", ra, dec, radius_deg, lone, times)
        if orphans.num_rows:
            import pyarrow as pa

            sources = pa.concat_tables([sources, orphans]).sort_by("midpointMjdTai")
        return {"DiaObject": objects, "DiaSource": sources, "DiaForcedSource": forced}

    @contextmanager
    def exclusive(self, ra: float, dec: float, radius_deg: float) -> Iterator[None]:
        """Be the only one who associates in a circle, from reading its history to storing what follows from it.

        Two overlapping images that are processed side by side would else make two objects of one new source. Whoever
        dies lets go; circles that do not touch do not wait for each other.

        Parameters
        ----------
        ra, dec, radius_deg
            Circle, ICRS degrees.

        Raises
        ------
        TransientError
            Somebody else held it for more than ``LOCK_WAIT_S``.
        """
        pixels = circle_pixels(ra, dec, radius_deg, LOCK_ORDER)
        with self._db.connection() as link:
            link.execute(f"SET LOCAL lock_timeout = '{LOCK_WAIT_S}s'".encode())
            # in one order everywhere, so nobody waits in a ring
            link.execute(
                "SELECT pg_advisory_xact_lock(%s, pixel) FROM (SELECT unnest(%s::int[]) AS pixel ORDER BY 1) AS p",
                (_LOCK_SPACE, pixels),
            )
            yield

    def store(
        self,
        visit: int,
        detector: int,
        *,
        dia_sources: Rows = (),
        dia_objects: Rows = (),
        forced: Rows = (),
        ss_sources: Rows = (),
        packets: Sequence[tuple[int, bytes]] = (),
        rejected: Mapping[str, int] | None = None,
    ) -> None:
        """Store one detector's results and its alerts in one transaction, at most once.

        Parameters
        ----------
        dia_sources, dia_objects, forced, ss_sources
            Rows of the tables (see :func:`cumbre.catalogs.columns.conform`); objects replace their older
            versions, whole, and every version is kept in ``DiaObjectVersion``. Objects that were not known are
            queued for precovery. ``hpx29`` is computed; times of processing are now unless given.
        packets
            (diaSourceId, packet) of the alerts, in the order to send.
        rejected
            Number of sources that became no alert, by reason.

        Raises
        ------
        ConflictError
            This visit and detector is stored already; nothing changed.
        UnprocessableDataError
            Rows do not fit the schema; nothing changed.
        TransientError
            The database is not there; try again.
        """
        from psycopg.types.json import Json

        now_tai = self._clock.now_tai_s()
        now_mjd = mjd_from_seconds(now_tai)
        tables = self._tables
        sources = conform(tables["DiaSource"], dia_sources, timeProcessedMjdTai=now_mjd)
        objects = conform(tables["DiaObject"], dia_objects, validityStartMjdTai=now_mjd)
        photometry = conform(tables["DiaForcedSource"], forced, timeProcessedMjdTai=now_mjd)
        known = conform(tables["SSSource"], ss_sources)
        for name, rows in (
            ("DiaSource", sources),
            ("DiaForcedSource", photometry),
            ("DiaObjectVersion", objects),
        ):
            self._partitions.ensure(tables[name], rows.column(tables[name].partition).unique().to_pylist())
        with self._db.connection() as link:
            first = link.execute(
                "INSERT INTO level1.visit_detector (visit, detector, n_sources, n_objects, n_forced, n_alerts,"
                " stored_tai, rejected) VALUES (%s, %s, %s, %s, %s, %s, %s, %s)"
                " ON CONFLICT DO NOTHING RETURNING 1",
                (
                    visit,
                    detector,
                    sources.num_rows,
                    objects.num_rows,
                    photometry.num_rows,
                    len(packets),
                    now_tai,
                    Json(dict(rejected or {})),
                ),
            ).fetchone()
            if first is None:
                raise ConflictError(
                    f"visit {visit}, detector {detector}: stored already; results are stored once, "
                    "so a repeated run has nothing to add"
                )
            if sources.num_rows:
                self._copy(link, tables["DiaSource"].sql_name, sources)
            if objects.num_rows:
                self._replace_objects(link, objects, visit, detector, now_tai)
            if photometry.num_rows:
                self._copy(link, tables["DiaForcedSource"].sql_name, photometry)
            if known.num_rows:
                self._copy(link, tables["SSSource"].sql_name, known)
            if packets:
                rows = ((identifier, visit, detector, packet) for identifier, packet in packets)
                columns = ["alert_id", "visit", "detector", "packet"]
                self._db.copy("level1.alert_outbox", columns, rows, connection=link)

    def precover_image(self, visit: int, detector: int, looked_for: Collection[int], rows: Rows) -> None:
        """Store what an earlier image says of new objects, once: forced photometry, and which were looked for."""
        table = self._tables["DiaForcedSource"]
        new = conform(table, rows, timeProcessedMjdTai=mjd_from_seconds(self._clock.now_tai_s()))
        self._partitions.ensure(table, new.column(table.partition).unique().to_pylist())
        names = ", ".join(f'"{column.sql_name}"' for column in table.columns)
        with self._db.connection() as link:
            link.execute(
                "CREATE TEMPORARY TABLE new_forced (LIKE level1.diaforcedsource INCLUDING DEFAULTS) ON COMMIT DROP"
            )
            self._copy(link, "new_forced", new)
            link.execute(
                f"INSERT INTO level1.diaforcedsource ({names}) SELECT {names} FROM new_forced"  # noqa: S608
                " ON CONFLICT DO NOTHING".encode()
            )
            link.execute(
                "INSERT INTO level1.precovery_image (dia_object_id, visit, detector, n_forced)"
                " SELECT id, %s, %s, (SELECT count(*) FROM new_forced WHERE diaobjectid = id)"
                " FROM unnest(%s::bigint[]) AS id ON CONFLICT DO NOTHING",
                (visit, detector, sorted(looked_for)),
            )

    def precovered_on(self, visit: int, detector: int, identifiers: Collection[int]) -> set[int]:
        """Which of some objects were looked for on an image, or measured there."""
        rows = self._db.execute(
            "SELECT dia_object_id FROM level1.precovery_image"
            " WHERE visit = %(visit)s AND detector = %(detector)s AND dia_object_id = ANY(%(ids)s)"
            " UNION SELECT diaobjectid FROM level1.diaforcedsource"
            " WHERE visit = %(visit)s AND detector = %(detector)s AND diaobjectid = ANY(%(ids)s)",
            {"visit": visit, "detector": detector, "ids": sorted(identifiers)},
        )
        return {int(row[0]) for row in rows}

    def precovery_queue(self, limit: int) -> list[dict[str, Any]]:
        """Objects whose past was not looked for yet, the oldest first."""
        return self._db.query(
            'SELECT dia_object_id AS "diaObjectId", ra, "dec", visit, detector, first_mjd_tai, attempts'
            " FROM level1.precovery WHERE done_tai IS NULL ORDER BY attempts, queued_tai, dia_object_id LIMIT %s",
            (limit,),
        )

    def precovered(self, found: Mapping[int, tuple[int, str]], *, is_done: bool) -> None:
        """Record what came of objects: id → (images that may show it, message); not done is tried again."""
        done = self._clock.now_tai_s() if is_done else None
        with self._db.connection() as link:
            for identifier, (n_images, message) in sorted(found.items()):
                link.execute(
                    "UPDATE level1.precovery SET done_tai = %s, n_images = %s, message = %s, attempts = attempts + 1,"
                    " n_forced = (SELECT coalesce(sum(n_forced), 0) FROM level1.precovery_image i"
                    " WHERE i.dia_object_id = precovery.dia_object_id) WHERE dia_object_id = %s",
                    (done, n_images, message[:1000], identifier),
                )

    def is_stored(self, visit: int, detector: int) -> bool:
        """Whether this visit and detector was stored."""
        return bool(
            self._db.execute(
                "SELECT 1 FROM level1.visit_detector WHERE visit = %s AND detector = %s", (visit, detector)
            )
        )

    def light_curve(self, dia_object_id: int) -> dict[str, pa.Table]:
        """All ``DiaSource`` and ``DiaForcedSource`` rows of an object in order of time."""
        where = "t.diaobjectid = %s ORDER BY t.midpointmjdtai"
        with self._db.connection() as link:
            return {
                name: self._read(link, name, where, (dia_object_id,))
                for name in ("DiaSource", "DiaForcedSource")
            }

    def cone(self, ra: float, dec: float, radius_deg: float, table: str = "DiaObject") -> pa.Table:
        """Rows of a table within ``radius_deg`` of an ICRS position (degrees), nearest first."""
        with self._db.connection() as link:
            found = self._in_circle(link, table, ra, dec, radius_deg)
        return found.take(np.argsort(_distances(found, ra, dec), kind="stable"))

    # -- reading --

    def _in_circle(
        self, link: Connection, name: str, ra: float, dec: float, radius_deg: float,
        condition: str = "TRUE", params: tuple[Any, ...] = (),
    ) -> pa.Table:  # fmt: skip
        """Index ranges first, then the exact distance."""
        ranges = circle_ranges(ra, dec, radius_deg)
        low, high = [pair[0] for pair in ranges], [pair[1] for pair in ranges]
        source = "unnest(%s::bigint[], %s::bigint[]) AS r(low, high) JOIN {} t"
        source += " ON t.hpx29 >= r.low AND t.hpx29 < r.high"
        found = self._read(link, name, condition, (low, high, *params), source)
        return found.filter(_distances(found, ra, dec) <= radius_deg)

    def _read(
        self, link: Connection, name: str, condition: str, params: tuple[Any, ...], source: str = "{} t"
    ) -> pa.Table:
        return read_table(link, self._tables[name], condition, params, source=source)

    # -- writing --

    def _copy(self, link: Connection, target: str, rows: pa.Table) -> None:
        lower = rows.rename_columns([name.lower() for name in rows.column_names])
        self._db.copy(target, lower.column_names, lower, connection=link)

    def _replace_objects(
        self, link: Connection, objects: pa.Table, visit: int, detector: int, now_tai: float
    ) -> None:
        """Insert or replace, in the order of identifiers so that two detectors cannot block each other."""
        table = self._tables["DiaObject"]
        link.execute(
            "CREATE TEMPORARY TABLE new_diaobject (LIKE level1.diaobject INCLUDING DEFAULTS) ON COMMIT DROP"
        )
        self._copy(link, "new_diaobject", objects)
        names = ", ".join(f'"{column.sql_name}"' for column in table.columns)
        sets = ", ".join(
            f'"{column.sql_name}" = excluded."{column.sql_name}"'
            for column in table.columns
            if column.name != "diaObjectId"
        )
        # a row that was inserted, not updated, has no xmax: the object is new, and its past is looked for
        link.execute(
            f"WITH written AS (INSERT INTO level1.diaobject AS o ({names}) "  # noqa: S608
            f"SELECT {names} FROM new_diaobject ORDER BY diaobjectid "
            f"ON CONFLICT (diaobjectid) DO UPDATE SET {sets} "
            "WHERE excluded.validitystartmjdtai >= o.validitystartmjdtai "
            'RETURNING o.diaobjectid, o.ra, o."dec", o.firstdiasourcemjdtai, o.xmax = 0 AS is_new) '
            'INSERT INTO level1.precovery (dia_object_id, ra, "dec", visit, detector, first_mjd_tai, queued_tai) '
            'SELECT diaobjectid, ra, "dec", %s, %s, firstdiasourcemjdtai, %s FROM written '
            "WHERE is_new AND firstdiasourcemjdtai IS NOT NULL ON CONFLICT DO NOTHING".encode(),
            (visit, detector, now_tai),
        )
        link.execute(
            f"INSERT INTO level1.diaobjectversion ({names}) SELECT {names} FROM new_diaobject "  # noqa: S608
            "ON CONFLICT DO NOTHING".encode()
        )


def read_table(
    link: Connection,
    table: Table,
    condition: str,
    params: tuple[Any, ...],
    *,
    source: str = "{} t",
    names: Sequence[str] = (),
) -> pa.Table:
    """Rows by COPY, which Arrow parses many times faster than a driver makes Python objects.

    Parameters
    ----------
    condition
        Of SQL's WHERE and what follows it; the table is ``t``, ``params`` fill its ``%s``.
    source
        Of SQL's FROM, the table's name in place of the braces.
    names
        Columns, in the schema's order; all when none are given.
    """
    import pyarrow as pa
    import pyarrow.csv

    schema = table.arrow()
    if names:
        schema = pa.schema([field for field in schema if field.name in names])
    columns = ", ".join(f't."{name.lower()}"' for name in schema.names)
    statement = (
        f"COPY (SELECT {columns} FROM {source.format(table.sql_name)} WHERE {condition})"  # noqa: S608
        " TO STDOUT (FORMAT csv)"
    )
    with link.cursor() as cursor, cursor.copy(statement.encode(), params) as stream:
        content = b"".join(stream)
    if not content:
        return schema.empty_table()
    return pyarrow.csv.read_csv(
        pa.BufferReader(content),
        read_options=pyarrow.csv.ReadOptions(column_names=schema.names),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=schema, true_values=["t"], false_values=["f"], null_values=[""],
            strings_can_be_null=True, quoted_strings_can_be_null=False,
        ),
    ).cast(schema)  # fmt: skip


def prepare(db: Database) -> None:
    """Make the tables, or bring them to this program's Felis file (which only ever gains columns)."""
    migrate(db, "level1", [_OUTBOX, _REJECTED, LEDGER, _ORBITS, _PRECOVERY, _PRECOVERED])
    ddl = level1_ddl()
    digest = hashlib.sha256(ddl.encode()).hexdigest()
    known = "SELECT 1 FROM level1.felis WHERE sha256 = %s"
    if db.execute(known, (digest,)):
        return
    with db.connection() as link:
        link.execute("LOCK TABLE level1.felis IN EXCLUSIVE MODE")
        if not link.execute(known, (digest,)).fetchone():
            for table in stored_tables():
                if table.partition:
                    cut_older(link, table, table.ddl())
                else:
                    link.execute(table.ddl().encode())
            link.execute("INSERT INTO level1.felis (sha256) VALUES (%s)", (digest,))


def _distances(rows: pa.Table, ra: float, dec: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    return separation_deg(ra, dec, rows.column("ra").to_numpy(), rows.column("dec").to_numpy())
