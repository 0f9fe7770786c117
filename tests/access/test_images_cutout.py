"""Regions and cutouts without a server: against brute force, and how long a cutout of a big image takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumbre.access.images.cutout import box_of, fits_bytes, raw_cutout
from cumbre.access.images.shapes import Circle, Polygon, Range, ShapeError, circle, polygon, pos, sky_range
from cumbre.capture.raw_fits import raw_fits_bytes
from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.core.geometry import pixel_from_sky, separation_deg, sky_from_pixel
from cumbre.core.instrument import load_instrument
from support.archive_world import pixel_value, raw_array

CAMERA = load_instrument("democam")
CHIP = CAMERA.detector(0)
NX, NY = CHIP.nx, CHIP.ny


def converters(ra: float, dec: float, rotation: float):
    where = (CAMERA, CHIP, ra, dec, rotation)
    return (lambda a, d: pixel_from_sky(*where, a, d)), (lambda x, y: sky_from_pixel(*where, x, y))


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 359.9), st.floats(-89, 89), st.floats(0, 360), st.floats(-300, 1324), st.floats(-300, 1324),
    st.floats(2, 900), st.sampled_from(["circle", "polygon", "range"]),
)  # fmt: skip
def test_the_box_holds_every_pixel_of_the_region_and_is_none_only_when_there_is_none(
    ra, dec, rotation, x, y, radius, kind
):
    to_pixel, to_sky = converters(ra, dec, rotation)
    centre = tuple(float(v) for v in to_sky(x, y))
    size = radius * 0.6 / 3600
    if kind == "circle":
        shape = Circle(*centre, size)
    elif kind == "polygon":
        corners = to_sky(
            np.array([x - radius, x + radius, x]), np.array([y - radius, y - radius / 2, y + radius])
        )
        shape = Polygon(*(tuple(float(v) for v in part) for part in corners))
    else:
        shape = Range(
            (centre[0] - size) % 360, (centre[0] - size) % 360 + 2 * size, centre[1] - size, centre[1] + size
        )
    grid_x, grid_y = np.meshgrid(np.arange(0, NX, 4.0), np.arange(0, NY, 4.0))
    inside = shape.contains(*to_sky(grid_x, grid_y))
    box = box_of(shape, NX, NY, to_pixel, to_sky)
    if inside.any():
        assert box is not None
        assert box.x0 <= grid_x[inside].min()
        assert box.x1 > grid_x[inside].max()
        assert box.y0 <= grid_y[inside].min()
        assert box.y1 > grid_y[inside].max()
    if box is not None:
        assert 0 <= box.x0 < box.x1 <= NX
        assert 0 <= box.y0 < box.y1 <= NY
        # not much more than is needed
        if kind == "circle":
            assert box.x1 - box.x0 <= 2 * radius * 1.05 + 4
            assert box.y1 - box.y0 <= 2 * radius * 1.05 + 4


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 360), st.floats(-90, 90), st.floats(0.001, 60))
def test_the_border_of_a_circle_is_its_radius_away(ra, dec, radius):
    edge = Circle(ra, dec, radius).edge()
    assert np.allclose(separation_deg(ra, dec, *edge), radius, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "made"),
    [("CIRCLE 1 2 3", Circle(1, 2, 3)), ("circle  1 2 3", Circle(1, 2, 3)), ("RANGE 1 2 -Inf +Inf", Range(1, 2, -np.inf, np.inf)),
     ("POLYGON 0 0 1 0 1 1", Polygon((0, 1, 1), (0, 0, 1)))],
)  # fmt: skip
def test_pos_is_read(text, made):
    assert pos(text) == made


@pytest.mark.parametrize(
    ("read", "text"),
    [(circle, "1 2"), (circle, "1 2 3 4"), (circle, "1 2 inf"), (circle, "361 0 1"), (circle, "0 91 1"), (circle, "0 0 -1"),
     (polygon, "1 2 3 4"), (polygon, "1 2 3 4 5"), (polygon, "0 0 120 0 240 0"), (polygon, "1 2 3 4 5 x"),
     (sky_range, "2 1 0 1"), (sky_range, "0 1 1 0"), (sky_range, "0 361 0 1"), (sky_range, "nan 1 0 1"),
     (pos, ""), (pos, "BOX 1 2 3 4")],
)  # fmt: skip
def test_what_is_no_region_is_refused(read, text):
    with pytest.raises(ShapeError):
        read(text)


def test_a_cutout_of_a_big_compressed_image_is_right_and_quick(tmp_path):
    camera = load_instrument("lsstcam")
    chip = next(d for d in camera.detectors if d.purpose == "SCIENCE")
    path = tmp_path / "raw.fits"
    path.write_bytes(raw_fits_bytes(chip, raw_array(chip), []))
    pointing = (200.0, -30.0, 70.0)
    x, y = chip.nx * 0.6, chip.ny * 0.5
    ra, dec = (float(v) for v in sky_from_pixel(camera, chip, *pointing, x, y))
    shape = Circle(ra, dec, 100 * chip.pixel_mm * camera.plate_scale / 3600)
    raw_cutout(path, camera, chip, pointing, shape)  # what is imported is imported
    part = raw_cutout(path, camera, chip, pointing, shape)
    content = fits_bytes([part])
    yy, xx = np.mgrid[part.box.y0 : part.box.y1, part.box.x0 : part.box.x1]
    assert np.array_equal(part.planes["IMAGE"], pixel_value(xx, yy, chip.id))
    assert min(part.box.shape) >= 198
    assert max(part.box.shape) <= 206
    assert len(content) < 200_000


def test_a_missing_and_a_broken_file_say_so(tmp_path):
    with pytest.raises(NotFoundError, match="cache"):
        raw_cutout(tmp_path / "no.fits", CAMERA, CHIP, (0, 0, 0), None)
    (tmp_path / "bad.fits").write_bytes(b"SIMPLE  =                    T" + b"x" * 5000)
    with pytest.raises(BadFileError):
        raw_cutout(tmp_path / "bad.fits", CAMERA, CHIP, (0, 0, 0), None)
