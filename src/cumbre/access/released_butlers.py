"""Which repository of images somebody may see, and that the released ones follow the horizon.

A released copy is made when somebody asks for it first, by a thread of its own, and kept up to date from then on.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cumbre.access.identity import COLLABORATION, EMBARGO
from cumbre.core.errors import NotFoundError, TransientError
from cumbre.core.time import tai_from_utc
from cumbre.repository.released import STATE, ReleasedCopy
from cumbre.repository.store import exists

if TYPE_CHECKING:
    from cumbre.access.images.catalogue import ImageCatalogue

log = logging.getLogger(__name__)

FOLDER = "archive/released"
FOLLOW_S = 60.0
FORGET_S = 3600.0
FIRST_WAIT_S = 30.0
"""So long a request waits for a copy that is being made."""


class ReleasedButlers:
    """The repositories of a site.

    Parameters
    ----------
    whole
        The archive's repository.
    folder
        Where the released copies are.
    catalogue
        Knows what is released.
    """

    def __init__(self, whole: Path, folder: Path, catalogue: ImageCatalogue) -> None:
        self._whole, self._catalogue = whole, catalogue
        self._copies = {level: ReleasedCopy(whole, folder / level) for level in ("public", COLLABORATION)}
        self._wanted: set[str] = {
            level for level, copy in self._copies.items() if (copy.root / STATE).is_file()
        }
        self._ready: set[str] = set()
        self._forgot_s: dict[str, float] = {}
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._followed_s = -FOLLOW_S

    def root(self, level: str) -> Path:
        """Folder of the repository of a level.

        Raises
        ------
        NotFoundError
            The site has no repository yet.
        TransientError
            The copy is being made; ask again.
        """
        if not exists(self._whole):
            raise NotFoundError("the archive has no repository yet; it is made with the first image")
        if level == EMBARGO:
            return self._whole
        with self._changed:
            if level not in self._ready:
                self._wanted.add(level)
                self._begin()
                if not self._changed.wait_for(lambda: level in self._ready, FIRST_WAIT_S):
                    raise TransientError(f"the repository of what is released ({level}) is being made")
        return self._copies[level].root

    def step(self) -> None:
        """Follow the horizon, beside everything else, when it is time and somebody uses it."""
        if self._wanted and time.monotonic() - self._followed_s > FOLLOW_S and exists(self._whole):
            with self._changed:
                self._begin()

    def _begin(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._followed_s = time.monotonic()
            self._thread = threading.Thread(target=self._follow, name="released-butlers", daemon=True)
            self._thread.start()

    def _follow(self) -> None:
        public, collaboration = self._catalogue.horizons()
        for level, horizon in (("public", public), (COLLABORATION, collaboration)):
            if level not in self._wanted or self._stop.is_set():
                continue
            forget = time.monotonic() - self._forgot_s.get(level, time.monotonic()) > FORGET_S
            try:
                passed = self._copies[level].follow(horizon, tai_from_utc(time.time()), forget=forget)
            except Exception:
                log.exception("the repository of what is released: %s", level)
                continue
            if passed.added or passed.removed:
                log.info("released %s: %d data sets more, %d gone", level, passed.added, passed.removed)
            with self._changed:
                if forget or level not in self._forgot_s:
                    self._forgot_s[level] = time.monotonic()
                self._ready.add(level)
                self._changed.notify_all()

    def close(self) -> None:
        """Wait for what is being done."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10)
