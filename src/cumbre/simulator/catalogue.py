"""The truth catalogue: what is in the sky of a survey's tiles, as parquet files in one folder.

``stars``, ``galaxies``, ``supernovae``, ``asteroids`` and ``sky.json`` (seed, tiles, site, first night). Counts
are those of real fields: stars by a power law of magnitude that grows towards the galactic plane, galaxies by
10^(0.35 m). Ids are unique across the four tables.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.configuration import Observatory, Simulator
from cumbre.core.errors import NotFoundError
from cumbre.core.geometry import field_radius_deg, sky_from_tangent
from cumbre.core.instrument import Instrument
from cumbre.core.time import SECONDS_PER_DAY
from cumbre.simulator import lightcurves, orbits
from cumbre.simulator.ephemeris import observer_km
from cumbre.simulator.randomness import generator
from cumbre.stores.files import publish, temporary_name, write_atomic

Table = dict[str, NDArray[Any]]
FIRST_ID = {
    "stars": 1_000_000_000,
    "galaxies": 2_000_000_000,
    "supernovae": 3_000_000_000,
    "asteroids": 4_000_000_000,
}
TABLES = tuple(FIRST_ID)
STAR_MAG = (14.0, 24.0)
GALAXY_MAG = (15.5, 23.5)
STAR_SLOPE, GALAXY_SLOPE = 0.17, 0.35
STARS_DEG2_R22 = 2200.0
GALAXIES_DEG2_MAG_R20 = 1250.0
TRANSIENT_MAG = (18.7, 21.8)
"""r magnitudes of supernovae on the first night: about SNR 100 to 8 in 30 s of a 1.2 m telescope."""
MARGIN_DEG = 0.03
ASTEROID_MARGIN_DEG = 0.12


@dataclass(frozen=True, slots=True)
class Tile:
    """One field of the survey."""

    name: str
    ra: float
    dec: float


def galactic_latitude_deg(ra: float, dec: float) -> float:
    """Galactic latitude of an ICRS position (north galactic pole at 192.859, +27.128 degrees)."""
    pole_ra, pole_dec = np.deg2rad(192.85948), np.deg2rad(27.12825)
    a, d = np.deg2rad(ra), np.deg2rad(dec)
    sine = np.sin(d) * np.sin(pole_dec) + np.cos(d) * np.cos(pole_dec) * np.cos(a - pole_ra)
    return float(np.rad2deg(np.arcsin(np.clip(sine, -1, 1))))


def _power_law(
    rng: np.random.Generator, n: int, slope: float, limits: tuple[float, float]
) -> NDArray[np.float64]:
    """Magnitudes with dN/dm ∝ 10^(slope·m) between two limits."""
    low, high = 10 ** (slope * limits[0]), 10 ** (slope * limits[1])
    return np.log10(low + rng.uniform(size=n) * (high - low)) / slope


def _disc(
    rng: np.random.Generator, tile: Tile, radius_deg: float, n: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions spread evenly over a tile's circle."""
    r, angle = radius_deg * np.sqrt(rng.uniform(size=n)), rng.uniform(0, 2 * np.pi, n)
    return sky_from_tangent(tile.ra, tile.dec, r * np.cos(angle), r * np.sin(angle))


def _stars(rng: np.random.Generator, tile: Tile, radius: float, config: Simulator) -> Table:
    latitude = abs(galactic_latitude_deg(tile.ra, tile.dec))
    density = STARS_DEG2_R22 * config.star_density * min(1 / max(np.sin(np.deg2rad(latitude)), 0.1), 1.5)
    low, high = (10 ** (STAR_SLOPE * m) for m in STAR_MAG)
    total = density * (high - low) / (10 ** (STAR_SLOPE * 22.0) - low)
    n = int(rng.poisson(total * np.pi * radius**2))
    ra, dec = _disc(rng, tile, radius, n)
    r = _power_law(rng, n, STAR_SLOPE, STAR_MAG)
    # Turn-off stars dominate bright counts, red dwarfs (g−r ≈ 1.4, r−i up to 1.8) faint ones.
    red = rng.uniform(size=n) < np.clip(0.15 + 0.08 * (r - 15), 0.15, 0.75)
    g_r = np.where(red, rng.normal(1.40, 0.07, n), rng.normal(0.50, 0.13, n))
    r_i = np.where(red, rng.uniform(0.5, 1.8, n), 0.36 * g_r + rng.normal(0, 0.03, n))
    varies = (rng.uniform(size=n) < config.variables_fraction) & (r < 21.5)
    pulsates = varies & (rng.uniform(size=n) < 0.3)
    kind = np.where(pulsates, lightcurves.RR_LYRAE, np.where(varies, lightcurves.SINUSOID, 0))
    period = np.where(pulsates, rng.uniform(0.45, 0.75, n), 10 ** rng.uniform(-0.7, 2.0, n))
    amplitude = np.where(pulsates, rng.uniform(0.5, 1.1, n), 10 ** rng.uniform(-1.0, -0.15, n))
    return {
        "ra": ra,
        "dec": dec,
        "mag_g": r + g_r,
        "mag_r": r,
        "mag_i": r - r_i,
        "variable_kind": kind.astype(np.int8),
        "period_days": np.where(varies, period, 0.0),
        "amplitude_mag": np.where(varies, amplitude, 0.0),
        "phase": rng.uniform(size=n),
    }


def _galaxies(rng: np.random.Generator, tile: Tile, radius: float) -> Table:
    low, high = (10 ** (GALAXY_SLOPE * (m - 20)) for m in GALAXY_MAG)
    total = GALAXIES_DEG2_MAG_R20 * (high - low) / (GALAXY_SLOPE * np.log(10))
    n = int(rng.poisson(total * np.pi * radius**2))
    ra, dec = _disc(rng, tile, radius, n)
    r = _power_law(rng, n, GALAXY_SLOPE, GALAXY_MAG)
    early = rng.uniform(size=n) < 0.3
    half_light = 1.4 * 10 ** (-0.13 * (r - 20)) * np.exp(rng.normal(0, 0.3, n))
    g_r = np.where(early, rng.normal(0.95, 0.12, n), rng.normal(0.55, 0.18, n))
    return {
        "ra": ra,
        "dec": dec,
        "mag_g": r + g_r,
        "mag_r": r,
        "mag_i": r - 0.45 * g_r - rng.normal(0.05, 0.05, n),
        "bulge_fraction": np.where(early, rng.uniform(0.5, 1.0, n), rng.uniform(0.0, 0.35, n)),
        "disc_arcsec": np.clip(half_light, 0.2, 8.0),
        "bulge_arcsec": np.clip(half_light * np.where(early, 0.9, 0.35), 0.15, 6.0),
        "axis_ratio": np.where(early, rng.uniform(0.6, 1.0, n), np.clip(rng.uniform(0.2, 1.0, n), 0.25, 1)),
        "position_angle_deg": rng.uniform(0, 180, n),
    }


def _supernovae(
    rng: np.random.Generator, radius: float, galaxies: Table, density: float, start_tai: float
) -> Table:
    """Supernovae in galaxies of this tile, bright on the first night, not yet there a month before it."""
    n = int(rng.poisson(density * np.pi * radius**2))
    light = np.where(galaxies["mag_r"] < 21.5, 10 ** (-0.4 * galaxies["mag_r"]), 0.0)
    # By light alone the few giants would take them all: the square root spreads them as a magnitude limit does.
    light = np.sqrt(light)
    n = min(n, int((light > 0).sum()))
    host = rng.choice(light.size, n, replace=False, p=light / light.sum()) if n else np.zeros(0, int)
    # Offset by the host's light: an exponential disc's radius is a gamma variate of shape 2.
    scale = galaxies["disc_arcsec"][host] / 1.67835 / 3600.0
    r, angle = rng.gamma(2.0, 1.0, n) * scale, rng.uniform(0, 2 * np.pi, n)
    major, minor = r * np.cos(angle), r * np.sin(angle) * galaxies["axis_ratio"][host]
    pa = np.deg2rad(galaxies["position_angle_deg"][host])
    north = major * np.cos(pa) - minor * np.sin(pa)
    east = major * np.sin(pa) + minor * np.cos(pa)
    age_days = rng.uniform(4.0, 26.0, n)
    stretch = rng.uniform(0.8, 1.15, n)
    tonight = rng.uniform(*TRANSIENT_MAG, n)
    peak = tonight + 2.5 * np.log10(lightcurves.supernova_flux(age_days, stretch))
    dec = galaxies["dec"][host] + north
    return {
        "ra": np.mod(galaxies["ra"][host] + east / np.cos(np.deg2rad(dec)), 360.0),
        "dec": dec,
        "host": host.astype(np.int64),
        "explosion_tai": start_tai - age_days * SECONDS_PER_DAY,
        "peak_mag_r": peak,
        "stretch": stretch,
    }


def _asteroids(
    rng: np.random.Generator,
    tile: Tile,
    radius: float,
    density: float,
    start_tai: float,
    observatory: Observatory,
) -> Table:
    """Main-belt orbits that pass through the tile's circle at the start."""
    n = int(rng.poisson(density * np.pi * radius**2))
    ra, dec = _disc(rng, tile, radius, n)
    line = np.stack(
        [
            np.cos(np.deg2rad(dec)) * np.cos(np.deg2rad(ra)),
            np.cos(np.deg2rad(dec)) * np.sin(np.deg2rad(ra)),
            np.sin(np.deg2rad(dec)),
        ],
        axis=-1,
    )
    o = observatory
    observer = observer_km(start_tai, o.latitude_deg, o.longitude_deg, o.elevation_m)
    earth = orbits.earth_position(start_tai) + observer / orbits.AU_KM
    a = np.clip(rng.normal(2.7, 0.28, n), 2.15, 3.3)
    e = np.clip(rng.rayleigh(0.11, n), 0.005, 0.33)
    # A place on the orbit by mean anomaly, then the distance at which the line of sight has that radius.
    anomaly = orbits.eccentric_anomaly(rng.uniform(0, 2 * np.pi, n), e)
    r = a * (1 - e * np.cos(anomaly))
    along = line @ earth
    distance = -along + np.sqrt(along**2 + r**2 - earth @ earth)
    position = orbits.ecliptic_from_equatorial(earth + distance[:, None] * line)
    radial = position / r[:, None]
    # The plane: its pole is the ecliptic's, made perpendicular to the radius and then tilted about it.
    pole = np.array([0.0, 0.0, 1.0]) - radial[:, 2:3] * radial
    pole /= np.linalg.norm(pole, axis=1)[:, None]
    tilt = rng.normal(0, np.deg2rad(8.0), n)[:, None]
    pole = pole * np.cos(tilt) + np.cross(radial, pole) * np.sin(tilt)
    forward = np.cross(pole, radial)
    speed2 = orbits.GM_SUN * (2 / r - 1 / a)
    across = np.sqrt(orbits.GM_SUN * a * (1 - e**2)) / r
    inward = np.sign(np.sin(anomaly)) * np.sqrt(np.maximum(speed2 - across**2, 0.0))
    velocity = inward[:, None] * radial + across[:, None] * forward
    el = orbits.elements_from_state(position, velocity, start_tai)
    seen = orbits.observe(el, start_tai, observer)
    v_mag = _power_law(rng, n, 0.3, (17.5, 22.4))
    return {
        "a_au": el.a,
        "e": el.e,
        "inclination_deg": np.rad2deg(el.inclination),
        "node_deg": np.rad2deg(el.node) % 360,
        "perihelion_deg": np.rad2deg(el.perihelion) % 360,
        "mean_anomaly_deg": np.rad2deg(el.mean_anomaly) % 360,
        "epoch_tai": np.full(n, start_tai),
        "h_mag": v_mag - orbits.magnitude(np.zeros(n), seen),
    }


def _join(parts: list[Table], name: str) -> Table:
    table = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    size = next(iter(table.values())).size
    return {"id": FIRST_ID[name] + np.arange(size, dtype=np.int64)} | table


def make_catalogue(
    *,
    config: Simulator,
    observatory: Observatory,
    instrument: Instrument,
    tiles: list[Tile],
    start_tai: float,
) -> dict[str, Table]:
    """Everything in the sky of the tiles; a function of its arguments only.

    Parameters
    ----------
    config
        Seed and densities. ``transients_per_detector`` counts for this instrument's detectors.
    start_tai
        Start of the first night: supernovae are bright and asteroids in the tiles then.
    """
    field = field_radius_deg(instrument)
    parts: dict[str, list[Table]] = {name: [] for name in TABLES}
    galaxies_before = 0
    area = float(
        np.mean([d.nx * d.ny * (instrument.pixel_scale(d) / 3600) ** 2 for d in instrument.detectors])
    )
    for tile in tiles:
        names = (config.seed, "sky", f"{tile.ra:.6f}", f"{tile.dec:.6f}")
        parts["stars"].append(_stars(generator(*names, "stars"), tile, field + MARGIN_DEG, config))
        galaxies = _galaxies(generator(*names, "galaxies"), tile, field + MARGIN_DEG)
        supernovae = _supernovae(
            generator(*names, "supernovae"),
            field + MARGIN_DEG,
            galaxies,
            config.transients_per_detector / area,
            start_tai,
        )
        supernovae["host"] = supernovae["host"] + FIRST_ID["galaxies"] + galaxies_before
        galaxies_before += galaxies["ra"].size
        parts["galaxies"].append(galaxies)
        parts["supernovae"].append(supernovae)
        parts["asteroids"].append(
            _asteroids(
                generator(*names, "asteroids"),
                tile,
                field + ASTEROID_MARGIN_DEG,
                config.asteroids_per_deg2,
                start_tai,
                observatory,
            )
        )
    return {name: _join(parts[name], name) for name in TABLES}


def write_table(table: Table, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a table as parquet, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.table({key: pa.array(value) for key, value in table.items()})
    if metadata:
        arrow = arrow.replace_schema_metadata(metadata)
    with temporary_name(path) as temporary:
        pq.write_table(arrow, temporary)
        publish(temporary, path)


def read_table(path: Path) -> Table:
    """Read a parquet table as arrays.

    Raises
    ------
    NotFoundError
        There is no such file.
    """
    import pyarrow.parquet as pq

    if not path.is_file():
        raise NotFoundError(f"{path}: no truth catalogue here; prepare the site's simulated sky first")
    arrow = pq.read_table(path)
    return {name: arrow.column(name).to_numpy() for name in arrow.column_names}


def write_catalogue(
    folder: Path,
    tables: dict[str, Table],
    *,
    seed: int,
    observatory: Observatory,
    tiles: list[Tile],
    start_tai: float,
) -> None:
    """Write the tables and, last, ``sky.json``: a folder with that file is complete."""
    for name, table in tables.items():
        write_table(table, folder / f"{name}.parquet")
    about = {
        "version": 1,
        "seed": seed,
        "start_tai": start_tai,
        "observatory": observatory.model_dump(),
        "tiles": [asdict(tile) for tile in tiles],
    }
    write_atomic(folder / "sky.json", json.dumps(about, indent=2).encode())


def read_about(folder: Path) -> dict[str, Any]:
    """Content of ``sky.json``.

    Raises
    ------
    NotFoundError
        The folder holds no complete sky.
    """
    path = folder / "sky.json"
    if not path.is_file():
        raise NotFoundError(f"{path}: no simulated sky here; prepare the site's simulated sky first")
    about: dict[str, Any] = json.loads(path.read_text())
    return about
