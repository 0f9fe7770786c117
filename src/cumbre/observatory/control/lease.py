"""The lease of a control system's identity: of several processes at most one acts.

Who holds it counts a renewal up. Who wants it watches: when epoch and renewal stay the same for the lease's
time on the watcher's own monotonic clock, it takes over with the next epoch. No wall clock is compared, so a
clock step changes nothing. Each writing transaction locks the lease's row and checks its epoch, so what a
paused or cut-off former holder tries later is refused by the database (fencing).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cumbre.core.errors import ConflictError
from cumbre.core.time import Clock
from cumbre.stores.postgres import Connection, Database

PAUSED_LIMIT = "2s"
"""A holder that stops within a transaction holds its lock; the server ends the transaction after this."""


class LeaseLostError(ConflictError):
    """Another process acts under this identity now."""

    outcome = "Fenced"


@dataclass(frozen=True, slots=True)
class Acquired:
    """How the lease was got.

    Attributes
    ----------
    warm
        Go on where the former holder was: it died, or it stopped and the site it ran on did not.
    silent_s
        Real seconds for which the former holder was seen to be silent.
    """

    warm: bool
    silent_s: float


class Lease:
    """One process's claim on an identity.

    Parameters
    ----------
    identity
        What is claimed (``control-base``).
    holder
        Name of this process for people; must be unique.
    lease_s
        Real seconds of silence until another takes over.
    boot
        What run of the site this process belongs to; "" when unknown.
    patience_s
        Real seconds for which a lease that nobody holds is left to others: a spare lets the first one begin.

    Attributes
    ----------
    epoch
        Epoch under which this process acts; 0 when it does not.
    """

    def __init__(
        self,
        db: Database,
        *,
        identity: str,
        holder: str,
        lease_s: float,
        clock: Clock | None = None,
        boot: str = "",
        patience_s: float = 0.0,
    ) -> None:
        self._patience_s = patience_s
        self._boot = boot
        self._db, self.identity, self.holder, self._lease_s = db, identity, holder, lease_s
        self._clock = clock or Clock.real()
        self.epoch = 0
        self._renewed = 0.0
        self._seen: tuple[str, int, int, str] | None = None
        self._seen_since = 0.0

    @property
    def is_sure(self) -> bool:
        """Whether nobody can have taken over yet."""
        return self.epoch > 0 and time.monotonic() - self._renewed < 0.8 * self._lease_s

    @property
    def is_due(self) -> bool:
        """Whether it should be renewed."""
        return time.monotonic() - self._renewed > self._lease_s / 5

    def acquire(self) -> Acquired | None:
        """Try to become the holder; None while another lives.

        Raises
        ------
        TransientError
            The database is away, or the former holder's transaction has not ended yet; try again.
        """
        now = time.monotonic()
        rows = self._db.execute(
            "SELECT holder, epoch, renewal, boot FROM control.lease WHERE identity = %s", (self.identity,)
        )
        if not rows:
            self._db.execute(
                "INSERT INTO control.lease VALUES (%s, '', 0, 0, 0, '') ON CONFLICT DO NOTHING",
                (self.identity,),
            )
            rows = [("", 0, 0, "")]
        seen = rows[0]
        if seen != self._seen:
            self._seen, self._seen_since = seen, now
        holder, epoch, renewal, boot = seen
        silent_s = now - self._seen_since
        if silent_s < (self._lease_s if holder else self._patience_s):
            return None
        with self._db.connection() as link:
            link.execute("SET LOCAL lock_timeout = '500ms'")
            taken = link.execute(
                "UPDATE control.lease SET holder = %s, epoch = epoch + 1, renewal = 0, renewed_tai = %s, boot = %s "
                "WHERE identity = %s AND epoch = %s AND renewal = %s RETURNING epoch",
                (self.holder, self._clock.now_tai_s(), self._boot, self.identity, epoch, renewal),
            ).fetchone()
        if taken is None:
            return None
        # counted from before the statement: the claim is never believed longer than others respect it
        self.epoch, self._renewed = int(taken[0]), now
        return Acquired(warm=bool(holder) or bool(boot and boot == self._boot), silent_s=silent_s)

    def renew(self) -> None:
        """Say that this process lives.

        Raises
        ------
        LeaseLostError
            Another process has taken over.
        """
        now = time.monotonic()
        rows = self._db.execute(
            "UPDATE control.lease SET renewal = renewal + 1, renewed_tai = %s "
            "WHERE identity = %s AND epoch = %s RETURNING 1",
            (self._clock.now_tai_s(), self.identity, self.epoch),
        )
        if not rows:
            raise self._lost()
        self._renewed = now

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction that can only commit while this process holds the lease.

        Raises
        ------
        LeaseLostError
            Another process has taken over; nothing was written.
        """
        with self._db.connection() as link:
            link.execute(f"SET LOCAL idle_in_transaction_session_timeout = '{PAUSED_LIMIT}'".encode())
            # FOR SHARE: a takeover waits until this transaction is over, or was ended by the server
            row = link.execute(
                "SELECT epoch FROM control.lease WHERE identity = %s FOR SHARE", (self.identity,)
            ).fetchone()
            if row is None or int(row[0]) != self.epoch:
                raise self._lost()
            yield link

    def release(self) -> None:
        """Let another process begin at once; nothing when the lease is not held any more."""
        if self.epoch:
            self._db.execute(
                "UPDATE control.lease SET holder = '' WHERE identity = %s AND epoch = %s",
                (self.identity, self.epoch),
            )
            self.epoch = 0

    def _lost(self) -> LeaseLostError:
        epoch, self.epoch = self.epoch, 0
        return LeaseLostError(
            f"{self.identity}: {self.holder} held epoch {epoch}; another process acts now under a later one"
        )
