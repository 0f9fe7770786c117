"""Queries to begin with; each runs on every site that has the tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cumbre.access.tables import Table


@dataclass(frozen=True, slots=True)
class Example:
    """One query with its name and what it answers."""

    name: str
    description: str
    adql: str
    tables: tuple[str, ...]


EXAMPLES = (
    Example(
        "Tables and how many columns each has",
        "What can be asked here.",
        "SELECT table_name, COUNT(*) AS n_columns FROM tap_schema.columns GROUP BY table_name ORDER BY table_name",
        ("tap_schema.columns",),
    ),
    Example(
        "Objects in a cone",
        "Variable and moving objects within 0.1 degrees of a position, nearest first.",
        "SELECT TOP 100 diaObjectId, ra, dec, nDiaSources, DISTANCE(ra, dec, 53.1, -27.8) AS distance_deg\n"
        "FROM level1.DiaObject\nWHERE DISTANCE(ra, dec, 53.1, -27.8) < 0.1\nORDER BY distance_deg",
        ("level1.DiaObject",),
    ),
    Example(
        "Light curves of the objects seen most often",
        "Every detection of the ten objects with the most of them.",
        "WITH busiest AS (SELECT TOP 10 diaObjectId FROM level1.DiaObject ORDER BY nDiaSources DESC)\n"
        "SELECT s.diaObjectId, s.midpointMjdTai, s.band, s.psfFlux, s.psfFluxErr\n"
        "FROM level1.DiaSource AS s JOIN busiest AS b ON s.diaObjectId = b.diaObjectId\n"
        "ORDER BY s.diaObjectId, s.midpointMjdTai",
        ("level1.DiaSource", "level1.DiaObject"),
    ),
    Example(
        "Images of a position",
        "Every image that covers a position, the newest first.",
        "SELECT TOP 100 obs_id, instrument_name, t_min, t_exptime, access_url\nFROM ivoa.obscore\n"
        "WHERE 1 = CONTAINS(POINT(53.1, -27.8), s_region)\nORDER BY t_min DESC",
        ("ivoa.obscore",),
    ),
)


def examples_for(tables: Iterable[Table]) -> list[Example]:
    """Examples whose tables are all there."""
    names = {table.full_name.lower() for table in tables}
    return [example for example in EXAMPLES if names.issuperset(name.lower() for name in example.tables)]
