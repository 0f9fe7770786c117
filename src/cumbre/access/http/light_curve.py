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
from cumbre.core.errors import NotFoundError

MAX_OBJECTS = 1000
_COLUMNS = (
    "diaObjectId, midpointMjdTai, band, psfFlux, psfFluxErr, scienceFlux, scienceFluxErr, visit, detector"
)
_PARTS = (("DiaSource", "detection", "diaSourceId"), ("DiaForcedSource", "forced", "diaForcedSourceId"))


@dataclass(frozen=True)
class LightCurves:
    """Light curves of the objects of Level 1."""

    tap: Tap

    async def curve(self, request: Request, who: Principal) -> Response:
        """``/lightcurve/ID``, or ``/lightcurve?ID=…`` with many; BAND chooses, RESPONSEFORMAT as in TAP."""
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
        question = Question(
            curve_adql(ids, parameters.values("BAND")), form, "1.4", parameters.integer("MAXREC")
        )
        await in_pool(self.tap.pool, self._check, ids, who)
        return await self.tap.answer(request, question, who)

    def _check(self, ids: list[int], who: Principal) -> None:
        """See that there is one of the objects; what is not released looks as if it were not there."""
        found = run(
            f"SELECT TOP 1 diaObjectId FROM level1.DiaObject WHERE diaObjectId IN ({_listed(ids)})",
            tables=self.tap.tables, engines=self.tap.engines, user=user_of(who),
        ).read_all()  # fmt: skip
        if not found.num_rows:
            shown = f"object {ids[0]}" if len(ids) == 1 else f"{len(ids)} objects"
            raise NotFoundError(f"{shown}: not there, or not released to you yet")


def _number(text: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise UsageError(f"ID = {text[:40]!r}: expected a diaObjectId, a whole number")
    return int(text)


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids))


def curve_adql(ids: list[int], bands: list[str]) -> str:
    """The query: detections, and the fluxes measured where nothing was detected.

    Raises
    ------
    UsageError
        A band that cannot be the name of one.
    """
    where = f"diaObjectId IN ({_listed(ids)}) AND timeWithdrawnMjdTai IS NULL"
    if bands:
        for band in bands:
            if not (band.isascii() and band.replace("_", "").isalnum() and len(band) <= 32):
                raise UsageError(f"BAND = {band[:40]!r}: expected the name of a band")
        where += f" AND band IN ({', '.join(repr(band) for band in bands)})"
    parts = [
        f"SELECT {_COLUMNS}, '{kind}' AS measurement, {number} AS sourceId FROM level1.{table} WHERE {where}"
        for table, kind, number in _PARTS
    ]
    return " UNION ALL ".join(parts) + " ORDER BY diaObjectId, midpointMjdTai"
