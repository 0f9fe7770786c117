"""What both buses share: stamps, validation, commands; and what each must bring."""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from cumbre.bus.messages import Ack, AckCode, Message
from cumbre.bus.topics import ACK_TOPIC, Topic, TopicCatalog, default_topics
from cumbre.core.errors import DeadlineError, UserError
from cumbre.core.time import Clock, utc_from_tai

Start = Literal["latest", "now", "earliest"] | int
Only = Mapping[str, Mapping[str, str]]
MAX_SEQ_NUM = 2**31 - 1
log = logging.getLogger(__name__)


class _Numbers:
    """Running numbers of this process, per topic; they start at 1, those of commands anywhere.

    A command is told from others by (identity, origin, seq_num). Process ids come again, so the numbers of
    commands must not start at the same place in each process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Iterator[int]] = {}

    def next(self, topic: Topic) -> int:
        with self._lock:
            count = self._counts.get(topic.name)
            if count is None:
                first = random.randrange(1, MAX_SEQ_NUM) if topic.kind == "command" else 1
                count = self._counts[topic.name] = itertools.count(first)
            return (next(count) - 1) % MAX_SEQ_NUM + 1


_numbers = _Numbers()


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A stamped, validated message on its way into the log."""

    topic: Topic
    index: int
    key: str
    fields: dict[str, Any]
    payload: bytes
    snd_tai: float
    snd_utc: float
    seq_num: int
    identity: str
    origin: int


class Subscription(ABC):
    """A reader of some topics with its own place in the log; used by one thread at a time."""

    @abstractmethod
    def poll(self, timeout_s: float = 0.0, limit: int = 500) -> list[Message]:
        """Next messages, at most ``limit``; waits at most ``timeout_s`` real seconds for the first one."""

    @abstractmethod
    def commit(self, message: Message | None = None) -> None:
        """Everything returned so far (up to ``message`` when given) is done; durable for named consumers."""

    @abstractmethod
    def close(self) -> None:
        """Release what it holds; what was not committed comes again to the next of the same name."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Bus(ABC):
    """Every command, event and telemetry sample, append-only. Safe to use from several threads.

    Parameters
    ----------
    identity
        Who publishes.
    clock
        Night time for the stamps; real time when not given.
    topics
        Catalog of topics; the package's own when not given.

    Attributes
    ----------
    unknown_fields
        How often received messages had a field that the topic here does not have, by ``(topic, field)``.
    """

    def __init__(
        self, *, identity: str, clock: Clock | None = None, topics: TopicCatalog | None = None
    ) -> None:
        self.identity = identity
        self.clock = clock or Clock.real()
        self.topics = topics or default_topics()
        self.unknown_fields: Counter[tuple[str, str]] = Counter()

    # what each bus brings

    @abstractmethod
    def _append(self, messages: list[Outgoing]) -> list[int]:
        """Store durably and give their offsets; must not wait for any reader."""

    @abstractmethod
    def latest(self, topic: str, index: int = 0, key: str | None = None) -> Message | None:
        """Last value of an event, None when there is none yet.

        ``key`` chooses among the last values of a topic with ``last_by``; the newest of all when None.

        Raises
        ------
        UserError
            The topic is no event: commands and telemetry have no last value.
        """

    @abstractmethod
    def latest_all(self, topic: str) -> list[Message]:
        """Last values of an event for every index and ``last_by`` key, oldest first."""

    @abstractmethod
    def subscribe(
        self,
        topics: Iterable[str],
        start: Start = "latest",
        consumer: str | None = None,
        *,
        only: Only | None = None,
    ) -> Subscription:
        """Start to read some topics.

        Parameters
        ----------
        start
            "latest": the last value of each event (per index), then what is new; "now": only what is new;
            "earliest": everything; a number: from that offset on.
        consumer
            A name makes the place in the log durable: reading goes on after what this name last committed,
            and ``start`` counts only the first time.
        only
            For some topics, fields of type string and the values that are wanted. A bus may spare the reader all other
            messages of these topics, but need not: look all the same.
        """

    @abstractmethod
    def replay(
        self,
        topics: Iterable[str] | None = None,
        start_offset: int = 0,
        since_tai: float | None = None,
        until_tai: float | None = None,
    ) -> Iterator[Message]:
        """Everything stored up to now in order, ``since_tai <= snd_tai < until_tai``; all topics for None."""

    @abstractmethod
    def prune(self, older_than_tai: float) -> int:
        """Forget telemetry sent before; gives how many. Nothing else is ever forgotten."""

    @abstractmethod
    def close(self) -> None:
        """Release what the bus holds."""

    # what they share

    def publish(
        self, topic: str, fields: Mapping[str, Any] | None = None, *, index: int = 0, key: str = ""
    ) -> int:
        """Validate, stamp and store one message; it is durable when this returns. Gives its offset.

        Raises
        ------
        UserError
            A field that the topic does not have, or a value of another type.
        NotFoundError
            No such topic.
        """
        return self._append([self._outgoing(topic, fields or {}, index=index, key=key)])[0]

    def publish_many(self, messages: Iterable[tuple[str, Mapping[str, Any]]], *, index: int = 0) -> list[int]:
        """Publish ``(topic, fields)`` pairs together: many at the price of one.

        Embedded: one transaction, all or none. Kafka: in order; when it raises, a first part may be stored.
        """
        return self._append([self._outgoing(topic, fields, index=index) for topic, fields in messages])

    def publish_bytes(self, topic: str, payload: bytes, key: str = "", *, index: int = 0) -> int:
        """Store the bytes of a stream topic as they are."""
        return self.publish_many_bytes([(topic, key, payload)], index=index)[0]

    def publish_many_bytes(self, packets: Iterable[tuple[str, str, bytes]], *, index: int = 0) -> list[int]:
        """Store ``(topic, key, bytes)`` of stream topics together, as :meth:`publish_many` does."""
        return self._append([self._packet(*packet, index=index) for packet in packets])

    def _packet(self, topic: str, key: str, payload: bytes, *, index: int) -> Outgoing:
        known = self.topics[topic]
        if known.kind != "stream":
            raise UserError(f"topic {topic} is {known.kind}, not stream: use publish with its fields")
        return self._stamped(known, {}, index=index, key=key, payload=bytes(payload))

    def command(
        self, topic: str, fields: Mapping[str, Any] | None = None, timeout_s: float = 30.0, *, index: int = 0
    ) -> Ack:
        """Send a command and wait for its final answer; an answer "in progress" adds its time to the limit.

        Parameters
        ----------
        timeout_s
            Real seconds.

        Raises
        ------
        DeadlineError
            No final answer in time.
        """
        known = self.topics[topic]
        if known.kind != "command":
            raise UserError(f"topic {topic} is {known.kind}, not command")
        with self.subscribe([f"{known.component}.{ACK_TOPIC}"], start="now") as answers:
            command = self._outgoing(topic, fields or {}, index=index)
            self._append([command])
            deadline = time.monotonic() + timeout_s
            while (left := deadline - time.monotonic()) > 0:
                for answer in answers.poll(left):
                    said = answer.fields
                    if (answer.seq_num, said["identity"], said["origin"]) != (
                        command.seq_num, self.identity, command.origin,
                    ):  # fmt: skip
                        continue
                    ack = Ack(AckCode(said["ack"]), said["result"], said["error"], said["timeout"])
                    if ack.code.is_final:
                        return ack
                    if ack.timeout_s > 0:
                        deadline += ack.timeout_s
        raise DeadlineError(f"command {topic} from {self.identity}: no final answer within {timeout_s:g} s")

    def acknowledge(
        self, message: Message, code: AckCode | int, result: str = "", error: int = 0, timeout_s: float = 0.0
    ) -> None:
        """Answer a command."""
        known = self.topics[message.topic]
        if known.kind != "command":
            raise UserError(f"topic {message.topic} is {known.kind}: only commands are acknowledged")
        answer = {
            "ack": int(AckCode(code)), "error": error, "result": result, "identity": message.identity,
            "origin": message.origin, "cmdtype": self.topics.command_number(known), "timeout": timeout_s,
        }  # fmt: skip
        ack = self.topics[f"{known.component}.{ACK_TOPIC}"]
        self._append([self._stamped(ack, ack.complete(answer), index=message.index, seq_num=message.seq_num)])

    def _outgoing(self, topic: str, fields: Mapping[str, Any], *, index: int, key: str = "") -> Outgoing:
        known = self.topics[topic]
        if known.kind in ("stream", "ack"):
            raise UserError(
                f"topic {topic} is {known.kind}: use "
                + ("publish_bytes" if known.kind == "stream" else "acknowledge")
            )
        if index and not known.indexed:
            raise UserError(f"topic {topic}, index = {index}: {known.component} has no index, expected 0")
        complete = known.complete(fields)
        return self._stamped(known, complete, index=index, key=key or known.last_key(complete))

    def _stamped(
        self, topic: Topic, fields: dict[str, Any], *, index: int, key: str = "", payload: bytes = b"",
        seq_num: int | None = None,
    ) -> Outgoing:  # fmt: skip
        tai = self.clock.now_tai_s()
        return Outgoing(
            topic, index, key, fields, payload, tai, utc_from_tai(tai),
            _numbers.next(topic) if seq_num is None else seq_num, self.identity, os.getpid(),
        )  # fmt: skip

    def _known_fields(self, topic: Topic, fields: Mapping[str, Any]) -> dict[str, Any]:
        known, extra = topic.received(fields)
        for name in extra:
            self.unknown_fields[topic.name, name] += 1
            if self.unknown_fields[topic.name, name] == 1:
                log.warning("topic %s: unknown field %r ignored (a newer sender?)", topic.name, name)
        return known

    def _known_topics(self, names: Iterable[str] | str) -> list[Topic]:
        if isinstance(names, str):
            names = [names]
        topics = [self.topics[name] for name in dict.fromkeys(names)]
        if not topics:
            raise UserError("subscribe: expected at least one topic")
        return topics

    def _event(self, name: str) -> Topic:
        topic = self.topics[name]
        if topic.kind != "event":
            raise UserError(f"topic {name} is {topic.kind}: only events have a last value")
        return topic

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
