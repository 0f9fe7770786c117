"""Which part of an image is one job, and which pair does it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cumbre.core.instrument import Instrument

WAVEFRONT = "wavefront"
JOBS_PER_PAIR = 2
"""Jobs of a fully-operational pair beyond which local-only pairs are used."""


def replicate_parts(instrument: Instrument) -> dict[str, tuple[str, ...]]:
    """Part → names of its detectors: one part a raft, and one for wavefront sensors and guiders.

    A detector without a raft in its name (``N6``) is a part of its own.
    """
    parts: dict[str, list[str]] = {}
    corner: list[str] = []
    for detector in instrument.detectors:
        if detector.purpose == "SCIENCE":
            parts.setdefault(detector.name.partition("_")[0], []).append(detector.name)
        else:
            corner.append(detector.name)
    if corner:
        parts[WAVEFRONT] = corner
    return {part: tuple(names) for part, names in parts.items()}


def process_parts(instrument: Instrument, *, wavefront: bool) -> dict[str, tuple[str, ...]]:
    """Part → names of its detectors: one part a science detector, and one a wavefront sensor if wanted.

    The two halves of a split wavefront sensor (``R00_SW0``, ``R00_SW1``) are one sensor.
    """
    parts: dict[str, list[str]] = {}
    for detector in instrument.detectors:
        if detector.purpose == "SCIENCE":
            parts[detector.name] = [detector.name]
        elif detector.purpose == "WAVEFRONT" and wavefront:
            parts.setdefault(detector.name.rstrip("0123456789"), []).append(detector.name)
    return {part: tuple(names) for part, names in parts.items()}


def allocate(
    count: int, *, full: Sequence[int], local: Sequence[int], load: Mapping[int, int], turn: int = 0
) -> list[int | None]:
    """Pairs for ``count`` jobs.

    Fully-operational pairs first, up to two jobs each; then local-only ones, up to as many; then whoever has
    least to do. Equally loaded ones take turns.

    Parameters
    ----------
    full, local
        Pairs of the two pools.
    load
        Jobs each pair has already.
    turn
        Moves the order among equals, so that small cameras use all pairs.
    """
    work = {pair: load.get(pair, 0) for pair in (*full, *local)}
    if not work:
        return [None] * count
    chosen: list[int | None] = []
    for number in range(count):
        for pool in (full, local):
            free = [pair for pair in pool if work[pair] < JOBS_PER_PAIR]
            if free:
                break
        else:
            free = list(full) or list(local)
        rank = {pair: (place - turn - number) % len(free) for place, pair in enumerate(free)}
        pair = min(free, key=lambda pair: (work[pair], rank[pair]))
        work[pair] += 1
        chosen.append(pair)
    return chosen
