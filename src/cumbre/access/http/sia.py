"""SIA 2.0: images by position, time, band and all the other parameters of the standard."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from cumbre.access.http.base import (
    VOTABLE_MIME,
    Parameters,
    UsageError,
    base_url,
    fault_text,
    read_parameters,
)
from cumbre.access.http.tap import Question, Tap
from cumbre.access.identity import AuthorizationError, Principal
from cumbre.access.images.shapes import Range, pos
from cumbre.access.results import find_format
from cumbre.access.results.services import Input, ServiceDescriptor
from cumbre.core.errors import CumbreError, UserError

MAX_VALUES = 200
MAXREC = 60_000
_TEXT_FORMATS = ("csv", "tsv", "text/csv", "text/tab-separated-values")
_INTERVALS = {
    # parameter: columns of the lower and the upper end
    "BAND": ("em_min", "em_max"),
    "TIME": ("t_min", "t_max"),
    "FOV": ("s_fov", "s_fov"),
    "SPATRES": ("s_resolution", "s_resolution"),
    "SPECRP": ("em_res_power", "em_res_power"),
    "EXPTIME": ("t_exptime", "t_exptime"),
    "TIMERES": ("t_resolution", "t_resolution"),
}
_TEXTS = {
    "ID": "obs_publisher_did",
    "COLLECTION": "obs_collection",
    "FACILITY": "facility_name",
    "INSTRUMENT": "instrument_name",
    "DPTYPE": "dataproduct_type",
    "TARGET": "target_name",
    "FORMAT": "access_format",
}
PARAMETERS = ("POS", *_INTERVALS, "POL", *_TEXTS, "CALIB")
_MEANING = {
    "POS": ("pos.outline;obs", "", "CIRCLE, RANGE or POLYGON and numbers (ICRS)"),
    "BAND": ("em.wl;stat.interval", "m", "Wavelength, or interval"),
    "TIME": ("time;stat.interval;obs.exposure", "d", "MJD (UTC), or interval"),
    "POL": ("meta.code;phys.polarization", "", "Polarization state"),
    "FOV": ("phys.angSize;instr.fov", "deg", "Size of the field, interval"),
    "SPATRES": ("pos.angResolution", "arcsec", "Angular resolution, interval"),
    "SPECRP": ("spect.resolution", "", "Resolving power, interval"),
    "EXPTIME": ("time.duration;obs.exposure", "s", "Exposure time, interval"),
    "TIMERES": ("time.resolution", "s", "Resolution in time, interval"),
    "ID": ("meta.ref.ivoid;meta.id", "", "Identifier of a data set"),
    "COLLECTION": ("meta.id", "", "Collection"),
    "FACILITY": ("meta.id;instr.tel", "", "Observatory"),
    "INSTRUMENT": ("meta.id;instr", "", "Camera"),
    "DPTYPE": ("meta.code.class", "", "Kind of data: image or cube"),
    "CALIB": ("meta.code;obs.calib", "", "Level of calibration, 0 to 4"),
    "TARGET": ("meta.id;src", "", "Name of the target"),
    "FORMAT": ("meta.code.mime", "", "Media type of the access URL"),
    "MAXREC": ("meta.number", "", "Most rows; 0 for this description"),
    "RESPONSEFORMAT": ("meta.code.mime", "", "Format of this table"),
}
_STATES = {"I", "Q", "U", "V", "RR", "LL", "RL", "LR", "XX", "YY", "XY", "YX", "POLI", "POLA"}


def _interval(name: str, text: str) -> str:
    words = text.split()
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or any(math.isnan(v) for v in numbers) or numbers[0] > numbers[-1]:
        raise UsageError(
            f"{name} = {text[:60]!r}: expected one number, or two with the smaller first (-Inf and +Inf are open)"
        )
    low, high = _INTERVALS[name]
    terms = [f"{high} IS NOT NULL"]
    if math.isfinite(numbers[0]):
        terms.append(f"{high} >= {numbers[0]!r}")
    elif numbers[0] > 0:
        return "1 = 0"
    if math.isfinite(numbers[-1]):
        terms.append(f"{low} <= {numbers[-1]!r}")
    elif numbers[-1] < 0:
        return "1 = 0"
    return "(" + " AND ".join(terms) + ")"


def _text(name: str, text: str) -> str:
    quoted = text.replace("'", "''")
    return f"{_TEXTS[name]} = '{quoted}'"


def _identifier(name: str, text: str) -> str:
    """Identifiers of the Virtual Observatory are the same in capital and small letters."""
    quoted = text.lower().replace("'", "''")
    return f"LOWER({_TEXTS[name]}) = '{quoted}'"


def _polarization(name: str, text: str) -> str:
    if text.upper() not in _STATES:
        raise UsageError(f"{name} = {text[:40]!r}: expected one of {', '.join(sorted(_STATES))}")
    return f"pol_states LIKE '%/{text.upper()}/%'"


def _calib(name: str, text: str) -> str:
    if text.strip() not in ("0", "1", "2", "3", "4"):
        raise UsageError(f"{name} = {text[:40]!r}: expected a level from 0 to 4")
    return f"calib_level = {int(text)}"


def _pos(name: str, text: str) -> str:
    del name
    shape = pos(text)
    if isinstance(shape, Range) and shape.is_everything():
        return "s_region IS NOT NULL"
    parts = shape.pieces() if isinstance(shape, Range) else [shape]
    return " OR ".join(f"1 = INTERSECTS(s_region, {part.adql()})" for part in parts)


_TERMS: dict[str, Callable[[str, str], str]] = {"POS": _pos, "POL": _polarization, "CALIB": _calib}
_TERMS.update(dict.fromkeys(_INTERVALS, _interval))
_TERMS.update(dict.fromkeys(_TEXTS, _text))
_TERMS["ID"] = _identifier


def sia_adql(parameters: Parameters) -> str:
    """The ADQL query of a request: OR within a parameter, AND across them.

    Raises
    ------
    UserError
        A value that cannot be understood, or too many of them.
    """
    conditions = []
    for name in PARAMETERS:
        values = parameters.values(name)
        if len(values) > MAX_VALUES:
            raise UsageError(f"{name} is given {len(values)} times: at most {MAX_VALUES} are taken")
        terms = [_TERMS[name](name, value.strip()) for value in values]
        if terms:
            conditions.append("(" + " OR ".join(terms) + ")")
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    return f"SELECT * FROM ivoa.obscore{where} ORDER BY t_min DESC, obs_publisher_did"  # noqa: S608 (ADQL, quoted)


@dataclass(frozen=True)
class Sia:
    """Image search of a site."""

    tap: Tap

    async def query(self, request: Request, who: Principal) -> Response:
        """``/sia/query``; errors are text when text was asked for."""
        parameters = await read_parameters(request)
        try:
            return await self._search(request, parameters, who)
        except AuthorizationError:
            raise
        except CumbreError as error:
            wanted = (parameters.values("RESPONSEFORMAT") or [""])[0].lower()
            if wanted.startswith(_TEXT_FORMATS):
                return fault_text(error)
            raise

    async def _search(self, request: Request, parameters: Parameters, who: Principal) -> Response:
        wanted = parameters.value("RESPONSEFORMAT") or "votable/td"
        maxrec = parameters.integer("MAXREC")
        try:
            adql = sia_adql(parameters)
        except UserError as error:
            raise UsageError(str(error)) from error
        question = Question(
            adql, find_format(wanted), "1.4", MAXREC if maxrec is None else min(maxrec, MAXREC)
        )
        services = [description(base_url(request, "sia"))]
        return await self.tap.answer(request, question, who, services=services)


def description(base: str) -> ServiceDescriptor:
    """The parameters, for programs; it is in every answer."""
    inputs = [
        Input(name, ucd=ucd, unit=unit, description=text) for name, (ucd, unit, text) in _MEANING.items()
    ]
    return ServiceDescriptor(
        "this", "this", "Search of images: values of one parameter are alternatives, all parameters must hold",
        f"{base}/query", tuple(inputs), "ivo://ivoa.net/std/SIA#query-2.0", VOTABLE_MIME, f"{base}/query?MAXREC=1",
    )  # fmt: skip
