"""The HTTP face in OpenAPI 3.1, for programs that make clients or tests of it: ``/openapi.json``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from cumbre.access.http.base import VOTABLE_MIME, XML_MIME
from cumbre.access.http.sia import PARAMETERS as SIA_PARAMETERS
from cumbre.access.results import FORMATS

_TEXT: dict[str, Any] = {"type": "string"}
_TEXTS: dict[str, Any] = {"type": "array", "items": _TEXT, "minItems": 1}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 10**9}
_TABLES = tuple(form.media_type for form in FORMATS)
_PLAIN = ("text/plain",)
_JSON = ("application/json",)
_VOTABLE = (VOTABLE_MIME,)
_XML = (XML_MIME,)


def _degrees(low: float, high: float) -> dict[str, Any]:
    return {"type": "number", "minimum": low, "maximum": high}


def _shape(words: int, example: str) -> dict[str, Any]:
    return {
        "type": "array",
        "items": {"type": "string", "examples": [example]},
        "minItems": 0,
        "maxItems": words,
    }


_FORMAT: dict[str, Any] = {"type": "string", "enum": [alias for form in FORMATS for alias in form.aliases]}
_QUERY = {
    "QUERY": _TEXT, "LANG": {"type": "string", "enum": ["ADQL", "ADQL-2.0", "ADQL-2.1"]}, "RESPONSEFORMAT": _FORMAT,
    "MAXREC": _COUNT, "RUNID": _TEXT, "UPLOAD": _TEXT,
}  # fmt: skip
_CUT = {
    "ID": _TEXTS, "CIRCLE": _shape(5, "53.1 -27.8 0.01"), "POLYGON": _shape(5, "53 -28 53.1 -28 53.1 -27.9"),
    "POS": _shape(5, "RANGE 53 53.1 -28 -27.9"), "TIME": _shape(5, "61000 62000"), "BAND": _shape(5, "5e-7 7e-7"),
    "POL": _shape(5, "I"), "CUTOUTDETAIL": _TEXT, "COMBINE": _TEXT, "RESPONSEFORMAT": _TEXT,
}  # fmt: skip


@dataclass(frozen=True)
class _Operation:
    """One path: what it is for, its parameters, and the media types of its answers."""

    path: str
    summary: str
    parameters: dict[str, dict[str, Any]]
    required: tuple[str, ...] = ()
    answers: tuple[str, ...] = _TABLES
    errors: tuple[str, ...] = _VOTABLE
    methods: tuple[str, ...] = ("get", "post")
    status: tuple[int, ...] = (200,)


_OPERATIONS = (
    _Operation("/tap/sync", "A query in ADQL, answered at once", _QUERY, ("QUERY",)),
    _Operation(
        "/tap/async", "A query in ADQL as a job", _QUERY | {"PHASE": {"type": "string", "enum": ["RUN"]}},
        answers=_XML, status=(303,), methods=("post",),
    ),
    _Operation(
        "/tap/async", "One's jobs",
        {"PHASE": _shape(3, "COMPLETED"), "AFTER": _TEXT, "LAST": {"type": "integer", "minimum": 1, "maximum": 1000}},
        answers=_XML, methods=("get",),
    ),
    _Operation("/tap/async/{job}", "A job", {"job": _TEXT, "WAIT": _COUNT}, ("job",), _XML, methods=("get",)),
    _Operation("/tap/tables", "Tables and columns", {"DETAIL": {"type": "string", "enum": ["min", "max"]}},
               answers=_XML, errors=(*_VOTABLE, *_PLAIN), methods=("get",)),
    _Operation("/tap/tables/{table}", "One table", {"table": _TEXT}, ("table",), _XML, methods=("get",)),
    _Operation("/tap/capabilities", "What TAP can do, and the limits of who asks", {}, answers=_XML, errors=_PLAIN,
               methods=("get",)),
    _Operation("/tap/availability", "Whether it works", {}, answers=_XML, errors=_PLAIN, methods=("get",)),
    _Operation("/tap/examples", "Queries to begin with", {}, answers=("application/xhtml+xml",), methods=("get",)),
    *(
        _Operation(
            path, "Rows near a position",
            {"RA": _degrees(0, 360), "DEC": _degrees(-90, 90), "SR": _degrees(0, 180), "MAXREC": _COUNT,
             "VERB": {"type": "integer", "minimum": 1, "maximum": 3}, "RESPONSEFORMAT": _FORMAT} | own,
            ("RA", "DEC", "SR", *own),
        )
        for path, own in (("/cone", {}), ("/cone/{table}", {"table": _TEXT}))
    ),
    _Operation(
        "/lightcurve", "Light curves of objects",
        {"ID": _TEXTS, "RELEASE": _TEXT, "BAND": _shape(6, "r"), "MAXREC": _COUNT, "RESPONSEFORMAT": _FORMAT}, ("ID",),
    ),
    _Operation(
        "/lightcurve/{object}", "Light curve of an object",
        {"object": _COUNT, "RELEASE": _TEXT, "BAND": _shape(6, "r"), "MAXREC": _COUNT, "RESPONSEFORMAT": _FORMAT},
        ("object",), methods=("get",),
    ),
    _Operation(
        "/lightcurve/{release}/{object}", "Light curve of an object of a release",
        {"release": _TEXT, "object": _COUNT, "BAND": _shape(6, "r"), "MAXREC": _COUNT, "RESPONSEFORMAT": _FORMAT},
        ("release", "object"), methods=("get",),
    ),
    _Operation(
        "/sia/query", "Search of images",
        {name: _shape(5, "") for name in SIA_PARAMETERS} | {"MAXREC": _COUNT, "RESPONSEFORMAT": _FORMAT},
        errors=(*_VOTABLE, *_PLAIN),
    ),
    _Operation("/soda/sync", "Parts of images", _CUT, ("ID",), ("application/fits", "image/png"), _PLAIN,
               status=(200, 204)),
    _Operation("/soda/async", "Parts of images as a job", _CUT | {"PHASE": {"type": "string", "enum": ["RUN"]}}, (),
               _XML, _PLAIN, ("post",), (303,)),
    _Operation("/datalink/links", "What belongs to images", {"ID": _TEXTS, "MAXREC": _COUNT, "RESPONSEFORMAT": _TEXT},
               (), ("application/x-votable+xml;content=datalink",)),
    _Operation("/files/{image}", "An image as a file", {"image": _TEXT}, ("image",), ("application/fits",), _PLAIN,
               ("get",), (200, 206)),
    _Operation(
        "/alerts/{alert}", "An alert",
        {"alert": _COUNT, "RESPONSEFORMAT": {"type": "string", "enum": ["avro", "json"]}}, ("alert",),
        ("application/vnd.apache.avro", "application/json"), _PLAIN, ("get",),
    ),
    _Operation("/butler/butler.yaml", "How a client of the middleware reaches the repository", {}, (), _JSON, _JSON, ("get",)),
    _Operation("/butler/v1/dataset/{id}/download", "The file of a data set", {"id": _TEXT}, ("id",),
               ("application/octet-stream",), _JSON, ("get",)),
    _Operation("/hips/hipslist", "Lists of HiPS", {}, (), _PLAIN, _PLAIN, ("get",)),
)  # fmt: skip
_ERRORS = {
    "400": "The request is wrong; the document says what.", "401": "The token is not valid.",
    "403": "The token does not allow it.", "404": "There is nothing, or it is not released to you.",
    "409": "It does not fit what is there.", "413": "Too large.", "416": "No such part of the file.",
    "429": "Too many requests in this minute; Retry-After says when.", "503": "Busy; Retry-After says when.",
}  # fmt: skip


def openapi(base: str) -> dict[str, Any]:
    """The description; ``base`` is the address of the site."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in _OPERATIONS:
        for method in operation.methods:
            paths.setdefault(operation.path, {})[method] = _described(operation, method)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cumbre: data access",
            "version": version("cumbre"),
            "description": "TAP 1.1, SIA 2.0, SODA 1.0, DataLink 1.1 and cone search of the IVOA, and what goes beyond. "
            "Names of parameters are taken in capitals and small letters.",
        },
        "servers": [{"url": base}],
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _described(operation: _Operation, method: str) -> dict[str, Any]:
    in_path = [name for name in operation.parameters if f"{{{name}}}" in operation.path]
    others = {name: schema for name, schema in operation.parameters.items() if name not in in_path}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": operation.parameters[name]}
        for name in in_path
    ]
    out: dict[str, Any] = {"summary": operation.summary}
    needed = [name for name in operation.required if name in others]
    if method == "get":
        parameters += [
            {"name": name, "in": "query", "required": name in needed, "schema": schema}
            for name, schema in others.items()
        ]
    else:
        form = {"type": "object", "properties": others, "required": needed}
        out["requestBody"] = {
            "required": bool(needed), "content": {"application/x-www-form-urlencoded": {"schema": form}}
        }  # fmt: skip
    good = {str(code): {"description": operation.summary, "content": _content(operation.answers)}
            for code in operation.status}  # fmt: skip
    for empty in ("204", "303"):
        if empty in good:
            good[empty] = {"description": "Nothing in common." if empty == "204" else "See the job."}
    bad = {
        code: {"description": words, "content": _content(operation.errors)} for code, words in _ERRORS.items()
    }
    return out | {"parameters": parameters, "responses": good | bad}


def _content(kinds: tuple[str, ...]) -> dict[str, Any]:
    return {kind: {} for kind in kinds}
