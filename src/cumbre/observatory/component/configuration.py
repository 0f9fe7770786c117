"""A configuration as a component installs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Configuration:
    """A named, checked set of parameters.

    Attributes
    ----------
    version
        Version of the software it is for.
    settings
        Parameters, as plain data.
    wait_s
        Real seconds that its prerequisites are waited for.
    url
        Where it was read.
    """

    name: str
    version: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    wait_s: float = 0.0
    url: str = ""

    @property
    def settings_json(self) -> str:
        """Parameters as a JSON object."""
        return json.dumps(dict(self.settings), sort_keys=True)

    @property
    def hash(self) -> str:
        """sha256:hex of name, version and parameters."""
        text = json.dumps([self.name, self.version, self.settings_json])
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
