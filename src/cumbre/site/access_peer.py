"""Another TAP service with the same rows beside ours: the figures of ``cumbre benchmark access --peer``."""

# ruff: noqa: S608 (queries of our own names and numbers)
from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from cumbre.site.access_client import JOBS, Service, centres, multipart

DEFAULT_TABLE = "cat.object"


class Peer:
    """A service that publishes the rows of the benchmark.

    Parameters
    ----------
    url
        Address of its TAP, as other clients are given it.
    rows, table
        How many rows, and where they are.

    Raises
    ------
    RuntimeError
        The table is not there, or has another number of rows.
    """

    def __init__(self, url: str, rows: int, table: str = DEFAULT_TABLE) -> None:
        self.service, self.rows, self.table = Service(url.rstrip("/").removesuffix("/tap")), rows, table
        told = self.service.ask(f"SELECT count(*) AS n FROM {self.table}", FORMAT="csv")["start"]
        found = told.decode().split()[-1].strip('"')
        if found != str(rows):
            raise RuntimeError(f"{url}: {table} has {found} rows, expected the {rows} of this benchmark")

    def steps(self, upload: pa.Table, radius_deg: float) -> dict[str, Callable[[], dict[str, Any]]]:
        """What is measured, by the names of ours; what the peer refuses is told in words."""
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "peer: cone 0.1 deg": lambda: self._cones(0.1),
            "peer: cone 1 deg": lambda: self._cones(1.0),
            "peer: BINARY2": self._document,
            "peer: scan and aggregate": self._scan,
            f"peer: match {upload.num_rows // 1000}k": lambda: self._match(upload, radius_deg),
            "peer: async count": self._jobs,
        }
        return {name: lambda step=step: _or_why_not(step) for name, step in steps.items()}  # type: ignore[misc]

    def _cones(self, radius: float) -> dict[str, Any]:
        """The form of a cone that every service knows and has an index for."""
        queries = [
            f"SELECT * FROM {self.table} WHERE 1 = CONTAINS(POINT('ICRS', ra, dec), CIRCLE('ICRS', {ra}, {dec}, {radius}))"
            for ra, dec in centres()
        ]
        return self.service.times([lambda q=query: self.service.ask(q) for query in queries])  # type: ignore[misc]

    def _document(self) -> dict[str, Any]:
        got = self.service.ask(
            f"SELECT TOP {self.rows} * FROM {self.table}", FORMAT="votable/b2", MAXREC=str(self.rows)
        )
        if b'value="OVERFLOW"' in got["start"] + got["end"]:
            raise RuntimeError(f"the peer cuts its answers below {self.rows} rows")
        return {
            "rows_per_s": round(self.rows / got["seconds"]), "first_byte_s": round(got["first"], 3),
            "seconds": round(got["seconds"], 2), "bytes_per_row": round(got["bytes"] / self.rows, 1),
        }  # fmt: skip

    def _scan(self) -> dict[str, Any]:
        query = f"SELECT count(*), avg(g_mag - r_mag), max(visits) FROM {self.table} WHERE r_mag < 21 AND extended = 1"
        return {"seconds": round(min(self.service.ask(query)["seconds"] for _ in range(3)), 3)}

    def _match(self, upload: pa.Table, radius_deg: float) -> dict[str, Any]:
        from astropy.io.votable import from_table
        from astropy.table import Table

        query = (
            f"SELECT u.n, o.objectid FROM TAP_UPLOAD.mine AS u JOIN {self.table} AS o ON 1 = CONTAINS("
            f"POINT('ICRS', o.ra, o.dec), CIRCLE('ICRS', u.ra, u.dec, {radius_deg}))"
        )
        columns = {name: upload.column(name).to_numpy() for name in upload.column_names}
        stream = io.BytesIO()
        from_table(Table(columns)).to_xml(stream, tabledata_format="tabledata")
        body, kind = multipart(query, stream.getvalue(), "mine.vot", MAXREC=str(100 * upload.num_rows))
        taken = [self.service.fetch("/tap/sync", body=body, kind=kind) for _ in range(2)]
        return {"seconds": round(min(got["seconds"] for got in taken), 3), "bytes": taken[0]["bytes"]}

    def _jobs(self) -> dict[str, Any]:
        query = "SELECT count(*) AS n FROM tap_schema.schemas"
        return self.service.times([lambda: self.service.one_job(query, apart=True)] * JOBS)


def _or_why_not(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return step()
    except RuntimeError as error:
        return {"failed": str(error)[:300]}
