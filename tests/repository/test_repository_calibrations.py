import numpy as np
import pytest
from astropy.io import fits

from cumbre.core.errors import NotFoundError, UserError
from cumbre.core.geometry import detector_corners
from cumbre.core.instrument import load_instrument
from cumbre.repository.calibrations import find_calibration, find_template, put_calibration, put_template
from cumbre.repository.store import create_repository

CAMERA = load_instrument("democam")
T0 = 1795223000.0


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    with create_repository(tmp_path_factory.mktemp("repo"), [CAMERA]) as made:
        yield made


def frame(folder, value):
    path = folder / f"frame{value}.fits"
    fits.PrimaryHDU(np.full((2, 2), value, np.float32)).writeto(path)
    return path


def value_of(path):
    return fits.getdata(path)[0, 0]


def test_the_frame_that_holds_at_the_time_is_found(repository, tmp_path):
    def put(value, begin, end, version):
        put_calibration(
            repository, "bias", frame(tmp_path, value), instrument="DemoCam", detector=1,
            valid_begin_tai=begin, valid_end_tai=end, version=version,
        )  # fmt: skip

    def find(at):
        return find_calibration(repository, "bias", instrument="DemoCam", detector=1, tai_s=at)

    put(1, T0, T0 + 1000, "v1")
    put(2, T0 + 500, T0 + 600, "v2")
    assert value_of(find(T0 + 10)) == 1
    assert value_of(find(T0 + 550)) == 2
    assert value_of(find(T0 + 600)) == 1
    assert find(T0 + 1000) is None
    assert find(T0 - 1) is None
    assert find_calibration(repository, "bias", instrument="DemoCam", detector=2, tai_s=T0 + 10) is None


def test_a_flat_needs_its_filter(repository, tmp_path):
    path = frame(tmp_path, 3)
    common = {"instrument": "DemoCam", "detector": 0}
    with pytest.raises(UserError, match="physical_filter"):
        put_calibration(repository, "flat", path, valid_begin_tai=T0, version="v", **common)
    put_calibration(
        repository, "flat", path, valid_begin_tai=T0, version="v", physical_filter="r_demo", **common
    )
    assert find_calibration(repository, "flat", tai_s=T0 + 1e6, physical_filter="g_demo", **common) is None
    assert find_calibration(repository, "flat", tai_s=T0 + 1e6, physical_filter="r_demo", **common)
    with pytest.raises(UserError, match="one of bias, dark, flat"):
        find_calibration(repository, "sky", tai_s=T0, **common)
    with pytest.raises(NotFoundError):
        put_calibration(repository, "bias", tmp_path / "no.fits", valid_begin_tai=T0, version="v", **common)


def test_templates_by_tile_and_the_newest_version_wins(repository, tmp_path):
    corners = detector_corners(CAMERA, CAMERA.detectors[0], 150.0, -20.0, 0.0)
    where = {"instrument": "DemoCam", "tile": 7, "detector": 0, "band": "r"}
    assert find_template(repository, **where) is None
    for value, version in ((4, "2026-01"), (5, "2026-02")):
        put_template(repository, frame(tmp_path, value), corners_deg=corners, version=version, **where)
    assert value_of(find_template(repository, **where)) == 5
    assert find_template(repository, **where | {"tile": 8}) is None
