"""Retention: old and proven goes, everything else stays."""

from __future__ import annotations

import json

import pytest
from transfer_double import DETECTORS, hops, key_of, obs_id, write_image

from cumbre.archive.retention import RetentionService
from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.time import Clock
from cumbre.ledger import Ledger, LedgerService
from cumbre.stores.files import copy_verified, sha256_of
from cumbre.stores.postgres import Database

DAY_S = 86400.0


def stage(site: Site, bus: Bus, number: int, proven: range) -> None:
    """An image in the camera's store and three raw caches; its first detectors are on both tapes."""
    for index, path in enumerate(write_image(site, bus, number)):
        for place in ("base", "archive"):
            copy_verified(path, site.path(f"{place}/raw/{key_of(number, DETECTORS[index])}"))
            if index in proven:
                bus.publish(
                    "Image.hop",
                    {
                        "obsId": obs_id(number), "instrument": "DemoCam", "exposureId": 2026112000000 + number,
                        "detector": index, "detectorName": DETECTORS[index], "hop": f"{place}_tape",
                        "place": place, "byteSize": path.stat().st_size, "checksum": sha256_of(path),
                        "hopTai": bus.clock.now_tai_s(),
                    },
                )  # fmt: skip
    folder = site.path(f"summit/daq/{obs_id(number)}")
    folder.mkdir(parents=True)
    info = {"obs_id": obs_id(number), "instrument": "DemoCam", "detectors": list(DETECTORS)}
    (folder / "exposure.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("age_days", "daq", "summit", "caches"), [(0, 2, 8, 16), (5, 1, 8, 16), (9, 1, 3, 16), (40, 1, 3, 6)]
)
def test_only_old_and_proven_files_go(
    site: Site, bus: Bus, clock: Clock, database: Database, age_days: int, daq: int, summit: int, caches: int
) -> None:
    stage(site, bus, 1, range(4))
    stage(site, bus, 2, range(1))
    ledger = LedgerService(site=site, bus=bus, db=database)
    while ledger.step(0.05):
        pass
    later = Clock(clock.tai0_s + age_days * DAY_S, clock.mono0_s, 1.0)
    service = RetentionService(site=site, bus=bus, clock=later, ledger=Ledger(database))
    service.step(0.0)
    assert len(list(site.path("summit/daq").iterdir())) == daq
    assert len(list(site.path("summit/raw").rglob("*.fits"))) == summit
    found = [*site.path("base/raw").rglob("*.fits"), *site.path("archive/raw").rglob("*.fits")]
    assert len(found) == caches
    assert len(hops(bus, "deleted")) == 24 - summit - caches
    assert service.step(0.0) == 0
    service.close()
    ledger.close()


def test_frames_of_years_ago_that_came_today_are_new_here(
    site: Site, bus: Bus, clock: Clock, database: Database
) -> None:
    stage(site, bus, 1, range(4))
    ledger = LedgerService(site=site, bus=bus, db=database)
    while ledger.step(0.05):
        pass
    years = 9 * 365 * DAY_S
    database.execute("UPDATE ledger.hop SET hop_tai = hop_tai + %s", (years,))
    today = Clock(clock.tai0_s + years + DAY_S, clock.mono0_s, 1.0)
    service = RetentionService(site=site, bus=bus, clock=today, ledger=Ledger(database))
    service.step(0.0)
    assert hops(bus, "deleted") == []
    service.close()
    ledger.close()


@pytest.mark.parametrize("word", ["catch-up: found there", "shipped on disk 76c0e41808b6"])
def test_copies_that_came_late_count_and_nothing_goes_before_them(
    site: Site, bus: Bus, clock: Clock, database: Database, word: str
) -> None:
    """A site without tape: what the archive has proves that the summit's copy may go, whichever way it came."""
    places = {name: place.model_copy(update={"tape": None}) for name, place in site.config.places.items()}
    bare = Site(site.root, site.config.model_copy(update={"places": places}))
    paths = write_image(bare, bus, 1)
    common = {"obsId": obs_id(1), "instrument": "DemoCam", "exposureId": 2026112000001}
    ledger = LedgerService(site=bare, bus=bus, db=database)
    later = Clock(clock.tai0_s + 40 * DAY_S, clock.mono0_s, 1.0)
    service = RetentionService(site=bare, bus=bus, clock=later, ledger=Ledger(database))

    def arrive(place: str, detectors: range, **changed: object) -> int:
        for index in detectors:
            said = {
                "detector": index, "detectorName": DETECTORS[index], "hop": f"at_{place}", "place": place,
                "checksum": sha256_of(paths[index]), "message": word, "hopTai": bus.clock.now_tai_s(),
            }  # fmt: skip
            bus.publish("Image.hop", common | said | changed)
        while ledger.step(0.05):
            pass
        return service.clean()

    assert arrive("base", range(4)) == 0  # nothing at the archive yet
    assert arrive("archive", range(1), checksum="sha256:" + "0" * 64) == 0  # another content there
    assert arrive("archive", range(1, 3)) == 2
    assert [path.exists() for path in paths] == [True, False, False, True]
    ledger.close()
