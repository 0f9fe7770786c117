"""Cutouts read what they need, on disk and in an object store: bytes are counted, pixels compared with the whole."""

from __future__ import annotations

import os
from pathlib import Path

import fitsio
import numpy as np
import pytest

from cumbre.access.images.cutout import exposure_cutout, raw_cutout
from cumbre.access.images.shapes import Circle
from cumbre.access.images.source import PixelBox, is_remote, opened
from cumbre.capture.raw_fits import raw_fits_bytes
from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.core.geometry import sky_from_pixel
from cumbre.core.instrument import load_instrument
from cumbre.payloads.kernels.wcs import PlaneWcs
from support.archive_world import pixel_value, raw_array

CAMERA = load_instrument("democam")
CHIP = CAMERA.detector(0)
SIDE, SCALE = 2048, 0.2 / 3600
WCS = PlaneWcs.linear(10.0, 20.0, SIDE / 2, SIDE / 2, [[-SCALE, 0], [0, SCALE]])


@pytest.fixture
def bucket(s3_bucket):
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"], region_name="us-east-1")
    return lambda name, path: (client.upload_file(str(path), s3_bucket, name), f"s3://{s3_bucket}/{name}")[1]


@pytest.fixture(scope="module")
def exposure(tmp_path_factory) -> Path:
    """Image, variance and mask of 2048 × 2048 pixels, compressed in tiles of three kinds."""
    path = tmp_path_factory.mktemp("exposure") / "exposure.fits"
    rng = np.random.default_rng(3)
    image = rng.normal(100, 10, (SIDE, SIDE)).astype(np.float32)
    mask = rng.integers(0, 500, (SIDE, SIDE)).astype(np.uint16)
    header = [{"name": k, "value": v} for k, v in WCS.to_header().items()]
    with fitsio.FITS(str(path), "rw") as file:
        file.write(None, header=header)
        file.write(image, extname="IMAGE", compress="RICE", tile_dims=(256, 256), qlevel=16)
        file.write(np.abs(image), extname="VARIANCE", compress="GZIP_2", tile_dims=(1, SIDE), qlevel=0)
        file.write(mask, extname="MASK")
    return path


@pytest.mark.parametrize(
    ("x", "y", "radius"), [(1000, 700, 100), (255, 256, 3), (2040, 2040, 60), (0, 1024, 30)]
)
def test_a_remote_cutout_is_the_local_one_and_few_bytes_came(bucket, exposure, x, y, radius):
    url = bucket("a/exposure.fits", exposure)
    shape = Circle(*(float(v) for v in WCS.pix2sky(x, y)), radius * SCALE)
    planes = ("IMAGE", "VARIANCE", "MASK")
    here, there = exposure_cutout(exposure, shape, planes=planes), exposure_cutout(url, shape, planes=planes)
    assert here.box == there.box
    with fitsio.FITS(str(exposure)) as file:
        for name in planes:
            whole = file[name].read()[here.box.y0 : here.box.y1, here.box.x0 : here.box.x1]
            assert np.array_equal(whole, here.planes[name])
            assert np.array_equal(whole, there.planes[name])
    with opened(url) as file:
        file.sections([("IMAGE", here.box)])
        assert file.remote.size == exposure.stat().st_size > 20e6
        assert file.remote.fetched < 1.2e6  # four tiles of 256 × 256 at the most, and headers
        assert file.remote.requests <= 12
        before = file.remote.requests
        file.sections([("IMAGE", here.box)])
        assert file.remote.requests == before


def test_on_disk_too_only_tiles_are_read(exposure):
    def read_so_far() -> int:
        text = Path("/proc/self/io").read_text()
        return int(text.split("rchar: ")[1].split()[0])

    shape = Circle(*(float(v) for v in WCS.pix2sky(1000, 700)), 100 * SCALE)
    exposure_cutout(exposure, shape)
    before = read_so_far()
    cut = exposure_cutout(exposure, shape)
    assert cut.planes["IMAGE"].size > 40_000
    assert read_so_far() - before < 1.5e6 < exposure.stat().st_size / 10


def test_amplifiers_of_a_remote_raw_file(bucket, tmp_path):
    path = tmp_path / "raw.fits"
    path.write_bytes(raw_fits_bytes(CHIP, raw_array(CHIP), []))
    url = bucket("raw.fits", path)
    pointing = (50.0, -30.0, 20.0)
    # the corner of four amplifiers
    ra, dec = (float(v) for v in sky_from_pixel(CAMERA, CHIP, *pointing, 512, 512))
    cut = raw_cutout(url, CAMERA, CHIP, pointing, Circle(ra, dec, 40 * 0.6 / 3600))
    y, x = np.mgrid[cut.box.y0 : cut.box.y1, cut.box.x0 : cut.box.x1]
    assert np.array_equal(cut.planes["IMAGE"], pixel_value(x, y, 0))
    assert np.array_equal(raw_cutout(url, CAMERA, CHIP, pointing, None).planes["IMAGE"],
                          pixel_value(*np.meshgrid(np.arange(CHIP.nx), np.arange(CHIP.ny)), 0))  # fmt: skip


def test_what_is_not_there_or_cut_off_is_said(bucket, exposure, tmp_path):
    (tmp_path / "cut.fits").write_bytes(exposure.read_bytes()[:1_000_000])
    cut = bucket("cut.fits", tmp_path / "cut.fits")
    with pytest.raises(NotFoundError), opened(cut.replace("cut.fits", "none.fits")):
        pass
    for path in (cut, tmp_path / "none.fits"):
        with pytest.raises((BadFileError, NotFoundError)):
            exposure_cutout(path, None)
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(BadFileError):
            exposure_cutout(cut, None)
    assert len(os.listdir("/proc/self/fd")) <= files + 1  # nothing stays open
    assert is_remote("s3://x/y")
    with opened(exposure) as file, pytest.raises(NotFoundError):
        file.sections([("NOTHING", PixelBox(0, 1, 0, 1))])
