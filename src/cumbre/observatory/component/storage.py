"""What a component remembers: its state, and each command with its answer. Translation only, no decisions."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from cumbre.bus import AckCode, Message
from cumbre.observatory.component.machine import Processing, Protocol, State
from cumbre.stores.postgres import Connection

type Transaction = Callable[[], AbstractContextManager[Connection]]
"""Opens a transaction; a fenced one refuses when another process acts for the component."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A component's stored state and what its configuration was."""

    state: State = field(default_factory=State)
    version: str = ""
    hash: str = ""
    settings: str = "{}"
    enabled_tai: float = 0.0


@dataclass(frozen=True, slots=True)
class Answered:
    """A command seen before, with its answer."""

    ack: AckCode
    result: str

    @property
    def is_final(self) -> bool:
        """Whether it was brought to its end."""
        return self.ack.is_final


_KEY = "topic = %s AND commander = %s AND origin = %s AND seq_num = %s AND sent_tai = %s"


def _key(message: Message) -> tuple[str, str, int, int, float]:
    return message.topic, message.identity, message.origin, message.seq_num, message.snd_tai


def load_state(link: Connection, name: str) -> Saved | None:
    """Read a component's state; None when it was never stored."""
    row = link.execute(
        "SELECT protocol, configuration, processing, configuring, error_code, error_report, version, hash, "
        "settings, enabled_tai FROM control.entity WHERE name = %s",
        (name,),
    ).fetchone()
    if row is None:
        return None
    state = State(Protocol(row[0]), row[1], Processing(row[2]), *row[3:6])
    return Saved(state, *row[6:])


def save_state(link: Connection, name: str, saved: Saved, *, epoch: int, now_tai: float) -> None:
    """Write a component's state."""
    state = saved.state
    link.execute(
        "INSERT INTO control.entity (name, protocol, configuration, processing, configuring, error_code, "
        "error_report, version, hash, settings, enabled_tai, epoch, changed_tai) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (name) DO UPDATE SET "
        "protocol = excluded.protocol, configuration = excluded.configuration, "
        "processing = excluded.processing, configuring = excluded.configuring, "
        "error_code = excluded.error_code, error_report = excluded.error_report, "
        "version = excluded.version, hash = excluded.hash, settings = excluded.settings, "
        "enabled_tai = excluded.enabled_tai, epoch = excluded.epoch, changed_tai = excluded.changed_tai",
        (
            name, str(state.protocol), state.configuration, str(state.processing), state.configuring,
            state.error_code, state.error_report, saved.version, saved.hash, saved.settings,
            saved.enabled_tai, epoch, now_tai,
        ),
    )  # fmt: skip


def answered(link: Connection, message: Message) -> Answered | None:
    """Look whether a command came before, and what it was answered."""
    row = link.execute(
        f"SELECT ack, result FROM control.command WHERE {_KEY}".encode(),  # noqa: S608 (no value in it)
        _key(message),
    ).fetchone()
    return Answered(AckCode(row[0]), row[1]) if row else None


def record(
    link: Connection, message: Message, ack: AckCode, result: str, *, epoch: int, now_tai: float
) -> None:
    """Write a command and its answer into the audit trail; a final answer is never replaced."""
    ended = now_tai if ack.is_final else None
    link.execute(
        "INSERT INTO control.command AS c (topic, commander, origin, seq_num, sent_tai, argument, "
        "accepted_tai, ended_tai, ack, result, epoch) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) "
        "ON CONFLICT (topic, commander, origin, seq_num, sent_tai) DO UPDATE SET "
        "ended_tai = excluded.ended_tai, ack = excluded.ack, result = excluded.result, "
        "epoch = excluded.epoch WHERE c.ended_tai IS NULL",
        (*_key(message), json.dumps(message.fields), now_tai, ended, int(ack), result, epoch),
    )


def open_command(link: Connection, topics: list[str]) -> Message | None:
    """Give the command that was in progress when the process before this one died, as it was received."""
    row = link.execute(
        "SELECT topic, commander, origin, seq_num, sent_tai, argument FROM control.command "
        "WHERE topic = ANY(%s) AND ended_tai IS NULL ORDER BY accepted_tai DESC LIMIT 1",
        (topics,),
    ).fetchone()
    if row is None:
        return None
    topic, commander, origin, seq_num, sent_tai, argument = row
    return Message(topic, "command", 0, json.loads(argument), sent_tai, 0.0, seq_num, commander, origin, 0)
