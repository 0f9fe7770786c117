"""Identifiers: round trips for all values, clear refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumbre.core.errors import UserError
from cumbre.core.ids import ObsId, image_key, source_id, split_exposure_id, split_source_id

days = st.dates(
    min_value=__import__("datetime").date(1970, 1, 1), max_value=__import__("datetime").date(2198, 12, 31)
).map(lambda d: d.year * 10000 + d.month * 100 + d.day)


@given(days, st.integers(1, 99999), st.from_regex("[A-Z]{2}", fullmatch=True))
def test_obs_id_round_trip(day_obs, seq_num, prefix):
    obs_id = ObsId(day_obs, seq_num, prefix)
    assert ObsId.parse(str(obs_id)) == obs_id
    assert split_exposure_id(obs_id.exposure_id) == (day_obs, seq_num)


@given(days, st.integers(1, 99999), st.integers(0, 255), st.integers(0, 16383))
def test_source_id_round_trip_and_fits_int64(day_obs, seq_num, detector, counter):
    exposure_id = day_obs * 100000 + seq_num
    identifier = source_id(exposure_id, detector, counter)
    assert 0 < identifier < 2**63
    assert split_source_id(identifier) == (exposure_id, detector, counter)


@pytest.mark.parametrize(
    "text", ["", "XC_O_20261120_12", "../etc/passwd", "XC_O_20261120_000000", "xc_O_20261120_000001"]
)
def test_wrong_obs_ids_are_refused(text):
    with pytest.raises(UserError, match="expected XX_O"):
        ObsId.parse(text)


@pytest.mark.parametrize(
    "parts", [(2026112000012, 256, 0), (2026112000012, 0, 16384), (-1, 0, 0), (2**41, 0, 0)]
)
def test_source_id_refuses_what_does_not_fit(parts):
    with pytest.raises(ValueError, match="no source id"):
        source_id(*parts)


def test_key_is_the_published_layout():
    key = image_key("LSSTCam", ObsId(20250430, 295, "MC"), "R22_S11")
    assert key == "LSSTCam/20250430/MC_O_20250430_000295/MC_O_20250430_000295_R22_S11.fits"
