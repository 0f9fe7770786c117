"""Where a worker gets its raw image: from the archive's raw cache, or from one of its distributors."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.core.configuration import Site
from cumbre.core.errors import TransientError

if TYPE_CHECKING:
    from cumbre.archive.client import ImageClient

WAIT_S = 30.0
"""Real seconds for a distributor's answer."""
log = logging.getLogger(__name__)


@lru_cache(maxsize=4)
def _distributors(site: str) -> ImageClient:
    from cumbre.archive.client import ImageClient

    return ImageClient(Site.load(Path(site)), "archive")


@contextmanager
def local_image(payload: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the payload with its image as a file of this machine, there while the block runs.

    With ``images: distributor`` a distributor is asked, which verifies what it gives; when none answers and the raw
    cache can be read from here, that is read instead.

    Raises
    ------
    TransientError
        No distributor answers, or not in time, and there is no file.
    BadFileError
        The distributor's copy is damaged.
    """
    image = payload["image"]
    if payload.get("images", "path") != "distributor":
        yield payload
        return
    with tempfile.TemporaryDirectory(prefix="cumbre-image-") as folder:
        path = image["path"]
        try:
            received = _distributors(payload["site"]).get(
                image["instrument"],
                image["obs_id"],
                image["detector_name"],
                folder=Path(folder),
                wait_s=WAIT_S,
            )
        except TransientError as error:
            if not Path(path).is_file():
                raise
            log.warning("%s; read from the raw cache instead", error)
        else:
            path = str(received.path)
            log.info(
                "%s from a distributor, with telemetry of %d entries", received.key, len(received.telemetry)
            )
        yield payload | {"image": image | {"path": path}}
