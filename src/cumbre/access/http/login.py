"""Logging in: with the site's provider for pages, and for programs that ask for a token.

Cookies are for pages only: no service of data looks at them, so nobody's browser can be led to ask for data in their
name. What changes something needs a word from a page that only the one who logged in has seen.
"""

from __future__ import annotations

import hashlib
import hmac
import html
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from cumbre.access.http.base import (
    base_url,
    error_headers,
    in_pool,
    read_parameters,
    status_of,
    who_asks,
)
from cumbre.access.identity import EMBARGO, AuthenticationError, AuthorizationError, Identity, Principal
from cumbre.access.identity_local import PAGE_HEADERS, STYLE
from cumbre.access.identity_oidc import OidcProvider
from cumbre.access.tokens_login import LOGIN_S, SESSION_S, SESSION_SCOPES, Logins, safe_target
from cumbre.core.errors import CumbreError

SESSION, STATE = "cumbre_session", "cumbre_login"
PER_MINUTE = 300
"""Logins, confirmations and questions for a token of one address in a minute."""
FORM_HEADERS = PAGE_HEADERS | {
    "Content-Security-Policy": PAGE_HEADERS["Content-Security-Policy"] + "; form-action 'self'",
    "Referrer-Policy": "same-origin",
}
Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]


@dataclass(frozen=True)
class Login:
    """Routes below ``/login``.

    Attributes
    ----------
    provider
        Gives the site's provider; called in a thread.
    group_map
        What a provider calls a group → its name here. The provider's other groups count by their own names, save
        ``administrators``: that is given only by an entry here.
    is_local
        The provider is the site's own.
    """

    identity: Identity
    logins: Logins
    provider: Callable[[], OidcProvider]
    pool: Executor
    group_map: dict[str, str]
    is_local: bool = False

    def routes(self) -> list[Route]:
        """All of them."""
        table: list[tuple[str, Any, list[str]]] = [
            ("", self.begin, ["GET"]),
            ("/callback", self.callback, ["GET"]),
            ("/account", self.account, ["GET"]),
            ("/logout", self.logout, ["POST"]),
            ("/token", self.make_token, ["POST"]),
            ("/device", self.device, ["POST"]),
            ("/device/token", self.device_token, ["POST"]),
            ("/confirm", self.confirm, ["GET", "POST"]),
        ]
        return [
            Route(f"/login{path}", self._endpoint(handler), methods=methods)
            for path, handler, methods in table
        ]

    def _endpoint(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def call(request: Request) -> Response:
            try:
                address = Principal(address=request.client.host if request.client else "")
                await in_pool(self.pool, self.identity.count_request, address, "login", PER_MINUTE)
                return await handler(request)
            except CumbreError as error:
                # who is not known is asked to log in by a page, not by the browser's own dialogue
                headers = {k: v for k, v in error_headers(error).items() if k != "WWW-Authenticate"}
                return PlainTextResponse(f"{error}\n", status_of(error), PAGE_HEADERS | headers)

        return call

    # the provider

    async def begin(self, request: Request) -> Response:
        """Send the browser to the provider."""
        begun = await in_pool(self.pool, self.logins.begin, request.query_params.get("next", ""))
        provider = await in_pool(self.pool, self.provider)
        url = await in_pool(
            self.pool,
            lambda: provider.login_url(
                base_url(request, "login/callback"),
                state=begun.state,
                nonce=begun.nonce,
                verifier=begun.verifier,
            ),
        )
        response = RedirectResponse(url, 303, PAGE_HEADERS)
        # the answer must come to the browser that asked
        _set(response, request, STATE, begun.state, "/login", LOGIN_S)
        return response

    async def callback(self, request: Request) -> Response:
        """The provider's answer."""
        asked = request.query_params
        state = asked.get("state", "")
        if not state or not hmac.compare_digest(state.encode(), request.cookies.get(STATE, "").encode()):
            raise AuthenticationError("this login did not begin in this browser; begin again: /login")
        begun = await in_pool(self.pool, self.logins.take, state)
        if "code" not in asked:
            raise AuthenticationError(f"the provider refuses: {asked.get('error', 'no code')[:100]}")
        provider = await in_pool(self.pool, self.provider)
        claims = await in_pool(
            self.pool,
            lambda: provider.exchange(
                asked["code"], base_url(request, "login/callback"), nonce=begun.nonce, verifier=begun.verifier
            ),
        )
        account = await in_pool(
            self.pool,
            lambda: self.identity.account_of(
                provider.issuer, claims.subject, claims.name, is_local=self.is_local
            ),
        )
        await in_pool(self.pool, self.identity.set_claimed_groups, account, self._groups(claims.groups))
        session = await in_pool(self.pool, self.logins.open_session, account)
        response = RedirectResponse(begun.target, 303, PAGE_HEADERS)
        _set(response, request, SESSION, session, "/", SESSION_S)
        response.delete_cookie(STATE, "/login")
        return response

    def _groups(self, told: Collection[str]) -> set[str]:
        mapped = {self.group_map[name] for name in told if name in self.group_map}
        own = {
            name
            for name in told
            if name not in self.group_map and (self.is_local or name != "administrators")
        }
        return mapped | own

    # pages

    def session_of(self, request: Request) -> tuple[str, Principal] | None:
        """The session of a page's request."""
        session = request.cookies.get(SESSION, "")
        who = self.logins.who(session) if session else None
        return None if who is None else (session, who)

    async def _must(self, request: Request) -> tuple[str, Principal] | Response:
        found = await in_pool(self.pool, self.session_of, request)
        if found is not None:
            return found
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"/login?next={quote(target, safe='')}", 303, PAGE_HEADERS)

    async def account(self, request: Request) -> Response:
        """Who is logged in; a form for a token."""
        found = await self._must(request)
        if isinstance(found, Response):
            return found
        session, who = found
        boxes = "".join(
            f'<label><input type="checkbox" name="scope" value="{name}" style="display:inline;width:auto"> {name}</label><br>'
            for name in SESSION_SCOPES
        )
        groups = html.escape(", ".join(sorted(who.groups)) or "public data only")
        return _page(
            f"<h1>{html.escape(who.account)}</h1><p>{groups}</p>"
            f'<form method="post" action="/login/token">{_word_field(session)}{boxes}'
            '<label>Days <input name="days" type="number" value="30" min="1" max="90"></label>'
            "<button>Make a token</button></form>"
            f'<form method="post" action="/login/logout">{_word_field(session)}<button>Log out</button></form>'
        )

    async def _changed(self, request: Request) -> tuple[str, Principal, Any]:
        """Session and parameters of a request that changes something and came from our own page."""
        found = await in_pool(self.pool, self.session_of, request)
        parameters = await read_parameters(request)
        if found is None:
            raise AuthenticationError("log in first: /login")
        if not hmac.compare_digest((parameters.value("word") or "").encode(), _word(found[0]).encode()):
            raise AuthorizationError("this form is not of your session; open the page again")
        return *found, parameters

    async def logout(self, request: Request) -> Response:
        """End the session."""
        session, _, _ = await self._changed(request)
        await in_pool(self.pool, self.logins.end_session, session)
        response = _page("<p>Logged out.</p>")
        response.delete_cookie(SESSION, "/")
        return response

    async def make_token(self, request: Request) -> Response:
        """Show a new token, once."""
        _, who, parameters = await self._changed(request)
        days = parameters.integer("days", least=1) or 30
        device, code = await in_pool(
            self.pool, self.logins.begin_device, parameters.values("scope"), float(days)
        )
        await in_pool(self.pool, self.logins.confirm, code, who.account)
        made = await in_pool(self.pool, self.logins.collect, device)
        assert made is not None
        return _page(f"<p>Shown once, keep it safe:</p><p><code>{html.escape(made.token)}</code></p>")

    # programs

    async def device(self, request: Request) -> Response:
        """A program asks for a token: what it must show to a person, and the secret with which it comes back."""
        parameters = await read_parameters(request)
        scopes = [word for text in parameters.values("scope") for word in text.split()]
        days = parameters.integer("days", least=1) or 30
        device, code = await in_pool(self.pool, self.logins.begin_device, scopes, float(days))
        page = base_url(request, "login/confirm")
        answer = {
            "device_code": device, "user_code": code, "verification_uri": page,
            "verification_uri_complete": f"{page}?user_code={code}", "expires_in": LOGIN_S, "interval": 2,
        }  # fmt: skip
        return JSONResponse(answer, headers={"Cache-Control": "no-store"})

    async def device_token(self, request: Request) -> Response:
        """The program's token, when somebody has confirmed."""
        device = (await read_parameters(request)).required("device_code")
        made = await in_pool(self.pool, self.logins.collect, device)
        if made is None:
            return JSONResponse({"error": "authorization_pending"}, 400)
        answer = {"access_token": made.token, "token_type": "Bearer", "scope": " ".join(made.scopes)}
        about = {"user": made.account, "expires": made.expires.strftime("%Y-%m-%dT%H:%M:%SZ")}
        return JSONResponse(answer | about, headers={"Cache-Control": "no-store"})

    async def confirm(self, request: Request) -> Response:
        """A person sees what a program asks for, and gives it."""
        found = await self._must(request)
        if isinstance(found, Response):
            return found
        if request.method == "POST":
            _, who, parameters = await self._changed(request)
            await in_pool(self.pool, self.logins.confirm, parameters.required("user_code"), who.account)
            return _page("<p>Done: the program has its token. You can close this page.</p>")
        code = request.query_params.get("user_code", "")
        if not code:
            return _page(
                '<form><label>Code <input name="user_code" required></label><button>Go on</button></form>'
            )
        scopes = await in_pool(self.pool, self.logins.asked, code)
        return _page(
            f"<p>A program that shows the code <strong>{html.escape(code)}</strong> asks to act for you, "
            f"<strong>{html.escape(found[1].account)}</strong>:</p><p>{html.escape(', '.join(scopes))}</p>"
            f'<form method="post" action="/login/confirm">{_word_field(found[0])}'
            f'<input type="hidden" name="user_code" value="{html.escape(code, quote=True)}"><button>Allow</button></form>'
            "<p>You did not start such a program? Close this page.</p>"
        )


class PageGuard:
    """Pages about images under embargo, for those who may see such: everything but the paths that guard themselves.

    Parameters
    ----------
    application
        What is guarded.
    login
        Knows sessions.
    open_paths
        Begins of paths that decide themselves who may see what.
    """

    def __init__(self, application: Application, login: Login, open_paths: Collection[str]) -> None:
        self._application, self._login, self._open = application, login, tuple(open_paths)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve, or send to the login."""
        if scope["type"] == "http" and not self._is_open(scope["path"]):
            request = Request(scope, receive)
            refused = await self._refusal(request)
            if refused is not None:
                await refused(scope, receive, send)
                return
        await self._application(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return any(path == begin or path.startswith(f"{begin}/") for begin in self._open)

    async def _refusal(self, request: Request) -> Response | None:
        try:
            found = await in_pool(self._login.pool, self._login.session_of, request)
            who = (
                found[1]
                if found
                else await in_pool(self._login.pool, who_asks, request, self._login.identity)
            )
        except CumbreError as error:
            return PlainTextResponse(f"{error}\n", status_of(error), error_headers(error))
        if EMBARGO in who.rights:
            return None
        if not who.is_anonymous:
            return PlainTextResponse(
                f"AuthorizationError: {who.account}: these pages show images under embargo\n", 403
            )
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            target = quote(safe_target(request.url.path), safe="")
            return RedirectResponse(f"/login?next={target}", 303)
        return PlainTextResponse("AuthenticationError: log in: /login\n", 401)


def _page(body: str) -> HTMLResponse:
    return HTMLResponse(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>cumbre</title>{STYLE}{body}</html>',
        headers=FORM_HEADERS,
    )


def _word(session: str) -> str:
    return hashlib.sha256(f"form {session}".encode()).hexdigest()


def _word_field(session: str) -> str:
    return f'<input type="hidden" name="word" value="{_word(session)}">'


def _set(response: Response, request: Request, name: str, value: str, path: str, seconds: int) -> None:
    response.set_cookie(
        name,
        value,
        max_age=seconds,
        path=path,
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
