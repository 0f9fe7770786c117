"""Weather and sky brightness: deterministic functions of (seed, time), whatever the order of calls.

Slow quantities are first-order autoregressive series, one for each observing day, drawn whole from a generator
of their own and interpolated. Moonlight follows Krisciunas and Schaefer (1991, PASP 103, 1033).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cumbre.core.configuration import Observatory
from cumbre.core.geometry import airmass, horizontal_from_sky, separation_deg, sidereal_deg
from cumbre.core.time import SECONDS_PER_DAY, day_obs_from_tai, day_obs_start_tai
from cumbre.simulator import ephemeris
from cumbre.simulator.randomness import generator

STEP_S = 120.0
_STEPS = int(SECONDS_PER_DAY / STEP_S) + 2
DARK_SKY_MAG = {"u": 22.8, "g": 22.1, "r": 21.1, "i": 20.3, "z": 19.5, "y": 18.6}
"""Moonless zenith, AB magnitudes per square arc second."""
EXTINCTION_MAG = {"u": 0.45, "g": 0.18, "r": 0.10, "i": 0.07, "z": 0.06, "y": 0.10}
"""Magnitudes per air mass."""
MOON_COLOUR = {"u": 1.6, "g": 1.4, "r": 0.9, "i": 0.5, "z": 0.3, "y": 0.2}
"""Moonlight of a band relative to V, both as flux density."""
WAVELENGTH_NM = {"u": 360.0, "g": 475.0, "r": 625.0, "i": 755.0, "z": 870.0, "y": 1000.0}


@dataclass(frozen=True, slots=True)
class Conditions:
    """Weather at one time; what a weather station and a seeing monitor would say.

    Attributes
    ----------
    seeing_arcsec
        FWHM at zenith and 500 nm.
    transparency
        Part of the light that clouds and aerosols let through, beyond normal extinction.
    sky_mag
        Zenith, r band, AB magnitudes per square arc second, moon and twilight included.
    """

    seeing_arcsec: float
    transparency: float
    airtemp_c: float
    pressure_hpa: float
    humidity_percent: float
    wind_speed_m_s: float
    wind_direction_deg: float
    sky_mag: float

    def as_dict(self) -> dict[str, float]:
        """Names and values, for headers and telemetry."""
        return asdict(self)


@lru_cache(maxsize=256)
def _series(seed: int, day_obs: int, name: str, correlation_s: float) -> NDArray[np.float64]:
    """Stationary AR(1) series of one observing day: mean 0, variance 1, step ``STEP_S``."""
    rng = generator(seed, "weather", name, day_obs)
    memory = np.exp(-STEP_S / correlation_s)
    kicks = rng.normal(0, np.sqrt(1 - memory**2), _STEPS)
    out = np.empty(_STEPS)
    state = rng.normal()
    for k in range(_STEPS):
        out[k] = state = memory * state + kicks[k]
    return out


class Weather:
    """The weather of one site."""

    def __init__(self, observatory: Observatory, seed: int) -> None:
        self.observatory = observatory
        self.seed = seed

    def _value(self, name: str, tai_s: float, correlation_s: float) -> float:
        day = day_obs_from_tai(tai_s)
        position = (tai_s - day_obs_start_tai(day)) / STEP_S
        series = _series(self.seed, day, name, correlation_s)
        return float(np.interp(position, np.arange(_STEPS), series))

    def seeing_arcsec(self, tai_s: float) -> float:
        """FWHM at zenith and 500 nm: log-normal, median 1.05 arc seconds, telescope and dome included."""
        return float(np.clip(1.05 * np.exp(0.16 * self._value("seeing", tai_s, 2400.0)), 0.85, 1.6))

    def transparency(self, tai_s: float) -> float:
        """Clear most of the time; thin cirrus when the series is high."""
        return float(np.exp(-0.01 - 0.10 * max(self._value("cirrus", tai_s, 5400.0) - 0.8, 0.0)))

    def psf_fwhm_arcsec(self, tai_s: float, band: str, air: float) -> float:
        """FWHM of star images: seeing × airmass^0.6 × (wavelength / 500 nm)^-0.2."""
        colour = (WAVELENGTH_NM.get(band, 500.0) / 500.0) ** -0.2
        return float(self.seeing_arcsec(tai_s) * air**0.6 * colour)

    def throughput(self, tai_s: float, band: str, air: float) -> float:
        """Part of the light above the atmosphere that reaches the telescope."""
        return self.transparency(tai_s) * float(10 ** (-0.4 * EXTINCTION_MAG.get(band, 0.1) * air))

    def sky_mag(self, tai_s: float, band: str, ra: float, dec: float) -> float:
        """Sky brightness towards (ra, dec): AB magnitudes per square arc second."""
        o = self.observatory
        altitude = float(horizontal_from_sky(tai_s, o.latitude_deg, o.longitude_deg, ra, dec)[0])
        dark = DARK_SKY_MAG.get(band, 21.0)
        k = EXTINCTION_MAG.get(band, 0.1)
        x = _scattering_airmass(90.0 - altitude)
        flux = 10 ** (-0.4 * dark) * 10 ** (-0.4 * k * (x - 1)) * x
        flux += self._moonlight(tai_s, ra, dec, altitude, band)
        sun = ephemeris.sun_position(tai_s)
        sun_altitude = float(horizontal_from_sky(tai_s, o.latitude_deg, o.longitude_deg, *sun)[0])
        flux += 10 ** (-0.4 * max(22.8 - 0.9 * (sun_altitude + 18.0), 4.0))
        # Airglow and aerosol vary by some per cent.
        return float(-2.5 * np.log10(flux) + 0.04 * self._value("glow", tai_s, 3600.0))

    def _moonlight(self, tai_s: float, ra: float, dec: float, altitude: float, band: str) -> float:
        """Krisciunas and Schaefer's eq. 15, as AB flux (10^(−0.4 mag)) per square arc second."""
        o = self.observatory
        moon = ephemeris.moon_topocentric(tai_s, o.latitude_deg, o.longitude_deg, o.elevation_m)
        moon_altitude = float(horizontal_from_sky(tai_s, o.latitude_deg, o.longitude_deg, *moon)[0])
        if moon_altitude <= 0:
            return 0.0
        phase = ephemeris.moon_phase_angle_deg(tai_s)
        distance = float(separation_deg(ra, dec, *moon))
        illuminance = 10 ** (-0.4 * (3.84 + 0.026 * phase + 4e-9 * phase**4))
        rayleigh = 10**5.36 * (1.06 + np.cos(np.deg2rad(distance)) ** 2)
        mie = 10 ** (6.15 - distance / 40.0) if distance >= 10 else 6.2e7 / max(distance, 0.25) ** 2
        k = 0.13
        path = 10 ** (-0.4 * k * _scattering_airmass(90.0 - moon_altitude))
        nano_lambert = (
            (rayleigh + mie)
            * illuminance
            * path
            * (1 - 10 ** (-0.4 * k * _scattering_airmass(90.0 - altitude)))
        )
        # Garstang: B[nL] = 34.08 exp(20.7233 − 0.92104 V).
        v_mag = (20.7233 - np.log(max(nano_lambert, 1e-9) / 34.08)) / 0.92104
        return float(10 ** (-0.4 * v_mag) * MOON_COLOUR.get(band, 1.0))

    def airmass(self, tai_s: float, ra: float, dec: float) -> float:
        """Air mass towards (ra, dec), at most 10."""
        o = self.observatory
        altitude = horizontal_from_sky(tai_s, o.latitude_deg, o.longitude_deg, ra, dec)[0]
        return min(float(airmass(altitude)), 10.0)

    def conditions(self, tai_s: float) -> Conditions:
        """Weather values for headers and telemetry."""
        o = self.observatory
        hour = (tai_s / 3600.0 + o.longitude_deg / 15.0) % 24.0
        temperature = 11.0 - o.elevation_m * 0.0015 + 3.5 * np.cos(2 * np.pi * (hour - 15.0) / 24.0)
        zenith_ra = float(sidereal_deg(tai_s, o.longitude_deg))
        return Conditions(
            seeing_arcsec=self.seeing_arcsec(tai_s),
            transparency=self.transparency(tai_s),
            airtemp_c=float(temperature + 0.8 * self._value("temperature", tai_s, 7200.0)),
            pressure_hpa=float(
                1013.25 * np.exp(-o.elevation_m / 8300.0) + 1.2 * self._value("pressure", tai_s, 40000.0)
            ),
            humidity_percent=float(np.clip(28 + 11 * self._value("humidity", tai_s, 9000.0), 3, 98)),
            wind_speed_m_s=float(5.5 * np.exp(0.45 * self._value("wind", tai_s, 1800.0))),
            wind_direction_deg=float((20 + 35 * self._value("direction", tai_s, 3600.0)) % 360.0),
            sky_mag=self.sky_mag(tai_s, "r", zenith_ra, o.latitude_deg),
        )


def _scattering_airmass(zenith_distance_deg: float) -> float:
    """Krisciunas and Schaefer's eq. 3."""
    sine = np.sin(np.deg2rad(min(zenith_distance_deg, 90.0)))
    return float(1.0 / np.sqrt(1.0 - 0.96 * sine * sine))
