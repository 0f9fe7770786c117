"""Header repair: rules on made-up headers, and real headers whose truth is in their READMEs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumbre.core.errors import BadFileError
from cumbre.core.header import sexagesimal, translate
from cumbre.core.header_files import read_headers, read_metadata
from cumbre.core.header_time import moment_ns, tai_ns_from_utc_ns, utc_ns_from_tai_ns
from cumbre.core.instrument import HeaderField, load_instrument
from cumbre.core.time import isot, utc_from_tai

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")
DEMO = load_instrument("democam")
NS = 1_000_000_000

OWN = {
    "OBSID": "XC_O_20261120_000012", "IMGTYPE": "OBJECT", "FILTER": "r_demo", "EXPTIME": 30.0, "DARKTIME": 30.5,
    "DATE-BEG": "2026-11-21T03:00:00.250", "DATE-END": "2026-11-21T03:00:30.250", "RA": 370.0, "DEC": -20.0,
    "CHIPID": "R00_S10", "GROUPID": "g", "ELSTART": 50.0,
}  # fmt: skip


def with_rules(**rules):
    return DEMO.model_copy(update={"header": {key: HeaderField(**value) for key, value in rules.items()}})


MINIMUM = {
    "begin": {"keywords": ("T",), "time_scale": "utc"},
    "exposure_s": {"constant": 1.0},
    "image_type": {"constant": "science"},
    "detector": {"constant": "R00_S00"},
}


def test_own_raws_need_no_rules():
    found = translate(DEMO, [OWN], "x.fits")
    assert (found.exposure_id, found.detector_id, found.band) == (2026112000012, 2, "r")
    assert found.begin_ns == 1795230000_250000000
    assert found.end_tai - found.begin_tai == pytest.approx(30.0)
    assert found.ra_deg == pytest.approx(10.0)
    assert found.zenith_angle_deg == pytest.approx(40.0)
    assert found.image_type == "science"


def test_frames_of_a_foreign_camera_that_went_through_our_writer_are_in_our_words():
    kast = load_instrument("kast_blue")
    written = OWN | {"CAMERA": "KastBlue", "EXPID": 2026112000012, "OBSID": "KB_O_20261120_000012", "FILTER": "Open",
                     "CHIPID": "R00_S00", "OBJECT": "Bias", "IMGTYPE": "BIAS"}  # fmt: skip
    found = translate(kast, [written], "x.fits")
    assert (found.obs_id, found.image_type, found.ra_deg) == (
        "KB_O_20261120_000012",
        "bias",
        pytest.approx(10.0),
    )


def test_the_error_names_file_keyword_and_what_to_add():
    header = {key: value for key, value in OWN.items() if key != "EXPTIME"}
    with pytest.raises(
        BadFileError, match=r"x\.fits: exposure_s is missing.*EXPTIME.*keywords: \[THE KEYWORD"
    ):
        translate(DEMO, [header], "x.fits")
    with pytest.raises(BadFileError, match=r"detector 'R99'.*R00_S00"):
        translate(DEMO, [OWN | {"CHIPID": "R99"}], "x.fits")
    with pytest.raises(BadFileError, match="not a time"):
        translate(DEMO, [OWN | {"DATE-BEG": "yesterday"}], "x.fits")


def test_what_is_repaired_is_listed():
    header = {key: value for key, value in OWN.items() if key not in ("DATE-END", "FILTER", "DEC")}
    found = translate(DEMO, [header | {"DARKTIME": 0.0}], "x.fits")
    text = " | ".join(found.problems)
    for word in ("end:", "filter:", "ra, dec:", "dark_s:"):
        assert word in text
    assert found.dark_s == 30.0
    assert math.isnan(found.dec_deg)
    unknown = translate(DEMO, [OWN | {"FILTER": "H-alpha"}], "x.fits")
    assert (unknown.filter, unknown.band) == ("H-alpha", "")
    assert "H-alpha" in " ".join(unknown.problems)


@pytest.mark.parametrize(
    ("rule", "value", "utc"),
    [
        ({"time_scale": "utc"}, "2017-12-20T01:33:43.317-0000", "2017-12-20T01:33:43.317"),
        ({"time_scale": "local", "utc_offset_h": -7}, "2017-12-19T18:33:43.317", "2017-12-20T01:33:43.317"),
        ({"time_scale": "local", "utc_offset_h": 99}, "2017-12-19T18:33:43.317-0700", "2017-12-20T01:33:43.317"),
        ({"time_scale": "mjd_utc"}, 58107.5, "2017-12-20T12:00:00.000"),
        ({"time_scale": "jd_utc"}, 2458108.0, "2017-12-20T12:00:00.000"),
        ({"time_scale": "tai"}, "2017-12-20T12:00:37", "2017-12-20T12:00:00.000"),
        ({"time_scale": "unix"}, 1513771200, "2017-12-20T12:00:00.000"),
        ({"time_scale": "timesys"}, "2017-12-20T12:00:00", "2017-12-20T12:00:00.000"),
    ],
)  # fmt: skip
def test_times_of_every_kind(rule, value, utc):
    found = translate(with_rules(**MINIMUM | {"begin": {"keywords": ("T",), **rule}}), [{"T": value}], "x")
    assert isot(utc_from_tai(found.begin_tai)) == utc


def test_a_copied_date_is_replaced_by_the_later_step():
    rules = MINIMUM | {"begin": {"keywords": ("T",), "time_scale": "utc", "not_after": "DATE"}}
    header = {"T": "2018-08-04T09:23:31", "DATE": "2016-08-23T19:47:51"}
    found = translate(with_rules(**rules), [header], "x")
    assert isot(utc_from_tai(found.begin_tai), 0) == "2016-08-23T19:47:51"
    assert "copied" in found.problems[0]


def test_numbers_with_units_and_sexagesimal():
    rules = MINIMUM | {
        "ra": {"keywords": ("RA",), "unit": "hourangle"},
        "dec": {"keywords": ("DEC",), "unit": "deg"},
        "exposure_s": {"keywords": ("MS",), "unit": "ms"},
        "altitude": {"keywords": ("ZD",), "scale": -1.0, "offset": 90.0},
        "rotpa": {"keywords": ("PA",), "unit": "rad"},
    }
    header = {"T": "2020-01-01T00:00:00", "RA": "+12:30:49.4", "DEC": "-00 30 00", "MS": 2500, "ZD": 30.0,
              "PA": math.pi}  # fmt: skip
    found = translate(with_rules(**rules), [header], "x")
    assert found.ra_deg == pytest.approx(187.705833, abs=1e-6)
    assert found.dec_deg == -0.5
    assert (found.exposure_s, found.altitude_deg) == (2.5, 60.0)
    assert found.rotpa_deg == pytest.approx(180.0)


def test_mapping_join_absent_and_extension():
    rules = MINIMUM | {
        "filter": {"keywords": ("F", "G"), "join": "~", "mapping": {"empty*": "empty"}},
        "object": {"keywords": ("A", "SCI/B"), "absent": ("-1",)},
        "program": {"keywords": ("C",), "pattern": r"run-(\d+)"},
        "image_type": {"keywords": ("O",), "mapping": {"*FLAT*": "flat", "*": "science"}},
    }
    header = {
        "T": "2020-01-01T00:00:00",
        "F": "g",
        "G": "empty_1",
        "A": "-1",
        "C": "x run-17 y",
        "O": "Dome flat",
    }
    found = translate(with_rules(**rules), [header, {"EXTNAME": "SCI", "B": "M 88"}], "x")
    assert found.filter == "g~empty"
    assert (found.object, found.program, found.image_type) == ("M 88", "17", "flat")


def test_sequence_number_from_the_file_name_or_the_time():
    rules = with_rules(**MINIMUM)
    named = rules.model_copy(update={"file_pattern": r"n(?P<seq_num>\d+)(?P<letter>[a-z])\.fits"})
    header = {"T": "2020-01-01T12:00:09"}
    assert translate(named, [header], "/a/n04c.fits").obs_id == "XC_O_20200101_000403"
    made = translate(rules, [header], "/a/b.fits")
    assert made.obs_id == "XC_O_20200101_000010"
    assert any(problem.startswith("seq_num") for problem in made.problems)
    last = translate(rules, [{"T": "2020-01-02T11:59:59.9"}], "/a/b.fits")
    assert (last.day_obs, last.seq_num) == (20200101, 86400)


WCS = {
    "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 10.0, "CRVAL2": -20.0, "CRPIX1": 512.5, "CRPIX2": 512.5,
    "CD1_1": -0.6 / 3600, "CD1_2": 0.0, "CD2_1": 0.0, "CD2_2": 0.6 / 3600,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "usable"),
    [
        ({}, True),
        ({"CRVAL2": -18.0}, False),
        ({"CRPIX1": 20512.5}, False),
        ({"CD1_1": -0.1, "CD2_2": 0.1}, False),
        ({"CTYPE1": "PIXEL"}, False),
        ({"CD1_1": None, "CD2_2": None, "CDELT1": -0.6 / 3600, "CDELT2": 0.6 / 3600}, True),
    ],
)
def test_a_stale_wcs_is_noticed(changes, usable):
    header = {key: value for key, value in (OWN | WCS | changes).items() if value is not None}
    assert translate(DEMO, [header], "x").wcs_usable is usable


@given(st.integers(min_value=70000000 * NS, max_value=4000000000 * NS))
def test_utc_and_tai_nanoseconds_are_inverse(utc_ns):
    assert utc_ns_from_tai_ns(tai_ns_from_utc_ns(utc_ns)) == utc_ns


@given(st.floats(min_value=0, max_value=89.999))
def test_sexagesimal_round_trip(value):
    minutes = (value - int(value)) * 60
    text = f"-{int(value):02d}:{int(minutes):02d}:{(minutes - int(minutes)) * 60:.9f}"
    assert sexagesimal(text) == pytest.approx(-value, abs=1e-9)


def test_mjd_keeps_the_digits_that_float_seconds_lose():
    assert moment_ns(59619.0405108324, "mjd_tai", 0.0) == 1644368300135919149


# real files: the truths are those of the data sets' descriptions


def metadata_of(name, path):
    return read_metadata(load_instrument(name), DATA / path)


@needs_data
def test_microobservatory_takes_universal_time_not_local():
    found = metadata_of("microobservatory", "timeseries_hatp32/HATP-32171220013343.FITS.bz2")
    assert isot(utc_from_tai(found.begin_tai)) == "2017-12-20T01:33:43.317"
    assert (found.day_obs, found.exposure_s, found.wcs_usable) == (20171219, 60.0, False)
    instrument = load_instrument("microobservatory")
    header = read_headers(DATA / "timeseries_hatp32/HATP-32171220013343.FITS.bz2")[0]
    del header["UT-OBS"]
    local = translate(instrument, [header], "x")
    assert local.begin_ns == found.begin_ns
    assert any("local" in problem for problem in local.problems)


@needs_data
def test_all_48_frames_of_the_transit_get_their_own_identity():
    paths = sorted((DATA / "timeseries_hatp32").glob("*.bz2"))
    instrument = load_instrument("microobservatory")
    assert len({read_metadata(instrument, path).obs_id for path in paths}) == len(paths) >= 37


@needs_data
def test_goto_pair_and_its_stale_original():
    found = metadata_of("goto", "diffim_goto/1.fits.fz")
    assert (found.band, found.exposure_s, found.seq_num, found.wcs_usable) == ("L", 360.0, 1, True)
    assert found.ra_deg == pytest.approx(187.7058, abs=1e-4)
    headers = read_headers(DATA / "diffim_goto/1.fits.fz")
    # As published, before CRPIX was shifted by (-5016, -1637): a position far from the pointing.
    headers[1] |= {"CRPIX1": headers[1]["CRPIX1"] + 5016, "CRPIX2": headers[1]["CRPIX2"] + 1637}
    published = translate(load_instrument("goto"), headers, "1.fits")
    assert not published.wcs_usable
    assert any("stale" in problem for problem in published.problems)


@needs_data
def test_decam_epochs_are_apart_in_spite_of_the_copied_date():
    late = metadata_of("decam", "diffim_decam/DEC-OBS04a.mini.fits.gz")
    early = metadata_of("decam", "diffim_decam/DEC-OBS18a.mini.fits.gz")
    assert late.day_obs == 20180803
    assert early.day_obs // 10000 == 2016
    assert early.wcs_usable
    assert any("copied" in problem for problem in early.problems)


@needs_data
@pytest.mark.parametrize(
    ("file", "image_type", "seq_num"),
    [
        ("b1", "arc", 1),
        ("b12", "flat", 12),
        ("b21", "bias", 21),
        ("b24", "science", 24),
        ("b27", "science", 27),
    ],
)
def test_kast_image_types_come_from_the_title(file, image_type, seq_num):
    found = metadata_of("kast_blue", f"raw_kast_blue/{file}.fits.gz")
    assert (found.image_type, found.seq_num) == (image_type, seq_num)


@needs_data
def test_cafos_science_flats_and_bias():
    science = metadata_of("cafos", "raw_cafos/science/NGC2420/B/uamA_0027.fits.bz2")
    assert (science.band, science.exposure_s, science.dark_s, science.day_obs) == ("B", 60.0, 60.0, 20210328)
    assert science.airmass == pytest.approx(1.597, abs=1e-3)
    assert not science.wcs_usable
    flat = metadata_of("cafos", "raw_cafos/calib/flat/V/uamA_0048.fits.bz2")
    assert (flat.image_type, flat.filter, flat.exposure_s) == ("flat", "JohnsonV", 3.5)
    assert metadata_of("cafos", "raw_cafos/calib/bias/uamA_0001.fits.bz2").image_type == "bias"


@needs_data
def test_laboratory_frames_of_lsstcam():
    found = metadata_of("lsstcam", "raw_lsst_headers/30211212000310-R22-S22-det098.fits")
    assert (found.obs_id, found.detector_name, found.image_type, found.band) == (
        "MC_C_20211212_000310", "R22_S22", "flat", "i",
    )  # fmt: skip
    assert isot(utc_from_tai(found.begin_tai)) == "2021-12-13T04:58:56.398"


def test_not_fits_is_a_bad_file(tmp_path):
    path = tmp_path / "a.fits"
    path.write_bytes(b"not a FITS file at all")
    with pytest.raises(BadFileError, match=r"a\.fits"):
        read_headers(path)


def test_metadata_is_a_value():
    found = translate(DEMO, [OWN], "x.fits")
    assert replace(found, seq_num=13) != found


@pytest.mark.parametrize(
    ("index", "length", "group", "expected"),
    [
        (2, 2, "g", (2026112000011, 2, 2)),
        (1, 2, "g", (2026112000012, 1, 2)),
        (2, 2, None, (2026112000012, 1, 1)),
        (3, 2, "g", (2026112000012, 1, 1)),
        (13, 20, "g", (2026112000012, 1, 1)),
        (None, None, "g", (2026112000012, 1, 1)),
    ],
)
def test_a_visit_has_the_number_of_its_first_exposure(index, length, group, expected):
    found = translate(DEMO, [OWN | {"CURINDEX": index, "MAXINDEX": length, "GROUPID": group}], "x.fits")
    assert (found.visit_id, found.sequence_index, found.sequence_length) == expected
