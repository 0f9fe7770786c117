"""Jobs: ordered once, known in the database until they end, recovered by whoever takes over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cumbre.bus import Bus
from cumbre.core.time import Clock
from cumbre.observatory.component.storage import Transaction
from cumbre.stores.postgres import Connection

REPLICATE, PROCESS = "replicate", "process"
SUBMITTED, RUNNING, DONE, FAILED = "submitted", "running", "done", "failed"
_COLUMNS = (
    "job_id", "entity", "kind", "obs_id", "group_id", "instrument", "part", "detectors", "link", "pair",
    "mode", "state", "attempt", "submitted_tai", "started_tai", "deadline_tai",
)  # fmt: skip


@dataclass(slots=True)
class Job:
    """One part of one image to be moved or processed.

    Attributes
    ----------
    waiting
        Names of detectors that are not there yet; with none left the job is done.
    pair
        Who shall send it; None while there is nobody.
    """

    job_id: str
    entity: str
    kind: str
    obs_id: str
    group_id: str
    instrument: str
    part: str
    detectors: tuple[str, ...]
    link: str
    pair: int | None
    mode: str
    state: str
    attempt: int
    submitted_tai: float
    started_tai: float | None
    deadline_tai: float
    waiting: set[str] = field(default_factory=set)

    @property
    def unit(self) -> str:
        """Group of the visit, or obs_id, for which a process job was made."""
        return self.job_id.removeprefix(f"{PROCESS}/").removesuffix(f"/{self.part}")

    def row(self) -> tuple[Any, ...]:
        """Values of the table's columns."""
        values = [getattr(self, name) for name in _COLUMNS]
        values[_COLUMNS.index("detectors")] = list(self.detectors)
        return tuple(values)

    def order(self, epoch: int) -> dict[str, Any]:
        """Fields of Control.job."""
        return {
            "jobId": self.job_id, "entity": self.entity, "kind": self.kind, "obsId": self.obs_id,
            "groupId": self.group_id, "instrument": self.instrument, "part": self.part,
            "detectors": list(self.detectors), "link": self.link,
            "pair": -1 if self.pair is None else self.pair, "mode": self.mode, "attempt": self.attempt,
            "epoch": epoch, "deadlineTai": self.deadline_tai,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class End:
    """How a job ended."""

    job: Job
    outcome: str = "ok"
    message: str = ""
    bytes: int = 0
    duration_s: float | None = None


class JobTable:
    """Jobs that have not ended, by the detector images they wait for; every change is stored, then told."""

    def __init__(self, *, bus: Bus, clock: Clock, transaction: Transaction, epoch: Callable[[], int]) -> None:
        self._bus, self._clock, self._transaction, self._epoch = bus, clock, transaction, epoch
        self._jobs: dict[str, Job] = {}
        self._counts: Counter[str] = Counter()
        self._by_image: dict[tuple[str, str], Job] = {}
        self._by_unit: dict[str, dict[str, Job]] = {}

    def __iter__(self) -> Any:
        return iter(list(self._jobs.values()))

    def get(self, job_id: str) -> Job | None:
        """Give a job that has not ended."""
        return self._jobs.get(job_id)

    def waiting_for(self, obs_id: str, detector: str) -> Job | None:
        """Give the replicate job that waits for a detector's image."""
        return self._by_image.get((obs_id, detector))

    def of_unit(self, unit: str) -> Mapping[str, Job]:
        """Process jobs of an announced visit (group), or of an image, by the names of their detectors."""
        return self._by_unit.get(unit, {})

    def count(self, entity: str) -> int:
        """Jobs of an entity that have not ended."""
        return self._counts[entity]

    def load_by_pair(self, link: str) -> Counter[int]:
        """Jobs that each pair of a link has."""
        return Counter(job.pair for job in self._jobs.values() if job.link == link and job.pair is not None)

    def recover(self) -> None:
        """Read the jobs in flight, and which of their detectors are there already."""
        self._jobs, self._counts, self._by_image, self._by_unit = {}, Counter(), {}, {}
        with self._transaction() as link:
            rows = link.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM control.job WHERE ended_tai IS NULL".encode()  # noqa: S608
            ).fetchall()
            for row in rows:
                values = dict(zip(_COLUMNS, row, strict=True))
                self._keep(Job(**values | {"detectors": tuple(values["detectors"])}))
            self._recover_arrivals(link)

    def _recover_arrivals(self, link: Connection) -> None:
        obs_ids = list({job.obs_id for job in self._jobs.values() if job.kind == REPLICATE})
        if not obs_ids or not link.execute("SELECT to_regclass('ledger.hop')").fetchone()[0]:  # type: ignore[index]
            return
        rows = link.execute(
            "SELECT obs_id, detector_name, place FROM ledger.hop "
            "WHERE obs_id = ANY(%s) AND hop LIKE 'at\\_%%' AND outcome = 'ok'",
            (obs_ids,),
        ).fetchall()
        for obs_id, detector, place in rows:
            job = self._by_image.get((obs_id, detector))
            if job is not None and job.link.rpartition("-")[2] == place:
                self.arrived(job, detector)

    def _keep(self, job: Job) -> None:
        self._jobs[job.job_id] = job
        self._counts[job.entity] += 1
        job.waiting = set(job.detectors)
        if job.kind == REPLICATE:
            for detector in job.detectors:
                self._by_image[job.obs_id, detector] = job
        else:
            self._by_unit.setdefault(job.unit, {}).update(dict.fromkeys(job.detectors, job))

    def submit(self, jobs: Iterable[Job]) -> int:
        """Store and order jobs; those that were ordered before are not ordered again. Gives how many are new."""
        jobs = [job for job in jobs if job.job_id not in self._jobs]
        if not jobs:
            return 0
        epoch = self._epoch()
        marks = ", ".join(["%s"] * (len(_COLUMNS) + 1))
        with self._transaction() as link:
            known = {
                row[0]
                for row in link.execute(
                    "SELECT job_id FROM control.job WHERE job_id = ANY(%s)", ([job.job_id for job in jobs],)
                )
            }
            jobs = [job for job in jobs if job.job_id not in known]
            link.cursor().executemany(
                f"INSERT INTO control.job ({', '.join(_COLUMNS)}, epoch) VALUES ({marks})".encode(),  # noqa: S608
                [(*job.row(), epoch) for job in jobs],
            )
        for job in jobs:
            self._keep(job)
        self.tell(jobs)
        return len(jobs)

    def tell(self, jobs: Iterable[Job]) -> None:
        """Publish orders (again); readers take the last one of a job."""
        epoch = self._epoch()
        orders = [("Control.job", job.order(epoch)) for job in jobs]
        if orders:
            self._bus.publish_many(orders)

    def arrived(self, job: Job, detector: str) -> bool:
        """Take in that a detector's image is there (or will never come); True when it was the last."""
        job.waiting.discard(detector)
        if job.kind == REPLICATE:
            self._by_image.pop((job.obs_id, detector), None)
        return not job.waiting

    def started(self, jobs: Iterable[Job]) -> None:
        """Store that jobs run."""
        now = self._clock.now_tai_s()
        rows = []
        for job in jobs:
            if job.state == SUBMITTED:
                job.state, job.started_tai = RUNNING, now
                rows.append((now, job.job_id))
        if rows:
            with self._transaction() as link:
                link.cursor().executemany(
                    "UPDATE control.job SET state = 'running', started_tai = %s WHERE job_id = %s", rows
                )

    def end(self, ends: Iterable[End]) -> int:
        """Store how jobs ended; gives how many."""
        ends = [end for end in ends if end.job.job_id in self._jobs]
        if not ends:
            return 0
        now = self._clock.now_tai_s()
        with self._transaction() as link:
            link.cursor().executemany(
                "UPDATE control.job SET state = %s, ended_tai = %s, outcome = %s, message = %s, bytes = %s, "
                "duration_s = %s, pair = %s, obs_id = %s WHERE job_id = %s AND ended_tai IS NULL",
                [
                    (
                        DONE if end.outcome == "ok" else FAILED, now, end.outcome, end.message[:1000], end.bytes,
                        now - end.job.submitted_tai if end.duration_s is None else end.duration_s,
                        end.job.pair, end.job.obs_id, end.job.job_id,
                    )
                    for end in ends
                ],
            )  # fmt: skip
        for end in ends:
            if self._jobs.pop(end.job.job_id, None) is not None:
                self._counts[end.job.entity] -= 1
            self._forget(end.job)
        return len(ends)

    def _forget(self, job: Job) -> None:
        unit = self._by_unit.get(job.unit, {}) if job.kind == PROCESS else {}
        for detector in job.detectors:
            self._by_image.pop((job.obs_id, detector), None)
            unit.pop(detector, None)
        if job.kind == PROCESS and not unit:
            self._by_unit.pop(job.unit, None)

    def reassign(self, moves: Iterable[tuple[Job, int | None]], deadline_tai: float) -> int:
        """Give jobs to other pairs: one more attempt each, stored and ordered."""
        moves = list(moves)
        if not moves:
            return 0
        with self._transaction() as link:
            link.cursor().executemany(
                "UPDATE control.job SET pair = %s, attempt = attempt + 1, state = 'submitted', epoch = %s, "
                "deadline_tai = %s WHERE job_id = %s",
                [(pair, self._epoch(), deadline_tai, job.job_id) for job, pair in moves],
            )
        for job, pair in moves:
            job.pair, job.attempt, job.state = pair, job.attempt + 1, SUBMITTED
            job.deadline_tai = deadline_tai
        self.tell(job for job, _ in moves)
        return len(moves)
