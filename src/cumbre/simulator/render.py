"""Raw pixels of one detector: sky and lamp, sensor, electronics.

The order is nature's: light through optics and PSF, photon noise, cosmic rays, saturation with bleeding, then
amplifier by amplifier crosstalk, non-linearity, bias, read noise, conversion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import UserError
from cumbre.core.geometry import focal_plane_from_pixel
from cumbre.core.instrument import Detector, Instrument
from cumbre.simulator import profiles
from cumbre.simulator.chip import Chip, chip, field_position, raw_shape
from cumbre.simulator.exposure import ExposureRequest
from cumbre.simulator.randomness import generator
from cumbre.simulator.sky import Component

if TYPE_CHECKING:
    from cumbre.simulator.sky import Light, Sky

IMAGE_TYPES = ("OBJECT", "BIAS", "DARK", "FLAT")
LAMP_E_S = 6000.0
"""Electrons per pixel and second of the flat-field lamp, before the filter's few per cent."""
EXACT_POISSON_BELOW_E = 30.0
COSMIC_RAYS_CM2_MIN = 3.0
TRAIL_PROBABILITY = 0.05
"""Satellite trails per exposure and field."""
GLINT_PROBABILITY = 0.03
"""Tumbling satellites per exposure and field: each leaves a row of flashes."""


def expected_electrons(
    instrument: Instrument, detector: Detector, exposure: ExposureRequest, sky: Sky, seed: int
) -> NDArray[np.float32]:
    """Mean electrons of every pixel before any noise: light × response + dark; shape (ny, nx)."""
    fixed = chip(instrument, detector, seed)
    if exposure.image_type == "BIAS":
        return np.zeros(detector.shape, np.float32)
    if exposure.image_type == "FLAT":
        lamp = generator(seed, "lamp", exposure.obs_id).normal(1.0, 0.01)
        image = np.full(detector.shape, LAMP_E_S * lamp * exposure.exposure_s, np.float32)
    elif exposure.image_type == "DARK":
        image = np.zeros(detector.shape, np.float32)
    elif exposure.image_type == "OBJECT":
        image = _sky_image(instrument, detector, exposure, sky, seed)
    else:
        raise UserError(f"image type {exposure.image_type!r}: expected one of {', '.join(IMAGE_TYPES)}")
    image *= fixed.response
    image += fixed.dark_e_s * np.float32(exposure.exposure_s)
    return image


def _sky_image(
    instrument: Instrument, detector: Detector, exposure: ExposureRequest, sky: Sky, seed: int
) -> NDArray[np.float32]:
    """Electrons of sky background, sources and satellite trails on a perfect sensor."""
    light = sky.light(instrument, detector, exposure)
    background = light.background_e
    image = np.full(detector.shape, background, np.float32)
    _add_sources(instrument, detector, image, light)
    _add_trail(image, detector, exposure, light, seed)
    _add_glints(instrument, detector, exposure, image, light, seed)
    return image


def glints(detector: Detector, exposure: ExposureRequest, light: Light, seed: int) -> NDArray[np.float64]:
    """Flashes of a tumbling satellite on one detector: (n, 3) x, y in pixels, electrons; part of the truth."""
    rng = generator(seed, "glints", exposure.obs_id)
    if rng.uniform() >= GLINT_PROBABILITY:
        return np.zeros((0, 3))
    number, angle = int(rng.integers(6, 15)), rng.uniform(0, 2 * np.pi)
    # in the focal plane, about a place near the middle: one satellite crosses all detectors on its way
    step_mm = rng.uniform(0.3, 2.0)
    along = (np.arange(number) - number / 2) * step_mm
    start = rng.uniform(-8, 8, 2)
    x_mm, y_mm = start[0] + along * np.cos(angle), start[1] + along * np.sin(angle)
    noise = np.sqrt(light.background_e * light.psf.effective_pixels())
    flux = noise * 10 ** rng.uniform(1.3, 2.0) * rng.uniform(0.7, 1.3, number)
    x0, y0 = (float(value) for value in focal_plane_from_pixel(detector, 0.0, 0.0))
    turn = np.deg2rad(detector.angle_deg)
    dx, dy = (x_mm - x0) / detector.pixel_mm, (y_mm - y0) / detector.pixel_mm
    x, y = dx * np.cos(turn) + dy * np.sin(turn), -dx * np.sin(turn) + dy * np.cos(turn)
    inside = (x > -0.5) & (y > -0.5) & (x < detector.nx - 0.5) & (y < detector.ny - 0.5)
    return np.asarray(np.column_stack([x, y, flux])[inside])


def _add_glints(
    instrument: Instrument, detector: Detector, exposure: ExposureRequest, image: NDArray[np.float32], light: Light, seed: int
) -> None:  # fmt: skip
    """Add the flashes of the exposure, if it has some: short ones, of the shape of stars."""
    rows = glints(detector, exposure, light, seed)
    if len(rows):
        x, y, flux = rows.T
        unit = np.array([1.0])
        points = Component(x, y, flux, np.zeros((len(rows), 3)))
        _add_component(instrument, detector, image, light, points, (unit, unit))


def _add_trail(
    image: NDArray[np.float32], detector: Detector, exposure: ExposureRequest, light: Light, seed: int
) -> None:
    """Add the satellite trail of the exposure, if it has one."""
    from cumbre.simulator import kernels

    trail = generator(seed, "trail", exposure.obs_id)
    if trail.uniform() < TRAIL_PROBABILITY:
        angle, offset_mm = trail.uniform(0, np.pi), trail.uniform(-15, 15)
        brightness = 10 ** trail.uniform(1.8, 3.5)
        angle_px = angle - np.deg2rad(detector.angle_deg)
        cx, cy = focal_plane_from_pixel(detector, 0.0, 0.0)
        across_mm = offset_mm - (-float(cx) * np.sin(angle) + float(cy) * np.cos(angle))
        across = across_mm / detector.pixel_mm
        kernels.add_trail(
            image,
            -across * np.sin(angle_px),
            across * np.cos(angle_px),
            np.cos(angle_px),
            np.sin(angle_px),
            brightness,
            0.5 * light.psf.fwhm_px,
        )


def trail_light(
    detector: Detector, exposure: ExposureRequest, light: Light, seed: int
) -> NDArray[np.float32]:
    """Electrons of the satellite trail alone, shape (ny, nx): part of the truth."""
    image = np.zeros(detector.shape, np.float32)
    _add_trail(image, detector, exposure, light, seed)
    return image


def _add_sources(
    instrument: Instrument, detector: Detector, image: NDArray[np.float32], light: Light
) -> None:
    """Add every source, in order of the catalogue."""
    unit = np.array([1.0])
    _add_component(instrument, detector, image, light, light.points, (unit, unit))
    _add_component(instrument, detector, image, light, light.discs, profiles.exponential())
    _add_component(instrument, detector, image, light, light.bulges, profiles.de_vaucouleurs())


def _add_component(
    instrument: Instrument,
    detector: Detector,
    image: NDArray[np.float32],
    light: Light,
    component: Component,
    profile: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> None:
    """Add sources of one profile (weights and variances of its Gaussians)."""
    from cumbre.simulator import kernels

    if component.x.size == 0:
        return
    psf_weights, psf_variances = profiles.moffat()
    faint = 0.2 * np.sqrt(max(light.background_e, 25.0))
    u, v = field_position(instrument, detector, component.x, component.y)
    kernels.add_light(
        image, component.x, component.y, component.flux_e, component.shape, light.psf.unit_covariance(u, v),
        *profile, psf_weights, psf_variances, profiles.PIXEL_VARIANCE, faint,
    )  # fmt: skip


def add_cosmic_rays(
    image: NDArray[np.float32], detector: Detector, seconds: float, rng: np.random.Generator
) -> None:
    """Muons that cross the silicon, and slow electrons that wander in it."""
    from cumbre.simulator import kernels

    area_cm2 = image.size * (detector.pixel_mm / 10) ** 2
    thickness_px = 0.1 / detector.pixel_mm
    for _ in range(int(rng.poisson(COSMIC_RAYS_CM2_MIN * area_cm2 * seconds / 60))):
        x, y = rng.uniform(0, detector.nx), rng.uniform(0, detector.ny)
        direction = rng.uniform(0, 2 * np.pi)
        if rng.uniform() < 0.8:
            # cos² law of zenith angles on a horizontal sensor: tan of the angle sets the track's length.
            tangent = np.sqrt(1 / max(rng.uniform(), 1e-3) ** 0.5 - 1)
            length = min(thickness_px * tangent + 0.5, 400.0)
            deposit = 80 * 1000 * 0.1 * np.sqrt(1 + tangent**2) / length
            steps = max(int(length * 3), 2)
            charges = deposit * length / steps * rng.lognormal(0, 0.3, steps)
            kernels.add_track(
                image,
                x,
                y,
                np.cos(direction) * length / steps,
                np.sin(direction) * length / steps,
                charges,
            )
        else:
            for _ in range(int(rng.integers(8, 40))):
                direction += rng.normal(0, 0.6)
                dx, dy = 0.8 * np.cos(direction), 0.8 * np.sin(direction)
                kernels.add_track(image, x, y, dx, dy, np.array([rng.lognormal(6.0, 0.5)]))
                x, y = x + dx, y + dy


def electrons(
    instrument: Instrument, detector: Detector, exposure: ExposureRequest, sky: Sky, seed: int
) -> NDArray[np.float32]:
    """Electrons in every pixel when the shutter has closed, noise, cosmic rays and bleeding included."""
    from cumbre.simulator import kernels

    fixed = chip(instrument, detector, seed)
    image, rng = _exposed(instrument, detector, exposure, sky, seed)
    if exposure.image_type == "BIAS":
        return image
    add_cosmic_rays(image, detector, exposure.exposure_s + instrument.readout_s, rng)
    for index, amplifier in enumerate(detector.amplifiers):
        kernels.bleed(image, *amplifier.detector_box, fixed.full_well_e[index])
    return image


def _exposed(
    instrument: Instrument, detector: Detector, exposure: ExposureRequest, sky: Sky, seed: int
) -> tuple[NDArray[np.float32], np.random.Generator]:
    """Electrons with photon noise, and the generator of what comes after."""
    from cumbre.simulator import kernels

    rng = generator(seed, "pixels", exposure.obs_id, detector.name)
    image = expected_electrons(instrument, detector, exposure, sky, seed)
    if exposure.image_type == "BIAS":
        return image, rng
    low = np.float32(EXACT_POISSON_BELOW_E)
    dim = np.flatnonzero(image.reshape(-1) <= low)
    kernels.photon_noise(image, rng.standard_normal(image.shape, dtype=np.float32), low)
    if dim.size:
        image.reshape(-1)[dim] = rng.poisson(image.reshape(-1)[dim])
    return image, rng


def particle_tracks(
    instrument: Instrument, detector: Detector, exposure: ExposureRequest, sky: Sky, seed: int
) -> NDArray[np.float32]:
    """Electrons that particles left on the sensor, shape (ny, nx): part of the truth."""
    _, rng = _exposed(instrument, detector, exposure, sky, seed)
    tracks = np.zeros(detector.shape, np.float32)
    add_cosmic_rays(tracks, detector, exposure.exposure_s + instrument.readout_s, rng)
    return tracks


def _offset(fixed: Chip, exposure: ExposureRequest, seed: int, detector: Detector) -> NDArray[np.float32]:
    """Bias of this exposure: structure, slow drift with time, row noise common to an amplifier."""
    n, ny, _ = fixed.bias.shape
    rng = generator(seed, "offset", exposure.obs_id, detector.name)
    phase = generator(seed, "drift", detector.name).uniform(0, 2 * np.pi, n)
    drift = 3.0 * np.sin(2 * np.pi * exposure.begin_tai / 14400.0 + phase) + rng.normal(0, 0.7, n)
    # Random walk that forgets after about 100 rows: what the overscan of each row is for.
    kicks = rng.normal(0, 0.08, (n, ny))
    rows = np.empty((n, ny))
    rows[:, 0] = rng.normal(0, 0.5, n)
    for j in range(1, ny):
        rows[:, j] = 0.99 * rows[:, j - 1] + kicks[:, j]
    level = (drift[:, None] + rows)[:, :, None].astype(np.float32)
    return np.asarray(fixed.bias + level, np.float32)


def render(
    instrument: Instrument, detector: Detector, exposure: ExposureRequest, sky: Sky, seed: int
) -> NDArray[np.uint16]:
    """Raw array of one detector, the same for the same arguments bit for bit.

    Returns
    -------
    uint16 of shape (n_amp, ny_raw, nx_raw)
        In the order of ``detector.amplifiers``, as the DAQ store keeps it.

    Raises
    ------
    UserError
        Unknown image type or filter, or amplifiers of different raw sizes.
    """
    from cumbre.simulator import kernels

    fixed = chip(instrument, detector, seed)
    image = electrons(instrument, detector, exposure, sky, seed)
    shape = raw_shape(detector)
    height, width = fixed.data_shape[:, 1].max(), fixed.data_shape[:, 0].max()
    signal = np.zeros((shape[0], height, width), np.float32)
    for index, amplifier in enumerate(detector.amplifiers):
        part = image[amplifier.detector_box.slices]
        part = part[:: -1 if amplifier.flip_y else 1, :: -1 if amplifier.flip_x else 1]
        np.multiply(
            part, np.float32(1.0 / fixed.gain[index]), out=signal[index, : part.shape[0], : part.shape[1]]
        )
    noise = generator(seed, "read", exposure.obs_id, detector.name).standard_normal(shape, dtype=np.float32)
    raw = np.empty(shape, np.uint16)
    kernels.read_out(
        signal,
        _offset(fixed, exposure, seed, detector),
        noise,
        fixed.read_noise_adu,
        fixed.data_box,
        fixed.data_shape,
        fixed.coupling,
        fixed.linearity,
        raw,
    )
    return raw
