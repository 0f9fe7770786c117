"""Serving workers: an image of one detector as soon as it is here, with what is known of its exposure.

The answer to ``get`` is a frame with sizes and checksum, the telemetry of the exposure (the header sidecar, JSON),
the bytes of the file, and a last frame ``end``; that one says ``damaged`` when the bytes on disk are no longer
those that came over the link.
"""

from __future__ import annotations

import hashlib
import logging
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cumbre.archive.protocol import BLOCK_BYTES, send_frame
from cumbre.capture.keys import RawKey, sidecar_key
from cumbre.core.errors import BadFileError, UserError
from cumbre.core.ids import ObsId, image_folder
from cumbre.stores.files import PREFIX

log = logging.getLogger(__name__)

MAX_WAIT_S = 600.0
LOOK_EVERY_S = 0.05
SIDECAR_WAIT_S = 0.5
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")


class ImageServer:
    """Gives out files of a raw cache.

    Parameters
    ----------
    root
        Raw cache.
    checksum_of
        Key → ``sha256:…`` that the file had when it came; None when nothing is known of it.
    """

    def __init__(self, root: Path, checksum_of: Callable[[str], str | None]) -> None:
        self._root, self._checksum_of = root, checksum_of
        self.served = 0

    def serve(
        self, connection: socket.socket, said: dict[str, Any], stopped: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Answer a ``get``: send the image, or give the frame that says why not."""
        try:
            folder, instrument, obs_id, detector, wait_s = _wanted(said)
        except BadFileError as error:
            return {"answer": "refused", "error": str(error)}
        until = time.monotonic() + wait_s
        while (path := self._find(folder, obs_id, detector)) is None:
            if time.monotonic() >= until or stopped():
                return {"answer": "absent", "error": f"{obs_id} {detector}: not here after {wait_s:.1f} s"}
            time.sleep(LOOK_EVERY_S)
        telemetry = self._telemetry(instrument, obs_id)
        key = str(path.relative_to(self._root))
        known = self._checksum_of(key)
        size = path.stat().st_size
        head = {"answer": "image", "key": key, "size": size, "sha256": known, "telemetry": len(telemetry)}
        send_frame(connection, head)
        connection.sendall(telemetry)
        digest, left = hashlib.sha256(), size
        with path.open("rb") as stream:
            while left and (block := stream.read(min(BLOCK_BYTES, left))):
                digest.update(block)
                connection.sendall(block)
                left -= len(block)
        if left:
            raise OSError(f"{path}: became shorter while it was read")
        found = PREFIX + digest.hexdigest()
        if known not in (None, found):
            log.error("%s: has %s, came with %s", path, found, known)
        self.served += 1
        return {"answer": "end" if known in (None, found) else "damaged", "sha256": found}

    def _find(self, folder: str, obs_id: ObsId, detector: str) -> Path | None:
        for path in (self._root / folder).glob(f"{obs_id}_{detector}.fits*"):
            try:
                if RawKey.parse(str(path.relative_to(self._root))).part == detector:
                    return path
            except BadFileError:
                continue
        return None

    def _telemetry(self, instrument: str, obs_id: ObsId) -> bytes:
        """The header sidecar, which may come a moment after the first image; empty without one."""
        path = self._root / sidecar_key(instrument, obs_id)
        until = time.monotonic() + SIDECAR_WAIT_S
        while True:
            try:
                return path.read_bytes()
            except FileNotFoundError:
                if time.monotonic() >= until:
                    return b""
                time.sleep(LOOK_EVERY_S)


def _wanted(said: dict[str, Any]) -> tuple[str, str, ObsId, str, float]:
    """Folder, instrument, image, detector and waiting time of a ``get``.

    Raises
    ------
    BadFileError
        A field is missing or not what it may be.
    """
    instrument, detector, wait_s = said.get("instrument"), said.get("detector"), said.get("wait_s", 0)
    for name, word in (("instrument", instrument), ("detector", detector)):
        if not isinstance(word, str) or _WORD.fullmatch(word) is None:
            raise BadFileError(f"get: {name} = {str(word)[:60]!r}: expected a name")
    if isinstance(wait_s, bool) or not isinstance(wait_s, int | float) or not 0 <= wait_s <= MAX_WAIT_S:
        raise BadFileError(f"get: wait_s = {str(wait_s)[:60]!r}: expected 0 to {MAX_WAIT_S:.0f}")
    try:
        obs_id = ObsId.parse(str(said.get("obs_id")))
    except UserError as error:
        raise BadFileError(f"get: {error}") from error
    assert isinstance(instrument, str)
    assert isinstance(detector, str)
    return image_folder(instrument, obs_id), instrument, obs_id, detector, float(wait_s)
