"""Catch-Up Archiver: what did not go the usual way is brought home, oldest first, and each night is summed up.

It compares the camera's store, raw files, outage buffers and tapes with the ledger, sends what is missing over
its own connections within its own bandwidth, always offers before it sends, and has the image writer write
again what only the camera still holds. It works while ``CatchUpArchiver.detailedState`` says enabled, or
when nobody ever said anything.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from cumbre.archive.alarms import Alarm
from cumbre.archive.catch_up_way import BEAT_S, Way, Work
from cumbre.archive.night_summary import NightSummaries
from cumbre.archive.owed import DAYS_BACK, RECENT_DAYS, Finder, InCamera
from cumbre.capture.hops import hop_fields, publish_hop, publish_hops
from cumbre.core.errors import CumbreError
from cumbre.ledger import Ledger

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock
    from cumbre.stores.postgres import Database

log = logging.getLogger(__name__)

STATE_TOPIC = "CatchUpArchiver.detailedState"
RECAPTURE = "Writer.recapture"
MAX_QUEUED = 500
FILES_EVERY, PAST_EVERY = 6, 60
"""A look at all files, and one far into the past, come with every so many looks at the last two nights."""
IDLE_PART = 10
"""Looks take at most one part in so many of the time."""


class CatchUpArchiver:
    """The service; one a machine that has files to send.

    Parameters
    ----------
    db
        Database of the ledger.
    """

    name = "catch-up"

    def __init__(self, *, site: Site, bus: Bus, clock: Clock, db: Database) -> None:
        self._site, self._bus, self._clock = site, bus, clock
        self._settings = site.config.catch_up
        ledger = Ledger(db)
        self._ways: list[Way] = []
        for link in site.config.links:
            finder = Finder(
                site=site, clock=clock, db=db, ledger=ledger, source=link.source, target=link.target,
                grace_s=self._settings.grace_s,
            )  # fmt: skip
            self._ways.append(Way(site=site, bus=bus, link=link, finder=finder))
        self._summaries = NightSummaries(site=site, bus=bus, clock=clock, ledger=ledger)
        self._recaptured: dict[str, tuple[float, int]] = {}
        self._haves: Counter[str] = Counter()
        self._alarms = {
            way.name: Alarm(bus, f"catch-up-{way.name}-lost", way.finder.source) for way in self._ways
        }
        self._next_scan, self._scans = 0.0, 0
        self._cut: Way | None = None
        self._stop = threading.Event()
        threading.Thread(target=self._beat, name="catch-up-beat", daemon=True).start()

    @property
    def is_enabled(self) -> bool:
        """Whether it may begin transfers."""
        last = self._bus.latest(STATE_TOPIC)
        return last is None or last.fields["processing"] == "enabled"

    def step(self, timeout_s: float) -> int:
        """Look for what is owed when it is time, report what was delivered; gives the number of files."""
        end = time.monotonic() + timeout_s
        count = 0
        while True:
            count += sum(self._settle(way) for way in self._ways)
            now = time.monotonic()
            if now >= self._next_scan or (self._cut is not None and self._cut.waiting < MAX_QUEUED // 4):
                self._scan()
                took_s = time.monotonic() - now
                self._next_scan = time.monotonic() + max(self._settings.every_s, IDLE_PART * took_s)
            if count or now >= end:
                return count
            time.sleep(min(0.1, max(end - now, 0.0)))

    def close(self) -> None:
        """Stop; what is owed is found again."""
        self._stop.set()
        for way in self._ways:
            way.close()

    def _beat(self) -> None:
        """Heartbeats, whatever a look at many files takes."""
        while not self._stop.wait(BEAT_S):
            for way in self._ways:
                try:
                    way.beat()
                except Exception:
                    log.exception("heartbeat of %s", way.name)

    def _scan(self) -> None:
        if not self.is_enabled:
            for way in self._ways:
                way.clear()
            return
        self._scans += 1
        self._cut = None
        for way in self._ways:
            if not way.finder.is_here:
                continue
            way.forget()
            far = self._scans % PAST_EVERY == 1
            found = way.finder.look(way.skips, days_back=DAYS_BACK if far else RECENT_DAYS)
            if self._scans % FILES_EVERY == 1:
                found = _chained(found, way.finder.look_at_files())
            for item in found:
                if isinstance(item, InCamera):
                    self._recapture(item)
                elif way.waiting >= MAX_QUEUED:
                    self._cut = way  # the rest is looked for when these are sent
                    break
                else:
                    way.add(item)
            self._tell_lost(way)
        self._summaries.tell()

    def _tell_lost(self, way: Way) -> None:
        """An image without any good copy is the worst there is: somebody must look for one at once."""
        alarm, lost = self._alarms[way.name], way.finder.lost
        if lost:
            some = ", ".join(sorted(lost)[:3])
            message = f"{len(lost)} files have no good copy at {way.finder.source}: {some}…"
            alarm.begin(f"{message}; see cumbre query ledger missing", severity=3, backlog=len(lost))
        else:
            alarm.end(f"everything at {way.finder.source} has a good copy")

    def _recapture(self, item: InCamera) -> None:
        """Have the image writer write what only the camera holds; ever rarer while nothing comes of it."""
        not_before, tries = self._recaptured.get(item.obs_id, (0.0, 0))
        now = self._clock.now_tai_s()
        if now < not_before:
            return
        self._recaptured[item.obs_id] = (now + 60.0 * 2 ** min(tries, 8), tries + 1)
        log.info(
            "%s: %d detectors only in the camera's store; written again", item.obs_id, len(item.detectors)
        )
        self._bus.publish(RECAPTURE, {"obsId": item.obs_id, "detectors": list(item.detectors)})

    def _settle(self, way: Way) -> int:
        """Tell what became of files that were sent."""
        count = 0
        while True:
            try:
                work, answer = way.results.get_nowait()
            except queue.Empty:
                return count
            count += 1
            owed, key = work.owed, work.owed.parcel.key
            way.on_way.discard(key)
            way.finder.release(owed)
            word = "" if isinstance(answer, CumbreError) else str(answer.get("answer"))
            if word in ("ok", "have") and answer.get("sha256") == owed.parcel.sha256:  # type: ignore[union-attr]
                way.later[key] = (time.monotonic() + 2 * self._settings.every_s, 0)
                self._delivered(way, work, sent=word == "ok")
            else:
                pause_s = min(self._settings.every_s * 2**work.attempts, 600.0)
                way.later[key] = (time.monotonic() + pause_s, work.attempts)
                self._failed(way, work, answer)

    def _delivered(self, way: Way, work: Work, *, sent: bool) -> None:
        owed = work.owed
        if not owed.key.is_detector:
            return
        source, target = way.finder.source, way.finder.target
        if sent:
            publish_hop(
                self._bus,
                self._clock,
                owed.piece,
                "transmitted",
                place=source,
                path=owed.path,
                byte_size=owed.parcel.size,
                checksum=owed.parcel.sha256,
                message=f"catch-up: sent to {target} from {owed.origin}",
                attempt=work.attempts,
            )
            return
        self._haves[owed.parcel.key] += 1
        if self._haves[owed.parcel.key] == 2:
            # It is there, read again by its receiver, and the ledger still does not know: its hop was lost.
            path = self._site.path(self._site.config.places[target].raw) / owed.parcel.key
            hop = hop_fields(
                self._clock,
                owed.piece,
                f"at_{target}",
                place=target,
                path=path,
                byte_size=owed.parcel.size,
                checksum=owed.parcel.sha256,
                message="catch-up: found there",
            )
            publish_hops(self._bus, [hop])

    def _failed(self, way: Way, work: Work, answer: dict[str, Any] | CumbreError) -> None:
        if isinstance(answer, CumbreError):
            outcome, message = answer.outcome, str(answer)
        else:
            words = {"conflict": "Conflict", "refused": "UnprocessableData"}
            outcome = words.get(str(answer.get("answer")), "Transient")
            message = f"answer {answer.get('answer')!r} {answer.get('error', '')}"
        log.warning("%s: %s: %s", way.name, work.owed.parcel.key, message)
        if work.owed.key.is_detector and work.attempts & (work.attempts - 1) == 0:
            publish_hop(
                self._bus,
                self._clock,
                work.owed.piece,
                "transmitted",
                place=way.finder.source,
                outcome=outcome,
                message=f"catch-up: {message}",
                attempt=work.attempts,
            )


def _chained(*parts: Any) -> Any:
    for part in parts:
        yield from part
