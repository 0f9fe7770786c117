"""Files of a real camera in the same flow; whatever is wrong with one of them, the next one is taken."""

from __future__ import annotations

import json
from pathlib import Path

import camera_double as camera
import pytest
from astropy.io import fits

from cumbre.bus import Bus
from cumbre.capture.directory import DirectoryCamera
from cumbre.capture.primary import primary_cards
from cumbre.capture.raw_fits import raw_fits_bytes
from cumbre.core.configuration import Site
from cumbre.core.instrument import load_instrument
from cumbre.core.time import Clock

OBS = "XC_O_20261120_000001"
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def camera_file(folder: Path, index: int, seed: int = 1, **changed: object) -> Path:
    detector = camera.INSTRUMENT.detectors[index]
    keywords = {
        "OBSID": OBS, "DATE-BEG": "2026-11-21T01:00:37", "DATE-END": "2026-11-21T01:01:07", "EXPTIME": 30.0,
        "IMGTYPE": "OBJECT", "FILTER": "r_demo", "RA": 53.1, "DEC": -27.8, "ROTPA": 0.0, "GROUPID": "g1",
        "INSTRUME": "DemoCam",
    } | changed  # fmt: skip
    header = {"complete": True, "keywords": {k: [v, ""] for k, v in keywords.items() if v is not None}}
    content = raw_fits_bytes(
        detector, camera.arrays(seed)[detector.name], primary_cards(header, detector, "sha256:" + "0" * 64)
    )
    path = folder / f"frame-{index}-{seed}.fits"
    path.write_bytes(content)
    return path


@pytest.fixture
def taker(site: Site, bus: Bus, clock: Clock) -> DirectoryCamera:
    return DirectoryCamera(site=site, bus=bus, clock=clock, instrument=camera.INSTRUMENT)


def test_files_are_kept_byte_for_byte_and_told(
    taker: DirectoryCamera, site: Site, bus: Bus, tmp_path: Path
) -> None:
    files = [camera_file(tmp_path, index) for index in (2, 0)]
    taken = taker.ingest(files)
    assert [(item.outcome, item.detector) for item in taken] == [("ok", 2), ("ok", 0)]
    folder = site.path(f"summit/raw/DemoCam/20261120/{OBS}")
    for source, item in zip(files, taken, strict=True):
        assert item.path is not None
        assert item.path.parent == folder
        assert item.path.read_bytes() == source.read_bytes()
    assert item.path.name == f"{OBS}_R00_S00.fits"
    manifest = json.loads((folder / f"{OBS}_expectedSensors.json").read_bytes())
    assert manifest["expectedSensors"] == {"R00_S10": "SCIENCE", "R00_S00": "SCIENCE"}
    assert sorted(str(hop["detectorName"]) for hop in camera.hops(bus, "written")) == ["R00_S00", "R00_S10"]
    start = bus.latest("Camera.startIntegration")
    end = bus.latest("Camera.endReadout")
    assert start is not None
    assert end is not None
    assert start.fields["timestampAcquisitionStart"] == camera.BEGIN_TAI
    assert start.fields["imageType"] == "OBJECT"
    assert (
        dict(zip(start.fields["additionalKeys"], start.fields["additionalValues"], strict=True))["ra"]
        == "53.1"
    )
    assert end.fields["detectors"] == ["R00_S00", "R00_S10"]


def test_again_is_harmless_and_other_content_is_a_conflict(
    taker: DirectoryCamera, site: Site, bus: Bus, tmp_path: Path
) -> None:
    (first,) = taker.ingest([camera_file(tmp_path, 0)])
    assert first.path is not None
    before = first.path.read_bytes()
    (again,) = taker.ingest([tmp_path / "frame-0-1.fits"])
    assert (again.outcome, again.path) == ("ok", first.path)
    (other,) = taker.ingest([camera_file(tmp_path, 0, seed=2)])
    assert other.outcome == "Conflict"
    assert first.path.read_bytes() == before
    assert other.path is not None
    assert other.path.read_bytes() == (tmp_path / "frame-0-2.fits").read_bytes()
    (hop,) = camera.hops(bus, "quarantined")
    assert (hop["outcome"], hop["detector"]) == ("Conflict", 0)


def test_bad_files_go_to_quarantine_and_the_good_one_passes(
    taker: DirectoryCamera, site: Site, bus: Bus, tmp_path: Path
) -> None:
    good = camera_file(tmp_path, 1)
    truncated, text, empty, headless, stranger = (tmp_path / f"{n}.fits" for n in "abcde")
    truncated.write_bytes(good.read_bytes()[:-5760])
    text.write_text("not FITS at all")
    empty.touch()
    headless.write_bytes(camera_file(tmp_path, 2, OBSID=None).read_bytes())
    stranger.write_bytes(camera_file(tmp_path, 3).read_bytes().replace(b"R00_S11", b"R99_S11"))
    absent = tmp_path / "absent.fits"
    taken = taker.ingest([truncated, text, empty, headless, stranger, absent, good])
    assert [item.outcome for item in taken][-1] == "ok"
    assert all(item.outcome in ("BadFile", "NotFound") and item.message for item in taken[:-1])
    for item in taken[:5]:
        assert item.path is not None, item
        assert item.path.is_relative_to(site.path("summit/quarantine"))
        reason = json.loads(item.path.with_name(f"{item.path.name}.reason.json").read_bytes())
        assert reason["outcome"] == item.outcome
        assert item.path.read_bytes() == item.source.read_bytes()
    assert len(camera.hops(bus, "written")) == 1


def test_a_reader_that_breaks_is_survived(site: Site, bus: Bus, clock: Clock, tmp_path: Path) -> None:
    def broken(path: Path) -> dict[str, object]:
        if "bad" in path.name:
            raise ZeroDivisionError("inside a reader")
        return {"obs_id": OBS, "detector_id": 1, "begin_tai": 1.0, "end_tai": 2.0, "exposure_s": float("nan")}

    for name in ("bad", "good"):
        (tmp_path / name).write_bytes(name.encode())
    taker = DirectoryCamera(site=site, bus=bus, clock=clock, instrument=camera.INSTRUMENT, describe=broken)
    assert [item.outcome for item in taker.ingest([tmp_path / "bad", tmp_path / "good"])] == ["BadFile", "ok"]


def test_real_latiss_files(site: Site, bus: Bus, clock: Clock) -> None:
    files = sorted((SHARED / "raw_lsst_headers").glob("AT_O_20220208_00014[0-2]*.fits.gz"))
    if not files:
        pytest.skip(f"no real raw files in {SHARED}")
    latiss = load_instrument("latiss")
    taken = DirectoryCamera(site=site, bus=bus, clock=clock, instrument=latiss).ingest(files)
    assert [(item.outcome, item.obs_id) for item in taken] == [
        ("ok", f"AT_O_20220208_00014{n}") for n in (0, 1, 2)
    ]
    for source, item in zip(files, taken, strict=True):
        assert item.path is not None
        assert item.path.name.endswith(".fits.gz")
        assert item.path.read_bytes() == source.read_bytes()
        assert fits.getheader(item.path)["DAYOBS"] == "20220208"
