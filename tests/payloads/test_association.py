"""Association and object summaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumbre.payloads.association import associate, summarise_object

ARCSEC = 1 / 3600


def test_nearest_within_the_radius():
    index, distance = associate(
        [10.0, 10.0, 50.0], [0.0, 1.0, 0.0], [10.0 + 0.5 * ARCSEC, 10.0], [0.0, 1.0 + 2 * ARCSEC]
    )
    assert index.tolist() == [0, -1, -1]
    assert distance[0] == pytest.approx(0.5, abs=1e-6)
    assert np.isnan(distance[1:]).all()


def test_an_object_gets_one_source():
    index, _ = associate([10.0, 10.0 + 0.3 * ARCSEC], [0.0, 0.0], [10.0 + 0.1 * ARCSEC], [0.0])
    assert index.tolist() == [0, -1]


@pytest.mark.parametrize(("ra", "dec", "ra2"), [(359.99999, 0.0, 0.00001), (0.0, 89.99999, 180.0)])
def test_across_the_meridian_and_the_pole(ra, dec, ra2):
    index, _ = associate([ra], [dec], [ra2], [dec], radius_arcsec=0.1)
    assert index.tolist() == [0]


def test_nothing_to_match():
    assert associate([], [], [], [])[0].tolist() == []
    assert associate([1.0], [1.0], [], [])[0].tolist() == [-1]
    assert associate([np.nan], [1.0], [1.0], [1.0])[0].tolist() == [-1]


@given(st.integers(0, 1000))
def test_small_scatter_finds_the_right_partner(seed):
    rng = np.random.default_rng(seed)
    ra, dec = rng.uniform(30, 31, 40), rng.uniform(-60, -59, 40)
    order = rng.permutation(40)
    index, _ = associate(
        ra[order] + rng.normal(0, 0.02 * ARCSEC, 40), dec[order] + rng.normal(0, 0.02 * ARCSEC, 40), ra, dec
    )
    assert (index == order).all()


def source(mjd, flux, error=10.0, band="r", ra=150.0):
    return {
        "midpointMjdTai": mjd, "psfFlux": flux, "psfFluxErr": error, "band": band, "ra": ra, "dec": 2.0,
        "raErr": 1e-5, "scienceFlux": 5000.0, "scienceFluxErr": 20.0,
    }  # fmt: skip


def test_summary_of_an_object():
    rows = [
        source(60002.0, 300.0),
        source(60000.0, 100.0),
        source(60001.0, 100.0, error=5.0),
        source(60003.0, 50.0, band="g"),
    ]
    row = summarise_object(7, rows, valid_from_mjd_tai=60003.1)
    assert row["nDiaSources"] == 4
    assert (row["firstDiaSourceMjdTai"], row["lastDiaSourceMjdTai"]) == (60000.0, 60003.0)
    assert row["r_psfFluxMean"] == pytest.approx(
        (300 / 100 + 100 / 100 + 100 / 25) / (1 / 100 + 1 / 100 + 1 / 25)
    )
    assert row["r_psfFluxMaxSlope"] == pytest.approx(200.0)
    assert (row["r_psfFluxMin"], row["r_psfFluxMax"], row["r_psfFluxNdata"]) == (100.0, 300.0, 3)
    assert row["g_psfFluxNdata"] == 1
    assert row["i_psfFluxNdata"] == 0
    assert "i_psfFluxMean" not in row
    assert row["ra"] == pytest.approx(150.0)


def test_earlier_history_is_kept():
    row = summarise_object(
        7,
        [source(60500.0, 1.0)],
        valid_from_mjd_tai=1.0,
        before={"nDiaSources": 9, "firstDiaSourceMjdTai": 60000.0},
    )
    assert row["nDiaSources"] == 10
    assert row["firstDiaSourceMjdTai"] == 60000.0


def test_mean_position_across_zero():
    row = summarise_object(
        1, [source(1.0, 1.0, ra=359.9999), source(2.0, 1.0, ra=0.0001)], valid_from_mjd_tai=1.0
    )
    assert min(row["ra"], 360 - row["ra"]) < 1e-6
