"""Prompt processing as a pure machine: messages in, instructions out, no I/O.

A visit announced is prepared for each science detector at once. An image that reaches the archive is
processed, announced or not, prepared or not, once. An announced visit without an image is given up after the
read-out (or the announced end) plus the timeout; if the image comes even later it is processed all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cumbre.observatory.visits import AnnouncedVisit

EXPIRY_S = 3600.0
"""A nextVisit older than this is not prepared any more, and what is known of a visit is forgotten."""


@dataclass(frozen=True, slots=True)
class DetectorImage:
    """One detector's raw file at the archive."""

    obs_id: str
    instrument: str
    exposure_id: int
    group_id: str
    detector: int
    detector_name: str
    path: str
    at_tai: float


@dataclass(frozen=True, slots=True)
class ReadOut:
    """The end of a read-out: from here latency counts."""

    group_id: str
    obs_id: str
    tai: float


@dataclass(frozen=True, slots=True)
class Preload:
    """Prepare one detector of a visit."""

    visit: AnnouncedVisit
    detector: int
    detector_name: str


@dataclass(frozen=True, slots=True)
class Process:
    """Process one detector's image."""

    image: DetectorImage
    visit: AnnouncedVisit | None
    read_out_tai: float


@dataclass(frozen=True, slots=True)
class DropPreload:
    """Nobody needs this preparation any more."""

    group_id: str
    detector: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No image came for a detector of an announced visit."""

    visit: AnnouncedVisit
    detector: int
    obs_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reject:
    """An image that no instrument or detector of this site explains."""

    image: DetectorImage
    reason: str


Instruction = Preload | Process | DropPreload | GiveUp | Reject


@dataclass(slots=True)
class _Group:
    visit: AnnouncedVisit | None = None
    waiting: dict[int, str] = field(default_factory=dict)
    """Detectors whose image is still expected: id → name."""
    obs_id: str = ""
    read_out_tai: float = 0.0
    give_up_tai: float = float("inf")
    seen_tai: float = 0.0
    is_taken: bool = False
    """An image of it was taken in."""


class PromptState:
    """What is known of the visits of the last hour.

    Parameters
    ----------
    detectors
        Instrument → {detector id: name} of its science detectors.
    image_timeout_s
        Night seconds after the end of read-out (or the announced end) without an image.
    """

    def __init__(
        self,
        detectors: Mapping[str, Mapping[int, str]],
        *,
        image_timeout_s: float,
        ignored: Mapping[str, frozenset[int]] | None = None,
    ) -> None:
        self._detectors = detectors
        self._ignored = ignored or {}
        self._timeout_s = image_timeout_s
        self._groups: dict[str, _Group] = {}
        self._seen: dict[tuple[str, int], float] = {}

    def _group(self, group_id: str, now_tai: float) -> _Group:
        group = self._groups.setdefault(group_id, _Group())
        group.seen_tai = now_tai
        return group

    def announced(self, visit: AnnouncedVisit, sent_tai: float, now_tai: float) -> list[Instruction]:
        """Take in a nextVisit; one told twice, too old, or of another site's camera gives nothing."""
        detectors = self._detectors.get(visit.instrument)
        if detectors is None or now_tai - sent_tai > EXPIRY_S:
            return []
        group = self._group(visit.group_id, now_tai)
        if group.visit is not None:
            return []
        group.visit = visit
        end = (visit.start_tai or sent_tai) + visit.duration_s
        group.give_up_tai = (group.read_out_tai or end) + self._timeout_s
        group.waiting = {
            number: name
            for number, name in detectors.items()
            if not group.obs_id or (group.obs_id, number) not in self._seen
        }
        return [Preload(visit, number, name) for number, name in group.waiting.items()]

    def canceled(self, group_id: str) -> list[Instruction]:
        """Take in a nextVisitCanceled: nothing is waited for; an image that comes all the same is processed."""
        group = self._groups.get(group_id)
        if group is None:
            return []
        drops: list[Instruction] = [DropPreload(group_id, number) for number in group.waiting]
        group.waiting = {}
        return drops

    def read_out(self, event: ReadOut, now_tai: float) -> list[Instruction]:
        """Take in an end of read-out."""
        group = self._group(event.group_id, now_tai)
        group.obs_id, group.read_out_tai = event.obs_id, event.tai
        group.give_up_tai = max(event.tai, now_tai) + self._timeout_s
        return []

    def at_archive(self, image: DetectorImage, now_tai: float) -> list[Instruction]:
        """Take in a file's arrival; the same file told again gives nothing."""
        key = (image.obs_id, image.detector)
        if key in self._seen or image.detector in self._ignored.get(image.instrument, frozenset()):
            return []
        self._seen[key] = now_tai
        known = self._detectors.get(image.instrument)
        if known is None or image.detector not in known:
            what = (
                f"instrument {image.instrument!r}" if known is None else f"science detector {image.detector}"
            )
            return [Reject(image, f"this site has no {what}")]
        group = self._group(image.group_id, now_tai)
        group.obs_id, group.is_taken = group.obs_id or image.obs_id, True
        group.waiting.pop(image.detector, None)
        return [Process(image, group.visit, group.read_out_tai)]

    def tick(self, now_tai: float) -> list[Instruction]:
        """Give up what did not come, and forget what is old."""
        lost: list[Instruction] = []
        for group_id, group in list(self._groups.items()):
            if group.visit is not None and group.waiting and now_tai >= group.give_up_tai:
                reason = f"no image at the archive {self._timeout_s:.0f} s after " + (
                    "the end of read-out" if group.read_out_tai else "the announced end of the visit"
                )
                lost += [GiveUp(group.visit, number, group.obs_id, reason) for number in group.waiting]
                group.waiting = {}
            if not group.waiting and now_tai - group.seen_tai > EXPIRY_S:
                del self._groups[group_id]
        if len(self._seen) > 100_000:
            self._seen = {key: t for key, t in self._seen.items() if now_tai - t < EXPIRY_S}
        return lost

    def knows(self, group_id: str) -> bool:
        """Whether a visit was announced, or an image of its group taken in."""
        group = self._groups.get(group_id)
        return group is not None and (group.visit is not None or group.is_taken)

    def is_known(self, obs_id: str, detector: int) -> bool:
        """Whether this image was taken in already."""
        return (obs_id, detector) in self._seen

    @property
    def waiting(self) -> int:
        """Detector images that are announced and not here."""
        return sum(len(group.waiting) for group in self._groups.values())
