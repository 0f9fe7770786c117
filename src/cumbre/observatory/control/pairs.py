"""The replicator pairs as control sees them: who is registered in which pool, and who is silent."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FULL, LOCAL, CATCH_UP = "fully-operational", "local-only", "catch-up"
POOLS = (FULL, LOCAL, CATCH_UP)
SILENT_S = 5.0
"""Real seconds without a heartbeat after which a pair is lost (it sends one a second)."""


@dataclass(slots=True)
class Pair:
    """One registered replicator and its distributor."""

    name: str
    link: str
    pair: int
    pool: str
    reason: str
    heard: float
    heartbeat_tai: float

    def is_alive(self, now: float) -> bool:
        """Whether its last heartbeat is young enough."""
        return now - self.heard < SILENT_S


class PairTable:
    """Pairs by name of their replicator."""

    def __init__(self) -> None:
        self._pairs: dict[str, Pair] = {}
        self.news: set[str] = set()
        """Names whose registration changed since the database was told."""

    def registered(self, fields: Mapping[str, Any], tai: float) -> None:
        """Take in a Replicator.registration; another pool word than the three means unregistered."""
        name = fields["name"]
        old = self._pairs.get(name)
        pair = Pair(
            name, fields["link"], int(fields["pair"]), fields["pool"], fields["reason"], time.monotonic(), tai
        )
        if old is None or (old.link, old.pair, old.pool) != (pair.link, pair.pair, pair.pool):
            self.news.add(name)
        self._pairs[name] = pair

    def beat(self, fields: Mapping[str, Any], tai: float) -> None:
        """Take in a Replicator.heartbeat."""
        pair = self._pairs.get(fields["name"])
        if pair is not None:
            pair.heard, pair.heartbeat_tai = time.monotonic(), tai

    def pool(self, link: str, pool: str) -> list[int]:
        """Numbers of the living pairs of one pool of a link."""
        now = time.monotonic()
        return sorted(
            pair.pair
            for pair in self._pairs.values()
            if pair.link == link and pair.pool == pool and pair.is_alive(now)
        )

    def named(self, name: str) -> Pair:
        """One pair."""
        return self._pairs[name]

    def names(self) -> set[str]:
        """Names of all pairs ever registered."""
        return set(self._pairs)

    def count(self, pool: str) -> int:
        """How many living pairs all links have in a pool."""
        now = time.monotonic()
        return sum(pair.pool == pool and pair.is_alive(now) for pair in self._pairs.values())
