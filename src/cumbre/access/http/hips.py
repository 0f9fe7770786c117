"""HiPS over HTTP: tiles as files, and the list of what this server has."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from cumbre.access.http.base import base_url, in_pool, safe_below
from cumbre.access.identity import Principal
from cumbre.core.errors import NotFoundError

_TYPES = {".fits": "application/fits", ".png": "image/png", "": "text/plain; charset=utf-8"}
MAX_AGE_S = 3600


@dataclass(frozen=True)
class Hips:
    """The HiPS of a site; they are made of released images only.

    Attributes
    ----------
    folder
        One folder below it for each HiPS.
    """

    folder: Path
    pool: Executor

    async def file(self, request: Request, who: Principal) -> Response:
        """A tile, the coverage, or the properties."""
        del who
        relative = f"{request.path_params['name']}/{request.path_params['path']}"
        path = await in_pool(self.pool, safe_below, self.folder, relative)
        if path.suffix not in _TYPES or (not path.suffix and path.name != "properties"):
            raise NotFoundError(f"{relative}: there is no such file")
        headers = {"Cache-Control": f"public, max-age={MAX_AGE_S}"}
        return FileResponse(path, media_type=_TYPES[path.suffix], headers=headers)

    async def listing(self, request: Request, who: Principal) -> Response:
        """``hipslist``: one record for each HiPS, with its address."""
        del who
        base = base_url(request, "hips")
        return PlainTextResponse(await in_pool(self.pool, self._listing, base))

    def _listing(self, base: str) -> str:
        records = []
        for path in sorted(self.folder.glob("*/properties")):
            records.append(path.read_text() + f"{'hips_service_url':<20} = {base}/{path.parent.name}\n")
        return "\n".join(records)
