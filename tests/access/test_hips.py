"""HiPS: each pixel of a tile against the sky it stands for (by the HPX projection), resuming, coverage, HTTP."""

from __future__ import annotations

import io
import math
import shutil

import fitsio
import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from cumbre.access.images.catalogue import Image
from cumbre.access.images.hips import (
    FOLDER,
    WIDTH,
    HipsMaker,
    Survey,
    merged_cells,
    moc_bytes,
    order_of,
    tile_path,
)  # fmt: skip
from cumbre.payloads.exposure import Exposure
from cumbre.payloads.exposure_file import save_exposure
from cumbre.payloads.kernels.wcs import PlaneWcs

RA, DEC, SIDE, PIXEL = 53.1, -27.8, 400, 0.6 / 3600
UNIT_ZERO_POINT = 2.5 * math.log10(3631e9)
"""With this zero point an electron is a nanojansky."""


def flux(ra, dec):
    """Smooth on the sky, known everywhere."""
    return 1000 + 4e4 * (ra - RA) * math.cos(math.radians(DEC)) + 2e4 * (dec - DEC)


def image(folder, name: str, east: float = 0.0, zero_point: float = UNIT_ZERO_POINT) -> Image:
    """A file whose pixels are what the sky has there, ``east`` pixels away."""
    centre = RA + east * PIXEL / math.cos(math.radians(DEC)), DEC
    turn = np.radians(30)
    cd = PIXEL * np.array([[-np.cos(turn), np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    wcs = PlaneWcs.linear(*centre, (SIDE - 1) / 2, (SIDE - 1) / 2, cd)
    y, x = np.mgrid[:SIDE, :SIDE]
    pixels = (flux(*wcs.pix2sky(x, y)) * 10 ** (0.4 * (zero_point - UNIT_ZERO_POINT))).astype(np.float32)
    mask = np.zeros((SIDE, SIDE), np.uint16)
    mask[100:120, 200:230] = 256  # no data there
    path = folder / f"{name}.fits"
    save_exposure(Exposure(pixels, np.ones_like(pixels), mask, wcs, zero_point=zero_point), path)
    corners = wcs.pix2sky(np.array([0, SIDE, SIDE, 0.0]) - 0.5, np.array([0, 0, SIDE, SIDE]) - 0.5)
    region = tuple(float(v) for pair in zip(*corners, strict=True) for v in pair)
    return Image(name, "template", 3, "DemoCam", name, 0, "D", str(path), SIDE, SIDE, region=region, band="r",
                 ra=centre[0], dec=centre[1], fov_deg=0.1, pixel_arcsec=0.6, release_at_once=True)  # fmt: skip


def survey(*images: Image) -> Survey:
    return Survey("demo", "Demonstration", "Cumbre", "x.y", images)


def sky_of_tile(order: int, tile: int):
    """Sky of each pixel of a tile's array, by the HPX projection of wcslib."""
    across = 1 << order
    face, inside = divmod(tile, across * across)
    column = sum(((inside >> (2 * bit)) & 1) << bit for bit in range(order))
    row = sum(((inside >> (2 * bit + 1)) & 1) << bit for bit in range(order))
    j, i = np.mgrid[:WIDTH, :WIDTH]
    u = (column + (WIDTH - 1 - j + 0.5) / WIDTH) / across  # towards north-east
    v = (row + (i + 0.5) / WIDTH) / across  # towards north-west
    middle = {0: (45 + 90 * (face % 4), 45), 1: (90 * (face % 4), 0), 2: (45 + 90 * (face % 4), -45)}[
        face // 4
    ]
    header = {"CTYPE1": "RA---HPX", "CTYPE2": "DEC--HPX", "CRVAL1": 0.0, "CRVAL2": 0.0, "CRPIX1": 1.0, "CRPIX2": 1.0,
              "CDELT1": 1.0, "CDELT2": 1.0, "PV2_1": 4, "PV2_2": 3}  # fmt: skip
    return WCS(header).all_pix2world(middle[0] + (u - v) * 45, middle[1] + (u + v - 1) * 45, 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hips")
    images = image(folder, "a"), image(folder, "b", east=300, zero_point=UNIT_ZERO_POINT - 1)
    maker = HipsMaker(folder / "demo", survey(*images))
    maker.make(now_utc_s=1.79e9)
    return folder / "demo", maker, images


def test_every_pixel_of_a_tile_is_the_sky_it_stands_for(made):
    folder, maker, _ = made
    assert maker.order == order_of(0.6) == 10
    seen = 0
    for order in (10, 9, 6):
        tiles = sorted((folder / f"Norder{order}").glob("Dir*/Npix*.fits"))
        assert tiles
        for path in tiles:
            pixels = fitsio.read(str(path))
            ra, dec = sky_of_tile(order, int(path.stem[4:]))
            good = np.isfinite(pixels)
            # the mean of what is there, in pixels at an edge, is not quite their middle
            tolerance = 0.02 if order == 10 else 4e4 * 0.12 / 3600 * 4 ** (10 - order) + 2
            assert np.abs(pixels - flux(ra, dec))[good].max() < tolerance, path
            seen += good.sum()
    assert seen > SIDE * SIDE * (0.6 / 0.4025) ** 2  # both images: more than one of them has
    # where there is no image there is nothing: area of the finite pixels is that of the images
    deepest = [fitsio.read(str(p)) for p in (folder / "Norder10").glob("Dir*/Npix*.fits")]
    area = sum(np.isfinite(t).sum() for t in deepest) * (math.degrees(math.sqrt(math.pi / 3)) / 2**19) ** 2
    union = (
        SIDE * SIDE + 300 * SIDE * math.cos(math.radians(30)) + 300 * math.sin(math.radians(30)) * 60
    ) * PIXEL**2
    assert area == pytest.approx(union, rel=0.08)


def test_what_is_done_is_not_done_again_and_a_stopped_run_goes_on(made, tmp_path):
    folder, _, images = made
    again = HipsMaker(folder, survey(*images))
    count = again.make(now_utc_s=1.79e9)
    assert (again.made, again.kept >= count) == (0, True)

    class StoppedError(Exception):
        pass

    def stop(done: int, of: int) -> None:
        if done == 5:
            raise StoppedError

    first = HipsMaker(tmp_path / "x", survey(*images))
    with pytest.raises(StoppedError):
        first.make(stop, now_utc_s=1.79e9)
    assert not (tmp_path / "x" / "properties").exists()  # not offered before it is whole
    second = HipsMaker(tmp_path / "x", survey(*images))
    second.make(now_utc_s=1.79e9)
    assert second.kept == 5
    for path in folder.rglob("Npix*.fits"):
        assert np.array_equal(
            fitsio.read(str(path)),
            fitsio.read(str(tmp_path / "x" / path.relative_to(folder))),
            equal_nan=True,
        )
    # one image less: its tiles go, the others stay as they are
    third = HipsMaker(tmp_path / "x", survey(images[0]))
    third.make(now_utc_s=1.79e9)
    assert 0 < len(list((tmp_path / "x" / "Norder10").rglob("*.fits"))) < count
    assert third.kept > 0


def test_coverage_and_properties(made):
    import hpgeom

    folder, _, images = made
    about = dict(line.split("=", 1) for line in (folder / "properties").read_text().splitlines())
    about = {key.strip(): value.strip() for key, value in about.items()}
    needed = {"creator_did", "obs_title", "dataproduct_type", "hips_version", "hips_release_date", "hips_status",
              "hips_frame", "hips_order", "hips_tile_width", "hips_tile_format"}  # fmt: skip
    assert needed <= set(about)
    assert (about["hips_frame"], about["hips_order"], about["hips_tile_width"]) == ("equatorial", "10", "512")
    table = fits.getdata(folder / "Moc.fits", 1)
    header = fits.getheader(folder / "Moc.fits", 1)
    assert (header["PIXTYPE"], header["ORDERING"], header["COORDSYS"]) == ("HEALPIX", "NUNIQ", "C")
    orders = (np.log2(table["UNIQ"] / 4).astype(int)) // 2
    cells = table["UNIQ"] - 4 * 4**orders

    def covered(ra: float, dec: float) -> bool:
        return any(
            hpgeom.angle_to_pixel(1 << int(o), ra, dec) == c for o, c in zip(orders, cells, strict=True)
        )

    for item in images:
        assert covered(item.ra, item.dec)
    assert not covered(RA + 0.3, DEC)
    fraction = float((1.0 / (12 * 4.0**orders)).sum())
    assert fraction == pytest.approx(float(about["moc_sky_fraction"]), rel=1e-4)
    area = fraction * 41252.96
    one = (SIDE * PIXEL) ** 2
    assert one < area < 3.2 * one


def test_cells_are_joined_where_four_are_there():
    whole = np.arange(16) + 16 * 5
    assert merged_cells(4, whole) == [(2, 5)]
    assert sorted(merged_cells(4, np.array([80, 81, 82, 83, 84]))) == [(3, 20), (4, 84)]
    assert fits.getdata(io.BytesIO(moc_bytes([(3, 20), (4, 84)])))["UNIQ"].tolist() == [
        4 * 64 + 20,
        4 * 256 + 84,
    ]


def test_tiles_over_http(made, world, client):
    import cv2

    folder = made[0]
    place = world.site.root / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, place / "demo")
    listed = client.get("/hips/hipslist").text
    assert f"{world.url}/hips/demo" in listed
    assert listed == client.get("/hipslist").text
    path = next((folder / "Norder10").rglob("*.png"))
    answer = client.get(f"/hips/demo/{path.relative_to(folder)}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.headers["access-control-allow-origin"] == "*"
    picture = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture.shape == (512, 512, 4)
    tile = fitsio.read(str(path.with_suffix(".fits")))
    assert np.array_equal(picture[::-1, :, 3] > 0, np.isfinite(tile))
    for name, kind in (("properties", "text/plain"), ("Moc.fits", "application/fits"),
                       ("Norder3/Allsky.png", "image/png"), ("Norder3/Allsky.fits", "application/fits")):  # fmt: skip
        assert client.get(f"/hips/demo/{name}").headers["content-type"].startswith(kind)
    sheet = fits.getdata(io.BytesIO(client.get("/hips/demo/Norder3/Allsky.fits").content))
    assert sheet.shape == (29 * 64, 27 * 64)
    for path in (
        "demo/cuts.json",
        "demo/../../site.yaml",
        "demo/%2e%2e/%2e%2e/%2e%2e/site.yaml",
        "demo/",
        "other/properties",
    ):
        assert client.get(f"/hips/{path}").status_code == 404
    shutil.rmtree(place / "demo")
    assert tile_path(folder, 10, 20001, "png").parent.name == "Dir20000"
