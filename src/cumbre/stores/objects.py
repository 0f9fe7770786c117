"""Objects by key, in a folder or in an S3 bucket, through ``lsst.resources``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cumbre.core.errors import BadFileError, ConfigurationError, NotFoundError, UserError
from cumbre.stores.files import (
    Checksummed,
    blocks_of,
    copy_verified,
    normal_checksum,
    sha256_of,
    sha256_of_bytes,
    write_atomic,
)

if TYPE_CHECKING:
    from lsst.resources import ResourcePath


class ObjectStore:
    """A flat space of keys ``a/b/c`` under a root.

    Parameters
    ----------
    root
        Folder or ``s3://bucket/prefix``. For S3 the client's usual environment holds: ``S3_ENDPOINT_URL``,
        ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``.

    Raises
    ------
    ConfigurationError
        Another scheme than a folder, ``file://`` or ``s3://``.
    """

    def __init__(self, root: str | Path) -> None:
        text = str(root)
        scheme = text.partition("://")[0] if "://" in text else "file"
        if scheme not in ("file", "s3"):
            raise ConfigurationError(
                f"object store {text!r}: expected a folder, file:// or s3://bucket/prefix"
            )
        self._folder: Path | None = None
        self.root = text.rstrip("/")
        if scheme == "file":
            self._folder = Path(text.removeprefix("file://")).absolute()
            self.root = str(self._folder)

    def put(self, key: str, content: Path | bytes, expected_sha256: str | None = None) -> Checksummed:
        """Store a file or bytes; readers see the old object or the whole new one.

        Returns
        -------
        Checksummed
            ``path`` is the file in a folder store, the key under the root otherwise.

        Raises
        ------
        NotFoundError
            No source file.
        BadFileError
            The content has another checksum than expected; nothing is stored.
        """
        if self._folder is not None:
            target = self._path(key)
            if isinstance(content, Path):
                return copy_verified(content, target, expected_sha256)
            _check(key, sha256_of_bytes(content), expected_sha256)
            return write_atomic(target, content)
        if isinstance(content, Path):
            if not content.is_file():
                raise NotFoundError(f"{content}: no such file")
            checksum, size = sha256_of(content), content.stat().st_size
            _check(key, checksum, expected_sha256)
            from lsst.resources import ResourcePath

            self._resource(key).transfer_from(ResourcePath(str(content)), transfer="copy", overwrite=True)
        else:
            checksum, size = sha256_of_bytes(content), len(content)
            _check(key, checksum, expected_sha256)
            self._resource(key).write(content, overwrite=True)
        return Checksummed(Path(_clean(key)), size, checksum)

    def get(self, key: str, expected_sha256: str | None = None) -> bytes:
        """Read an object.

        Raises
        ------
        NotFoundError
            No such object.
        BadFileError
            The stored bytes have another checksum than expected.
        """
        if self._folder is not None:
            content = b"".join(blocks_of(self._path(key)))
        else:
            try:
                content = self._resource(key).read()
            except FileNotFoundError as error:
                raise NotFoundError(f"{self.root}/{key}: no such object") from error
        _check(key, sha256_of_bytes(content) if expected_sha256 else "", expected_sha256)
        return content

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        if self._folder is not None:
            return self._path(key).is_file()
        return bool(self._resource(key).exists())

    def size(self, key: str) -> int:
        """Bytes of an object.

        Raises
        ------
        NotFoundError
            No such object.
        """
        try:
            return self._path(key).stat().st_size if self._folder is not None else self._resource(key).size()
        except FileNotFoundError as error:
            raise NotFoundError(f"{self.root}/{key}: no such object") from error

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys below the folder ``prefix``, sorted within each folder; unfinished writes do not show."""
        if self._folder is not None:
            top = self._path(prefix) if prefix else self._folder
            for folder, folders, names in top.walk():
                folders.sort()
                for name in sorted(names):
                    if not name.endswith(".tmp"):
                        yield (folder / name).relative_to(self._folder).as_posix()
            return
        base = self._resource("", folder=True)
        for folder_path, _, names in self._resource(prefix, folder=True).walk():
            for name in sorted(names):
                key = folder_path.join(name).relative_to(base)
                if key:
                    yield key

    def delete(self, key: str) -> None:
        """Remove an object; an absent one is fine."""
        if self._folder is not None:
            self._path(key).unlink(missing_ok=True)
        elif self.exists(key):
            self._resource(key).remove()

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / _clean(key)

    def _resource(self, key: str, *, folder: bool = False) -> ResourcePath:
        from lsst.resources import ResourcePath

        base = ResourcePath(self.root, forceDirectory=True)
        return base.join(_clean(key), forceDirectory=folder) if key else base


def _clean(key: str) -> str:
    """Normalise a relative key; no detours.

    Raises
    ------
    UserError
        The key is absolute, empty or leaves the store.
    """
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts or "\0" in key:
        raise UserError(f"object key {key!r}: expected a relative path such as raw/20261120/name.fits")
    return "/".join(parts)


def _check(key: str, found: str, expected: str | None) -> None:
    if expected is not None and found != normal_checksum(expected):
        raise BadFileError(f"object {key}: checksum {found}, expected {expected}; take another copy")
