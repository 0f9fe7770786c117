"""Light curves: a simulated drifting field with a planted dip, and the transit of HAT-P-32 b from raw frames."""

from pathlib import Path

import numpy as np
import pytest

from cumbre.core.errors import NoWorkFoundError
from cumbre.core.instrument import load_instrument
from cumbre.payloads.exposure import Exposure
from cumbre.payloads.isr import assemble_and_correct
from cumbre.payloads.light_curve import ensemble_light_curves, fit_dip, trapezoid
from cumbre.payloads.raw import read_raw

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
TAI_MINUS_UTC = 37 / 86400


@pytest.mark.parametrize("mid", [0.12, 0.15])
def test_dip_of_known_shape_with_trend_and_outliers(mid):
    rng = np.random.default_rng(6)
    t = np.linspace(0, 0.3, 60)
    truth = (1 + 0.02 * t / 0.3) * (1 - 0.02 * trapezoid(t, mid, 0.13, 0.02))
    flux = truth + rng.normal(0, 0.002, t.size)
    flux[[5, 40]] += [0.08, -0.09]
    flux[10] = np.nan
    dip = fit_dip(t, flux)
    assert abs(dip.mid - mid) < 0.004
    assert dip.depth == pytest.approx(0.02, abs=0.003)
    assert dip.duration == pytest.approx(0.13, abs=0.02)
    assert dip.scatter == pytest.approx(0.002, rel=0.4)
    assert dip.delta_chi2 > 200
    assert dip.model.shape == t.shape
    quiet = fit_dip(t, 1 + rng.normal(0, 0.002, t.size))
    assert quiet.delta_chi2 < 40
    with pytest.raises(NoWorkFoundError):
        fit_dip(t[:5], flux[:5])


def drifting_frames(rng, n=12):
    """Stars moving 15 pixels a frame under changing transparency; star 0 dims by 10 % in the frames 5 to 7."""
    x, y = rng.uniform(-150, 350, 300), rng.uniform(0, 200, 300)
    x[0], y[0] = 100, 100
    far = np.hypot(x - 100, y - 100) > 15
    far[0] = True
    x, y = x[far], y[far]
    flux = 10 ** rng.uniform(4, 5, x.size)
    flux[0] = 40000
    frames = []
    yy, xx = np.mgrid[0:200, 0:260]
    for k in range(n):
        image = np.full((200, 260), 300.0)
        clouds = 1 - 0.3 * rng.random()
        for i, (a, b, f) in enumerate(zip(x, y, flux, strict=True)):
            px, py = a + 15 * (k - n / 2) + 0.37 * k, b + 2.2 * (k - n / 2)
            if not (-10 < px < 270 and -10 < py < 210):
                continue
            level = f * clouds * (0.9 if i == 0 and 5 <= k <= 7 else 1)
            image += level / (2 * np.pi * 1.4**2) * np.exp(-((xx - px) ** 2 + (yy - py) ** 2) / (2 * 1.4**2))
        noisy = rng.poisson(image).astype(np.float32)
        frames.append(
            Exposure(
                noisy,
                np.asarray(image, np.float32),
                np.zeros(image.shape, np.uint16),
                metadata={"mjd_mid_tai": 59000 + k / 100},
            )
        )
    return frames


def test_drifting_field_under_clouds():
    frames = drifting_frames(np.random.default_rng(2))
    curves = ensemble_light_curves(frames[::-1])
    assert np.all(np.diff(curves.mjd_tai) > 0)
    star = curves.nearest(100 - 90, 100 - 13.2, frame=0)
    relative = curves.relative[star]
    assert np.isfinite(relative).sum() >= 10
    low = np.nanmean(relative[5:8])
    high = np.nanmean(np.r_[relative[:5], relative[8:]])
    assert low / high == pytest.approx(0.9, abs=0.012)
    others = np.delete(np.arange(curves.x.size), star)
    others = others[np.isfinite(curves.relative[others]).sum(axis=1) >= 6]
    scatter = np.nanstd(curves.relative[others], axis=1)
    assert np.nanmedian(scatter) < 0.02
    table = curves.table()
    assert set(table["object"]) <= set(range(curves.x.size))
    assert np.isfinite(table["relative"]).all()
    assert (table["object"] == star).sum() == np.isfinite(relative).sum()
    with pytest.raises(NoWorkFoundError):
        ensemble_light_curves(frames[:2])


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared test data are not here")
def test_transit_of_hatp32b_from_raw_frames():
    """Published: middle 2017-12-20 04:57:54 UTC (MJD 58107.20687), depth 2.2 %, 3.1 h."""
    instrument = load_instrument("microobservatory")
    paths = sorted((DATA / "timeseries_hatp32").glob("*.FITS.bz2"))
    assert len(paths) == 48
    frames = [assemble_and_correct(read_raw(path, instrument)) for path in paths]
    curves = ensemble_light_curves(frames)
    assert curves.mjd_tai.size == 48
    drift = curves.transforms[0].offset - curves.transforms[-1].offset
    assert 250 < abs(drift[0]) < 300
    target = curves.nearest(424 - 1, 286 - 1, frame=0)
    star = curves.relative[target]
    assert np.isfinite(star).sum() >= 46
    dip = fit_dip(curves.mjd_tai - TAI_MINUS_UTC, star)
    assert abs(dip.mid - 58107.20687) < 10 / 1440
    assert dip.depth == pytest.approx(0.022, abs=0.004)
    assert dip.duration * 24 == pytest.approx(3.1, abs=0.5)
    assert dip.delta_chi2 > 100
    comparison = curves.relative[curves.nearest(465 - 1, 183 - 1, frame=0)]
    assert abs(fit_dip(curves.mjd_tai, comparison).depth) < 0.012
