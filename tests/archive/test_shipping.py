"""Media shipping: what went on the disk comes out of it, once; what a disk only claims does not come in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transfer_double import DETECTORS, hops, key_of, obs_id, say_written, write_image

from cumbre.archive.shipment import MANIFEST, SEAL, Report, read_manifest, verify
from cumbre.archive.shipping import Export, Selection
from cumbre.archive.shipping_import import Import
from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.core.time import Clock
from cumbre.ledger import Ledger, LedgerService
from cumbre.stores.files import sha256_of, sha256_of_bytes
from cumbre.stores.postgres import Database

BEGIN = 1_795_222_837.0


def sidecar(site: Site, number: int) -> None:
    """Header beside the pixels: the exposure began 100 s after the one before."""
    from cumbre.core.time import isot

    path = site.path(f"summit/raw/{key_of(number)}").with_name(f"{obs_id(number)}_header.json")
    keywords = {"DATE-BEG": [isot(BEGIN + 100 * number), ""], "RA": [150.0, ""], "DEC": [-20.0, ""]}
    path.write_text(json.dumps({"group_id": f"group {number}", "keywords": keywords}))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def out(site: Site, bus: Bus, clock: Clock, disk: Path) -> Callable[..., Report]:
    def run(selection: Selection | None = None, ledger: Ledger | None = None) -> Report:
        chosen = selection or Selection(since_tai=BEGIN, until_tai=BEGIN + 1000)
        work = Export(site=site, bus=bus, clock=clock, disk=disk, source="summit", ledger=ledger)
        return work.run(chosen)

    return run


@pytest.fixture
def take(site: Site, bus: Bus, clock: Clock, disk: Path) -> Callable[..., Report]:
    def run(ledger: Ledger | None = None) -> Report:
        return Import(site=site, bus=bus, clock=clock, disk=disk, place="archive", ledger=ledger).run()

    return run


def follow(site: Site, bus: Bus, database: Database) -> Ledger:
    """A ledger that knows everything that was said so far."""
    service = LedgerService(site=site, bus=bus, db=Database(database.dsn))
    while service.step(0.05):
        pass
    service.close()
    return Ledger(database)


def seal(disk: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A liar's manifest: changed, and sealed like an honest one."""
    body = json.loads((disk / MANIFEST).read_bytes())
    change(body)
    content = json.dumps(body).encode()
    (disk / MANIFEST).write_bytes(content)
    (disk / SEAL).write_text(f"{sha256_of_bytes(content)}  {MANIFEST}\n")


def test_images_and_telemetry_travel_and_arrive_once(
    site: Site, bus: Bus, disk: Path, out: Callable[..., Report], take: Callable[..., Report]
) -> None:
    for number in (1, 2, 3):
        write_image(site, bus, number)
        sidecar(site, number)
    until = BEGIN + 350.0
    report = out(Selection(since_tai=BEGIN + 150.0, until_tai=until))
    assert report.copied == 12  # images 2 and 3: four detectors and two sidecars each
    assert verify(disk) == []
    (recording,) = read_manifest(disk).recordings.values()
    lines = [json.loads(line) for line in (disk / "telemetry" / recording.file).read_text().splitlines()]
    expected = list(bus.replay(None, since_tai=BEGIN + 150.0, until_tai=until))
    assert [line["fields"]["obsId"] for line in lines if line["topic"] == "Image.hop"] == [
        m.fields["obsId"] for m in expected if m.topic == "Image.hop"
    ]
    taken = take()
    assert (taken.copied, taken.present, taken.refused) == (12, 0, [])
    told = hops(bus, "at_archive")
    assert {(hop["obsId"], hop["detector"]) for hop in told} == {
        (obs_id(n), d) for n in (2, 3) for d in range(4)
    }
    for hop in told:
        original = site.path(f"summit/raw/{key_of(hop['exposureId'] % 100000, hop['detectorName'])}")
        assert sha256_of(Path(hop["path"])) == sha256_of(original) == hop["checksum"]
        assert hop["groupId"] == f"group {hop['exposureId'] % 100000}"
        assert hop["message"].startswith("shipped on disk")
    shipped = list(site.path("archive/telemetry").rglob("*.jsonl"))
    assert [sha256_of(path) for path in shipped] == [recording.sha256]
    item = read_manifest(disk).items[key_of(2)]
    assert item.sky.begin_tai == pytest.approx(BEGIN + 200, abs=1e-3)
    assert item.sky.ra is not None


def test_both_ends_may_be_repeated(
    site: Site,
    bus: Bus,
    database: Database,
    disk: Path,
    out: Callable[..., Report],
    take: Callable[..., Report],
) -> None:
    write_image(site, bus, 1)
    sidecar(site, 1)
    assert out().copied == 6
    before = {path: path.stat().st_mtime_ns for path in (disk / "images").rglob("*.*")}
    again = out()
    assert (again.copied, again.present) == (0, 6)
    write_image(site, bus, 2)
    sidecar(site, 2)
    assert out().copied == 6  # more on the same disk
    assert before.items() <= {p: p.stat().st_mtime_ns for p in (disk / "images").rglob("*.*")}.items()
    assert take().copied == 12
    ledger = follow(site, bus, database)
    twice = take(ledger)
    assert (twice.copied, twice.present, twice.refused) == (0, 12, [])
    assert len(hops(bus, "at_archive")) == 8
    assert ledger.missing("archive") == []
    assert ledger.night(20261120)["shipped"] == 8
    assert ledger.may_delete(obs_id(1), 0, ["archive"])


def test_an_interrupted_export_goes_on_and_is_no_shipment_before_its_end(
    site: Site, bus: Bus, disk: Path, out: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        write_image(site, bus, number)
        sidecar(site, number)
    import cumbre.archive.shipping as module

    copy, count = module.copy_verified, [0]

    def pulled(*given: Any) -> Any:
        count[0] += 1
        if count[0] == 8:
            raise OSError(5, "the disk was pulled out")
        return copy(*given)

    monkeypatch.setattr(module, "copy_verified", pulled)
    with pytest.raises(OSError, match="pulled"):
        out()
    with pytest.raises(NotFoundError, match="run the export again"):
        read_manifest(disk)
    with (disk / "progress.jsonl").open("ab") as torn:
        torn.write(b'{"key": "DemoCam/2026')
    report = out()
    assert (report.copied, report.present) == (5, 7)
    assert verify(disk) == []
    assert not (disk / "progress.jsonl").exists()


def test_what_is_missing_at_a_place_by_the_ledger(
    site: Site, bus: Bus, database: Database, disk: Path, out: Callable[..., Report]
) -> None:
    for number in (1, 2):
        for detector, path in enumerate(write_image(site, bus, number)):
            if number == 1:
                say_written(bus, number, detector, path, hop="at_archive", place="archive")
        sidecar(site, number)
    ledger = follow(site, bus, database)
    site.path(f"summit/raw/{key_of(2, 'R00_S01')}").write_bytes(b"rot")
    report = out(Selection(missing_at="archive"), ledger)
    shipped = {key for key in read_manifest(disk).items if key.endswith(".fits")}
    assert shipped == {key_of(2, name) for name in DETECTORS if name != "R00_S01"}
    (refused,) = report.refused  # its copy is not what the writer wrote
    assert refused["file"] == key_of(2, "R00_S01")
    with pytest.raises(NotFoundError, match="ledger"):
        out(Selection(missing_at="archive"))


def test_a_manifest_that_was_changed_on_the_way_is_believed_in_nothing(
    site: Site, bus: Bus, disk: Path, out: Callable[..., Report], take: Callable[..., Report]
) -> None:
    write_image(site, bus, 1)
    sidecar(site, 1)
    out()
    (disk / MANIFEST).write_bytes((disk / MANIFEST).read_bytes().replace(b"group 1", b"group 2"))
    with pytest.raises(BadFileError, match="nothing of this disk is taken"):
        take()
    with pytest.raises(BadFileError):
        verify(disk)
    assert not list(site.path("archive/raw").rglob("*.fits"))
    assert len(list(site.path("archive/quarantine").glob("*_manifest.json"))) == 1


KEY = key_of(1)


def first(body: dict[str, Any]) -> dict[str, Any]:
    return next(item for item in body["images"] if item["key"] == KEY)


LIES: dict[str, Callable[[Path], None]] = {
    "size": lambda disk: seal(disk, lambda body: first(body).update(size=29_999)),
    "checksum": lambda disk: seal(disk, lambda body: first(body).update(sha256="sha256:" + "0" * 64)),
    "rot": lambda disk: flip(disk / "images" / KEY),
    "short": lambda disk: os.truncate(disk / "images" / KEY, 1000),
    "absent": lambda disk: (disk / "images" / KEY).unlink(),
    "link": lambda disk: link(disk / "images" / KEY, disk.parent / "secret"),
    "folder": lambda disk: folder_link(disk / "images/DemoCam"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[77] ^= 1
    path.write_bytes(content)


def link(path: Path, secret: Path) -> None:
    secret.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(secret)


def folder_link(path: Path) -> None:
    away = path.parent.parent.parent / "elsewhere"
    shutil.move(path, away)
    path.symlink_to(away)


@pytest.mark.parametrize("lie", LIES)
def test_files_that_are_not_as_the_manifest_says_are_refused(
    site: Site, bus: Bus, disk: Path, out: Callable[..., Report], take: Callable[..., Report], lie: str
) -> None:
    write_image(site, bus, 1)
    sidecar(site, 1)
    out()
    LIES[lie](disk)
    assert verify(disk)
    report = take()
    refused = {item["file"] for item in report.refused}
    assert KEY in refused
    assert len(refused) == (6 if lie == "folder" else 1)
    assert report.copied == (0 if lie == "folder" else 5)
    assert not site.path(f"archive/raw/{KEY}").exists()
    assert (obs_id(1), 0) not in {(hop["obsId"], hop["detector"]) for hop in hops(bus, "at_archive")}
    assert list(site.path("archive/quarantine").iterdir())
    assert hops(bus, "quarantined", outcome="BadFile")


@pytest.mark.parametrize(
    "key",
    [
        "../../../etc/passwd.fits",
        "/etc/passwd",
        f"{KEY}/../x.fits",
        KEY.replace("/", "\\"),
        "a" * 300,
        7,
        None,
    ],
)
def test_a_path_in_a_manifest_makes_it_no_manifest(
    site: Site, bus: Bus, disk: Path, out: Callable[..., Report], take: Callable[..., Report], key: Any
) -> None:
    write_image(site, bus, 1)
    sidecar(site, 1)
    out()
    seal(disk, lambda body: first(body).update(key=key))
    with pytest.raises(BadFileError):
        take()
    assert not list(site.path("archive/raw").rglob("*.fits"))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(format="cumbre shipment 2"),
        lambda body: body.update(shipment="../../x"),
        lambda body: body["images"].append(first(body)),
        lambda body: body["telemetry"][0].update(file="../../../site.yaml.jsonl"),
        lambda body: body["telemetry"][0].update(size=-1),
        lambda body: body.pop("images"),
        lambda body: body.update(images={"a": 1}),
    ],
)
def test_manifests_of_another_form_are_refused(
    site: Site, bus: Bus, disk: Path, out: Callable[..., Report], take: Callable[..., Report], change: Any
) -> None:
    write_image(site, bus, 1)
    sidecar(site, 1)
    out()
    seal(disk, change)
    with pytest.raises(BadFileError):
        take()
    assert not site.path("archive/raw").exists()


def test_a_forged_image_is_refused_by_the_ledger_or_by_the_one_that_is_there(
    site: Site,
    bus: Bus,
    database: Database,
    disk: Path,
    out: Callable[..., Report],
    take: Callable[..., Report],
) -> None:
    write_image(site, bus, 1)
    sidecar(site, 1)
    out()
    forged = disk / "images" / KEY
    flip(forged)
    seal(disk, lambda body: first(body).update(sha256=sha256_of(forged)))
    assert verify(disk) == []  # it is consistent in itself
    ledger = follow(site, bus, database)
    report = take(ledger)
    assert [item["outcome"] for item in report.refused] == ["Conflict"]
    assert report.copied == 5
    assert not site.path(f"archive/raw/{KEY}").exists()
    good = site.path(f"archive/raw/{KEY}")
    good.write_bytes(site.path(f"summit/raw/{KEY}").read_bytes())
    kept = good.read_bytes()
    assert [item["outcome"] for item in take(None).refused] == ["Conflict"]
    assert good.read_bytes() == kept
    names = [path.name for path in site.path("archive/quarantine").iterdir()]
    assert any(name.endswith("R00_S00.fits") for name in names)


def test_telemetry_that_is_not_as_the_manifest_says_is_refused(
    site: Site, bus: Bus, disk: Path, out: Callable[..., Report], take: Callable[..., Report]
) -> None:
    write_image(site, bus, 1)
    sidecar(site, 1)
    out()
    (path,) = (disk / "telemetry").iterdir()
    flip(path)
    report = take()
    assert [item["file"] for item in report.refused] == [path.name]
    assert not list(site.path("archive/telemetry").rglob("*.jsonl"))
