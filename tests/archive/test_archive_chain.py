"""Summit → base → archive over real connections: nothing is lost, whatever dies, breaks or is cut."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from transfer_double import (
    DETECTORS,
    hops,
    key_of,
    obs_id,
    running,
    say_written,
    until,
    write_image,
)

from cumbre.archive.addresses import read_address, write_address
from cumbre.archive.distributor import Distributor
from cumbre.archive.replicator import Forwarder, Replicator
from cumbre.archive.tape_writer import TapeWriter
from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.time import Clock
from cumbre.simulator.network import LinkProxy, control_link
from cumbre.stores.files import sha256_of


def stored(site: Site, place: str) -> set[str]:
    root = site.path(f"{place}/raw")
    return {str(path.relative_to(root)) for path in root.rglob("*.fits")}


def keys(numbers: range) -> set[str]:
    return {key_of(number, name) for number in numbers for name in DETECTORS}


def make_chain(site: Site, bus: Bus, clock: Clock) -> list[object]:
    return [
        Distributor(site=site, bus=bus, clock=clock, place="archive"),
        Distributor(site=site, bus=bus, clock=clock, place="base"),
        TapeWriter(site=site, bus=bus, clock=clock, place="archive"),
        TapeWriter(site=site, bus=bus, clock=clock, place="base"),
        LinkProxy(site=site, bus=bus, clock=clock, source="summit", target="base"),
        LinkProxy(site=site, bus=bus, clock=clock, source="base", target="archive"),
        Replicator(site=site, bus=bus, clock=clock),
        Forwarder(site=site, bus=bus, clock=clock),
    ]


def test_every_file_reaches_both_caches_and_both_tapes(site: Site, bus: Bus, clock: Clock) -> None:
    for number in (1, 2, 3):
        write_image(site, bus, number)
    with running(*make_chain(site, bus, clock)):
        until(lambda: len(hops(bus, "archive_tape")) == 12 and len(hops(bus, "sent")) == 12)
        until(lambda: not list(site.path("summit/buffer").rglob("entries/*")))
        until(lambda: not list(site.path("base/buffer").rglob("entries/*")))
        manifest = key_of(1).replace("_R00_S00.fits", "_expectedSensors.json")
        until(lambda: site.path(f"archive/raw/{manifest}").is_file())
    for place in ("base", "archive"):
        assert stored(site, place) == keys(range(1, 4))
        told = hops(bus, f"at_{place}")
        assert {(hop["obsId"], hop["detector"]) for hop in told} == {
            (obs_id(n), d) for n in (1, 2, 3) for d in range(4)
        }
        for hop in told:
            original = site.path(f"summit/raw/{key_of(hop['exposureId'] % 100000, hop['detectorName'])}")
            assert Path(hop["path"]).is_absolute()
            assert sha256_of(Path(hop["path"])) == sha256_of(original) == hop["checksum"]
            assert hop["groupId"] == f"group {hop['exposureId'] % 100000}"
        with tarfile.open(site.path(f"{place}/tape/{place}-000001.tar")) as tape:
            assert keys(range(1, 4)) <= set(tape.getnames())
    assert len(hops(bus, "buffered")) == 12
    assert [m.fields for m in bus.replay(["Image.hop"]) if m.fields["outcome"] != "ok"] == []


def test_an_outage_is_buffered_and_emptied_oldest_first(site: Site, bus: Bus, clock: Clock) -> None:
    control_link(site, "summit", "base", down=True)
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    proxy = LinkProxy(site=site, bus=bus, clock=clock, source="summit", target="base")
    replicator = Replicator(site=site, bus=bus, clock=clock)
    with running(base, proxy, replicator):
        for number in (5, 3, 4, 1, 2):
            write_image(site, bus, number)
        until(lambda: len(hops(bus, "buffered")) == 20)
        assert hops(bus, "at_base") == []
        assert len(replicator.buffer) >= 20
        control_link(site, "summit", "base", down=False)
        until(lambda: len(hops(bus, "at_base")) == 20)
        until(lambda: len(replicator.buffer) == 0)
    arrived = [hop["exposureId"] for hop in hops(bus, "at_base")]
    # Two connections run side by side: neighbours may overtake each other, images as a whole may not.
    assert all(later >= earlier - 1 for earlier, later in pairwise(arrived))
    assert arrived[0] == 2026112000001
    assert arrived[-1] == 2026112000005


def test_an_outage_in_the_middle_of_a_transfer(site: Site, bus: Bus, clock: Clock) -> None:
    control_link(site, "summit", "base", latency_ms=20, bandwidth_mbit_s=4)  # 3 MB/s on the fast clock
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    proxy = LinkProxy(site=site, bus=bus, clock=clock, source="summit", target="base")
    with running(base, proxy, Replicator(site=site, bus=bus, clock=clock)):
        write_image(site, bus, 1, size=400_000)
        until(lambda: any(site.path("base/raw/.incoming").iterdir()))
        control_link(site, "summit", "base", down=True)
        until(lambda: bool(hops(bus, "transmitted", outcome="Transient")))
        until(lambda: not any(site.path("base/raw/.incoming").iterdir()))
        control_link(site, "summit", "base", down=False)
        until(lambda: stored(site, "base") == keys(range(1, 2)))


class Vandal:
    """A link that damages one byte in the middle of the first few transfers."""

    def __init__(self, target: tuple[str, int], times: int) -> None:
        self.target, self.times = target, times
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            threading.Thread(target=self.pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self.pump, args=(far, near, False), daemon=True).start()

    def pump(self, taken: socket.socket, given: socket.socket, damage: bool) -> None:
        try:
            while chunk := taken.recv(65536):
                if damage and self.times and len(chunk) > 12_000:
                    self.times -= 1
                    chunk = chunk[:10_000] + bytes([chunk[10_000] ^ 255]) + chunk[10_001:]
                given.sendall(chunk)
        except OSError:
            pass
        finally:
            given.close()


@pytest.mark.parametrize(("secure", "words"), [(True, "BAD_RECORD_MAC"), (False, "corrupt")])
def test_corrupted_bytes_on_the_wire_are_sent_again(
    site: Site, bus: Bus, clock: Clock, secure: bool, words: str
) -> None:
    if not secure:
        site.config.tls = None
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    vandal = Vandal(base.address, 2)
    write_address(site, "wan-summit-base-1", vandal.listener.getsockname())
    paths = write_image(site, bus, 1)
    with running(base, Replicator(site=site, bus=bus, clock=clock)):
        until(lambda: stored(site, "base") == keys(range(1, 2)))
        until(lambda: len(hops(bus, "at_base")) >= 4)
    vandal.listener.close()
    assert vandal.times == 0
    for path in paths:
        assert sha256_of(site.path("base/raw") / path.relative_to(site.path("summit/raw"))) == sha256_of(path)
    assert words in str([hop["message"] for hop in hops(bus, "transmitted", outcome="Transient")])


def test_damage_in_the_buffer_is_repaired_or_quarantined(site: Site, bus: Bus, clock: Clock) -> None:
    first = Replicator(site=site, bus=bus, clock=clock)
    write_image(site, bus, 1)
    until(lambda: first.step(0.05) > 0 and len(first.buffer) == 5)
    first.close()
    copy = site.path(f"summit/buffer/pair-1/data/{key_of(1, 'R00_S00')}")
    copy.unlink()  # a hard link: the source must stay whole here
    copy.write_bytes(b"rubbish")
    both = site.path(f"summit/buffer/pair-1/data/{key_of(1, 'R00_S01')}")
    both.write_bytes(b"rubbish too")
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    proxy = LinkProxy(site=site, bus=bus, clock=clock, source="summit", target="base")
    again = Replicator(site=site, bus=bus, clock=clock)
    with running(base, proxy, again):
        until(lambda: len(again.buffer) == 0)
    assert stored(site, "base") == keys(range(1, 2)) - {key_of(1, "R00_S01")}
    (bad,) = hops(bus, "quarantined", outcome="BadFile")
    assert bad["detector"] == 1
    assert Path(bad["path"]).read_bytes() == b"rubbish too"


def test_other_content_under_a_known_key(site: Site, bus: Bus, clock: Clock) -> None:
    taken = site.path(f"base/raw/{key_of(1)}")
    taken.parent.mkdir(parents=True)
    taken.write_bytes(b"the first")
    write_image(site, bus, 1)
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    proxy = LinkProxy(site=site, bus=bus, clock=clock, source="summit", target="base")
    replicator = Replicator(site=site, bus=bus, clock=clock)
    tape = TapeWriter(site=site, bus=bus, clock=clock, place="base")
    with running(base, tape, proxy, replicator):
        until(lambda: len(hops(bus, "base_tape")) == 4 and len(replicator.buffer) == 0)
        until(
            lambda: {h["place"] for h in hops(bus, "quarantined", outcome="Conflict")} == {"base", "summit"}
        )
    assert taken.read_bytes() == b"the first"


def test_hops_that_make_no_sense_are_survived(site: Site, bus: Bus, clock: Clock) -> None:
    paths = write_image(site, bus, 1, announce=False)
    outside = site.root / "secret.fits"
    outside.write_bytes(b"x")
    say_written(bus, 1, 0, outside)
    say_written(bus, 1, 1, paths[1], path=str(site.path("summit/raw/../../secret.fits")))
    say_written(bus, 1, 2, paths[2], checksum="sha256:" + "0" * 64)
    say_written(bus, 1, 3, paths[3], path=str(paths[3]) + ".gone")
    say_written(bus, 1, 3, paths[3])
    replicator = Replicator(site=site, bus=bus, clock=clock, scan_every_s=1e9)
    replicator._next_scan = time.monotonic() + 1e9
    until(lambda: replicator.step(0.05) == 0)
    assert key_of(1, "R00_S11") in replicator.buffer
    assert [hop["outcome"] for hop in hops(bus, "buffered", outcome=None)].count("BadFile") >= 2
    replicator.close()


SERVICE = """
import os, sys
from pathlib import Path
from cumbre.bus import open_bus
from cumbre.core.configuration import Site
from cumbre.core.time import Clock
site = Site.load(Path(sys.argv[1])); clock = Clock.load(site.clock_path)
bus = open_bus(f"sqlite:///{site.root}/bus/bus.db", identity="base", clock=clock)
die = sys.argv[2]
if die == "tape":
    from cumbre.archive.tape_writer import TapeWriter
    service = TapeWriter(site=site, bus=bus, clock=clock, place="base")
    tape = service._mounted()
    sync = tape.sync
    def dying():
        if len(tape) and tape._unsynced:
            os.kill(os.getpid(), 9)  # the volume has grown, the index does not know it
        return sync()
    tape.sync = dying
else:
    from cumbre.archive.distributor import Distributor
    import cumbre.archive.distributor as module
    service = Distributor(site=site, bus=bus, clock=clock, place="base")
    if die == "hop":
        module.publish_hops = lambda *_: os.kill(os.getpid(), 9)
while True:
    service.step(0.1)
"""


@pytest.mark.parametrize("moment", ["hop", "tape", "any"])
def test_a_killed_distributor_or_tape_writer_goes_on(site: Site, bus: Bus, clock: Clock, moment: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", SERVICE, str(site.root), moment])
    proxy = LinkProxy(site=site, bus=bus, clock=clock, source="summit", target="base")
    replicator = Replicator(site=site, bus=bus, clock=clock)
    base = [Distributor(site=site, bus=bus, clock=clock, place="base")] if moment == "tape" else []
    with running(proxy, replicator, *base):
        until(lambda: site.path("run/base-1.addr").is_file())
        for number in range(1, 7):
            write_image(site, bus, number, size=200_000)
        if moment == "any":
            until(lambda: len(hops(bus, "at_base")) >= 3)
            process.send_signal(signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
        again = [TapeWriter(site=site, bus=bus, clock=clock, place="base")]
        if not base:
            again.append(Distributor(site=site, bus=bus, clock=clock, place="base"))
        with running(*again):
            until(lambda: len({(h["obsId"], h["detector"]) for h in hops(bus, "base_tape")}) == 24)
            until(lambda: len({(h["obsId"], h["detector"]) for h in hops(bus, "at_base")}) == 24)
            until(lambda: len(replicator.buffer) == 0)
    assert stored(site, "base") == keys(range(1, 7))
    with tarfile.open(site.path("base/tape/base-000001.tar")) as tape:
        names = tape.getnames()
    assert sorted(name for name in names if name.endswith(".fits")) == sorted(keys(range(1, 7)))


def test_a_killed_replicator_goes_on(site: Site, bus: Bus, clock: Clock) -> None:
    script = SERVICE.partition("die = ")[0] + (
        "from cumbre.archive.replicator import Replicator\n"
        "relay = Replicator(site=site, bus=bus, clock=clock)\n"
        "while True:\n    relay.step(0.1)\n"
    )
    control_link(site, "summit", "base", bandwidth_mbit_s=4)
    base = Distributor(site=site, bus=bus, clock=clock, place="base")
    proxy = LinkProxy(site=site, bus=bus, clock=clock, source="summit", target="base")
    process = subprocess.Popen([sys.executable, "-c", script, str(site.root)])
    with running(base, proxy):
        for number in range(1, 4):
            write_image(site, bus, number, size=200_000)
        until(lambda: len(hops(bus, "at_base")) >= 2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        control_link(site, "summit", "base")
        again = Replicator(site=site, bus=bus, clock=clock)
        with running(again):
            until(lambda: stored(site, "base") == keys(range(1, 4)) and len(again.buffer) == 0)


def test_files_without_events_are_caught_up(site: Site, bus: Bus, clock: Clock) -> None:
    paths = write_image(site, bus, 1, announce=False)
    (paths[0].parent / f"{obs_id(1)}_header.json").write_text(
        json.dumps({"group_id": "group of the sidecar"})
    )
    for path in paths:
        os.utime(path, (time.time() - 60, time.time() - 60))
    with running(*make_chain(site, bus, clock)):
        until(lambda: len(hops(bus, "archive_tape")) == 4)
    assert {hop["groupId"] for hop in hops(bus, "at_archive")} == {"group of the sidecar"}
    assert stored(site, "archive") == keys(range(1, 2))


def test_the_link_has_the_latency_and_bandwidth_it_is_told(site: Site, clock: Clock) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    write_address(site, "base-1", server.getsockname())
    control_link(site, "summit", "base", latency_ms=600, bandwidth_mbit_s=8)  # 0.1 s and 6 MB/s at rate 6
    proxy = LinkProxy(site=site, clock=clock, source="summit", target="base")
    near = socket.create_connection(read_address(site, "wan-summit-base-1"))
    far, _ = server.accept()
    try:
        begin = time.monotonic()
        near.sendall(b"a")
        assert far.recv(1) == b"a"
        assert time.monotonic() - begin >= 0.1
        begin, got = time.monotonic(), 0
        threading.Thread(target=near.sendall, args=(bytes(1_800_000),), daemon=True).start()
        while got < 1_800_000:
            got += len(far.recv(1 << 16))
        assert time.monotonic() - begin >= 0.3
        control_link(site, "summit", "base", down=True)
        proxy.step(0.0)
        assert far.recv(10) == b""
        with socket.create_connection(proxy.address) as refused:
            assert refused.recv(10) == b""
    finally:
        proxy.close()
        near.close()
        far.close()
        server.close()


def test_control_file_garbage_is_ignored(site: Site, clock: Clock) -> None:
    path = site.path("run/link-base-archive.json")
    for content in ("{", "[]", json.dumps({"latency_ms": "fast", "bandwidth_mbit_s": -1, "down": 1})):
        path.write_text(content)
        proxy = LinkProxy(site=site, clock=clock, source="base", target="archive")
        assert (proxy.state.down, proxy.state.latency_ms, proxy.state.bandwidth_mbit_s) == (False, 60, 1000)
        proxy.close()
