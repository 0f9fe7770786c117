"""The catalogue of orbits (``level1.mpc_orbits``): replaced as a whole, read for a night's table and for packets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.catalogs.columns import conform
from cumbre.catalogs.level1 import prepare, read_table
from cumbre.catalogs.schema import level1_tables
from cumbre.core.time import Clock
from cumbre.stores.postgres import Database

if TYPE_CHECKING:
    from numpy.typing import NDArray

ELEMENTS = ("ssObjectId", "q", "e", "i", "node", "argperi", "peri_time", "epoch_mjd", "h", "g")
_COUNTS = ("u_param", "nopp", "nobs_total")


class OrbitCatalogue:
    """Orbits of known objects in the site's database.

    Parameters
    ----------
    db
        Tables are made when absent.
    """

    def __init__(self, db: Database, clock: Clock | None = None) -> None:
        self._db = db
        self._clock = clock or Clock.real()
        self._table = level1_tables()["mpc_orbits"]
        prepare(db)

    def version(self) -> int:
        """Number of the present catalogue; 0 before the first."""
        rows = self._db.execute("SELECT max(version) FROM level1.orbit_load")
        return int(rows[0][0] or 0)

    def replace(self, columns: Mapping[str, NDArray[Any]], *, source: str) -> int:
        """Put a new catalogue in the place of the old one, in one transaction: readers see one or the other.

        Parameters
        ----------
        columns
            Columns of ``mpc_orbits``, NaN where not known, with ``packed`` and ``designation`` (text) and
            ``ssObjectId``.
        source
            Where it comes from, for the records.

        Returns
        -------
        int
            Version of the new catalogue.
        """
        n = len(columns["ssObjectId"])
        known = {column.name for column in self._table.columns}
        rows: dict[str, Any] = {name: values for name, values in columns.items() if name in known}
        for name in _COUNTS:
            if name in rows:
                # text such as the U of a doubtful orbit is no number
                rows[name] = [None if not np.isfinite(value) else int(value) for value in rows[name]]
        rows |= {
            "id": np.arange(1, n + 1, dtype=np.int32),
            "packed_primary_provisional_designation": columns["packed"],
            "unpacked_primary_provisional_designation": columns["designation"],
        }
        arrow = conform(self._table, rows)
        arrow = arrow.rename_columns([name.lower() for name in arrow.column_names])
        with self._db.connection() as link:
            link.execute("LOCK TABLE level1.orbit_load IN EXCLUSIVE MODE")
            link.execute("DELETE FROM level1.mpc_orbits")
            self._db.copy(self._table.sql_name, arrow.column_names, arrow, connection=link)
            made = link.execute(
                "INSERT INTO level1.orbit_load (source, rows, loaded_tai) VALUES (%s, %s, %s) RETURNING version",
                (source, n, self._clock.now_tai_s()),
            ).fetchone()
        assert made is not None
        self._db.execute("ANALYZE level1.mpc_orbits")
        return int(made[0])

    def elements(self) -> tuple[int, dict[str, NDArray[Any]]]:
        """Version, and the columns :data:`ELEMENTS` of all orbits (degrees, au, MJD TT; NaN where not known)."""
        with self._db.connection() as link:
            # both of one moment, whoever loads meanwhile
            link.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            found = link.execute("SELECT max(version) FROM level1.orbit_load").fetchone()
            table = read_table(link, self._table, "TRUE", (), names=ELEMENTS)
        columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in ELEMENTS}
        return int((found and found[0]) or 0), columns

    def rows(self, identifiers: Collection[int]) -> dict[int, dict[str, Any]]:
        """Rows of some objects as packets carry them, by ``ssObjectId``."""
        if not identifiers:
            return {}
        with self._db.connection() as link:
            found = read_table(
                link, self._table, "t.ssobjectid = ANY(%s)", (sorted(identifiers),)
            ).to_pylist()
        return {row.pop("ssObjectId"): row for row in found}
