from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from click.testing import CliRunner

from cumbre.cli.instrument import instrument as command
from cumbre.core.instrument import instrument_from_mapping, load_instrument
from cumbre.core.instrument_check import check_files

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")

MINE = {
    "name": "Mine", "prefix": "MY", "plate_scale": 100.0, "raw_layout": "one_hdu",
    "filters": [{"name": "R", "band": "r"}],
    "detectors": [{"id": 0, "name": "A", "nx": 20, "ny": 10, "amplifiers": [
        {"name": "a", "raw_box": [0, 20, 0, 10], "detector_box": [0, 20, 0, 10]}]}],
    "header": {
        "begin": {"keywords": ["DATE-OBS"], "required": True},
        "exposure_s": {"keywords": ["EXPOSURE"]},
        "image_type": {"constant": "science"},
        "filter": {"keywords": ["FILTER"]},
    },
}  # fmt: skip


def write(path, shape=(10, 20), **cards):
    hdu = fits.PrimaryHDU(np.zeros(shape, np.uint16))
    hdu.header["DATE-OBS"] = "2026-01-01T02:00:00"
    hdu.header["EXPTIME"] = 5.0
    for key, value in cards.items():
        hdu.header[key] = value
    hdu.writeto(path)
    return path


def messages(report, severity):
    return [finding.message for finding in report.findings if finding.severity == severity]


def test_a_missing_keyword_is_named_with_the_file_s_own_candidate(tmp_path):
    report = check_files(instrument_from_mapping(MINE, "mine.yaml"), [write(tmp_path / "a.fits")])
    (error,) = messages(report, "error")
    assert "exposure_s is missing" in error
    assert "EXPOSURE" in error
    assert "The file has EXPTIME" in error


def test_boxes_that_leave_the_file_and_pixels_nobody_described(tmp_path):
    description = instrument_from_mapping(MINE, "mine.yaml")
    small = check_files(description, [write(tmp_path / "small.fits", (10, 16), EXPOSURE=5.0)])
    assert any("reaches outside the file's 16 x 10" in text for text in messages(small, "error"))
    wide = check_files(description, [write(tmp_path / "wide.fits", (10, 26), EXPOSURE=5.0, RA=10.0)])
    assert wide.errors == 0
    assert any("20 x 10 of 26 x 10" in text for text in messages(wide, "note"))
    assert any("ra: no rule, but the file has RA" in text for text in messages(wide, "note"))


def test_two_files_with_one_identity_or_one_time(tmp_path):
    description = instrument_from_mapping(MINE, "mine.yaml")
    paths = [write(tmp_path / f"{n}.fits", EXPOSURE=5.0) for n in (1, 2)]
    assert any("same identity" in text for text in messages(check_files(description, paths), "error"))
    numbered = instrument_from_mapping(MINE | {"file_pattern": r"(?P<seq_num>\d+)\.fits"}, "mine.yaml")
    report = check_files(numbered, paths)
    assert report.errors == 0
    assert any("copied" in text for text in messages(report, "note"))


def test_a_misspelt_quantity_and_a_file_that_is_not_fits(tmp_path):
    bad = tmp_path / "x.fits"
    bad.write_text("hello")
    rules = MINE["header"] | {"exposure": {"keywords": ["EXPTIME"]}}
    report = check_files(instrument_from_mapping(MINE | {"header": rules}, "mine.yaml"), [bad])
    assert any("header.exposure is no quantity" in text for text in messages(report, "error"))
    assert any("not a readable FITS file" in text for text in messages(report, "error"))


@needs_data
@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("cafos", "raw_cafos/**/*.bz2"),
        ("kast_blue", "raw_kast_blue/*.gz"),
        ("goto", "diffim_goto/*.fz"),
        ("decam", "diffim_decam/*.gz"),
        ("microobservatory", "timeseries_hatp32/*0?12.FITS.bz2"),
        ("latiss", "raw_lsst_headers/AT_O_20220208_00014?-R00S00.fits.gz"),
        ("lsstcomcam", "raw_lsst_headers/3019053000001*.fits"),
    ],
)
def test_shipped_descriptions_fit_their_files(name, pattern):
    report = check_files(load_instrument(name), sorted(DATA.glob(pattern))[:10])
    assert report.files
    assert messages(report, "error") == []


def test_command_says_it_in_words_and_by_exit_code(tmp_path):
    good = write(tmp_path / "good.fits", EXPOSURE=5.0)
    bad = write(tmp_path / "bad.fits")
    description = tmp_path / "mine.yaml"
    description.write_text(json.dumps(MINE))
    run = CliRunner().invoke(command, ["check", "-i", str(description), str(good)])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(command, ["check", "-i", str(description), str(good), str(bad)])
    assert run.exit_code == 1
    assert "bad.fits: exposure_s is missing" in run.output
    run = CliRunner().invoke(command, ["check", "-i", str(description), "--json", str(good)])
    answer = json.loads(run.output)
    assert (answer["errors"], answer["instrument"]) == (0, "Mine")
    assert answer["metadata"][str(good)]["exposure_s"] == 5.0


def test_list_and_show():
    run = CliRunner().invoke(command, ["list", "--json"])
    assert {row["key"]: row["detectors"] for row in json.loads(run.output)}["lsstcam"] == 205
    run = CliRunner().invoke(command, ["show", "lsstcomcam"])
    assert "9 detectors" in run.output
    run = CliRunner().invoke(command, ["show", "democam", "--json"])
    assert json.loads(run.output)["name"] == "DemoCam"


@needs_data
def test_an_unnamed_file_finds_its_description():
    for file, name in (("diffim_goto/1.fits.fz", "GOTO"), ("raw_kast_blue/b21.fits.gz", "KastBlue")):
        run = CliRunner().invoke(command, ["check", str(DATA / file)])
        assert run.exit_code == 0
        assert name in run.output.splitlines()[0]
