"""Services that belong to columns of a result, wherever the rows come from."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request

from cumbre.access.http.base import base_url
from cumbre.access.results.services import Input, ServiceDescriptor, field_id
from cumbre.access.tables import CURVE_UTYPE, Column


def next_steps(request: Request, columns: Sequence[Column]) -> list[ServiceDescriptor]:
    """Light curves for objects, links for images."""
    found: list[ServiceDescriptor] = []
    for column in columns:
        name = column.name.lower()
        release = column.utype.removeprefix(CURVE_UTYPE) if column.utype.startswith(CURVE_UTYPE) else ""
        if release or (name == "diaobjectid" and column.datatype == "long"):
            identity = f"light_curve_{release}" if release else "light_curve"
            if not _known(found, identity):
                found.append(_light_curve(request, column, identity, release))
        elif name == "obs_publisher_did" and not _known(found, "links"):
            found.append(
                ServiceDescriptor(
                    "links", "links", "What belongs to an image: the file, a picture, cutouts",
                    base_url(request, "datalink/links"),
                    (Input("ID", ucd="meta.id;meta.main", ref=field_id(column.name)),),
                    "ivo://ivoa.net/std/DataLink#links-1.1", "application/x-votable+xml;content=datalink",
                )
            )  # fmt: skip
    return found


def _light_curve(request: Request, column: Column, identity: str, release: str) -> ServiceDescriptor:
    pinned = (Input("RELEASE", ucd="meta.version", value=release),) if release else ()
    return ServiceDescriptor(
        identity, "light curve", "Everything that was measured at the place of an object", base_url(request, "lightcurve"),
        (
            Input("ID", "long", "", ucd="meta.id", ref=field_id(column.name)), *pinned,
            Input("BAND", ucd="instr.bandpass", description="Only measurements in this band"),
        ),
        content_type="application/x-votable+xml",
    )  # fmt: skip


def _known(found: list[ServiceDescriptor], identity: str) -> bool:
    return any(service.identity == identity for service in found)
