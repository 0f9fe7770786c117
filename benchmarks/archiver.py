"""Throughput of the archiver: ``python benchmarks/archiver.py [--images N] [--mb SIZE] [--json]``.

Real processes of a site (pairs of replicators, distributors, forwarders) move files from the summit over the
base to the archive on the loopback. Beside it, on the same files and with as many processes, what this machine
can do at all: read, hash, write, sync. A file makes two hops, so the limit for the whole way is half of that.
CPU seconds per GB are given too: they stay true on a machine that is busy with other things.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cumbre.archive.certificates import Security
from cumbre.archive.distributor import Distributor
from cumbre.archive.pairs import distributor_name, relay_name
from cumbre.archive.protocol import Parcel
from cumbre.archive.sender import Sender
from cumbre.archive.wire import PACKED_BYTES, packed
from cumbre.bus import Bus
from cumbre.capture.hops import publish_hops
from cumbre.core.configuration import Site
from cumbre.core.ids import ObsId, image_folder
from cumbre.core.instrument import load_instrument
from cumbre.core.time import Clock
from cumbre.site.profiles import create_site
from cumbre.site.roles import open_site_bus
from cumbre.stores.files import copy_verified, sha256_of

PAIRS = 2
DEADLINE_S = 300.0


def make_site(root: Path, *, secure: bool) -> Site:
    """A site without simulated networks, so that only the machine limits."""
    create_site(root, simulated=False)
    path = root / "site.yaml"
    text = path.read_text().replace("control: true", "control: false")
    if not secure:
        text = (
            text.replace("tls:", "x-tls:").replace("x-tls:", "#tls:").replace("  authority:", "#  authority:")
        )
    path.write_text(text)
    Clock.real().save(root / "clock.json")
    return Site.load(root)


def make_images(site: Site, count: int, size: int, start: int = 1) -> list[dict[str, Any]]:
    """Files under summit/raw and the hops that the writer would tell."""
    content = random.Random(1).randbytes(size)
    hops = []
    for number in range(start, start + count):
        obs_id = ObsId(20261120, number, "XC")
        folder = site.path("summit/raw") / image_folder("DemoCam", obs_id)
        folder.mkdir(parents=True)
        for detector in load_instrument("democam").detectors:
            path = folder / f"{obs_id}_{detector.name}.fits"
            path.write_bytes(f"{path.name:80}".encode() + content[80:])
            hops.append({
                "obsId": str(obs_id), "instrument": "DemoCam", "exposureId": obs_id.exposure_id, "groupId": "g",
                "detector": detector.id, "detectorName": detector.name, "hop": "written", "place": "summit",
                "path": str(path), "byteSize": size, "checksum": sha256_of(path),
                "hopTai": Clock.load(site.clock_path).now_tai_s(),
            })  # fmt: skip
    return hops


@contextmanager
def services(site: Site) -> Iterator[list[psutil.Process]]:
    """The pairs of both links as processes, until the block ends."""
    names = [distributor_name(place, pair) for place in ("archive", "base") for pair in range(1, PAIRS + 1)]
    names += [relay_name(place, pair) for place in ("summit", "base") for pair in range(1, PAIRS + 1)]
    (site.root / "logs").mkdir(exist_ok=True)
    started = []
    for name in names:
        with (site.root / "logs" / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "cumbre.site.runner", str(site.root), name]
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
    try:
        yield [psutil.Process(process.pid) for process in started]
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            process.wait(30)


def wait_registered(bus: Bus) -> None:
    """Until every relay has its distributor."""
    end = time.monotonic() + 60
    while True:
        pools = {m.fields["name"]: m.fields["pool"] for m in bus.latest_all("Replicator.registration")}
        if sum(pool == "fully-operational" for pool in pools.values()) == 2 * PAIRS:
            return
        if time.monotonic() > end:
            raise SystemExit(f"not all pairs came up: {pools}")
        time.sleep(0.1)


def wait_arrived(bus: Bus, wanted: int, since: int) -> dict[tuple[str, int], float]:
    """Arrival (monotonic s, as seen here) of each file at the archive."""
    seen: dict[tuple[str, int], float] = {}
    end = time.monotonic() + DEADLINE_S
    with bus.subscribe(["Image.hop"], start=since) as hops:
        while len(seen) < wanted:
            for message in hops.poll(0.5):
                fields = message.fields
                if fields["hop"] == "at_archive" and fields["outcome"] == "ok":
                    seen.setdefault((fields["obsId"], fields["detector"]), time.monotonic())
            if time.monotonic() > end:
                raise SystemExit(f"{len(seen)} of {wanted} files came within {DEADLINE_S:.0f} s")
    return seen


def cpu_s(processes: list[psutil.Process]) -> float:
    """CPU seconds that processes have used."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def whole_way(root: Path, *, secure: bool, images: int, size: int, paced: int) -> dict[str, Any]:
    """Move ``images`` at once, then some at a steady pace."""
    site = make_site(root, secure=secure)
    assert (site.config.tls is not None) == secure
    hops = make_images(site, images, size)
    with open_site_bus(site, "benchmark") as bus, services(site) as processes:
        wait_registered(bus)
        before, begin = cpu_s(processes), time.monotonic()
        bus.publish_many([("Image.hop", hop) for hop in hops[:1]])
        publish_hops(bus, hops[1:])
        arrived = wait_arrived(bus, len(hops), 0)
        wall_s = max(arrived.values()) - begin
        used_s = cpu_s(processes) - before
        messages = sum(1 for _ in bus.replay(["Image.hop"]))
        total = size * len(hops)
        lags = pace(site, bus, paced, size, images) if paced else []
        memory = [process.memory_full_info().pss for process in processes]
    return {
        "mb_per_s": round(total / wall_s / 1e6, 1),
        "wall_s": round(wall_s, 2),
        "cpu_s_per_gb": round(used_s / (total / 1e9), 3),
        "cpu_ms_per_file": round(used_s / len(hops) * 1e3, 2),
        "hops_per_file": round(messages / len(hops), 2),
        "pss_mb_per_process": round(float(np.mean(memory)) / 1e6, 1),
        "written_to_archive_s": lags and {
            "p50": round(float(np.percentile(lags, 50)), 3), "p98": round(float(np.percentile(lags, 98)), 3),
            "n": len(lags),
        },
    }  # fmt: skip


def cpu_by_number(root: Path, images: int) -> list[dict[str, Any]]:
    """CPU of the services for each file, small ones in three rounds: it must not grow with what is there."""
    site = make_site(root, secure=True)
    out, done = [], 0
    with open_site_bus(site, "benchmark") as bus, services(site) as processes:
        wait_registered(bus)
        for _ in range(3):
            hops = make_images(site, images // 3, 20_000, done + 1)
            before = cpu_s(processes)
            offset = bus.publish_many([("Image.hop", hop) for hop in hops])[0]
            wait_arrived(bus, len(hops), offset)
            used_s = cpu_s(processes) - before
            done += images // 3
            out.append({"files_there": done * 4, "cpu_ms_per_file": round(used_s / len(hops) * 1e3, 2)})
    return out


def pace(site: Site, bus: Bus, images: int, size: int, done: int) -> list[float]:
    """Real seconds from the writer's word to the verified copy at the archive, one image a second."""
    lags = []
    for number in range(done + 1, done + images + 1):
        begin = time.monotonic()
        hops = make_images(site, 1, size, number)
        said = time.monotonic()
        offset = bus.publish_many([("Image.hop", hop) for hop in hops])[0]
        arrived = wait_arrived(bus, len(hops), offset)
        lags += [when - said for when in arrived.values()]
        time.sleep(max(0.0, begin + 1.0 - time.monotonic()))
    return lags


def _copy(job: tuple[list[Path], Path]) -> float:
    files, target = job
    for path in files:
        copy_verified(path, target / path.name)
    return time.process_time()


def machine_limit(root: Path, images: int, size: int) -> dict[str, Any]:
    """Read, hash, write and sync the same number of bytes with as many processes as there are pairs."""
    content = random.Random(2).randbytes(size)
    files = []
    for number in range(images * 4):
        path = root / "from" / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        files.append(path)
    with multiprocessing.get_context("spawn").Pool(PAIRS) as pool:
        pool.map(abs, range(PAIRS))
        workers = [psutil.Process(process.pid) for process in pool._pool]  # type: ignore[attr-defined]
        before, begin = cpu_s(workers), time.monotonic()
        pool.map(_copy, [(files[k::PAIRS], root / "to" / str(k)) for k in range(PAIRS)], chunksize=1)
        wall_s, used_s = time.monotonic() - begin, cpu_s(workers) - before
    total = size * len(files)
    return {"mb_per_s": round(total / wall_s / 1e6, 1), "cpu_s_per_gb": round(used_s / (total / 1e9), 3)}


def one_hop(root: Path, *, secure: bool, size: int, count: int = 24) -> dict[str, Any]:
    """CPU of one connection: sender and receiver in one process, nothing else."""
    site = make_site(root, secure=secure)
    with open_site_bus(site, "benchmark") as bus:
        base = Distributor(site=site, bus=bus, clock=bus.clock, place="base", scan_every_s=1e9)
        hops = make_images(site, count // 4, size)
        sender = Sender(base.address, timeout_s=60, security=Security.of(site, "summit"), target="base")
        begin, used = time.monotonic(), time.process_time()
        for hop in hops:
            path = Path(hop["path"])
            key = str(path.relative_to(site.path("summit/raw")))
            assert sender.deliver(Parcel(key, size, hop["checksum"]), path, ask_first=False)["answer"] == "ok"
        used_s, wall_s = time.process_time() - used, time.monotonic() - begin
        sender.close()
        base.close()
    total = size * len(hops)
    return {"mb_per_s": round(total / wall_s / 1e6, 1), "cpu_s_per_gb": round(used_s / (total / 1e9), 3)}


def compression(folder: Path) -> dict[str, Any]:
    """What zstd makes of an image of 2k x 2k pixels, tile-compressed (as all raw files are) and plain."""
    import fitsio

    pixels = np.random.default_rng(1).poisson(900, (2048, 2048)).astype(np.uint16)
    out = {}
    for name, options in (("tile-compressed", {"compress": "rice"}), ("plain", {})):
        path = folder / f"{name}.fits"
        fitsio.write(path, pixels, **options)
        content = path.read_bytes()
        blocks = [content[start : start + PACKED_BYTES] for start in range(0, len(content), PACKED_BYTES)]
        used = time.process_time()
        small = sum(map(len, packed(blocks, "zstd")))
        used = time.process_time() - used
        out[name] = {"mb": round(len(content) / 1e6, 2), "part": round(small / len(content), 3),
                     "cpu_s_per_gb": round(used / (len(content) / 1e9), 2)}  # fmt: skip
    return out


def ledger_cost(site_root: Path, folder: Path) -> dict[str, Any]:
    """CPU of the ledger's service for the hops of a run, and what the bus keeps of them."""
    from cumbre.ledger import LedgerService
    from cumbre.stores.postgres import Database, EmbeddedPostgres

    site = Site.load(site_root)
    postgres = EmbeddedPostgres(folder / "postgres")
    try:
        database = Database(postgres.start())
        with open_site_bus(site, "ledger-benchmark") as bus:
            service = LedgerService(site=site, bus=bus, db=database, clock=bus.clock)
            used, begin = time.process_time(), time.monotonic()
            count = 0
            while done := service.step(0.05):
                count += done
            used_s, wall_s = time.process_time() - used, time.monotonic() - begin
            images = len({m.fields["obsId"] for m in bus.replay(["Image.hop"])})
            service.close()
    finally:
        postgres.stop()
    kept = sum(path.stat().st_size for path in (site.root / "bus").iterdir() if path.is_file())
    return {
        "messages": count,
        "cpu_ms_per_image": round(used_s / max(images, 1) * 1e3, 2),
        "wall_ms_per_image": round(wall_s / max(images, 1) * 1e3, 2),
        "bus_bytes_per_image": kept // max(images, 1),
    }


def table(out: dict[str, Any]) -> None:
    """For people: ours, the limit beside it, and the ratio."""
    limit = out["limit_copy_hash_sync"]
    print(f"{out['files']} files of {out['file_mb']:g} MB, {out['cores']} cores, load {out['load']}")
    print(f"{'':34}{'ours':>10}{'limit':>10}{'ratio':>8}")
    for name in ("tls", "plain"):
        whole, hop = out[f"whole_way_{name}"], out[f"one_hop_{name}"]
        rows = [
            ("whole way, MB/s", whole["mb_per_s"], limit["mb_per_s"] / 2, out[f"part_of_limit_{name}"]),
            ("whole way, CPU s/GB", whole["cpu_s_per_gb"], 2 * limit["cpu_s_per_gb"], out[f"part_of_limit_cpu_{name}"]),
            ("one hop, MB/s", hop["mb_per_s"], limit["mb_per_s"], hop["mb_per_s"] / limit["mb_per_s"]),
            ("one hop, CPU s/GB", hop["cpu_s_per_gb"], limit["cpu_s_per_gb"], limit["cpu_s_per_gb"] / hop["cpu_s_per_gb"]),
        ]  # fmt: skip
        for label, ours, most, ratio in rows:
            print(f"{f'{label} ({name})':34}{ours:10.2f}{most:10.2f}{ratio:8.2f}")
    if lags := out["whole_way_tls"]["written_to_archive_s"]:
        print(f"written -> verified copy at the archive: {lags['p50']:.2f} s p50, {lags['p98']:.2f} s p98, "
              f"{lags['n']} files, an image a second")  # fmt: skip
    grown = out["cpu_by_number"]
    print("CPU ms a file of all services, by the number of files there: "
          + ", ".join(f"{one['files_there']} {one['cpu_ms_per_file']:.1f}" for one in grown))  # fmt: skip
    cost = out["ledger_and_events"]
    print(
        f"ledger: {cost['cpu_ms_per_image']} ms CPU, {cost['bus_bytes_per_image']} bytes of the bus an image"
    )
    for kind, made in out["compression"].items():
        print(
            f"zstd on {kind} images: {made['part']:.0%} of {made['mb']} MB, {made['cpu_s_per_gb']} CPU s/GB"
        )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=12, help="images of four files")
    parser.add_argument("--mb", type=float, default=8.0, help="size of a file")
    parser.add_argument("--paced", type=int, default=10, help="images at one a second")
    parser.add_argument("--many", type=int, default=300, help="images of the look at growing cost")
    parser.add_argument("--folder", type=Path, help="where to work (a disk to be measured)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    size = int(options.mb * 1e6)
    root = Path(tempfile.mkdtemp(prefix="cumbre-archiver-", dir=options.folder))
    try:
        out: dict[str, Any] = {
            "files": options.images * 4, "file_mb": options.mb, "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "limit_copy_hash_sync": machine_limit(root / "limit", options.images, size),
        }  # fmt: skip
        for name, secure in (("tls", True), ("plain", False)):
            out[f"one_hop_{name}"] = one_hop(root / f"hop-{name}", secure=secure, size=size)
            paced = options.paced if secure else 0
            out[f"whole_way_{name}"] = whole_way(
                root / name, secure=secure, images=options.images, size=size, paced=paced
            )
        half = out["limit_copy_hash_sync"]["mb_per_s"] / 2
        for name in ("tls", "plain"):
            out[f"part_of_limit_{name}"] = round(out[f"whole_way_{name}"]["mb_per_s"] / half, 3)
            out[f"part_of_limit_cpu_{name}"] = round(
                2 * out["limit_copy_hash_sync"]["cpu_s_per_gb"] / out[f"whole_way_{name}"]["cpu_s_per_gb"], 3
            )
        out["cpu_by_number"] = cpu_by_number(root / "many", options.many)
        out["ledger_and_events"] = ledger_cost(root / "tls", root)
        out["compression"] = compression(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if options.json:
        print(json.dumps(out))
        return
    table(out)


if __name__ == "__main__":
    main()
