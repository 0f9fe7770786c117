"""Who asks: the part of an identity that decides which tables are visible."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class User:
    """A person or service that asks.

    Attributes
    ----------
    name
        User name; None for somebody unknown.
    groups
        Names of the groups the user is in; each opens what is shared with it.
    """

    name: str | None = None
    groups: frozenset[str] = field(default_factory=frozenset)

    def may_read(self, access: bool | str) -> bool:
        """Whether something is open: True for everybody, else the name of a group or ``user:NAME``."""
        if isinstance(access, bool):
            return access
        return access in self.groups or (self.name is not None and access == f"user:{self.name}")


ANYBODY = User()
"""Somebody who did not say who they are."""
