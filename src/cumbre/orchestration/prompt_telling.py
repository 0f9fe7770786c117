"""What prompt processing says of its results: hops for the ledger, events and quality for everybody."""

from __future__ import annotations

import logging
from typing import Any

from cumbre.bus import Bus
from cumbre.core.errors import UserError
from cumbre.core.time import Clock
from cumbre.orchestration.models import SUCCESS, FinishedJob
from cumbre.orchestration.prompt_jobs import process_of
from cumbre.orchestration.prompt_state import DetectorImage, Process

QUALITY_FIELDS = (
    "band", "seeing", "zeroPoint", "zeroPointErr", "colourTerm", "colourTermErr", "skyLevel", "skyNoise", "nStars",
    "astrometricRms", "templateCoverage", "maskedFraction", "psfEllipticity", "limitingMagnitude", "nSources", "durationS",
)  # fmt: skip
log = logging.getLogger(__name__)


class Teller:
    """Publishes results."""

    def __init__(self, bus: Bus, clock: Clock) -> None:
        self.bus, self.clock = bus, clock

    def result(self, finished: FinishedJob, *, prepared_tai: float | None) -> None:
        """Tell what became of one image.

        Parameters
        ----------
        prepared_tai
            When the preparation's own job ended; None when there was none, and it was done within this job.
        """
        payload, result = finished.job.payload, finished.result
        asked, value = process_of(payload), result.value
        image = asked.image
        now = self.clock.now_tai_s()
        outcome = str(value.get("outcome", result.outcome))
        message = str(value.get("message", "") or result.message)
        latency = now - (payload["read_out_tai"] or image.at_tai)
        loaded = value.get("preload") or {}
        for one in (*asked.snaps, image) if loaded else ():
            self.hop(
                one, "preloaded", outcome=SUCCESS, message=str(loaded.get("note", "")),
                hop_tai=now if prepared_tai is None else prepared_tai,
            )  # fmt: skip
        visit = int(value.get("visit", image.exposure_id))
        self.processed(
            asked, visit=visit, outcome=outcome, message=message, attempt=finished.attempts, latency_s=latency,
            sources=int(value.get("n_sources", 0)), alerts=int(value.get("n_alerts", 0)),
        )  # fmt: skip
        self._quality(image, visit, value.get("quality") or {})
        log.info(
            "%s detector %d: %s, %d alerts, %.1f s after read-out (%.2f s of work)%s",
            image.obs_id, image.detector, outcome, value.get("n_alerts", 0), latency, result.wall_s,
            f": {message}" if message else "",
        )  # fmt: skip

    def processed(
        self, asked: Process, *, outcome: str, message: str, attempt: int = 1, latency_s: float = 0.0,
        sources: int = 0, alerts: int = 0, visit: int = 0,
    ) -> None:  # fmt: skip
        """Tell the hop of each exposure of a visit and the event of its detector."""
        image, now = asked.image, self.clock.now_tai_s()
        for snap in asked.snaps:
            told = "; ".join(text for text in (f"with {image.obs_id}", message) if text)
            self.hop(snap, "processed", outcome=outcome, message=told, attempt=attempt, hop_tai=now)
        self.hop(image, "processed", outcome=outcome, message=message, attempt=attempt, hop_tai=now)
        self.detector(
            {
                "obsId": image.obs_id,
                "visit": visit or image.exposure_id,
                "detector": image.detector,
                "groupId": image.group_id,
                "nSources": sources,
                "nAlerts": alerts,
                "latencyS": latency_s,
            },
            outcome=outcome,
            message=message,
        )

    def detector(self, fields: dict[str, Any], *, outcome: str, message: str) -> None:
        """Publish Prompt.detectorProcessed."""
        told = fields | {"outcome": _word(outcome), "message": message[:1000]}
        self.bus.publish("Prompt.detectorProcessed", told)

    def hop(
        self, image: DetectorImage, hop: str, *, outcome: str, message: str, attempt: int = 1,
        hop_tai: float | None = None,
    ) -> None:  # fmt: skip
        """Publish Image.hop."""
        self.bus.publish(
            "Image.hop",
            {
                "obsId": image.obs_id,
                "instrument": image.instrument,
                "exposureId": image.exposure_id,
                "groupId": image.group_id,
                "detector": image.detector,
                "detectorName": image.detector_name,
                "hop": hop,
                "outcome": _word(outcome),
                "place": "archive",
                "message": message[:1000],
                "hopTai": self.clock.now_tai_s() if hop_tai is None else hop_tai,
                "attempt": attempt,
            },
        )

    def _quality(self, image: DetectorImage, visit: int, measured: dict[str, Any]) -> None:
        quality = {k: item for k, item in measured.items() if k in QUALITY_FIELDS and item is not None}
        if not quality:
            return
        common = {
            "visit": visit,
            "detector": image.detector,
            "obsId": image.obs_id,
            "instrument": image.instrument,
        }
        try:
            self.bus.publish("Prompt.visitQuality", common | quality)
        except UserError as error:
            # a number of another kind than the topic's: the result itself must be told
            log.warning("%s detector %d: quality not published: %s", image.obs_id, image.detector, error)


def _word(outcome: str) -> str:
    return "ok" if outcome == SUCCESS else outcome
