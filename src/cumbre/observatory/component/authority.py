"""Who may command what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase


class Authority:
    """Allow lists of identities, by ``Entity.command``, else ``Entity``, else ``*``.

    Parameters
    ----------
    commanders
        Key → patterns of identities (``*`` and ``?`` match).
    """

    def __init__(self, commanders: Mapping[str, Sequence[str]]) -> None:
        self._commanders = commanders

    def allowed(self, entity: str, verb: str) -> Sequence[str]:
        """Patterns of who may send this command; the most special key counts alone."""
        for key in (f"{entity}.{verb}", entity, "*"):
            if key in self._commanders:
                return self._commanders[key]
        return ()

    def may(self, entity: str, verb: str, identity: str) -> bool:
        """Whether this identity may send this command."""
        return any(fnmatchcase(identity, pattern) for pattern in self.allowed(entity, verb))
