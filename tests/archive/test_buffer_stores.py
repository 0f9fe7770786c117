"""The outage buffer: two stores of which either may die, a limit that is told, drops that are policy and recorded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transfer_double import DETECTORS, hops, key_of, obs_id, running, until, write_image

from cumbre.archive.buffer import OutageBuffer, Watch, open_buffer
from cumbre.archive.distributor import Distributor
from cumbre.archive.protocol import Parcel
from cumbre.archive.replicator import Replicator
from cumbre.bus import Bus
from cumbre.capture.hops import Piece
from cumbre.core.configuration import Site, parse_site
from cumbre.core.errors import BadFileError, ConfigurationError, NotFoundError, TransientError
from cumbre.core.time import Clock
from cumbre.ledger import Ledger, LedgerService
from cumbre.simulator.network import LinkProxy
from cumbre.stores.files import sha256_of
from cumbre.stores.postgres import Database

SIZE = 10_000


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    """Two disks, each with the buffer's folder of one pair."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return [tmp_path / name / "pair-1" for name in ("a", "b")]


class Filler:
    """Files that somebody wants to be kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, buffer: OutageBuffer, number: int, *, name: str = DETECTORS[0], size: int = SIZE) -> str:
        key = key_of(number, name)
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * size)
        piece = Piece(obs_id(number), "DemoCam", "", DETECTORS.index(name), name)
        assert buffer.add(Parcel(key, size, sha256_of(path)), piece, path, 0.0)
        return key


@pytest.fixture
def raw(tmp_path: Path) -> Filler:
    return Filler(tmp_path / "raw")


def opened(disks: list[Path], **options: Any) -> OutageBuffer:
    return OutageBuffer(disks, heal_every_s=1e9, **options)


def taken(buffer: OutageBuffer) -> list[str]:
    found = []
    while entry := buffer.take(time.monotonic()):
        found.append(entry.parcel.key)
    return found


def test_both_stores_have_bytes_of_their_own(disks: list[Path], raw: Filler) -> None:
    buffer = opened(disks)
    key = raw.add(buffer, 1)
    copies = [disk / "data" / key for disk in disks]
    assert [copy.read_bytes() for copy in copies] == [bytes([1]) * SIZE] * 2
    assert copies[0].stat().st_ino != copies[1].stat().st_ino
    entry = buffer.take(0.0)
    assert entry is not None
    buffer.remove(entry)
    assert not [path for disk in disks for path in disk.rglob("*.fits*")]
    assert len(opened(disks)) == 0


@pytest.mark.parametrize("dead", [0, 1])
def test_either_store_may_be_lost_for_ever(disks: list[Path], raw: Filler, dead: int) -> None:
    buffer = opened(disks)
    first = raw.add(buffer, 1)
    disks[dead].parent.rename(disks[dead].parent.with_name("dead"))
    second = raw.add(buffer, 2)
    shutil.rmtree(raw.folder)  # the buffer alone must hold them
    for each in (buffer, opened(disks)):
        assert len(each) == 2
        for key in (first, second):
            assert each.data_path(key).is_file()
    assert taken(buffer) == [first, second]
    assert not disks[dead].parent.exists()  # nothing was written where the disk should be


@pytest.mark.parametrize("again", ["the same disk", "a new disk"])
def test_a_store_that_comes_back_is_filled_and_brings_nothing_old(
    disks: list[Path], raw: Filler, again: str
) -> None:
    buffer = opened(disks)
    old, kept = raw.add(buffer, 1), raw.add(buffer, 2)
    disk = disks[1].parent
    away = disk.with_name("away")
    disk.rename(away)
    new = raw.add(buffer, 3)
    entry = buffer.take(0.0)
    assert entry is not None
    assert entry.parcel.key == old
    buffer.remove(entry)  # delivered while one store did not hear of it
    buffer.heal()
    assert not disk.exists()
    away.rename(disk) if again == "the same disk" else disk.mkdir()
    buffer.heal()
    for key in (kept, new):
        assert (disks[1] / "data" / key).read_bytes() == (raw.folder / key).read_bytes()
    assert not (disks[1] / "data" / old).exists()
    shutil.rmtree(disks[0].parent)
    assert sorted(taken(opened(disks))) == [kept, new]


def test_it_heals_by_itself(disks: list[Path], raw: Filler) -> None:
    buffer = OutageBuffer(disks, heal_every_s=0.05)
    disk = disks[0].parent
    disk.rename(disk.with_name("away"))
    key = raw.add(buffer, 1)
    disk.mkdir()
    until(lambda: (disks[0] / "entries").is_dir() and (disks[0] / "data" / key).is_file())


def test_reads_come_from_the_copy_that_verifies(disks: list[Path], raw: Filler) -> None:
    buffer = opened(disks)
    key = raw.add(buffer, 1)
    (raw.folder / key).unlink()
    (disks[0] / "data" / key).unlink()
    (disks[0] / "data" / key).write_bytes(b"rot")
    entry = buffer.take(0.0)
    assert entry is not None
    assert buffer.repair(entry)
    for disk in disks:
        assert (disk / "data" / key).read_bytes() == bytes([1]) * SIZE
    for disk in disks:
        (disk / "data" / key).write_bytes(b"rot")
    assert not buffer.repair(entry)


def test_bad_and_absent_sources_blame_no_store(disks: list[Path], raw: Filler) -> None:
    buffer = opened(disks)
    path = raw.folder / key_of(1)
    piece = Piece(obs_id(1), "DemoCam", "", 0, DETECTORS[0])
    with pytest.raises(NotFoundError):
        buffer.add(Parcel(key_of(1), 3, "sha256:" + "0" * 64), piece, path, 0.0)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"abc")
    with pytest.raises(BadFileError):
        buffer.add(Parcel(key_of(1), 3, "sha256:" + "0" * 64), piece, path, 0.0)
    assert len(buffer) == 0
    assert all(not store.failed for store in buffer._stores)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_one_full_disk_leaves_the_other(disks: list[Path], raw: Filler, small_disk: Path) -> None:
    stores = [disks[0], small_disk / "pair-1"]
    buffer = opened(stores)
    keys = [raw.add(buffer, number) for number in range(1, 11)]
    shutil.rmtree(raw.folder)
    assert [store.failed for store in buffer._stores] == [False, True]
    assert all(buffer.data_path(key).read_bytes() for key in keys)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    buffer.heal()
    assert not buffer._stores[1].failed
    assert all((small_disk / "pair-1/data" / key).is_file() for key in keys)


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_buffer_stores import Filler
from cumbre.archive.buffer import OutageBuffer
import cumbre.archive.buffer_store as module
folder = Path(sys.argv[1])
buffer = OutageBuffer([folder / "a/pair-1", folder / "b/pair-1"], heal_every_s=1e9)
raw = Filler(folder / "raw")
raw.add(buffer, 1)
write, left = module.write_atomic, [int(sys.argv[3])]
def dying(*given):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), 9)
    return write(*given)
module.write_atomic = dying
raw.add(buffer, 2)
"""


@pytest.mark.parametrize("moment", [1, 2])
def test_a_kill_between_the_two_stores(disks: list[Path], tmp_path: Path, moment: int) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent), str(moment)]
    assert subprocess.run(words, check=False).returncode == -9
    buffer = opened(disks)
    assert len(buffer) == moment  # with its entry on one store the file is owed, before that it is found anew
    buffer.heal()
    for disk in disks:
        assert len(list((disk / "entries").iterdir())) == moment
    assert taken(buffer) == [key_of(number) for number in range(1, moment + 1)]


# limits


class Said:
    """Stands where the bus stands: what alarms were told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bool, int]] = []

    def alarm(self, what: str) -> Any:
        from cumbre.archive.alarms import Alarm

        said = self

        class Bus:
            clock = Clock.real()

            @staticmethod
            def latest(*_: Any, **__: Any) -> None:
                return None

            @staticmethod
            def publish(_: str, fields: dict[str, Any]) -> None:
                said.told.append((fields["name"], fields["active"], fields["severity"]))

        return Alarm(Bus(), what, "summit")  # type: ignore[arg-type]


def test_alarms_come_before_it_is_full_and_nothing_is_lost_when_it_is(tmp_path: Path, raw: Filler) -> None:
    said = Said()
    buffer = OutageBuffer(tmp_path / "one", limit_bytes=20 * SIZE, watch=Watch(alarm=said.alarm))
    for number in range(1, 16):
        raw.add(buffer, number)
    assert said.told == []
    raw.add(buffer, 16)
    assert said.told == [("full", True, 1)]
    for number in range(17, 21):
        raw.add(buffer, number)
    assert said.told == [("full", True, 1), ("full", True, 2)]
    with pytest.raises(TransientError, match="full"):
        raw.add(buffer, 21)
    assert said.told[-1] == ("full", True, 3)
    assert len(buffer) == 20
    assert (raw.folder / key_of(21)).is_file()  # where it was written, and found again
    for _ in range(6):
        entry = buffer.take(0.0)
        assert entry is not None
        buffer.remove(entry)
    assert said.told[-1] == ("full", False, 3)
    raw.add(buffer, 22)
    assert OutageBuffer(tmp_path / "one").used_bytes == buffer.used_bytes == 15 * SIZE


def in_camera(site: Site, number: int, image_type: str) -> None:
    folder = site.path(f"summit/daq/{obs_id(number)}")
    folder.mkdir(parents=True)
    checksums = {}
    for name in DETECTORS:
        np.save(folder / f"{name}.npy", np.full(5, number, np.uint16))
        checksums[name] = sha256_of(folder / f"{name}.npy")
    info = {
        "obs_id": obs_id(number), "instrument": "DemoCam", "detectors": list(DETECTORS),
        "image_type": image_type, "sha256": checksums,
    }  # fmt: skip
    (folder / "exposure.json").write_text(json.dumps(info))


def test_only_calibrations_that_the_camera_holds_are_dropped_and_each_is_recorded(
    site: Site, bus: Bus, clock: Clock, raw: Filler, database: Database
) -> None:
    settings = site.config.places["summit"].model_copy(update={"buffer_gb": 4 * SIZE / 1e9})
    places = site.config.places | {"summit": settings}
    buffer = open_buffer(
        site=Site(site.root, site.config.model_copy(update={"places": places})),
        bus=bus,
        clock=clock,
        place="summit",
    )
    for number, kind in ((1, "BIAS"), (2, "OBJECT"), (3, "FLAT"), (4, "DARK"), (5, "OBJECT"), (6, "OBJECT")):
        in_camera(site, number, kind)
    (site.path(f"summit/daq/{obs_id(3)}") / "R00_S00.npy").write_bytes(b"rot")  # the camera has lost the flat
    keys = {number: raw.add(buffer, number) for number in (1, 2, 3, 4)}
    in_camera(site, 7, "BIAS")
    with pytest.raises(TransientError, match="full"):
        raw.add(buffer, 7)  # what could itself be dropped pushes nothing out
    raw.add(buffer, 5)
    raw.add(buffer, 6)
    with pytest.raises(TransientError, match="full"):
        raw.add(buffer, 8)
    assert keys[1] not in buffer
    assert keys[4] not in buffer
    assert keys[2] in buffer
    assert keys[3] in buffer
    told = hops(bus, "dropped")
    assert [(hop["obsId"], hop["detector"]) for hop in told] == [(obs_id(1), 0), (obs_id(4), 0)]
    assert all("camera's store holds it" in hop["message"] for hop in told)
    ledger = LedgerService(site=site, bus=bus, db=database)
    while ledger.step(0.05):
        pass
    assert [row["hop"] for row in Ledger(database).where(obs_id(1))] == ["dropped"]
    ledger.close()


def test_a_dropped_copy_proves_nothing_any_more(
    site: Site, bus: Bus, clock: Clock, database: Database
) -> None:
    common = {
        "obsId": obs_id(1), "instrument": "DemoCam", "exposureId": 2026112000001, "detector": 0,
        "detectorName": DETECTORS[0], "place": "summit", "path": "/buffer/x", "checksum": "sha256:" + "1" * 64,
    }  # fmt: skip
    bus.publish("Image.hop", common | {"hop": "buffered", "hopTai": 100.0})
    bus.publish("Image.hop", common | {"hop": "at_base", "place": "base", "hopTai": 100.0})
    service = LedgerService(site=site, bus=bus, db=database)
    while service.step(0.05):
        pass
    ledger = Ledger(database)
    assert ledger.may_delete(obs_id(1), 0, ["summit", "base"])
    bus.publish("Image.hop", common | {"hop": "dropped", "hopTai": 101.0})
    while service.step(0.05):
        pass
    assert not ledger.may_delete(obs_id(1), 0, ["summit", "base"])
    service.close()


def test_a_replicator_goes_on_with_one_dead_store(site: Site, bus: Bus, clock: Clock, tmp_path: Path) -> None:
    path = site.path("site.yaml")
    second = tmp_path / "second"
    second.mkdir()
    path.write_text(path.read_text().replace("buffer: summit/buffer", f"buffer: [summit/buffer, {second}]"))
    site = Site.load(site.root)
    replicator = Replicator(site=site, bus=bus, clock=clock)
    write_image(site, bus, 1)
    until(lambda: replicator.step(0.05) > 0 and len(replicator.buffer) == 5)
    shutil.rmtree(site.path("summit/buffer"))  # the disk dies in the outage
    write_image(site, bus, 2)
    until(lambda: bool(replicator.step(0.05) or True) and len(replicator.buffer) == 10)
    alarm = bus.latest("Storage.alarm", key="buffer-summit-1-store-1")
    assert alarm is not None
    assert alarm.fields["active"]
    shutil.rmtree(site.path("summit/raw"))  # and the raw files with it
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    proxy = LinkProxy(site=site, bus=bus, clock=clock, source="summit", target="base")
    with running(base, proxy, replicator):
        until(lambda: len(hops(bus, "at_base")) == 8)
        until(lambda: len(replicator.buffer) == 0)
    assert not list((second / "pair-1/entries").iterdir())


@pytest.mark.parametrize("value", ["[a, a]", "[a, b, c]"])
def test_a_buffer_has_one_folder_or_two_different_ones(value: str) -> None:
    text = (
        "observatory: {latitude_deg: -30, longitude_deg: -70}\ninstruments: [democam]\n"
        f"places: {{summit: {{raw: raw, buffer: {value}}}}}\n"
    )
    with pytest.raises(ConfigurationError, match="one folder or two different"):
        parse_site(text, "test")
