"""Planted sources: where they lie, how bright they are, and that nothing of them leaves the payload."""

from __future__ import annotations

import numpy as np
import pytest

from cumbre.payloads import injection
from cumbre.payloads.alert_production import produce
from cumbre.payloads.calibrate import STAR_TYPE
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels.psf import gaussian_psf
from cumbre.payloads.kernels.wcs import PlaneWcs

SHAPE = (400, 420)
FWHM = 3.8
WCS = PlaneWcs.linear(150.0, -30.0, 210.0, 200.0, np.array([[-1e-4, 0], [0, 1e-4]]))


def exposure(seed, *, new=()):
    rng = np.random.default_rng(7)
    places = np.stack(np.meshgrid(np.arange(25, 400, 50), np.arange(25, 390, 50)), -1).reshape(-1, 2)
    places = places + rng.uniform(-6, 6, places.shape)
    flux = 10 ** rng.uniform(3.8, 4.8, len(places))
    yy, xx = np.mgrid[: SHAPE[0], : SHAPE[1]]
    sigma = FWHM / 2.3548
    image = np.zeros(SHAPE)
    for (x, y), f in [*zip(places, flux, strict=True), *new]:
        image += f * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    variance = 100.0 + image
    stars = np.zeros(len(places), STAR_TYPE)
    stars["x"], stars["y"], stars["flux"] = places[:, 0], places[:, 1], flux
    stars["is_psf_star"] = True
    noisy = image + np.random.default_rng(seed).normal(0, np.sqrt(variance))
    return Exposure(
        noisy.astype(np.float32), variance.astype(np.float32), np.zeros(SHAPE, np.uint16), wcs=WCS,
        psf=gaussian_psf(FWHM, SHAPE), zero_point=30.0, is_background_subtracted=True,
        metadata={"exposure_id": 77, "detector": 1, "mjd_mid_tai": 61000.0, "band": "r", "exposure_s": 30.0, "stars": stars},
    )  # fmt: skip


def test_plan_is_repeatable_inside_and_apart():
    image = exposure(1)
    config = injection.InjectionConfig(transients=12, variables=6)
    fakes = injection.plan(image, injection.seed_of("a", 1), config)
    again = injection.plan(image, injection.seed_of("a", 1), config)
    assert np.array_equal(fakes, again)
    assert (~fakes["is_variable"]).sum() == 12
    assert fakes["x"].min() > 10
    assert fakes["y"].max() < SHAPE[0] - 11
    apart = np.hypot(fakes["x"][:, None] - fakes["x"], fakes["y"][:, None] - fakes["y"])
    assert apart[~np.eye(len(fakes), dtype=bool)].min() > 8 * FWHM
    assert fakes["mag"] == pytest.approx(30 - 2.5 * np.log10(np.abs(fakes["flux"])))


def test_planted_light_is_what_was_asked_for():
    image = exposure(1)
    fakes = np.zeros(1, injection.FAKE_DTYPE)
    fakes["x"], fakes["y"], fakes["flux"] = 201.3, 150.6, 40000.0
    planted = injection.plant(image, fakes, np.random.default_rng(3))
    added = planted.image - image.image
    assert added.sum() == pytest.approx(40000, abs=5 * np.sqrt(40000))
    yy, xx = np.mgrid[: SHAPE[0], : SHAPE[1]]
    assert (added * xx).sum() / added.sum() == pytest.approx(201.3, abs=0.05)
    assert (added * yy).sum() / added.sum() == pytest.approx(150.6, abs=0.05)
    assert planted.mask[151, 201] & MaskPlane.INJECTED
    assert not image.mask.any()


def test_fraction_of_visits():
    chosen = [injection.is_chosen(visit, 0.2) for visit in range(2000)]
    assert np.mean(chosen) == pytest.approx(0.2, abs=0.04)
    assert not any(injection.is_chosen(visit, 0.0) for visit in range(50))


def test_fakes_are_counted_but_never_stored_nor_sent():
    template = exposure(2)
    image = exposure(3, new=[((75.0, 100.0), 30000.0)])
    made = produce(
        image, None, template, None, processed_mjd_tai=61000.1,
        inject=injection.InjectionConfig(transients=10, snr=(15.0, 60.0), near_part=0.0),
    )  # fmt: skip
    assert made.injected is not None
    assert len(made.injected) == 10
    assert sum(row["found"] for row in made.injected) >= 9
    assert len(made.alerts) == 1
    source = made.alerts[0]["diaSource"]
    assert np.hypot(source["x"] - 75, source["y"] - 100) < 0.5
    for row in made.dia_sources:
        assert min(np.hypot(row["x"] - f["x"], row["y"] - f["y"]) for f in made.injected) > 2
    assert not any(row["pixelFlags_injectedCenter"] for row in made.dia_sources)
