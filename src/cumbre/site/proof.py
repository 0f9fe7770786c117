"""Proof that nothing was lost: from the camera's own store, the ledger, and every stored byte read again.

The camera's store is the truth, not our own books: what has an ``exposure.json`` there was taken. Each of its
detectors must be in the raw cache of base and archive exactly once, as a file whose pixels, decoded, are the
camera's array; and on the tape of each place that has one, readable. The ledger must say the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumbre.archive.tape import read_entry, view_tape
from cumbre.archive.tape_index import TapeEntry
from cumbre.capture.daq import EXPOSURE_FILE, DaqImage, images
from cumbre.capture.keys import RawKey
from cumbre.core.configuration import Site
from cumbre.core.errors import BadFileError, CumbreError, NotFoundError
from cumbre.core.instrument import Detector, Instrument, load_instrument
from cumbre.stores.files import sha256_of, sha256_of_bytes

if TYPE_CHECKING:
    from cumbre.stores.postgres import Database

DAQ = "summit/daq"
PLACES = ("base", "archive")

Piece = tuple[str, str]
"""obs_id and detector name."""


@dataclass(slots=True)
class Proof:
    """What was found.

    Attributes
    ----------
    taken
        obs_ids of the images in the camera's store.
    pieces
        Number of detector images of them.
    verified
        Place → number of images whose every detector is there once, with the camera's pixels.
    on_tape
        Place → number of detector images readable from its tape.
    lost
        Detector images that are missing or wrong somewhere, with what is wrong.
    duplicated
        Detector images that are somewhere more than once, with where.
    foreign
        Files and tape entries of images that the camera never took.
    books
        Where the ledger and the stored bytes disagree.
    """

    taken: list[str] = field(default_factory=list)
    pieces: int = 0
    verified: dict[str, int] = field(default_factory=dict)
    on_tape: dict[str, int] = field(default_factory=dict)
    lost: dict[Piece, list[str]] = field(default_factory=lambda: defaultdict(list))
    duplicated: dict[Piece, list[str]] = field(default_factory=lambda: defaultdict(list))
    foreign: list[str] = field(default_factory=list)
    books: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing lost, nothing twice, nothing of unknown origin, and the books agree."""
        return not (self.lost or self.duplicated or self.foreign or self.books)

    def problems(self, limit: int = 50) -> list[str]:
        """Lines for people."""
        lines = [f"{' '.join(piece)}: {'; '.join(told)}" for piece, told in sorted(self.lost.items())]
        lines += [f"{' '.join(p)}: twice: {'; '.join(t)}" for p, t in sorted(self.duplicated.items())]
        lines += [f"not of this camera: {item}" for item in self.foreign]
        return (lines + self.books)[:limit]

    def public(self) -> dict[str, Any]:
        """Numbers for JSON."""
        return {
            "images_taken": len(self.taken),
            "detector_images": self.pieces,
            **{f"verified_{place}": count for place, count in self.verified.items()},
            "lost": len({obs_id for obs_id, _ in self.lost}),
            "duplicated": len({obs_id for obs_id, _ in self.duplicated}),
            "foreign": len(self.foreign),
            "ledger_disagreements": len(self.books),
            "on_tape": self.on_tape,
            "problems": self.problems(),
        }


@dataclass(frozen=True, slots=True)
class _Truth:
    """One detector image as the camera stored it."""

    instrument: Instrument
    detector: Detector
    array: NDArray[np.uint16]
    source: str


class _Camera:
    """The camera's store, arrays read only when asked for."""

    def __init__(self, site: Site) -> None:
        self.root = site.path(DAQ)
        self.instruments = {item.name: item for item in map(load_instrument, site.config.instruments)}
        self.images = {folder.name: DaqImage.open(folder) for folder in images(self.root)}
        self.pieces = [(obs_id, name) for obs_id, image in self.images.items() for name in image.detectors]

    def truth(self, piece: Piece) -> _Truth:
        """Read and verify the camera's array of one piece (its own checksum included)."""
        image = self.images[piece[0]]
        instrument = self.instruments[image.instrument]
        detector = instrument.detector(piece[1])
        array, source = image.load(detector)
        return _Truth(instrument, detector, array, source)


def taken_images(site: Site) -> list[str]:
    """obs_ids of all images in the camera's store, oldest first."""
    return [folder.name for folder in images(site.path(DAQ))]


def unfinished_exposures(site: Site) -> list[str]:
    """Exposures that the camera began and of which it has neither an image nor the word that it was aborted."""
    out = []
    for path in sorted(site.path(DAQ).glob("*/started.json")):
        folder = path.parent
        if not (folder / EXPOSURE_FILE).exists() and not (folder / "aborted.json").exists():
            out.append(folder.name)
    return out


def raw_pixels(path: Path, detector: Detector) -> NDArray[np.uint16]:
    """Pixels of a raw file of ours as the camera gave them: uint16 of shape (n_amplifiers, ny_raw, nx_raw).

    Raises
    ------
    BadFileError
        Not readable, or not this detector's file.
    """
    import fitsio

    try:
        with fitsio.FITS(str(path)) as fits:
            planes = [hdu.read() for hdu in fits[1:]]
    except (OSError, ValueError) as error:
        raise BadFileError(f"{path}: not readable as FITS: {error}") from error
    shapes = [amplifier.raw_shape for amplifier in detector.amplifiers]
    if [plane.shape for plane in planes] != shapes:
        raise BadFileError(f"{path}: planes {[plane.shape for plane in planes]}, expected {shapes}")
    out = np.zeros((len(planes), max(ny for ny, _ in shapes), max(nx for _, nx in shapes)), np.uint16)
    for index, plane in enumerate(planes):
        out[index, : plane.shape[0], : plane.shape[1]] = plane
    return out


def prove(site: Site, db: Database | None = None) -> Proof:
    """Read every stored byte of a site and compare it with the camera's store.

    Parameters
    ----------
    site
        Its files are only read.
    db
        The site's database; None leaves the ledger out.
    """
    camera = _Camera(site)
    proof = Proof(taken=list(camera.images), pieces=len(camera.pieces))
    places = [name for name in PLACES if name in site.config.places]
    files = {
        place: _files_by_piece(site.path(site.config.places[place].raw), proof, camera) for place in places
    }
    tapes = {
        place: _TapeReader(site, place) for place in places if site.config.places[place].tape is not None
    }

    def check(piece: Piece) -> tuple[Piece, list[str], list[str], set[str], set[str], dict[str, str]]:
        return _check_piece(camera, piece, files, tapes)

    whole: dict[str, Counter[str]] = {place: Counter() for place in places}
    proof.on_tape = dict.fromkeys(tapes, 0)
    sums: dict[str, dict[Piece, str]] = {place: {} for place in places}
    with ThreadPoolExecutor(2) as pool:
        for piece, lost, twice, good, taped, found in pool.map(check, camera.pieces):
            if lost:
                proof.lost[piece] += lost
            if twice:
                proof.duplicated[piece] += twice
            for place in good:
                whole[place][piece[0]] += 1
            for place in taped:
                proof.on_tape[place] += 1
            for place, checksum in found.items():
                sums[place][piece] = checksum
    for place in places:
        wanted = {obs_id: len(image.detectors) for obs_id, image in camera.images.items()}
        proof.verified[place] = sum(whole[place][obs_id] == count for obs_id, count in wanted.items())
    known = set(camera.pieces)
    for place, reader in tapes.items():
        proof.foreign += [f"{place} tape: {' '.join(piece)}" for piece in reader.pieces if piece not in known]
    if db is not None:
        proof.books += _compare_books(db, camera, sums)
    return proof


def _files_by_piece(root: Path, proof: Proof, camera: _Camera) -> dict[Piece, list[Path]]:
    """Every file with pixels below a raw cache, by what its name and its header say it is."""
    known = set(camera.pieces)
    out: dict[Piece, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*.fits*")):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue  # halves under way have hidden names
        try:
            key = RawKey.parse(str(path.relative_to(root)))
        except BadFileError:
            proof.foreign.append(str(path))
            continue
        piece = (str(key.obs_id), key.part)
        if piece in known:
            out[piece].append(path)
        else:
            proof.foreign.append(str(path))
    return out


def _check_piece(
    camera: _Camera,
    piece: Piece,
    files: dict[str, dict[Piece, list[Path]]],
    tapes: dict[str, _TapeReader],
) -> tuple[Piece, list[str], list[str], set[str], set[str], dict[str, str]]:
    lost, twice = list[str](), list[str]()
    good, taped, sums = set[str](), set[str](), dict[str, str]()
    try:
        truth = camera.truth(piece)
    except CumbreError as error:
        return piece, [f"the camera's own store: {error}"], twice, good, taped, sums
    for place, found in files.items():
        here = found.get(piece, [])
        if not here:
            lost.append(f"not at {place}")
            continue
        if len(here) > 1:
            twice.append(f"{len(here)} files at {place}")
        try:
            _same_pixels(here[0], truth, piece)
        except CumbreError as error:
            lost.append(f"{place}: {error}")
            continue
        sums[place] = sha256_of(here[0])
        good.add(place)
    if len(set(sums.values())) > 1:
        lost.append("the files of the places differ")
    for place, tape in tapes.items():
        entries = tape.pieces.get(piece, [])
        if not entries:
            lost.append(f"not on the tape of {place}")
            continue
        if len(entries) > 1:
            twice.append(f"{len(entries)} times on the tape of {place}")
        try:
            found_sum = tape.read(entries[0])
        except CumbreError as error:
            lost.append(f"tape of {place}: {error}")
            continue
        if sums and found_sum not in sums.values():
            lost.append(f"tape of {place}: other bytes than the file")
            continue
        taped.add(place)
    return piece, lost, twice, good, taped, sums


def _same_pixels(path: Path, truth: _Truth, piece: Piece) -> None:
    """Compare a raw file with the camera's array, pixel for pixel.

    Raises
    ------
    BadFileError
        They differ.
    """
    import fitsio

    pixels = raw_pixels(path, truth.detector)
    if not np.array_equal(pixels, truth.array):
        count = int((pixels != truth.array).sum()) if pixels.shape == truth.array.shape else -1
        raise BadFileError(f"{path}: {count} pixels are not the camera's")
    try:
        header = fitsio.read_header(str(path), 0)
    except (OSError, ValueError) as error:
        raise BadFileError(f"{path}: no readable header: {error}") from error
    told = (str(header.get("OBSID", "")), str(header.get("CHIPID", "")))
    if told != piece:
        raise BadFileError(f"{path}: its header says {' '.join(told)}")


class _TapeReader:
    """The tape of one place, only read: its writer may be at work."""

    def __init__(self, site: Site, place: str) -> None:
        index, self._shelf = view_tape(site, place)
        # A damaged copy that was written again stays on the volume; it is no second copy.
        replaced = {entry.replaces for entry in (*index.entries.values(), *index.superseded)}
        self.pieces: dict[Piece, list[TapeEntry]] = defaultdict(list)
        for entry in (*index.entries.values(), *index.superseded):
            key = RawKey.parse(entry.key)
            if key.is_detector and entry.place not in replaced:
                self.pieces[str(key.obs_id), key.part].append(entry)

    def read(self, entry: TapeEntry) -> str:
        """Read one member back; gives its checksum.

        Raises
        ------
        BadFileError
            The volume is not there, or its bytes have another checksum than the index says.
        """
        try:
            return sha256_of_bytes(read_entry(self._shelf, entry))
        except OSError as error:
            raise BadFileError(f"{entry.volume}: {error}") from error


def _compare_books(db: Database, camera: _Camera, sums: dict[str, dict[Piece, str]]) -> list[str]:
    """What the ledger says of each copy against what was just read."""
    rows = db.query(
        "SELECT obs_id, detector, hop, outcome, checksum FROM ledger.hop"
        " WHERE hop IN ('at_base', 'at_archive') AND detector >= 0",
        (),
    )
    told = {(row["obs_id"], row["detector"], row["hop"]): row for row in rows}
    out = _vanished(db, camera)
    for obs_id, name in camera.pieces:
        try:
            number = camera.instruments[camera.images[obs_id].instrument].detector(name).id
        except (KeyError, NotFoundError):
            continue  # told as lost already
        for place, found in sums.items():
            if (obs_id, name) not in found:
                continue
            row = told.get((obs_id, number, f"at_{place}"))
            if row is None:
                out.append(f"{obs_id} {name}: is at {place}, but the ledger does not know it")
            elif row["outcome"] != "ok" or row["checksum"] != found[obs_id, name]:
                out.append(f"{obs_id} {name}: the ledger says {row['outcome']} {row['checksum']} of {place}")
    return out


def _vanished(db: Database, camera: _Camera) -> list[str]:
    """Images of the last days that the camera told of and that are no longer in its store."""
    rows = db.query(
        "SELECT DISTINCT h.obs_id FROM ledger.hop h JOIN ledger.image i USING (obs_id) WHERE h.hop = 'read_out'"
        " AND h.outcome = 'ok' AND i.day_obs = (SELECT max(day_obs) FROM ledger.image)",
        (),
    )
    gone = sorted(row["obs_id"] for row in rows if row["obs_id"] not in camera.images)
    return [f"{obs_id}: the camera read it out, its store does not have it" for obs_id in gone]


def outstanding(site: Site, db: Database) -> set[Piece]:
    """Detector images of the camera's store that the ledger does not yet know at every place and on every tape.

    Cheap enough to be asked every second; :func:`prove` is what counts.
    """
    places = [name for name in PLACES if name in site.config.places]
    hops = [f"at_{place}" for place in places]
    hops += [f"{place}_tape" for place in places if site.config.places[place].tape]
    rows = db.query(
        "SELECT obs_id, detector_name, count(DISTINCT hop) AS n FROM ledger.hop"
        " WHERE outcome = 'ok' AND detector >= 0 AND hop = ANY(%s) GROUP BY obs_id, detector_name",
        (hops,),
    )
    done = {(row["obs_id"], row["detector_name"]) for row in rows if row["n"] == len(hops)}
    return {piece for piece in _pieces(site) if piece not in done}


def _pieces(site: Site) -> Iterator[Piece]:
    for folder in images(site.path(DAQ)):
        try:
            image = DaqImage.open(folder)
        except CumbreError:
            continue
        for name in image.detectors:
            yield folder.name, name
