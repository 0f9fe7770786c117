"""Matching of star lists: by a voted shift, or blind by pairs with rotation, scale and parity unknown.

Lists are ordered brightest first. A hypothesis comes from one pair of stars in each list; it is tested by
counting how many of the brightest stars fall on a star of the other list, through a grid of cells, and the
search stops as soon as the count cannot be chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Affine:
    """``(x', y') = matrix @ (x, y) + offset``."""

    matrix: Floats
    offset: Floats

    def __call__(self, x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
        """Transformed positions; shapes broadcast."""
        xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
        m = self.matrix
        return m[0, 0] * xs + m[0, 1] * ys + self.offset[0], m[1, 0] * xs + m[1, 1] * ys + self.offset[1]

    def inverse(self) -> Affine:
        """The transform back."""
        matrix = np.linalg.inv(self.matrix)
        return Affine(matrix, -matrix @ self.offset)

    @property
    def scale(self) -> float:
        """Mean magnification."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix))))

    @property
    def rotation_deg(self) -> float:
        """Rotation of the x axis, counter-clockwise."""
        return float(np.degrees(np.arctan2(self.matrix[1, 0], self.matrix[0, 0])))

    @property
    def parity(self) -> int:
        """−1 when the transform mirrors."""
        return 1 if np.linalg.det(self.matrix) > 0 else -1

    @classmethod
    def identity(cls) -> Affine:
        """No change."""
        return cls(np.eye(2), np.zeros(2))


@dataclass(frozen=True, slots=True)
class Match:
    """Matched stars of two lists.

    Attributes
    ----------
    transform
        From the first list's coordinates to the second's.
    first, second
        Indices into the two lists, shape (n,); each star appears once.
    rms
        Root mean square distance of the matched stars after the transform, in the second list's units.
    """

    transform: Affine
    first: Ints
    second: Ints
    rms: float

    @property
    def n(self) -> int:
        """Number of matched stars."""
        return int(self.first.size)


def nearest_pairs(
    x: ArrayLike, y: ArrayLike, x_ref: ArrayLike, y_ref: ArrayLike, radius: float
) -> tuple[Ints, Ints]:
    """Pairs of stars that are each other's nearest within ``radius``.

    Returns
    -------
    first, second
        Indices, shape (n,).
    """
    from scipy.spatial import cKDTree

    a = np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)], axis=1)
    b = np.stack([np.asarray(x_ref, np.float64), np.asarray(y_ref, np.float64)], axis=1)
    good_a, good_b = np.flatnonzero(np.isfinite(a).all(axis=1)), np.flatnonzero(np.isfinite(b).all(axis=1))
    if good_a.size == 0 or good_b.size == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    a, b = a[good_a], b[good_b]
    distance, index = cKDTree(b).query(a, distance_upper_bound=radius)
    _, back = cKDTree(a).query(b)
    found = np.flatnonzero(np.isfinite(distance))
    mutual = found[back[index[found]] == found]
    return good_a[mutual].astype(np.int64), good_b[index[mutual]].astype(np.int64)


def fit_affine(x: ArrayLike, y: ArrayLike, x_ref: ArrayLike, y_ref: ArrayLike) -> Affine:
    """Least-squares affine transform of matched positions (a shift for fewer than three pairs)."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    target = np.stack([np.asarray(x_ref, np.float64), np.asarray(y_ref, np.float64)], axis=1)
    if xs.size < 3:
        return Affine(np.eye(2), target.mean(axis=0) - np.array([xs.mean(), ys.mean()]))
    basis = np.stack([xs, ys, np.ones_like(xs)], axis=1)
    solution, *_ = np.linalg.lstsq(basis, target, rcond=None)
    return Affine(np.ascontiguousarray(solution[:2].T), solution[2].copy())


def vote_shift(
    x: ArrayLike, y: ArrayLike, x_ref: ArrayLike, y_ref: ArrayLike, *, max_shift: float, cell: float
) -> tuple[float, float, int, float]:
    """The shift that most pairs of stars agree on.

    Parameters
    ----------
    max_shift
        Largest shift along each axis.
    cell
        Size of a voting cell; use about the expected scatter of positions (distortion included).

    Returns
    -------
    dx, dy, votes, chance
        Shift to add to (x, y), how many pairs agree within 1.5 cells, and how many would by chance.
    """
    dx = (np.asarray(x_ref, np.float64)[None, :] - np.asarray(x, np.float64)[:, None]).ravel()
    dy = (np.asarray(y_ref, np.float64)[None, :] - np.asarray(y, np.float64)[:, None]).ravel()
    near = (np.abs(dx) < max_shift) & (np.abs(dy) < max_shift)
    dx, dy = dx[near], dy[near]
    if dx.size == 0:
        return 0.0, 0.0, 0, 0.0
    n = int(np.clip(2 * max_shift / cell, 1, 4000))
    ix = ((dx + max_shift) * (n / (2 * max_shift))).astype(np.int64).clip(0, n - 1)
    iy = ((dy + max_shift) * (n / (2 * max_shift))).astype(np.int64).clip(0, n - 1)
    votes = np.bincount(iy * n + ix, minlength=n * n).reshape(n, n)
    padded = np.pad(votes, 1)
    summed = sum(padded[j : j + n, i : i + n] for j in range(3) for i in range(3))
    peak = int(np.argmax(summed))
    size = 2 * max_shift / n
    cx, cy = (peak % n + 0.5) * size - max_shift, (peak // n + 0.5) * size - max_shift
    inside = (np.abs(dx - cx) < 1.5 * size) & (np.abs(dy - cy) < 1.5 * size)
    chance = dx.size * 9.0 / (n * n)
    return float(np.median(dx[inside])), float(np.median(dy[inside])), int(inside.sum()), float(chance)


@njit(cache=True)
def _fill_cells(x, y, x0, y0, cell, nx, ny):  # type: ignore[no-untyped-def]
    """Linked lists of the stars in each cell."""
    head = np.full(nx * ny, -1, np.int64)
    following = np.full(x.size, -1, np.int64)
    for i in range(x.size):
        k = int((y[i] - y0) / cell) * nx + int((x[i] - x0) / cell)
        following[i] = head[k]
        head[k] = i
    return head, following


@njit(cache=True)
def _count(x, y, n, m00, m01, m10, m11, tx, ty, xr, yr, head, following, x0, y0, cell, nx, ny):  # type: ignore[no-untyped-def]
    """How many of the first n stars fall within a cell's size of a reference star; gives up early."""
    hits = 0
    for i in range(n):
        px = m00 * x[i] + m01 * y[i] + tx
        py = m10 * x[i] + m11 * y[i] + ty
        fx, fy = (px - x0) / cell, (py - y0) / cell
        if fx < 0 or fy < 0 or fx >= nx or fy >= ny:
            continue
        cx, cy = int(fx), int(fy)
        found = False
        for jy in range(max(cy - 1, 0), min(cy + 2, ny)):
            for jx in range(max(cx - 1, 0), min(cx + 2, nx)):
                k = head[jy * nx + jx]
                while k >= 0:
                    dx, dy = xr[k] - px, yr[k] - py
                    if dx * dx + dy * dy < cell * cell:
                        found = True
                        break
                    k = following[k]
                if found:
                    break
            if found:
                break
        if found:
            hits += 1
        if i == 9 and hits < 3:
            return hits
    return hits


@njit(cache=True)
def _search(  # type: ignore[no-untyped-def]
    x,
    y,
    order_i,
    order_j,
    xr,
    yr,
    pair_i,
    pair_j,
    pair_length,
    n_count,
    tolerance,
    scale_low,
    scale_high,
    cos_max,
    allow_same,
    allow_mirror,
    max_shift,
    cx,
    cy,
    enough,
    budget,
    head,
    following,
    x0,
    y0,
    nx,
    ny,
):
    best, best_hits = np.zeros(6), 0
    tried = 0
    for p in range(order_i.size):
        i, j = order_i[p], order_j[p]
        vx, vy = x[j] - x[i], y[j] - y[i]
        length = np.sqrt(vx * vx + vy * vy)
        if length < 8 * tolerance:
            continue
        low = np.searchsorted(pair_length, length * scale_low)
        high = np.searchsorted(pair_length, length * scale_high)
        for q in range(low, high):
            for flip in range(2):
                a = pair_i[q] if flip == 0 else pair_j[q]
                b = pair_j[q] if flip == 0 else pair_i[q]
                wx, wy = xr[b] - xr[a], yr[b] - yr[a]
                for mirror in range(2):
                    if (mirror == 0 and not allow_same) or (mirror == 1 and not allow_mirror):
                        continue
                    ux = -vx if mirror == 1 else vx
                    # complex division w / u: rotation and scale in one number
                    norm = ux * ux + vy * vy
                    c, s = (wx * ux + wy * vy) / norm, (wy * ux - wx * vy) / norm
                    if c < cos_max * np.sqrt(c * c + s * s):
                        continue
                    m00, m01, m10, m11 = c, -s, s, c
                    if mirror == 1:
                        m00, m10 = -c, -s
                    tx = xr[a] - m00 * x[i] - m01 * y[i]
                    ty = yr[a] - m10 * x[i] - m11 * y[i]
                    sx, sy = m00 * cx + m01 * cy + tx, m10 * cx + m11 * cy + ty
                    if abs(sx - cx) > max_shift or abs(sy - cy) > max_shift:
                        continue
                    hits = _count(
                        x,
                        y,
                        n_count,
                        m00,
                        m01,
                        m10,
                        m11,
                        tx,
                        ty,
                        xr,
                        yr,
                        head,
                        following,
                        x0,
                        y0,
                        tolerance,
                        nx,
                        ny,
                    )
                    if hits > best_hits:
                        best_hits = hits
                        best[0], best[1], best[2], best[3], best[4], best[5] = m00, m01, m10, m11, tx, ty
        tried += 2 * (high - low)
        if best_hits >= enough or tried > budget:
            break
    return best, best_hits


def match_blind(
    x: ArrayLike,
    y: ArrayLike,
    x_ref: ArrayLike,
    y_ref: ArrayLike,
    *,
    tolerance: float,
    scale_tolerance: float = 0.05,
    max_rotation_deg: float = 180.0,
    parity: int = 0,
    max_shift: float = float("inf"),
    n_bright: int = 40,
    n_bright_ref: int = 400,
    budget: int = 20_000_000,
) -> Match | None:
    """Match two star lists with unknown shift, rotation, parity and a roughly known scale.

    Both lists are in the same approximate unit (scale the reference's tangent plane to pixels first) and are
    ordered brightest first.

    Parameters
    ----------
    x, y
        First list (detector), shape (n,).
    x_ref, y_ref
        Second list (reference), shape (m,); it may cover a much larger area.
    tolerance
        Distance within which stars agree under the right transform, before distortion is fitted.
    parity
        1 same sense, −1 mirrored, 0 unknown.
    max_shift
        Largest move of the first list's centre along each axis.
    n_bright, n_bright_ref
        How many of the brightest stars take part in the search.
    budget
        Hypotheses to try before giving up (about 0.2 µs each).

    Returns
    -------
    Match or None
        None when no transform matches more stars than chance would.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    xr, yr = np.asarray(x_ref, np.float64)[:n_bright_ref], np.asarray(y_ref, np.float64)[:n_bright_ref]
    n = min(xs.size, n_bright)
    if n < 3 or xr.size < 3:
        return None
    x0, y0 = float(xr.min()) - tolerance, float(yr.min()) - tolerance
    # cells of the tolerance's size; a sparse huge area would need too many, which real lists never do
    nx = int((xr.max() - x0) / tolerance) + 2
    ny = int((yr.max() - y0) / tolerance) + 2
    if nx * ny > 100_000_000:
        raise ValueError(f"match_blind: tolerance {tolerance} is too small for an area of {nx} x {ny} cells")
    head, following = _fill_cells(xr, yr, x0, y0, tolerance, nx, ny)
    span = float(np.hypot(np.ptp(xs[:n]), np.ptp(ys[:n]))) * (1 + scale_tolerance)
    i_ref, j_ref = np.triu_indices(xr.size, 1)
    length = np.hypot(xr[j_ref] - xr[i_ref], yr[j_ref] - yr[i_ref])
    keep = length < span
    i_ref, j_ref, length = i_ref[keep], j_ref[keep], length[keep]
    order = np.argsort(length)
    i_ref, j_ref, length = i_ref[order], j_ref[order], length[order]
    i_obs, j_obs = np.triu_indices(n, 1)
    bright_first = np.argsort(i_obs + j_obs, kind="stable")
    density = xr.size / ((np.ptp(xr) + tolerance) * (np.ptp(yr) + tolerance))
    chance = n * density * np.pi * tolerance**2
    needed = max(4.0, chance + 4 * np.sqrt(chance) + 3)
    enough = int(max(2 * needed, 0.5 * n)) if n > 10 else n
    best, hits = _search(
        xs, ys, i_obs[bright_first], j_obs[bright_first], xr, yr, i_ref, j_ref, length, n, tolerance,
        1 - scale_tolerance, 1 + scale_tolerance, np.cos(np.radians(max_rotation_deg)) - 1e-9, parity >= 0,
        parity <= 0, max_shift, float(np.mean(xs)), float(np.mean(ys)), enough, budget, head, following, x0, y0, nx, ny,
    )  # fmt: skip
    if hits < min(needed, n):
        return None
    transform = Affine(np.array([[best[0], best[1]], [best[2], best[3]]]), best[4:6].copy())
    return refine(xs, ys, x_ref, y_ref, transform, tolerance)


def refine(
    x: ArrayLike,
    y: ArrayLike,
    x_ref: ArrayLike,
    y_ref: ArrayLike,
    transform: Affine,
    tolerance: float,
    rounds: int = 3,
) -> Match | None:
    """Improve a transform: match all stars, fit an affine transform, match again.

    Returns
    -------
    Match or None
        None when fewer than three stars remain.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    xr, yr = np.asarray(x_ref, np.float64), np.asarray(y_ref, np.float64)
    first = second = np.zeros(0, np.int64)
    radius = tolerance
    for _ in range(rounds):
        px, py = transform(xs, ys)
        first, second = nearest_pairs(px, py, xr, yr, radius)
        if first.size < 3:
            return None
        distance = np.hypot(px[first] - xr[second], py[first] - yr[second])
        limit = max(4 * float(np.median(distance)), 0.1 * tolerance)
        keep = distance <= limit
        transform = fit_affine(xs[first[keep]], ys[first[keep]], xr[second[keep]], yr[second[keep]])
        radius = float(np.clip(limit, 0.2 * tolerance, tolerance))
    px, py = transform(xs, ys)
    first, second = nearest_pairs(px, py, xr, yr, radius)
    if first.size < 3:
        return None
    rms = float(np.sqrt(np.mean((px[first] - xr[second]) ** 2 + (py[first] - yr[second]) ** 2)))
    return Match(transform, first, second, rms)


def match_images(
    x: ArrayLike, y: ArrayLike, x_ref: ArrayLike, y_ref: ArrayLike, *, tolerance: float = 3.0
) -> Match | None:
    """Match the star lists of two images of one camera: any shift and rotation, scale within 3 %.

    A pure shift is tried first (the usual drift between frames), then the blind search.
    """
    n, m = min(len(np.atleast_1d(x)), 80), min(len(np.atleast_1d(x_ref)), 80)
    if n < 3 or m < 3:
        return None
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    xr, yr = np.asarray(x_ref, np.float64), np.asarray(y_ref, np.float64)
    reach = float(max(np.ptp(xr), np.ptp(yr), np.ptp(xs), np.ptp(ys)))
    dx, dy, votes, chance = vote_shift(xs[:n], ys[:n], xr[:m], yr[:m], max_shift=reach, cell=tolerance)
    if votes > max(5.0, chance + 6 * np.sqrt(chance) + 3):
        match = refine(xs, ys, xr, yr, Affine(np.eye(2), np.array([dx, dy])), tolerance)
        if match is not None and match.n >= max(5.0, 0.4 * _overlap(xs[:n], ys[:n], xr, yr, match.transform)):
            return match
    return match_blind(xs, ys, xr, yr, tolerance=tolerance, scale_tolerance=0.03, n_bright_ref=120)


def _overlap(x: Floats, y: Floats, x_ref: Floats, y_ref: Floats, transform: Affine) -> int:
    """How many stars of the first list fall into the second list's rectangle."""
    px, py = transform(x, y)
    inside = (px > x_ref.min()) & (px < x_ref.max()) & (py > y_ref.min()) & (py < y_ref.max())
    return int(inside.sum())
