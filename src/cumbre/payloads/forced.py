"""Forced photometry on a difference and its science image, at the places of known objects: rows of DiaForcedSource."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cumbre.core.ids import COUNTER_BITS, source_id
from cumbre.payloads.alert_records import SourceContext
from cumbre.payloads.difference import UNUSABLE
from cumbre.payloads.exposure import MaskPlane
from cumbre.payloads.kernels.detect import light_near
from cumbre.payloads.kernels.photometry import forced_psf_photometry
from cumbre.payloads.kernels.psf import PsfModel
from cumbre.payloads.processing import DifferenceResult, science_flux_error, template_factor, whole_error


def force(
    result: DifferenceResult, context: SourceContext, objects: Sequence[Mapping[str, Any]], *, first: int = 1
) -> list[dict[str, Any]]:
    """Fluxes at the places of all objects on the image, detected or not."""
    exposure = result.exposure
    if not objects or exposure.wcs is None:
        return []
    ra, dec = np.array([o["ra"] for o in objects], float), np.array([o["dec"] for o in objects], float)
    x, y = (
        exposure.wcs.sky2pix(ra, dec)
        if hasattr(exposure.wcs, "sky2pix")
        else exposure.wcs.all_world2pix(ra, dec, 0)
    )
    ny, nx = exposure.shape
    inside = np.flatnonzero(np.isfinite(x) & (x > -0.5) & (y > -0.5) & (x < nx - 0.5) & (y < ny - 0.5))
    pixel = np.rint(y[inside]).astype(int).clip(0, ny - 1), np.rint(x[inside]).astype(int).clip(0, nx - 1)
    inside = inside[(exposure.mask[pixel] & np.uint16(MaskPlane.INJECTED)) == 0]
    inside = inside[: max((1 << COUNTER_BITS) - first, 0)]
    made = result.difference
    scale = result.metrics["snr_scale"]
    on_difference = forced_psf_photometry(
        exposure.image,
        exposure.variance,
        exposure.mask,
        difference_psf(result),
        x[inside],
        y[inside],
        bad_bits=UNUSABLE,
    )
    on_science = forced_psf_photometry(
        made.science.image, made.science.variance, made.science.mask, made.science_psf, x[inside], y[inside],
        bad_bits=int(MaskPlane.unusable()),
    )  # fmt: skip
    row, column = np.rint(y[inside]).astype(int), np.rint(x[inside]).astype(int)
    fwhm = max(made.science_psf.fwhm_px, made.template_psf.fwhm_px)
    light, _ = light_near(made.template.image, column, row, fwhm)
    difference_err = whole_error(
        result.metrics, on_difference.flux_err * scale, on_difference.flux, light * template_factor(made),
        is_inexact=(on_difference.bits & np.uint16(MaskPlane.SUSPECT)) > 0,
    )  # fmt: skip
    science_err = science_flux_error(result.metrics, on_science.flux_err, on_science.flux)
    rows = []
    for k, which in enumerate(inside.tolist()):
        values = on_difference.flux[k], difference_err[k], on_science.flux[k], science_err[k]
        psf, psf_err, science, science_error = (
            float(v) * context.flux_scale if math.isfinite(v) else None for v in values
        )
        rows.append(
            {
                "diaForcedSourceId": source_id(context.visit, context.detector, first + k),
                "diaObjectId": int(objects[which]["diaObjectId"]),
                "ra": float(ra[which]),
                "dec": float(dec[which]),
                "visit": context.visit,
                "detector": context.detector,
                "psfFlux": psf,
                "psfFluxErr": psf_err,
                "midpointMjdTai": context.midpoint_mjd_tai,
                "scienceFlux": science,
                "scienceFluxErr": science_error,
                "band": context.band or None,
                "timeProcessedMjdTai": context.processed_mjd_tai,
                "timeWithdrawnMjdTai": None,
            }
        )
    return rows


def difference_psf(result: DifferenceResult) -> PsfModel:
    """The difference's PSF (science PSF filtered by the decorrelation) as a model for forced photometry."""
    ny, nx = result.exposure.shape
    grid = [(x, y) for y in np.linspace(0, ny - 1, 4) for x in np.linspace(0, nx - 1, 4)]
    stamps = np.stack([result.difference.psf(x, y) for x, y in grid])
    u = np.array([2 * x / max(nx - 1, 1) - 1 for x, _ in grid])
    v = np.array([2 * y / max(ny - 1, 1) - 1 for _, y in grid])
    basis = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=1)
    solution, *_ = np.linalg.lstsq(basis, stamps.reshape(len(grid), -1), rcond=None)
    coefficients = np.ascontiguousarray(solution.reshape(6, *stamps.shape[1:]), dtype=np.float32)
    total = float(stamps.sum(axis=(1, 2)).mean())
    return PsfModel(coefficients, (ny, nx), result.difference.science_psf.fwhm_px, total=total)
