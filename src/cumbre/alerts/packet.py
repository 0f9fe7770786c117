"""Alert packets as bytes: Avro without schema behind Confluent's five-byte header, and container files."""

from __future__ import annotations

import base64
import io
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import fastavro

from cumbre.core.errors import BadFileError, CumbreError, NotFoundError, UnprocessableDataError
from cumbre.stores.files import Checksummed, write_atomic

if TYPE_CHECKING:
    from cumbre.alerts.encode import EncodedRows

SCHEMA_ID = 1101
"""Registry id of v11.1: major times 100 plus minor, Rubin's rule."""
_HEADER = struct.Struct(">bI")
_MAX_BYTES = 64 << 20
_others: dict[int, dict[str, Any]] = {}


@lru_cache(maxsize=1)
def schema() -> dict[str, Any]:
    """The parsed schema v11.1."""
    text = resources.files("cumbre.alerts").joinpath("schema/lsst.v11_1.alert.avsc").read_text("utf-8")
    return dict(fastavro.parse_schema(json.loads(text)))


def register(schema_id: int, other: Mapping[str, Any]) -> None:
    """Let :func:`decode_packet` read another version (a registry's answer for that id)."""
    _others[schema_id] = dict(fastavro.parse_schema(dict(other)))


def packet_bytes(record: Mapping[str, Any]) -> bytes:
    """One packet as brokers get it.

    Parameters
    ----------
    record
        Fields of the schema; absent nullable ones are null. NaN in a nullable number becomes null, numpy
        scalars are taken as numbers. An array may be given as ``encode.EncodedRows``.

    Raises
    ------
    UnprocessableDataError
        A required field is missing or a value does not fit; the message names the record.
    """
    stream = io.BytesIO()
    stream.write(_HEADER.pack(0, SCHEMA_ID))
    encoded = {name: value for name, value in record.items() if hasattr(value, "content")}
    with _writing():
        if encoded:
            _write_parts(stream, record, encoded)
        else:
            fastavro.schemaless_writer(stream, schema(), clean_record(record))
    return stream.getvalue()


def _write_parts(stream: io.BytesIO, record: Mapping[str, Any], encoded: Mapping[str, EncodedRows]) -> None:
    """A packet field by field, arrays that are encoded already as they are."""
    plain = {name: value for name, value in record.items() if name not in encoded}
    cleaned = clean_record(plain)
    for name, kind in _top_fields():
        rows = encoded.get(name)
        if rows is None:
            fastavro.schemaless_writer(stream, kind, cleaned.get(name))
        elif len(rows) == 0:
            stream.write(b"\x02\x00")
        else:
            # the union's second branch, one block of records, and the block that ends the array
            stream.write(b"\x02")
            fastavro.schemaless_writer(stream, "long", len(rows))
            stream.write(rows.content)
            stream.write(b"\x00")


@lru_cache(maxsize=1)
def _top_fields() -> tuple[tuple[str, Any], ...]:
    """Name and type, parsed by itself, of every field of the packet."""
    known: dict[str, Any] = {}
    return tuple(
        (field["name"], fastavro.parse_schema(field["type"], named_schemas=known))
        for field in schema()["fields"]
    )


def decode_packet(packet: bytes) -> dict[str, Any]:
    """Read one packet, whoever wrote it.

    Raises
    ------
    BadFileError
        Not a packet, cut off, followed by something, or of a schema that is not registered.
    """
    if len(packet) > _MAX_BYTES:
        raise BadFileError(f"alert packet: {len(packet)} bytes, expected at most {_MAX_BYTES}")
    if len(packet) < _HEADER.size:
        raise BadFileError(f"alert packet: {len(packet)} bytes, expected a header of {_HEADER.size}")
    magic, schema_id = _HEADER.unpack_from(packet)
    if magic != 0:
        raise BadFileError(f"alert packet: first byte {magic & 255}, expected 0 (Confluent wire format)")
    writer = schema() if schema_id == SCHEMA_ID else _others.get(schema_id)
    if writer is None:
        raise BadFileError(f"alert packet: unknown schema id {schema_id}; register it first")
    stream = io.BytesIO(packet)
    stream.seek(_HEADER.size)
    with _reading("alert packet"):
        record = fastavro.schemaless_reader(stream, writer, None)
    if not isinstance(record, dict) or stream.tell() != len(packet):
        raise BadFileError(f"alert packet: {len(packet) - stream.tell()} bytes after its end")
    return record


HEAVY = ("prvDiaSources", "prvDiaForcedSources", "cutoutDifference", "cutoutScience", "cutoutTemplate")
"""What a lite packet does without: history and pictures."""


@lru_cache(maxsize=1)
def _light_schema() -> dict[str, Any]:
    """The schema without the heavy fields: a reader of it skips their bytes."""
    text = resources.files("cumbre.alerts").joinpath("schema/lsst.v11_1.alert.avsc").read_text("utf-8")
    whole = json.loads(text)
    whole["fields"] = [field for field in whole["fields"] if field["name"] not in HEAVY]
    return dict(fastavro.parse_schema(whole))


def lite_packet(packet: bytes) -> bytes:
    """The same alert with null for history and pictures; the schema stays that of the whole packet.

    Raises
    ------
    BadFileError
        Not a packet of the present schema.
    """
    if packet[: _HEADER.size] != _HEADER.pack(0, SCHEMA_ID):
        raise BadFileError(f"alert packet: expected one of schema {SCHEMA_ID}")
    stream = io.BytesIO(packet)
    stream.seek(_HEADER.size)
    with _reading("alert packet"):
        record = fastavro.schemaless_reader(stream, schema(), _light_schema())
    out = io.BytesIO()
    out.write(_HEADER.pack(0, SCHEMA_ID))
    fastavro.schemaless_writer(out, schema(), record)
    return out.getvalue()


def printable(value: Any) -> Any:
    """A record, or a part of it, as JSON can hold it: bytes in base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {key: printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list) else value


def write_container(path: Path, records: Iterable[Mapping[str, Any]]) -> Checksummed:
    """Write an Avro container file (schema inside, blocks deflated), whole or not at all.

    Raises
    ------
    UnprocessableDataError
        As :func:`packet_bytes`.
    """
    stream = io.BytesIO()
    with _writing():
        fastavro.writer(stream, schema(), (clean_record(record) for record in records), codec="deflate")
    return write_atomic(path, stream.getvalue())


def read_packets(source: Path | BinaryIO | bytes) -> Iterator[dict[str, Any]]:
    """Records of a container file of any version, with the schema that it carries.

    Raises
    ------
    NotFoundError
        No such file.
    BadFileError
        Not an Avro container, damaged or cut off; records before the damage have been given.
    """
    if isinstance(source, Path):
        try:
            with source.open("rb") as opened:
                yield from _records(opened, str(source))
        except FileNotFoundError as error:
            raise NotFoundError(f"{source}: no such file") from error
        return
    yield from _records(io.BytesIO(source) if isinstance(source, bytes) else source, "alert container")


def _records(stream: BinaryIO, where: str) -> Iterator[dict[str, Any]]:
    with _reading(where):
        reader = fastavro.reader(stream)
    while True:
        with _reading(where):
            record = next(reader, None)
        if record is None:
            return
        if not isinstance(record, dict):
            raise BadFileError(f"{where}: holds {type(record).__name__}, expected records")
        yield record


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn whatever a decoder does on damaged bytes into BadFileError; strangers feed it."""
    try:
        yield
    except Exception as error:
        raise BadFileError(f"{where}: not readable as Avro: {type(error).__name__}: {error}") from error


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except CumbreError:
        raise
    except (TypeError, ValueError, OverflowError, AttributeError, struct.error) as error:
        raise UnprocessableDataError(f"alert packet: a value does not fit the schema: {error}") from error


@lru_cache(maxsize=1)
def _shapes() -> dict[str, tuple[frozenset[str], frozenset[str], dict[str, str]]]:
    """For each record: all fields, required ones, and which fields hold records (of what name)."""
    shapes: dict[str, tuple[frozenset[str], frozenset[str], dict[str, str]]] = {}

    def walk(kind: Any) -> str:
        if isinstance(kind, list):
            return next((name for item in kind if (name := walk(item))), "")
        if isinstance(kind, dict) and kind["type"] == "array":
            return walk(kind["items"])
        if isinstance(kind, dict) and kind["type"] == "record":
            inner = {field["name"]: walk(field["type"]) for field in kind["fields"]}
            required = frozenset(field["name"] for field in kind["fields"] if "default" not in field)
            shapes[kind["name"]] = (frozenset(inner), required, {k: v for k, v in inner.items() if v})
            return str(kind["name"])
        return kind if isinstance(kind, str) and kind in shapes else ""

    walk(schema())
    return shapes


def clean_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Give the record with null for NaN and Python's numbers for numpy's.

    Raises
    ------
    UnprocessableDataError
        A field is unknown or a required one missing, by record and name.
    """
    return _clean(record, schema()["name"])


def _clean(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    fields, required, inner = _shapes()[name]
    out: dict[str, Any] = {}
    for key, value in record.items():
        if key not in fields:
            raise UnprocessableDataError(f"alert packet: {name} has no field {key!r}")
        if key in inner:
            if isinstance(value, Mapping):
                out[key] = _clean(value, inner[key])
            else:
                out[key] = None if value is None else [_clean(item, inner[key]) for item in value]
            continue
        if hasattr(value, "item") and not isinstance(value, bytes | str):
            value = value.item()  # noqa: PLW2901
        if isinstance(value, float) and math.isnan(value) and key not in required:
            value = None  # noqa: PLW2901
        out[key] = value
    if absent := sorted(key for key in required if out.get(key) is None):
        raise UnprocessableDataError(f"alert packet: {name} lacks {', '.join(absent)}")
    return out
