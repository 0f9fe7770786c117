"""The tables that every site publishes: Level 1, images, the plan, the ledger; each as its reader may see it.

Rows of images that are still under embargo are not there for those without the right: every table is a view for
each right, and all views compare with the one row that says what is released (``access.horizon``). Which view is
asked follows from who asks, before any query is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import yaml

from cumbre.access.engines.postgres_functions import prepare as prepare_functions
from cumbre.access.identity import COLLABORATION, EMBARGO
from cumbre.access.tables import Column, ForeignKey, Position, Schema, Table, Tables
from cumbre.access.user import User
from cumbre.catalogs.schema import Column as StoredColumn
from cumbre.catalogs.schema import level1_tables
from cumbre.core.time import leap_seconds
from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Database

PLAN_STEPS = (
    """
    CREATE SCHEMA IF NOT EXISTS access;
    CREATE TABLE access.plan (
        group_id text PRIMARY KEY,
        announced_tai float8 NOT NULL,
        start_tai float8 NOT NULL,
        duration_s float8,
        exposures int,
        instrument text NOT NULL,
        survey text NOT NULL DEFAULT '',
        filter text NOT NULL DEFAULT '',
        ra float8,
        "dec" float8,
        rotation float8,
        region float8[],
        fov_deg float8,
        em_min float8,
        em_max float8,
        cancelled boolean NOT NULL DEFAULT false
    );
    CREATE INDEX plan_start ON access.plan (start_tai);
    CREATE TABLE access.setting (name text PRIMARY KEY, value text NOT NULL);
    """,
    """
    CREATE INDEX image_region ON access.image USING gist (adql.region_key(region));
    CREATE INDEX plan_region ON access.plan USING gist (adql.region_key(region));
    """,
    """
    CREATE TABLE access.calibration (
        instrument text NOT NULL,
        detector int NOT NULL,
        band text NOT NULL,
        kind text NOT NULL,
        detector_name text NOT NULL,
        file text NOT NULL,
        byte_size bigint NOT NULL,
        sha256 text NOT NULL,
        valid_begin_tai float8 NOT NULL,
        valid_end_tai float8 NOT NULL DEFAULT 'infinity',
        recorded_tai float8 NOT NULL,
        PRIMARY KEY (instrument, detector, band, kind, valid_begin_tai)
    );
    """,
    """
    ALTER TABLE access.plan DROP CONSTRAINT plan_pkey;
    ALTER TABLE access.plan ALTER COLUMN group_id DROP NOT NULL, ADD COLUMN plan_id text;
    UPDATE access.plan SET plan_id = group_id;
    ALTER TABLE access.plan ALTER COLUMN plan_id SET NOT NULL, ADD PRIMARY KEY (plan_id), ADD UNIQUE (group_id);
    """,
)
_POWER = "CASE WHEN em_max > em_min THEN (em_min + em_max) / (2 * (em_max - em_min)) END"
_VOTABLE = {
    "long": ("long", None), "int": ("int", None), "float": ("float", None), "double": ("double", None),
    "boolean": ("boolean", None), "string": ("char", "*"), "timestamp": ("char", "*"),
}  # fmt: skip
_SCHEMAS = (
    Schema("level1", "Prompt products: sources of difference images and the objects they belong to."),
    Schema("ivoa", "Images and the plan of observations as the Virtual Observatory describes them."),
    Schema("calibration", "Calibrations that images are processed with."),
    Schema("ledger", "Where every image is on its way from the shutter to the archive."),
)
_KEYS = (
    ForeignKey("diasource_object", "level1.DiaSource", "level1.DiaObject", (("diaObjectId", "diaObjectId"),)),
    ForeignKey(
        "forced_object", "level1.DiaForcedSource", "level1.DiaObject", (("diaObjectId", "diaObjectId"),)
    ),
    ForeignKey("hop_image", "ledger.hop", "ledger.image", (("obs_id", "obs_id"),)),
)


@dataclass(frozen=True, slots=True)
class _View:
    """A published table: its SQL without embargo, and what time decides about a row."""

    table: Table
    select: str
    begin_tai: str
    """SQL of the time that is compared with the horizon; empty for public at once."""


def prepare(db: Database, *, observatory: str, authority: str) -> None:
    """Make tables and views of the published tables; the tables they show must be there.

    Parameters
    ----------
    observatory
        Name for ``facility_name``.
    authority
        Of the identifiers of data sets, ``ivo://AUTHORITY?…``.
    """
    prepare_functions(db)
    migrate(db, "access_published", PLAN_STEPS)
    for name, value in (("observatory", observatory), ("authority", authority)):
        set_setting(db, name, value)
    with db.connection() as link:
        # views hold no data: made anew, they always fit this program and this database
        link.execute("SELECT pg_advisory_xact_lock(hashtext('cumbre.access.published'))")
        for view in _views():
            for right, limit in (
                ("embargo", ""),
                (COLLABORATION, "collaboration_tai"),
                ("public", "public_tai"),
            ):
                name = _view_name(view.table, right)
                statement = view.select
                if limit and view.begin_tai:
                    word = "AND" if " WHERE " in statement else "WHERE"
                    statement += f" {word} ({view.begin_tai}) <= (SELECT {limit} FROM access.horizon)"  # noqa: S608
                link.execute(f"DROP VIEW IF EXISTS {name}".encode())
                link.execute(f"CREATE VIEW {name} AS {statement}".encode())


def set_setting(db: Database, name: str, value: str) -> None:
    """Keep a value that the views show (observatory, authority, base_url)."""
    db.execute(
        "INSERT INTO access.setting VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
        " WHERE access.setting.value <> excluded.value",
        (name, value),
    )


def site_tables() -> Tables:
    """Everything a site publishes; what a user sees of it depends on the user."""
    return Tables(schemas=list(_SCHEMAS), keys=list(_KEYS), providers=[_for_user])


def _for_user(user: User) -> Iterator[Table]:
    from dataclasses import replace

    right = EMBARGO if EMBARGO in user.groups else COLLABORATION if COLLABORATION in user.groups else "public"
    for view in _views():
        yield replace(view.table, source=_view_name(view.table, right))


def _view_name(table: Table, right: str) -> str:
    return f"access.{table.schema}_{table.name}_{right}".lower()


@lru_cache(maxsize=1)
def _standard_columns() -> dict[str, tuple[Column, ...]]:
    text = resources.files("cumbre.access").joinpath("ivoa_tables.yaml").read_text(encoding="utf-8")
    out = {}
    for name, entries in yaml.safe_load(text).items():
        columns = []
        for entry in entries:
            label, kind, size, xtype, unit, ucd, utype, description = (
                part.strip() for part in entry.split("|")
            )
            columns.append(
                Column(
                    label.lstrip("*"), kind, size or None, xtype, unit, ucd,
                    f"obscore:{utype}" if utype and name == "obscore" else utype, description, label.startswith("*"),
                    label.lstrip("*") in ("obs_id", "t_min", "s_region"), bool(utype),
                    "", "polygon" if xtype == "adql:REGION" else "",
                )
            )  # fmt: skip
        out[name] = tuple(columns)
    return out


def mjd_utc(tai_s: str) -> str:
    """SQL: the MJD in UTC, which the standards want, of TAI seconds in an expression."""
    steps = reversed([step for step in leap_seconds() if step[0] > 0])
    whens = " ".join(f"WHEN {tai_s} >= {start} THEN {offset}" for start, offset in steps)
    return f"(({tai_s} - CASE {whens} ELSE 10 END) / 86400.0 + 40587.0)"


@lru_cache(maxsize=1)
def _views() -> tuple[_View, ...]:
    setting = "(SELECT value FROM access.setting WHERE name = '{}')".format
    columns = _standard_columns()
    obscore = f"""SELECT 'image'::text AS dataproduct_type, calib_level, instrument || '/' || product AS obs_collection,
        obs_id, 'ivo://' || {setting("authority")} || '?' || image_id AS obs_publisher_did,
        coalesce({setting("base_url")}, '') || '/datalink/links?ID=ivo://' || {setting("authority")} || '?' || image_id
        AS access_url,
        'application/x-votable+xml;content=datalink'::text AS access_format,
        (byte_size + 1023) / 1024 AS access_estsize, nullif(target, '') AS target_name, ra AS s_ra, "dec" AS s_dec,
        fov_deg AS s_fov, region AS s_region, NULL::float8 AS s_resolution, nx::bigint AS s_xel1, ny::bigint AS s_xel2,
        {mjd_utc("begin_tai")} AS t_min, {mjd_utc("end_tai")} AS t_max, exposure_s AS t_exptime,
        exposure_s AS t_resolution, 1::bigint AS t_xel, em_min, em_max, {_POWER} AS em_res_power, 1::bigint AS em_xel,
        'phot.count'::text AS o_ucd, NULL::text AS pol_states, NULL::bigint AS pol_xel,
        {setting("observatory")} AS facility_name, instrument AS instrument_name, product AS dataproduct_subtype,
        pixel_arcsec AS s_pixel_scale, hpx29 FROM access.image WHERE image_type = 'OBJECT'"""  # noqa: S608 (ours)
    obsplan = f"""SELECT {mjd_utc("p.announced_tai")} AS t_planning, nullif(p.survey, '') AS target_name,
        p.plan_id AS obs_id, p.instrument AS obs_collection, p.ra AS s_ra, p."dec" AS s_dec, p.fov_deg AS s_fov,
        p.region AS s_region, NULL::float8 AS s_resolution,
        {mjd_utc("coalesce(i.begin_tai, p.start_tai)")} AS t_min,
        {mjd_utc("coalesce(i.end_tai, p.start_tai + p.duration_s)")} AS t_max,
        coalesce(i.exposure_s, p.duration_s) AS t_exptime, coalesce(i.exposure_s, p.duration_s) AS t_resolution,
        p.em_min, p.em_max, {_POWER} AS em_res_power, 'phot.count'::text AS o_ucd, NULL::text AS pol_states,
        NULL::int AS pol_xel, {setting("observatory")} AS facility_name, p.instrument AS instrument_name,
        p.duration_s AS t_plan_exptime, 'Fixed'::text AS category, 1::int AS priority,
        CASE WHEN i.n_ended >= coalesce(nullif(p.exposures, 0), 1) THEN 'Performed' WHEN p.cancelled THEN 'Aborted'
        WHEN p.group_id IS NULL THEN 'Planned' ELSE 'Scheduled' END
        AS execution_status, 'Sidereal'::text AS tracking_type, p.group_id
        FROM access.plan p LEFT JOIN (SELECT group_id, min(begin_tai) AS begin_tai, max(end_tai) AS end_tai,
        sum(exposure_s) AS exposure_s,
        count(end_tai) AS n_ended FROM ledger.image WHERE group_id <> '' GROUP BY group_id) i USING (group_id)"""  # noqa: S608
    standard = (
        _View(
            Table("ivoa", "obscore", columns["obscore"], "Every image of the sky (ObsCore 1.1).",
                  position=Position("s_ra", "s_dec", "hpx29"), utype="ivo://ivoa.net/std/ObsCore#core-1.1"),
            obscore, "CASE WHEN release_at_once THEN '-infinity'::float8 ELSE begin_tai END",
        ),
        _View(
            Table("ivoa", "obsplan", columns["obsplan"], "Planned and performed observations (ObsLocTAP 1.0).",
                  position=Position("s_ra", "s_dec"), utype="ivo://ivoa.net/std/obsloctap#table-1.0"),
            obsplan, "",
        ),
        _View(
            Table("ledger", "image", columns["ledger_image"], "One row for each exposure.",
                  position=Position("ra", "dec")),
            f"SELECT {_names(columns['ledger_image'])} FROM ledger.image",  # noqa: S608
            "coalesce(begin_tai, '-infinity')",
        ),
        _View(
            Table("ledger", "hop", columns["ledger_hop"], "One row for each step of each detector's image."),
            f"SELECT {_names(columns['ledger_hop'], 'h.')} FROM ledger.hop h JOIN ledger.image i USING (obs_id)",  # noqa: S608
            "coalesce(i.begin_tai, '-infinity')",
        ),
        _View(
            Table("calibration", "record", columns["calibration_record"],
                  "One row for each calibration of a detector and the time in which it held."),
            f"SELECT {_names(columns['calibration_record'][:-2])},"  # noqa: S608
            " CASE WHEN valid_begin_tai > '-infinity' THEN valid_begin_tai END AS valid_begin_tai,"
            " CASE WHEN valid_end_tai < 'infinity' THEN valid_end_tai END AS valid_end_tai FROM access.calibration",
            "",
        ),
    )  # fmt: skip
    return (*_level1_views(), *standard)


def _level1_views() -> Iterator[_View]:
    times = {
        "DiaSource": "midpointmjdtai", "DiaForcedSource": "midpointmjdtai", "DiaObject": "firstdiasourcemjdtai",
    }  # fmt: skip
    for stored in level1_tables().values():
        if not stored.stored or stored.name not in times:
            continue
        indexed = {index[1][0] for index in stored.indexes} | {stored.primary_key[0]}
        columns = tuple(_level1_column(column, column.name in indexed) for column in stored.columns)
        names = {column.name for column in stored.columns}
        position = Position("ra", "dec", "hpx29" if "hpx29" in names else "") if "ra" in names else None
        chosen = ", ".join(f'"{column.sql_name}"' for column in stored.columns)
        time = f'(coalesce("{times[stored.name]}", 0) - 40587.0) * 86400.0'
        yield _View(
            Table("level1", stored.name, columns, stored.description, position=position),
            f"SELECT {chosen} FROM {stored.sql_name}", time,  # noqa: S608
        )  # fmt: skip


def _level1_column(column: StoredColumn, indexed: bool) -> Column:
    kind, size = _VOTABLE[column.datatype]
    stamp = column.datatype == "timestamp"
    return Column(
        column.name, kind, size, "timestamp" if stamp else "", column.unit, column.ucd, "", column.description,
        column.name in PRINCIPAL, indexed, False, column.sql_name, "timestamptz" if stamp else "",
    )  # fmt: skip


PRINCIPAL = {
    "diaSourceId", "diaObjectId", "visit", "detector", "midpointMjdTai", "ra", "dec", "band", "psfFlux", "psfFluxErr",
    "reliability", "snr", "nDiaSources", "firstDiaSourceMjdTai", "lastDiaSourceMjdTai",
}  # fmt: skip
"""Columns of Level 1 that are worth showing first."""


def _names(columns: tuple[Column, ...], prefix: str = "") -> str:
    return ", ".join(f'{prefix}"{column.name}"' for column in columns)
