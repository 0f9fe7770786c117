"""What a release says of itself: one Felis file with its tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cumbre.access.tables import CURVE_UTYPE, Column, CurveColumns, Position, Table
from cumbre.core.configuration import parse_yaml
from cumbre.core.errors import NotFoundError, UserError

if TYPE_CHECKING:
    import pyarrow as pa

DESCRIPTION_FILE = "release.yaml"
PIXEL = "hpx29"
"""Column that the loader adds to tables with a position, and sorts them by."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
_RESERVED = {
    "tap_schema",
    "tap_upload",
    "ivoa",
    "level1",
    "ledger",
    "public",
    "information_schema",
    "snapshot",
    "calibration",
}
_VOTABLE = {
    "boolean": "boolean", "byte": "unsignedByte", "short": "short", "int": "int", "long": "long",
    "float": "float", "double": "double", "string": "char", "char": "char",
}  # fmt: skip


class _Model(BaseModel):
    # Felis has more keys than a loader needs; those are kept in the file and not refused.
    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class ReleaseColumn(_Model):
    """One column."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]
    datatype: Literal["boolean", "byte", "short", "int", "long", "float", "double", "string", "char"]
    nullable: bool = True
    description: Annotated[str, Field(min_length=3)]
    unit: Annotated[str, Field(alias="fits:tunit")] = ""
    ucd: Annotated[str, Field(alias="ivoa:ucd")] = ""
    principal: Annotated[int, Field(alias="tap:principal")] = 0


class ReleasePosition(_Model):
    """Columns of the main position, ICRS degrees."""

    ra: str
    dec: str


class ReleaseCurve(_Model):
    """Which columns make the rows of a table points of light curves.

    ``time`` and ``band`` are columns of the table, or, when ``visits`` names a table, of that one, joined by the
    column ``visit`` of both.
    """

    object: str
    time: str
    band: str
    flux: str
    flux_error: Annotated[str, Field(alias="fluxErr")]
    kind: Literal["detection", "forced"] = "forced"
    visits: str = ""
    visit: str = "visit"

    def columns(self) -> CurveColumns:
        """As the query service knows it."""
        return CurveColumns(
            self.object, self.time, self.band, self.flux, self.flux_error, self.kind, self.visits, self.visit
        )


class ReleaseTable(_Model):
    """One table."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]
    description: Annotated[str, Field(min_length=3)]
    columns: Annotated[list[ReleaseColumn], Field(min_length=1)]
    primary_key: Annotated[str | list[str] | None, Field(alias="primaryKey")] = None
    position: Annotated[ReleasePosition | None, Field(alias="cumbre:position")] = None
    curve: Annotated[ReleaseCurve | None, Field(alias="cumbre:light_curve")] = None

    @property
    def key(self) -> list[str]:
        """Names of the key's columns."""
        given = [self.primary_key] if isinstance(self.primary_key, str) else self.primary_key or []
        return [name.rpartition(".")[2].lstrip("#") for name in given]

    def position_names(self) -> tuple[str, str]:
        """Columns of the position; only for tables that have one."""
        assert self.position is not None
        return self.position.ra, self.position.dec

    @model_validator(mode="after")
    def _consistent(self) -> ReleaseTable:
        names = [column.name for column in self.columns]
        lower = [name.lower() for name in names]
        if len(set(lower)) != len(lower):
            raise ValueError(f"table {self.name}: column names must differ in more than capitals")
        if PIXEL in lower:
            raise ValueError(f"table {self.name}: {PIXEL} is made by the loader; leave it out")
        wanted = [*self.key, *((self.position.ra, self.position.dec) if self.position else ())]
        for name in wanted:
            if name not in names:
                raise ValueError(f"table {self.name}: key or position names {name!r}, which is no column")
        return self

    def has(self, *names: str) -> str | None:
        """The first of some columns that the table has not."""
        known = {column.name for column in self.columns}
        return next((name for name in names if name not in known), None)

    def arrow(self) -> pa.Schema:
        """Arrow schema, with the pixel column when there is a position."""
        import pyarrow as pa

        kinds = {
            "boolean": pa.bool_(), "byte": pa.uint8(), "short": pa.int16(), "int": pa.int32(), "long": pa.int64(),
            "float": pa.float32(), "double": pa.float64(), "string": pa.string(), "char": pa.string(),
        }  # fmt: skip
        fields = [pa.field(c.name, kinds[c.datatype], c.nullable) for c in self.columns]
        if self.position is not None:
            fields.append(pa.field(PIXEL, pa.int64(), nullable=False))
        return pa.schema(fields)

    def published(
        self,
        release: str,
        source: str,
        *,
        public: bool | str,
        rows: int | None,
        objects: frozenset[str] = frozenset(),
    ) -> Table:
        """The table as the query service sees it; ``objects`` are names of columns that have light curves."""
        columns = [
            Column(
                c.name, _VOTABLE[c.datatype], "*" if c.datatype in ("string", "char") else None, unit=c.unit, ucd=c.ucd,
                utype=f"{CURVE_UTYPE}{release}" if c.name in objects else "",
                description=c.description, principal=bool(c.principal),
                indexed=self.position is not None and c.name in (self.position.ra, self.position.dec),
            )
            for c in self.columns
        ]  # fmt: skip
        position = None
        if self.position is not None:
            position = Position(self.position.ra, self.position.dec, PIXEL)
            columns.append(
                Column(
                    PIXEL,
                    "long",
                    ucd="pos.healpix",
                    description="HEALPix pixel, order 29, nested.",
                    indexed=True,
                )
            )
        return Table(
            release,
            self.name,
            tuple(columns),
            self.description,
            "parquet",
            source,
            position,
            public,
            rows=rows,
            curve=None if self.curve is None else self.curve.columns(),
        )


class ReleaseDescription(_Model):
    """The whole release."""

    name: str
    description: Annotated[str, Field(min_length=3)]
    tables: Annotated[list[ReleaseTable], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> ReleaseDescription:
        names = [table.name.lower() for table in self.tables]
        if len(set(names)) != len(names):
            raise ValueError("table names must differ in more than capitals")
        by_name = {table.name: table for table in self.tables}
        for table in self.tables:
            if table.curve is not None:
                _check_curve(table, table.curve, by_name)
        return self

    @property
    def objects(self) -> frozenset[str]:
        """Names of the columns of objects that have light curves."""
        return frozenset(table.curve.object for table in self.tables if table.curve is not None)

    def table(self, name: str) -> ReleaseTable:
        """A table by its name.

        Raises
        ------
        NotFoundError
            There is none.
        """
        for table in self.tables:
            if table.name == name:
                return table
        raise NotFoundError(f"release {self.name}: no table {name!r}")


def _check_curve(table: ReleaseTable, curve: ReleaseCurve, tables: Mapping[str, ReleaseTable]) -> None:
    where = f"table {table.name}: cumbre:light_curve"
    own, joined = [curve.object, curve.flux, curve.flux_error], [curve.time, curve.band]
    if curve.visits:
        if curve.visits not in tables:
            raise ValueError(f"{where}: visits names {curve.visits!r}, which is no table of this release")
        missing = tables[curve.visits].has(*joined, curve.visit)
        if missing is not None:
            raise ValueError(f"{where}: {missing!r} is no column of table {curve.visits}")
        joined = [curve.visit]
    missing = table.has(*own, *joined)
    if missing is not None:
        raise ValueError(f"{where}: {missing!r} is no column")
    kind = next(column.datatype for column in table.columns if column.name == curve.object)
    if kind != "long":
        raise ValueError(f"{where}: object {curve.object!r} is {kind}, expected long")


def check_name(name: str) -> str:
    """A release's name, which is also its schema in queries.

    Raises
    ------
    UserError
        It cannot be used.
    """
    if _NAME.fullmatch(name) is None or name in _RESERVED or name.startswith(("pg_", "snapshot_")):
        raise UserError(
            f"release name {name[:40]!r}: expected small letters, digits and underscores, a letter first, at most 31, and "
            "not a schema that exists already; for example dr1"
        )
    return name


def read_description(folder: Path) -> tuple[ReleaseDescription, str]:
    """Read ``release.yaml`` of a folder; also its text, which is kept.

    Raises
    ------
    NotFoundError
        The folder or the file is not there.
    ConfigurationError
        It is wrong; the message names file, key, value and expectation.
    """
    path = folder / DESCRIPTION_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(
            f"{path}: not there; a release is a folder with {DESCRIPTION_FILE} (Felis) and one Parquet or CSV file, or a "
            "folder of them, for each table"
        ) from None
    return parse_description(text, str(path)), text


def parse_description(text: str, where: str) -> ReleaseDescription:
    """Validate a description's text.

    Raises
    ------
    ConfigurationError
        Names file, key, value and expectation.
    """
    return parse_yaml(text, where, ReleaseDescription)
