"""Worker functions with known answers, in the place of the real payload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cumbre.core.errors import NoWorkFoundError, TransientError


def warm_up(payload: dict[str, Any]) -> dict[str, Any]:
    return {}


def preload(payload: dict[str, Any]) -> dict[str, Any]:
    return {"note": f"tile {payload['visit']['survey']}"}


def process(payload: dict[str, Any]) -> dict[str, Any]:
    path = Path(payload["image"]["path"])
    if path.name.startswith("notemplate"):
        raise NoWorkFoundError("no template")
    if path.name.startswith("breaks"):
        raise ZeroDivisionError("one over nothing")
    if path.name.startswith("flaky") and not path.with_suffix(".tried").exists():
        path.with_suffix(".tried").touch()
        raise TransientError("database restarts")
    return {
        "n_sources": 7,
        "n_alerts": 3,
        "preload": {"note": "tile a", "is_late": payload["visit"] is None},
        "quality": {"seeing": 0.9, "nStars": 40, "unknownThing": 1.0},
    }


def correct(payload: dict[str, Any]) -> dict[str, Any]:
    return {"message": "ISR only", "quality": {"skyNoise": 4.0}}
