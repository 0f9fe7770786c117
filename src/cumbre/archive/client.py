"""Asking a distributor for an image: a worker waits until it is there and gets it with its telemetry, verified."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cumbre.archive.addresses import Address, read_address
from cumbre.archive.certificates import Security
from cumbre.archive.guard import Patience
from cumbre.archive.pairs import distributor_name, pairs_into
from cumbre.archive.protocol import MAX_FILE_BYTES, ProtocolError, read_exactly, read_frame, send_frame
from cumbre.archive.sender import connect
from cumbre.archive.wire import receive_plain
from cumbre.capture.keys import RawKey
from cumbre.core.configuration import Site
from cumbre.core.errors import BadFileError, DeadlineError, TransientError
from cumbre.stores.files import PREFIX, publish, temporary_name

MAX_TELEMETRY_BYTES = 16 << 20
SLACK_S = 10.0
"""Real seconds that an answer may take longer than the time that was asked for."""


@dataclass(frozen=True, slots=True)
class ReceivedImage:
    """An image as a distributor gave it.

    Attributes
    ----------
    key, path
        Its key, and the verified file.
    sha256
        Checksum of the file.
    telemetry
        Header of the exposure (the sidecar); empty when there was none.
    """

    key: str
    path: Path
    sha256: str
    telemetry: dict[str, Any]


class ImageClient:
    """Asks the distributors of one place, whichever answers; they share its raw cache.

    Parameters
    ----------
    site, place
        The own place: its certificate is shown.
    """

    def __init__(self, site: Site, place: str) -> None:
        self._site, self._place = site, place
        self._security = Security.of(site, place)

    def get(
        self, instrument: str, obs_id: str, detector: str, *, folder: Path, wait_s: float
    ) -> ReceivedImage:
        """Wait for an image and write it to ``folder``.

        Parameters
        ----------
        wait_s
            Real seconds.

        Raises
        ------
        DeadlineError
            It did not come in time.
        BadFileError
            The distributor's copy is damaged, or the question was refused.
        TransientError
            No distributor answers.
        """
        end = time.monotonic() + wait_s
        question = {"op": "get", "instrument": instrument, "obs_id": obs_id, "detector": detector}
        failure: TransientError | None = None
        for address in self._addresses():
            left = max(end - time.monotonic(), 0.0)
            try:
                with contextlib.closing(
                    connect(address, timeout_s=5.0, security=self._security, target=self._place)
                ) as connection:
                    return _ask(connection, question | {"wait_s": left}, folder, left + SLACK_S)
            except DeadlineError:
                raise
            except TransientError as error:
                failure = error
            except OSError as error:
                failure = TransientError(f"{address[0]}:{address[1]}: {error}")
        raise failure or TransientError(f"{self._place}: no distributor listens")

    def _addresses(self) -> Iterator[Address]:
        for pair in range(1, pairs_into(self._site, self._place) + 1):
            with contextlib.suppress(TransientError):
                yield read_address(self._site, distributor_name(self._place, pair))


def _ask(
    connection: socket.socket, question: dict[str, Any], folder: Path, patience_s: float
) -> ReceivedImage:
    """One question over one connection."""
    send_frame(connection, question)
    stream = Patience(connection)
    stream.for_frame(patience_s)
    answer = read_frame(stream)
    word = None if answer is None else answer.get("answer")
    if answer is None or word not in ("image", "absent", "refused"):
        raise ProtocolError(f"get: answer {word!r}")
    if word == "absent":
        raise DeadlineError(str(answer.get("error")))
    if word == "refused":
        raise BadFileError(str(answer.get("error")))
    key, size, count = answer.get("key"), answer.get("size"), answer.get("telemetry")
    if not isinstance(size, int) or not 0 < size <= MAX_FILE_BYTES:
        raise ProtocolError(f"get: size = {size!r}")
    if not isinstance(count, int) or not 0 <= count <= MAX_TELEMETRY_BYTES:
        raise ProtocolError(f"get: telemetry = {count!r}")
    parsed = RawKey.parse(str(key))
    if (str(parsed.obs_id), parsed.part) != (question["obs_id"], question["detector"]):
        raise ProtocolError(f"get: {key} is not what was asked for")
    stream.for_bytes(count + size)
    telemetry = _telemetry(read_exactly(stream, count) if count else b"")
    path = folder / Path(str(key)).name
    digest = hashlib.sha256()
    with temporary_name(path) as temporary:
        with temporary.open("wb") as file:

            def take(block: memoryview) -> None:
                digest.update(block)
                file.write(block)

            receive_plain(stream, size, take)
        stream.for_frame(SLACK_S)
        last = read_frame(stream) or {}
        found = PREFIX + digest.hexdigest()
        if last.get("answer") != "end" or found != last.get("sha256"):
            raise BadFileError(f"{key}: {last.get('answer', 'cut short')} at the distributor, {found} came")
        publish(temporary, path)
    return ReceivedImage(str(key), path, found, telemetry)


def _telemetry(content: bytes | bytearray | None) -> dict[str, Any]:
    if not content:
        return {}
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ProtocolError(f"telemetry is not JSON: {error}") from error
    return parsed if isinstance(parsed, dict) else {}
