"""Prompt processing as a pure machine: messages in, instructions out, no I/O.

A visit announced is prepared for each science detector at once. An image that reaches the archive is
processed, announced or not, prepared or not, once; one of a visit that was left out, or that the Catch-Up
Archiver brought, is left for later. An announced visit without an image is given up after the read-out (or the
announced end) plus the timeout; if the image comes even later it is processed all the same.

The exposures of a visit wait for one another, and are processed together. When one has not come by the timeout
after the last read-out, the others are processed without it; if it comes then, it is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cumbre.core.ids import ObsId
from cumbre.observatory.visits import AnnouncedVisit
from cumbre.orchestration.models import CAUGHT_UP, DEADLINE, SAMPLED_OUT

EXPIRY_S = 3600.0
"""A nextVisit older than this is not prepared any more, and what is known of a visit is forgotten."""


BETWEEN_S = 30.0
"""Most seconds from the end of an exposure's read-out to the start of the visit's next exposure."""
ALERTS, ISR = "alerts", "isr"


@dataclass(frozen=True, slots=True)
class Work:
    """What is done with images, by the mode in which they were taken up.

    Attributes
    ----------
    kind
        ``alerts``: everything up to alerts; ``isr``: instrument signature removal and quality numbers only.
    corrections, psf
        For ``isr``: calibrations to apply, and whether the PSF is measured.
    wavefront
        Whether wavefront sensors are processed, always as ``isr``.
    mode
        Name of the mode.
    """

    kind: str = ALERTS
    corrections: tuple[str, ...] = ("bias", "dark", "flat", "fringe", "defects")
    psf: bool = True
    wavefront: bool = True
    mode: str = ""

    @classmethod
    def of_mode(cls, mode: str, settings: Mapping[str, Any]) -> Work:
        """From a mode's parameters of the Alert Production Cluster; {} without a control system."""
        return cls(
            kind=str(settings.get("processing", ALERTS)),
            corrections=tuple(settings.get("corrections", cls().corrections)),
            psf=bool(settings.get("psf", True)),
            wavefront=bool(settings.get("wavefront", True)),
            mode=mode,
        )


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

    @property
    def unit(self) -> str:
        """What it belongs to: its group, or itself when it has none."""
        return self.group_id or self.obs_id


@dataclass(frozen=True, slots=True)
class ReadOut:
    """The end of a read-out: from here latency counts."""

    group_id: str
    obs_id: str
    tai: float
    n_images: int = 1
    """Exposures of the visit, as the camera says."""
    exposure_s: float = 0.0
    """Time of this exposure: the next one needs as long."""


@dataclass(frozen=True, slots=True)
class Preload:
    """Prepare one detector of a visit."""

    visit: AnnouncedVisit
    detector: int
    detector_name: str
    work: Work = Work()


@dataclass(frozen=True, slots=True)
class Process:
    """Process one detector's image.

    Attributes
    ----------
    snaps
        Further exposures of the visit, in the order in which they were taken.
    note
        What is missing, in words.
    read_out_tai
        Last read-out of the visit; 0 when it is not known.
    since_tai
        From when the deadline counts where that is not the read-out; 0 for the read-out.
    """

    image: DetectorImage
    visit: AnnouncedVisit | None
    read_out_tai: float
    work: Work = Work()
    snaps: tuple[DetectorImage, ...] = ()
    note: str = ""
    since_tai: float = 0.0


@dataclass(frozen=True, slots=True)
class Miss:
    """Leave an image for later."""

    process: Process
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class LeaveOut:
    """A visit of several exposures is not among those that are sampled: remembered, as its images will wait."""

    visit: AnnouncedVisit


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
    others: tuple[str, ...] = ()
    """Further exposures of the visit that were read out."""


@dataclass(frozen=True, slots=True)
class Reject:
    """An image of which nothing is made: nothing of this site explains it, or its visit went on without it."""

    image: DetectorImage
    reason: str
    outcome: str = "UnprocessableData"


Instruction = Preload | Process | Miss | LeaveOut | DropPreload | GiveUp | Reject


@dataclass(slots=True)
class _Group:
    visit: AnnouncedVisit | None = None
    waiting: dict[int, str] = field(default_factory=dict)
    """Detectors whose image is still expected: id → name."""
    obs_id: str = ""
    read_outs: dict[str, float] = field(default_factory=dict)
    """End of read-out of each of its exposures."""
    work: Work | None = None
    is_left_out: bool = False
    give_up_tai: float = float("inf")
    seen_tai: float = 0.0
    is_taken: bool = False
    """An image of it was taken in."""
    held: dict[int, list[DetectorImage]] = field(default_factory=dict)
    """Detector → exposures that wait for the visit's others."""
    caught_up: set[int] = field(default_factory=set)
    """Detectors of which an exposure was brought by the Catch-Up Archiver."""
    ended: set[int] = field(default_factory=set)
    """Detectors that were given to a worker, or left for later."""
    n_taken: int = 0
    """Exposures as the camera says; 0 before a read-out."""

    @property
    def n_images(self) -> int:
        announced = self.visit.n_images if self.visit else 0
        return max(announced or self.n_taken, 1)


class PromptState:
    """What is known of the visits of the last hour.

    Parameters
    ----------
    detectors
        Instrument → {detector id: name} of its science detectors.
    image_timeout_s
        Night seconds after the end of read-out (or the announced end) without an image.
    wavefront, ignored
        Instrument → its wavefront sensors, and detectors that nothing is done with.
    """

    def __init__(
        self,
        detectors: Mapping[str, Mapping[int, str]],
        *,
        image_timeout_s: float,
        wavefront: Mapping[str, frozenset[int]] | None = None,
        ignored: Mapping[str, frozenset[int]] | None = None,
    ) -> None:
        self._detectors = detectors
        self._wavefront = wavefront or {}
        self._ignored = ignored or {}
        self._timeout_s = image_timeout_s
        self._groups: dict[str, _Group] = {}
        self._seen: dict[tuple[str, int], float] = {}

    def _group(self, group_id: str, now_tai: float) -> _Group:
        group = self._groups.setdefault(group_id, _Group())
        group.seen_tai = now_tai
        return group

    def leave_out(self, unit: str, now_tai: float) -> None:
        """Process nothing of a visit now: it is not among those that are sampled."""
        self._group(unit, now_tai).is_left_out = True

    def announced(
        self, visit: AnnouncedVisit, sent_tai: float, now_tai: float, work: Work | None = None
    ) -> list[Instruction]:
        """Take in a nextVisit; one told twice, too old, or of another site's camera gives nothing."""
        detectors = self._detectors.get(visit.instrument)
        if detectors is None or now_tai - sent_tai > EXPIRY_S:
            return []
        group = self._group(visit.group_id, now_tai)
        if group.visit is not None:
            return []
        group.visit, group.work = visit, group.work or work or Work()
        if group.is_left_out:
            return [LeaveOut(visit)] if visit.n_images > 1 else []
        end = (visit.start_tai or sent_tai) + visit.duration_s
        is_over = len(group.read_outs) >= max(group.n_images, 1)
        group.give_up_tai = max([*group.read_outs.values(), *(() if is_over else (end,))]) + self._timeout_s
        group.waiting = {
            number: name
            for number, name in detectors.items()
            if not group.obs_id or (group.obs_id, number) not in self._seen
        }
        return [Preload(visit, number, name, group.work) for number, name in group.waiting.items()]

    def remember(self, visit: AnnouncedVisit, now_tai: float, work: Work | None = None) -> None:
        """Know a visit again of which nothing more is to be prepared."""
        group = self._group(visit.group_id, now_tai)
        group.visit, group.work = group.visit or visit, group.work or work

    def canceled(self, group_id: str, now_tai: float) -> list[Instruction]:
        """Take in a nextVisitCanceled: nothing is waited for; an image that comes all the same is processed."""
        group = self._groups.get(group_id)
        if group is None:
            return []
        held: list[Instruction] = []
        for number in list(group.held):
            held += self._whole(group, number, now_tai)
        drops: list[Instruction] = [DropPreload(group_id, number) for number in group.waiting]
        group.waiting = {}
        return [*held, *drops]

    def read_out(self, event: ReadOut, now_tai: float) -> list[Instruction]:
        """Take in an end of read-out."""
        group = self._group(event.group_id or event.obs_id, now_tai)
        group.obs_id, group.read_outs[event.obs_id] = event.obs_id, event.tai
        group.n_taken = max(event.n_images, group.n_taken)
        left = max(group.n_images - len(group.read_outs), 0)
        give_up = max(event.tai, now_tai) + self._timeout_s + left * (event.exposure_s + BETWEEN_S)
        # What is announced is waited for until its announced end at least.
        group.give_up_tai = max(give_up, group.give_up_tai) if left and group.visit is not None else give_up
        return []

    def at_archive(
        self, image: DetectorImage, now_tai: float, work: Work | None = None, *, is_caught_up: bool = False
    ) -> list[Instruction]:
        """Take in a file's arrival; the same file told again gives nothing.

        ``work`` is that of the present mode: it counts for an image of whose visit nothing is known yet.
        """
        key = (image.obs_id, image.detector)
        if key in self._seen or image.detector in self._ignored.get(image.instrument, frozenset()):
            return []
        is_wavefront = image.detector in self._wavefront.get(image.instrument, frozenset())
        known = self._detectors.get(image.instrument)
        if is_wavefront and not self._work_of(image.unit, work).wavefront:
            return []
        self._seen[key] = now_tai
        if known is None or not (is_wavefront or image.detector in known):
            what = (
                f"instrument {image.instrument!r}" if known is None else f"science detector {image.detector}"
            )
            return [Reject(image, f"this site has no {what}")]
        group = self._group(image.unit, now_tai)
        group.obs_id, group.is_taken = group.obs_id or image.obs_id, True
        group.work = self._work_of(image.unit, work)
        if group.n_images > 1 and group.work.kind == ALERTS and not is_wavefront:
            if is_caught_up:
                group.caught_up.add(image.detector)
            return self._hold(group, image, now_tai)
        group.ended.add(image.detector)
        is_prepared = group.waiting.pop(image.detector, None) is not None
        process = Process(
            image,
            group.visit,
            group.read_outs.get(image.obs_id, 0.0),
            replace(group.work, kind=ISR) if is_wavefront else group.work,
        )
        if group.is_left_out:
            return [Miss(process, SAMPLED_OUT, "its visit was left out while the workers were behind")]
        if is_caught_up:
            dropped: list[Instruction] = [DropPreload(image.group_id, image.detector)] if is_prepared else []
            return [*dropped, Miss(process, CAUGHT_UP, "brought by the Catch-Up Archiver")]
        return [process]

    def _hold(self, group: _Group, image: DetectorImage, now_tai: float) -> list[Instruction]:
        """Keep one of several exposures until the others are there."""
        if image.detector in group.ended:
            return [Reject(image, "it came when its visit had been processed without it", DEADLINE)]
        held = group.held.setdefault(image.detector, [])
        held.append(image)
        if len(held) >= group.n_images:
            return self._whole(group, image.detector, now_tai)
        if not now_tai < group.give_up_tai < float("inf"):
            # Long after its time, from a buffer or the Catch-Up Archiver: the others are on their way too.
            group.give_up_tai = now_tai + self._timeout_s
        return []

    def _whole(self, group: _Group, detector: int, now_tai: float) -> list[Instruction]:
        """Process what came of a visit of several exposures, and tell of those that did not come."""
        held = sorted(group.held.pop(detector), key=lambda image: image.exposure_id)
        is_prepared = group.waiting.pop(detector, None) is not None
        group.ended.add(detector)
        first, came = held[0], {image.obs_id for image in held}
        is_whole = len(held) >= group.n_images
        process = Process(
            first,
            group.visit,
            max(group.read_outs.values(), default=0.0),
            group.work or Work(),
            tuple(held[1:]),
            "" if is_whole else f"{len(held)} of {group.n_images} exposures came",
            # What waited in vain has the whole deadline before it; the same where no read-out was told.
            0.0 if is_whole and group.read_outs else now_tai,
        )
        absent: list[Instruction] = [
            Reject(
                self._other(first, obs_id), "not at the archive: its visit is processed without it", DEADLINE
            )
            for obs_id in sorted(group.read_outs)
            if obs_id not in came
        ]
        if group.is_left_out:
            return [
                *absent,
                Miss(process, SAMPLED_OUT, "its visit was left out while the workers were behind"),
            ]
        if detector in group.caught_up:
            dropped: list[Instruction] = [DropPreload(first.group_id, detector)] if is_prepared else []
            return [*absent, *dropped, Miss(process, CAUGHT_UP, "brought by the Catch-Up Archiver")]
        return [*absent, process]

    @staticmethod
    def _other(image: DetectorImage, obs_id: str) -> DetectorImage:
        """Another exposure of the same visit and detector, of which there is no file."""
        number = ObsId.parse(obs_id).exposure_id
        return replace(image, obs_id=obs_id, exposure_id=number, path="", at_tai=0.0)

    def taken(self, process: Process, now_tai: float) -> None:
        """Know again what was given to a worker before a restart."""
        group = self._group(process.image.unit, now_tai)
        for image in (process.image, *process.snaps):
            self._seen[image.obs_id, image.detector] = now_tai
        group.obs_id, group.is_taken = group.obs_id or process.image.obs_id, True
        group.work = self._work_of(process.image.unit, process.work)
        group.waiting.pop(process.image.detector, None)
        group.ended.add(process.image.detector)

    def awaiting(self) -> set[str]:
        """Visits of several exposures that are known."""
        return {unit for unit, group in self._groups.items() if group.n_images > 1}

    def _work_of(self, unit: str, now: Work | None) -> Work:
        known = self._groups.get(unit)
        return (known.work if known else None) or now or Work()

    def tick(self, now_tai: float) -> list[Instruction]:
        """Give up what did not come, and forget what is old."""
        lost: list[Instruction] = []
        for group_id, group in list(self._groups.items()):
            is_over = now_tai >= group.give_up_tai
            if is_over:
                for number in list(group.held):
                    lost += self._whole(group, number, now_tai)
            if group.visit is not None and group.waiting and is_over:
                reason = f"no image at the archive {self._timeout_s:.0f} s after " + (
                    "the end of read-out" if group.read_outs else "the announced end of the visit"
                )
                taken = sorted(group.read_outs)
                first, others = (taken[0] if taken else group.obs_id), tuple(taken[1:])
                lost += [GiveUp(group.visit, number, first, reason, others) for number in group.waiting]
                group.waiting = {}
            if not group.waiting and not group.held and now_tai - group.seen_tai > EXPIRY_S:
                del self._groups[group_id]
        if len(self._seen) > 100_000:
            self._seen = {key: t for key, t in self._seen.items() if now_tai - t < EXPIRY_S}
        return lost

    def knows(self, unit: str) -> bool:
        """Whether a visit was announced, or an image of its group taken in, or it was left out."""
        group = self._groups.get(unit)
        return group is not None and (group.visit is not None or group.is_taken or group.is_left_out)

    @property
    def waiting(self) -> int:
        """Detector images that are announced and not here."""
        return sum(len(group.waiting) for group in self._groups.values())
