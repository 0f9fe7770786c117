"""The observing service: picks targets, announces visits, orders exposures, survives its own death.

In: ``survey.json``, ``night.json``, Camera.endReadout and the camera's answers, ScriptQueue.pause and resume.
Out: Scheduler.target, Scheduler.predictedSchedule, ScriptQueue.nextVisit, ScriptQueue.nextVisitCanceled,
Camera.takeImages; at the night's end ``observatory/night_done.json``. The next visit is announced while the
present one is exposed.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

from cumbre.bus import Bus
from cumbre.bus.messages import AckCode, Message
from cumbre.core.configuration import Site
from cumbre.core.errors import ConfigurationError, NotFoundError
from cumbre.core.instrument import Instrument, load_instrument
from cumbre.core.time import Clock
from cumbre.observatory import script_queue as queue
from cumbre.observatory.instruments import instrument_source
from cumbre.observatory.script_queue import QUEUE_FILE, QueueState, Timing
from cumbre.observatory.targets import (
    Limits,
    TelescopeState,
    first_possible,
    next_target,
    predict,
    why_nothing,
)
from cumbre.observatory.visits import SURVEY_FILE, Target, Tile, Visit, load_tiles
from cumbre.stores.files import write_atomic

__all__ = ["Limits", "ObservingService", "TelescopeState", "next_target", "predict", "why_nothing"]

NIGHT_FILE = "night.json"
DONE_FILE = "observatory/night_done.json"
ACKS = "Camera.ackcmd"
PREDICTED = 20
"""Targets that are predicted after each visit that is announced."""
log = logging.getLogger(__name__)


def site_instrument(site: Site) -> Instrument:
    """Load the description of the site's first camera, shipped or in the site's folder."""
    return load_instrument(instrument_source(site, site.config.instruments[0]))


class ObservingService:
    """Scheduler and thin script queue of one telescope.

    Parameters
    ----------
    site, bus, clock
        The observatory, its bus, night time.
    """

    name = "scheduler"

    def __init__(self, *, site: Site, bus: Bus, clock: Clock) -> None:
        self.site, self.bus, self.clock = site, bus, clock
        self.instrument = site_instrument(site)
        self.limits = Limits.of_site(site.config, self.instrument)
        settings = site.config.scheduler
        self.timing = Timing(settings.cadence_s, settings.notice_s, self.instrument.readout_s)
        self._path = site.path(QUEUE_FILE)
        self.state = QueueState.load(self._path)
        self._tiles: list[Tile] = []
        self._tiles_mtime = 0.0
        self._said = ""
        commands = [t for t in ("ScriptQueue.pause", "ScriptQueue.resume") if t in bus.topics]
        self._commands = bus.subscribe([ACKS, *commands], start="now")
        self._readouts = bus.subscribe(["Camera.endReadout"], start="now", consumer=self.name)
        if self.state.finished and not site.path(DONE_FILE).exists():
            self._write_done(self.state.finished)

    def step(self, timeout_s: float) -> int:
        """Take in messages, then act until the next moment that matters; waits at most ``timeout_s``.

        Raises
        ------
        ConfigurationError
            ``night.json`` or ``survey.json`` is wrong.
        """
        handled = self._read_order() + self._take_in(0.0)
        while True:
            now = self.clock.now_tai_s()
            action = queue.next_action(
                self.state, now, self.timing, self._choose, instrument=self.instrument.name
            )
            if isinstance(action, queue.Wait):
                break
            self._perform(action, now)
            handled += 1
        wait_s = min(timeout_s, max(self.clock.wall_s(action.until_tai - self.clock.now_tai_s()), 0.0))
        return handled + self._take_in(wait_s)

    def close(self) -> None:
        """Let go of the subscriptions; the state is already on disk."""
        self._commands.close()
        self._readouts.close()

    # -- input --

    def _read_order(self) -> int:
        """Look at ``night.json``: a new night, or a pause."""
        path = self.site.path(NIGHT_FILE)
        try:
            order = json.loads(path.read_text())
            visits = int(order["visits"])
            running = str(order.get("state", "running"))
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f'{path}: {error!r}; expected {{"visits": N, "state": "running"}}'
            ) from error
        key = str(order.get("id") or order.get("start_tai") or "night")
        if running == "running" and key != self.state.night:
            log.info("night %s: %d visits", key, visits)
            self._save(queue.begin_night(self.state, key, visits))
            return 1
        paused = running == "paused"
        if paused and not self.state.paused:
            self._save(replace(self.state, paused=True))
            return 1
        if running == "done" and key == self.state.night and not self.state.finished:
            # Ordered to stop: what is announced or exposing still ends, nothing new begins.
            under_way = (self.state.announced is not None) + (self.state.exposing is not None)
            if self.state.wanted > self.state.done + under_way:
                self._save(replace(self.state, wanted=self.state.done + under_way))
                return 1
        return 0

    def _take_in(self, timeout_s: float) -> int:
        """Read what the camera said; commits only after the state is saved."""
        handled = 0
        for message in self._commands.poll(timeout_s=0.0):
            handled += self._command(message)
        messages = self._readouts.poll(timeout_s=timeout_s)
        for message in messages:
            fields = message.fields
            if fields["instrument"] in ("", self.instrument.name):
                name, n_images = fields["imageName"], fields["imagesInSequence"]
                self._save(queue.end_of_readout(self.state, fields["groupId"], name, n_images))
        if messages:
            self._readouts.commit()
        return handled + len(messages)

    def _command(self, message: Message) -> int:
        if message.topic == ACKS:
            return self._refused(message)
        paused = message.topic == "ScriptQueue.pause"
        self._save(replace(self.state, paused=paused))
        self.bus.acknowledge(message, AckCode.COMPLETE, "paused" if paused else "running")
        return 1

    def _refused(self, message: Message) -> int:
        """Cancel the visit whose command the camera refused."""
        fields, visit = message.fields, self.state.exposing
        ours = fields["identity"] == self.bus.identity and message.snd_tai >= self.state.commanded_tai
        if visit is None or not ours or fields["ack"] >= 0:
            return 0
        now = self.clock.now_tai_s()
        self._perform(queue.Cancel(visit, f"the camera refused: {fields['result']}"), now)
        return 1

    # -- decisions --

    def tiles(self) -> list[Tile]:
        """Tiles of the survey, read again when the file changed.

        Raises
        ------
        NotFoundError, ConfigurationError
            No survey yet, or a wrong one.
        """
        path = self.site.path(SURVEY_FILE)
        mtime = path.stat().st_mtime if path.exists() else 0.0
        if not self._tiles or mtime != self._tiles_mtime:
            self._tiles, self._tiles_mtime = load_tiles(path), mtime
        return self._tiles

    def telescope(self, state: QueueState) -> TelescopeState:
        """Where the telescope will be when the visit under way is over."""
        if state.last is None:
            return TelescopeState(last_visit_tai=state.last_visit_tai)
        free = max(state.last.start_tai, state.commanded_tai) + state.last.duration_s
        last = state.last
        return TelescopeState(last.ra, last.dec, last.filter, free, state.last_visit_tai)

    def _choose(self, state: QueueState, earliest_tai: float) -> Target | queue.Finish | None:
        try:
            tiles = self.tiles()
        except NotFoundError as error:
            self._say(str(error))
            return None
        telescope = self.telescope(state)
        target = next_target(telescope, earliest_tai, self.limits, tiles)
        if target is None:
            self._say(f"nothing to observe: {why_nothing(telescope, earliest_tai, self.limits, tiles)}")
            if first_possible(telescope, earliest_tai, self.limits, tiles) is None:
                return queue.Finish(f"nothing can be observed within a day: {self._said}")
        return target

    def _say(self, text: str) -> None:
        if text != self._said:
            log.warning("%s", text)
            self._said = text

    # -- output --

    def _perform(self, action: queue.Action, now_tai: float) -> None:
        """Do one action in the order that makes a crash at any line harmless."""
        after = queue.apply(self.state, action, now_tai, self.timing)
        match action:
            case queue.Announce(visit):
                self._save(after)
                self._perform(queue.Republish(visit), now_tai)
            case queue.Republish(visit):
                self.bus.publish("Scheduler.target", visit.target_fields())
                self.bus.publish("ScriptQueue.nextVisit", visit.next_visit_fields())
                self._save(replace(after, published_tai=self.clock.now_tai_s()))
                self._predict(visit)
                log.info("next visit %s: tile %s", visit.group_id, visit.target.tile)
            case queue.Expose(visit):
                self._save(after)
                self.bus.publish("Camera.takeImages", visit.take_images_fields())
            case queue.Cancel(visit, reason):
                log.warning("visit %s cancelled: %s", visit.group_id, reason)
                fields = {"groupId": visit.group_id, "scriptSalIndex": visit.target_id}
                self.bus.publish("ScriptQueue.nextVisitCanceled", fields)
                self._save(after)
            case queue.Finish(reason):
                self._save(after)
                self._write_done(reason)
            case queue.Wait():
                return

    def _predict(self, visit: Visit) -> None:
        """Publish what will follow a visit if all goes well; a visit of now matters more than a plan of then."""
        target = visit.target
        cadence_s = max(self.timing.cadence_s, self.timing.camera_s(target))
        begin = target.start_tai + cadence_s
        state = TelescopeState(last_visit_tai=self.state.last_visit_tai).after(target)
        left = self.state.wanted - self.state.done - (self.state.exposing is not None) - 1
        count = max(min(PREDICTED, left), 0)
        until = begin + count * cadence_s - 1.0
        found = predict(state, begin, self.limits, self._tiles, until_tai=until, cadence_s=cadence_s)[:count]
        columns: dict[str, list[Any]] = {
            "targetId": [visit.target_id + 1 + i for i in range(len(found))],
            "ra": [t.ra for t in found], "decl": [t.dec for t in found], "rotation": [t.rotation for t in found],
            "filter": [t.filter for t in found], "exposureTime": [t.exposure_s for t in found],
            "nimages": [t.snaps for t in found], "duration": [t.duration_s for t in found],
            "startTai": [t.start_tai for t in found], "survey": [t.tile for t in found],
        }  # fmt: skip
        self.bus.publish("Scheduler.predictedSchedule", {"instrument": visit.instrument, **columns})

    def _save(self, state: QueueState) -> None:
        if state != self.state:
            write_atomic(self._path, json.dumps(state.to_json(), indent=1).encode())
            self.state = state

    def _write_done(self, reason: str) -> None:
        state = self.state
        done: dict[str, Any] = {
            "night": state.night,
            "visits": state.done,
            "wanted": state.wanted,
            "failed": state.failed,
            "reason": reason,
            "done_tai": self.clock.now_tai_s(),
        }
        write_atomic(self.site.path(DONE_FILE), json.dumps(done, indent=1).encode())
        log.info("night over: %s; %d of %d visits", reason, state.done, state.wanted)
