"""Image writer: the camera's arrays and the header become raw FITS files, once and completely.

Several nodes share each image detector by detector (:mod:`cumbre.capture.nodes`). They stream, every image as
it is read out, and are commanded, a given image of the camera's store (``Writer.writeImage``,
``Writer.recapture``). An image waits for its header until a deadline of night time; then it is written with
what is known. A bad array gives that detector an outcome and the others go on. A node killed at any line goes
on where it stopped, or the others take its detectors; a scan of the camera's store finds images whose event
never came.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cumbre.bus.messages import AckCode
from cumbre.capture.daq import DaqImage, images
from cumbre.capture.hops import Piece, publish_hop, publish_hops
from cumbre.capture.keys import sidecar_key
from cumbre.capture.nodes import Done, Membership, NodeJournals, owner, write_once
from cumbre.capture.pixels import PixelWriter
from cumbre.capture.primary import Header, completed_header
from cumbre.core.errors import CumbreError, NotFoundError, UnprocessableDataError
from cumbre.core.ids import ObsId, manifest_key
from cumbre.core.instrument import Instrument, load_instrument

if TYPE_CHECKING:
    from cumbre.bus import Bus, Message
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)

END_READOUT = "Camera.endReadout"
HEADER_TOPIC = "HeaderService.largeFileObjectAvailable"
COMMANDS = ("Writer.writeImage", "Writer.recapture")
IMAGE_WRITTEN = "Writer.imageWritten"
DAQ_FOLDER = "summit/daq"
HEADERS_FOLDER = "summit/headers"
RECORDS_FOLDER = "summit/capture"
QUARANTINE_FOLDER = "summit/quarantine"
SCAN_GRACE_S = 20.0
"""Night time that the events of a newly seen image get before the scan takes it."""
COMMAND_S = 120.0
"""Real seconds that a command may take before its sender is told to wait no longer."""


@dataclass(slots=True)
class _Pending:
    """An image with detectors that may be unwritten."""

    obs_id: ObsId
    folder: Path
    before: Message | None
    deadline_tai: float
    header: Path
    instrument: str = ""
    group_id: str = ""
    command: Message | None = None
    detectors: list[str] = field(default_factory=list)
    """Only these, for a command; empty for all."""
    image: DaqImage | None = None
    ready: Header | None = None
    """The header to write, once the sidecar is there."""

    @property
    def token(self) -> str:
        """Identity of the command; empty for the stream."""
        c = self.command
        return f"{c.identity}:{c.origin}:{c.seq_num}" if c is not None else ""


def writer_nodes(site: Site) -> tuple[list[str], list[str]]:
    """Names of the regular nodes and of the spares, counted up from ``writer-1``."""
    settings = site.config.capture
    names = [f"writer-{number}" for number in range(1, settings.writers + settings.spares + 1)]
    return names[: settings.writers], names[settings.writers :]


class ImageWriter:
    """One node that writes raw files at the summit.

    Parameters
    ----------
    node
        Its number, 1 to the site's writers and spares.
    header_wait_s
        Night time that an image waits for its header after the end of readout.
    scan_every_s
        Real seconds between scans of the camera's store.
    """

    def __init__(
        self,
        *,
        site: Site,
        bus: Bus,
        clock: Clock,
        node: int = 1,
        header_wait_s: float = 30.0,
        scan_every_s: float = 10.0,
    ) -> None:
        self.name = f"writer-{node}"
        self._site, self._bus, self._clock = site, bus, clock
        self._header_wait_s, self._scan_every_s = header_wait_s, scan_every_s
        self._raw = site.path(site.config.places["summit"].raw)
        self._daq = site.path(DAQ_FOLDER)
        self._records = site.path(RECORDS_FOLDER)
        self._pixels = PixelWriter(raw=self._raw, quarantine_folder=site.path(QUARANTINE_FOLDER), clock=clock)
        self._instruments = {i.name: i for i in map(load_instrument, site.config.instruments)}
        regular, spares = writer_nodes(site)
        self._members = Membership(
            bus, self.name, regular=regular, spares=spares, silence_s=site.config.capture.silence_s
        )
        self._journals = NodeJournals(self._records, self.name)
        self._subscription = bus.subscribe(
            [END_READOUT, HEADER_TOPIC], start="earliest", consumer=f"image-{self.name}"
        )
        self._commands = bus.subscribe(COMMANDS, start="now", consumer=f"image-{self.name}-commands")
        self._pending: OrderedDict[tuple[str, str], _Pending] = OrderedDict()
        self._seen: dict[str, float] = {}
        self._done: set[str] = set()
        self._previous: Message | None = None
        self._committed: Message | None = None
        self._commands_open = False
        self._next_scan = 0.0

    def step(self, timeout_s: float) -> int:
        """Take in events and commands, write what is this node's; gives the number of finished images."""
        self._members.beat(len(self._pending))
        self._take_in(min(timeout_s, 0.1) if self._pending else timeout_s)
        self._members.listen()
        if time.monotonic() >= self._next_scan:
            self._scan()
            self._next_scan = time.monotonic() + self._scan_every_s
        for day in {item.obs_id.day_obs for item in self._pending.values()}:
            self._journals.look(day)
        now, done = self._clock.now_tai_s(), 0
        for key, item in list(self._pending.items()):
            late = now > item.deadline_tai
            if (item.ready or item.header.is_file() or late) and self._take(item, late=late):
                del self._pending[key]
                done += 1
        self._commit()
        return done

    def close(self) -> None:
        """Let go of the subscriptions; unfinished images come again."""
        self._members.close()
        self._commands.close()
        self._subscription.close()

    # what is asked for

    def _take_in(self, timeout_s: float) -> None:
        for message in self._subscription.poll(timeout_s):
            try:
                if message.topic == END_READOUT:
                    self._read_out(message)
                elif (message.fields["id"], "") in self._pending:
                    self._pending[message.fields["id"], ""].header = Path(message.fields["url"])
            except CumbreError as error:
                log.error("%s at offset %d: %s", message.topic, message.offset, error)
            self._previous = message
        for message in self._commands.poll(0.0):
            self._commands_open = True
            try:
                self._commanded(message)
            except CumbreError as error:
                if self._leads(message.fields["obsId"], str(message.seq_num)):
                    self._bus.acknowledge(message, AckCode.FAILED, str(error), error=1)

    def _read_out(self, message: Message) -> None:
        fields = message.fields
        obs_id = ObsId.parse(fields["imageName"])
        folder = self._site.path(fields["daqPath"]) if fields["daqPath"] else self._daq / str(obs_id)
        if not folder.is_dir() and (not fields["daqPath"] or self._record_path(obs_id).is_file()):
            return  # a camera that writes its own files (see capture.directory), or long done and cleaned
        self._add(obs_id, folder, fields["timestampEndOfReadout"] or message.snd_tai, fields)

    def _commanded(self, message: Message) -> None:
        """Take up a command; every node does, and each does its share.

        Raises
        ------
        CumbreError
            It cannot be done: no such image or detector.
        """
        obs_id = ObsId.parse(message.fields["obsId"])
        image = DaqImage.open(self._daq / str(obs_id))
        wanted = list(message.fields["detectors"])
        unknown = sorted(set(wanted) - set(image.detectors))
        if unknown:
            raise NotFoundError(
                f"{obs_id}: detectors {unknown}: the camera read {', '.join(image.detectors)}"
            )
        item = self._add(obs_id, image.folder, self._clock.now_tai_s() - self._header_wait_s, {}, message)
        item.detectors = wanted
        if self._leads(str(obs_id), item.token):
            self._bus.acknowledge(message, AckCode.IN_PROGRESS, timeout_s=COMMAND_S)

    def _add(
        self,
        obs_id: ObsId,
        folder: Path,
        read_out_tai: float,
        fields: dict[str, Any],
        command: Message | None = None,
    ) -> _Pending:
        item = _Pending(
            obs_id,
            folder,
            self._previous,
            read_out_tai + self._header_wait_s,
            self._site.path(HEADERS_FOLDER) / f"{obs_id}.json",
            fields.get("instrument", ""),
            fields.get("groupId", ""),
            command,
        )
        present = self._pending.get((str(obs_id), item.token))
        if present is not None:
            item.before = present.before  # told again: the place in the log stays before the first telling
        self._pending[str(obs_id), item.token] = item
        return item

    def _scan(self) -> None:
        """Find images in the camera's store that were never written."""
        now = self._clock.now_tai_s()
        present = set()
        for folder in images(self._daq):
            name = folder.name
            present.add(name)
            if name in self._done or (name, "") in self._pending:
                continue
            obs_id = ObsId.parse(name)
            if self._record_path(obs_id).is_file():
                self._done.add(name)
            elif now - self._seen.setdefault(name, now) > SCAN_GRACE_S:
                log.info("%s: in the camera's store but not written; taking it now", name)
                self._add(obs_id, folder, now - self._header_wait_s, {})
        self._done &= present
        self._seen = {key: value for key, value in self._seen.items() if key in present - self._done}
        if self._pending:
            self._journals.forget_before(min(item.obs_id.day_obs for item in self._pending.values()))

    def _commit(self) -> None:
        """Commit the stream up to the oldest unfinished image, the commands when all are done."""
        streamed = [item for item in self._pending.values() if item.command is None]
        place = self._previous if not streamed else streamed[0].before
        if place is not None and place is not self._committed:
            self._subscription.commit(place)
            self._committed = place
        if self._commands_open and len(streamed) == len(self._pending):
            self._commands.commit()
            self._commands_open = False

    def _leads(self, *what: str) -> bool:
        """Whether this node speaks for all about a thing."""
        nodes = self._members.working()
        return bool(nodes) and owner(nodes, *what) == self.name

    # what is done

    def _take(self, item: _Pending, *, late: bool) -> bool:
        """Do this node's share of an image; True when the image needs nothing more from anybody."""
        try:
            return self._share(item)
        except NotFoundError as error:
            if not late:
                return False
            self._fail(item, error)
        except CumbreError as error:
            self._fail(item, error)
        except OSError as error:
            # A full or broken disk is not the image's fault: it stays pending and is tried again.
            log.error("%s: cannot write now: %s", item.obs_id, error)
            return False
        except Exception as error:
            # The loop of a component: one image must never stop the next.
            log.exception("%s could not be written", item.obs_id)
            self._fail(item, UnprocessableDataError(f"{type(error).__name__}: {error}"))
        self._done.add(str(item.obs_id))
        return True

    def _fail(self, item: _Pending, error: CumbreError) -> None:
        log.error("%s: %s", item.obs_id, error)
        if not self._leads(str(item.obs_id), item.token):
            return
        if item.command is not None:
            self._bus.acknowledge(item.command, AckCode.FAILED, str(error), error=1)
            return
        publish_hop(
            self._bus,
            self._clock,
            Piece(str(item.obs_id), item.instrument, item.group_id),
            "written",
            place="summit",
            outcome=error.outcome,
            message=str(error),
        )

    def _share(self, item: _Pending) -> bool:
        """Write the detectors of an image that are this node's and not yet done; True when all are done."""
        if item.image is None:
            item.image = DaqImage.open(item.folder)
        image = item.image
        instrument = self._instruments.get(image.instrument)
        if instrument is None:
            raise UnprocessableDataError(
                f"{image.obs_id}: instrument {image.instrument!r}; this site has {', '.join(self._instruments)}"
            )
        wanted = item.detectors or image.detectors
        for name in wanted:
            if self._find(item, image, name) is not None:
                continue
            self._members.beat(len(self._pending))
            nodes = self._members.working()
            if self.name in nodes and owner(nodes, str(image.obs_id), name) == self.name:
                self._detector(item, image, instrument, name)
        all_done = [self._find(item, image, name) for name in wanted]
        if any(done is None for done in all_done):
            return False
        self._finish(item, image, [done for done in all_done if done is not None])
        self._done.add(str(item.obs_id))
        return True

    def _find(self, item: _Pending, image: DaqImage, name: str) -> Done | None:
        return self._journals.find(item.obs_id, name, image.checksum(name) or "", item.token)

    def _detector(self, item: _Pending, image: DaqImage, instrument: Instrument, name: str) -> None:
        if item.ready is None:
            item.ready = self._sidecars(image, instrument, completed_header(_read_header(item.header), image))
        hops, error = self._pixels.write(image, instrument, name, item.ready)
        publish_hops(self._bus, hops)
        if error is not None:
            log.error("%s %s: %s", image.obs_id, name, error)
        told: dict[str, Any] = hops[0] if error is None else {"checksum": "", "byteSize": 0}
        self._journals.note(
            Done(
                str(image.obs_id),
                name,
                image.checksum(name) or "",
                item.token,
                error.outcome if error is not None else "ok",
                told["checksum"],
                told["byteSize"],
                str(error or "")[:500],
                self.name,
            )
        )

    def _finish(self, item: _Pending, image: DaqImage, done: Sequence[Done]) -> None:
        """All detectors have their outcome: the first node to see it says so."""
        if item.command is not None:
            failed = [f"{one.detector}: {one.message}" for one in done if one.outcome != "ok"]
            if self._leads(str(item.obs_id), item.token):
                code = AckCode.FAILED if failed else AckCode.COMPLETE
                said = "; ".join(failed) or f"{len(done)} detectors"
                self._bus.acknowledge(item.command, code, said, error=1 if failed else 0)
            if item.detectors:
                return
        record = {
            "obs_id": str(image.obs_id),
            "detectors": {
                one.detector: {
                    "outcome": one.outcome, "sha256": one.sha256, "size": one.size, "source": one.source,
                    "message": one.message, "node": one.node,
                }
                for one in done
            },
        }  # fmt: skip
        if write_once(self._record_path(image.obs_id), json.dumps(record).encode()) is None:
            return
        good = [one for one in done if one.outcome == "ok"]
        self._bus.publish(
            IMAGE_WRITTEN,
            {
                "obsId": str(image.obs_id),
                "instrument": image.instrument,
                "groupId": image.group_id,
                "expected": len(done),
                "written": len(good),
                "missing": [one.detector for one in done if one.outcome != "ok"],
                "nodes": sorted({one.node for one in done}),
                "byteSize": sum(one.size for one in good),
                "writtenTai": self._clock.now_tai_s(),
            },
        )

    def _record_path(self, obs_id: ObsId) -> Path:
        return self._records / str(obs_id.day_obs) / f"{obs_id}.json"

    def _sidecars(self, image: DaqImage, instrument: Instrument, header: Header) -> Header:
        """Manifest and header beside the pixels, before them: who sees pixels can know what else must come.

        Returns
        -------
        Header
            The one that is there: the first node's, so that all write the same.
        """
        purposes = {detector.name: detector.purpose for detector in instrument.detectors}
        key = manifest_key(instrument.name, image.obs_id)
        manifest = {
            "obsId": str(image.obs_id),
            "version": 1,
            "fileName": Path(key).name,
            "fileType": "expectedSensors",
            "expectedSensors": {name: purposes.get(name, "UNKNOWN") for name in image.detectors},
        }
        write_once(self._raw / key, json.dumps(manifest, indent=1).encode())
        path = self._raw / sidecar_key(instrument.name, image.obs_id)
        if write_once(path, json.dumps(header, indent=1).encode()) is None:
            return _read_header(path) or header
        return header


def _read_header(path: Path) -> Header | None:
    """Read a header file; None when there is none or it is unreadable (the image is written all the same)."""
    try:
        header = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.error("%s: not JSON (%s); writing with the camera's record only", path, error)
        return None
    required = {"keywords", "provenance", "missing", "complete"}
    if not isinstance(header, dict) or not required <= header.keys():
        log.error("%s: not a header (expected %s)", path, ", ".join(sorted(required)))
        return None
    return header
