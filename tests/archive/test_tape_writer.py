"""The tape's own role: whatever the tape does, nothing is lost, somebody is told, and the backlog drains in order."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from transfer_double import DETECTORS, hops, key_of, obs_id, until, write_image

from cumbre.archive.tape import open_tape, tape_state, view_tape
from cumbre.archive.tape_writer import TapeWriter
from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.errors import TransientError
from cumbre.core.time import Clock
from cumbre.stores.files import copy_verified, sha256_of, sha256_of_bytes

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


def test_what_rotted_while_nobody_wrote_does_not_go_on_tape(
    site: Site, bus: Bus, start: Callable[..., TapeWriter]
) -> None:
    site.path("base/tape").parent.mkdir(parents=True, exist_ok=True)
    site.path("base/tape").write_bytes(b"no folder")  # the tape is away
    writer = start(site)
    arrive(site, bus, 1)
    drive(writer, lambda: alarms(bus) == [True])
    writer.close()
    path = site.path(f"base/raw/{key_of(1)}")
    good = path.read_bytes()
    path.write_bytes(b"rot" + good[3:])
    site.path("base/tape").unlink()
    writer = start(site)  # it remembers nothing of what it was told
    drive(writer, lambda: taped(bus) == images(1) - {(obs_id(1), 0)})
    (bad,) = hops(bus, "base_tape", outcome="BadFile")
    assert bad["detector"] == 0
    assert key_of(1) not in view_tape(site, "base")[0].entries
    path.write_bytes(good)  # mended, and told anew
    arrive(site, bus, 1)
    drive(writer, lambda: taped(bus) == images(1))
    assert view_tape(site, "base")[0].entry(key_of(1)).sha256 == sha256_of(path)


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
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket with object lock: an S3 client's view of it."""
    import boto3

    monkeypatch.setenv("S3_ENDPOINT_URL", s3_server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, os.environ.get(name, "testing"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    client = boto3.client("s3", endpoint_url=s3_server)
    name = f"tapes-{uuid4().hex[:8]}"
    client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    yield Bucket(client, name)
    client.close()


class Bucket:
    def __init__(self, client: Any, name: str) -> None:
        self.client, self.name = client, name

    def keys(self) -> list[str]:
        """Every version of every object: a replaced one would be there twice."""
        found = self.client.list_object_versions(Bucket=self.name).get("Versions", [])
        return sorted(item["Key"] for item in found)

    def volumes(self) -> list[str]:
        return [key for key in self.keys() if key.endswith(".tar")]

    def site(self, site: Site, **settings: Any) -> Site:
        options = {"tape": f"s3://{self.name}/base", "tape_volume_mb": 0.1} | settings
        return with_place(site, "base", **options)


def test_a_bucket_gets_whole_locked_volumes_and_only_then_is_it_tape(
    site: Site, bus: Bus, bucket: Bucket, start: Callable[..., TapeWriter]
) -> None:
    far = bucket.site(site, tape_lock_days=365.0, tape_close_s=1e9)
    writer = start(far)
    arrive(far, bus, 1)
    drive(writer, lambda: len(taped(bus)) > 0)
    assert bucket.keys() == [f"base/base-000001.tar{end}" for end in ("", ".index.jsonl", ".volume.json")]
    head = bucket.client.head_object(Bucket=bucket.name, Key="base/base-000001.tar")
    assert head["ObjectLockMode"] == "COMPLIANCE"
    assert (head["ObjectLockRetainUntilDate"] - head["LastModified"]).days in (364, 365)
    with pytest.raises(bucket.client.exceptions.ClientError, match="AccessDenied"):
        bucket.client.delete_object(
            Bucket=bucket.name, Key="base/base-000001.tar", VersionId=head["VersionId"]
        )
    body = bucket.client.get_object(Bucket=bucket.name, Key="base/base-000001.tar")["Body"].read()
    index, shelf = view_tape(far, "base")
    assert sha256_of_bytes(body) == index.volumes["base-000001.tar"].sha256
    up = [entry for entry in index.entries.values() if entry.volume == "base-000001.tar"]
    assert len(taped(bus)) == sum(entry.key.endswith(".fits") for entry in up)
    assert not far.path("base/tape-open/base-000001.tar").exists()
    for entry in up:
        content = b"".join(shelf.blocks(entry.volume, entry.offset, entry.size))
        assert content == far.path(f"base/raw/{entry.key}").read_bytes()
    assert b"".join(shelf.blocks("base-000001.tar")) == body


def test_an_unfilled_volume_goes_up_when_its_time_has_come(
    site: Site, bus: Bus, bucket: Bucket, start: Callable[..., TapeWriter]
) -> None:
    far = bucket.site(site, tape_volume_mb=4096.0, tape_close_s=1e9)
    arrive(far, bus, 1)
    for _ in range(2):  # and once more after a restart: what only this machine has is not on tape
        writer = start(far)
        drive(writer, lambda: (site.path("base/tape-open/index.jsonl")).exists())
        writer.step(0.0)
        assert (taped(bus), bucket.keys()) == (set(), [])
        writer.close()
    far = bucket.site(site, tape_volume_mb=4096.0, tape_close_s=0.5)
    drive(start(far), lambda: taped(bus) == images(1))
    assert bucket.volumes() == ["base/base-000001.tar"]


def test_a_bucket_that_is_down_loses_nothing(
    site: Site, bus: Bus, bucket: Bucket, start: Callable[..., TapeWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    far = bucket.site(site, tape_close_s=0.5)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    up = os.environ["S3_ENDPOINT_URL"]
    monkeypatch.setenv("S3_ENDPOINT_URL", nobody)
    writer = start(far)
    for number in (1, 2):
        arrive(far, bus, number)
    drive(writer, lambda: alarms(bus) == [True])
    assert taped(bus) == set()
    writer.close()
    writer = start(far)  # killed and started again in the middle of it
    writer.step(0.0)
    assert (taped(bus), alarms(bus)) == (set(), [True])
    monkeypatch.setenv("S3_ENDPOINT_URL", up)
    drive(writer, lambda: taped(bus) == images(1, 2) and alarms(bus) == [True, False])
    assert bucket.volumes() == sorted(set(bucket.volumes()))  # each once


def test_an_object_with_another_content_is_never_replaced(
    site: Site, bus: Bus, bucket: Bucket, start: Callable[..., TapeWriter]
) -> None:
    far = bucket.site(site, tape_close_s=0.5)
    bucket.client.put_object(Bucket=bucket.name, Key="base/base-000001.tar", Body=b"somebody else's")
    writer = start(far)
    arrive(far, bus, 1)
    drive(writer, lambda: alarms(bus) == [True])
    assert "the first one is kept" in bus.latest("Storage.alarm", key="tape-base").fields["message"]
    kept = bucket.client.get_object(Bucket=bucket.name, Key="base/base-000001.tar")["Body"].read()
    assert kept == b"somebody else's"
    assert taped(bus) == set()


def test_a_new_machine_finds_its_tape_in_the_bucket(
    site: Site, bus: Bus, bucket: Bucket, start: Callable[..., TapeWriter], tmp_path: Path
) -> None:
    far = bucket.site(site, tape_close_s=0.5)
    arrive(far, bus, 1)
    writer = start(far)
    drive(writer, lambda: taped(bus) == images(1))
    writer.close()
    site.path("base/tape-open").rename(tmp_path / "burnt")
    site.path("base/taped").rename(tmp_path / "burnt too")
    tape = open_tape(far, "base", bus.clock)
    fits = {key for key in tape.index.entries if key.endswith(".fits")}
    assert fits == {key_of(1, name) for name in DETECTORS}
    assert tape.read(key_of(1)) == far.path(f"base/raw/{key_of(1)}").read_bytes()
    last = int(Path(bucket.volumes()[-1]).stem.rpartition("-")[2])
    assert tape._number == last + 1
    tape.close()
