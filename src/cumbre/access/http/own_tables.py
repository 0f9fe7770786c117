"""Users' tables over HTTP, as CADC's youcat does it, so that pyvo's ``create_table`` and ``load_table`` work.

``PUT /tap/tables/NAME`` makes a table from a VOSI table or an empty VOTable, ``POST /tap/load/NAME`` appends a file,
``DELETE /tap/tables/NAME`` drops it, ``POST /tap/table-update`` is a UWS job that makes an index; beside them
``/tap/save`` (UWS: the rows of a query become a table), ``/tap/share/NAME`` and ``/tap/usage``.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cumbre.access.http.base import (
    Gate,
    Parameters,
    TooLargeError,
    UsageError,
    dali_error,
    in_pool,
    read_parameters,
)
from cumbre.access.http.tap import Question, Tap
from cumbre.access.http.upload_files import read_table
from cumbre.access.http.uws_views import JobFace
from cumbre.access.identity import AuthenticationError, Principal
from cumbre.access.results.types import column_of_field
from cumbre.access.tables import Column
from cumbre.access.user_tables import UserTables
from cumbre.access.uws import Job, JobResult, JobStore
from cumbre.access.uws_runner import JobContext, JobRunner
from cumbre.core.errors import CumbreError

if TYPE_CHECKING:
    from starlette.datastructures import UploadFile

SCOPE = "write:table"
UPDATE, SAVE = "table-update", "table-save"
MAX_DEFINITION_BYTES = 1 << 20
_VOSI_TYPES = {
    "boolean", "unsignedByte", "short", "int", "long", "float", "double", "char", "unicodeChar",
}  # fmt: skip
_TAP_TYPES = {
    "smallint": "short", "integer": "int", "bigint": "long", "real": "float", "varchar": "char", "clob": "char",
    "timestamp": "char",
}  # fmt: skip


@dataclass(frozen=True)
class OwnTables:
    """The face of users' tables.

    Attributes
    ----------
    upload_bytes
        Most bytes of one file.
    """

    tables: UserTables
    gate: Gate
    pool: Executor
    upload_bytes: int
    store: JobStore
    tap: Tap

    def routes(self, runner: JobRunner) -> list[Route]:
        """All resources."""

        def route(path: str, handler: Any, *methods: str) -> Route:
            return Route(
                path, self.gate.endpoint(handler, scope=SCOPE, error=dali_error), methods=list(methods)
            )

        jobs = [
            JobFace(
                service=service, path=f"tap/{path}", scope=SCOPE, store=self.store, runner=runner, gate=self.gate,
                pool=self.pool, make=make, max_execution_s=self.tap.longest_job_s,
                body_limit=MAX_DEFINITION_BYTES,
            )
            for service, path, make in ((UPDATE, "table-update", self.make_update), (SAVE, "save", self.make_save))
        ]  # fmt: skip
        return [
            route("/tap/tables/{name}", self.put_or_delete, "PUT", "DELETE"),
            route("/tap/load/{name}", self.load, "POST"),
            route("/tap/share/{name}", self.share, "POST"),
            route("/tap/usage", self.usage, "GET"),
            *(found for face in jobs for found in face.routes()),
        ]

    # at once

    async def put_or_delete(self, request: Request, who: Principal) -> Response:
        """Make or drop a table."""
        account, name = account_of(who), request.path_params["name"]
        if request.method == "DELETE":
            await in_pool(self.pool, self.tables.drop, account, name)
            await in_pool(self.pool, self.gate.identity.audit, who, "table drop", name)
            return PlainTextResponse(f"{name} is dropped\n")
        content = await body_of(request, MAX_DEFINITION_BYTES)
        columns, description = await in_pool(self.pool, definition_of, content)
        made = await in_pool(self.pool, self.tables.create, account, name, columns, description)
        await in_pool(self.pool, self.gate.identity.audit, who, "table create", made)
        return PlainTextResponse(f"{made}\n", 201)

    async def load(self, request: Request, who: Principal) -> Response:
        """Append a file: TSV, CSV, VOTable, FITS or Parquet; with ``?create=true`` the table is made of it."""
        account, name = account_of(who), request.path_params["name"]
        create = request.query_params.get("create", "").lower() in ("1", "true", "yes")
        content = await body_of(request, self.upload_bytes)

        def work() -> int:
            rows = read_table(content, name)
            if create:
                self.tables.create(account, name, [column_of_field(field) for field in rows.schema])
            try:
                return self.tables.append(account, name, rows)
            except CumbreError:
                if create:
                    self.tables.drop(account, name)
                raise

        count = await in_pool(self.pool, work)
        await in_pool(self.pool, self.gate.identity.audit, who, "table load", name)
        return PlainTextResponse(f"{name} has {count} rows\n")

    async def share(self, request: Request, who: Principal) -> Response:
        """Let the groups of the parameters GROUP read a table; none takes it back."""
        parameters = await read_parameters(request)
        groups = parameters.values("GROUP")
        await in_pool(self.pool, self.tables.share, account_of(who), request.path_params["name"], groups)
        return JSONResponse({"table": request.path_params["name"], "shared_with": sorted(set(groups))})

    async def usage(self, request: Request, who: Principal) -> Response:
        """Room used and allowed, and the name of one's schema."""
        del request
        account = account_of(who)
        schema = await in_pool(self.pool, self.tables.schema_of, account)
        room = await in_pool(self.pool, self.tables.usage, account)
        return JSONResponse({"schema": schema, "used_bytes": room.used, "quota_bytes": room.quota})

    # jobs

    def make_update(self, parameters: Parameters, who: Principal) -> Job:
        """Store a job that indexes a column."""
        account_of(who)
        parameters.required("TABLE")
        parameters.required("INDEX")
        return self._make(UPDATE, parameters, who)

    def make_save(self, parameters: Parameters, who: Principal) -> Job:
        """Store a job that saves the rows of a query as a table."""
        account_of(who)
        parameters.required("TABLE")
        Question.of(parameters)
        return self._make(SAVE, parameters, who)

    def _make(self, service: str, parameters: Parameters, who: Principal) -> Job:
        pairs = [pair for pair in parameters.pairs if pair[0].upper() not in ("PHASE", "ACTION")]
        return self.store.create(service, who, pairs, execution_s=self.tap.longest_job_s(who))

    def work_update(self, job: Job, context: JobContext) -> list[JobResult]:
        """Index a column."""
        del context
        given = Parameters(list(job.parameters))
        unique = (given.value("UNIQUE") or "").lower() in ("1", "true", "yes")
        self.tables.add_index(
            account_of(job.principal), given.required("TABLE"), given.required("INDEX"), unique=unique
        )
        return []

    def work_save(self, job: Job, context: JobContext) -> list[JobResult]:
        """Run the query and append its batches to a new table; a failure leaves no table."""
        import pyarrow as pa

        given = Parameters(list(job.parameters))
        account, name = account_of(job.principal), given.required("TABLE")
        question = Question.of(given)
        with self.tap.start(
            question, job.principal, self.tap.allowed.job_limits(job.principal), {}, context.cancelled
        ) as result:
            # pixels are made anew where there is a position; a copied column of them would be in its way
            columns = [column for column in result.columns if column.name.lower() != "hpx29"]
            made = self.tables.create(account, name, columns, f"Saved query: {question.adql}")
            try:
                for batch in result.batches():
                    self.tables.append(account, name, pa.Table.from_batches([batch]))
                    context.info.update(rows=result.rows, table=made)
            except BaseException:
                self.tables.drop(account, name)
                raise
        context.info.update(rows=result.rows, table=made)
        return []


def account_of(who: Principal) -> str:
    """The account of somebody with a token.

    Raises
    ------
    AuthenticationError
        Nobody known.
    """
    if who.is_anonymous:
        raise AuthenticationError("tables of one's own need a token with the scope write:table")
    return who.account


async def body_of(request: Request, limit: int) -> bytes:
    """The whole body, bounded.

    Raises
    ------
    TooLargeError
        It is larger than ``limit`` bytes.
    UsageError
        There is none.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        files: dict[str, UploadFile] = (await read_parameters(request, limit_bytes=limit)).files
        if len(files) != 1:
            raise UsageError(f"{len(files)} files in the form: expected one")
        return await next(iter(files.values())).read()
    content = bytearray()
    async for block in request.stream():
        content += block
        if len(content) > limit:
            raise TooLargeError(f"the file is larger than {limit} bytes, the most that is taken at once")
    if not content:
        raise UsageError("the request has no body: send the file, or the definition of the table, in it")
    return bytes(content)


def definition_of(content: bytes) -> tuple[list[Column], str]:
    """Columns and description of a table that is described by a VOSI table or by a VOTable.

    Raises
    ------
    UsageError
        It is neither.
    """
    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        root: Element = fromstring(content, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError) as error:
        raise UsageError(f"the table's definition is not XML: {str(error)[:200]}") from error
    name = _local(root)
    if name == "VOTABLE":
        rows = read_table(content, "definition")
        return [column_of_field(field) for field in rows.schema], ""
    if name != "table":
        raise UsageError(f"the table's definition begins with {name[:40]}: expected table (VOSI) or VOTABLE")
    columns = [_column(child) for child in root if _local(child) == "column"]
    return columns, _text(root, "description")


def _column(element: Element) -> Column:
    kind = next((child for child in element if _local(child) in ("dataType", "datatype")), None)
    text = (kind.text or "").strip() if kind is not None else ""
    arraysize = kind.get("arraysize") if kind is not None else None
    datatype = text if text in _VOSI_TYPES else _TAP_TYPES.get(text.lower().removeprefix("adql:"), "")
    if not datatype:
        raise UsageError(
            f"column {_text(element, 'name')[:60]}: datatype {text[:40]!r}: expected one of {', '.join(sorted(_VOSI_TYPES))}"
        )
    if datatype in ("char", "unicodeChar"):
        arraysize = "*"
    return Column(
        _text(element, "name"), datatype, arraysize, unit=_text(element, "unit"), ucd=_text(element, "ucd"),
        utype=_text(element, "utype"), description=_text(element, "description"),
    )  # fmt: skip


def _text(element: Element, name: str) -> str:
    for child in element:
        if _local(child) == name:
            return (child.text or "").strip()
    return ""


def _local(element: Element) -> str:
    return str(element.tag).rpartition("}")[2]
