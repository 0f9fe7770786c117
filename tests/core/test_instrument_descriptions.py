"""The shipped descriptions against the real files and against what is published of the cameras."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from cumbre.core.errors import ConfigurationError
from cumbre.core.header_files import read_headers
from cumbre.core.instrument import instrument_from_mapping, load_instrument, shipped_instruments
from cumbre.repository.fits_image import read_fits

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")


@pytest.mark.parametrize("name", shipped_instruments())
def test_amplifiers_tile_every_detector_once(name):
    instrument = load_instrument(name)
    for shape in {(d.nx, d.ny, d.amplifiers) for d in instrument.detectors}:
        nx, ny, amplifiers = shape
        hits = np.zeros((ny, nx), np.uint8)
        for amplifier in amplifiers:
            hits[amplifier.detector_box.slices] += 1
        assert hits.min() == hits.max() == 1


def test_lsstcam_has_its_205_detectors():
    camera = load_instrument("lsstcam")
    count = {p: sum(d.purpose == p for d in camera.detectors) for p in ("SCIENCE", "WAVEFRONT", "GUIDER")}
    assert count == {"SCIENCE": 189, "WAVEFRONT": 8, "GUIDER": 8}
    assert [d.id for d in camera.detectors] == list(range(205))
    # Numbers that Rubin publishes: the central sensor, one of the file names of the test data, the corners.
    for number, name in ((94, "R22_S11"), (35, "R10_S22"), (98, "R22_S22"), (0, "R01_S00"), (188, "R43_S22"),
                         (189, "R00_SG0"), (191, "R00_SW0"), (204, "R44_SW1")):  # fmt: skip
        assert camera.detector(number).name == name
    e2v = {d.name[:3] for d in camera.detectors if (d.nx, d.ny) == (4096, 4004)}
    assert len(e2v) == 13
    assert "R22" in e2v
    assert {len(d.amplifiers) for d in camera.detectors} == {8, 16}


def test_lsstcam_pixels_and_field_are_those_published():
    camera = load_instrument("lsstcam")
    pixels = sum(d.nx * d.ny for d in camera.detectors if d.purpose == "SCIENCE")
    assert pixels == pytest.approx(3.1e9, rel=0.02)
    # The field of view is 3.5 degrees across; rafts sit 127 mm and sensors 42.25 mm apart.
    reach = max(np.hypot(d.x_offset_mm, d.y_offset_mm) for d in camera.detectors) * 20 / 3600
    assert 1.5 < reach < 1.9
    corner = camera.detector("R44_SW0")
    assert camera.detector("R22_S12").x_offset_mm == 42.25
    assert camera.detector("R14_S11").x_offset_mm == 254
    # Corner wavefront sensors lie about 1.7 degrees from the axis.
    assert np.hypot(corner.x_offset_mm, corner.y_offset_mm) * 20 / 3600 == pytest.approx(1.68, abs=0.06)


def test_no_two_lsstcam_sensors_overlap():
    camera = load_instrument("lsstcam")
    boxes = []
    for d in camera.detectors:
        sx, sy = (d.nx, d.ny) if d.angle_deg % 180 == 0 else (d.ny, d.nx)
        half_x, half_y = sx * d.pixel_mm / 2, sy * d.pixel_mm / 2
        boxes.append(
            (d.x_offset_mm - half_x, d.x_offset_mm + half_x, d.y_offset_mm - half_y, d.y_offset_mm + half_y)
        )
    x0, x1, y0, y1 = np.array(boxes).T
    overlap = (
        (x0[:, None] < x1[None])
        & (x0[None] < x1[:, None])
        & (y0[:, None] < y1[None])
        & (y0[None] < y1[:, None])
    )
    assert overlap.sum() == len(boxes)


@needs_data
def test_e2v_assembly_is_exact():
    image = read_fits(DATA / "raw_lsstcam_assembly" / "e2v_spot.fits.gz")
    expected = fits.getdata(DATA / "raw_lsstcam_assembly" / "e2v_expected_assembled.fits.gz")
    detector = load_instrument("lsstcam").detector("R22_S11")
    assert [hdu.name for hdu in image.hdus[1:17]] == [a.hdu for a in detector.amplifiers]
    np.testing.assert_array_equal(image.assemble(detector), expected)


@needs_data
@pytest.mark.parametrize(
    ("name", "file", "detector"),
    [
        ("lsstcam", "3019032200002-R10-S22-det035.fits", 35),
        ("lsstcam", "30211212000310-R22-S22-det098.fits", 98),
        ("lsstcomcam", "3019053000001-R22-S00-det000.fits", 0),
    ],
)
def test_boxes_are_those_of_the_real_headers(name, file, detector):
    detector = load_instrument(name).detector(detector)
    headers = {h.get("EXTNAME", ""): h for h in read_headers(DATA / "raw_lsst_headers" / file)}
    for amplifier in detector.amplifiers:
        header = headers[amplifier.hdu]
        raw, place = amplifier.raw_box, header["DETSEC"].strip("[]").split(",")
        assert header["DATASEC"] == f"[{raw.x0 + 1}:{raw.x1},{raw.y0 + 1}:{raw.y1}]"
        (xa, xb), (ya, yb) = ([int(part) for part in side.split(":")] for side in place)
        box = amplifier.detector_box
        assert (min(xa, xb), max(xa, xb)) == (box.x0 + 1, box.x1)
        assert (xa > xb) == amplifier.flip_x
        # The camera counts rows from the other end than the assembled images of the data management do.
        assert (min(ya, yb), max(ya, yb)) == (detector.ny - box.y1 + 1, detector.ny - box.y0)
        assert (ya < yb) == amplifier.flip_y
        assert amplifier.overscan_box.x1 == header["NAXIS1"] == 576


@needs_data
def test_kast_overscan_follows_the_bias_of_each_amplifier():
    detector = load_instrument("kast_blue").detectors[0]
    pixels = read_fits(DATA / "raw_kast_blue" / "b21.fits.gz").pixels(0)
    for amplifier, level in zip(detector.amplifiers, (945, 966), strict=True):
        overscan = np.median(pixels[amplifier.overscan_box.slices])
        assert overscan == pytest.approx(level, abs=3)
        assert np.median(pixels[amplifier.raw_box.slices]) == pytest.approx(overscan, abs=2)


def test_grid_order_must_name_every_amplifier():
    text = {"name": "X", "prefix": "XX", "plate_scale": 1, "filters": [], "detector_types": {
        "c": {"nx": 4, "ny": 4, "grid": {"columns": 2, "rows": 1, "order": ["C00"]}}},
        "detectors": [{"type": "c", "id": 0, "name": "A"}]}  # fmt: skip
    with pytest.raises(ConfigurationError, match="order"):
        instrument_from_mapping(text, "x.yaml")


def test_grid_rows_can_be_flipped_each():
    text = {"name": "X", "prefix": "XX", "plate_scale": 1, "filters": [], "detector_types": {
        "c": {"nx": 4, "ny": 4, "grid": {"columns": 1, "rows": 2, "flip_x": [False, True]}}},
        "detectors": [{"type": "c", "id": 0, "name": "A"}]}  # fmt: skip
    lower, upper = instrument_from_mapping(text, "x.yaml").detectors[0].amplifiers
    assert (lower.flip_x, lower.flip_y, upper.flip_x, upper.flip_y) == (False, False, True, True)
