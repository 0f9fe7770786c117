"""The site's catalogue of orbits: loading a file, and the nights made of it."""

from __future__ import annotations

from pathlib import Path

from cumbre.core.configuration import Site
from cumbre.site.roles import open_site_clock, site_database

SIMULATED = "archive/orbits/MPCORB.DAT"


def load_orbits(site: Site, path: Path) -> tuple[int, int]:
    """Replace the catalogue by a file's orbits; (number, version).

    Raises
    ------
    UserError
        The file cannot be read.
    NotFoundError
        No such file, or the site's database is not running.
    """
    from cumbre.catalogs.orbits import OrbitCatalogue
    from cumbre.payloads.solar_system.orbits import read_orbits

    columns = read_orbits(path)
    catalogue = OrbitCatalogue(site_database(site), open_site_clock(site))
    return len(columns["ssObjectId"]), catalogue.replace(columns, source=str(path))


def make_night(site: Site, day_obs: int) -> int:
    """Integrate all orbits to a night ahead of it; number of objects, 0 without a catalogue."""
    from cumbre.orchestration.known_objects import KnownObjectLoader

    table = KnownObjectLoader(site.root, site_database(site)).table(day_obs)
    return 0 if table is None else len(table)


def load_simulated(site: Site) -> tuple[int, int] | None:
    """Load what is known of a simulated sky, once; None when it is loaded already or there is none."""
    from cumbre.catalogs.orbits import OrbitCatalogue

    path = site.root / SIMULATED
    if not path.is_file() or OrbitCatalogue(site_database(site)).version():
        return None
    return load_orbits(site, path)
