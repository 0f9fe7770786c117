"""Alerts by their identifier over HTTP: for whom the image of an alert is released, the alert is, and nobody else."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cumbre.access.http.base import UsageError, in_pool, read_parameters
from cumbre.access.identity import Identity, Principal
from cumbre.access.images.catalogue import released_sql
from cumbre.alerts.archive import AlertArchive
from cumbre.core.errors import NotFoundError
from cumbre.stores.postgres import Database

AVRO_MIME = "application/vnd.apache.avro"


@dataclass(frozen=True)
class Alerts:
    """The archive of alerts of a site.

    Attributes
    ----------
    archive
        Where they are.
    db
        Knows which images are released.
    """

    archive: AlertArchive
    db: Database
    identity: Identity
    pool: Executor

    async def alert(self, request: Request, who: Principal) -> Response:
        """``/alerts/ID``: an Avro container with the schema; ``RESPONSEFORMAT=json`` for text, stamps in base64."""
        text = request.path_params["alert"]
        wanted = ((await read_parameters(request)).value("RESPONSEFORMAT") or "avro").lower()
        if wanted not in ("avro", "json"):
            raise UsageError(f"RESPONSEFORMAT = {wanted[:40]!r}: expected avro or json")
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise UsageError(f"alert {text[:40]!r}: expected the number of a difference source")
        record = await in_pool(self.pool, self._find, int(text), who)
        if wanted == "json":
            from cumbre.alerts.packet import printable

            return JSONResponse(printable(record))
        content = await in_pool(self.pool, _container, record)
        headers = {"Content-Disposition": f'attachment; filename="{text}.avro"'}
        return Response(content, 200, headers, AVRO_MIME)

    def _find(self, alert_id: int, who: Principal) -> dict[str, Any]:
        from cumbre.alerts.packet import decode_packet

        absent = NotFoundError(f"alert {alert_id}: there is none, or its image is not released to you yet")
        try:
            record = decode_packet(self.archive.packet(alert_id))
        except NotFoundError:
            raise absent from None
        condition = released_sql(who.rights).replace("release_at_once OR ", "")
        rows = self.db.execute(
            f"SELECT 1 FROM ledger.image, access.horizon WHERE exposure_id = %s AND ({condition})",  # noqa: S608 (ours)
            (record["diaSource"]["visit"],),
        )
        if not rows:
            raise absent
        self.identity.audit(who, "alert", str(alert_id))
        return record


def _container(record: dict[str, Any]) -> bytes:
    import io

    import fastavro

    from cumbre.alerts.packet import schema

    stream = io.BytesIO()
    fastavro.writer(stream, schema(), [record], codec="deflate")
    return stream.getvalue()
