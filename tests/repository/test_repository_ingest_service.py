"""The ingest service on a site of four detectors, files written as the image writer does."""

from __future__ import annotations

import json

import numpy as np
import pytest
from astropy.io import fits

from cumbre.bus import open_bus
from cumbre.core.configuration import Site, parse_site
from cumbre.core.ids import ObsId, image_key, manifest_key
from cumbre.core.instrument import load_instrument
from cumbre.core.time import Clock, isot
from cumbre.repository.ingest import IngestService

CAMERA = load_instrument("democam")
OBS = "XC_O_20261120_000012"
BEGIN = 1795223000.0


@pytest.fixture
def site(tmp_path):
    text = """
observatory: {latitude_deg: -30, longitude_deg: -70}
instruments: [democam]
places:
  summit: {raw: summit/raw, repository: summit/repository}
  archive: {raw: archive/raw, repository: archive/repository}
"""
    return Site(tmp_path, parse_site(text, "test"))


@pytest.fixture
def clock():
    # Fast: a night minute of waiting is 6 ms here.
    return Clock.starting_at(BEGIN + 100, rate=10000.0)


@pytest.fixture
def bus(site, clock):
    with open_bus(f"sqlite:///{site.root}/bus.db", identity="test", clock=clock) as opened:
        yield opened


@pytest.fixture
def service(site, bus, clock):
    made = IngestService(site=site, bus=bus, clock=clock, place="summit", complete_after_s=1e9)
    yield made
    made.close()


def write_raw(site, detector, obs_id=OBS, place="summit", **changes):
    obs = ObsId.parse(obs_id)
    path = site.path(f"{place}/raw") / image_key("DemoCam", obs, detector.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = fits.Header()
    cards = {
        "OBSID": obs_id, "DAYOBS": obs.day_obs, "SEQNUM": obs.seq_num, "GROUPID": obs_id, "IMGTYPE": "OBJECT",
        "FILTER": "r_demo", "EXPTIME": 30.0, "DARKTIME": 30.5, "DATE-BEG": isot(BEGIN),
        "DATE-END": isot(BEGIN + 30), "RA": 150.0, "DEC": -20.0, "ROTPA": 0.0, "CHIPID": detector.name,
        "TELESCOP": "T", "ELSTART": 60.0, "AZSTART": 10.0, "AIRMASS": 1.15,
    } | changes  # fmt: skip
    for key, value in cards.items():
        if value is not None:
            header[key] = value
    hdus = [fits.PrimaryHDU(header=header), fits.ImageHDU(np.zeros((4, 4), np.uint16), name="Segment00")]
    fits.HDUList(hdus).writeto(path, overwrite=True)
    return path


def announce(bus, detector, path, obs_id=OBS, hop="written", place="summit"):
    bus.publish(
        "Image.hop",
        {
            "obsId": obs_id, "instrument": "DemoCam", "exposureId": ObsId.parse(obs_id).exposure_id,
            "groupId": obs_id, "detector": detector.id, "detectorName": detector.name, "hop": hop, "outcome": "ok",
            "place": place, "path": str(path), "byteSize": 1, "checksum": "sha256:0", "hopTai": BEGIN + 40,
        },
    )  # fmt: skip


def manifest(site, names, place="summit"):
    path = site.path(f"{place}/raw") / manifest_key("DemoCam", ObsId.parse(OBS))
    path.write_text(
        json.dumps({"obsId": OBS, "version": 1, "expectedSensors": dict.fromkeys(names, "SCIENCE")})
    )


def events(bus, topic):
    return [message.fields for message in bus.replay([topic])]


def run_until_quiet(service):
    while service.step(0.0):
        pass


def test_an_image_is_complete_when_the_manifest_is_fulfilled(site, bus, service):
    for detector in CAMERA.detectors[:3]:
        announce(bus, detector, write_raw(site, detector))
    manifest(site, [d.name for d in CAMERA.detectors])
    assert service.step(0.0) == 3
    assert events(bus, "OODS.imageComplete") == []
    announce(bus, CAMERA.detectors[3], write_raw(site, CAMERA.detectors[3]))
    service.step(0.0)
    (complete,) = events(bus, "OODS.imageComplete")
    assert complete["expected"] == complete["ingested"] == 4
    assert complete["missing"] == []
    assert [e["statusCode"] for e in events(bus, "OODS.imageInOODS")] == [0] * 4
    hops = [e for e in events(bus, "Image.hop") if e["hop"] == "ingested_oods"]
    assert sorted(h["detectorName"] for h in hops) == [d.name for d in CAMERA.detectors]
    assert service.repository.ingested_detectors("DemoCam", 2026112000012) == {0, 1, 2, 3}
    visits = service.repository.butler.query_dimension_records("visit", instrument="DemoCam", explain=False)
    assert [visit.id for visit in visits] == [2026112000012]


def test_missing_detectors_are_named_and_late_ones_complete_the_image(site, bus, clock, service):
    service._wait_s = 60.0
    announce(bus, CAMERA.detectors[0], write_raw(site, CAMERA.detectors[0]))
    manifest(site, [d.name for d in CAMERA.detectors])
    service.step(0.0)
    clock.sleep(120.0)
    service.step(0.0)
    assert events(bus, "OODS.imageComplete")[-1]["missing"] == ["R00_S01", "R00_S10", "R00_S11"]
    service.step(0.0)
    assert len(events(bus, "OODS.imageComplete")) == 1
    for detector in CAMERA.detectors[1:]:
        announce(bus, detector, write_raw(site, detector))
    service.step(0.0)
    assert events(bus, "OODS.imageComplete")[-1]["missing"] == []


def test_a_bad_file_is_quarantined_and_the_others_go_on(site, bus, service):
    good, truncated, nameless = CAMERA.detectors[:3]
    announce(bus, good, write_raw(site, good))
    path = write_raw(site, truncated)
    path.write_bytes(path.read_bytes()[:100])
    announce(bus, truncated, path)
    announce(bus, nameless, write_raw(site, nameless, EXPTIME=None))
    service.step(0.0)
    status = {e["sensor"]: (e["statusCode"], e["description"]) for e in events(bus, "OODS.imageInOODS")}
    assert status["S00"][0] == 0
    assert status["S01"][0] == status["S10"][0] == 2
    assert "EXPTIME" in status["S10"][1]
    quarantined = [e for e in events(bus, "Image.hop") if e["hop"] == "quarantined"]
    assert {e["detectorName"]: e["outcome"] for e in quarantined} == {
        "R00_S01": "BadFile",
        "R00_S10": "BadFile",
    }
    assert len(list(site.path("summit/quarantine").glob("*.reason.json"))) == 2


def test_a_missing_file_is_tried_three_times(site, bus, clock, service):
    announce(bus, CAMERA.detectors[0], site.path("summit/raw/gone.fits"))
    for _ in range(4):
        service.step(0.0)
        clock.sleep(60.0)
    messages = [e["description"] for e in events(bus, "OODS.imageInOODS")]
    assert len(messages) == 3
    assert messages[0].startswith("try 1")
    (hop,) = [e for e in events(bus, "Image.hop") if e["hop"] == "ingested_oods"]
    assert (hop["outcome"], hop["attempt"]) == ("NotFound", 3)


def test_one_conflicting_file_does_not_stop_its_batch(site, bus, service):
    announce(bus, CAMERA.detectors[0], write_raw(site, CAMERA.detectors[0]))
    service.step(0.0)
    other = "XC_O_20261120_000013"
    announce(bus, CAMERA.detectors[0], write_raw(site, CAMERA.detectors[0], other), other)
    # The same exposure with another exposure time: the first one stays.
    service.repository._known.clear()
    announce(bus, CAMERA.detectors[1], write_raw(site, CAMERA.detectors[1], EXPTIME=15.0))
    service.step(0.0)
    assert service.repository.ingested_detectors("DemoCam", 2026112000013) == {0}
    assert service.repository.ingested_detectors("DemoCam", 2026112000012) == {0}
    assert [e["sensor"] for e in events(bus, "OODS.imageInOODS") if e["statusCode"] == 1] == ["S01"]


def test_a_restarted_service_goes_on_and_repeats_nothing_wrong(site, bus, clock, service):
    for detector in CAMERA.detectors[:2]:
        announce(bus, detector, write_raw(site, detector))
    manifest(site, [d.name for d in CAMERA.detectors])
    service.step(0.0)
    service._subscription.close()
    # Died after the state was saved; the next one has neither its memory nor its connections.
    again = IngestService(site=site, bus=bus, clock=clock, place="summit", complete_after_s=1e9)
    for detector in CAMERA.detectors:
        announce(bus, detector, write_raw(site, detector))
    again.step(0.0)
    assert events(bus, "OODS.imageComplete")[-1]["ingested"] == 4
    again.close()


def test_the_archive_takes_only_what_arrived_there(site, bus, clock):
    service = IngestService(site=site, bus=bus, clock=clock, place="archive", complete_after_s=1e9)
    first, second = CAMERA.detectors[:2]
    announce(bus, first, write_raw(site, first))
    announce(bus, second, write_raw(site, second, place="archive"), hop="at_archive", place="archive")
    bus.publish("Camera.endReadout", {"instrument": "DemoCam", "imageName": OBS, "detectors": [second.name]})
    run_until_quiet(service)
    hops = [e for e in events(bus, "Image.hop") if e["hop"] == "ingested_embargo"]
    assert [h["detectorName"] for h in hops] == [second.name]
    assert events(bus, "OODS.imageComplete")[-1]["place"] == "archive"
    service.close()


SECOND = "XC_O_20261120_000013"


@pytest.mark.parametrize("order", [(OBS, SECOND), (SECOND, OBS)])
def test_two_exposures_are_one_visit_whichever_comes_first(site, bus, service, order):
    begins = {OBS: BEGIN, SECOND: BEGIN + 17}
    for obs_id in order:
        begin = begins[obs_id]
        changes = {
            "GROUPID": "g", "CURINDEX": 1 + (obs_id == SECOND), "MAXINDEX": 2, "EXPTIME": 15.0, "DARKTIME": 15.5,
            "DATE-BEG": isot(begin), "DATE-END": isot(begin + 15), "ELSTART": 60.0 + (obs_id == SECOND),
        }  # fmt: skip
        for detector in CAMERA.detectors:
            announce(bus, detector, write_raw(site, detector, obs_id, **changes), obs_id)
        assert service.step(0.0) == 4
    butler = service.repository.butler
    (visit,) = butler.query_dimension_records("visit", instrument="DemoCam")
    first, second = ObsId.parse(OBS), ObsId.parse(SECOND)
    assert (visit.id, visit.name, visit.seq_num) == (first.exposure_id, OBS, first.seq_num)
    assert visit.exposure_time == 30.0
    assert visit.zenith_angle == 30.0, "of the first exposure"
    assert visit.timespan.begin.unix_tai == pytest.approx(BEGIN)
    assert visit.timespan.end.unix_tai == pytest.approx(BEGIN + 32)
    made_of = butler.query_dimension_records("visit_definition", instrument="DemoCam")
    assert {(row.visit, row.exposure) for row in made_of} == {
        (first.exposure_id, first.exposure_id), (first.exposure_id, second.exposure_id),
    }  # fmt: skip
    regions = butler.query_dimension_records("visit_detector_region", instrument="DemoCam")
    assert {(row.visit, row.detector) for row in regions} == {(visit.id, d.id) for d in CAMERA.detectors}
    exposures = butler.query_dimension_records("exposure", instrument="DemoCam", order_by="exposure")
    assert [(e.id, e.seq_start, e.seq_end) for e in exposures] == [
        (first.exposure_id, 12, 13), (second.exposure_id, 12, 13),
    ]  # fmt: skip
    # the raw files of a visit are found by its number
    with butler.query() as query:
        mine = query.join_dimensions(["visit"]).where(instrument="DemoCam", visit=visit.id)
        refs = list(mine.data_ids(["exposure", "detector"]))
    assert {item["exposure"] for item in refs} == {first.exposure_id, second.exposure_id}


def test_images_of_one_command_without_a_group_are_visits_of_their_own(site, bus, service):
    for number in (12, 13):
        obs_id = f"XC_O_20261120_{number:06d}"
        detector = CAMERA.detectors[0]
        path = write_raw(site, detector, obs_id, GROUPID=None, CURINDEX=number - 11, MAXINDEX=2)
        announce(bus, detector, path, obs_id)
    service.step(0.0)
    visits = service.repository.butler.query_dimension_records("visit", instrument="DemoCam")
    assert {v.id for v in visits} == {2026112000012, 2026112000013}
