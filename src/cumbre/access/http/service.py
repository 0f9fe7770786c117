"""All services of data access in one object: routes for a server to mount, and the jobs behind them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from cumbre.access.classes import Allowed, UserClass
from cumbre.access.http import images, tap, vosi
from cumbre.access.http.alerts import Alerts
from cumbre.access.http.base import (
    MAX_LINKS_BYTES,
    XML_MIME,
    Gate,
    Handler,
    base_url,
    dali_error,
    fault_error,
    in_pool,
    read_parameters,
    votable_error,
)
from cumbre.access.http.butler import ButlerFace, Butlers
from cumbre.access.http.cone import Cone, cone_error
from cumbre.access.http.examples import examples_for
from cumbre.access.http.hips import Hips
from cumbre.access.http.images import Images
from cumbre.access.http.light_curve import LightCurves
from cumbre.access.http.openapi import openapi
from cumbre.access.http.own_tables import SAVE, UPDATE, OwnTables
from cumbre.access.http.sia import Sia
from cumbre.access.http.stream import Lanes
from cumbre.access.http.tap import Tap, user_of
from cumbre.access.http.uws_views import JobFace
from cumbre.access.identity import Identity, Principal
from cumbre.access.images.catalogue import ImageCatalogue
from cumbre.access.images.hips import FOLDER as HIPS_FOLDER
from cumbre.access.images.regenerate import Regenerator
from cumbre.access.limits import Limits
from cumbre.access.user_tables import UserTables
from cumbre.access.uws import JobStore
from cumbre.access.uws_runner import JobRunner, Work
from cumbre.core.errors import TransientError
from cumbre.stores.postgres import Database

if TYPE_CHECKING:
    from cumbre.access.engines import Engines
    from cumbre.access.tables import Tables
    from cumbre.alerts.archive import AlertArchive

REQUEST_THREADS = 16
QUERY_THREADS = 48
RESULTS_FOLDER = "access/jobs"


@dataclass(frozen=True)
class Settings:
    """What the services allow.

    Attributes
    ----------
    sync_limits, job_limits
        What one query may cost at once and as a job.
    upload_bytes
        Most bytes of one request.
    retention
        How long jobs and their results are kept.
    job_threads
        Jobs at a time.
    regenerated_bytes
        Most bytes of images that were made again and are kept.
    anonymous_per_minute, user_per_minute
        Requests of one address without a token, and of one account.
    classes
        Other limits for groups.
    """

    sync_limits: Limits = field(default_factory=Limits)
    job_limits: Limits = field(default_factory=lambda: Limits(seconds=3600.0))
    upload_bytes: int = 64 << 20
    retention: timedelta = timedelta(days=7)
    job_threads: int = 3
    regenerated_bytes: int = 20 << 30
    anonymous_per_minute: int = 3000
    user_per_minute: int = 12000
    classes: Mapping[str, UserClass] = field(default_factory=dict)

    def allowed(self) -> Allowed:
        """Who may do how much."""
        return Allowed(
            self.sync_limits, self.job_limits, self.anonymous_per_minute, self.user_per_minute, self.classes
        )


class AccessService:
    """TAP, cone search and images of a site.

    Parameters
    ----------
    root
        Folder of the site: results of jobs are kept below it.
    db
        Database of identities and jobs.
    tables, engines
        What can be asked and who runs it.
    catalogue, authority
        Images, and the authority of their identifiers; without a catalogue there are no image services.
    own
        Tables of users; without them there are none.
    alerts
        The archive of alerts; without it none are served.
    butlers
        Repositories for clients of the middleware; without them there is no Butler server.
    """

    def __init__(
        self,
        *,
        root: Path,
        db: Database,
        tables: Tables,
        engines: Engines,
        catalogue: ImageCatalogue | None = None,
        authority: str = "cumbre.local",
        own: UserTables | None = None,
        alerts: AlertArchive | None = None,
        settings: Settings | None = None,
        butlers: Butlers | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.db, self.tables, self.engines = db, tables, engines
        self.identity = Identity(db)
        self.store = JobStore(db, root / RESULTS_FOLDER, retention=self.settings.retention)
        self.requests = ThreadPoolExecutor(REQUEST_THREADS, thread_name_prefix="request")
        self.queries = ThreadPoolExecutor(QUERY_THREADS, thread_name_prefix="query")
        allowed = self.settings.allowed()
        self.gate = Gate(self.identity, self.requests, allowed.per_minute)
        self.tap = Tap(
            tables, engines, self.identity, self.store, self.queries, Lanes(), allowed,
            self.settings.upload_bytes,
        )  # fmt: skip
        work: dict[str, Work] = {tap.SERVICE: self.tap.work}
        self.images = None
        if catalogue is not None:
            again = Regenerator(root, catalogue, most_bytes=self.settings.regenerated_bytes)
            self.images = Images(catalogue, self.identity, self.store, self.requests, authority, again)
            work[images.SERVICE] = self.images.work
        self.alerts = None if alerts is None else Alerts(alerts, db, self.identity, self.requests)
        self.hips = Hips(root / HIPS_FOLDER, self.requests)
        self.butler = (
            None
            if butlers is None
            else ButlerFace(butlers, self.identity, self.gate, self.requests, self.queries)
        )
        self.own = None
        if own is not None:
            self.own = OwnTables(
                own, self.gate, self.requests, self.settings.upload_bytes, self.store, self.tap
            )
            work |= {UPDATE: self.own.work_update, SAVE: self.own.work_save}
        self.runner = JobRunner(self.store, work, threads=self.settings.job_threads)
        self._since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._started = False

    def start(self) -> None:
        """Begin to run jobs."""
        self.runner.start()
        self._started = True

    def step(self) -> None:
        """Small upkeep; call it now and then."""
        self.identity.forget_old_counts()

    def close(self) -> None:
        """Stop running jobs; those that run are taken up by the next server."""
        if self._started:
            self.runner.close()
        self.requests.shutdown(wait=False, cancel_futures=True)
        self.queries.shutdown(wait=False, cancel_futures=True)
        if self.butler is not None:
            self.butler.butlers.close()

    def routes(self) -> list[Route]:
        """Every route, to be mounted at the root of a server."""
        routes = [*self._tap_routes(), *self._cone_routes(), self._text("/openapi.json", self._openapi)]
        if self.images is not None:
            routes += self._image_routes(self.images)
        if self.alerts is not None:
            endpoint = self.gate.endpoint(self.alerts.alert, scope="read:image")
            routes.append(Route("/alerts/{alert}", endpoint, methods=["GET"]))
        if self.butler is not None:
            routes += self.butler.routes()
        if self.own is not None:
            routes += self.own.routes(self.runner)
        return routes

    def _cone_routes(self) -> list[Route]:
        search = self.gate.endpoint(Cone(self.tap).search, scope="read:tap", error=cone_error)
        curve = self.gate.endpoint(LightCurves(self.tap).curve, scope="read:tap", error=votable_error)
        return [
            Route("/cone", search, methods=["GET", "POST"]),
            Route("/cone/{table}", search, methods=["GET", "POST"]),
            Route("/lightcurve", curve, methods=["GET", "POST"]),
            Route("/lightcurve/{object}", curve, methods=["GET"]),
            Route("/lightcurve/{release}/{object}", curve, methods=["GET"]),
        ]

    def _image_routes(self, face: Images) -> list[Route]:
        def route(path: str, handler: Any, methods: list[str], error: Any = dali_error) -> Route:
            return Route(path, self.gate.endpoint(handler, scope="read:image", error=error), methods=methods)

        jobs = JobFace(
            service=images.SERVICE, path="soda/async", scope="read:image", store=self.store, runner=self.runner,
            gate=self.gate, pool=self.requests, make=face.make_job, max_execution_s=lambda _who: 600, body_limit=MAX_LINKS_BYTES,
            error=dali_error,
        )  # fmt: skip
        sia, soda, links = (
            vosi.Service("ivo://ivoa.net/std/SIA#query-2.0", "query", "2.0"),
            vosi.Service("ivo://ivoa.net/std/SODA#sync-1.0", "sync", "1.0"),
            vosi.Service("ivo://ivoa.net/std/DataLink#links-1.1", "links", "1.1"),
        )
        soda_async = vosi.Service("ivo://ivoa.net/std/SODA#async-1.0", "async", "1.0")
        out = [
            route("/sia/query", Sia(self.tap).query, ["GET", "POST"], fault_error),
            route("/soda/sync", face.cut, ["GET", "POST"]),
            *jobs.routes(),
            route("/datalink/links", face.links, ["GET", "POST"], fault_error),
            route("/files/{image:path}", face.file, ["GET"]),
            route("/hips/hipslist", self.hips.listing, ["GET"]),
            route("/hipslist", self.hips.listing, ["GET"]),
            route("/hips/{name}/{path:path}", self.hips.file, ["GET"]),
        ]
        for name, services in (("sia", (sia,)), ("soda", (soda, soda_async)), ("datalink", (links,))):
            out += [
                route(f"/{name}/capabilities", _capabilities(name, services), ["GET"]),
                route(f"/{name}/availability", self._availability, ["GET"]),
                route(f"/{name}", self._to_capabilities, ["GET"]),
            ]
        return out

    def _tap_routes(self) -> list[Route]:
        def tap_route(path: str, handler: Any, methods: list[str]) -> Route:
            endpoint = self.gate.endpoint(handler, scope="read:tap", error=votable_error)
            return Route(path, endpoint, methods=methods)

        jobs = JobFace(
            service=tap.SERVICE, path="tap/async", scope="read:tap", store=self.store, runner=self.runner,
            gate=self.gate, pool=self.requests, make=self.tap.make_job,
            max_execution_s=self.tap.longest_job_s, body_limit=self.settings.upload_bytes,
        )  # fmt: skip
        return [
            tap_route("/tap/sync", self.tap.sync, ["GET", "POST"]),
            *jobs.routes(),
            tap_route("/tap/tables", self._tables, ["GET"]),
            tap_route("/tap/tables/{name}", self._one_table, ["GET"]),
            tap_route("/tap/examples", self._examples, ["GET"]),
            self._text("/tap/capabilities", self._tap_capabilities),
            self._text("/tap/availability", self._availability),
            self._text("/tap", self._to_capabilities),
        ]

    def _text(self, path: str, handler: Any) -> Route:
        return Route(path, self.gate.endpoint(handler, scope="read:tap", error=dali_error), methods=["GET"])

    async def _openapi(self, request: Request, who: Principal) -> Response:
        del who
        return JSONResponse(openapi(str(request.base_url).rstrip("/")))

    async def _to_capabilities(self, request: Request, who: Principal) -> Response:
        del who
        return RedirectResponse(base_url(request, request.url.path.strip("/")) + "/capabilities", 303)

    async def _tap_capabilities(self, request: Request, who: Principal) -> Response:
        base = base_url(request, "tap")
        first = await in_pool(
            self.requests, vosi.tap_capability, base, self.tables, user_of(who), self.tap.allowed.job_limits(who),
            self.tap.allowed.sync_limits(who), self.settings.retention, self.settings.upload_bytes,
        )  # fmt: skip
        services = (
            vosi.Service("ivo://ivoa.net/std/VOSI#tables-1.1", "tables", use="full"),
            vosi.Service("ivo://ivoa.net/std/DALI#examples", "examples", kind="vr:WebBrowser", use="full"),
        )
        return Response(vosi.capabilities(base, services, first), media_type=XML_MIME)

    async def _availability(self, request: Request, who: Principal) -> Response:
        del request, who
        try:
            await in_pool(self.requests, self.db.execute, "SELECT 1")
        except TransientError as error:
            return Response(vosi.availability(False, str(error), self._since), media_type=XML_MIME)
        return Response(vosi.availability(True, "accepting queries", self._since), media_type=XML_MIME)

    async def _tables(self, request: Request, who: Principal) -> Response:
        detail = ((await read_parameters(request)).value("DETAIL") or "max").lower()
        if detail not in ("min", "max"):
            return PlainTextResponse(f"UsageError: detail = {detail[:40]!r}: expected min or max\n", 400)
        text = await in_pool(
            self.requests, lambda: vosi.tableset(self.tables, user_of(who), columns=detail == "max")
        )
        return Response(text, media_type=XML_MIME)

    async def _one_table(self, request: Request, who: Principal) -> Response:
        schema, _, name = request.path_params["name"].rpartition(".")
        found = await in_pool(self.requests, self.tables.find, schema or None, name, user_of(who))
        return Response(vosi.one_table(found, self.tables), media_type=XML_MIME)

    async def _examples(self, request: Request, who: Principal) -> Response:
        visible = await in_pool(self.requests, lambda: list(self.tables.visible(user_of(who))))
        page = vosi.examples_page(examples_for(visible), base_url(request, "tap"))
        return Response(page, media_type="application/xhtml+xml")


def _capabilities(name: str, services: tuple[vosi.Service, ...]) -> Handler:
    async def answer(request: Request, who: Principal) -> Response:
        del who
        return Response(vosi.capabilities(base_url(request, name), services), media_type=XML_MIME)

    return answer
