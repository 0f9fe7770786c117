"""Schemas that know their version.

A component gives its name and an ever-growing list of SQL steps; each step runs once, in a transaction,
under an advisory lock, so any number of processes may call :func:`migrate` at the same time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from cumbre.core.errors import ConflictError
from cumbre.stores.postgres import Database

_LOCK = 0x63756D627265  # "cumbre"


def migrate(database: Database, component: str, steps: Sequence[str]) -> int:
    """Bring ``component`` to version ``len(steps)``.

    Returns
    -------
    int
        Number of steps that ran now (0 when it was up to date).

    Raises
    ------
    ConflictError
        A step that ran earlier has another text now (never edit a step: append one), or the database is
        newer than this program.
    """
    digests = [hashlib.sha256(step.encode()).hexdigest() for step in steps]
    with database.connection() as link:
        link.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        link.execute(
            "CREATE TABLE IF NOT EXISTS public.cumbre_migration ("
            "component text, version int, sha256 text NOT NULL, applied timestamptz DEFAULT now(), "
            "PRIMARY KEY (component, version))"
        )
        done = link.execute(
            "SELECT version, sha256 FROM public.cumbre_migration WHERE component = %s ORDER BY version",
            (component,),
        ).fetchall()
        if len(done) > len(steps):
            raise ConflictError(
                f"schema {component}: the database has version {len(done)}, this program knows {len(steps)}; "
                "use a newer cumbre with this site"
            )
        for version, digest in done:
            if digests[version - 1] != digest:
                raise ConflictError(
                    f"schema {component}: step {version} differs from the one that ran; "
                    "steps are never edited, append a new one"
                )
        for version in range(len(done) + 1, len(steps) + 1):
            link.execute(steps[version - 1].encode())
            link.execute(
                "INSERT INTO public.cumbre_migration (component, version, sha256) VALUES (%s, %s, %s)",
                (component, version, digests[version - 1]),
            )
    return len(steps) - len(done)
