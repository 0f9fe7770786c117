"""Functions that tests run on workers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from cumbre.core.errors import NoWorkFoundError, TransientError


def add(payload: dict[str, Any]) -> dict[str, Any]:
    return {"sum": payload["a"] + payload["b"], "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}


def no_work(payload: dict[str, Any]) -> dict[str, Any]:
    raise NoWorkFoundError("no template")


def breaks(payload: dict[str, Any]) -> dict[str, Any]:
    raise ZeroDivisionError("one over nothing")


def _tries(payload: dict[str, Any]) -> int:
    path = Path(payload["count"])
    with path.open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    return len(path.read_text().splitlines())


def flaky(payload: dict[str, Any]) -> dict[str, Any]:
    if _tries(payload) < payload["good_at"]:
        raise TransientError("the network is down")
    return {"tries": _tries(payload)}


def waits_once(payload: dict[str, Any]) -> dict[str, Any]:
    """Sleeps the first time (to be killed meanwhile), returns at once later."""
    if _tries(payload) == 1:
        time.sleep(60)
    return {"pid": os.getpid()}


def order(payload: dict[str, Any]) -> dict[str, Any]:
    with Path(payload["file"]).open("a") as stream:
        stream.write(payload["name"])
    return {}
