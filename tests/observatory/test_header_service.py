"""The header service: values with their sources, deadlines, restarts, bad images; the sky against ERFA."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cumbre.bus import Bus, open_bus
from cumbre.core.configuration import Site
from cumbre.core.errors import ConfigurationError
from cumbre.core.ids import ObsId
from cumbre.core.time import Clock
from cumbre.observatory.header_keywords import Entry, load_header_map
from cumbre.observatory.header_service import HeaderService
from cumbre.site.profiles import create_site

BEGIN_TAI = 1795222837.0
OBS = "XC_O_20261120_000001"
GROUP = "2026-11-11T17:06:40.000"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return create_site(tmp_path / "site")


@pytest.fixture
def clock() -> Clock:
    return Clock.starting_at(BEGIN_TAI, rate=6.0)


@pytest.fixture
def bus(site: Site, clock: Clock) -> Iterator[Bus]:
    with open_bus(f"sqlite:///{site.root}/bus/bus.db", identity="camera", clock=clock) as opened:
        yield opened


def common(obs_id: str, pairs: dict[str, str] | None = None) -> dict[str, Any]:
    parsed = ObsId.parse(obs_id)
    pairs = {"filter": "r_demo", "ra": "53.1", "dec": "-27.8", "rotation": "12.5"} if pairs is None else pairs
    return {
        "instrument": "DemoCam", "imagesInSequence": 1, "imageName": obs_id, "imageIndex": 1,
        "imageSource": "XC", "imageController": "O", "imageDate": str(parsed.day_obs),
        "imageNumber": parsed.seq_num, "timestampAcquisitionStart": BEGIN_TAI, "groupId": GROUP,
        "additionalKeys": list(pairs), "additionalValues": list(pairs.values()),
    }  # fmt: skip


SEQUENCE = ("imageIndex", "imagesInSequence")


def image(
    bus: Bus, obs_id: str = OBS, *, stages: str = "sre", pairs: dict[str, str] | None = None, **changed: Any
) -> None:
    fields = common(obs_id, pairs) | {name: changed[name] for name in SEQUENCE if name in changed}
    if "s" in stages:
        begin = {"exposureTime": 30.0, "imageType": "OBJECT", "timeout": 20.0}
        bus.publish("Camera.startIntegration", fields | begin | changed)
    if "r" in stages:
        bus.publish("Camera.startReadout", fields)
    if "e" in stages:
        done = {
            "timestampDateObs": BEGIN_TAI, "timestampDateEnd": BEGIN_TAI + 30.0,
            "measuredShutterOpenTime": 30.01, "darkTime": 30.5, "emulatedImage": "",
        }  # fmt: skip
        bus.publish("Camera.endOfImageTelemetry", fields | done)


def header(site: Site, obs_id: str = OBS) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(site.path(f"summit/headers/{obs_id}.json").read_bytes())
    return found


def run(service: HeaderService, wanted: int = 1, seconds: float = 5.0) -> None:
    deadline, done = time.monotonic() + seconds, 0
    while done < wanted and time.monotonic() < deadline:
        done += service.step(0.02)
    assert done >= wanted


def announced(bus: Bus) -> list[dict[str, Any]]:
    return [m.fields for m in bus.replay(["HeaderService.largeFileObjectAvailable"])]


def test_a_whole_image(site: Site, bus: Bus, clock: Clock) -> None:
    image(bus)
    run(HeaderService(site=site, bus=bus, clock=clock))
    got = header(site)
    values = {name: value for name, (value, _) in got["keywords"].items()}
    assert got["complete"]
    assert values["EXPID"] == 2026112000001
    assert values["BAND"] == "r"
    assert values["EXPTIME"] == 30.0
    assert values["SHUTTIME"] == 30.01
    assert values["DATE-BEG"] == "2026-11-21T01:00:37.000"
    assert values["MJD-END"] == pytest.approx(BEGIN_TAI / 86400 + 40587 + 30 / 86400, abs=1e-9)
    assert got["provenance"]["EXPTIME"]["topic"] == "Camera.startIntegration"
    assert got["provenance"]["AIRMASS"]["topic"] == "derived:airmass"
    # no weather station on this bus: told, but the header counts as complete
    assert {"SEEING", "AIRTEMP", "PRESSURE", "HUMIDITY", "WINDSPD"} <= set(got["missing"])
    (event,) = announced(bus)
    assert (event["id"], event["missing"]) == (OBS, got["missing"])
    (hop,) = [m.fields for m in bus.replay(["Image.hop"])]
    assert (hop["hop"], hop["outcome"], hop["detector"]) == ("header", "ok", -1)
    assert hop["checksum"] == event["checkSum"]


def test_sky_agrees_with_erfa(site: Site, bus: Bus, clock: Clock) -> None:
    import erfa
    import numpy as np

    image(bus, pairs={"filter": "r_demo", "ra": "102.25", "dec": "-33.5", "rotation": "0"})
    run(HeaderService(site=site, bus=bus, clock=clock))
    values = {name: value for name, (value, _) in header(site)["keywords"].items()}
    place = site.config.observatory
    utc = erfa.taiutc(2440587.5, BEGIN_TAI / 86400)
    azimuth, zenith, hour_angle, *_ = erfa.atco13(
        np.deg2rad(102.25), np.deg2rad(-33.5), 0, 0, 0, 0, *utc, 0.0,
        np.deg2rad(place.longitude_deg), np.deg2rad(place.latitude_deg), place.elevation_m, 0, 0, 0, 0, 0, 0.55,
    )  # fmt: skip
    assert values["ELSTART"] == pytest.approx(90 - np.rad2deg(zenith), abs=0.02)
    separation = (values["AZSTART"] - np.rad2deg(azimuth) + 180) % 360 - 180
    assert abs(separation) * np.sin(zenith) < 0.02
    assert values["HA"] == pytest.approx(np.rad2deg(hour_angle) / 15, abs=0.02 / 15)


def test_command_and_visit_fill_what_the_event_lacks(site: Site, bus: Bus, clock: Clock) -> None:
    service = HeaderService(site=site, bus=bus, clock=clock)
    bus.publish(
        "ScriptQueue.nextVisit",
        {"groupId": GROUP, "position": [10.5, -20.25], "cameraAngle": 33.0, "filters": "g_demo",
         "instrument": "DemoCam", "survey": "wide"},
    )  # fmt: skip
    image(bus, pairs={})
    run(service)
    got = header(site)
    assert [got["keywords"][k][0] for k in ("RA", "DEC", "ROTPA", "FILTER", "BAND", "PROGRAM")] == [
        10.5, -20.25, 33.0, "g_demo", "g", "wide",
    ]  # fmt: skip
    assert got["provenance"]["RA"]["topic"] == "ScriptQueue.nextVisit"
    assert got["complete"]


def test_calibrations_have_no_sky(site: Site, bus: Bus, clock: Clock) -> None:
    image(bus, pairs={}, imageType="BIAS", exposureTime=0.0)
    run(HeaderService(site=site, bus=bus, clock=clock))
    got = header(site)
    assert got["complete"]
    assert not {"RA", "AIRMASS", "FILTER"} & (set(got["keywords"]) | set(got["missing"]))


def test_deadline_gives_a_partial_header_and_late_events_change_nothing(
    site: Site, bus: Bus, clock: Clock
) -> None:
    fast = Clock(clock.tai0_s, clock.mono0_s, 600.0)
    service = HeaderService(site=site, bus=bus, clock=fast)
    image(bus, stages="s")
    run(service)
    got = header(site)
    assert not got["complete"]
    assert {"SHUTTIME", "DATE-END", "MJD-END"} <= set(got["missing"])
    assert got["reasons"]["DATE-END"] == "needs end_tai"
    (hop,) = [m.fields for m in bus.replay(["Image.hop"])]
    assert "DATE-END" in hop["message"]
    image(bus, stages="e")
    for _ in range(5):
        service.step(0.02)
    assert header(site) == got
    assert len(announced(bus)) == 1


def test_bad_images_never_stop_the_next(site: Site, bus: Bus, clock: Clock) -> None:
    service = HeaderService(site=site, bus=bus, clock=clock)
    bus.publish("Camera.startIntegration", common(OBS) | {"imageName": "nonsense", "exposureTime": 1.0})
    blocked = "XC_O_20261120_000007"
    site.path(f"summit/headers/{blocked}.json").mkdir(parents=True)
    image(bus, blocked)
    image(bus, "XC_O_20261120_000008", pairs={"ra": "nan", "dec": "word", "filter": "purple"})
    image(bus)
    run(service, 2)
    assert header(site)["complete"]
    strange = header(site, "XC_O_20261120_000008")
    assert {"RA", "DEC", "BAND", "AIRMASS"} <= set(strange["missing"])
    assert "purple" in strange["reasons"]["BAND"]
    outcomes = {m.fields["obsId"]: m.fields["outcome"] for m in bus.replay(["Image.hop"])}
    assert outcomes == {blocked: "Transient", "XC_O_20261120_000008": "ok", OBS: "ok"}


def test_restart_takes_up_unfinished_images(site: Site, bus: Bus, clock: Clock) -> None:
    first = HeaderService(site=site, bus=bus, clock=clock)
    image(bus, "XC_O_20261120_000001")
    image(bus, "XC_O_20261120_000002", stages="s")
    run(first)
    before = header(site, "XC_O_20261120_000001")
    del first  # as after kill -9: nothing is closed
    image(bus, "XC_O_20261120_000002", stages="re")
    run(HeaderService(site=site, bus=bus, clock=clock))
    assert header(site, "XC_O_20261120_000002")["complete"]
    assert header(site, "XC_O_20261120_000001") == before


def test_old_telemetry_does_not_count() -> None:
    from cumbre.bus import Message
    from cumbre.observatory.header_keywords import Collected

    entry = Entry.model_validate({"from": ["Environment.weather.seeing"], "type": "float", "max_age_s": 60})
    message = Message("Environment.weather", "telemetry", 0, {"seeing": 0.8}, 1000.0, 963.0, 1, "dimm", 1, 1)
    fresh, stale = Collected(), Collected()
    fresh.collect({"SEEING": entry}, lambda _: message, 1030.0)
    stale.collect({"SEEING": entry}, lambda _: message, 1061.0)
    assert fresh.values == {"SEEING": 0.8}
    assert fresh.provenance["SEEING"]["age_s"] == 30.0
    assert stale.values == {}
    assert "61 s old" in stale.reasons["SEEING"]


def test_a_wrong_map_says_where(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text("version: 1\ndeadline_s: 30\nkeywords: {RA: {derive: magic}, dec: {constant: 1}}\n")
    with pytest.raises(ConfigurationError, match="magic"):
        load_header_map(path)


def test_both_exposures_of_a_visit_have_their_headers(site: Site, bus: Bus, clock: Clock) -> None:
    """The second begins while the first one's end is still under way."""
    second = str(ObsId(ObsId.parse(OBS).day_obs, ObsId.parse(OBS).seq_num + 1, "XC"))
    service = HeaderService(site=site, bus=bus, clock=clock)
    image(bus, OBS, stages="sr", imageIndex=1, imagesInSequence=2)
    image(bus, second, stages="s", imageIndex=2, imagesInSequence=2)
    image(bus, OBS, stages="e")
    image(bus, second, stages="re")
    while service.step(0.0):
        pass
    service.close()
    for index, obs_id in enumerate((OBS, second), 1):
        words = header(site, obs_id)["keywords"]
        assert [words[name][0] for name in ("OBSID", "GROUPID", "CURINDEX", "MAXINDEX")] == [
            obs_id,
            GROUP,
            index,
            2,
        ]
