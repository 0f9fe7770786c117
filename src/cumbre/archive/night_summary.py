"""What became of each night's images: an event and a file, again whenever the numbers change."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cumbre.core.time import SECONDS_PER_DAY
from cumbre.stores.files import write_atomic

if TYPE_CHECKING:
    from cumbre.bus import Bus
    from cumbre.core.configuration import Site
    from cumbre.core.time import Clock
    from cumbre.ledger import Ledger

TOPIC = "Storage.nightSummary"
DAYS_BACK = 3


class NightSummaries:
    """Summaries of the nights of which something was reported lately: ``report/archive-<day_obs>.json``."""

    def __init__(self, *, site: Site, bus: Bus, clock: Clock, ledger: Ledger) -> None:
        self._site, self._bus, self._clock, self._ledger = site, bus, clock, ledger
        self._tapes = [f"{name}_tape" for name, place in site.config.places.items() if place.tape]
        self._told: dict[int, dict[str, Any]] = {
            int(message.fields["dayObs"]): {name: message.fields[name] for name in _FIELDS}
            for message in bus.latest_all(TOPIC)
        }

    def tell(self) -> list[dict[str, Any]]:
        """Publish and write what has changed; gives it."""
        news = []
        for day_obs in self._ledger.nights(self._clock.now_tai_s() - DAYS_BACK * SECONDS_PER_DAY):
            fields = summary_of(self._ledger, day_obs, self._tapes)
            if self._told.get(day_obs) == fields:
                continue
            self._bus.publish(TOPIC, fields)
            path = self._site.path(f"report/archive-{day_obs}.json")
            write_atomic(path, json.dumps(fields | {"toldTai": self._clock.now_tai_s()}, indent=1).encode())
            self._told[day_obs] = fields
            news.append(fields)
        return news


_FIELDS = {
    "dayObs": "day_obs", "images": "images", "expected": "expected", "written": "written", "atBase": "at_base",
    "atArchive": "at_archive", "onTape": "on_tape", "missing": "missing", "resent": "resent",
    "shipped": "shipped", "failed": "failed", "complete": "complete",
}  # fmt: skip


def summary_of(ledger: Ledger, day_obs: int, tapes: list[str]) -> dict[str, Any]:
    """Fields of ``Storage.nightSummary``."""
    row = ledger.night(day_obs, tapes)
    row |= {"day_obs": day_obs, "complete": row["missing"] == 0}
    return {name: row[column] for name, column in _FIELDS.items()}
