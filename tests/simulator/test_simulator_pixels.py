"""Raw pixels against the truth they were made from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cumbre.core.errors import UserError
from cumbre.core.geometry import separation_deg
from cumbre.core.time import SECONDS_PER_DAY
from cumbre.simulator import profiles
from cumbre.simulator import sky as sky_module
from cumbre.simulator.catalogue import Tile, make_catalogue
from cumbre.simulator.chip import chip, raw_shape
from cumbre.simulator.preparation import calibration_requests, render_epochs, template_requests
from cumbre.simulator.refcat import reference_catalogue
from cumbre.simulator.render import LAMP_E_S, electrons, expected_electrons, render
from cumbre.simulator.sky import ASTEROID, STAR, Sky
from cumbre.simulator.truth import detector_truth

SEED = 5


def trimmed_adu(raw, detector):
    """Overscan-subtracted, assembled image in ADU."""
    image = np.zeros(detector.shape)
    for index, a in enumerate(detector.amplifiers):
        part = raw[index][a.raw_box.slices].astype(float)
        part -= np.median(raw[index][a.overscan_box.slices], axis=1)[:, None]
        image[a.detector_box.slices] = part[:: -1 if a.flip_y else 1, :: -1 if a.flip_x else 1]
    return image


def test_same_arguments_same_bits(democam, sky, exposure):
    detector = democam.detectors[1]
    first = render(democam, detector, exposure, sky, SEED)
    render(democam, democam.detectors[0], replace(exposure, obs_id="XC_O_20261109_000002"), sky, SEED)
    assert np.array_equal(first, render(democam, detector, exposure, sky, SEED))
    assert first.dtype == np.uint16
    assert first.shape == raw_shape(detector) == (8, 512, 292)
    assert not np.array_equal(first, render(democam, detector, exposure, sky, SEED + 1))


def test_unknown_image_type_is_refused(democam, sky, exposure):
    with pytest.raises(UserError, match="expected one of OBJECT"):
        render(democam, democam.detectors[0], replace(exposure, image_type="SPECTRUM"), sky, SEED)


def test_bias_has_its_level_and_read_noise(democam, sky, exposure):
    detector = democam.detectors[0]
    a, b = (
        render(
            democam,
            detector,
            replace(exposure, obs_id=f"XC_O_20261109_00001{k}", image_type="BIAS"),
            sky,
            SEED,
        )
        for k in (0, 1)
    )
    for index, amplifier in enumerate(detector.amplifiers):
        assert np.median(a[index]) == pytest.approx(amplifier.bias_level, abs=12)
        difference = a[index].astype(float) - b[index]
        difference -= np.median(difference, axis=1)[:, None]
        # Rounding to whole ADU adds 1/12 to each variance.
        noise = np.sqrt(difference.var() / 2 - 1 / 12) * amplifier.gain
        assert noise == pytest.approx(amplifier.read_noise, rel=0.02)


def test_flat_pair_gives_the_gain(democam, sky, exposure):
    """Photon transfer: variance of a difference of flats / 2 = signal / gain."""
    detector = democam.detectors[2]
    pair = [
        trimmed_adu(
            render(
                democam, detector,
                replace(exposure, obs_id=f"XC_O_20261109_00002{k}", image_type="FLAT", exposure_s=2.0), sky, SEED,
            ), detector,
        )
        for k in (0, 1)
    ]  # fmt: skip
    good = ~chip(democam, detector, SEED).defects
    for amplifier in detector.amplifiers:
        p, q = (frame[amplifier.detector_box.slices][good[amplifier.detector_box.slices]] for frame in pair)
        level = 0.5 * (np.median(p) + np.median(q))
        difference = p / np.median(p) - q / np.median(q)
        low, high = np.percentile(difference, [0.5, 99.5])
        kept = difference[(difference > low) & (difference < high)]
        variance = kept.var() / 2 * level**2 / 0.9226  # the part of a normal variance inside 1 % clipping
        gain = level / (variance - (amplifier.read_noise / amplifier.gain) ** 2)
        assert gain == pytest.approx(amplifier.gain, rel=0.05)
        assert level * amplifier.gain == pytest.approx(2.0 * LAMP_E_S, rel=0.15)


def test_photon_noise_is_poisson(democam, sky, exposure):
    detector = democam.detectors[0]
    flat = replace(exposure, image_type="FLAT", exposure_s=0.01)  # 60 electrons: skewness is visible
    mean = expected_electrons(democam, detector, flat, sky, SEED)
    counts = electrons(democam, detector, flat, sky, SEED)
    good = ~chip(democam, detector, SEED).defects & (counts < mean + 8 * np.sqrt(mean))
    pull = ((counts - mean) / np.sqrt(mean))[good]
    assert pull.mean() == pytest.approx(0, abs=0.005)
    assert pull.std() == pytest.approx(1, abs=0.01)
    assert (pull**3).mean() == pytest.approx(1 / np.sqrt(60), rel=0.15)


def one_star_sky(sky, democam, exposure, mags, detector):
    """A sky of single stars on a grid of one detector."""
    from cumbre.core.geometry import sky_from_pixel

    n = len(mags)
    x = 120.0 + 190.0 * (np.arange(n) % 5) + 0.37
    y = 150.0 + 180.0 * (np.arange(n) // 5) + 0.21
    ra, dec = sky_from_pixel(democam, detector, exposure.ra, exposure.dec, exposure.rotpa, x, y)
    stars = {key: value[:n].copy() for key, value in sky.tables["stars"].items()}
    stars |= {"ra": ra, "dec": dec, "variable_kind": np.zeros(n, np.int8)}
    stars |= {f"mag_{band}": np.array(mags, float) for band in "gri"}
    empty = {name: {k: v[:0] for k, v in table.items()} for name, table in sky.tables.items()}
    return Sky(empty | {"stars": stars}, observatory=sky.observatory, seed=SEED, tiles=[]), x, y


def test_aperture_sum_of_a_star_is_its_flux(democam, sky, exposure):
    detector = democam.detectors[3]
    mags = np.linspace(15.8, 19.5, 20)
    single, x, y = one_star_sky(sky, democam, exposure, mags, detector)
    image = expected_electrons(democam, detector, exposure, single, SEED)
    fixed = chip(democam, detector, SEED)
    light = single.light(democam, detector, exposure)
    image = (image - fixed.dark_e_s * 30) / np.maximum(fixed.response, 1e-3) - light.background_e
    yy, xx = np.mgrid[: detector.ny, : detector.nx]
    good = ~fixed.defects
    order = np.argsort(light.sources.x + 2000 * np.round(light.sources.y / 100))
    assert np.allclose(np.sort(light.sources.x[order]), np.sort(x), atol=1e-3)
    for k in range(20):
        inside = np.hypot(xx - x[k], yy - y[k]) < 14
        if not good[inside].all():
            continue
        nearest = np.hypot(light.sources.x - x[k], light.sources.y - y[k]).argmin()
        want = light.sources.flux_e[nearest]
        throughput = single.weather.throughput(exposure.mid_tai, "r", light.airmass)
        assert want == pytest.approx(30 * 10 ** (-0.4 * (mags[k] - 26.0)) * throughput, rel=1e-9)
        assert image[inside].sum() == pytest.approx(want, rel=0.006)
        centre = (image * xx)[inside].sum() / image[inside].sum()
        assert centre == pytest.approx(x[k], abs=0.03)


def test_raw_star_photometry_within_noise(democam, sky, exposure):
    detector = democam.detectors[0]
    single, x, y = one_star_sky(sky, democam, exposure, np.full(20, 17.5), detector)
    image = trimmed_adu(render(democam, detector, exposure, single, SEED), detector)
    fixed = chip(democam, detector, SEED)
    gain = np.zeros(detector.shape)
    for a in detector.amplifiers:
        gain[a.detector_box.slices] = a.gain
    image = (image + np.float64(-1.5e-7) * image**2) * gain / np.maximum(fixed.response, 1e-3)
    yy, xx = np.mgrid[: detector.ny, : detector.nx]
    light = single.light(democam, detector, exposure)
    pulls = []
    for k in range(20):
        distance = np.hypot(xx - x[k], yy - y[k])
        aperture, ring = distance < 7, (distance > 14) & (distance < 40)
        if fixed.defects[distance < 8].any():
            continue
        background = np.median(image[ring])
        flux = image[aperture].sum() - background * aperture.sum()
        want = light.sources.flux_e.max()
        noise = np.sqrt(want + aperture.sum() * (background + 40) * (1 + aperture.sum() / ring.sum()))
        pulls.append((flux / 0.985 - want) / noise)  # about 1.5 % of a Moffat's light is outside
    assert abs(np.median(pulls)) < 1.5
    assert len(pulls) > 14


def test_crosstalk_and_nonlinearity_are_there(democam, sky, exposure):
    """A saturated star leaves its ghost in the neighbouring amplifier, at the same place of the read-out."""
    detector = democam.detectors[0]
    strong = detector.model_copy(
        update={
            "crosstalk": tuple(tuple(0.0 if i == j else 2e-3 for j in range(8)) for i in range(8)),
            "amplifiers": tuple(a.model_copy(update={"linearity": (-2e-6,)}) for a in detector.amplifiers),
        }
    )
    instrument = democam.model_copy(update={"detectors": (strong,)})
    single, x, y = one_star_sky(sky, instrument, exposure, [13.5], strong)
    raw = render(instrument, strong, exposure, single, SEED)
    signal = [raw[k].astype(float) - np.median(raw[k]) for k in range(8)]
    j, i = int(y[0]), int(x[0]) + 4
    assert strong.amplifiers[0].detector_box.x1 > x[0]
    patch = (slice(j - 1, j + 2), slice(i - 1, i + 2))
    ghost = np.mean([signal[k][patch].mean() for k in range(1, 8)])
    assert ghost == pytest.approx(2e-3 * signal[0][patch].mean(), rel=0.15)
    # true = m − 2e-6·m²: the measured value is larger than the true one.
    lamp = replace(exposure, image_type="FLAT", exposure_s=8.0)
    mean_e = np.median(expected_electrons(instrument, strong, lamp, single, SEED)[:512, :256])
    measured = np.median(trimmed_adu(render(instrument, strong, lamp, single, SEED), strong)[:512, :256])
    gains = [a.gain for a in strong.amplifiers]
    true = mean_e / gains[0] + 2e-3 * sum(mean_e / g for g in gains[1:])  # the others' crosstalk is in it
    assert measured > 1.03 * true
    assert measured - 2e-6 * measured**2 == pytest.approx(true, rel=0.003)


def test_bright_star_bleeds_along_its_column_and_keeps_its_charge(democam, sky, exposure):
    detector = democam.detectors[1]
    single, x, y = one_star_sky(sky, democam, exposure, [11.5], detector)
    raw = render(democam, detector, exposure, single, SEED)
    amplifier = detector.amplifiers[0]
    column = raw[0][:, round(x[0]) + amplifier.raw_box.x0]
    row = raw[0][round(y[0]), :]
    assert (column > amplifier.saturation).sum() > 3 * (row > amplifier.saturation).sum()
    clean = expected_electrons(democam, detector, exposure, single, SEED)
    full = electrons(democam, detector, exposure, single, SEED)
    assert full[:512, :256].sum() == pytest.approx(clean[:512, :256].sum(), rel=2e-3)


def test_psf_sum_of_gaussians_is_a_moffat():
    weights, variances = profiles.moffat()
    assert weights.sum() == pytest.approx(1)
    radius = np.linspace(0, 3, 200)
    value = (weights / (2 * np.pi * variances) * np.exp(-0.5 * radius[:, None] ** 2 / variances)).sum(axis=1)
    assert np.interp(0.5, radius, value) / value[0] == pytest.approx(0.5, abs=0.01)
    alpha = 0.5 / np.sqrt(2 ** (1 / profiles.MOFFAT_BETA) - 1)
    true = (1 + (radius / alpha) ** 2) ** -profiles.MOFFAT_BETA
    assert np.abs(value / value[0] - true).max() < 0.02


@pytest.mark.parametrize("profile", [profiles.exponential, profiles.de_vaucouleurs])
def test_galaxy_profiles_hold_half_their_light_in_the_half_light_radius(profile):
    weights, variances = profile()
    inside = (weights * (1 - np.exp(-0.5 / variances))).sum()
    assert inside == pytest.approx(0.5, abs=0.05)


def test_counts_are_those_of_the_sky(catalogue, democam):
    from cumbre.core.geometry import field_radius_deg

    area = np.pi * (field_radius_deg(democam) + 0.03) ** 2
    stars = (catalogue["stars"]["mag_r"] < 22).sum() / area
    assert 1500 < stars < 3500
    galaxies = catalogue["galaxies"]["mag_r"]
    ratio = ((galaxies > 22) & (galaxies < 23)).sum() / ((galaxies > 20) & (galaxies < 21)).sum()
    assert ratio == pytest.approx(10**0.7, rel=0.35)
    assert (catalogue["stars"]["variable_kind"] > 0).any()
    ids = np.concatenate([table["id"] for table in catalogue.values()])
    assert np.unique(ids).size == ids.size


def test_supernovae_lie_in_their_hosts_and_appear_only_now(catalogue, sky):
    table = catalogue["supernovae"]
    galaxies = catalogue["galaxies"]
    row = np.searchsorted(galaxies["id"], table["host"])
    distance = separation_deg(table["ra"], table["dec"], galaxies["ra"][row], galaxies["dec"][row]) * 3600
    assert np.median(distance / galaxies["disc_arcsec"][row]) < 1.5
    index = np.arange(table["id"].size)
    tonight = sky.magnitudes("supernovae", index, "r", sky.start_tai)
    assert tonight.min() > 18.0
    assert tonight.max() < 22.2
    assert np.isinf(sky.magnitudes("supernovae", index, "r", sky.start_tai - 30 * SECONDS_PER_DAY)).all()


def test_asteroids_move_like_the_main_belt(observatory, democam, tiles, sky):
    from cumbre.core.configuration import Simulator

    crowded = make_catalogue(
        config=Simulator(seed=9, asteroids_per_deg2=600.0),
        observatory=observatory, instrument=democam, tiles=[Tile("E", 40.0, 15.0)], start_tai=sky.start_tai,
    )  # fmt: skip
    many = Sky(crowded, observatory=observatory, seed=9, tiles=[], start_tai=sky.start_tai)
    now, later = many._moving("r", sky.start_tai), many._moving("r", sky.start_tai + 3600)
    rate = separation_deg(now["ra"], now["dec"], later["ra"], later["dec"]) * 24
    assert now["id"].size > 50
    assert ((rate > 0.05) & (rate < 0.6)).mean() > 0.97
    assert separation_deg(now["ra"], now["dec"], 40.0, 15.0).max() < 0.5
    assert ((crowded["asteroids"]["a_au"] > 2.1) & (crowded["asteroids"]["a_au"] < 3.35)).all()
    assert crowded["asteroids"]["e"].max() < 0.35


def test_truth_of_a_detector(democam, sky, exposure):
    total = 0
    for detector in democam.detectors:
        truth = detector_truth(democam, detector, exposure, sky, SEED)
        total += truth["id"].size
        assert set(truth["kind"]) <= {"variable", "supernova", "asteroid"}
        supernova = truth["kind"] == "supernova"
        assert np.allclose(truth["delta_flux_e"][supernova], truth["flux_e"][supernova])
        from cumbre.core.geometry import sky_from_pixel

        ra, dec = sky_from_pixel(democam, detector, exposure.ra, exposure.dec, 0.0, truth["x"], truth["y"])
        assert separation_deg(ra, dec, truth["ra"], truth["dec"]).max(initial=0) * 3600 < 1e-3
    assert total > 10


def test_templates_take_their_part_of_the_difference(democam, sky, exposure, catalogue, observatory, tiles):
    import copy

    from cumbre.simulator.lightcurves import variable_offset_mag

    other = copy.copy(sky)
    other.template_tai = {("T001", "r"): [sky.start_tai - 40 * SECONDS_PER_DAY]}
    stars = catalogue["stars"]
    seen = 0
    for detector in democam.detectors:
        plain = detector_truth(democam, detector, exposure, sky, SEED)
        truth = detector_truth(democam, detector, exposure, other, SEED)
        supernova = truth["kind"] == "supernova"
        assert np.all(truth["snr"][supernova] < plain["snr"][supernova])
        assert np.all(truth["snr"][supernova] > 0.6 * plain["snr"][supernova])
        for k in np.flatnonzero(truth["kind"] == "variable"):
            row = int(np.searchsorted(stars["id"], truth["id"][k]))
            then, now = (
                variable_offset_mag(
                    *(stars[c][row] for c in ("variable_kind", "period_days", "amplitude_mag", "phase")), t
                )
                for t in (other.template_tai["T001", "r"][0], exposure.mid_tai)
            )
            want = truth["flux_e"][k] * (1 - 10 ** (-0.4 * (then - now)))
            assert truth["delta_flux_e"][k] == pytest.approx(want, rel=1e-6)
            seen += 1
    assert seen > 2


def test_expected_snr_is_what_photometry_of_the_pixels_gives(democam, sky, exposure):
    """Scatter of matched-filter photometry of equal stars = flux / snr."""
    detector = democam.detectors[0]
    single, x, y = one_star_sky(sky, democam, exposure, np.full(20, 20.5), detector)
    single.tables["stars"]["variable_kind"][:] = 1
    single.tables["stars"]["amplitude_mag"][:] = 0.0
    truth = detector_truth(democam, detector, exposure, single, SEED)
    psf = single.psf(democam, detector, exposure)
    weights, variances = profiles.moffat()
    yy, xx = np.mgrid[-9:10, -9:10]
    fixed = chip(democam, detector, SEED)
    fluxes, expected = [], []
    for k in range(8):
        request = replace(exposure, obs_id=f"XC_O_20261109_0001{k:02d}")
        image = electrons(democam, detector, request, single, SEED) / np.maximum(fixed.response, 1e-3)
        for px, py in zip(x, y, strict=True):
            column, row = round(px), round(py)
            box = (slice(row - 9, row + 10), slice(column - 9, column + 10))
            if fixed.defects[box].any():
                continue
            c = variances * psf.fwhm_px**2 + profiles.PIXEL_VARIANCE
            r2 = (xx - (px - column)) ** 2 + (yy - (py - row)) ** 2
            p = (weights / (2 * np.pi * c) * np.exp(-0.5 * r2[..., None] / c)).sum(axis=-1)
            stamp = image[box] - np.median(image[row - 25 : row + 26, column - 25 : column + 26])
            if np.abs(stamp - p * 4000).max() < 2000:  # no cosmic ray
                fluxes.append((stamp * p).sum() / (p * p).sum())
                expected.append(truth["snr_image"][np.hypot(truth["x"] - px, truth["y"] - py).argmin()])
    scatter = 1.4826 * np.median(np.abs(fluxes - np.median(fluxes)))
    assert np.median(fluxes) / scatter == pytest.approx(np.median(expected), rel=0.25)


def test_reference_catalogue_errors(catalogue):
    table = reference_catalogue(catalogue["stars"], 5)
    assert np.all(np.diff(table["ra"]) >= 0)
    assert table["mag_r"].max() < 20.6
    truth = catalogue["stars"]
    row = np.searchsorted(truth["id"], table["id"])
    d_dec = (table["dec"] - truth["dec"][row]) * 3.6e6
    assert d_dec.std() == pytest.approx(5.0, rel=0.15)
    assert (table["mag_r"] - truth["mag_r"][row]).std() == pytest.approx(0.01, rel=0.15)


def test_frames_before_the_night(democam, sky):
    requests = calibration_requests(democam, sky.start_tai, biases=1, flats=1)
    requests += template_requests(democam, sky, epochs=1, exposure_s=5.0)
    frames = list(render_epochs(democam, requests, sky, seed=SEED))
    assert len(frames) == 3 * 4
    assert [f.exposure.image_type for f in frames[::4]] == ["BIAS", "FLAT", "OBJECT"]
    assert [f.detector.id for f in frames[:4]] == [0, 1, 2, 3]
    assert np.array_equal(frames[5].raw, render(democam, frames[5].detector, frames[5].exposure, sky, SEED))
    assert requests[-1].begin_tai < sky.start_tai - 26 * SECONDS_PER_DAY
    assert len({r.obs_id for r in requests}) == len(requests)


def test_asteroid_kinds_have_motion(sky, democam, exposure):
    found = [sky.sources(democam, d, exposure) for d in democam.detectors]
    rates = np.concatenate([np.hypot(s.rate_x, s.rate_y)[s.kind == ASTEROID] for s in found])
    stars = np.concatenate([np.hypot(s.rate_x, s.rate_y)[s.kind == STAR] for s in found])
    assert not stars.any()
    if rates.size:
        assert rates.min() * 0.6 * 24 > 0.05  # arcsec/s · 24 = deg/day
    assert sky_module.KIND_NAMES[ASTEROID] == "asteroid"
