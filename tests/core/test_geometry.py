"""Pixel to sky: against astropy's WCS and coordinates, and against itself backwards."""

from __future__ import annotations

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import AltAz, EarthLocation, SkyCoord
from astropy.time import Time
from astropy.utils.iers import conf as iers_conf
from astropy.wcs import WCS

from cumbre.core import geometry
from cumbre.core.instrument import Instrument, load_instrument


@pytest.fixture
def democam() -> Instrument:
    return load_instrument("democam")


def turned(instrument: Instrument, **changes) -> Instrument:
    return instrument.model_copy(update=changes)


@pytest.mark.parametrize(
    ("ra", "dec", "rotpa"), [(10, -30, 0), (359.99, 0, 33), (120, 85, -140), (0.01, -89, 181)]
)
def test_round_trip_is_exact(democam, ra, dec, rotpa):
    detector = democam.detectors[3].model_copy(update={"angle_deg": 91.3})
    rng = np.random.default_rng(1)
    x, y = rng.uniform(-50, 1100, (2, 1000))
    sky = geometry.sky_from_pixel(democam, detector, ra, dec, rotpa, x, y)
    x2, y2 = geometry.pixel_from_sky(democam, detector, ra, dec, rotpa, *sky)
    assert np.hypot(x2 - x, y2 - y).max() < 1e-6


@pytest.mark.parametrize("parity", [1, -1])
@pytest.mark.parametrize("rotpa", [0.0, 25.0, 200.0])
def test_without_distortion_it_is_astropys_tan_wcs(democam, parity, rotpa):
    instrument = turned(democam, distortion=(), parity=parity)
    ra, dec = 310.2, -44.0
    for detector in instrument.detectors:
        wcs = WCS(naxis=2)
        wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
        wcs.wcs.crval = [ra, dec]
        scale = instrument.plate_scale * detector.pixel_mm / 3600
        wcs.wcs.crpix = [
            (detector.nx + 1) / 2 - detector.x_offset_mm / detector.pixel_mm,
            (detector.ny + 1) / 2 - detector.y_offset_mm / detector.pixel_mm,
        ]
        # East of north turns +y towards east; x is west when parity is 1.
        cos, sin = np.cos(np.deg2rad(rotpa)), np.sin(np.deg2rad(rotpa))
        wcs.wcs.cd = scale * np.array([[-parity * cos, sin], [parity * sin, cos]])
        wcs.wcs.set()
        x, y = np.meshgrid(np.linspace(0, 1023, 9), np.linspace(0, 1023, 9))
        sky = geometry.sky_from_pixel(instrument, detector, ra, dec, rotpa, x, y)
        x2, y2 = wcs.all_world2pix(*sky, 0)
        assert np.hypot(x2 - x, y2 - y).max() < 1e-4
        want = wcs.all_pix2world(x, y, 0)
        assert geometry.separation_deg(*sky, *want).max() * 3600 < 1e-5


def test_orientation(democam):
    up = geometry.sky_from_focal_plane(democam, 50, 10, 0, 0, 1)
    right = geometry.sky_from_focal_plane(democam, 50, 10, 0, 1, 0)
    assert up[1] > 10
    assert up[0] == pytest.approx(50)
    assert right[0] < 50
    east = geometry.sky_from_focal_plane(democam, 50, 10, 90, 0, 1)
    assert east[0] > 50
    assert east[1] == pytest.approx(10, abs=1e-4)


def test_distortion_moves_the_corner_by_its_polynomial(democam):
    r_mm = 60.0
    _, dec = geometry.sky_from_focal_plane(democam, 0, 0, 0, 0, r_mm)
    r_fp = r_mm * democam.plate_scale / 3600
    want = np.rad2deg(np.arctan(np.deg2rad(r_fp * (1 + 0.004 * r_fp**2))))
    assert dec == pytest.approx(want, abs=1e-12)


def test_approximate_wcs_is_good_to_a_fifth_of_a_pixel(democam):
    for detector in democam.detectors:
        header = geometry.approximate_wcs(democam, detector, 10, -60, 12)
        wcs = WCS(header)
        x, y = np.meshgrid(np.linspace(0, 1023, 9), np.linspace(0, 1023, 9))
        x2, y2 = wcs.all_world2pix(*geometry.sky_from_pixel(democam, detector, 10, -60, 12, x, y), 0)
        assert np.hypot(x2 - x, y2 - y).max() < 0.2


def test_corners_and_field(democam):
    ra, dec = geometry.detector_corners(democam, democam.detectors[0], 0, 0, 0)
    width = geometry.separation_deg(ra[0], dec[0], ra[1], dec[1]) * 3600
    assert width == pytest.approx(1024 * 0.6, rel=1e-3)
    assert 0.2 < geometry.field_radius_deg(democam) < 0.3


def test_behind_the_sky_is_nan(democam):
    x, _ = geometry.pixel_from_sky(democam, democam.detectors[0], 0, 0, 0, 180.0, 5.0)
    assert np.isnan(x)


def test_horizontal_against_astropy():
    location = EarthLocation(lat=-30.24 * u.deg, lon=-70.74 * u.deg, height=2650 * u.m)
    rng = np.random.default_rng(3)
    ra, dec = rng.uniform(0, 360, 50), np.rad2deg(np.arcsin(rng.uniform(-1, 1, 50)))
    time = Time("2026-11-21T03:00:00", scale="utc")
    tai_s = (time.tai.mjd - 40587.0) * 86400
    with iers_conf.set_temp("auto_download", False), iers_conf.set_temp("iers_degraded_accuracy", "ignore"):
        want = SkyCoord(ra * u.deg, dec * u.deg).transform_to(AltAz(obstime=time, location=location))
    altitude, azimuth, _ = geometry.horizontal_from_sky(tai_s, -30.24, -70.74, ra, dec)
    assert geometry.separation_deg(azimuth, altitude, want.az.deg, want.alt.deg).max() < 0.02


def test_airmass_at_known_altitudes():
    assert geometry.airmass(90.0) == pytest.approx(1.0, abs=1e-3)
    assert geometry.airmass(30.0) == pytest.approx(1.995, abs=0.005)
    assert np.isinf(geometry.airmass(-1.0))
