"""The state of a commandable component as a pure machine: three axes and the configure that may run.

Commands of both faces (automated-operation document, CSC) go in, a new state and an answer come out. What each
does in each state is the table of ``docs/reference/commandable-components.md``; a test holds both together.

Invariants: without configuration nothing is enabled; OFFLINE has no configuration and runs no configure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import Literal

from cumbre.core.errors import NotFoundError


class Protocol(StrEnum):
    """Whether it takes commands."""

    OFFLINE = "OFFLINE"
    IDLE = "IDLE"
    ERROR = "ERROR"


class Processing(StrEnum):
    """Whether it processes events and data; draining: no new ones, and jobs still run."""

    DISABLED = "disabled"
    ENABLED = "enabled"
    DRAINING = "draining"


class SummaryState(IntEnum):
    """CSC summary states, with SAL's numbers."""

    DISABLED = 1
    ENABLED = 2
    FAULT = 3
    OFFLINE = 4
    STANDBY = 5


NO_ERROR, ABORTED, FAULT = 0, 1, 2
"""Error codes: none, the abort command, an internal fault."""


@dataclass(frozen=True, slots=True)
class State:
    """What a component stores.

    Attributes
    ----------
    configuration, configuring
        Name of the configuration in force, and of the one that a running configure installs; "" for none.
    error_code, error_report
        Why the protocol state is ERROR.
    """

    protocol: Protocol = Protocol.OFFLINE
    configuration: str = ""
    processing: Processing = Processing.DISABLED
    configuring: str = ""
    error_code: int = NO_ERROR
    error_report: str = ""

    @property
    def summary(self) -> SummaryState:
        """CSC face."""
        if self.protocol is Protocol.OFFLINE:
            return SummaryState.OFFLINE
        if self.protocol is Protocol.ERROR:
            return SummaryState.FAULT
        if not self.configuration:
            return SummaryState.STANDBY
        return SummaryState.ENABLED if self.processing is Processing.ENABLED else SummaryState.DISABLED

    @property
    def ldm(self) -> str:
        """Face of the document's protocol: OFFLINE, IDLE, ERROR, or BUSY while a command runs."""
        return "BUSY" if self.configuring else str(self.protocol)

    @property
    def is_enabled(self) -> bool:
        """Whether events and data are processed."""
        return self.processing is Processing.ENABLED


type Answer = Literal["complete", "in progress", "failed"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a command does.

    Attributes
    ----------
    cancels
        A configure that ran ends with this; who sent it is answered "aborted".
    """

    state: State
    answer: Answer = "complete"
    result: str = "done"
    cancels: bool = False


@dataclass(frozen=True, slots=True)
class _Case:
    state: State
    argument: str
    locked: str
    jobs: int

    def off(self) -> Processing:
        """Disabled, once the jobs that run have ended."""
        return Processing.DRAINING if self.jobs else Processing.DISABLED

    def failed(self, reason: str) -> Decision:
        return Decision(self.state, "failed", reason)

    def becomes(self, state: State, result: str = "done") -> Decision:
        """Complete; a configure that ran is over unless the new state still has it."""
        return Decision(state, result=result, cancels=bool(self.state.configuring) and not state.configuring)

    def bare(self, protocol: Protocol) -> Decision:
        """Disabled and without configuration."""
        return self.becomes(State(protocol, processing=self.off()))


def command(state: State, verb: str, *, argument: str = "", locked: str = "", jobs: int = 0) -> Decision:
    """Decide on one command. Pure: the same arguments give the same decision.

    Parameters
    ----------
    verb
        Name of the command's topic.
    argument
        Name of the configuration for configure and start.
    locked
        Why engineering has locked control out; "" when it has not.
    jobs
        Jobs in flight.

    Raises
    ------
    NotFoundError
        No such command.
    """
    if verb not in _VERBS:
        raise NotFoundError(f"no command {verb!r}; a commandable component has {', '.join(_VERBS)}")
    return _VERBS[verb](_Case(state, argument, locked, jobs))


def configured(state: State, *, jobs: int = 0) -> State:
    """After a configure whose checks were good: disabled, then the new configuration in force."""
    assert state.configuring
    processing = Processing.DRAINING if jobs else Processing.DISABLED
    return State(Protocol.IDLE, state.configuring, processing)


def configure_failed(state: State) -> State:
    """After a configure whose checks were bad: as it was before, running what it ran."""
    return replace(state, configuring="")


def fault(state: State, report: str, *, jobs: int = 0) -> State:
    """After an internal fault: ERROR and disabled, the configuration kept; an OFFLINE component stays so."""
    if state.protocol is Protocol.OFFLINE:
        return state
    processing = Processing.DRAINING if jobs else Processing.DISABLED
    return State(Protocol.ERROR, state.configuration, processing, "", FAULT, report)


def drained(state: State) -> State:
    """After the end of the last job."""
    if state.processing is Processing.DRAINING:
        return replace(state, processing=Processing.DISABLED)
    return state


def _enter(case: _Case) -> Decision:
    if case.state.protocol is not Protocol.OFFLINE:
        return case.failed(f"expected OFFLINE, it is {case.state.protocol}")
    if case.locked:
        return case.failed(f"engineering has locked control out: {case.locked}")
    return case.becomes(replace(case.state, protocol=Protocol.IDLE))


def _configure(case: _Case) -> Decision:
    if case.state.protocol is Protocol.OFFLINE:
        return case.failed("OFFLINE; send init first")
    if case.state.configuring:
        return case.failed(f"configure {case.state.configuring} runs; wait for it, or send stop")
    if not case.argument:
        return case.failed("no configuration named")
    return Decision(replace(case.state, configuring=case.argument), "in progress", "checking")


def _start(case: _Case) -> Decision:
    if case.state.summary is not SummaryState.STANDBY:
        return case.failed(f"start is for STANDBY, it is {case.state.summary.name}; use configure")
    return _configure(case)


def _enable(case: _Case) -> Decision:
    state = case.state
    if state.protocol is not Protocol.IDLE:
        return case.failed(
            f"{state.protocol}; send {'init' if state.protocol is Protocol.OFFLINE else 'reset'} first"
        )
    if state.configuring:
        return case.failed(f"configure {state.configuring} runs; wait for it")
    if not state.configuration:
        return case.failed("no configuration selected; send configure first")
    return case.becomes(replace(state, processing=Processing.ENABLED))


def _disable(case: _Case) -> Decision:
    if case.state.protocol is Protocol.OFFLINE:
        return case.failed("OFFLINE; nothing is enabled")
    off = case.off()
    return case.becomes(
        replace(case.state, processing=off),
        f"done; {case.jobs} jobs go on to their end" if off is Processing.DRAINING else "done",
    )


def _release(case: _Case) -> Decision:
    return case.bare(Protocol.OFFLINE)


def _stop(case: _Case) -> Decision:
    if not case.state.configuring:
        return case.becomes(case.state, "ignored: no configure runs")
    return case.becomes(replace(case.state, configuration="", processing=case.off(), configuring=""))


def _abort(case: _Case) -> Decision:
    state = case.state
    if state.protocol is Protocol.OFFLINE:
        return case.failed("OFFLINE; send init first")
    report = "abort command"
    if state.configuring:
        return case.becomes(State(Protocol.ERROR, "", case.off(), "", ABORTED, f"{report} during configure"))
    kept = replace(state, protocol=Protocol.ERROR, error_code=ABORTED, error_report=report)
    return case.becomes(kept, f"ERROR; processing stays {state.processing}, disable ends it")


def _reset(case: _Case) -> Decision:
    if case.state.protocol is Protocol.OFFLINE:
        return case.failed("OFFLINE; send init first")
    return case.bare(Protocol.IDLE)


def _standby(case: _Case) -> Decision:
    if case.state.summary not in (SummaryState.DISABLED, SummaryState.FAULT):
        return case.failed(f"standby is for DISABLED and FAULT, it is {case.state.summary.name}")
    return case.bare(Protocol.IDLE)


def _exit(case: _Case) -> Decision:
    if case.state.summary is not SummaryState.STANDBY:
        return case.failed(f"exitControl is for STANDBY, it is {case.state.summary.name}")
    if case.state.configuring:
        return case.failed(f"configure {case.state.configuring} runs; wait for it, or send stop")
    return case.bare(Protocol.OFFLINE)


def _log_level(case: _Case) -> Decision:
    return case.becomes(case.state)


_VERBS: dict[str, Callable[[_Case], Decision]] = {
    "init": _enter,
    "configure": _configure,
    "enable": _enable,
    "disable": _disable,
    "release": _release,
    "stop": _stop,
    "abort": _abort,
    "reset": _reset,
    "start": _start,
    "standby": _standby,
    "enterControl": _enter,
    "exitControl": _exit,
    "setLogLevel": _log_level,
}
VERBS = tuple(_VERBS)
