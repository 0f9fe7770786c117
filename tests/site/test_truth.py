"""Completeness and purity on hand-made lists, whose answers are counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumbre.site.truth import of_visit, score


def rows(*items, mag=20.0):
    data = np.array(items, dtype=float).reshape(-1, 3)
    return {"ra": data[:, 0], "dec": data[:, 1], "snr": data[:, 2], "mag": np.full(len(data), mag)}


def test_found_missed_and_false_are_counted_once_each():
    arcsec = 1 / 3600
    truth = rows((10, -30, 20), (10.1, -30, 20), (10.2, -30, 5))
    detections = rows((10, -30 + arcsec, 19), (10.2, -30, 9), (11, -30, 50), (12, -30, 4))
    result = score([(truth, detections)])
    assert (result.n_truth, result.n_found) == (2, 1)
    assert (result.n_detections, result.n_true_detections) == (3, 2)
    assert result.completeness == 0.5
    assert result.purity == pytest.approx(2 / 3)
    assert [m["ra"] for m in result.missed] == [10.1]
    assert [f["ra"] for f in result.false] == [11]
    assert result.by_magnitude == [{"mag": 20.0, "n": 2, "found": 1, "completeness": 0.5}]


def test_the_other_side_of_the_radius_is_a_miss_and_false():
    result = score([(rows((10, 0, 20)), rows((10, 1.6 / 3600, 20)))])
    assert (result.completeness, result.purity) == (0, 0)


def test_nothing_to_find_is_not_zero():
    result = score([(rows(), rows())])
    assert result.completeness is None
    assert result.purity is None


@given(st.lists(st.tuples(st.floats(0, 359), st.floats(-80, 80), st.floats(9, 99)), min_size=1, max_size=20))
def test_the_truth_itself_scores_one(items):
    table = rows(*items)
    result = score([(table, table)])
    assert result.completeness == result.purity == 1


def test_variable_stars_are_counted_apart():
    truth = rows((10, 0, 20), (11, 0, 20), (12, 0, 20)) | {
        "kind": np.array(["supernova", "variable", "asteroid"])
    }
    result = score([(truth, rows((10, 0, 20), (12, 0, 20)))])
    assert result.completeness == 1
    assert result.by_kind["variable"] == {"n": 1, "found": 0}


def test_the_truth_of_a_pair_has_each_once_with_the_noise_of_the_sum():
    def exposure(ids, ras, snr, usable):
        n = len(ids)
        return {
            "id": np.array(ids), "kind": np.array(["asteroid"] * n, dtype=object), "ra": np.array(ras),
            "dec": np.full(n, -30.0), "x": np.arange(n, dtype=float), "y": np.zeros(n), "mag": np.full(n, 20.0),
            "snr": np.array(snr), "usable": np.array(usable),
        }  # fmt: skip

    first = exposure([7, 9], [359.9999, 10.0], [10.0, 20.0], [True, True])
    second = exposure([9, 7, 11], [10.0, 0.0001, 11.0], [20.0, 12.0, 10.0], [False, True, True])
    both = of_visit([first, second])
    assert both["id"].tolist() == [7, 9, 11]
    assert both["snr"] == pytest.approx(np.array([22.0, 40.0, 10.0]) / 2**0.5)
    assert both["usable"].tolist() == [True, False, True]
    assert (both["ra"][0] + 180) % 360 == pytest.approx(180.0, abs=1e-9)
    assert both["ra"][1:] == pytest.approx([10.0, 11.0])
    assert of_visit([first]) is first
