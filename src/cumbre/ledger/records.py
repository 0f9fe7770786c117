"""From bus messages to rows of the ledger; a message that does not fit raises and is set aside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from cumbre.bus import Message
from cumbre.core.errors import CumbreError, UnprocessableDataError
from cumbre.core.ids import ObsId, split_exposure_id, visit_id
from cumbre.core.instrument import Instrument, load_instrument
from cumbre.stores.files import normal_checksum

_DETECTOR_LIMIT = 1 << 15


@dataclass(frozen=True, slots=True)
class Hop:
    """One row of ``ledger.hop``; ``recv_tai`` is when the ledger read it."""

    obs_id: str
    detector: int
    detector_name: str
    hop: str
    outcome: str
    place: str
    path: str
    byte_size: int
    checksum: str
    message: str
    hop_tai: float
    recv_tai: float
    attempt: int


@dataclass(frozen=True, slots=True)
class GivenUp:
    """One row of ``ledger.visit_without_image``: an announced visit's detector for which no image came."""

    group_id: str
    detector: int
    outcome: str
    message: str
    told_tai: float


@dataclass(frozen=True, slots=True)
class Entry:
    """What one message adds: columns of its image (``None`` = not known; empty = no image) and hops."""

    image: dict[str, Any]
    hops: list[Hop] = field(default_factory=list)
    given_up: list[GivenUp] = field(default_factory=list)


class Instruments:
    """Descriptions of the site's instruments by name, for detector numbers and bands."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    @lru_cache(maxsize=32)  # noqa: B019 (lives as long as the service)
    def get(self, name: str) -> Instrument | None:
        """The instrument of that name, None when the site does not have it."""
        for shipped in self._names:
            instrument = load_instrument(shipped)
            if instrument.name == name:
                return instrument
        return None


def entry_of(message: Message, recv_tai: float, instruments: Instruments) -> Entry:
    """Translate one message.

    Raises
    ------
    UnprocessableDataError
        The message has no usable identity, time or checksum; nothing of it can be recorded.
    """
    if message.topic == "Image.hop":
        return _from_hop(message.fields, recv_tai)
    if message.topic == "Prompt.detectorProcessed":
        return _from_prompt(message)
    return _from_camera(message, recv_tai, instruments)


def _from_hop(fields: Mapping[str, Any], recv_tai: float) -> Entry:
    obs_id = _obs_id(fields["obsId"])
    hop_tai = float(fields["hopTai"])
    if not (math.isfinite(hop_tai) and hop_tai > 0):
        raise UnprocessableDataError(f"Image.hop of {obs_id}: hopTai {hop_tai}, expected TAI seconds")
    detector = int(fields["detector"])
    if not -1 <= detector < _DETECTOR_LIMIT:
        raise UnprocessableDataError(f"Image.hop of {obs_id}: detector {detector}, expected −1 or more")
    if not fields["hop"]:
        raise UnprocessableDataError(f"Image.hop of {obs_id}: no hop named")
    checksum = str(fields["checksum"])
    hop = Hop(
        obs_id, detector, _text(fields["detectorName"]), _text(fields["hop"]),
        _text(fields["outcome"]) or "ok", _text(fields["place"]), _text(fields["path"]),
        int(fields["byteSize"]), normal_checksum(_text(checksum)) if checksum else "",
        _text(fields["message"]), hop_tai, recv_tai, int(fields["attempt"]),
    )  # fmt: skip
    image = _identity(obs_id, int(fields["exposureId"]))
    image |= {"instrument": _text(fields["instrument"]), "group_id": _text(fields["groupId"])}
    return Entry(image, [hop])


def _from_prompt(message: Message) -> Entry:
    """Only what no image tells: its hops come from the prompt service beside this event."""
    fields = message.fields
    if fields["obsId"] or not fields["groupId"]:
        return Entry({})
    row = GivenUp(
        _text(fields["groupId"]), int(fields["detector"]), _text(fields["outcome"]), _text(fields["message"]),
        message.snd_tai,
    )  # fmt: skip
    return Entry({}, given_up=[row])


def _from_camera(message: Message, recv_tai: float, instruments: Instruments) -> Entry:
    fields = message.fields
    obs_id = _obs_id(fields["imageName"])
    image = _identity(obs_id, 0)
    image |= {"instrument": _text(fields["instrument"]), "group_id": _text(fields["groupId"])}
    instrument = instruments.get(fields["instrument"])
    is_in_sequence = bool(fields["groupId"]) and fields["imageIndex"] <= fields["imagesInSequence"]
    image["visit"] = visit_id(image["exposure_id"], int(fields["imageIndex"]) if is_in_sequence else 1)
    image |= _additional(fields, instrument)
    hops: list[Hop] = []
    event = message.topic.partition(".")[2]
    if event == "startIntegration":
        image |= {"image_type": _text(fields["imageType"]), "exposure_s": _number(fields["exposureTime"])}
        image["begin_tai"] = _number(fields["timestampAcquisitionStart"])
        hops = [_camera_hop(obs_id, -1, "", "exposed", image["begin_tai"] or message.snd_tai, recv_tai)]
    elif event == "endReadout":
        names = [_text(name) for name in fields["detectors"]]
        image |= {"exposure_s": _number(fields["requestedExposureTime"]), "expected_detectors": len(names)}
        tai = _number(fields["timestampEndOfReadout"]) or message.snd_tai
        path = _text(fields["daqPath"])
        hops = [_camera_hop(obs_id, -1, "", "read_out", tai, recv_tai, path)]
        for number, name in _numbered(names, instrument):
            hops.append(_camera_hop(obs_id, number, name, "read_out", tai, recv_tai, path))
    elif event == "endOfImageTelemetry":
        image["begin_tai"] = _number(fields["timestampDateObs"])
        image["end_tai"] = _number(fields["timestampDateEnd"])
    return Entry(image, hops)


def _numbered(names: list[str], instrument: Instrument | None) -> list[tuple[int, str]]:
    """Numbers of the detectors that the instrument has; what happened to others is told by the writer."""
    if instrument is None:
        raise UnprocessableDataError("an instrument that site.yaml does not list: its detectors are unknown")
    known = {detector.name: detector.id for detector in instrument.detectors}
    return [(known[name], name) for name in names if name in known]


def _camera_hop(
    obs_id: str, detector: int, name: str, hop: str, tai: float, recv_tai: float, path: str = ""
) -> Hop:
    return Hop(obs_id, detector, name, hop, "ok", "camera", path, 0, "", "", tai, recv_tai, 1)


def _additional(fields: Mapping[str, Any], instrument: Instrument | None) -> dict[str, Any]:
    """Filter, pointing and program from the free key/value pairs of takeImages."""
    pairs = {
        key.lower(): value
        for key, value in zip(fields["additionalKeys"], fields["additionalValues"], strict=False)
    }
    out: dict[str, Any] = {}
    if chosen := pairs.get("filter"):
        out["filter"] = _text(chosen)
        try:
            out["band"] = instrument.filter(chosen).band if instrument else None
        except CumbreError:
            out["band"] = None  # a filter the description does not have; the name is kept
    for column, keys in {"ra": ("ra",), "dec": ("dec", "decl"), "rotation": ("rotation", "rotpa")}.items():
        for key in keys:
            if key in pairs:
                out[column] = _number(pairs[key], zero=True)
    if program := pairs.get("program"):
        out["program"] = _text(program)
    return out


def _obs_id(value: Any) -> str:
    text = _text(value)
    if not text:
        raise UnprocessableDataError("a message without obs_id")
    return text


def _identity(obs_id: str, exposure_id: int) -> dict[str, Any]:
    try:
        parsed = ObsId.parse(obs_id)
        exposure_id, day_obs, seq_num = parsed.exposure_id, parsed.day_obs, parsed.seq_num
    except CumbreError:
        if exposure_id <= 0:
            raise UnprocessableDataError(f"{obs_id!r}: neither an obs_id nor an exposure id") from None
        day_obs, seq_num = split_exposure_id(exposure_id)
    return {"obs_id": obs_id, "exposure_id": exposure_id, "day_obs": day_obs, "seq_num": seq_num}


def _text(value: Any) -> str:
    """PostgreSQL has no NUL in texts; one in a message is a fault worth seeing, not a reason to lose it."""
    return str(value).replace("\0", "\N{REPLACEMENT CHARACTER}")


def _number(value: Any, *, zero: bool = False) -> float | None:
    """A finite number, None for what is absent (SAL sends 0 or NaN)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and (zero or number != 0) else None
