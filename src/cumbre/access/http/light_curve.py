"""Light curves of objects: everything that was ever measured at their places, in the order of time."""

# ruff: noqa: S608 (ADQL of numbers that were checked)
from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from cumbre.access.http.base import MAX_LINKS_BYTES, UsageError, in_pool, read_parameters
from cumbre.access.http.tap import Question, Tap, user_of
from cumbre.access.identity import Principal
from cumbre.access.query import run
from cumbre.access.results import find_format
from cumbre.access.tables import CurveColumns, Table
from cumbre.core.errors import NotFoundError

MAX_OBJECTS = 1000
_COLUMNS = (
    "diaObjectId, midpointMjdTai, band, psfFlux, psfFluxErr, scienceFlux, scienceFluxErr, visit, detector"
)
_PARTS = (("DiaSource", "detection", "diaSourceId"), ("DiaForcedSource", "forced", "diaForcedSourceId"))


@dataclass(frozen=True)
class LightCurves:
    """Light curves of the objects of Level 1, and of releases and snapshots by their name."""

    tap: Tap

    async def curve(self, request: Request, who: Principal) -> Response:
        """``/lightcurve/ID``, or ``/lightcurve?ID=…`` with many; BAND chooses, RESPONSEFORMAT as in TAP.

        With RELEASE, or as ``/lightcurve/RELEASE/ID``, of that release, which stays as it is.
        """
        parameters = await read_parameters(request, limit_bytes=MAX_LINKS_BYTES)
        texts = parameters.values("ID")
        if "object" in request.path_params:
            texts.append(request.path_params["object"])
        ids = list(dict.fromkeys(_number(text) for text in texts))
        if not 1 <= len(ids) <= MAX_OBJECTS:
            raise UsageError(
                f"{len(ids)} objects: expected ID with a diaObjectId, 1 to {MAX_OBJECTS} of them"
            )
        form = find_format(parameters.value("RESPONSEFORMAT"))
        release = request.path_params.get("release") or parameters.value("RELEASE")
        bands = _bands(parameters.values("BAND"))
        if release is None:
            adql, checks = curve_adql(ids, bands), [("level1.DiaObject", "diaObjectId")]
        else:
            tables = await in_pool(self.tap.pool, self._of_release, release, who)
            adql, checks = release_adql(tables, ids, bands), _objects_of(tables)
        question = Question(adql, form, "1.4", parameters.integer("MAXREC"))
        if checks:
            await in_pool(self.tap.pool, self._check, checks, ids, who)
        return await self.tap.answer(request, question, who)

    def _of_release(self, name: str, who: Principal) -> list[Table]:
        """All tables of a release that somebody may read.

        Raises
        ------
        NotFoundError
            There is none of that name, or none of its tables has points of light curves.
        """
        tables = [table for table in self.tap.tables.visible(user_of(who)) if table.schema == name.lower()]
        if not any(table.curve for table in tables):
            raise NotFoundError(f"release {name[:40]!r}: not there, or it has no light curves")
        return tables

    def _check(self, places: list[tuple[str, str]], ids: list[int], who: Principal) -> None:
        """See that there is one of the objects; what is not released looks as if it were not there."""
        for table, column in places:
            found = run(
                f'SELECT TOP 1 "{column}" FROM {table} WHERE "{column}" IN ({_listed(ids)})',
                tables=self.tap.tables, engines=self.tap.engines, user=user_of(who),
            ).read_all()  # fmt: skip
            if found.num_rows:
                return
        shown = f"object {ids[0]}" if len(ids) == 1 else f"{len(ids)} objects"
        raise NotFoundError(f"{shown}: not there, or not released to you yet")


def _number(text: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise UsageError(f"ID = {text[:40]!r}: expected a diaObjectId, a whole number")
    return int(text)


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids))


def _bands(bands: list[str]) -> list[str]:
    for band in bands:
        if not (band.isascii() and band.replace("_", "").isalnum() and len(band) <= 32):
            raise UsageError(f"BAND = {band[:40]!r}: expected the name of a band")
    return bands


def curve_adql(ids: list[int], bands: list[str]) -> str:
    """The query of Level 1: detections, and the fluxes measured where nothing was detected."""
    where = f"diaObjectId IN ({_listed(ids)}) AND timeWithdrawnMjdTai IS NULL"
    if bands:
        where += f" AND band IN ({_quoted(bands)})"
    parts = [
        f"SELECT {_COLUMNS}, '{kind}' AS measurement, {number} AS sourceId FROM level1.{table} WHERE {where}"
        for table, kind, number in _PARTS
    ]
    return " UNION ALL ".join(parts) + " ORDER BY diaObjectId, midpointMjdTai"


def _quoted(bands: list[str]) -> str:
    return ", ".join(repr(band) for band in bands)


def _objects_of(tables: list[Table]) -> list[tuple[str, str]]:
    """Tables that list the objects of the light curves, and the column of each."""
    names = {table.curve.object for table in tables if table.curve is not None}
    listed = [table for table in tables if table.curve is None and table.position is not None]
    return [(_name(table), name) for name in sorted(names) for table in listed if table.column(name)]


def _name(table: Table) -> str:
    return f'"{table.schema}"."{table.name}"'


def release_adql(tables: list[Table], ids: list[int], bands: list[str]) -> str:
    """The query of a release: every table with points of light curves; columns have the names of the first one."""
    parts = []
    first: CurveColumns | None = None
    for table in tables:
        curve = table.curve
        if curve is None:
            continue
        first = first or curve
        when, joined = "s", ""
        if curve.visits:
            when = "v"
            joined = f' JOIN "{table.schema}"."{curve.visits}" AS v ON s."{curve.visit}" = v."{curve.visit}"'
        where = f's."{curve.object}" IN ({_listed(ids)})'
        if table.column("timeWithdrawnMjdTai"):
            where += ' AND s."timeWithdrawnMjdTai" IS NULL'
        if bands:
            where += f' AND {when}."{curve.band}" IN ({_quoted(bands)})'
        parts.append(
            f'SELECT s."{curve.object}" AS "{first.object}", {when}."{curve.time}" AS "{first.time}",'
            f' {when}."{curve.band}" AS "{first.band}", s."{curve.flux}" AS "{first.flux}",'
            f" s.\"{curve.flux_error}\" AS \"{first.flux_error}\", '{curve.kind}' AS measurement, '{table.schema}' AS release"
            f" FROM {_name(table)} AS s{joined} WHERE {where}"
        )
    assert first is not None
    return " UNION ALL ".join(parts) + f' ORDER BY "{first.object}", "{first.time}"'
