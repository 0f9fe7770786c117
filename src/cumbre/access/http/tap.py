"""TAP 1.1: queries answered at once (``/tap/sync``) and as jobs (``/tap/async``)."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from cumbre.access.classes import Allowed
from cumbre.access.http.base import (
    Parameters,
    TooLargeError,
    UsageError,
    in_pool,
    read_parameters,
)
from cumbre.access.http.fetch import fetch_table
from cumbre.access.http.next_steps import next_steps
from cumbre.access.http.stream import Lanes, Pipe, start_writing
from cumbre.access.http.upload_files import parse_upload_parameter, read_table
from cumbre.access.identity import Identity, Principal
from cumbre.access.limits import Limits, QueryCancelledError
from cumbre.access.query import Result, run
from cumbre.access.results import Format, find_format, write
from cumbre.access.user import User
from cumbre.access.uws import Job, JobResult, JobStore, new_job_id
from cumbre.access.uws_runner import JobContext
from cumbre.core.errors import ConflictError, TransientError, UserError
from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

    from cumbre.access.engines import Engines
    from cumbre.access.results.services import ServiceDescriptor
    from cumbre.access.tables import Column, Tables

SERVICE = "tap"
MAX_QUERY_BYTES = 1 << 19
LANGUAGES = ("ADQL", "ADQL-2.0", "ADQL-2.1")
_VERSION = re.compile(r";\s*version\s*=\s*\"?(1\.[45])\"?", re.IGNORECASE)


class QueryFailedError(UserError):
    """The query failed while it ran."""

    outcome = "QueryFailed"


def user_of(who: Principal) -> User:
    """What the query engine needs to know of who asks: data rights count as groups."""
    return User(None if who.is_anonymous else who.account, who.groups | who.rights)


@dataclass(frozen=True, slots=True)
class Question:
    """One query, checked as far as that goes without running it."""

    adql: str
    form: Format
    votable_version: str
    maxrec: int | None

    @classmethod
    def of(cls, parameters: Parameters) -> Question:
        """The query of a request.

        Raises
        ------
        UserError
            A parameter is missing or wrong.
        """
        request = parameters.value("REQUEST")
        if request is not None and request.lower() != "doquery":
            raise UsageError(f"REQUEST = {request[:40]!r}: expected doQuery, or nothing")
        language = parameters.value("LANG") or "ADQL"
        if language.upper() not in LANGUAGES:
            raise UsageError(f"LANG = {language[:40]!r}: expected one of {', '.join(LANGUAGES)}")
        adql = parameters.required("QUERY")
        if len(adql.encode()) > MAX_QUERY_BYTES:
            raise TooLargeError(
                f"QUERY has {len(adql.encode()):,} bytes, at most {MAX_QUERY_BYTES:,} are read; long lists go "
                "into a table that is uploaded with the query"
            )
        wanted = parameters.value("RESPONSEFORMAT") or parameters.value("FORMAT")
        version = _VERSION.search(wanted) if wanted else None
        form = find_format(_VERSION.sub("", wanted) if wanted else None)
        return cls(adql, form, version[1] if version else "1.4", parameters.integer("MAXREC"))


class Stop:
    """Ends a query from any thread, whether it has begun or not."""

    def __init__(self) -> None:
        self.told = threading.Event()
        self._lock = threading.Lock()
        self._result: Result | None = None

    def watch(self, result: Result | None) -> None:
        """The query that is to be ended; None when there is none any more."""
        with self._lock:
            self._result = result
        if result is not None and self.told.is_set():
            result.cancel()

    def __call__(self) -> None:
        """End it."""
        self.told.set()
        with self._lock:
            result = self._result
        if result is not None:
            result.cancel()

    def later(self) -> None:
        """End it without waiting for that."""
        if not self.told.is_set():
            threading.Thread(target=self, name="query-stop", daemon=True).start()


def _no_place() -> TransientError:
    return TransientError(
        "this query is long and the places for long ones are taken; try again, or send it as an asynchronous job"
    )


@dataclass(frozen=True)
class Tap:
    """Queries of a site.

    Attributes
    ----------
    tables, engines
        What can be asked and who runs it.
    allowed
        What a query may cost in each mode, for whom.
    upload_bytes
        Most bytes of one request.
    upload_hosts
        Hosts of private networks from which tables may be fetched.
    """

    tables: Tables
    engines: Engines
    identity: Identity
    store: JobStore
    pool: Executor
    lanes: Lanes
    allowed: Allowed
    upload_bytes: int
    upload_hosts: frozenset[str] = frozenset()

    # at once

    async def sync(self, request: Request, who: Principal) -> Response:
        """``/tap/sync``."""
        parameters = await read_parameters(request, limit_bytes=self.upload_bytes)
        question = Question.of(parameters)
        files = await in_pool(self.pool, self.uploaded, parameters)
        return await self.answer(request, question, who, files)

    async def answer(
        self,
        request: Request,
        question: Question,
        who: Principal,
        files: Mapping[str, bytes] | None = None,
        *,
        describe: Callable[[Column], Column] | None = None,
        services: Sequence[ServiceDescriptor] = (),
    ) -> Response:
        """Run a query and stream its answer.

        Parameters
        ----------
        files
            Uploaded tables by name.
        describe
            Changes what the document says of a column.
        services
            More that can be asked, beside what belongs to the columns.

        Raises
        ------
        UserError
            The query is wrong, or failed before anything was sent.
        """
        stop = Stop()
        pipe = Pipe(asyncio.get_running_loop())

        def work(pipe: Pipe) -> None:

            def write(block: bytes | bytearray | memoryview) -> int:
                place.give_way()
                return pipe.write(block)

            with self.lanes.place(stop) as place:
                try:
                    uploads = {name: read_table(content, name) for name, content in (files or {}).items()}
                    result = self.start(question, who, self.allowed.sync_limits(who), uploads, stop.told)
                    if describe is not None:
                        result.columns = tuple(describe(column) for column in result.columns)
                    stop.watch(result)
                    told = [*services, *next_steps(request, result.columns)]
                    status = self._write(result, question, write, told)
                except QueryCancelledError:
                    if place.pushed_out.is_set():
                        raise _no_place() from None
                    raise
                finally:
                    stop.watch(None)
            self.identity.audit(who, "query", question.adql, status.partition(":")[0])
            if status.startswith("ERROR") and not pipe.flushed:
                if place.pushed_out.is_set():
                    raise _no_place()
                raise QueryFailedError(status.partition(":")[2].strip())

        await start_writing(self.pool, pipe, work, request, stop.later)
        headers = {"Cache-Control": "no-store"}
        if question.form.name not in ("votable", "votable-tabledata", "json"):
            headers["Content-Disposition"] = f'inline; filename="result.{question.form.extension}"'
        return StreamingResponse(pipe.blocks(stop.later), 200, headers, question.form.media_type)

    def uploaded(self, parameters: Parameters) -> dict[str, bytes]:
        """Content of every table that comes with a request.

        Raises
        ------
        UserError
            One is not there, or cannot be fetched.
        """
        out: dict[str, bytes] = {}
        lower = {name.lower(): item for name, item in parameters.files.items()}
        for name, where in parse_upload_parameter(parameters.values("UPLOAD")).items():
            if not where.lower().startswith("param:"):
                out[name] = fetch_table(where, self.upload_bytes, self.upload_hosts)
                continue
            wanted = where[len("param:") :]
            item = parameters.files.get(wanted) or lower.get(wanted.lower())
            if item is not None:
                out[name] = item.file.read()
            elif found := parameters.values(wanted):
                out[name] = found[-1].encode()
            else:
                raise UsageError(
                    f"UPLOAD: there is no file {wanted[:60]!r} in the request; send a form (multipart/form-data) "
                    "with a part of that name"
                )
        return out

    def start(
        self,
        question: Question,
        who: Principal,
        limits: Limits,
        uploads: Mapping[str, pa.Table],
        cancel: threading.Event,
    ) -> Result:
        """Start a query."""
        return run(
            question.adql, tables=self.tables, engines=self.engines, user=user_of(who), limits=limits,
            maxrec=question.maxrec, uploads=uploads, cancel=cancel,
        )  # fmt: skip

    @staticmethod
    def _write(
        result: Result, question: Question, write_bytes: Any, services: Sequence[ServiceDescriptor] = ()
    ) -> str:
        return write(
            result, question.form, write_bytes, info={"QUERY": question.adql},
            votable_version=question.votable_version, services=services,
        )  # fmt: skip

    # jobs

    def make_job(self, parameters: Parameters, who: Principal) -> Job:
        """Store a job of a request; its uploads are kept with it.

        Raises
        ------
        UserError
            A parameter that could never work. A job without QUERY may get it later.
        """
        job_id = new_job_id()
        for name, content in self.uploaded(parameters).items():
            write_atomic(self._upload_path(job_id, name), content)
        return self.store.create(
            SERVICE, who, [pair for pair in parameters.pairs if pair[0].upper() not in ("PHASE", "ACTION")],
            execution_s=self.longest_job_s(who), run_id=parameters.value("RUNID"), job_id=job_id,
        )  # fmt: skip

    def longest_job_s(self, who: Principal) -> int:
        """Seconds that a job of this one may take."""
        return int(self.allowed.job_limits(who).seconds)

    def _upload_path(self, job_id: str, name: str) -> Path:
        return self.store.job_folder(job_id) / "uploads" / name.lower()

    def work(self, job: Job, context: JobContext) -> list[JobResult]:
        """Run a stored query; its answer is a file.

        Raises
        ------
        UserError
            The query is wrong or failed.
        """
        question = Question.of(Parameters(list(job.parameters)))
        uploads = {}
        for name in parse_upload_parameter(job.values("UPLOAD")):
            path = self._upload_path(job.job_id, name)
            if not path.is_file():
                raise ConflictError(f"upload {name} was never sent with this job; make a new job with it")
            uploads[name] = read_table(path.read_bytes(), name)
        limits = replace(self.allowed.job_limits(job.principal), seconds=float(job.execution_s))
        result = self.start(question, job.principal, limits, uploads, context.cancelled)
        context.on_cancel(result.cancel)
        target = context.folder / f"result.{question.form.extension}"
        status = ""

        def content(writer: Any) -> None:
            nonlocal status

            def counted(block: bytes) -> None:
                writer.write(block)
                context.info.update(rows=result.rows, bytes=writer.size)

            status = self._write(result, question, counted)
            if status.startswith("ERROR"):
                raise QueryFailedError(status.partition(":")[2].strip())

        written = write_atomic(target, content)
        context.info.update(rows=result.rows, bytes=written.size)
        if status.startswith("OVERFLOW"):
            context.info["overflow"] = status.partition(":")[2].strip()
        self.identity.audit(job.principal, "query job", question.adql, status.partition(":")[0])
        return [JobResult("result", target.name, question.form.media_type, written.size, target.name)]
