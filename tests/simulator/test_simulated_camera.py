"""The camera service on a real bus: events, store, truth, and kill -9 at every state."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cumbre.bus import open_bus
from cumbre.bus.messages import AckCode
from cumbre.core.configuration import Site, SiteConfig
from cumbre.core.ids import ObsId
from cumbre.core.time import Clock
from cumbre.simulator.camera import SimulatedCamera
from cumbre.simulator.preparation import prepare_sky
from cumbre.stores.files import sha256_of

EVENTS = ["Camera.startIntegration", "Camera.startReadout", "Camera.endReadout", "Camera.endOfImageTelemetry"]
RATE = 300.0


@pytest.fixture
def site(tmp_path) -> Site:
    config = SiteConfig.model_validate(
        {
            "observatory": {"latitude_deg": -30.24, "longitude_deg": -70.74, "elevation_m": 2650},
            "instruments": ["democam"],
            "places": {"summit": {"raw": "summit/raw"}},
            "scheduler": {"tiles": 1},
            "simulator": {"seed": 3, "start": "2026-11-10T02:00:00"},
        }
    )
    site = Site(tmp_path, config)
    prepare_sky(site)
    return site


@pytest.fixture
def clock(site):
    return Clock.starting_at(prepare_sky(site).start_tai, rate=RATE)


@pytest.fixture
def bus(site, clock):
    with open_bus(f"sqlite:///{site.root}/bus.db", identity="camera", clock=clock) as bus:
        yield bus


def command(site, **changes):
    tile = json.loads((site.root / "simulator" / "sky.json").read_text())["tiles"][0]
    return {
        "numImages": 1, "expTime": 30.0, "imageType": "OBJECT", "groupId": "g1", "instrument": "DemoCam",
        "filter": "r_demo", "ra": tile["ra"], "dec": tile["dec"], "rotation": 0.0, "program": "survey",
    } | changes  # fmt: skip


def run(camera, bus, answers=1):
    """Step until so many commands have their final answer."""
    got = []
    reader = bus.subscribe(["Camera.ackcmd"], start="earliest")
    for _ in range(2000):
        camera.step(0.02)
        got += [m for m in reader.poll(0) if AckCode(m.fields["ack"]).is_final]
        if len(got) >= answers:
            return got
    raise AssertionError("the camera did not answer")


def events(bus, *topics):
    return list(bus.replay(list(topics)))


def test_one_image(site, bus, clock):
    camera = SimulatedCamera(site=site, bus=bus, clock=clock)
    bus.publish("Camera.takeImages", command(site))
    [answer] = run(camera, bus)
    camera.close()
    assert AckCode(answer.fields["ack"]) is AckCode.COMPLETE
    obs_id = answer.fields["result"]
    assert ObsId.parse(obs_id).seq_num == 1
    assert [m.topic for m in events(bus, *EVENTS)] == EVENTS
    start, _, end, telemetry = (m.fields for m in events(bus, *EVENTS))
    assert {f["imageName"] for f in (start, end, telemetry)} == {obs_id}
    assert telemetry["timestampDateEnd"] - telemetry["timestampDateObs"] == pytest.approx(30.0)
    assert end["timestampEndOfReadout"] - telemetry["timestampDateEnd"] >= 2.0
    assert dict(zip(start["additionalKeys"], start["additionalValues"], strict=True))["filter"] == "r_demo"
    folder = site.root / "summit" / "daq" / obs_id
    assert end["daqPath"] == str(folder)
    about = json.loads((folder / "exposure.json").read_text())
    for name in ("R00_S00", "R00_S01", "R00_S10", "R00_S11"):
        assert np.load(folder / f"{name}.npy").shape == tuple(about["shapes"][name])
        assert sha256_of(folder / f"{name}.npy") == about["sha256"][name]
    hops = [m.fields for m in events(bus, "Image.hop")]
    assert sorted((h["hop"], h["detector"]) for h in hops) == sorted(
        (hop, d) for hop in ("exposed", "read_out") for d in range(4)
    )
    assert all(h["outcome"] == "ok" and h["place"] == "camera" for h in hops)
    assert {h["checksum"] for h in hops if h["hop"] == "read_out"} == set(about["sha256"].values())
    weather = events(bus, "Environment.weather")[0].fields
    assert 0.8 < weather["seeing"] < 1.7
    assert 60_000 < weather["pressure"] < 90_000
    import pyarrow.parquet as pq

    truth = pq.read_table(site.root / "simulator" / f"truth_{obs_id}.parquet")
    assert {"id", "kind", "ra", "dec", "x", "y", "detector", "flux_e", "mag", "snr"} <= set(
        truth.column_names
    )
    assert truth.num_rows > 0


def test_the_writer_can_read_the_store(site, bus, clock):
    from cumbre.capture.daq import DaqImage
    from cumbre.core.instrument import load_instrument

    camera = SimulatedCamera(site=site, bus=bus, clock=clock)
    bus.publish("Camera.takeImages", command(site, imageType="BIAS", expTime=0.0))
    [answer] = run(camera, bus)
    camera.close()
    image = DaqImage.open(site.root / "summit" / "daq" / answer.fields["result"])
    array, checksum = image.load(load_instrument("democam").detector("R00_S01"))
    assert array.dtype == np.uint16
    assert checksum == image.checksum("R00_S01")


def test_bad_commands_are_refused_and_the_next_is_done(site, bus, clock):
    camera = SimulatedCamera(site=site, bus=bus, clock=clock)
    for bad in (
        {"instrument": "Nothing"},
        {"filter": "purple"},
        {"imageType": "X"},
        {"expTime": 1e9},
        {"dec": 95.0},
    ):
        bus.publish("Camera.takeImages", command(site, **bad))
    bus.publish("Camera.takeImages", command(site, numImages=2, expTime=1.0, imageType="DARK"))
    answers = run(camera, bus, 6)
    camera.close()
    assert [AckCode(a.fields["ack"]).name for a in answers] == ["FAILED"] * 5 + ["COMPLETE"]
    assert "expected one of" in answers[0].fields["result"]
    assert [ObsId.parse(name).seq_num for name in answers[-1].fields["result"].split()] == [1, 2]


def test_old_commands_are_not_taken(site, bus, clock):
    bus.publish("Camera.takeImages", command(site))
    later = Clock(clock.tai0_s + 500.0, clock.mono0_s, clock.rate)
    camera = SimulatedCamera(site=site, bus=bus, clock=later)
    [answer] = run(camera, bus)
    camera.close()
    assert AckCode(answer.fields["ack"]) is AckCode.TIMEOUT
    assert not events(bus, "Camera.startIntegration")


class Killed(BaseException):
    """kill -9: nothing catches it."""


def kill(*_args, **_kwargs):
    raise Killed


def step_many(camera):
    for _ in range(2000):
        camera.step(0.02)


def killed_at(site, bus, clock, monkeypatch, where):
    """Run a camera until it dies at a place; what it leaves is only on disk and on the bus."""
    camera = SimulatedCamera(site=site, bus=bus, clock=clock)
    with monkeypatch.context() as patch:
        target, name = where(camera)
        patch.setattr(target, name, kill)
        with pytest.raises(Killed):
            step_many(camera)
    camera.close()


def test_killed_before_readout_the_image_is_aborted_and_the_camera_goes_on(site, bus, clock, monkeypatch):
    bus.publish("Camera.takeImages", command(site))
    killed_at(site, bus, clock, monkeypatch, lambda camera: (camera.journal, "complete"))
    camera = SimulatedCamera(site=site, bus=bus, clock=clock)
    bus.publish("Camera.takeImages", command(site, groupId="g2"))
    answers = run(camera, bus, 2)
    camera.close()
    assert [AckCode(a.fields["ack"]).name for a in answers] == ["FAILED", "COMPLETE"]
    hops = [m.fields for m in events(bus, "Image.hop")]
    assert [(h["hop"], h["outcome"], h["detector"]) for h in hops if h["outcome"] != "ok"] == [
        ("exposed", "Aborted", -1)
    ]
    ends = [m.fields for m in events(bus, "Camera.endReadout")]
    assert [ObsId.parse(f["imageName"]).seq_num for f in ends] == [2]


def test_killed_after_readout_the_image_is_announced_once_more(site, bus, clock, monkeypatch):
    bus.publish("Camera.takeImages", command(site))
    killed_at(site, bus, clock, monkeypatch, lambda camera: (camera.bus, "publish_many"))
    assert not events(bus, "Camera.endReadout")
    camera = SimulatedCamera(site=site, bus=bus, clock=clock)
    [answer] = run(camera, bus)
    camera.close()
    assert AckCode(answer.fields["ack"]) is AckCode.COMPLETE
    [end] = events(bus, "Camera.endReadout")
    assert end.fields["imageName"] == answer.fields["result"]
    assert len(events(bus, "Image.hop")) == 8
    # And a third start finds nothing to do.
    SimulatedCamera(site=site, bus=bus, clock=clock).close()
    assert len(events(bus, "Camera.endReadout")) == 1


def test_killed_before_the_answer_the_command_is_not_done_twice(site, bus, clock, monkeypatch):
    bus.publish("Camera.takeImages", command(site, imageType="BIAS"))
    killed_at(site, bus, clock, monkeypatch, lambda camera: (camera, "_answer"))
    camera = SimulatedCamera(site=site, bus=bus, clock=clock)
    [answer] = run(camera, bus)
    camera.close()
    assert AckCode(answer.fields["ack"]) is AckCode.COMPLETE
    assert len(events(bus, "Camera.startIntegration")) == 1


def test_numbers_go_on_after_the_store_was_emptied(site, bus, clock):
    camera = SimulatedCamera(site=site, bus=bus, clock=clock)
    assert camera.journal.next_obs_id("XC", 20261109) == "XC_O_20261109_000001"
    (site.root / "summit/daq/XC_O_20261109_000007").mkdir()
    assert camera.journal.next_obs_id("XC", 20261109) == "XC_O_20261109_000008"
    (site.root / "summit/daq/XC_O_20261109_000007").rmdir()
    assert camera.journal.next_obs_id("XC", 20261109) == "XC_O_20261109_000009"
    assert camera.journal.next_obs_id("XC", 20261110) == "XC_O_20261110_000001"
    camera.close()


def test_a_step_does_not_wait_longer_than_asked(site, bus):
    import time

    slow = Clock.starting_at(prepare_sky(site).start_tai, rate=0.1)
    camera = SimulatedCamera(site=site, bus=bus, clock=slow)
    bus.publish("Camera.takeImages", command(site))
    camera._pool.submit(int).result()
    for _ in range(6):
        before = time.monotonic()
        camera.step(0.05)
        assert time.monotonic() - before < 20  # the exposure alone takes minutes on this clock
    camera.close()


def test_a_damaged_journal_does_not_stop_the_camera(site, bus, clock):
    folder = site.root / "summit/daq/XC_O_20261109_000004"
    folder.mkdir(parents=True)
    (folder / "started.json").write_text("{not json")
    camera = SimulatedCamera(site=site, bus=bus, clock=clock)
    bus.publish("Camera.takeImages", command(site, imageType="BIAS"))
    [answer] = run(camera, bus)
    camera.close()
    assert AckCode(answer.fields["ack"]) is AckCode.COMPLETE
    assert answer.fields["result"].endswith("000005")


PROGRAM = """
import sys
from pathlib import Path
from cumbre.bus import open_bus
from cumbre.core.configuration import Site
from cumbre.core.time import Clock
from cumbre.simulator.camera import SimulatedCamera
site = Site.load(Path(sys.argv[1]))
clock = Clock.load(site.clock_path)
camera = SimulatedCamera(site=site, bus=open_bus(f"sqlite:///{site.root}/bus.db", identity="camera", clock=clock), clock=clock)
while True:
    camera.step(0.1)
"""


def test_a_real_kill_in_the_middle_of_an_exposure(site, bus, clock):
    import signal
    import subprocess
    import sys
    import time

    slow = Clock.starting_at(clock.now_tai_s(), rate=10.0)
    slow.save(site.clock_path)
    (site.root / "site.yaml").write_text(json.dumps(site.config.model_dump(mode="json")))
    sender = open_bus(f"sqlite:///{site.root}/bus.db", identity="queue", clock=slow)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(site.root)])
    try:
        sender.publish("Camera.takeImages", command(site))
        deadline = time.monotonic() + 30
        while sender.latest("Camera.startIntegration") is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sender.latest("Camera.startIntegration") is not None
    assert sender.latest("Camera.endReadout") is None
    fast = Clock.starting_at(slow.now_tai_s(), rate=RATE)
    with open_bus(f"sqlite:///{site.root}/bus.db", identity="camera", clock=fast) as again:
        camera = SimulatedCamera(site=site, bus=again, clock=fast)
        again.publish("Camera.takeImages", command(site))
        answers = run(camera, again, 2)
        camera.close()
        aborted = [m.fields["obsId"] for m in events(again, "Image.hop") if m.fields["outcome"] == "Aborted"]
    sender.close()
    assert [AckCode(a.fields["ack"]).name for a in answers] == ["FAILED", "COMPLETE"]
    assert aborted == ["XC_O_20261109_000001"]
    assert answers[1].fields["result"] == "XC_O_20261109_000002"
