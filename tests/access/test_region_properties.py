"""Random regions: planner and both engines give what plain vectors give, row for row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from access_data import Place, in_files, in_postgres, sky
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from support.pg import fresh_database

EDGE_DEG = 1e-8
"""Rows so near to an edge that rounding decides are not counted."""


@pytest.fixture(scope="module")
def places(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Place]]:
    with fresh_database(postgres_dsn) as db:
        yield [in_postgres(db), in_files(tmp_path_factory.mktemp("files"))]


def vectors(ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
    a, d = np.radians(ra), np.radians(dec)
    return np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)], -1)


IDS = sky().column("id").to_numpy()
STARS = vectors(sky().column("ra").to_numpy(), sky().column("dec").to_numpy())


def whole(value: float) -> float:
    """A position in a table is zero or far from the smallest double."""
    return value if abs(value) > 1e-100 else 0.0


longitudes = st.floats(-360, 720) | st.sampled_from([0.0, 360.0, 359.999999, 180.0])
latitudes = st.floats(-90, 90) | st.sampled_from([-90.0, 90.0, 0.0, 41.8103149])
radii = st.floats(1e-4, 150) | st.sampled_from([0.01, 1.0, 58.0, 90.0])
relaxed = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)

few = settings(relaxed, max_examples=12)


def check(places: list[Place], condition: str, inside: np.ndarray, sure: np.ndarray) -> None:
    wanted, unsure = set(IDS[inside & sure].tolist()), set(IDS[~sure].tolist())
    for place in places:
        found = {row[0] for row in place.rows(f"SELECT id FROM stars WHERE {condition}")} - unsure
        assert found == wanted, (place.name, condition)


def angle(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(one, other), axis=-1), np.sum(one * other, axis=-1)))


@given(longitudes, latitudes, radii, st.sampled_from(["contains", "distance", "points"]))
@relaxed
def test_circles(places: list[Place], ra: float, dec: float, radius: float, form: str) -> None:
    distance = angle(STARS, vectors(np.array(ra), np.array(dec)))
    condition = {
        "contains": f"1 = CONTAINS(POINT(ra, dec), CIRCLE({ra!r}, {dec!r}, {radius!r}))",
        "distance": f"DISTANCE({ra!r}, {dec!r}, ra, dec) <= {radius!r}",
        "points": f"DISTANCE(POINT(ra, dec), POINT({ra!r}, {dec!r})) <= {radius!r}",
    }[form]
    # near the antipode a distance is only known to 1e-6 degrees
    margin = np.where(distance > 179.9, 1e-5, EDGE_DEG)
    check(places, condition, distance <= radius, np.abs(distance - radius) > margin)


@given(longitudes, latitudes, st.floats(0.01, 175), st.floats(0.01, 175))
@relaxed
def test_boxes(places: list[Place], ra: float, dec: float, width: float, height: float) -> None:
    """Sides at right angles to the ends of the arms: half-spaces, here from vectors of the centre."""
    a, d = np.radians(ra), np.radians(dec)
    centre = vectors(np.array(ra), np.array(dec))
    east = np.array([-np.sin(a), np.cos(a), 0.0])
    north = np.array([-np.sin(d) * np.cos(a), -np.sin(d) * np.sin(a), np.cos(d)])
    assume(
        np.hypot(np.tan(np.radians(width / 2)), np.tan(np.radians(height / 2))) < 50
    )  # smaller than half the sky
    depth = STARS @ centre
    x = np.abs(STARS @ east) - depth * np.tan(np.radians(width / 2))
    y = np.abs(STARS @ north) - depth * np.tan(np.radians(height / 2))
    sure = (np.abs(x) > 1e-9) & (np.abs(y) > 1e-9) & (np.abs(depth) > 1e-9)
    condition = f"CONTAINS(POINT(ra, dec), BOX({ra!r}, {dec!r}, {width!r}, {height!r})) = 1"
    check(places, condition, (depth > 0) & (x <= 0) & (y <= 0), sure)


@st.composite
def polygons(draw: st.DrawFn, largest: float = 60) -> tuple[np.ndarray, np.ndarray]:
    """Corners around a centre at random distances: any simple shape, convex or not, in either direction."""
    ra, dec, size = draw(longitudes), draw(latitudes), draw(st.floats(0.05, largest))
    count = draw(st.integers(3, 9))
    angles = np.sort(draw(st.lists(st.floats(0, 2 * np.pi), min_size=count, max_size=count, unique=True)))
    reach = np.radians(size) * np.array(draw(st.lists(st.floats(0.1, 1), min_size=count, max_size=count)))
    assume(np.diff(angles).min(initial=9) > 0.05 and angles[-1] - angles[0] < 2 * np.pi - 0.05)
    assume(max(np.diff(angles).max(), 2 * np.pi - angles[-1] + angles[0]) < 3.0)  # the centre is inside
    a, d = np.radians(ra), np.radians(dec)
    centre = vectors(np.array(ra), np.array(dec))
    east = np.array([-np.sin(a), np.cos(a), 0.0])
    north = np.array([-np.sin(d) * np.cos(a), -np.sin(d) * np.sin(a), np.cos(d)])
    flat = np.cos(angles)[:, None] * east + np.sin(angles)[:, None] * north
    corners = np.cos(reach)[:, None] * centre + np.sin(reach)[:, None] * flat
    if draw(st.booleans()):
        corners = corners[::-1]
    return np.degrees(np.arctan2(corners[:, 1], corners[:, 0])), np.degrees(
        np.arcsin(np.clip(corners[:, 2], -1, 1))
    )


def winding(points: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns of polygons about points, by the angles between corners as seen from there; and how sure.

    Many points and one polygon, or one point and many polygons (corners of shape (corner, polygon, 3)).
    """
    total, nearest = np.zeros(1), np.full(1, 180.0)
    for one, other in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        u, v = np.cross(points, one), np.cross(points, other)
        total = total + np.arctan2(np.sum(np.cross(u, v) * points, axis=-1), np.sum(u * v, axis=-1))
        normal = np.cross(one, other)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        away = np.clip(np.sum(points * normal, axis=-1), -1, 1)
        nearest = np.minimum(nearest, np.abs(np.degrees(np.arcsin(away))))
    return np.abs(total) > np.pi, nearest > 1e-7


@given(polygons())
@relaxed
def test_polygons(places: list[Place], corners: tuple[np.ndarray, np.ndarray]) -> None:
    ra, dec = corners
    edges = vectors(ra, dec)
    middle = edges.sum(axis=0)
    middle /= np.linalg.norm(middle)
    assume((edges @ middle).min() > 0.05)
    turns, sure = winding(STARS, edges)
    inside = turns & (STARS @ middle > 0)
    listed = ", ".join(f"{a!r}, {b!r}" for a, b in zip(ra.tolist(), dec.tolist(), strict=True))
    check(places, f"1 = CONTAINS(POINT(ra, dec), POLYGON({listed}))", inside, sure)


@given(st.lists(st.tuples(longitudes, latitudes), min_size=1, max_size=30), st.floats(1e-3, 20))
@relaxed
def test_matches(places: list[Place], positions: list[tuple[float, float]], radius: float) -> None:
    upload = pa.table(
        {
            "n": range(len(positions)),
            "ra": [whole(p[0]) for p in positions],
            "dec": [whole(p[1]) for p in positions],
        }
    )
    wanted, unsure = set(), set()
    for n, (ra, dec) in enumerate(positions):
        distance = angle(STARS, vectors(np.array(ra), np.array(dec)))
        wanted |= {(n, int(i)) for i in IDS[distance < radius]}
        unsure |= {(n, int(i)) for i in IDS[np.abs(distance - radius) < EDGE_DEG]}
    for place in places:
        rows = place.rows(
            f"SELECT u.n, s.id FROM mine u JOIN stars s ON DISTANCE(u.ra, u.dec, s.ra, s.dec) < {radius!r}",
            uploads={"mine": upload},
        )
        assert len(rows) == len(set(rows))
        assert set(rows) - unsure == wanted - unsure


FLAT = np.array(sky().column("outline").to_pylist()).reshape(len(IDS), 4, 2)
OUTLINES = vectors(FLAT[..., 0], FLAT[..., 1])
MIDDLES = OUTLINES.sum(axis=1) / np.linalg.norm(OUTLINES.sum(axis=1), axis=-1, keepdims=True)
PLAIN = (FLAT[..., 1].max(axis=1) < 89) & (FLAT[..., 1].min(axis=1) > -89)
"""Outlines that do not end at a pole, where two corners are one."""


def edges_of(corners: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(corners, np.roll(corners, -1, axis=0), strict=True))


def to_edge(point: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Degrees from a point to arcs: to the foot of the perpendicular when it is on the arc, else to an end."""
    normal = np.cross(one, other)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    foot = point - np.sum(point * normal, axis=-1, keepdims=True) * normal
    foot /= np.linalg.norm(foot, axis=-1, keepdims=True)
    on = np.isclose(angle(one, foot) + angle(foot, other), angle(one, other), atol=1e-9)
    return np.where(on, angle(point, foot), np.minimum(angle(point, one), angle(point, other)))


@given(longitudes, latitudes, st.floats(1e-4, 20), st.booleans())
@few
def test_stored_outlines_and_circles(
    places: list[Place], ra: float, dec: float, radius: float, inside: bool
) -> None:
    """The column of regions is found by its index in one engine and by circles around it in the other."""
    centre = vectors(np.array(ra), np.array(dec))
    corners = OUTLINES.transpose(1, 0, 2)
    to_edges = np.min([to_edge(centre, one, other) for one, other in edges_of(corners)], axis=0)
    turns, sure = winding(centre[None], corners)
    within = turns & (MIDDLES @ centre > 0)
    farthest = angle(OUTLINES, centre).max(axis=1)
    if inside:
        condition = f"1 = CONTAINS(outline, CIRCLE({ra!r}, {dec!r}, {radius!r}))"
        found, distance = farthest <= radius, farthest
    else:
        condition = f"INTERSECTS(CIRCLE({ra!r}, {dec!r}, {radius!r}), outline) = 1"
        found, distance = within | (to_edges <= radius), to_edges
    check(places, condition, found, PLAIN & (sure | (to_edges > 1e-6)) & (np.abs(distance - radius) > 1e-6))


@given(polygons(largest=12))
@few
def test_stored_outlines_and_polygons(places: list[Place], corners: tuple[np.ndarray, np.ndarray]) -> None:
    ra, dec = corners
    edges = vectors(ra, dec)
    middle = edges.sum(axis=0) / np.linalg.norm(edges.sum(axis=0))
    assume((edges @ middle).min() > 0.05)
    found, sure = np.zeros(len(IDS), bool), PLAIN.copy()
    for i in range(4):
        turns, clear = winding(OUTLINES[:, i], edges)
        found |= turns & (OUTLINES[:, i] @ middle > 0)
        sure &= clear
    for corner in edges:
        turns, clear = winding(corner[None], OUTLINES.transpose(1, 0, 2))
        found |= turns & (MIDDLES @ corner > 0)
        sure &= clear
    for one, other in edges_of(edges):
        for first, second in edges_of(OUTLINES.transpose(1, 0, 2)):
            meeting = np.cross(np.cross(one, other), np.cross(first, second))
            meeting /= np.linalg.norm(meeting, axis=-1, keepdims=True)
            for point in (meeting, -meeting):
                on_one = np.isclose(angle(one, point) + angle(point, other), angle(one, other), atol=1e-9)
                on_two = np.isclose(
                    angle(first, point) + angle(point, second), angle(first, second), atol=1e-9
                )
                found |= on_one & on_two
    listed = ", ".join(f"{a!r}, {b!r}" for a, b in zip(ra.tolist(), dec.tolist(), strict=True))
    check(places, f"1 = INTERSECTS(outline, POLYGON({listed}))", found, sure)


def test_a_point_just_inside_a_corner_finds_the_outline(places: list[Place]) -> None:
    """As far from the middle as can be: what the index must not lose."""
    rng = np.random.default_rng(5)
    for row in rng.choice(np.flatnonzero(PLAIN), 40, replace=False):
        near = 0.001 * MIDDLES[row] + 0.999 * OUTLINES[row, rng.integers(4)]
        ra, dec = (
            np.degrees(np.arctan2(near[1], near[0])),
            np.degrees(np.arcsin(near[2] / np.linalg.norm(near))),
        )
        for place in places:
            found = place.rows(f"SELECT id FROM stars WHERE 1 = CONTAINS(POINT({ra}, {dec}), outline)")
            assert (IDS[row],) in found, (place.name, ra, dec)


def test_a_polygon_with_a_thin_corner_far_from_its_middle(places: list[Place]) -> None:
    """Three corners nearly in line: seen from the middle they turn the other way than they do on the sky."""
    corners = (
        (33.0, 0.0), (9.092781602452527, 13.826976662325036), (-15.12286705659449, 29.685503131243543),
        (-31.305544593173106, -11.014081262926874), (-23.000306554415072, -24.34211566448001),
        (10.437577915297233, -31.484480338936326),
    )  # fmt: skip
    ra, dec = (np.array(part) for part in zip(*corners, strict=True))
    edges = vectors(ra, dec)
    turns, sure = winding(STARS, edges)
    inside = turns & (STARS @ edges.sum(axis=0) > 0)
    listed = ", ".join(f"{a!r}, {b!r}" for a, b in zip(ra.tolist(), dec.tolist(), strict=True))
    check(places, f"1 = CONTAINS(POINT(ra, dec), POLYGON({listed}))", inside, sure)
