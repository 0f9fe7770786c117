"""Exposure files: what is written is read, bit for bit; damage is an error, never a crash."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.core.geometry import approximate_wcs
from cumbre.core.instrument import load_instrument
from cumbre.payloads.exposure import Exposure
from cumbre.payloads.exposure_file import load_about, load_exposure, save_exposure
from cumbre.payloads.kernels.psf import gaussian_psf
from cumbre.payloads.kernels.wcs import PlaneWcs

STARS = np.array(
    [(1.25, 65535, True, -1), (2.5, 0, False, 7)],
    dtype=[("x", "f8"), ("bits", "u2"), ("is_psf_star", "?"), ("ref_index", "i8")],
)


@pytest.fixture
def exposure():
    rng = np.random.default_rng(3)
    instrument = load_instrument("democam")
    header = approximate_wcs(instrument, instrument.detectors[0], 50.0, -30.0, 20.0)
    return Exposure(
        image=rng.normal(size=(40, 50)).astype(np.float32),
        variance=rng.uniform(1, 2, (40, 50)).astype(np.float32),
        mask=rng.integers(0, 8192, (40, 50)).astype(np.uint16),
        wcs=PlaneWcs.from_header(header),
        psf=gaussian_psf(3.0, (40, 50)),
        zero_point=29.5,
        zero_point_err=0.01,
        is_background_subtracted=True,
        metadata={"obs_id": "XC_O_20261120_000001", "depth": np.zeros(3), "stars": STARS},
        metrics={"n_stars": 12.0},
    )


def test_round_trip(exposure, tmp_path):
    save_exposure(exposure, tmp_path / "e.fits")
    again = load_exposure(tmp_path / "e.fits")
    for name in ("image", "variance", "mask"):
        np.testing.assert_array_equal(getattr(again, name), getattr(exposure, name))
    assert again.zero_point == 29.5
    assert again.is_background_subtracted
    stars = again.metadata.pop("stars")
    assert stars.dtype == STARS.dtype
    np.testing.assert_array_equal(stars, STARS)
    assert load_about(tmp_path / "e.fits")["metadata"] == again.metadata
    assert again.metadata == {"obs_id": "XC_O_20261120_000001"}
    assert again.metrics == {"n_stars": 12.0}
    np.testing.assert_allclose(again.psf.stamp(10.3, 20.2), exposure.psf.stamp(10.3, 20.2), atol=1e-7)
    np.testing.assert_allclose(
        np.array(again.wcs.pix2sky(7.0, 8.0)), np.array(exposure.wcs.pix2sky(7.0, 8.0)), atol=1e-9
    )


def test_absent_and_foreign_files_are_told_apart(tmp_path):
    with pytest.raises(NotFoundError):
        load_exposure(tmp_path / "none.fits")
    (tmp_path / "x.fits").write_text("no FITS")
    with pytest.raises(BadFileError, match=r"x\.fits"):
        load_exposure(tmp_path / "x.fits")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 0.99))
def test_truncated_files_are_refused(exposure, tmp_path, cut):
    save_exposure(exposure, tmp_path / "e.fits")
    content = (tmp_path / "e.fits").read_bytes()
    (tmp_path / "cut.fits").write_bytes(content[: int(cut * len(content))])
    with pytest.raises(BadFileError):
        load_exposure(tmp_path / "cut.fits")
