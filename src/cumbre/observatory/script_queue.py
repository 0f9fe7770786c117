"""The queue of visits as a pure machine: at most one announced and one exposing, each done once.

State and time in, one action out; the service performs it in the order that makes a crash harmless:

====================  =================================================================================
action                what the service does
====================  =================================================================================
:class:`Announce`     saves the state, then publishes Scheduler.target and ScriptQueue.nextVisit
:class:`Republish`    publishes them again: the process died between saving and publishing
:class:`Expose`       saves the state, then sends Camera.takeImages (so never twice for a group)
:class:`Cancel`       publishes nextVisitCanceled, then saves
:class:`Finish`       saves, then writes ``observatory/night_done.json`` (again at a start that misses it)
:class:`Wait`         nothing before that moment, unless a message comes
====================  =================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cumbre.core.errors import ConfigurationError
from cumbre.observatory.visits import Target, Visit, new_group_id

QUEUE_FILE = "observatory/queue.json"
REMEMBERED_CANCELED = 20
MARGIN_S = 1.0
"""Night seconds of notice beyond what is promised: publishing takes time too."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Night seconds of a visit's parts.

    Attributes
    ----------
    grace_s
        How long beyond all exposures and read-outs of a visit its last end of read-out is waited for.
    late_s
        An announced visit that could not start for so long is cancelled.
    """

    cadence_s: float
    notice_s: float
    readout_s: float
    grace_s: float = 120.0
    late_s: float = 600.0

    def camera_s(self, target: Target) -> float:
        """Seconds for which a visit needs the camera: every exposure with its read-out."""
        return target.snaps * (target.exposure_s + self.readout_s)


@dataclass(frozen=True, slots=True)
class QueueState:
    """Everything that must survive a restart.

    Attributes
    ----------
    night
        Key of the night under way; "" before the first.
    wanted, done, failed
        Visits ordered, exposed, given up.
    announced, is_published, published_tai
        The next visit, whether its nextVisit is known to be out, and since when.
    exposing, deadline_tai
        The visit whose takeImages was (perhaps) sent, and how long it is waited for.
    last_visit_tai
        Tile name → start of its last exposure.
    read_out
        Group id → images read out, of visits that have not all of theirs yet.
    finished
        Why the night is over; "" while it runs.
    """

    night: str = ""
    wanted: int = 0
    done: int = 0
    failed: int = 0
    last_group: str = ""
    last_target_id: int = 0
    announced: Visit | None = None
    is_published: bool = False
    published_tai: float = 0.0
    exposing: Visit | None = None
    commanded_tai: float = 0.0
    deadline_tai: float = 0.0
    last: Target | None = None
    last_visit_tai: dict[str, float] = field(default_factory=dict)
    canceled: tuple[str, ...] = ()
    read_out: dict[str, list[str]] = field(default_factory=dict)
    paused: bool = False
    finished: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> QueueState:
        """Inverse of :meth:`to_json`; unknown keys of a newer version are left out."""
        known = {key: data[key] for key in cls.__dataclass_fields__ if key in data}
        for key in ("announced", "exposing"):
            if known.get(key):
                known[key] = Visit.from_json(known[key])
        if known.get("last"):
            known["last"] = Target(**known["last"])
        known["canceled"] = tuple(known.get("canceled", ()))
        return cls(**known)

    @classmethod
    def load(cls, path: Path) -> QueueState:
        """Read the saved state; a fresh one where there is no file.

        Raises
        ------
        ConfigurationError
            The file is not what :meth:`to_json` wrote.
        """
        if not path.exists():
            return cls()
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(
                f"{path}: not a saved queue ({error}); move it away to start with an empty queue"
            ) from error


@dataclass(frozen=True, slots=True)
class Announce:
    """Make this visit the next one."""

    visit: Visit


@dataclass(frozen=True, slots=True)
class Republish:
    """Publish the announced visit again."""

    visit: Visit


@dataclass(frozen=True, slots=True)
class Expose:
    """Send takeImages for the announced visit."""

    visit: Visit


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give a visit up."""

    visit: Visit
    reason: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The night is over."""

    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before ``until_tai``."""

    until_tai: float


Action = Announce | Republish | Expose | Cancel | Finish | Wait
Chooser = Callable[[QueueState, float], "Target | Finish | None"]
"""State and earliest start (TAI) → the target; None when nothing may be observed then, Finish when never."""


def begin_night(state: QueueState, night: str, wanted: int) -> QueueState:
    """Start to count for a new night; group ids, target ids and what was seen when go on."""
    return replace(state, night=night, wanted=wanted, done=0, failed=0, canceled=(), read_out={}, finished="")


def end_of_readout(state: QueueState, group_id: str, name: str = "", n_images: int = 1) -> QueueState:
    """Take in an end of read-out: with its last image a visit is done, also one given up whose images came late.

    Parameters
    ----------
    name
        Of the image; one told twice counts once.
    n_images
        How many images the camera takes for this visit, as it says itself.
    """
    is_exposing = state.exposing is not None and state.exposing.group_id == group_id
    if not is_exposing and group_id not in state.canceled:
        return state
    wanted = state.exposing.target.snaps if is_exposing and state.exposing else n_images
    seen = state.read_out.get(group_id, [])
    seen = seen if name in seen else [*seen, name]
    others = {group: names for group, names in state.read_out.items() if group != group_id}
    if len(seen) < wanted:
        return replace(state, read_out=others | {group_id: seen})
    left = tuple(item for item in state.canceled if item != group_id)
    return replace(
        state,
        exposing=None if is_exposing else state.exposing,
        canceled=left,
        read_out=others,
        done=state.done + 1,
    )


def next_action(
    state: QueueState, now_tai: float, timing: Timing, choose: Chooser, *, instrument: str
) -> Action:
    """Decide the one thing to do now. Pure: the same arguments give the same action."""
    if state.exposing is not None and now_tai >= state.deadline_tai:
        came, wanted = len(state.read_out.get(state.exposing.group_id, ())), state.exposing.target.snaps
        told = f"{came} of {wanted} images were read out" if came else "no end of read-out"
        return Cancel(state.exposing, f"{told} before the deadline")
    if state.announced is not None:
        if not state.is_published:
            return Republish(state.announced)
        if state.exposing is None:
            return _start(state, state.announced, now_tai, timing)
        return Wait(state.deadline_tai)
    if state.finished or not state.night:
        return Wait(now_tai + timing.cadence_s)
    if state.exposing is None and state.done >= state.wanted:
        return Finish("all visits are done")
    given_up = state.failed > max(10, state.wanted)
    if state.exposing is None and given_up:
        return Finish(f"given up after {state.failed} failed visits")
    if given_up or state.paused or state.done + (state.exposing is not None) >= state.wanted:
        return Wait(state.deadline_tai if state.exposing else now_tai + timing.cadence_s)
    return _announce(state, now_tai, timing, choose, instrument=instrument)


def _start(state: QueueState, visit: Visit, now_tai: float, timing: Timing) -> Action:
    # A pause holds back the next announcement, not this: prompt processing has prepared for it.
    if now_tai > visit.target.start_tai + timing.late_s:
        return Cancel(visit, f"could not start within {timing.late_s:.0f} s of its time")
    start = max(visit.target.start_tai, state.published_tai + timing.notice_s)
    return Expose(visit) if now_tai >= start else Wait(start)


def _announce(
    state: QueueState, now_tai: float, timing: Timing, choose: Chooser, *, instrument: str
) -> Action:
    earliest = now_tai + timing.notice_s + MARGIN_S
    if state.exposing is not None:
        target = state.exposing.target
        begun = max(target.start_tai, state.commanded_tai)
        following = begun + max(timing.cadence_s, timing.camera_s(target))
        if earliest < following:
            return Wait(following - timing.notice_s - MARGIN_S)
    chosen = choose(state, earliest)
    if chosen is None:
        return Wait(now_tai + timing.cadence_s)
    if isinstance(chosen, Finish):
        return chosen if state.exposing is None else Wait(state.deadline_tai)
    group_id = new_group_id(now_tai, state.last_group)
    return Announce(Visit(group_id, state.last_target_id + 1, instrument, chosen))


def apply(state: QueueState, action: Action, now_tai: float, timing: Timing) -> QueueState:
    """Give the state after an action was decided."""
    match action:
        case Announce(visit):
            return replace(
                state,
                announced=visit,
                is_published=False,
                last_group=visit.group_id,
                last_target_id=visit.target_id,
            )
        case Republish():
            return replace(state, is_published=True, published_tai=now_tai)
        case Expose(visit):
            target = visit.target
            return replace(
                state,
                announced=None,
                is_published=False,
                exposing=visit,
                commanded_tai=now_tai,
                deadline_tai=now_tai + timing.camera_s(target) + timing.grace_s,
                last=target,
                last_visit_tai={**state.last_visit_tai, target.tile: now_tai},
            )
        case Cancel(visit):
            canceled = (*state.canceled, visit.group_id)[-REMEMBERED_CANCELED:]
            kept = {*canceled, state.exposing.group_id if state.exposing else ""}
            read_out = {group: names for group, names in state.read_out.items() if group in kept}
            state = replace(state, read_out=read_out)
            if state.exposing is not None and state.exposing.group_id == visit.group_id:
                return replace(state, exposing=None, failed=state.failed + 1, canceled=canceled)
            return replace(
                state, announced=None, is_published=False, failed=state.failed + 1, canceled=canceled
            )
        case Finish(reason):
            return replace(state, finished=reason)
        case Wait():
            return state
