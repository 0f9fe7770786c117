"""Verification of a tape: every byte is read again and compared with the index and with the ledger."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.archive.tape import read_entry, view_tape
from cumbre.archive.tape_index import TapeEntry, TapeIndex
from cumbre.archive.tape_shelf import Shelf, hash_volume
from cumbre.capture.keys import RawKey
from cumbre.core.errors import CumbreError
from cumbre.stores.files import normal_checksum, sha256_of

if TYPE_CHECKING:
    from cumbre.core.configuration import Site
    from cumbre.ledger import Ledger

log = logging.getLogger(__name__)

DAMAGED, LOST, DIFFERS, VOLUME, UNTOLD = (
    "damaged",
    "not on tape",
    "differs",
    "volume damaged",
    "not in ledger",
)
HARMLESS = (UNTOLD,)
"""What the ledger does not know of is kept longer than needed; nothing is in danger."""


@dataclass(slots=True)
class Finding:
    """Something that is not as it should be.

    Attributes
    ----------
    problem
        ``damaged`` (bytes of a file), ``volume damaged`` (bytes between files, or no such volume),
        ``not on tape`` (the ledger says it is), ``differs`` (another checksum than the ledger's),
        ``not in ledger`` (the ledger was not told of it yet).
    repaired
        Where the copy that a rewrite was made from is; empty when there was none.
    """

    problem: str
    key: str
    place: str
    message: str
    repaired: str = ""
    entry: TapeEntry | None = None

    def row(self) -> dict[str, str]:
        """As JSON shows it."""
        return {
            "problem": self.problem, "key": self.key, "where": self.place, "message": self.message,
            "repaired_from": self.repaired,
        }  # fmt: skip


@dataclass(slots=True)
class Report:
    """What a verification found."""

    volumes: int = 0
    files: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def damaged(self) -> list[tuple[Finding, TapeEntry]]:
        """Findings that are of one file each: a new copy of it can be written."""
        return [(finding, finding.entry) for finding in self.findings if finding.entry is not None]

    @property
    def is_good(self) -> bool:
        """Whether nothing is in danger."""
        return all(finding.problem in HARMLESS for finding in self.findings)


def total_bytes(index: TapeIndex) -> int:
    """Bytes that a verification will read, about."""
    return sum(max(entry.end for entry in entries) for entries in index.by_volume().values())


def verify(
    index: TapeIndex,
    shelf: Shelf,
    told: list[dict[str, Any]] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Read all volumes.

    Parameters
    ----------
    told
        Rows of the ledger's hop of this tape (obs_id, detector_name, checksum, path); None leaves it out.
    progress
        Called with numbers of bytes read.
    """
    report = Report()
    for volume, entries in index.by_volume().items():
        _verify_volume(index, shelf, volume, entries, report=report, progress=progress)
    if told is not None:
        _compare(index, told, report)
    return report


def _verify_volume(
    index: TapeIndex,
    shelf: Shelf,
    volume: str,
    entries: list[TapeEntry],
    *,
    report: Report,
    progress: Callable[[int], None],
) -> None:
    closed = index.volumes.get(volume)
    size = 0

    def counted() -> Iterator[bytes]:
        nonlocal size
        for block in shelf.blocks(volume):
            size += len(block)
            progress(len(block))
            yield block

    try:
        whole, found = hash_volume(counted(), entries)
    except (CumbreError, OSError) as error:
        whole, found = "", {}
        report.findings.append(Finding(VOLUME, "", volume, str(error)))
    report.volumes += 1
    report.bytes += size
    bad = sum(found.get(entry.offset) != entry.sha256 for entry in entries)
    for entry in entries:
        if index.entries.get(entry.key) != entry:
            continue  # known to be damaged, and written again elsewhere
        report.files += 1
        if found.get(entry.offset) != entry.sha256:
            message = f"{found.get(entry.offset, 'cut off')}, the index says {entry.sha256}"
            report.findings.append(Finding(DAMAGED, entry.key, entry.place, message, entry=entry))
    if closed is not None and whole and whole != closed.sha256 and not bad:
        message = (
            f"{size} bytes with {whole}, closed with {closed.size} and {closed.sha256}; all files are whole"
        )
        report.findings.append(Finding(VOLUME, "", volume, message))


def _compare(index: TapeIndex, told: list[dict[str, Any]], report: Report) -> None:
    here = {_name(RawKey.parse(key)): entry for key, entry in index.entries.items()}
    known: set[tuple[str, str]] = set()
    for row in told:
        name = (str(row["obs_id"]), str(row["detector_name"]))
        known.add(name)
        entry = here.get(name)
        if entry is None:
            message = f"the ledger has it at {row['path']} with {row['checksum']}"
            report.findings.append(Finding(LOST, "/".join(name), str(row["path"]), message))
        elif normal_checksum(str(row["checksum"])) != entry.sha256:
            message = f"{entry.sha256}, the ledger says {row['checksum']}"
            report.findings.append(Finding(DIFFERS, entry.key, entry.place, message))
    for name, entry in here.items():
        if name not in known and RawKey.parse(entry.key).is_detector:
            message = "on tape, not in the ledger (yet)"
            report.findings.append(Finding(UNTOLD, entry.key, entry.place, message))


def _name(key: RawKey) -> tuple[str, str]:
    return str(key.obs_id), key.part


def told_by(ledger: Ledger, place: str) -> list[dict[str, Any]]:
    """What the ledger says to be on a place's tape."""
    return ledger.copies(f"{place}_tape")


def good_copy(site: Site, place: str, entry: TapeEntry) -> tuple[Path | bytes, str] | None:
    """A verified copy of a damaged file, from a raw cache, a buffer or another tape of this site; and where."""
    for name, other in site.config.places.items():
        folders = [] if "://" in other.raw else [site.path(other.raw)]
        folders += [path for store in other.buffers for path in site.path(store).glob("pair-*/data")]
        for folder in folders:
            path = folder / entry.key
            try:
                if path.is_file() and sha256_of(path) == entry.sha256:
                    return path, str(path)
            except (CumbreError, OSError) as error:
                log.warning("%s: %s", path, error)
        if name == place or other.tape is None:
            continue
        try:
            index, shelf = view_tape(site, name)
            copy = index.entries.get(entry.key)
            if copy is not None and copy.sha256 == entry.sha256:
                return read_entry(shelf, copy), f"tape of {name}"
        except (CumbreError, OSError) as error:
            log.warning("tape of %s: %s", name, error)
    return None
