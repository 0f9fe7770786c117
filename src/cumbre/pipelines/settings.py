"""Configuration of tasks from the payloads' own settings, so that each choice is described once."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any, get_args, get_origin, get_type_hints

from lsst.pex.config import Config, Field, ListField

_NAMES = re.compile(r"^(\w+(?:, \w+)*)$")


def descriptions(kind: type) -> dict[str, str]:
    """Field → text of the section ``Attributes`` of a dataclass's docstring."""
    _, _, section = (kind.__doc__ or "").partition("Attributes\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (text.strip() for text in section.splitlines()[1:]):
        if match := _NAMES.match(line):
            names = match[1].split(", ")
            found |= dict.fromkeys(names, "")
        elif line:
            found |= {name: f"{found[name]} {line}".strip() for name in names}
    return found


def settings_class(kind: type, module: str, name: str) -> Any:
    """A ``pex_config`` class with a documented field for each field of a dataclass.

    Parameters
    ----------
    kind
        A dataclass whose fields are numbers, texts, truth values or tuples of numbers, all with defaults.
    module, name
        Where the class can be imported from: saved configurations name it.

    Raises
    ------
    TypeError
        A field has no description, no default, or another type.
    """
    hints, texts = get_type_hints(kind), descriptions(kind)
    made: dict[str, Any] = {"__module__": module, "__doc__": f"Choices of {kind.__name__}.", "_kind": kind}
    for item in fields(kind):
        hint = hints[item.name]
        if not texts.get(item.name) or item.default is MISSING:
            raise TypeError(f"{kind.__name__}.{item.name}: expected a description and a default")
        if get_origin(hint) is tuple:
            made[item.name] = ListField(
                texts[item.name], get_args(hint)[0], default=list(item.default), length=len(get_args(hint))
            )
        else:
            made[item.name] = Field(texts[item.name], hint, default=item.default)
    return type(Config)(name, (Config,), made)


def values(settings: Any) -> Any:
    """The dataclass that a configuration of :func:`settings_class` describes."""
    kind = type(settings)._kind
    found = {item.name: getattr(settings, item.name) for item in fields(kind)}
    return kind(
        **{
            key: tuple(v) if isinstance(v, list | tuple) or hasattr(v, "append") else v
            for key, v in found.items()
        }
    )
