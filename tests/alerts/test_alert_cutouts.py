from __future__ import annotations

import io

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from cumbre.alerts.cutout import encode_cutout, stamp
from cumbre.core.errors import UnprocessableDataError

DETECTOR_WCS = {
    "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CUNIT1": "deg", "CUNIT2": "deg", "CRVAL1": 150.123456789012,
    "CRVAL2": -30.5, "CRPIX1": 512.5, "CRPIX2": 500.25, "CD1_1": -5.5e-5, "CD1_2": 1.25e-7, "CD2_1": 1.25e-7,
    "CD2_2": 5.5e-5, "RADESYS": "ICRS",
}  # fmt: skip


def test_astropy_opens_it_and_finds_the_same_sky() -> None:
    image = np.random.default_rng(1).normal(size=(1000, 1024)).astype(np.float32)
    cut, x0, y0 = stamp(image, 700.4, 300.6, 51)
    content = encode_cutout(cut, DETECTOR_WCS, origin=(x0, y0), uncertainty=cut + 1, psf=np.ones((25, 25)))
    assert len(content) % 2880 == 0
    with fits.open(io.BytesIO(content)) as hdus:
        hdus.verify("exception")
        assert [hdu.name for hdu in hdus] == ["PRIMARY", "UNCERT", "PSFIMAGE"]
        np.testing.assert_array_equal(hdus[0].data, image[y0 : y0 + 51, x0 : x0 + 51])
        np.testing.assert_array_equal(hdus[1].data, cut + 1)
        assert hdus[2].data.shape == (25, 25)
        assert hdus[0].header["BUNIT"] == "nJy"
        assert hdus[0].data[25, 25] == image[301, 700]  # the pixel that holds the position
        small, whole = WCS(hdus[0].header), WCS(fits.Header(DETECTOR_WCS))
        found, expected = small.pixel_to_world(25.4, 24.6), whole.pixel_to_world(25.4 + x0, 24.6 + y0)
        assert found.separation(expected).arcsec < 1e-6


def test_stamps_over_the_edge_are_nan_outside() -> None:
    image = np.ones((100, 80), dtype=np.float32)
    cut, x0, y0 = stamp(image, 0.0, 99.0, 31)
    assert (x0, y0, cut.shape) == (-15, 84, (31, 31))
    assert np.isfinite(cut).sum() == 16 * 16
    assert np.isnan(stamp(image, 500.0, 500.0, 31)[0]).all()
    with fits.open(io.BytesIO(encode_cutout(cut))) as hdus:
        np.testing.assert_array_equal(hdus[0].data, cut)


@pytest.mark.parametrize("shape", [(29, 40), (40, 29), (40,)])
def test_small_cutouts_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnprocessableDataError, match="30"):
        encode_cutout(np.zeros(shape))


def test_unknown_values_are_left_out_and_quotes_are_doubled() -> None:
    content = encode_cutout(
        np.zeros((30, 30)), {"CRVAL1": float("nan"), "OBJECT": "Barnard's star", "OBSERVED": 7}
    )
    with fits.open(io.BytesIO(content)) as hdus:
        assert "CRVAL1" not in hdus[0].header
        assert hdus[0].header["OBJECT"] == "Barnard's star"
        assert hdus[0].header["OBSERVED"] == 7
