"""Users' own tables (Level 3; LDM-230 5.3): a schema a user in PostgreSQL, with a quota that is enforced before writing.

Tables live beside Level 1, so joins with it are local; releases are read from Parquet, and the planner joins both.
Names of schemas and tables are made here from a small alphabet; nothing that a user gives is put into SQL as text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.access.identity import AuthorizationError
from cumbre.access.results.types import arrow_type
from cumbre.access.tables import Column, Position, Schema, Table
from cumbre.access.user import User
from cumbre.catalogs.columns import hpx29
from cumbre.core.errors import ConflictError, NotFoundError, UserError
from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Connection, Database

if TYPE_CHECKING:
    import pyarrow as pa

PREFIX = "u_"
PIXEL = "hpx29"
QUOTA_BYTES = 1 << 30
MAX_COLUMNS = 500
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_SQL = {
    "boolean": "boolean", "unsignedByte": "smallint", "short": "smallint", "int": "int", "long": "bigint",
    "float": "real", "double": "float8", "char": "text", "unicodeChar": "text",
}  # fmt: skip
_STEPS = [
    """
CREATE SCHEMA IF NOT EXISTS access;
CREATE TABLE access.user_schema (account text PRIMARY KEY, name text NOT NULL UNIQUE, quota_bytes bigint);
CREATE TABLE access.user_table (
    schema_name text NOT NULL REFERENCES access.user_schema (name), name text NOT NULL, account text NOT NULL,
    description text NOT NULL, columns jsonb NOT NULL, ra text, decl text, shared_with text[] NOT NULL DEFAULT '{}',
    rows bigint NOT NULL DEFAULT 0, created timestamptz NOT NULL DEFAULT now(), changed timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (schema_name, name));
"""
]


class QuotaError(UserError):
    """The user's tables would need more room than they may have."""

    outcome = "QuotaExceeded"


@dataclass(frozen=True, slots=True)
class Usage:
    """Room of a user's tables, bytes with indexes."""

    used: int
    quota: int


class UserTables:
    """Create, load, share and drop tables of users.

    Parameters
    ----------
    quota_bytes
        Of a user for whom no other is set.
    """

    def __init__(self, db: Database, *, quota_bytes: int = QUOTA_BYTES) -> None:
        self._db, self._quota = db, quota_bytes
        migrate(db, "access_user_tables", _STEPS)

    # schemas and room

    def schema_of(self, account: str) -> str:
        """The user's schema, made when absent: ``u_`` and the account's letters and digits."""
        rows = self._db.execute("SELECT name FROM access.user_schema WHERE account = %s", (account,))
        if rows:
            return str(rows[0][0])
        plain = PREFIX + re.sub(r"[^a-z0-9]+", "_", account.lower()).strip("_")[:40]
        # two accounts may differ only in signs that a name cannot have
        longer = f"{plain}_{hashlib.sha256(account.encode()).hexdigest()[:8]}"
        for name in (plain, longer):
            self._db.execute(
                "INSERT INTO access.user_schema (account, name) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                (account, name),
            )
            rows = self._db.execute("SELECT name FROM access.user_schema WHERE account = %s", (account,))
            if rows:
                break
        made = str(rows[0][0])
        self._db.execute(f'CREATE SCHEMA IF NOT EXISTS "{made}"')
        return made

    def usage(self, account: str) -> Usage:
        """Room used and allowed."""
        with self._db.connection() as link:
            return self._usage(link, account)

    def set_quota(self, account: str, quota_bytes: int | None) -> None:
        """Another quota for one user; None for the usual one."""
        self.schema_of(account)
        self._db.execute(
            "UPDATE access.user_schema SET quota_bytes = %s WHERE account = %s", (quota_bytes, account)
        )

    def _usage(self, link: Connection, account: str) -> Usage:
        row = link.execute(
            "SELECT coalesce((SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class c JOIN pg_namespace n"
            " ON n.oid = c.relnamespace WHERE n.nspname = s.name AND c.relkind = 'r'), 0)::bigint, s.quota_bytes"
            " FROM access.user_schema s WHERE s.account = %s",
            (account,),
        ).fetchone()
        used, quota = row or (0, None)
        return Usage(int(used), self._quota if quota is None else int(quota))

    # tables

    def create(self, account: str, name: str, columns: Sequence[Column], description: str = "") -> str:
        """Make an empty table; gives its full name.

        A table with columns ``ra`` and ``dec`` (or with the UCDs of a main position) gets a HEALPix column and its index,
        so that regions and cross-matches are fast.

        Raises
        ------
        UserError
            A name or a type that cannot be used.
        ConflictError
            There is a table of this name.
        AuthorizationError
            The name is in somebody else's schema.
        """
        from psycopg.types.json import Json

        schema, table = self._own(account, name)
        _check_columns(columns)
        position = _position(columns)
        lines = [f'"{c.name.lower()}" {_sql_type(c)}' for c in columns]
        if position is not None:
            lines.append(f"{PIXEL} bigint")
        with self._db.connection() as link:
            made = link.execute(
                "INSERT INTO access.user_table (schema_name, name, account, description, columns, ra, decl)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING RETURNING 1",
                (
                    schema, table, account, description[:2000], Json([_plain(c) for c in columns]),
                    *(position or (None, None)),
                ),
            ).fetchone()  # fmt: skip
            if made is None:
                raise ConflictError(f"table {schema}.{table} is there already; drop it first or append to it")
            link.execute(f'CREATE TABLE "{schema}"."{table}" ({", ".join(lines)})'.encode())
            if position is not None:
                link.execute(f'CREATE INDEX ON "{schema}"."{table}" ({PIXEL})'.encode())
        return f"{schema}.{table}"

    def append(self, account: str, name: str, rows: pa.Table) -> int:
        """Add rows, all or none; gives the number of rows the table then has.

        Columns are taken by name, capitals ignored; absent ones are null.

        Raises
        ------
        QuotaError
            There is no room for them; nothing was written.
        UserError
            A column that the table does not have, or a value of another type.
        """
        import pyarrow as pa

        schema, table = self._own(account, name)
        described = self._columns(schema, table)
        have = {column.lower(): column for column in rows.column_names}
        known = {column.name.lower() for column in described}
        if extra := sorted(set(have) - known - {PIXEL}):
            raise UserError(
                f"{schema}.{table} has no column {', '.join(extra[:5])}; it has {', '.join(sorted(known))[:300]}"
            )
        arrays, names = [], []
        for column in described:
            if column.name.lower() not in have:
                continue
            values = rows.column(have[column.name.lower()])
            try:
                arrays.append(values.cast(arrow_type(column)))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise UserError(
                    f"column {column.name}: expected {column.datatype}: {str(error)[:200]}"
                ) from error
            names.append(column.name.lower())
        ready = pa.table(arrays, names=names)
        ready = self._with_pixels(schema, table, ready)
        with self._db.connection() as link:
            # one writer a user at a time, so that two of them cannot both fit into the last room
            link.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (f"cumbre user {account}",))
            usage = self._usage(link, account)
            need = ready.nbytes + 40 * ready.num_rows  # a row's head in PostgreSQL and its place in the index
            if usage.used + need > usage.quota:
                raise QuotaError(
                    f"your tables use {usage.used / 1e6:,.1f} MB of {usage.quota / 1e6:,.1f} MB and these {ready.num_rows:,} "
                    f"rows need about {need / 1e6:,.1f} MB; drop a table, or ask for a larger quota"
                )
            self._db.copy(f"{schema}.{table}", ready.column_names, ready, connection=link)
            row = link.execute(
                "UPDATE access.user_table SET rows = rows + %s, changed = now() WHERE schema_name = %s AND name = %s"
                " RETURNING rows",
                (ready.num_rows, schema, table),
            ).fetchone()
        assert row is not None
        return int(row[0])

    def drop(self, account: str, name: str) -> None:
        """Delete a table.

        Raises
        ------
        NotFoundError
            There is none.
        """
        schema, table = self._own(account, name)
        with self._db.connection() as link:
            gone = link.execute(
                "DELETE FROM access.user_table WHERE schema_name = %s AND name = %s RETURNING 1",
                (schema, table),
            ).fetchone()
            if gone is None:
                raise NotFoundError(f"there is no table {schema}.{table}")
            link.execute(f'DROP TABLE IF EXISTS "{schema}"."{table}"'.encode())

    def add_index(self, account: str, name: str, column: str, *, unique: bool = False) -> None:
        """Index a column.

        Raises
        ------
        UserError
            Values are not unique, or there is no such column.
        """
        schema, table = self._own(account, name)
        found = next((c for c in self._columns(schema, table) if c.name.lower() == column.lower()), None)
        if found is None:
            raise UserError(f"{schema}.{table} has no column {column[:60]!r}")
        kind = "UNIQUE INDEX" if unique else "INDEX"
        index = f"i_{hashlib.sha256(f'{table}.{found.name}.{unique}'.lower().encode()).hexdigest()[:16]}"
        try:
            self._db.execute(
                f'CREATE {kind} IF NOT EXISTS {index} ON "{schema}"."{table}" ("{found.name.lower()}")'
            )
        except Exception as error:
            if "duplicate" in str(error) or "unique" in str(error).lower():
                raise UserError(
                    f"{schema}.{table}: column {found.name} has values that are not unique"
                ) from error
            raise

    def share(self, account: str, name: str, groups: Iterable[str]) -> None:
        """Let groups read a table; an empty list takes it back."""
        schema, table = self._own(account, name)
        changed = self._db.execute(
            "UPDATE access.user_table SET shared_with = %s WHERE schema_name = %s AND name = %s RETURNING 1",
            (sorted(set(groups)), schema, table),
        )
        if not changed:
            raise NotFoundError(f"there is no table {schema}.{table}")

    # what the query service sees

    def tables(self, user: User) -> Iterator[Table]:
        """Tables that are the user's or shared with a group of the user."""
        if user.name is None and not user.groups:
            return
        rows = self._db.execute(
            "SELECT schema_name, name, account, description, columns, ra, decl, shared_with, rows FROM access.user_table"
            " WHERE account = %s OR shared_with && %s::text[] ORDER BY schema_name, name",
            (user.name, sorted(user.groups)),
        )
        for schema, name, account, description, columns, ra, dec, shared, count in rows:
            own = user.name is not None and account == user.name
            public = f"user:{account}" if own else sorted(set(shared) & user.groups)[0]
            position = Position(ra, dec, PIXEL) if ra else None
            described = [Column(**column) for column in columns]
            if position is not None:
                described.append(
                    Column(PIXEL, "long", ucd="pos.healpix", description="HEALPix pixel.", indexed=True)
                )
            yield Table(
                schema, name, tuple(described), description, "postgres", f'"{schema}"."{name}"', position, public,
                rows=int(count),
            )  # fmt: skip

    def schemas(self) -> list[Schema]:
        """Descriptions of all users' schemas."""
        rows = self._db.execute("SELECT name, account FROM access.user_schema ORDER BY name")
        return [Schema(name, f"Tables of {account}.") for name, account in rows]

    # helpers

    def _own(self, account: str, name: str) -> tuple[str, str]:
        """Schema and table of a name given with or without the schema."""
        schema = self.schema_of(account)
        before, _, table = name.rpartition(".")
        if before and before.lower() != schema:
            raise AuthorizationError(f"{account}: {before[:60]} is not your schema; yours is {schema}")
        if _NAME.fullmatch(table) is None:
            raise UserError(
                f"table name {table[:60]!r}: expected a letter or underscore, then up to 62 letters, digits, underscores"
            )
        return schema, table.lower()

    def _columns(self, schema: str, table: str) -> list[Column]:
        rows = self._db.execute(
            "SELECT columns FROM access.user_table WHERE schema_name = %s AND name = %s", (schema, table)
        )
        if not rows:
            raise NotFoundError(f"there is no table {schema}.{table}; create it first")
        return [Column(**column) for column in rows[0][0]]

    def _with_pixels(self, schema: str, table: str, rows: pa.Table) -> pa.Table:
        import pyarrow as pa

        found = self._db.execute(
            "SELECT ra, decl FROM access.user_table WHERE schema_name = %s AND name = %s", (schema, table)
        )
        ra_name, dec_name = found[0] if found else (None, None)
        if ra_name is None or not {ra_name.lower(), dec_name.lower()} <= set(rows.column_names):
            return rows
        ra, dec = (
            rows.column(name.lower()).to_numpy(zero_copy_only=False).astype(float)
            for name in (ra_name, dec_name)
        )
        good = np.isfinite(ra) & np.isfinite(dec) & (np.abs(dec) <= 90)
        pixels = np.zeros(len(ra), np.int64)
        pixels[good] = hpx29(ra[good], dec[good])
        return rows.append_column(PIXEL, pa.array(pixels, mask=~good))


def _check_columns(columns: Sequence[Column]) -> None:
    if not 0 < len(columns) <= MAX_COLUMNS:
        raise UserError(f"{len(columns)} columns: expected 1 to {MAX_COLUMNS}")
    seen: set[str] = set()
    for column in columns:
        if _NAME.fullmatch(column.name) is None or column.name.lower() == PIXEL:
            raise UserError(
                f"column name {column.name[:60]!r}: expected a letter or underscore, then up to 62 letters, digits, "
                f"underscores, and not {PIXEL}, which is made here"
            )
        if column.name.lower() in seen:
            raise UserError(f"column {column.name} stands twice")
        seen.add(column.name.lower())
        _sql_type(column)


def _sql_type(column: Column) -> str:
    kind = _SQL.get(column.datatype)
    if kind is None or (kind != "text" and column.arraysize not in (None, "", "1")):
        raise UserError(
            f"column {column.name}: datatype {column.datatype}"
            + (f" with arraysize {column.arraysize}" if column.arraysize else "")
            + f": expected a single {', '.join(k for k in _SQL)}"
        )
    return kind


def _plain(column: Column) -> dict[str, Any]:
    """The published description, without where it came from."""
    kept = asdict(column) | {"sql_name": column.name.lower(), "storage": "", "std": False, "indexed": False}
    if column.datatype in ("char", "unicodeChar"):
        kept |= {"datatype": "char", "arraysize": "*"}
    elif column.datatype == "unsignedByte":
        kept["datatype"] = "short"
    return kept


def _position(columns: Sequence[Column]) -> tuple[str, str] | None:
    """Names of the main position: by UCD, else ``ra`` and ``dec``."""

    def find(ucd: str, names: tuple[str, ...]) -> str | None:
        numbers = [c for c in columns if c.datatype in ("float", "double")]
        for column in numbers:
            words = column.ucd.lower().split(";")
            if ucd in words and "meta.main" in words:
                return column.name
        return next((c.name for c in numbers if c.name.lower() in names), None)

    ra, dec = find("pos.eq.ra", ("ra",)), find("pos.eq.dec", ("dec", "decl"))
    return (ra, dec) if ra and dec else None
