"""The prompt service: from nextVisit and images at the archive to jobs, and from their results to the bus.

Workers return plain results; this process alone publishes them. What it must not forget is in the jobs table
(what runs, what ended, what was told) and in the bus consumer's place, which moves only after the table knows.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.bus import Bus, Message
from cumbre.core.configuration import Site
from cumbre.core.errors import UnprocessableDataError, UserError
from cumbre.core.ids import ObsId
from cumbre.core.instrument import Instrument
from cumbre.core.time import Clock
from cumbre.observatory.control.following import Follower
from cumbre.observatory.instruments import site_instruments
from cumbre.observatory.visits import AnnouncedVisit
from cumbre.orchestration.engine import ComputeEngine, DaskEngine
from cumbre.orchestration.jobs import JobStore
from cumbre.orchestration.manager import JobManager
from cumbre.orchestration.models import DEADLINE, SUCCESS, FinishedJob, Job, Priority
from cumbre.orchestration.prompt_state import (
    EXPIRY_S,
    DetectorImage,
    DropPreload,
    GiveUp,
    Instruction,
    Preload,
    Process,
    PromptState,
    ReadOut,
    Reject,
)

if TYPE_CHECKING:
    from cumbre.stores.postgres import Database

PRELOAD = "prompt.preload"
PROCESS = "prompt.process"
WORKER = "cumbre.orchestration.prompt_worker"
TOPICS = ["ScriptQueue.nextVisit", "ScriptQueue.nextVisitCanceled", "Camera.endReadout", "Image.hop"]
POOL_S = 2.0
"""Real seconds between two words to control of how many workers there are."""
SLICE_S = 0.05
"""Real seconds of one wait: how late the two sources (bus, engine) can see one another's news."""
QUALITY_FIELDS = (
    "band", "seeing", "zeroPoint", "skyLevel", "skyNoise", "nStars", "astrometricRms",
    "templateCoverage", "maskedFraction", "psfEllipticity", "limitingMagnitude", "nSources", "durationS",
)  # fmt: skip
log = logging.getLogger(__name__)


class PromptService:
    """Prompt processing of one site.

    Parameters
    ----------
    db
        Database of the jobs table; the workers reach Level 1 by its DSN.
    engine
        Where jobs run; by default Dask as the site's configuration says.
    """

    name = "prompt"
    survives_faults = True
    """What was taken from the bus and not yet done stays pending: the runner need not make it anew."""

    def __init__(
        self, *, site: Site, bus: Bus, clock: Clock, db: Database, engine: ComputeEngine | None = None
    ) -> None:
        self.site, self.bus, self.clock, self.db = site, bus, clock, db
        self.settings = site.config.prompt
        self._instruments = site_instruments(site)
        self.engine = engine or DaskEngine(
            self.settings.cluster,
            n_workers=self.settings.workers,
            warm_up=f"{WORKER}:warm_up",
            warm_payload={"site": str(site.root)},
        )
        self.store = JobStore(db)
        self.state = PromptState(
            {name: self._detectors(item, science=True) for name, (_, item) in self._instruments.items()},
            image_timeout_s=self.settings.image_timeout_s,
            ignored={
                name: frozenset(self._detectors(item, science=False))
                for name, (_, item) in self._instruments.items()
            },
        )
        self._subscription = bus.subscribe(TOPICS, start="now", consumer=self.name)
        self._pending: list[Instruction] = []
        self._finished: deque[FinishedJob] = deque()
        self._uncommitted = False
        self._leader = Follower(site, bus, "AlertProductionCluster")
        self._declined: dict[str, float] = {}
        self._next_pool = 0.0
        self._restore()
        self.manager = JobManager(self.store, self.engine, clock, owner=self.name)
        for kind in (PRELOAD, PROCESS):
            for finished in self.store.unreported(kind):
                self._report(finished)

    @staticmethod
    def _detectors(instrument: Instrument, *, science: bool) -> dict[int, str]:
        return {d.id: d.name for d in instrument.detectors if (d.purpose == "SCIENCE") is science}

    def _restore(self) -> None:
        """Know again what was announced, read out and taken in before a restart."""
        now = self.clock.now_tai_s()
        since = now - EXPIRY_S
        for row in self.store.payloads(PRELOAD, since):
            if row["state"] == "cancelled":
                continue
            visit = AnnouncedVisit(**row["payload"]["visit"])
            self.state.announced(visit, row["created_tai"], now)
        for message in self.bus.replay(["Camera.endReadout"], since_tai=since):
            self.state.read_out(_read_out(message), now)
        for row in self.store.payloads(PROCESS, since):
            self.state.at_archive(DetectorImage(**row["payload"]["image"]), now)

    # -- the loop --

    def step(self, timeout_s: float) -> int:
        """Take in messages, start jobs, tell results; waits at most ``timeout_s`` real seconds for work."""
        end = time.monotonic() + timeout_s
        while True:
            handled = self._take_in(0.0) + self._tell()
            left = end - time.monotonic()
            if handled or left <= 0:
                return handled
            handled = self._take_in(min(SLICE_S, left))
            if handled:
                return handled + self._tell()

    def close(self) -> None:
        """Stop the workers; unfinished jobs go on at the next start."""
        self._subscription.close()
        self.engine.close()

    def _tell_pool(self) -> None:
        """Tell control how many workers there are."""
        if time.monotonic() < self._next_pool:
            return
        self._next_pool = time.monotonic() + POOL_S
        self.bus.publish(
            "AlertProductionCluster.pool",
            {"workers": len(self.engine.workers()), "waiting": self.state.waiting},
        )

    def _takes(self, group_id: str, now_tai: float) -> bool:
        """Whether a visit, or an image that nobody announced, may be taken up.

        Decided once a group: disabling the cluster does not end what the current visit still needs, and
        enabling it does not begin in the middle of one.
        """
        if group_id in self._declined:
            return False
        if self.state.knows(group_id) or (self._leader.is_enabled and self._leader.mode_processes):
            return True
        if not group_id:
            return False  # no group to remember it by
        self._declined[group_id] = now_tai
        if len(self._declined) > 10_000:
            self._declined = {g: t for g, t in self._declined.items() if now_tai - t < EXPIRY_S}
        return False

    def _take_in(self, timeout_s: float) -> int:
        self._tell_pool()
        messages = self._subscription.poll(timeout_s=timeout_s)
        now = self.clock.now_tai_s()
        for message in messages:
            try:
                self._pending += self._understand(message, now)
            except UnprocessableDataError as error:
                log.warning("%s ignored: %s", message.topic, error)
        self._pending += self.state.tick(now)
        self._uncommitted = self._uncommitted or bool(messages)
        # With the database away this raises: what was understood stays pending, nothing is committed, and
        # the next step tries again. Jobs have names, so trying twice makes none twice.
        self._follow(self._pending)
        handled, self._pending = len(self._pending), []
        if self._uncommitted:
            self._subscription.commit()
            self._uncommitted = False
        return handled

    def _understand(self, message: Message, now_tai: float) -> list[Instruction]:
        fields = message.fields
        match message.topic:
            case "ScriptQueue.nextVisit" if self._takes(fields["groupId"], now_tai):
                return self.state.announced(AnnouncedVisit.from_fields(fields), message.snd_tai, now_tai)
            case "ScriptQueue.nextVisitCanceled":
                return self.state.canceled(fields["groupId"])
            case "Camera.endReadout":
                return self.state.read_out(_read_out(message), now_tai)
            case "Image.hop" if (
                fields["hop"] == "at_archive"
                and fields["outcome"] == "ok"
                and fields["detector"] >= 0
                and self._takes(fields["groupId"], now_tai)
            ):
                return self.state.at_archive(_image(message), now_tai)
        return []

    def _follow(self, instructions: Iterable[Instruction]) -> None:
        jobs: list[Job] = []
        for instruction in instructions:
            match instruction:
                case Preload():
                    jobs.append(self._preload_job(instruction))
                case Process():
                    # What waits to be prepared is prepared by the process job itself: no time for both.
                    self.manager.cancel(_preload_id(instruction.image.group_id, instruction.image.detector))
                    jobs.append(self._process_job(instruction))
                case DropPreload(group_id, detector):
                    self.manager.cancel(_preload_id(group_id, detector))
                case GiveUp(visit, detector, obs_id, reason):
                    if obs_id:
                        self._tell_hop(
                            self._expected(visit, detector, obs_id),
                            "processed",
                            outcome=DEADLINE,
                            message=reason,
                        )
                    self._tell_detector(
                        {"obsId": obs_id, "groupId": visit.group_id, "detector": detector},
                        outcome=DEADLINE,
                        message=reason,
                    )
                case Reject(image, reason):
                    self._tell_hop(image, "processed", outcome="UnprocessableData", message=reason)
        if jobs:
            self.manager.submit_all(jobs)

    def _expected(self, visit: AnnouncedVisit, detector: int, obs_id: str) -> DetectorImage:
        """The image that did not come, so that the ledger can name it."""
        name = self._instruments[visit.instrument][1].detector(detector).name
        number = ObsId.parse(obs_id).exposure_id
        return DetectorImage(obs_id, visit.instrument, number, visit.group_id, detector, name, "", 0.0)

    def _common(self, instrument: str) -> dict[str, Any]:
        where, _ = self._instruments[instrument]
        return {
            "site": str(self.site.root),
            "dsn": self.db.dsn,
            "instrument": where,
            "detection_sigma": self.settings.detection_sigma,
            "reliability": self.settings.reliability,
            "injection_fraction": self.settings.injection_fraction,
        }

    def _preload_job(self, instruction: Preload) -> Job:
        visit, detector = instruction.visit, instruction.detector
        return Job(
            id=_preload_id(visit.group_id, detector),
            kind=PRELOAD,
            function=f"{WORKER}:preload",
            payload=self._common(visit.instrument) | {"visit": asdict(visit), "detector": detector},
            priority=Priority.PROMPT,
            affinity=detector,
            max_attempts=1,
        )

    def _process_job(self, instruction: Process) -> Job:
        image, visit = instruction.image, instruction.visit
        begun = instruction.read_out_tai or image.at_tai
        return Job(
            id=f"{PROCESS}/{image.obs_id}/{image.detector}",
            kind=PROCESS,
            function=f"{WORKER}:process",
            payload=self._common(image.instrument)
            | {
                "image": asdict(image),
                "visit": asdict(visit) if visit else None,
                "read_out_tai": instruction.read_out_tai,
            },
            priority=Priority.PROMPT,
            deadline_tai=begun + self.settings.deadline_s,
            affinity=image.detector,
            max_attempts=1 + self.settings.retries,
        )

    # -- results --

    def _tell(self) -> int:
        self._finished.extend(self.manager.poll(0.0))
        told = 0
        while self._finished:
            self._report(self._finished[0])  # raises while the database is away: told at the next step then
            self._finished.popleft()
            told += 1
        return told

    def _report(self, finished: FinishedJob) -> None:
        """Publish a result, then mark it told: dying between tells it twice, which the readers bear."""
        if finished.job.kind == PROCESS:
            self._report_process(finished)
        elif not finished.result.is_success:
            log.warning("%s: %s: %s", finished.job.id, finished.result.outcome, finished.result.message)
        self.store.mark_reported([finished.job.id])

    def _report_process(self, finished: FinishedJob) -> None:
        payload, result = finished.job.payload, finished.result
        image, value = DetectorImage(**payload["image"]), result.value
        now = self.clock.now_tai_s()
        outcome = str(value.get("outcome", result.outcome))
        message = str(value.get("message", "") or result.message)
        latency = now - (payload["read_out_tai"] or image.at_tai)
        loaded = value.get("preload") or {}
        if loaded:
            # In time: when the preparation's own job ended. Late: within this job, so by now.
            ahead = (
                None if loaded.get("is_late") else self.store.get(_preload_id(image.group_id, image.detector))
            )
            self._tell_hop(
                image, "preloaded", outcome=SUCCESS, message=str(loaded.get("note", "")),
                hop_tai=ahead["ended_tai"] if ahead and ahead["ended_tai"] else now,
            )  # fmt: skip
        self._tell_hop(image, "processed", outcome=outcome, message=message, attempt=finished.attempts)
        self._tell_detector(
            {
                "obsId": image.obs_id,
                "visit": image.exposure_id,
                "detector": image.detector,
                "groupId": image.group_id,
                "nSources": int(value.get("n_sources", 0)),
                "nAlerts": int(value.get("n_alerts", 0)),
                "latencyS": latency,
            },
            outcome=outcome,
            message=message,
        )
        self._tell_quality(image, value.get("quality") or {})
        log.info(
            "%s detector %d: %s, %d alerts, %.1f s after read-out (%.2f s of work)%s",
            image.obs_id, image.detector, outcome, value.get("n_alerts", 0), latency, result.wall_s,
            f": {message}" if message else "",
        )  # fmt: skip

    def _tell_quality(self, image: DetectorImage, measured: dict[str, Any]) -> None:
        quality = {k: item for k, item in measured.items() if k in QUALITY_FIELDS and item is not None}
        if not quality:
            return
        common = {
            "visit": image.exposure_id,
            "detector": image.detector,
            "obsId": image.obs_id,
            "instrument": image.instrument,
        }
        try:
            self.bus.publish("Prompt.visitQuality", common | quality)
        except (
            UserError
        ) as error:  # a number of another kind than the topic's: the result itself must be told
            log.warning("%s detector %d: quality not published: %s", image.obs_id, image.detector, error)

    def _tell_hop(
        self,
        image: DetectorImage,
        hop: str,
        *,
        outcome: str,
        message: str,
        attempt: int = 1,
        hop_tai: float | None = None,
    ) -> None:
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
                "outcome": "ok" if outcome == SUCCESS else outcome,
                "place": "archive",
                "message": message[:1000],
                "hopTai": self.clock.now_tai_s() if hop_tai is None else hop_tai,
                "attempt": attempt,
            },
        )

    def _tell_detector(self, fields: dict[str, Any], *, outcome: str, message: str) -> None:
        told = fields | {"outcome": "ok" if outcome == SUCCESS else outcome, "message": message[:1000]}
        self.bus.publish("Prompt.detectorProcessed", told)


def _preload_id(group_id: str, detector: int) -> str:
    return f"{PRELOAD}/{group_id}/{detector}"


def _read_out(message: Message) -> ReadOut:
    fields = message.fields
    tai = fields["timestampEndOfReadout"]
    known = math.isfinite(tai) and tai > 0
    return ReadOut(fields["groupId"], fields["imageName"], tai if known else message.snd_tai)


def _image(message: Message) -> DetectorImage:
    fields = message.fields
    at_tai = float(fields["hopTai"])
    return DetectorImage(
        obs_id=fields["obsId"],
        instrument=fields["instrument"],
        exposure_id=int(fields["exposureId"]),
        group_id=fields["groupId"],
        detector=int(fields["detector"]),
        detector_name=fields["detectorName"],
        path=str(Path(fields["path"])),
        at_tai=at_tai if math.isfinite(at_tai) and at_tai > 0 else message.snd_tai,
    )
