"""Instrument signature removal: known effects put in must come out; real frames must be clean."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cumbre.core.errors import BadFileError, NotFoundError, UnprocessableDataError
from cumbre.core.header import translate
from cumbre.core.instrument import load_instrument
from cumbre.payloads import calibration
from cumbre.payloads.calibration import Calibrations
from cumbre.payloads.exposure import MaskPlane
from cumbre.payloads.isr import assemble_and_correct, detector_planes
from cumbre.payloads.kernels import cosmic_rays, isr
from cumbre.payloads.raw import RawDetector, read_raw

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared test data are not here")

HEADER = {
    "OBSID": "XC_O_20261120_000012", "IMGTYPE": "OBJECT", "FILTER": "r_demo", "EXPTIME": 30.0, "DARKTIME": 30.0,
    "DATE-BEG": "2026-11-21T03:00:00", "DATE-END": "2026-11-21T03:00:30", "RA": 60.0, "DEC": -30.0, "ROTPA": 0.0,
    "CHIPID": "R00_S00",
}  # fmt: skip


@pytest.fixture(scope="module")
def democam():
    return load_instrument("democam")


def read_out(instrument, electrons, rng, *, bias_shape=0.0, noise=True, **header):
    """What the electronics make of electrons per pixel: the effects applied one by one, in float."""
    detector = instrument.detectors[0]
    n = len(detector.amplifiers)
    parts = []
    for a in detector.amplifiers:
        part = electrons[a.detector_box.slices] / a.gain
        parts.append(part[:: -1 if a.flip_y else 1, :: -1 if a.flip_x else 1])
    arrays = []
    for k, a in enumerate(detector.amplifiers):
        linear = parts[k] + sum(detector.crosstalk[k][m] * parts[m] for m in range(n))
        measured = linear.copy()
        for _ in range(30):  # true = m + c2 m^2, solved for m
            measured = linear - a.linearity[0] * measured**2
        raw = np.zeros((512, a.overscan_box.x1))
        raw[a.raw_box.slices] = measured
        rows = 3 * np.sin(np.arange(512) / 120)
        raw += a.bias_level + rows[:, None]
        raw[a.raw_box.slices] += bias_shape * np.arange(512)[:, None] / 512
        if noise:
            raw += rng.normal(0, a.read_noise / a.gain, raw.shape)
        arrays.append(np.clip(np.round(raw), 0, 65535).astype(np.uint16))
    meta = translate(instrument, [{**HEADER, **header}], "test")
    return RawDetector(arrays, {}, detector, instrument, meta, "test.fits")


def test_every_effect_is_undone(democam):
    rng = np.random.default_rng(5)
    yy, xx = np.mgrid[0:1024, 0:1024]
    light = 3000 + 2.0 * xx + 1.0 * yy
    light[300:320, 600:640] = 70000
    response = (1 - 0.3 * ((xx - 511) ** 2 + (yy - 511) ** 2) / 511**2 / 2).astype(np.float32)
    bias = calibration.combine_bias(
        [read_out(democam, np.zeros((1024, 1024)), rng, bias_shape=8, IMGTYPE="BIAS") for _ in range(7)]
    )
    flat = calibration.combine_flat(
        [read_out(democam, 30000 * response, rng, bias_shape=8, IMGTYPE="FLAT") for _ in range(3)], bias
    )
    assert np.std(flat / response * np.median(response) - 1) < 0.001
    exposure = assemble_and_correct(
        read_out(democam, light * response, rng, bias_shape=8), Calibrations(bias=bias, flat=flat)
    )
    truth = light * np.median(response)
    residual = exposure.image - truth
    assert abs(np.median(residual)) < 2
    assert (
        np.abs(
            [
                np.median(residual[y : y + 128, x : x + 128])
                for y in range(0, 1024, 128)
                for x in range(0, 1024, 128)
            ]
        ).max()
        < 6
    )
    assert np.std(residual / np.sqrt(exposure.variance)) < 1  # no photon noise was put in
    # crosstalk of the 70,000 electron block: 5 electrons in the neighbouring amplifier, gone
    ghost = residual[300:320, 256 + (600 - 512) : 256 + (640 - 512)]
    assert abs(ghost.mean() - np.median(residual)) < 1.0


def test_dark_current_and_variance(democam):
    rng = np.random.default_rng(11)
    warm = np.full((1024, 1024), 2.0)  # electrons per second
    warm[:, 512:] = 6.0
    dark = calibration.combine_dark(
        [read_out(democam, 100 * warm, rng, IMGTYPE="DARK", EXPTIME=0.0, DARKTIME=100.0) for _ in range(5)],
        None,
    )
    assert np.median(dark[:, :512]) == pytest.approx(2.0, abs=0.02)
    light = rng.poisson(1500 + 30 * warm).astype(float)
    exposure = assemble_and_correct(read_out(democam, light, rng), Calibrations(dark=dark))
    for half in (np.s_[:, :512], np.s_[:, 512:]):
        assert np.median(exposure.image[half]) == pytest.approx(1500, abs=3)
        # the dark's own photons stay in the variance
        assert np.var(exposure.image[half] - 1500) == pytest.approx(
            np.mean(exposure.variance[half]), rel=0.03
        )


def test_each_gain_and_the_whole_matrix_of_crosstalk(democam):
    rng = np.random.default_rng(12)
    detector = democam.detectors[0]
    n = len(detector.amplifiers)
    matrix = rng.uniform(-2e-3, 4e-3, (n, n)) * (1 - np.eye(n))
    amplifiers = tuple(
        a.model_copy(update={"gain": 1.0 + 0.1 * k}) for k, a in enumerate(detector.amplifiers)
    )
    other = detector.model_copy(
        update={"amplifiers": amplifiers, "crosstalk": tuple(tuple(row) for row in matrix.tolist())}
    )
    camera = democam.model_copy(update={"detectors": (other, *democam.detectors[1:])})
    light = rng.uniform(100, 40000, (1024, 1024))
    exposure = assemble_and_correct(read_out(camera, light, rng, noise=False))
    # without noise the overscan is whole counts: up to one count, times the gains, is left
    assert np.abs(exposure.image - light).max() < 7
    assert np.abs(exposure.image - light).mean() < 2
    without = camera.model_copy(update={"detectors": (other.model_copy(update={"crosstalk": ()}),)})
    raw = read_out(camera, light, rng, noise=False)
    wrong = assemble_and_correct(RawDetector(raw.amplifiers, {}, without.detectors[0], without, raw.metadata))
    assert np.abs(wrong.image - light).max() > 100


def test_crosstalk_of_another_detector_goes_when_its_file_is_there(democam, tmp_path):
    from cumbre.capture.raw_fits import raw_fits_bytes

    rng = np.random.default_rng(13)
    victim, source = democam.detectors[0], democam.detectors[1]
    n = len(victim.amplifiers)
    matrix = rng.uniform(0, 3e-3, (n, n))
    none = ((0.0,) * n,) * n
    coupled = victim.model_copy(
        update={"crosstalk": none, "crosstalk_from": {source.name: tuple(map(tuple, matrix.tolist()))}}
    )
    silent = source.model_copy(update={"crosstalk": none})
    camera = democam.model_copy(update={"detectors": (coupled, silent)})
    bright = np.full((1024, 1024), 100.0)
    bright[300:340, 200:900] = 50000
    first = democam.model_copy(update={"detectors": (silent,)})
    elsewhere = read_out(first, bright, rng, CHIPID=source.name)
    counts = [
        (bright[a.detector_box.slices] / a.gain)[:: -1 if a.flip_y else 1, :: -1 if a.flip_x else 1]
        for a in source.amplifiers
    ]
    light = np.full((1024, 1024), 1000.0)
    for k, a in enumerate(coupled.amplifiers):
        ghost = sum(matrix[k][m] * counts[m] for m in range(n)) * a.gain
        light[a.detector_box.slices] += ghost[:: -1 if a.flip_y else 1, :: -1 if a.flip_x else 1]
    raw = read_out(camera, light, rng)
    paths = [tmp_path / f"image_{name}.fits" for name in (victim.name, source.name)]
    here = replace(raw, path=str(paths[0]))
    alone = assemble_and_correct(here)
    assert alone.image[300:340].max() - np.median(alone.image) > 60
    assert f"no file of {source.name}" in alone.metadata["problems"][-1]
    header = {**HEADER, "CHIPID": source.name, "DETECTOR": source.id}
    cards = [{"name": key, "value": value, "comment": ""} for key, value in header.items()]
    paths[1].write_bytes(raw_fits_bytes(source, np.stack(elsewhere.amplifiers), cards))
    both = assemble_and_correct(here)
    assert both.metadata["problems"] == raw_problems(raw)
    assert np.abs(both.image - 1000).max() < 8 * 1.5 * victim.amplifiers[0].read_noise
    assert abs(np.median(both.image[300:340]) - np.median(both.image[500:540])) < 0.6


def raw_problems(raw):
    return list(raw.metadata.problems)


def fringes(phase=0.0):
    yy, xx = np.mgrid[0:1024, 0:1024]
    return 0.02 * np.sin(xx / 9 + 6 * np.sin(yy / 130) + phase)


def test_the_fringe_frame_finds_its_own_strength(democam):
    rng = np.random.default_rng(14)
    pattern = fringes().astype(np.float32)

    def sky_of(level, stars=60):
        light = level * (1 + pattern.astype(float))
        for x, y, flux in zip(
            rng.uniform(9, 1015, stars),
            rng.uniform(9, 1015, stars),
            rng.uniform(1e4, 1e5, stars),
            strict=True,
        ):
            yy, xx = np.mgrid[int(y) - 8 : int(y) + 9, int(x) - 8 : int(x) + 9]
            light[yy, xx] += flux / 25.1 * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / 8)
        return rng.poisson(light).astype(float)

    made = calibration.combine_fringe(
        [
            assemble_and_correct(read_out(democam, sky_of(level), rng))
            for level in (4000, 5000, 6000, 7000, 8000)
        ]
    )
    inner = np.s_[50:-50, 50:-50]
    made, truth = made[inner].ravel(), pattern[inner].ravel()
    assert (made * truth).sum() / (truth**2).sum() == pytest.approx(1, abs=0.03)
    assert np.std(made - truth) < 1.1 * 1.25 / np.sqrt(5 * 5800)  # the photon noise of a median of five
    light = sky_of(3000.0)
    before = assemble_and_correct(read_out(democam, light, rng))
    after = assemble_and_correct(read_out(democam, light, rng), Calibrations(fringe=pattern))
    assert after.metrics["fringe_electrons"] == pytest.approx(3000, rel=0.02)

    def left(exposure):
        flat = exposure.image - np.median(exposure.image)
        faint = np.abs(flat) < 300
        return abs(np.mean(flat[faint] * pattern[faint]) / np.mean(pattern[faint] ** 2))

    assert left(before) > 2500
    assert left(after) < 60
    blank = assemble_and_correct(
        read_out(democam, rng.poisson(np.full((1024, 1024), 3000.0)).astype(float), rng),
        Calibrations(fringe=pattern),
    )
    assert abs(blank.metrics["fringe_electrons"]) < 30
    with pytest.raises(UnprocessableDataError, match="five or more"):
        calibration.combine_fringe([before])


def test_saturation_is_flagged_and_grown(democam):
    light = np.full((1024, 1024), 1000.0)
    light[100, 100] = 1e6
    light[900, 300] = 1e6
    exposure = assemble_and_correct(read_out(democam, light, np.random.default_rng(1)))
    saturated = (exposure.mask & MaskPlane.SAT) > 0
    assert saturated[99:102, 99:102].all()
    assert saturated[899:902, 299:302].all()
    assert saturated.sum() == 18
    assert exposure.metadata["exposure_s"] == 30
    assert exposure.metadata["mjd_mid_tai"] == pytest.approx(61365.125 + 15 / 86400, abs=1e-9)


def test_overscan_spline_follows_drift_and_ignores_hit_rows():
    rng = np.random.default_rng(2)
    drift = 1000 + 4 * np.sin(np.arange(512) / 90)
    pixels = drift[:, None] + rng.normal(0, 4, (512, 30))
    pixels[77] += 300
    level = isr.overscan_level(pixels.astype(np.float32))
    assert np.std(level - drift) < 0.5
    assert np.std(isr.overscan_level(pixels.astype(np.float32), "rows")[:70] - drift[:70]) > 0.6


def test_defects_and_calibration_files(tmp_path, democam):
    rng = np.random.default_rng(3)
    flat = rng.normal(1, 0.005, (1024, 1024)).astype(np.float32)
    flat[:, 500] = 0.3
    flat[10, 20] = 2.0
    defects = calibration.find_defects(flat=flat)
    assert defects[:, 500].all()
    assert defects[10, 20]
    assert defects.sum() == 1025
    both = Calibrations(flat=flat, defects=defects, metadata={"band": "r", "n_flat": 3})
    both.save(tmp_path / "c.fits")
    again = Calibrations.load(tmp_path / "c.fits")
    assert np.array_equal(again.flat, flat)
    assert np.array_equal(again.defects, defects)
    assert again.bias is None
    assert again.metadata["n_flat"] == 3
    exposure = assemble_and_correct(read_out(democam, np.full((1024, 1024), 2000.0), rng), again)
    assert ((exposure.mask[:, 500] & MaskPlane.BAD) > 0).all()
    assert abs(np.median(exposure.image[:, 500]) - 2000) < 20
    assert ((exposure.mask[:, 500] & MaskPlane.INTRP) > 0).all()
    with pytest.raises(NotFoundError):
        Calibrations.load(tmp_path / "none.fits")
    (tmp_path / "bad.fits").write_bytes(b"x" * 5000)
    with pytest.raises(BadFileError):
        Calibrations.load(tmp_path / "bad.fits")
    with pytest.raises(UnprocessableDataError, match="shape"):
        assemble_and_correct(
            read_out(democam, np.zeros((1024, 1024)), rng), Calibrations(bias=np.zeros((5, 5), np.float32))
        )


def test_calibrations_refuse_wrong_frames(democam):
    rng = np.random.default_rng(3)
    dark_room = read_out(democam, np.zeros((1024, 1024)), rng, IMGTYPE="FLAT")
    with pytest.raises(UnprocessableDataError, match="electrons"):
        calibration.combine_flat([dark_room])
    with pytest.raises(UnprocessableDataError, match="no frames"):
        calibration.combine_bias([])
    dark = calibration.combine_dark([read_out(democam, np.full((1024, 1024), 60.0), rng)], None)
    assert np.median(dark) == pytest.approx(2.0, abs=0.05)


def test_cosmic_rays_are_found_and_stars_kept():
    rng = np.random.default_rng(8)
    image = np.zeros((400, 400))
    yy, xx = np.mgrid[0:400, 0:400]
    for x, y, f in zip(
        rng.uniform(10, 390, 150), rng.uniform(10, 390, 150), 10 ** rng.uniform(2.5, 5.5, 150), strict=True
    ):
        for fwhm, part in ((2.2, 0.9), (4.5, 0.1)):
            s = fwhm / 2.3548
            image += part * f / (2 * np.pi * s * s) * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * s * s))
    rays = np.zeros_like(image, bool)
    for _ in range(60):
        x, y, t, n = rng.uniform(15, 385), rng.uniform(15, 385), rng.uniform(0, np.pi), rng.integers(1, 12)
        for k in range(n):
            rays[int(y + k * np.sin(t)), int(x + k * np.cos(t))] = True
    variance = image + 300
    noisy = image + rng.normal(0, 1, image.shape) * np.sqrt(variance)
    noisy[rays] += rng.uniform(300, 3000, rays.sum())
    found, cleaned = cosmic_rays.find_cosmic_rays(
        noisy.astype(np.float32), variance.astype(np.float32), contrast=cosmic_rays.star_contrast(2.2)
    )
    assert found[rays].mean() > 0.93
    from scipy.ndimage import binary_dilation

    assert (found & ~binary_dilation(rays, np.ones((3, 3)))).sum() < 15
    assert np.median(np.abs(cleaned - image)[rays]) < 60


@needs_data
def test_kast_two_amplifiers_become_one():
    kast = load_instrument("kast_blue")
    folder = DATA / "raw_kast_blue"
    frames = [read_raw(folder / f"b{n}.fits.gz", kast) for n in (21, 22, 23)]
    for start, level in ((2050, 945), (2082, 966)):
        assert np.median(frames[0].amplifiers[0][:, start : start + 28]) == pytest.approx(level, abs=4)
    bias = calibration.combine_bias(frames)
    assert abs(np.median(bias[:, :1024]) - np.median(bias[:, 1024:])) < 2
    planes = [detector_planes(frame, in_adu=True)[0] for frame in frames[:2]]
    noise = np.std((planes[0] - planes[1])[20:-20], axis=None) / np.sqrt(2)
    assert noise == pytest.approx(3.0, abs=0.4)
    flat_raw = read_raw(folder / "b12.fits.gz", kast)
    flat = calibration.combine_flat([flat_raw], bias)
    flattened = assemble_and_correct(flat_raw, Calibrations(bias=bias, flat=flat)).image
    assert np.median(flattened[:, 1004:1024]) == pytest.approx(np.median(flattened[:, 1024:1044]), rel=0.003)
    science = assemble_and_correct(read_raw(folder / "b27.fits.gz", kast), Calibrations(bias=bias))
    # a broad sky line peaks at the join: compare beside it; the raw step is 25 electrons
    left, right = np.median(science.image[:, 1005:1015]), np.median(science.image[:, 1031:1041])
    assert abs(left - right) < 2
    found, _ = cosmic_rays.find_cosmic_rays(
        science.image - np.median(science.image, axis=0), science.variance
    )
    assert 50 < found.sum() < 5000
    star = assemble_and_correct(read_raw(folder / "b24.fits.gz", kast), Calibrations(bias=bias)).image
    trace = np.argmax(np.median(star[:, 900:1100], axis=1))
    assert np.median(star[trace, 900:1100]) > 20 * np.median(star[:, 900:1100])
