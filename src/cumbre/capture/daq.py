"""The camera's image store: one folder an image, one array a detector, ``exposure.json`` written last."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import BadFileError, NotFoundError, UserError
from cumbre.core.ids import ObsId
from cumbre.core.instrument import Detector
from cumbre.stores.files import normal_checksum, sha256_of_bytes

EXPOSURE_FILE = "exposure.json"
MAX_EXPOSURE_BYTES = 4 << 20
_NPY_HEADER_BYTES = 4096

RawArray = NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class DaqImage:
    """One image in the store.

    Attributes
    ----------
    folder
        Where it is.
    info
        Contents of ``exposure.json``.
    """

    folder: Path
    info: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> DaqImage:
        """Read ``exposure.json``.

        Raises
        ------
        NotFoundError
            The image is not (or not yet completely) in the store.
        BadFileError
            ``exposure.json`` is not what it should be.
        """
        path = folder / EXPOSURE_FILE
        try:
            if path.stat().st_size > MAX_EXPOSURE_BYTES:
                raise BadFileError(
                    f"{path}: larger than {MAX_EXPOSURE_BYTES} bytes; not an exposure description"
                )
            info = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise NotFoundError(f"{path}: no such image in the camera's store") from None
        except ValueError as error:
            raise BadFileError(f"{path}: not JSON: {error}") from error
        if not isinstance(info, dict) or not isinstance(info.get("obs_id"), str) or "instrument" not in info:
            raise BadFileError(f"{path}: expected an object with obs_id, instrument and detectors")
        if info["obs_id"] != folder.name:
            raise BadFileError(f"{path}: obs_id = {info['obs_id']!r}, expected {folder.name!r} as its folder")
        image = cls(folder, info)
        if not image.detectors:
            raise BadFileError(f"{path}: detectors: expected at least one")
        return image

    @property
    def obs_id(self) -> ObsId:
        """Its identity."""
        return ObsId.parse(self.info["obs_id"])

    @property
    def instrument(self) -> str:
        """Instrument's name."""
        return str(self.info["instrument"])

    @property
    def group_id(self) -> str:
        """Group of exposures of one visit."""
        return str(self.info.get("group_id") or "")

    @property
    def detectors(self) -> list[str]:
        """Names of the detectors that were read."""
        listed = self.info.get("detectors") or []
        return [str(item["name"]) if isinstance(item, dict) else str(item) for item in listed]

    def checksum(self, name: str) -> str | None:
        """``sha256:…`` that the camera gave for a detector's file."""
        found = self.info.get("sha256")
        value = found.get(name) if isinstance(found, dict) else None
        for item in self.info.get("detectors") or []:
            if value is None and isinstance(item, dict) and item.get("name") == name:
                value = item.get("sha256")
        return normal_checksum(str(value)) if value else None

    def load(self, detector: Detector) -> tuple[RawArray, str]:
        """Read and verify a detector's array.

        Returns
        -------
        tuple
            uint16 of shape (n_amplifiers, ny_raw, nx_raw), and ``sha256:…`` of its file.

        Raises
        ------
        BadFileError
            Missing, truncated, too long, with another checksum, or of another type or shape.
        """
        path = self.folder / f"{detector.name}.npy"
        shapes = {amplifier.raw_shape for amplifier in detector.amplifiers}
        expected = (
            len(detector.amplifiers),
            max(ny for ny, _ in shapes),
            max(nx for _, nx in shapes),
        )
        limit = int(np.prod(expected)) * 2 + _NPY_HEADER_BYTES
        try:
            size = path.stat().st_size
            if size > limit:
                raise BadFileError(f"{path}: {size} bytes, expected at most {limit} for shape {expected}")
            content = path.read_bytes()
        except FileNotFoundError:
            raise BadFileError(f"{path}: the camera listed this detector but its file is missing") from None
        found = sha256_of_bytes(content)
        wanted = self.checksum(detector.name)
        if wanted is not None and found != wanted:
            raise BadFileError(f"{path}: checksum {found}, the camera gave {wanted} ({size} bytes)")
        try:
            array = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError, OSError, SyntaxError) as error:
            raise BadFileError(f"{path}: not a readable array: {error}") from error
        if not isinstance(array, np.ndarray) or array.dtype != np.uint16 or array.shape != expected:
            kind = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise BadFileError(f"{path}: {kind}, expected uint16 {expected}")
        return array, found


def images(root: Path) -> Iterator[Path]:
    """Folders of complete images, oldest first."""
    found = []
    if root.is_dir():
        for folder in root.iterdir():
            try:
                obs_id = ObsId.parse(folder.name)
            except UserError:
                continue
            if (folder / EXPOSURE_FILE).is_file():
                found.append((obs_id, folder))
    for _, folder in sorted(found):
        yield folder
