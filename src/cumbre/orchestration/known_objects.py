"""Known solar-system objects for the workers: the night's table of the site's catalogue of orbits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cumbre.core.configuration import Site
from cumbre.core.time import day_obs_from_tai, seconds_from_mjd

if TYPE_CHECKING:
    from cumbre.payloads.solar_system.attribution import KnownObjects
    from cumbre.payloads.solar_system.night import NightTable
    from cumbre.stores.postgres import Database

FOLDER = "archive/ephemerides"
MARGIN_DEG = 0.01
"""Around the image: objects just outside take part in deciding whose source is whose."""
log = logging.getLogger(__name__)


class KnownObjectLoader:
    """Where the known objects are, night by night.

    Parameters
    ----------
    root
        Folder of the site; tables lie in :data:`FOLDER`.
    db
        Has the catalogue of orbits.
    """

    def __init__(self, root: Path, db: Database) -> None:
        from cumbre.catalogs.orbits import OrbitCatalogue
        from cumbre.payloads.solar_system.bodies import Observer

        place = Site.load(root).config.observatory
        self._observer = Observer.at(place.latitude_deg, place.longitude_deg, place.elevation_m)
        self._folder = root / FOLDER
        self._catalogue = OrbitCatalogue(db)
        self._open: dict[tuple[int, int], NightTable] = {}

    def table(self, day_obs: int) -> NightTable | None:
        """The table of an observing day, integrated when it is not there; None without a catalogue."""
        from cumbre.payloads.solar_system.tables import night_table

        version = self._catalogue.version()
        if version == 0:
            return None
        key = day_obs, version
        if key not in self._open:
            self._open = {
                key: night_table(self._folder, day_obs, version, self._observer, self._catalogue.elements)
            }
        return self._open[key]

    def near(self, ra: float, dec: float, radius_deg: float, mjd_tai: float) -> KnownObjects | None:
        """Objects in a circle (ICRS degrees) at a moment; None without a catalogue."""
        from cumbre.payloads.solar_system.attribution import KnownObjects

        table = self.table(day_obs_from_tai(seconds_from_mjd(mjd_tai)))
        if table is None:
            return None
        return KnownObjects(table.near(ra, dec, radius_deg + MARGIN_DEG, mjd_tai), self._catalogue.rows)
