"""What an ingest service must remember across restarts: images on their way, files to try again. Pure data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_ATTEMPTS = 3
FORGET_AFTER_S = 86400.0
PRIORITY = {"WAVEFRONT": 0, "SCIENCE": 1, "GUIDER": 2}
"""Wavefront sensors first: the telescope's optics wait for them."""


@dataclass(frozen=True, slots=True)
class Item:
    """One file to ingest."""

    obs_id: str
    instrument: str
    group_id: str
    detector: int
    detector_name: str
    path: str
    checksum: str = ""
    byte_size: int = 0
    attempt: int = 1
    not_before_tai: float = 0.0

    @property
    def key(self) -> str:
        """What makes it one."""
        return f"{self.obs_id}/{self.detector_name}"


@dataclass(slots=True)
class ImageState:
    """One image of which some detectors may still be missing."""

    obs_id: str
    instrument: str
    last_tai: float
    expected: list[str] = field(default_factory=list)
    """Detector names; empty while nobody said."""
    ingested: list[str] = field(default_factory=list)
    announced_missing: bool = False

    def missing(self) -> list[str]:
        """Expected detectors that are not ingested, sorted."""
        return sorted(set(self.expected) - set(self.ingested))


class PendingState:
    """All images that are not complete, and all files that wait for another try."""

    def __init__(self) -> None:
        self.images: dict[str, ImageState] = {}
        self.retries: dict[str, Item] = {}

    def image(self, obs_id: str, instrument: str, now_tai: float) -> ImageState:
        """The image's state, made when it is new."""
        return self.images.setdefault(obs_id, ImageState(obs_id, instrument, now_tai))

    def expect(self, obs_id: str, instrument: str, detectors: list[str], now_tai: float) -> None:
        """Somebody (manifest, camera) said which detectors the image has."""
        state = self.image(obs_id, instrument, now_tai)
        state.expected = sorted({*state.expected, *detectors})

    def ingested(self, obs_id: str, instrument: str, detector_name: str, now_tai: float) -> None:
        """A detector is in the repository."""
        state = self.image(obs_id, instrument, now_tai)
        if detector_name not in state.ingested:
            state.ingested.append(detector_name)
        state.last_tai = now_tai

    def retry(self, item: Item, *, not_before_tai: float, count: bool = True) -> bool:
        """Queue for another try; False when it had its last one."""
        if count and item.attempt >= MAX_ATTEMPTS:
            self.retries.pop(item.key, None)
            return False
        values = asdict(item) | {"attempt": item.attempt + count, "not_before_tai": not_before_tai}
        self.retries[item.key] = Item(**values)
        return True

    def due(self, now_tai: float) -> list[Item]:
        """Files whose next try may begin; they leave the queue."""
        due = [item for item in self.retries.values() if item.not_before_tai <= now_tai]
        for item in due:
            del self.retries[item.key]
        return due

    def complete(self) -> list[ImageState]:
        """Images of which every expected detector is there; they are forgotten."""
        done = [state for state in self.images.values() if state.expected and not state.missing()]
        for state in done:
            del self.images[state.obs_id]
        return done

    def overdue(self, now_tai: float, wait_s: float) -> list[ImageState]:
        """Images that have waited too long for detectors, each told once; very old ones are forgotten."""
        out = []
        for state in list(self.images.values()):
            if now_tai - state.last_tai > FORGET_AFTER_S:
                del self.images[state.obs_id]
            if now_tai - state.last_tai > wait_s and not state.announced_missing:
                state.announced_missing = True
                out.append(state)
        return out

    def to_json(self) -> bytes:
        """For the state file."""
        return json.dumps(
            {
                "images": [asdict(state) for state in self.images.values()],
                "retries": [asdict(item) for item in self.retries.values()],
            }
        ).encode()

    @classmethod
    def from_json(cls, text: bytes) -> PendingState:
        """Read the state file's text."""
        data: dict[str, Any] = json.loads(text)
        out = cls()
        out.images = {row["obs_id"]: ImageState(**row) for row in data["images"]}
        for row in data["retries"]:
            item = Item(**row)
            out.retries[item.key] = item
        return out


def by_priority(items: list[Item], purposes: dict[tuple[str, int], str]) -> list[list[Item]]:
    """Groups of items to ingest one after another, most urgent first.

    Parameters
    ----------
    items
        In order of arrival, which is kept inside a group.
    purposes
        (instrument, detector) → SCIENCE, WAVEFRONT or GUIDER; unknown ones count as SCIENCE.
    """
    groups: dict[int, list[Item]] = {}
    for item in items:
        purpose = purposes.get((item.instrument, item.detector), "SCIENCE")
        groups.setdefault(PRIORITY[purpose], []).append(item)
    return [groups[number] for number in sorted(groups)]
