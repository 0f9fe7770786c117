"""The machine against the table of docs/reference/commandable-components.md, row by row, and its invariants."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumbre.core.errors import NotFoundError
from cumbre.observatory.component import machine
from cumbre.observatory.component.machine import VERBS, Processing, Protocol, State, SummaryState

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "commandable-components.md"
OLD, NEW = "science", "engineering"
INSIDE = ("(checks good)", "(checks bad)", "(fault)", "(last job ended)")


def allowed(state):
    """The invariants of the page."""
    if not state.configuration and state.is_enabled:
        return False
    if state.protocol is Protocol.OFFLINE and (state.configuration or state.configuring):
        return False
    return (state.error_code != 0) == (state.protocol is Protocol.ERROR)


STATES = [
    state
    for protocol, configuration, processing, configuring in itertools.product(
        Protocol, ("", OLD), Processing, ("", NEW)
    )
    if allowed(state := State(protocol, configuration, processing, configuring, int(protocol == "ERROR")))
]


@dataclass(frozen=True)
class Row:
    line: int
    command: str
    before: tuple[str, ...]
    answer: str
    after: tuple[str, ...]

    def fits(self, state):
        words = (
            state.protocol,
            "X" if state.configuration else "none",
            state.processing,
            "yes" if state.configuring else "no",
        )
        return all(
            cell == "*" or word in cell.split(", ") for cell, word in zip(self.before, words, strict=True)
        )


def table():
    lines = PAGE.read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| command |"))
    for number, line in enumerate(lines[head + 2 :], head + 3):
        if not line.startswith("|"):
            return
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        yield Row(number, cells[0], tuple(cells[1:5]), cells[5], tuple(cells[6:10]))


ROWS = list(table())


def cases():
    for row in ROWS:
        for state in STATES:
            if row.fits(state):
                for jobs in (0, 3):
                    yield pytest.param(
                        row, state, jobs,
                        id=f"{row.command}-line{row.line}-{state.protocol}-{state.configuration or 'none'}"
                        f"-{state.processing}-{'configuring' if state.configuring else 'quiet'}-{jobs}",
                    )  # fmt: skip


def act(row, state, jobs):
    """What the machine does with the row's command: answer, state after, whether a configure was ended."""
    match row.command:
        case "(checks good)":
            return "", machine.configured(state, jobs=jobs), False
        case "(checks bad)":
            return "", machine.configure_failed(state), False
        case "(fault)":
            return "", machine.fault(state, "broken", jobs=jobs), True
        case "(last job ended)":
            return "", machine.drained(state), False
    verb, _, locked = row.command.partition(", ")
    decision = machine.command(state, verb, argument=NEW, locked=locked, jobs=jobs)
    assert (decision.answer != "failed") or decision.result, "a refusal has a reason"
    return decision.answer, decision.state, decision.cancels


@pytest.mark.parametrize(("row", "state", "jobs"), list(cases()))
def test_the_machine_does_what_the_table_says(row, state, jobs):
    answer, after, cancels = act(row, state, jobs)
    protocol, configuration, processing, configuring = row.after
    assert answer == row.answer
    assert after.protocol == (state.protocol if protocol == "=" else protocol)
    names = {"none": "", "=": state.configuration, "X": OLD, "new": NEW}
    assert after.configuration == names[configuration]
    off = Processing.DRAINING if jobs else Processing.DISABLED
    assert after.processing == {"=": state.processing, "off": off}.get(processing, processing)
    assert bool(after.configuring) is {"=": bool(state.configuring), "yes": True, "no": False}[configuring]
    if row.answer != "":
        assert cancels is (bool(state.configuring) and not after.configuring)
    assert allowed(after)


def test_every_command_in_every_state_is_in_exactly_one_row():
    commands = {row.command for row in ROWS}
    assert commands == {*VERBS, "init, locked out", "enterControl, locked out", *INSIDE}
    for command, state in itertools.product(VERBS, STATES):
        rows = [row for row in ROWS if row.command == command and row.fits(state)]
        assert len(rows) == 1, (command, state, rows)


def test_summary_states_are_projections():
    seen = {state.summary for state in STATES}
    assert seen == set(SummaryState)
    assert State().summary is SummaryState.OFFLINE
    assert State(Protocol.IDLE).summary is SummaryState.STANDBY
    assert State(Protocol.IDLE, OLD, Processing.DRAINING).summary is SummaryState.DISABLED
    assert State(Protocol.IDLE, OLD, Processing.ENABLED).summary is SummaryState.ENABLED
    assert State(Protocol.ERROR, OLD, Processing.ENABLED, "", 1).summary is SummaryState.FAULT
    assert [int(SummaryState[n]) for n in ("DISABLED", "ENABLED", "FAULT", "OFFLINE", "STANDBY")] == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip
    assert State(Protocol.IDLE, OLD, configuring=NEW).ldm == "BUSY"


def test_an_unknown_command_is_named():
    with pytest.raises(NotFoundError, match="'explode'"):
        machine.command(State(), "explode")


def test_configure_needs_a_name():
    assert machine.command(State(Protocol.IDLE), "configure").answer == "failed"


MOVES = st.one_of(
    st.tuples(st.sampled_from(VERBS), st.sampled_from(("", OLD, NEW)), st.booleans()),
    st.tuples(st.sampled_from(INSIDE), st.just(""), st.just(False)),
)


@given(st.lists(st.tuples(MOVES, st.integers(0, 3)), max_size=40))
def test_any_sequence_keeps_the_invariants(moves):
    state, jobs, running = State(), 0, ""
    for (verb, argument, locked), wanted in moves:
        before = state
        # jobs begin only while enabled; else they can only end
        jobs = wanted if state.is_enabled else min(jobs, wanted)
        if verb in INSIDE:
            if verb == "(checks good)" and state.configuring:
                state = machine.configured(state, jobs=jobs)
                assert (state.configuration, state.is_enabled) == (running, False)
            elif verb == "(checks bad)" and state.configuring:
                state = machine.configure_failed(state)
                assert (state.configuration, state.processing) == (before.configuration, before.processing)
            elif verb == "(fault)":
                state = machine.fault(state, "broken", jobs=jobs)
            elif verb == "(last job ended)":
                jobs = 0
                state = machine.drained(state)
        else:
            decision = machine.command(
                state, verb, argument=argument, locked="tests" if locked else "", jobs=jobs
            )
            state = decision.state
            if decision.answer == "failed":
                assert state == before
            if decision.answer == "in progress":
                running = argument
            assert decision.cancels is (bool(before.configuring) and not state.configuring)
            if before.protocol is Protocol.OFFLINE and locked:
                assert state.protocol is Protocol.OFFLINE, "nothing leads around the lock-out"
            if before.is_enabled and not state.is_enabled:
                assert (state.processing is Processing.DRAINING) is (jobs > 0), "jobs are never killed"
            if not before.is_enabled and state.is_enabled:
                assert verb == "enable"
        assert allowed(state)
