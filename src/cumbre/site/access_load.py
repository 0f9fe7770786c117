"""Many people at once: small questions with pauses, a few large ones all the time."""

# ruff: noqa: S608 (queries of our own names and numbers)
from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

BIG = (
    "SELECT TOP 1000000 * FROM pg.object",
    "SELECT TOP 1000000 * FROM files.object",
    "SELECT count(*), avg(g_mag - r_mag) FROM pg.object WHERE r_mag < 21",
    "SELECT extended, count(*), avg(g_mag - r_mag) FROM files.object GROUP BY extended",
)
LATE_S = 30.0


@dataclass
class Tally:
    """What the clients saw."""

    small: list[float] = field(default_factory=list)
    big: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    received: int = 0

    def summary(self) -> dict[str, Any]:
        """Percentiles and counts."""
        ordered = sorted(self.small)

        def at(part: float) -> float | None:
            return round(ordered[int(part * (len(ordered) - 1))], 3) if ordered else None

        return {
            "small": len(ordered), "small_p50_s": at(0.5), "small_p95_s": at(0.95), "small_worst_s": at(1.0),
            "big": len(self.big), "big_mean_s": round(statistics.fmean(self.big), 2) if self.big else None,
            "received_mb": self.received >> 20, "failures": len(self.failures), "reasons": self.failures[:5],
        }  # fmt: skip


def small_question(rng: random.Random, rows: int) -> str:
    """What one person asks in passing: a cone, an object, what there is."""
    kind = rng.randrange(8)
    schema = "pg" if rng.random() < 0.7 else "files"
    ra, dec = rng.uniform(0, 360), rng.uniform(-80, 80)
    if kind < 5:
        return f"SELECT * FROM {schema}.object WHERE DISTANCE(ra, dec, {ra}, {dec}) < 0.1"
    if kind == 5:
        return "SELECT table_name, description FROM tap_schema.tables"
    if kind == 6:
        return f"SELECT TOP 50 obs_id, s_ra, s_dec FROM ivoa.obscore WHERE 1 = INTERSECTS(s_region, CIRCLE({ra}, {dec}, 0.1))"
    low = rng.randrange(12 << 58)
    return f"SELECT TOP 10 * FROM {schema}.object WHERE hpx29 BETWEEN {low} AND {low + (12 << 58) // rows}"


async def _ask(client: httpx.AsyncClient, query: str, tally: Tally, times: list[float]) -> None:
    import httpx

    begin = time.perf_counter()
    try:
        async with client.stream("POST", "/tap/sync", data={"LANG": "ADQL", "QUERY": query}) as answer:
            end = b""
            async for block in answer.aiter_raw():
                tally.received += len(block)
                end = (end + block)[-400:]
        if answer.status_code != 200 or b"</VOTABLE>" not in end or b'value="ERROR"' in end:
            tally.failures.append(f"{answer.status_code}: {end[:200].decode(errors='replace')}")
            return
    except httpx.HTTPError as error:
        tally.failures.append(f"{type(error).__name__}: {error}")
        return
    times.append(time.perf_counter() - begin)


async def _clients(url: str, rows: int, clients: int, big: int, seconds: float, pause_s: float) -> Tally:
    import httpx

    tally = Tally()
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients + big, max_keepalive_connections=clients + big)
    async with httpx.AsyncClient(base_url=url, timeout=LATE_S + seconds, limits=limits) as client:

        async def person(number: int) -> None:
            rng = random.Random(number)
            await asyncio.sleep(rng.uniform(0, pause_s))
            while time.monotonic() < end:
                await _ask(client, small_question(rng, rows), tally, tally.small)
                await asyncio.sleep(rng.expovariate(1 / pause_s))

        async def program(number: int) -> None:
            turn = number
            while time.monotonic() < end:
                await _ask(client, BIG[turn % len(BIG)], tally, tally.big)
                turn += 1

        people = [person(number) for number in range(clients - big)]
        await asyncio.gather(*people, *(program(number) for number in range(big)))
    return tally


def crowd(
    url: str, rows: int, *, clients: int = 200, big: int = 4, seconds: float = 20.0, pause_s: float = 4.0
) -> dict[str, Any]:
    """Clients that ask for some seconds; what they saw.

    Parameters
    ----------
    clients, big
        How many at once, and how many of them ask for much, one thing after another.
    pause_s
        Mean time that the others think between two questions.
    """
    tally = asyncio.run(_clients(url, rows, clients, big, seconds, pause_s))
    return {"clients": clients, "seconds": seconds, "pause_s": pause_s} | tally.summary()
