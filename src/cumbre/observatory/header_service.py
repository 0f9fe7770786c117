"""Header service: events and telemetry become one header an image, each value with its source and age.

In: camera events, ``Camera.takeImages``, ``ScriptQueue.nextVisit`` and every topic of ``header_map.yaml``.
Out: ``summit/headers/<obs_id>.json``, ``HeaderService.largeFileObjectAvailable``, ``Image.hop`` ``header``.
State is kept per image; an image that goes wrong gets an outcome and the next one goes on. Places in the log
are committed only up to the oldest unfinished image, so a restart takes unfinished images up again.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.core.errors import CumbreError
from cumbre.core.ids import ObsId
from cumbre.core.instrument import load_instrument
from cumbre.observatory.header_keywords import MAP_FILE, Collected, HeaderMap, load_header_map
from cumbre.stores.files import sha256_of, write_atomic

if TYPE_CHECKING:
    from cumbre.bus import Bus, Message
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

START, READOUT, END = "Camera.startIntegration", "Camera.startReadout", "Camera.endOfImageTelemetry"
COMMAND, NEXT_VISIT = "Camera.takeImages", "ScriptQueue.nextVisit"
HEADER_TOPIC = "HeaderService.largeFileObjectAvailable"
HEADERS_FOLDER = "summit/headers"
_REMEMBERED = 500


@dataclass(slots=True)
class _Pending:
    """An image whose header is being collected."""

    obs_id: str
    before: Message | None
    """Last message before the first one of this image: the place to restart from."""
    deadline_tai: float
    events: dict[str, Message] = field(default_factory=dict)
    collected: Collected = field(default_factory=Collected)

    def said(self, name: str) -> Any:
        """A field that any of the image's events has."""
        for message in self.events.values():
            if message.fields.get(name) not in (None, ""):
                return message.fields[name]
        return ""


class HeaderService:
    """Writes one header an image.

    Parameters
    ----------
    map_file
        Keyword map; the shipped one when not given.
    """

    name = "headers"

    def __init__(self, *, site: Site, bus: Bus, clock: Clock, map_file: Path = MAP_FILE) -> None:
        self._bus, self._clock = bus, clock
        self._observatory = site.config.observatory
        self._folder = site.path(HEADERS_FOLDER)
        self._map: HeaderMap = load_header_map(map_file)
        self._instrument_files = {load_instrument(item).name: item for item in site.config.instruments}
        wanted = {START, READOUT, END, COMMAND, NEXT_VISIT} | self._map.topics
        absent = sorted(topic for topic in wanted if topic not in bus.topics)
        if absent:
            log.warning("no such topics on this bus, their keywords will be missing: %s", ", ".join(absent))
        self._subscription = bus.subscribe(
            sorted(wanted - set(absent)), start="earliest", consumer="header-service"
        )
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._last: dict[str, Message] = {}
        self._commands: OrderedDict[str, Message] = OrderedDict()
        self._visits: OrderedDict[str, Message] = OrderedDict()
        self._previous: Message | None = None
        self._committed: Message | None = None

    def step(self, timeout_s: float) -> int:
        """Take in what came, write headers that are complete or overdue; gives the number of headers."""
        limit = 500
        messages = self._subscription.poll(timeout_s, limit)
        done = 0
        for message in messages:
            done += self._guarded(message)
            self._previous = message
        if len(messages) < limit:
            # Only when caught up: an old image's end event may still be on its way through the log.
            now = self._clock.now_tai_s()
            for image in [p for p in self._pending.values() if now > p.deadline_tai]:
                self._pending.pop(image.obs_id)
                done += self._finish(image, now)
        self._commit()
        return done

    def close(self) -> None:
        """Let go of the subscription; unfinished images come again."""
        self._subscription.close()

    def _commit(self) -> None:
        oldest = next(iter(self._pending.values()), None)
        place = self._previous if oldest is None else oldest.before
        if place is not None and place is not self._committed:
            self._subscription.commit(place)
            self._committed = place

    def _guarded(self, message: Message) -> int:
        """Handle one message; whatever one image brings, the next message is handled too."""
        try:
            return self._handle(message)
        except Exception:
            log.exception("message %s at offset %d could not be handled", message.topic, message.offset)
            return 0

    def _handle(self, message: Message) -> int:
        fields = message.fields
        if message.topic == COMMAND:
            _remember(self._commands, fields["obsId"] or fields["groupId"], message)
        elif message.topic == NEXT_VISIT:
            _remember(self._visits, fields["groupId"], message)
        elif message.topic in (START, READOUT, END):
            return self._image_event(message)
        else:
            self._last[message.topic] = message
        return 0

    def _image_event(self, message: Message) -> int:
        obs_id = str(ObsId.parse(message.fields["imageName"]))
        image = self._pending.get(obs_id)
        if image is None:
            if message.topic != START and (self._folder / f"{obs_id}.json").is_file():
                return 0  # written at its deadline already; a late event does not change it
            image = self._pending[obs_id] = _Pending(obs_id, self._previous, 0.0)
        image.events[message.topic] = message
        if message.topic == START:
            image.deadline_tai = message.snd_tai + message.fields["exposureTime"] + self._map.deadline_s
        elif message.topic == READOUT or image.deadline_tai == 0.0:
            image.deadline_tai = message.snd_tai + self._map.deadline_s
        stage = message.topic.partition(".")[2]
        for group in (self._map.quantities, self._map.keywords):
            chosen = {name: entry for name, entry in group.items() if entry.collect == stage}
            image.collected.collect(chosen, lambda topic: self._look_up(image, topic), message.snd_tai)
        if message.topic != END:
            return 0
        self._pending.pop(obs_id)
        return self._finish(image, message.snd_tai)

    def _look_up(self, image: _Pending, topic: str) -> Message | None:
        """The message of a topic that belongs to an image: its own events, its command, its visit, or telemetry."""
        if topic in (START, READOUT, END):
            return image.events.get(topic)
        if topic == COMMAND:
            return self._commands.get(image.obs_id) or self._commands.get(image.said("groupId"))
        if topic == NEXT_VISIT:
            return self._visits.get(image.said("groupId"))
        return self._last.get(topic)

    def _finish(self, image: _Pending, at_tai: float) -> int:
        """Write and announce; a failure is told by a hop and does not stop the service."""
        try:
            self._write(image, at_tai)
        except Exception as error:
            # The loop of a component: one bad image must never stop the next.
            outcome = "Transient" if isinstance(error, OSError) else "UnprocessableData"
            outcome = error.outcome if isinstance(error, CumbreError) else outcome
            log.exception("header of %s failed", image.obs_id)
            self._hop(image, outcome=outcome, message=str(error))
            return 0
        return 1

    def _write(self, image: _Pending, at_tai: float) -> None:
        collected = image.collected
        for group in (self._map.quantities, self._map.keywords):
            collected.collect(group, lambda topic: self._look_up(image, topic), at_tai)
        instrument = self._instrument_files.get(str(image.said("instrument")))
        if instrument is not None:
            collected.values["_instrument_file"] = instrument
        collected.finish(self._map, self._observatory, at_tai)
        applying = {name: e for name, e in self._map.keywords.items() if collected.applies(e)}
        missing = [name for name in applying if name not in collected.values]
        required = [name for name in missing if not applying[name].optional]
        header = {
            "obs_id": image.obs_id,
            "instrument": image.said("instrument"),
            "group_id": image.said("groupId"),
            "version": self._map.version,
            "complete": not required,
            "missing": missing,
            "reasons": {name: collected.reasons.get(name, "nothing was received") for name in missing},
            "keywords": {
                name: [collected.values[name], entry.comment]
                for name, entry in applying.items()
                if name in collected.values
            },
            "provenance": {n: collected.provenance[n] for n in applying if n in collected.provenance},
            "written_tai": self._clock.now_tai_s(),
        }
        path = self._folder / f"{image.obs_id}.json"
        kept = _read_complete(path)
        if kept is None:
            write_atomic(path, json.dumps(header, indent=1).encode())
        else:
            # Taken up again after a restart: what was written with fresh telemetry stays.
            header, missing, required = kept, kept["missing"], []
        size, checksum = path.stat().st_size, sha256_of(path)
        self._bus.publish(
            HEADER_TOPIC,
            {
                "id": image.obs_id,
                "url": str(path),
                "byteSize": size,
                "checkSum": checksum,
                "mimeType": "application/json",
                "generator": "headerService",
                "version": float(self._map.version),
                "instrument": header["instrument"],
                "missing": missing,
            },
        )
        message = f"partial: {', '.join(required)} missing" if required else ""
        self._hop(image, path=str(path), size=size, checksum=checksum, message=message)

    def _hop(
        self,
        image: _Pending,
        *,
        outcome: str = "ok",
        path: str = "",
        size: int = 0,
        checksum: str = "",
        message: str = "",
    ) -> None:
        self._bus.publish(
            "Image.hop",
            {
                "obsId": image.obs_id,
                "instrument": image.said("instrument"),
                "exposureId": ObsId.parse(image.obs_id).exposure_id,
                "groupId": image.said("groupId"),
                "detector": -1,
                "hop": "header",
                "outcome": outcome,
                "place": "summit",
                "path": path,
                "byteSize": size,
                "checksum": checksum,
                "message": message,
                "hopTai": self._clock.now_tai_s(),
            },
        )


def _remember(kept: OrderedDict[str, Message], key: str, message: Message) -> None:
    """Keep the last few by key; memory stays bounded through years of nights."""
    if key:
        kept[key] = message
        kept.move_to_end(key)
        while len(kept) > _REMEMBERED:
            kept.popitem(last=False)


def _read_complete(path: Path) -> dict[str, Any] | None:
    """A header written before, None when there is none or it is not complete."""
    try:
        header = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return header if isinstance(header, dict) and header.get("complete") else None
