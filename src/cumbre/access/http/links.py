"""The table of links of DataLink 1.1, with the descriptor of the cutout service."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from cumbre.access.http.base import lines, xml_text
from cumbre.access.results.services import Input, ServiceDescriptor

LINKS_MIME = "application/x-votable+xml;content=datalink"
SYNC, ASYNC = "soda-sync", "soda-async"
"""Names of the descriptors of the cutout service, at once and as a job."""
_LINK_FIELDS = (
    # name, datatype, arraysize, ucd, description
    ("ID", "char", "*", "meta.id;meta.main", "Identifier that was asked for"),
    ("access_url", "char", "*", "meta.ref.url", "Where it is"),
    ("service_def", "char", "*", "meta.ref", "Descriptor of the service that gives it"),
    ("error_message", "char", "*", "meta.code.error", "Why there is nothing"),
    ("semantics", "char", "*", "meta.code", "What it is to the image"),
    ("description", "char", "*", "meta.note", "In words"),
    ("content_type", "char", "*", "meta.code.mime", "Media type"),
    ("content_length", "long", None, "phys.size;meta.file", "Size in bytes"),
    ("content_qualifier", "char", "*", "meta.code", "Kind of data"),
    ("link_auth", "char", "*", "meta.code", "Whether a token is needed"),
    ("link_authorized", "boolean", None, "meta.code", "Whether you may"),
)


def links_document(rows: Sequence[dict[str, object]], soda_url: str, *, overflow: bool) -> str:
    """The table of links with the descriptor of the cutout service."""
    out = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<VOTABLE version="1.4" xmlns="http://www.ivoa.net/xml/VOTable/v1.3">',
        '<RESOURCE type="results">',
        '<INFO name="standardID" value="ivo://ivoa.net/std/DataLink#links-1.1"/>',
        '<INFO name="QUERY_STATUS" value="OK"/>',
        '<TABLE name="links">',
    ]
    for name, kind, size, ucd, description in _LINK_FIELDS:
        identity = ' ID="links_id"' if name == "ID" else ""
        shape = f' arraysize="{size}"' if size else ""
        unit = ' unit="byte"' if name == "content_length" else ""
        out.append(
            f'<FIELD{identity} name="{name}" datatype="{kind}"{shape}{unit} ucd="{ucd}">'
            f"<DESCRIPTION>{description}</DESCRIPTION></FIELD>"
        )
    out.append("<DATA><TABLEDATA>")
    for row in rows:
        cells = (row.get(name) for name, *_ in _LINK_FIELDS)
        out.append("<TR>" + "".join(f"<TD>{xml_text(_cell(cell))}</TD>" for cell in cells) + "</TR>")
    out.append("</TABLEDATA></DATA></TABLE>")
    if overflow:
        out.append(f'<INFO name="QUERY_STATUS" value="OVERFLOW">the first {len(rows)} rows of more</INFO>')
    out.append("</RESOURCE>")
    services = [_descriptor(soda_url, name, _example(rows, name)) for name in (SYNC, ASYNC)]
    return lines([*out, *(line for service in services for line in service), "</VOTABLE>"])


def _example(rows: Sequence[dict[str, object]], service: str) -> str:
    return next((str(row["ID"]) for row in rows if row.get("service_def") == service), "")


def _cell(value: object) -> object:
    if value is None:
        return ""
    return ("true" if value else "false") if isinstance(value, bool) else value


def _descriptor(soda_url: str, service: str, example: str) -> list[str]:
    """How to call the cutout service, by DataLink's service descriptors."""
    resource = service.removeprefix("soda-")
    url = f"{soda_url}/{resource}"
    return ServiceDescriptor(
        service, "cutout", "Part of an image", url,
        (
            Input("ID", ucd="meta.ref.url;meta.curation", ref="links_id"),
            Input("CIRCLE", "double", "3", "circle", "pos.outline;obs", "deg", "Longitude, latitude, radius (ICRS)"),
            Input("POLYGON", "double", "*", "polygon", "pos.outline;obs", "deg", "Corners (ICRS)"),
            Input("POS", ucd="pos.outline;obs", description="CIRCLE, RANGE or POLYGON and numbers"),
            Input("BAND", "double", "2", "interval", "em.wl;stat.interval", "m", "Only images that touch it"),
            Input("TIME", "double", "2", "interval", "time.interval;obs.exposure", "d", "MJD (UTC) that they touch"),
            Input("RESPONSEFORMAT", ucd="meta.code.mime", description="application/fits or image/png"),
            Input("CUTOUTDETAIL", ucd="meta.code", description="Image, MaskedImage or Exposure"),
            Input("COMBINE", ucd="meta.code", description="MOSAIC of a visit's detectors, STACK of epochs"),
        ),
        f"ivo://ivoa.net/std/SODA#{resource}-1.0", "application/fits",
        f"{url}?ID={quote(example, safe='')}" if example else "",
    ).lines()  # fmt: skip
