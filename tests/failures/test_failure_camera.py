"""Sensors without data or with garbage, and a clock that steps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cumbre.site.proof import raw_pixels


def described(running, obs_id):
    return json.loads(running.site.path(f"summit/daq/{obs_id}/exposure.json").read_text())


def test_a_sensor_without_data_is_left_out_and_the_others_go_on(running):
    with running.fault("sensor_silent", "R00_S01"):
        (obs_id,) = running.take(1)
    assert set(described(running, obs_id)["detectors"]) == {
        d.name for d in running.instrument.detectors
    } - {"R00_S01"}  # fmt: skip
    running.nothing_is_lost([obs_id])
    manifest = next(running.site.path("archive/raw").rglob(f"{obs_id}_expectedSensors.json"))
    assert "R00_S01" not in json.loads(manifest.read_text())["expectedSensors"]
    # nor does anybody miss it: the writer looked for what the camera read, not for what it has
    silent = running.instrument.detector("R00_S01").id
    assert silent not in {hop["detector"] for hop in running.hops(obs_id, "written")}


def test_garbage_of_a_sensor_is_archived_as_it_came(running):
    with running.fault("sensor_garbage", "R01_S00"):
        (obs_id,) = running.take(1)
    running.nothing_is_lost([obs_id])
    path = next(running.site.path("archive/raw").rglob(f"{obs_id}_R01_S00.fits"))
    pixels = raw_pixels(path, running.instrument.detector("R01_S00"))
    assert pixels.std() > 15000  # every value equally likely: 65536 / sqrt(12)
    assert (pixels == np.load(running.site.path(f"summit/daq/{obs_id}/R01_S00.npy"))).all()


@pytest.mark.parametrize("step_s", [-100.0, 100.0])
@pytest.mark.parametrize("name", ["writer-1", "camera", "base-1"])
def test_a_clock_that_steps(running, name, step_s):
    """One process lives minutes before or after the others."""
    before = running.take(1)
    with running.fault("clock_step", name, step_s=step_s):
        before += running.take(1)
    running.nothing_is_lost(before + running.take(1))
