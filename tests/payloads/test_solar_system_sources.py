"""Known objects among the sources of an image: first of all, with residuals, in the packet too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import BarycentricMeanEcliptic, SkyCoord

from cumbre.alerts.packet import decode_packet, packet_bytes
from cumbre.payloads.alert_production import produce
from cumbre.payloads.exposure import Exposure
from cumbre.payloads.kernels.wcs import PlaneWcs
from cumbre.payloads.solar_system.attribution import KnownObjects, attribute
from cumbre.payloads.solar_system.bodies import Observer
from cumbre.payloads.solar_system.kepler import AU_KM
from cumbre.payloads.solar_system.night import NightTable, Places
from cumbre.payloads.solar_system.orbits import Orbits
from cumbre.payloads.solar_system.tables import night_table

MJD = 61364.2
PACHON = Observer.at(-30.2446, -70.7494, 2663.0)


def orbits(n: int) -> Orbits:
    rng = np.random.default_rng(4)
    return Orbits.of_columns(
        {
            "ssObjectId": np.arange(1, n + 1), "q": rng.uniform(1.8, 2.6, n), "e": rng.uniform(0, 0.2, n),
            "i": rng.uniform(0, 15, n), "node": rng.uniform(0, 360, n), "argperi": rng.uniform(0, 360, n),
            "peri_time": rng.uniform(60000, 61500, n), "epoch_mjd": np.full(n, 61360.0), "h": np.full(n, 14.0),
            "g": np.full(n, 0.15),
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def places() -> Places:
    return NightTable.build(orbits(40), 20261120, PACHON).near(0.0, 0.0, 180.0, MJD)


def row(identifier: int, ra: float, dec: float, **more: object) -> dict[str, object]:
    return {"diaSourceId": identifier, "ra": ra, "dec": dec, "ssObjectId": None, "isNegative": False, **more}


def test_nearest_within_an_arc_second_and_residuals_by_direction(places: Places) -> None:
    k = int(np.argmax(np.abs(places.ra_rate)))
    ra, dec = float(places.ra[k]), float(places.dec[k])
    cosine = np.cos(np.radians(dec))
    sources = [
        row(1, ra + 0.3 / 3600 / cosine, dec - 0.4 / 3600),
        row(2, ra + 0.8 / 3600 / cosine, dec),
        row(3, float(places.ra[3]), float(places.dec[3]) + 1.2 / 3600),
        row(4, float(places.ra[5]), float(places.dec[5]), isNegative=True),
    ]
    rows = attribute(sources, KnownObjects(places, lambda _: {}))
    assert [s["ssObjectId"] for s in sources] == [int(places.ids[k]), None, None, None]
    (found,) = rows
    assert found["ephOffsetRa"] == pytest.approx(0.3, abs=1e-4)
    assert found["ephOffsetDec"] == pytest.approx(-0.4, abs=1e-4)
    assert found["ephOffset"] == pytest.approx(0.5, abs=1e-4)
    along, across = found["ephOffsetAlongTrack"], found["ephOffsetCrossTrack"]
    assert np.hypot(along, across) == pytest.approx(0.5, abs=1e-4)
    direction = np.array([places.ra_rate[k], places.dec_rate[k]]) / np.hypot(
        places.ra_rate[k], places.dec_rate[k]
    )
    assert along == pytest.approx(direction @ [0.3, -0.4], abs=1e-4)
    seen = SkyCoord(sources[0]["ra"], sources[0]["dec"], unit="deg")
    assert (found["galLon"], found["galLat"]) == pytest.approx(
        (seen.galactic.l.deg, seen.galactic.b.deg), abs=1e-5
    )
    ecliptic = seen.transform_to(BarycentricMeanEcliptic(equinox="J2000"))
    assert (
        SkyCoord(found["eclLambda"], found["eclBeta"], unit="deg").separation(
            SkyCoord(ecliptic.lon, ecliptic.lat)
        )
        < 0.1 * u.arcsec
    )
    assert found["helio_vtot"] == pytest.approx(np.linalg.norm(places.helio[k, 3:]) * AU_KM / 86400)
    assert 10 < found["helio_vtot"] < 30  # km/s, main belt
    # change of distance between two moments against the rate
    night = NightTable.build(orbits(40), 20261120, PACHON)
    both = [night.near(0.0, 0.0, 180.0, MJD + step) for step in (-0.01, 0.01)]
    one, two = (p.take(np.flatnonzero(p.ids == places.ids[k])) for p in both)
    moved = np.linalg.norm(two.topo[0, :3]) - np.linalg.norm(one.topo[0, :3])
    assert found["topoRangeRate"] == pytest.approx(moved / 0.02 * AU_KM / 86400, abs=0.02)
    turned = (two.ra[0] - one.ra[0]) * np.cos(np.radians(one.dec[0])) / 0.02
    assert found["ephRateRa"] == pytest.approx(turned, abs=2e-4)


def image(transients: list[tuple[float, float, float]], seed: int, wcs: PlaneWcs) -> Exposure:
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:300, :300]
    stars = np.random.default_rng(1)
    gx, gy = np.meshgrid(np.arange(35, 290, 40), np.arange(35, 290, 40))
    x, y = gx.ravel() + stars.uniform(-6, 6, gx.size), gy.ravel() + stars.uniform(-6, 6, gx.size)
    flux = 10 ** stars.uniform(3.7, 5.0, x.size)
    pixels = np.zeros((300, 300))
    for px, py, f in [*zip(x, y, flux, strict=True), *transients]:
        pixels += f * np.exp(-((xx - px) ** 2 + (yy - py) ** 2) / (2 * 1.8**2)) / (2 * np.pi * 1.8**2)
    variance = 64.0 + pixels
    return Exposure(
        (pixels + rng.normal(0, np.sqrt(variance))).astype(np.float32), variance.astype(np.float32),
        np.zeros((300, 300), np.uint16), wcs=wcs, zero_point=31.4, is_background_subtracted=True,
        metadata={"exposure_id": 2026112000012, "detector": 3, "mjd_mid_tai": MJD, "band": "r", "exposure_s": 30.0},
        metrics={"pixel_scale_arcsec": 0.4, "seeing_arcsec": 1.7},
    )  # fmt: skip


def test_a_known_asteroid_is_no_new_object_and_its_packet_says_who_it_is(places: Places) -> None:
    ra, dec = float(places.ra[0]), float(places.dec[0])
    scale = 0.4 / 3600
    wcs = PlaneWcs.linear(ra, dec, 137.3, 155.8, np.array([[-scale, 0], [0, scale]]))
    science = image([(137.3, 155.8, 5000.0), (215.4, 95.1, 5000.0)], 2, wcs)
    template = image([], 3, wcs)
    asked: list[float] = []

    def known(mjd_tai: float) -> KnownObjects:
        asked.append(mjd_tai)
        orbit = {"id": 7, "designation": "2026 AA", "packed_primary_provisional_designation": "K26A00A",
                 "unpacked_primary_provisional_designation": "2026 AA", "a": 2.5}  # fmt: skip
        return KnownObjects(places, lambda ids: dict.fromkeys(ids, orbit))

    made = produce(science, None, template, None, processed_mjd_tai=MJD, solar_system=known)
    assert asked == [MJD]
    moving = [s for s in made.dia_sources if s["ssObjectId"] is not None]
    assert len(moving) == 1
    assert moving[0]["ssObjectId"] == int(places.ids[0])
    assert moving[0]["diaObjectId"] is None
    assert [r["diaSourceId"] for r in made.ss_sources] == [moving[0]["diaSourceId"]]
    assert made.ss_sources[0]["designation"] == "2026 AA"
    assert made.ss_sources[0]["ephOffset"] < 0.2
    # the other one is new and stays a candidate
    assert len(made.dia_objects) == 1
    assert abs(made.dia_objects[0]["dec"] - dec) > 10 * scale
    packets = {a["diaSourceId"]: decode_packet(packet_bytes(a)) for a in made.alerts}
    packet = packets.pop(moving[0]["diaSourceId"])
    assert packet["ssSource"]["ssObjectId"] == int(places.ids[0])
    assert packet["mpc_orbits"]["designation"] == "2026 AA"
    assert packet["diaObject"] is None
    assert packet["diaSource"]["diaObjectId"] is None
    (other,) = packets.values()
    assert other["ssSource"] is None
    assert other["mpc_orbits"] is None
    assert other["diaObject"] is not None


def test_a_nights_table_is_made_once_for_each_catalogue(tmp_path: Path) -> None:
    calls: list[int] = []

    def elements(version: int):
        def give():
            calls.append(version)
            n = 5
            zero = np.zeros(n)
            return version, {
                "ssObjectId": np.arange(n), "q": np.full(n, 2.0), "e": zero, "i": zero, "node": zero,
                "argperi": zero, "peri_time": np.full(n, 61000.0), "epoch_mjd": np.full(n, 61000.0), "h": zero, "g": zero,
            }  # fmt: skip

        return give

    for version in (1, 1, 2, 2):
        assert len(night_table(tmp_path, 20261120, version, PACHON, elements(version))) == 5
    assert calls == [1, 2]
    for day in range(20261121, 20261130):
        night_table(tmp_path, day, 2, PACHON, elements(2))
    assert len(list(tmp_path.glob("*.tab"))) <= 6
    assert (tmp_path / "20261129_2.tab").exists()
