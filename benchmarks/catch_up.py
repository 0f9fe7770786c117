"""Catch-up rate against the rate at which the camera takes images.

    python benchmarks/catch_up.py [--images 12] [--instrument democam] [--mb 3] [--json]

A real ledger, a real distributor in a process of its own and the Catch-Up Archiver, over loopback: images that
nobody has sent are found, verified, sent, verified and told. The machine's own limit, one copy with checksum
of the same files on the same disk, is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path

from cumbre.archive.catch_up import CatchUpArchiver
from cumbre.archive.distributor import Distributor
from cumbre.bus import Bus, open_bus
from cumbre.capture.hops import Piece, hop_fields, publish_hops
from cumbre.core.configuration import Site, parse_site
from cumbre.core.ids import ObsId, image_key
from cumbre.core.instrument import Instrument, load_instrument
from cumbre.core.time import Clock
from cumbre.ledger import Ledger, LedgerService
from cumbre.stores.files import copy_verified, sha256_of
from cumbre.stores.postgres import Database, EmbeddedPostgres

VISIT_S = 17.0
"""The camera takes at most one image in this time (image-capture-simplification)."""
LSSTCAM_IMAGE_BYTES = 12e9
DAY = 20261120
T0 = 1_795_222_837.0


def make_site(folder: Path, instrument: str) -> Site:
    text = (
        f"observatory: {{latitude_deg: -30, longitude_deg: -70}}\ninstruments: [{instrument}]\n"
        "places:\n  summit: {raw: summit/raw, buffer: summit/buffer}\n"
        "  base: {raw: base/raw, listen: '127.0.0.1:0'}\n"
        "links: [{source: summit, target: base, pairs: 1, connections: 2}]\n"
        "catch_up: {grace_s: 0, every_s: 0.2, connections: 2}\n"
    )
    (folder / "site.yaml").write_text(text)
    return Site(folder, parse_site(text, "benchmark"))


def site_bus(site: Site, identity: str) -> Bus:
    return open_bus(f"sqlite:///{site.root}/bus.db", identity=identity, clock=Clock.load(site.clock_path))


def receive(root: Path, ready: multiprocessing.synchronize.Event) -> None:
    site = Site.load(root)
    with site_bus(site, "base") as bus:
        service = Distributor(site=site, bus=bus, clock=bus.clock, place="base")
        ready.set()
        while True:
            service.step(0.2)


def write_images(site: Site, bus: Bus, camera: Instrument, *, images: int, size: int) -> list[Path]:
    rng, paths = random.Random(1), []
    for number in range(1, images + 1):
        obs, hops = ObsId(DAY, number, camera.prefix), []
        for detector in camera.detectors:
            path = site.path("summit/raw") / image_key(camera.name, obs, detector.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(rng.randbytes(size))
            paths.append(path)
            piece = Piece(str(obs), camera.name, str(obs), detector.id, detector.name)
            hops.append(
                hop_fields(
                    bus.clock,
                    piece,
                    "written",
                    place="summit",
                    path=path,
                    byte_size=size,
                    checksum=sha256_of(path),
                )
            )
        publish_hops(bus, hops)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--instrument", default="democam")
    parser.add_argument("--mb", type=float, default=3.0, help="size of one detector's file")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    camera, size = load_instrument(arguments.instrument), int(arguments.mb * 1e6)
    with tempfile.TemporaryDirectory(prefix="cumbre-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        site = make_site(folder, arguments.instrument)
        Clock.starting_at(T0, rate=1.0).save(site.clock_path)
        postgres = EmbeddedPostgres(folder / "pg", durable=False)
        dsn = postgres.start()
        context = multiprocessing.get_context("spawn")
        ready = context.Event()
        receiver = context.Process(target=receive, args=(folder, ready), daemon=True)
        try:
            with site_bus(site, "benchmark") as bus:
                ledger = LedgerService(site=site, bus=bus, db=Database(dsn))
                paths = write_images(site, bus, camera, images=arguments.images, size=size)
                while ledger.step(0.0):
                    pass
                began = time.perf_counter()
                for path in paths:
                    copy_verified(path, folder / "limit" / path.name)
                limit_s = time.perf_counter() - began
                receiver.start()
                ready.wait(30)
                service = CatchUpArchiver(site=site, bus=bus, clock=bus.clock, db=Database(dsn))
                reader = Ledger(Database(dsn))
                began, cpu = time.perf_counter(), time.process_time()
                while reader.missing("base"):
                    service.step(0.05)
                    ledger.step(0.0)
                took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
                summary = reader.night(DAY)
                service.close()
                ledger.close()
        finally:
            if receiver.is_alive():
                receiver.terminate()
                receiver.join()
            postgres.stop()
    total = size * len(paths)
    rate = total / took_s
    image_bytes = size * len(camera.detectors)
    result = {
        "instrument": camera.name,
        "images": arguments.images,
        "files": len(paths),
        "bytes": total,
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "copy_hash_limit_mb_per_s": round(total / limit_s / 1e6, 1),
        "catch_up_mb_per_s": round(rate / 1e6, 1),
        "ratio_to_limit": round(rate / (total / limit_s), 2),
        "sender_cpu_s": round(cpu_s, 2),
        "images_per_s": round(arguments.images / took_s, 2),
        "times_taking_rate": round(rate / (image_bytes / VISIT_S), 1),
        "machines_for_4x_lsstcam": round(4 * LSSTCAM_IMAGE_BYTES / VISIT_S / rate, 1),
        "missing_after": summary["missing"]
        if summary["at_archive"]
        else summary["expected"] - summary["at_base"],
        "resent": summary["resent"],
    }
    if arguments.json:
        print(json.dumps(result))
        return
    taking = image_bytes / VISIT_S / 1e6
    print(f"{len(paths)} files of {size / 1e6:g} MB ({arguments.images} images of {camera.name}), "
          f"{os.cpu_count()} cores, load {result['load']}")  # fmt: skip
    print(f"{'':34}{'ours':>10}{'limit':>10}{'ratio':>8}")
    print(f"{'catch-up against copy + hash, MB/s':34}{rate / 1e6:10.1f}{total / limit_s / 1e6:10.1f}"
          f"{result['ratio_to_limit']:8.2f}")  # fmt: skip
    print(f"{'against the taking rate, MB/s':34}{rate / 1e6:10.1f}{taking:10.1f}{result['times_taking_rate']:8.1f}"
          f"   (an image each {VISIT_S:g} s; wanted: 4)")  # fmt: skip
    print(f"sender {cpu_s:.2f} CPU s, missing afterwards {result['missing_after']}, marked as resent {result['resent']}; "
          f"{result['machines_for_4x_lsstcam']} such machines for 4 x LSSTCam")  # fmt: skip


if __name__ == "__main__":
    main()
