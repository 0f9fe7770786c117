"""UWS 1.1 over HTTP: the job list and every resource of a job, for any service that has jobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from cumbre.access.http.base import (
    XML_MIME,
    ErrorDocument,
    Gate,
    Parameters,
    UsageError,
    base_url,
    in_pool,
    lines,
    read_parameters,
    safe_below,
    votable_error,
    xml_attribute,
    xml_text,
)
from cumbre.access.identity import Principal
from cumbre.access.uws import ACTIVE, PENDING, QUEUED, Job, JobStore, parse_phase
from cumbre.access.uws_runner import JobRunner
from cumbre.core.errors import CumbreError, NotFoundError

MAX_WAIT_S = 60.0
_NAMESPACES = (
    'xmlns="http://www.ivoa.net/xml/UWS/v1.0" xmlns:xlink="http://www.w3.org/1999/xlink"'
    ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"'
)
_HEAD = '<?xml version="1.0" encoding="UTF-8"?>'


@dataclass(frozen=True)
class JobFace:
    """The ``async`` resource of one service.

    Attributes
    ----------
    service
        Its name in the store.
    path
        Path of the job list, e.g. ``tap/async``.
    make
        Stores a new job of a request's parameters; may refuse.
    check
        Looks at a job's parameters before it is queued; may refuse.
    max_execution_s
        Most seconds that somebody may ask for.
    """

    service: str
    path: str
    scope: str
    store: JobStore
    runner: JobRunner
    gate: Gate
    pool: Executor
    make: Callable[[Parameters, Principal], Job]
    max_execution_s: Callable[[Principal], int]
    body_limit: int
    error: ErrorDocument = votable_error

    def routes(self) -> list[Route]:
        """All resources."""
        root = f"/{self.path}"
        table: list[tuple[str, Any, list[str]]] = [
            ("", self.job_list, ["GET", "POST"]),
            ("/{job}", self.job, ["GET", "POST", "DELETE"]),
            ("/{job}/phase", self.phase, ["GET", "POST"]),
            ("/{job}/quote", self.quote, ["GET"]),
            ("/{job}/owner", self.owner, ["GET"]),
            ("/{job}/executionduration", self.execution, ["GET", "POST"]),
            ("/{job}/destruction", self.destruction, ["GET", "POST"]),
            ("/{job}/parameters", self.parameters, ["GET", "POST"]),
            ("/{job}/error", self.job_error, ["GET"]),
            ("/{job}/results", self.results, ["GET"]),
            ("/{job}/results/{result}", self.result, ["GET"]),
        ]
        return [
            Route(
                root + path, self.gate.endpoint(handler, scope=self.scope, error=self.error), methods=methods
            )
            for path, handler, methods in table
        ]

    async def _do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await in_pool(self.pool, function, *arguments)

    async def _get(self, request: Request, who: Principal) -> Job:
        found: Job = await self._do(self.store.get, self.service, request.path_params["job"], who)
        return found

    def _to_job(self, request: Request, job_id: str, suffix: str = "") -> Response:
        return RedirectResponse(f"{base_url(request, self.path)}/{job_id}{suffix}", 303)

    # the list

    async def job_list(self, request: Request, who: Principal) -> Response:
        """Jobs of the one who asks; POST makes one."""
        parameters = await read_parameters(request, limit_bytes=self.body_limit)
        if request.method == "POST":
            job = await self._do(self.make, parameters, who)
            if (parameters.value("PHASE") or "").upper() == "RUN":
                await self._queue(job)
            return self._to_job(request, job.job_id)
        phases = [parse_phase(text) for text in parameters.values("PHASE")]
        after = parse_time(text, "AFTER") if (text := parameters.value("AFTER")) else None
        last = parameters.integer("LAST", least=1)
        jobs = await self._do(
            lambda: self.store.list(self.service, who, phases=phases, after=after, last=last)
        )
        return Response(jobs_xml(jobs, base_url(request, self.path)), media_type=XML_MIME)

    # one job

    async def job(self, request: Request, who: Principal) -> Response:
        """A job whole; WAIT holds the answer until its phase changes. DELETE, or POST ACTION=DELETE, ends it."""
        job = await self._get(request, who)
        parameters = await read_parameters(request, limit_bytes=self.body_limit)
        if request.method == "DELETE" or (parameters.value("ACTION") or "").upper() == "DELETE":
            self.runner.stop_job(job.job_id)
            await self._do(self.store.delete, job)
            return RedirectResponse(base_url(request, self.path) + "?LAST=100", 303)
        if request.method == "POST":
            raise UsageError("expected ACTION=DELETE; parameters go to the job's resources")
        if (wait := wait_of(parameters)) is not None:
            await self._wait(job, wait, parameters.value("PHASE"))
            job = await self._get(request, who)
        return Response(job_xml(job, base_url(request, self.path)), media_type=XML_MIME)

    async def _wait(self, job: Job, wait_s: float, phase: str | None) -> None:
        begin = parse_phase(phase) if phase else job.phase
        if job.phase != begin or job.phase not in ACTIVE:
            return
        end, seen, look_s = time.monotonic() + wait_s, self.store.version(job.job_id), time.monotonic()
        while time.monotonic() < end:
            await asyncio.sleep(0.02)
            if self.store.version(job.job_id) == seen and time.monotonic() - look_s < 1.0:
                continue
            seen, look_s = self.store.version(job.job_id), time.monotonic()
            if await self._do(self.store.phase, job.job_id) != begin:
                return

    async def phase(self, request: Request, who: Principal) -> Response:
        """The phase; POST PHASE=RUN or PHASE=ABORT changes it."""
        job = await self._get(request, who)
        if request.method == "GET":
            return PlainTextResponse(job.phase)
        wanted = ((await read_parameters(request)).required("PHASE")).upper()
        if wanted == "RUN":
            await self._queue(job)
        elif wanted == "ABORT":
            await self._do(self.store.abort, job)
            self.runner.stop_job(job.job_id)
        else:
            raise UsageError(f"PHASE = {wanted[:40]!r}: expected RUN or ABORT")
        return self._to_job(request, job.job_id)

    async def _queue(self, job: Job) -> None:
        await self._do(self.store.queue, job)
        self.runner.wake()

    async def quote(self, request: Request, who: Principal) -> Response:
        """When the job is expected to end: not known."""
        await self._get(request, who)
        return PlainTextResponse("")

    async def owner(self, request: Request, who: Principal) -> Response:
        """Whose job it is."""
        return PlainTextResponse(_shown_owner(await self._get(request, who)) or "")

    async def execution(self, request: Request, who: Principal) -> Response:
        """Seconds that the job may run."""
        job = await self._get(request, who)
        if request.method == "GET":
            return PlainTextResponse(str(job.execution_s))
        seconds = (await read_parameters(request)).integer("EXECUTIONDURATION")
        if seconds is None:
            raise UsageError("the parameter EXECUTIONDURATION is missing")
        most = self.max_execution_s(who)
        kept = min(seconds, most) or most
        await self._do(self.store.set_execution, job, kept)
        return self._to_job(request, job.job_id)

    async def destruction(self, request: Request, who: Principal) -> Response:
        """When the job and its results are deleted."""
        job = await self._get(request, who)
        if request.method == "GET":
            return PlainTextResponse(iso(job.destruction))
        when = parse_time((await read_parameters(request)).required("DESTRUCTION"), "DESTRUCTION")
        await self._do(self.store.set_destruction, job, when)
        return self._to_job(request, job.job_id)

    async def parameters(self, request: Request, who: Principal) -> Response:
        """Parameters; POST adds or replaces some before the job runs."""
        job = await self._get(request, who)
        if request.method == "GET":
            return Response(lines([_HEAD, *parameters_xml(job, _NAMESPACES + " ")]), media_type=XML_MIME)
        given = await read_parameters(request, limit_bytes=self.body_limit)
        await self._do(self.store.set_parameters, job, given.pairs)
        return self._to_job(request, job.job_id)

    async def job_error(self, request: Request, who: Principal) -> Response:
        """The error as a document."""
        job = await self._get(request, who)
        if job.error is None:
            raise NotFoundError(f"job {job.job_id} has no error: it is {job.phase}")
        answer = self.error(CumbreError(str(job.error["message"])))
        return Response(answer.body, 200, media_type=answer.media_type)

    async def results(self, request: Request, who: Principal) -> Response:
        """The list of results."""
        job = await self._get(request, who)
        base = base_url(request, self.path)
        return Response(lines([_HEAD, *results_xml(job, base, _NAMESPACES + " ")]), media_type=XML_MIME)

    async def result(self, request: Request, who: Principal) -> Response:
        """One result: a file, also in parts (Range)."""
        job = await self._get(request, who)
        wanted = request.path_params["result"]
        for item in job.results:
            if item.result_id == wanted:
                path = safe_below(self.store.job_folder(job.job_id), item.file)
                headers = {"Content-Disposition": f'attachment; filename="{item.name or path.name}"'}
                return FileResponse(path, media_type=item.mime, headers=headers)
        state = f"it is {job.phase}" if job.phase in ACTIVE else "see its list of results"
        raise NotFoundError(f"job {job.job_id} has no result {wanted[:60]!r}: {state}")


def wait_of(parameters: Parameters) -> float | None:
    """Seconds of WAIT: bounded; −1 means as long as the service allows.

    Raises
    ------
    UsageError
        It is no number.
    """
    wait = parameters.integer("WAIT", least=-1)
    return None if wait is None else MAX_WAIT_S if wait < 0 else min(float(wait), MAX_WAIT_S)


def parse_time(text: str, name: str) -> datetime:
    """An ISO 8601 time, UTC unless it says otherwise.

    Raises
    ------
    UsageError
        It is none.
    """
    try:
        parsed = datetime.fromisoformat(text.strip().replace("Z", "+00:00").replace(" ", "+"))
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError(
            f"{name} = {text[:60]!r}: expected an ISO 8601 time, e.g. 2026-11-21T01:02:03Z"
        ) from None


def iso(when: datetime) -> str:
    """UTC to the millisecond."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _shown_owner(job: Job) -> str | None:
    return None if job.principal.is_anonymous else job.owner


def _nillable(name: str, value: str | None) -> str:
    return f'<{name} xsi:nil="true"/>' if value is None else f"<{name}>{xml_text(value)}</{name}>"


def jobs_xml(jobs: Sequence[Job], base: str) -> str:
    """The job list."""
    out = [_HEAD, f'<jobs {_NAMESPACES} version="1.1">']
    for job in jobs:
        out.append(
            f"<jobref id={xml_attribute(job.job_id)} xlink:href={xml_attribute(f'{base}/{job.job_id}')}>"
        )
        out.append(f"<phase>{job.phase}</phase>")
        if job.run_id:
            out.append(f"<runId>{xml_text(job.run_id)}</runId>")
        out.append(_nillable("ownerId", _shown_owner(job)))
        out.append(f"<creationTime>{iso(job.created)}</creationTime>")
        out.append("</jobref>")
    return lines([*out, "</jobs>"])


def parameters_xml(job: Job, namespaces: str = "") -> list[str]:
    """The element ``parameters``."""
    out = [f"<parameters {namespaces}>" if namespaces else "<parameters>"]
    out += [
        f"<parameter id={xml_attribute(name)}>{xml_text(value)}</parameter>"
        for name, value in job.parameters
        if name.upper() != "PHASE"
    ]
    return [*out, "</parameters>"]


def results_xml(job: Job, base: str, namespaces: str = "") -> list[str]:
    """The element ``results``."""
    out = [f"<results {namespaces}>" if namespaces else "<results>"]
    for item in job.results:
        link = f"{base}/{job.job_id}/results/{quote(item.result_id)}"
        out.append(
            f'<result id={xml_attribute(item.result_id)} xlink:type="simple" xlink:href={xml_attribute(link)}'
            f' mime-type={xml_attribute(item.mime)} size="{item.size}"/>'
        )
    return [*out, "</results>"]


def job_xml(job: Job, base: str) -> str:
    """A job whole."""
    out = [_HEAD, f'<job {_NAMESPACES} version="1.1">', f"<jobId>{job.job_id}</jobId>"]
    if job.run_id:
        out.append(f"<runId>{xml_text(job.run_id)}</runId>")
    out += [
        _nillable("ownerId", _shown_owner(job)),
        f"<phase>{job.phase}</phase>",
        '<quote xsi:nil="true"/>',
        f"<creationTime>{iso(job.created)}</creationTime>",
        _nillable("startTime", iso(job.started) if job.started else None),
        _nillable("endTime", iso(job.ended) if job.ended else None),
        f"<executionDuration>{job.execution_s}</executionDuration>",
        f"<destruction>{iso(job.destruction)}</destruction>",
        *parameters_xml(job),
        *results_xml(job, base),
    ]
    if job.error is not None:
        out.append(f'<errorSummary type={xml_attribute(job.error["type"])} hasDetail="true">')
        out.append(f"<message>{xml_text(job.error['message'])}</message></errorSummary>")
    if job.info and job.phase not in (PENDING, QUEUED):
        out.append("<jobInfo>")
        for name, value in job.info.items():
            out.append(f'<{name} xmlns="">{xml_text(value)}</{name}>')
        out.append("</jobInfo>")
    return lines([*out, "</job>"])
