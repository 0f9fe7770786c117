"""An hour of LSSTCam's night through the whole chain: ``python benchmarks/full_camera.py [--visits N] [--speed S]``.

Every role is a process of a real site, started by the supervisor: image writers, 22 replicator pairs, their
distributors at the base, forwarders, distributors at the archive, tapes, ledger, base control system and its warm
spare, Catch-Up Archiver, PostgreSQL and bus, the links with TLS. The camera is LSSTCam with its 205 detectors and
all their names, but one amplifier of few pixels a detector: each file is a real raw FITS file of some 20 kB, and
everything that does not depend on the number of pixels costs what it costs. Played by this script: the camera and
its header, and two strings of 193 workers, that answer each job once its image is at the archive (no payload).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from cumbre.bus import Message
from cumbre.core.configuration import Site
from cumbre.core.ids import ObsId
from cumbre.core.instrument import Instrument, load_instrument
from cumbre.core.time import Clock
from cumbre.observatory.component.client import RemoteComponent
from cumbre.site.profiles import create_site
from cumbre.site.roles import open_site_bus, site_database
from cumbre.site.supervisor import read_state, start_detached, stop_site

CADENCE_S, EXPOSURE_S, READOUT_S = 37.0, 30.0, 2.4
WORKERS = 2 * 193
JOBS = 22 + 193
DAY_OBS = 20261120
BEGIN_TAI = 1_795_222_837.0
FILTER = "r_57"
MODE = """\
mode: full
description: science with jobs for the wavefront sensors too
entities:
  Archiver: {min_pairs: 22, deadline_s: 600}
  CatchUpArchiver: {min_pairs: 1}
  AlertProductionCluster: {min_workers: 193, wavefront: true, deadline_s: 600}
"""
HOPS = ("written", "buffered", "at_base", "base_tape", "sent", "at_archive", "archive_tape")


def make_instrument(path: Path) -> Instrument:
    """LSSTCam with one small amplifier a detector."""
    text = (resources.files("cumbre.core") / "instruments" / "lsstcam.yaml").read_text()
    data = yaml.safe_load(text)
    for kind in data["detector_types"].values():
        pixel_mm = kind["pixel_mm"] * kind["nx"] / 32
        kind |= {"nx": 32, "ny": 32, "pixel_mm": pixel_mm}
        kind["grid"] |= {"columns": 1, "rows": 1, "prescan": 2, "overscan": 4, "parallel_overscan": 4}
        kind["grid"] |= {"flip_x": False, "flip_y": False}
        kind["grid"].pop("order", None)
        kind["grid"].pop("first_row", None)
    path.write_text(yaml.safe_dump(data))
    return load_instrument(path)


def make_site(root: Path, options: argparse.Namespace) -> tuple[Site, Instrument]:
    """The site of one machine with as many pairs as LSSTCam has replicate jobs."""
    create_site(root, simulated=False)
    instrument = make_instrument(root / "camera.yaml")
    path = root / "site.yaml"
    data = yaml.safe_load(path.read_text())
    data["instruments"] = [str(root / "camera.yaml")]
    for place in data["places"].values():
        place.pop("repository", None)
        if not options.tape:
            place.pop("tape", None)
    pairs = options.pairs
    data["links"] = [
        {"source": source, "target": target, "pairs": pairs, "connections": 1, "expected_s": 60}
        for source, target in (("summit", "base"), ("base", "archive"))
    ]
    data["capture"] = {"writers": options.writers}
    data["control"] = {
        "start": dict.fromkeys(("Archiver", "CatchUpArchiver", "AlertProductionCluster"), "full")
    }
    if not options.tls:
        del data["tls"]
    data["roles"] = [
        "ledger", "control-base", "control-base-spare", "writer", "replicator", "base", "forwarder", "archive",
        "catch-up", *(["tape-base", "tape-archive"] if options.tape else []),
    ]  # fmt: skip
    path.write_text(yaml.safe_dump(data))
    (root / "modes").mkdir()
    (root / "modes" / "full.yaml").write_text(MODE)
    Clock.starting_at(BEGIN_TAI, rate=options.speed).save(root / "clock.json")
    return Site.load(root), instrument


class Camera:
    """The played camera: its arrays are made once, every image has links to them."""

    def __init__(self, site: Site, instrument: Instrument) -> None:
        self.site, self.instrument = site, instrument
        self._kept = site.path("summit/daq-arrays")
        self._kept.mkdir(parents=True)
        self._sums = {}
        rng = np.random.default_rng(1)
        for detector in instrument.detectors:
            shape = (len(detector.amplifiers), *detector.amplifiers[0].raw_shape)
            path = self._kept / f"{detector.name}.npy"
            np.save(path, rng.normal(1100, 12, shape).astype(np.uint16))
            self._sums[detector.name] = hashlib.sha256(path.read_bytes()).hexdigest()

    def block(self, obs_id: str, begin_tai: float) -> dict[str, Any]:
        """Fields that all events of an image have."""
        pairs = {"filter": FILTER, "ra": "53.1", "dec": "-27.8", "rotation": "12.5", "program": "survey"}
        parsed = ObsId.parse(obs_id)
        return {
            "instrument": self.instrument.name, "imagesInSequence": 1, "imageName": obs_id, "imageIndex": 1,
            "imageSource": self.instrument.prefix, "imageController": "O", "imageDate": str(parsed.day_obs),
            "imageNumber": parsed.seq_num, "timestampAcquisitionStart": begin_tai, "groupId": obs_id,
            "additionalKeys": list(pairs), "additionalValues": list(pairs.values()),
        }  # fmt: skip

    def store(self, obs_id: str, begin_tai: float) -> None:
        """Put an image into the camera's store, and its header beside."""
        folder = self.site.path(f"summit/daq/{obs_id}")
        folder.mkdir(parents=True)
        for name in self._sums:
            os.link(self._kept / f"{name}.npy", folder / f"{name}.npy")
        info = {
            "obs_id": obs_id, "instrument": self.instrument.name, "detectors": list(self._sums),
            "sha256": self._sums, "group_id": obs_id, "image_type": "OBJECT", "exposure_s": EXPOSURE_S,
            "filter": FILTER, "ra": 53.1, "dec": -27.8, "rotation": 12.5, "begin_tai": begin_tai,
            "end_tai": begin_tai + EXPOSURE_S,
        }  # fmt: skip
        (folder / "exposure.json").write_text(json.dumps(info))
        keywords = {
            "TELESCOP": "Simonyi", "INSTRUME": self.instrument.name, "OBSID": obs_id, "DAYOBS": str(DAY_OBS),
            "SEQNUM": ObsId.parse(obs_id).seq_num, "EXPID": ObsId.parse(obs_id).exposure_id, "GROUPID": obs_id,
            "IMGTYPE": "OBJECT", "FILTER": FILTER, "BAND": "r", "EXPTIME": EXPOSURE_S, "RA": 53.1, "DEC": -27.8,
            "ROTPA": 12.5, "AIRMASS": 1.1,
        } | {f"KEY{number:05d}": 1.5 * number for number in range(60)}  # fmt: skip
        header = {
            "obs_id": obs_id, "instrument": self.instrument.name, "group_id": obs_id, "complete": True,
            "missing": [], "provenance": {}, "keywords": {name: [value, ""] for name, value in keywords.items()},
        }  # fmt: skip
        path = self.site.path(f"summit/headers/{obs_id}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header))


class Pool:
    """The played workers of the Alert Production Cluster: each answers when its image is at the archive."""

    def __init__(self, instrument: Instrument) -> None:
        self._numbers = {detector.name: detector.id for detector in instrument.detectors}
        self._wanted: set[tuple[str, int]] = set()
        self._there: set[tuple[str, int]] = set()
        self.answered = 0

    def take(self, message: Message) -> list[tuple[str, dict[str, Any]]]:
        """Events to publish because of one."""
        fields = message.fields
        if message.topic == "Control.job":
            if fields["kind"] != "process":
                return []
            keys = [(fields["groupId"], self._numbers[name]) for name in fields["detectors"]]
            self._wanted |= {key for key in keys if key not in self._there}
            return [self._answer(key) for key in keys if key in self._there]
        key = (fields["groupId"], fields["detector"])
        if key in self._there:
            return []
        self._there.add(key)
        if key not in self._wanted:
            return []
        self._wanted.discard(key)
        return [self._answer(key)]

    def _answer(self, key: tuple[str, int]) -> tuple[str, dict[str, Any]]:
        self.answered += 1
        return "Prompt.detectorProcessed", {"obsId": key[0], "groupId": key[0], "detector": key[1]}


class Watcher:
    """Reads the hops as they come, plays the pool, and knows how far the chain is behind the camera."""

    def __init__(self, site: Site, instrument: Instrument, *, tape: bool) -> None:
        self.counts: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.last = "archive_tape" if tape else "at_archive"
        self.pool = Pool(instrument)
        self._site, self._stop = site, threading.Event()
        self._threads = [threading.Thread(target=act, daemon=True) for act in (self._watch, self._beat)]
        for thread in self._threads:
            thread.start()

    def _watch(self) -> None:
        seen: set[tuple[str, int, str]] = set()
        with open_site_bus(self._site, "workers") as bus:
            messages = bus.subscribe(["Image.hop", "Control.job"], start="now")
            while not self._stop.is_set():
                answers = []
                for message in messages.poll(0.3, limit=2000):
                    fields = message.fields
                    if message.topic == "Image.hop":
                        self._count(fields, seen)
                        if (fields["hop"], fields["outcome"]) != ("at_archive", "ok"):
                            continue
                    answers += self.pool.take(message)
                if answers:
                    bus.publish_many(answers)

    def _count(self, fields: dict[str, Any], seen: set[tuple[str, int, str]]) -> None:
        key = (fields["obsId"], fields["detector"], fields["hop"])
        if fields["outcome"] != "ok":
            self.bad[f"{fields['hop']} {fields['outcome']}"] += 1
        elif fields["detector"] >= 0 and key not in seen:
            seen.add(key)
            self.counts[fields["hop"]] += 1

    def _beat(self) -> None:
        with open_site_bus(self._site, "pool") as bus:
            while not self._stop.wait(0.5):
                bus.publish("AlertProductionCluster.pool", {"workers": WORKERS})

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        for thread in self._threads:
            thread.join()


def processes(site: Site) -> dict[str, psutil.Process]:
    """The site's processes by role."""
    state = read_state(site) or {"services": []}
    return {item["name"]: psutil.Process(item["pid"]) for item in state["services"] if item["pid"]}


def cpu(site: Site) -> dict[str, float]:
    """CPU seconds by kind of role; PostgreSQL with all its backends."""
    used: Counter[str] = Counter()
    for name, process in processes(site).items():
        family = [process, *process.children(recursive=True)] if name == "postgres" else [process]
        kind = name.rpartition("-")[0] if name.rpartition("-")[2].isdigit() else name
        for one in family:
            try:
                times = one.cpu_times()
                used[kind] += times.user + times.system
                if name == "postgres" and one is process:  # backends that ended
                    used[kind] += times.children_user + times.children_system
            except psutil.NoSuchProcess:
                continue
    return used


def wait(so: Any, limit_s: float, what: str) -> Any:
    """Poll until something is so."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if found := so():
            return found
        time.sleep(0.1)
    raise SystemExit(f"{what}: not within {limit_s:.0f} s")


def night(site: Site, camera: Camera, options: argparse.Namespace) -> dict[str, Any]:
    """Take all visits; gives what was found."""
    clock = Clock.load(site.clock_path)
    files = len(camera.instrument.detectors)
    with open_site_bus(site, "camera") as bus:
        watcher = Watcher(site, camera.instrument, tape=options.tape)  # its workers are wanted first
        for entity in ("Archiver", "AlertProductionCluster"):
            component = RemoteComponent(bus, entity)
            wait(
                lambda c=component: (c.detailed_state or {}).get("processing") == "enabled",
                180,
                f"{entity} enabled",
            )
        time.sleep(options.settle)
        idle = cpu(site)
        idle_begin = time.monotonic()
        time.sleep(options.settle)
        idle_s = {
            name: (value - idle[name]) / (time.monotonic() - idle_begin) for name, value in cpu(site).items()
        }
        before, begin, begin_tai = cpu(site), time.monotonic(), clock.now_tai_s()
        own = time.process_time()
        backlogs, failover_s = [], math.nan
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())  # a shorter night, counted as it is
        for number in range(options.visits):
            start_tai = begin_tai + number * CADENCE_S
            clock.sleep(max(0.0, start_tai - clock.now_tai_s()))
            obs_id = str(ObsId(DAY_OBS, number + 1, camera.instrument.prefix))
            now = clock.now_tai_s()
            visit = {
                "groupId": obs_id, "instrument": camera.instrument.name, "position": [53.1, -27.8],
                "coordinateSystem": 2, "startTime": now, "duration": EXPOSURE_S, "nimages": 1,
            }  # fmt: skip
            block = camera.block(obs_id, now)
            image = block | {"exposureTime": EXPOSURE_S, "imageType": "OBJECT"}
            bus.publish_many([("ScriptQueue.nextVisit", visit), ("Camera.startIntegration", image)])
            if options.kill and number == options.visits // 2:
                failover_s = _kill_control(site, bus)
            clock.sleep(max(0.0, start_tai + EXPOSURE_S + READOUT_S - clock.now_tai_s()))
            camera.store(obs_id, now)
            # Just before the next image everything of the ones before should be away.
            backlogs.append(number * files - watcher.counts[watcher.last])
            end = block | {
                "requestedExposureTime": EXPOSURE_S, "timestampEndOfReadout": clock.now_tai_s(),
                "daqPath": f"summit/daq/{obs_id}", "detectors": [d.name for d in camera.instrument.detectors],
            }  # fmt: skip
            bus.publish("Camera.endReadout", end)
            print(f"visit {number + 1}: {backlogs[-1]} files behind", file=sys.stderr, flush=True)
            if stop.is_set():
                break
        options.visits = number + 1
        clock.sleep(max(0.0, begin_tai + options.visits * CADENCE_S - clock.now_tai_s()))
        backlog_end = options.visits * files - watcher.counts[watcher.last]
        offered_s = time.monotonic() - begin
        db = site_database(site)

        def done() -> bool:
            jobs = db.execute("SELECT count(*), count(ended_tai) FROM control.job")[0]
            here = watcher.counts[watcher.last] >= options.visits * files
            return here and jobs == (options.visits * JOBS,) * 2

        try:
            wait(done, options.patience, "all files and jobs done")
            complete = True
        except SystemExit as late:
            print(late, dict(watcher.counts))
            complete = False
        took_s = time.monotonic() - begin
        used = {name: (value - before.get(name, 0.0)) / options.visits for name, value in cpu(site).items()}
        own = (time.process_time() - own) / options.visits
        watcher.close()
        found = {
            "visits": options.visits, "speed": options.speed, "offered_s": offered_s, "took_s": took_s,
            "complete": complete, "backlog_worst": max(backlogs), "backlog_end": backlog_end,
            "cpu_s_per_visit": used, "cpu_idle_s_per_s": idle_s, "own_cpu_s_per_visit": own,
            "files": dict(watcher.counts), "bad": dict(watcher.bad), "jobs_answered": watcher.pool.answered,
            "failover_s": failover_s,
            "hops": _hops(db), "jobs": _jobs(db),
            "pss_gb": sum(_pss(process) for process in processes(site).values()) / 1e9,
        }  # fmt: skip
        db.close()
    return found


def _kill_control(site: Site, bus: Any) -> float:
    """kill -9 the acting control system; gives seconds until another acts."""
    acting = bus.latest("Control.system", key="control-base").fields
    begin = time.monotonic()
    processes(site)[acting["holder"].split()[0]].send_signal(signal.SIGKILL)
    wait(
        lambda: bus.latest("Control.system", key="control-base").fields["epoch"] > acting["epoch"],
        60,
        "failover",
    )
    return time.monotonic() - begin


def _pss(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0.0


def _hops(db: Any) -> dict[str, dict[str, float]]:
    """Files a hop, and night seconds from the end of readout to it."""
    rows = db.query(
        "WITH begun AS (SELECT obs_id, min(hop_tai) AS tai FROM ledger.hop WHERE hop = 'read_out' GROUP BY obs_id),"
        " lags AS (SELECT hop, hop_tai - tai AS lag FROM ledger.hop JOIN begun USING (obs_id)"
        " WHERE outcome = 'ok' AND detector >= 0)"
        " SELECT hop, count(*) AS files, max(lag) AS max, percentile_cont(0.5) WITHIN GROUP (ORDER BY lag) AS p50,"
        " percentile_cont(0.98) WITHIN GROUP (ORDER BY lag) AS p98 FROM lags GROUP BY hop", ()
    )  # fmt: skip
    return {row["hop"]: {key: float(row[key]) for key in ("files", "p50", "p98", "max")} for row in rows}


def _jobs(db: Any) -> list[dict[str, Any]]:
    rows = db.query(
        "SELECT kind, outcome, count(*) AS n, max(attempt) AS attempts,"
        " percentile_cont(0.5) WITHIN GROUP (ORDER BY ended_tai - submitted_tai) AS p50,"
        " percentile_cont(0.98) WITHIN GROUP (ORDER BY ended_tai - submitted_tai) AS p98"
        " FROM control.job GROUP BY kind, outcome ORDER BY kind, outcome", ()
    )  # fmt: skip
    return [dict(row) for row in rows]


def table(found: dict[str, Any]) -> None:
    """For people."""
    visits, speed = found["visits"], found["speed"]
    files = found["hops"].get("written", {}).get("files", 0)
    print(f"visits      {visits} = {visits * CADENCE_S / 60:.0f} min of night, clock x {speed:g}: "
          f"{found['offered_s']:.0f} s real, all done after {found['took_s']:.0f} s")  # fmt: skip
    print(
        f"{'hop':<14}{'files':>8}{'p50 s':>9}{'p98 s':>9}{'max s':>9}   night time since the end of readout"
    )
    for hop in HOPS:
        if hop in found["hops"]:
            row = found["hops"][hop]
            print(f"{hop:<14}{row['files']:8.0f}{row['p50']:9.1f}{row['p98']:9.1f}{row['max']:9.1f}")
    print(f"backlog     {found['backlog_worst']} files at worst when the next image was read out, "
          f"{found['backlog_end']} a visit's time after the last one")  # fmt: skip
    for job in found["jobs"]:
        p50, p98 = (math.nan if job[key] is None else job[key] for key in ("p50", "p98"))
        print(f"jobs        {job['kind']:<10} {job['outcome'] or 'open':<8} {job['n']:6d}  {p50:.1f} s p50, "
              f"{p98:.1f} s p98 (night), attempts up to {job['attempts']}")  # fmt: skip
    print(
        f"failures    {found['bad'] or 'none'}; failover after kill -9 of control: {found['failover_s']:.1f} s real"
    )
    print(f"{'CPU':<20}{'s a visit':>10}{'ms a file':>11}{'idle, s/s':>11}")
    for kind, used in sorted(found["cpu_s_per_visit"].items(), key=lambda item: -item[1]):
        print(
            f"{kind:<20}{used:10.2f}{used * visits / max(files, 1) * 1e3:11.2f}{found['cpu_idle_s_per_s'].get(kind, 0):11.3f}"
        )
    total = sum(found["cpu_s_per_visit"].values())
    budget = CADENCE_S * (os.cpu_count() or 1)
    print(f"{'all':<20}{total:10.2f}{total * visits / max(files, 1) * 1e3:11.2f}"
          f"{sum(found['cpu_idle_s_per_s'].values()):11.3f}   {total / budget:.0%} of this machine's "
          f"{budget:.0f} CPU s a visit in real time; played part {found['own_cpu_s_per_visit']:.2f} s")  # fmt: skip
    print(f"memory      {found['pss_gb']:.1f} GB")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--visits", type=int, default=97, help="97 are an hour")
    parser.add_argument("--speed", type=float, default=1.0, help="night seconds a real second")
    parser.add_argument("--pairs", type=int, default=22)
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--tls", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tape", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--kill", action=argparse.BooleanOptionalAction, default=True, help="kill control once"
    )
    parser.add_argument("--settle", type=float, default=10.0, help="seconds in which idle cost is measured")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds for what is left at the end")
    parser.add_argument("--folder", type=Path, help="where to work (a disk, or memory to leave the disk out)")
    parser.add_argument("--keep", action="store_true", help="leave the site's folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="cumbre-full-", dir=options.folder))
    root.chmod(0o755)
    site, instrument = make_site(root / "site", options)
    try:
        camera = Camera(site, instrument)
        start_detached(site, wait_s=300)
        found = night(site, camera, options)
    finally:
        stop_site(site, wait_s=120)
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    found |= {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    if options.json:
        print(json.dumps(found))
    else:
        table(found)


if __name__ == "__main__":
    main()
