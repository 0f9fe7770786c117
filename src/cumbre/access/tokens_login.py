"""Logins under way, sessions of pages, and programs that ask for a token: rows that any server of a site reads."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cumbre.access.identity import SCOPES, AuthenticationError, Identity, NewToken, Principal
from cumbre.access.identity_oidc import new_verifier
from cumbre.core.errors import NotFoundError, UserError
from cumbre.stores.postgres import Database

LOGIN_S, SESSION_S, DEVICE_S = 600, 12 * 3600, 600
MAX_DAYS = 90.0
"""Longest life of a token that somebody makes by logging in."""
MAX_DEVICES = 1000
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
"""Of codes that people type: no vowels, no words."""
SESSION_SCOPES = tuple(name for name in SCOPES if name != "admin")


@dataclass(frozen=True, slots=True)
class Begun:
    """A login that began."""

    state: str
    nonce: str
    verifier: str
    target: str


class Logins:
    """Everything between the first step of a login and a token.

    Parameters
    ----------
    identity
        Of the site; its tables are there.
    db
        The site's database.
    """

    def __init__(self, identity: Identity, db: Database) -> None:
        self._identity, self._db = identity, db

    # logins

    def begin(self, target: str) -> Begun:
        """Remember a login; ``target`` is where to go after it, a path of this site."""
        begun = Begun(
            secrets.token_urlsafe(32), secrets.token_urlsafe(16), new_verifier(), safe_target(target)
        )
        self._db.execute(
            "INSERT INTO access.login VALUES (%s, %s, %s, %s, %s)",
            (_hash(begun.state), begun.nonce, begun.verifier, begun.target, _in(LOGIN_S)),
        )
        return begun

    def take(self, state: str) -> Begun:
        """The login that began with a state; it is taken once.

        Raises
        ------
        AuthenticationError
            There is none, any more.
        """
        rows = self._db.execute(
            "DELETE FROM access.login WHERE state_sha256 = %s RETURNING nonce, verifier, target, expires > now()",
            (_hash(state),),
        )
        if not rows or not rows[0][3]:
            raise AuthenticationError("this login took too long, or was used before; begin again")
        return Begun(state, *rows[0][:3])

    # sessions

    def open_session(self, account: str) -> str:
        """The secret of a new session."""
        session = secrets.token_urlsafe(32)
        self._db.execute(
            "INSERT INTO access.session VALUES (%s, %s, %s)", (_hash(session), account, _in(SESSION_S))
        )
        self._identity.audit(Principal(account=account, token_id="session"), "login")  # noqa: S106 (a word)
        return session

    def who(self, session: str) -> Principal | None:
        """Whose session it is; its rights are those of its groups now."""
        rows = self._db.execute(
            "SELECT s.account FROM access.session s JOIN access.account a ON a.name = s.account"
            " WHERE session_sha256 = %s AND expires > now() AND NOT a.disabled",
            (_hash(session),),
        )
        if not rows:
            return None
        return self._identity.principal(rows[0][0], SESSION_SCOPES, token_id="session")  # noqa: S106 (a word)

    def end_session(self, session: str) -> None:
        """Forget a session."""
        self._db.execute("DELETE FROM access.session WHERE session_sha256 = %s", (_hash(session),))

    def forget_old(self) -> None:
        """Delete what has expired."""
        for table in ("login", "session", "device"):
            self._db.execute(f"DELETE FROM access.{table} WHERE expires < now() - interval '1 hour'")  # noqa: S608

    # programs

    def begin_device(self, scopes: Sequence[str], days: float) -> tuple[str, str]:
        """A program asks for a token; returns its secret and the code that a person confirms.

        Raises
        ------
        UserError
            Scopes that nobody gets this way, or too long a life.
        """
        unknown = sorted(set(scopes) - set(SESSION_SCOPES))
        if unknown or not scopes:
            raise UserError(
                f"scope {', '.join(unknown) or '(none)'}: expected some of {', '.join(SESSION_SCOPES)}"
            )
        if not 0 < days <= MAX_DAYS:
            raise UserError(f"days = {days:g}: expected more than 0 and at most {MAX_DAYS:g}")
        if self._db.execute("SELECT count(*) FROM access.device WHERE expires > now()")[0][0] >= MAX_DEVICES:
            raise UserError("too many programs wait for a confirmation; try again in some minutes")
        device = secrets.token_urlsafe(32)
        code = "".join(secrets.choice(_LETTERS) for _ in range(8))
        self._db.execute(
            "INSERT INTO access.device (device_sha256, user_code, scopes, days, expires) VALUES (%s, %s, %s, %s, %s)",
            (_hash(device), code, sorted(set(scopes)), days, _in(DEVICE_S)),
        )
        return device, f"{code[:4]}-{code[4:]}"

    def asked(self, user_code: str) -> list[str]:
        """Scopes that a waiting program asks for.

        Raises
        ------
        NotFoundError
            None waits with this code.
        """
        rows = self._db.execute(
            "SELECT scopes FROM access.device WHERE user_code = %s AND expires > now() AND account IS NULL",
            (_plain(user_code),),
        )
        if not rows:
            raise NotFoundError("no program waits with this code; it may have waited too long")
        return list(rows[0][0])

    def confirm(self, user_code: str, account: str) -> None:
        """Somebody who logged in gives the program a token.

        Raises
        ------
        NotFoundError
            None waits with this code.
        """
        done = self._db.execute(
            "UPDATE access.device SET account = %s WHERE user_code = %s AND expires > now() AND account IS NULL"
            " RETURNING 1",
            (account, _plain(user_code)),
        )
        if not done:
            raise NotFoundError("no program waits with this code; it may have waited too long")

    def collect(self, device: str) -> NewToken | None:
        """The program's token, once; None while nobody has confirmed.

        Raises
        ------
        AuthenticationError
            The secret is not known, any more.
        """
        rows = self._db.execute(
            "SELECT account FROM access.device WHERE device_sha256 = %s AND expires > now()", (_hash(device),)
        )
        if not rows:
            raise AuthenticationError(
                "this request for a token is not known, or waited too long; begin again"
            )
        if rows[0][0] is None:
            return None
        taken = self._db.execute(
            "DELETE FROM access.device WHERE device_sha256 = %s AND account IS NOT NULL RETURNING account, scopes, days",
            (_hash(device),),
        )
        if not taken:
            raise AuthenticationError("this token was collected before")
        account, scopes, days = taken[0]
        return self._identity.create_token(account, scopes, days)


def safe_target(target: str) -> str:
    """A path of this site, whatever was asked for."""
    good = target.startswith("/") and not target.startswith(("//", "/\\")) and "\\" not in target
    return target[:1000] if good and target.isprintable() else "/login/account"


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _in(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def _plain(user_code: str) -> str:
    return "".join(letter for letter in user_code.upper() if letter.isalpha())
