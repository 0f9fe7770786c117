"""A small OpenID provider for one machine: people with passwords in a file, and nothing else to install.

It speaks what any provider speaks (discovery, authorization code with PKCE S256, signed identity tokens, keys), so that
a site which moves to another provider changes its configuration only. Passwords are kept as scrypt hashes. It runs
within the web service of a site, or as a process of its own: ``python -m cumbre.access.identity_local``.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import json
import re
import secrets
import threading
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.access.identity_oidc import challenge_of
from cumbre.core.errors import BadFileError, NotFoundError, UserError
from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

USERS_FILE = "access/users.json"
KEY_FILE = "access/provider.key"
CLIENT = "cumbre"
LEAST_PASSWORD = 12
CODE_S, TOKEN_S = 120.0, 600
TRIES, TRIES_S = 5, 60.0
"""Wrong passwords of one name within so many seconds before it must wait."""
_COST = {"n": 1 << 15, "r": 8, "p": 1, "maxmem": 128 << 20, "dklen": 32}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._@-]{0,49}")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}
STYLE = (
    "<style>body{font:1em/1.5 sans-serif;max-width:26em;margin:12vh auto;padding:0 1em}"
    "input,button{font:inherit;display:block;width:100%;box-sizing:border-box;margin:.3em 0 1em;padding:.4em}</style>"
)


class Users:
    """Names, scrypt hashes of passwords, and groups, in a file that only its owner reads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise BadFileError(f"{self._path}: not JSON: {error}") from error
        if not isinstance(found, dict):
            raise BadFileError(f"{self._path}: expected names and their hashes")
        return found

    def names(self) -> dict[str, list[str]]:
        """Name → groups."""
        return {name: list(about["groups"]) for name, about in self._read().items()}

    def set(self, name: str, password: str, groups: list[str]) -> None:
        """Add somebody, or give them another password and other groups.

        Raises
        ------
        UserError
            A name of another form, or a password that is too short.
        """
        if not _NAME.fullmatch(name):
            raise UserError(
                f"user {name!r}: expected a letter, then up to 49 letters, digits, or any of . _ @ -"
            )
        if len(password) < LEAST_PASSWORD:
            raise UserError(
                f"the password has {len(password)} characters: expected at least {LEAST_PASSWORD}"
            )
        salt = secrets.token_bytes(16)
        about = {"salt": salt.hex(), "scrypt": _hash(password, salt).hex(), "groups": sorted(set(groups))}
        self._write(self._read() | {name: about})

    def remove(self, name: str) -> None:
        """Take somebody out.

        Raises
        ------
        NotFoundError
            There is nobody of that name.
        """
        users = self._read()
        if users.pop(name, None) is None:
            raise NotFoundError(f"user {name!r}: there is none")
        self._write(users)

    def _write(self, users: dict[str, dict[str, Any]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, json.dumps(users, indent=1).encode(), mode=0o600)

    def check(self, name: str, password: str) -> list[str] | None:
        """Groups of somebody whose password this is; None otherwise, after the same work whether the name is known."""
        about = self._read().get(name)
        salt = bytes.fromhex(about["salt"]) if about else b"\0" * 16
        found = _hash(password, salt)
        wanted = bytes.fromhex(about["scrypt"]) if about else secrets.token_bytes(32)
        return list(about["groups"]) if hmac.compare_digest(found, wanted) and about else None


def _hash(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode()[:1024], salt=salt, **_COST)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Grant:
    name: str
    groups: list[str]
    client: str
    redirect: str
    challenge: str
    nonce: str
    expires_s: float


class LocalProvider:
    """The provider's routes.

    Parameters
    ----------
    users
        Who may log in.
    key_file
        Private key that signs; made when absent.
    redirects
        Addresses of clients to which codes may be sent. A client below the provider's own address may always.
    """

    def __init__(self, users: Users, key_file: Path, *, redirects: tuple[str, ...] = ()) -> None:
        self._users, self._key_file, self._redirects = users, key_file, redirects
        self._grants: dict[str, _Grant] = {}
        self._failed: dict[str, list[float]] = {}
        self._lock = threading.Lock()
        self.issuer = ""
        self._private: Any = None

    def _key(self) -> Any:
        from joserfc.jwk import ECKey

        with self._lock:
            if self._private is None:
                try:
                    made = ECKey.import_key(json.loads(self._key_file.read_bytes()))
                except FileNotFoundError:
                    made = ECKey.generate_key("P-256", {"use": "sig", "alg": "ES256"}, auto_kid=True)
                    self._key_file.parent.mkdir(parents=True, exist_ok=True)
                    content = json.dumps(made.as_dict(private=True)).encode()
                    write_atomic(self._key_file, content, mode=0o600)
                self._private = made
            return self._private

    def routes(self, prefix: str = "") -> list[Any]:
        """Routes, each below a prefix."""
        from starlette.routing import Route

        return [
            Route(f"{prefix}/.well-known/openid-configuration", self.discovery),
            Route(f"{prefix}/jwks", self.keys),
            Route(f"{prefix}/authorize", self.authorize, methods=["GET", "POST"]),
            Route(f"{prefix}/token", self.token, methods=["POST"]),
        ]

    def discovery(self, request: Request) -> Response:
        """What there is and where."""
        from starlette.responses import JSONResponse

        del request
        return JSONResponse(
            {
                "issuer": self.issuer,
                "authorization_endpoint": f"{self.issuer}/authorize",
                "token_endpoint": f"{self.issuer}/token",
                "jwks_uri": f"{self.issuer}/jwks",
                "response_types_supported": ["code"],
                "grant_types_supported": ["authorization_code"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["ES256"],
                "code_challenge_methods_supported": ["S256"],
                "scopes_supported": ["openid", "profile", "email"],
                "claims_supported": ["sub", "preferred_username", "groups"],
            }
        )

    def keys(self, request: Request) -> Response:
        """Public keys."""
        from starlette.responses import JSONResponse

        del request
        return JSONResponse({"keys": [self._key().as_dict(private=False)]})

    async def authorize(self, request: Request) -> Response:
        """The form for name and password; with the right ones a code goes back to the client."""
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import PlainTextResponse, RedirectResponse

        asked = dict(request.query_params)
        if wrong := self._refusal(asked):
            # no redirect: nothing is sent to an address that is not known
            return PlainTextResponse(f"this login cannot begin: {wrong}\n", 400, PAGE_HEADERS)
        if request.method == "GET":
            return _form("")
        form = urllib.parse.parse_qs((await _body(request)).decode("utf-8", "replace"))
        name, password = form.get("name", [""])[0], form.get("password", [""])[0]
        if not self._may_try(name):
            return _form("Too many wrong passwords; wait a minute.", 429)
        groups = await run_in_threadpool(self._users.check, name, password)
        if groups is None:
            with self._lock:
                self._failed.setdefault(name, []).append(time.monotonic())
            return _form("Name or password is wrong.", 403)
        code = secrets.token_urlsafe(32)
        now = time.monotonic()
        with self._lock:
            self._grants = {key: grant for key, grant in self._grants.items() if grant.expires_s > now}
            self._grants[code] = _Grant(
                name, groups, asked["client_id"], asked["redirect_uri"], asked["code_challenge"],
                asked.get("nonce", ""), now + CODE_S,
            )  # fmt: skip
        back = urllib.parse.urlencode({"code": code, "state": asked.get("state", ""), "iss": self.issuer})
        return RedirectResponse(f"{asked['redirect_uri']}?{back}", 303, PAGE_HEADERS)

    def _refusal(self, asked: dict[str, str]) -> str:
        """What is wrong with a request to log in; empty for nothing."""
        own = self.issuer.removesuffix("/idp")
        redirect = asked.get("redirect_uri", "")
        if asked.get("client_id") != CLIENT:
            return f"client_id: expected {CLIENT}"
        if redirect not in self._redirects and redirect != f"{own}/login/callback":
            return "redirect_uri is not one of this site's"
        if asked.get("response_type") != "code" or "openid" not in asked.get("scope", "").split():
            return "expected response_type=code and the scope openid"
        if asked.get("code_challenge_method") != "S256" or len(asked.get("code_challenge", "")) != 43:
            return "expected a code_challenge by S256"
        return ""

    def _may_try(self, name: str) -> bool:
        now = time.monotonic()
        with self._lock:
            self._failed = {
                key: recent
                for key, tries in self._failed.items()
                if (recent := [t for t in tries if now - t < TRIES_S])
            }
            return len(self._failed.get(name, [])) < TRIES

    async def token(self, request: Request) -> Response:
        """The identity token for a code, once."""
        from joserfc import jwt
        from starlette.responses import JSONResponse

        form = {
            k: v[0]
            for k, v in urllib.parse.parse_qs((await _body(request)).decode("utf-8", "replace")).items()
        }
        with self._lock:
            grant = self._grants.pop(form.get("code", ""), None)
        good = (
            grant is not None
            and form.get("grant_type") == "authorization_code"
            and grant.expires_s > time.monotonic()
            and (form.get("client_id"), form.get("redirect_uri")) == (grant.client, grant.redirect)
            and hmac.compare_digest(challenge_of(form.get("code_verifier", "")), grant.challenge)
        )
        if grant is None or not good:
            return JSONResponse({"error": "invalid_grant"}, 400, PAGE_HEADERS)
        now = int(time.time())
        claims: dict[str, Any] = {
            "iss": self.issuer, "sub": grant.name, "aud": grant.client, "iat": now, "exp": now + TOKEN_S,
            "nonce": grant.nonce, "preferred_username": grant.name, "groups": grant.groups,
        }  # fmt: skip
        key = self._key()
        signed = jwt.encode({"alg": "ES256", "kid": key.kid}, claims, key)
        answer = {"access_token": secrets.token_urlsafe(16), "token_type": "Bearer", "expires_in": TOKEN_S}
        return JSONResponse(answer | {"id_token": signed}, headers=PAGE_HEADERS)

    def application(self) -> Starlette:
        """The provider alone."""
        from starlette.applications import Starlette

        return Starlette(routes=self.routes())


async def _body(request: Request) -> bytes:
    content = bytearray()
    async for block in request.stream():
        content += block
        if len(content) > 1 << 16:
            return b""
    return bytes(content)


def _form(message: str, status: int = 200) -> Response:
    from starlette.responses import HTMLResponse

    said = f"<p><strong>{html.escape(message)}</strong></p>" if message else ""
    return HTMLResponse(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Log in</title>{STYLE}<h1>Log in</h1>{said}'
        '<form method="post"><label>Name <input name="name" autocomplete="username" autofocus required></label>'
        '<label>Password <input name="password" type="password" autocomplete="current-password" required></label>'
        "<button>Log in</button></form></html>",
        status,
        PAGE_HEADERS,
    )


def main(folder: Path, redirects: tuple[str, ...]) -> None:
    """Run the provider alone on a free port of this machine; its address is printed."""
    import socket
    import sys

    import uvicorn

    provider = LocalProvider(Users(folder / USERS_FILE), folder / KEY_FILE, redirects=redirects)
    listening = socket.create_server(("127.0.0.1", 0))
    provider.issuer = f"http://127.0.0.1:{listening.getsockname()[1]}"
    sys.stdout.write(provider.issuer + "\n")
    sys.stdout.flush()
    config = uvicorn.Config(provider.application(), log_level="warning", lifespan="off")
    uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]), tuple(sys.argv[2:]))
