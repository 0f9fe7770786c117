"""The quality of alerts on a simulated sky that no classifier was trained on, and the report of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cumbre.payloads.kernels import classify
from cumbre.site import quality, quality_page

JOB = {"seed": 301, "rich": True, "detectors": 1, "visits": 2}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return quality.records_of(quality.Job(str(tmp_path_factory.mktemp("skies")), **JOB))


@pytest.fixture(scope="module")
def summary(records):
    data = quality.summarise(records)
    return data | {"made_of": {"size": "1k", "seeds": [301], "detectors": 1, "visits": 2, "command": "test"}}


def test_what_changed_is_found_and_what_is_published_is_true(summary):
    above = summary["above"]["8"]
    assert above["n"] >= 15
    assert above["completeness"] >= 0.9
    assert above["purity"] >= 0.9
    assert above["completeness_all"] <= above["completeness"] <= above["detected"]


def test_fluxes_and_places_are_those_of_the_truth(summary):
    assert abs(summary["flux"]["bias"]) < 0.03
    assert summary["astrometry_mas"]["stars_vs_reference"] < 25
    assert summary["astrometry_mas"]["wcs_vs_truth"] < 25


def test_forced_fluxes_of_constant_stars_err_as_they_say(summary):
    stars = summary["flux"]["stars"]
    assert stars["n"] > 60
    assert abs(stars["bias"]) < 0.02
    # the brightest: PSF model and zero point count there, not photons
    brightest = stars["by_snr"][-1]
    assert brightest["n"] > 15
    assert 0.4 < brightest["science_pull_width"] < 1.4
    assert 0.4 < brightest["difference_pull_width"] < 1.6


def test_figures_of_another_size_stand_in_the_same_report(summary):
    text = quality_page.markdown(summary | {"also": {"4k": summary}})
    assert "## Detectors of 4k" in text
    assert "### Forced fluxes of constant stars (4k)" in text
    assert quality_page.page(summary | {"also": {"4k": summary}}, {}).count("<table>") == 2 * len(
        quality_page.tables(summary)
    )


def test_particles_are_not_published(summary):
    struck = summary["rejected"]["cosmic ray"]
    assert struck["n"] >= 2
    assert struck["published"] <= 1


def test_hard_rules_beat_any_score(records):
    for record in records:
        rejected = record.features[:, -1] > 0
        assert rejected.any()
        assert (record.sources["reliability"][rejected] == 0).all()


def test_logistic_features_are_those_of_the_model(records):
    for record in records:
        assert record.features.shape[1] == len(classify.WEIGHTS) + 1
        assert np.isfinite(record.features).all()


def test_report_files_hold_the_numbers(summary, tmp_path):
    files = quality_page.write(tmp_path, summary)
    assert json.loads((tmp_path / "quality.json").read_text())["above"] == summary["above"]
    page = (tmp_path / "quality.html").read_text()
    assert page.count("data:image/png") == 3
    assert "http" not in page
    assert f"{100 * summary['above']['8']['completeness']:.1f} %" in (tmp_path / "quality.md").read_text()
    assert (tmp_path / "quality_snr.png").read_bytes().startswith(b"\x89PNG")
    assert set(files) == {p.name for p in tmp_path.iterdir()}


def test_truth_near_nothing_and_nothing_near_truth():
    distance, _ = quality.nearest([10.0, 20.0], [0.0, 0.0], [], [])
    assert np.isinf(distance).all()
    distance, index = quality.nearest([10.0, 20.0], [0.0, 0.0], [20.0 + 1 / 3600, 50], [0.0, 0.0])
    assert distance[1] == pytest.approx(1.0, abs=1e-6)
    assert index[1] == 0


def test_systematic_error_of_a_bright_star_counts():
    truth = {
        "delta_flux_e": np.array([1000.0, 1000.0]),
        "snr": np.array([50.0, 50.0]),
        "flux_e": np.array([1e5, 1000.0]),
    }
    total = quality.with_systematic(truth)["snr_total"]
    # 1 % of 99,000 electrons is 990; of nothing, nothing.
    assert total[0] == pytest.approx(1000 / np.hypot(20, 990))
    assert total[1] == pytest.approx(50)
