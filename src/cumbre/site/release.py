"""A small release of a site's own data: objects of its coadds and the visits that it archived."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.core.errors import NotFoundError, NoWorkFoundError
from cumbre.site.roles import site_database

if TYPE_CHECKING:
    from cumbre.core.configuration import Site
    from cumbre.stores.postgres import Database

TEMPLATES = "archive/templates/index.json"
_COLUMNS = [
    ("objectId", "long", "", "meta.id;meta.main", "Identifier: HEALPix pixel of order 29 of the position."),
    ("ra", "double", "deg", "pos.eq.ra;meta.main", "Right ascension, ICRS, of the brightest measurement."),
    ("dec", "double", "deg", "pos.eq.dec;meta.main", "Declination, ICRS."),
    ("band", "string", "", "meta.id;instr.bandpass", "Band of the coadd."),
    ("tile", "string", "", "meta.id", "Tile of the coadd."),
    ("detector", "string", "", "meta.id;instr.det", "Detector of the coadd."),
    ("x", "double", "pixel", "pos.cartesian.x", "Column in the coadd, 0-based."),
    ("y", "double", "pixel", "pos.cartesian.y", "Row in the coadd, 0-based."),
    ("psfFlux", "double", "nJy", "phot.flux.density", "Flux by the PSF."),
    ("psfFluxErr", "double", "nJy", "stat.error;phot.flux.density", "Error of psfFlux."),
    ("apFlux", "double", "nJy", "phot.flux.density", "Flux in a circle of 1.5 FWHM."),
    ("apFluxErr", "double", "nJy", "stat.error;phot.flux.density", "Error of apFlux."),
    ("mag", "double", "mag", "phot.mag", "AB magnitude of psfFlux."),
    ("snr", "double", "", "stat.snr", "psfFlux over its error."),
    ("halfLight", "double", "arcsec", "phys.angSize", "Radius of half the light."),
    ("elongation", "double", "", "phys.size.axisRatio", "Longer over shorter axis."),
    ("extendedness", "double", "", "src.class.starGalaxy", "0 as the PSF, 1 wider than it."),
    ("saturated", "boolean", "", "meta.code", "Its middle is saturated in every exposure."),
]
_LEVEL1 = (
    ("DiaObject", "diaObjectId", True),
    ("DiaSource", "diaSourceId", True),
    ("DiaForcedSource", "diaForcedSourceId", False),
)
"""Tables of Level 1 in a release, their keys, and whether they have a place on the sky."""
_VISITS = [
    ("visit", "long", "", "meta.id;meta.main", "Exposure id."),
    ("obsId", "string", "", "meta.id", "Name of the exposure."),
    ("band", "string", "", "meta.id;instr.bandpass", "Band."),
    ("expTime", "double", "s", "time.duration;obs.exposure", "Exposure time."),
    ("expMidptMJD", "double", "d", "time.epoch", "Middle of the exposure, MJD TAI."),
    ("ra", "double", "deg", "pos.eq.ra;meta.main", "Boresight, ICRS."),
    ("dec", "double", "deg", "pos.eq.dec;meta.main", "Boresight, ICRS."),
]


def make_release(site: Site, out: Path, name: str, *, progress: Callable[[int, int], None]) -> dict[str, int]:
    """Write the folder that ``cumbre release load`` takes: ``release.yaml`` and a Parquet file for each table.

    ``Object`` and ``Visit``, and of Level 1, as it is public now, ``DiaObject``, ``DiaSource`` and ``DiaForcedSource``
    with the light curves.

    Parameters
    ----------
    progress
        Called with (coadds done, coadds in all).

    Returns
    -------
    dict
        Rows of each table.

    Raises
    ------
    NotFoundError
        The site has no coadds.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    from cumbre.stores.files import write_atomic

    index = site.path(TEMPLATES)
    if not index.is_file():
        raise NotFoundError(
            f"{index}: the site has no coadds yet; they are made with its first night: cumbre night"
        )
    objects = _objects(index, progress)
    visits = _visits(site)
    out.mkdir(parents=True, exist_ok=True)
    rows = {}
    for table, content in (("Object", objects), ("Visit", visits)):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(content), sink)
        write_atomic(out / f"{table}.parquet", sink.getvalue().to_pybytes())
        rows[table] = len(next(iter(content.values())))
    rows |= write_level1(site_database(site), out)
    text = yaml.safe_dump(_description(site, name), sort_keys=False, allow_unicode=True, width=120)
    write_atomic(out / "release.yaml", text.encode())
    return rows


def _objects(index: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    from cumbre.catalogs.columns import hpx29
    from cumbre.orchestration.inputs import one_each, read_index
    from cumbre.payloads.exposure_file import load_exposure
    from cumbre.payloads.object_catalog import measure_objects, merge

    entries = one_each(read_index(index))
    parts = []
    for done, entry in enumerate(entries):
        progress(done, len(entries))
        try:
            part = measure_objects(load_exposure(index.parent / entry["path"]))
        except NoWorkFoundError:
            continue
        for key in ("tile", "band", "detector"):
            part[key] = np.full(part["ra"].size, entry[key], dtype=object)
        parts.append(part)
    progress(len(entries), len(entries))
    if not parts:
        raise NoWorkFoundError(f"{index}: no object in any of {len(entries)} coadds")
    by_band = {
        band: [p for p in parts if p["band"][0] == band]
        for band in dict.fromkeys(p["band"][0] for p in parts)
    }
    merged = [merge(group) for group in by_band.values()]
    out = {key: np.concatenate([part[key] for part in merged]) for key in merged[0]}
    out["objectId"] = hpx29(out["ra"], out["dec"])
    if len(by_band) > 1:  # one row an object and band: the same place in two bands needs two identifiers
        band_number = {band: number for number, band in enumerate(by_band)}
        out["objectId"] = out["objectId"] + (np.array([band_number[b] for b in out["band"]], np.int64) << 62)
    with np.errstate(invalid="ignore", divide="ignore"):
        out["mag"] = np.where(out["psfFlux"] > 0, -2.5 * np.log10(out["psfFlux"] / 3631e9), np.nan)
    return {column[0]: out[column[0]] for column in _COLUMNS}


def _visits(site: Site) -> dict[str, Any]:
    rows = site_database(site).execute(
        "SELECT coalesce(visit, exposure_id), min(obs_id), min(band), sum(exposure_s), (min(begin_tai) + max(end_tai)) / 2,"
        " min(ra), min(dec) FROM ledger.image WHERE ra IS NOT NULL AND dec IS NOT NULL AND exposure_id IS NOT NULL"
        " AND begin_tai IS NOT NULL GROUP BY instrument, coalesce(visit, exposure_id) ORDER BY min(begin_tai)"
    )
    from cumbre.core.time import mjd_from_seconds

    columns: list[list[Any]] = [[] for _ in _VISITS]
    for row in rows:
        middle = None if row[4] is None else mjd_from_seconds(row[4])
        for column, value in zip(columns, (*row[:4], middle, *row[5:]), strict=True):
            column.append(value)
    return {about[0]: column for about, column in zip(_VISITS, columns, strict=True)}


def _description(site: Site, name: str) -> dict[str, Any]:
    def table(
        title: str, text: str, columns: list[tuple[str, str, str, str, str]], key: str
    ) -> dict[str, Any]:
        made = []
        for column, datatype, unit, ucd, about in columns:
            required = column in (key, "ra", "dec")
            made.append(
                {"name": column, "datatype": datatype, "nullable": not required, "description": about}
                | ({"fits:tunit": unit} if unit else {})
                | {"ivoa:ucd": ucd, "tap:principal": 1}
            )
        return {
            "name": title, "description": text, "primaryKey": key, "cumbre:position": {"ra": "ra", "dec": "dec"},
            "columns": made,
        }  # fmt: skip

    return {
        "name": name,
        "description": f"Static objects of the coadds of {site.config.observatory.name}, and the visits archived so far.",
        "tables": [
            table("Object", "Objects of the coadds, each once in a band.", _COLUMNS, "objectId"),
            table("Visit", "Visits of the archive.", _VISITS, "visit"),
            *level1_descriptions(),
        ],
    }


def write_level1(db: Database, out: Path) -> dict[str, int]:
    """Public rows of Level 1, sources before objects so that each finds its own; rows of each table."""
    from cumbre.access.snapshots import TABLES, write_public

    return {name: write_public(db, name, out / f"{name}.parquet", _level1_columns(name)) for name in TABLES}


def _level1_columns(name: str) -> list[str]:
    """Columns that a release takes: no times of the database, no pixel, which the loader makes itself."""
    from cumbre.access.published import site_tables
    from cumbre.access.releases.description import PIXEL

    table = site_tables().find("level1", name)
    return [c.name for c in table.columns if c.xtype != "timestamp" and c.name.lower() != PIXEL]


def level1_descriptions() -> list[dict[str, Any]]:
    """What a release says of the tables of Level 1."""
    from cumbre.access.published import site_tables
    from cumbre.access.snapshots import CURVES

    described = []
    for name, key, placed in _LEVEL1:
        table = site_tables().find("level1", name)
        columns = []
        for wanted in _level1_columns(name):
            column = table.column(wanted)
            assert column is not None
            required = wanted == key or (placed and wanted in ("ra", "dec"))
            columns.append(
                {"name": wanted, "datatype": "string" if column.datatype == "char" else column.datatype,
                 "nullable": not required, "description": column.description}
                | ({"fits:tunit": column.unit} if column.unit else {}) | ({"ivoa:ucd": column.ucd} if column.ucd else {})
                | {"tap:principal": int(column.principal)}
            )  # fmt: skip
        about: dict[str, Any] = {"name": name, "description": table.description, "primaryKey": key}
        if placed:
            about["cumbre:position"] = {"ra": "ra", "dec": "dec"}
        if (curve := CURVES.get(name)) is not None:
            about["cumbre:light_curve"] = {
                "object": curve.object, "time": curve.time, "band": curve.band, "flux": curve.flux,
                "fluxErr": curve.flux_error, "kind": curve.kind,
            }  # fmt: skip
        described.append(about | {"columns": columns})
    return described
