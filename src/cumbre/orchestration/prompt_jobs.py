"""The jobs of prompt processing: what a worker is given, and under which name."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cumbre.core.configuration import Site
from cumbre.observatory.instruments import site_instruments
from cumbre.observatory.visits import AnnouncedVisit
from cumbre.orchestration.models import DEADLINE, DROPPED, KILLED, LOST, FinishedJob, Job, JobState, Priority
from cumbre.orchestration.prompt_state import ALERTS, DetectorImage, LeaveOut, Preload, Process, Work

PRELOAD = "prompt.preload"
PROCESS = "prompt.process"
MISSED = "prompt.missed"
PRECOVERY = "prompt.precovery"
PRECOVERY_S = 15.0
"""Real seconds after which such a job begins no further image: an image that comes then waits that long at most."""
NO_DETECTOR = -1
WORKER = "cumbre.orchestration.prompt_worker"
PASSING = ("Transient", DEADLINE, LOST, DROPPED, KILLED)
"""Outcomes of a job that may end otherwise at another time."""


def preload_id(group_id: str, detector: int) -> str:
    """Name of the job that prepares a detector of a visit."""
    return f"{PRELOAD}/{group_id}/{detector}"


def process_of(payload: dict[str, Any]) -> Process:
    """What a payload of :meth:`PromptJobs.process` asks for."""
    visit = payload["visit"]
    return Process(
        DetectorImage(**payload["image"]),
        AnnouncedVisit(**visit) if visit else None,
        payload["read_out_tai"],
        work_of(payload),
        tuple(DetectorImage(**snap) for snap in payload.get("snaps", ())),
        payload.get("note", ""),
        payload.get("since_tai", 0.0),
    )


def work_of(payload: dict[str, Any]) -> Work:
    """The work that a payload names."""
    named = payload.get("work") or {}
    return Work(**named | {"corrections": tuple(named.get("corrections", Work().corrections))})


def is_missed(finished: FinishedJob) -> bool:
    """Whether a job ended without an answer that another time would not change."""
    return finished.state is JobState.FAILED and (
        finished.result.may_retry or finished.result.outcome in PASSING
    )


class PromptJobs:
    """Makes the jobs of a site.

    Parameters
    ----------
    dsn
        Database in which the workers store.
    """

    def __init__(self, site: Site, dsn: str) -> None:
        self.instruments = site_instruments(site)
        self._site, self._dsn, self._settings = site, dsn, site.config.prompt

    def _common(self, instrument: str, work: Work) -> dict[str, Any]:
        return {
            "site": str(self._site.root),
            "dsn": self._dsn,
            "instrument": self.instruments[instrument][0],
            "detection_sigma": self._settings.detection_sigma,
            "difference_method": self._settings.difference,
            "reliability": self._settings.reliability,
            "injection_fraction": self._settings.injection_fraction,
            "images": self._settings.images,
            "work": asdict(work),
        }

    def preload(self, instruction: Preload) -> Job:
        """Prepare one detector of a visit."""
        visit, detector = instruction.visit, instruction.detector
        return Job(
            id=preload_id(visit.group_id, detector),
            kind=PRELOAD,
            function=f"{WORKER}:preload",
            payload=self._common(visit.instrument, instruction.work)
            | {"visit": asdict(visit), "detector": detector},
            priority=Priority.PROMPT,
            affinity=detector,
            max_attempts=1,
        )

    def left_out(self, instruction: LeaveOut) -> Job:
        """The memory of a visit that is left out; nothing is done."""
        visit = instruction.visit
        return Job(
            id=preload_id(visit.group_id, NO_DETECTOR),
            kind=PRELOAD,
            function=f"{WORKER}:preload",
            payload={"visit": asdict(visit), "detector": NO_DETECTOR, "left_out": True},
            max_attempts=1,
        )

    def process(self, instruction: Process) -> Job:
        """Process one detector's image now."""
        image = instruction.image
        begun = instruction.since_tai or instruction.read_out_tai or image.at_tai
        return Job(
            id=f"{PROCESS}/{image.obs_id}/{image.detector}",
            kind=PROCESS,
            function=self._function(instruction.work),
            payload=self._payload(instruction),
            priority=Priority.PROMPT,
            deadline_tai=begun + self._settings.deadline_s,
            affinity=image.detector,
            max_attempts=1 + self._settings.retries,
        )

    def missed(self, instruction: Process, reason: str) -> Job:
        """Process one detector's image later."""
        image = instruction.image
        return Job(
            id=f"{MISSED}/{image.obs_id}/{image.detector}",
            kind=MISSED,
            function=self._function(instruction.work),
            payload=self._payload(instruction)
            | {"missed": reason, "publish_alerts": self._settings.missed.alerts},
            priority=Priority.OFFLINE,
            affinity=image.detector,
            max_attempts=self._settings.missed.attempts,
        )

    def precovery(self, now_tai: float) -> Job:
        """Measure some new objects on images of the weeks before."""
        return Job(
            id=f"{PRECOVERY}/{now_tai:.0f}",
            kind=PRECOVERY,
            function="cumbre.orchestration.precovery:work",
            payload={
                "site": str(self._site.root),
                "dsn": self._dsn,
                "days": self._settings.precovery_days,
                "budget_s": PRECOVERY_S,
            },
            priority=Priority.OFFLINE,
            max_attempts=1,
        )

    @staticmethod
    def _function(work: Work) -> str:
        return f"{WORKER}:{'process' if work.kind == ALERTS else 'correct'}"

    def _payload(self, instruction: Process) -> dict[str, Any]:
        image, visit = instruction.image, instruction.visit
        return self._common(image.instrument, instruction.work) | {
            "image": asdict(image),
            "visit": asdict(visit) if visit else None,
            "read_out_tai": instruction.read_out_tai,
            "snaps": [asdict(snap) for snap in instruction.snaps],
            "note": instruction.note,
            "since_tai": instruction.since_tai,
        }
