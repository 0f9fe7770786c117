"""Snap pairs of a simulated sky: rays in one of them go, stars stay, the sum is the visit."""

from __future__ import annotations

import numpy as np
import pytest

from cumbre.core.errors import UnprocessableDataError
from cumbre.core.instrument import load_instrument
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.snaps import calibrate_snaps, combine_snaps

SIDE, SKY, READ_NOISE = 512, 300.0, 6.0


def light_of(stars, fwhm, shift=0.0):
    """Expected electrons of stars (x, y, flux) without sky."""
    yy, xx = np.mgrid[:SIDE, :SIDE]
    out = np.zeros((SIDE, SIDE))
    s = fwhm / 2.3548
    for x, y, flux in stars:
        x0, x1 = max(int(x) - 20, 0), min(int(x) + 21, SIDE)
        y0, y1 = max(int(y) - 20, 0), min(int(y) + 21, SIDE)
        box = np.s_[y0:y1, x0:x1]
        out[box] += flux / (2 * np.pi * s * s) * np.exp(
            -((xx[box] - x - shift) ** 2 + (yy[box] - y) ** 2) / (2 * s * s)
        )  # fmt: skip
    return out


def snap(expected, seed, number, *, exposure_s=15.0):
    rng = np.random.default_rng(seed)
    electrons = rng.poisson(expected + SKY) + rng.normal(0, READ_NOISE, expected.shape)
    begin = 1795223000.0 + 20.0 * number
    about = {
        "instrument": "DemoCam", "detector": 3, "exposure_id": 2026112000011 + number, "exposure_s": exposure_s,
        "begin_tai": begin, "end_tai": begin + exposure_s, "problems": [],
    }  # fmt: skip
    variance = np.maximum(electrons, 0) + READ_NOISE**2
    return Exposure(
        electrons.astype(np.float32), variance.astype(np.float32), np.zeros(expected.shape, np.uint16),
        metadata=about, metrics={"sky_adu": SKY},
    )  # fmt: skip


def strike(exposure, seed, n=40):
    """Tracks of 1 to 12 pixels with 200 to 4000 electrons each; where they are."""
    rng = np.random.default_rng(seed)
    hit = np.zeros(exposure.shape, bool)
    for _ in range(n):
        x, y, angle = rng.uniform(15, SIDE - 15), rng.uniform(15, SIDE - 15), rng.uniform(0, np.pi)
        for k in range(rng.integers(1, 12)):
            hit[int(y + k * np.sin(angle)), int(x + k * np.cos(angle))] = True
    charge = np.where(hit, rng.uniform(200, 4000, exposure.shape), 0).astype(np.float32)
    exposure.image += charge
    exposure.variance += charge
    return hit


@pytest.fixture(scope="module")
def stars():
    rng = np.random.default_rng(4)
    n = 150
    return list(
        zip(
            rng.uniform(12, SIDE - 12, n), rng.uniform(12, SIDE - 12, n), 10 ** rng.uniform(2.5, 5.5, n),
            strict=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("widened", "shift"), [(1.0, 0.0), (1.08, 0.3)])
def test_rays_go_and_stars_stay(stars, widened, shift):
    first, second = light_of(stars, 3.5), light_of(stars, 3.5 * widened, shift)
    pair = [snap(first, 1, 0), snap(second, 2, 1)]
    rays = [strike(pair[0], 5), strike(pair[1], 6)]
    once = (rays[0] ^ rays[1]) & ~(rays[0] & rays[1])
    whole = combine_snaps(pair)
    truth = first + second + 2 * SKY
    left = np.abs(whole.image - truth) > 6 * np.sqrt(whole.variance) + 0.4 * (first + second)
    assert left[once].mean() < 0.02
    away = ~(rays[0] | rays[1])
    suspect = (whole.mask & MaskPlane.SUSPECT) > 0
    assert suspect[once].mean() > 0.95
    assert (suspect & away).sum() < 0.35 * once.sum()  # the rim of a track is taken with it
    blank = away & (first + second < 1)
    pull = (whole.image - truth)[blank] / np.sqrt(whole.variance[blank])
    assert abs(pull.mean()) < 0.02
    assert pull.std() == pytest.approx(1.0, abs=0.03)
    bright = [(x, y) for x, y, flux in stars if flux > 3e4]
    for x, y in bright:
        box = np.s_[max(int(y) - 6, 0) : int(y) + 7, max(int(x) - 6, 0) : int(x) + 7]
        if not (rays[0] | rays[1])[box].any():
            assert not suspect[box].any()


def test_the_sum_is_the_visit():
    pair = [snap(np.zeros((SIDE, SIDE)), 1, 0), snap(np.zeros((SIDE, SIDE)), 2, 1)]
    whole = combine_snaps(pair[::-1])
    about = whole.metadata
    assert (about["exposure_id"], about["exposure_s"], about["n_snaps"]) == (2026112000011, 30.0, 2)
    assert about["mjd_mid_tai"] == pytest.approx(40587 + (1795223000.0 + 17.5) / 86400, abs=1e-9)
    assert whole.image.mean() == pytest.approx(2 * SKY, abs=0.2)
    assert whole.metrics["sky_adu"] == 2 * SKY


def test_a_pixel_lost_in_one_snap_comes_from_the_other_and_one_lost_in_both_stays_lost():
    level = np.full((SIDE, SIDE), 500.0)
    pair = [snap(level, 1, 0, exposure_s=10.0), snap(level * 2 + SKY, 2, 1, exposure_s=20.0)]
    pair[0].image[10, 10:14] = 1e5
    pair[0].mask[10, 10:14] = MaskPlane.SAT
    pair[1].mask[10, 12:14] = MaskPlane.SAT
    pair[1].image[10, 12:14] = 1e5
    whole = combine_snaps(pair)
    assert np.allclose(whole.image[10, 10:12], 1.5 * pair[1].image[10, 10:12])
    assert np.allclose(whole.variance[10, 10:12], 1.5**2 * pair[1].variance[10, 10:12])
    assert not (whole.mask[10, 10:12] & MaskPlane.unusable()).any()
    assert ((whole.mask[10, 10:12] & MaskPlane.SUSPECT) > 0).all()
    assert ((whole.mask[10, 12:14] & MaskPlane.SAT) > 0).all()
    assert (whole.image[10, 12:14] > 9e4).all()


def test_snaps_of_two_skies_are_not_summed(stars):
    first = snap(light_of(stars, 3.5), 1, 0)
    second = snap(light_of([(x + 9, y, f) for x, y, f in stars], 3.5), 2, 1)
    whole = combine_snaps([first, second])
    assert whole.image is first.image
    assert whole.metadata["n_snaps"] == 1
    assert "only the first is used" in whole.metadata["problems"][0]


def test_other_snaps_are_refused():
    one = snap(np.zeros((SIDE, SIDE)), 1, 0)
    other = snap(np.zeros((SIDE, SIDE)), 1, 1)
    other.metadata["detector"] = 4
    with pytest.raises(UnprocessableDataError, match="different detectors"):
        combine_snaps([one, other])
    with pytest.raises(UnprocessableDataError, match="without an exposure"):
        combine_snaps([])
    assert combine_snaps([one]) is one


def test_hot_pixels_that_both_have_are_no_stars():
    """Comparison finds nothing where both snaps are alike; a map of defects may be older than the defect."""
    rng = np.random.default_rng(7)
    places = rng.uniform(25, SIDE - 25, (60, 2))
    light = light_of([(x, y, 10 ** rng.uniform(4.0, 5.0)) for x, y in places], 3.5)
    for x, y in rng.integers(20, SIDE - 20, (80, 2)):
        light[y, x] += rng.uniform(2000, 6000)
    made = calibrate_snaps([snap(light, n, n) for n in (0, 1)], None, instrument=load_instrument("democam"))
    assert made.psf.fwhm_px == pytest.approx(3.5, rel=0.05)
