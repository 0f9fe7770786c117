"""Objects by key, in a folder or in an S3 bucket, through ``lsst.resources``."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cumbre.core.errors import (
    BadFileError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    TransientError,
    UserError,
)
from cumbre.stores.files import (
    Checksummed,
    blocks_of,
    copy_verified,
    normal_checksum,
    sha256_of,
    sha256_of_bytes,
    sync_folder,
    temporary_name,
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
        self._s3: Any = None
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

    def put_new(
        self, key: str, content: Path | bytes, sha256: str, *, retain_until: datetime | None = None
    ) -> bool:
        """Store an object that must not be there yet; nothing is ever replaced.

        Parameters
        ----------
        sha256
            Checksum of the content, proven before and, by servers that do so, while it takes the bytes.
        retain_until
            Object lock in compliance mode up to this time (S3; a bucket with object lock).

        Returns
        -------
        bool
            False when the same object is there already.

        Raises
        ------
        ConflictError
            Another object has this key; it is kept.
        BadFileError
            The content has another checksum; nothing is stored.
        TransientError
            The store does not answer or refuses for now.
        """
        if self._folder is not None:
            return self._put_new_file(self._path(key), content, sha256)
        found = sha256_of(content) if isinstance(content, Path) else sha256_of_bytes(content)
        _check(key, found, sha256)  # not every server proves what it is told
        client, bucket, name = self._client(key)
        digest = bytes.fromhex(normal_checksum(sha256).removeprefix("sha256:"))
        options: dict[str, Any] = {
            "ChecksumAlgorithm": "SHA256",
            "ChecksumSHA256": base64.b64encode(digest).decode(),
            "Metadata": {"sha256": normal_checksum(sha256)},
        }
        if retain_until is not None:
            options |= {"ObjectLockMode": "COMPLIANCE", "ObjectLockRetainUntilDate": retain_until}
        with _s3_errors(f"{self.root}/{key}"):
            if not self._head(client, bucket, name):
                try:
                    if isinstance(content, Path):
                        with content.open("rb") as stream:
                            client.put_object(
                                Bucket=bucket, Key=name, Body=stream, IfNoneMatch="*", **options
                            )
                    else:
                        client.put_object(Bucket=bucket, Key=name, Body=content, IfNoneMatch="*", **options)
                except client.exceptions.ClientError as error:
                    if error.response.get("Error", {}).get("Code") not in ("PreconditionFailed", "412"):
                        raise
                else:
                    self._prove(key, self._head(client, bucket, name), content, sha256)
                    return True
            self._prove(key, self._head(client, bucket, name), content, sha256)
            return False

    def _prove(self, key: str, head: dict[str, Any] | None, content: Path | bytes, sha256: str) -> None:
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        if head is None:
            raise TransientError(f"{self.root}/{key}: stored, but the bucket does not show it")
        found = head.get("Metadata", {}).get("sha256")
        if head["ContentLength"] != size or found != normal_checksum(sha256):
            raise ConflictError(
                f"{self.root}/{key}: {head['ContentLength']} bytes with {found}, now {size} with {sha256}; "
                "the first one is kept"
            )

    @staticmethod
    def _put_new_file(path: Path, content: Path | bytes, sha256: str) -> bool:
        if path.exists():
            if sha256_of(path) != normal_checksum(sha256):
                raise ConflictError(f"{path}: here with other content; the first one is kept")
            return False
        with temporary_name(path) as temporary:
            if isinstance(content, Path):
                copy_verified(content, temporary, sha256)
            else:
                _check(str(path), sha256_of_bytes(content), sha256)
                write_atomic(temporary, content)
            try:
                os.link(temporary, path)  # unlike a rename, a link never replaces
            except FileExistsError as error:
                raise ConflictError(f"{path}: somebody stored it at the same time") from error
        sync_folder(path.parent)
        return True

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        """A part of an object; less at its end.

        Raises
        ------
        NotFoundError
            No such object.
        TransientError
            The store does not answer.
        """
        if size <= 0:
            return b""
        if self._folder is not None:
            try:
                with self._path(key).open("rb") as stream:
                    stream.seek(offset)
                    return stream.read(size)
            except FileNotFoundError as error:
                raise NotFoundError(f"{self.root}/{key}: no such object") from error
        client, bucket, name = self._client(key)
        with _s3_errors(f"{self.root}/{key}"):
            answer = client.get_object(Bucket=bucket, Key=name, Range=f"bytes={offset}-{offset + size - 1}")
            content: bytes = answer["Body"].read()
            return content

    def _client(self, key: str) -> tuple[Any, str, str]:
        """S3 client, bucket and full key; a client is made once."""
        if self._s3 is None:
            import boto3
            from botocore.config import Config

            self._s3 = boto3.client(
                "s3",
                endpoint_url=os.environ.get("S3_ENDPOINT_URL"),
                config=Config(connect_timeout=10, read_timeout=60, retries={"max_attempts": 2}),
            )
        bucket, _, prefix = self.root.removeprefix("s3://").partition("/")
        return self._s3, bucket, f"{prefix}/{_clean(key)}" if prefix else _clean(key)

    @staticmethod
    def _head(client: Any, bucket: str, name: str) -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = client.head_object(Bucket=bucket, Key=name)
        except client.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey", "NotFound"):
                return None
            raise
        return head

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
            client, bucket, name = self._client(key)
            with _s3_errors(f"{self.root}/{key}"):
                content = client.get_object(Bucket=bucket, Key=name)["Body"].read()
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
        if self._folder is not None:
            try:
                return self._path(key).stat().st_size
            except FileNotFoundError as error:
                raise NotFoundError(f"{self.root}/{key}: no such object") from error
        client, bucket, name = self._client(key)
        with _s3_errors(f"{self.root}/{key}"):
            head = self._head(client, bucket, name)
        if head is None:
            raise NotFoundError(f"{self.root}/{key}: no such object")
        return int(head["ContentLength"])

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys below the folder ``prefix``, sorted (within each folder); unfinished writes do not show."""
        if self._folder is not None:
            top = self._path(prefix) if prefix else self._folder
            for folder, folders, names in top.walk():
                folders.sort()
                for name in sorted(names):
                    if not name.endswith(".tmp"):
                        yield (folder / name).relative_to(self._folder).as_posix()
            return
        client, bucket, base = self._client("x")
        base = base.removesuffix("x")
        start = f"{base}{_clean(prefix)}/" if prefix else base
        with _s3_errors(f"{self.root}/{prefix}"):
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start):
                for item in page.get("Contents", ()):
                    yield str(item["Key"]).removeprefix(base)

    def delete(self, key: str) -> None:
        """Remove an object; an absent one is fine."""
        if self._folder is not None:
            self._path(key).unlink(missing_ok=True)
        elif self.exists(key):
            self._resource(key).remove()

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / _clean(key)

    def _resource(self, key: str) -> ResourcePath:
        from lsst.resources import ResourcePath

        return ResourcePath(self.root, forceDirectory=True).join(_clean(key))


@contextmanager
def _s3_errors(what: str) -> Iterator[None]:
    """Errors of the S3 client in our words."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code"))
        if code in ("404", "NoSuchKey", "NotFound"):
            raise NotFoundError(f"{what}: no such object") from error
        if code in ("BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"):
            raise BadFileError(f"{what}: the store found another checksum: {error}") from error
        raise TransientError(f"{what}: {error}") from error
    except BotoCoreError as error:
        raise TransientError(f"{what}: {error}") from error


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
