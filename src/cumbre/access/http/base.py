"""What every service shares: parameters, who asks, limits, errors as documents, work in pools of threads."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape, quoteattr

from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from cumbre.access.identity import (
    AuthenticationError,
    AuthorizationError,
    Identity,
    Principal,
    RateLimitError,
)
from cumbre.core.errors import ConflictError, CumbreError, NotFoundError, TransientError, UserError

if TYPE_CHECKING:
    from starlette.datastructures import UploadFile

log = logging.getLogger(__name__)

VOTABLE_MIME = "application/x-votable+xml"
XML_MIME = "text/xml"
MAX_FIELDS = 1000
MAX_FORM_BYTES = 1 << 20
MAX_LINKS_BYTES = 8 << 20
REQUEST_WINDOW = "requests"
FAILED_PER_MINUTE = 300
"""Requests of one address with a token that is not valid."""
OPEN_HEADERS = {"Access-Control-Allow-Origin": "*", "X-Content-Type-Options": "nosniff"}
"""Pages elsewhere may ask, for there are no cookies: who asks is told by a header that they must know."""
RETRY_S = 5
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class TooLargeError(UserError):
    """The request's body is larger than allowed."""

    outcome = "UsageError"


class UsageError(UserError):
    """A parameter is missing or wrong."""

    outcome = "UsageError"


class BusyError(TransientError):
    """All places of a pool and its queue are taken."""

    outcome = "ServiceUnavailable"


@dataclass
class Parameters:
    """Parameters of a request by DALI: names without regard to case, values in order."""

    pairs: list[tuple[str, str]] = field(default_factory=list)
    files: dict[str, UploadFile] = field(default_factory=dict)

    def values(self, name: str) -> list[str]:
        """All values of a parameter that are not empty."""
        return [value for key, value in self.pairs if key.upper() == name.upper() and value.strip()]

    def value(self, name: str) -> str | None:
        """The value of a parameter that may be given once.

        Raises
        ------
        UsageError
            It is given with two different values.
        """
        found = list(dict.fromkeys(self.values(name)))
        if len(found) > 1:
            raise UsageError(f"{name} is given {len(found)} times: expected once")
        return found[0] if found else None

    def required(self, name: str) -> str:
        """The value of a parameter that must be there.

        Raises
        ------
        UsageError
            It is not.
        """
        found = self.value(name)
        if found is None:
            raise UsageError(f"the parameter {name} is missing")
        return found

    def integer(self, name: str, *, least: int = 0) -> int | None:
        """A whole number, None when absent.

        Raises
        ------
        UsageError
            It is no whole number, or less than ``least``.
        """
        text = self.value(name)
        if text is None:
            return None
        if not re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text) or int(text) < least:
            raise UsageError(f"{name} = {text[:40]!r}: expected a whole number, {least} or more")
        return int(text)

    def names(self) -> set[str]:
        """Upper-case names of what is given."""
        return {key.upper() for key, _ in self.pairs}


async def read_parameters(request: Request, *, limit_bytes: int = MAX_FORM_BYTES) -> Parameters:
    """Parameters of the query string and of a form, with bounds on both.

    Raises
    ------
    TooLargeError
        The body is larger than ``limit_bytes``.
    UsageError
        The body is not a form.
    """
    pairs = _pairs(request.url.query)
    files: dict[str, UploadFile] = {}
    if request.method in ("POST", "PUT"):
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit_bytes:
            raise TooLargeError(_too_large(limit_bytes))
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            count = _Count(request.receive, limit_bytes)
            try:
                form = await Request(request.scope, count.receive).form(
                    max_files=32, max_fields=MAX_FIELDS, max_part_size=min(limit_bytes, MAX_LINKS_BYTES)
                )
            except ClientDisconnect:
                raise
            except Exception as error:
                if count.exceeded:
                    raise TooLargeError(_too_large(limit_bytes)) from error
                raise UsageError(f"the form cannot be read: {str(error)[:200]}") from error
            request.state.form = form  # the gate closes its files
            for name, item in form.multi_items():
                if isinstance(item, str):
                    pairs.append((name, item))
                else:
                    files[name] = item
        elif kind in ("application/x-www-form-urlencoded", ""):
            body = bytearray()
            async for block in request.stream():
                body += block
                if len(body) > limit_bytes:
                    raise TooLargeError(_too_large(limit_bytes))
            pairs += _pairs(body.decode("latin-1"))
        else:
            raise UsageError(
                f"Content-Type {kind[:80]!r}: expected application/x-www-form-urlencoded or multipart/form-data"
            )
    if any("\0" in name or "\0" in value for name, value in pairs):
        raise UsageError("a parameter holds the character NUL, which no text has")
    return Parameters(pairs, files)


def _pairs(text: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(text, keep_blank_values=True, max_num_fields=100_000, errors="replace")
    except ValueError as error:
        raise UsageError(f"the parameters cannot be read: {error}") from error


def _too_large(limit_bytes: int) -> str:
    return f"the request is larger than {limit_bytes} bytes, the most that is taken here"


class _Count:
    """Counts the bytes of a body and stops it in a way that lets the form close its files."""

    def __init__(self, receive: Callable[[], Awaitable[Any]], limit: int) -> None:
        self._receive, self._limit, self._seen = receive, limit, 0
        self.exceeded = False

    async def receive(self) -> Any:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            self.exceeded = True
            raise MultiPartException("too large")
        return message


# who asks


def token_of(request: Request) -> str | None:
    """The token of a request: ``Authorization: Bearer``, or the password of ``Basic``."""
    import base64
    import binascii

    scheme, _, rest = request.headers.get("authorization", "").strip().partition(" ")
    if not scheme:
        return None
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            user, _, password = base64.b64decode(rest, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise AuthenticationError("the Basic authorization cannot be read") from None
        return password or user
    raise AuthenticationError(f"authorization by {scheme[:20]!r}: expected Bearer with a token of this site")


def who_asks(request: Request, identity: Identity) -> Principal:
    """Who makes a request.

    Raises
    ------
    AuthenticationError
        A token is shown that is not valid.
    """
    address = request.client.host if request.client else ""
    token = token_of(request)
    return Principal(address=address) if token is None else identity.authenticate(token, address)


# errors


def status_of(error: CumbreError) -> int:
    """HTTP status of one of our errors."""
    if isinstance(error, AuthenticationError):
        return 401
    if isinstance(error, AuthorizationError):
        return 403
    if isinstance(error, RateLimitError):
        return 429
    if isinstance(error, TooLargeError):
        return 413
    if isinstance(error, NotFoundError):
        return 404
    if isinstance(error, ConflictError):
        return 409
    if isinstance(error, UserError):
        return 400
    if isinstance(error, TransientError):
        return 503
    return 500


def error_headers(error: CumbreError) -> dict[str, str]:
    """Headers that tell a client what to do."""
    if isinstance(error, AuthenticationError):
        return {"WWW-Authenticate": 'Bearer realm="cumbre"'}
    if isinstance(error, RateLimitError):
        return error.allowance.headers() | {"Retry-After": str(error.allowance.retry_after_s())}
    if isinstance(error, TransientError):
        return {"Retry-After": str(RETRY_S)}
    return {}


def xml_text(value: object) -> str:
    """Text for an XML element."""
    return escape(_NOT_XML.sub("\ufffd", str(value)))


def xml_attribute(value: object) -> str:
    """Quoted value for an XML attribute."""
    return quoteattr(_NOT_XML.sub("\ufffd", str(value)))


def votable_error(error: CumbreError, version: str = "1.4", text: str | None = None) -> Response:
    """An error as a VOTable document; ``text`` instead of its own."""
    document = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<VOTABLE version="{version}" xmlns="http://www.ivoa.net/xml/VOTable/v1.3">\n<RESOURCE type="results">\n'
        f'<INFO name="QUERY_STATUS" value="ERROR">{xml_text(error if text is None else text)}</INFO>\n'
        f'<INFO name="ERROR_KIND" value={xml_attribute(error.outcome)}/>\n</RESOURCE>\n</VOTABLE>\n'
    )
    return Response(document, status_of(error), error_headers(error), VOTABLE_MIME)


def fault_line(error: CumbreError) -> str:
    """An error's text with the word before it that SIA and DataLink want."""
    status = status_of(error)
    if isinstance(error, NotFoundError):
        return f"NotFoundFault: {error}"
    if status in (429, 503):
        return f"TransientFault: {error}"
    if status in (401, 403):
        return f"DefaultFault: {error}"
    return f"{'FatalFault' if status >= 500 else 'UsageFault'}: {error}"


def fault_error(error: CumbreError) -> Response:
    """An error as a VOTable whose text begins with the word for it."""
    return votable_error(error, text=fault_line(error))


def fault_text(error: CumbreError) -> Response:
    """The same as a line of text."""
    return PlainTextResponse(f"{fault_line(error)}\n", status_of(error), error_headers(error))


_DALI_WORDS = {401: "AuthenticationError", 403: "AuthorizationError", 503: "ServiceUnavailable", 500: "Error"}


def dali_error(error: CumbreError) -> Response:
    """An error as a line of text that begins with DALI's word for it."""
    status = status_of(error)
    word = (
        error.outcome
        if error.outcome == "MultiValuedParamNotSupported"
        else _DALI_WORDS.get(status, "UsageError")
    )
    return PlainTextResponse(f"{word}: {error}\n", status, error_headers(error))


ErrorDocument = Callable[[CumbreError], Response]
Handler = Callable[[Request, Principal], Awaitable[Response]]


@dataclass(frozen=True)
class Gate:
    """The one way in: tells who asks, counts, calls, and turns errors into documents.

    Attributes
    ----------
    identity
        Of the site.
    pool
        Threads for the database work of requests.
    per_minute
        How many requests somebody may make.
    """

    identity: Identity
    pool: Executor
    per_minute: Callable[[Principal], int]

    def endpoint(
        self, handler: Handler, *, scope: str, error: ErrorDocument = dali_error
    ) -> Callable[[Request], Awaitable[Response]]:
        """A Starlette endpoint made of a handler.

        Parameters
        ----------
        scope
            What a token must allow.
        error
            Makes the document of an error.
        """

        async def call(request: Request) -> Response:
            response = await self._answer(request, handler, scope, error)
            for name, value in OPEN_HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        return call

    async def _answer(self, request: Request, handler: Handler, scope: str, error: ErrorDocument) -> Response:
        try:
            if any("\0" in str(part) for part in request.path_params.values()):
                raise NotFoundError("there is nothing of that name")
            who, headers = await in_pool(self.pool, self._enter, request, scope)
            try:
                response = await handler(request, who)
            except AuthorizationError as fault:
                await in_pool(self.pool, self._refused, request, who, fault)
                raise
        except CumbreError as fault:
            if status_of(fault) >= 500:
                log.warning("%s %s: %s", request.method, request.url.path, fault)
            return error(fault)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:
            log.exception("%s %s", request.method, request.url.path)
            return error(CumbreError("a fault of the service; it is in its log"))
        finally:
            form = getattr(request.state, "form", None)
            if form is not None:
                await form.close()
        response.headers.update(headers)
        return response

    def _refused(self, request: Request, who: Principal, fault: AuthorizationError) -> None:
        self.identity.audit(who, request.method, request.url.path, fault.outcome)

    def _enter(self, request: Request, scope: str) -> tuple[Principal, dict[str, str]]:
        try:
            who = who_asks(request, self.identity)
        except AuthenticationError:
            address = Principal(address=request.client.host if request.client else "")
            self.identity.count_request(address, "authentication", FAILED_PER_MINUTE)
            raise
        try:
            who.require(scope)
        except AuthorizationError as fault:
            self._refused(request, who, fault)
            raise
        if who.is_administrator:
            return who, {}
        limit = self.per_minute(who)
        if limit == 0:
            raise AuthorizationError(
                f"{who.owner}: requests are not allowed here; ask the administrators of this site"
            )
        return who, self.identity.count_request(who, REQUEST_WINDOW, limit).headers()


async def in_pool[T](pool: Executor, function: Callable[..., T], *arguments: Any) -> T:
    """Call a blocking function in a pool of threads."""
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def base_url(request: Request, service: str) -> str:
    """Absolute URL of a service as the client reaches it."""
    return f"{str(request.base_url).rstrip('/')}/{service}"


def safe_below(folder: Path, relative: str) -> Path:
    """A path below a folder.

    Raises
    ------
    NotFoundError
        It leads out of the folder, or nothing is there.
    """
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise NotFoundError(f"{relative}: there is no such file")
    return path


def lines(parts: Iterable[str]) -> str:
    """Text of a document made of parts."""
    return "\n".join(parts) + "\n"
