"""The reliability network: orientation, training that separates, a file that is the same for the same seed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cumbre.core.errors import BadFileError
from cumbre.payloads import realbogus, training
from cumbre.payloads.kernels.psf import gaussian_psf
from cumbre.payloads.kernels.stamp_features import RESIDUAL_CELLS, describe_stamps

SIZE, FWHM, NOISE = 61, 3.0, 5.0


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(3)
    n = 1200
    is_real = rng.uniform(size=n) < 0.5
    inputs = rng.normal(0, 0.1, (n, realbogus.N_INPUTS)).astype(np.float32)
    # False ones have a bright cell off the middle, in any direction: no single cell tells.
    first = len(realbogus.SCALARS)
    for k in np.flatnonzero(~is_real):
        cell = rng.choice([2 * 7 + 3, 4 * 7 + 3, 3 * 7 + 2, 3 * 7 + 4])
        inputs[k, first + cell] += 1.5
    what = np.where(is_real, "supernova", "cosmic ray").astype(object)
    return training.Examples(inputs, is_real, what, np.full(n, 12.0), np.ones(n))


@pytest.fixture(scope="module")
def network(examples):
    half = training.Examples(*(getattr(examples, name)[:800] for name in training.Examples.__slots__))
    return training.fit(half, seed=4, epochs=120)


def test_it_separates_what_it_has_not_seen(network, examples):
    score = network.scores(examples.inputs[800:])
    real = examples.is_real[800:]
    assert (score[real] > 0.5).mean() > 0.95
    assert (score[~real] < 0.5).mean() > 0.95


def test_written_model_gives_the_same_scores_and_bytes(network, examples, tmp_path):
    about = {"version": "test-1", "domain": {"fwhm_px": [1.5, 3.0]}}
    for name in ("a", "b"):
        training.export(network, tmp_path / name / "reliability.onnx", about)
    assert (tmp_path / "a/reliability.onnx").read_bytes() == (tmp_path / "b/reliability.onnx").read_bytes()
    assert (tmp_path / "a/reliability.onnx").stat().st_size < 300_000
    model = realbogus.Model(tmp_path / "a" / "reliability.onnx")
    assert model.version == "test-1"
    assert model.scores(examples.inputs[:50]) == pytest.approx(network.scores(examples.inputs[:50]), abs=1e-5)
    assert model.covers(fwhm_px=2.0, noise_correlation=1.0)
    assert not model.covers(fwhm_px=4.0, noise_correlation=1.0)
    assert not model.covers(fwhm_px=2.0, noise_correlation=1.0, psf_residual=0.014)


def test_orientation_does_not_matter(network, examples):
    one = examples.inputs[:20]
    for index in realbogus.symmetries():
        assert network.scores(one[:, index]) == pytest.approx(network.scores(one), abs=1e-9)


def test_model_for_other_inputs_is_refused(network, tmp_path):
    path = tmp_path / "reliability.onnx"
    training.export(network, path, {"version": "x"})
    about = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(about | {"inputs": 3}))
    with pytest.raises(BadFileError, match="train it again"):
        realbogus.Model(path)
    with pytest.raises(BadFileError, match="cumbre train"):
        realbogus.Model(tmp_path / "none.onnx")


def test_shipped_model_is_small_and_says_what_it_is():
    path = realbogus.MODELS / "reliability.onnx"
    assert path.stat().st_size < 300_000
    model = realbogus.load_model()
    assert model.version.startswith("cumbre-net-")
    assert all(item["sky"] < 200 for item in model.about["trained_on"])
    assert {"supernova", "cosmic ray", "variable"} <= set(model.about["held_out"]["classes"])


def describe(image, template, x, y, flux):
    psf = gaussian_psf(FWHM, (SIZE, SIZE), 15).centred(30, 30)[None].astype(np.float32)
    shape = (SIZE, SIZE)
    return describe_stamps(
        image.astype(np.float32), np.full(shape, NOISE**2, np.float32), np.zeros(shape, bool),
        template.astype(np.float32), np.array([x]), np.array([y]), np.array([flux]), np.array([flux < 0]),
        np.zeros(1, np.intp), psf, FWHM,
    )  # fmt: skip


def star(x, y, flux, fwhm=FWHM):
    yy, xx = np.mgrid[:SIZE, :SIZE]
    sigma = fwhm / 2.3548
    return flux * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)


def test_a_star_that_varied_a_shifted_and_a_widened_one_are_told_apart():
    rng = np.random.default_rng(1)
    noise = rng.normal(0, NOISE, (SIZE, SIZE))
    template = star(30, 30, 1e5)
    varied = describe(star(30, 30, 9000) + noise, template, 30.0, 30.0, 9000.0)[3]
    assert varied.part_flux[0] > 0.95
    assert varied.flux[0] == pytest.approx(9000, abs=5 * varied.flux_err[0])
    assert varied.template_flux[0] == pytest.approx(1e5, rel=0.05)
    shifted = describe(star(30.15, 30, 1e5) - template + noise, template, 31.0, 30.0, 6000.0)[3]
    assert shifted.part_shift[0] > 0.9
    widened = describe(star(30, 30, 1e5, 1.06 * FWHM) - template + noise, template, 30.0, 30.0, -6000.0)[3]
    assert widened.part_width[0] > 0.7
    assert realbogus.is_change_of_flux(varied, 0.01)[0]
    assert not realbogus.is_change_of_flux(shifted, 0.01)[0]


def test_residual_of_a_point_source_is_empty_and_of_a_hit_is_not():
    rng = np.random.default_rng(2)
    noise, dark = rng.normal(0, NOISE, (SIZE, SIZE)), np.zeros((SIZE, SIZE))
    residual, _, numbers, _ = describe(star(30.3, 29.8, 20000) + noise, dark, 30.3, 29.8, 20000.0)
    middle = RESIDUAL_CELLS // 2
    assert np.abs(residual[0]).max() < 0.08
    hit = noise.copy()
    hit[30, 30] += 8000
    struck, _, worse, _ = describe(hit, dark, 30.0, 30.0, 8000.0)
    assert struck[0, middle, middle] > 1.0
    assert worse[0, 0] > numbers[0, 0] + 2
