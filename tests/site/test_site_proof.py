"""The proof must see everything that can be wrong with stored images; the plan of faults is a function of its seed."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

from cumbre.archive.tape import open_tape
from cumbre.capture.primary import primary_cards
from cumbre.capture.raw_fits import raw_fits_bytes
from cumbre.core.configuration import Site
from cumbre.core.ids import ObsId, image_key
from cumbre.core.instrument import load_instrument
from cumbre.core.time import Clock
from cumbre.ledger import Ledger
from cumbre.ledger.schema import prepare
from cumbre.simulator.chip import raw_shape
from cumbre.simulator.faults import KINDS, flip_bit
from cumbre.site.chaos import chaos_site
from cumbre.site.chaos_plan import DECK, Targets, make_plan
from cumbre.site.proof import outstanding, prove, unfinished_exposures
from cumbre.stores.files import sha256_of

OBS = [f"XX_O_20261120_{number:06d}" for number in (1, 2)]
PLACES = ("base", "archive")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Two images that are where they should be."""
    site = chaos_site(tmp_path / "site", 1, 1, small_disks=False)
    instrument = load_instrument(site.config.instruments[0])
    clock = Clock.starting_at(1.8e9, rate=1.0)
    tapes = [open_tape(site, place, clock) for place in PLACES]
    for number, obs_id in enumerate(OBS):
        folder = site.path(f"summit/daq/{obs_id}")
        folder.mkdir(parents=True)
        sums = {}
        for detector in instrument.detectors:
            rng = np.random.default_rng(number * 10 + detector.id)
            array = rng.integers(900, 1300, raw_shape(detector), dtype=np.uint16)
            np.save(folder / f"{detector.name}.npy", array)
            sums[detector.name] = hashlib.sha256((folder / f"{detector.name}.npy").read_bytes()).hexdigest()
            header = {"complete": True, "keywords": {"OBSID": [obs_id, ""]}}
            cards = primary_cards(header, detector, f"sha256:{sums[detector.name]}")
            content = raw_fits_bytes(detector, array, cards)
            key = image_key(instrument.name, ObsId.parse(obs_id), detector.name)
            for place, tape in zip(PLACES, tapes, strict=True):
                path = site.path(f"{place}/raw") / key
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                tape.append(key, path, sha256_of(path))
        info = {"obs_id": obs_id, "instrument": instrument.name, "detectors": list(sums), "sha256": sums}
        (folder / "started.json").write_text("{}")
        (folder / "exposure.json").write_text(json.dumps(info))
    for tape in tapes:
        tape.sync()
        tape.close()
    return site


def stored(site: Site, place: str, obs_id: str = OBS[0], name: str = "R01_S00") -> Path:
    return next(site.path(f"{place}/raw").rglob(f"{obs_id}_{name}.fits"))


def test_what_is_whole_is_proven(site: Site) -> None:
    proof = prove(site)
    assert proof.ok, proof.problems()
    assert proof.public() | {"problems": 0} == {
        "images_taken": 2, "detector_images": 10, "verified_base": 2, "verified_archive": 2, "lost": 0,
        "duplicated": 0, "foreign": 0, "ledger_disagreements": 0, "on_tape": {"base": 10, "archive": 10},
        "problems": 0,
    }  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_missing_file_is_lost(site: Site, place: str) -> None:
    stored(site, place).unlink()
    proof = prove(site)
    assert dict(proof.lost) == {(OBS[0], "R01_S00"): [f"not at {place}"]}
    assert proof.verified[place] == 1


def test_one_wrong_pixel_is_lost(site: Site) -> None:
    """A file that is sound in itself, with a pixel that the camera did not read."""
    instrument = load_instrument(site.config.instruments[0])
    detector = instrument.detector("R01_S00")
    array = np.load(site.path(f"summit/daq/{OBS[0]}/R01_S00.npy"))
    array[1, 5, 7] += 1
    cards = primary_cards({"complete": True, "keywords": {"OBSID": [OBS[0], ""]}}, detector, "sha256:0")
    stored(site, "archive").write_bytes(raw_fits_bytes(detector, array, cards))
    (told,) = prove(site).lost[OBS[0], "R01_S00"][:1]
    assert "1 pixels are not the camera's" in told


def test_a_file_under_the_name_of_another_detector_is_lost(site: Site) -> None:
    stored(site, "base").write_bytes(stored(site, "base", name="R00_S00").read_bytes())
    assert (OBS[0], "R01_S00") in prove(site).lost


@pytest.mark.parametrize("seed", range(6))
def test_any_flipped_bit_in_a_cache_is_seen(site: Site, seed: int) -> None:
    flip_bit(stored(site, PLACES[seed % 2]), random.Random(seed))
    assert set(prove(site).lost) == {(OBS[0], "R01_S00")}


def test_a_flipped_bit_on_tape_is_seen(site: Site) -> None:
    line = next(x for x in map(json.loads, site.path("base/tape/index.jsonl").read_text().splitlines())
                if "R01_S00" in x["key"])  # fmt: skip
    volume = site.path("base/tape") / line["volume"]
    volume.chmod(0o644)
    with volume.open("r+b") as stream:
        stream.seek(line["offset"] + 100)
        byte = stream.read(1)[0]
        stream.seek(line["offset"] + 100)
        stream.write(bytes([byte ^ 1]))
    proof = prove(site)
    assert list(proof.lost) == [(OBS[0], "R01_S00")]
    assert proof.on_tape == {"base": 9, "archive": 10}


def test_twice_at_a_place_or_on_a_tape_is_told(site: Site) -> None:
    path = stored(site, "base")
    path.with_name(path.name + ".gz").write_bytes(path.read_bytes())
    index = site.path("archive/tape/index.jsonl")
    index.write_text(index.read_text() + index.read_text().splitlines()[0] + "\n")
    proof = prove(site)
    assert not proof.lost
    assert {told for tolds in proof.duplicated.values() for told in tolds} == {
        "2 files at base", "2 times on the tape of archive"
    }  # fmt: skip


def test_what_the_camera_never_took_is_foreign(site: Site) -> None:
    path = stored(site, "archive")
    other = Path(str(path).replace("000001", "000077"))
    other.parent.mkdir(parents=True)
    other.write_bytes(path.read_bytes())
    (told,) = prove(site).foreign
    assert "000077" in told


def test_a_damaged_camera_store_proves_nothing(site: Site) -> None:
    flip_bit(site.path(f"summit/daq/{OBS[1]}/R00_S00.npy"), random.Random(1))
    assert "the camera's own store" in prove(site).lost[OBS[1], "R00_S00"][0]


def test_the_ledger_must_agree(site: Site, database) -> None:
    prepare(database)
    assert len(prove(site, database).books) == 20  # it knows of nothing
    assert len(outstanding(site, database)) == 10
    instrument = load_instrument(site.config.instruments[0])
    for obs_id in OBS:
        database.execute("INSERT INTO ledger.image (obs_id, day_obs) VALUES (%s, 20261120)", (obs_id,))
        for detector in instrument.detectors:
            for place in PLACES:
                checksum = sha256_of(stored(site, place, obs_id, detector.name))
                for hop in (f"at_{place}", f"{place}_tape", "read_out"):
                    database.execute(
                        "INSERT INTO ledger.hop (obs_id, detector, detector_name, hop, outcome, place, checksum,"
                        " hop_tai, recv_tai) VALUES (%s, %s, %s, %s, 'ok', %s, %s, 0, 0)",
                        (obs_id, detector.id, detector.name, hop, place, checksum),
                    )
    assert Ledger(database).image(OBS[0]) is not None
    assert prove(site, database).ok
    assert outstanding(site, database) == set()
    database.execute(
        "UPDATE ledger.hop SET checksum = 'sha256:0' WHERE obs_id = %s AND detector = 0 AND hop = 'at_base'",
        (OBS[0],),
    )
    (told,) = prove(site, database).books
    assert "the ledger says ok sha256:0" in told
    database.execute("INSERT INTO ledger.image (obs_id, day_obs) VALUES ('XX_O_20261120_000003', 20261120)")
    database.execute(
        "INSERT INTO ledger.hop (obs_id, detector, hop, outcome, hop_tai, recv_tai)"
        " VALUES ('XX_O_20261120_000003', 0, 'read_out', 'ok', 0, 0)"
    )
    assert any("its store does not have it" in told for told in prove(site, database).books)


def test_exposures_that_never_ended_are_listed(site: Site) -> None:
    for number, ending in ((3, "aborted.json"), (4, None)):
        folder = site.path(f"summit/daq/XX_O_20261120_{number:06d}")
        folder.mkdir()
        (folder / "started.json").write_text("{}")
        if ending:
            (folder / ending).write_text("{}")
    assert unfinished_exposures(site) == ["XX_O_20261120_000004"]
    assert prove(site).ok


TARGETS = Targets(
    ["a", "b", "prompt"], ["x-y"], ["site", "base/raw"], ["base/tape"], ["R00_S00"], ["base/buffer"]
)


def plan(seed: int, seconds: float = 600.0, targets: Targets = TARGETS) -> list[dict[str, object]]:
    return [fault.public() for fault in make_plan(seed, seconds, targets)]


def test_the_plan_is_a_function_of_seed_length_and_site() -> None:
    assert plan(5) == plan(5)
    assert plan(5) != plan(6)


def test_every_kind_of_fault_comes_within_one_deck_and_ends_in_time() -> None:
    cards = sum(count for _, count in DECK)
    faults = make_plan(3, 600.0, TARGETS)
    assert {fault.kind for fault in faults[:cards]} == {kind for kind, _ in DECK} == set(KINDS)
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)
    assert all(fault.at_s + fault.lasts_s <= 601.0 for fault in faults)
    assert {fault.target for fault in faults if fault.kind == "kill_service"} == {"a", "b", "prompt"}


def test_what_a_site_does_not_have_is_not_broken() -> None:
    kinds = {fault.kind for fault in make_plan(3, 600.0, Targets(["a"], [], [], [], ["R00_S00"]))}
    assert not any(kind.startswith(("link", "disk", "tape", "rotten_tape", "buffer")) for kind in kinds)
    assert "kill_worker" not in kinds
    assert "kill_service" in kinds
