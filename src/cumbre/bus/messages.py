"""What travels: messages, and answers to commands."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from cumbre.bus.topics import Kind
from cumbre.core.errors import CumbreError


class AckCode(IntEnum):
    """Answers to a command, with SAL's numbers."""

    ACK = 300
    IN_PROGRESS = 301
    STALLED = 302
    COMPLETE = 303
    NO_PERMISSION = -300
    NO_ACK = -301
    FAILED = -302
    ABORTED = -303
    TIMEOUT = -304

    @property
    def is_final(self) -> bool:
        """Whether no further answer follows."""
        return self not in (AckCode.ACK, AckCode.IN_PROGRESS)


@dataclass(frozen=True, slots=True)
class Message:
    """One message as received.

    Attributes
    ----------
    topic, kind, index, fields
        What it says; every field of the topic is there.
    snd_tai, snd_utc
        When it was sent, seconds since 1970 TAI and UTC.
    seq_num, identity, origin
        Running number, name and process id of the sender.
    offset
        Place in the log (embedded: of the whole log; Kafka: of the topic), greater for later messages.
    payload
        Bytes of a stream topic, else empty.
    key
        What the sender gave as key, or the topic's ``last_by`` values.
    """

    topic: str
    kind: Kind
    index: int
    fields: dict[str, Any]
    snd_tai: float
    snd_utc: float
    seq_num: int
    identity: str
    origin: int
    offset: int
    payload: bytes = b""
    key: str = ""


@dataclass(frozen=True, slots=True)
class Ack:
    """Answer to a command."""

    code: AckCode
    result: str = ""
    error: int = 0
    timeout_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the command was completed."""
        return self.code is AckCode.COMPLETE

    def raise_if_failed(self, command: str = "command") -> None:
        """Raise CumbreError unless the command was completed."""
        if not self.ok:
            raise CumbreError(f"{command}: {self.code.name} (error {self.error}): {self.result}")
