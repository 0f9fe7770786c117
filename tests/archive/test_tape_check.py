"""Reading a tape back: by sky, by time, byte for byte; what is damaged is found, told and written again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from transfer_double import DETECTORS, hops, key_of, obs_id, running, until, write_image

from cumbre.archive.tape import open_tape, view_tape
from cumbre.archive.tape_check import DAMAGED, DIFFERS, LOST, UNTOLD, VOLUME, verify
from cumbre.archive.tape_index import TapeEntry, TapeIndex
from cumbre.archive.tape_writer import TapeWriter
from cumbre.bus import Bus
from cumbre.cli.tape import tape as tape_command
from cumbre.core.configuration import Site
from cumbre.core.geometry import sky_from_pixel
from cumbre.core.instrument import load_instrument
from cumbre.core.time import Clock, isot, tai_from_utc, utc_from_tai
from cumbre.ledger import Ledger, LedgerService
from cumbre.stores.files import copy_verified, sha256_of
from cumbre.stores.postgres import Database

BEGIN = 1_795_222_837.0
POINTINGS = {1: (150.0, -20.0, 0.0), 2: (150.0, -20.0, 45.0), 3: (359.99, 2.0, 90.0), 4: None}


def to_base(site: Site, bus: Bus, number: int) -> None:
    """An image with its header in the base's raw cache."""
    keywords: dict[str, Any] = {"DATE-BEG": [isot(BEGIN + 100 * number), ""]}
    if pointing := POINTINGS[number]:
        keywords |= {name: [value, ""] for name, value in zip(("RA", "DEC", "ROTPA"), pointing, strict=True)}
    for path in write_image(site, bus, number):
        target = site.path("base/raw") / path.relative_to(site.path("summit/raw"))
        copy_verified(path, target)
    header = target.with_name(f"{obs_id(number)}_header.json")
    header.write_text(json.dumps({"group_id": "g", "keywords": keywords}))


@pytest.fixture
def filled(site: Site, bus: Bus, clock: Clock) -> Site:
    """Four images on the base's tape, in volumes of about one image."""
    path = site.path("site.yaml")
    path.write_text(path.read_text().replace("tape: base/tape", "tape: base/tape\n    tape_volume_mb: 0.12"))
    site = Site.load(site.root)
    for number in POINTINGS:
        to_base(site, bus, number)
    writer = TapeWriter(site=site, bus=bus, clock=clock, place="base", scan_every_s=0.05)
    until(lambda: bool(writer.step(0.02) and False) or len(hops(bus, "base_tape")) == 16)
    writer.close()
    return site


@pytest.fixture
def run(filled: Site) -> Callable[..., Result]:
    def call(verb: str, *words: Any) -> Result:
        given = [verb, "--site", str(filled.root), "--place", "base", *map(str, words)]
        return CliRunner().invoke(tape_command, given)

    return call


def rows(result: Result) -> Any:
    return json.loads(result.stdout)


def rot(site: Site, entry: TapeEntry) -> None:
    path = site.path(f"base/tape/{entry.volume}")
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(entry.offset + 77)
        stream.write(b"rot")


def test_a_point_on_a_pixel_finds_the_detectors_that_saw_it(filled: Site) -> None:
    camera = load_instrument("democam")
    index, _ = view_tape(filled, "base")
    for number, pointing in POINTINGS.items():
        if pointing is None:
            continue
        for detector in camera.detectors:
            ra, dec = sky_from_pixel(camera, detector, *pointing, detector.nx / 3, detector.ny / 4)
            found = index.select(cone=(float(ra), float(dec), 0.0), obs_ids=[obs_id(number)])
            assert key_of(number, detector.name) in {entry.key for entry in found}
    entry = index.entry(key_of(1))
    assert entry.ra is not None
    far = index.select(cone=(150.0, -20.0 + 10.0, 0.5))
    assert far == []
    wide = index.select(cone=(150.0, -20.0, 5.0))
    assert {e.key.split("/")[2] for e in wide} == {obs_id(1), obs_id(2)}
    assert any(e.key.endswith("_header.json") for e in wide)  # sidecars of the images come along
    corner = index.select(cone=(0.0, 2.0, 0.3))  # over the meridian where ra begins again
    assert {e.key.split("/")[2] for e in corner} == {obs_id(3)}


def test_by_time_and_by_name_on_the_command_line(
    filled: Site, run: Callable[..., Result], tmp_path: Path
) -> None:
    since, until_ = (isot(utc_from_tai(BEGIN + 100 * n)) for n in (2, 4))
    listed = rows(run("list", "--from", since, "--to", until_, "--json"))
    assert {row["key"].split("/")[2] for row in listed} == {obs_id(2), obs_id(3)}
    out = tmp_path / "back"
    read = run("read", "--from", since, "--to", until_, "--out", out)
    assert read.exit_code == 0, read.output
    for number in (2, 3):
        for name in DETECTORS:
            key = key_of(number, name)
            assert (out / key).read_bytes() == filled.path(f"summit/raw/{key}").read_bytes()
    assert len(list(out.rglob("*.fits"))) == 8
    stamp = (out / key_of(2)).stat().st_mtime_ns
    (out / key_of(3)).write_bytes(b"torn")
    assert run("read", "--from", since, "--to", until_, "--out", out).exit_code == 0
    assert (out / key_of(2)).stat().st_mtime_ns == stamp
    assert sha256_of(out / key_of(3)) == sha256_of(filled.path(f"base/raw/{key_of(3)}"))
    named = rows(run("list", "--obs-id", obs_id(4), "--json"))
    assert {row["key"].split("/")[2] for row in named} == {obs_id(4)}
    assert tai_from_utc(utc_from_tai(BEGIN)) == pytest.approx(BEGIN)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--ra", 1], 2),
        (["--ra", 1, "--dec", 91, "--radius", 1], 2),
        (["--from", "yesterday"], 2),
        (["--obs-id", "XC_O_20200101_000001"], 3),
    ],
)
def test_conditions_that_make_no_sense(run: Callable[..., Result], words: list[Any], code: int) -> None:
    result = run("list", *words)
    raised = result.exception
    assert (raised.exit_code if hasattr(raised, "exit_code") else result.exit_code) == code


def test_a_good_tape_verifies_with_and_without_the_ledger(
    filled: Site, run: Callable[..., Result], bus: Bus, database: Database
) -> None:
    result = run("verify", "--json")
    assert result.exit_code == 0, result.output
    report = rows(result)
    assert (report["files"], report["good"], report["ledger"]) == (20, True, False)
    assert report["bytes"] == sum(path.stat().st_size for path in filled.path("base/tape").glob("*.tar"))
    told = copies(filled, bus, database)
    index, shelf = view_tape(filled, "base")
    assert verify(index, shelf, told).findings == []


def copies(site: Site, bus: Bus, database: Database) -> list[dict[str, Any]]:
    service = LedgerService(site=site, bus=bus, db=Database(database.dsn))
    while service.step(0.05):
        pass
    service.close()
    return Ledger(database).copies("base_tape")


def problems(site: Site, told: list[dict[str, Any]] | None = None) -> list[tuple[str, str]]:
    index, shelf = view_tape(site, "base")
    return [(finding.problem, finding.key) for finding in verify(index, shelf, told).findings]


def test_every_kind_of_damage_is_found(filled: Site, bus: Bus, database: Database) -> None:
    told = copies(filled, bus, database)
    index, _ = view_tape(filled, "base")
    first = min(index.entries.values(), key=lambda e: (e.volume, e.offset))
    filled.path(f"base/tape/{first.volume}").chmod(0o644)
    with filled.path(f"base/tape/{first.volume}").open("r+b") as stream:
        stream.seek(first.offset - 400)  # the header that tar needs
        stream.write(b"?")
    assert problems(filled) == [(VOLUME, "")]
    rot(filled, index.entry(key_of(3, "R00_S01")))
    assert problems(filled) == [(VOLUME, ""), (DAMAGED, key_of(3, "R00_S01"))]
    last = max(index.entries.values(), key=lambda e: (e.volume, e.offset))
    path = filled.path(f"base/tape/{last.volume}")
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.truncate(last.offset + 5)
    assert (DAMAGED, last.key) in problems(filled)
    ghost = {"obs_id": obs_id(9), "detector_name": "R00_S00", "checksum": "sha256:" + "1" * 64, "path": "x@1"}
    other = [row | {"checksum": "sha256:" + "2" * 64} if row["obs_id"] == obs_id(3) else row for row in told]
    without = [row for row in other if row["obs_id"] != obs_id(1)]
    found = problems(filled, [*without, ghost])
    assert (LOST, f"{obs_id(9)}/R00_S00") in found
    assert {key for problem, key in found if problem == DIFFERS} == {key_of(3, name) for name in DETECTORS}
    assert {key for problem, key in found if problem == UNTOLD} == {key_of(1, name) for name in DETECTORS}
    filled.path(f"base/tape/{first.volume}").unlink()
    assert (VOLUME, "") in problems(filled)


def test_damage_is_told_to_the_ledger_and_repaired_from_another_place(
    filled: Site, run: Callable[..., Result], bus: Bus, database: Database
) -> None:
    index, _ = view_tape(filled, "base")
    old = index.entry(key_of(2))
    rot(filled, old)
    filled.path(f"base/raw/{key_of(2)}").write_bytes(b"rot too")
    ledger = Ledger(database)
    copies(filled, bus, database)
    assert ledger.may_delete(obs_id(2), 0, ["base_tape"])
    result = run("verify", "--json")
    assert result.exit_code == 1
    copies(filled, bus, database)
    assert not ledger.may_delete(obs_id(2), 0, ["base_tape"])
    repaired = run("verify", "--repair", "--json")
    assert repaired.exit_code == 0, repaired.output
    (finding,) = [item for item in rows(repaired)["findings"] if item["problem"] == DAMAGED]
    assert finding["repaired_from"] == str(filled.path(f"summit/raw/{key_of(2)}"))
    index, shelf = view_tape(filled, "base")
    new = index.entry(key_of(2))
    assert new.replaces == old.place
    assert new.volume > old.volume
    assert (new.ra, new.begin_tai) == (old.ra, old.begin_tai)
    assert [entry.place for entry in index.superseded] == [old.place]  # kept where it was
    assert verify(index, shelf).is_good
    copies(filled, bus, database)
    assert ledger.may_delete(obs_id(2), 0, ["base_tape"])
    assert ledger.copies("base_tape")[4]["path"] == new.place


@pytest.mark.parametrize("key", [key_of(1), key_of(1).rpartition("/")[0] + f"/{obs_id(1)}_header.json"])
def test_a_running_writer_serves_the_repair(
    filled: Site, run: Callable[..., Result], bus: Bus, clock: Clock, key: str
) -> None:
    index, _ = view_tape(filled, "base")
    rot(filled, index.entry(key))
    with running(TapeWriter(site=filled, bus=bus, clock=clock, place="base")):
        until(lambda: filled.path("base/taped/lock").exists())
        result = run("verify", "--repair", "--json")
    assert result.exit_code == 0, result.output
    assert view_tape(filled, "base")[0].entry(key).replaces
    assert not list(filled.path("base/taped/rewrites").iterdir())


def test_without_a_good_copy_anywhere_it_says_so(filled: Site, run: Callable[..., Result], bus: Bus) -> None:
    index, _ = view_tape(filled, "base")
    rot(filled, index.entry(key_of(1)))
    for place in ("summit", "base"):
        shutil.rmtree(filled.path(f"{place}/raw"))
    result = run("verify", "--repair")
    assert result.exit_code == 1
    assert "no good copy" in result.output
    read = run("read", "--obs-id", obs_id(1), "--out", filled.path("out"))
    assert read.exit_code == 1
    assert len(list(filled.path("out").rglob("*.fits"))) == 3  # the others are read all the same


def test_indexes_of_before_are_read(tmp_path: Path) -> None:
    line = {
        "volume": "base-000001.tar",
        "key": key_of(1),
        "offset": 512,
        "size": 3,
        "sha256": "x",
        "tai": 1.0,
    }
    (tmp_path / "index.jsonl").write_text(json.dumps(line) + "\n" + '{"torn')
    index = TapeIndex.read(tmp_path)
    assert list(index.entries) == [key_of(1)]
    assert index.select() == list(index.entries.values())


def test_the_volume_checksum_is_that_of_the_file(filled: Site, clock: Clock) -> None:
    index, _ = view_tape(filled, "base")
    assert len(index.volumes) >= 3
    for volume in index.volumes.values():
        assert sha256_of(filled.path(f"base/tape/{volume.volume}")) == volume.sha256
    tape = open_tape(filled, "base", clock)
    assert tape.index.volumes == index.volumes
    tape.close()
