"""Calibration of simulated images with known sky, PSF, zero point; and of real CAFOS frames."""

from pathlib import Path

import numpy as np
import pytest

from cumbre.core.errors import BadFileError, NotFoundError, NoWorkFoundError, UnprocessableDataError
from cumbre.core.geometry import pixel_from_sky, sky_from_pixel
from cumbre.core.instrument import load_instrument
from cumbre.payloads import calibration
from cumbre.payloads.calibrate import calibrate
from cumbre.payloads.calibration import Calibrations
from cumbre.payloads.coadd import make_template
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.isr import assemble_and_correct
from cumbre.payloads.kernels.match import match_images
from cumbre.payloads.kernels.wcs import PlaneWcs
from cumbre.payloads.raw import read_raw
from cumbre.payloads.refcat import RefCat

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared test data are not here")
ZERO_POINT = 29.7
FWHM = 2.4


@pytest.fixture(scope="module")
def democam():
    return load_instrument("democam")


@pytest.fixture(scope="module")
def sky():
    """Stars of 1.4 deg around (60, -30)."""
    rng = np.random.default_rng(20)
    n = 15000
    ra = 60 + rng.uniform(-0.7, 0.7, n) / np.cos(np.radians(30))
    dec = -30 + rng.uniform(-0.7, 0.7, n)
    mag = 22 - rng.exponential(1.3, n)
    return RefCat(ra, dec, {"r": np.clip(mag, 14.5, 23)})


def observe(
    democam, sky, seed, *, ra=60.0, dec=-30.0, rotpa=15.0, detector=3, sky_level=900.0, fwhm=FWHM, dim=0.0
):
    """An image after ISR; the true pointing may differ from what its metadata say (set by the caller)."""
    rng = np.random.default_rng(seed)
    chip = democam.detector(detector)
    x, y = pixel_from_sky(democam, chip, ra, dec, rotpa, sky.ra, sky.dec)
    flux = 10 ** (-0.4 * (sky.magnitudes["r"] + dim - ZERO_POINT))
    image = np.zeros((1024, 1024))
    inside = (x > -15) & (x < 1039) & (y > -15) & (y < 1039)
    s = fwhm / 2.3548
    for px, py, f in zip(x[inside], y[inside], flux[inside], strict=True):
        x0, x1, y0, y1 = (
            max(int(px) - 14, 0),
            min(int(px) + 15, 1024),
            max(int(py) - 14, 0),
            min(int(py) + 15, 1024),
        )
        if x1 <= x0 or y1 <= y0:
            continue
        gx = np.exp(-0.5 * ((np.arange(x0, x1) - px) / s) ** 2)
        gy = np.exp(-0.5 * ((np.arange(y0, y1) - py) / s) ** 2)
        image[y0:y1, x0:x1] += f / (2 * np.pi * s * s) * gy[:, None] * gx[None, :]
    yy, xx = np.mgrid[0:1024, 0:1024]
    image += sky_level * (1 + 0.05 * xx / 1024 - 0.03 * (yy / 1024) ** 2)
    variance = image + 36
    image = image + rng.normal(0, 1, image.shape) * np.sqrt(variance)
    mask = np.zeros(image.shape, np.uint16)
    mask[image > 84000] = MaskPlane.SAT
    meta = {
        "obs_id": "test",
        "detector": detector,
        "band": "r",
        "ra_deg": ra,
        "dec_deg": dec,
        "rotpa_deg": rotpa,
        "gain": 1.5,
    }
    exposure = Exposure(image.astype(np.float32), variance.astype(np.float32), mask, metadata=meta)
    return exposure, x, y, flux


@pytest.fixture(scope="module")
def calibrated(democam, sky):
    exposure, x, y, flux = observe(democam, sky, 1)
    exposure.metadata["ra_deg"] += 0.02
    exposure.metadata["dec_deg"] -= 0.015
    exposure.metadata["rotpa_deg"] += 0.15
    rng = np.random.default_rng(3)
    hits = rng.integers(20, 1000, (2, 80))
    exposure.image[hits[1], hits[0]] += 3000
    return calibrate(exposure, sky, instrument=democam), x, y, flux, hits, exposure


def test_wcs_zero_point_psf_and_metrics(democam, calibrated):
    result, _, _, _, hits, before = calibrated
    chip = democam.detector(3)
    gx, gy = np.meshgrid(np.linspace(10, 1013, 9), np.linspace(10, 1013, 9))
    truth = sky_from_pixel(democam, chip, 60.0, -30.0, 15.0, gx, gy)
    px, py = result.wcs.sky2pix(*truth)
    assert np.max(np.hypot(px - gx, py - gy)) < 0.1
    assert result.metrics["astrometric_rms_arcsec"] < 0.05
    assert result.zero_point == pytest.approx(ZERO_POINT, abs=0.01)
    assert result.zero_point_err < 0.003
    assert result.psf.fwhm_px == pytest.approx(FWHM, rel=0.03)
    m = result.metrics
    assert m["seeing_arcsec"] == pytest.approx(FWHM * 0.6, rel=0.03)
    assert m["pointing_offset_arcsec"] == pytest.approx(83, abs=8)
    assert m["sky_electrons"] == pytest.approx(900 * 1.015, rel=0.02)
    # 5 sigma of a Gaussian PSF over 4 pi sigma^2 pixels of sky noise
    area = 4 * np.pi * (FWHM / 2.3548) ** 2
    assert m["m5"] == pytest.approx(ZERO_POINT - 2.5 * np.log10(5 * np.sqrt(area * (914 + 36))), abs=0.06)
    assert m["aperture_correction"] == pytest.approx(1, abs=0.02)
    assert result.is_background_subtracted
    assert abs(np.median(result.image)) < 1.5
    struck = (result.mask[hits[1], hits[0]] & MaskPlane.CR) > 0
    assert struck.mean() > 0.9
    assert not before.is_background_subtracted
    assert before.wcs is None
    assert "stars" not in before.metadata


def test_star_table_matches_truth(sky, calibrated):
    result, x, y, flux, *_ = calibrated
    stars = result.metadata["stars"]
    known = stars["ref_index"] >= 0
    assert known.sum() > 100
    ref = stars["ref_index"][known]
    assert np.hypot(stars["x"][known] - x[ref], stars["y"][known] - y[ref]).max() < 2.5
    good = known & stars["isolated"] & (stars["bits"] == 0)
    ratio = stars["flux"][good] / flux[stars["ref_index"][good]]
    assert np.median(ratio) == pytest.approx(1, abs=0.01)
    assert np.allclose(sky.dec[ref], stars["dec"][known], atol=1e-3)


def test_badly_wrong_pointing_is_solved_blind(democam, sky):
    # half a turn about the boresight moves this detector by another 0.24 deg
    wild = democam.model_copy(update={"pointing_error_deg": 0.6})
    exposure, *_ = observe(democam, sky, 5)
    exposure.metadata.update(ra_deg=60.3, dec_deg=-30.2, rotpa_deg=15.0 + 171.0)
    result = calibrate(exposure, sky, instrument=wild)
    ra, dec = sky_from_pixel(democam, democam.detector(3), 60.0, -30.0, 15.0, 100.0, 900.0)
    px, py = result.wcs.sky2pix(ra, dec)
    assert np.hypot(px - 100, py - 900) < 0.2


@pytest.mark.parametrize("offset_deg", [30 / 3600, 0.5])
def test_pointing_off_by_any_known_amount_is_solved(democam, sky, offset_deg):
    exposure, *_ = observe(democam, sky, 6)
    exposure.metadata["dec_deg"] += offset_deg
    result = calibrate(exposure, sky, instrument=democam)
    assert result.metrics["pointing_offset_arcsec"] == pytest.approx(3600 * offset_deg, rel=0.02)
    assert result.metrics["astrometric_rms_arcsec"] < 0.05
    assert result.zero_point == pytest.approx(ZERO_POINT, abs=0.03)


def test_outcomes_of_hopeless_images(democam, sky):
    exposure, *_ = observe(democam, sky, 2)
    empty = np.random.default_rng(1).normal(900, 30, (1024, 1024)).astype(np.float32)
    blank = Exposure(empty, np.full_like(empty, 900), exposure.mask, metadata=exposure.metadata)
    with pytest.raises(NoWorkFoundError):
        calibrate(blank, sky, instrument=democam)
    elsewhere = RefCat(sky.ra + 40, sky.dec, sky.magnitudes)
    with pytest.raises(NoWorkFoundError, match="reference stars within"):
        calibrate(exposure, elsewhere, instrument=democam)
    rng = np.random.default_rng(7)
    shuffled = RefCat(rng.permutation(sky.ra), sky.dec, sky.magnitudes)
    with pytest.raises(UnprocessableDataError, match=r"test detector 3.*do not match"):
        calibrate(exposure, shuffled, instrument=democam)
    alone = calibrate(exposure, None, instrument=democam)
    assert np.isnan(alone.zero_point)
    assert alone.wcs is not None


def test_reference_catalogue_file(tmp_path, sky):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "ref.parquet"
    pq.write_table(pa.table({"ra": sky.ra, "dec": sky.dec, "mag_r": sky.magnitudes["r"]}), path)
    part = RefCat.load(path, (60.0, -30.0), 0.2)
    from astropy.coordinates import SkyCoord

    far = SkyCoord(sky.ra, sky.dec, unit="deg").separation(SkyCoord(60, -30, unit="deg")).deg
    assert len(part) == (far <= 0.2).sum()
    assert len(RefCat.load(path)) == 15000
    with pytest.raises(NotFoundError):
        RefCat.load(tmp_path / "none.parquet")
    pq.write_table(pa.table({"ra": sky.ra}), path)
    with pytest.raises(BadFileError):
        RefCat.load(path)


def test_template_of_dithered_images(democam, sky):
    visits = []
    for seed, (dra, ddec, rot, dim) in enumerate(
        [(0, 0, 15, 0), (0.01, 0.004, 16, 0.3), (-0.008, -0.006, 15.3, 0.1)]
    ):
        exposure, *_ = observe(democam, sky, 50 + seed, ra=60 + dra, dec=-30 + ddec, rotpa=rot, dim=dim)
        visits.append(calibrate(exposure, sky, instrument=democam))
    visits[1].image[500:503, 400:900] += 2500  # a trail in one of them
    centre = visits[0].wcs.pix2sky(511.5, 511.5)
    target = PlaneWcs.linear(
        float(centre[0]), float(centre[1]), 449.5, 449.5, [[-0.6 / 3600, 0], [0, 0.6 / 3600]]
    )
    template = make_template(visits, target, (900, 900))
    assert template.zero_point == pytest.approx(27.0)
    assert template.metrics["coverage"] > 0.95
    x, y = target.sky2pix(sky.ra, sky.dec)
    bright = (
        (x > 30) & (x < 870) & (y > 30) & (y < 870) & (sky.magnitudes["r"] < 20) & (sky.magnitudes["r"] > 17)
    )
    from cumbre.payloads.kernels.photometry import forced_psf_photometry

    got = forced_psf_photometry(
        template.image,
        template.variance,
        template.mask,
        template.psf,
        x[bright],
        y[bright],
        bad_bits=MaskPlane.unusable(),
    )
    truth = 10 ** (-0.4 * (sky.magnitudes["r"][bright] - 27.0))
    ratio = (got.flux / truth)[np.isfinite(got.flux)]
    assert np.median(ratio) == pytest.approx(1, abs=0.02)
    tx, ty = target.sky2pix(*visits[1].wcs.pix2sky(np.arange(450.0, 850.0, 10), np.full(40, 501.0)))
    on_trail = template.image[ty.round().astype(int), tx.round().astype(int)]
    noise = np.sqrt(np.median(template.variance))
    assert np.median(np.abs(on_trail)) < 4 * noise
    sigma = 1.4826 * np.median(np.abs(template.image - np.median(template.image)))
    assert sigma < 1.1 * noise
    with pytest.raises(NoWorkFoundError):
        make_template([], target, (900, 900))


@needs_data
def test_cafos_raw_to_calibrated():
    """NGC 2420: the stars of two frames agree, and the rising moonlit sky vanishes."""
    cafos = load_instrument("cafos")
    folder = DATA / "raw_cafos"
    bias = calibration.combine_bias([read_raw(p, cafos) for p in sorted((folder / "calib/bias").glob("*"))])
    assert np.median(bias) == pytest.approx(672, abs=2)
    for band, first, second in (("B", 26, 27), ("V", 31, 32)):
        flats = [read_raw(p, cafos) for p in sorted((folder / f"calib/flat/{band}").glob("*"))]
        flat = calibration.combine_flat(flats, bias)
        frames = []
        for number in (first, second):
            raw = read_raw(folder / f"science/NGC2420/{band}/uamA_{number:04d}.fits.bz2", cafos)
            exposure = assemble_and_correct(raw, Calibrations(bias=bias, flat=flat))
            frames.append(calibrate(exposure, None, instrument=cafos))
        for frame in frames:
            assert 1.5 < frame.metrics["seeing_arcsec"] < 3.5
            assert frame.metrics["n_stars"] > 50
            blank = frame.image[100:900, 100:900]
            assert abs(np.median(blank)) < 0.1 * frame.metrics["sky_noise_electrons"]
        if band == "V":
            levels = [f.metrics["sky_electrons"] for f in frames]
            assert 1.02 < levels[1] / levels[0] < 1.07
        a, b = (f.metadata["stars"] for f in frames)
        match = match_images(a["x"], a["y"], b["x"], b["y"])
        assert match is not None
        assert match.n > 100
        fa, fb = a[match.first], b[match.second]
        clean = (
            fa["isolated"]
            & fb["isolated"]
            & (fa["bits"] == 0)
            & (fb["bits"] == 0)
            & (fa["snr"] > 50)
            & (fb["snr"] > 50)
        )
        ratio = -2.5 * np.log10(fb["flux"] / fa["flux"])[clean]
        assert clean.sum() > 30
        assert abs(np.median(ratio)) < 0.06
        assert 1.4826 * np.median(np.abs(ratio - np.median(ratio))) < 0.03
