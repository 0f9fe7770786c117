"""Static objects of calibrated, background-subtracted coadds: one row an object, for a small release."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import UnprocessableDataError
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.kernels.photometry import aperture_photometry, forced_psf_photometry
from cumbre.payloads.stars import detect

Columns = dict[str, NDArray[Any]]
NJY_PER_UNIT = 3631e9
SAME_ARCSEC = 1.0
_UNSEEN = MaskPlane.NO_DATA | MaskPlane.BAD


def measure_objects(coadd: Exposure, *, threshold: float = 5.0) -> Columns:
    """Objects of one coadd.

    Parameters
    ----------
    coadd
        With WCS, PSF and zero point.
    threshold
        Sigma of a pixel after smoothing.

    Returns
    -------
    dict
        Arrays of shape (n,): ``ra``, ``dec`` (deg ICRS), ``x``, ``y``, ``psfFlux``, ``psfFluxErr``, ``apFlux``,
        ``apFluxErr`` (nJy; radius 1.5 FWHM), ``halfLight`` (arcsec), ``elongation``, ``extendedness`` (0 as the PSF, 1
        wider), ``saturated``, ``snr``.

    Raises
    ------
    UnprocessableDataError
        The coadd is not calibrated.
    NoWorkFoundError
        There is no object in it.
    """
    if coadd.wcs is None or coadd.psf is None or not np.isfinite(coadd.zero_point):
        raise UnprocessableDataError("objects: the coadd has no WCS, PSF or zero point")
    unseen = (coadd.mask & np.uint16(_UNSEEN)) != 0
    noise = np.sqrt(np.where(unseen, np.inf, coadd.variance)).astype(np.float32)
    noise[~np.isfinite(noise)] = np.float32(1e10)
    found, _ = detect(coadd.image, noise, unseen, threshold=threshold)
    fwhm = float(coadd.psf.fwhm_px)
    point = forced_psf_photometry(
        coadd.image, coadd.variance, coadd.mask, coadd.psf, found.x, found.y, bad_bits=int(_UNSEEN)
    )
    wide, wide_err, _ = aperture_photometry(coadd.image, coadd.variance, unseen, found.x, found.y, 1.5 * fwhm)
    ra, dec = coadd.wcs.pix2sky(found.x, found.y)
    east, north = coadd.wcs.pix2sky(found.x, found.y + 1)
    scale = 3600 * np.hypot((np.asarray(east) - ra) * np.cos(np.radians(dec)), np.asarray(north) - dec)
    njy = NJY_PER_UNIT * 10 ** (-0.4 * coadd.zero_point)
    ny, nx = coadd.shape
    rows, columns = (
        np.clip(np.rint(found.y).astype(int), 0, ny - 1),
        np.clip(np.rint(found.x).astype(int), 0, nx - 1),
    )
    bits = coadd.mask[rows, columns]
    # the light of a star within 1.5 FWHM, by the same PSF, is what a point source would have there
    expected = _encircled(coadd, 1.5 * fwhm) * point.flux
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = (wide - expected) / np.hypot(wide_err, 0.03 * np.abs(wide))
    good = np.isfinite(point.flux) & (point.flux_err > 0) & np.isfinite(np.asarray(ra) + np.asarray(dec))
    # an object cut by the edge has its middle at another place, and the neighbouring coadd has it whole
    inside = 1.5 * fwhm
    good &= (
        (found.x > inside) & (found.x < nx - 1 - inside) & (found.y > inside) & (found.y < ny - 1 - inside)
    )
    out: Columns = {
        "ra": np.asarray(ra, float) % 360.0, "dec": np.asarray(dec, float), "x": found.x, "y": found.y,
        "psfFlux": point.flux * njy, "psfFluxErr": point.flux_err * njy, "apFlux": wide * njy,
        "apFluxErr": wide_err * njy, "halfLight": found.half_light_px * scale, "elongation": found.elongation,
        "extendedness": np.clip(excess / 6.0, 0.0, 1.0), "snr": point.flux / point.flux_err,
        "saturated": (bits & np.uint16(MaskPlane.SAT)) != 0,
    }  # fmt: skip
    return {name: values[good] for name, values in out.items()}


def _encircled(coadd: Exposure, radius: float) -> float:
    """Part of a star's light inside a circle, by the PSF in the middle of the image."""
    ny, nx = coadd.shape
    stamp = np.ascontiguousarray(coadd.psf.stamp((nx - 1) / 2, (ny - 1) / 2), np.float32)
    flux, _, _ = aperture_photometry(
        stamp, np.ones_like(stamp), None, (stamp.shape[1] - 1) / 2, (stamp.shape[0] - 1) / 2, radius
    )
    return float(flux[0] / stamp.sum())


def merge(parts: Sequence[Columns]) -> Columns:
    """Objects of overlapping coadds, each once: of those within an arc second the one with the best PSF flux stays."""
    from scipy.spatial import cKDTree

    from cumbre.payloads.association import unit_vectors

    if not parts:
        return {}
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(-joined["snr"], kind="stable")
    joined = {name: values[order] for name, values in joined.items()}
    chord = 2 * np.sin(np.radians(SAME_ARCSEC / 3600) / 2)
    pairs = cKDTree(unit_vectors(joined["ra"], joined["dec"])).query_pairs(chord, output_type="ndarray")
    keep = np.ones(order.size, bool)
    for first, second in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))] if pairs.size else ():
        if keep[first]:
            keep[second] = False
    return {name: values[keep] for name, values in joined.items()}
