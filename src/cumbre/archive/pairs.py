"""Pairs: each sending end of a link has exactly one receiving end, and both have the same number.

Replicator *k* (summit to base) sends to distributor ``base-k``, forwarder *k* (base to archive) to
``archive-k``. The distributors of one place share its raw cache; nothing else is shared between pairs.
"""

from __future__ import annotations

import contextlib
import fcntl
import zlib
from pathlib import Path

from cumbre.core.configuration import Site
from cumbre.core.ids import ObsId

FIRST_PLACE = "summit"
WAVEFRONT = "wavefront"


def relay_name(source: str, pair: int) -> str:
    """Role of a pair's sending end: ``replicator-1`` at the summit, ``forwarder-1`` behind it."""
    return f"{'replicator' if source == FIRST_PLACE else 'forwarder'}-{pair}"


def distributor_name(place: str, pair: int) -> str:
    """Role of a pair's receiving end: ``base-1``."""
    return f"{place}-{pair}"


def link_name(source: str, target: str) -> str:
    """Name of a link in jobs, events and control files: ``summit-base``."""
    return f"{source}-{target}"


def pairs_into(site: Site, place: str) -> int:
    """How many distributors a place has: as many as the widest link to it has pairs."""
    return max((link.pairs for link in site.config.links if link.target == place), default=1)


def buffer_folders(site: Site, source: str, pair: int) -> list[Path]:
    """The outage buffer of one pair, a folder on each store of the buffer of its place."""
    stores = site.config.places[source].buffers or [f"{source}/buffer"]
    return [site.path(store) / f"pair-{pair}" for store in stores]


def raft_of(detector_name: str) -> str:
    """What is sent together: the raft (``R22`` of ``R22_S11``), the whole name where there are no rafts."""
    return detector_name.partition("_")[0]


def share(obs_id: ObsId, part: str, pairs: int) -> int:
    """Pair that sends a part of an image where nobody assigns jobs; neighbouring images take turns."""
    return (obs_id.seq_num + zlib.crc32(part.encode())) % pairs + 1


class PairLock:
    """Shows the other pairs of this machine that one runs, until its process ends in whatever way."""

    def __init__(self, site: Site, name: str) -> None:
        path = _lock_path(site, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Let it go."""
        self._stream.close()

    @staticmethod
    def is_held(site: Site, name: str) -> bool:
        """Whether a pair's process runs."""
        try:
            with _lock_path(site, name).open("ab") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False


def _lock_path(site: Site, name: str) -> Path:
    return site.path(f"run/{name}.lock")
