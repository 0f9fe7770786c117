"""Reference stars: positions and magnitudes that images are calibrated against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.core.geometry import separation_deg

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RefCat:
    """Reference stars.

    Attributes
    ----------
    ra, dec
        ICRS degrees, shape (n,).
    magnitudes
        AB magnitudes by band, each of shape (n,); NaN where not known.
    """

    ra: Floats
    dec: Floats
    magnitudes: dict[str, Floats]

    def __len__(self) -> int:
        return int(self.ra.size)

    @classmethod
    def load(
        cls, path: str | Path, centre: tuple[float, float] | None = None, radius_deg: float = 180.0
    ) -> RefCat:
        """Read a parquet file with the columns ra, dec (degrees) and one ``mag_<band>`` (or ``<band>_mag``) a band.

        Parameters
        ----------
        centre, radius_deg
            Only stars within this cone; row groups outside its declination range are not read.

        Raises
        ------
        NotFoundError
            No such file.
        BadFileError
            Not parquet, or columns are missing.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        if not path.exists():
            raise NotFoundError(f"reference catalogue {path}: there is no such file")
        filters = None
        if centre is not None and radius_deg < 90:
            low, high = centre[1] - radius_deg, centre[1] + radius_deg
            filters = [("dec", ">=", low), ("dec", "<=", high)]
        try:
            table = pq.read_table(path, filters=filters)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise BadFileError(
                f"reference catalogue {path}: not readable as parquet with ra, dec: {error}"
            ) from error
        catalogue = cls.from_table(table, str(path))
        return catalogue if centre is None else catalogue.cone(*centre, radius_deg)

    @classmethod
    def from_table(cls, table: pa.Table, where: str) -> RefCat:
        """From an Arrow table with the columns of :meth:`load`; ``where`` names it in errors.

        Raises
        ------
        BadFileError
            Columns are missing.
        """
        bands = {}
        for name in table.column_names:
            if name.startswith("mag_"):
                bands[name[4:]] = name
            elif name.endswith("_mag"):
                bands[name[:-4]] = name
        if not {"ra", "dec"} <= set(table.column_names) or not bands:
            raise BadFileError(
                f"reference catalogue {where}: columns {', '.join(table.column_names)}; "
                "expected ra, dec and mag_<band>"
            )
        columns = {name: table[name].to_numpy().astype(np.float64) for name in ("ra", "dec", *bands.values())}
        return cls(columns["ra"], columns["dec"], {band: columns[name] for band, name in bands.items()})

    def to_table(self) -> pa.Table:
        """Columns ra, dec, ``mag_<band>``."""
        import pyarrow as pa

        magnitudes = {f"mag_{band}": values for band, values in self.magnitudes.items()}
        return pa.table({"ra": self.ra, "dec": self.dec} | magnitudes)

    def cone_index(self, ra: float, dec: float, radius_deg: float) -> NDArray[np.intp]:
        """Indices of the stars within a radius."""
        index = np.flatnonzero(np.abs(self.dec - dec) <= radius_deg)
        near: NDArray[np.intp] = index[separation_deg(ra, dec, self.ra[index], self.dec[index]) <= radius_deg]
        return near

    def cone(self, ra: float, dec: float, radius_deg: float) -> RefCat:
        """Stars within a radius."""
        return self.take(self.cone_index(ra, dec, radius_deg))

    def take(self, index: NDArray[np.integer] | NDArray[np.bool_]) -> RefCat:
        """Chosen stars."""
        return RefCat(self.ra[index], self.dec[index], {b: m[index] for b, m in self.magnitudes.items()})

    def magnitude(self, band: str) -> Floats:
        """Magnitudes in a band; NaN for all when the catalogue does not have it."""
        return self.magnitudes.get(band, np.full(self.ra.size, np.nan))

    def brightness(self, band: str) -> Floats:
        """Magnitudes to order by: of the band, else of the first band there is."""
        if band in self.magnitudes:
            return self.magnitudes[band]
        return next(iter(self.magnitudes.values()), np.zeros(self.ra.size))
