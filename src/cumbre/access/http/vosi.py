"""VOSI 1.1: what a service can do, whether it is up, which tables it has; and the examples of TAP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from cumbre.access.http.base import lines, xml_attribute, xml_text
from cumbre.access.http.examples import Example
from cumbre.access.limits import Limits
from cumbre.access.results import FORMATS
from cumbre.access.tables import Column, Table, Tables
from cumbre.access.tap_schema import written
from cumbre.access.user import User

_HEAD = '<?xml version="1.0" encoding="UTF-8"?>'
_XSI = 'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"'
_CAPABILITIES = (
    '<vosi:capabilities xmlns:vosi="http://www.ivoa.net/xml/VOSICapabilities/v1.0"'
    ' xmlns:vr="http://www.ivoa.net/xml/VOResource/v1.0" xmlns:vs="http://www.ivoa.net/xml/VODataService/v1.1"'
    f' xmlns:tr="http://www.ivoa.net/xml/TAPRegExt/v1.0" {_XSI}>'
)
_FEATURES = "ivo://ivoa.net/std/TAPRegExt#features-"
LANGUAGE_FEATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "adqlgeo",
        ("AREA", "BOX", "CENTROID", "CIRCLE", "CONTAINS", "COORD1", "COORD2", "COORDSYS", "DISTANCE", "INTERSECTS",
         "POINT", "POLYGON"),
    ),
    ("adql-string", ("LOWER", "UPPER", "ILIKE")),
    ("adql-common-table", ("WITH",)),
    ("adql-sets", ("UNION", "EXCEPT", "INTERSECT")),
    ("adql-type", ("CAST",)),
    ("adql-unit", ("IN_UNIT",)),
    ("adql-offset", ("OFFSET",)),
)  # fmt: skip
OBSCORE, OBSPLAN = "ivoa.obscore", "ivoa.obsplan"


@dataclass(frozen=True, slots=True)
class Service:
    """One interface of a capability.

    Attributes
    ----------
    standard_id
        IVOA identifier of the standard.
    path
        Below the service's base URL; empty for the base itself.
    version
        Of the interface; empty for none.
    kind
        ``vs:ParamHTTP`` or ``vs:WebBrowser``.
    """

    standard_id: str
    path: str
    version: str = ""
    kind: str = "vs:ParamHTTP"
    use: str = "base"


def capabilities(base: str, services: Iterable[Service], first: Sequence[str] = ()) -> str:
    """The capabilities document of a service; ``first`` are ready-made capability elements."""
    out = [_HEAD, _CAPABILITIES, *first]
    for path, name in (("capabilities", "capabilities"), ("availability", "availability")):
        out += _capability(base, Service(f"ivo://ivoa.net/std/VOSI#{name}", path, use="full"))
    for service in services:
        out += _capability(base, service)
    return lines([*out, "</vosi:capabilities>"])


def _capability(base: str, service: Service) -> list[str]:
    url = f"{base}/{service.path}" if service.path else base
    version = f' version="{service.version}"' if service.version else ""
    return [
        f'<capability standardID="{service.standard_id}">',
        f'<interface xsi:type="{service.kind}" role="std"{version}>',
        f'<accessURL use="{service.use}">{xml_text(url)}</accessURL>',
        "</interface>",
        "</capability>",
    ]


def tap_capability(
    base: str, tables: Tables, user: User, job_limits: Limits, sync_limits: Limits, retention: timedelta,
    upload_bytes: int,
) -> list[str]:  # fmt: skip
    """The capability element of TAP with its language and its limits."""
    names = {table.full_name.lower() for table in tables.visible(user)}
    out = [
        '<capability standardID="ivo://ivoa.net/std/TAP" xsi:type="tr:TableAccess">',
        '<interface xsi:type="vs:ParamHTTP" role="std" version="1.1">',
        f'<accessURL use="base">{xml_text(base)}</accessURL>',
        "</interface>",
    ]
    if OBSCORE in names:
        out.append('<dataModel ivo-id="ivo://ivoa.net/std/ObsCore#core-1.1">ObsCore-1.1</dataModel>')
    if OBSPLAN in names:
        out.append('<dataModel ivo-id="ivo://ivoa.net/std/obsloctap#table-1.0">ObsLocTAP-1.0</dataModel>')
    out += ["<language>", "<name>ADQL</name>"]
    for version in ("2.1", "2.0"):
        out.append(f'<version ivo-id="ivo://ivoa.net/std/ADQL#v{version}">{version}</version>')
    out.append(
        "<description>ADQL 2.1 with all of its optional features (COALESCE too), and CASE.</description>"
    )
    for feature, forms in LANGUAGE_FEATURES:
        out.append(f'<languageFeatures type="{_FEATURES}{feature}">')
        out += [f"<feature><form>{form}</form></feature>" for form in forms]
        out.append("</languageFeatures>")
    out.append("</language>")
    for form in FORMATS:
        identifier = f" ivo-id={xml_attribute(form.standard_id)}" if form.standard_id else ""
        out += [f"<outputFormat{identifier}>", f"<mime>{xml_text(form.media_type)}</mime>"]
        out += [
            f"<alias>{xml_text(alias)}</alias>" for alias in form.aliases if alias != form.media_type.lower()
        ]
        out.append("</outputFormat>")
    keep = int(retention.total_seconds())
    out += [
        *(
            f'<uploadMethod ivo-id="ivo://ivoa.net/std/TAPRegExt#upload-{way}"/>'
            for way in ("inline", "http", "https")
        ),
        f"<retentionPeriod><default>{keep}</default><hard>{keep * 4}</hard></retentionPeriod>",
        (
            f"<executionDuration><default>{int(job_limits.seconds)}</default>"
            f"<hard>{int(job_limits.seconds)}</hard></executionDuration>"
        ),
        (
            f'<outputLimit><default unit="row">{min(sync_limits.rows, job_limits.rows)}</default>'
            f'<hard unit="row">{job_limits.rows}</hard></outputLimit>'
        ),
        (
            f'<uploadLimit><default unit="byte">{upload_bytes}</default>'
            f'<hard unit="byte">{upload_bytes}</hard></uploadLimit>'
        ),
        "</capability>",
    ]
    return out


def availability(up: bool, note: str, since: str) -> str:
    """Whether the service works."""
    return lines(
        [
            _HEAD,
            '<vosi:availability xmlns:vosi="http://www.ivoa.net/xml/VOSIAvailability/v1.0">',
            f"<vosi:available>{str(up).lower()}</vosi:available>",
            f"<vosi:upSince>{since}</vosi:upSince>",
            f"<vosi:note>{xml_text(note)}</vosi:note>",
            "</vosi:availability>",
        ]
    )


_TABLES = (
    'xmlns:vosi="http://www.ivoa.net/xml/VOSITables/v1.0"'
    f' xmlns:vs="http://www.ivoa.net/xml/VODataService/v1.1" {_XSI}'
)


def tableset(tables: Tables, user: User, *, columns: bool) -> str:
    """All visible tables, with or without their columns."""
    out = [_HEAD, f'<vosi:tableset {_TABLES} xsi:type="vs:TableSet">']
    visible = list(tables.visible(user))
    for schema in tables.visible_schemas(user):
        out += ["<schema>", f"<name>{xml_text(schema.name)}</name>"]
        if schema.description:
            out.append(f"<description>{xml_text(schema.description)}</description>")
        if schema.utype:
            out.append(f"<utype>{xml_text(schema.utype)}</utype>")
        for table in visible:
            if table.schema == schema.name:
                out += ['<table type="table">', *_table(table, tables, columns=columns), "</table>"]
        out.append("</schema>")
    return lines([*out, "</vosi:tableset>"])


def one_table(table: Table, tables: Tables) -> str:
    """One table with its columns."""
    head = f'<vosi:table {_TABLES} type="table" xsi:type="vs:Table">'
    return lines([_HEAD, head, *_table(table, tables, columns=True), "</vosi:table>"])


def _table(table: Table, tables: Tables, *, columns: bool) -> list[str]:
    out = [f"<name>{xml_text(table.full_name)}</name>"]
    if table.description:
        out.append(f"<description>{xml_text(table.description)}</description>")
    if table.utype:
        out.append(f"<utype>{xml_text(table.utype)}</utype>")
    if not columns:
        return out
    for column in table.columns:
        out += _column(column)
    for key in tables.keys:
        if key.from_table == table.full_name:
            out += ["<foreignKey>", f"<targetTable>{xml_text(key.target_table)}</targetTable>"]
            for source, target in key.pairs:
                out.append(
                    f"<fkColumn><fromColumn>{xml_text(source)}</fromColumn>"
                    f"<targetColumn>{xml_text(target)}</targetColumn></fkColumn>"
                )
            if key.description:
                out.append(f"<description>{xml_text(key.description)}</description>")
            out.append("</foreignKey>")
    return out


def _column(column: Column) -> list[str]:
    out = [
        f"<column{' std=' + chr(34) + 'true' + chr(34) if column.std else ''}>",
        f"<name>{xml_text(written(column.name))}</name>",
    ]
    for tag in ("description", "unit", "ucd", "utype"):
        if value := getattr(column, tag):
            out.append(f"<{tag}>{xml_text(value)}</{tag}>")
    size = f" arraysize={xml_attribute(column.arraysize)}" if column.arraysize else ""
    extended = f" extendedType={xml_attribute(column.xtype)}" if column.xtype else ""
    out.append(f'<dataType xsi:type="vs:VOTableType"{size}{extended}>{column.datatype}</dataType>')
    out += [
        f"<flag>{word}</flag>"
        for word, on in (("principal", column.principal), ("indexed", column.indexed))
        if on
    ]
    return [*out, "</column>"]


def examples_page(examples: Sequence[Example], base: str) -> str:
    """The examples by DALI: a page for people, marked up for programs."""
    out = [
        "<!DOCTYPE html>",
        (
            '<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8"/>'
            "<title>Queries to begin with</title></head>"
        ),
        '<body vocab="http://www.ivoa.net/rdf/examples#">',
        f"<h1>Queries to begin with</h1><p>Service: <code>{xml_text(base)}</code></p>",
    ]
    for number, example in enumerate(examples, 1):
        out += [
            f'<div typeof="example" id="example-{number}" resource="#example-{number}">',
            f'<h2 property="name">{xml_text(example.name)}</h2>',
            f'<p property="description">{xml_text(example.description)}</p>',
            f'<pre property="query">{xml_text(example.adql)}</pre>',
            "<p>"
            + ", ".join(f'<code property="table">{xml_text(name)}</code>' for name in example.tables)
            + "</p>",
            "</div>",
        ]
    return lines([*out, "</body></html>"])
