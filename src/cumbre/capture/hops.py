"""The hops that capture and archive report to the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.core.errors import NotFoundError
from cumbre.core.ids import ObsId
from cumbre.core.instrument import load_instrument

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cumbre.bus import Bus
    from cumbre.core.configuration import SiteConfig
    from cumbre.core.time import Clock

HOP_TOPIC = "Image.hop"
WHOLE_IMAGE = -1


@dataclass(frozen=True, slots=True)
class Piece:
    """One detector's file of one image, or the whole image (``detector`` −1)."""

    obs_id: str
    instrument: str
    group_id: str = ""
    detector: int = WHOLE_IMAGE
    detector_name: str = ""

    @property
    def exposure_id(self) -> int:
        """``day_obs · 100000 + seq_num``."""
        return ObsId.parse(self.obs_id).exposure_id

    @classmethod
    def from_hop(cls, fields: dict[str, Any]) -> Piece:
        """The piece that an ``Image.hop`` event speaks of."""
        return cls(
            fields["obsId"],
            fields["instrument"],
            fields["groupId"],
            fields["detector"],
            fields["detectorName"],
        )


def hop_fields(
    clock: Clock,
    piece: Piece,
    hop: str,
    *,
    place: str,
    outcome: str = "ok",
    path: Path | str = "",
    byte_size: int = 0,
    checksum: str = "",
    message: str = "",
    attempt: int = 1,
) -> dict[str, Any]:
    """Fields of an ``Image.hop`` event that happens now."""
    return {
        "obsId": piece.obs_id,
        "instrument": piece.instrument,
        "exposureId": piece.exposure_id,
        "groupId": piece.group_id,
        "detector": piece.detector,
        "detectorName": piece.detector_name,
        "hop": hop,
        "outcome": outcome,
        "place": place,
        "path": str(path),
        "byteSize": byte_size,
        "checksum": checksum,
        "message": message[:2000],
        "hopTai": clock.now_tai_s(),
        "attempt": attempt,
    }


def publish_hop(bus: Bus, clock: Clock, piece: Piece, hop: str, **details: Any) -> None:
    """Publish one hop; ``details`` as in :func:`hop_fields`."""
    bus.publish(HOP_TOPIC, hop_fields(clock, piece, hop, **details))


def publish_hops(bus: Bus, hops: Iterable[dict[str, Any]]) -> None:
    """Publish several hops in one transaction."""
    messages = [(HOP_TOPIC, fields) for fields in hops]
    if messages:
        bus.publish_many(messages)


def detector_ids(config: SiteConfig) -> dict[tuple[str, str], int]:
    """(instrument, detector name) → detector number, for every instrument of a site."""
    instruments = [load_instrument(name) for name in config.instruments]
    return {(item.name, detector.name): detector.id for item in instruments for detector in item.detectors}


def piece_of(instrument: str, obs_id: ObsId, detector_name: str, ids: dict[tuple[str, str], int]) -> Piece:
    """A piece from its names only.

    Raises
    ------
    NotFoundError
        The site has no such detector.
    """
    try:
        number = ids[instrument, detector_name]
    except KeyError:
        raise NotFoundError(
            f"{obs_id}: this site has no detector {detector_name!r} of an instrument {instrument!r}; "
            "see `instruments` in site.yaml"
        ) from None
    return Piece(str(obs_id), instrument, "", number, detector_name)
