"""A night's table on disk, made once from the catalogue of orbits, whoever asks first."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cumbre.core.errors import NotFoundError
from cumbre.payloads.solar_system.bodies import Observer
from cumbre.payloads.solar_system.night import NightTable

log = logging.getLogger(__name__)
KEEP_NIGHTS = 3


def night_table(
    folder: Path,
    day_obs: int,
    version: int,
    observer: Observer,
    elements: Callable[[], tuple[int, dict[str, Any]]],
) -> NightTable:
    """The table of an observing day; integrated when it is not there yet, by one process while others wait.

    Parameters
    ----------
    folder
        Where the tables lie; those of earlier nights are removed.
    version
        Of the catalogue: another one has another table.
    elements
        Version and columns of the catalogue, called only when the table must be made.
    """
    path = folder / f"{day_obs}_{version}.tab"
    try:
        return NightTable.open(path, observer)
    except NotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return NightTable.open(path, observer)
        except NotFoundError:
            from cumbre.payloads.solar_system.orbits import Orbits

            found, columns = elements()
            path = folder / f"{day_obs}_{found}.tab"
            table = NightTable.build(Orbits.of_columns(columns), day_obs, observer)
            table.save(path)
            log.info("%d orbits integrated to %d", len(table), day_obs)
        for old in sorted(folder.glob("*.tab"))[: -2 * KEEP_NIGHTS]:
            old.unlink()
            old.with_suffix(".json").unlink(missing_ok=True)
    return NightTable.open(path, observer)


def warm_up() -> None:
    """Compile what the first image of a night would wait for."""
    import numpy as np

    from cumbre.payloads.solar_system.orbits import Orbits

    one, zero = np.ones(1), np.zeros(1)
    orbits = Orbits.of_columns(
        {
            "ssObjectId": np.ones(1, np.int64), "q": 2 * one, "e": zero, "i": zero, "node": zero, "argperi": zero,
            "peri_time": 61000 * one, "epoch_mjd": 61000 * one, "h": zero, "g": zero,
        }
    )  # fmt: skip
    NightTable.build(orbits, 20251201, Observer(np.zeros(3))).near(0.0, 0.0, 1.0, 61010.2)
