"""Real frames through the commands: CAFOS, Kast and HAT-P-32, the last through a whole site too."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import fitsio
import numpy as np
import pytest
from click.testing import CliRunner

from cumbre.cli.main import cli
from cumbre.payloads.calibrate_run import dispersion_axis, take_out_lamp
from cumbre.payloads.exposure import MaskPlane
from cumbre.payloads.exposure_file import load_exposure
from cumbre.payloads.transit import fit_transit, hidden_light

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CAFOS, KAST, HATP32 = DATA / "raw_cafos", DATA / "raw_kast_blue", DATA / "timeseries_hatp32"
needs = {p: pytest.mark.skipif(not p.is_dir(), reason=f"{p} is absent") for p in (CAFOS, KAST, HATP32)}
# HAT-P-32 b by its published elements: middle of the transit, UTC, and (Rp/Rs)^2
MID_MJD_UTC, DEPTH = 58107.20687, 0.022
TARGET = "31.0428,46.6878"


def call(*words, code=0):
    done = CliRunner().invoke(cli, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def report_of(done):
    return json.loads(done.stdout)


@needs[CAFOS]
def test_cafos_with_a_broken_file_in_between(tmp_path):
    broken = tmp_path / "uamA_0099.fits"
    broken.write_bytes(b"SIMPLE  = T, but no more than that")
    science = sorted((CAFOS / "science/NGC2420").glob("*/*.bz2"))
    chosen = [p for p in science if "0027" in p.name or "0031" in p.name or "0032" in p.name]
    done = call(
        "calibrate", "--instrument", "cafos", "--bias", *sorted((CAFOS / "calib/bias").glob("*")),
        "--flat", *sorted((CAFOS / "calib/flat").glob("*/*")),
        "--science", chosen[0], broken, *chosen[1:], "--out", tmp_path / "out", "--json", code=1,
    )  # fmt: skip
    report = report_of(done)
    assert [(row["file"], row["outcome"]) for row in report["refused"]] == [("uamA_0099.fits", "BadFile")]
    assert report["bias"][0]["level_adu"][0] == pytest.approx(672, abs=2)
    assert {row["filter"] for row in report["flats"]} == {"JohnsonB", "JohnsonV"}
    assert [row["filter"] for row in report["frames"]] == ["JohnsonB", "JohnsonV", "JohnsonV"]
    for row in report["frames"]:
        assert row["outcome"] == "ok"
        assert 1.5 < row["seeing_arcsec"] < 3.5
        assert row["n_stars"] > 50
        assert 0 < (tmp_path / "out" / row["picture"]).stat().st_size < 150_000
        exposure = load_exposure(tmp_path / "out" / row["image"])
        assert exposure.shape == (1024, 1024)
        assert abs(np.median(exposure.image[100:900, 100:900])) < 0.1 * row["sky_noise_electrons"]
    # the full Moon rises between the two V frames
    assert 1.02 < report["frames"][2]["sky_electrons"] / report["frames"][1]["sky_electrons"] < 1.07
    assert json.loads((tmp_path / "out/report.json").read_text()) == report


@needs[CAFOS]
def test_a_frame_without_its_flat_is_refused(tmp_path):
    done = call(
        "calibrate", "--instrument", "cafos", "--bias", *sorted((CAFOS / "calib/bias").glob("*")),
        "--flat", CAFOS / "calib/flat/B/uamA_0043.fits.bz2",
        "--science", CAFOS / "science/NGC2420/V/uamA_0031.fits.bz2", "--out", tmp_path, code=1,
    )  # fmt: skip
    assert "no flat in filter 'JohnsonV'" in done.stderr


@needs[KAST]
def test_kast_spectra_are_calibrated_without_stars(tmp_path):
    done = call(
        "calibrate", "--instrument", "kast_blue", "--bias", *sorted(KAST.glob("b2[123]*")), "--flat", KAST / "b12.fits.gz",
        "--science", KAST / "b24.fits.gz", KAST / "b27.fits.gz", "--out", tmp_path, "--json",
    )  # fmt: skip
    report = report_of(done)
    assert report["bias"][0]["level_adu"] == pytest.approx([945, 966], abs=4)
    assert report["bias"][0]["read_noise_adu"] == pytest.approx([3.0, 3.0], abs=0.4)
    assert [row["outcome"] for row in report["frames"]] == ["NoWorkFound"] * 2
    assert report["flats"][0]["dispersed_along"] == "x"
    star = load_exposure(tmp_path / "b24.calibrated.fits")
    trace = np.argmax(np.median(star.image[50:300, 900:1100], axis=1)) + 50
    # the spectrum runs on over the join of the amplifiers without a step
    left, right = (np.median(star.image[trace - 2 : trace + 3, a : a + 15]) for a in (1004, 1029))
    assert left == pytest.approx(right, rel=0.05)
    flat = fitsio.read(str(tmp_path / "master_flat_000_Open.fits"), ext="FLAT")
    lit = np.median(flat, axis=1) > 0.5
    assert np.std(np.median(flat[lit], axis=0)[700:1900]) < 0.1
    assert np.mean((star.mask & MaskPlane.VIGNETTED) > 0) < 0.2


def test_lamp_is_taken_out_and_the_pixels_stay():
    rng = np.random.default_rng(3)
    x = np.linspace(-1, 1, 800)
    lamp = np.exp(-2 * (x - 0.7) ** 2 + 0.3 * np.sin(3 * x))
    pixels = 1 + 0.02 * rng.normal(size=(60, 800))
    gain = np.where(np.arange(800) < 400, 1.0, 1.07)
    flat = (lamp * pixels * gain).astype(np.float32)
    assert dispersion_axis(flat) == "x"
    assert dispersion_axis(flat.T.copy()) == "y"
    assert dispersion_axis(pixels.astype(np.float32)) is None
    halves = [(slice(0, 60), slice(0, 400)), (slice(0, 60), slice(400, 800))]
    made = take_out_lamp(flat, "x", 1e6, halves)
    ratio = made / (pixels * gain)
    assert np.std(ratio / np.median(ratio)) < 0.003
    turned = take_out_lamp(flat.T.copy(), "y", 1e6, [(b, a) for a, b in halves])
    assert np.allclose(turned.T, made, rtol=1e-4)


def test_hidden_light_against_what_geometry_says():
    assert hidden_light([0.0, 0.5, 1.2], 0.15, (0, 0)) == pytest.approx([0.0225, 0.0225, 0], rel=0.01)
    # linear law, small disc at the centre: k^2 / (1 - u/3)
    assert hidden_light(0.0, 0.05, (0.6, 0.0)) == pytest.approx(0.0025 / 0.8, rel=0.01)
    # half of a small disc is over the rim when its centre is there
    assert hidden_light(1.0, 0.05, (0, 0)) == pytest.approx(0.00125, rel=0.05)


@pytest.mark.parametrize("ratio", [0.08, 0.15])
def test_transit_of_known_area(ratio):
    rng = np.random.default_rng(8)
    t = np.linspace(0, 0.3, 80)
    truth = 1.3 * (1 + 0.01 * t) * (1 - hidden_light(np.abs(t - 0.14) / 0.065 * (1 + ratio), ratio))
    flux = truth * (1 + rng.normal(0, 0.001, t.size))
    flux[[5, 50]] = [np.nan, 1.6]
    found = fit_transit(t, flux)
    assert abs(found.mid - 0.14) < 4 * found.mid_err < 0.01
    assert abs(found.area_ratio - ratio**2) < 4 * found.area_ratio_err < 0.002
    assert found.duration == pytest.approx(0.13, rel=0.05)


def check_transit(report):
    assert report["frames"] == 48
    assert report["target"]["is_credible"]
    assert report["target"]["offset_deg"] < 0.1
    # (424, 286) counted from 1
    assert report["target"]["first_frame_xy"] == pytest.approx([423, 285], abs=2)
    assert abs(report["transit"]["mid_mjd_utc"] - MID_MJD_UTC) < 10 / 1440
    assert report["transit"]["depth"] == pytest.approx(DEPTH, abs=0.004)
    assert report["transit"]["duration_h"] == pytest.approx(3.1, abs=0.5)


@needs[HATP32]
def test_hatp32_from_files(tmp_path):
    broken = tmp_path / "broken.fits"
    broken.write_bytes(b"no image")
    files = [*sorted(HATP32.glob("*.bz2"))[::-1], broken]
    words = ["--instrument", "microobservatory", "--target", TARGET, "--out", tmp_path / "out", "--json"]
    report = report_of(call("lightcurve", *files, *words, code=1))
    assert [row["outcome"] for row in report["refused"]] == ["BadFile"]
    check_transit(report)
    with (tmp_path / "out/lightcurves.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if int(row["object"]) == report["target"]["object"]]
    assert len(rows) >= 46
    assert (tmp_path / "out/lightcurve.png").stat().st_size < 150_000


def test_lightcurve_says_what_is_missing(tmp_path):
    from cumbre.core.errors import NoWorkFoundError, UserError

    with pytest.raises(UserError, match="give FILES"):
        call("lightcurve", "--instrument", "microobservatory", "--out", tmp_path)
    with pytest.raises(NoWorkFoundError, match="0 usable frames"):
        call("lightcurve", tmp_path / "nothing.fits", "--instrument", "microobservatory", "--out", tmp_path)
    done = call(
        "lightcurve", "x", "--instrument", "microobservatory", "--out", tmp_path, "--target", "1h,2", code=2
    )
    assert "expected RA,DEC in degrees" in done.stderr


@pytest.fixture
def site(tmp_path):
    """A real observatory's site without prompt processing, up; stopped at the end."""
    from cumbre.core.configuration import SITE_FILE, Site
    from cumbre.site.profiles import create_site
    from cumbre.site.supervisor import stop_site

    root = tmp_path / "site"
    create_site(root, instrument="microobservatory", simulated=False)
    path = root / SITE_FILE
    roles = (
        "ledger, replicator, base, archive, forwarder, tape-base, tape-archive, wan-summit-base,"
        " wan-base-archive, embargo"
    )
    text = (
        path.read_text()
        .replace("latency_ms: 60", "latency_ms: 0")
        .replace("latency_ms: 1,", "latency_ms: 0,")
        .replace("control: true", "control: false")
    )
    path.write_text(f"{text}roles: [{roles}]\n")
    made = Site.load(root)
    # as a user would: the supervisor is no child of the tests
    command = [sys.executable, "-m", "cumbre.cli.main", "up", "--site", str(root)]
    subprocess.run(command, check=True, timeout=90, stdout=subprocess.DEVNULL)
    yield made
    stop_site(made)


@needs[HATP32]
def test_hatp32_through_a_site_is_one_object(site, tmp_path):
    """Ingest, archive, light curve, query: the transit is in the rows of one DiaObject."""
    files = sorted(HATP32.glob("*.bz2"))
    words = ["--site", site.root, "--instrument", "microobservatory", "--target", TARGET]
    took = report_of(call("ingest", *words, "--out", tmp_path / "out", "--json", *files))
    assert [row["outcome"] for row in took["files"]] == ["ok"] * 48
    report = took["light_curves"]
    check_transit(report)
    stored = report["level1"]
    assert stored["visits_stored"] == 48
    sql = (
        "SELECT f.midpointmjdtai AS mjd, f.scienceflux AS flux FROM level1.diaforcedsource f "
        f"WHERE f.diaobjectid = {stored['diaObjectId']} ORDER BY 1"
    )
    rows = report_of(call("query", "--site", site.root, "--json", sql))
    assert len(rows) >= 46
    flux = np.array([row["flux"] for row in rows])
    found = fit_transit([row["mjd"] for row in rows], flux / np.median(flux))
    assert abs(found.mid - 37 / 86400 - MID_MJD_UTC) < 10 / 1440
    assert found.area_ratio == pytest.approx(DEPTH, abs=0.004)
    again = report_of(call("lightcurve", *words, "--out", tmp_path / "again", "--json"))
    assert again["level1"] == stored | {"visits_stored": 0, "visits_already": 48, "forced_sources": 0}
