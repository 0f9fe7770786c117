"""Login with an OpenID provider: authorization code with PKCE, discovery, tokens checked with the provider's keys."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cumbre.access.identity import AuthenticationError
from cumbre.core.errors import ConfigurationError, TransientError

if TYPE_CHECKING:
    from joserfc.jwk import KeySet

ALGORITHMS = ("RS256", "ES256", "EdDSA")
"""Signatures that are believed: never "none", never a shared secret."""
TIMEOUT_S = 10.0
KEYS_S = 3600.0
LEEWAY_S = 60
_MAX_BYTES = 1 << 20
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Claims:
    """What a provider says of somebody who logged in."""

    subject: str
    name: str
    groups: tuple[str, ...]


def new_verifier() -> str:
    """A secret of one login, kept here until the code comes back."""
    return secrets.token_urlsafe(48)


def challenge_of(verifier: str) -> str:
    """What is told of the secret when the login begins (S256)."""
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


class OidcProvider:
    """A provider as its client sees it.

    Parameters
    ----------
    issuer
        Its address; discovery tells the rest. https, or http on this machine.
    client_id, client_secret
        As registered there; no secret for public clients.
    groups_claim
        Name of the claim with the groups.
    """

    def __init__(
        self,
        issuer: str,
        client_id: str,
        *,
        client_secret: str = "",
        scope: str = "openid profile email",
        groups_claim: str = "groups",
    ) -> None:
        self.issuer, self._client_id, self._secret = issuer.rstrip("/"), client_id, client_secret
        self._scope, self._groups_claim = scope, groups_claim
        _check_address(self.issuer)
        self._found: dict[str, Any] | None = None
        self._keys: tuple[float, KeySet] | None = None

    def _discovered(self) -> dict[str, Any]:
        if self._found is None:
            found = _fetch(f"{self.issuer}/.well-known/openid-configuration")
            if str(found.get("issuer", "")).rstrip("/") != self.issuer:
                raise AuthenticationError(
                    f"{self.issuer}: its discovery document is that of {str(found.get('issuer'))[:200]}"
                )
            for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
                _check_address(str(found.get(name, "")))
            self._found = found
        return self._found

    def login_url(self, redirect: str, *, state: str, nonce: str, verifier: str) -> str:
        """Where somebody who wants to log in is sent."""
        query = {
            "response_type": "code", "client_id": self._client_id, "redirect_uri": redirect, "scope": self._scope,
            "state": state, "nonce": nonce, "code_challenge": challenge_of(verifier), "code_challenge_method": "S256",
        }  # fmt: skip
        address = str(self._discovered()["authorization_endpoint"])
        return f"{address}{'&' if '?' in address else '?'}{urllib.parse.urlencode(query)}"

    def exchange(self, code: str, redirect: str, *, nonce: str, verifier: str) -> Claims:
        """Give the code for an identity token, and read it.

        Raises
        ------
        AuthenticationError
            The provider refuses, or its token is not one for this login.
        TransientError
            The provider does not answer.
        """
        form = {
            "grant_type": "authorization_code", "code": code, "redirect_uri": redirect, "client_id": self._client_id,
            "code_verifier": verifier,
        }  # fmt: skip
        answer = _fetch(str(self._discovered()["token_endpoint"]), form, self._client_id, self._secret)
        token = answer.get("id_token")
        if not isinstance(token, str):
            raise AuthenticationError("the provider gave no identity token")
        return self._claims(token, nonce)

    def _claims(self, token: str, nonce: str) -> Claims:
        from joserfc import jwt
        from joserfc.errors import JoseError

        for is_last in (False, True):
            try:
                claims = jwt.decode(token, self._key_set(refresh=is_last), algorithms=list(ALGORITHMS)).claims
                break
            except (JoseError, ValueError) as error:
                if is_last:  # keys were changed: asked for once more
                    raise AuthenticationError(f"the identity token is not genuine: {error}") from error
        registry = jwt.JWTClaimsRegistry(
            leeway=LEEWAY_S,
            iss={"essential": True}, sub={"essential": True}, exp={"essential": True}, iat={"essential": True},
            aud={"essential": True, "value": self._client_id}, nonce={"essential": True, "value": nonce},
        )  # fmt: skip
        try:
            registry.validate(claims)
        except JoseError as error:
            raise AuthenticationError(f"the identity token is not for this login: {error}") from error
        if str(claims["iss"]).rstrip("/") != self.issuer:
            raise AuthenticationError(f"the identity token is of {str(claims['iss'])[:200]}")
        several = isinstance(claims["aud"], list) and len(claims["aud"]) > 1
        if claims.get("azp", self._client_id if not several else None) != self._client_id:
            raise AuthenticationError("the identity token was made for another client")
        groups = claims.get(self._groups_claim) or []
        groups = groups.split() if isinstance(groups, str) else groups
        name = claims.get("preferred_username") or str(claims.get("email") or claims["sub"])
        return Claims(
            str(claims["sub"]), str(name), tuple(str(item) for item in groups if isinstance(item, str))
        )

    def _key_set(self, *, refresh: bool) -> KeySet:
        from joserfc.jwk import KeySet

        if refresh or self._keys is None or time.monotonic() - self._keys[0] > KEYS_S:
            content: Any = _fetch(str(self._discovered()["jwks_uri"]))
            self._keys = time.monotonic(), KeySet.import_key_set(content)
        return self._keys[1]


def _check_address(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ConfigurationError(
            f"provider address {url[:200]!r}: expected https (http on this machine only)"
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """No provider sends its clients elsewhere."""


def _fetch(url: str, form: dict[str, str] | None = None, user: str = "", secret: str = "") -> dict[str, Any]:
    headers = {"Accept": "application/json", "User-Agent": "cumbre"}
    if secret:
        pair = f"{urllib.parse.quote(user, safe='')}:{urllib.parse.quote(secret, safe='')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    body = urllib.parse.urlencode(form).encode() if form is not None else None
    request = urllib.request.Request(url, body, headers)  # noqa: S310 (the scheme was checked)
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S) as answer:
            content: Any = json.loads(answer.read(_MAX_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(2000).decode("utf-8", "replace")
        raise AuthenticationError(f"the provider refuses ({error.code}): {said[:200]}") from error
    except OSError as error:
        raise TransientError(
            f"the provider at {urllib.parse.urlsplit(url).netloc} does not answer: {error}"
        ) from error
    except ValueError as error:
        raise AuthenticationError(f"{url}: expected JSON") from error
    if not isinstance(content, dict):
        raise AuthenticationError(f"{url}: expected a JSON object")
    return content
