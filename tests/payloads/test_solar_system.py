"""Ephemerides against JPL Horizons, orbit files, and a night's table against brute force."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest

from cumbre.core.errors import NotFoundError, UserError
from cumbre.core.time import mjd_from_seconds, parse_isot, tai_from_utc
from cumbre.payloads.solar_system import kepler
from cumbre.payloads.solar_system.bodies import Observer, tt_from_tai
from cumbre.payloads.solar_system.motion import integrate
from cumbre.payloads.solar_system.night import NightTable
from cumbre.payloads.solar_system.orbits import Orbits, object_id, packed_designation, read_orbits

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "moving_objects"
horizons = pytest.mark.skipif(
    not DATA.is_dir(), reason="real orbits (../shared/data/moving_objects) not here"
)
NO_GRAVITY_ALONE = "Oumuamua"
DAY_OBS = 20261120
PACHON = Observer.at(-30.2446, -70.7494, 2663.0)
CERES = (
    "00001    3.34  0.15 K2555 188.70269   73.27343   80.25221   10.58780  0.0794013  0.21424651   2.7660512  "
    "0 E2024-V47  7330 125 1801-2024 0.80 M-v 30k MPCLINUX   4000      (1) Ceres              20241101"
)


def jpl_orbits() -> tuple[list[str], Orbits]:
    rows = pyarrow.parquet.read_table(DATA / "horizons" / "orbits.parquet").to_pylist()
    states = np.array([[row["coordinates"][k] for k in ("x", "y", "z", "vx", "vy", "vz")] for row in rows])
    epochs = np.array([row["coordinates"]["time"]["days"] for row in rows], float)
    states = np.hstack(
        [kepler.equatorial_from_ecliptic(states[:, :3]), kepler.equatorial_from_ecliptic(states[:, 3:])]
    )
    n = len(rows)
    return [row["object_id"] for row in rows], Orbits(
        np.arange(1, n + 1), states, epochs, np.full(n, np.nan), np.full(n, 0.15)
    )


@horizons
def test_states_of_jpl_up_to_three_years_away() -> None:
    """Integrated from JPL's own epoch; what is left is asteroids' pull, planets' series and sunlight's push."""
    names, orbits = jpl_orbits()
    rows = pyarrow.parquet.read_table(DATA / "horizons" / "propagated_orbits.parquet").to_pylist()
    spans = []
    for i, name in enumerate(names):
        if NO_GRAVITY_ALONE in name:
            continue  # pushed by its own gas
        mine = [row["coordinates"] for row in rows if int(row["orbit_id"]) == i]
        times = np.array([c["time"]["days"] for c in mine], float)
        truth = np.array([[c[k] for k in "xyz"] for c in mine])
        far = int(np.argmax(np.abs(times - orbits.epochs[i])))
        got = integrate(orbits.states[i : i + 1], orbits.epochs[i : i + 1], times[far : far + 1])[0, 0, :3]
        off = np.linalg.norm(kepler.ecliptic_from_equatorial(got) - truth[far]) / np.linalg.norm(truth[far])
        days = abs(times[far] - orbits.epochs[i])
        spans.append(days)
        assert np.degrees(off) * 3600 < (0.01 if days < 40 else 0.4), name
    assert max(spans) > 1000
    assert len(spans) == 27


@horizons
def test_places_on_the_sky_are_those_of_jpl() -> None:
    """Apparent motion of 28 objects from two observatories, at most 60 days from the orbit's epoch of the table."""
    names, orbits = jpl_orbits()
    codes = json.loads(gzip.decompress((DATA / "ObsCodes.json.gz").read_bytes()))
    table = pyarrow.csv.read_csv(DATA / "horizons" / "ephemeris.csv.gz")
    wanted = [
        "orbit_id",
        "mjd_utc",
        "observatory_code",
        "RA",
        "DEC",
        "RA_rate",
        "DEC_rate",
        "r",
        "delta",
        "alpha",
    ]
    rows = table.select(wanted).to_pylist()
    checked = 0
    for code in ("X05", "W84"):
        place = codes[code]
        angle = np.radians(place["Longitude"])
        observer = Observer(
            6378.137 * np.array([place["cos"] * np.cos(angle), place["cos"] * np.sin(angle), place["sin"]])
        )
        for i, name in enumerate(names):
            mine = [row for row in rows if row["orbit_id"] == i and row["observatory_code"] == code]
            row = mine[len(mine) // 2]
            utc = (row["mjd_utc"] - 40587) * 86400
            mjd_tai = mjd_from_seconds(tai_from_utc(utc))
            day = np.datetime64(int((utc - 43200) // 86400), "D").item()
            one = Orbits(*(getattr(orbits, k)[i : i + 1] for k in orbits.__slots__))
            night = NightTable.build(one, day.year * 10000 + day.month * 100 + day.day, observer)
            seen = night.near(row["RA"], row["DEC"], 0.1, mjd_tai)
            assert len(seen) == 1, name
            cosine = np.cos(np.radians(row["DEC"]))
            off = 3600 * np.hypot((seen.ra[0] - row["RA"]) * cosine, seen.dec[0] - row["DEC"])
            assert off < (60 if NO_GRAVITY_ALONE in name else 0.6), f"{name} from {code}: {off}"
            checked += 1
            if NO_GRAVITY_ALONE in name:
                continue
            # arc seconds an hour; JPL's are along the axes of date, which are turned by some arc minutes
            assert seen.ra_rate[0] * 150 == pytest.approx(row["RA_rate"], abs=0.3, rel=5e-3)
            assert seen.dec_rate[0] * 150 == pytest.approx(row["DEC_rate"], abs=0.3, rel=5e-3)
            assert np.linalg.norm(seen.topo[0, :3]) == pytest.approx(row["delta"], rel=2e-6)
            assert np.linalg.norm(seen.helio[0, :3]) == pytest.approx(row["r"], rel=2e-6)
            assert seen.phase_angle[0] == pytest.approx(row["alpha"], abs=0.02)
    assert checked == 56


@pytest.mark.parametrize("e", [0.0, 0.3, 0.95, 1.0, 1.2, 3.4])
def test_any_conic_keeps_energy_and_obeys_its_equation(e: float) -> None:
    days = np.linspace(-300, 300, 61)
    n = days.size
    position, velocity = kepler.state_from_perihelion(np.full(n, 0.8), np.full(n, e), 0.3, 1.0, 2.0, days)
    r = np.linalg.norm(position, axis=1)
    energy = 0.5 * np.sum(velocity**2, axis=1) - kepler.GM_SUN / r
    assert np.allclose(energy, -kepler.GM_SUN * (1 - e) / 2 / 0.8, atol=1e-12 * kepler.GM_SUN)
    momentum = np.linalg.norm(np.cross(position, velocity), axis=1)
    assert np.allclose(momentum, np.sqrt(kepler.GM_SUN * 0.8 * (1 + e)), rtol=1e-10)
    ahead, _ = kepler.state_from_perihelion(np.full(n, 0.8), np.full(n, e), 0.3, 1.0, 2.0, days + 1e-3)
    behind, _ = kepler.state_from_perihelion(np.full(n, 0.8), np.full(n, e), 0.3, 1.0, 2.0, days - 1e-3)
    assert np.abs((ahead - behind) / 2e-3 - velocity).max() < 1e-8
    assert r.min() == pytest.approx(0.8, abs=1e-9)  # the middle one is perihelion


@horizons
def test_elements_of_the_center_give_its_own_state() -> None:
    path = DATA / "mpc_orb" / "2062_mpcorb_v07.json"
    columns = read_orbits(path)
    assert columns["designation"].tolist() == ["1976 AA"]
    assert packed_designation(int(columns["ssObjectId"][0])) == "J76A00A"
    truth = np.array(json.loads(path.read_text())["CAR"]["coefficient_values"][:6])
    state = Orbits.of_columns(columns).states[0]
    assert np.allclose(kepler.ecliptic_from_equatorial(state[:3]), truth[:3], atol=2e-9)
    assert np.allclose(kepler.ecliptic_from_equatorial(state[3:]), truth[3:], atol=2e-10)


def test_mpcorb_columns(tmp_path: Path) -> None:
    path = tmp_path / "MPCORB.DAT"
    provisional = "K10A12B" + CERES[7:166] + "2010 AB12".ljust(28) + CERES[194:]
    broken = "K10A13B" + CERES[7:26] + "  x  ".rjust(9) + CERES[35:]
    path.write_text(f"heading\n{'-' * 160}\n{CERES}\n\n{provisional}\n{broken}\n")
    columns = read_orbits(path)
    assert columns["packed"].tolist() == ["00001", "K10A12B"]
    assert columns["designation"].tolist() == ["(1) Ceres", "2010 AB12"]
    assert columns["epoch_mjd"].tolist() == [60800.0, 60800.0]  # 2025 May 5
    assert columns["h"][0] == 3.34
    assert columns["a"][0] == 2.7660512
    assert columns["q"][0] == pytest.approx(2.7660512 * (1 - 0.0794013))
    assert columns["mean_motion"][0] == pytest.approx(0.21424651, abs=1e-7)  # the file's own n
    assert columns["nobs_total"][0] == 7330
    assert object_id("00001") == int.from_bytes(b"00001", "big")
    with gzip.open(tmp_path / "MPCORB.DAT.gz", "wb") as out:
        out.write(path.read_bytes())
    assert read_orbits(tmp_path / "MPCORB.DAT.gz")["packed"].tolist() == ["00001", "K10A12B"]
    path.write_text(f"{CERES}\n{CERES}\n")
    with pytest.raises(UserError, match="twice"):
        read_orbits(path)
    path.write_text("no orbits here\n")
    with pytest.raises(UserError, match=r"MPCORB\.DAT"):
        read_orbits(path)
    with pytest.raises(NotFoundError):
        read_orbits(tmp_path / "nothing")


def many(n: int) -> Orbits:
    """Main belt, with near-Earth objects among them."""
    rng = np.random.default_rng(8)
    near = np.arange(n) % 10 == 0
    a = np.where(near, rng.uniform(0.8, 1.8, n), rng.uniform(2.1, 3.3, n))
    e = np.where(near, rng.uniform(0.1, 0.6, n), rng.uniform(0, 0.3, n))
    degrees = rng.uniform(0, 360, (3, n))
    period = 360 / (np.degrees(kepler.GAUSS_K) * a**-1.5)
    return Orbits.of_columns(
        {
            "ssObjectId": np.arange(1, n + 1), "q": a * (1 - e), "e": e, "i": rng.uniform(0, 25, n), "node": degrees[0],
            "argperi": degrees[1], "peri_time": 61300 - period * degrees[2] / 360, "epoch_mjd": np.full(n, 61300.0),
            "h": rng.uniform(10, 20, n), "g": np.full(n, np.nan),
        }
    )  # fmt: skip


def test_a_circle_brings_all_and_only_what_is_in_it(tmp_path: Path) -> None:
    orbits = many(3000)
    built = NightTable.build(orbits, DAY_OBS, PACHON)
    path = tmp_path / "night.tab"
    built.save(path)
    night = NightTable.open(path, PACHON)
    assert len(night) == 3000
    rng = np.random.default_rng(3)
    found = 0
    for part in (0.05, 0.5, 0.95):
        mjd_tai = mjd_from_seconds(tai_from_utc(parse_isot("2026-11-20T12:00:00"))) + part
        everything = night.near(0.0, 0.0, 180.0, mjd_tai)
        assert sorted(everything.ids.tolist()) == list(range(1, 3001))
        for k in rng.integers(0, 3000, 60):
            ra, dec = float(everything.ra[k]), float(everything.dec[k])
            d = 3600 * np.degrees(
                np.hypot(np.radians((everything.ra - ra + 180) % 360 - 180) * np.cos(np.radians(dec)),
                         np.radians(everything.dec - dec))
            )  # fmt: skip
            inside = set(everything.ids[d < 0.999 * 1800].tolist())
            seen = night.near(ra, dec, 0.5, mjd_tai)
            assert inside <= set(seen.ids.tolist())
            assert len(seen) <= len(inside) + 1
            found += len(seen)
    assert found > 180


def test_the_table_is_as_good_as_integrating_to_the_moment() -> None:
    orbits = many(300)
    night = NightTable.build(orbits, DAY_OBS, PACHON)
    mjd_tai = mjd_from_seconds(tai_from_utc(parse_isot("2026-11-21T04:30:00")))
    seen = night.near(0.0, 0.0, 180.0, mjd_tai)
    order = np.argsort(seen.ids)
    distance = np.linalg.norm(seen.topo[order, :3], axis=1)
    for i in range(0, 300, 7):
        at = float(tt_from_tai(mjd_tai)) - distance[i] * kepler.LIGHT_DAYS_PER_AU
        truth = integrate(orbits.states[i : i + 1], orbits.epochs[i : i + 1], np.array([at]))[0, 0, :3]
        off = np.linalg.norm(truth - seen.helio[order[i], :3]) / distance[i]
        assert np.degrees(off) * 3600 < 1e-3


def test_a_table_that_was_not_finished_is_none(tmp_path: Path) -> None:
    NightTable.build(many(10), DAY_OBS, PACHON).save(tmp_path / "night.tab")
    (tmp_path / "night.json").unlink()
    with pytest.raises(NotFoundError):
        NightTable.open(tmp_path / "night.tab", PACHON)
