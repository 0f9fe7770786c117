"""What runs on a worker around every job: it never raises, it always answers.

This is the worker loop, one of the three places where any exception is caught.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from cumbre.core.errors import ConflictError, CumbreError, TransientError, UserError
from cumbre.orchestration.models import FAILED, SUCCESS

LOG_LINES = 60
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


class _Tail(logging.Handler):
    """Keeps the last lines of this job's log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: deque[str] = deque(maxlen=LOG_LINES)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def resolve(path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Find ``package.module:function``.

    Raises
    ------
    UserError
        There is no such module or function.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"job function {path!r}: expected package.module:function ({error})") from error
    if not callable(found):
        raise UserError(f"job function {path!r}: not callable")
    return found  # type: ignore[no-any-return]


def run_task(function: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Run one job here; returns the fields of a :class:`~cumbre.orchestration.models.JobResult`."""
    tail = _Tail()
    root = logging.getLogger("cumbre")
    root.addHandler(tail)
    before = root.level
    root.setLevel(min(before or logging.INFO, logging.INFO))
    started = time.monotonic()
    answer: dict[str, Any] = {"worker": f"{socket.gethostname()}:{os.getpid()}"}
    try:
        answer |= {"outcome": SUCCESS, "value": resolve(function)(payload) or {}}
    except CumbreError as error:
        answer |= {
            "outcome": error.outcome,
            "message": str(error),
            "may_retry": isinstance(error, TransientError),
        }
        if not isinstance(error, UserError | ConflictError):
            tail.lines.append(traceback.format_exc(limit=-4))
    except Exception as error:
        answer |= {
            "outcome": FAILED,
            "message": f"{type(error).__name__}: {error}",
            "may_retry": isinstance(error, OSError | MemoryError),
        }
        tail.lines.append(traceback.format_exc())
    finally:
        root.removeHandler(tail)
        root.setLevel(before)
    answer["wall_s"] = time.monotonic() - started
    answer["log_tail"] = "\n".join(tail.lines)[-8000:]
    return answer


def one_thread() -> None:
    """Hold every numerical library to one thread: a worker is one core."""
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, "1")
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(1)
