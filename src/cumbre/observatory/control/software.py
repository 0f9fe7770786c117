"""What is installed, by hash, and what may run."""

from __future__ import annotations

import hashlib
import platform
from functools import lru_cache
from pathlib import Path

import cumbre
from cumbre.stores.postgres import Database

SUFFIXES = (".py", ".yaml", ".html", ".js", ".css")


@lru_cache(maxsize=1)
def installed_hash() -> str:
    """``sha256:hex`` over names and contents of the installed package's files."""
    root = Path(cumbre.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(root)).encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}"


def accept_installed(db: Database, *, by: str, now_tai: float) -> tuple[str, str]:
    """Record that the software installed here may run; gives version and hash."""
    version, digest = cumbre.__version__, installed_hash()
    db.execute(
        "INSERT INTO control.software VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (version, digest, by, now_tai),
    )
    return version, digest


def is_accepted(db: Database, version: str, digest: str) -> bool:
    """Whether this version with this hash may run."""
    return bool(
        db.execute("SELECT 1 FROM control.software WHERE version = %s AND hash = %s", (version, digest))
    )


def record_installation(db: Database, *, machine: str | None = None, now_tai: float) -> None:
    """Write down what is installed on this machine."""
    db.execute(
        "INSERT INTO control.installation VALUES (%s, %s, %s, %s) ON CONFLICT (machine) DO UPDATE SET "
        "version = excluded.version, hash = excluded.hash, checked_tai = excluded.checked_tai",
        (machine or platform.node() or "localhost", cumbre.__version__, installed_hash(), now_tai),
    )


def wrong_installations(db: Database, version: str) -> list[str]:
    """Machines on which something else is installed than this version with an accepted hash; why."""
    rows = db.execute(
        "SELECT machine, i.version, i.hash, s.hash IS NOT NULL FROM control.installation i "
        "LEFT JOIN control.software s ON s.version = i.version AND s.hash = i.hash ORDER BY machine"
    )
    return [
        f"{machine} has {found} ({digest[:15]}…{'' if accepted else ', not accepted'})"
        for machine, found, digest, accepted in rows
        if found != version or not accepted
    ]
