"""Quarantine: what was refused is kept with the reason beside it, never thrown away and never used."""

from __future__ import annotations

import json
from pathlib import Path

from cumbre.core.errors import CumbreError
from cumbre.stores.files import copy_verified, sha256_of, sha256_of_bytes, write_atomic


def quarantine(
    folder: Path, name: str, content: Path | bytes, error: CumbreError, *, at_tai: float, origin: str = ""
) -> Path:
    """Keep a refused file.

    Parameters
    ----------
    folder
        Quarantine folder of the place.
    name
        Readable name; slashes become underscores. The checksum makes it unique, so the same file twice is one.
    content
        The refused file (copied) or its bytes.
    error
        Why; its outcome word and message go to the reason file.

    Returns
    -------
    Path
        The kept file; ``<it>.reason.json`` says why.
    """
    checksum = sha256_of_bytes(content) if isinstance(content, bytes) else sha256_of(content)
    target = folder / f"{checksum.removeprefix('sha256:')[:12]}_{name.replace('/', '_')[-150:]}"
    if not target.exists():
        if isinstance(content, bytes):
            write_atomic(target, content)
        else:
            copy_verified(content, target, checksum)
    reason = {
        "name": name, "outcome": error.outcome, "reason": str(error), "sha256": checksum,
        "origin": origin or (str(content) if isinstance(content, Path) else ""), "tai": at_tai,
    }  # fmt: skip
    write_atomic(target.with_name(f"{target.name}.reason.json"), json.dumps(reason, indent=1).encode())
    return target
