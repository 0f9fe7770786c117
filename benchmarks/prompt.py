"""Prompt processing: nextVisit to worker ready, cold and warm; image at the archive to result.

``python benchmarks/prompt.py [SITE]``: SITE is a prepared demonstration site; without one a small site is
prepared in a temporary folder first. Prints one line of JSON; times are real seconds.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cumbre.bus import open_bus
from cumbre.core.configuration import SITE_FILE, Site
from cumbre.core.ids import ObsId
from cumbre.core.time import Clock, isot
from cumbre.orchestration.prompt import PromptService
from cumbre.orchestration.prompt_jobs import PRELOAD, PROCESS
from cumbre.stores.postgres import Database, EmbeddedPostgres


def small_site(root: Path) -> Site:
    """A demonstration site with one tile and two template epochs."""
    from cumbre.site.preparation import prepare
    from cumbre.site.profiles import create_site

    path = create_site(root).root / SITE_FILE
    text = path.read_text().replace("tiles: 3", "tiles: 1") + "  template_epochs: 2\n"
    path.write_text(text)
    site = Site.load(root)
    prepare(site, lambda text: print(text, file=sys.stderr))
    return site


def ready_s(service: PromptService, tile: dict[str, Any], group: str) -> float:
    """Seconds from publishing a nextVisit until every detector of it is prepared."""
    clock, instrument = service.clock, next(iter(service.jobs.instruments))
    wanted = len([d for d in service.jobs.instruments[instrument][1].detectors if d.purpose == "SCIENCE"])
    begun = time.monotonic()
    service.bus.publish(
        "ScriptQueue.nextVisit",
        {
            "groupId": group, "position": [tile["ra"], tile["dec"]], "instrument": instrument, "cameraAngle": 0.0,
            "startTime": clock.now_tai_s() + 22, "duration": 30.0, "nimages": 1, "survey": tile["name"],
            "filters": service.site.config.scheduler.filters[0],
        },
    )  # fmt: skip
    while True:
        service.step(0.02)
        rows = [r for r in service.store.payloads(PRELOAD, 0) if r["payload"]["visit"]["group_id"] == group]
        if len(rows) == wanted and all(r["state"] in ("done", "failed") for r in rows):
            bad = [r["outcome"] for r in rows if r["outcome"] != "Success"]
            if bad:
                raise SystemExit(f"preload failed: {bad}")
            return time.monotonic() - begun


def result_s(service: PromptService) -> tuple[float, list[float], list[str]]:
    """Seconds from four files at the archive to their results, work of each, outcomes.

    The image is the last template visit of the preparation: its own difference, but the same work.
    """
    name, (_, instrument) = next(iter(service.jobs.instruments.items()))
    folders = sorted(p.parent for p in (service.site.root / "earlier").rglob("*_R00_S00.fits"))
    folder = folders[0]  # the earliest night: a template visit, not an afternoon's calibration
    for candidate in folders:
        if len(list(candidate.glob("*.fits"))) == len(instrument.detectors):
            folder = candidate
            break
    obs_id = ObsId.parse(folder.name)
    begun = time.monotonic()
    for detector in instrument.detectors:
        service.bus.publish(
            "Image.hop",
            {
                "obsId": str(obs_id), "instrument": name, "exposureId": obs_id.exposure_id, "groupId": "bench",
                "detector": detector.id, "detectorName": detector.name, "hop": "at_archive", "place": "archive",
                "path": str(folder / f"{obs_id}_{detector.name}.fits"), "hopTai": service.clock.now_tai_s(),
            },
        )  # fmt: skip
    while True:
        service.step(0.02)
        rows = service.store.payloads(PROCESS, 0)
        if rows and all(r["state"] in ("done", "failed") for r in rows) and len(rows) == 4:
            work = [float(service.store.get(r["id"])["wall_s"]) for r in rows]
            return time.monotonic() - begun, work, sorted({r["outcome"] for r in rows})


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="cumbre-bench-") as scratch:
        root = Path(scratch)
        root.chmod(0o711)
        site = Site.load(Path(sys.argv[1])) if len(sys.argv) > 1 else small_site(root / "site")
        tiles = json.loads((site.root / "survey.json").read_text())
        postgres = EmbeddedPostgres(root / "pg", durable=False)
        try:
            database = Database(postgres.start())
            clock = Clock.load(site.clock_path)
            with open_bus(f"sqlite:///{root}/bus.db", identity="prompt", clock=clock) as bus:
                begun = time.monotonic()
                service = PromptService(site=site, bus=bus, clock=clock, db=database)
                started = time.monotonic() - begun
                times = [ready_s(service, tiles[0], isot(clock.now_tai_s() + n)) for n in range(6)]
                elapsed, work, outcomes = result_s(service)
                service.close()
            warm = sorted(times[1:])
            print(
                json.dumps(
                    {
                        "machine": f"{platform.processor() or platform.machine()}, {site.config.prompt.workers} workers",
                        "service_start_s": round(started, 2),
                        "next_visit_to_ready_cold_s": round(times[0], 3),
                        "next_visit_to_ready_warm_s": round(warm[len(warm) // 2], 3),
                        "four_images_to_results_s": round(elapsed, 2),
                        "work_per_image_s": round(sorted(work)[len(work) // 2], 2),
                        "outcomes": outcomes,
                    }
                )
            )
        finally:
            postgres.stop()


if __name__ == "__main__":
    main()
