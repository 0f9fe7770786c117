"""Looks at a raw cache cost what is left to do, not what is there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from transfer_double import key_of

from cumbre.archive.journal import DAYS_IN_MEMORY, Journal, RawRounds, raw_files

OLD_S = 3600.0


def put(root: Path, key: str, age_s: float = OLD_S) -> None:
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    when = time.time() - age_s
    os.utime(path.parent, (when, when))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of images that were listed."""
    folders: list[str] = []
    listed = os.scandir

    def scandir(folder: str) -> object:
        if Path(folder).name.count("_") == 3:
            folders.append(Path(folder).name)
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    return folders


def test_a_finished_folder_is_not_opened_again_until_it_changes(tmp_path: Path, opened: list[str]) -> None:
    root, done = tmp_path / "cache.raw", set[str]()
    keys = [key_of(number) for number in (1, 2, 3)]
    for key in keys:
        put(root, key)
    rounds = RawRounds(root, done.__contains__)
    assert [str(key) for key in rounds.left()] == keys == [str(key) for key in raw_files(root)]
    done.update(keys[:2])
    assert [str(key) for key in rounds.left()] == keys[2:]
    opened.clear()
    assert [str(key) for key in rounds.left()] == keys[2:]
    assert opened == [Path(keys[2]).parent.name]
    again = keys[0].replace(".fits", "_x.fits")
    put(root, again, age_s=OLD_S / 2)
    assert [str(key) for key in rounds.left()] == [again, keys[2]]


def test_a_folder_in_which_something_happens_now_is_opened_every_time(tmp_path: Path) -> None:
    root, done = tmp_path / "raw", set[str]()
    key = key_of(1)
    put(root, key, age_s=0.0)
    done.add(key)
    rounds = RawRounds(root, done.__contains__)
    assert not list(rounds.left())
    changed_ns = (root / key).parent.stat().st_mtime_ns
    later = key.replace(".fits", "_x.fits")
    (root / later).write_bytes(b"x")
    os.utime((root / key).parent, ns=(changed_ns, changed_ns))  # within one tick of the folder's clock
    assert [str(found) for found in rounds.left()] == [later]


def test_names_that_are_not_ours_and_missing_folders_are_nothing(tmp_path: Path) -> None:
    assert not list(RawRounds(tmp_path / "none", lambda _: False).left())
    put(tmp_path, key_of(1).replace(".fits", ".tmp"))
    (tmp_path / "stray").write_bytes(b"x")
    assert not list(RawRounds(tmp_path, lambda _: False).left())
    assert not raw_files(tmp_path)


def test_a_journal_forgets_no_day_that_left_its_memory(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    days = [f"202611{day:02d}" for day in range(1, DAYS_IN_MEMORY + 4)]
    keys = [key_of(1).replace("20261120", day) for day in days]
    for key in keys:
        journal.note(key, "sent")
    assert len(journal._days) == DAYS_IN_MEMORY
    assert all(journal.has(key, "sent") and not journal.has(key, "lost") for key in keys)
    journal.note(keys[0], "lost")
    assert journal.marks(keys[0]) == {"sent", "lost"}
    assert journal.marks(keys[1]) == {"sent"}
