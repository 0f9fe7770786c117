from __future__ import annotations

import pytest

from cumbre.core.configuration import Observatory, Simulator
from cumbre.core.instrument import load_instrument
from cumbre.core.time import parse_isot, tai_from_utc
from cumbre.simulator.catalogue import Tile, make_catalogue
from cumbre.simulator.exposure import ExposureRequest
from cumbre.simulator.sky import Sky

START = tai_from_utc(parse_isot("2026-11-10T02:00:00"))  # a day after new moon


@pytest.fixture(scope="session")
def observatory() -> Observatory:
    return Observatory(latitude_deg=-30.24, longitude_deg=-70.74, elevation_m=2650)


@pytest.fixture(scope="session")
def democam():
    return load_instrument("democam")


@pytest.fixture(scope="session")
def tiles() -> list[Tile]:
    return [Tile("T001", 10.0, -25.0)]


@pytest.fixture(scope="session")
def catalogue(observatory, democam, tiles):
    config = Simulator(seed=5, variables_fraction=0.05)
    return make_catalogue(
        config=config, observatory=observatory, instrument=democam, tiles=tiles, start_tai=START
    )


@pytest.fixture(scope="session")
def sky(catalogue, observatory, tiles) -> Sky:
    return Sky(catalogue, observatory=observatory, seed=5, tiles=tiles, start_tai=START)


@pytest.fixture
def exposure(tiles) -> ExposureRequest:
    return ExposureRequest(
        "XC_O_20261109_000001", "OBJECT", 30.0, "r_demo", tiles[0].ra, tiles[0].dec, 0.0, START
    )
