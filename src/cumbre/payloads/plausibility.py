"""Whether a difference can be believed: most of the sky is the same every night."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import cKDTree

from cumbre.core.errors import UnprocessableDataError
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels.photometry import forced_psf_photometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cumbre.payloads.kernels.psf import PsfModel

CHANGED = 0.2
"""Part of its light by which a star must differ to count as changed."""
MOST_CHANGED = 0.2
"""Above this part of changed stars the difference shows how the images were taken, not the sky."""
FEWEST_CHANGED = 5
MOST_STARS = 3000
GHOST_PX = 60.0
"""How far from a star its second image is looked for."""
SAME_PX = 2.0
"""How well the second images of a jump agree in their offset."""
MOST_GHOSTS = 0.1
"""Second images for each star above which the telescope jumped."""
ELONGATED = 0.3
"""Ellipticity of the PSF from which a warning is due: the telescope did not follow the sky."""


@dataclass(frozen=True, slots=True)
class StarCheck:
    """How the stars of an image compare with the template.

    Attributes
    ----------
    known
        Stars of the reference catalogue that could be looked at (not saturated, above 20 sigma, not planted). What is
        in no catalogue may have moved: a field on the ecliptic may hold as many asteroids as stars.
    changed
        Of them, those whose light differs.
    ghosts
        Changed sources in no catalogue that stand at one and the same offset from a star.
    """

    known: int
    changed: int
    ghosts: int = 0


def compare_stars(science: Exposure, difference: Exposure, psf: PsfModel) -> StarCheck:
    """Measure the stars that calibration listed on the difference.

    Parameters
    ----------
    science
        With ``metadata["stars"]``; without that list nothing can be said. If none of them is matched to a catalogue
        all count as known.
    difference
        In units of the science image.
    psf
        Of the difference.
    """
    stars = science.metadata.get("stars")
    if not isinstance(stars, np.ndarray) or not {"snr", "bits", "flux", "x", "y", "ref_index"} <= set(
        stars.dtype.names or ()
    ):
        return StarCheck(0, 0)
    stars = stars[(stars["snr"] > 20) & (stars["bits"] == 0)]
    stars = stars[np.argsort(-stars["flux"], kind="stable")][:MOST_STARS]
    ny, nx = science.shape
    x, y = stars["x"].round().astype(int).clip(0, nx - 1), stars["y"].round().astype(int).clip(0, ny - 1)
    stars = stars[(science.mask[y, x] & np.uint16(MaskPlane.INJECTED)) == 0]
    if not len(stars):
        return StarCheck(0, 0)
    left = forced_psf_photometry(
        difference.image, difference.variance, difference.mask, psf, stars["x"], stars["y"],
        bad_bits=int(MaskPlane.unusable() | MaskPlane.SAT_TEMPLATE),
    )  # fmt: skip
    seen = np.isfinite(left.flux) & np.isfinite(left.flux_err)
    flux = np.abs(left.flux)
    changed = seen & (flux > CHANGED * stars["flux"]) & (flux > 5 * left.flux_err)
    listed = stars["ref_index"] >= 0
    if not listed.any():
        return StarCheck(int(seen.sum()), int(changed.sum()))
    known = seen & listed
    ghosts = _same_offset(_places(stars[changed & ~listed]), _places(stars[known]))
    return StarCheck(int(known.sum()), int((changed & known).sum()), ghosts)


def _places(stars: NDArray[Any]) -> NDArray[np.float64]:
    return np.stack([stars["x"], stars["y"]], axis=1).astype(np.float64)


def _same_offset(sources: NDArray[np.float64], stars: NDArray[np.float64]) -> int:
    """How many sources stand at the most frequent offset from a star."""
    if not len(sources) or not len(stars):
        return 0
    near = cKDTree(stars).query_ball_point(sources, GHOST_PX)
    offsets = np.concatenate([sources[k] - stars[found] for k, found in enumerate(near)])
    if not len(offsets):
        return 0
    return int(cKDTree(offsets).query_ball_point(offsets, SAME_PX, return_length=True).max())


def check_same_sky(science: Exposure, difference: Exposure, psf: PsfModel) -> float | None:
    """Part of the stars that changed; None when too few are known.

    Raises
    ------
    UnprocessableDataError
        So many that image and template do not show the same: another filter, a double or trailed image.
    """
    found = compare_stars(science, difference, psf)
    if found.changed >= FEWEST_CHANGED and found.changed > MOST_CHANGED * found.known:
        raise UnprocessableDataError(
            f"{found.changed} of {found.known} stars differ from the template by more than {CHANGED:.0%}: another "
            "filter than the template's, a double or trailed image, or a template of another field; no alerts are "
            "made of it"
        )
    if found.ghosts >= FEWEST_CHANGED and found.ghosts > MOST_GHOSTS * found.known:
        raise UnprocessableDataError(
            f"{found.ghosts} sources that the template does not have stand at one offset from stars, {found.known} of "
            "which are known: a double or trailed image, the telescope jumped; no alerts are made of it"
        )
    return found.changed / found.known if found.known >= FEWEST_CHANGED else None


def ellipticity(psf: PsfModel) -> float:
    """(a² − b²) / (a² + b²) of the PSF at the image's centre, from its pixels above 3 % of the peak."""
    ny, nx = psf.shape
    stamp = psf.stamp((nx - 1) // 2, (ny - 1) // 2).astype(np.float64)
    weight = np.where(stamp > 0.03 * stamp.max(), stamp, 0)
    half = stamp.shape[0] // 2
    grid = np.arange(-half, half + 1)
    total = weight.sum()
    x, y = (weight * grid[None, :]).sum() / total, (weight * grid[:, None]).sum() / total
    dx, dy = grid[None, :] - x, grid[:, None] - y
    xx, yy, xy = (weight * dx**2).sum(), (weight * dy**2).sum(), (weight * dx * dy).sum()
    return float(math.hypot(xx - yy, 2 * xy) / (xx + yy))
