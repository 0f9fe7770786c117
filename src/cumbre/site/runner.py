"""One service as one process: ``python -m cumbre.site.runner SITE ROLE``.

This is one of the three places where any exception is caught: a fault of one item is logged, told to the
bus, and the loop goes on after a pause that grows with repeated faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from cumbre.bus import Bus
from cumbre.core.configuration import Site
from cumbre.core.errors import FatalError, TransientError
from cumbre.site.roles import Service, build, open_site_bus, open_site_clock

log = logging.getLogger("cumbre")

STEP_S = 0.5
HEARTBEAT_S = 3.0
"""The watch tells of a service that is silent for some of them."""
MAX_PAUSE_S = 5.0
ENABLED, FAULT, OFFLINE = 2, 3, 4
"""CSC summary states."""
PARENT_VARIABLE = "CUMBRE_SUPERVISOR"
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def die_with_parent() -> None:
    """Ask the kernel to stop this process when the supervisor dies, however it dies."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None and os.getppid() != int(parent):
        sys.exit(0)  # it died before we could ask


def name_process(name: str) -> None:
    """Show the role in ``ps -o comm`` and ``top``."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"cumbre:{name}"[:15].encode(), 0, 0, 0)


def configure_logging(name: str) -> None:
    """Lines for a person at 3 a.m.: UTC, level, service, message."""
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s.%(msecs)03dZ %(levelname)-7s {name}: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        stream=sys.stderr,
        force=True,  # a forked service takes over the supervisor's handlers
    )
    for noisy in ("distributed", "lsst", "asyncio", "bokeh", "numba"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _heartbeats(site: Site, name: str, stop: threading.Event) -> None:
    """Publish heartbeats from an own bus connection, so that long steps do not look dead."""
    bus = open_site_bus(site, name)
    while not stop.wait(HEARTBEAT_S):
        try:
            bus.publish("Service.heartbeat", {"name": name, "pid": os.getpid()})
        except TransientError as error:
            log.debug("no heartbeat: %s", error)
        except Exception:
            log.exception("no heartbeat")


def _report(bus: Bus, name: str, state: int, message: str) -> None:
    with contextlib.suppress(Exception):
        bus.publish(
            "Service.summaryState",
            {"name": name, "summaryState": state, "pid": os.getpid(), "message": message},
        )


def loop(make: Callable[[], Service], bus: Bus, stop: threading.Event, name: str) -> None:
    """Call ``step`` until told to stop.

    A step that raises may have taken messages that it did not finish. The service is therefore made anew and
    resumes from durable state, as after a kill, unless it keeps what it took (``survives_faults``).
    """
    service: Service | None = make()
    _report(bus, name, ENABLED, "enabled")
    log.info("started, pid %d", os.getpid())
    faults = 0
    try:
        while not stop.is_set():
            try:
                if service is None:
                    service = make()
                service.step(STEP_S)
                faults = 0
            except FatalError:
                raise
            except Exception as error:
                faults += 1
                log.exception("step failed (%d in a row)", faults)
                with contextlib.suppress(Exception):
                    bus.publish(
                        "Service.logMessage",
                        {
                            "name": name,
                            "level": 40,
                            "message": str(error),
                            "traceback": traceback.format_exc(),
                        },
                    )
                if service is not None and not getattr(service, "survives_faults", False):
                    with contextlib.suppress(Exception):
                        service.close()
                    service = None
                stop.wait(min(0.1 * 2**faults, MAX_PAUSE_S))
    finally:
        if service is not None:
            service.close()


def main(argv: list[str] | None = None) -> int:
    """Run one role of a site until SIGTERM."""
    arguments = sys.argv[1:] if argv is None else argv
    root, name = Path(arguments[0]), arguments[1]
    die_with_parent()
    name_process(name)
    configure_logging(name)
    site = Site.load(root)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    bus = open_site_bus(site, name)
    threading.Thread(target=_heartbeats, args=(site, name, stop), daemon=True).start()
    code = 0
    try:
        loop(lambda: build(name, site, bus, open_site_clock(site)), bus, stop, name)
    except FatalError as error:
        log.critical("%s", error)
        _report(bus, name, FAULT, str(error))
        code = 1
    finally:
        stop.set()
    _report(bus, name, OFFLINE if code == 0 else FAULT, "stopped")
    log.info("stopped")
    return code


if __name__ == "__main__":
    sys.exit(main())
