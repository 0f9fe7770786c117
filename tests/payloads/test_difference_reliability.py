"""Completeness and purity of alerts on simulated detector images of a sky that was not used in training."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

SEED = 301
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import reliability  # noqa: E402


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return reliability.run_seed((str(tmp_path_factory.mktemp("skies")), SEED, 1, 2))


def counts(records, limit=8.0):
    wanted = found = published = true = 0
    for record in records:
        truth, sources = record["truth"], record["sources"]
        good = sources[sources["reliability"] >= 0.5]
        near, _ = reliability.match(truth, good["ra"], good["dec"])
        chosen = (truth["snr"] > limit) & truth["usable"]
        wanted, found = wanted + int(chosen.sum()), found + int((near[chosen] < 1.5).sum())
        strong = good[good["snr"] > limit]
        near, _ = reliability.match(strong, truth["ra"], truth["dec"])
        published, true = published + len(strong), true + int((near < 1.5).sum())
    return wanted, found, published, true


def test_nine_of_ten_are_found_and_four_of_five_alerts_are_true(records):
    wanted, found, published, true = counts(records)
    assert wanted >= 8
    assert found >= 0.9 * wanted
    assert true >= 0.8 * published


def test_features_explain_the_published_reliability(records):
    from cumbre.payloads.kernels.classify import BIAS, WEIGHTS

    for record in records:
        again = reliability.scores(record, BIAS, np.array(WEIGHTS))
        assert again == pytest.approx(record["sources"]["reliability"], abs=1e-9)
