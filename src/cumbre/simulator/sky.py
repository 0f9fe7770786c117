"""The sky as one exposure of one detector sees it: positions in pixels, electrons, background, PSF."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cumbre.core.configuration import Observatory
from cumbre.core.geometry import pixel_from_sky, separation_deg, sky_from_pixel, tangent_from_sky
from cumbre.core.instrument import Detector, Instrument
from cumbre.core.time import SECONDS_PER_DAY
from cumbre.simulator import lightcurves, orbits
from cumbre.simulator.catalogue import Table, Tile, read_about, read_table
from cumbre.simulator.ephemeris import observer_km
from cumbre.simulator.exposure import ExposureRequest
from cumbre.simulator.profiles import Psf
from cumbre.simulator.randomness import generator
from cumbre.simulator.weather import Conditions, Weather

FloatArray = NDArray[np.float64]
STAR, GALAXY, VARIABLE, SUPERNOVA, ASTEROID = range(5)
KIND_NAMES = ("star", "galaxy", "variable", "supernova", "asteroid")
EDGE_PX = 60.0
"""Sources this far outside still light the detector."""
ASTEROID_COLOUR = {"g": 0.35, "r": -0.20, "i": -0.38, "u": 1.7, "z": -0.42, "y": -0.45}
"""Magnitude of a band minus V of a mean asteroid."""
TEMPLATES_FILE = "templates.json"


@dataclass(slots=True)
class Sources:
    """Sources of one detector image; arrays of one length.

    Attributes
    ----------
    x, y
        0-based pixels.
    flux_e
        Electrons of the whole exposure, extinction included; the sensor's response is not.
    kind
        STAR, GALAXY, VARIABLE, SUPERNOVA or ASTEROID.
    rate_x, rate_y
        Motion in pixels per second (asteroids).
    bulge_fraction, disc_arcsec, bulge_arcsec, axis_ratio, position_angle_deg
        Shapes of galaxies; 0 for points.
    """

    id: NDArray[np.int64]
    kind: NDArray[np.int8]
    ra: FloatArray
    dec: FloatArray
    x: FloatArray
    y: FloatArray
    mag: FloatArray
    flux_e: FloatArray
    rate_x: FloatArray
    rate_y: FloatArray
    bulge_fraction: FloatArray
    disc_arcsec: FloatArray
    bulge_arcsec: FloatArray
    axis_ratio: FloatArray
    position_angle_deg: FloatArray


@dataclass(frozen=True, slots=True)
class Component:
    """Light of one profile: arrays (n,), shape (n, 3) in pixels²."""

    x: FloatArray
    y: FloatArray
    flux_e: FloatArray
    shape: FloatArray


@dataclass(frozen=True, slots=True)
class Light:
    """All that falls on one detector during one exposure."""

    background_e: float
    psf: Psf
    sources: Sources
    points: Component
    discs: Component
    bulges: Component
    airmass: float


def band_magnitude(table: Table, band: str) -> FloatArray:
    """Magnitude of a catalogue in a band; u, z, y follow from the colours, other bands are r."""
    g, r, i = table["mag_g"], table["mag_r"], table["mag_i"]
    values = {
        "g": g,
        "r": r,
        "i": i,
        "u": g + 0.5 + 1.1 * (g - r),
        "z": i - 0.55 * (r - i),
        "y": i - 0.75 * (r - i),
    }
    return np.asarray(values.get(band, r), float)


class Sky:
    """Truth catalogue and weather together.

    Parameters
    ----------
    tables
        ``stars``, ``galaxies``, ``supernovae``, ``asteroids`` (see :mod:`cumbre.simulator.catalogue`).
    template_tai
        Middle times of the template visits for each (tile, band), for ``delta_flux``.
    """

    def __init__(
        self,
        tables: dict[str, Table],
        *,
        observatory: Observatory,
        seed: int,
        tiles: list[Tile],
        start_tai: float = 0.0,
        template_tai: dict[tuple[str, str], list[float]] | None = None,
    ) -> None:
        self.tables = tables
        self.observatory = observatory
        self.seed = seed
        self.tiles = tiles
        self.start_tai = start_tai
        self.weather = Weather(observatory, seed)
        self.template_tai = template_tai or {}
        self._vectors = {
            name: _vectors(tables[name]["ra"], tables[name]["dec"])
            for name in ("stars", "galaxies", "supernovae")
        }
        a = tables["asteroids"]
        epoch = float(a["epoch_tai"][0]) if a["epoch_tai"].size else start_tai
        self.elements = orbits.Elements(
            a=a["a_au"],
            e=a["e"],
            inclination=np.deg2rad(a["inclination_deg"]),
            node=np.deg2rad(a["node_deg"]),
            perihelion=np.deg2rad(a["perihelion_deg"]),
            mean_anomaly=np.deg2rad(a["mean_anomaly_deg"]),
            epoch_tai=epoch,
        )

    @classmethod
    def load(cls, folder: Path) -> Sky:
        """Read a truth catalogue folder.

        Raises
        ------
        NotFoundError
            The folder holds no complete sky.
        """
        about = read_about(folder)
        templates: dict[tuple[str, str], list[float]] = {}
        path = folder / TEMPLATES_FILE
        if path.is_file():
            for item in json.loads(path.read_text()):
                templates.setdefault((item["tile"], item["band"]), []).append(item["mid_tai"])
        return cls(
            {
                name: read_table(folder / f"{name}.parquet")
                for name in ("stars", "galaxies", "supernovae", "asteroids")
            },
            observatory=Observatory.model_validate(about["observatory"]),
            seed=int(about["seed"]),
            tiles=[Tile(**tile) for tile in about["tiles"]],
            start_tai=float(about["start_tai"]),
            template_tai=templates,
        )

    def conditions(self, tai_s: float) -> Conditions:
        """Weather for headers and telemetry."""
        return self.weather.conditions(tai_s)

    def templates(self, ra: float, dec: float, band: str) -> list[float]:
        """Middle times of the template visits of the tile nearest to a boresight."""
        if not self.tiles:
            return []
        distances = [float(separation_deg(ra, dec, tile.ra, tile.dec)) for tile in self.tiles]
        nearest = int(np.argmin(distances))
        return self.template_tai.get((self.tiles[nearest].name, band), []) if distances[nearest] < 0.1 else []

    def magnitudes(self, name: str, index: NDArray[np.int64], band: str, tai_s: float) -> FloatArray:
        """Magnitudes at a time of rows of ``stars`` or ``supernovae``; infinite before an explosion."""
        table = {key: value[index] for key, value in self.tables[name].items()}
        if name == "supernovae":
            days = (tai_s - table["explosion_tai"]) / SECONDS_PER_DAY
            flux = lightcurves.supernova_flux(days, table["stretch"])
            g_r, r_i = lightcurves.supernova_colour(days)
            with np.errstate(divide="ignore"):
                r = table["peak_mag_r"] - 2.5 * np.log10(flux)
            return np.asarray(r + {"g": g_r, "u": g_r + 0.8, "i": -r_i, "z": -r_i, "y": -r_i}.get(band, 0.0))
        mag = band_magnitude(table, band)
        if name == "stars":
            mag = mag + lightcurves.AMPLITUDE_OF_BAND.get(band, 1.0) * lightcurves.variable_offset_mag(
                table["variable_kind"], table["period_days"], table["amplitude_mag"], table["phase"], tai_s
            )
        return mag

    def sources(self, instrument: Instrument, detector: Detector, exposure: ExposureRequest) -> Sources:
        """Everything that lights one detector, in the catalogue's order."""
        band = instrument.filter(exposure.filter).band
        zero_point = instrument.filter(exposure.filter).zero_point
        ra0, dec0, rotpa = exposure.ra, exposure.dec, exposure.rotpa
        air = self.weather.airmass(exposure.mid_tai, ra0, dec0)
        electrons = exposure.exposure_s * self.weather.throughput(exposure.mid_tai, band, air)
        cx, cy = 0.5 * (detector.nx - 1), 0.5 * (detector.ny - 1)
        centre = sky_from_pixel(instrument, detector, ra0, dec0, rotpa, cx, cy)
        reach = (np.hypot(cx, cy) + EDGE_PX) * instrument.pixel_scale(detector) * 1.02 / 3600.0
        parts: list[dict[str, NDArray[np.float64]]] = []
        for name in ("stars", "galaxies", "supernovae", "asteroids"):
            part = (
                self._moving(band, exposure.mid_tai)
                if name == "asteroids"
                else self._fixed(name, band, exposure.mid_tai, _vectors(*centre)[0], reach)
            )
            x, y = pixel_from_sky(instrument, detector, ra0, dec0, rotpa, part["ra"], part["dec"])
            part["x"], part["y"] = x, y
            x2, y2 = pixel_from_sky(instrument, detector, ra0, dec0, rotpa, part.pop("ra2"), part.pop("dec2"))
            part["rate_x"], part["rate_y"] = x2 - x, y2 - y
            inside = (
                (x > -EDGE_PX)
                & (x < detector.nx + EDGE_PX)
                & (y > -EDGE_PX)
                & (y < detector.ny + EDGE_PX)
                & np.isfinite(part["mag"])
            )
            parts.append({key: value[inside] for key, value in part.items()})
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        joined["flux_e"] = 10 ** (-0.4 * (joined["mag"] - zero_point)) * electrons
        return Sources(**joined)  # type: ignore[arg-type]

    def _fixed(
        self, name: str, band: str, tai_s: float, centre: FloatArray, reach_deg: float
    ) -> dict[str, NDArray[np.float64]]:
        """Stars, galaxies or supernovae near a direction."""
        index = np.flatnonzero(self._vectors[name] @ centre > np.cos(np.deg2rad(reach_deg)))
        table = self.tables[name]
        ra, dec = table["ra"][index], table["dec"][index]
        out = {"id": table["id"][index], "ra": ra, "dec": dec, "ra2": ra, "dec2": dec}
        if name == "stars":
            out["kind"] = np.where(table["variable_kind"][index] > 0, VARIABLE, STAR).astype(np.int8)
        else:
            out["kind"] = np.full(index.size, GALAXY if name == "galaxies" else SUPERNOVA, np.int8)
        out["mag"] = self.magnitudes(name, index, band, tai_s)
        for key in ("bulge_fraction", "disc_arcsec", "bulge_arcsec", "axis_ratio", "position_angle_deg"):
            out[key] = table[key][index] if name == "galaxies" else np.zeros(index.size)
        return out

    def _moving(self, band: str, tai_s: float) -> dict[str, NDArray[np.float64]]:
        """All asteroids, with their places one second later in ``ra2``, ``dec2``."""
        o = self.observatory
        table = self.tables["asteroids"]
        n = table["id"].size
        seen = orbits.observe(
            self.elements, tai_s, observer_km(tai_s, o.latitude_deg, o.longitude_deg, o.elevation_m)
        )
        step_s = 60.0
        later_tai = tai_s + step_s
        later = orbits.observe(
            self.elements, later_tai, observer_km(later_tai, o.latitude_deg, o.longitude_deg, o.elevation_m)
        )
        d_ra = (np.mod(later.ra - seen.ra + 180, 360) - 180) / step_s
        out = {
            "id": table["id"],
            "ra": seen.ra,
            "dec": seen.dec,
            "ra2": seen.ra + d_ra,
            "dec2": seen.dec + (later.dec - seen.dec) / step_s,
            "kind": np.full(n, ASTEROID, np.int8),
            "mag": orbits.magnitude(table["h_mag"], seen) + ASTEROID_COLOUR.get(band, -0.2),
        }
        for key in ("bulge_fraction", "disc_arcsec", "bulge_arcsec", "axis_ratio", "position_angle_deg"):
            out[key] = np.zeros(n)
        return out

    def background_e(self, instrument: Instrument, detector: Detector, exposure: ExposureRequest) -> float:
        """Electrons of the sky in one pixel at full response."""
        item = instrument.filter(exposure.filter)
        mag = self.weather.sky_mag(exposure.mid_tai, item.band, exposure.ra, exposure.dec)
        area = instrument.pixel_scale(detector) ** 2
        return float(10 ** (-0.4 * (mag - item.zero_point)) * area * exposure.exposure_s)

    def psf(self, instrument: Instrument, detector: Detector, exposure: ExposureRequest) -> Psf:
        """PSF of one exposure: seeing, and a shape that guiding and focus give it."""
        band = instrument.filter(exposure.filter).band
        air = self.weather.airmass(exposure.mid_tai, exposure.ra, exposure.dec)
        fwhm = self.weather.psf_fwhm_arcsec(exposure.mid_tai, band, air)
        rng = generator(self.seed, "psf", exposure.obs_id)
        e1, e2 = rng.normal(0, 0.015, 2)
        g = rng.normal(0, 0.015, 4)
        return Psf(
            fwhm_px=float(fwhm / instrument.pixel_scale(detector)),
            radial=0.03,
            shape=(float(e1), float(g[0]), float(g[1]), float(e2), float(g[2]), float(g[3])),
        )

    def light(self, instrument: Instrument, detector: Detector, exposure: ExposureRequest) -> Light:
        """Background, PSF and sources of one detector image, ready for the renderer."""
        s = self.sources(instrument, detector, exposure)
        is_galaxy = s.kind == GALAXY
        trail = exposure.exposure_s**2 / 12.0
        smear = np.stack([s.rate_x**2, s.rate_x * s.rate_y, s.rate_y**2], axis=-1) * trail
        point = ~is_galaxy
        axes = _pixel_axes(instrument, detector, exposure)
        disc = (s.flux_e * (1 - s.bulge_fraction))[is_galaxy]
        bulge = (s.flux_e * s.bulge_fraction)[is_galaxy]
        x, y = s.x[is_galaxy], s.y[is_galaxy]
        ratio, angle = s.axis_ratio[is_galaxy], s.position_angle_deg[is_galaxy]
        return Light(
            background_e=self.background_e(instrument, detector, exposure),
            psf=self.psf(instrument, detector, exposure),
            sources=s,
            points=Component(s.x[point], s.y[point], s.flux_e[point], smear[point]),
            discs=Component(x, y, disc, _covariance(s.disc_arcsec[is_galaxy], ratio, angle, axes)),
            # Bulges are rounder than the discs about them.
            bulges=Component(
                x, y, bulge, _covariance(s.bulge_arcsec[is_galaxy], np.sqrt(ratio), angle, axes)
            ),
            airmass=self.weather.airmass(exposure.mid_tai, exposure.ra, exposure.dec),
        )


def _vectors(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> FloatArray:
    """Unit vectors, shape (n, 3)."""
    a, d = np.deg2rad(np.atleast_1d(ra)), np.deg2rad(np.atleast_1d(dec))
    return np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)], axis=-1)


def _pixel_axes(instrument: Instrument, detector: Detector, exposure: ExposureRequest) -> FloatArray:
    """Matrix that turns (east, north) arc seconds into pixels, at the detector's centre."""
    cx, cy = 0.5 * (detector.nx - 1), 0.5 * (detector.ny - 1)
    x, y = np.array([cx, cx + 1, cx]), np.array([cy, cy, cy + 1])
    ra, dec = sky_from_pixel(instrument, detector, exposure.ra, exposure.dec, exposure.rotpa, x, y)
    xi, eta = tangent_from_sky(float(ra[0]), float(dec[0]), ra, dec)
    forward = np.array([[xi[1], xi[2]], [eta[1], eta[2]]]) * 3600.0
    return np.linalg.inv(forward)


def _covariance(
    radius_arcsec: FloatArray, ratio: FloatArray, angle_deg: FloatArray, axes: FloatArray
) -> FloatArray:
    """Covariance (n, 3) in pixels² of ellipses of equal area, position angle east of north."""
    major, minor = radius_arcsec / np.sqrt(ratio), radius_arcsec * np.sqrt(ratio)
    pa = np.deg2rad(angle_deg)
    along, across = np.stack([np.sin(pa), np.cos(pa)]), np.stack([np.cos(pa), -np.sin(pa)])
    p, q = axes @ (along * major), axes @ (across * minor)
    return np.stack([p[0] ** 2 + q[0] ** 2, p[0] * p[1] + q[0] * q[1], p[1] ** 2 + q[1] ** 2], axis=-1)
