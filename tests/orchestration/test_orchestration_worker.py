"""The worker's own work on a simulated raw file: a planted star becomes a stored source and an alert, once."""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from cumbre.core.errors import BadFileError, NoWorkFoundError, TransientError, UnprocessableDataError
from cumbre.core.ids import ObsId, image_key
from cumbre.core.time import mjd_from_seconds
from cumbre.orchestration import inputs, prompt_worker
from cumbre.orchestration.prompt_state import Work
from cumbre.orchestration.provenance import pixel_checksum, read_record, record_path, reproduce, snaps_of
from support.prompt_world import (
    AMPLIFIER,
    CAMERA,
    NIGHT,
    PLANTED_E,
    frame,
    make_payload,
    make_site,
    make_template,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("worker") / "site")


@pytest.fixture(scope="module")
def template(site):
    make_template(site)


@pytest.fixture
def payload(site, template, database):
    prompt_worker._prepared.clear()
    prompt_worker._level1.cache_clear()
    yield make_payload(site, database.dsn)
    prompt_worker._level1.cache_clear()


def _planted_pixel():
    box = AMPLIFIER.detector_box
    x = box.x1 - 1 - 120 if AMPLIFIER.flip_x else box.x0 + 120
    y = box.y1 - 1 - 200 if AMPLIFIER.flip_y else box.y0 + 200
    return x, y


def test_planted_star_is_stored_and_alerted_once(payload, database):
    ready = prompt_worker.preload(payload)
    assert "template T" in ready["note"]
    done = prompt_worker.process(payload)
    assert done["preload"]["is_late"] is False
    assert done["quality"]["seeing"] > 0
    rows = database.query("SELECT x, y, snr, psfflux, isnegative FROM level1.diasource")
    assert len(rows) == done["n_sources"]
    x, y = _planted_pixel()
    (found,) = [r for r in rows if np.hypot(r["x"] - x, r["y"] - y) < 1.0]
    assert not found["isnegative"]
    # zeroPoint is the magnitude of one electron a second
    electrons = 30.0 * found["psfflux"] / (3631e9 * 10 ** (-0.4 * done["quality"]["zeroPoint"]))
    assert electrons == pytest.approx(PLANTED_E, rel=0.1)
    alerts = database.query("SELECT count(*) AS n FROM level1.alert_outbox")
    assert alerts[0]["n"] == done["n_alerts"] >= 1
    again = prompt_worker.process(payload)
    assert again["is_repeat"]
    assert database.query("SELECT count(*) AS n FROM level1.alert_outbox")[0]["n"] == done["n_alerts"]


def test_image_without_visit_is_prepared_late(payload):
    done = prompt_worker.process(payload | {"visit": None})
    assert done["preload"]["is_late"] is True
    assert done["n_sources"] > 0


def test_bad_images_get_their_words(payload, tmp_path, monkeypatch):
    image = payload["image"]
    with pytest.raises(UnprocessableDataError, match="the archive said"):
        prompt_worker.process(payload | {"image": image | {"path": str(tmp_path / "gone.fits")}})
    with pytest.raises(UnprocessableDataError, match="expected XC_O_20261120_000002"):
        prompt_worker.process(
            payload | {"image": image | {"obs_id": "XC_O_20261120_000002", "exposure_id": 2026112000002}}
        )
    truncated = tmp_path / "short.fits"
    truncated.write_bytes(Path(image["path"]).read_bytes()[:20000])
    with pytest.raises(UnprocessableDataError):
        prompt_worker.process(payload | {"image": image | {"path": str(truncated)}})
    monkeypatch.setattr(inputs.InputLoader, "template", lambda *_: ("", None))
    with pytest.raises(NoWorkFoundError, match="no template in r"):
        prompt_worker.process(payload)


def test_wrong_announcement_is_not_believed(payload):
    wrong = payload["visit"] | {"ra": payload["visit"]["ra"] + 1.0}
    prompt_worker.preload(payload | {"visit": wrong})
    done = prompt_worker.process(payload | {"visit": wrong})
    assert done["preload"]["is_late"] is True


def test_a_pair_is_one_result_under_the_first_number_and_is_made_again_bit_for_bit(payload, site, database):
    pixel = AMPLIFIER.raw_box.x0 + 120, AMPLIFIER.raw_box.y0 + 200
    images = []
    for index, begin in ((1, NIGHT + 300), (2, NIGHT + 317)):
        obs_id = ObsId.parse(f"XC_O_20261120_{30 + index:06d}")
        path, _ = frame(site, str(obs_id), begin, planted=pixel, exposure_s=15.0, index=index, total=2)
        images.append(
            payload["image"] | {"obs_id": str(obs_id), "exposure_id": obs_id.exposure_id, "path": str(path)}
        )
    first, second = images
    asked = payload | {"image": first, "snaps": [second], "visit": None}
    done = prompt_worker.process(asked)
    assert done["visit"] == first["exposure_id"]
    rows = database.query("SELECT x, y, visit, psfflux, midpointmjdtai AS mjd FROM level1.diasource")
    assert {row["visit"] for row in rows} == {first["exposure_id"]}
    x, y = _planted_pixel()
    (found,) = [row for row in rows if np.hypot(row["x"] - x, row["y"] - y) < 1.0]
    assert found["mjd"] == pytest.approx(mjd_from_seconds(NIGHT + 316), abs=1e-9)
    # the star gave its electrons in each of the two
    electrons = 30.0 * found["psfflux"] / (3631e9 * 10 ** (-0.4 * done["quality"]["zeroPoint"]))
    assert electrons == pytest.approx(2 * PLANTED_E, rel=0.1)

    record = read_record(record_path(site.root, first["obs_id"], "R00_S00"))
    assert (record["visit"], snaps_of(record)) == (first["exposure_id"], [second["obs_id"]])
    made = reproduce(site.root, record, Path(first["path"]), Path(second["path"]))
    assert pixel_checksum(made.exposure) == record["pixels"]["calibrated"]
    assert pixel_checksum(made.result.exposure) == record["pixels"]["difference"]
    with pytest.raises(BadFileError, match="1 raw files, expected the 2 of then"):
        reproduce(site.root, record, Path(first["path"]))
    with pytest.raises(BadFileError, match="expected the raw file of then"):
        reproduce(site.root, record, Path(second["path"]), Path(first["path"]))

    # the second alone, whoever asks for it later, is not another visit
    again = prompt_worker.process(asked | {"image": second, "snaps": []})
    assert (again["is_repeat"], again["visit"]) == (True, first["exposure_id"])


def test_a_further_exposure_that_cannot_be_read_is_left_out_and_named(payload, tmp_path):
    gone = payload["image"] | {"path": str(tmp_path / "gone.fits")}
    read, unread = prompt_worker._read_snaps([payload["image"], gone], CAMERA, CAMERA.detector(0))
    assert len(read) == 1
    assert [text.partition(":")[0] for text in unread] == [f"without {gone['obs_id']}"]


def test_late_work_stores_its_sources_and_keeps_its_alerts_when_told_so(payload, database):
    done = prompt_worker.process(payload | {"missed": "Dropped", "publish_alerts": False})
    assert done["n_alerts"] == 0 < done["n_sources"]
    (row,) = database.query("SELECT n_sources, n_alerts, rejected FROM level1.visit_detector")
    assert (row["n_sources"], row["n_alerts"]) == (done["n_sources"], 0)
    assert row["rejected"]["late"] >= 1
    assert database.query("SELECT count(*) AS n FROM level1.alert_outbox")[0]["n"] == 0


def _reduced(payload, site, obs_id, image_type, **work):
    path, _ = frame(site, obs_id, NIGHT + 120, image_type=image_type)
    image = payload["image"] | {
        "obs_id": obs_id,
        "exposure_id": int(obs_id[5:13] + obs_id[14:].zfill(5)[-5:]),
    }
    work = Work(kind="isr", mode="raw_calibration", **work)
    return prompt_worker.correct(
        payload | {"image": image | {"path": str(path)}, "visit": None, "work": asdict(work)}
    )


def test_a_bias_is_assembled_and_measured_and_nothing_is_stored(payload, site, database):
    done = _reduced(payload, site, "XC_O_20261120_000011", "BIAS", corrections=(), psf=False)
    # what is left of a bias is the noise of its amplifiers
    noise = np.median(
        [
            amplifier.read_noise
            for amplifier in prompt_worker.load_instrument("democam").detector(0).amplifiers
        ]
    )
    assert done["quality"]["skyNoise"] == pytest.approx(noise, rel=0.15)
    assert abs(done["quality"]["skyLevel"]) < noise
    assert done["quality"]["maskedFraction"] < 0.05
    assert "seeing" not in done["quality"]
    assert "ISR only (raw_calibration)" in done["message"]
    assert not database.query("SELECT 1 FROM information_schema.tables WHERE table_schema = 'level1'")


def test_the_psf_is_measured_where_there_are_stars(payload, site):
    sky = _reduced(payload, site, "XC_O_20261120_000012", "OBJECT")
    assert 0.4 < sky["quality"]["seeing"] < 3.0
    assert sky["quality"]["nStars"] >= 3
    dark = _reduced(payload, site, "XC_O_20261120_000013", "DARK")
    assert "seeing" not in dark["quality"] or dark["quality"]["nStars"] < sky["quality"]["nStars"]


def test_a_worker_asks_a_distributor_and_reads_the_cache_when_none_answers(payload, site, tmp_path):
    from cumbre.archive.distributor import Distributor
    from cumbre.core.time import Clock
    from cumbre.site.roles import open_site_bus

    image = payload["image"]
    own = Path(image["path"])
    Clock.starting_at(NIGHT + 200, rate=1.0).save(site.clock_path)
    bus = open_site_bus(site, "archive-1")
    distributor = Distributor(site=site, bus=bus, clock=bus.clock, place="archive")
    kept = site.path("archive/raw") / image_key(
        image["instrument"], ObsId.parse(image["obs_id"]), image["detector_name"]
    )
    kept.parent.mkdir(parents=True)
    kept.write_bytes(own.read_bytes())
    stop = threading.Event()

    def serve():
        while not stop.is_set():
            distributor.step(0.05)

    thread = threading.Thread(target=serve)
    thread.start()
    asked = payload | {"images": "distributor", "image": image | {"path": str(tmp_path / "not-mounted.fits")}}
    try:
        assert prompt_worker.process(asked)["n_alerts"] >= 1
    finally:
        stop.set()
        thread.join()
        distributor.close()
    with pytest.raises(TransientError):
        prompt_worker.correct(asked | {"work": asdict(Work(kind="isr"))})
    found = prompt_worker.correct(asked | {"work": asdict(Work(kind="isr")), "image": image})
    assert found["quality"]["nStars"] > 0
