"""One store of an outage buffer: a folder on one disk, that may go away and come back."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from cumbre.stores.files import copy_verified, sha256_of, sync_folder, write_atomic

log = logging.getLogger(__name__)

MARK = "store.json"


def entry_name(key: str) -> str:
    """Name of an entry's file."""
    return f"{key.replace('/', '+')}.json"


class BufferStore:
    """Files and entries below one folder.

    The folder is made once; later a missing mark means that the disk is not there, and nothing is written to
    the place where it should be mounted.

    Attributes
    ----------
    failed
        Set by the buffer: not used until it works again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed = False

    @property
    def is_known(self) -> bool:
        """Whether the store was begun before."""
        return (self.folder / MARK).is_file() or (self.folder / "entries").is_dir()

    def begin(self, *, fresh: bool) -> bool:
        """Make the store ready; False when its disk is not there or takes nothing.

        Parameters
        ----------
        fresh
            The first time: the whole path may be made. Later the folder above must be there, as on a new disk.
        """
        if not (fresh or self.is_known or self.folder.parent.is_dir()):
            return False
        try:
            (self.folder / "entries").mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / MARK, b"{}\n")
        except OSError as error:
            log.error("%s: %s", self.folder, error)
            if fresh:
                raise
            return False
        return True

    def data(self, key: str) -> Path:
        """Path of a file."""
        return self.folder / "data" / key

    def put(self, key: str, source: Path, sha256: str, body: bytes, *, link: bool) -> None:
        """Keep a file and its entry.

        Parameters
        ----------
        link
            The file may share the source's bytes where the file system can.

        Raises
        ------
        BadFileError
            The source has another checksum.
        NotFoundError
            There is no source.
        OSError
            The store is away or takes nothing.
        """
        self._check()
        path = self.data(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        linked = False
        if link:
            with contextlib.suppress(OSError):
                os.link(source, path)
                sync_folder(path.parent)
                linked = True
        if not linked:
            copy_verified(source, path, sha256)
        write_atomic(self.folder / "entries" / entry_name(key), body)

    def mend(self, key: str, good: Path, sha256: str, body: bytes) -> bool:
        """Replace a file that is not what it should be; True when it is right afterwards."""
        self._check()
        path = self.data(key)
        if good != path and (not path.is_file() or sha256_of(path) != sha256):
            copy_verified(good, path, sha256)
        entry = self.folder / "entries" / entry_name(key)
        if not entry.is_file():
            write_atomic(entry, body)
        return True

    def remove(self, key: str) -> None:
        """Forget a file: its bytes first, then its entry."""
        self._check()
        path = self.data(key)
        path.unlink(missing_ok=True)
        self.remove_entry(entry_name(key))
        for folder in list(path.parents)[:3]:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only when empty

    def remove_entry(self, name: str) -> None:
        """Forget an entry only."""
        (self.folder / "entries" / name).unlink(missing_ok=True)

    def names(self) -> set[str]:
        """Names of all entries."""
        self._check()
        return {name for name in os.listdir(self.folder / "entries") if name.endswith(".json")}

    def read(self, name: str) -> bytes:
        """Content of an entry."""
        return (self.folder / "entries" / name).read_bytes()

    def note_gone(self, key: str) -> None:
        """Remember that a file is delivered, for the store that was away when it was."""
        write_atomic(self.folder / "gone" / entry_name(key), b"")

    def gone(self) -> set[str]:
        """Names of entries that are delivered, whatever another store says."""
        folder = self.folder / "gone"
        return set(os.listdir(folder)) if folder.is_dir() else set()

    def forget_gone(self, names: set[str]) -> None:
        """Every store knows of them now."""
        for name in names:
            (self.folder / "gone" / name).unlink(missing_ok=True)

    def _check(self) -> None:
        if not (self.folder / MARK).is_file():
            raise OSError(f"{self.folder}: its disk is not mounted")
