"""The camera's memory on disk: which exposures began, which are whole, which were announced.

One folder an exposure in the DAQ store. ``started.json`` is written before the shutter opens, the arrays and
then ``exposure.json`` after the readout, ``announced.json`` after the events of its end are on the bus, or
``aborted.json`` when it will never be whole. An image counts as taken only when ``exposure.json`` is there.
``sequence.json`` keeps the last number of a day, whatever is deleted from the store.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cumbre.core.errors import BadFileError, UserError
from cumbre.core.ids import ObsId
from cumbre.simulator.exposure import ExposureRequest
from cumbre.stores.files import write_atomic

log = logging.getLogger(__name__)
STARTED, EXPOSURE, ANNOUNCED, ABORTED = "started.json", "exposure.json", "announced.json", "aborted.json"
SEQUENCE = "sequence.json"


@dataclass(frozen=True, slots=True)
class Started:
    """One exposure that began.

    Attributes
    ----------
    command
        Identity of the ``takeImages`` command (sender, process, number).
    index, total
        1-based place in the command's sequence.
    """

    request: ExposureRequest
    instrument: str
    command: str
    index: int
    total: int
    program: str
    note: str

    @property
    def obs_id(self) -> str:
        """Its name."""
        return self.request.obs_id


def _write(path: Path, data: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(data, indent=1).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadFileError(f"{path}: not JSON: {error}") from error
    return data


class Journal:
    """The DAQ store as the camera writes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def folder(self, obs_id: str) -> Path:
        """Folder of one exposure."""
        return self.root / obs_id

    def next_obs_id(self, prefix: str, day_obs: int) -> str:
        """Next free name of the day, and remember it."""
        last = 0
        path = self.root / SEQUENCE
        kept: dict[str, int] = _read(path) if path.is_file() else {}
        key = f"{prefix}_{day_obs}"
        last = int(kept.get(key, 0))
        for item in self.root.glob(f"{prefix}_*_{day_obs}_*"):
            try:
                last = max(last, ObsId.parse(item.name).seq_num)
            except UserError:
                continue
        _write(
            path, {key: last + 1} | {k: v for k, v in kept.items() if k != key and k.endswith(str(day_obs))}
        )
        return str(ObsId(day_obs, last + 1, prefix))

    def begin(self, started: Started) -> None:
        """Write that an exposure begins."""
        _write(self.folder(started.obs_id) / STARTED, asdict(started))

    def started(self, obs_id: str) -> Started | None:
        """What began under a name; None when nothing did."""
        path = self.folder(obs_id) / STARTED
        if not path.is_file():
            return None
        data = _read(path)
        return Started(**(data | {"request": ExposureRequest(**data["request"])}))

    def complete(self, obs_id: str, description: dict[str, Any]) -> None:
        """Write ``exposure.json``: from now on the image is taken."""
        _write(self.folder(obs_id) / EXPOSURE, description)

    def description(self, obs_id: str) -> dict[str, Any] | None:
        """Content of ``exposure.json``; None when the image is not whole."""
        path = self.folder(obs_id) / EXPOSURE
        return _read(path) if path.is_file() else None

    def announced(self, obs_id: str) -> None:
        """Write that the events of its end are on the bus."""
        _write(self.folder(obs_id) / ANNOUNCED, {"obs_id": obs_id})

    def abort(self, obs_id: str, reason: str) -> None:
        """Write that an exposure will never be whole."""
        _write(self.folder(obs_id) / ABORTED, {"obs_id": obs_id, "reason": reason})

    def is_settled(self, obs_id: str) -> bool:
        """Whether nothing is left to do for an exposure."""
        folder = self.folder(obs_id)
        return (folder / ANNOUNCED).is_file() or (folder / ABORTED).is_file()

    def exposures(self) -> list[Started]:
        """Every exposure that began, oldest first."""
        out = []
        for path in self.root.glob(f"*/{STARTED}"):
            try:
                started = self.started(path.parent.name)
            except (BadFileError, TypeError, KeyError) as error:
                log.error("%s: not a journal of this camera, left alone: %s", path, error)
                continue
            if started is not None:
                out.append(started)
        return sorted(out, key=lambda s: ObsId.parse(s.obs_id))

    def unsettled(self) -> list[Started]:
        """Exposures that a crash left between two states, oldest first."""
        return [s for s in self.exposures() if not self.is_settled(s.obs_id)]
