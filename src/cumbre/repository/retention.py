"""Cleaning a repository: old raws go, when it is proven that others have them.

The proof is a callable, in practice ``Ledger.may_delete``: this module deletes nothing that it does not vouch
for. Whatever is in a TAGGED collection stays, because somebody wants it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cumbre.repository.store import Repository, raw_run

log = logging.getLogger(__name__)
Proof = Callable[[str, int], bool]


@dataclass(slots=True)
class Cleaned:
    """What a cleaning did: (obs_id, detector) of each raw."""

    removed: list[tuple[str, int]] = field(default_factory=list)
    unproven: list[tuple[str, int]] = field(default_factory=list)
    tagged: list[tuple[str, int]] = field(default_factory=list)
    freed_bytes: int = 0


def clean(
    repository: Repository,
    older_than_tai: float,
    *,
    may_delete: Proof,
    keep_tagged: bool = True,
    delete_files: bool = True,
) -> Cleaned:
    """Remove raws of exposures that ended before a time.

    Parameters
    ----------
    repository
        Opened for writing.
    older_than_tai
        TAI seconds.
    may_delete
        ``may_delete(obs_id, detector)``: whether the copies that policy asks for are proven elsewhere.
    keep_tagged
        Keep what is in a TAGGED collection.
    delete_files
        Also delete the file of a raw that was ingested in place (``transfer=direct``).

    Returns
    -------
    Cleaned
        Removed, kept for want of proof, kept because tagged, and bytes freed.
    """
    butler, out = repository.butler, Cleaned()
    tagged = _tagged_ids(repository) if keep_tagged else set()
    for record in butler.query_dimension_records("instrument", explain=False):
        refs = butler.query_datasets(
            "raw",
            collections=raw_run(record.name),
            instrument=record.name,
            with_dimension_records=True,
            explain=False,
            limit=None,
        )
        doomed = []
        for ref in refs:
            exposure = ref.dataId.records["exposure"]
            if exposure.timespan.end.unix_tai >= older_than_tai:
                continue
            key = (str(exposure.obs_id), int(ref.dataId["detector"]))
            if ref.id in tagged:
                out.tagged.append(key)
            elif not may_delete(*key):
                out.unproven.append(key)
            else:
                doomed.append((ref, key, Path(butler.getURI(ref).ospath)))
        if not doomed:
            continue
        # Out of the registry first: a reader must never find a dataset whose file is gone.
        butler.pruneDatasets([ref for ref, _, _ in doomed], disassociate=True, unstore=True, purge=True)
        for _, key, path in doomed:
            size = path.stat().st_size if path.is_file() else 0
            if delete_files:
                path.unlink(missing_ok=True)
            out.removed.append(key)
            out.freed_bytes += size if delete_files else 0
    if out.unproven:
        log.warning("%d old raws are not proven elsewhere and were kept", len(out.unproven))
    return out


def _tagged_ids(repository: Repository) -> set[object]:
    from lsst.daf.butler import CollectionType

    butler = repository.butler
    names = [
        info.name for info in butler.collections.query_info("*", collection_types={CollectionType.TAGGED})
    ]
    out: set[object] = set()
    for name in names:
        out |= {ref.id for ref in butler.query_datasets("raw", collections=name, explain=False, limit=None)}
    return out
