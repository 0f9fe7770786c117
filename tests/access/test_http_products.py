"""Mosaics and stacks over a real server: every pixel against the place on the sky that it says it has."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from cumbre.core.geometry import pixel_from_sky, sky_from_pixel
from cumbre.core.instrument import load_instrument
from support.archive_world import AUTHORITY, DEC, NEW, OLD, RA, ROTATION

CAMERA = load_instrument("democam")
PIXEL_DEG = 0.6 / 3600


@pytest.fixture
def insider(world):
    with httpx.Client(base_url=world.url, timeout=60, headers=world.headers(world.admin)) as client:
        yield client


def did(obs_id: str, detector: int) -> str:
    return f"ivo://{AUTHORITY}?raw/{obs_id}/{CAMERA.detector(detector).name}"


def sky(detector: int, x: float, y: float) -> tuple[float, float]:
    ra, dec = sky_from_pixel(CAMERA, CAMERA.detector(detector), RA, DEC, ROTATION, x, y)
    return float(ra), float(dec)


def check(header, pixels, detectors) -> int:
    """Every finite pixel is the ramp of the detector that lies there; returns how many there are."""
    ny, nx = pixels.shape
    y, x = np.mgrid[:ny, :nx]
    ra, dec = WCS(header, naxis=2).all_pix2world(x, y, 0)
    seen = np.zeros(pixels.shape, bool)
    for detector in detectors:
        px, py = pixel_from_sky(CAMERA, CAMERA.detector(detector), RA, DEC, ROTATION, ra, dec)
        inside = (px > 5) & (py > 5) & (px < 1018) & (py < 1018)
        expected = 7 * px + 13 * py + 1000 * detector
        close = np.abs(pixels - expected) < 12 + 2e-3 * expected
        assert close[inside].all(), np.nanmax(np.abs(pixels - expected)[inside])
        outside = (px < -1) | (py < -1) | (px > 1024) | (py > 1024)
        seen |= ~outside
    assert np.isnan(pixels[~seen]).all()
    return int(np.isfinite(pixels).sum())


def test_a_mosaic_of_a_visit_is_one_image_of_all_detectors(client):
    # a circle about the middle of the focal plane touches both detectors
    data = {"ID": [did(OLD, 0), did(OLD, 3)], "CIRCLE": f"{RA} {DEC} {300 * PIXEL_DEG}", "COMBINE": "MOSAIC"}
    answer = client.post("/soda/sync", data=data)
    assert answer.status_code == 200, answer.text
    hdus = fits.open(io.BytesIO(answer.content), checksum=True)
    assert [hdu.name for hdu in hdus] == ["PRIMARY", "IMAGE", "INPUTS"]
    image = hdus["IMAGE"]
    assert image.data.shape == pytest.approx((601, 601), abs=2)
    assert check(image.header, image.data, (0, 3)) > 80_000
    assert (image.header["COMBINE"], image.header["NIMAGES"], image.header["OBSID"]) == ("MOSAIC", 2, OLD)
    assert hdus["INPUTS"].data["detector"].tolist() == [0, 3]
    one = client.post("/soda/sync", data=data | {"ID": did(OLD, 0)})
    single = fits.open(io.BytesIO(one.content))["IMAGE"]
    assert np.isfinite(single.data).sum() < 0.6 * np.isfinite(image.data).sum()


def test_many_visits_and_shapes_in_one_request(insider):
    ids = [did(obs, detector) for obs in (OLD, NEW) for detector in (0, 3)]
    circles = [f"{ra} {dec} {20 * PIXEL_DEG}" for ra, dec in (sky(0, 400, 400), sky(3, 600, 500))]
    answer = insider.post("/soda/sync", data={"ID": ids, "CIRCLE": circles, "COMBINE": "MOSAIC"})
    hdus = fits.open(io.BytesIO(answer.content))
    assert [hdu.header["OBSID"] for hdu in hdus if hdu.name.startswith("IMAGE")] == [OLD, NEW, OLD, NEW]
    for number, detector in ((1, 0), (2, 0), (3, 3), (4, 3)):
        assert check(hdus[f"IMAGE_{number}"].header, hdus[f"IMAGE_{number}"].data, (detector,)) > 1500


def test_a_stack_is_a_cube_of_stamps_in_the_order_of_time(insider, client):
    ra, dec = sky(0, 500, 400)
    data = {"ID": [did(NEW, 0), did(OLD, 0), did(OLD, 3)], "CIRCLE": f"{ra} {dec} {25 * PIXEL_DEG}",
            "COMBINE": "STACK"}  # fmt: skip
    answer = insider.post("/soda/sync", data=data)
    hdus = fits.open(io.BytesIO(answer.content), checksum=True)
    cube, inputs = hdus["IMAGE"], hdus["INPUTS"].data
    assert cube.data.shape[0] == 2  # detector 3 does not touch the place
    assert inputs["obs_id"].tolist() == [OLD, NEW]
    assert np.diff(inputs["mjd_begin_tai"]) > 0
    for layer in cube.data:
        assert check(cube.header, layer, (0,)) == layer.size
    # the middle of each stamp is the place that was asked for
    x, y = WCS(cube.header, naxis=2).all_world2pix(ra, dec, 0)
    assert (float(x), float(y)) == pytest.approx(((layer.shape[1] - 1) / 2, (layer.shape[0] - 1) / 2), abs=1)
    assert client.post("/soda/sync", data=data).status_code == 404  # NEW is under embargo
    assert insider.post("/soda/sync", data=data | {"CIRCLE": "1 1 0.01"}).status_code == 204


def test_pictures_of_products(insider):
    import cv2

    ra, dec = sky(0, 500, 400)
    data = {
        "ID": [did(NEW, 0), did(OLD, 0)],
        "CIRCLE": f"{ra} {dec} {25 * PIXEL_DEG}",
        "RESPONSEFORMAT": "png",
    }
    for combine, ratio in (("STACK", 2.0), ("MOSAIC", 1.0)):
        ids = data["ID"] if combine == "STACK" else data["ID"][:1]
        answer = insider.post("/soda/sync", data=data | {"COMBINE": combine, "ID": ids})
        picture = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_GRAYSCALE)
        assert max(picture.shape) / min(picture.shape) == pytest.approx(ratio, abs=0.05)
        assert np.std(picture) > 20


@pytest.mark.parametrize(
    ("more", "status"),
    [({"COMBINE": "SUM"}, 400), ({"COMBINE": "STACK"}, 400), ({"COMBINE": "MOSAIC", "CIRCLE": "1 1 80"}, 400),
     ({"COMBINE": "MOSAIC", "CIRCLE": "53.1 -27.8 20"}, 413), ({"COMBINE": "MOSAIC", "CUTOUTDETAIL": "Exposure"}, 400)],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused(client, more, status):
    assert client.post("/soda/sync", data={"ID": did(OLD, 0)} | more).status_code == status


def test_stacks_as_jobs_one_result_a_shape(client):
    circles = [f"{ra} {dec} {20 * PIXEL_DEG}" for ra, dec in (sky(0, 400, 400), sky(3, 600, 500), (1, 1))]
    data = {"ID": [did(OLD, 0), did(OLD, 3)], "CIRCLE": circles, "COMBINE": "STACK", "PHASE": "RUN"}
    url = client.post("/soda/async", data=data).headers["location"]
    ns = "{http://www.ivoa.net/xml/UWS/v1.0}"
    for _ in range(20):
        root = ElementTree.fromstring(client.get(url, params={"WAIT": 5}).content)
        if root.findtext(f"{ns}phase") in ("COMPLETED", "ERROR"):
            break
    assert root.findtext(f"{ns}phase") == "COMPLETED"
    results = [e.get("{http://www.w3.org/1999/xlink}href") for e in root.find(f"{ns}results")]
    assert len(results) == 3
    for href, detector in zip(results, (0, 3), strict=False):
        hdus = fits.open(io.BytesIO(client.get(href).content))
        assert check(hdus["IMAGE"].header, hdus["IMAGE"].data[0], (detector,)) > 1500
    assert client.get(results[2]).text.startswith("UsageError")


def test_image_mask_and_variance_of_a_mosaic_and_zero_points(client, world, tmp_path):
    from cumbre.access.images.catalogue import Image
    from cumbre.payloads.exposure import Exposure
    from cumbre.payloads.exposure_file import save_exposure
    from cumbre.payloads.kernels.wcs import PlaneWcs

    images = []
    for number, (zero_point, level) in enumerate(((27.0, 100.0), (27.5, 100.0 * 10**0.2))):
        pixels = np.full((300, 300), level, np.float32)
        mask = np.zeros((300, 300), np.uint16)
        mask[140:160, 140:160] = 8 << number
        # the second lies 200 pixels further east
        wcs = PlaneWcs.linear(10.0, 20.0, 150 + 200 * number, 150, [[-PIXEL_DEG, 0], [0, PIXEL_DEG]])
        path = tmp_path / f"{number}.fits"
        save_exposure(
            Exposure(
                pixels, np.full_like(pixels, 4.0 * 10 ** (0.4 * number)), mask, wcs, zero_point=zero_point
            ),
            path,
        )
        corner_ra, corner_dec = wcs.pix2sky(np.array([0, 299, 299, 0.0]), np.array([0, 0, 299, 299.0]))
        region = tuple(float(v) for pair in zip(corner_ra, corner_dec, strict=True) for v in pair)
        images.append(
            Image(f"calibrated/x/{number}", "calibrated", 2, "DemoCam", OLD, number, f"D{number}", str(path), 300, 300,
                  begin_tai=0.0, region=region, pixel_arcsec=0.6)
        )  # fmt: skip
    world.access.catalogue.register(images)
    try:
        ids = [image.image_id for image in images]
        answer = client.post(
            "/soda/sync", data={"ID": ids, "COMBINE": "MOSAIC", "CUTOUTDETAIL": "MaskedImage"}
        )
        hdus = fits.open(io.BytesIO(answer.content))
    finally:
        world.database.execute("DELETE FROM access.image WHERE product = 'calibrated'")
    assert [hdu.name for hdu in hdus[1:]] == ["IMAGE", "VARIANCE", "MASK", "INPUTS"]
    image, variance, mask = (hdus[name].data for name in ("IMAGE", "VARIANCE", "MASK"))
    assert image.shape == pytest.approx((301, 500), abs=3)
    good = np.isfinite(image)
    assert 0.94 < good.mean() <= 1
    assert np.allclose(image[good], 100.0, rtol=2e-3)  # scaled to the zero point of the first
    assert hdus["IMAGE"].header["MAGZERO"] == 27.0
    assert np.array_equal(mask & 256 != 0, ~good)
    # one image alone has 4 electrons² less what Lanczos averages; two together half of it
    assert np.nanpercentile(variance, 95) / np.nanmin(variance) == pytest.approx(2, rel=0.35)
    assert hdus["INPUTS"].data["scale"].tolist() == pytest.approx([1, 10**-0.2])
    assert {int(bits) for bits in np.unique(mask)} >= {0, 8, 16}
