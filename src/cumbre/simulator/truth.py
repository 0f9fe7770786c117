"""What really was variable in one exposure: the answer book of the night report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.instrument import Detector, Instrument
from cumbre.simulator.catalogue import FIRST_ID, Table, write_table
from cumbre.simulator.chip import chip
from cumbre.simulator.exposure import ExposureRequest
from cumbre.simulator.profiles import PIXEL_VARIANCE, Psf, moffat
from cumbre.simulator.sky import ASTEROID, KIND_NAMES, STAR, SUPERNOVA, VARIABLE, Sky, Sources, band_magnitude

EDGE_PX = 8.0


def truth_path(site_root: Path, obs_id: str) -> Path:
    """Where the truth of one exposure is in a site's folder."""
    return site_root / "simulator" / f"truth_{obs_id}.parquet"


@dataclass(frozen=True, slots=True)
class _Templates:
    """The template visits of a field.

    Attributes
    ----------
    visits
        An exposure request for each.
    weights
        Their parts of the mean, sum 1: by the noise of their skies, in units of one flux.
    variance
        Of a pixel of the mean, electrons² of the exposure in question.
    """

    visits: list[ExposureRequest]
    weights: NDArray[np.float64]
    variance: float


def _templates(
    instrument: Instrument, detector: Detector, exposure: ExposureRequest, sky: Sky, response: float, read_noise_e: float
) -> _Templates:  # fmt: skip
    here, visits, variances = _throughput(instrument, exposure, sky), [], []
    for mid_tai in sky.templates(exposure.ra, exposure.dec, instrument.filter(exposure.filter).band):
        visit = replace(exposure, begin_tai=mid_tai - 0.5 * exposure.exposure_s)
        scale = here / _throughput(instrument, visit, sky)
        variances.append(
            scale**2 * (sky.background_e(instrument, detector, visit) * response + read_noise_e**2)
        )
        visits.append(visit)
    if not visits:
        return _Templates([], np.zeros(0), 0.0)
    weights = 1.0 / np.array(variances)
    return _Templates(visits, weights / weights.sum(), float(1.0 / weights.sum()))


def _template_fluxes(
    sky: Sky,
    templates: _Templates,
    band: str,
    ids: NDArray[np.int64],
    kind: NDArray[np.int8],
    now: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Flux in each template visit, relative to magnitude ``now``, (visits, n); 0 where there was nothing."""
    out = np.zeros((max(len(templates.visits), 1), ids.size))
    for which, name in ((VARIABLE, "stars"), (SUPERNOVA, "supernovae")):
        chosen = np.flatnonzero(kind == which)
        if chosen.size == 0:
            continue
        rows = ids[chosen] - FIRST_ID[name]
        if templates.visits:
            mags = np.array([sky.magnitudes(name, rows, band, visit.mid_tai) for visit in templates.visits])
            out[:, chosen] = 10 ** (-0.4 * (mags - now[chosen]))
        elif which == VARIABLE:
            # No template is known: the mean brightness stands for it.
            table = {key: value[rows] for key, value in sky.tables[name].items()}
            out[:, chosen] = 10 ** (-0.4 * (band_magnitude(table, band) - now[chosen]))
    return out


def _throughput(instrument: Instrument, exposure: ExposureRequest, sky: Sky) -> float:
    air = sky.weather.airmass(exposure.mid_tai, exposure.ra, exposure.dec)
    return sky.weather.throughput(exposure.mid_tai, instrument.filter(exposure.filter).band, air)


def _light_of_others(
    psf: Psf, x: NDArray[np.float64], y: NDArray[np.float64], sources: Sources, full: float
) -> NDArray[np.float64]:
    """Electrons that stars bright enough to saturate put into the pixel at each place, other than a source at it."""
    bright = (sources.kind == STAR) & (sources.flux_e * psf.peak_fraction() > 0.5 * full)
    r2 = (x[:, None] - sources.x[bright]) ** 2 + (y[:, None] - sources.y[bright]) ** 2
    weights, variances = moffat()
    profile = np.zeros_like(r2)
    for weight, variance in zip(weights, variances, strict=True):
        total = variance * psf.fwhm_px**2 + PIXEL_VARIANCE
        profile += weight / (2 * np.pi * total) * np.exp(-r2 / (2 * total))
    return np.asarray((profile * sources.flux_e[bright]).sum(axis=1))


def detector_truth(
    instrument: Instrument, detector: Detector, exposure: ExposureRequest, sky: Sky, seed: int
) -> dict[str, NDArray[Any]]:
    """Variables, supernovae and asteroids on one detector.

    Returns
    -------
    dict of arrays
        ``id``, ``kind`` (word), ``ra``, ``dec`` (degrees), ``x``, ``y`` (pixels), ``detector``, ``band``,
        ``mag``, ``flux_e`` and ``delta_flux_e`` (electrons of the exposure at full response; against the mean
        of the template visits, each by the noise of its sky), ``snr_image`` (whole flux in this image), ``snr``
        (|delta| in the difference: PSF photometry on the noise of this image and of the mean of the template
        visits), ``usable`` (8 pixels inside, no defect within one pixel, not saturated in the image or a template
        visit).
    """
    band = instrument.filter(exposure.filter).band
    light = sky.light(instrument, detector, exposure)
    s = light.sources
    chosen = np.flatnonzero(
        np.isin(s.kind, (VARIABLE, SUPERNOVA, ASTEROID))
        & (s.x > -0.5)
        & (s.x < detector.nx - 0.5)
        & (s.y > -0.5)
        & (s.y < detector.ny - 0.5)
    )
    ids, kind, mag, flux = s.id[chosen], s.kind[chosen], s.mag[chosen], s.flux_e[chosen]
    x, y = s.x[chosen], s.y[chosen]
    fixed = chip(instrument, detector, seed)
    column, row = np.rint(x).astype(int), np.rint(y).astype(int)
    response = np.array(
        [
            np.median(fixed.response[max(j - 3, 0) : j + 4, max(i - 3, 0) : i + 4])
            for i, j in zip(column, row, strict=True)
        ]
    )
    defect = np.array(
        [
            fixed.defects[max(j - 1, 0) : j + 2, max(i - 1, 0) : i + 2].any()
            for i, j in zip(column, row, strict=True)
        ],
        bool,
    )
    read_noise = float(np.mean([a.read_noise for a in detector.amplifiers]))
    pixels = light.psf.effective_pixels()
    background = light.background_e * response + read_noise**2
    signal = flux * response
    templates = _templates(
        instrument, detector, exposure, sky, float(np.median(fixed.response[::16, ::16])), read_noise
    )
    before = flux * _template_fluxes(sky, templates, band, ids, kind, mag)
    delta = flux - (templates.weights @ before if templates.visits else before[0])
    image_variance = pixels * background + signal
    template_variance = pixels * templates.variance
    full = float(fixed.full_well_e.min())
    inside = (x > EDGE_PX) & (x < detector.nx - 1 - EDGE_PX) & (y > EDGE_PX) & (y < detector.ny - 1 - EDGE_PX)
    # a change on a star that saturates there can not be measured any more than the star itself
    others = _light_of_others(light.psf, x, y, s, full)
    saturated = signal * light.psf.peak_fraction() + background + others > 0.95 * full
    for visit, there in zip(templates.visits, before, strict=False):
        psf = sky.psf(instrument, detector, visit)
        part = psf.peak_fraction()
        scale = _throughput(instrument, visit, sky) / _throughput(instrument, exposure, sky)
        level = sky.background_e(instrument, detector, visit) * response
        others = scale * _light_of_others(psf, x, y, s, full)
        saturated |= scale * there * response * part + level + others > 0.95 * full
    return {
        "id": ids,
        "kind": np.array([KIND_NAMES[k] for k in kind], dtype=object),
        "ra": s.ra[chosen],
        "dec": s.dec[chosen],
        "x": x,
        "y": y,
        "detector": np.full(chosen.size, detector.id, np.int32),
        "band": np.array([band] * chosen.size, dtype=object),
        "mag": mag,
        "flux_e": flux,
        "delta_flux_e": delta,
        "snr_image": signal / np.sqrt(image_variance),
        "snr": np.abs(delta) * response / np.sqrt(image_variance + template_variance),
        "usable": inside & ~defect & ~saturated,
    }


def write_truth(path: Path, instrument: Instrument, exposure: ExposureRequest, sky: Sky, seed: int) -> Table:
    """Write the truth of every detector of one exposure; dark and lamp frames have none (empty table)."""
    import pyarrow as pa

    parts = (
        [detector_truth(instrument, d, exposure, sky, seed) for d in instrument.detectors]
        if exposure.is_open
        else []
    )
    if parts:
        table = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        arrow = {
            key: pa.array(value, pa.string()) if value.dtype == object else value
            for key, value in table.items()
        }
        write_table(arrow, path, {"obs_id": exposure.obs_id, "mid_tai": repr(exposure.mid_tai)})
        return table
    return {}
