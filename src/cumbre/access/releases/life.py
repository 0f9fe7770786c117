"""The life of a release as a pure machine: hidden → verified → open → closed.

A release is loaded hidden, can be queried by its testers, is verified as often as wanted, and only then opened.
Until it is opened everything can be undone by loading it again; afterwards it is only ever closed and opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cumbre.core.errors import ConflictError

type State = Literal["hidden", "verified", "open", "closed"]
type Verb = Literal["verify", "reject", "open", "close", "drop"]

_NEXT: dict[tuple[str, str], State | None] = {
    ("hidden", "verify"): "verified",
    ("hidden", "reject"): "hidden",
    ("hidden", "drop"): None,
    ("verified", "verify"): "verified",
    ("verified", "reject"): "hidden",
    ("verified", "open"): "open",
    ("verified", "drop"): None,
    ("open", "verify"): "open",
    ("open", "reject"): "closed",
    ("open", "close"): "closed",
    ("closed", "verify"): "closed",
    ("closed", "reject"): "closed",
    ("closed", "open"): "open",
}
_REMEDY = {
    ("hidden", "open"): "verify it first: cumbre release verify",
    ("open", "open"): "it is open already",
    ("closed", "close"): "it is closed already",
    ("hidden", "close"): "it was never open",
    ("verified", "close"): "it was never open",
    ("open", "drop"): "released data are never dropped; close it instead",
    ("closed", "drop"): "released data are never dropped",
}
KEPT_OPEN = 2
"""Newest releases that stay open beside the first one (DMS: the third oldest is closed)."""


def step(name: str, state: State, verb: Verb) -> State | None:
    """State after a verb; None when the release is gone.

    ``reject`` is a verification that failed: an open release is closed by it, for nobody may read damaged data.

    Raises
    ------
    ConflictError
        The verb is not for this state; says what is.
    """
    if (state, verb) not in _NEXT:
        raise ConflictError(f"release {name} is {state}: {verb} is not possible; {_REMEDY[state, verb]}")
    return _NEXT[state, verb]


@dataclass(frozen=True, slots=True)
class Known:
    """A release, as far as the rule of closing needs it; ``number`` counts openings in time."""

    name: str
    state: State
    number: int | None


def to_close(releases: Sequence[Known], opening: str) -> list[str]:
    """Open releases that are closed when one is opened for the first time: all but the first and the newest two.

    A release that was opened before and is opened again (somebody needs it) closes nothing.
    """
    if any(r.name == opening and r.number is not None for r in releases):
        return []
    opened = sorted((r for r in releases if r.number is not None), key=lambda r: r.number or 0)
    keep = {opening, *(r.name for r in opened[-(KEPT_OPEN - 1) :]), *(r.name for r in opened[:1])}
    return [r.name for r in opened if r.state == "open" and r.name not in keep]
