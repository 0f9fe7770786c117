"""The plan of a chaos run: which fault comes when, to what, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from cumbre.core.configuration import Site
from cumbre.core.instrument import load_instrument
from cumbre.simulator.faults import CACHES, STORES, WHOLE_SITE, Fault, can_mount
from cumbre.site.roles import roles_of

MEAN_GAP_S = 3.5
DECK = (
    ("kill_service", 8), ("hang_service", 3), ("kill_worker", 1), ("kill_database", 1), ("hang_database", 1),
    ("kill_supervisor", 1), ("link_down", 2), ("link_slow", 1), ("link_flapping", 1), ("link_corrupt", 2),
    ("disk_full", 2), ("rotten_file", 2), ("rotten_tape", 1), ("tape_away", 1), ("buffer_store_away", 1),
    ("clock_step", 1), ("sensor_silent", 1), ("sensor_garbage", 1), ("bus_locked", 1),
)  # fmt: skip
"""How often each kind comes in a full deck."""
LASTS_S: dict[str, tuple[float, float]] = {
    "hang_service": (1.0, 8.0), "hang_database": (1.0, 5.0), "link_down": (3.0, 15.0), "link_slow": (5.0, 15.0),
    "link_flapping": (5.0, 12.0), "link_corrupt": (5.0, 12.0), "disk_full": (2.0, 8.0), "tape_away": (3.0, 10.0),
    "buffer_store_away": (3.0, 12.0), "clock_step": (5.0, 15.0), "sensor_silent": (4.0, 15.0),
    "sensor_garbage": (4.0, 15.0), "bus_locked": (1.0, 6.0),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Targets:
    """What faults can be aimed at in one site."""

    roles: list[str]
    links: list[str]
    disks: list[str]
    tapes: list[str]
    sensors: list[str]
    buffers: list[str] = field(default_factory=list)
    """Stores of which a buffer has two."""

    @classmethod
    def of(cls, site: Site) -> Targets:
        """Everything that a site has; roles come and go with its configuration."""
        places = site.config.places
        instrument = load_instrument(site.config.instruments[0])
        return cls(
            roles=roles_of(site),
            links=[f"{link.source}-{link.target}" for link in site.config.links],
            disks=[WHOLE_SITE, *STORES] if can_mount() else [],
            tapes=[place.tape for place in places.values() if place.tape and "://" not in place.tape],
            sensors=[detector.name for detector in instrument.detectors],
            buffers=[store for place in places.values() if len(place.buffers) > 1 for store in place.buffers],
        )


def make_plan(seed: int, seconds: float, targets: Targets) -> list[Fault]:
    """Faults of a run, by time: a function of the arguments only.

    Every kind that has a target comes before any comes twice as often as the deck says.
    """
    chance = random.Random(f"chaos {seed}")
    deck = _deck(chance, targets)
    roles = _endless(chance, targets.roles)
    plan, now = [], 2.0
    while now < seconds:
        kind = next(deck)
        low, high = LASTS_S.get(kind, (0.0, 0.0))
        lasts = min(chance.uniform(low, high), max(seconds - now, 0.5)) if high else 0.0
        target, details = _aim(chance, kind, targets, roles)
        plan.append(Fault(round(now, 2), kind, target, round(lasts, 2), details))
        now += chance.expovariate(1.0 / MEAN_GAP_S)
    return plan


def _deck(chance: random.Random, targets: Targets) -> Iterator[str]:
    has = {
        "link": bool(targets.links), "disk_full": bool(targets.disks), "tape_away": bool(targets.tapes),
        "rotten_tape": bool(targets.tapes), "buffer_store": bool(targets.buffers),
        "kill_worker": "prompt" in targets.roles,
    }  # fmt: skip
    absent = tuple(kind for kind, is_there in has.items() if not is_there)
    cards = [kind for kind, count in DECK for _ in range(count) if not kind.startswith(absent)]
    while True:
        yield from chance.sample(cards, len(cards))


def _endless(chance: random.Random, items: list[str]) -> Iterator[str]:
    while True:
        yield from chance.sample(items, len(items))


def _aim(
    chance: random.Random, kind: str, targets: Targets, roles: Iterator[str]
) -> tuple[str, dict[str, float]]:
    """Target and details of one fault."""
    match kind:
        case "kill_service" | "hang_service":
            return next(roles), {}
        case "kill_worker":
            return "prompt", {}
        case "kill_database" | "hang_database":
            return "postgres", {}
        case "kill_supervisor":
            return "supervisor", {}
        case "clock_step":
            return next(roles), {"step_s": round(chance.choice((-1, 1)) * chance.uniform(2.0, 300.0), 1)}
        case "disk_full":
            return chance.choice(targets.disks), {}
        case "rotten_file":
            return chance.choice(CACHES), {}
        case "tape_away" | "rotten_tape":
            return chance.choice(targets.tapes), {}
        case "buffer_store_away":
            return chance.choice(targets.buffers), {"lost": float(chance.random() < 0.5)}
        case "sensor_silent" | "sensor_garbage":
            return chance.choice(targets.sensors), {}
        case "bus_locked":
            return "bus", {}
    link = chance.choice(targets.links)
    return link, {
        "link_down": {},
        "link_slow": {
            "bandwidth_mbit_s": round(chance.uniform(0.003, 0.05), 4),
            "latency_ms": round(chance.uniform(200.0, 4000.0)),
        },
        "link_flapping": {"period_s": round(chance.uniform(0.2, 1.5), 2)},
        "link_corrupt": {"part": round(chance.uniform(0.02, 0.4), 3)},
    }[kind]
