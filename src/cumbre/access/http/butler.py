"""The repository of images for ``Butler("https://…/butler/")``: the protocol of the middleware's remote Butler.

In: requests of an unmodified ``RemoteButler``. Out: the middleware's own models, made by a Butler of the repository that
the one who asks may see: the whole one, or a copy without what is not released (:mod:`cumbre.repository.released`).
Files come from here too, by token. Systems C3, G3.

The middleware is imported when somebody asks first: a site without such users pays nothing for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cumbre.access.http.base import (
    Gate,
    TooLargeError,
    UsageError,
    base_url,
    in_pool,
    status_of,
)
from cumbre.access.http.base import error_headers as headers_of
from cumbre.access.http.stream import Pipe, start_writing
from cumbre.access.identity import COLLABORATION, EMBARGO, Identity, Principal
from cumbre.core.errors import CumbreError, NotFoundError

if TYPE_CHECKING:
    from lsst.daf.butler import Butler, DatasetRef

PATH = "butler"
MAX_BODY = 64 << 20
MAX_UPLOAD_ROWS = 100_000
FRESH_S = 60.0
"""A Butler is opened anew after this time, for collections and types that came meanwhile."""
LEVELS = ("public", COLLABORATION, EMBARGO)
_USER_ERROR = 422
"""Status of errors that the client raises as the middleware's own."""


def level_of(who: Principal) -> str:
    """Which repository somebody may see."""
    if EMBARGO in who.rights:
        return EMBARGO
    return COLLABORATION if COLLABORATION in who.rights else "public"


@dataclass
class Butlers:
    """Butlers of the repositories, one kept for each level.

    Attributes
    ----------
    roots
        Folder of the repository of a level, which may not be ready yet (``TransientError``).
    """

    roots: Callable[[str], Path]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _kept: dict[str, tuple[float, Any]] = field(default_factory=dict)
    _retired: dict[str, Any] = field(default_factory=dict)

    def open(self, level: str) -> Butler:
        """A Butler for one request."""
        from lsst.daf.butler import Butler

        root = self.roots(level)
        with self._lock:
            made_s, kept = self._kept.get(level, (-FRESH_S, None))
            if kept is None or time.monotonic() - made_s > FRESH_S:
                # requests that began with the one before may still read: it is closed a turn later
                if (before := self._retired.pop(level, None)) is not None:
                    before.close()
                if kept is not None:
                    self._retired[level] = kept
                kept = Butler.from_config(str(root))
                self._kept[level] = (time.monotonic(), kept)
            clone: Butler = kept.clone()
            return clone

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            for butler in [*self._retired.values(), *(kept for _, kept in self._kept.values())]:
                butler.close()
            self._retired.clear()
            self._kept.clear()


@dataclass(frozen=True)
class ButlerFace:
    """The routes.

    Attributes
    ----------
    butlers
        The repositories.
    identity
        For the audit log of files.
    pool, queries
        Threads for what is answered at once, and for queries that are streamed.
    """

    butlers: Butlers
    identity: Identity
    gate: Gate
    pool: Executor
    queries: Executor

    def routes(self) -> list[Route]:
        """All of them, below ``/butler``."""
        own: list[tuple[str, str, Any]] = [
            ("butler.yaml", "GET", self.config), ("butler.json", "GET", self.config),
            ("v1/dataset/{id}/download", "GET", self.download),
            ("v1/query/execute", "POST", self.execute), ("v1/query/all_datasets", "POST", self.all_datasets),
        ]  # fmt: skip
        own += [(path, "GET", self._answering(function)) for path, function in _GETS.items()]
        own += [
            (path, "POST", self._answering(function, model)) for path, (model, function) in _POSTS.items()
        ]
        return [
            Route(
                f"/{PATH}/{path}", self.gate.endpoint(handler, scope="read:image", error=butler_error), methods=[method]
            )
            for path, method, handler in own
        ]  # fmt: skip

    async def config(self, request: Request, who: Principal) -> Response:
        """What a client needs to know; the same for all."""
        del who
        about = {"url": base_url(request, PATH), "authentication": "rubin_science_platform"}
        return JSONResponse({"cls": "lsst.daf.butler.remote_butler.RemoteButler", "remote_butler": about})

    def _answering(self, function: Callable[..., Any], model: str = "") -> Any:
        async def answer(request: Request, who: Principal) -> Response:
            body = await _body(request) if model else b""

            def work() -> str:
                given = _parsed(model, body) if model else None
                with _told_as_ours():
                    asked = Asked(self.butlers.open(level_of(who)), request, who, self.identity)
                    text: str = function(asked, given).model_dump_json(by_alias=True)
                return text

            return Response(await in_pool(self.pool, work), media_type="application/json")

        return answer

    async def download(self, request: Request, who: Principal) -> Response:
        """The file of a data set."""
        text = request.path_params["id"]

        def find() -> Path:
            butler = self.butlers.open(level_of(who))
            ref = butler.get_dataset(_uuid(text), datastore_records=True)
            place = None if ref is None else butler.getURIs(ref).primaryURI
            self.identity.audit(who, "butler file", text, "ok" if place is not None else "absent")
            if place is None or not place.isLocal or not Path(place.ospath).is_file():
                raise NotFoundError(f"data set {text}: there is none, or it is not released to you yet")
            return Path(place.ospath)

        path = await in_pool(self.pool, find)
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    async def execute(self, request: Request, who: Principal) -> Response:
        """Rows of a query, a page of them in each line."""

        def pages(given: Any) -> Iterator[Any]:
            butler = self.butlers.open(level_of(who))
            with _driver(butler, given.query) as (driver, tree):
                spec = given.result_spec.to_result_spec(driver.universe)
                for page in driver.execute(spec, tree):
                    yield _page(spec, page)

        return await self._stream(request, "QueryExecuteRequestModel", pages)

    async def all_datasets(self, request: Request, who: Principal) -> Response:
        """Data sets of many types, a page of them in each line."""

        def pages(given: Any) -> Iterator[Any]:
            from lsst.daf.butler._query_all_datasets import QueryAllDatasetsParameters, query_all_datasets
            from lsst.daf.butler.remote_butler.server_models import DatasetRefResultModel

            butler = _with_defaults(self.butlers.open(level_of(who)), given.default_data_id)
            wanted = QueryAllDatasetsParameters(
                collections=given.collections, name=given.name, find_first=given.find_first, data_id=given.data_id,
                where=given.where, bind={name: value.get_literal_value() for name, value in given.bind.items()},
                limit=given.limit, with_dimension_records=given.with_dimension_records,
            )  # fmt: skip
            with butler.query() as query:
                for page in query_all_datasets(butler, query, wanted):
                    yield DatasetRefResultModel.from_refs(page.data)

        return await self._stream(request, "QueryAllDatasetsRequestModel", pages)

    async def _stream(self, request: Request, model: str, pages: Callable[[Any], Iterator[Any]]) -> Response:
        import asyncio

        body = await _body(request)
        pipe = Pipe(asyncio.get_running_loop())

        def work(pipe: Pipe) -> None:
            from lsst.daf.butler import ButlerUserError
            from lsst.daf.butler.remote_butler._errors import serialize_butler_user_error
            from lsst.daf.butler.remote_butler.server_models import QueryErrorResultModel

            given = _parsed(model, body)
            try:
                for page in pages(given):
                    pipe.write(page.model_dump_json().encode() + b"\n")
            except ButlerUserError as error:
                told = QueryErrorResultModel(error=serialize_butler_user_error(error))
                pipe.write(told.model_dump_json().encode() + b"\n")

        def nothing() -> None:
            """A page that is being read cannot be stopped; the next write ends it."""

        await start_writing(self.queries, pipe, work, request, nothing)
        return StreamingResponse(pipe.blocks(nothing), media_type="application/jsonlines")


@dataclass(frozen=True)
class Asked:
    """What a handler works with."""

    butler: Butler
    request: Request
    who: Principal
    identity: Identity

    def url_of(self, dataset_id: UUID) -> str:
        """Where a client gets the file of a data set."""
        return base_url(self.request, f"{PATH}/v1/dataset/{dataset_id}/download")


class _UserFaultError(UsageError):
    """An error of the middleware that its client raises again."""

    def __init__(self, document: str) -> None:
        super().__init__(document)
        self.document = document


@contextmanager
def _told_as_ours() -> Iterator[None]:
    """Errors of the middleware that are the user's become documents for its client."""
    from lsst.daf.butler import ButlerUserError
    from lsst.daf.butler.remote_butler._errors import serialize_butler_user_error

    try:
        yield
    except ButlerUserError as error:
        raise _UserFaultError(serialize_butler_user_error(error).model_dump_json()) from error


def butler_error(error: CumbreError) -> Response:
    """Errors as the client knows them."""
    if isinstance(error, _UserFaultError):
        return Response(error.document, _USER_ERROR, media_type="application/json")
    return JSONResponse({"detail": str(error)}, status_of(error), headers_of(error))


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for block in request.stream():
        body += block
        if len(body) > MAX_BODY:
            raise TooLargeError(f"the request is larger than {MAX_BODY} bytes, the most that is taken here")
    return bytes(body)


def _parsed(model: str, body: bytes) -> Any:
    from lsst.daf.butler.remote_butler import server_models
    from pydantic import ValidationError

    try:
        return getattr(server_models, model).model_validate_json(body)
    except ValidationError as error:
        raise UsageError(f"not a request of a Butler client: {str(error)[:500]}") from None


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise UsageError(f"{text[:60]!r} is not the UUID of a data set") from None


def _models() -> Any:
    from lsst.daf.butler.remote_butler import server_models

    return server_models


def _with_defaults(butler: Butler, data_id: Any) -> Butler:
    from lsst.daf.butler import DataCoordinate
    from lsst.daf.butler.registry import RegistryDefaults

    values = DataCoordinate.standardize(data_id, universe=butler.dimensions)
    butler.registry.defaults = RegistryDefaults.from_data_id(values)
    return butler


@contextmanager
def _driver(butler: Any, query: Any) -> Iterator[tuple[Any, Any]]:
    """The middleware's query driver with everything that a query of a client brings, and the query."""
    from lsst.daf.butler import DataCoordinate, DimensionGroup

    universe = butler.dimensions
    tree = query.tree.to_query_tree(universe)
    defaults = DataCoordinate.from_simple(query.default_data_id, universe=universe)
    with butler._query_driver(default_collections=(), default_data_id=defaults) as driver:
        for item in query.additional_query_inputs:
            dimensions = DimensionGroup.from_simple(item.dimensions, universe)
            if item.type == "upload":
                if len(item.rows) > MAX_UPLOAD_ROWS:
                    raise UsageError(f"{len(item.rows)} data ids: at most {MAX_UPLOAD_ROWS} are taken")
                driver.upload_data_coordinates(dimensions, [tuple(row) for row in item.rows], key=item.key)
            else:
                driver.materialize(
                    item.tree.to_query_tree(universe), dimensions, frozenset(item.datasets), key=item.key,
                    allow_duplicate_overlaps=item.allow_duplicate_overlaps,
                )  # fmt: skip
        yield driver, tree


def _page(spec: Any, page: Any) -> Any:
    """A page of results as the client reads it."""
    models = _models()
    match spec.result_type:
        case "dimension_record":
            return models.DimensionRecordsResultModel(rows=[row.to_simple() for row in page.rows])
        case "data_coordinate":
            return models.DataCoordinateResultModel(rows=[row.to_simple() for row in page.rows])
        case "dataset_ref":
            return models.DatasetRefResultModel.from_refs(page.rows)
    from lsst.daf.butler.column_spec import make_tuple_type_adapter

    columns = page.spec.get_result_columns()
    adapter = make_tuple_type_adapter([columns.get_column_spec(c.logical_table, c.field) for c in columns])
    records = page.dimension_records
    return models.GeneralResultModel(
        rows=[adapter.dump_python(row, mode="json") for row in page.rows],
        dimension_records=None if records is None else {
            element.name: [record.to_simple() for record in of_element] for element, of_element in records.items()
        },
    )  # fmt: skip


# what is answered at once


def _universe(asked: Asked, _: None) -> Any:
    return _models().GetUniverseResponseModel(universe=asked.butler.dimensions.dimensionConfig.to_simple())


def _dataset_type(asked: Asked, _: None) -> Any:
    kind = asked.butler.get_dataset_type(asked.request.path_params["name"])
    return _models().GetDatasetTypeResponseModel(dataset_type=kind.to_simple())


def _found(ref: DatasetRef | None) -> Any:
    return _models().FindDatasetResponseModel(dataset_ref=None if ref is None else ref.to_simple())


def _dataset(asked: Asked, _: None) -> Any:
    records = asked.request.query_params.get("dimension_records", "").lower() in ("true", "1")
    return _found(asked.butler.get_dataset(_uuid(asked.request.path_params["id"]), dimension_records=records))


def _datasets(asked: Asked, given: Any) -> Any:
    return _models().GetManyDatasetsResponseModel.from_refs(asked.butler.get_many_datasets(given.dataset_ids))


def _find(asked: Asked, given: Any) -> Any:
    butler = _with_defaults(asked.butler, given.default_data_id)
    ref = butler.find_dataset(
        given.dataset_type, given.data_id, collections=given.collections, timespan=given.timespan,
        dimension_records=given.dimension_records,
    )  # fmt: skip
    return _found(ref)


def _expand(asked: Asked, given: Any) -> Any:
    made = asked.butler.registry.expandDataId(given.data_id)
    return _models().ExpandDataIdResponseModel(data_coordinate=made.to_simple())


def _file(asked: Asked, _: None) -> Any:
    from lsst.daf.butler import DatasetNotFoundError

    dataset_id = _uuid(asked.request.path_params["id"])
    ref = asked.butler.get_dataset(dataset_id, datastore_records=True)
    if ref is None:
        raise DatasetNotFoundError(f"Dataset ID {dataset_id} not found")
    return _file_of(asked, ref)


def _file_by_data_id(asked: Asked, given: Any) -> Any:
    butler: Any = _with_defaults(asked.butler, given.default_data_id)
    ref = butler._findDatasetRef(
        datasetRefOrType=given.dataset_type, dataId=given.data_id, collections=given.collections,
        datastore_records=True, timespan=given.timespan,
    )  # fmt: skip
    return _file_of(asked, ref)


def _file_of(asked: Asked, ref: DatasetRef) -> Any:
    """Where the file is and how it is read; only data sets of one file."""
    from lsst.daf.butler.datastore.stored_file_info import make_datastore_path_relative

    models = _models()
    butler: Any = asked.butler
    locations = butler._datastore.prepare_get_for_external_client(ref)
    artifact = None
    if locations:
        files = []
        for _, info in locations:
            records = info.to_simple()
            records.path = make_datastore_path_relative(records.path)
            files.append(
                models.FileInfoRecord(url=asked.url_of(ref.id), datastoreRecords=records, auth="gafaelfawr")
            )
        artifact = models.FileInfoPayload(datastore_type="file", file_info=files)
    return models.GetFileResponseModel(dataset_ref=ref.to_simple(), artifact=artifact)


def _transfer(asked: Asked, given: Any) -> Any:
    """Where files are that go to another repository."""
    from lsst.daf.butler.datastore.stored_file_info import make_datastore_path_relative

    models = _models()
    butler: Any = asked.butler
    out: dict[Any, list[Any]] = {}
    for dataset_id, records in butler._datastore.get_file_info_for_transfer(given.dataset_ids).items():
        out[dataset_id] = []
        for record in records:
            info = record.file_info.to_simple()
            info.path = make_datastore_path_relative(info.path)
            made = models.FileTransferRecordModel(
                url=asked.url_of(dataset_id), auth="gafaelfawr", file_info=info
            )
            out[dataset_id].append(made)
    return models.GetFileTransferInfoResponseModel(files=out)


def _collection_summary(asked: Asked, _: None) -> Any:
    name = asked.request.query_params.get("name", "")
    summary = asked.butler.registry.getCollectionSummary(name)
    return _models().GetCollectionSummaryResponseModel(summary=summary.to_simple())


def _collections(asked: Asked, given: Any) -> Any:
    found = asked.butler.collections.query_info(
        given.expression, collection_types=set(given.collection_types), flatten_chains=given.flatten_chains,
        include_chains=given.include_chains, include_parents=given.include_parents,
        include_summary=given.include_summary, include_doc=given.include_doc, summary_datasets=given.summary_datasets,
    )  # fmt: skip
    return _models().QueryCollectionInfoResponseModel(collections=list(found))


def _dataset_types(asked: Asked, given: Any) -> Any:
    missing: list[str] = []
    found = asked.butler.registry.queryDatasetTypes(given.search, missing=missing)
    return _models().QueryDatasetTypesResponseModel(
        dataset_types=[kind.to_simple() for kind in found], missing=missing
    )


def _count(asked: Asked, given: Any) -> Any:
    with _driver(asked.butler, given.query) as (driver, tree):
        spec = given.result_spec.to_result_spec(driver.universe)
        count = driver.count(tree, spec, exact=given.exact, discard=given.discard)
    return _models().QueryCountResponseModel(count=count)


def _any(asked: Asked, given: Any) -> Any:
    with _driver(asked.butler, given.query) as (driver, tree):
        found = driver.any(tree, execute=given.execute, exact=given.exact)
    return _models().QueryAnyResponseModel(found_rows=found)


def _explain(asked: Asked, given: Any) -> Any:
    with _driver(asked.butler, given.query) as (driver, tree):
        messages = driver.explain_no_results(tree, execute=given.execute)
    return _models().QueryExplainResponseModel(messages=list(messages))


_GETS: dict[str, Callable[[Asked, None], Any]] = {
    "v1/universe": _universe, "v1/dataset_type/{name}": _dataset_type, "v1/dataset/{id}": _dataset,
    "v1/get_file/{id}": _file, "v1/collection_summary": _collection_summary,
}  # fmt: skip
_POSTS: dict[str, tuple[str, Callable[[Asked, Any], Any]]] = {
    "v1/datasets": ("GetManyDatasetsRequestModel", _datasets), "v1/find_dataset": ("FindDatasetRequestModel", _find),
    "v1/expand_data_id": ("ExpandDataIdRequestModel", _expand),
    "v1/get_file_by_data_id": ("GetFileByDataIdRequestModel", _file_by_data_id),
    "v1/file_transfer": ("GetFileTransferInfoRequestModel", _transfer),
    "v1/query_collection_info": ("QueryCollectionInfoRequestModel", _collections),
    "v1/query_dataset_types": ("QueryDatasetTypesRequestModel", _dataset_types),
    "v1/query/count": ("QueryCountRequestModel", _count), "v1/query/any": ("QueryAnyRequestModel", _any),
    "v1/query/explain": ("QueryExplainRequestModel", _explain),
}  # fmt: skip
