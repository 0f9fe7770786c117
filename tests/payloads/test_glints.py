"""Rows of glints among unrelated sources."""

from __future__ import annotations

import numpy as np
import pytest

from cumbre.payloads.kernels.glints import LEAST_FLASHES, glint_rows, least_flashes

SHAPE = (4096, 4096)


def field(rng, n):
    return rng.uniform(0, SHAPE[1], n), rng.uniform(0, SHAPE[0], n)


@pytest.mark.parametrize("angle", [0.0, 0.7, 2.5])
def test_row_is_found_whole_and_nothing_else(angle):
    rng = np.random.default_rng(3)
    x, y = field(rng, 300)
    steps = np.arange(9) * 130.0
    gx = 1500 + steps * np.cos(angle) + rng.normal(0, 0.3, 9)
    gy = 1200 + steps * np.sin(angle) + rng.normal(0, 0.3, 9)
    order = rng.permutation(309)
    found = glint_rows(np.concatenate([x, gx])[order], np.concatenate([y, gy])[order], SHAPE, 3.5)
    assert sorted(order[found]) == list(range(300, 309))


def test_unrelated_sources_make_no_rows():
    for seed, n in ((1, 50), (2, 400), (3, 1500)):
        x, y = field(np.random.default_rng(seed), n)
        assert not glint_rows(x, y, SHAPE, 4.0).any()


def test_dense_fields_need_longer_rows():
    few, many = (least_flashes(n, 4096.0**2, 400.0, 4.0) for n in (50, 1500))
    assert few == LEAST_FLASHES
    assert many > few


def test_fewer_than_a_row_is_none():
    assert not glint_rows(np.array([10.0, 60, 110]), np.array([10.0, 10, 10]), SHAPE, 3.0).any()
    assert not glint_rows(np.zeros(0), np.zeros(0), SHAPE, 3.0).any()
