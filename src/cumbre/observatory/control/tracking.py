"""Following jobs to their end: results, arrivals, deadlines, and pairs that are lost."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from cumbre.bus import Message
from cumbre.core.time import Clock
from cumbre.observatory.control.allocation import JOBS_PER_PAIR
from cumbre.observatory.control.entities import AlertProductionCluster, Archiver
from cumbre.observatory.control.jobs import REPLICATE, End, Job, JobTable
from cumbre.observatory.control.pairs import FULL, LOCAL, PairTable

log = logging.getLogger(__name__)

TOPICS = (
    "Control.jobResult", "Image.hop", "Camera.endReadout", "Prompt.detectorProcessed",
    "ScriptQueue.nextVisitCanceled",
)  # fmt: skip
LATE, NO_DATA, CANCELED = "Deadline", "NoWorkFound", "Canceled"


class Tracker:
    """Brings jobs to their end.

    Parameters
    ----------
    archiver, cluster
        Whose jobs they are; their modes say how long and how often.
    """

    def __init__(
        self, *, jobs: JobTable, pairs: PairTable, clock: Clock, archiver: Archiver,
        cluster: AlertProductionCluster,
    ) -> None:  # fmt: skip
        self._jobs, self._pairs, self._clock = jobs, pairs, clock
        self._archiver, self._cluster = archiver, cluster
        self._names: dict[str, dict[int, str]] = {}

    def take_in(self, messages: Iterable[Message]) -> int:
        """Follow what the bus says of jobs; gives how many ended or moved."""
        ends: dict[str, End] = {}
        running: list[Job] = []
        refused: list[tuple[Job, str, str]] = []
        for message in messages:
            for end in self._understand(message, running, refused):
                ends.setdefault(end.job.job_id, end)
        self._jobs.started(job for job in running if job.job_id not in ends)
        done = self._jobs.end(ends.values())
        for job, outcome, why in refused:
            if job.job_id not in ends:
                done += self._move(job, outcome, why)
        return done

    def _understand(
        self, message: Message, running: list[Job], refused: list[tuple[Job, str, str]]
    ) -> list[End]:
        fields = message.fields
        match message.topic:
            case "Image.hop":
                return self._hop(fields, running)
            case "Control.jobResult":
                return self._result(fields, running, refused)
            case "Camera.endReadout":
                return self._read_out(fields)
            case "Prompt.detectorProcessed":
                return self._processed(fields)
            case "ScriptQueue.nextVisitCanceled":
                jobs = {job.job_id: job for job in self._jobs.of_unit(fields["groupId"]).values()}
                return [End(job, CANCELED, "the visit was cancelled") for job in jobs.values()]
        return []

    def _hop(self, fields: dict[str, Any], running: list[Job]) -> list[End]:
        job = self._jobs.waiting_for(fields["obsId"], fields["detectorName"])
        if job is None:
            return []
        source, _, target = job.link.rpartition("-")
        if fields["hop"] == f"at_{target}" and fields["outcome"] == "ok":
            if self._jobs.arrived(job, fields["detectorName"]):
                return [End(job)]
            running.append(job)
        elif (fields["hop"], fields["place"]) == ("quarantined", source) and self._jobs.arrived(
            job, fields["detectorName"]
        ):
            # what the source has set aside will never be sent
            return [End(job, fields["outcome"], fields["message"])]
        return []

    def _result(
        self, fields: dict[str, Any], running: list[Job], refused: list[tuple[Job, str, str]]
    ) -> list[End]:
        job = self._jobs.get(fields["jobId"])
        if job is None:
            return []
        if fields["outcome"] == "started":
            running.append(job)
            return []
        duration = _known(fields["durationS"])
        if fields["outcome"] == "ok":
            if fields["pair"] >= 0:
                job.pair = fields["pair"]
            return [End(job, "ok", fields["message"], fields["bytes"], duration)]
        if job.pair is None or fields["pair"] in (-1, job.pair):
            # the failure of an earlier attempt says nothing of the present one
            refused.append((job, fields["outcome"], fields["message"]))
        return []

    def _read_out(self, fields: dict[str, Any]) -> list[End]:
        """Forget detectors that the camera did not read."""
        read, ends = set(fields["detectors"]), []
        if not read:
            return []
        for job in self._jobs:
            if job.kind != REPLICATE or job.obs_id != fields["imageName"]:
                continue
            for detector in sorted(job.waiting - read):
                if self._jobs.arrived(job, detector):
                    outcome = NO_DATA if not read & set(job.detectors) else "ok"
                    ends.append(End(job, outcome, "the camera read none of its detectors"))
        return ends

    def _processed(self, fields: dict[str, Any]) -> list[End]:
        visit = self._jobs.of_unit(fields["obsId"]) or self._jobs.of_unit(fields["groupId"])
        if not visit:
            return []
        name = self._name_of(next(iter(visit.values())).instrument, fields["detector"])
        job = visit.get(name)
        if job is None:
            return []
        job.obs_id = fields["obsId"]
        if not self._jobs.arrived(job, name):
            return []
        return [End(job, fields["outcome"], fields["message"], 0, _known(fields["latencyS"]))]

    def _name_of(self, instrument: str, detector: int) -> str:
        """Name of a detector by its number; "" for one that the camera does not have."""
        if instrument not in self._names:
            described = self._cluster.instrument(instrument)
            self._names[instrument] = {item.id: item.name for item in described.detectors}
        return self._names[instrument].get(detector, "")

    def tend(self) -> int:
        """Give jobs of lost pairs to others, and end or move what is late; gives how many."""
        now, link, done = self._clock.now_tai_s(), self._archiver.link, 0
        full, local = self._pairs.pool(link, FULL), self._pairs.pool(link, LOCAL)
        load = self._jobs.load_by_pair(link)
        late = []
        for job in self._jobs:
            if now > job.deadline_tai:
                late.append(job)
            elif job.kind == REPLICATE and self._wants_another(job, full, local, load):
                moved = self._move(job, "PairLost", "its pair is gone", full=full, local=local)
                done += moved
                if moved and job.pair is not None:
                    load[job.pair] += 1
        for job in late:
            if job.kind == REPLICATE:
                done += self._move(job, LATE, "not done in the expected time", full=full, local=[])
            else:
                done += self._jobs.end([End(job, LATE, "no result in the expected time")])
        return done

    def _wants_another(self, job: Job, full: list[int], local: list[int], load: dict[int, int]) -> bool:
        if job.pair in full or not (full or local):
            return False
        if job.pair not in local:
            return True
        # alive without its link: better off with a pair that has one, if that is not busy
        return any(load.get(pair, 0) < JOBS_PER_PAIR for pair in full)

    def _move(
        self, job: Job, outcome: str, why: str, *, full: list[int] | None = None,
        local: list[int] | None = None,
    ) -> int:  # fmt: skip
        """Another pair for a job; with none left, or tried too often, the Catch-Up Archiver has the image."""
        link = job.link
        full = self._pairs.pool(link, FULL) if full is None else full
        local = self._pairs.pool(link, LOCAL) if local is None else local
        others = [pair for pair in full if pair != job.pair]
        spare = [pair for pair in local if pair != job.pair]
        load = self._jobs.load_by_pair(link)
        limit, deadline_s = self._limits()
        if job.attempt >= limit or not (others or spare):
            if outcome == "PairLost":
                return 0  # it may come back before the deadline
            log.warning("%s: %s: %s; left to the Catch-Up Archiver", job.job_id, outcome, why)
            return self._jobs.end([End(job, outcome, f"{why}; left to the Catch-Up Archiver")])
        pool = others or spare
        pair = min(pool, key=lambda number: (load[number], number))
        log.warning("%s: %s (%s): from pair %s to pair %d", job.job_id, outcome, why, job.pair, pair)
        return self._jobs.reassign([(job, pair)], max(job.deadline_tai, self._clock.now_tai_s() + deadline_s))

    def _limits(self) -> tuple[int, float]:
        """Attempts and deadline of the mode in force; the defaults where there is none any more."""
        try:
            return int(self._archiver.parameters.attempts), self._archiver.patience_s()
        except ValueError:
            return 5, 180.0


def _known(seconds: float) -> float | None:
    """Give a duration; None when it was not told (NaN on the bus)."""
    return seconds if seconds >= 0 else None
