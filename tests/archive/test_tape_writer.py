"""The tape's own role: whatever the tape does, nothing is lost, somebody is told, and the backlog drains in order."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transfer_double import DETECTORS, hops, key_of, obs_id, until, write_image

from cumbre.archive.tape import open_tape, tape_state, view_tape
from cumbre.archive.tape_writer import TapeWriter
from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.errors import TransientError
from cumbre.core.time import Clock
from cumbre.stores.files import copy_verified, sha256_of
from support.s3_double import S3Double

SIZE = 30_000


def with_place(site: Site, place: str, **settings: Any) -> Site:
    changed = site.config.places[place].model_copy(update=settings)
    return Site(site.root, site.config.model_copy(update={"places": site.config.places | {place: changed}}))


def arrive(site: Site, bus: Bus, number: int, *, say: bool = True) -> None:
    """An image in the raw cache of the base, with its hops."""
    for detector, path in enumerate(write_image(site, bus, number, size=SIZE, announce=False)):
        target = site.path(f"base/raw/{key_of(number, DETECTORS[detector])}")
        copy_verified(path, target)
        if say:
            bus.publish(
                "Image.hop",
                {
                    "obsId": obs_id(number), "instrument": "DemoCam", "exposureId": 2026112000000 + number,
                    "groupId": f"group {number}", "detector": detector, "detectorName": DETECTORS[detector],
                    "hop": "at_base", "place": "base", "path": str(target), "byteSize": target.stat().st_size,
                    "checksum": sha256_of(target), "hopTai": bus.clock.now_tai_s(),
                },
            )  # fmt: skip


def taped(bus: Bus) -> set[tuple[str, int]]:
    return {(hop["obsId"], hop["detector"]) for hop in hops(bus, "base_tape")}


def images(*numbers: int) -> set[tuple[str, int]]:
    return {(obs_id(number), detector) for number in numbers for detector in range(4)}


def alarms(bus: Bus) -> list[bool]:
    found = [m.fields for m in bus.replay(["Storage.alarm"])]
    return [alarm["active"] for alarm in found if alarm["name"] == "tape-base"]


@pytest.fixture
def start(bus: Bus, clock: Clock) -> Iterator[Callable[..., TapeWriter]]:
    made: list[TapeWriter] = []

    def make(site: Site, **options: Any) -> TapeWriter:
        options = {"scan_every_s": 0.2, "max_pause_s": 0.2} | options
        made.append(TapeWriter(site=site, bus=bus, clock=clock, place="base", **options))
        return made[-1]

    yield make
    for writer in made:
        writer.close()


def drive(writer: TapeWriter, condition: Callable[[], bool]) -> None:
    until(lambda: bool(writer.step(0.02) and False) or condition())


def test_hops_and_a_scan_both_feed_it(site: Site, bus: Bus, start: Callable[..., TapeWriter]) -> None:
    arrive(site, bus, 2)
    arrive(site, bus, 1, say=False)
    writer = start(site)
    drive(writer, lambda: taped(bus) == images(1, 2))
    index, _ = view_tape(site, "base")
    for hop in hops(bus, "base_tape"):
        entry = index.entry(key_of(hop["exposureId"] % 100000, hop["detectorName"]))
        assert (hop["path"], hop["checksum"], hop["byteSize"]) == (entry.place, entry.sha256, entry.size)
    assert alarms(bus) == []


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_tape_is_told_and_goes_on_when_there_is_room(
    site: Site, bus: Bus, start: Callable[..., TapeWriter]
) -> None:
    folder = site.path("base/tape")
    with small_disk(folder, "160k"):
        writer = start(site)
        for number in (3, 1, 2):
            arrive(site, bus, number)
        drive(writer, lambda: alarms(bus) == [True])
        assert "No space" in bus.latest("Storage.alarm", key="tape-base").fields["message"]
        before = taped(bus)
        assert before < images(1, 2, 3)
        assert {(hop["outcome"]) for hop in hops(bus, "base_tape", outcome=None)} <= {
            "ok"
        }  # no file was blamed
        subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
        drive(writer, lambda: taped(bus) == images(1, 2, 3))
        drive(writer, lambda: alarms(bus) == [True, False])
        with tarfile.open(folder / "base-000001.tar") as volume:
            names = [name for name in volume.getnames() if name.endswith(".fits")]
        assert sorted(names) == names  # in the order of time
        assert len(names) == 12
        writer.close()


def test_a_read_only_tape_is_told_and_goes_on(site: Site, bus: Bus, start: Callable[..., TapeWriter]) -> None:
    folder = site.path("base/tape")
    with small_disk(folder, "4m"):
        writer = start(site)
        arrive(site, bus, 1)
        drive(writer, lambda: taped(bus) == images(1))
        writer.close()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        again = start(site)
        arrive(site, bus, 2)
        drive(again, lambda: alarms(bus) == [True])
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        drive(again, lambda: taped(bus) == images(1, 2) and alarms(bus) == [True, False])
        again.close()


@pytest.mark.parametrize("when", ["running", "before the start"])
def test_a_tape_that_is_away_is_not_made_anew_in_its_place(
    site: Site, bus: Bus, start: Callable[..., TapeWriter], when: str
) -> None:
    folder, shelf = site.path("base/tape"), site.path("shelf")
    writer = start(site)
    arrive(site, bus, 1)
    drive(writer, lambda: taped(bus) == images(1))
    if when == "before the start":
        writer.close()
    folder.rename(shelf)
    folder.mkdir()  # the mount point without its tape
    if when == "before the start":
        writer = start(site)
    else:
        writer._tape.abandon()  # type: ignore[union-attr]  # what the first failing write does
        writer._tape = None
    arrive(site, bus, 2)
    drive(writer, lambda: alarms(bus) == [True])
    assert list(folder.iterdir()) == []
    assert taped(bus) == images(1)
    folder.rmdir()
    shelf.rename(folder)
    drive(writer, lambda: taped(bus) == images(1, 2))
    drive(writer, lambda: alarms(bus) == [True, False])
    assert [entry.volume for entry in view_tape(site, "base")[0].entries.values()] == ["base-000001.tar"] * 8


def test_a_tape_whose_folder_is_gone_while_it_is_written(
    site: Site, bus: Bus, start: Callable[..., TapeWriter]
) -> None:
    folder, shelf = site.path("base/tape"), site.path("shelf")
    small = with_place(site, "base", tape_volume_mb=0.001)  # each batch needs a new volume
    writer = start(small)
    arrive(small, bus, 1)
    drive(writer, lambda: taped(bus) == images(1))
    folder.rename(shelf)
    arrive(small, bus, 2)
    drive(writer, lambda: alarms(bus) == [True])
    shelf.rename(folder)
    drive(writer, lambda: taped(bus) == images(1, 2) and alarms(bus) == [True, False])


def test_another_tape_in_the_drive_is_refused(site: Site, bus: Bus, clock: Clock) -> None:
    first = open_tape(site, "base", clock)
    with pytest.raises(TransientError, match="another process"):
        open_tape(site, "base", clock)
    first.close()
    site.path("base/tape").rename(site.path("mine"))
    remembered = tape_state(site, "base") / "tape.json"
    mine = remembered.read_bytes()
    remembered.unlink()
    open_tape(site, "base", clock).close()  # a new tape was begun on purpose
    remembered.write_bytes(mine)
    with pytest.raises(TransientError, match="another tape"):
        open_tape(site, "base", clock)


def test_a_volume_that_does_not_read_back_is_written_again(
    site: Site, bus: Bus, start: Callable[..., TapeWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = with_place(site, "base", tape_volume_mb=0.1)
    writer = start(small)
    import cumbre.archive.tape as module

    close, rotten = module.TapeArchive._close_volume, []

    def rot(tape: Any) -> None:
        path = tape._volume_path(tape._number)
        if not rotten:
            key = next(key for key in tape.index.entries if key.endswith(".fits"))
            rotten.append(key)
            with path.open("r+b") as stream:
                stream.seek(tape.entry(key).offset + 99)
                stream.write(b"rot")
        close(tape)

    monkeypatch.setattr(module.TapeArchive, "_close_volume", rot)
    arrive(small, bus, 1)
    drive(writer, lambda: taped(bus) == images(1))
    drive(writer, lambda: bool(rotten) and len(hops(bus, "base_tape", outcome=None)) == 5)
    writer.close()
    index, _ = view_tape(small, "base")
    (old,) = index.superseded
    assert (old.key, index.entry(old.key).replaces) == (rotten[0], old.place)
    told = [
        h for h in hops(bus, "base_tape", outcome=None) if rotten[0].endswith(f"{h['detectorName']}.fits")
    ]
    assert [hop["outcome"] for hop in told] == ["BadFile", "ok"]
    assert told[-1]["path"] == index.entry(rotten[0]).place
    tape = open_tape(small, "base", bus.clock)
    assert tape.read(rotten[0]) == site.path(f"base/raw/{rotten[0]}").read_bytes()
    tape.close()


# buckets


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Double]:
    double = S3Double()
    monkeypatch.setenv("S3_ENDPOINT_URL", double.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tape")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tape")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield double
    double.close()


def bucket_site(site: Site, **settings: Any) -> Site:
    return with_place(site, "base", tape="s3://tapes/base", tape_volume_mb=0.1, **settings)


def test_a_bucket_gets_whole_locked_volumes_and_only_then_is_it_tape(
    site: Site, bus: Bus, bucket: S3Double, start: Callable[..., TapeWriter]
) -> None:
    far = bucket_site(site, tape_lock_days=365.0, tape_close_s=1e9)
    writer = start(far)
    arrive(far, bus, 1)
    drive(writer, lambda: ("tapes", "base/base-000001.tar.volume.json") in bucket.objects)
    body, kept = bucket.objects["tapes", "base/base-000001.tar"]
    assert kept["x-amz-object-lock-mode"] == "COMPLIANCE"
    assert kept["x-amz-object-lock-retain-until-date"] > "2027"
    index, shelf = view_tape(far, "base")
    assert (
        f"sha256:{__import__('hashlib').sha256(body).hexdigest()}" == index.volumes["base-000001.tar"].sha256
    )
    up = [entry for entry in index.entries.values() if entry.volume == "base-000001.tar"]
    drive(writer, lambda: len(taped(bus)) == sum(entry.key.endswith(".fits") for entry in up))
    assert not far.path("base/tape-open/base-000001.tar").exists()
    for entry in up:
        content = b"".join(shelf.blocks(entry.volume, entry.offset, entry.size))
        assert content == far.path(f"base/raw/{entry.key}").read_bytes()
    assert [f"base/base-000001.tar{end}" for end in (".index.jsonl", "", ".volume.json")] == bucket.puts


def test_an_unfilled_volume_goes_up_when_its_time_has_come(
    site: Site, bus: Bus, bucket: S3Double, start: Callable[..., TapeWriter]
) -> None:
    far = with_place(site, "base", tape="s3://tapes/base", tape_close_s=0.5)
    arrive(far, bus, 1)
    drive(start(far), lambda: taped(bus) == images(1))
    assert [key for _, key in bucket.objects if key.endswith(".tar")] == ["base/base-000001.tar"]


def test_a_bucket_that_is_down_loses_nothing(
    site: Site, bus: Bus, bucket: S3Double, start: Callable[..., TapeWriter]
) -> None:
    far = bucket_site(site, tape_close_s=0.5)
    bucket.down = True
    writer = start(far)
    for number in (1, 2):
        arrive(far, bus, number)
    drive(writer, lambda: alarms(bus) == [True])
    assert taped(bus) == set()
    writer.close()
    writer = start(far)  # killed and started again in the middle of it
    drive(writer, lambda: not writer._queue or True)
    bucket.down = False
    drive(writer, lambda: taped(bus) == images(1, 2) and alarms(bus) == [True, False])
    puts = [key for key in bucket.puts if key.endswith(".tar")]
    assert puts == sorted(set(puts))  # each once, in order


def test_an_object_with_another_content_is_never_replaced(
    site: Site, bus: Bus, bucket: S3Double, start: Callable[..., TapeWriter]
) -> None:
    far = bucket_site(site, tape_close_s=0.5)
    bucket.objects["tapes", "base/base-000001.tar"] = b"somebody else's", {}
    writer = start(far)
    arrive(far, bus, 1)
    drive(writer, lambda: alarms(bus) == [True])
    assert "the first one is kept" in bus.latest("Storage.alarm", key="tape-base").fields["message"]
    assert bucket.objects["tapes", "base/base-000001.tar"][0] == b"somebody else's"
    assert taped(bus) == set()


def test_a_new_machine_finds_its_tape_in_the_bucket(
    site: Site, bus: Bus, bucket: S3Double, start: Callable[..., TapeWriter], tmp_path: Path
) -> None:
    far = bucket_site(site, tape_close_s=0.5)
    arrive(far, bus, 1)
    writer = start(far)
    drive(writer, lambda: taped(bus) == images(1))
    writer.close()
    site.path("base/tape-open").rename(tmp_path / "burnt")
    site.path("base/taped").rename(tmp_path / "burnt too")
    tape = open_tape(far, "base", bus.clock)
    assert {key for key in tape.index.entries if key.endswith(".fits")} == {
        key_of(1, name) for name in DETECTORS
    }
    assert tape.read(key_of(1)) == far.path(f"base/raw/{key_of(1)}").read_bytes()
    number = int(max(os.path.basename(k) for _, k in bucket.objects if k.endswith(".tar"))[5:11])
    assert tape._number == number + 1
    tape.close()
