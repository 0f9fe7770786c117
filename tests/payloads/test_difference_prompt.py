"""Alert production of one detector image: association, forced photometry, packets."""

from __future__ import annotations

import numpy as np
import pytest

from cumbre.alerts.packet import decode_packet, packet_bytes
from cumbre.core.errors import NoWorkFoundError
from cumbre.core.ids import split_source_id
from cumbre.payloads.alert_production import produce
from cumbre.payloads.exposure import Exposure
from cumbre.payloads.kernels.wcs import PlaneWcs

SHAPE = (400, 400)
SCALE = 0.4 / 3600
ZERO_POINT = 31.4  # one electron is one nJy


def sky(ra, dec, flux, wcs, sigma):
    yy, xx = np.mgrid[: SHAPE[0], : SHAPE[1]]
    image = np.zeros(SHAPE)
    for x, y, f in zip(*wcs.sky2pix(ra, dec), flux, strict=True):
        image += f * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    return image


def make(image, wcs, noise, seed, visit=2026112000012):
    rng = np.random.default_rng(seed)
    variance = noise**2 + np.maximum(image, 0)
    return Exposure(
        (image + rng.normal(0, np.sqrt(variance))).astype(np.float32), variance.astype(np.float32),
        np.zeros(SHAPE, np.uint16), wcs=wcs, zero_point=ZERO_POINT, is_background_subtracted=True,
        metadata={"exposure_id": visit, "detector": 3, "mjd_mid_tai": 61364.2, "band": "r", "exposure_s": 30.0},
        metrics={"pixel_scale_arcsec": 0.4, "seeing_arcsec": 1.6},
    )  # fmt: skip


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(11)
    centre = (150.0, -30.0)
    wcs = PlaneWcs.linear(*centre, 200.0, 200.0, np.array([[-SCALE, 0], [0, SCALE]]))
    c, s = np.cos(np.radians(5)), np.sin(np.radians(5))
    turned = PlaneWcs.linear(*centre, 207.0, 190.0, SCALE * np.array([[-c, s], [s, c]]))
    gx, gy = np.meshgrid(np.arange(35, 380, 40), np.arange(35, 380, 40))
    x, y = gx.ravel() + rng.uniform(-6, 6, gx.size), gy.ravel() + rng.uniform(-6, 6, gx.size)
    ra, dec = wcs.pix2sky(x, y)
    flux = 10 ** rng.uniform(3.7, 5.0, x.size)
    new_ra, new_dec = wcs.pix2sky(np.array([55.3, 175.8, 255.0]), np.array([295.2, 135.4, 216.0]))
    template = make(sky(ra, dec, 0.4 * flux, turned, 1.6), turned, 3.0, 1)
    new_flux = np.array([3000.0, -2500.0, 4000.0])
    image = sky(ra, dec, flux, wcs, 2.0) + sky(new_ra, new_dec, new_flux, wcs, 2.0)
    return make(image, wcs, 8.0, 2), template, new_ra, new_dec, new_flux


@pytest.fixture(scope="module")
def first(scene):
    exposure, template, *_ = scene
    return produce(exposure, None, template, None, processed_mjd_tai=61364.3)


def test_new_sources_become_objects_and_alerts(scene, first):
    _, _, ra, dec, flux = scene
    assert len(first.alerts) == 3
    assert len(first.dia_objects) == 3
    for r, d, f in zip(ra, dec, flux, strict=True):
        near = min(first.alerts, key=lambda a: np.hypot(a["diaSource"]["ra"] - r, a["diaSource"]["dec"] - d))
        source = near["diaSource"]
        assert np.hypot((source["ra"] - r) * np.cos(np.radians(d)), source["dec"] - d) * 3600 < 0.1
        assert abs(source["psfFlux"] - f) < 4 * source["psfFluxErr"]
        assert source["psfFluxErr"] < 0.05 * abs(f)
        assert source["isNegative"] == (f < 0)
        assert split_source_id(source["diaSourceId"])[:2] == (2026112000012, 3)
        assert near["diaObject"]["diaObjectId"] == source["diaObjectId"]


def test_packets_pass_the_schema_and_have_stamps(first):
    from io import BytesIO

    from astropy.io import fits

    packet = decode_packet(packet_bytes(first.alerts[0]))
    assert packet["diaSourceId"] == first.alerts[0]["diaSourceId"]
    for name in ("cutoutDifference", "cutoutScience", "cutoutTemplate"):
        with fits.open(BytesIO(packet[name])) as hdus:
            assert min(hdus[0].data.shape) >= 30
            assert hdus[0].header["CTYPE1"] == "RA---TAN"
    peak = fits.getdata(BytesIO(packet["cutoutDifference"]))
    at = np.unravel_index(np.argmax(np.abs(peak)), peak.shape)
    assert np.abs(np.array(at) - 15).max() <= 2


def test_known_objects_are_found_again_and_forced(scene, first):
    exposure, template, ra, dec, _ = scene
    far = {**first.dia_objects[0], "diaObjectId": 999, "ra": ra[0] - 0.01, "dec": dec[0] + 0.008}
    history = {
        "DiaObject": [*first.dia_objects, far],
        "DiaSource": first.dia_sources,
        "DiaForcedSource": first.forced,
    }
    exposure.metadata["exposure_id"] += 1
    again = produce(exposure, None, template, None, history=history, processed_mjd_tai=61364.4)
    exposure.metadata["exposure_id"] -= 1
    known = {o["diaObjectId"] for o in first.dia_objects}
    assert {o["diaObjectId"] for o in again.dia_objects} == known
    assert all(o["nDiaSources"] == 2 for o in again.dia_objects)
    assert all(a["prvDiaSources"] and a["prvDiaForcedSources"] for a in again.alerts)
    forced = {f["diaObjectId"]: f for f in again.forced}
    assert set(forced) == known | {999}
    assert abs(forced[999]["psfFlux"]) < 5 * forced[999]["psfFluxErr"]
    for a in again.alerts:
        assert forced[a["diaSource"]["diaObjectId"]]["psfFlux"] == pytest.approx(
            a["diaSource"]["psfFlux"], rel=0.08
        )
    packet_bytes(again.alerts[0])


def test_history_from_a_database_gives_the_packets_of_rows(scene, first):
    import pyarrow as pa

    exposure, template, *_ = scene
    rows = {"DiaObject": first.dia_objects, "DiaSource": first.dia_sources, "DiaForcedSource": first.forced}
    tables = {name: pa.Table.from_pylist(listed) for name, listed in rows.items()}
    a, b = (
        produce(exposure, None, template, None, history=history, processed_mjd_tai=61364.4)
        for history in (rows, tables)
    )
    assert len(a.alerts) == 3
    assert [packet_bytes(x) for x in a.alerts] == [packet_bytes(x) for x in b.alerts]
    assert all(x["nDiaSources"] == 2 for x in b.dia_objects)


def test_same_input_gives_the_same_output(scene, first):
    exposure, template, *_ = scene
    repeated = produce(exposure, None, template, None, processed_mjd_tai=61364.3)
    assert repeated.dia_sources == first.dia_sources


def test_no_overlap_is_no_work(scene):
    exposure, template, *_ = scene
    elsewhere = make(
        template.image, PlaneWcs.linear(10.0, 10.0, 200, 200, np.array([[-SCALE, 0], [0, SCALE]])), 3.0, 1
    )
    with pytest.raises(NoWorkFoundError, match="cover"):
        produce(exposure, None, elsewhere, None)
