"""Level 1 as it is public on a day, in Parquet: statistics over everything ask it, and get tomorrow what they get today.

A snapshot is a folder that never changes once it has its name. Sources are read before objects, so every source finds
its object. The newest one is the schema ``snapshot``; each that is kept is also ``snapshot_YYYYMMDD``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cumbre.access.limits import Limits
from cumbre.access.published import site_tables
from cumbre.access.tables import CURVE_UTYPE, CurveColumns, Schema, Table
from cumbre.access.user import ANYBODY, User
from cumbre.core.errors import BadFileError, CumbreError
from cumbre.core.time import Clock, day_obs_from_tai
from cumbre.stores.files import sha256_of, sync_folder, write_atomic
from cumbre.stores.postgres import Database

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = "archive/snapshots"
MANIFEST = "manifest.json"
TABLES = ("DiaForcedSource", "DiaSource", "DiaObject")
"""In the order in which they are read."""
_CURVE = ("diaObjectId", "midpointMjdTai", "band", "psfFlux", "psfFluxErr")
CURVES = {"DiaSource": CurveColumns(*_CURVE, "detection"), "DiaForcedSource": CurveColumns(*_CURVE, "forced")}
"""Tables whose rows are points of light curves."""
KEPT = 7
ROW_GROUP = 100_000
QUIET_S = 1800.0
"""Night time without an exposure after which the night is over."""
_LIMITS = Limits(rows=10**10, bytes=1 << 50, seconds=6 * 3600.0, memory_mb=512)


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    """One file of a snapshot."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Level 1 of one observing day."""

    day_obs: int
    made_tai: float
    tables: tuple[SnapshotTable, ...]

    @property
    def schema(self) -> str:
        """Its name in queries."""
        return f"snapshot_{self.day_obs}"


class Snapshots:
    """The snapshots of a site.

    Parameters
    ----------
    folder
        Where they are, one folder a day.
    keep
        The newest so many are kept.
    """

    def __init__(self, db: Database, folder: Path, clock: Clock, *, keep: int = KEPT) -> None:
        self._db, self._folder, self._clock, self._keep = db, folder, clock, keep
        self._read: dict[Path, Snapshot] = {}

    def all(self) -> list[Snapshot]:
        """Those that are there, the newest first."""
        found = []
        for path in sorted(self._folder.glob(f"[0-9]*/{MANIFEST}"), reverse=True):
            if path not in self._read:
                self._read[path] = read_manifest(path)
            found.append(self._read[path])
        return found

    def due(self) -> bool:
        """Whether the night is over and its day has none yet."""
        now = self._clock.now_tai_s()
        if (self._folder / str(day_obs_from_tai(now)) / MANIFEST).exists():
            return False
        rows = self._db.execute("SELECT max(begin_tai) FROM ledger.image")
        if rows[0][0] is None or now - rows[0][0] < QUIET_S:
            return False
        return bool(self._db.execute("SELECT 1 FROM access.level1_diasource_public LIMIT 1"))

    def make(self) -> Snapshot:
        """Today's snapshot: made when it is not there, else as it is.

        Memory does not grow with the rows. What a killed one left is made again.
        """
        now = self._clock.now_tai_s()
        day = day_obs_from_tai(now)
        target = self._folder / str(day)
        if not (target / MANIFEST).exists():
            part = self._folder / f".making-{day}"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            snapshot = Snapshot(day, now, tuple(self._table(name, part) for name in TABLES))
            write_atomic(part / MANIFEST, json.dumps(asdict(snapshot), indent=1).encode())
            sync_folder(part)
            part.replace(target)
            sync_folder(self._folder)
        for old in self.all()[self._keep :]:
            self._read.pop(self._folder / str(old.day_obs) / MANIFEST, None)
            shutil.rmtree(self._folder / str(old.day_obs), ignore_errors=True)
        return read_manifest(target / MANIFEST)

    def _table(self, name: str, folder: Path) -> SnapshotTable:
        path = folder / f"{name}.parquet"
        count = write_public(self._db, name, path)
        return SnapshotTable(name, count, path.stat().st_size, sha256_of(path))

    # what the query service sees

    def tables(self, user: User) -> Iterator[Table]:
        """Tables of the snapshots; everybody may read them."""
        del user
        live = {table.name: table for table in site_tables().visible(ANYBODY) if table.schema == "level1"}
        for number, snapshot in enumerate(self.all()):
            for schema in ("snapshot", snapshot.schema) if number == 0 else (snapshot.schema,):
                for part in snapshot.tables:
                    table = live[part.name]
                    path = self._folder / str(snapshot.day_obs) / f"{part.name}.parquet"
                    mark = f"{CURVE_UTYPE}{snapshot.schema}"
                    columns = tuple(
                        replace(
                            c, sql_name="", storage="", indexed=False, utype=mark if c.name == _CURVE[0] else c.utype
                        )
                        for c in table.columns
                    )  # fmt: skip
                    yield replace(
                        table, schema=schema, engine="parquet", source=str(path), rows=part.rows, columns=columns,
                        curve=CURVES.get(part.name),
                        description=f"{table.description} As it was public on {snapshot.day_obs}.",
                    )  # fmt: skip

    def schemas(self) -> list[Schema]:
        """Descriptions of the snapshots."""
        found = self.all()
        newest = [Schema("snapshot", f"The newest snapshot of Level 1: {found[0].schema}.")] if found else []
        return newest + [Schema(s.schema, f"Level 1 as it was public on {s.day_obs}.") for s in found]


def write_public(db: Database, name: str, path: Path, columns: Sequence[str] = ()) -> int:
    """All public rows of a table of Level 1 in a Parquet file, along the sky where it has a place there.

    Parameters
    ----------
    columns
        Only these; all without any.

    Returns
    -------
    int
        How many rows.
    """
    import pyarrow.parquet as pq

    from cumbre.access.engines import Engines
    from cumbre.access.query import run

    live = site_tables()
    table = live.find("level1", name)
    order = table.position.pixel if table.position and table.position.pixel else table.columns[0].name
    chosen = ", ".join(f'"{column}"' for column in columns) or "*"
    with (
        run(
            f'SELECT {chosen} FROM level1."{name}" ORDER BY "{order}"',  # noqa: S608 (ADQL of our own names)
            tables=live,
            engines=Engines(db),
            limits=_LIMITS,
        ) as result,
        pq.ParquetWriter(path, result.schema, compression="zstd", compression_level=1) as writer,
    ):
        for rows in _grouped(result.batches(), result.schema):
            writer.write_table(rows, row_group_size=ROW_GROUP)
        return result.rows


def _grouped(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Batches joined to row groups."""
    import pyarrow as pa

    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(part.num_rows for part in held) >= ROW_GROUP:
            yield pa.Table.from_batches(held, schema=schema)
            held = []
    if held:
        yield pa.Table.from_batches(held, schema=schema)


def read_manifest(path: Path) -> Snapshot:
    """What a snapshot says of itself.

    Raises
    ------
    BadFileError
        It is damaged.
    """
    try:
        data = json.loads(path.read_text())
        return Snapshot(
            data["day_obs"], data["made_tai"], tuple(SnapshotTable(**item) for item in data["tables"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFileError(f"{path}: not the manifest of a snapshot: {error}") from error


def verify(folder: Path) -> list[str]:
    """Read every byte of a snapshot's folder again; gives what is wrong, nothing when all is right."""
    try:
        snapshot = read_manifest(folder / MANIFEST)
    except CumbreError as error:
        return [str(error)]
    wrong = []
    for part in snapshot.tables:
        path = folder / f"{part.name}.parquet"
        if not path.is_file() or path.stat().st_size != part.bytes or sha256_of(path) != part.sha256:
            wrong.append(f"{path}: missing or damaged: its checksum is not the one of the manifest")
    return wrong
