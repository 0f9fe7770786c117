"""Damaged copies on a tape are written again at its end, from a verified copy; the old ones stay where they are.

Who verifies a tape puts requests beside its state: ``rewrites/<name>`` is the good copy, ``<name>.request`` says
what it stands for and is written last. The one writer of the tape serves them.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from cumbre.archive.tape import TapeArchive
from cumbre.archive.tape_index import TapeEntry
from cumbre.core.errors import BadFileError, ConflictError, CumbreError
from cumbre.stores.files import copy_verified, write_atomic

log = logging.getLogger(__name__)

FOLDER = "rewrites"
REQUEST = ".request"
"""No file that goes to tape has a name that ends so: a sidecar is a ``.json`` itself."""


def request_rewrite(state: Path, damaged: TapeEntry, good: Path | bytes) -> Path:
    """Ask for a new copy of a damaged one; gives the request, which goes away when it was served.

    Raises
    ------
    BadFileError
        The copy offered is not the file.
    """
    path = state / FOLDER / damaged.key.replace("/", "+")
    if isinstance(good, Path):
        copy_verified(good, path, damaged.sha256)
    elif write_atomic(path, good).sha256 != damaged.sha256:
        path.unlink()
        raise BadFileError(f"{damaged.key}: the copy offered has another checksum")
    request = path.with_name(path.name + REQUEST)
    body = {"key": damaged.key, "sha256": damaged.sha256, "replaces": damaged.place}
    write_atomic(request, json.dumps(body).encode())
    return request


def serve_rewrites(tape: TapeArchive, state: Path) -> list[TapeEntry]:
    """Write what was asked for; gives the new entries that are safe on tape.

    Raises
    ------
    OSError, TransientError
        The tape cannot be written now; the requests stay.
    """
    written: list[TapeEntry] = []
    for request in sorted((state / FOLDER).glob(f"*{REQUEST}")):
        source = request.with_name(request.name.removesuffix(REQUEST))
        try:
            body = json.loads(request.read_bytes())
            old = tape.entry(body["key"])
            if not source.exists():
                log.error("%s: the copy offered is gone", request)
            elif old.place == body["replaces"]:
                tape.append(old.key, source, body["sha256"], sky=old.sky, replaces=old.place)
        except (ConflictError, BadFileError, ValueError, KeyError, TypeError) as error:
            log.error("%s: %s", request, error)
        except CumbreError as error:
            log.error("%s: %s", request, error)
            continue
        written += tape.sync()
        request.unlink()
        source.unlink(missing_ok=True)
    return written
