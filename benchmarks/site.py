"""Figures of a demonstration site: ``python benchmarks/site.py SITE [--json]``.

Reads a finished night (``make demo``; ``report/night.json``, the bus log and, when the database runs, nothing
more): nextVisit to worker ready, ingest per file, lag of every hop, size of the log. When the site is up
(``make demo ARGS=--keep``) also its memory: proportional set size (PSS: shared pages are divided among those
who share them) of the supervisor's process tree and the database.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cumbre.core.configuration import Site
from cumbre.ledger.schema import HOPS
from cumbre.site.roles import open_site_bus
from cumbre.site.supervisor import read_state


def percentiles(values: list[float]) -> dict[str, Any]:
    """n, p50, p98, max; rounded to milliseconds."""
    if not values:
        return {"n": 0}
    p50, p98 = np.percentile(values, [50, 98])
    return {
        "n": len(values),
        "p50": round(float(p50), 3),
        "p98": round(float(p98), 3),
        "max": round(max(values), 3),
    }


def read_log(site: Site) -> dict[str, Any]:
    """What the bus log tells: lags in night seconds, ingest times in real seconds, counts and bytes."""
    announced: dict[str, float] = {}
    ready: list[float] = []
    read_out: dict[str, float] = {}
    lags: dict[str, list[float]] = defaultdict(list)
    seen: set[tuple[str, int, str, str]] = set()
    ingests: dict[str, list[float]] = defaultdict(list)
    hops: dict[str, int] = defaultdict(int)
    count, first, last = 0, float("inf"), 0.0
    with open_site_bus(site, "benchmark") as bus:
        for message in bus.replay():
            count += 1
            first, last = min(first, message.snd_tai), max(last, message.snd_tai)
            fields = message.fields
            if message.topic == "ScriptQueue.nextVisit":
                announced.setdefault(fields["groupId"], message.snd_tai)
            elif message.topic == "Camera.endReadout":
                read_out.setdefault(fields["imageName"], fields["timestampEndOfReadout"])
            elif message.topic == "Image.hop" and fields["outcome"] == "ok" and fields["detector"] >= 0:
                key = (fields["obsId"], fields["detector"], fields["hop"], fields["place"])
                if key in seen:
                    continue
                seen.add(key)
                hops[fields["hop"]] += 1
                if fields["hop"] == "preloaded" and fields["groupId"] in announced:
                    ready.append(fields["hopTai"] - announced[fields["groupId"]])
                if fields["obsId"] in read_out:
                    lags[fields["hop"]].append(fields["hopTai"] - read_out[fields["obsId"]])
                if fields["hop"] in ("ingested_oods", "ingested_embargo"):
                    ingests[fields["hop"]].append(fields["hopTai"])
    rate = open_rate(site)
    order = [hop for hop in HOPS if hop in lags and hop != "preloaded"]
    return {
        "rate": rate,
        "messages": count,
        "messages_per_real_s": round(count / max((last - first) / rate, 1e-9), 1),
        "log_bytes": sum(path.stat().st_size for path in (site.root / "bus").iterdir() if path.is_file()),
        "hops_per_detector_image": round(sum(hops.values()) / max(hops.get("written", 0), 1), 2),
        "next_visit_to_preloaded_real_s": percentiles([value / rate for value in ready]),
        "lag_real_s": {hop: percentiles([value / rate for value in lags[hop]]) for hop in order},
        "ingested_files": {hop: len(times) for hop, times in ingests.items()},
    }


def open_rate(site: Site) -> float:
    """Night seconds per real second."""
    return site.config.simulator.rate if site.config.simulator else 1.0


def ingest_batches(site: Site) -> dict[str, Any]:
    """Real seconds from a file's ``written`` (``at_archive``) to its ingest, over the files of the batch."""
    sources = {"ingested_oods": "written", "ingested_embargo": "at_archive"}
    times: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    with open_site_bus(site, "benchmark") as bus:
        for message in bus.replay(["Image.hop"]):
            fields = message.fields
            if fields["outcome"] == "ok" and fields["detector"] >= 0:
                times[fields["hop"]].setdefault((fields["obsId"], fields["detector"]), fields["hopTai"])
    out: dict[str, Any] = {}
    rate = open_rate(site)
    for hop, source in sources.items():
        images: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for (obs_id, detector), at in times[hop].items():
            if (obs_id, detector) in times[source]:
                images[obs_id].append((times[source][obs_id, detector], at))
        spans = [
            (max(b for _, b in pairs) - min(a for a, _ in pairs)) / len(pairs) / rate
            for pairs in images.values()
        ]
        out[hop] = percentiles(spans)
    return out


def memory(site: Site) -> dict[str, Any] | None:
    """PSS in MB by service with its children, and their sum; None when the site is down."""
    state = read_state(site)
    if state is None:
        return None
    supervisor = psutil.Process(int(state["pid"]))
    services = {int(s["pid"]): s["name"] for s in state["services"] if s["pid"]}
    by_name: dict[str, float] = defaultdict(float)
    counted: set[int] = set()

    def add(process: psutil.Process, name: str) -> None:
        if process.pid in counted:
            return
        counted.add(process.pid)
        try:
            by_name[name] += process.memory_full_info().pss / 2**20
            children = process.children()
        except psutil.NoSuchProcess:
            return
        for child in children:
            add(child, services.get(child.pid, name))

    add(supervisor, "supervisor")
    for pid, name in services.items():
        if psutil.pid_exists(pid):  # the database server is nobody's child
            add(psutil.Process(pid), name)
    return {
        "pss_mb": {name: round(value) for name, value in sorted(by_name.items(), key=lambda x: -x[1])},
        "sum_mb": round(sum(by_name.values())),
        "processes": len(counted),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    site = Site.load(arguments.site)
    figures: dict[str, Any] = {"cores": os.cpu_count()}
    report = next(iter(sorted(site.root.glob("report*/**/night.json"))), None)
    if report is not None:
        night = json.loads(report.read_text())
        wanted = ("images_taken", "lost", "late", "latency_s", "alerts", "completeness", "purity", "wall_s")
        figures["night"] = {key: night.get(key) for key in wanted}
    figures |= read_log(site) | {"ingest_s_per_file": ingest_batches(site), "memory": memory(site)}
    if arguments.json:
        print(json.dumps(figures))
        return
    for key, value in figures.items():
        if key == "lag_real_s":
            print("real seconds after the end of read-out:")
            for hop, row in value.items():
                print(f"  {hop:20s}{row['n']:6d}  p50 {row['p50']:7.3f}  p98 {row['p98']:7.3f}")
        elif key == "memory" and value is not None:
            print(f"memory (PSS) {value['sum_mb']} MB in {value['processes']} processes (want < 4096):")
            for name, size in value["pss_mb"].items():
                print(f"  {name:20s}{size:6d} MB")
        else:
            print(f"{key}: {json.dumps(value)}")


if __name__ == "__main__":
    main()
