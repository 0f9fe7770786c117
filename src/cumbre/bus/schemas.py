"""Where the schemas of Kafka messages live: a Confluent registry, or a compacted topic beside the others."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from typing import Any, Protocol

from confluent_kafka import Consumer, KafkaException, TopicPartition

from cumbre.bus import avro
from cumbre.core.errors import FatalError, TransientError, UnprocessableDataError

TIMEOUT_S = 10.0
SCHEMA_TOPIC = "_schemas"


class Publish(Protocol):
    """How a schema topic's record is written."""

    def __call__(self, topic: str, key: bytes, value: bytes) -> None:
        """Store one record."""
        ...


class Schemas(Protocol):
    """Ids of schemas and schemas of ids."""

    def id_of(self, subject: str, schema: dict[str, Any]) -> int:
        """Id under which messages of this schema are written; makes it known to readers first."""
        ...

    def schema_of(self, identifier: int) -> Any:
        """Parsed schema of an id."""
        ...


class RegistrySchemas:
    """Confluent's registry protocol over HTTP.

    Parameters
    ----------
    url
        Base address of the registry.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._lock = threading.Lock()
        self._ids: dict[str, int] = {}
        self._parsed: dict[int, Any] = {}
        if not self._url.startswith(("http://", "https://")):
            raise FatalError(f"schema registry {url!r}: expected http:// or https://")

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked above
            f"{self._url}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/vnd.schemaregistry.v1+json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
                content: dict[str, Any] = json.load(answer)
                return content
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:300]
            kind = FatalError if error.code in (401, 403, 409, 422) else TransientError
            raise kind(f"schema registry {self._url}{path}: {error.code} {text}") from error
        except (urllib.error.URLError, TimeoutError, ValueError) as error:
            raise TransientError(f"schema registry {self._url}{path}: {error}") from error

    def id_of(self, subject: str, schema: dict[str, Any]) -> int:
        """Register the schema under ``{topic}-value`` (again is no harm) and give its id."""
        text = avro.schema_text(schema)
        with self._lock:
            if text not in self._ids:
                answer = self._ask(f"/subjects/{subject}/versions", {"schema": text})
                self._ids[text] = int(answer["id"])
            return self._ids[text]

    def schema_of(self, identifier: int) -> Any:
        """Parsed schema of an id, asked once."""
        with self._lock:
            if identifier not in self._parsed:
                self._parsed[identifier] = avro.parse(
                    json.loads(self._ask(f"/schemas/ids/{identifier}")["schema"])
                )
            return self._parsed[identifier]


class TopicSchemas:
    """No registry: ids are fingerprints, and a compacted topic maps them to schemas.

    Writers put a schema there before its first message, readers look there when an id is new to them.
    """

    def __init__(self, topic: str, publish: Publish, consumer: dict[str, Any]) -> None:
        self._topic = topic
        self._publish = publish
        self._config = consumer
        self._lock = threading.Lock()
        self._schemas: dict[int, dict[str, Any]] = {}
        self._parsed: dict[int, Any] = {}
        self._ids: dict[str, int] = {}
        self._position = 0

    def _refresh(self) -> None:
        """Read what came to the topic since the last time."""
        reader = Consumer(self._config)
        try:
            low, high = reader.get_watermark_offsets(TopicPartition(self._topic, 0), timeout=TIMEOUT_S)
            self._position = max(self._position, low)
            if self._position >= high:
                return
            reader.assign([TopicPartition(self._topic, 0, self._position)])
            while True:
                record = reader.poll(TIMEOUT_S)
                if record is None:
                    raise TransientError(f"topic {self._topic}: no answer within {TIMEOUT_S:g} s")
                if record.error():
                    if record.error().name() == "_PARTITION_EOF":
                        return
                    raise TransientError(f"topic {self._topic}: {record.error()}")
                if record.value():
                    self._schemas[int(record.key())] = json.loads(record.value())
                self._position = record.offset() + 1
                if self._position >= high:
                    return
        except KafkaException as error:
            raise TransientError(f"topic {self._topic}: {error}") from error
        finally:
            reader.close()

    def id_of(self, subject: str, schema: dict[str, Any]) -> int:  # noqa: ARG002 - the registry needs it
        """Fingerprint of the schema; written to the topic unless it is there."""
        text = avro.schema_text(schema)
        with self._lock:
            if text not in self._ids:
                identifier = avro.schema_id(schema)
                self._refresh()
                known = self._schemas.get(identifier)
                if known is None:
                    self._publish(self._topic, str(identifier).encode(), text.encode())
                    self._schemas[identifier] = schema
                elif avro.schema_text(known) != text:
                    raise FatalError(
                        f"{self._topic}: id {identifier} belongs to another schema; change a description of "
                        f"{schema['namespace']}.{schema['name']}, or use a schema registry"
                    )
                self._ids[text] = identifier
            return self._ids[text]

    def schema_of(self, identifier: int) -> Any:
        """Parsed schema of an id."""
        with self._lock:
            if identifier not in self._parsed:
                if identifier not in self._schemas:
                    self._refresh()
                if identifier not in self._schemas:
                    raise UnprocessableDataError(
                        f"{self._topic}: no schema {identifier}; was it written with a schema registry? "
                        "then give registry=http://… in the bus's address"
                    )
                self._parsed[identifier] = avro.parse(self._schemas[identifier])
            return self._parsed[identifier]
