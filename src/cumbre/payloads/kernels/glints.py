"""Rows of glints: a satellite that tumbles flashes at equal intervals and leaves points at equal distances on a line.

Single flashes look like any other source; a row of them does not happen by chance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST_FLASHES = 4
MOST_CHANCE = 0.02
"""Rows of unrelated sources expected in one image, above which a row must be longer."""
_LONGEST = 12
_MOST_SOURCES = 1500


def least_flashes(n: int, area_px: float, reach_px: float, tolerance_px: float) -> int:
    """Number of sources in a row that chance hardly makes among ``n`` sources in an image.

    Every pair within reach predicts the next place; how often one of the others lies there follows from their density.
    """
    density = n / max(area_px, 1.0)
    pairs = 0.5 * n * density * np.pi * reach_px**2
    hit = density * np.pi * tolerance_px**2
    least = LEAST_FLASHES
    while least < _LONGEST and pairs * (2 * hit) ** (least - 2) > MOST_CHANCE:
        least += 1
    return least


def glint_rows(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    shape: tuple[int, int],
    fwhm_px: float,
    *,
    reach_px: float = 400.0,
) -> NDArray[np.bool_]:
    """Which sources belong to a row of glints.

    Parameters
    ----------
    x, y
        Positive point sources, the most significant first; beyond the first 1,500 none is looked at.
    shape
        (ny, nx) of the image.
    fwhm_px
        Of the PSF; flashes lie within a FWHM of their place in the row.
    reach_px
        Greatest distance between one flash and the next.
    """
    from scipy.spatial import cKDTree

    out = np.zeros(len(x), bool)
    n = min(len(x), _MOST_SOURCES)
    if n < LEAST_FLASHES:
        return out
    tolerance = max(fwhm_px, 1.5)
    least = least_flashes(n, float(shape[0] * shape[1]), reach_px, tolerance)
    places = np.stack([x[:n], y[:n]], axis=1)
    tree = cKDTree(places)
    for i, j in tree.query_pairs(reach_px, output_type="ndarray"):
        if out[i] and out[j]:
            continue
        row = _row(tree, places, int(i), int(j), tolerance)
        if len(row) >= least:
            out[row] = True
    return out


def _row(tree: object, places: NDArray[np.float64], i: int, j: int, tolerance: float) -> list[int]:
    """The sources that go on from a pair in its steps, both ways, until one is missing."""
    if np.hypot(*(places[j] - places[i])) < 3 * tolerance:
        return []
    row = [i, j]
    for _ in range(2):
        while True:
            # the step is that of the whole row so far: the places of two flashes alone are too uncertain
            step = (places[row[-1]] - places[row[0]]) / (len(row) - 1)
            apart, index = tree.query(places[row[-1]] + step)  # type: ignore[attr-defined]
            if not apart <= tolerance or int(index) in row:
                break
            row.append(int(index))
        row.reverse()
    return row
