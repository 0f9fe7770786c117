"""Who asks, and what they may see: accounts, groups, data rights, API tokens, rate limits, audit.

Rights grow: everyone has ``public``; ``collaboration`` adds what is released to members only; ``embargo`` adds
images of the last hours. A right comes from a group. A token is shown once and stored as a hash; what it may do
is the meeting of its scopes and its account's rights. Counts of requests are rows of the database, so every
server of a site counts the same.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cumbre.core.errors import CumbreError, NotFoundError, UserError
from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Database

PUBLIC, COLLABORATION, EMBARGO = "public", "collaboration", "embargo"
RIGHTS = (PUBLIC, COLLABORATION, EMBARGO)
SCOPES = {
    "read:tap": "queries: TAP, cone search",
    "read:image": "images: SIA, DataLink, cutouts, files",
    "write:table": "tables of one's own",
    "admin": "everything, for everyone",
}
ADMINISTRATORS = "administrators"
RELEASE_TESTERS = "releases"
"""See releases before they are opened and after they are closed."""
GROUP_RIGHTS: dict[str, tuple[str, ...]] = {
    COLLABORATION: (PUBLIC, COLLABORATION),
    EMBARGO: RIGHTS,
    ADMINISTRATORS: RIGHTS,
    RELEASE_TESTERS: (PUBLIC, COLLABORATION),
}
"""Groups that every site has."""
ANONYMOUS = "anonymous"
ADMIN_ACCOUNT = "admin"
ADMIN_TOKEN_FILE = "run/admin.token"  # noqa: S105 (a path)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._@-]{0,63}")
_TOKEN = re.compile(r"cmb_(?P<id>[0-9a-f]{12})_(?P<secret>[A-Za-z0-9_-]{43})")
_MAX_DAYS = 3660
WINDOW_S = 60
STEPS = (
    """
    CREATE SCHEMA IF NOT EXISTS access;
    CREATE TABLE access.account (
        name text PRIMARY KEY,
        created timestamptz NOT NULL DEFAULT now(),
        disabled boolean NOT NULL DEFAULT false
    );
    CREATE TABLE access.account_group (name text PRIMARY KEY, rights text[] NOT NULL);
    CREATE TABLE access.member (
        account text NOT NULL REFERENCES access.account,
        group_name text NOT NULL REFERENCES access.account_group,
        PRIMARY KEY (account, group_name)
    );
    CREATE TABLE access.token (
        token_id text PRIMARY KEY,
        account text NOT NULL REFERENCES access.account,
        secret_sha256 bytea NOT NULL,
        scopes text[] NOT NULL,
        created timestamptz NOT NULL DEFAULT now(),
        expires timestamptz NOT NULL,
        revoked timestamptz,
        last_used timestamptz
    );
    CREATE INDEX token_account ON access.token (account);
    CREATE TABLE access.request_count (
        who text NOT NULL,
        resource text NOT NULL,
        window_start timestamptz NOT NULL,
        used int NOT NULL,
        PRIMARY KEY (who, resource, window_start)
    );
    CREATE TABLE access.audit (
        audit_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        at timestamptz NOT NULL DEFAULT now(),
        account text NOT NULL,
        token_id text,
        address text NOT NULL DEFAULT '',
        action text NOT NULL,
        target text NOT NULL DEFAULT '',
        outcome text NOT NULL DEFAULT 'ok'
    );
    CREATE INDEX audit_time ON access.audit (at);
    """,
    """
    CREATE TABLE access.subject (
        issuer text NOT NULL,
        subject text NOT NULL,
        account text NOT NULL UNIQUE REFERENCES access.account,
        PRIMARY KEY (issuer, subject)
    );
    CREATE TABLE access.claimed_member (
        account text NOT NULL REFERENCES access.account,
        group_name text NOT NULL REFERENCES access.account_group,
        PRIMARY KEY (account, group_name)
    );
    CREATE VIEW access.all_member AS SELECT account, group_name FROM access.member
        UNION SELECT account, group_name FROM access.claimed_member;
    CREATE TABLE access.login (
        state_sha256 bytea PRIMARY KEY,
        nonce text NOT NULL,
        verifier text NOT NULL,
        target text NOT NULL,
        expires timestamptz NOT NULL
    );
    CREATE TABLE access.session (
        session_sha256 bytea PRIMARY KEY,
        account text NOT NULL REFERENCES access.account,
        expires timestamptz NOT NULL
    );
    CREATE TABLE access.device (
        device_sha256 bytea PRIMARY KEY,
        user_code text NOT NULL UNIQUE,
        scopes text[] NOT NULL,
        days float8 NOT NULL,
        account text REFERENCES access.account,
        expires timestamptz NOT NULL
    );
    """,
)


class AuthenticationError(UserError):
    """The token is unknown, expired, revoked or badly formed."""

    outcome = "AuthenticationError"


class AuthorizationError(UserError):
    """Known, but not allowed to do this."""

    outcome = "AuthorizationError"


class RateLimitError(CumbreError):
    """Too many requests in this minute; ``allowance`` tells when to come back."""

    outcome = "RateLimit"

    def __init__(self, message: str, allowance: Allowance) -> None:
        super().__init__(message)
        self.allowance = allowance


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: account, rights, scopes, and from where."""

    account: str = ANONYMOUS
    rights: frozenset[str] = frozenset({PUBLIC})
    scopes: frozenset[str] = frozenset({"read:tap", "read:image"})
    groups: frozenset[str] = frozenset()
    token_id: str | None = None
    address: str = ""

    @property
    def is_anonymous(self) -> bool:
        """Whether no token was shown."""
        return self.token_id is None

    @property
    def is_administrator(self) -> bool:
        """Whether everything is allowed."""
        return "admin" in self.scopes and ADMINISTRATORS in self.groups

    @property
    def owner(self) -> str:
        """Owner of this one's jobs; people without a token are told apart by their address."""
        return f"{ANONYMOUS}@{self.address}" if self.is_anonymous else self.account

    def require(self, scope: str) -> None:
        """See that a scope is there.

        Raises
        ------
        AuthorizationError
            It is not.
        """
        if scope not in self.scopes and not self.is_administrator:
            raise AuthorizationError(
                f"{self.account}: this needs the scope {scope} ({SCOPES.get(scope, '')}); make a token with it: "
                f"cumbre token create --user {self.account} --scope {scope}"
            )


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a limit in this minute."""

    resource: str
    limit: int
    used: int
    reset: datetime

    def headers(self) -> dict[str, str]:
        """The X-RateLimit headers."""
        return {
            "X-RateLimit-Limit": str(self.limit),
            "X-RateLimit-Remaining": str(max(self.limit - self.used, 0)),
            "X-RateLimit-Used": str(self.used),
            "X-RateLimit-Reset": str(int(self.reset.timestamp())),
            "X-RateLimit-Resource": self.resource,
        }

    def retry_after_s(self) -> int:
        """Seconds until the limit counts anew, at least 1."""
        return max(int((self.reset - datetime.now(UTC)).total_seconds()) + 1, 1)


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token at the moment of its making: the only time its text is known."""

    token: str = field(repr=False)
    token_id: str
    account: str
    scopes: tuple[str, ...]
    expires: datetime


class Identity:
    """Accounts, tokens, limits and the audit log of a site.

    Parameters
    ----------
    db
        The site's database; tables are made when absent.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        migrate(db, "access_identity", STEPS)
        for name, rights in GROUP_RIGHTS.items():
            db.execute(
                "INSERT INTO access.account_group VALUES (%s, %s) ON CONFLICT (name) DO NOTHING",
                (name, list(rights)),
            )

    # accounts and groups

    def ensure_account(self, name: str) -> None:
        """Make an account unless it is there.

        Raises
        ------
        UserError
            The name has another form.
        """
        if not _NAME.fullmatch(name) or name == ANONYMOUS:
            raise UserError(
                f"user {name!r}: expected a letter, then up to 63 letters, digits, or any of . _ @ -"
            )
        self._db.execute("INSERT INTO access.account (name) VALUES (%s) ON CONFLICT DO NOTHING", (name,))

    def add_member(self, account: str, group: str) -> None:
        """Put an account (made when absent) into a group.

        Raises
        ------
        NotFoundError
            There is no such group.
        """
        known = [row[0] for row in self._db.execute("SELECT name FROM access.account_group ORDER BY name")]
        if group not in known:
            raise NotFoundError(f"group {group!r}: this site has {', '.join(known)}")
        self.ensure_account(account)
        self._db.execute("INSERT INTO access.member VALUES (%s, %s) ON CONFLICT DO NOTHING", (account, group))

    def remove_member(self, account: str, group: str) -> None:
        """Take an account out of a group; again does no harm."""
        self._db.execute("DELETE FROM access.member WHERE account = %s AND group_name = %s", (account, group))

    def groups_of(self, account: str) -> frozenset[str]:
        """Groups of an account."""
        rows = self._db.execute("SELECT group_name FROM access.all_member WHERE account = %s", (account,))
        return frozenset(row[0] for row in rows)

    # tokens

    def create_token(self, account: str, scopes: Sequence[str], days: float) -> NewToken:
        """Make a token (and its account when absent).

        Parameters
        ----------
        scopes
            Of ``SCOPES``.
        days
            Until it expires.

        Raises
        ------
        UserError
            An unknown scope, no scope, or a time that is not between 0 and ten years.
        """
        unknown = sorted(set(scopes) - set(SCOPES))
        if unknown or not scopes:
            raise UserError(f"scope {', '.join(unknown) or '(none)'}: expected some of {', '.join(SCOPES)}")
        if not 0 < days <= _MAX_DAYS:
            raise UserError(f"days = {days:g}: expected more than 0 and at most {_MAX_DAYS}")
        self.ensure_account(account)
        token_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        expires = datetime.now(UTC) + timedelta(days=days)
        kept = tuple(sorted(set(scopes)))
        self._db.execute(
            "INSERT INTO access.token (token_id, account, secret_sha256, scopes, expires)"
            " VALUES (%s, %s, %s, %s, %s)",
            (token_id, account, hashlib.sha256(secret.encode()).digest(), list(kept), expires),
        )
        self.audit(Principal(account=account, token_id=token_id), "token create", token_id)
        return NewToken(f"cmb_{token_id}_{secret}", token_id, account, kept, expires)

    def tokens(self, account: str | None = None) -> list[dict[str, Any]]:
        """Tokens without their secrets, the newest first."""
        return self._db.query(
            "SELECT token_id, account, scopes, created, expires, revoked, last_used,"
            " revoked IS NULL AND expires > now() AS valid"
            " FROM access.token WHERE %(account)s::text IS NULL OR account = %(account)s ORDER BY created DESC",
            {"account": account},
        )

    def revoke(self, token_id: str) -> None:
        """Make a token worthless from now on.

        Raises
        ------
        NotFoundError
            There is no such token.
        """
        found = self._db.execute(
            "UPDATE access.token SET revoked = coalesce(revoked, now()) WHERE token_id = %s RETURNING account",
            (token_id,),
        )
        if not found:
            raise NotFoundError(f"token {token_id!r}: there is none; see: cumbre token list")
        self.audit(Principal(account=found[0][0], token_id=token_id), "token revoke", token_id)

    def authenticate(self, token: str, address: str = "") -> Principal:
        """Who shows this token.

        Raises
        ------
        AuthenticationError
            It is not one of ours, expired, revoked, or the account is disabled.
        """
        match = _TOKEN.fullmatch(token.strip())
        if match is None:
            raise AuthenticationError("this is not a token of this site: expected cmb_ID_SECRET")
        rows = self._db.query(
            "UPDATE access.token t SET last_used = CASE WHEN last_used > now() - interval '1 minute'"
            " THEN last_used ELSE now() END FROM access.account a"
            " WHERE token_id = %s AND a.name = t.account"
            " RETURNING t.account, secret_sha256, scopes, expires, revoked, disabled,"
            " (SELECT coalesce(array_agg(group_name), '{}') FROM access.all_member m WHERE m.account = t.account)"
            " AS groups",
            (match["id"],),
        )
        digest = hashlib.sha256(match["secret"].encode()).digest()
        if not rows or not hmac.compare_digest(bytes(rows[0]["secret_sha256"]), digest):
            raise AuthenticationError("this token is not known here; ask for one: cumbre token create")
        row = rows[0]
        if row["revoked"] is not None or row["disabled"]:
            raise AuthenticationError(f"token {match['id']} was revoked; make another: cumbre token create")
        if row["expires"] <= datetime.now(UTC):
            raise AuthenticationError(
                f"token {match['id']} expired at {row['expires']:%Y-%m-%dT%H:%M:%SZ}; make another: "
                f"cumbre token create --user {row['account']}"
            )
        return self.principal(
            row["account"], row["scopes"], token_id=match["id"], address=address, groups=row["groups"]
        )

    def principal(
        self,
        account: str,
        scopes: Iterable[str],
        *,
        token_id: str,
        address: str = "",
        groups: Iterable[str] | None = None,
    ) -> Principal:
        """An account that has shown who it is, with the rights of its groups."""
        known = self.groups_of(account) if groups is None else frozenset(groups)
        return Principal(account, self._rights(known), frozenset(scopes), known, token_id, address)

    # people who log in elsewhere

    def account_of(self, issuer: str, subject: str, wanted: str, *, is_local: bool = False) -> str:
        """Account of somebody whom a provider knows; the first time one is made.

        Parameters
        ----------
        wanted
            The name that the provider tells; another is made of it when it is taken, so that nobody gets the account
            of somebody else by calling themselves so.
        is_local
            The provider is this site's own: its users are the site's accounts.

        Raises
        ------
        AuthorizationError
            The account is disabled.
        """
        if not subject:
            raise AuthenticationError("the provider tells no subject")
        name = re.sub(r"[^A-Za-z0-9._@-]", "-", wanted)[:50]
        if not _NAME.fullmatch(name) or name == ANONYMOUS:
            name = f"u-{name}"[:50].rstrip("-") if name else "u"
        mark = hashlib.sha256(f"{issuer} {subject}".encode()).hexdigest()[:8]
        with self._db.connection() as link:
            found = link.execute(
                "SELECT account FROM access.subject WHERE issuer = %s AND subject = %s", (issuer, subject)
            ).fetchone()
            if found is None:
                for candidate in (name, f"{name}.{mark}"):
                    made = link.execute(
                        "INSERT INTO access.account (name) VALUES (%s) ON CONFLICT DO NOTHING RETURNING 1",
                        (candidate,),
                    ).fetchone()
                    if made or (is_local and candidate == name):
                        name = candidate
                        break
                else:
                    raise AuthorizationError(f"{wanted}: this account belongs to somebody else")
                link.execute("INSERT INTO access.subject VALUES (%s, %s, %s)", (issuer, subject, name))
            else:
                name = found[0]
            disabled = link.execute("SELECT disabled FROM access.account WHERE name = %s", (name,)).fetchone()
        if disabled and disabled[0]:
            raise AuthorizationError(f"{name}: this account is disabled")
        return name

    def set_claimed_groups(self, account: str, groups: Iterable[str]) -> frozenset[str]:
        """The groups that a provider tells replace those that it told before; unknown ones are left out."""
        with self._db.connection() as link:
            link.execute("DELETE FROM access.claimed_member WHERE account = %s", (account,))
            rows = link.execute(
                "INSERT INTO access.claimed_member SELECT %s, name FROM access.account_group WHERE name = ANY(%s)"
                " RETURNING group_name",
                (account, sorted(set(groups))),
            ).fetchall()
        return frozenset(row[0] for row in rows)

    def _rights(self, groups: Iterable[str]) -> frozenset[str]:
        rows = self._db.execute(
            "SELECT rights FROM access.account_group WHERE name = ANY(%s)", (sorted(groups),)
        )
        return frozenset({PUBLIC}).union(*(row[0] for row in rows))

    def local_administrator(self, root: Path) -> Path:
        """See that ``run/admin.token`` holds a valid token of the administrator; only its owner may read it."""
        path = root / ADMIN_TOKEN_FILE
        self.add_member(ADMIN_ACCOUNT, ADMINISTRATORS)
        try:
            if path.stat().st_mode & 0o077 == 0:
                self.authenticate(path.read_text())
                return path
        except (FileNotFoundError, AuthenticationError):
            pass
        from cumbre.stores.files import write_atomic

        made = self.create_token(ADMIN_ACCOUNT, list(SCOPES), 365)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (made.token + "\n").encode(), mode=0o600)
        return path

    # limits and audit

    def count_request(self, who: Principal, resource: str, limit: int) -> Allowance:
        """Count one request of this minute.

        Raises
        ------
        RateLimitError
            More than ``limit`` in this minute.
        """
        start, used = self._db.execute(
            "INSERT INTO access.request_count (who, resource, window_start, used) VALUES (%s, %s,"
            " to_timestamp(floor(extract(epoch FROM clock_timestamp()) / %s) * %s), 1)"
            " ON CONFLICT (who, resource, window_start) DO UPDATE SET used = access.request_count.used + 1"
            " RETURNING window_start, used",
            (who.owner, resource, WINDOW_S, WINDOW_S),
        )[0]
        allowance = Allowance(resource, limit, used, start + timedelta(seconds=WINDOW_S))
        if used > limit:
            raise RateLimitError(
                f"{who.owner}: {used} requests of {resource} in this minute, {limit} are allowed; "
                f"come back in {allowance.retry_after_s()} s, or ask for a token with a higher limit",
                allowance,
            )
        return allowance

    def forget_old_counts(self) -> None:
        """Delete counts of past minutes."""
        self._db.execute(
            "DELETE FROM access.request_count WHERE window_start < now() - interval '10 minutes'"
        )

    def audit(self, who: Principal, action: str, target: str = "", outcome: str = "ok") -> None:
        """Write who did what."""
        self._db.execute(
            "INSERT INTO access.audit (account, token_id, address, action, target, outcome)"
            " VALUES (%s, %s, %s, %s, %s, %s)",
            (
                who.account,
                who.token_id,
                who.address,
                action[:64],
                target[:4000].replace("\0", " "),
                outcome[:64],
            ),
        )
