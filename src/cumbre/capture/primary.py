"""The primary header of a raw file: the header service's keywords, completed from the camera's own record."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cumbre.capture.daq import DaqImage
from cumbre.core.instrument import Detector
from cumbre.core.time import isot, mjd_from_seconds

Header = dict[str, Any]
"""A header file's content: obs_id, complete, missing, keywords {name: [value, comment]}, provenance…"""

Card = dict[str, Any]


def _text(value: Any) -> str:
    return str(value)[:68]


def _iso(value: Any) -> str:
    return isot(float(value))


def _mjd(value: Any) -> float:
    return round(mjd_from_seconds(float(value)), 9)


_CAMERA_SAYS: tuple[tuple[str, tuple[str, ...], Callable[[Any], Any]], ...] = (
    ("GROUPID", ("group_id",), _text),
    ("CURINDEX", ("index",), int),
    ("MAXINDEX", ("total",), int),
    ("IMGTYPE", ("image_type",), _text),
    ("FILTER", ("filter", "physical_filter"), _text),
    ("BAND", ("band",), _text),
    ("EXPTIME", ("exposure_s", "exposure_time"), float),
    ("SHUTTIME", ("shutter_s", "exposure_s"), float),
    ("DARKTIME", ("dark_s",), float),
    ("DATE-BEG", ("begin_tai",), _iso),
    ("DATE-END", ("end_tai",), _iso),
    ("MJD-BEG", ("begin_tai",), _mjd),
    ("MJD-END", ("end_tai",), _mjd),
    ("RA", ("ra", "ra_deg"), float),
    ("DEC", ("dec", "dec_deg"), float),
    ("ROTPA", ("rotation", "rotation_deg"), float),
    ("PROGRAM", ("program",), _text),
    ("OBSANNOT", ("note",), _text),
)


def _is_card_value(value: Any) -> bool:
    """FITS has no NaN and no infinity: such a value is as good as absent."""
    return not isinstance(value, float) or math.isfinite(value)


def completed_header(header: Header | None, image: DaqImage) -> Header:
    """A header with what the camera's record can add where the header service had nothing.

    Parameters
    ----------
    header
        From the header service; None when none came in time.
    image
        The image in the camera's store.
    """
    out: Header = {"obs_id": image.info["obs_id"], "instrument": image.instrument, "group_id": image.group_id}
    out |= header or {"complete": False, "missing": [], "reasons": {}, "keywords": {}, "provenance": {}}
    keywords, provenance = dict(out["keywords"]), dict(out["provenance"])
    obs_id = image.obs_id
    known: list[tuple[str, Any]] = [
        ("INSTRUME", image.instrument),
        ("CAMERA", image.instrument),
        ("OBSID", str(obs_id)),
        ("DAYOBS", obs_id.day_obs),
        ("SEQNUM", obs_id.seq_num),
        ("EXPID", obs_id.exposure_id),
        ("TIMESYS", "TAI"),
    ]
    sky = image.info.get("image_type", "OBJECT") == "OBJECT"
    for name, keys, convert in _CAMERA_SAYS:
        if name in ("RA", "DEC", "ROTPA") and not sky:
            continue
        value = next((image.info[key] for key in keys if image.info.get(key) not in (None, "")), None)
        if value is not None:
            try:
                converted = convert(value)
            except (TypeError, ValueError, OverflowError):
                continue
            if _is_card_value(converted):
                known.append((name, converted))
    for name, value in known:
        if name not in keywords:
            keywords[name] = [value, "from the camera's record"]
            provenance[name] = {"topic": "camera record", "snd_tai": image.info.get("end_tai"), "age_s": None}
    if header is None:
        out["reasons"] = {"": "no header came in time"}
    out["missing"] = [name for name in out["missing"] if name not in keywords]
    return out | {"keywords": keywords, "provenance": provenance}


def primary_cards(header: Header, detector: Detector, source_sha256: str) -> list[Card]:
    """Cards of one detector's primary header."""
    raft, _, slot = detector.name.partition("_")
    cards: list[Card] = [
        {"name": name, "value": value, "comment": comment}
        for name, (value, comment) in header["keywords"].items()
        if _is_card_value(value)
    ]
    return [
        *cards,
        {"name": "CHIPID", "value": detector.name, "comment": "Detector name"},
        {"name": "DETECTOR", "value": detector.id, "comment": "Detector number"},
        {"name": "RAFTBAY", "value": raft, "comment": "Raft"},
        {"name": "CCDSLOT", "value": slot, "comment": "Slot in the raft"},
        {"name": "CCDSERN", "value": detector.serial, "comment": "Serial number"},
        {"name": "DETSIZE", "value": f"[1:{detector.nx},1:{detector.ny}]", "comment": "Assembled pixels"},
        {
            "name": "HDRSTAT",
            "value": "COMPLETE" if header["complete"] else "PARTIAL",
            "comment": "Whether the header service had everything",
        },
        {"name": "DAQSUM", "value": source_sha256.removeprefix("sha256:"), "comment": ""},
    ]
