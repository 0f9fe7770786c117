"""Tape: readable by tar, verified, append-only, and whole again after a crash at any byte."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transfer_double import key_of

from cumbre.archive.tape import TapeArchive
from cumbre.core.errors import BadFileError, ConflictError, FatalError
from cumbre.core.time import Clock
from cumbre.stores.files import sha256_of, sha256_of_bytes

CLOCK = Clock.real()


@pytest.fixture
def mount() -> Iterator[Callable[..., TapeArchive]]:
    """Open archives that are let go of at the end of the test."""
    opened: list[TapeArchive] = []

    def make(folder: Path, **options: Any) -> TapeArchive:
        opened.append(TapeArchive(folder, clock=CLOCK, **options))
        return opened[-1]

    yield make
    for tape in opened:
        tape.close()


def fill(tape: TapeArchive, tmp_path: Path, numbers: range, size: int = 3000) -> None:
    for number in numbers:
        source = tmp_path / "source"
        source.write_bytes(bytes([number % 256]) * (size + number))
        tape.append(key_of(number), source, sha256_of(source))
        tape.sync()


def test_volumes_are_tar_files_that_roll_over(tmp_path: Path, mount: Callable[..., TapeArchive]) -> None:
    folder = tmp_path / "tape"
    tape = mount(folder, label="base", volume_bytes=10_000)
    fill(tape, tmp_path, range(1, 8))
    volumes = sorted(folder.glob("*.tar"))
    assert [v.name for v in volumes] == ["base-000001.tar", "base-000002.tar", "base-000003.tar"]
    assert [v.stat().st_mode & 0o222 for v in volumes] == [0, 0, 0o200]
    found = {}
    for volume in volumes:
        with tarfile.open(volume) as opened:
            for member in opened.getmembers():
                stream = opened.extractfile(member)
                assert stream is not None
                found[member.name] = stream.read()
    assert found == {key_of(n): bytes([n]) * (3000 + n) for n in range(1, 8)}
    assert all(tape.read(key) == content for key, content in found.items())
    assert tape.keys() == sorted(found)


def test_duplicates_conflicts_and_damaged_sources(tmp_path: Path, mount: Callable[..., TapeArchive]) -> None:
    tape = mount(tmp_path / "tape")
    fill(tape, tmp_path, range(1, 2))
    source = tmp_path / "source"
    assert tape.append(key_of(1), source, sha256_of(source)) is None
    with pytest.raises(ConflictError):
        tape.append(key_of(1), source, sha256_of_bytes(b"other"))
    with pytest.raises(BadFileError):
        tape.append(key_of(2), source, sha256_of_bytes(b"other"))
    fill(tape, tmp_path, range(3, 4))
    with tarfile.open(tmp_path / "tape/tape-000001.tar") as opened:
        assert opened.getnames() == [key_of(1), key_of(3)]


@pytest.mark.parametrize("torn", ["volume", "index", "both"])
def test_a_torn_tail_is_cut_off(tmp_path: Path, mount: Callable[..., TapeArchive], torn: str) -> None:
    folder = tmp_path / "tape"
    tape = mount(folder)
    fill(tape, tmp_path, range(1, 4))
    volume, index = folder / "tape-000001.tar", folder / "index.jsonl"
    if torn in ("volume", "both"):
        with volume.open("r+b") as stream:
            stream.seek(tape.entry(key_of(3)).end)
            stream.write(b"half a member" * 100)
    if torn in ("index", "both"):
        index.write_bytes(index.read_bytes()[:-20])
    again = mount(folder)
    assert len(again) == (3 if torn == "volume" else 2)
    fill(again, tmp_path, range(3, 6))
    with tarfile.open(volume) as opened:
        assert opened.getnames() == [key_of(n) for n in range(1, 6)]
    assert again.read(key_of(5)) == bytes([5]) * 3005
    assert [json.loads(line)["key"] for line in index.read_text().splitlines()] == again.keys()


def test_a_lost_end_of_a_volume_is_written_again(tmp_path: Path, mount: Callable[..., TapeArchive]) -> None:
    tape = mount(tmp_path / "tape")
    fill(tape, tmp_path, range(1, 4))
    end = tape.entry(key_of(2)).end
    with (tmp_path / "tape/tape-000001.tar").open("r+b") as stream:
        stream.truncate(end + 700)
    again = mount(tmp_path / "tape")
    assert again.keys() == [key_of(1), key_of(2)]
    fill(again, tmp_path, range(3, 4))
    assert again.read(key_of(3)) == bytes([3]) * 3003


def test_damage_is_seen_when_read(tmp_path: Path, mount: Callable[..., TapeArchive]) -> None:
    tape = mount(tmp_path / "tape")
    fill(tape, tmp_path, range(1, 3))
    with (tmp_path / "tape/tape-000001.tar").open("r+b") as stream:
        stream.seek(tape.entry(key_of(1)).offset + 10)
        stream.write(b"!")
    with pytest.raises(BadFileError, match="damaged"):
        tape.read(key_of(1))
    assert tape.read(key_of(2)) == bytes([2]) * 3002
    index = tmp_path / "tape/index.jsonl"
    index.write_text("garbage\n" + index.read_text())
    with pytest.raises(FatalError, match="line 1"):
        mount(tmp_path / "tape")
