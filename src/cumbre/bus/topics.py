"""Topics as data: one YAML file per component, read once, and the law of each field's value."""

from __future__ import annotations

import difflib
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cumbre.core.errors import ConfigurationError, NotFoundError, UserError

Kind = Literal["event", "command", "telemetry", "ack", "stream"]
ACK_TOPIC = "ackcmd"
SCALARS = ("boolean", "int", "long", "float", "double", "string", "bytes")
_LIMITS = {"int": 2**31, "long": 2**63}
_DEFAULTS: dict[str, Any] = {
    "boolean": False, "int": 0, "long": 0, "float": math.nan, "double": math.nan, "string": "", "bytes": b"",
}  # fmt: skip


def _boolean(value: Any) -> bool:
    if value in (True, False):
        return bool(value)
    raise ValueError


def _integer(limit: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, str | bytes) or int(value) != value or not -limit <= int(value) < limit:
            raise ValueError
        return int(value)

    return convert


def _double(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise ValueError
    return float(value)


def _single(value: Any) -> float:
    # rounded here, so that both buses give back the same number
    return float(struct.unpack("<f", struct.pack("<f", _double(value)))[0])


def _string(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise ValueError
    if not value.isascii():
        value.encode()  # a lone surrogate has no UTF-8 and no place in Avro
    return str(value)


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise ValueError
    return bytes(value)


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "boolean": _boolean,
    "int": _integer(_LIMITS["int"]),
    "long": _integer(_LIMITS["long"]),
    "float": _single,
    "double": _double,
    "string": _string,
    "bytes": _bytes,
}


class FieldModel(BaseModel):
    """One field of a topic."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str
    description: str
    unit: str = ""
    default: Any = None

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        if value.removesuffix("[]") not in SCALARS:
            raise ValueError(f"expected one of {', '.join(SCALARS)}, or one of them followed by []")
        return value

    @model_validator(mode="after")
    def _fitting_default(self) -> FieldModel:
        if self.default is not None:
            self.coerce(self.default)
        return self

    @property
    def is_list(self) -> bool:
        """Whether the value is a list of the scalar type."""
        return self.type.endswith("[]")

    @property
    def scalar(self) -> str:
        """Type of the value, or of its elements."""
        return self.type.removesuffix("[]")

    def missing(self) -> Any:
        """Value when none was given: the default, NaN for floating point, else the type's zero."""
        if self.default is not None:
            return self.coerce(self.default)
        return [] if self.is_list else _DEFAULTS[self.scalar]

    def coerce(self, value: Any) -> Any:
        """Value in the field's type (plain Python types; numpy values are accepted).

        Raises
        ------
        ValueError
            The value has no lossless form of the field's type.
        """
        convert = _CONVERTERS[self.scalar]
        try:
            if not self.is_list:
                return convert(
                    value.item() if hasattr(value, "item") and not hasattr(value, "__len__") else value
                )
            if isinstance(value, str | bytes | Mapping):
                raise ValueError
            if hasattr(value, "tolist"):
                value = value.tolist()
            zero = _DEFAULTS[self.scalar]
            return [zero if item is None else convert(item) for item in value]
        except (TypeError, ValueError, OverflowError, struct.error) as error:
            raise ValueError(f"{value!r} is no {self.type}") from error


class _TopicModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["event", "command", "telemetry", "stream"]
    description: str
    use: list[str] = []
    fields: dict[str, FieldModel] = {}
    last_by: list[str] = []
    keep: Literal["last", "all"] = "last"


class _GenericModel(BaseModel):
    """Topics that several components have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    blocks: dict[str, dict[str, FieldModel]] = {}
    topics: dict[str, _TopicModel]


class _ComponentModel(_GenericModel):
    component: str = Field(pattern=r"^[A-Z][A-Za-z0-9]*$")
    description: str
    indexed: bool = False
    generics: list[str] = []


@dataclass(frozen=True, slots=True)
class Topic:
    """One kind of message of a component.

    Attributes
    ----------
    name
        ``Component.topic``.
    indexed
        Whether several instances (instruments) publish it under their own index.
    last_by
        Fields that, beside the index, tell whose last value an event is.
    keep_all
        The whole history of the event is kept (never compacted).
    """

    name: str
    component: str
    short: str
    kind: Kind
    description: str
    fields: Mapping[str, FieldModel]
    indexed: bool = False
    last_by: tuple[str, ...] = ()
    keep_all: bool = False

    def complete(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Every field of the topic in its type; missing (or None) ones get their default.

        Raises
        ------
        UserError
            A field that the topic does not have, or a value of another type.
        """
        for given in fields:
            if given not in self.fields:
                near = difflib.get_close_matches(given, self.fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(self.fields)}"
                raise UserError(f"topic {self.name} has no field {given!r}{hint}")
        done: dict[str, Any] = {}
        for name, field in self.fields.items():
            value = fields.get(name)
            try:
                done[name] = field.missing() if value is None else field.coerce(value)
            except ValueError:
                raise UserError(
                    f"topic {self.name}, field {name} = {value!r}: expected {field.type}"
                    f"{f' in {field.unit}' if field.unit else ''} ({field.description})"
                ) from None
        return done

    def received(self, fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Fields of a message of perhaps another version of the topic, and the names it has too many."""
        done = {}
        for name, field in self.fields.items():
            done[name] = fields[name] if name in fields else field.missing()
        return done, [name for name in fields if name not in self.fields]

    def last_key(self, fields: Mapping[str, Any]) -> str:
        """Text that tells whose last value this is, beside the index."""
        return ":".join(str(fields[name]) for name in self.last_by)


_ACK_CODES = (
    "300 ack, 301 in progress, 302 stalled, 303 complete; -300 no permission, -301 no answer, -302 failed, "
    "-303 aborted, -304 timeout"
)


def _ack_fields() -> dict[str, FieldModel]:
    texts = {
        "ack": ("int", _ACK_CODES),
        "error": ("int", "Error number of a failed command"),
        "result": ("string", "Result or reason"),
        "identity": ("string", "Who issued the command"),
        "origin": ("int", "Process id of the issuer"),
        "cmdtype": ("int", "Index of the command in the component's sorted list of topics"),
        "timeout": ("double", "Seconds more that a command in progress expects to take"),
    }
    return {
        name: FieldModel(type=kind, description=text, unit="s" if name == "timeout" else "")
        for name, (kind, text) in texts.items()
    }


class TopicCatalog:
    """All topics, by full name; iterable."""

    def __init__(self, topics: Iterable[Topic]) -> None:
        self._topics = {topic.name: topic for topic in topics}

    def __getitem__(self, name: str) -> Topic:
        try:
            return self._topics[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._topics, n=3)
            raise NotFoundError(
                f"no topic {name!r}; "
                + (f"did you mean {' or '.join(near)}?" if near else "see cumbre/bus/topics")
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._topics

    def __iter__(self) -> Any:
        return iter(self._topics.values())

    def __len__(self) -> int:
        return len(self._topics)

    def command_number(self, topic: Topic) -> int:
        """Index of a command in the sorted list of its component's topics (SAL's cmdtype)."""
        names = sorted(other.name for other in self if other.component == topic.component)
        return names.index(topic.name)


def _read_model[M: BaseModel](path: Path, kind: type[M]) -> M:
    try:
        return kind.model_validate(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path}: not a topic file: {error}") from error


def read_component(path: Path) -> list[Topic]:
    """Topics of one component's file, with those of its ``generics``; one with commands also gets ``ackcmd``.

    Raises
    ------
    ConfigurationError
        The file is not a valid topic file; the message names the key.
    """
    model = _read_model(path, _ComponentModel)
    blocks, entries = dict(model.blocks), dict(model.topics)
    for name in model.generics:
        shared = path.parent / "generics" / f"{name}.yaml"
        if not shared.is_file():
            raise ConfigurationError(f"{path}: generics: {name}: there is no {shared}")
        common = _read_model(shared, _GenericModel)
        blocks, entries = common.blocks | blocks, common.topics | entries
    topics = []
    for short, entry in entries.items():
        fields: dict[str, FieldModel] = {}
        for block in entry.use:
            if block not in blocks:
                raise ConfigurationError(f"{path}: topic {short}: use: no block {block!r} in this file")
            fields |= blocks[block]
        fields |= entry.fields
        for name in entry.last_by:
            if name not in fields:
                raise ConfigurationError(f"{path}: topic {short}: last_by: no field {name!r}")
        topics.append(
            Topic(
                name=f"{model.component}.{short}", component=model.component, short=short, kind=entry.kind,
                description=entry.description, fields=fields, indexed=model.indexed,
                last_by=tuple(entry.last_by), keep_all=entry.keep == "all" or entry.kind == "stream",
            )
        )  # fmt: skip
    if any(topic.kind == "command" for topic in topics):
        topics.append(
            Topic(
                name=f"{model.component}.{ACK_TOPIC}", component=model.component, short=ACK_TOPIC, kind="ack",
                description="Answers to commands.", fields=_ack_fields(), indexed=model.indexed,
            )
        )  # fmt: skip
    return topics


def load_topics(*folders: Path) -> TopicCatalog:
    """Catalog of all ``*.yaml`` of the folders (the package's own when none is given)."""
    places = folders or (Path(__file__).parent / "topics",)
    return TopicCatalog(
        topic for place in places for path in sorted(place.glob("*.yaml")) for topic in read_component(path)
    )


@lru_cache(maxsize=1)
def default_topics() -> TopicCatalog:
    """Catalog of the package's own topic files, read once a process."""
    return load_topics()
