"""Which inputs fit which image."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumbre.core import geometry
from cumbre.core.errors import BadFileError
from cumbre.core.instrument import load_instrument
from cumbre.orchestration.inputs import Cache, Field, choose_template, read_index, size_of

CAMERA = load_instrument("democam")


@settings(max_examples=40, deadline=None)
@given(
    ra=st.floats(0, 359.99),
    dec=st.floats(-85, 85),
    rotation=st.floats(0, 360),
    number=st.integers(0, 3),
    x=st.floats(0, 1023),
    y=st.floats(0, 1023),
)
def test_predicted_circle_holds_every_pixel(*, ra, dec, rotation, number, x, y):
    detector = CAMERA.detector(number)
    field = Field.predict(CAMERA, detector, ra, dec, rotation=rotation)
    sky = geometry.sky_from_pixel(CAMERA, detector, ra, dec, rotation, x, y)
    assert geometry.separation_deg(field.centre_ra, field.centre_dec, *sky) <= field.radius_deg
    # half the diagonal of 1024 pixels of 0.6 arcsec, and the padding
    assert field.radius_deg == pytest.approx(1024 * 0.6 * 2**0.5 / 2 / 3600 + 50 / 3600, rel=0.03)


def test_same_sky_or_not():
    field = Field.predict(CAMERA, CAMERA.detector(0), 359.999, -30.0, rotation=359.8)
    assert field.is_near(0.001, -30.0, 0.2)
    assert not field.is_near(0.1, -30.0, 0.0)
    assert not field.is_near(359.999, -30.0, 5.0)


def _row(tile, ra, dec, band="r", detector="R00_S00"):
    return {"tile": tile, "ra": ra, "dec": dec, "band": band, "detector": detector, "path": f"{tile}.fits"}


def test_nearest_template_of_band_and_detector():
    rows = [
        _row("a", 0.01, 0.0),
        _row("b", 359.999, 0.0),
        _row("c", 0.0, 0.0, "g"),
        _row("d", 0.0, 0.0, "r", "R00_S01"),
    ]
    want = {"ra": 0.0, "dec": 0.0, "band": "r", "detector": "R00_S00"}
    assert choose_template(rows, **want, reach_deg=0.1)["tile"] == "b"
    assert choose_template(rows, **want | {"ra": 5.0}, reach_deg=0.1) is None
    assert choose_template(rows, **want | {"band": "y"}, reach_deg=0.1) is None
    assert choose_template([], **want, reach_deg=0.1) is None


@pytest.mark.parametrize("text", ["{", "{}", '[{"tile": "a"}]', "[3]"])
def test_bad_index_is_explained(tmp_path, text):
    path = tmp_path / "index.json"
    path.write_text(text)
    with pytest.raises(BadFileError, match=r"index\.json: not a template index"):
        read_index(path)


def test_cache_reads_once_again_when_changed_and_keeps_its_budget(tmp_path):
    reads = []

    def load(path):
        reads.append(path.name)
        return np.zeros(1000, np.uint8)

    cache = Cache(2500)
    one = tmp_path / "1"
    for name in "1123":
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
        cache.get(tmp_path / name, load)
    assert reads == ["1", "2", "3"]
    assert len(cache) == 2
    cache.get(one, load)
    assert reads[-1] == "1"
    os.utime(one, (2, 2))
    cache.get(one, load)
    assert reads == ["1", "2", "3", "1", "1"]


def test_sizes_of_nested_things():
    assert size_of({"a": [np.zeros(10), (np.zeros(5, np.uint8),)], "b": "text"}) == 85
    assert size_of(CAMERA.detector(0)) == 0


def test_index_roundtrip(tmp_path):
    path = tmp_path / "index.json"
    path.write_text(json.dumps([_row("a", 1, 2)]))
    assert read_index(path)[0]["tile"] == "a"
