"""Limits of classes of users: what a group may do in the place of what everybody may."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cumbre.access.identity import ANONYMOUS
from cumbre.access.limits import Limits

if TYPE_CHECKING:
    from cumbre.access.identity import Principal

type Changes = Mapping[str, float]
"""New values of fields of :class:`cumbre.access.limits.Limits`, by name."""


@dataclass(frozen=True)
class UserClass:
    """Limits of one group; what is not named stays as it is for everybody.

    Attributes
    ----------
    sync, job
        Of one query answered at once, and of one job.
    per_minute
        Requests a minute; None leaves it.
    """

    sync: Changes = field(default_factory=dict)
    job: Changes = field(default_factory=dict)
    per_minute: int | None = None


@dataclass(frozen=True)
class Allowed:
    """Who may do how much.

    Attributes
    ----------
    sync, job
        Limits of queries for everybody.
    anonymous_per_minute, user_per_minute
        Requests of one address without a token, and of one account.
    classes
        By group; ``anonymous`` are people without a token.
    """

    sync: Limits
    job: Limits
    anonymous_per_minute: int
    user_per_minute: int
    classes: Mapping[str, UserClass] = field(default_factory=dict)

    def sync_limits(self, who: Principal) -> Limits:
        """What one query answered at once may cost."""
        return _most(self.sync, (known.sync for known in self._classes(who)))

    def job_limits(self, who: Principal) -> Limits:
        """What one job may cost."""
        return _most(self.job, (known.job for known in self._classes(who)))

    def per_minute(self, who: Principal) -> int:
        """Requests a minute."""
        given = [known.per_minute for known in self._classes(who) if known.per_minute is not None]
        if given:
            return max(given)
        return self.anonymous_per_minute if who.is_anonymous else self.user_per_minute

    def _classes(self, who: Principal) -> list[UserClass]:
        names = {ANONYMOUS} if who.is_anonymous else who.groups
        return [known for name, known in self.classes.items() if name in names]


def _most(base: Limits, changes: Iterable[Changes]) -> Limits:
    """The most generous of several changes of each limit."""
    found: dict[str, float] = {}
    for change in changes:
        for name, value in change.items():
            found[name] = max(value, found.get(name, 0))
    whole = {name: value if name == "seconds" else int(value) for name, value in found.items()}
    return replace(base, **whole)  # type: ignore[arg-type]
