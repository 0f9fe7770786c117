from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.stores.files import copy_verified, sha256_of, write_atomic

# FIPS 180-2, appendix B.1
ABC = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("content", [b"abc", [b"a", b"", b"bc"], lambda w: (w.write(b"ab"), w.write(b"c"))])
def test_write_atomic_gives_the_published_checksum(tmp_path: Path, content: object) -> None:
    done = write_atomic(tmp_path / "deep" / "file", content)  # type: ignore[arg-type]
    assert (done.size, done.sha256) == (3, ABC)
    assert done.path.read_bytes() == b"abc"
    assert sha256_of(done.path) == ABC


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fails(writer: object) -> None:
        writer.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fails)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_copy_is_verified_while_it_is_made(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    source, target = tmp_path / "a", tmp_path / "b" / "c"
    source.write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    done = copy_verified(source, target, expected)  # with or without the prefix
    assert (done.size, done.sha256) == (len(content), "sha256:" + expected)
    assert target.read_bytes() == content


def test_damaged_source_never_becomes_a_copy(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"abd")
    with pytest.raises(BadFileError, match="expected sha256:ba78"):
        copy_verified(source, target, ABC)
    assert list(tmp_path.iterdir()) == [source]


def test_absent_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing-here"):
        copy_verified(tmp_path / "nothing-here", tmp_path / "b")
