"""The prompt service: from nextVisit and images at the archive to jobs, and from their results to the bus.

Workers return plain results; this process alone publishes them. What it must not forget is in the jobs table
(what runs, what ended, what was told) and in the bus consumer's place, which moves only after the table knows.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.bus import Bus, Message
from cumbre.core.configuration import Site
from cumbre.core.errors import UnprocessableDataError
from cumbre.core.ids import ObsId
from cumbre.core.instrument import Instrument
from cumbre.core.time import Clock
from cumbre.observatory.control.following import Follower
from cumbre.observatory.visits import AnnouncedVisit
from cumbre.orchestration.dispatch import OverloadPolicy, PoolRule
from cumbre.orchestration.engine import ComputeEngine, DaskEngine
from cumbre.orchestration.jobs import JobStore
from cumbre.orchestration.manager import LIVE, JobManager
from cumbre.orchestration.models import DEADLINE, DROPPED, KILLED, SAMPLED_OUT, FinishedJob, Job
from cumbre.orchestration.precovery import is_waiting
from cumbre.orchestration.prompt_jobs import (
    MISSED,
    NO_DETECTOR,
    PRECOVERY,
    PRELOAD,
    PROCESS,
    WORKER,
    PromptJobs,
    is_missed,
    preload_id,
    process_of,
    work_of,
)
from cumbre.orchestration.prompt_state import (
    EXPIRY_S,
    DetectorImage,
    DropPreload,
    GiveUp,
    Instruction,
    LeaveOut,
    Miss,
    Preload,
    Process,
    PromptState,
    ReadOut,
    Reject,
    Work,
)
from cumbre.orchestration.prompt_telling import Teller

if TYPE_CHECKING:
    from cumbre.stores.postgres import Database

TOPICS = ["ScriptQueue.nextVisit", "ScriptQueue.nextVisitCanceled", "Camera.endReadout", "Image.hop"]
SPARE, CATCH_UP = "spare", "catch-up"
CATCH_UP_NICE = 10
POOL_S = 2.0
"""Real seconds between two words to control of how many workers there are."""
PRECOVERY_LOOK_S = 60.0
"""Real seconds between two looks for new objects to be measured on earlier images."""
SLICE_S = 0.05
"""Real seconds of one wait: how late the two sources (bus, engine) can see one another's news."""
VISITS = "ScriptQueue.nextVisit"
CAUGHT_UP_TAG = "mode catch-up"
"""What a distributor says with the arrival of a file that the Catch-Up Archiver sent."""
log = logging.getLogger(__name__)


class PromptService:
    """Prompt processing of one site.

    Parameters
    ----------
    db
        Database of the jobs table; the workers reach Level 1 by its DSN.
    engine
        Where jobs run, or pools by name (``live``, ``spare``, ``catch-up``); by default Dask as the site's
        configuration says.
    """

    name = "prompt"
    survives_faults = True
    """What was taken from the bus and not yet done stays pending: the runner need not make it anew."""

    def __init__(
        self, *, site: Site, bus: Bus, clock: Clock, db: Database,
        engine: ComputeEngine | Mapping[str, ComputeEngine] | None = None,
    ) -> None:  # fmt: skip
        self.site, self.bus, self.clock, self.db = site, bus, clock, db
        self.settings = site.config.prompt
        self.jobs = PromptJobs(site, db.dsn)
        self.teller = Teller(bus, clock)
        if engine is None:
            engine = self._own_pools()
        self.engines = dict(engine) if isinstance(engine, Mapping) else {LIVE: engine}
        self.store = JobStore(db)
        self.state = PromptState(
            {name: self._detectors(item, "SCIENCE") for name, (_, item) in self.jobs.instruments.items()},
            image_timeout_s=self.settings.image_timeout_s,
            wavefront={
                name: frozenset(self._detectors(item, "WAVEFRONT"))
                for name, (_, item) in self.jobs.instruments.items()
            },
            ignored={
                name: frozenset(d.id for d in item.detectors if d.purpose not in ("SCIENCE", "WAVEFRONT"))
                for name, (_, item) in self.jobs.instruments.items()
            },
        )
        self._subscription = bus.subscribe(TOPICS, start="now", consumer=self.name)
        self._pending: list[Instruction] = []
        self._finished: deque[FinishedJob] = deque()
        self._uncommitted = False
        self._leader = Follower(site, bus, "AlertProductionCluster")
        self._declined: dict[str, float] = {}
        self._caught_up: dict[tuple[str, int], float] = {}
        self._left: Counter[str] = Counter()
        self._overload_told: dict[str, Any] = {}
        self._next_pool = 0.0
        self._next_precovery = 0.0
        self._restore()
        overload = self.settings.overload
        self.manager = JobManager(
            self.store, self.engines, clock, owner=self.name, light=[PRELOAD], rules=self._rules(idle=False),
            policy=OverloadPolicy(overload.behind, overload.drop_above, overload.kill_after_s),
        )  # fmt: skip
        self._restore_held()
        for kind in (PRELOAD, PROCESS, MISSED, PRECOVERY):
            for finished in self.store.unreported(kind):
                self._report(finished)

    def _own_pools(self) -> dict[str, ComputeEngine]:
        """Dask as the configuration says."""
        overload, later = self.settings.overload, self.settings.missed

        def pool(address: str | None, workers: int, nice: int = 0) -> ComputeEngine:
            return DaskEngine(
                address, n_workers=workers, nice=nice, warm_up=f"{WORKER}:warm_up",
                warm_payload={"site": str(self.site.root)},
            )  # fmt: skip

        made = {LIVE: pool(self.settings.cluster, self.settings.workers)}
        if overload.spare_cluster or overload.spare_workers:
            made[SPARE] = pool(overload.spare_cluster, overload.spare_workers)
        if later.catch_up_workers:
            made[CATCH_UP] = pool(None, later.catch_up_workers, CATCH_UP_NICE)
        return made

    @staticmethod
    def _detectors(instrument: Instrument, purpose: str) -> dict[int, str]:
        return {d.id: d.name for d in instrument.detectors if d.purpose == purpose}

    def _restore(self) -> None:
        """Know again what was announced, read out and taken in before a restart."""
        now = self.clock.now_tai_s()
        since = now - EXPIRY_S
        missed = self.store.payloads(MISSED, since)
        for row in missed:
            if row["payload"]["missed"] == SAMPLED_OUT:
                self.state.leave_out(process_of(row["payload"]).image.unit, now)
        dropped = []
        for row in self.store.payloads(PRELOAD, since):
            visit, work = AnnouncedVisit(**row["payload"]["visit"]), work_of(row["payload"])
            if row["payload"].get("left_out"):
                self.state.leave_out(visit.group_id, now)
            if row["state"] == "cancelled":
                dropped.append((visit, work))
            else:
                self.state.announced(visit, row["created_tai"], now, work)
        for visit, work in dropped:
            self.state.remember(visit, now, work)
        for message in self.bus.replay(["Camera.endReadout"], since_tai=since):
            self.state.read_out(_read_out(message), now)
        for row in (*self.store.payloads(PROCESS, since), *missed):
            self.state.taken(process_of(row["payload"]), now)

    def _restore_held(self) -> None:
        """Take in again the exposures that waited for the others of their visit: they are in no table yet."""
        now = self.clock.now_tai_s()
        awaited = self.state.awaiting()
        for message in self.bus.replay(["Image.hop"], since_tai=now - EXPIRY_S) if awaited else ():
            fields = message.fields
            if fields["groupId"] in awaited and fields["outcome"] == "ok" and fields["detector"] >= 0:
                self._pending += self._hop(message, now)

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
        for engine in self.engines.values():
            engine.close()

    def _rules(self, *, idle: bool) -> dict[str, PoolRule]:
        """What each pool does now: offline work never takes a live worker while a visit is expected."""
        when = self.settings.missed.when
        later = self._leader.is_enabled and (when == "idle" or (when == "daytime" and self._is_daytime))
        rules = {
            LIVE: PoolRule("always", offline=later and idle),
            SPARE: PoolRule("behind", offline=later),
            CATCH_UP: PoolRule("never", offline=True),
        }
        return {name: rules[name] for name in self.engines}

    @property
    def _is_daytime(self) -> bool:
        """Whether control wants late work done."""
        return self._leader.is_enabled and bool(self._leader.settings.get("missed", False))

    def _look_back(self, *, idle: bool) -> None:
        """By day, when nothing else is to be done: measure new objects on earlier images, one job at a time."""
        if not (idle and self._is_daytime and self.settings.precovery_days):
            return
        if time.monotonic() < self._next_precovery:
            return
        self._next_precovery = time.monotonic() + PRECOVERY_LOOK_S
        if is_waiting(self.db):
            self.manager.submit_all([self.jobs.precovery(self.clock.now_tai_s())])

    def _tell_pool(self) -> None:
        """Tell control how many workers there are, and everybody when they fall behind."""
        dispatcher = self.manager.dispatcher
        is_news = dispatcher.is_behind != self._overload_told.get("behind", False)
        if time.monotonic() < self._next_pool and not is_news:
            return
        self._next_pool = time.monotonic() + POOL_S
        workers = {name: len(engine.workers()) for name, engine in self.engines.items()}
        self.bus.publish(
            "AlertProductionCluster.pool", {"workers": workers[LIVE], "waiting": self.state.waiting}
        )
        told = {
            "behind": dispatcher.is_behind,
            "dropped": self._left[DROPPED],
            "killed": self._left[KILLED],
            "late": self._left[DEADLINE],
            "sampledOut": self._left[SAMPLED_OUT],
            "missed": self.store.count_open(MISSED),
        }
        if told != self._overload_told:
            self.bus.publish(
                "Prompt.overload",
                told
                | {
                    "waiting": dispatcher.waiting,
                    "running": dispatcher.running,
                    "workers": workers[LIVE],
                    "spareWorkers": workers.get(SPARE, 0),
                },
            )
            self._overload_told = told

    def _takes(self, unit: str, now_tai: float) -> bool:
        """Whether a visit, or an image that nobody announced, may be taken up (perhaps to be left out).

        Decided once a visit: disabling the cluster does not end what the current visit still needs, and
        enabling it does not begin in the middle of one.
        """
        if unit in self._declined:
            return False
        if self.state.knows(unit):
            return True
        self._leader.look()
        if self._leader.is_enabled and self._leader.mode_processes:
            if self.manager.dispatcher.is_behind and not is_sampled(unit, self.settings.overload.sampling):
                log.warning("%s left out: the workers are behind", unit)
                self.state.leave_out(unit, now_tai)
            return True
        self._declined[unit] = now_tai
        why = f"in mode {self._leader.mode!r}" if self._leader.is_enabled else "while it is not enabled"
        log.info("%s not taken up: the Alert Production Cluster processes nothing %s", unit, why)
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
            case "ScriptQueue.nextVisit":
                self._leader.look()
                # in modes without visits nothing is prepared, nor declined: their images are taken up
                if self._leader.settings.get("trigger", VISITS) == VISITS and self._takes(
                    fields["groupId"], now_tai
                ):
                    visit = AnnouncedVisit.from_fields(fields)
                    return self.state.announced(visit, message.snd_tai, now_tai, self._work())
            case "ScriptQueue.nextVisitCanceled":
                return self.state.canceled(fields["groupId"], now_tai)
            case "Camera.endReadout":
                return self.state.read_out(_read_out(message), now_tai)
            case "Image.hop" if fields["detector"] >= 0 and fields["outcome"] == "ok":
                return self._hop(message, now_tai)
        return []

    def _hop(self, message: Message, now_tai: float) -> list[Instruction]:
        """An image came to a place; what the Catch-Up Archiver brought anywhere on its way is remembered."""
        fields = message.fields
        key = fields["obsId"], fields["detector"]
        if fields["hop"].startswith("at_") and fields["message"] == CAUGHT_UP_TAG:
            self._caught_up[key] = now_tai
            if len(self._caught_up) > 100_000:
                self._caught_up = {k: t for k, t in self._caught_up.items() if now_tai - t < EXPIRY_S}
        if fields["hop"] != "at_archive" or not self._takes(fields["groupId"] or fields["obsId"], now_tai):
            return []
        self._recall(fields["groupId"], int(fields["detector"]), now_tai)
        is_caught_up = self._caught_up.pop(key, None) is not None
        return self.state.at_archive(_image(message), now_tai, self._work(), is_caught_up=is_caught_up)

    def _recall(self, group_id: str, detector: int, now_tai: float) -> None:
        """Know a visit of several exposures again that was announced too long ago, when one of them comes."""
        if not group_id or self.state.knows(group_id):
            return
        row = self.store.get(preload_id(group_id, detector)) or self.store.get(
            preload_id(group_id, NO_DETECTOR)
        )
        if row is not None and row["payload"]["visit"]["n_images"] > 1:
            if row["payload"].get("left_out"):
                self.state.leave_out(group_id, now_tai)
            visit = AnnouncedVisit(**row["payload"]["visit"])
            self.state.remember(visit, now_tai, work_of(row["payload"]))

    def _work(self) -> Work:
        return Work.of_mode(self._leader.mode, self._leader.settings)

    def _follow(self, instructions: list[Instruction]) -> None:
        """Make the jobs, then tell what none was made for: what is told is told once."""
        jobs: list[Job] = []
        for instruction in instructions:
            match instruction:
                case Preload():
                    jobs.append(self.jobs.preload(instruction))
                case Process():
                    # What waits to be prepared is prepared by the process job itself: no time for both.
                    self.manager.cancel(preload_id(instruction.image.group_id, instruction.image.detector))
                    jobs.append(self.jobs.process(instruction))
                case Miss(process, outcome):
                    jobs.append(self.jobs.missed(process, outcome))
                case LeaveOut():
                    job = self.jobs.left_out(instruction)
                    now = self.clock.now_tai_s()
                    if self.store.add(job, now):
                        self.store.cancel(job.id, now)
                case DropPreload(group_id, detector):
                    self.manager.cancel(preload_id(group_id, detector))
        if jobs:
            self.manager.submit_all(jobs)
        for instruction in instructions:
            match instruction:
                case Miss(process, outcome, reason):
                    self._left[outcome] += 1
                    self.teller.processed(process, outcome=outcome, message=reason)
                case GiveUp(visit, detector, obs_id, reason, others):
                    for other in others:
                        image = self._expected(visit, detector, other)
                        self.teller.hop(image, "processed", outcome=DEADLINE, message=reason)
                    if obs_id:
                        self.teller.hop(
                            self._expected(visit, detector, obs_id),
                            "processed",
                            outcome=DEADLINE,
                            message=reason,
                        )
                    self.teller.detector(
                        {"obsId": obs_id, "groupId": visit.group_id, "detector": detector},
                        outcome=DEADLINE,
                        message=reason,
                    )
                case Reject(image, reason, outcome):
                    self.teller.hop(image, "processed", outcome=outcome, message=reason)

    def _expected(self, visit: AnnouncedVisit, detector: int, obs_id: str) -> DetectorImage:
        """The image that did not come, so that the ledger can name it."""
        name = self.jobs.instruments[visit.instrument][1].detector(detector).name
        number = ObsId.parse(obs_id).exposure_id
        return DetectorImage(obs_id, visit.instrument, number, visit.group_id, detector, name, "", 0.0)

    # -- results --

    def _tell(self) -> int:
        idle = self.manager.dispatcher.is_idle and not self.state.waiting
        self.manager.rules = self._rules(idle=idle)
        self._look_back(idle=idle)
        self._finished.extend(self.manager.poll(0.0))
        told = 0
        while self._finished:
            self._report(self._finished[0])  # raises while the database is away: told at the next step then
            self._finished.popleft()
            told += 1
        return told

    def _report(self, finished: FinishedJob) -> None:
        """Publish a result, then mark it told: dying between tells it twice, which the readers bear."""
        if finished.job.kind == PRELOAD:
            if not finished.result.is_success:
                log.warning("%s: %s: %s", finished.job.id, finished.result.outcome, finished.result.message)
        elif finished.job.kind == PRECOVERY:
            self._report_precovery(finished)
        else:
            self._report_process(finished)
        self.store.mark_reported([finished.job.id])

    def _report_precovery(self, finished: FinishedJob) -> None:
        result = finished.result
        if not result.is_success:
            log.warning("%s: %s: %s", finished.job.id, result.outcome, result.message)
            return
        log.info("earlier images: %s", ", ".join(f"{value} {name}" for name, value in result.value.items()))
        if result.value.get("unfinished"):
            self._next_precovery = 0.0

    def _report_process(self, finished: FinishedJob) -> None:
        image = DetectorImage(**finished.job.payload["image"])
        # In time: when the preparation's own job ended. Late: within this job, so by now.
        is_late = (finished.result.value.get("preload") or {}).get("is_late", True)
        ahead = None if is_late else self.store.get(preload_id(image.group_id, image.detector))
        if finished.job.kind == PROCESS and is_missed(finished):
            outcome = finished.result.outcome
            job = self.jobs.missed(process_of(finished.job.payload), outcome)
            if self.store.add(job, self.clock.now_tai_s()):
                self._left[outcome] += 1
        self.teller.result(finished, prepared_tai=ahead["ended_tai"] if ahead else None)


def is_sampled(unit: str, part: float) -> bool:
    """Whether a visit is among the part that is processed: the same answer always."""
    number = int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8], "big")
    return number < part * 2**64


def _read_out(message: Message) -> ReadOut:
    fields = message.fields
    tai = fields["timestampEndOfReadout"]
    known = math.isfinite(tai) and tai > 0
    exposure_s = fields["requestedExposureTime"]
    return ReadOut(
        fields["groupId"],
        fields["imageName"],
        tai if known else message.snd_tai,
        fields["imagesInSequence"] if fields["groupId"] else 1,
        exposure_s if math.isfinite(exposure_s) else 0.0,
    )


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
