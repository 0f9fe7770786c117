"""The worker's own work on a simulated raw file: a planted star becomes a stored source and an alert, once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cumbre.core.errors import NoWorkFoundError, UnprocessableDataError
from cumbre.orchestration import inputs, prompt_worker
from support.prompt_world import AMPLIFIER, PLANTED_E, make_payload, make_site, make_template


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
