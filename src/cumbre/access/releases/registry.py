"""Releases of a site: their files below one folder, their state in PostgreSQL, every step kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cumbre.access.identity import ADMINISTRATORS, RELEASE_TESTERS
from cumbre.access.releases.description import (
    DESCRIPTION_FILE,
    ReleaseDescription,
    check_name,
    parse_description,
    read_description,
)
from cumbre.access.releases.life import Known, State, Verb, step, to_close
from cumbre.access.releases.load import Progress, ReleaseFile, stage, verify
from cumbre.access.tables import Schema, Table
from cumbre.access.user import User
from cumbre.core.errors import ConflictError, NotFoundError, UserError
from cumbre.core.time import Clock, isot, utc_from_tai
from cumbre.stores.files import sha256_of_bytes
from cumbre.stores.migrations import migrate
from cumbre.stores.postgres import Connection, Database

_STEPS = [
    """
CREATE SCHEMA IF NOT EXISTS release;
CREATE TABLE release.release (
    name text PRIMARY KEY, description text NOT NULL, folder text NOT NULL, sha256 text NOT NULL, state text NOT NULL,
    rows bigint NOT NULL, bytes bigint NOT NULL, number int UNIQUE, loaded_tai float8 NOT NULL, opened_tai float8,
    closed_tai float8, tables jsonb NOT NULL);
CREATE TABLE release.history (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL, verb text NOT NULL, state text,
    at_tai float8 NOT NULL, who text NOT NULL, message text NOT NULL);
"""
]


@dataclass(frozen=True, slots=True)
class Release:
    """A release as the database has it."""

    name: str
    description: str
    folder: Path
    sha256: str
    state: State
    rows: int
    bytes: int
    number: int | None
    tables: dict[str, int]

    def public(self) -> dict[str, Any]:
        """For people and JSON."""
        return {
            "name": self.name, "state": self.state, "rows": self.rows, "bytes": self.bytes, "tables": self.tables,
            "description": self.description, "folder": str(self.folder),
        }  # fmt: skip


class Releases:
    """Load, verify, open and close.

    Parameters
    ----------
    folder
        Where the files of all releases are.
    who
        Name written into the history.
    """

    def __init__(self, db: Database, folder: Path, clock: Clock, *, who: str = "operator") -> None:
        self._db, self._folder, self._clock, self._who = db, folder, clock, who
        migrate(db, "release", _STEPS)

    def load(self, source: Path, *, name: str | None = None, progress: Progress = lambda *_: None) -> Release:
        """Take a release from a folder, hidden.

        What a killed load left is completed by the next one of the same files.

        Parameters
        ----------
        name
            Name other than the description's.

        Raises
        ------
        ConflictError
            A release has this name already.
        UserError, UnprocessableDataError
            The folder, its description or its files cannot be used.
        """
        described, text = read_description(source)
        name = check_name(name or described.name)
        for known in self.all():
            if known.name == name:
                raise ConflictError(
                    f"release {name} is there already ({known.state}); give another --name, or, while it was never open, "
                    f"first: cumbre release drop {name}"
                )
        self._folder.mkdir(parents=True, exist_ok=True)
        files = stage(source, self._folder / name, described, text, progress=progress)
        self._register(name, described, sha256_of_bytes(text.encode()), files)
        return self.find(name)

    def _register(
        self, name: str, described: ReleaseDescription, digest: str, files: list[ReleaseFile]
    ) -> None:
        from psycopg.types.json import Json

        rows = {table.name: sum(f.rows for f in files if f.table == table.name) for table in described.tables}
        with self._db.connection() as link:
            link.execute(
                "INSERT INTO release.release (name, description, folder, sha256, state, rows, bytes, loaded_tai, tables)"
                " VALUES (%s, %s, %s, %s, 'hidden', %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                (
                    name, described.description, str(self._folder / name), digest, sum(rows.values()),
                    sum(f.bytes for f in files), self._clock.now_tai_s(), Json(rows),
                ),
            )  # fmt: skip
            self._note(link, name, "load", "hidden", f"{sum(rows.values())} rows in {len(files)} files")

    def all(self) -> list[Release]:
        """Every release in the order of loading."""
        rows = self._db.execute(
            "SELECT name, description, folder, sha256, state, rows, bytes, number, tables FROM release.release"
            " ORDER BY loaded_tai, name"
        )
        return [Release(r[0], r[1], Path(r[2]), *r[3:]) for r in rows]

    def find(self, name: str) -> Release:
        """One release.

        Raises
        ------
        NotFoundError
            There is none of that name.
        """
        releases = self.all()
        for release in releases:
            if release.name == name:
                return release
        names = ", ".join(release.name for release in releases) or "none"
        raise NotFoundError(f"no release {name!r}; there are: {names}")

    def history(self, name: str) -> list[dict[str, Any]]:
        """Every step of a release."""
        rows = self._db.execute(
            "SELECT verb, state, at_tai, who, message FROM release.history WHERE name = %s ORDER BY id",
            (name,),
        )
        return [
            {"verb": r[0], "state": r[1], "at": isot(utc_from_tai(r[2]), 0), "who": r[3], "message": r[4]}
            for r in rows
        ]

    def verify(self, name: str, progress: Progress = lambda *_: None) -> list[str]:
        """Read every byte again; gives what is wrong. Damage hides a verified release and closes an open one."""
        release = self.find(name)
        wrong = verify(release.folder, progress)
        message = "; ".join(wrong[:10]) if wrong else "every byte read"
        self._move(name, "reject" if wrong else "verify", message)
        return wrong

    def open(self, name: str) -> list[str]:
        """Open a release to everybody; gives the names of those that the rule closed."""
        return self._move(name, "open", "opened")

    def close(self, name: str) -> None:
        """Close an open release: only its testers read it then."""
        self._move(name, "close", "closed")

    def drop(self, name: str) -> None:
        """Forget a release that was never opened, and delete its files."""
        release = self.find(name)
        if release.folder.parent != self._folder:
            raise UserError(f"release {name}: its files are outside {self._folder}; nothing was deleted")
        self._move(name, "drop", "dropped")
        # The row is gone first: files without a row are completed or deleted, rows without files would fail queries.
        shutil.rmtree(release.folder, ignore_errors=True)

    def _move(self, name: str, verb: Verb, message: str) -> list[str]:
        """One step of the machine, and what it causes, in one transaction."""
        now = self._clock.now_tai_s()
        with self._db.connection() as link:
            link.execute("LOCK TABLE release.release IN SHARE ROW EXCLUSIVE MODE")
            rows = link.execute("SELECT name, state, number FROM release.release").fetchall()
            known = {row[0]: Known(*row) for row in rows}
            if name not in known:
                raise NotFoundError(f"no release {name!r}")
            state = step(name, _state(known[name].state), verb)
            closing = to_close(list(known.values()), name) if verb == "open" else []
            if state is None:
                link.execute("DELETE FROM release.release WHERE name = %s", (name,))
            else:
                self._set(link, name, state, now)
            if verb == "open" and known[name].number is None:
                link.execute(
                    "UPDATE release.release SET number = (SELECT coalesce(max(number), 0) + 1 FROM release.release)"
                    " WHERE name = %s",
                    (name,),
                )
            self._note(link, name, verb, state, message)
            for other in closing:
                self._set(link, other, "closed", now)
                self._note(link, other, "close", "closed", f"{name} was opened")
        return closing

    @staticmethod
    def _set(link: Connection, name: str, state: State, now: float) -> None:
        link.execute(
            "UPDATE release.release SET state = %s, opened_tai = CASE WHEN %s = 'open' THEN coalesce(opened_tai, %s) ELSE"
            " opened_tai END, closed_tai = CASE WHEN %s = 'closed' THEN %s END WHERE name = %s",
            (state, state, now, state, now, name),
        )

    def _note(self, link: Connection, name: str, verb: str, state: str | None, message: str) -> None:
        link.execute(
            "INSERT INTO release.history (name, verb, state, at_tai, who, message) VALUES (%s, %s, %s, %s, %s, %s)",
            (name, verb, state, self._clock.now_tai_s(), self._who, message),
        )

    # what the query service sees

    def tables(self, user: User) -> Iterator[Table]:
        """Tables of all releases; those that are not open only for the testers."""
        for release in self.all():
            public: bool | str = release.state == "open"
            if not public:
                public = next((g for g in (RELEASE_TESTERS, ADMINISTRATORS) if g in user.groups), False)
            if not user.may_read(public):
                continue
            text = (release.folder / DESCRIPTION_FILE).read_text()
            described = parse_description(text, str(release.folder))
            for table in described.tables:
                source = str(release.folder / table.name / "*.parquet")
                yield table.published(
                    release.name,
                    source,
                    public=public,
                    rows=release.tables.get(table.name),
                    objects=described.objects,
                )

    def schemas(self) -> list[Schema]:
        """Descriptions of the releases."""
        return [Schema(release.name, release.description) for release in self.all()]


def _state(word: str) -> State:
    assert word in ("hidden", "verified", "open", "closed")
    return word  # type: ignore[return-value]
