"""Whether a difference can be believed: most of the sky is the same every night."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cumbre.core.errors import UnprocessableDataError
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels.photometry import forced_psf_photometry

if TYPE_CHECKING:
    from cumbre.payloads.kernels.psf import PsfModel

CHANGED = 0.2
"""Part of its light by which a star must differ to count as changed."""
MOST_CHANGED = 0.2
"""Above this part of changed stars the difference shows how the images were taken, not the sky."""
FEWEST_CHANGED = 8
MOST_STARS = 3000
ELONGATED = 0.3
"""Ellipticity of the PSF from which a warning is due: the telescope did not follow the sky."""


def changed_stars(science: Exposure, difference: Exposure, psf: PsfModel) -> tuple[int, int]:
    """How many of the reference catalogue's stars are not the same in the template.

    What is in no catalogue may have moved (a field on the ecliptic holds more asteroids than stars) or be new.

    Parameters
    ----------
    science
        With ``metadata["stars"]`` matched to a catalogue; without that list nothing can be said.
    difference
        In units of the science image.
    psf
        Of the difference.

    Returns
    -------
    Changed stars, and stars that were looked at (not saturated, above 20 sigma, not planted).
    """
    stars = science.metadata.get("stars")
    if not isinstance(stars, np.ndarray) or not {"snr", "bits", "flux", "x", "y", "ref_index"} <= set(
        stars.dtype.names or ()
    ):
        return 0, 0
    stars = stars[(stars["snr"] > 20) & (stars["bits"] == 0) & (stars["ref_index"] >= 0)]
    stars = stars[np.argsort(-stars["flux"], kind="stable")][:MOST_STARS]
    ny, nx = science.shape
    x, y = stars["x"].round().astype(int).clip(0, nx - 1), stars["y"].round().astype(int).clip(0, ny - 1)
    stars = stars[(science.mask[y, x] & np.uint16(MaskPlane.INJECTED)) == 0]
    if not len(stars):
        return 0, 0
    left = forced_psf_photometry(
        difference.image, difference.variance, difference.mask, psf, stars["x"], stars["y"],
        bad_bits=int(MaskPlane.unusable() | MaskPlane.SAT_TEMPLATE),
    )  # fmt: skip
    known = np.isfinite(left.flux) & np.isfinite(left.flux_err)
    flux, error = np.abs(left.flux[known]), left.flux_err[known]
    changed = (flux > CHANGED * stars["flux"][known]) & (flux > 5 * error)
    return int(changed.sum()), int(known.sum())


def check_same_sky(science: Exposure, difference: Exposure, psf: PsfModel) -> float | None:
    """Part of the stars that changed; None when too few are known.

    Raises
    ------
    UnprocessableDataError
        So many that image and template do not show the same: another filter, a double or trailed image.
    """
    changed, of = changed_stars(science, difference, psf)
    if of < FEWEST_CHANGED:
        return None
    if changed >= FEWEST_CHANGED and changed > MOST_CHANGED * of:
        raise UnprocessableDataError(
            f"{changed} of {of} stars differ from the template by more than {CHANGED:.0%}: another filter than the "
            "template's, a double or trailed image, or a template of another field; no alerts are made of it"
        )
    return changed / of


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
