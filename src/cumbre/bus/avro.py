"""Avro schemas of the topics, with the private fields that SAL puts on each message, and the wire format."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from functools import lru_cache
from typing import Any

import fastavro

from cumbre.bus.base import Outgoing
from cumbre.bus.topics import FieldModel, Topic
from cumbre.core.errors import BadFileError

MAGIC = 0
_HEADER = struct.Struct(">bI")
# SAL's private fields: name, Avro type, unit, description
_PRIVATE = (
    ("private_sndStamp", "double", "s", "TAI when the message was sent"),
    ("private_rcvStamp", "double", "s", "TAI when it was received; filled by the reader"),
    ("private_efdStamp", "double", "s", "UTC of private_sndStamp, for the engineering database"),
    ("private_kafkaStamp", "double", "s", "TAI when it was handed to Kafka"),
    ("private_seqNum", "int", "", "Running number of the sender"),
    ("private_revCode", "string", "", "Fingerprint of the topic's public fields"),
    ("private_identity", "string", "", "Who sent it"),
    ("private_origin", "int", "", "Process id of the sender"),
)


def _entry(
    name: str, kind: str, unit: str, description: str, default: Any, *, is_list: bool
) -> dict[str, Any]:
    return {
        "name": name,
        "type": {"type": "array", "items": kind} if is_list else kind,
        "default": default,
        "description": description,
        "units": unit or "unitless",
    }


def _default(field: FieldModel) -> Any:
    value = field.missing()
    if field.is_list:
        return []
    if isinstance(value, bytes):
        return value.decode("latin-1")  # how Avro writes bytes in JSON
    # JSON has no NaN; SAL writes 0 too. Writers always fill every field, so it is never used
    return 0.0 if value != value else value  # noqa: PLR0124


@lru_cache(maxsize=1024)
def _schema(topic_key: tuple[Any, ...]) -> dict[str, Any]:
    component, short, description, indexed, fields = topic_key
    revision = hashlib.sha256(
        json.dumps(
            [component, short, indexed, [(name, field.type, field.unit) for name, field in fields]]
        ).encode()
    ).hexdigest()[:8]
    entries = []
    if indexed:
        entries.append(_entry("salIndex", "int", "", "Index of the instance", 0, is_list=False))
    for name, kind, unit, text in _PRIVATE:
        default: Any = {"double": 0.0, "int": 0, "string": ""}[kind]
        if name == "private_revCode":
            default = revision
        entries.append(_entry(name, kind, unit, text, default, is_list=False))
    for name, field in fields:
        entries.append(
            _entry(name, field.scalar, field.unit, field.description, _default(field), is_list=field.is_list)
        )
    return {
        "type": "record",
        "name": short,
        "namespace": f"lsst.sal.{component}",
        "doc": description,
        "fields": entries,
    }


def avro_schema(topic: Topic) -> dict[str, Any]:
    """Avro record of a topic: salIndex (indexed components), SAL's private fields, then its own."""
    return _schema(
        (topic.component, sal_name(topic), topic.description, topic.indexed, tuple(topic.fields.items()))
    )


def sal_name(topic: Topic) -> str:
    """SAL's name of a topic within its component: ``logevent_x``, ``command_x``, ``x`` or ``ackcmd``."""
    return {"event": "logevent_", "command": "command_"}.get(topic.kind, "") + topic.short


def schema_id(schema: dict[str, Any]) -> int:
    """Id of a schema where no registry counts: the first 4 bytes of the SHA-256 of its JSON."""
    return int.from_bytes(hashlib.sha256(schema_text(schema).encode()).digest()[:4])


def schema_text(schema: dict[str, Any]) -> str:
    """One text for equal schemas."""
    return json.dumps(schema, sort_keys=True, separators=(",", ":"))


def parse(schema: dict[str, Any]) -> Any:
    """Schema in the form fastavro reads fastest."""
    # each under its own names: versions of a topic share the record's name
    return fastavro.parse_schema(json.loads(json.dumps(schema)), named_schemas={})


def encode(message: Outgoing, schema: Any, identifier: int, kafka_tai: float) -> bytes:
    """Confluent wire format: magic 0, 4 bytes schema id, Avro."""
    record = {
        "salIndex": message.index,
        "private_sndStamp": message.snd_tai,
        "private_rcvStamp": 0.0,
        "private_efdStamp": message.snd_utc,
        "private_kafkaStamp": kafka_tai,
        "private_seqNum": message.seq_num,
        "private_identity": message.identity,
        "private_origin": message.origin,
        **message.fields,
    }
    buffer = io.BytesIO()
    buffer.write(_HEADER.pack(MAGIC, identifier))
    fastavro.schemaless_writer(buffer, schema, record)
    return buffer.getvalue()


def wire_id(raw: bytes) -> int:
    """Schema id of a message in wire format.

    Raises
    ------
    BadFileError
        The bytes are not Confluent wire format.
    """
    if len(raw) < _HEADER.size or raw[0] != MAGIC:
        raise BadFileError(
            f"message starts {raw[:5].hex()!r}: expected Confluent wire format (00 and a schema id)"
        )
    return int(_HEADER.unpack_from(raw)[1])


def decode(raw: bytes, schema: Any) -> dict[str, Any]:
    """Record of a message in wire format, read with its writer's schema.

    Raises
    ------
    BadFileError
        The bytes do not fit the schema.
    """
    try:
        record: dict[str, Any] = fastavro.schemaless_reader(io.BytesIO(raw[_HEADER.size :]), schema, None)
    except (EOFError, ValueError, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise BadFileError(f"message of {len(raw)} bytes does not fit its schema: {error}") from error
    return record
