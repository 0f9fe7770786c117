"""The web service: Starlette pages in a thread of their own, watched by the runner like any service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cumbre.archive.alarms import active_alarms
from cumbre.core.configuration import Site
from cumbre.core.errors import FatalError, TransientError
from cumbre.core.time import Clock
from cumbre.stores.files import write_atomic
from cumbre.web import views

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from cumbre.bus import Bus
    from cumbre.stores.postgres import Database

HERE = Path(__file__).parent
EVENT_PERIOD_S = 1.0
START_DEADLINE_S = 20.0
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}


def _plain(data: Any) -> Any:
    return json.loads(json.dumps(data, default=str))


class Pages:
    """Routes of one site; every page answers with ``.json`` too."""

    def __init__(self, *, site: Site, bus: Bus, clock: Clock, db: Database) -> None:
        from jinja2 import Environment, FileSystemLoader, select_autoescape

        self.site, self.bus, self.clock, self.db = site, bus, clock, db
        self.expected = views.expected_hops(site.config)
        self.environment = Environment(
            loader=FileSystemLoader(HERE / "pages"), autoescape=select_autoescape(default=True)
        )

    def _html(self, template: str, **values: Any) -> Response:
        from starlette.responses import HTMLResponse

        text = self.environment.get_template(template).render(
            observatory=self.site.config.observatory.name, now=views.times(self.clock.now_tai_s()), **values
        )
        return HTMLResponse(text, headers=SECURITY)

    def _answer(self, request: Request, data: Any, template: str, **values: Any) -> Response:
        from starlette.responses import JSONResponse

        if request.url.path.endswith(".json"):
            return JSONResponse(_plain(data), headers=SECURITY)
        return self._html(template, json_url=request.url.path.rstrip("/") + ".json", **values)

    def tonight(self, request: Request) -> Response:
        """The night at a glance."""
        data = {
            "flow": self._flow(),
            "exposures": views.exposures(self.db),
            "alarms": active_alarms(self.bus),
        }
        return self._answer(request, data, "tonight.html", **data)

    def flow(self, request: Request) -> Response:
        """Every hop: count, lag, backlog."""
        data = self._flow()
        return self._answer(request, data, "flow.html", flow=data)

    def alarms(self, request: Request) -> Response:
        """What needs a person."""
        rows = active_alarms(self.bus)
        return self._answer(request, rows, "alarms.html", alarms=rows)

    def exposure(self, request: Request) -> Response:
        """One image and all its hops."""
        from starlette.exceptions import HTTPException

        data = views.exposure(self.db, request.path_params["obs_id"].removesuffix(".json"))
        if data is None:
            raise HTTPException(404, "no such image in the ledger")
        columns = ["detector", "hop", "outcome", "place", "hop_utc", "byte_size", "checksum", "message"]
        return self._answer(request, data, "table.html", heading=data["image"]["obs_id"],
                            facts=data["image"], columns=columns, rows=data["hops"])  # fmt: skip

    def components(self, request: Request) -> Response:
        """Services of the site."""
        try:
            rows = json.loads((self.site.root / "run" / "supervisor.json").read_text())["services"]
        except FileNotFoundError:
            rows = []
        return self._answer(request, rows, "table.html", heading="Components", facts={},
                            columns=["name", "state", "pid", "restarts"], rows=rows)  # fmt: skip

    def report(self, request: Request) -> Response:
        """The last night report."""
        from starlette.exceptions import HTTPException
        from starlette.responses import FileResponse

        name = "night.json" if request.url.path.endswith(".json") else "night.html"
        path = self.site.root / "report" / name
        if not path.exists():
            raise HTTPException(404, "no night report yet: it is written at the end of a night")
        return FileResponse(path)

    def _flow(self) -> dict[str, Any]:
        return views.flow(self.db, self.clock, self.expected)

    def _live(self) -> dict[str, Any]:
        return self._flow() | {"alarms": active_alarms(self.bus)}

    async def events(self, request: Request) -> Response:
        """Server-Sent Events: flow and alarms, each second."""
        from starlette.responses import StreamingResponse

        async def stream() -> AsyncIterator[str]:
            number = 0
            while not await request.is_disconnected():
                number += 1
                with contextlib.suppress(TransientError):
                    data = await asyncio.to_thread(self._live)
                    yield f"id: {number}\nevent: flow\ndata: {json.dumps(_plain(data))}\n\n"
                await asyncio.sleep(EVENT_PERIOD_S)

        return StreamingResponse(stream(), media_type="text/event-stream",
                                 headers=SECURITY | {"Cache-Control": "no-store"})  # fmt: skip

    def application(self, more: Sequence[Any] = ()) -> Starlette:
        """The application with all routes and those of others."""
        from starlette.applications import Starlette
        from starlette.routing import Mount, Route
        from starlette.staticfiles import StaticFiles

        routes: list[Any] = [Mount("/static", StaticFiles(directory=HERE / "static"))]
        for paths, view in (
            (("/", "/index.json"), self.tonight),
            (("/flow", "/flow.json"), self.flow),
            (("/alarms", "/alarms.json"), self.alarms),
            (("/exposures/{obs_id}",), self.exposure),
            (("/components", "/components.json"), self.components),
            (("/report", "/report.json"), self.report),
            (("/events",), self.events),
        ):
            routes += [Route(path, view) for path in paths]
        routes += more
        return Starlette(routes=routes)


class Mounted(Protocol):
    """A neighbour that is served on the same address."""

    def routes(self) -> list[Any]:
        """Its routes, absolute; each decides itself who may ask."""

    def serve_at(self, url: str) -> None:
        """Told where it can be reached."""

    def step(self) -> int:
        """Its upkeep; returns how much was done."""

    def close(self) -> None:
        """Let go of what is held."""


class WebService:
    """Serves :class:`Pages` on the configured address and writes ``run/web.url``.

    Parameters
    ----------
    mounted
        Neighbours served beside the pages.
    """

    name = "web"

    def __init__(
        self, *, site: Site, bus: Bus, clock: Clock, db: Database, mounted: Sequence[Mounted] = ()
    ) -> None:
        import uvicorn

        self._mounted = list(mounted)
        routes = [route for neighbour in mounted for route in neighbour.routes()]
        application: Any = Pages(site=site, bus=bus, clock=clock, db=db).application(routes)
        for neighbour in mounted:
            # one that knows who people are keeps the pages for those who may see them
            if (guard := getattr(neighbour, "guard", None)) is not None:
                application = guard(application, [route.path for route in routes])
        host, port = site.config.web.host, site.config.web.port
        self._socket = socket.create_server((host, port), backlog=128)
        # connections get it from here (asyncio does not set it for such a socket): without it the body of an answer on
        # a connection that is kept waits up to 40 ms for the client to acknowledge the header
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server = uvicorn.Server(
            uvicorn.Config(application, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_DEADLINE_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise FatalError(f"the web server did not start on {host}:{port}")
            time.sleep(0.02)
        actual = self._socket.getsockname()[1]
        for neighbour in self._mounted:
            neighbour.serve_at(f"http://{host}:{actual}")
        write_atomic(site.root / "run" / "web.url", f"http://{host}:{actual}/\n".encode())

    def step(self, timeout_s: float) -> int:
        """See that the server's thread lives; the neighbours' upkeep."""
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            raise FatalError("the web server stopped")
        return sum(neighbour.step() for neighbour in self._mounted)

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        self._thread.join(3)
        self._socket.close()
        for neighbour in self._mounted:
            neighbour.close()
