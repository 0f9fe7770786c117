"""A shipment: a disk with images, telemetry and a manifest that names every byte of both.

``manifest.json`` lists keys, sizes, checksums, times and sky; ``manifest.sha256`` proves it and is written last.
What a manifest says is checked like anything from outside: no path, size or checksum of it is believed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cumbre.archive.protocol import Parcel
from cumbre.archive.tape_index import Sky
from cumbre.core.errors import BadFileError, CumbreError, NotFoundError
from cumbre.stores.files import sha256_of, sha256_of_bytes, write_atomic

FORMAT = "cumbre shipment 1"
MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
IMAGES, TELEMETRY = "images", "telemetry"
MAX_MANIFEST_BYTES = 512 << 20
MAX_TELEMETRY_BYTES = 1 << 40

Progress = Callable[[int], None]
"""Called with the number of bytes that were handled since the last call."""


@dataclass(frozen=True, slots=True)
class Item:
    """One raw file of a shipment."""

    parcel: Parcel
    sky: Sky

    def body(self) -> dict[str, Any]:
        """Its entry of the manifest."""
        parcel = {key: value for key, value in asdict(self.parcel).items() if value}
        return parcel | {key: value for key, value in asdict(self.sky).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Recording:
    """One file of bus messages, a line each."""

    file: str
    size: int
    sha256: str
    since_tai: float
    until_tai: float
    messages: int


@dataclass(slots=True)
class Manifest:
    """Everything on a disk."""

    shipment: str
    source: str
    made_tai: float
    items: dict[str, Item] = field(default_factory=dict)
    recordings: dict[str, Recording] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of images and telemetry."""
        images = sum(item.parcel.size for item in self.items.values())
        return images + sum(item.size for item in self.recordings.values())


@dataclass(slots=True)
class Report:
    """What an export or import did; ``refused`` has a file, an outcome and a message each."""

    shipment: str = ""
    copied: int = 0
    present: int = 0
    bytes: int = 0
    telemetry_files: int = 0
    telemetry_messages: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)


def write_manifest(disk: Path, manifest: Manifest) -> None:
    """Write the manifest, then its seal."""
    body = {
        "format": FORMAT,
        "shipment": manifest.shipment,
        "source": manifest.source,
        "made_tai": manifest.made_tai,
        "images": [item.body() for _, item in sorted(manifest.items.items())],
        "telemetry": [asdict(item) for _, item in sorted(manifest.recordings.items())],
    }
    content = json.dumps(body, indent=0).encode()
    (disk / SEAL).unlink(missing_ok=True)
    write_atomic(disk / MANIFEST, content)
    write_atomic(disk / SEAL, f"{sha256_of_bytes(content)}  {MANIFEST}\n".encode())


def read_manifest(disk: Path) -> Manifest:
    """Read and check a manifest.

    Raises
    ------
    NotFoundError
        No finished shipment is on the disk.
    BadFileError
        The manifest is not what its seal says, or not what a manifest may be.
    """
    path, seal = disk / MANIFEST, disk / SEAL
    if not (path.is_file() and seal.is_file()):
        raise NotFoundError(
            f"{disk}: no finished shipment ({MANIFEST} and {SEAL}); run the export again, it goes on where it was"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES or seal.stat().st_size > 1000:
        raise BadFileError(f"{path}: larger than a manifest may be")
    content = path.read_bytes()
    if seal.read_text(errors="replace").split()[:1] != [sha256_of_bytes(content)]:
        raise BadFileError(f"{path}: its checksum is not that of {SEAL}; nothing of this disk is taken")
    try:
        body = json.loads(content)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise BadFileError(f"{path}: format: expected {FORMAT!r}")
        manifest = Manifest(_word(body["shipment"]), _word(body["source"]), float(body["made_tai"]))
        for said in body["images"]:
            item = Item(Parcel.checked(said), _sky(said))
            if item.parcel.key in manifest.items:
                raise BadFileError(f"{path}: {item.parcel.key} is listed twice")
            manifest.items[item.parcel.key] = item
        for said in body["telemetry"]:
            recording = _recording(said)
            manifest.recordings[recording.file] = recording
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadFileError(f"{path}: not a manifest: {type(error).__name__}: {error}") from error
    return manifest


def _word(value: Any) -> str:
    if (
        not isinstance(value, str)
        or not value.isascii()
        or not value.replace("-", "").isalnum()
        or len(value) > 64
    ):
        raise BadFileError(f"manifest: {str(value)[:80]!r}: expected a word of letters, digits and dashes")
    return value


def _sky(said: dict[str, Any]) -> Sky:
    names = ("begin_tai", "ra", "dec", "radius_deg")
    return Sky(*(None if said.get(name) is None else float(said[name]) for name in names))


def _recording(said: dict[str, Any]) -> Recording:
    name, size = said["file"], said["size"]
    if not isinstance(name, str) or not name.endswith(".jsonl"):
        raise BadFileError(f"manifest: telemetry {str(name)[:80]!r}: expected name.jsonl")
    _word(name.removesuffix(".jsonl"))
    if not isinstance(size, int) or not 0 <= size <= MAX_TELEMETRY_BYTES:
        raise BadFileError(f"manifest: telemetry {name}: size {size!r}")
    return Recording(
        name,
        size,
        str(said["sha256"]),
        float(said["since_tai"]),
        float(said["until_tai"]),
        int(said["messages"]),
    )


def checked_path(disk: Path, relative: str, size: int) -> Path:
    """Path of a file of the disk, which is a plain file of this size at this very place.

    Raises
    ------
    BadFileError
        It is absent, a link, reached through a link, no plain file, or of another size.
    """
    root = disk.resolve()
    path = root / relative
    try:
        real, info = path.resolve(strict=True), os.lstat(path)
    except (OSError, RuntimeError) as error:
        raise BadFileError(f"{path}: in the manifest, not on the disk ({error})") from error
    if real != path or not stat.S_ISREG(info.st_mode):
        raise BadFileError(f"{path}: a link or no plain file: not taken")
    if info.st_size != size:
        raise BadFileError(f"{path}: {info.st_size} bytes, the manifest says {size}")
    return path


def verify(disk: Path, progress: Progress = lambda _: None) -> list[dict[str, str]]:
    """Read every byte of a shipment again; gives what is wrong (``file``, ``problem``), none when all is well.

    Raises
    ------
    NotFoundError, BadFileError
        No shipment, or a manifest that is not what it should be.
    """
    manifest = read_manifest(disk)
    wrong: list[dict[str, str]] = []
    listed = [(f"{IMAGES}/{i.parcel.key}", i.parcel.size, i.parcel.sha256) for i in manifest.items.values()]
    listed += [(f"{TELEMETRY}/{r.file}", r.size, r.sha256) for r in manifest.recordings.values()]
    for relative, size, sha256 in listed:
        try:
            found = sha256_of(checked_path(disk, relative, size))
            if found != sha256:
                raise BadFileError(f"{relative}: {found}, the manifest says {sha256}")
        except (CumbreError, OSError) as error:
            wrong.append({"file": relative, "problem": str(error)})
        progress(size)
    known = {relative for relative, _, _ in listed}
    for folder in (IMAGES, TELEMETRY):
        for path in sorted((disk / folder).rglob("*")):
            relative = path.relative_to(disk).as_posix()
            if not path.is_dir() and relative not in known:
                wrong.append({"file": relative, "problem": "not in the manifest"})
    return wrong
