"""The jobs of one pair: which files it shall send, and when a job is done. Pure, no input or output.

Jobs and files come in any order. A file waits some time for its job: nobody can know whether the job is late or
the control system away. What nobody claims is the Catch-Up Archiver's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REPLICATE = "replicate"
REMEMBER_S = 1800.0
"""Night seconds that jobs and unclaimed files are remembered."""

File = tuple[str, str]
"""obs_id and detector name."""


@dataclass(slots=True)
class Job:
    """An order to send one part of one image."""

    job_id: str
    obs_id: str
    instrument: str
    part: str
    detectors: frozenset[str]
    pair: int
    mode: str
    attempt: int
    epoch: int
    deadline_tai: float
    seen_tai: float
    left: set[str] = field(default_factory=set)
    begun_tai: float | None = None
    moved_bytes: int = 0

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], seen_tai: float) -> Job:
        """The job of a ``Control.job`` event."""
        detectors = frozenset(fields["detectors"])
        return cls(
            fields["jobId"],
            fields["obsId"],
            fields["instrument"],
            fields["part"],
            detectors,
            fields["pair"],
            fields["mode"],
            fields["attempt"],
            fields["epoch"],
            fields["deadlineTai"],
            seen_tai,
            left=set(detectors),
        )


class JobBook:
    """What one pair has been told to send.

    Parameters
    ----------
    link, pair
        Whose jobs are kept.
    """

    def __init__(self, link: str, pair: int) -> None:
        self._link, self._pair = link, pair
        self._jobs: dict[str, Job] = {}
        self._of_file: dict[File, str] = {}
        self._unclaimed: dict[File, tuple[float, dict[str, Any]]] = {}
        self.epoch = 0

    def __len__(self) -> int:
        return sum(1 for job in self._jobs.values() if self._is_mine(job) and job.left)

    def order(self, fields: Mapping[str, Any], now_tai: float) -> tuple[Job | None, list[dict[str, Any]]]:
        """Take in a ``Control.job``.

        Returns
        -------
        job
            The job when it is (or was, then ``pair`` differs) this pair's; None when it is nothing to us.
        files
            Files already written that it claims.
        """
        if fields["kind"] != REPLICATE or fields["link"] != self._link or fields["epoch"] < self.epoch:
            return None, []
        self.epoch = max(self.epoch, fields["epoch"])
        old = self._jobs.get(fields["jobId"])
        if old is not None and (fields["epoch"], fields["attempt"]) <= (old.epoch, old.attempt):
            return None, []
        job = Job.from_fields(fields, now_tai)
        self._jobs[job.job_id] = job
        for detector in job.detectors:
            self._of_file[job.obs_id, detector] = job.job_id
        if not self._is_mine(job):
            return (job if old is not None and self._is_mine(old) else None), []
        files = [self._unclaimed[job.obs_id, name] for name in sorted(job.detectors)
                 if (job.obs_id, name) in self._unclaimed]  # fmt: skip
        return job, [written for _, written in files]

    def written(self, fields: dict[str, Any], now_tai: float) -> Job | None:
        """Take in a file that was written; gives the job when this pair shall send it."""
        file = fields["obsId"], fields["detectorName"]
        self._unclaimed[file] = now_tai, fields  # kept: the job may come again with this pair's number
        job = self._jobs.get(self._of_file.get(file, ""))
        return job if job is not None and self._is_mine(job) else None

    def job_of(self, obs_id: str, detector: str) -> Job | None:
        """Job of this pair that a file belongs to."""
        job = self._jobs.get(self._of_file.get((obs_id, detector), ""))
        return job if job is not None and self._is_mine(job) else None

    def claimed(self) -> list[dict[str, Any]]:
        """Files that were written and are this pair's to send."""
        return [fields for file, (_, fields) in self._unclaimed.items() if self.job_of(*file) is not None]

    def is_elsewhere(self, obs_id: str, detector: str) -> bool:
        """Whether a file belongs to a job that is not, or no longer, this pair's."""
        job = self._jobs.get(self._of_file.get((obs_id, detector), ""))
        return job is not None and not self._is_mine(job)

    def begin(self, job: Job, now_tai: float) -> bool:
        """A file of the job is on its way; True for the first one."""
        if job.begun_tai is not None:
            return False
        job.begun_tai = now_tai
        return True

    def sent(self, obs_id: str, detector: str, size: int) -> Job | None:
        """A file is delivered; gives its job when that was the last one."""
        job = self.job_of(obs_id, detector)
        if job is None or detector not in job.left:
            return None
        job.left.discard(detector)
        job.moved_bytes += size
        return None if job.left else job

    def gave_up(self, obs_id: str, detector: str) -> Job | None:
        """A file cannot be delivered by this pair; gives its job, which is then no longer this pair's."""
        job = self.job_of(obs_id, detector)
        if job is None or not job.left:
            return None
        job.pair = -1
        return job

    def forget(self, now_tai: float) -> None:
        """Let go of what is old."""
        for job in [job for job in self._jobs.values() if now_tai - job.seen_tai > REMEMBER_S]:
            del self._jobs[job.job_id]
        self._of_file = {file: job for file, job in self._of_file.items() if job in self._jobs}
        old = [file for file, (seen, _) in self._unclaimed.items() if now_tai - seen > REMEMBER_S]
        for file in old:
            del self._unclaimed[file]

    def _is_mine(self, job: Job) -> bool:
        return job.pair == self._pair
