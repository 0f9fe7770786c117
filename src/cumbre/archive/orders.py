"""The control system's jobs as a replicator meets them: read from the bus, answered on the bus."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from cumbre.archive.jobs import REMEMBER_S, Job, JobBook
from cumbre.capture.hops import HOP_TOPIC, Piece
from cumbre.core.errors import CumbreError

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

JOB_TOPIC = "Control.job"
RESULT_TOPIC = "Control.jobResult"


class Orders:
    """Jobs of one pair; safe to use from several threads."""

    def __init__(self, link: str, pair: int, bus: Bus, clock: Clock) -> None:
        self.book = JobBook(link, pair)
        self._pair, self._bus, self._clock = pair, bus, clock
        self._lock = threading.Lock()

    def recover(self, hop: str, place: str) -> list[dict[str, Any]]:
        """Read again what was said lately: after a restart the book is empty, the jobs are not done.

        Gives the files that jobs of this pair claim, whatever had become of them.
        """
        since = self._clock.now_tai_s() - REMEMBER_S
        for message in self._bus.replay([JOB_TOPIC, HOP_TOPIC], since_tai=since):
            fields = message.fields
            if message.topic == JOB_TOPIC:
                self.book.order(fields, message.snd_tai)
            elif (fields["hop"], fields["outcome"], fields["place"]) == (hop, "ok", place):
                self.book.written(fields, message.snd_tai)
        return self.book.claimed()

    def order(self, fields: dict[str, Any]) -> tuple[Job | None, list[dict[str, Any]]]:
        """Take in a job; see :meth:`JobBook.order`."""
        with self._lock:
            return self.book.order(fields, self._clock.now_tai_s())

    def written(self, fields: dict[str, Any]) -> Job | None:
        """Job of this pair for a file that was written."""
        with self._lock:
            return self.book.written(fields, self._clock.now_tai_s())

    def begin(self, job: Job) -> None:
        """The first file of a job is on its way."""
        with self._lock:
            first = self.book.begin(job, self._clock.now_tai_s())
        if first:
            self._tell(job, "started", "")

    def is_elsewhere(self, piece: Piece) -> bool:
        """Whether a file is now the job of another pair."""
        with self._lock:
            return self.book.is_elsewhere(piece.obs_id, piece.detector_name)

    def sent(self, piece: Piece, size: int) -> None:
        """A file is delivered."""
        with self._lock:
            job = self.book.sent(piece.obs_id, piece.detector_name, size)
        if job is not None:
            self._tell(job, "ok", f"{len(job.detectors)} files of {job.part}")

    def gave_up(self, piece: Piece, error: Exception) -> None:
        """A file cannot be delivered by this pair."""
        with self._lock:
            job = self.book.gave_up(piece.obs_id, piece.detector_name)
        if job is not None:
            outcome = error.outcome if isinstance(error, CumbreError) else "Transient"
            self._tell(job, outcome, str(error))

    def _tell(self, job: Job, outcome: str, message: str) -> None:
        begun = job.begun_tai if job.begun_tai is not None else self._clock.now_tai_s()
        self._bus.publish(
            RESULT_TOPIC,
            {
                "jobId": job.job_id,
                "outcome": outcome,
                "message": message[:2000],
                "bytes": job.moved_bytes,
                "durationS": self._clock.now_tai_s() - begun,
                "pair": self._pair,
            },
        )
