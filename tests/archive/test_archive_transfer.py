"""Transfers that break and go on, blocks on the wire, images for workers, and files of several detectors."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_double import DETECTORS, hops, key_of, obs_id, running, say_written, until, write_image

from cumbre.archive.addresses import write_address
from cumbre.archive.certificates import Security
from cumbre.archive.client import ImageClient
from cumbre.archive.distributor import Distributor
from cumbre.archive.intake import RESUME_BYTES
from cumbre.archive.journal import Journal
from cumbre.archive.pairs import PairLock, relay_name
from cumbre.archive.protocol import Parcel, ProtocolError, send_frame
from cumbre.archive.replicator import Forwarder, Replicator
from cumbre.archive.sender import Sender
from cumbre.archive.wire import PACKED_BYTES, is_worth_it, packed, receive_packed
from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.errors import BadFileError, DeadlineError, TransientError
from cumbre.core.time import Clock
from cumbre.simulator.network import LinkProxy, control_link
from cumbre.stores.files import sha256_of, sha256_of_bytes

BIG = 6 << 20


# blocks on the wire


class Wire:
    """Bytes in pieces of any size."""

    def __init__(self, content: bytes, piece: int) -> None:
        self.content, self.piece, self.place = content, piece, 0

    def recv_into(self, buffer: memoryview) -> int:
        part = self.content[self.place : self.place + min(self.piece, len(buffer))]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)


@settings(deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=6),
    st.sampled_from(["blocks", "zstd"]), st.integers(1, 999), st.data(),
)  # fmt: skip
def test_blocks_come_back_and_damage_is_found_before_it_is_taken(
    blocks: list[bytes], encoding: str, piece: int, data: st.DataObject
) -> None:
    blocks = [block * data.draw(st.sampled_from([1, 50])) for block in blocks]
    size = sum(map(len, blocks))
    raw = b"".join(packed(blocks, encoding))
    got = bytearray()
    receive_packed(Wire(raw, piece), size, got.extend)
    assert bytes(got) == b"".join(blocks)
    place, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(raw)
    damaged[place] ^= 1 << bit
    good = bytearray()
    with contextlib.suppress(ProtocolError):
        receive_packed(Wire(bytes(damaged), piece), size, good.extend)
    # Whatever was taken is a true beginning of the file: a transfer may go on from there.
    assert b"".join(blocks).startswith(bytes(good))


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(1, 1 << 40))
def test_any_bytes_end_the_reader_of_blocks(content: bytes, size: int) -> None:
    taken = [0]
    with pytest.raises(ProtocolError):
        receive_packed(
            Wire(content, 50), size + 200, lambda block: taken.__setitem__(0, taken[0] + len(block))
        )
    assert taken[0] <= len(content) * PACKED_BYTES


def test_what_shrinks_is_compressed_and_what_does_not_is_not(tmp_path: Path) -> None:
    import fitsio

    rng = np.random.default_rng(1)
    pixels = rng.poisson(900, (1024, 1024)).astype(np.uint16)
    fitsio.write(tmp_path / "rice.fits", pixels, compress="rice", clobber=True)
    fitsio.write(tmp_path / "plain.fits", pixels, clobber=True)
    assert not is_worth_it((tmp_path / "rice.fits").read_bytes()[:PACKED_BYTES])
    assert is_worth_it((tmp_path / "plain.fits").read_bytes()[:PACKED_BYTES])


@pytest.mark.parametrize("secure", [True, False])
def test_a_compressed_transfer_is_verified_as_the_original(
    site: Site, bus: Bus, clock: Clock, tmp_path: Path, secure: bool
) -> None:
    if not secure:
        site.config.tls = None
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    content = np.random.default_rng(2).poisson(900, 1 << 20).astype(">u2").tobytes()
    path = tmp_path / "file"
    path.write_bytes(content)
    parcel = Parcel(key_of(1), len(content), sha256_of_bytes(content))
    with running(base):
        sender = Sender(
            base.address, timeout_s=10, security=Security.of(site, "summit"), target="base", compression="zstd"
        )  # fmt: skip
        assert sender.deliver(parcel, path, ask_first=False)["answer"] == "ok"
        assert sender.sent_bytes < 0.8 * len(content)
        sender.close()
    assert (site.path("base/raw") / parcel.key).read_bytes() == content


# transfers that go on


def big_image(site: Site, number: int = 1, size: int = BIG) -> tuple[Path, Parcel]:
    path = site.path(f"summit/raw/{key_of(number)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(number).randbytes(size))
    return path, Parcel(key_of(number), size, sha256_of(path))


def break_off(site: Site, base: Distributor, path: Path, parcel: Parcel, after: int) -> None:
    """Send the first bytes and cut the connection."""
    sender = Sender(base.address, timeout_s=10, security=Security.of(site, "summit"), target="base")
    send_frame(sender._connection, parcel.fields("put"))
    sender._connection.sendall(path.read_bytes()[:after])
    sender.close()


def parts(site: Site) -> list[Path]:
    return sorted(site.path("base/raw/.incoming").iterdir())


@pytest.mark.parametrize(("after", "resumed"), [(RESUME_BYTES // 2, False), (4 << 20, True)])
def test_a_big_file_goes_on_where_it_broke_off_and_a_small_part_is_not_kept(
    site: Site, bus: Bus, clock: Clock, after: int, resumed: bool
) -> None:
    path, parcel = big_image(site)
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    other = Distributor(site=site, bus=bus, clock=clock, place="base", pair=2)
    with running(base, other):
        break_off(site, base, path, parcel, after)
        until(lambda: bool(parts(site)) == resumed)
        if resumed:
            until(lambda: parts(site)[0].stat().st_size == after)
        # The next try may come over any pair.
        sender = Sender(other.address, timeout_s=10, security=Security.of(site, "summit"), target="base")
        assert sender.deliver(parcel, path, ask_first=True)["answer"] == "ok"
        assert sender.resumed_at == (after if resumed else 0)
        assert sender.sent_bytes == parcel.size - sender.resumed_at
        sender.close()
        until(lambda: len(hops(bus, "at_base")) == 1)
    assert sha256_of(site.path("base/raw") / parcel.key) == parcel.sha256
    assert parts(site) == []


def test_a_part_of_something_else_is_not_gone_on_with(site: Site, bus: Bus, clock: Clock) -> None:
    path, parcel = big_image(site)
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    with running(base):
        break_off(site, base, path, parcel, 4 << 20)
        until(lambda: bool(parts(site)) and parts(site)[0].stat().st_size == 4 << 20)
        with parts(site)[0].open("r+b") as stream:
            stream.seek(2 << 20)
            stream.write(b"damaged on disk")
        sender = Sender(base.address, timeout_s=10, security=Security.of(site, "summit"), target="base")
        assert sender.deliver(parcel, path, ask_first=True)["answer"] == "ok"
        assert sender.resumed_at == 0
        sender.close()
    assert sha256_of(site.path("base/raw") / parcel.key) == parcel.sha256


def test_parts_survive_a_restart_and_old_ones_go(site: Site, bus: Bus, clock: Clock) -> None:
    path, parcel = big_image(site)
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    with running(base):
        break_off(site, base, path, parcel, 3 << 20)
        until(lambda: bool(parts(site)) and parts(site)[0].stat().st_size == 3 << 20)
    again = Distributor(site=site, bus=bus, clock=clock, place="base")
    with running(again):
        assert len(parts(site)) == 1
    long_ago = time.time() - 2 * 86400
    os.utime(parts(site)[0], (long_ago, long_ago))
    with running(Distributor(site=site, bus=bus, clock=clock, place="base")):
        assert parts(site) == []


def test_over_a_flapping_link_a_big_file_arrives_without_ever_starting_again(
    site: Site, bus: Bus, clock: Clock
) -> None:
    """No up-time is long enough for the whole file: only by going on can it ever arrive."""
    size = 12 << 20
    big_image(site, size=size)
    control_link(site, "summit", "base", bandwidth_mbit_s=8)  # 6 MB/s on the fast clock: 2 s for the file
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    proxy = LinkProxy(site=site, bus=bus, clock=clock, source="summit", target="base")
    path = site.path(f"summit/raw/{key_of(1)}")
    say_written(bus, 1, 0, path)
    replicator = Replicator(site=site, bus=bus, clock=clock)
    with running(base, proxy, replicator):
        end = time.monotonic() + 90
        while not hops(bus, "at_base"):
            assert time.monotonic() < end
            control_link(site, "summit", "base", bandwidth_mbit_s=8)
            time.sleep(1.2)
            control_link(site, "summit", "base", down=True, bandwidth_mbit_s=8)
            time.sleep(0.3)
        resumed = base._receiver.intake.resumed_bytes
    assert resumed > 1 << 20
    assert sha256_of(site.path("base/raw") / key_of(1)) == sha256_of(path)


def test_two_pairs_with_the_same_file_at_once_make_one_copy(site: Site, bus: Bus, clock: Clock) -> None:
    path, parcel = big_image(site)
    bases = [Distributor(site=site, bus=bus, clock=clock, place="base", pair=pair) for pair in (1, 2)]
    answers: list[str] = []

    def send(base: Distributor) -> None:
        sender = Sender(base.address, timeout_s=20, security=Security.of(site, "summit"), target="base")
        answers.append(sender.deliver(parcel, path, ask_first=False)["answer"])
        sender.close()

    with running(*bases):
        threads = [threading.Thread(target=send, args=(base,)) for base in bases * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == ["ok"] * 4
    assert sha256_of(site.path("base/raw") / parcel.key) == parcel.sha256
    assert parts(site) == []


# several pairs without a control system


@pytest.fixture
def wide(site: Site) -> Site:
    for link in site.config.links:
        link.pairs = 3
    return site


def test_pairs_share_what_comes_and_each_file_goes_once(wide: Site, bus: Bus, clock: Clock) -> None:
    pairs = (1, 2, 3)
    made = {"site": wide, "bus": bus, "clock": clock}
    services = [Distributor(**made, place=place, pair=k) for place in ("base", "archive") for k in pairs]
    links = [LinkProxy(**made, source=s, target=t) for s, t in (("summit", "base"), ("base", "archive"))]
    senders = [kind(**made, pair=k) for kind in (Replicator, Forwarder) for k in pairs]
    with running(*services, *links, *senders):
        for number in range(1, 7):
            write_image(wide, bus, number)
        until(lambda: len(hops(bus, "at_archive")) == 24)
        until(lambda: not any(len(sender.buffer) for sender in senders))
        until(
            lambda: (
                {m.fields["name"] for m in bus.replay(["Replicator.heartbeat"])} == {s.name for s in senders}
            )
        )
    for hop in ("buffered", "at_base", "sent", "at_archive"):
        assert len({(h["obsId"], h["detector"]) for h in hops(bus, hop)}) == len(hops(bus, hop)) == 24
    taken = {distributor.name: distributor._receiver.received_bytes for distributor in services}
    assert all(taken.values()), taken


def test_files_of_a_pair_that_does_not_run_are_taken_over(wide: Site, bus: Bus, clock: Clock) -> None:
    held = PairLock(wide, relay_name("summit", 2))  # pair 2 runs, pair 3 does not
    for number in (1, 2, 3):
        for path in write_image(wide, bus, number, announce=False):
            os.utime(path, (time.time() - 600,) * 2)
    replicator = Replicator(site=wide, bus=bus, clock=clock, pair=1)
    until(lambda: replicator.step(0.05) == 0 and len(replicator.buffer) > 0)
    waiting = {path.name for path in wide.path("summit/buffer").rglob("*.fits")}
    assert len(waiting) == 8  # its own image and that of pair 3
    replicator.close()
    held.close()
    assert not PairLock.is_held(wide, relay_name("summit", 2))


MARKS = """
import sys
from pathlib import Path
from cumbre.archive.journal import Journal
journal = Journal(Path(sys.argv[1]))
for n in range(1, 400):
    key = f"DemoCam/20261120/XC_O_20261120_{n:06d}/XC_O_20261120_{n:06d}_R00_S00.fits"
    journal.note(key, sys.argv[2])
"""


def test_a_journal_of_several_processes_and_a_torn_line(tmp_path: Path) -> None:
    reader = Journal(tmp_path)
    assert not reader.has(key_of(1), "a")
    (tmp_path / "20261120.jsonl").write_bytes(b'["torn')
    writers = [subprocess.Popen([sys.executable, "-c", MARKS, str(tmp_path), mark]) for mark in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    for n in range(1, 400):
        assert reader.marks(key_of(n)) == {"a", "b", "c"}
    assert Journal(tmp_path).marks(key_of(7)) == {"a", "b", "c"}


# workers


@pytest.fixture
def archive(site: Site, bus: Bus, clock: Clock) -> Distributor:
    return Distributor(site=site, bus=bus, clock=clock, place="archive")


def test_a_worker_waits_for_its_image_and_gets_its_telemetry(
    site: Site, bus: Bus, clock: Clock, archive: Distributor, tmp_path: Path
) -> None:
    base_raw = site.path("base/raw")
    header = {"obs_id": obs_id(1), "keywords": {"SEEING": [0.7, "DIMM"]}}
    sender_site = Security.of(site, "base")
    files = {f"{Path(key_of(1)).parent}/{obs_id(1)}_header.json": json.dumps(header).encode()}
    files |= {key_of(1, name): bytes([n]) * 200_000 for n, name in enumerate(DETECTORS)}

    def later() -> None:
        time.sleep(0.4)
        sender = Sender(archive.address, timeout_s=10, security=sender_site, target="archive")
        for key, content in files.items():
            (base_raw / key).parent.mkdir(parents=True, exist_ok=True)
            (base_raw / key).write_bytes(content)
            parcel = Parcel(key, len(content), sha256_of_bytes(content))
            sender.deliver(parcel, base_raw / key, ask_first=False)
        sender.close()

    with running(archive):
        client = ImageClient(site, "archive")
        thread = threading.Thread(target=later)
        begin = time.monotonic()
        thread.start()
        got = client.get("DemoCam", obs_id(1), "R00_S10", folder=tmp_path, wait_s=10)
        thread.join()
        assert time.monotonic() - begin >= 0.4
        assert got.path.read_bytes() == files[key_of(1, "R00_S10")]
        assert (got.key, got.telemetry) == (key_of(1, "R00_S10"), header)
        begin = time.monotonic()
        with pytest.raises(DeadlineError, match="not here"):
            client.get("DemoCam", obs_id(2), "R00_S10", folder=tmp_path, wait_s=0.5)
        assert time.monotonic() - begin > 0.4
        for wrong in ("../../x", "R00*", "[a-z]*"):
            with pytest.raises(BadFileError):
                client.get("DemoCam", obs_id(1), wrong, folder=tmp_path, wait_s=1)
        # Bytes that are no longer those that came are not given out as good.
        (site.path("archive/raw") / key_of(1, "R00_S11")).write_bytes(b"rotten" * 1000)
        with pytest.raises(BadFileError, match="damaged"):
            client.get("DemoCam", obs_id(1), "R00_S11", folder=tmp_path, wait_s=1)
    assert sorted(path.name for path in tmp_path.glob("*.fits")) == [f"{obs_id(1)}_R00_S10.fits"]


def test_workers_may_ask_and_nobody_else(site: Site, archive: Distributor, tmp_path: Path) -> None:
    with running(archive):
        client = ImageClient(site, "archive")
        client._security = Security.of(site, "base")  # may put, not ask
        with pytest.raises(BadFileError, match="not for you"):
            client.get("DemoCam", obs_id(1), "R00_S00", folder=tmp_path, wait_s=1)
    with pytest.raises(TransientError):
        ImageClient(site, "archive").get("DemoCam", obs_id(1), "R00_S00", folder=tmp_path, wait_s=1)


# several detectors in one file


def multi_detector_file(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    from astropy.io import fits

    rng = np.random.default_rng(3)
    planes = {name: rng.integers(0, 60000, (2, 60, 70)).astype(np.uint16) for name in names}
    primary = fits.PrimaryHDU()
    primary.header["OBSID"], primary.header["EXPTIME"] = obs_id(1), 30.0
    hdus = fits.HDUList([primary])
    for amplifier in range(2):  # interleaved, as a read-out would be
        for name, plane in planes.items():
            hdu = fits.CompImageHDU(plane[amplifier], compression_type="RICE_1", name=f"Segment0{amplifier}")
            hdu.header["CHIPID"] = name
            hdus.append(hdu)
    path.parent.mkdir(parents=True, exist_ok=True)
    hdus.writeto(path, checksum=True)
    return planes


def test_a_file_of_a_whole_raft_is_split(site: Site, bus: Bus, clock: Clock, archive: Distributor) -> None:
    import fitsio

    path = site.path(f"summit/raw/{key_of(1, 'R00')}")
    planes = multi_detector_file(path, DETECTORS)
    os.utime(path, (time.time() - 60,) * 2)
    services = [
        archive, Distributor(site=site, bus=bus, clock=clock, place="base"),
        LinkProxy(site=site, bus=bus, clock=clock, source="summit", target="base"),
        LinkProxy(site=site, bus=bus, clock=clock, source="base", target="archive"),
        Replicator(site=site, bus=bus, clock=clock), Forwarder(site=site, bus=bus, clock=clock),
    ]  # fmt: skip
    with running(*services):
        until(lambda: len(hops(bus, "at_archive")) == 4, 30)
    for hop in hops(bus, "at_archive"):
        piece = Path(hop["path"])
        assert hop["checksum"] == sha256_of(piece)
        with fitsio.FITS(piece) as opened:
            assert [hdu.get_extname() for hdu in opened][1:] == ["SEGMENT00", "SEGMENT01"]
            header = opened[0].read_header()
            assert (header["CHIPID"], header["DETECTOR"]) == (hop["detectorName"], hop["detector"])
            assert (header["OBSID"].strip(), header["EXPTIME"]) == (obs_id(1), 30.0)
            for amplifier in range(2):
                np.testing.assert_array_equal(
                    opened[amplifier + 1].read(), planes[hop["detectorName"]][amplifier]
                )
                opened[amplifier + 1].verify_checksum()
    # The original is kept as it came.
    assert sha256_of(site.path(f"base/raw/{key_of(1, 'R00')}")) == sha256_of(path)


@pytest.mark.parametrize("name", ["../../../tmp/x", "R99_S00", ""])
def test_a_header_with_a_path_or_a_foreign_detector_makes_no_file(
    site: Site, bus: Bus, clock: Clock, name: str
) -> None:
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    path = site.path(f"summit/raw/{key_of(1, 'R00')}")
    multi_detector_file(path, ("R00_S00", name))
    before = {item for item in site.root.rglob("*") if item.is_file()}
    with running(base):
        sender = Sender(base.address, timeout_s=10, security=Security.of(site, "summit"), target="base")
        parcel = Parcel(key_of(1, "R00"), path.stat().st_size, sha256_of(path))
        assert sender.deliver(parcel, path, ask_first=False)["answer"] == "ok"
        sender.close()
        until(lambda: len(hops(bus, "quarantined", outcome="BadFile")) == 1)
    new = {item.name for item in site.root.rglob("*.fits") if item not in before}
    assert new == {f"{obs_id(1)}_R00.fits"}
    assert hops(bus, "at_base") == []
    assert [m.fields["reason"] for m in bus.replay(["Replicator.refusal"])] == ["bad-content"]


def test_addresses_of_distributors_elsewhere(site: Site, tmp_path: Path) -> None:
    from cumbre.archive.addresses import route

    site.config.simulator = None
    write_address(site, "base-1", ("127.0.0.1", 7001))
    assert route(site, "summit", "base") == ("127.0.0.1", 7001)
    site.config.links[0].addresses = ["dc1.example.org:7001", "dc1.example.org:7002"]
    assert route(site, "summit", "base", 2) == ("dc1.example.org", 7002)
