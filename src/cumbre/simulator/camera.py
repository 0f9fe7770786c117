"""The simulated camera: takes images on command, never blocks longer than asked, survives kill -9.

In: ``Camera.takeImages`` (consumer ``camera``). Out: the DAQ store, the Camera events, ``Image.hop`` exposed and
read_out, and the truth of each exposure under ``<site>/simulator``.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumbre.bus.messages import AckCode, Message
from cumbre.capture.hops import Piece, hop_fields
from cumbre.core.errors import CumbreError, UserError
from cumbre.core.ids import ObsId
from cumbre.core.instrument import Detector, Instrument, load_instrument
from cumbre.core.time import day_obs_from_tai
from cumbre.simulator.exposure import ExposureRequest
from cumbre.simulator.journal import Journal, Started
from cumbre.simulator.preparation import SKY_FOLDER
from cumbre.simulator.randomness import generator
from cumbre.simulator.render import IMAGE_TYPES, render
from cumbre.simulator.sky import Sky
from cumbre.simulator.truth import truth_path, write_truth
from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock

log = logging.getLogger(__name__)
DAQ_FOLDER = "summit/daq"
PLACE = "camera"
COMMAND_LIFE_S = 120.0
"""Night seconds after which a command that nobody answered is no longer wanted."""
MAX_EXPOSURE_S = 3600.0
HEADER_TIMEOUT_S = 30.0
WEATHER_TOPIC = "Environment.weather"
WEATHER_EVERY_S = 20.0

SENSORS_FILE = "run/sensors.json"
SILENT, GARBAGE = "silent", "garbage"


def break_sensors(site: Site, faults: dict[str, str]) -> None:
    """Detector name → ``silent`` (no data at all) or ``garbage`` (noise); a detector not named works again."""
    write_atomic(site.path(SENSORS_FILE), json.dumps(faults).encode())


def broken_sensors(site: Site) -> dict[str, str]:
    """What :func:`break_sensors` said last."""
    try:
        found = json.loads(site.path(SENSORS_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def garbage(shape: tuple[int, ...], seed: int, obs_id: str, detector: str) -> NDArray[np.uint16]:
    """Pixels that are no image: every value equally likely, uint16 of ``shape``."""
    return generator(seed, "garbage", obs_id, detector).integers(0, 65536, shape, dtype=np.uint16)


@dataclass(slots=True)
class _Task:
    """A command under way: its images one after the other."""

    message: Message
    instrument: Instrument
    total: int
    index: int = 0
    taken: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Running:
    """The exposure under way."""

    started: Started
    pixels: list[tuple[Detector, Future[NDArray[np.uint16]]]]
    end_tai: float
    is_reading: bool = False


class SimulatedCamera:
    """Camera of a simulated site.

    Raises
    ------
    NotFoundError
        The site's sky was not prepared.
    UserError
        The site has no ``simulator`` block.
    """

    name = "camera"

    def __init__(self, *, site: Site, bus: Bus, clock: Clock) -> None:
        if site.config.simulator is None:
            raise UserError(
                f"{site.root}/site.yaml: no `simulator` block, expected one for a simulated camera"
            )
        self.site, self.bus, self.clock = site, bus, clock
        self.seed = site.config.simulator.seed
        self.sky = Sky.load(site.path(SKY_FOLDER))
        self.instruments = {item.name: item for item in map(load_instrument, site.config.instruments)}
        self.journal = Journal(site.path(DAQ_FOLDER))
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="pixels")
        self._commands = bus.subscribe(["Camera.takeImages"], start="earliest", consumer=self.name)
        self._queue: deque[Message] = deque()
        self._task: _Task | None = None
        self._running: _Running | None = None
        self._weather_tai = -np.inf
        # Which exposures each command has begun; a command comes again when this process dies before its answer.
        self._by_command: dict[str, list[str]] = {}
        for started in self.journal.exposures():
            self._by_command.setdefault(started.command, []).append(started.obs_id)
        self._settle()
        self._warm_up()

    # -- the loop --

    def step(self, timeout_s: float) -> int:
        """Do what is due; wait at most ``timeout_s`` real seconds. Gives how many things were done."""
        self._publish_weather()
        if self._running is not None:
            return self._advance(self._running, timeout_s)
        if self._task is not None:
            self._begin_next(self._task)
            return 1
        if not self._queue:
            self._queue.extend(self._commands.poll(timeout_s, limit=20))
        if not self._queue:
            return 0
        self._accept(self._queue.popleft())
        return 1

    def close(self) -> None:
        """Stop; an exposure under way is aborted and said to be so at the next start."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._commands.close()

    def _warm_up(self) -> None:
        """Compile and make the sensors' fixed properties before the first exposure needs them."""
        now = self.clock.now_tai_s()
        for instrument in self.instruments.values():
            request = ExposureRequest(
                "warm-up", "OBJECT", 1.0, instrument.filters[0].name, 0.0, 0.0, 0.0, now
            )
            for detector in instrument.detectors:
                self._pool.submit(render, instrument, detector, request, self.sky, self.seed)

    # -- commands --

    @staticmethod
    def _identity(message: Message) -> str:
        return f"{message.identity}:{message.origin}:{message.seq_num}"

    def _accept(self, message: Message) -> None:
        """Begin a command, or answer one that a former process of this camera had begun."""
        before = self._by_command.get(self._identity(message), [])
        whole = [obs_id for obs_id in before if self.journal.description(obs_id) is not None]
        total = max(int(message.fields["numImages"]), 1)
        if before and len(whole) < len(before):
            self._answer(message, AckCode.FAILED, f"{before[-1]}: the camera restarted, exposure aborted")
        elif len(whole) >= total:
            self._answer(message, AckCode.COMPLETE, " ".join(whole))
        elif not before and self.clock.now_tai_s() - message.snd_tai > COMMAND_LIFE_S:
            age_s = self.clock.now_tai_s() - message.snd_tai
            self._answer(
                message, AckCode.TIMEOUT, f"the command is {age_s:.0f} s old, limit {COMMAND_LIFE_S:.0f} s"
            )
        else:
            try:
                instrument = self._check(message)
            except CumbreError as error:
                self._answer(message, AckCode.FAILED, str(error))
                return
            exposure_s = float(message.fields["expTime"])
            wall_s = self.clock.wall_s(total * (exposure_s + instrument.readout_s + HEADER_TIMEOUT_S))
            self.bus.acknowledge(message, AckCode.IN_PROGRESS, timeout_s=wall_s + 30.0)
            self._task = _Task(message, instrument, total, len(whole), whole)

    def _check(self, message: Message) -> Instrument:
        """Refuse what cannot be done before anything moves."""
        fields = message.fields
        name = fields["instrument"] or next(iter(self.instruments))
        instrument = self.instruments.get(name)
        if instrument is None:
            raise UserError(
                f"takeImages.instrument = {name!r}: expected one of {', '.join(self.instruments)}"
            )
        if fields["imageType"] not in IMAGE_TYPES:
            raise UserError(
                f"takeImages.imageType = {fields['imageType']!r}: expected one of {', '.join(IMAGE_TYPES)}"
            )
        if not 0 <= fields["expTime"] <= MAX_EXPOSURE_S:
            raise UserError(f"takeImages.expTime = {fields['expTime']}: expected 0 to {MAX_EXPOSURE_S:.0f} s")
        if fields["filter"]:
            instrument.filter(fields["filter"])
        if not (0 <= fields["ra"] <= 360 and -90 <= fields["dec"] <= 90):
            raise UserError(
                f"takeImages.ra, dec = {fields['ra']}, {fields['dec']}: expected degrees on the sky"
            )
        if fields["obsId"]:
            wanted = ObsId.parse(fields["obsId"])
            if fields["numImages"] > 1 or self.journal.started(str(wanted)) is not None:
                raise UserError(f"takeImages.obsId = {wanted}: expected one image and a name not used before")
        return instrument

    def _answer(self, message: Message, code: AckCode, result: str) -> None:
        """Give the final answer; after it the command is done with."""
        if code is not AckCode.COMPLETE:
            log.warning("takeImages refused: %s", result)
        self.bus.acknowledge(message, code, result, error=0 if code is AckCode.COMPLETE else 1)
        self._commands.commit(message)

    # -- one exposure --

    def _begin_next(self, task: _Task) -> None:
        if task.index >= task.total:
            self._answer(task.message, AckCode.COMPLETE, " ".join(task.taken))
            self._task = None
            return
        fields, instrument = task.message.fields, task.instrument
        now = self.clock.now_tai_s()
        request = ExposureRequest(
            obs_id=fields["obsId"] or self.journal.next_obs_id(instrument.prefix, day_obs_from_tai(now)),
            image_type=fields["imageType"],
            exposure_s=0.0 if fields["imageType"] == "BIAS" else float(fields["expTime"]),
            filter=instrument.filter(fields["filter"]).name
            if fields["filter"]
            else instrument.filters[0].name,
            ra=float(fields["ra"]),
            dec=float(fields["dec"]),
            rotpa=float(fields["rotation"]),
            begin_tai=now,
            group_id=fields["groupId"],
        )
        task.index += 1
        command = self._identity(task.message)
        started = Started(
            request, instrument.name, command, task.index, task.total, fields["program"], fields["note"]
        )
        self.journal.begin(started)
        self._by_command.setdefault(command, []).append(request.obs_id)
        self.bus.publish(
            "Camera.startIntegration",
            self._common(started)
            | {
                "exposureTime": request.exposure_s,
                "imageType": request.image_type,
                "timeout": HEADER_TIMEOUT_S,
            },
        )
        pixels = [
            (detector, self._pool.submit(render, instrument, detector, request, self.sky, self.seed))
            for detector in instrument.detectors
        ]
        self._running = _Running(started, pixels, now + request.exposure_s)
        log.info(
            "%s: %s %.1f s in %s", request.obs_id, request.image_type, request.exposure_s, request.filter
        )

    def _common(self, started: Started) -> dict[str, Any]:
        """Return the fields that every image event repeats."""
        r = started.request
        obs_id = ObsId.parse(r.obs_id)
        extra: dict[str, str] = {
            "imageType": r.image_type,
            "filter": r.filter,
            "ra": repr(r.ra),
            "dec": repr(r.dec),
            "rotation": repr(r.rotpa),
            "program": started.program,
            "note": started.note,
        }
        weather = self.sky.conditions(r.mid_tai).as_dict()
        extra |= {name: f"{value:.4f}" for name, value in weather.items()}
        return {
            "instrument": started.instrument,
            "imagesInSequence": started.total,
            "imageName": r.obs_id,
            "imageIndex": started.index,
            "imageSource": obs_id.prefix,
            "imageController": obs_id.controller,
            "imageDate": str(obs_id.day_obs),
            "imageNumber": obs_id.seq_num,
            "timestampAcquisitionStart": r.begin_tai,
            "groupId": r.group_id,
            "additionalKeys": list(extra),
            "additionalValues": list(extra.values()),
        }

    def _advance(self, running: _Running, timeout_s: float) -> int:
        """Let time pass, then shut, then read out."""
        deadline = time.monotonic() + timeout_s
        left_s = self.clock.wall_s(running.end_tai - self.clock.now_tai_s())
        if not running.is_reading:
            if left_s > 0:
                time.sleep(min(left_s, timeout_s))
                if left_s > timeout_s:
                    return 0
            self.bus.publish("Camera.startReadout", self._common(running.started))
            instrument = self.instruments[running.started.instrument]
            running.end_tai = self.clock.now_tai_s() + instrument.readout_s
            running.is_reading = True
            return 1
        futures = [future for _, future in running.pixels]
        if wait(futures, timeout=max(deadline - time.monotonic(), 0.0)).not_done:
            return 0
        left_s = self.clock.wall_s(running.end_tai - self.clock.now_tai_s())
        if left_s > 0:
            time.sleep(min(left_s, max(deadline - time.monotonic(), 0.0)))
            if self.clock.now_tai_s() < running.end_tai:
                return 0
        self._finish(running)
        return 1

    def _finish(self, running: _Running) -> None:
        """Store the pixels, tell everybody; a failure ends this exposure and not the camera."""
        started = running.started
        try:
            self._store(running)
            self._announce(started)
        except (CumbreError, OSError, ValueError, MemoryError) as error:
            log.exception("%s: not stored", started.obs_id)
            self._abort(started, f"{type(error).__name__}: {error}")
            if self._task is not None:
                self._answer(self._task.message, AckCode.FAILED, f"{started.obs_id}: {error}")
                self._task = None
        else:
            if self._task is not None:
                self._task.taken.append(started.obs_id)
        self._running = None

    def _store(self, running: _Running) -> None:
        """Write the arrays, the truth, and last ``exposure.json``."""
        started = running.started
        request = started.request
        instrument = self.instruments[started.instrument]
        folder = self.journal.folder(request.obs_id)
        files = {}
        broken = broken_sensors(self.site)
        for detector, future in running.pixels:
            fault = broken.get(detector.name)
            if fault == SILENT:
                log.warning("%s: %s gave no data", request.obs_id, detector.name)
                continue
            raw = future.result()
            if fault == GARBAGE:
                raw = garbage(raw.shape, self.seed, request.obs_id, detector.name)
            stream = io.BytesIO()
            np.save(stream, raw, allow_pickle=False)
            stored = write_atomic(folder / f"{detector.name}.npy", stream.getbuffer())
            files[detector.name] = (stored.size, stored.sha256, raw.shape)
        write_truth(truth_path(self.site.root, request.obs_id), instrument, request, self.sky, self.seed)
        self.journal.complete(
            request.obs_id,
            {
                "obs_id": request.obs_id,
                "instrument": started.instrument,
                "detectors": list(files),
                "shapes": {name: list(shape) for name, (_, _, shape) in files.items()},
                "sizes": {name: size for name, (size, _, _) in files.items()},
                "sha256": {name: sha256 for name, (_, sha256, _) in files.items()},
                "group_id": request.group_id,
                "index": started.index,
                "total": started.total,
                "image_type": request.image_type,
                "exposure_s": request.exposure_s,
                "filter": request.filter,
                "ra": request.ra,
                "dec": request.dec,
                "rotation": request.rotpa,
                "begin_tai": request.begin_tai,
                "end_tai": request.begin_tai + request.exposure_s,
                "readout_tai": self.clock.now_tai_s(),
                "program": started.program,
                "note": started.note,
            },
        )

    def _announce(self, started: Started) -> None:
        """Publish the hops and events of a whole image; repeated after a crash, which its readers bear."""
        obs_id = started.obs_id
        about = self.journal.description(obs_id)
        if about is None:
            raise UserError(f"{obs_id}: no exposure.json in {self.journal.folder(obs_id)}")
        instrument = self.instruments[started.instrument]
        hops = []
        for name in about["detectors"]:
            piece = Piece(obs_id, started.instrument, about["group_id"], instrument.detector(name).id, name)
            exposed = hop_fields(self.clock, piece, "exposed", place=PLACE)
            exposed["hopTai"] = about["end_tai"]
            read_out = hop_fields(
                self.clock,
                piece,
                "read_out",
                place=PLACE,
                path=self.journal.folder(obs_id) / f"{name}.npy",
                byte_size=about["sizes"][name],
                checksum=about["sha256"][name],
            )
            read_out["hopTai"] = about["readout_tai"]
            hops += [exposed, read_out]
        common = self._common(started)
        begin, end = about["begin_tai"], about["end_tai"]
        shutter_s = end - begin if started.request.is_open or started.request.image_type == "FLAT" else 0.0
        self.bus.publish_many(
            [
                *(("Image.hop", hop) for hop in hops),
                (
                    "Camera.endReadout",
                    common
                    | {
                        "requestedExposureTime": started.request.exposure_s,
                        "timestampEndOfReadout": about["readout_tai"],
                        "daqPath": str(self.journal.folder(obs_id)),
                        "detectors": about["detectors"],
                    },
                ),
                (
                    "Camera.endOfImageTelemetry",
                    common
                    | {
                        "timestampDateObs": begin,
                        "timestampDateEnd": end,
                        "measuredShutterOpenTime": shutter_s,
                        "darkTime": about["readout_tai"] - begin - instrument.readout_s,
                        "emulatedImage": "",
                    },
                ),
            ]
        )
        self.journal.announced(obs_id)

    # -- after a crash --

    def _settle(self) -> None:
        """Finish or abort what a former process left behind."""
        for started in self.journal.unsettled():
            if started.instrument not in self.instruments:
                log.warning(
                    "%s: this site no longer has the instrument %s", started.obs_id, started.instrument
                )
            elif self.journal.description(started.obs_id) is not None:
                log.warning("%s: was read out before the restart; announced now", started.obs_id)
                self._announce(started)
            else:
                self._abort(started, "the camera stopped before the image was read out")

    def _abort(self, started: Started, reason: str) -> None:
        log.warning("%s: aborted: %s", started.obs_id, reason)
        piece = Piece(started.obs_id, started.instrument, started.request.group_id)
        self.bus.publish(
            "Image.hop",
            hop_fields(self.clock, piece, "exposed", place=PLACE, outcome="Aborted", message=reason),
        )
        self.journal.abort(started.obs_id, reason)

    # -- weather --

    def _publish_weather(self) -> None:
        """Say what the weather station sees, for headers and the telemetry store."""
        now = self.clock.now_tai_s()
        if now - self._weather_tai < WEATHER_EVERY_S or WEATHER_TOPIC not in self.bus.topics:
            return
        self._weather_tai = now
        seen = self.sky.conditions(now)
        self.bus.publish(
            WEATHER_TOPIC,
            {
                "seeing": seen.seeing_arcsec,
                "airTemperature": seen.airtemp_c,
                "pressure": seen.pressure_hpa * 100.0,
                "humidity": seen.humidity_percent,
                "windSpeed": seen.wind_speed_m_s,
            },
        )
