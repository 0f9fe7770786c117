"""Dipoles and trails of known flux, length and angle: on noise alone, and from exposures to the packet."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cumbre.alerts.packet import decode_packet, packet_bytes
from cumbre.payloads.alert_production import produce
from cumbre.payloads.exposure import Exposure
from cumbre.payloads.kernels.detect import GridPsf, significance
from cumbre.payloads.kernels.lobes import fit_dipoles, fit_trails
from cumbre.payloads.kernels.wcs import PlaneWcs

SIGMA, NOISE, HALF = 1.3, 10.0, 12
SCALE = 0.4 / 3600.0
TURN = math.radians(33.0)
WCS_MATRIX = SCALE * np.array([[-math.cos(TURN), math.sin(TURN)], [math.sin(TURN), math.cos(TURN)]])
"""North is turned from +y, and east is on the left."""


def spot(shape, x, y, flux, sigma=SIGMA):
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    return flux / (2 * np.pi * sigma**2) * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * sigma**2))


def bar(shape, x, y, flux, length, angle, sigma=SIGMA):
    """A point that moves at constant speed."""
    at = ((np.arange(60) + 0.5) / 60 - 0.5) * length
    return sum(spot(shape, x + t * math.cos(angle), y + t * math.sin(angle), flux / 60, sigma) for t in at)


def model_psf():
    grid = np.arange(-HALF, HALF + 1)
    stamp = np.exp(-(grid[:, None] ** 2 + grid**2) / (2 * SIGMA**2))
    return GridPsf(lambda x, y: stamp / stamp.sum(), lambda x, y: np.ones((1, 1)), half=HALF)


def planes(light, rng):
    image = (light + rng.normal(0, NOISE, light.shape)).astype(np.float32)
    variance, mask = np.full(image.shape, NOISE**2, np.float32), np.zeros(image.shape, np.uint16)
    snr = significance(image, variance, mask > 0, model_psf(), HALF)
    y, x = np.unravel_index(np.abs(snr).argmax(), snr.shape)
    return (image, variance, mask, snr, model_psf()), np.array([x]), np.array([y])


def test_dipoles_come_back_with_their_errors():
    rng = np.random.default_rng(11)
    pulls, distances, misfits = [], [], []
    for _ in range(80):
        angle, apart = rng.uniform(0, 2 * np.pi), rng.uniform(2.5, 5.0)
        up, down = rng.uniform(3000, 9000, 2)
        x, y = 40 + rng.uniform(-0.5, 0.5, 2)
        dx, dy = apart / 2 * math.cos(angle), apart / 2 * math.sin(angle)
        shape = (81, 81)
        given, px, py = planes(spot(shape, x + dx, y + dy, up) - spot(shape, x - dx, y - dy, down), rng)
        found = fit_dipoles(*given, px, py, unusable=1, radius=6.0)
        assert found.is_good[0]
        misfits.append(found.chi2[0] / found.n_pixels[0])
        for (value, error), truth in zip(
            (found.mean_flux(), found.flux_difference()), ((up + down) / 2, up - down), strict=True
        ):
            pulls.append((value[0] - truth) / error[0])
        distances += [found.x_up[0] - x - dx, found.y_down[0] - y + dy]
        pulls += list(np.array(distances[-2:]) / np.sqrt(found.covariance[0][[1, 5], [1, 5]]))
    assert np.std(pulls) == pytest.approx(1.0, abs=0.15)
    assert abs(np.mean(pulls)) < 0.25
    assert np.abs(distances).max() < 0.3
    assert np.mean(misfits) == pytest.approx(0.95, abs=0.05)  # six numbers were fitted to 120 pixels


@pytest.mark.parametrize("length", [4.0, 12.0, 22.0])
def test_trails_come_back_with_their_errors(length):
    rng = np.random.default_rng(int(length))
    pulls = []
    for _ in range(40):
        angle, flux = rng.uniform(0, np.pi), 1500.0 * length
        x, y = 45 + rng.uniform(-0.5, 0.5, 2)
        given, px, py = planes(bar((91, 91), x, y, flux, length, angle), rng)
        found = fit_trails(*given, px, py, np.array([angle + rng.normal(0, 0.1)]), unusable=1, radius=6.0)
        assert found.is_good[0]
        assert not found.is_cut[0]
        assert found.chi2_point[0] > found.chi2[0] + 100
        turned = (found.angle[0] - angle + np.pi / 2) % np.pi - np.pi / 2
        misses = [found.flux[0] - flux, found.x[0] - x, found.y[0] - y, found.length[0] - length, turned]
        pulls.append(np.array(misses) / np.sqrt(np.diagonal(found.covariance[0])))
    assert np.std(pulls) == pytest.approx(1.0, abs=0.2)
    assert np.abs(np.mean(pulls, axis=0)).max() < 0.6


def test_a_trail_over_the_edge_is_told():
    rng = np.random.default_rng(3)
    given, px, py = planes(bar((91, 91), 88.0, 45.0, 20000.0, 12.0, 0.0), rng)
    assert fit_trails(*given, px, py, np.array([0.0]), unusable=1, radius=6.0).is_cut[0]


# --- from exposures to packets -----------------------------------------------------------------------------------------

SHAPE = (420, 420)
DIPOLES = ((90.0, 100.0, 3.2, 40.0), (300.0, 92.0, 1.0, 200.0), (210.0, 330.0, 0.5, 115.0))
"""x, y, distance in pixels, direction in degrees from +x to +y of the lobe that is new."""
STAR = 60000.0
TRAILS = ((120.0, 250.0, 6.0, 20.0), (320.0, 240.0, 14.0, 115.0))
POINT = (215.0, 120.0)


@pytest.fixture(scope="module")
def packets():
    rng = np.random.default_rng(5)
    gx, gy = np.meshgrid(np.arange(25, 410, 33), np.arange(25, 410, 33))
    x, y = (gx + rng.uniform(-4, 4, gx.shape)).ravel(), (gy + rng.uniform(-4, 4, gy.shape)).ravel()
    taken = [(a, b) for a, b, *_ in (*DIPOLES, *TRAILS, (*POINT, 0, 0))]
    free = np.array([min(math.hypot(a - c, b - d) for c, d in taken) > 28 for a, b in zip(x, y, strict=True)])
    stars = [(a, b, 10 ** rng.uniform(3.8, 4.8)) for a, b in zip(x[free], y[free], strict=True)]
    light = {1.5: np.zeros(SHAPE), 1.7: np.zeros(SHAPE)}
    for sigma in light:
        for a, b, flux in stars:
            light[sigma] += spot(SHAPE, a, b, flux, sigma)
    for a, b, apart, angle in DIPOLES:
        dx, dy = (apart / 2 * f(math.radians(angle)) for f in (math.cos, math.sin))
        light[1.7] += spot(SHAPE, a + dx, b + dy, STAR, 1.7)
        light[1.5] += spot(SHAPE, a - dx, b - dy, STAR, 1.5)
    for a, b, length, angle in TRAILS:
        light[1.7] += bar(SHAPE, a, b, 2500.0 * length, length, math.radians(angle), 1.7)
    light[1.7] += spot(SHAPE, *POINT, 8000.0, 1.7)
    pair = []
    for sigma, noise in ((1.7, 10.0), (1.5, 4.0)):
        variance = noise**2 + light[sigma] / 4
        pair.append(
            Exposure(
                (light[sigma] + rng.normal(0, np.sqrt(variance))).astype(np.float32), variance.astype(np.float32),
                np.zeros(SHAPE, np.uint16), is_background_subtracted=True, zero_point=31.4,
                wcs=PlaneWcs.linear(150.0, -30.0, 210.0, 210.0, WCS_MATRIX),
                metadata={"exposure_id": 7, "detector": 1, "mjd_mid_tai": 61000.0, "exposure_s": 30.0, "band": "r"},
            )
        )  # fmt: skip
    made = produce(pair[0], None, pair[1], None)
    return [decode_packet(packet_bytes(alert))["diaSource"] for alert in map(whole, made.dia_sources)]


def whole(source):
    from cumbre.payloads.alert_records import alert

    return alert(source)


def near(sources, x, y, *, reach=6.0):
    """The most significant source about a place."""
    found = [s for s in sources if math.hypot(s["x"] - x, s["y"] - y) < reach]
    assert found, f"nothing at {x} {y}"
    return max(found, key=lambda s: s["snr"])


def position_angle(angle):
    """East of north of a direction on the pixels."""
    direction = WCS_MATRIX @ [math.cos(math.radians(angle)), math.sin(math.radians(angle))]
    return math.degrees(math.atan2(direction[0], direction[1]))


def turned(a, b, period):
    return abs((a - b + period / 2) % period - period / 2)


@pytest.mark.parametrize(("x", "y", "apart", "angle"), DIPOLES)
def test_a_packet_describes_a_dipole(packets, x, y, apart, angle):
    source = near(packets, x, y)
    assert source["isDipole"]
    assert source["dipoleFitAttempted"]
    # lobes that overlap: what science image and template have of the star decides, to a tenth
    allowed = max(3 * source["dipoleMeanFluxErr"], 0.03 * STAR)
    assert source["dipoleMeanFlux"] == pytest.approx(STAR, abs=allowed)
    assert source["dipoleMeanFluxErr"] < 0.15 * STAR
    assert abs(source["dipoleFluxDiff"]) < 4 * source["dipoleFluxDiffErr"]
    assert source["dipoleLength"] == pytest.approx(0.4 * apart, rel=0.2)
    assert turned(source["dipoleAngle"], position_angle(angle), 360.0) < 8
    assert source["dipoleNdata"] > 50
    assert source["dipoleChi2"] > 0
    assert source["trailLength"] is None


@pytest.mark.parametrize(("x", "y", "length", "angle"), TRAILS)
def test_a_packet_describes_a_trail(packets, x, y, length, angle):
    source = near(packets, x, y, reach=length / 2 + 3)
    assert source["trailAlgorithm"] == 1
    assert source["trail_flag"] is False
    assert source["trail_flag_edge"] is False
    # the model's PSF is that of the field's stars: known to a per cent
    assert source["trailLength"] == pytest.approx(0.4 * length, abs=4 * source["trailLengthErr"] + 0.04)
    assert turned(source["trailAngle"], position_angle(angle), 180.0) < 4 * source["trailAngleErr"] + 0.5
    assert source["trailFlux"] == pytest.approx(2500.0 * length, abs=4 * source["trailFluxErr"])
    centre = PlaneWcs.linear(150.0, -30.0, 210.0, 210.0, WCS_MATRIX).pix2sky(np.array([x]), np.array([y]))
    east = (source["trailRa"] - centre[0][0]) * math.cos(math.radians(30))
    assert abs(east) < 5 * source["trailRaErr"] + 0.1 * SCALE
    assert abs(source["trailDec"] - centre[1][0]) < 5 * source["trailDecErr"] + 0.1 * SCALE
    assert source["trailNdata"] > 100
    assert source["isDipole"] is False
    assert source["dipoleMeanFlux"] is None


def test_a_point_has_neither(packets):
    source = near(packets, *POINT)
    assert source["dipoleFitAttempted"] is False
    assert source["trail_flag"] is None
    assert source["dipoleMeanFlux"] is None
    assert source["trailFlux"] is None
    assert source["trailNdata"] == source["dipoleNdata"] == 0
