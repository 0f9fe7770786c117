"""The bus on Kafka: SAL's topic names, Avro in Confluent's wire format, events compacted by index.

Each topic has one partition, so that order is the topic's. Readers assign partitions themselves (no group
rebalancing on the way of a night); named ones keep their place as committed offsets of the group
``{prefix}.{name}``.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from cumbre.bus import avro
from cumbre.bus.base import Bus, Only, Outgoing, Start, Subscription
from cumbre.bus.messages import Message
from cumbre.bus.schemas import SCHEMA_TOPIC, RegistrySchemas, Schemas, TopicSchemas
from cumbre.bus.topics import Topic, TopicCatalog
from cumbre.core.errors import (
    ConfigurationError,
    FatalError,
    TransientError,
    UnprocessableDataError,
    UserError,
)
from cumbre.core.time import Clock

log = logging.getLogger(__name__)
TIMEOUT_S = 10.0
DELIVERY_TIMEOUT_S = 30.0
DAY_MS = 86_400_000
RETENTION_MS = 7 * DAY_MS
"""Telemetry and commands stay this long on the broker; compaction of events waits as long."""
HISTORY = 500
"""Messages searched back for the last values of a topic whose whole history is kept (as salobj does)."""


def _waiting_mark(end: int) -> str:
    """Commit metadata: last values before ``end`` are not yet done."""
    return f"latest<{end}"


@contextmanager
def _transient(what: str) -> Iterator[None]:
    try:
        yield
    except KafkaException as error:
        raise TransientError(f"{what}: {error}") from error


class KafkaBus(Bus):
    """Bus on a Kafka cluster.

    Parameters
    ----------
    servers
        ``host:port[,host:port]``.
    prefix
        Start of every topic name: ``{prefix}.{Component}.{sal_name}``.
    registry
        Address of a Confluent schema registry; without it schemas live in the compacted topic
        ``{prefix}._schemas``.
    create
        "yes" creates missing topics with the right policies; "no" leaves that to the broker's operator.
    replication
        Copies of each created topic; -1 is the broker's default.
    properties
        JSON file of further librdkafka properties (security, passwords).
    options
        Further librdkafka properties, those with a dot in their name (``fetch.wait.max.ms=10``).
    """

    def __init__(
        self,
        servers: str,
        *,
        identity: str,
        clock: Clock | None = None,
        topics: TopicCatalog | None = None,
        prefix: str = "lsst.sal",
        registry: str = "",
        create: str = "yes",
        replication: str = "-1",
        properties: str = "",
        **options: str,
    ) -> None:
        super().__init__(identity=identity, clock=clock, topics=topics)
        if wrong := [name for name in options if "." not in name]:
            raise ConfigurationError(
                f"bus kafka://{servers}: {wrong[0]}: expected prefix, registry, create, replication, properties "
                "or a librdkafka property such as security.protocol"
            )
        if create not in ("yes", "no"):
            raise ConfigurationError(f"bus kafka://{servers}: create = {create!r}: expected yes or no")
        self.prefix = prefix
        self._create, self._replication = create == "yes", int(replication)
        self._base: dict[str, Any] = {"bootstrap.servers": servers, "client.id": identity, **options}
        if properties:
            self._base |= json.loads(Path(properties).read_text())
        self._names = {self.topic_name(topic): topic for topic in self.topics}
        self._readers: weakref.WeakSet[_KafkaSubscription] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._there: set[str] = set()
        self._parsed: dict[str, tuple[int, Any]] = {}
        self._producer: Producer | None = None
        self._poller: threading.Thread | None = None
        self._closed = threading.Event()
        self._schemas: Schemas
        if registry:
            self._schemas = RegistrySchemas(registry)
        else:
            # made at the first use, so that an unreachable broker does not stop the start
            self._schemas = TopicSchemas(
                f"{prefix}.{SCHEMA_TOPIC}", self._write_schema, self._consumer_config(f"{prefix}.schemas")
            )

    def topic_name(self, topic: Topic) -> str:
        """Name on Kafka."""
        return f"{self.prefix}.{topic.component}.{avro.sal_name(topic)}"

    def _consumer_config(self, group: str | None = None) -> dict[str, Any]:
        base = {name: value for name, value in self._base.items() if not name.startswith("queue.buffering")}
        return base | {
            "group.id": group or f"{self.prefix}.{self.identity}.{uuid.uuid4().hex}",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
        }

    # topics

    def _policy(self, topic: Topic | None) -> dict[str, str]:
        if topic is None:
            return {"cleanup.policy": "compact"}
        if topic.keep_all:
            return {"cleanup.policy": "delete", "retention.ms": "-1"}
        if topic.kind == "event":
            return {"cleanup.policy": "compact", "min.compaction.lag.ms": str(RETENTION_MS)}
        return {"cleanup.policy": "delete", "retention.ms": str(RETENTION_MS)}

    def _ensure(self, names: Iterable[str]) -> None:
        """Make sure that topics exist; asks the broker once for each."""
        with self._lock, _transient(f"bus {self._base['bootstrap.servers']}"):
            missing = [name for name in names if name not in self._there]
            if not missing:
                return
            admin = AdminClient(self._consumer_free())
            if not self._create:
                for name in missing:
                    admin.list_topics(name, timeout=TIMEOUT_S)
                self._there.update(missing)
                return
            # without a name: asking for a topic by name may create it with the wrong policy
            existing = set(admin.list_topics(timeout=TIMEOUT_S).topics)
            wanted = [
                NewTopic(name, 1, self._replication, config=self._policy(self._names.get(name)))
                for name in missing
                if name not in existing
            ]
            if wanted:
                for name, future in admin.create_topics(wanted, request_timeout=TIMEOUT_S).items():
                    try:
                        future.result(TIMEOUT_S)
                    except KafkaException as error:
                        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                            raise TransientError(f"bus: cannot create topic {name}: {error}") from error
            self._there.update(missing)

    def _consumer_free(self) -> dict[str, Any]:
        """Properties that every kind of client understands."""
        return {
            name: value for name, value in self._base.items() if not name.startswith(("fetch.", "queue."))
        }

    # writing

    def _writer(self) -> Producer:
        with self._lock:
            if self._closed.is_set():
                raise FatalError(f"bus of {self.identity}: published after close")
            if self._producer is None:
                self._producer = Producer(
                    {
                        "linger.ms": 0,
                        "acks": "all",
                        "enable.idempotence": True,
                        "delivery.timeout.ms": int(DELIVERY_TIMEOUT_S * 1000),
                    }
                    | self._consumer_free()
                )
                self._poller = threading.Thread(target=self._serve, name="kafka-delivery", daemon=True)
                self._poller.start()
            return self._producer

    def _serve(self) -> None:
        producer = self._producer
        assert producer is not None
        while not self._closed.is_set():
            producer.poll(0.1)

    def _send(self, records: list[dict[str, Any]]) -> list[int]:
        """Hand records to the broker and wait until it has them all."""
        offsets: list[int] = [-1] * len(records)
        errors: list[Any] = []
        left = len(records)
        done = threading.Event()

        def delivered(number: int, error: Any, record: Any) -> None:
            nonlocal left
            if error is not None:
                errors.append(error)
            else:
                offsets[number] = record.offset()
            left -= 1
            if left == 0:
                done.set()

        writer = self._writer()
        for number, record in enumerate(records):
            while True:
                try:
                    writer.produce(
                        partition=0,
                        on_delivery=lambda error, got, n=number: delivered(n, error, got),
                        **record,
                    )
                    break
                except BufferError:
                    time.sleep(0.005)  # the local queue is full: the broker is slower than we are
                except KafkaException as error:
                    raise TransientError(f"bus: topic {record['topic']}: {error}") from error
        if not done.wait(DELIVERY_TIMEOUT_S + TIMEOUT_S) or errors:
            raise TransientError(
                f"bus: topic {records[0]['topic']}: not stored: {errors[0] if errors else 'no answer'}; "
                f"is the broker {self._base['bootstrap.servers']} up?"
            )
        return offsets

    def _write_schema(self, topic: str, key: bytes, value: bytes) -> None:
        self._send([{"topic": topic, "key": key, "value": value}])

    def _append(self, messages: list[Outgoing]) -> list[int]:
        if not messages:
            return []
        self._ensure([f"{self.prefix}.{SCHEMA_TOPIC}", *(self.topic_name(m.topic) for m in messages)])
        return self._send([self._record(message) for message in messages])

    def _outgoing_schema(self, topic: Topic) -> tuple[int, Any]:
        with self._lock:
            if topic.name not in self._parsed:
                schema = avro.avro_schema(topic)
                identifier = self._schemas.id_of(f"{self.topic_name(topic)}-value", schema)
                self._parsed[topic.name] = identifier, avro.parse(schema)
            return self._parsed[topic.name]

    def _record(self, message: Outgoing) -> dict[str, Any]:
        topic, name = message.topic, self.topic_name(message.topic)
        key = message.key
        if topic.kind == "event":
            parts: dict[str, Any] = {"name": topic.component, "index": message.index, "topic": topic.short}
            if message.key:
                parts["key"] = message.key
            key = json.dumps(parts)
        if topic.kind == "stream":
            stamps = [
                message.index,
                message.snd_tai,
                message.snd_utc,
                message.seq_num,
                message.identity,
                message.origin,
            ]
            headers = [("cumbre", json.dumps(stamps).encode())]
            return {"topic": name, "key": key.encode(), "value": message.payload, "headers": headers}
        identifier, schema = self._outgoing_schema(topic)
        value = avro.encode(message, schema, identifier, self.clock.now_tai_s())
        return {"topic": name, "key": key.encode(), "value": value}

    # reading

    def _message(self, record: Any) -> Message | None:
        """Message of a record; None (and counted, logged) for one that is not ours to understand."""
        topic = self._names[record.topic()]
        raw, key = record.value() or b"", (record.key() or b"").decode(errors="replace")
        index = 0
        try:
            if topic.kind == "stream":
                stamps: list[Any] = [0, 0.0, 0.0, 0, "", 0]
                for name, value in record.headers() or ():
                    if name == "cumbre":
                        stamps = json.loads(value)
                index, snd_tai, snd_utc, seq_num, identity, origin = stamps
                return Message(
                    topic.name, topic.kind, index, {}, snd_tai, snd_utc, seq_num, identity, origin,
                    record.offset(), raw, key,
                )  # fmt: skip
            fields = avro.decode(raw, self._schemas.schema_of(avro.wire_id(raw)))
        except UnprocessableDataError as error:
            # one bad message never stops the next; it stays on the broker for who wants to look
            self.unknown_fields[topic.name, ""] += 1
            log.error("topic %s, offset %d: skipped: %s", topic.name, record.offset(), error)
            return None
        private = {n: fields.pop(n) for n in list(fields) if n.startswith("private_")}
        index = fields.pop("salIndex", 0)
        if topic.kind == "event" and key.startswith("{"):
            key = str(json.loads(key).get("key", ""))
        return Message(
            topic.name, topic.kind, index, self._known_fields(topic, fields), private["private_sndStamp"],
            private["private_efdStamp"], private["private_seqNum"], private["private_identity"],
            private["private_origin"], record.offset(), b"", key,
        )  # fmt: skip

    def _range(self, reader: Consumer, name: str, start: int, end: int) -> Iterator[Message]:
        """Messages of one topic with start <= offset < end."""
        if start >= end:
            return
        reader.assign([TopicPartition(name, 0, start)])
        while True:
            record = reader.poll(TIMEOUT_S)
            if record is None:
                raise TransientError(f"bus: topic {name}: no answer within {TIMEOUT_S:g} s")
            if record.error():
                if record.error().code() == KafkaError._PARTITION_EOF:
                    return
                raise TransientError(f"bus: topic {name}: {record.error()}")
            if record.offset() < end and (message := self._message(record)):
                yield message
            if record.offset() >= end - 1:
                return

    def _bounds(self, reader: Consumer, name: str) -> tuple[int, int]:
        low, high = reader.get_watermark_offsets(TopicPartition(name, 0), timeout=TIMEOUT_S)
        return int(low), int(high)

    def _last_values(self, reader: Consumer, topic: Topic, end: int | None = None) -> list[Message]:
        """Last values of an event before ``end``, one for each index and ``last_by`` key."""
        name = self.topic_name(topic)
        low, high = self._bounds(reader, name)
        high = high if end is None else min(end, high)
        single = not topic.indexed and not topic.last_by
        start = max(low, high - (1 if single else HISTORY)) if single or topic.keep_all else low
        found: dict[tuple[int, str], Message] = {}
        for message in self._range(reader, name, start, high):
            found[message.index, message.key if topic.last_by else ""] = message
        return sorted(found.values(), key=lambda message: message.offset)

    def latest(self, topic: str, index: int = 0, key: str | None = None) -> Message | None:
        """Last value of an event; see :meth:`Bus.latest`. Looks back in growing steps to the beginning."""
        known = self._event(topic)
        name = self.topic_name(known)
        self._ensure([name])
        with _transient(f"bus: topic {name}"), closing(Consumer(self._consumer_config())) as reader:
            low, end = self._bounds(reader, name)
            step = 1
            while end > low:
                start = max(low, end - step)
                found = None
                for message in self._range(reader, name, start, end):
                    if message.index == index and (key is None or not known.last_by or message.key == key):
                        found = message
                if found:
                    return found
                end, step = start, min(step * 10, 10_000)
        return None

    def latest_all(self, topic: str) -> list[Message]:
        """Last values of an event; see :meth:`Bus.latest_all`. Of kept histories the last 500 are searched."""
        known = self._event(topic)
        self._ensure([self.topic_name(known)])
        with _transient(f"bus: topic {topic}"), closing(Consumer(self._consumer_config())) as reader:
            return self._last_values(reader, known)

    def subscribe(
        self,
        topics: Iterable[str],
        start: Start = "latest",
        consumer: str | None = None,
        *,
        only: Only | None = None,  # noqa: ARG002 - brokers do not look into messages
    ) -> Subscription:
        """Start to read; see :meth:`Bus.subscribe`. A number means that offset in every topic."""
        if not isinstance(start, int) and start not in ("latest", "now", "earliest"):
            raise UserError(f"subscribe: start = {start!r}: expected latest, now, earliest or an offset")
        known = self._known_topics(topics)
        self._ensure([self.topic_name(topic) for topic in known])
        with _transient("bus: subscribe"):
            return _KafkaSubscription(self, known, start, consumer)

    def replay(
        self,
        topics: Iterable[str] | None = None,
        start_offset: int = 0,
        since_tai: float | None = None,
        until_tai: float | None = None,
    ) -> Iterator[Message]:
        """Everything stored up to now; order is kept within each topic, topics come one after the other."""
        known = list(self.topics) if topics is None else self._known_topics(topics)
        self._ensure([self.topic_name(topic) for topic in known])
        with _transient("bus: replay"), closing(Consumer(self._consumer_config())) as reader:
            for topic in known:
                name = self.topic_name(topic)
                low, high = self._bounds(reader, name)
                for message in self._range(reader, name, max(low, start_offset or 0), high):
                    if (since_tai is None or message.snd_tai >= since_tai) and (
                        until_tai is None or message.snd_tai < until_tai
                    ):
                        yield message

    def prune(self, older_than_tai: float) -> int:
        """Delete telemetry records sent before (the broker's retention does it anyway, in real time)."""
        known = [topic for topic in self.topics if topic.kind == "telemetry"]
        self._ensure([self.topic_name(topic) for topic in known])
        cuts, count = [], 0
        with _transient("bus: prune"), closing(Consumer(self._consumer_config())) as reader:
            for topic in known:
                name = self.topic_name(topic)
                low, high = self._bounds(reader, name)
                cut = high
                for message in self._range(reader, name, low, high):
                    if message.snd_tai >= older_than_tai:
                        cut = message.offset
                        break
                if cut > low:
                    cuts.append(TopicPartition(name, 0, cut))
                    count += cut - low
            if cuts:
                admin = AdminClient(self._consumer_free())
                for future in admin.delete_records(cuts, request_timeout=TIMEOUT_S).values():
                    future.result(TIMEOUT_S)
        return count

    def close(self) -> None:
        """Flush, stop, and close the subscriptions still open."""
        for reader in list(self._readers):
            reader.close()
        self._closed.set()
        if self._poller is not None:
            self._poller.join(TIMEOUT_S)
        if self._producer is not None:
            self._producer.flush(TIMEOUT_S)
        self._producer = None


class _KafkaSubscription(Subscription):
    """Reader with assigned partitions; named ones commit offsets in their group."""

    def __init__(self, bus: KafkaBus, topics: list[Topic], start: Start, consumer: str | None) -> None:
        self._bus = bus
        self._named = consumer is not None
        self._reader = Consumer(bus._consumer_config(f"{bus.prefix}.{consumer}" if consumer else None))
        self._open = True
        bus._readers.add(self)
        self._backlog: list[Message] = []
        self._pending: deque[tuple[str, int]] = deque()
        self._next: dict[str, int] = {}
        self._waiting: dict[str, tuple[int, int]] = {}  # topic name: (end, last offset of its backlog)
        names = {bus.topic_name(topic): topic for topic in topics}
        stored: dict[str, Any] = {}
        if self._named:
            for place in self._reader.committed([TopicPartition(n, 0) for n in names], timeout=TIMEOUT_S):
                if place.offset >= 0:
                    stored[place.topic] = place
        for name, topic in names.items():
            low, high = bus._bounds(self._reader, name)
            place = stored.get(name)
            if place is None:
                begin = start if isinstance(start, int) else {"earliest": low}.get(start, high)
                waiting = start == "latest" and topic.kind == "event"
            else:
                begin = place.offset
                waiting = place.metadata == _waiting_mark(begin)
            if waiting:
                last = bus._last_values(self._reader, topic, begin)
                if last:
                    self._waiting[name] = (begin, last[-1].offset)
                    self._backlog += last
            self._next[name] = begin
        if self._named:
            # written at once: a crash before the first commit must not move the start
            self._store({n: begin for n, begin in self._next.items() if n not in stored})
        self._backlog.sort(key=lambda message: message.snd_tai)
        self._reader.assign([TopicPartition(name, 0, begin) for name, begin in self._next.items()])

    def _store(self, places: dict[str, int]) -> None:
        if not places:
            return
        offsets = [
            TopicPartition(name, 0, offset, _waiting_mark(offset) if name in self._waiting else "")
            for name, offset in places.items()
        ]
        with _transient("bus: commit"):
            for place in self._reader.commit(offsets=offsets, asynchronous=False):
                if place.error:
                    raise TransientError(f"bus: commit {place.topic}: {place.error}")

    def poll(self, timeout_s: float = 0.0, limit: int = 500) -> list[Message]:
        """Next messages; see :meth:`Subscription.poll`."""
        if self._backlog:
            taken, self._backlog = self._backlog[:limit], self._backlog[limit:]
            self._note(taken)
            return taken
        deadline = time.monotonic() + timeout_s
        while True:
            messages = []
            record = self._reader.poll(max(deadline - time.monotonic(), 0.0))
            if record is not None:
                # what is already here comes along, without waiting for more
                records = [record, *(self._reader.consume(limit - 1, 0.0) if limit > 1 else ())]
                for one in records:
                    if one.error() is None:
                        if message := self._bus._message(one):
                            messages.append(message)
                    elif one.error().fatal():
                        raise TransientError(f"bus: {one.error()}")
                    elif one.error().code() != KafkaError._PARTITION_EOF:
                        log.warning("bus: %s; librdkafka tries again", one.error())
            if messages:
                self._note(messages)
                return messages
            if time.monotonic() >= deadline:
                return []

    def _note(self, messages: list[Message]) -> None:
        if self._named:
            self._pending.extend((message.topic, message.offset) for message in messages)

    def commit(self, message: Message | None = None) -> None:
        """Mark what was returned (up to ``message``) as done; see :meth:`Subscription.commit`."""
        until = None if message is None else (message.topic, message.offset)
        if until is not None and until not in self._pending:
            return
        changed: dict[str, int] = {}
        while self._pending:
            topic, offset = one = self._pending.popleft()
            name = self._bus.topic_name(self._bus.topics[topic])
            end, last = self._waiting.get(name, (0, 0))
            if offset < end:
                if offset == last:
                    del self._waiting[name]
                    changed[name] = self._next[name]
            else:
                self._next[name] = changed[name] = offset + 1
            if one == until:
                break
        self._store(changed)

    def close(self) -> None:
        """Leave the cluster."""
        if self._open:
            self._open = False
            self._reader.close()
